"""What a server can be asked for, and which of it a request gets: the request-level reduction of a router.

A server applies one adapter to all of a request. The options are the base, every adapter alone, and the mixtures that the router itself
has in a table, which are exported as adapters of their own. A request gets the option that is nearest to what the router would do:
to its own decision for the prompt, or to the mean share of a router that decides token by token. Near is meant as for distributions,
with the base as one of those among whom the shares are: ½ Σ |w − w'|. Where nobody else is near this is the adapter with the largest
share, or the base where that has more.

Dimensions in names: C row, E adapter, O option.
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


def nearest(weights_E: Tensor, names: Sequence[str], options: Sequence[Option]) -> tuple[Option, float]:
    """The option that is nearest to a mixture, and how far it is (0 to 1 for shares); of equals the first."""
    wanted = _with_base(weights_E)
    tables_OE = torch.stack([_with_base(torch.tensor([float(o.weights.get(n, 0.0)) for n in names])) for o in options])
    distance_O = (tables_OE - wanted).abs().sum(-1) / 2
    best = int(distance_O.argmin())
    return options[best], float(distance_O[best])


def _with_base(weights_E: Tensor) -> Tensor:
    return torch.cat([weights_E.double(), 1 - weights_E.double().sum(-1, keepdim=True)])
