"""Somebody's zoo.json as a list of what to fetch: the same lock gives the same zoo, byte for byte.

Every adapter comes from the commit that the lock names, under the lock's name, and every file has the hash that stands there. The
Hub is not asked what the hashes are. What was converted is converted again from originals with the lock's hashes; another
machine may round otherwise, and then the receipt says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from recycler.intake.jobs import Job
from recycler.zoo import inspect
from recycler.zoo.errors import InputError, SecurityError, UsageError, shorten
from recycler.zoo.inspect import printable
from recycler.zoo.manifest import Entry, check_name, read_manifest
from recycler.zoo.sources import FileFact, Listing, Source, is_commit

_MAX_LOCK = 200_000_000  # some 100,000 adapters
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ROUNDING = 1e-4


def jobs_from_lock(lock: str | Path) -> list[Job]:
    """A job for every adapter that a zoo.json lists.

    Raises:
        InputError: it cannot be read, or an entry does not say what it must.
    """
    path = Path(lock).expanduser()
    path = path / "zoo.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(
            f"There is no lock {printable(path)}.",
            "",
            "Give somebody's zoo.json: recycle fetch --from zoo.json",
            code="E_MANIFEST",
        )
    if path.stat().st_size > _MAX_LOCK:
        raise InputError(
            f"{printable(path)} is no lock: it holds more than {_MAX_LOCK / 1e6:,.0f} MB.",
            "",
            "Give a zoo.json.",
            code="E_TOO_LARGE",
        )
    jobs = [_job(name, entry, path) for name, entry in read_manifest(path).items()]
    if not jobs:
        raise InputError(f"{printable(path)} lists no adapters.", "", "Give the zoo.json of a zoo that holds some.")
    return jobs


def listing_of(pinned: Entry, source: Source, max_bytes: int, *, allow_pickle: bool) -> Listing:
    """What a lock says of an adapter's files, in place of the Hub.

    Raises:
        InputError: they are too large. SecurityError: pickles, which were not allowed; or names that could do harm.
    """
    originals = originals_of(pinned)
    inspect.check_names(pinned.name, originals)
    sizes = {name: fact["size"] for name, fact in originals.items()}
    pickles = sorted(name for name in sizes if inspect.is_pickle(name) or name.endswith(".meta"))
    if pickles and not allow_pickle:
        raise SecurityError(
            f"{pinned.name} was made of pickles: {shorten(map(printable, pickles), 3)}.",
            "Loading a pickle can run any code its author put there; that the lock's owner did does not make it safe here.",
            "Add --allow-pickle: they are then opened in a process that can do little harm.",
            code="E_PICKLE",
        )
    if sum(sizes.values()) > max_bytes:
        raise InputError(
            f"{pinned.name} holds {sum(sizes.values()) / 1e6:,.0f} MB, more than the limit of {max_bytes / 1e6:,.0f} MB.",
            "An adapter is small next to its base.",
            "If it is meant, raise the limit with --max-size.",
            code="E_TOO_LARGE",
        )
    prefix = source.subfolder + "/" if source.subfolder else ""
    facts = {name: FileFact(prefix + name, fact["size"], fact["sha256"], None) for name, fact in originals.items()}
    return Listing(source.repo, str(pinned.revision), facts, by="the lock")


def originals_of(pinned: Entry) -> Mapping[str, Mapping[str, Any]]:
    """The files that came from the source: those in the zoo, or those that these were made of."""
    return pinned.converted["files"] if pinned.converted else pinned.files


def check_originals(pinned: Entry, folder: Path) -> None:
    """Compare files with the lock's hashes of what came from the source.

    Raises:
        SecurityError: some differ, are missing or, where nothing is converted, are not in the lock; all are named.
    """
    wanted = originals_of(pinned)
    wrong = []
    for name, fact in wanted.items():
        here = inspect.hashes(folder / name)[0] if (folder / name).is_file() else "missing"
        if here != fact["sha256"]:
            wrong.append(f"{printable(name)} (the lock says {fact['sha256']}, here it is {here})")
    if not pinned.converted:
        own = inspect.own_files([path.name for path in folder.iterdir()])
        wrong += [f"{printable(name)} (not in the lock)" for name in own if name not in wanted]
    if wrong:
        raise SecurityError(
            f"{pinned.name} is not what the lock describes: {shorten(wrong, 5)}.",
            "Its files were changed since the lock was written, or the lock was.",
            "Ask the lock's owner; or fetch it without --from to take it as it is now.",
            code="E_LOCK",
        )


def check_against(pinned: Entry, files: Mapping[str, Any], norm: float | None) -> tuple[float | None, tuple[str, ...]]:
    """Compare what is about to be kept with the lock's entry.

    Returns:
        The norm to record, and warnings for the receipt.
    """
    warnings = []
    if pinned.converted and {n: f["sha256"] for n, f in files.items()} != {n: f["sha256"] for n, f in pinned.files.items()}:
        warnings.append(
            "converted again from the lock's originals, it differs from the lock in its bytes: another machine or version "
            "rounds otherwise. Compare what it answers before relying on it"
        )
    if norm is None or pinned.norm is None:
        return norm, tuple(warnings)
    if abs(norm - pinned.norm) <= _ROUNDING * max(norm, pinned.norm):
        return pinned.norm, tuple(warnings)
    warnings.append(f"‖ΔW‖ is {norm:g}; the lock says {pinned.norm:g}")
    return norm, tuple(warnings)


def _job(name: str, entry: Entry, lock: Path) -> Job:
    check_name(name)
    texts = (
        entry.source,
        *(v for v in (entry.revision, entry.base, entry.base_path, entry.licence, entry.added) if v is not None),
    )
    hashes = [fact["sha256"] for fact in (*entry.files.values(), *originals_of(entry).values())]
    sizes = [fact["size"] for fact in originals_of(entry).values()]
    numbers = isinstance(entry.norm, int | float | None) and all(size >= 0 for size in sizes)
    if not all(isinstance(text, str) for text in texts) or not all(map(_SHA256.fullmatch, hashes)) or not numbers:
        raise InputError(
            f"{printable(lock)}: the entry of {name} cannot be used.",
            "A hash, a source or another text in it is no such thing.",
            "Get the lock again from its owner; do not edit it by hand.",
            code="E_MANIFEST",
        )
    inspect.check_names(f"{lock} ({name})", originals_of(entry))
    return Job(name, _source(entry, lock), given=True, pinned=entry)


def _source(entry: Entry, lock: Path) -> Source:
    """Where the entry's files are to come from."""
    if not is_commit(entry.revision):  # a folder, which may be here too, or lie in a zoo that was copied whole
        folder, beside = Path(entry.source), lock.parent / "adapters" / entry.name
        return Source(entry.source, beside if not entry.converted and not folder.is_dir() and beside.is_dir() else folder)
    owner, _, rest = entry.source.partition("/")
    repo, _, place = rest.partition("/")
    text = f"{owner}/{repo}@{entry.revision}" + (f"/{place}" if place else "")
    try:
        return replace(Source.parse(f"hf://{text}"), text=text)
    except UsageError as error:
        raise InputError(
            f"{printable(lock)}: {entry.name} comes from {printable(entry.source)}, which is no repository.",
            "It was cut or edited by hand.",
            "Get the lock again from its owner.",
            code="E_MANIFEST",
        ) from error
