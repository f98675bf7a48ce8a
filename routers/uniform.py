"""Every adapter at the same weight 1/E: the plainest merge there is, and a baseline that routing has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from recycler.routers.base import Gate, Group, Model, Profile, Router, TopK

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class UniformConfig(TopK):
    """All adapters take part."""

    top_k: int | None = None


class Uniform(Router):
    """w_e = 1/E at every site. An adapter that is absent at a site keeps its share, and adds nothing there."""

    Config = UniformConfig
    paper = "Wortsman et al. 2022, Model soups (arXiv:2203.05482), applied to updates"

    @classmethod
    def fit(cls, model: Model, profile: Profile | None, config: UniformConfig) -> Self:
        return cls(model.adapters, config)

    def score(self, group: Group, site: str, x_BTD: Tensor, plan: Any = None) -> Tensor:
        return x_BTD.new_zeros(1, 1, len(self.adapters))

    def gate(self, group: Group) -> Gate:
        return _Constant(len(self.adapters))


class _Constant(Gate):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x_BTD: Tensor, plan: Any = None) -> Tensor:
        return x_BTD.new_zeros(1, 1, 1, self.count)
