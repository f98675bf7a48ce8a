"""What a doctor writes down: findings, ranked by how likely they are the cause."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from recycler.zoo.errors import RecycleError
from recycler.zoo.inspect import printable

Level = Literal["problem", "suspicion", "ok"]
LEVELS: tuple[Level, ...] = ("problem", "suspicion", "ok")
# What explains most comes first: on another base nothing else means anything, and with damaged weights little does.
CAUSES = (
    "installation", "model", "weights", "base", "tokenizer", "template", "adapters", "router", "quantisation", "dtype", "sampling",
    "prompts", "zoo", "versions", "device", "encoder", "disk", "hub",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        about: one of `CAUSES`.
        what, why, fix: what was found, what it does, and what to do; an ``ok`` has the first only.
        code: an error code (`recycler.zoo.error_codes`) where there is one.
        subject: the adapter that it is about, where it is about one.
    """

    level: Level
    about: str
    what: str
    why: str = ""
    fix: str = ""
    code: str | None = None
    subject: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return asdict(self)


class Notes:
    """Findings as they come."""

    def __init__(self) -> None:
        self.found: list[Finding] = []

    def problem(self, about: str, what: str, why: str = "", fix: str = "", **more: Any) -> None:
        self.found.append(Finding("problem", about, what, why, fix, **more))

    def suspect(self, about: str, what: str, why: str = "", fix: str = "", **more: Any) -> None:
        self.found.append(Finding("suspicion", about, what, why, fix, **more))

    def ok(self, about: str, what: str) -> None:
        self.found.append(Finding("ok", about, what))

    def error(self, about: str, error: RecycleError, subject: str | None = None) -> None:
        self.problem(about, error.what, error.why, error.fix, code=error.code, subject=subject)

    @contextmanager
    def during(self, about: str) -> Iterator[None]:
        """Whatever is raised within becomes a finding: a doctor that falls over helps nobody."""
        try:
            yield
        except RecycleError as error:
            self.error(about, error)
        except Exception as error:
            self.problem(about, f"This could not be examined: {type(error).__name__}: {printable(error, 300)}.",
                         fix="If it stays so, report it with the output of: recycle env", code="E_UNEXPECTED")  # fmt: skip

    def ranked(self) -> list[Finding]:
        """Problems first, then suspicions; of each the likeliest cause first."""
        return sorted(self.found, key=lambda f: (LEVELS.index(f.level), CAUSES.index(f.about)))
