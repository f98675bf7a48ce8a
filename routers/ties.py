"""TIES on exact ΔW: trim, elect signs, average those that agree; one adapter comes out.

At a linear, with v_e = the `density` largest entries of ΔW_e, zero elsewhere (O × D):

    γ = sign Σ_e w_e v_e      m = Σ|w| · Σ_{e ∈ A} w_e v_e / Σ_{e ∈ A} |w_e|,  A = {e : sign(w_e v_e) = γ}, entry by entry

which is factorised (options ``rank``, ``energy``; the error is in the report). At density 1 and one adapter of weight w it is w ΔW.
``signs=frequency`` lets every adapter have one vote. Biases of B are merged by the same rule.

Yadav et al. 2023, TIES-Merging (arXiv:2306.01708). Departures: entries are ranked within a linear, not over the whole model.
PEFT's ``ties`` works on A and B apart, which is no function of ΔW; its ``ties_svd`` elects without the weights, and divides by the
number that agree, which is the same at ``weights=mean``. Costs an SVD of every dense linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from recycler.routers.merging import DenseMerge, ShortConfig, agree, check_density, keep_largest


@dataclass(frozen=True)
class TiesConfig(ShortConfig):
    """A merge's options, and:

    Attributes:
        density: the share of each ΔW's entries that is kept, the largest.
        signs: what elects a sign: the "total" of the entries, or the "frequency" of their signs.
    """

    density: float = 0.2
    signs: Literal["total", "frequency"] = "total"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.density)


class Ties(DenseMerge):
    """The mean of the trimmed entries that have the elected sign."""

    Config = TiesConfig
    paper = "Yadav et al. 2023 (arXiv:2306.01708)"

    @classmethod
    def blend(cls, deltas: Iterable[tuple[str, float, Tensor]], total: float, key: str, config: TiesConfig) -> Tensor:
        return agree(Trimmed(deltas, config.density), total, config.signs)


class Trimmed:
    """Deltas with their largest entries alone, trimmed each time they are gone through."""

    def __init__(self, deltas: Iterable[tuple[str, float, Tensor]], density: float) -> None:
        self.deltas, self.density = deltas, density

    def __iter__(self) -> Iterator[tuple[str, float, Tensor]]:
        return ((name, w, keep_largest(delta, self.density)) for name, w, delta in self.deltas)
