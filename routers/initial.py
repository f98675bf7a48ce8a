"""Gates from shots without training: each adapter's mean input, less what all of them share.

For adapter e let m_e be the mean input over all real tokens of its own tasks' shots. Its direction is m_e − mean over adapters of
m, at length 1; a temperature makes the softmax over scores x·v/T give its first choice a probability of about ½ in the mean.

After mergekit's "hidden" gates. Departures: what is recorded is the input of the routed linear itself (the gate's own input), not
the residual stream; padding does not count; the component that adapters share is taken out.

Dimensions in names: B batch, T token, D input width, E adapter, N sampled tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recycler.routers.chains import Chain, few, labels
from recycler.routers.protocol import Group, Model, Rowwise

_SAMPLE = 1024  # tokens kept to find a temperature on
_SURE = 0.5  # what the first choice should get in the mean


@dataclass
class Start:
    """What shots say about one input.

    Attributes:
        v_ED: directions of length 1; zero for adapters without shots.
        sample_ND: inputs of some tokens, spread evenly over the shots.
    """

    v_ED: Tensor
    sample_ND: Tensor

    def temperature(self, present: Sequence[int]) -> float:
        """The T at which softmax(x·v/T) over the adapters `present` gives its first choice about ½."""
        return temperature(self.sample_ND @ self.v_ED[list(present)].T)


def starts(model: Model, rows: Sequence[Chain], tokens: int, *, normalise: bool) -> dict[str, Start]:
    """Name of each group → its start, from forwards in which each shot runs with its own adapter.

    Args:
        normalise: look at LN(x) instead of x.
    """
    count = len(model.adapters)
    shots = [[shot for _, shot in chain] for chain in rows]
    batches = [(numbers, model.encode([shots[i] for i in numbers])) for numbers in model.batches(shots, tokens)]
    seen: dict[str, Means] = {}
    every = {
        stream: max(sum(int(batch.mask_BT[stream].sum()) for _, batch in batches) // _SAMPLE, 1)
        for stream in batches[0][1].mask_BT
    }
    step = model.progress(len(batches), "activations")
    for numbers, batch in batches:
        told = [rows[i] for i in numbers]
        label_BT = {stream: labels(told, segment_BT) for stream, segment_BT in batch.segment_BT.items()}

        def look(group: Group, x_BTD: Tensor, batch: object = batch, label_BT: object = label_BT) -> Tensor:
            mask = batch.mask_BT[group.stream]  # type: ignore[attr-defined]
            label = label_BT[group.stream]  # type: ignore[index]
            x_ND = x_BTD.reshape(*mask.shape, -1)[mask].float()
            if normalise:
                x_ND = nn.functional.layer_norm(x_ND, x_ND.shape[-1:])
            seen.setdefault(group.name, Means(count)).add(x_ND, label[mask], every[group.stream])
            return nn.functional.one_hot(label, count).float()[:, :, None]

        model.observe(batch, Rowwise(look, few(told)))
        step()
    return {name: means.start() for name, means in seen.items()}


class Means:
    """Running sums of inputs by adapter, and a sample of them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.sum_ED: Tensor | None = None
        self.tokens_E: Tensor | None = None
        self.sample: list[Tensor] = []

    def add(self, x_ND: Tensor, label_N: Tensor, every: int = 1) -> None:
        y_NE = nn.functional.one_hot(label_N, self.count).to(x_ND)
        if self.sum_ED is None or self.tokens_E is None:
            self.sum_ED, self.tokens_E = y_NE.T @ x_ND, y_NE.sum(0)
        else:
            self.sum_ED += y_NE.T @ x_ND
            self.tokens_E += y_NE.sum(0)
        self.sample.append(x_ND[::every])

    def start(self) -> Start:
        assert self.sum_ED is not None and self.tokens_E is not None
        return Start(directions(self.sum_ED, self.tokens_E).cpu(), torch.cat(self.sample).cpu())


def directions(sum_ED: Tensor, tokens_E: Tensor) -> Tensor:
    """Sums of inputs and numbers of tokens → each adapter's mean less the mean of means, at length 1; zero without tokens."""
    known = tokens_E > 0
    mean_ED = sum_ED / tokens_E.clamp(min=1)[:, None]
    centred_ED = (mean_ED - mean_ED[known].mean(0)) * known[:, None]
    # An adapter alone is its own mean: what rounding leaves of nothing is not a direction.
    centred_ED[centred_ED.norm(dim=1) <= 1e-5 * mean_ED.norm(dim=1)] = 0
    return nn.functional.normalize(centred_ED, dim=1)


def temperature(scores_NE: Tensor) -> float:
    """The T at which softmax(scores/T) gives its first choice about ½ in the mean; ¾ of two, which share at least ½; 1 where
    scores do not differ."""
    count = scores_NE.shape[-1]
    if count < 2 or float((scores_NE.amax(-1) - scores_NE.amin(-1)).max()) == 0.0:
        return 1.0
    target = _SURE if count > 2 else 0.75

    def sure(log_t: float) -> float:
        return float((scores_NE / math.exp(log_t)).softmax(-1).amax(-1).mean())

    return math.exp(_bisect(sure, target, -12.0, 12.0))


def _bisect(falling: Callable[[float], float], target: float, low: float, high: float) -> float:
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > target else (low, middle)
    return (low + high) / 2
