"""Writing into a zoo so that a process may be killed at any moment: the lock, private folders, and what is swept after it.

Three things can be left by a process that died, and whoever takes the zoo's lock next removes them: private folders whose
owner no longer holds the lock beside them; manifests that were never finished; and folders that were renamed into place before,
or taken out of the manifest before, the other half of the work was done. These last are written down first, in a note that the
owner removes in the end.

They lie in ``adapters/``. In a large zoo they have a folder of their own, ``staging/``, so that sweeping does not look at every
adapter's name.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from recycler.zoo import journal
from recycler.zoo.errors import InputError, RecycleError
from recycler.zoo.inspect import printable
from recycler.zoo.manifest import is_slug, journal_of, read_manifest

if TYPE_CHECKING:
    from filelock import BaseFileLock

_LOCK_SECONDS = 120
_PRIVATE, _DOUBT = ".tmp-", ".doubt-"


@contextmanager
def locked(zoo: Path) -> Iterator[None]:
    """Hold the zoo's lock, with its folders made and leftovers of killed processes swept.

    Raises:
        InputError: the folder cannot be written, or somebody else holds the lock for long.
    """
    from filelock import Timeout

    try:
        (zoo / "adapters").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"The zoo at {zoo} cannot be written: {error.strerror}.",
            fix="Choose another folder with RECYCLE_ZOO.",
            code="E_FILES",
        ) from error
    held = _lock(zoo / ".lock")
    try:
        held.acquire()
    except Timeout as error:
        raise InputError(
            f"The zoo at {zoo} has been locked by another process for {_LOCK_SECONDS} s.",
            "Two writers at once would lose adapters.",
            "Wait for the other run to end.",
            code="E_BUSY",
        ) from error
    try:
        _sweep(zoo)
        yield
    finally:
        held.release()


@contextmanager
def private(zoo: Path) -> Iterator[Path]:
    """An empty folder inside the zoo, that is gone afterwards unless it was renamed."""
    with locked(zoo):  # sweeping and creating exclude each other, so that no folder is swept while it begins
        folder = trash(zoo)
        alive = _lock(_lock_of(folder))
        alive.acquire()
        folder.mkdir()
    try:
        yield folder
    finally:
        with locked(zoo):
            shutil.rmtree(folder, ignore_errors=True)
            alive.release()
            _lock_of(folder).unlink(missing_ok=True)


def trash(zoo: Path) -> Path:
    """A name for a folder that is swept if nobody removes it."""
    return bench(zoo) / f"{_PRIVATE}{uuid.uuid4().hex}"


@contextmanager
def in_doubt(zoo: Path, names: Iterable[str]) -> Iterator[None]:
    """Within it, under the lock, the folders of these adapters may come to be without being listed, or the reverse. If the
    process dies there, those that the manifest does not list are removed by the next to take the lock."""
    note = bench(zoo) / f"{_DOUBT}{uuid.uuid4().hex}"
    note.write_text("\n".join(names), "utf-8")
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


@contextmanager
def called(staged: Path, name: str, place: str) -> Iterator[None]:
    """Errors about files in a private folder, raised within it, name what a person knows: the adapter, and where it came from."""
    try:
        yield
    except RecycleError as error:
        texts = [error.what, error.why, error.fix]
        for path in {str(staged), str(staged.resolve())}:
            texts = [text.replace(path, printable(place)) for text in texts]
        texts = [text.replace(staged.name, name) for text in texts]
        if texts == [error.what, error.why, error.fix]:
            raise
        raise type(error)(*texts, code=error.code) from error


def sync(folder: Path) -> None:
    """Wait until the files of a folder are on the disk, so that no manifest can outlive what it lists."""
    for path in folder.iterdir():
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())


def require_writable(folder: Path) -> None:
    """Asked before long work whose result goes into `folder`, or one of its folders to be; leaves nothing.

    Raises:
        OSError: it cannot be written, with its name.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(folder)) from error


def sweep_adapters(zoo: Path) -> None:
    """Remove what killed processes left in ``adapters/``, under the lock; in a large zoo, what was left when it was small."""
    _sweep_folder(zoo, zoo / "adapters")


def _sweep(zoo: Path) -> None:
    _sweep_folder(zoo, bench(zoo))
    for torn in zoo.glob("zoo.json.tmp-*"):
        torn.unlink(missing_ok=True)
    if logs := set(zoo.glob(journal.PATTERN)):
        named = journal_of(zoo / "zoo.json")
        for log in logs - {named}:
            if journal.is_empty(log) or named in logs:  # not yet, or no longer; where zoo.json is damaged, nothing is lost
                log.unlink(missing_ok=True)


def _sweep_folder(zoo: Path, folder: Path) -> None:
    with os.scandir(folder) as every:
        left = [folder / one.name for one in every if one.name.startswith((_PRIVATE, _DOUBT))]
    doubts = [path for path in left if path.name.startswith(_DOUBT)]
    if doubts:  # whoever wrote them held the lock, and so is dead
        listed = read_manifest(zoo / "zoo.json")
        for note in doubts:
            for name in note.read_text("utf-8").splitlines():
                if is_slug(name) and name not in listed:
                    shutil.rmtree(zoo / "adapters" / name, ignore_errors=True)
            note.unlink(missing_ok=True)
    for stale in {path.with_name(path.name.removesuffix(".lock")) for path in left if path.name.startswith(_PRIVATE)}:
        _sweep_private(stale)


def bench(zoo: Path) -> Path:
    """The folder that private folders and notes of doubt lie in."""
    own = zoo / "staging"
    return own if own.is_dir() else zoo / "adapters"


def _sweep_private(stale: Path) -> None:
    """Remove a private folder whose process is gone: a living one holds the lock beside it."""
    from filelock import Timeout

    try:
        with _lock(_lock_of(stale)).acquire(timeout=0):
            shutil.rmtree(stale, ignore_errors=True)
    except Timeout:
        return
    _lock_of(stale).unlink(missing_ok=True)


def _lock(path: Path) -> BaseFileLock:
    from filelock import FileLock

    return FileLock(path, timeout=_LOCK_SECONDS)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")
