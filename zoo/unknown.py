"""Names that are not in a zoo, and what may have been meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from recycler.zoo.entries import Entries
from recycler.zoo.errors import UsageError, shorten
from recycler.zoo.inspect import printable
from recycler.zoo.manifest import Entry


class UnknownAdapterError(UsageError, KeyError):
    """A name that is not in the zoo; a KeyError too, so that a zoo behaves as a mapping."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


def require(names: Iterable[str], entries: Mapping[str, Entry]) -> None:
    """Raises UnknownAdapterError, naming all that are not there."""
    absent = [name for name in names if name not in entries]
    if absent:
        raise unknown(absent, entries)


def unknown(names: list[str], entries: Mapping[str, Entry]) -> UnknownAdapterError:
    """The error for names that are not there, with close ones first."""
    if isinstance(entries, Entries):
        close = [c for name in names[:20] for c in get_close_matches(name, entries.index.near_names(name), n=3)]
        known, count = [entry.name for entry in entries.index.page(20)], len(entries)
    else:
        close = [c for name in names for c in get_close_matches(name, entries, n=3)]
        known, count = list(entries), len(entries)
    shown = list(dict.fromkeys([*close, *known]))[:20]
    more = f" and {count - len(shown)} more" if count > len(shown) else ""
    return UnknownAdapterError(
        f"Not in the zoo: {shorten(printable(name) for name in names)}.",
        f"It holds: {', '.join(shown)}{more}." if shown else "It holds nothing yet.",
        "Names are listed by: recycle zoo list",
        code="E_UNKNOWN",
    )
