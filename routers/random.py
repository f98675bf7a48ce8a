"""Random: gates drawn once, by the adapter's name and the site. It learned nothing, and is what learned gates have to beat.

Score = LN(x)·LN(v)/√d with v ~ N(0, I) of its own for every (adapter, site): about N(0, 1) for every token, the same for the same
token at the same site. A decision is a function of the token, as a learned gate's is, so that what a router gains over this one is
what it learned, and not that it routes.

THOR (Zuo et al. 2021, arXiv:2110.04260) draws its experts anew at every call, which shows that such a baseline is a strong one;
drawn anew, the answer to a prompt would depend on the batch, and on whether there is a KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recycler.routers import columns
from recycler.routers.linear import LinearRouter, Rows
from recycler.routers.protocol import Group, Model, Profile
from recycler.routers.select import Policy

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class RandomConfig(Policy):
    """
    Attributes:
        seed: draws other gates.
    """

    seed: int = 0


class Random(LinearRouter):
    """score = LN(x)·LN(v)/√d, v random. Adapters absent at a site are −∞ there."""

    Config = RandomConfig
    paper = "Zuo et al. 2021, THOR (arXiv:2110.04260), drawn once"
    normalise = True

    @classmethod
    def fit(cls, model: Model, profile: Profile | None, config: RandomConfig) -> Self:
        rows = {}
        for group in model.groups:
            for site in group.sites:
                held = model.factors(site)
                v_ED = torch.zeros(len(model.adapters), group.width)
                offset_E = torch.full((len(model.adapters),), float("-inf"))
                for e, name in enumerate(model.adapters):
                    if name in held:
                        v_ED[e], offset_E[e] = _draw(config.seed, name, site, group.width), 0.0
                rows[site] = Rows(v_ED, offset_E)
        return cls(model.adapters, config, rows)

    def extended(self, model: Model, profile: Profile | None, name: str) -> Self:
        def column(group: Group, site: str) -> Tensor | None:
            return _draw(self.config.seed, name, site, group.width) if name in model.factors(site) else None

        return columns.extended(self, model, name, column)

    def without(self, name: str) -> Self:
        return columns.without(self, name)


def _draw(seed: int, name: str, site: str, width: int) -> Tensor:
    """v [D] of one adapter at one site, LN(v)/√d: nobody else's changes it."""
    key = int.from_bytes(sha256(f"{seed} {name} {site}".encode()).digest()[:7], "big")
    v_D = torch.randn(width, generator=torch.Generator().manual_seed(key))
    return torch.nn.functional.layer_norm(v_D, (width,)) / width**0.5
