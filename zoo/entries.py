"""The entries of a large zoo as a mapping that parses none before it is asked for."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, ValuesView

from recycler.zoo.index import Index
from recycler.zoo.manifest import Entry


class Entries(Mapping[str, Entry]):
    """Name → Entry, sorted by name, read from an index as they are asked for."""

    def __init__(self, index: Index) -> None:
        self.index = index

    def __getitem__(self, name: str) -> Entry:
        entry = self.index.get(name) if isinstance(name, str) else None
        if entry is None:
            raise KeyError(name)
        return entry

    def __iter__(self) -> Iterator[str]:
        return iter(self.index.names())

    def __len__(self) -> int:
        return self.index.count()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self.index.ask("SELECT 1 FROM adapters WHERE name = ?", name))

    def items(self) -> ItemsView[str, Entry]:
        return _Items(self)

    def values(self) -> ValuesView[Entry]:
        return _Values(self)

    def stream(self) -> Iterator[Entry]:
        """All entries, some thousand at a time."""
        last = ""
        while some := self.index.after(last):
            yield from some
            last = some[-1].name


class _Items(ItemsView[str, Entry]):
    _mapping: Entries

    def __iter__(self) -> Iterator[tuple[str, Entry]]:
        return ((entry.name, entry) for entry in self._mapping.stream())


class _Values(ValuesView[Entry]):
    _mapping: Entries

    def __iter__(self) -> Iterator[Entry]:
        return self._mapping.stream()
