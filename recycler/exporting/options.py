"""What a server can be asked for, and which of it a request gets: the request-level reduction of a router.

A server applies one adapter to all of a request. The options are the base, every adapter alone, and mixtures, which are exported as
adapters of their own: those that the router itself has in a table, and those that prompts of one's own ask for most. A request gets
the option that is nearest to what the router would do:
to its own decision for the prompt, or to the mean share of a router that decides token by token. Near is meant as for distributions,
with the base as one of those among whom the shares are: ½ Σ |w − w'|. Where nobody else is near this is the adapter with the largest
share, or the base where that has more.

Dimensions in names: C row, E adapter, N prompt, O option.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recycler.routers.static import StaticRouter

if TYPE_CHECKING:
    from recycler.routers.base import Router

BASE = "base"
_TOGETHER = (
    3  # adapters in a mixture that prompts ask for: ranks add up, and a server keeps as much room for every other adapter
)
_LEAST = 0.05  # of a share in it


@dataclass(frozen=True)
class Option:
    """One thing that a request can be given.

    Attributes:
        name: an adapter's, ``mix-1`` and so on, or ``base``. weights: adapter → weight; none for the base.
        model: what the server calls it.
    """

    name: str
    weights: Mapping[str, float]
    model: str

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "weights": dict(self.weights), "model": self.model}


def mixtures(router: Router) -> list[dict[str, float]]:
    """The mixtures that a router has in a table, and that are neither one adapter nor the base; no more than once each."""
    rows: list[Tensor] = []
    table_CE = getattr(router, "table_CE", None)
    friends_CC = getattr(router, "friends_CC", None)
    if isinstance(router, StaticRouter):
        rows.append(router.weights_E)
    if isinstance(table_CE, Tensor):
        rows += list(table_CE)
        if isinstance(friends_CC, Tensor):  # a prompt that is not sure gets two friends' rows, half and half
            rows += [(table_CE[c] + table_CE[d]) / 2 for c, d in friends_CC.nonzero().tolist() if c < d]
    found: list[dict[str, float]] = []
    for row_E in rows:
        named = {name: float(f"{w:.6g}") for name, w in zip(router.adapters, row_E.tolist(), strict=True) if abs(w) >= 1e-6}
        if named and list(named.values()) != [1.0] and named not in found:
            found.append(named)
    return found


def asked_for(
    shares_NE: Tensor, names: Sequence[str], given: Sequence[Mapping[str, float]], count: int
) -> list[dict[str, float]]:
    """At most `count` mixtures that, beside those that are `given`, bring prompts nearest to what the router would give them: one after
    the other, each time the one that shortens the way of all prompts together most.

    Args:
        shares_NE: what the router gives each prompt. names: the adapters. given: options that there are already, as weights.
    """
    rows_NE = torch.stack([_cut(share_E) for share_E in shares_NE])
    wanted = _with_base(shares_NE)
    tables_OE = _table(given, names)
    left_N = (torch.cdist(wanted, _with_base(tables_OE), p=1) / 2).min(1).values
    way_NC = torch.cdist(wanted, _with_base(rows_NE), p=1) / 2
    found: list[dict[str, float]] = []
    for _ in range(count):
        gain_C = (left_N[:, None] - way_NC).clamp(min=0).sum(0)
        best = int(gain_C.argmax())
        if float(gain_C[best]) < 1e-6 * len(shares_NE):  # all have what they want
            break
        left_N = torch.minimum(left_N, way_NC[:, best])
        pairs = zip(names, rows_NE[best].tolist(), strict=True)
        found.append({name: float(f"{w:.6g}") for name, w in pairs if w})
    return found


def _cut(share_E: Tensor) -> Tensor:
    """A share's largest few, to which the rest is given in proportion, so that the base keeps what it had."""
    size_K, index_K = share_E.abs().topk(min(_TOGETHER, len(share_E)))
    kept_K = index_K[(size_K >= _LEAST) | (size_K == size_K[0])]
    cut_E = torch.zeros_like(share_E)
    cut_E[kept_K] = share_E[kept_K]
    whole, kept = float(share_E.sum()), float(cut_E.sum())
    return cut_E * (whole / kept) if whole * kept > 0 else cut_E


def nearest(weights_E: Tensor, names: Sequence[str], options: Sequence[Option]) -> tuple[Option, float]:
    """The option that is nearest to a mixture, and how far it is (0 to 1 for shares); of equals the first."""
    wanted = _with_base(weights_E)
    tables_OE = _with_base(_table([one.weights for one in options], names))
    distance_O = (tables_OE - wanted).abs().sum(-1) / 2
    best = int(distance_O.argmin())
    return options[best], float(distance_O[best])


def _with_base(weights_E: Tensor) -> Tensor:
    return torch.cat([weights_E.double(), 1 - weights_E.double().sum(-1, keepdim=True)], -1)


def _table(weights: Sequence[Mapping[str, float]], names: Sequence[str]) -> Tensor:
    """[O, E]"""
    return torch.tensor([[float(one.get(name, 0.0)) for name in names] for one in weights])
