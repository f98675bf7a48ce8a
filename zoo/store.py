"""The zoo on disk: a mapping from name to adapter.

``zoo.json`` is the truth: small, sorted, diffable. A folder that it does not list is no part of the zoo.
Files are staged in a private folder, vetted there, and renamed into place; the manifest is written last,
under a lock, by renaming a finished file over the old one. Whatever fails, and wherever, the zoo is as
before.

Beyond `SMALL` adapters changes go to a journal beside zoo.json (`recycler.zoo.journal`), and entries are read through an index
(`recycler.zoo.index`), so that neither adding nor looking gets slower as the zoo grows.

::

    zoo.json           name → source, 40-hex revision, base, sha256 of every file, licence, ranks
    zoo-<id>.jsonl     in a large zoo, what changed since
    cache/             derived: index.sqlite, sketches.bin
    adapters/<name>/   the PEFT files as downloaded
    profiles/<id>/     routers/<id>/
"""

from __future__ import annotations

import math
import os
import random
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timezone
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from recycler.zoo import formats, inspect, journal, match, staging
from recycler.zoo.adapter import Adapter
from recycler.zoo.entries import Entries
from recycler.zoo.errors import SecurityError, UsageError, shorten
from recycler.zoo.index import PEERS, Found, Index
from recycler.zoo.inspect import Receipt, printable
from recycler.zoo.manifest import (
    HOW_CONVERTED,
    Entry,
    State,
    check_name,
    journal_of,
    read_manifest,
    slug,
    state_of,
    write_manifest,
)
from recycler.zoo.staging import require_writable as require_writable
from recycler.zoo.unknown import UnknownAdapterError as UnknownAdapterError
from recycler.zoo.unknown import require, unknown
from recycler.zoo.verifying import Problem, compare

SMALL = 1000
"""Up to so many adapters zoo.json is written whole at every change."""
_SMALL_BYTES = 4_000_000  # up to which a zoo.json without a journal is parsed rather than indexed
_GARBAGE = 8  # a journal this many times as long as zoo.json is folded into it, where most of it no longer counts


class Zoo(Mapping[str, Adapter]):
    """Adapters by name. Reading ``zoo["math"]`` reads its factors; len, ``in`` and iteration do not.

    Args:
        path: the zoo's folder; ``$RECYCLE_ZOO`` where None, else ``~/.cache/recycle/zoo``. It is created by
            the first `add`, not here.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        chosen = path or os.environ.get("RECYCLE_ZOO") or "~/.cache/recycle/zoo"
        self.path = Path(chosen).expanduser()
        self._seen: tuple[State, Mapping[str, Entry]] | None = None

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
        """Name → Entry, sorted by name, as the manifest says now. A large zoo's are read one at a time, as they are asked for:
        len, ``in``, `page` and a single entry then cost the same as in a small one.

        Raises:
            InputError: zoo.json is broken, or was written by a newer version.
        """
        state = state_of(self.manifest)
        if state is None:
            return {}
        if self._seen is None or self._seen[0] != state:  # else a loop over all names would parse it every time
            large = state[2] > _SMALL_BYTES or journal_of(self.manifest) is not None
            entries = Entries(self.index) if large else MappingProxyType(read_manifest(self.manifest))
            self._seen = state, entries
        return self._seen[1]

    @cached_property
    def index(self) -> Index:
        """For pages and searches; made, and brought up to date, when it is asked."""
        return Index(self.path)

    def entry(self, name: str) -> Entry:
        """Raises UnknownAdapterError, naming close matches first."""
        entries = self.entries
        found = entries.get(name)
        if found is None:
            raise unknown([name], entries)
        return found

    def page(self, limit: int | None = None, offset: int = 0) -> list[Entry]:
        """At most `limit` entries in the order of names, after the first `offset`."""
        entries = self.entries
        if isinstance(entries, Entries):
            return entries.index.page(-1 if limit is None else limit, offset)
        return list(islice(entries.values(), offset, None if limit is None else offset + limit))

    def search(self, text: str, limit: int | None = 20, offset: int = 0) -> list[Found]:
        """Adapters whose name, source, base, licence or card hold every word of `text`, or a word that begins with it, the best
        first."""
        return self.index.search(text, limit, offset) if self.manifest.exists() else []

    def matching(self, text: str) -> list[str]:
        """The names of all that `search` finds, sorted."""
        return self.index.matching(text) if self.manifest.exists() else []

    def peers(self, base: str | None, base_path: str | None = None) -> list[Entry]:
        """Adapters to judge a new one by: those for the same base, or on the same folder. All of a small zoo; of a large one some
        hundreds, which say as well what is usual."""
        entries = self.entries
        if not isinstance(entries, Entries):
            return list(entries.values())
        index = entries.index
        some = [e for other in index.bases() if match.same_base(other, base) for e in index.of_base(other)]
        more = index.of_base_path(base_path) if base_path else []
        return list({entry.name: entry for entry in [*some[:PEERS], *more]}.values())

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
        if journal_of(self.manifest):
            self._sketch(adapter, entry)
        with staging.locked(self.path):
            entries = self.entries
            if old := entries.get(name):
                return self._keep_again(staged, old, entry, receipt)
            receipt = _note_twins(receipt, entry, entries)
            with staging.in_doubt(self.path, [name]):
                shutil.rmtree(home, ignore_errors=True)  # not listed, so nobody's
                staged.rename(home)
                try:
                    self._write({name: entry})
                except BaseException:
                    shutil.rmtree(home, ignore_errors=True)
                    raise
        return entry, receipt

    def _keep_again(self, staged: Path, old: Entry, entry: Entry, receipt: Receipt) -> tuple[Entry, Receipt]:
        """`keep` for a name that is taken, under the lock."""
        home = self._home(entry.name)
        if not _same_contents(old, entry):
            raise _taken(old, entry)
        kept, note = _with_base(old, entry)
        if compare(home, old):
            kept, note = replace(kept, files=entry.files), f"{old.name} was damaged in the zoo, and is whole again"
            aside = staging.trash(self.path)
            if home.exists():
                home.rename(aside)
            staged.rename(home)
            shutil.rmtree(aside, ignore_errors=True)
        if kept != old:
            self._write({old.name: kept})
        return kept, replace(receipt, notes=(*receipt.notes, note))

    def held(self, name: str, source: str, revision: str | None) -> Entry | None:
        """The entry of that name if it came from there, at that commit, and is undamaged: then there is nothing to fetch."""
        entry = self.entries.get(name)
        same = entry is not None and revision is not None and (entry.source, entry.revision) == (source, revision)
        return entry if entry is not None and same and not compare(self._home(name), entry) else None

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
            old = self.entry(name)
            said = replace(old, base=base, base_path=base_path, base_revision=base_revision, forced_base=forced)
            entry, note = _with_base(old, said)
            if entry != old:
                self._write({name: entry})
        return entry, note

    def remove(self, names: str | Iterable[str]) -> None:
        """Remove adapters; all of them or, where one is unknown, none.

        Raises:
            UnknownAdapterError: naming those that are not there.
        """
        wanted = [names] if isinstance(names, str) else list(names)
        if not wanted:
            return
        require(wanted, self.entries)  # before a lock is made in a folder that may not exist
        with staging.locked(self.path):
            require(wanted, self.entries)
            with staging.in_doubt(self.path, wanted):
                self._write({}, wanted)
                for name in wanted:
                    shutil.rmtree(self._home(name), ignore_errors=True)

    def verify(self, names: Iterable[str] | None = None) -> list[Problem]:
        """Hash all files of the named adapters (of all, where None) and compare with the manifest.

        Returns:
            Every file that is missing, changed or not listed; empty where all is well.
        """
        entries = self.entries
        if names is not None:
            names = list(names)
            require(names, entries)
        wanted = entries.values() if names is None else (entries[name] for name in names)
        problems = [problem for entry in wanted for problem in compare(self._home(entry.name), entry)]
        if names is None and (self.path / "adapters").is_dir():
            strays = {p.name for p in (self.path / "adapters").iterdir() if not p.name.startswith(".")}
            lost = [printable(name) for name in sorted(strays - set(entries))]
            problems += [Problem(name, "adapters/" + name, "not in zoo.json") for name in lost]
        return problems

    def weights(self) -> list[tuple[str, str]]:
        """(name, sha256 of its weights) of all, sorted."""
        entries = self.entries
        if isinstance(entries, Entries):
            return entries.index.hashes()
        return [(name, entry.weights) for name, entry in entries.items()]

    def sample(self, count: int, seed: int = 0) -> list[str]:
        """Names drawn at random, the same for the same zoo and seed; all, where there are no more. Sorted."""
        names = list(self)
        return sorted(random.Random(seed).sample(names, min(count, len(names))))

    def reindex(self) -> int:
        """Write zoo.json whole again, its journal folded in; remove what killed processes left, and build the index anew.

        Returns:
            How many adapters there are.
        """
        if not self.manifest.exists():
            return 0
        with staging.locked(self.path):
            staging.sweep_adapters(self.path)
            self._fold(read_manifest(self.manifest))
        self.index.rebuild()
        return len(self)

    def _write(self, changed: Mapping[str, Entry], removed: Collection[str] = ()) -> None:
        """Make a change to the manifest, under the lock: in a small zoo zoo.json is written anew, in a large one its journal grows."""
        entries = self.entries
        log = journal_of(self.manifest)
        if log is None and len(entries) + len(changed) <= SMALL:
            gone = set(removed)
            write_manifest(self.manifest, {**{n: e for n, e in entries.items() if n not in gone}, **changed})
            return
        if log is None or _mostly_garbage(self.manifest, log, entries):
            log = self._fold(entries, stays_large=True)
        assert log is not None
        journal.append(log, {name: entry.to_json() for name, entry in changed.items()}, removed)

    def _fold(self, entries: Mapping[str, Entry], *, stays_large: bool = False) -> Path | None:
        """Write zoo.json whole, under the lock; returns the journal that continues it, where the zoo is large."""
        large = stays_large or len(entries) > SMALL
        log = journal.create(self.path) if large else None
        if large:
            (self.path / "staging").mkdir(exist_ok=True)
        write_manifest(self.manifest, dict(entries), log)
        for old in set(self.path.glob(journal.PATTERN)) - {log}:
            old.unlink()
        if not large:
            with suppress(OSError):  # somebody's private folder is still in it
                (self.path / "staging").rmdir()
        return log

    def _sketch(self, adapter: Adapter, entry: Entry) -> None:
        """Note the sketch of an adapter while it is in memory; whoever misses one later makes it."""
        from recycler.zoo.sketches import Sketches, sketch

        Sketches(self.path).put({entry.weights: sketch(adapter)})

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
    if isinstance(entries, Entries):
        twins = entries.index.with_weights(entry.weights)
    else:
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


def _mostly_garbage(manifest: Path, log: Path, entries: Mapping[str, Entry]) -> bool:
    """Whether a journal grew by changes to the same adapters over and over; a zoo that only grows never has one."""
    written, grown = manifest.stat().st_size, log.stat().st_size
    if grown < _GARBAGE * max(written, _SMALL_BYTES):
        return False
    some = [len(str(entry.to_json())) for entry in entries.index.page(20)] if isinstance(entries, Entries) else []
    return grown > 3 * len(entries) * (sum(some) / max(len(some), 1))
