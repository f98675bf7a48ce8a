"""What to fetch, and under which names: sources, folders of folders, and what a search or a collection names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from recycler.zoo import importers, inspect
from recycler.zoo.errors import InputError, UsageError, shorten
from recycler.zoo.inspect import printable
from recycler.zoo.manifest import Entry, check_name, slug
from recycler.zoo.sources import Source
from recycler.zoo.store import Zoo

MAX_DEPTH = 4
MAX_FOLDERS = 10_000
"""How deep below a folder, and in how many folders, adapters are looked for."""


@dataclass(frozen=True)
class Job:
    """One source, and the name of what comes from it.

    Attributes:
        given: whether a person chose the name.
        pinned: what a lock says of it, None where it comes from no lock.
    """

    name: str
    source: Source
    given: bool = False
    pinned: Entry | None = None


def jobs_of(sources: Sequence[str | Path], names: Sequence[str] | None, *, layout: str = "auto") -> list[Job]:
    """A job for every source that a person named, folders of folders opened.

    Raises:
        UsageError: nothing, names that do not match, or two adapters of one name.
        InputError: more folders than can be looked through.
    """
    found = [one for text in sources for one in _expand(Source.parse(text), layout)]
    if names is None:  # the same source twice is one
        found = list({(source.place, source.revision): (stem, source) for stem, source in reversed(found)}.values())[::-1]
    if not found:
        raise UsageError("There is nothing to fetch.", fix="Name a repository on the Hub or a folder.")
    if names is not None and len(names) != len(found):
        raise UsageError(
            f"{len(names)} names were given for {len(found)} adapters.",
            "Each --as names one adapter, in the order of the sources, and a folder may hold several.",
            "Give as many names as adapters, or none.",
            code="E_NAME",
        )
    chosen = [slug(stem) for stem, _ in found] if names is None else [check_name(name) for name in names]
    twice = [name for name, count in Counter(chosen).items() if count > 1]
    if twice:
        pairs = list(zip(chosen, found, strict=True))
        owners = [f"{name} ({shorten(source.text for other, (_, source) in pairs if other == name)})" for name in twice]
        raise UsageError(
            f"Several adapters would be called {shorten(owners)}.",
            "A name stands for one adapter.",
            "Give every source a name with --as, in order.",
            code="E_NAME",
        )
    return [Job(name, source, names is not None) for name, (_, source) in zip(chosen, found, strict=True)]


def jobs_from_list(texts: Sequence[str], zoo: Zoo) -> list[Job]:
    """A job for everything that a search or a collection named. Names are those that the zoo has for the same places already, else
    the repository's where that is free, else the owner's before it: the same list gives the same names again."""
    held = {entry.source: name for name, entry in zoo.entries.items()}
    sources = list({source.place: source for source in map(Source.parse, texts)}.values())
    short = Counter(_soft_slug(source.stem) for source in sources)
    taken = set(zoo.entries)
    jobs = []
    for source in sources:
        name = held.get(source.place) or _soft_slug(source.stem)
        if source.place not in held and (name is None or short[name] > 1 or name in taken):
            name = _soft_slug(source.place.replace("/", "-"))
        name, count = name or "adapter", 1
        plain = name
        while source.place not in held and name in taken:
            count += 1
            name = f"{plain}-{count}"
        taken.add(name)
        jobs.append(Job(name, source))
    return jobs


def _expand(source: Source, layout: str) -> Iterator[tuple[str, Source]]:
    """(what a name is derived from, the source) for the source itself or, for a folder that is no adapter, for the adapters below
    it: by their paths, links and hidden folders not entered, nothing looked for inside an adapter."""
    folder = source.folder
    if folder is None or not folder.is_dir() or _is_source(folder, layout):
        yield source.stem, source
        return
    below = sorted(_adapters_below(folder, layout))
    if not below:
        yield source.stem, source  # whoever reads it says what is missing
    for path in below:
        yield "-".join(path.relative_to(folder).parts), Source.parse(path)


def _adapters_below(folder: Path, layout: str) -> Iterator[Path]:
    seen = 0
    waiting = [(folder, 0)]
    while waiting:
        here, depth = waiting.pop()
        with os.scandir(here) as entries:
            inside = [entry for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
        for entry in inside:
            seen += 1
            if seen > MAX_FOLDERS:
                raise InputError(
                    f"{printable(folder)} holds more than {MAX_FOLDERS:,} folders.",
                    "Looking through them all could take for ever.",
                    "Name the folders that hold adapters.",
                    code="E_TOO_LARGE",
                )
            path = Path(entry.path)
            if _is_source(path, layout):
                yield path
            elif not entry.is_symlink() and depth + 1 < MAX_DEPTH:
                waiting.append((path, depth + 1))


def _is_source(folder: Path, layout: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries]
    except OSError:
        return False
    # Without being told, a stray checkpoint does not make a folder of adapters one of pickles.
    return inspect.CONFIG in names or (layout not in ("auto", "peft") and importers.layout_of(names) == layout)


def _soft_slug(text: str) -> str | None:
    try:
        return slug(text)
    except UsageError:
        return None
