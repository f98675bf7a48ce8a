"""The zoo on disk: a mapping from name to adapter.

``zoo.json`` is the truth: small, sorted, diffable. A folder that it does not list is no part of the zoo.
Files are staged in a private folder, vetted there, and renamed into place; the manifest is written last,
under a lock, by renaming a finished file over the old one. Whatever fails, and wherever, the zoo is as
before.

::

    zoo.json           name → source, 40-hex revision, base, sha256 of every file, licence, ranks
    adapters/<name>/   the PEFT files as downloaded
    profiles/<id>/     routers/<id>/
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from recycler.zoo import formats, inspect
from recycler.zoo.adapter import Adapter
from recycler.zoo.errors import InputError, SecurityError, UsageError, shorten
from recycler.zoo.inspect import Receipt, printable
from recycler.zoo.manifest import Entry, check_name, read_manifest, slug, write_manifest

if TYPE_CHECKING:
    from filelock import BaseFileLock

_LOCK_SECONDS = 120


@dataclass(frozen=True)
class Problem:
    """Something in a zoo that differs from its manifest. ``str()`` says it in a line."""

    name: str
    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {self.file}: {self.what}"


class UnknownAdapterError(UsageError, KeyError):
    """A name that is not in the zoo; a KeyError too, so that a zoo behaves as a mapping."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


class Zoo(Mapping[str, Adapter]):
    """Adapters by name. Reading ``zoo["math"]`` reads its factors; len, ``in`` and iteration do not.

    Args:
        path: the zoo's folder; ``$RECYCLE_ZOO`` where None, else ``~/.cache/recycle/zoo``. It is created by
            the first `add`, not here.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        chosen = path or os.environ.get("RECYCLE_ZOO") or "~/.cache/recycle/zoo"
        self.path = Path(chosen).expanduser()
        self._seen: tuple[tuple[int, int, int], Mapping[str, Entry]] | None = None

    def __repr__(self) -> str:
        return f"Zoo({str(self.path)!r})"

    @property
    def manifest(self) -> Path:
        return self.path / "zoo.json"

    @property
    def profiles_dir(self) -> Path:
        return self.path / "profiles"

    @property
    def routers_dir(self) -> Path:
        return self.path / "routers"

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Name → Entry, sorted by name, as the manifest says now.

        Raises:
            InputError: zoo.json is broken, or was written by a newer version.
        """
        try:
            fact = self.manifest.stat()
            state = (fact.st_ino, fact.st_mtime_ns, fact.st_size)
        except OSError:
            return {}
        if self._seen is None or self._seen[0] != state:  # else a loop over all names would parse it every time
            self._seen = state, MappingProxyType(read_manifest(self.manifest))
        return self._seen[1]

    def entry(self, name: str) -> Entry:
        """Raises UnknownAdapterError, naming close matches first."""
        entries = self.entries
        if name not in entries:
            raise _unknown([name], entries)
        return entries[name]

    def folder(self, name: str) -> Path:
        """Where the adapter's files lie; PEFT loads from there."""
        self.entry(name)
        return self._home(name)

    def __getitem__(self, name: str) -> Adapter:
        entry = self.entry(name)
        adapter, _ = formats.read(self._home(name), name, source=entry.source, revision=entry.revision)
        expected = entry.files[inspect.WEIGHTS]["sha256"]
        if adapter.sha256 != expected:
            raise SecurityError(
                f"The weights of {name} are not those fetched: sha256 {adapter.sha256}, expected {expected}.",
                "They were changed or damaged after they were vetted.",
                f"Run: recycle zoo remove {name}, then fetch it again from {printable(entry.source)}.",
            )
        return replace(adapter, base=entry.base, licence=entry.licence)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A private, empty folder inside the zoo for files that are not vetted yet. It is gone afterwards,
        unless `keep` took it; one that a killed process left is removed the next time anything is written."""
        folder = self.path / "adapters" / f".tmp-{uuid.uuid4().hex}"
        with self._locked():  # sweeping and creating exclude each other, so that no folder is swept while it begins
            alive = _lock(_lock_of(folder))
            alive.acquire()
            folder.mkdir()
        try:
            yield folder
        finally:
            with self._locked():
                shutil.rmtree(folder, ignore_errors=True)
                alive.release()
                _lock_of(folder).unlink(missing_ok=True)

    def add(
        self,
        folder: Path | str,
        name: str | None = None,
        *,
        source: str | None = None,
        revision: str | None = None,
        base: str | None = None,
        base_path: str | None = None,
        max_bytes: int = inspect.MAX_BYTES,
    ) -> tuple[Entry, Receipt]:
        """Copy the adapter in `folder` into the zoo, after vetting the copy. It is not compared with its
        base: `fetch` does that.

        Args:
            name: a slug; derived from the folder's name where None.
            source, revision: where it came from, for the record.
            base: the base it is for; what it declares where None.
            base_path: a folder that serves as a copy of the base.

        Raises:
            UsageError: the name is not usable, or stands for other contents already.
            InputError, SecurityError: as `formats.read`.
        """
        folder = Path(folder)
        name = slug(folder.resolve().name) if name is None else check_name(name)
        with self.staging() as staged:
            copy_files(folder, staged, max_bytes)
            adapter, receipt = formats.read(staged, name, source=source or str(folder), revision=revision, max_bytes=max_bytes)
            adapter = replace(adapter, base=base or adapter.base)
            return self.keep(staged, adapter, receipt, base_path=base_path)

    def keep(self, staged: Path, adapter: Adapter, receipt: Receipt, *, base_path: str | None = None) -> tuple[Entry, Receipt]:
        """Make a staged and vetted folder part of the zoo under ``adapter.name``. The same contents under the
        same name are left as they are, with a note in the receipt.

        Raises:
            UsageError: the name stands for other contents already.
        """
        name = check_name(adapter.name)
        files = {
            path.name: {"sha256": inspect.hashes(path)[0], "size": path.stat().st_size} for path in sorted(staged.iterdir())
        }
        entry = Entry(
            name=name,
            source=adapter.source,
            revision=adapter.revision,
            base=adapter.base,
            base_path=base_path,
            base_revision=receipt.base_revision,
            files=files,
            licence=adapter.licence,
            ranks=receipt.ranks,
            sites=receipt.sites,
            parameters=receipt.parameters,
            kinds=receipt.kinds,
            added=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        with self._locked():
            entries = dict(self.entries)
            if name in entries:
                if not _same_contents(entries[name], entry):
                    raise _taken(entries[name], entry)
                entry, note = _with_base(entries[name], entry)
                if entry != entries[name]:
                    write_manifest(self.manifest, {**entries, name: entry})
                return entry, replace(receipt, notes=(*receipt.notes, note))
            receipt = _note_twins(receipt, entry, entries)
            home = self._home(name)
            shutil.rmtree(home, ignore_errors=True)  # not listed, so left by a process that was killed
            staged.rename(home)
            try:
                write_manifest(self.manifest, {**entries, name: entry})
            except BaseException:
                shutil.rmtree(home, ignore_errors=True)
                raise
        return entry, receipt

    def remove(self, names: str | Iterable[str]) -> None:
        """Remove adapters; all of them or, where one is unknown, none.

        Raises:
            UnknownAdapterError: naming those that are not there.
        """
        wanted = [names] if isinstance(names, str) else list(names)
        if not wanted:
            return
        _require(wanted, self.entries)  # before a lock is made in a folder that may not exist
        with self._locked():
            entries = dict(self.entries)
            _require(wanted, entries)
            write_manifest(self.manifest, {n: e for n, e in entries.items() if n not in wanted})
            for name in wanted:
                shutil.rmtree(self._home(name), ignore_errors=True)

    def verify(self, names: Iterable[str] | None = None) -> list[Problem]:
        """Hash all files of the named adapters (of all, where None) and compare with the manifest.

        Returns:
            Every file that is missing, changed or not listed; empty where all is well.
        """
        entries = self.entries
        wanted = list(entries) if names is None else list(names)
        _require(wanted, entries)
        problems = [p for name in wanted for p in _verify(self._home(name), entries[name])]
        if names is None and (self.path / "adapters").is_dir():
            strays = {p.name for p in (self.path / "adapters").iterdir() if not p.name.startswith(".tmp-")}
            problems += [Problem(n, "adapters/" + n, "not in zoo.json") for n in sorted(strays - set(entries))]
        return problems

    def _home(self, name: str) -> Path:
        return self.path / "adapters" / name

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the zoo's lock, with the folders made and leftovers of killed processes swept."""
        from filelock import Timeout

        try:
            (self.path / "adapters").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"The zoo at {self.path} cannot be written: {error.strerror}.",
                fix="Choose another folder with RECYCLE_ZOO.",
            ) from error
        try:
            with _lock(self.path / ".lock"):
                for stale in (self.path / "adapters").glob(".tmp-*"):
                    if stale.is_dir():
                        _sweep(stale)
                yield
        except Timeout as error:
            raise InputError(
                f"The zoo at {self.path} has been locked by another process for {_LOCK_SECONDS} s.",
                "Two writers at once would lose adapters.",
                "Wait for the other run to end.",
            ) from error


def copy_files(folder: Path, into: Path, max_bytes: int = inspect.MAX_BYTES) -> None:
    """Copy the adapter's own files, and nothing else, after `inspect.check_folder` passed."""
    for name in inspect.check_folder(folder, max_bytes):
        shutil.copyfile(folder / name, into / name)


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


def _lock(path: Path) -> BaseFileLock:
    from filelock import FileLock

    return FileLock(path, timeout=_LOCK_SECONDS)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")


def _sweep(stale: Path) -> None:
    """Remove a staging folder whose process is gone: a living one holds the lock beside it."""
    from filelock import Timeout

    try:
        with _lock(_lock_of(stale)).acquire(timeout=0):
            shutil.rmtree(stale, ignore_errors=True)
    except Timeout:
        return
    _lock_of(stale).unlink(missing_ok=True)


def _same_contents(a: Entry, b: Entry) -> bool:
    """By weights and config; a card may be edited without making another adapter."""
    return all(a.files[f]["sha256"] == b.files[f]["sha256"] for f in (inspect.CONFIG, inspect.WEIGHTS))


def _note_twins(receipt: Receipt, entry: Entry, entries: Mapping[str, Entry]) -> Receipt:
    """A copy under another name counts twice in every average and vote."""
    sha256 = entry.files[inspect.WEIGHTS]["sha256"]
    twins = [name for name, other in entries.items() if other.files[inspect.WEIGHTS]["sha256"] == sha256]
    if not twins:
        return receipt
    return replace(receipt, warnings=(*receipt.warnings, f"it has the same weights as {shorten(twins)}"))


def _with_base(old: Entry, new: Entry) -> tuple[Entry, str]:
    """The entry that is kept where contents are the same: the old one, with the base where only the new one
    has it."""
    entry = replace(old, base=new.base or old.base, base_path=new.base_path or old.base_path)
    note = f"{old.name} is in the zoo already, with the same contents"
    return entry, note + ("; left as it was" if entry == old else "; its base was recorded")


def _taken(old: Entry, new: Entry) -> UsageError:
    return UsageError(
        f"The zoo holds another adapter called {old.name}, from {printable(old.source)}.",
        f"What comes from {printable(new.source)} has other contents, and nothing is overwritten.",
        f"Give it another name with --as, or run: recycle zoo remove {old.name}",
    )


def _require(names: Iterable[str], entries: Mapping[str, Entry]) -> None:
    unknown = [name for name in names if name not in entries]
    if unknown:
        raise _unknown(unknown, entries)


def _unknown(names: list[str], entries: Mapping[str, Entry]) -> UnknownAdapterError:
    close = [c for name in names for c in get_close_matches(name, entries, n=3)]
    known = list(dict.fromkeys([*close, *entries]))
    return UnknownAdapterError(
        f"Not in the zoo: {shorten(printable(name) for name in names)}.",
        f"It holds: {shorten(known)}." if known else "It holds nothing yet.",
        "Names are listed by: recycle zoo list",
    )


def _verify(home: Path, entry: Entry) -> list[Problem]:
    problems = []
    present = {path.name for path in home.iterdir()} if home.is_dir() else set()
    for name, fact in entry.files.items():
        if name not in present:
            problems.append(Problem(entry.name, name, "missing"))
        elif inspect.hashes(home / name)[0] != fact["sha256"]:
            problems.append(Problem(entry.name, name, "changed: its sha256 differs from zoo.json"))
    problems += [Problem(entry.name, n, "not in zoo.json") for n in sorted(present - set(entry.files))]
    return problems
