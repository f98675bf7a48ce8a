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

import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

from recycler.zoo import formats, inspect, match, staging
from recycler.zoo.adapter import Adapter
from recycler.zoo.errors import SecurityError, UsageError, shorten
from recycler.zoo.inspect import Receipt, printable
from recycler.zoo.manifest import HOW_CONVERTED, Entry, check_name, read_manifest, slug, write_manifest
from recycler.zoo.staging import require_writable as require_writable


@dataclass(frozen=True)
class Problem:
    """Something in a zoo that differs from its manifest. ``str()`` says it in a line."""

    name: str
    file: str
    what: str

    @property
    def changed(self) -> bool:
        """Whether contents differ from those that were vetted; else a file is missing, or does not belong there."""
        return self.what.startswith("changed")

    def __str__(self) -> str:
        return f"{printable(self.name)}: {printable(self.file)}: {self.what}"


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
        adapter, _ = formats.read(self._home(name), name)  # what is wrong is wrong here, not where it came from
        expected = entry.weights
        if adapter.sha256 != expected:
            raise SecurityError(
                f"The weights of {name} are not those fetched: sha256 {adapter.sha256}, expected {expected}.",
                "They were changed or damaged after they were vetted.",
                f"Run: recycle zoo remove {name}, then fetch it again from {printable(entry.source)}.",
                code="E_HASH",
            )
        return replace(adapter, source=entry.source, revision=entry.revision, base=entry.base, licence=entry.licence)

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
        with staging.private(self.path) as folder:
            yield folder

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
            with staging.called(staged, name, str(folder)):
                adapter, receipt = formats.read(
                    staged, name, source=source or str(folder), revision=revision, max_bytes=max_bytes
                )
            adapter = replace(adapter, base=base or adapter.base)
            return self.keep(staged, adapter, receipt, base_path=base_path)

    def keep(
        self,
        staged: Path,
        adapter: Adapter,
        receipt: Receipt,
        *,
        base_path: str | None = None,
        base_revision: str | None = None,
        converted: Mapping[str, Any] | None = None,
        forced_base: bool = False,
        added: str | None = None,
        norm: float | None = None,
    ) -> tuple[Entry, Receipt]:
        """Make a staged and vetted folder part of the zoo under ``adapter.name``. The same contents under the
        same name are left as they are, with a note in the receipt; where the zoo's copy is damaged, they replace it.

        Args:
            base_path: a folder that serves as a copy of the base.
            base_revision: a commit of the base; what the adapter declares where None.
            converted, forced_base: as in `Entry`.
            added, norm: what to record, where a lock says so; now, and what is measured, where None.

        Raises:
            UsageError: the name stands for other contents already.
        """
        name = check_name(adapter.name)
        entry = Entry(
            name=name,
            source=adapter.source,
            revision=adapter.revision,
            base=adapter.base,
            base_path=base_path,
            base_revision=base_revision or receipt.base_revision,
            files=facts_of(staged),
            licence=adapter.licence,
            ranks=receipt.ranks,
            sites=receipt.sites,
            parameters=receipt.parameters,
            kinds=receipt.kinds,
            added=added or datetime.now(timezone.utc).isoformat(timespec="seconds"),
            norm=norm_of(adapter) if norm is None else norm,
            converted=converted,
            forced_base=forced_base,
        )
        staging.sync(staged)
        home = self._home(name)
        with staging.locked(self.path):
            entries = dict(self.entries)
            if name in entries:
                return self._keep_again(staged, entries, entry, receipt)
            receipt = _note_twins(receipt, entry, entries)
            with staging.in_doubt(self.path, [name]):
                shutil.rmtree(home, ignore_errors=True)  # not listed, so nobody's
                staged.rename(home)
                try:
                    write_manifest(self.manifest, {**entries, name: entry})
                except BaseException:
                    shutil.rmtree(home, ignore_errors=True)
                    raise
        return entry, receipt

    def _keep_again(self, staged: Path, entries: Mapping[str, Entry], entry: Entry, receipt: Receipt) -> tuple[Entry, Receipt]:
        """`keep` for a name that is taken, under the lock."""
        old, home = entries[entry.name], self._home(entry.name)
        if not _same_contents(old, entry):
            raise _taken(old, entry)
        kept, note = _with_base(old, entry)
        if _verify(home, old):
            kept, note = replace(kept, files=entry.files), f"{old.name} was damaged in the zoo, and is whole again"
            aside = staging.trash(self.path)
            if home.exists():
                home.rename(aside)
            staged.rename(home)
            shutil.rmtree(aside, ignore_errors=True)
        if kept != old:
            write_manifest(self.manifest, {**entries, old.name: kept})
        return kept, replace(receipt, notes=(*receipt.notes, note))

    def held(self, name: str, source: str, revision: str | None) -> Entry | None:
        """The entry of that name if it came from there, at that commit, and is undamaged: then there is nothing to fetch."""
        entry = self.entries.get(name)
        same = entry is not None and revision is not None and (entry.source, entry.revision) == (source, revision)
        return entry if entry is not None and same and not _verify(self._home(name), entry) else None

    def record_base(
        self,
        name: str,
        base: str | None,
        base_path: str | None,
        *,
        base_revision: str | None = None,
        forced: bool = False,
    ) -> tuple[Entry, str]:
        """Note the base of an adapter that the zoo holds, where it is given; what it holds else stays as it is.

        Returns:
            The entry, and a note for its receipt.
        """
        with staging.locked(self.path):
            entries = dict(self.entries)
            _require([name], entries)
            old = entries[name]
            said = replace(old, base=base, base_path=base_path, base_revision=base_revision, forced_base=forced)
            entry, note = _with_base(old, said)
            if entry != old:
                write_manifest(self.manifest, {**entries, name: entry})
        return entry, note

    def remove(self, names: str | Iterable[str]) -> None:
        """Remove adapters; all of them or, where one is unknown, none.

        Raises:
            UnknownAdapterError: naming those that are not there.
        """
        wanted = [names] if isinstance(names, str) else list(names)
        if not wanted:
            return
        _require(wanted, self.entries)  # before a lock is made in a folder that may not exist
        with staging.locked(self.path):
            entries = dict(self.entries)
            _require(wanted, entries)
            with staging.in_doubt(self.path, wanted):
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
            strays = {p.name for p in (self.path / "adapters").iterdir() if not p.name.startswith(".")}
            lost = [printable(name) for name in sorted(strays - set(entries))]
            problems += [Problem(name, "adapters/" + name, "not in zoo.json") for name in lost]
        return problems

    def _home(self, name: str) -> Path:
        return self.path / "adapters" / name


def copy_files(folder: Path, into: Path, max_bytes: int = inspect.MAX_BYTES) -> None:
    """Copy the adapter's own files, and nothing else, after `inspect.check_folder` passed."""
    for name in inspect.check_folder(folder, max_bytes):
        shutil.copyfile(folder / name, into / name)


def facts_of(folder: Path) -> dict[str, dict[str, Any]]:
    """File name → {"sha256", "size"} of all under a folder, as a manifest lists them; names are posix paths."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: {"sha256": inspect.hashes(path)[0], "size": path.stat().st_size} for name, path in paths.items()}


def norm_of(adapter: Adapter) -> float | None:
    """‖ΔW‖_F over all sites, to six digits, as a manifest records it; None where it is no finite number."""
    from recycler.zoo.similarity import norm

    size = float(f"{norm(adapter):.6g}")
    return size if math.isfinite(size) else None


def _same_contents(a: Entry, b: Entry) -> bool:
    """By weights and config; a card may be edited without making another adapter, and so may another machine's rounding where
    both were converted from the same files in the same way."""
    if a.converted and b.converted and all(a.converted.get(key) == b.converted.get(key) for key in HOW_CONVERTED):
        return True
    return all(a.files[f]["sha256"] == b.files[f]["sha256"] for f in (inspect.CONFIG, inspect.WEIGHTS))


def _note_twins(receipt: Receipt, entry: Entry, entries: Mapping[str, Entry]) -> Receipt:
    """A copy under another name counts twice in every average and vote."""
    twins = [name for name, other in entries.items() if other.weights == entry.weights]
    if not twins:
        return receipt
    return replace(receipt, warnings=(*receipt.warnings, f"it has the same weights as {shorten(twins)}"))


def _with_base(old: Entry, new: Entry) -> tuple[Entry, str]:
    """The entry that is kept where contents are the same: the old one, with the base where only the new one
    has it."""
    forced = new.forced_base if new.base else old.forced_base
    same = new.base is None or match.same_base(new.base, old.base)
    entry = replace(
        old,
        base=new.base or old.base,
        base_path=new.base_path or old.base_path,
        base_revision=(same and old.base_revision) or new.base_revision,  # a commit once recorded stays
        forced_base=forced,
    )
    note = f"{old.name} is in the zoo already, with the same contents"
    return entry, note + ("; left as it was" if entry == old else "; its base was recorded")


def _taken(old: Entry, new: Entry) -> UsageError:
    return UsageError(
        f"The zoo holds another adapter called {old.name}, from {printable(old.source)}.",
        f"What comes from {printable(new.source)} has other contents, and nothing is overwritten.",
        f"Give it another name with --as, or run: recycle zoo remove {old.name}",
        code="E_EXISTS",
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
        code="E_UNKNOWN",
    )


def _verify(home: Path, entry: Entry) -> list[Problem]:
    problems = []
    present = {path.name for path in home.iterdir()} if home.is_dir() else set()
    for name, fact in entry.files.items():
        if name not in present:
            problems.append(Problem(entry.name, printable(name), "missing"))
        elif inspect.hashes(home / name)[0] != fact["sha256"]:
            problems.append(Problem(entry.name, printable(name), "changed: its sha256 differs from zoo.json"))
    problems += [Problem(entry.name, printable(n), "not in zoo.json") for n in sorted(present - set(entry.files))]
    return problems
