"""Methods with their options, as one writes them in a list: ``ridge,glider:local=ridge,xlora:steps=20``.

A name and, after colons, options; ``method.key=value`` sets one apart, where a value holds a comma or a colon.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recycler.evaluating.evaluation import BASELINES
from recycler.routers.discovery import find, make_config, methods, options
from recycler.zoo.errors import UsageError

# Methods that are a baseline anyway; or ridge, where adapters are no more than one would compare methods on.
DOUBLES = (*BASELINES, "single", "hierarchy")


@dataclass(frozen=True)
class Contender:
    """A method and its options.

    Attributes:
        options: keywords of `recycler.build_router`.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keywords(self) -> dict[str, Any]:
        """For `recycler.build_router`."""
        given = dict(self.options)
        if "subtract" in given and isinstance(given["subtract"], str):
            given["subtract"] = tuple(given["subtract"].split("+"))
        return given

    @property
    def label(self) -> str:
        """How it is written, and what it is called in tables."""
        text = ":".join([self.method, *(f"{key}={value}" for key, value in self.options.items())])
        return f"{text} router" if text in BASELINES else text


def contenders(given: str | Iterable[str] | None = None, more: Sequence[str] = ()) -> list[Contender]:
    """What a list of methods says.

    Args:
        given: ``name:key=value:...``, in one text with commas or one by one; all methods that are no baseline where None.
        more: ``method.key=value``; for every entry of that method.

    Raises:
        UsageError: an unknown method or option, a value that it does not take, or two entries that are the same.
    """
    if given is None:
        given = [name for name in methods() if name not in DOUBLES]
    entries = re.split(r",(?=[^,=]+(?::|,|$))", given) if isinstance(given, str) else list(given)
    found = [_parse(entry) for entry in entries if entry.strip()]
    if not found:
        raise UsageError("No methods were named.", "", "Name some, --methods ridge,arrow, or leave them all.")
    for item in more:
        method, dot, pair = item.partition(".")
        key, equals, value = pair.partition("=")
        if not (dot and equals and key and value):
            raise UsageError(f"-o {item!r} is not METHOD.KEY=VALUE.", "", "Write -o METHOD.KEY=VALUE.")
        if method not in [one.method for one in found]:
            raise UsageError(f"-o {item}: {method} is not among the methods.", "", "Add it to --methods.")
        found = [Contender(c.method, {**c.options, key: value}) if c.method == method else c for c in found]
    for one in found:
        check(one)
    labels = [one.label for one in found]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UsageError(f"{', '.join(twice)} is named twice.", "", "Name it once, or give one of them other options.")
    return found


def check(one: Contender) -> None:
    """Finds a wrong method, option or value before the long work."""
    cls = find(one.method)
    own = options(cls)
    make_config(cls, {key: value for key, value in one.options.items() if key in own or key not in build_options()})


def build_options() -> set[str]:
    """Keywords of `recycler.build_router` that change what is built, and may stand beside a method's own."""
    from recycler.build import build_router

    every = {p.name for p in inspect.signature(build_router).parameters.values() if p.kind is p.KEYWORD_ONLY}
    return every - {"zoo", "base", "adapters", "out", "assign", "force", "progress", "loading", "select", "count"}


def _parse(entry: str) -> Contender:
    method, *pairs = re.split(r":(?=\w+=)", entry.strip())
    given = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        given[key] = value
    if ":" in method or "=" in method:
        raise UsageError(f"{entry!r} is not METHOD:KEY=VALUE.", "", "Write for instance glider:local=ridge.")
    return Contender(method, given)
