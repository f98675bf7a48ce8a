"""Magnitude pruning on exact ΔW: each update's largest entries, added up; one adapter comes out.

At a linear m = Σ_e w_e v_e, v_e = the `density` largest entries of ΔW_e, zero elsewhere (O × D): TIES without its election, and
without the mean over those that are there. m is factorised (options ``rank``, ``energy``; the error is in the report). Biases of B are
merged by the same rule.

PEFT's ``magnitude_prune`` prunes A and B apart, which is no function of ΔW; its ``magnitude_prune_svd`` is as here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from recycler.routers.merging import DenseMerge, ShortConfig, check_density, keep_largest


@dataclass(frozen=True)
class PruneConfig(ShortConfig):
    """A merge's options, and:

    Attributes:
        density: the share of each ΔW's entries that is kept, the largest.
    """

    density: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.density)


class MagnitudePrune(DenseMerge):
    """The sum of the largest entries of each update."""

    Config = PruneConfig
    paper = "Mangrulkar et al., PEFT (add_weighted_adapter, magnitude_prune)"

    @classmethod
    def blend(cls, deltas: Iterable[tuple[str, float, Tensor]], total: float, key: str, config: PruneConfig) -> Tensor:
        merged: Tensor | None = None
        for _, w, delta in deltas:
            v = w * keep_largest(delta, config.density)
            merged = v if merged is None else merged + v
        assert merged is not None
        return merged
