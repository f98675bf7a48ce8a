"""A router of your own, in one file: the adapter whose update is largest.

This is all that a method needs: a frozen dataclass of options, `fit`, `score`, and what saving keeps. Copied into routers/ it is a
method at once. In a package of its own it is one after two lines of that package's pyproject.toml; the name must be the module's::

    [project.entry-points."recycler.routers"]
    my_router = "my_router:MyRouter"

Then `recycle routers` lists it, `recycle build-router my_router -o per_norm=true` builds it, and the functions of
tests/test_conformance.py say whether it keeps what routers promise (tests/test_my_router.py runs them on this file).

Dimensions in names: B batch, T token, D input width, O output width, E adapter, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recycler.routers.base import Router
from recycler.routers.protocol import Group, Model, Profile
from recycler.routers.select import Policy


@dataclass(frozen=True)
class MyConfig(Policy):
    """Fields become Python keywords, `-o key=value` and JSON. Those of Policy say how scores become weights: top_k, temperature, ...

    Attributes:
        per_norm: divide by ‖B‖_F·‖A‖_F, so that strong adapters do not win by their strength alone.
    """

    per_norm: bool = False


class MyRouter(Router):
    """score = ‖B A x‖ [, divided by ‖B‖_F ‖A‖_F]. Adapters absent at a site are −∞ there."""

    Config = MyConfig
    needs = frozenset()  # or {"shots", "scores", ...}: then `fit` always gets a profile
    paper = "nowhere yet"

    def __init__(self, adapters: Any, config: MyConfig) -> None:
        super().__init__(adapters, config)
        self.pairs: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}  # (site, adapter) → A, B

    @classmethod
    def fit(cls, model: Model, profile: Profile | None, config: MyConfig) -> MyRouter:
        """Reads what it needs of the model; it must leave base and adapters as they are."""
        router = cls(model.adapters, config)
        for group in model.groups:
            for site in group.sites:
                for name, held in model.factors(site).items():
                    scale = held.a_RD.norm() * held.b_OR.norm() if config.per_norm else 1.0
                    router.pairs[site, name] = held.a_RD, held.b_OR / scale
        return router

    def score(self, group: Group, site: str, x_BTD: Tensor, plan: Any = None) -> Tensor:
        """[B, T, E], in fp32. A function of the token alone: that is what makes padding, batches and KV caches harmless."""
        scores = []
        for name in self.adapters:
            if (site, name) in self.pairs:
                a_RD, b_OR = (t.to(x_BTD.device) for t in self.pairs[site, name])
                scores.append((x_BTD.float() @ a_RD.T @ b_OR.T).norm(dim=-1))
            else:
                scores.append(torch.full(x_BTD.shape[:-1], -torch.inf, device=x_BTD.device))
        return torch.stack(scores, dim=-1)

    def tensors(self) -> dict[str, Tensor]:
        """What saving keeps, beside adapters and config; `load_tensors` is the inverse."""
        stored = {f"{site}.{name}.a": a_RD for (site, name), (a_RD, _) in self.pairs.items()}
        return stored | {f"{site}.{name}.b": b_OR for (site, name), (_, b_OR) in self.pairs.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for key in tensors:
            site, name, part = key.rsplit(".", 2)
            if part == "a":
                self.pairs[site, name] = tensors[key], tensors[f"{site}.{name}.b"]
