"""Routers that give every token the same mixture, whatever it is.

Dimensions in names: B batch, T token, E adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from recycler.routers.base import Gate, Router
from recycler.routers.protocol import Group


class StaticRouter(Router):
    """A router that is one mixture, `weights_E`. An adapter that is absent at a site keeps its share, and adds nothing there."""

    granularity: ClassVar[Literal["token", "sequence", "static"]] = "static"

    def __init__(self, adapters: Sequence[str], config: Any, weights_E: Tensor | None = None) -> None:
        super().__init__(adapters, config)
        self.weights_E = torch.zeros(len(self.adapters)) if weights_E is None else weights_E.float()

    def gate(self, group: Group) -> Gate:
        return _Constant(self.weights_E)

    def score(self, group: Group, site: str, x_BTD: Tensor, plan: Any = None) -> Tensor:
        """The weights [1, 1, E]: nothing is left for a policy to do."""
        return self.weights_E.to(x_BTD.device)[None, None]

    def weights(self, scores_E: Tensor, group: Group | None = None) -> Tensor:
        return scores_E

    def tensors(self) -> dict[str, Tensor]:
        return {"weights": self.weights_E}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.weights_E = tensors["weights"]


class _Constant(Gate):
    weights_E: Tensor

    def __init__(self, weights_E: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights_E", weights_E, persistent=False)

    def forward(self, x_BTD: Tensor, plan: Any = None) -> Tensor:
        return self.weights_E[None, None, None]
