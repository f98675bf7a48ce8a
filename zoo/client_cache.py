"""The client's cache as a Hub that needs no network: what lies there complete can be fetched offline, hashes and all.

A file of the cache is a link to a blob that is called by the Hub's hash of it: sha256 for large files, git's sha1 for small
ones. So contents can be checked without asking. Where a system has no links the files are plain copies, and cannot be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recycler.zoo import inspect
from recycler.zoo.errors import HubError
from recycler.zoo.inspect import printable
from recycler.zoo.sources import FileFact, Source


@contextmanager
def offline(wanted: bool = True) -> Iterator[None]:
    """Within it, the client and everything that uses it makes no request; also where its environment does not say so."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def is_offline() -> bool:
    """Whether the client makes no requests: ``HF_HUB_OFFLINE`` is set, or `offline` is in force."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def look(source: Source) -> tuple[str, list[FileFact], tuple[str, ...]]:
    """(commit, the files at the source's place, notes) as far as the cache holds them; no request is made.

    A branch is what it was when the client last saw it. Without a revision, and where the client never saw the branch but only
    commits, it is the commit that came last.

    Raises:
        HubError: the adapter is not there, or only in part.
    """
    folder, notes = _snapshot(source)
    place = folder / source.subfolder if source.subfolder else folder
    if not (place / inspect.CONFIG).is_file():
        raise _missing(source, "is not in the client's cache")
    facts = _facts(folder, place)
    if not any(path.is_file() and path.name not in (inspect.CONFIG, inspect.CARD) for path in place.iterdir()):
        raise _missing(source, "is in the client's cache without its weights")
    return folder.name, facts, notes


def contents(source: Source, marker: str, cache_dir: str | Path | None = None) -> tuple[str, list[FileFact], tuple[str, ...]]:
    """(commit, all files, notes) of a repository as far as the cache holds it, as `look`.

    Args:
        marker: the file without which it is not what is looked for.

    Raises:
        HubError: it is not there.
    """
    folder, notes = _snapshot(source, marker, cache_dir)
    if not (folder / marker).is_file():
        raise _missing(source, "is not in the client's cache")
    return folder.name, _facts(folder, folder), notes


def remember(source: Source, commit: str, cache_dir: str | Path | None = None) -> None:
    """Note in the cache which commit a branch or tag was at, as the client does where it is asked for one by its name."""
    name = source.revision or "main"
    if ".." not in name:
        ref = home(source.repo, cache_dir) / "refs" / name
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit, "utf-8")


def home(repo: str, cache_dir: str | Path | None = None) -> Path:
    """The folder that the cache has for a repository; it may not exist."""
    from huggingface_hub import constants

    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser() / f"models--{repo.replace('/', '--')}"


def _facts(folder: Path, place: Path) -> list[FileFact]:
    """The files under `place`, with the hashes that the cache's layout gives them; their paths begin at `folder`."""
    facts = []
    for path in sorted(place.rglob("*")):
        if path.is_file():
            sha256, blob = _hash_of(path)
            facts.append(FileFact(path.relative_to(folder).as_posix(), path.stat().st_size, sha256, blob))
    return facts


def _snapshot(
    source: Source, marker: str = inspect.CONFIG, cache_dir: str | Path | None = None
) -> tuple[Path, tuple[str, ...]]:
    """The folder that the cache has for the source's revision, in the layout that the client documents; it may not exist."""
    folder = home(source.repo, cache_dir)
    if source.pinned:
        return folder / "snapshots" / str(source.revision), ()
    ref = folder / "refs" / (source.revision or "main")
    if ref.is_file():
        return folder / "snapshots" / ref.read_text("utf-8").strip(), ()
    if source.revision is not None:
        return folder / "snapshots" / source.revision, ()
    held = [path for path in (folder / "snapshots").glob("*") if (path / source.subfolder / marker).is_file()]
    held.sort(key=lambda path: path.stat().st_mtime)
    if not held:
        return folder / "snapshots" / "none", ()
    several = f"the cache holds it at {len(held)} commits; this is what came last" if len(held) > 1 else ""
    return held[-1], (several,) if several else ()


def _hash_of(path: Path) -> tuple[str | None, str | None]:
    """(sha256, git blob sha1) that the cache's layout gives to a file, None where it does not say."""
    name = path.readlink().name if path.is_symlink() else ""
    return (name if re.fullmatch(r"[0-9a-f]{64}", name) else None), (name if re.fullmatch(r"[0-9a-f]{40}", name) else None)


def _missing(source: Source, what: str) -> HubError:
    return HubError(
        f"{printable(source.text)} was not fetched: offline mode is on, and it {what}.",
        "HF_HUB_OFFLINE is set or --offline was given, so no request is made.",
        "Fetch it once with the network; what is in the zoo or in the cache needs none afterwards.",
        code="E_OFFLINE",
    )
