"""Every error a user can cause, and the exit code each one ends with. What its code means: `recycler.zoo.error_codes`.

A message has three parts: what happened, why it is refused, what to do about it. The library raises; only the
command line exits. Each class also inherits the stdlib type it stands for, so that ordinary ``except ValueError``
code keeps working.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

_CHOICES = 30  # names in a message


class RecycleError(Exception):
    """Base of all errors raised on purpose. ``what`` happened, ``why`` it is refused, ``fix`` is what to do.

    Attributes:
        code: a stable name for the kind of mistake, such as E_PICKLE (`recycler.zoo.error_codes`); the class's own where the
            raiser gives none. Scripts may rely on it; texts may change.
    """

    exit_code = 1
    code = "E_UNEXPECTED"

    def __init__(self, what: str, why: str = "", fix: str = "", *, code: str | None = None) -> None:
        self.what, self.why, self.fix = what, why, fix
        self.code = code or type(self).code
        super().__init__(" ".join(part for part in (what, why, fix) if part))

    @property
    def docs(self) -> str:
        """Where this kind of error is explained: a file of the repository, and the place in it."""
        return f"docs/errors.md#{self.code.lower()}"


class UsageError(RecycleError, ValueError):
    """The call itself is off: an unknown option, two options that exclude each other, a name that is not there."""

    exit_code = 2
    code = "E_USAGE"


class InputError(RecycleError, ValueError):
    """An input was read and rejected, or does not fit what it should be combined with."""

    exit_code = 3
    code = "E_INPUT"


class SecurityError(RecycleError, ValueError):
    """An input could do harm: pickled weights, paths that escape their folder, contents that differ from their hash."""

    exit_code = 4
    code = "E_SECURITY"


class HubError(RecycleError, OSError):
    """The Hub did not give what was asked: missing, gated, rate-limited, unreachable or offline."""

    exit_code = 5
    code = "E_HUB"


class PartialError(RecycleError):
    """Some of many succeeded; the message says which did not, and why."""

    exit_code = 6
    code = "E_PARTIAL"


def shorten(items: Iterable[str], limit: int = 20) -> str:
    """``a, b, c and 17 more``: all offenders are counted, the first `limit` are named."""
    names: Sequence[str] = list(items)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def counted(count: int, what: str) -> str:
    """``1 adapter``, ``2 adapters``."""
    return f"{count} {what}{'s' * (count != 1)}"


def choices(names: Iterable[str], near: str = "") -> str:
    """``one of: a, b, c``, or ``none yet`` where there are none; of many, those that look like `near` first."""
    names = sorted(names)
    if len(names) > _CHOICES:
        alike = get_close_matches(near, names, cutoff=0.5) if near else []
        names = alike + [name for name in names if name not in alike]
    return f"one of: {shorten(names, _CHOICES)}" if names else "none yet"
