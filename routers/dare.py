"""DARE on exact ΔW: drop entries at random, rescale the rest, merge; one adapter comes out.

At a linear, with masks M_e of independent Bernoulli(density) entries (O × D):

    v_e = M_e ⊙ ΔW_e / density      m = Σ_e w_e v_e

so that m is Σ w ΔW in expectation; with ``signs=total`` or ``frequency`` the v_e are merged as in `ties` (DARE-TIES) instead. What
comes out is factorised (options ``rank``, ``energy``; the error is in the report). Noise is not of low rank: at a density far below 1
most of it is lost again with the factorisation, and the rank is what costs memory. A mask is drawn from (seed, linear, adapter), so
that neither the order of adapters nor the presence of others changes it. Biases of B are merged by the same rule.

Yu et al. 2024, Language Models are Super Mario (arXiv:2311.03099). PEFT's ``dare_linear`` and ``dare_ties`` drop in A and B apart, so
that an entry of ΔW is right in expectation but not sparse; its ``*_svd`` kinds are as here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

import torch
from torch import Tensor

from recycler.routers.merging import DenseMerge, ShortConfig, agree, check_density


@dataclass(frozen=True)
class DareConfig(ShortConfig):
    """A merge's options, and:

    Attributes:
        density: the share of entries that is kept.
        signs: "all" adds what is left; "total" and "frequency" elect signs first, as `ties` does.
        seed: of the masks.
    """

    density: float = 0.5
    signs: Literal["all", "total", "frequency"] = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.density)


class Dare(DenseMerge):
    """The sum of randomly dropped and rescaled updates."""

    Config = DareConfig
    paper = "Yu et al. 2024 (arXiv:2311.03099)"

    @classmethod
    def blend(cls, deltas: Iterable[tuple[str, float, Tensor]], total: float, key: str, config: DareConfig) -> Tensor:
        dropped = Dropped(deltas, config.density, f"{config.seed} {key}")
        if config.signs != "all":
            return agree(dropped, total, config.signs)
        merged: Tensor | None = None
        for _, w, v in dropped:
            merged = w * v if merged is None else merged + w * v
        assert merged is not None
        return merged


class Dropped:
    """Deltas of which a random part is kept and rescaled; the same part each time they are gone through."""

    def __init__(self, deltas: Iterable[tuple[str, float, Tensor]], density: float, key: str) -> None:
        self.deltas, self.density, self.key = deltas, density, key

    def __iter__(self) -> Iterator[tuple[str, float, Tensor]]:
        for name, w, delta in self.deltas:
            seed = int.from_bytes(sha256(f"{self.key} {name}".encode()).digest()[:7], "big")
            drawn = torch.rand(delta.shape, generator=torch.Generator().manual_seed(seed))
            yield name, w, torch.where(drawn < self.density, delta / self.density, 0.0)
