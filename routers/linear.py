"""Routers whose score is linear in a token's input at a site: Arrow, PHATGOOSE, ridge and their kin.

Dimensions in names: B batch, T token, D input width, E adapter, S site of a group, N rows of a group (sites × adapters).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recycler.routers.base import Gate, Router
from recycler.routers.protocol import Group
from recycler.zoo.errors import InputError


@dataclass
class Rows:
    """The linear gate of one site: scores = (|x̂·v| or x̂·v) + offset.

    Attributes:
        v_ED: one row per adapter, every constant factor folded in.
        offset_E: added to the scores; −∞ removes an adapter that is absent at this site.
    """

    v_ED: Tensor
    offset_E: Tensor | None = None


class LinearRouter(Router):
    """A router whose score is linear in the token's input at the site: Arrow, PHATGOOSE, ridge and their kin.

    A subclass fills `rows` (site → Rows) and says how x is normalised. Rows given only for the first site of a group serve
    the whole group; rows for every site give each its own gate. Either way a group costs one small fp32 GEMM. A group without
    rows reuses the decision of the group it runs after.
    """

    normalise: bool = False  # non-affine LayerNorm (eps 1e-5) of x first
    absolute: bool = False

    def __init__(self, adapters: Sequence[str], config: Any, rows: Mapping[str, Rows] | None = None) -> None:
        super().__init__(adapters, config)
        self.rows = dict(rows or {})

    def gate(self, group: Group) -> Gate | None:
        own = [site for site in group.sites if site in self.rows]
        if not own and group.after in self.rows:
            return None
        if own != list(group.sites) and own != [group.sites[0]]:
            missing = [s for s in group.sites if s not in self.rows]
            raise InputError(
                f"The router has no gate for {', '.join(missing)}.",
                "It was built for other adapters or for another base.",
                "Build it again for this zoo.",
                code="E_ROUTER",
            )
        return LinearGate([self.rows[site] for site in own], self.normalise, self.absolute)

    def score(self, group: Group, site: str, x_BTD: Tensor, plan: Any = None) -> Tensor:
        rows = self.rows[site if site in self.rows else group.sites[0]]
        return LinearGate([rows], self.normalise, self.absolute).to(x_BTD.device)(x_BTD)[..., 0, :]

    def tensors(self) -> dict[str, Tensor]:
        stored = {f"{site}.gate": rows.v_ED for site, rows in self.rows.items()}
        stored |= {f"{site}.offset": rows.offset_E for site, rows in self.rows.items() if rows.offset_E is not None}
        return stored

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        sites = [key.removesuffix(".gate") for key in tensors if key.endswith(".gate")]
        self.rows = {site: Rows(tensors[f"{site}.gate"], tensors.get(f"{site}.offset")) for site in sites}
        wrong = [s for s, r in self.rows.items() if r.v_ED.ndim != 2 or r.v_ED.shape[0] != len(self.adapters)]
        if wrong:
            raise InputError(
                f"The gates at {wrong[0]} are not one row per adapter.", "", "Build the router again.", code="E_ROUTER"
            )


_EPSILON = 1e-5  # of layer_norm


class LinearGate(Gate):
    """Scores of one group, [.., S or 1, E], from rows stacked over its sites."""

    v_ND: Tensor
    offset_N: Tensor | None

    def __init__(self, rows: Sequence[Rows], normalise: bool, absolute: bool) -> None:
        super().__init__()
        self.normalise, self.absolute = normalise, absolute
        self.shape = (len(rows), rows[0].v_ED.shape[0])
        self.register_buffer("v_ND", torch.cat([r.v_ED.float() for r in rows]), persistent=False)
        offset = None
        if any(r.offset_E is not None for r in rows):
            zero = torch.zeros(self.shape[1])
            offset = torch.cat([zero if r.offset_E is None else r.offset_E.float() for r in rows])
        self.register_buffer("offset_N", offset, persistent=False)

    def forward(self, x_BTD: Tensor, plan: Any = None) -> Tensor:
        x_BTD = x_BTD.float()
        if self.normalise:
            x_BTD = nn.functional.layer_norm(x_BTD, x_BTD.shape[-1:])
        # Few operations on purpose: at one token a step, each costs as much as a small GEMM.
        if self.absolute or self.offset_N is None:
            return self._scores(nn.functional.linear(x_BTD, self.v_ND))
        return nn.functional.linear(x_BTD, self.v_ND, self.offset_N).view(*x_BTD.shape[:-1], *self.shape)

    def rows(self) -> Tensor:
        """[N, D]: what x itself is multiplied with where `finish` comes after. LN(x)·v = x·(v − its mean)/σ(x)."""
        return self.v_ND - self.v_ND.mean(-1, keepdim=True) if self.normalise else self.v_ND

    def finish(self, product_BTN: Tensor, x_BTD: Tensor) -> Tensor:
        """The scores, from x·rowsᵀ in fp32."""
        if self.normalise:
            product_BTN = product_BTN * (x_BTD.float().var(-1, unbiased=False, keepdim=True) + _EPSILON).rsqrt()
        return self._scores(product_BTN)

    def _scores(self, product_BTN: Tensor) -> Tensor:
        scores_N = product_BTN.abs() if self.absolute else product_BTN
        if self.offset_N is not None:
            scores_N = scores_N + self.offset_N
        return scores_N.unflatten(-1, self.shape)
