"""PHATGOOSE: one sigmoid gate per adapter and site, trained on the adapter's own tasks; a softmax over all of them at inference.

Muqeeth et al. 2024, Learning to Route Among Specialized Experts for Zero-Shot Generalization (arXiv:2402.05859).

Training, adapter e alone: y = W x + σ(v·x) · ΔW_e x, on the raw x, v from zero (so the gate starts at ½), language-model loss on
the completions. Inference: score = LN(x)·LN(v)/√d, which is √d times the correlation of x and v. That training and inference
differ is the method.

The gates of different adapters are independent columns, so a batch holds rows of many adapters, each forced to its own, and one
backward serves them all. An adapter without shots of its own has no gate: its score is −∞, not the 0 that a zero gate would give
(0 beats every gate that correlates negatively).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recycler.routers.linear import LinearRouter, Rows
from recycler.routers.protocol import Group, Model, Profile, own_shots
from recycler.routers.select import Policy
from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class PhatgooseConfig(Policy):
    """
    Attributes:
        steps: optimiser steps. The paper takes 100 of 1024 rows each, at a learning rate of 5e-3.
        rows: rows in a step, over all adapters.
        lr: AdamW's learning rate. With so few rows a step a higher one gets further: on twelve real adapters the routed model's
            held-in exact match is 0.33 at 5e-3 and 0.35 at 2e-2 to 3e-2, in the same number of steps.
        tokens: padded tokens in one forward and backward, the dial for memory; a step is split into rows of like length.
    """

    steps: int = 45
    rows: int = 24
    lr: float = 3e-2
    tokens: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.rows < 1 or not self.lr > 0:
            raise UsageError("steps, rows and lr must be positive.", "", "")


class Phatgoose(LinearRouter):
    """score = LN(x)·LN(v)/√d. Adapters absent at a site have no gate there and are −∞."""

    Config = PhatgooseConfig
    needs = frozenset({"shots", "scores"})
    paper = "Muqeeth et al. 2024 (arXiv:2402.05859)"
    normalise = True

    @classmethod
    def fit(cls, model: Model, profile: Profile, config: PhatgooseConfig) -> Self:
        rows = own_shots(model, profile)
        gates = _Gates(model.groups, len(model.adapters))
        losses = _train(model, gates, rows, config, profile.seed)
        trained = {e for e, _ in rows}
        router = cls(model.adapters, config)
        for group in model.groups:
            for s, site in enumerate(group.sites):
                present = [e for e, name in enumerate(model.adapters) if name in model.factors(site) and e in trained]
                router.rows[site] = _rows(gates.v[gates.number[group.name]].detach()[s], present)
        router.report = {
            "rows": len(rows),
            "loss": {"first": round(losses[0], 4), "last": round(losses[-1], 4)},
            "without_gate": [name for e, name in enumerate(model.adapters) if e not in trained],
        }
        return router


def _rows(v_ED: Tensor, present: Sequence[int]) -> Rows:
    """Inference rows of one site: LN(v)/√d, −∞ for adapters that are absent or untrained.

    A trained gate that stayed exactly zero would normalise to zero anyway."""
    width = v_ED.shape[-1]
    offset_E = torch.full((len(v_ED),), float("-inf"))
    offset_E[list(present)] = 0.0
    # LN's epsilon (1e-5, as released) matters for small gates; keep it.
    return Rows((nn.functional.layer_norm(v_ED, (width,)) / math.sqrt(width)).cpu(), offset_E)


class _Gates(nn.Module):
    """v [S, E, D] per group, trained; as a mixture it gives each row its own adapter at weight σ(v·x)."""

    def __init__(self, groups: Sequence[Group], count: int) -> None:
        super().__init__()
        self.number = {group.name: i for i, group in enumerate(groups)}
        self.v = nn.ParameterList(torch.zeros(len(group.sites), count, group.width) for group in groups)
        self.one_hot_BE = torch.zeros(0, count)

    def mixture(self, group: Group, x_BTD: Tensor) -> Tensor:
        v_SED = self.v[self.number[group.name]]
        one_hot_BE = self.one_hot_BE
        v_BSD = torch.einsum("be,sed->bsd", one_hot_BE, v_SED)
        gate_BTS = torch.sigmoid(torch.einsum("btd,bsd->bts", x_BTD.float(), v_BSD))
        return gate_BTS[..., None] * one_hot_BE[:, None, None, :]


def _train(model: Model, gates: _Gates, rows: Sequence[tuple[int, Any]], config: PhatgooseConfig, seed: int) -> list[float]:
    """Mean loss of each step. Every pass over the rows visits each once, in a seeded order."""
    rng = random.Random(f"phatgoose {seed}")
    optimiser = torch.optim.AdamW(gates.parameters(), lr=config.lr, weight_decay=0.0, eps=1e-8)
    step = model.progress(config.steps, "gates")
    losses: list[float] = []
    pool: list[tuple[int, Any]] = []
    for _ in range(config.steps):
        while len(pool) < min(config.rows, len(rows)):
            pool += rng.sample(list(rows), len(rows))
        chosen, pool = pool[: config.rows], pool[config.rows :]
        optimiser.zero_grad(set_to_none=True)
        total = 0.0
        for part in model.batches([[shot] for _, shot in chosen], config.tokens):
            batch = model.encode([[chosen[i][1]] for i in part])
            device = batch.labels_BT.device
            gates.to(device)
            numbers = torch.tensor([chosen[i][0] for i in part], device=device)
            gates.one_hot_BE = nn.functional.one_hot(numbers, len(model.adapters)).float()
            loss_BT = model.nll(batch, gates.mixture)
            # The mean per row: no adapter's long completions may outvote another's short ones.
            loss = (loss_BT.sum(1) / (batch.labels_BT != -100).sum(1)).sum() / len(chosen)
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
        optimiser.step()
        losses.append(total)
        step(1, f"loss {losses[-1]:.3f}")
    return losses
