"""One adapter more or less, where every adapter is a column of its own: the others' stay as they are, to the bit.

Dimensions in names: D input width, E adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from recycler.routers.base import Router
from recycler.routers.linear import LinearRouter, Rows
from recycler.routers.protocol import Group, Model
from recycler.zoo.errors import UsageError

R = TypeVar("R", bound=LinearRouter)
Changed = TypeVar("Changed", bound=Router)


def require_next(router: Router, model: Model, name: str) -> None:
    """Raises UsageError unless `model` holds the router's adapters, in their order, and `name` after them."""
    if tuple(model.adapters) != (*router.adapters, name):
        raise UsageError(
            f"The model's adapters are {', '.join(model.adapters)}.",
            "They must be this router's, in order, and the new one last.",
            "",
        )


def rest(router: Router, name: str) -> list[int]:
    """The numbers of all adapters but `name`.

    Raises:
        UsageError: there is no such adapter, or no other.
    """
    if name not in router.adapters:
        raise UsageError(f"This router has no adapter {name}.", "", f"It has {', '.join(router.adapters)}.", code="E_UNKNOWN")
    if len(router.adapters) == 1:
        raise UsageError(
            f"{name} is this router's only adapter.", "Without any there is nothing to route to.", "", code="E_FIXED"
        )
    return [e for e, other in enumerate(router.adapters) if other != name]


def extended(router: R, model: Model, name: str, column: Callable[[Group, str], Tensor | None]) -> R:
    """The same linear router with `name` as its last column.

    Args:
        column: (group, site) → the new adapter's row v_D; None where it has no gate, which then scores −∞. At sites that the
            router did not know nobody else has one either.
    """
    require_next(router, model, name)
    rows = {}
    for group in model.groups:
        for site in group.sites:
            old = router.rows.get(site) or absent(len(router.adapters), group.width)
            v_D = column(group, site)
            one = absent(1, group.width) if v_D is None else Rows(v_D[None], torch.zeros(1))
            rows[site] = Rows(torch.cat([old.v_ED, one.v_ED]), torch.cat([_offset(old), _offset(one)]))
    return keeping(router, type(router)(model.adapters, router.config, rows))


def without(router: R, name: str) -> R:
    """The same linear router without the column of `name`; sites that nobody else touches go with it."""
    keep = rest(router, name)
    rows = {site: Rows(r.v_ED[keep], None if r.offset_E is None else r.offset_E[keep]) for site, r in router.rows.items()}
    silent_E = torch.stack([_offset(r) == float("-inf") for r in rows.values()]).all(0)
    if not silent_E.any():  # an adapter without any gate may touch a site all the same
        rows = {site: r for site, r in rows.items() if (_offset(r) > float("-inf")).any()}
    return keeping(router, type(router)([router.adapters[e] for e in keep], router.config, rows))


def keeping(router: Router, changed: Changed) -> Changed:
    """The changed router with what the old one knew beside its columns."""
    changed.facts, changed.thresholds = dict(router.facts), dict(router.thresholds)
    return changed


def absent(count: int, width: int) -> Rows:
    """Rows of adapters that have no gate at a site."""
    return Rows(torch.zeros(count, width), torch.full((count,), float("-inf")))


def _offset(rows: Rows) -> Tensor:
    return torch.zeros(len(rows.v_ED)) if rows.offset_E is None else rows.offset_E
