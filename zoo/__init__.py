"""Adapters at rest: files, formats, the Hub, safety. Knows nothing of routing and loads no base model.

Names are imported on first use, so that ``import recycler.zoo`` stays instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recycler.zoo.adapter import Adapter as Adapter
    from recycler.zoo.adapter import Factors as Factors
    from recycler.zoo.inspect import Receipt as Receipt
    from recycler.zoo.manifest import Entry as Entry
    from recycler.zoo.store import Zoo as Zoo

_HOMES = {
    "Adapter": "adapter",
    "Factors": "adapter",
    "Receipt": "inspect",
    "Entry": "manifest",
    "Zoo": "store",
}
__all__ = ["Adapter", "Entry", "Factors", "Receipt", "Zoo"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
