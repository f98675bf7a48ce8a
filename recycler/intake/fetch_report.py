"""What became of every source of a fetch: for people as text, for programs as JSON, for scripts as an exit code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recycler.zoo.errors import PartialError, RecycleError
from recycler.zoo.inspect import Receipt, printable

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Fetched:
    """An adapter that was kept or, in a dry run, could be.

    Attributes:
        bytes: the size of its files; in a dry run, of what would be downloaded or read.
        base: the base it is for, None where unknown.
        base_path: the folder that served as a copy of the base, or None.
        kept: whether it is in the zoo now.
        receipt: None in a dry run where the adapter would have to be converted first; then `plan` says so.
        licence: as its card states it, or None.
        converted: how its files were made, where they are not those of the source; see `Entry`.
        forced_base: it declares another base than `base`.
    """

    name: str
    source: str
    revision: str | None
    base: str | None
    base_path: str | None
    bytes: int
    kept: bool
    receipt: Receipt | None
    licence: str | None = None
    converted: Mapping[str, Any] | None = field(default=None, repr=False)
    forced_base: bool = False
    plan: str = ""

    def lines(self) -> list[str]:
        """The receipt and, where nothing was kept, what would come."""
        lines = [f"{self.name}: {self.plan}"] if self.receipt is None else self.receipt.lines()
        if not self.kept:
            targets = f"targets {', '.join(map(printable, self.receipt.targets))}, " if self.receipt else ""
            lines.append(f"  {self.bytes / 1e6:.1f} MB, {targets}base {printable(self.base or 'unknown')}; nothing was kept")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {**vars(self), "receipt": self.receipt.to_json() if self.receipt else None}


@dataclass(frozen=True)
class Failure:
    """A source that was refused or not to be had, and why."""

    name: str
    source: str
    error: RecycleError

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {
            "name": self.name,
            "source": self.source,
            "error": type(self.error).__name__,
            "exit_code": self.error.exit_code,
            "code": self.error.code,
            "docs": self.error.docs,
            "message": str(self.error),
        }


@dataclass(frozen=True)
class FetchReport:
    """What became of every source, in the order they were given.

    Attributes:
        notes: what concerns no single source, such as that a search ended early.
    """

    fetched: tuple[Fetched, ...]
    failures: tuple[Failure, ...] = ()
    dry_run: bool = False
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The adapters that were kept or, in a dry run, could be."""
        return [one.name for one in self.fetched]

    @property
    def bytes(self) -> int:
        """The size of all that came or would come."""
        return sum(one.bytes for one in self.fetched)

    def lines(self) -> list[str]:
        """The report as text: a receipt per adapter, then the failures."""
        lines = [line for one in self.fetched for line in one.lines()]
        return lines + [f"{printable(f.source)}: {f.error} [{f.error.code}]" for f in self.failures] + list(self.notes)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {
            "schema_version": SCHEMA_VERSION,
            "dry_run": self.dry_run,
            "bytes": self.bytes,
            "fetched": [one.to_json() for one in self.fetched],
            "failures": [one.to_json() for one in self.failures],
            "notes": list(self.notes),
        }

    def raise_for_failures(self) -> None:
        """Return where nothing failed.

        Raises:
            PartialError: some succeeded, or all failed for reasons of different kinds.
            RecycleError: all failed for reasons of one kind: an error of that kind, so that a script which
                fetches five gated repositories sees the exit code that one would give.
        """
        if not self.failures:
            return
        total = len(self.fetched) + len(self.failures)
        kinds = {type(f.error) for f in self.failures}
        codes = {f.error.code for f in self.failures}
        kind, code = PartialError, None
        if not self.fetched and len(kinds) == 1:
            (kind,) = kinds  # type: ignore[assignment]
            code = codes.pop() if len(codes) == 1 else None
        listing = "\n".join(f"{printable(f.source)}: {f.error} [{f.error.code}]" for f in self.failures)  # every one by name
        raise kind(
            f"{len(self.failures)} of {total} adapters were not fetched.",
            listing,
            "The others are in the zoo." if self.fetched and not self.dry_run else "",
            code=code,
        )
