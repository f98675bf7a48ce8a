"""Single: one adapter for everything, or the base where that is as good. What routing has to beat.

w_e = 1 for the adapter that is named, else for the profile's best single one (highest mean exact match over all tasks' shots where
answers were generated, else lowest mean NLL); 0 for all others, and for all where the base itself is best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from recycler.routers import columns
from recycler.routers.protocol import Model, Profile
from recycler.routers.static import StaticRouter
from recycler.zoo.errors import UsageError, choices

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class SingleConfig:
    """
    Attributes:
        adapter: the one to use; the profile's best when None.
    """

    adapter: str | None = None


class Single(StaticRouter):
    """w = the one-hot of one adapter; zero where the profile says that nobody beats the base."""

    Config = SingleConfig
    needs = frozenset({"scores"})
    paper = "the baseline that every comparison of routers needs"
    abstains = True

    @classmethod
    def needed(cls, config: SingleConfig) -> frozenset[str]:
        """Nothing of a profile's own tasks: where nobody has any, the base is the answer. `fit` says when there is no profile."""
        return frozenset()

    @classmethod
    def fit(cls, model: Model, profile: Profile | None, config: SingleConfig) -> Self:
        if config.adapter is None and profile is None:
            raise UsageError(
                "single uses one adapter everywhere, and was not told which.",
                "A profile says which is the best one.",
                "Add --profile NAME, or name it: -o adapter=NAME",
                code="E_NEEDS_PROFILE",
            )
        chosen = config.adapter if config.adapter is not None or profile is None else profile.best_single
        if chosen is not None and chosen not in model.adapters:
            raise UsageError(
                f"There is no adapter {chosen!r} to use.", "", f"Choose {choices(model.adapters)}.", code="E_UNKNOWN"
            )
        weights_E = torch.tensor([float(name == chosen) for name in model.adapters])
        router = cls(model.adapters, config, weights_E)
        router.report = {"adapter": chosen or "base"}
        return router

    def extended(self, model: Model, profile: Profile | None, name: str) -> Self:
        """It keeps to its adapter; whether the new one is better, a new build says."""
        columns.require_next(self, model, name)
        return type(self)(model.adapters, self.config, torch.nn.functional.pad(self.weights_E, (0, 1)))

    def without(self, name: str) -> Self:
        keep = columns.rest(self, name)
        if self.weights_E[self.adapters.index(name)]:
            raise UsageError(
                f"{name} is the adapter that this router uses.",
                "Without it nothing is left.",
                "Build it again.",
                code="E_FIXED",
            )
        return type(self)([self.adapters[e] for e in keep], self.config, self.weights_E[keep])
