"""Weighted average, or sum, of updates: y = W x + Σ_e w_e B_e A_e x, the adapters as they are, exact for every kind.

``weights=mean`` is w_e = 1/E (the uniform baseline), ``weights=sum`` with a ``scale`` λ is task arithmetic, w_e = λ (Ilharco et al.
2022, arXiv:2212.04089), and weights by name are taken as they are. An adapter that is absent at a linear adds nothing there and
keeps its share.

PEFT's ``add_weighted_adapter(..., "linear")`` is something else: it adds √w-weighted A's and B's, so that every A meets every B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from recycler.routers.merging import MergeConfig
from recycler.routers.protocol import Model
from recycler.routers.static import StaticRouter
from recycler.zoo.errors import UsageError, choices

if TYPE_CHECKING:
    from typing_extensions import Self


class Average(StaticRouter):
    """w_E of the config, at every site and token."""

    Config = MergeConfig
    paper = "Wortsman et al. 2022 (arXiv:2203.05482); Ilharco et al. 2022 (arXiv:2212.04089)"
    simplex = False

    @classmethod
    def fit(cls, model: Model, profile: Any, config: MergeConfig) -> Self:
        return cls._of(model.adapters, config)

    @classmethod
    def _of(cls, adapters: Sequence[str], config: MergeConfig) -> Self:
        mixture = config.mixture(adapters)
        return cls(adapters, config, torch.tensor([mixture.get(name, 0.0) for name in adapters]))

    def extended(self, model: Model, profile: Any, name: str) -> Self:
        """Where weights are by name, a new adapter has none."""
        return self._of(model.adapters, self.config)

    def without(self, name: str) -> Self:
        if name not in self.adapters:
            raise UsageError(
                f"There is no adapter {name} in this router.", "", f"Choose {choices(self.adapters)}.", code="E_UNKNOWN"
            )
        keep = [e for e, other in enumerate(self.adapters) if other != name]
        rest = [self.adapters[e] for e in keep]
        if self.config.weights in ("mean", "sum"):
            return self._of(rest, self.config)
        return type(self)(rest, self.config, self.weights_E[keep])
