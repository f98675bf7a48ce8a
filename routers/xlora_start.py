"""Where the classifier of `recycler.routers.xlora` starts, and the states that it is fitted on.

Dimensions in names: B batch, T token, H hidden width, E adapter, N tokens of all rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recycler.routers.chains import Chain, labels
from recycler.routers.initial import Means, temperature
from recycler.routers.protocol import Model

Linear = tuple[Tensor, Tensor]  # weight [out, in], bias [out]


class States:
    """The bare base's states of rows, computed once.

    Attributes:
        rows: [T, H] of each row's real tokens, fp32, on the CPU.
        label_T: of each row, the adapter whose token it is.
    """

    def __init__(self, model: Model, rows: Sequence[Chain], tokens: int) -> None:
        self.rows: list[Tensor] = [torch.empty(0)] * len(rows)
        self.label_T: list[Tensor] = [torch.empty(0)] * len(rows)
        shots = [[shot for _, shot in chain] for chain in rows]
        batches = list(model.batches(shots, tokens))
        step = model.progress(len(batches), "states")
        for numbers in batches:
            batch = model.encode([shots[i] for i in numbers])
            states_BTH, mask_BT = model.states(batch.inputs)
            label_BT = labels([rows[i] for i in numbers], batch.segment_BT["input"])
            self.device = states_BTH.device
            for i, states_TH, label_T, mask_T in zip(numbers, states_BTH, label_BT, mask_BT, strict=True):
                self.rows[i], self.label_T[i] = states_TH[mask_T].cpu(), label_T[mask_T].cpu()
            step()

    def padded(self, numbers: Sequence[int], mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The states [B, T, H] of rows as a batch of them is padded, and its mask."""
        real_NH = torch.cat([self.rows[i] for i in numbers]).to(mask_BT.device)
        states_BTH = real_NH.new_zeros(*mask_BT.shape, real_NH.shape[-1])
        states_BTH[mask_BT] = real_NH
        return states_BTH, mask_BT


def start(model: Model, shown: States, names: Sequence[str], config: Any, seed: int) -> tuple[list[Linear], dict[str, Linear]]:
    """Trunk and heads before training. Draws do not depend on how adapters are numbered."""
    if config.init == "random":
        return _random(model, names, config, seed)
    x_NH, label_N = torch.cat(shown.rows), torch.cat(shown.label_T)
    if config.normalise:
        x_NH = nn.functional.layer_norm(x_NH, x_NH.shape[-1:])
    count = len(model.adapters)
    if config.init == "shots":
        means = Means(count)
        means.add(x_NH, label_N, max(len(x_NH) // 1024, 1))
        found = means.start()
        known = sorted(set(label_N.tolist()))
        head = (found.v_ED / temperature(found.sample_ND @ found.v_ED[known].T), torch.zeros(count))
    else:
        head = _least_squares(x_NH, label_N, count, config)
    unknown = torch.bincount(label_N, minlength=count) == 0
    weight_EH, bias_E = head[0], head[1].masked_fill(unknown, float("-inf"))  # a 0 would beat whoever scores below it
    return [], {name: (weight_EH.clone(), bias_E.clone()) for name in names}


def _least_squares(x_NH: Tensor, label_N: Tensor, count: int, config: Any) -> Linear:
    """W and b of T·(G + λI)⁻¹C as in `recycler.routers.ridge`, tokens weighed half-way between counting them and adapters."""
    tokens_E = torch.bincount(label_N, minlength=count).double()
    weight_N = (tokens_E[tokens_E > 0].mean() / tokens_E[label_N]).sqrt()
    x_NH = nn.functional.pad(x_NH, (0, 1), value=1.0).double()
    weighted_NH = x_NH * weight_N[:, None]
    gram = weighted_NH.T @ x_NH
    gram.diagonal().add_(config.ridge)
    cross = weighted_NH.T @ nn.functional.one_hot(label_N, count).double()
    w = torch.cholesky_solve(cross, torch.linalg.cholesky(gram)).float() * config.sharpness
    return w[:-1].T.contiguous(), w[-1].contiguous()


def _random(model: Model, names: Sequence[str], config: Any, seed: int) -> tuple[list[Linear], dict[str, Linear]]:
    """PyTorch's own start of a linear layer: uniform in ±1/√(inputs)."""
    trunk: list[Linear] = []
    width = model.width
    for number in range(config.depth - 1):
        trunk.append(_uniform(f"xlora {seed} trunk {number}", config.size, width))
        width = config.size
    heads = {}
    for name in names:
        rows = [_uniform(f"xlora {seed} {name} {adapter}", 1, width) for adapter in model.adapters]
        heads[name] = (torch.cat([w for w, _ in rows]), torch.cat([b for _, b in rows]))
    return trunk, heads


def _uniform(seed: str, out: int, width: int) -> Linear:
    rng = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
    bound = 1 / math.sqrt(width)
    return (torch.rand(out, width, generator=rng) * 2 - 1) * bound, (torch.rand(out, generator=rng) * 2 - 1) * bound
