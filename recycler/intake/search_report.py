"""What a search for adapters found, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from recycler.zoo.inspect import printable
from recycler.zoo.preview import Candidate

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class SearchReport:
    """What was found, and what it cost.

    Attributes:
        base: what was asked for. listed_under: the ids whose adapters were listed: the base's own and its aliases'.
        candidates: by the order that was asked for, the largest first.
        scanned: repositories that the Hub's lists held.
        more: whether there are, or may be, further ones behind `limit` or `SCAN_LIMIT`.
        listing_calls, resolver_calls: requests to the Hub. cached: answers from the disk instead.
        stopped: why not all was looked at, for people; None where it was.
        wait_s: after how many seconds the Hub's budget is full again, where it said so.
        notes: what else is worth knowing.
    """

    base: str
    listed_under: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    scanned: int
    more: bool
    listing_calls: int
    resolver_calls: int
    cached: int
    stopped: str | None = None
    wait_s: int | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def complete(self) -> bool:
        """Whether nothing that should have been looked at was left out."""
        return self.stopped is None

    def usable(self, *, convertible: bool = False) -> list[str]:
        """What to fetch: the sources of usable adapters, pinned; with `convertible`, those too that become LoRA by conversion."""
        wanted = ("usable", "convertible") if convertible else ("usable",)
        return [one.source for one in self.candidates if one.verdict in wanted]

    def requests(self) -> str:
        """What it cost, in a line."""
        return (
            f"{_count(self.listing_calls, 'listing call')}, {_count(self.resolver_calls, 'resolver call')}, "
            f"{_count(self.cached, 'answer')} from cache"
        )

    def summary(self) -> list[str]:
        """In lines: how many of which verdict, what stopped it, what else to know, what it cost."""
        lines = []
        if self.candidates:
            verdicts = [one.verdict for one in self.candidates]
            parts = [
                f"{verdicts.count(kind)} {kind}" for kind in ("usable", "convertible", "refused", "unknown") if kind in verdicts
            ]
            lines.append(f"{_count(len(verdicts), 'adapter')} of {printable(self.base)}: {', '.join(parts)}")
        lines += [self.stopped] if self.stopped else []
        return [*lines, *self.notes, f"{repositories(self.scanned)} scanned; {self.requests()}"]

    def __str__(self) -> str:
        rows = [
            f"{one.name}: {one.verdict}" + (f" ({one.reason})" if one.reason != one.verdict else "") for one in self.candidates
        ]
        return "\n".join([*rows, *self.summary()])

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {
            "schema_version": SCHEMA_VERSION,
            "base": self.base,
            "listed_under": list(self.listed_under),
            "complete": self.complete,
            "stopped": self.stopped,
            "wait_s": self.wait_s,
            "scanned": self.scanned,
            "more": self.more,
            "requests": {"listing": self.listing_calls, "resolver": self.resolver_calls, "cached": self.cached},
            "notes": list(self.notes),
            "candidates": [one.to_json() for one in self.candidates],
        }


def repositories(number: int) -> str:
    """``1 repository``, ``2 repositories``"""
    return f"{number:,} {'repository' if number == 1 else 'repositories'}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
