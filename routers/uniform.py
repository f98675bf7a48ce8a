"""Every adapter at the same weight 1/E: the plainest merge there is, and a baseline that routing has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from recycler.routers import columns
from recycler.routers.protocol import Model, Profile
from recycler.routers.static import StaticRouter

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class UniformConfig:
    """Nothing to choose."""


class Uniform(StaticRouter):
    """w_e = 1/E at every site."""

    Config = UniformConfig
    paper = "Wortsman et al. 2022, Model soups (arXiv:2203.05482), applied to updates"

    @classmethod
    def fit(cls, model: Model, profile: Profile | None, config: UniformConfig) -> Self:
        return cls(model.adapters, config, torch.full((len(model.adapters),), 1 / len(model.adapters)))

    def extended(self, model: Model, profile: Profile | None, name: str) -> Self:
        columns.require_next(self, model, name)
        return self.fit(model, profile, self.config)

    def without(self, name: str) -> Self:
        rest = [self.adapters[e] for e in columns.rest(self, name)]
        return type(self)(rest, self.config, torch.full((len(rest),), 1 / len(rest)))
