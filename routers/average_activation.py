"""Average activation: an adapter's gate at a site is the mean input it sees there on its own shots. No gradients.

With the adapter active on its own tasks' shots, the input of each site is averaged over a shot's real tokens, then over shots: c.
The score of a token is LN(x)·LN(c)/√d, √d times their correlation.

From PHATGOOSE's baseline of this name (Muqeeth et al. 2024, arXiv:2402.05859), which puts c where its trained gate is. mttl's
variant (HiddenStateComputer, microsoft/mttl) is ``-o normalise=length``: x as it is, c of length 1, so that a score grows with the
token's norm; and ``-o pool=last`` takes the last token, which mttl finds by counting the mask, as if padding were always on the right.
An adapter without shots of its own has no gate, nor has one a site that it does not touch: −∞.

Shapes: x [B, T, D], c [E, D] per site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from recycler.routers import columns
from recycler.routers.chains import few
from recycler.routers.linear import LinearRouter, Rows
from recycler.routers.protocol import Batch, Function, Group, Model, Profile, Rowwise, own_shots
from recycler.routers.select import Policy
from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class AverageActivationConfig(Policy):
    """
    Attributes:
        pool: a shot's activation is the "mean" of its real tokens', or that of its "last" one.
        normalise: "layer": LayerNorm on both sides. "length": only the centroid, to length 1 (mttl).
        tokens: padded tokens in one forward; the dial for memory.
    """

    pool: Literal["mean", "last"] = "mean"
    normalise: Literal["layer", "length"] = "layer"
    tokens: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1:
            raise UsageError(f"tokens={self.tokens}.", "It is a count.", "Use tokens=1 or more.", code="E_OPTION")


class AverageActivation(LinearRouter):
    """score = LN(x)·LN(c)/√d, c the mean input on the adapter's own shots. Adapters absent at a site are −∞ there."""

    Config = AverageActivationConfig
    needs = frozenset({"shots", "scores"})
    paper = "Muqeeth et al. 2024 (arXiv:2402.05859), its baseline; mttl (arXiv:2405.11157)"

    def __init__(self, adapters: Sequence[str], config: Any, rows: Mapping[str, Rows] | None = None) -> None:
        super().__init__(adapters, config, rows)
        self.normalise = config.normalise == "layer"

    @classmethod
    def fit(cls, model: Model, profile: Profile, config: AverageActivationConfig) -> Self:
        shots = own_shots(model, profile)
        centroids = _centroids(model, shots, config)
        seen = {e for e, _ in shots}
        rows = {}
        for group in model.groups:
            v_ED = _rows(centroids[group.name], config)
            for site in group.sites:
                held = model.factors(site)
                absent_E = torch.tensor([name not in held or e not in seen for e, name in enumerate(model.adapters)])
                rows[site] = Rows(
                    v_ED.masked_fill(absent_E[:, None], 0.0),
                    torch.zeros(len(v_ED)).masked_fill(absent_E, float("-inf")),
                )
        router = cls(model.adapters, config, rows)
        without = [name for e, name in enumerate(model.adapters) if e not in seen]
        router.report = {"rows": len(shots), "without_shots": without}
        return router

    def extended(self, model: Model, profile: Profile, name: str) -> Self:
        columns.require_next(self, model, name)
        new = len(self.adapters)
        shots = [(new, shot) for task in profile.own.get(name, ()) for shot in profile.shots[task]]
        centroids = _centroids(model, shots, self.config)

        def column(group: Group, site: str) -> Tensor | None:
            return _rows(centroids[group.name], self.config)[new] if shots and name in model.factors(site) else None

        router = columns.extended(self, model, name, column)
        without = [*self.report.get("without_shots", []), *([] if shots else [name])]
        router.report = {"rows": self.report.get("rows", 0) + len(shots), "without_shots": without}
        return router

    def without(self, name: str) -> Self:
        return columns.without(self, name)


def _rows(centroid_ED: Tensor, config: AverageActivationConfig) -> Tensor:
    """Centroids → rows of the gate."""
    width = centroid_ED.shape[-1]
    if config.normalise == "layer":
        normalised_ED = torch.nn.functional.layer_norm(centroid_ED, (width,))
    else:
        normalised_ED = torch.nn.functional.normalize(centroid_ED, dim=-1)
    return normalised_ED / width**0.5


def _centroids(model: Model, shots: Sequence[tuple[int, Any]], config: AverageActivationConfig) -> dict[str, Tensor]:
    """Name of each group → the mean over an adapter's shots of their pooled inputs [E, D], fp32; zero without shots."""
    count = len(model.adapters)
    sums = {group.name: torch.zeros(count, group.width, dtype=torch.float64) for group in model.groups}
    batches = list(model.batches([[shot] for _, shot in shots], config.tokens))
    step = model.progress(len(batches), "activations")
    for numbers in batches:
        batch = model.encode([[shots[i][1]] for i in numbers])
        adapter_B = torch.tensor([shots[i][0] for i in numbers])
        look = _tap(batch, adapter_B, count, sums, config.pool)
        model.observe(batch, Rowwise(look, few([[shots[i]] for i in numbers])))
        step()
    shots_E = torch.bincount(torch.tensor([e for e, _ in shots], dtype=torch.long), minlength=count).clamp(min=1)
    return {name: (sum_ED / shots_E[:, None]).float() for name, sum_ED in sums.items()}


def _tap(batch: Batch, adapter_B: Tensor, count: int, sums: Mapping[str, Tensor], pool: str) -> Function:
    """A mixture that gives each row its own adapter, and looks at the inputs on the way."""
    active_BE = torch.nn.functional.one_hot(adapter_B, count).float().to(batch.labels_BT.device)

    def weights(group: Group, x_BTD: Tensor) -> Tensor:
        mask_BT = batch.mask_BT[group.stream]
        if pool == "last":
            last_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device) * mask_BT
            mask_BT = torch.nn.functional.one_hot(last_BT.argmax(1), mask_BT.shape[1]).bool()
        sum_BD = x_BTD.float().masked_fill(~mask_BT[..., None], 0.0).sum(1)
        sums[group.name].index_add_(0, adapter_B, (sum_BD / mask_BT.sum(1)[:, None]).double().cpu())
        return active_BE[:, None, None]

    return weights
