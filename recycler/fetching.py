"""Sources → zoo: download or read, vet, compare with the base, keep. One bad adapter
does not stop the others.

Nothing is kept that was not read in full and, where the base can be had, found to fit it site by site.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recycler.zoo import config, formats, hub, inspect, match
from recycler.zoo.errors import InputError, PartialError, RecycleError, UsageError, shorten
from recycler.zoo.hub import Source
from recycler.zoo.inspect import Receipt, printable
from recycler.zoo.manifest import check_name, slug
from recycler.zoo.store import Zoo, copy_files

SCHEMA_VERSION = 1
OnEvent = Callable[[str, str, str], None]
"""Called with a stage ("start", "kept", "checked", "failed"), the adapter's name, and a text for people."""


@dataclass(frozen=True)
class Fetched:
    """An adapter that was kept or, in a dry run, could be.

    Attributes:
        bytes: the size of its files.
        base: the base it is for, None where unknown.
        base_path: the folder that served as a copy of the base, or None.
        kept: whether it is in the zoo now.
    """

    name: str
    source: str
    revision: str | None
    base: str | None
    base_path: str | None
    bytes: int
    kept: bool
    receipt: Receipt

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        plain = {key: value for key, value in vars(self).items() if key != "receipt"}
        return {**plain, "receipt": self.receipt.to_json()}


@dataclass(frozen=True)
class Failure:
    """A source that was refused or not to be had, and why."""

    name: str
    source: str
    error: RecycleError

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {
            "name": self.name,
            "source": self.source,
            "error": type(self.error).__name__,
            "exit_code": self.error.exit_code,
            "message": str(self.error),
        }


@dataclass(frozen=True)
class FetchReport:
    """What became of every source, in the order they were given."""

    fetched: tuple[Fetched, ...]
    failures: tuple[Failure, ...] = ()
    dry_run: bool = False

    @property
    def names(self) -> list[str]:
        """The adapters that were kept or, in a dry run, could be."""
        return [one.name for one in self.fetched]

    def lines(self) -> list[str]:
        """The report as text: a receipt per adapter, then the failures."""
        lines = []
        for one in self.fetched:
            lines += one.receipt.lines()
            if self.dry_run:
                lines.append(
                    f"  {one.bytes / 1e6:.1f} MB, targets {', '.join(one.receipt.targets)}, "
                    f"base {printable(one.base or 'unknown')}; nothing was kept"
                )
        return lines + [f"{printable(f.source)}: {f.error}" for f in self.failures]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {
            "schema_version": SCHEMA_VERSION,
            "dry_run": self.dry_run,
            "fetched": [one.to_json() for one in self.fetched],
            "failures": [one.to_json() for one in self.failures],
        }

    def raise_for_failures(self) -> None:
        """Return where nothing failed.

        Raises:
            PartialError: some succeeded, or all failed for reasons of different kinds.
            RecycleError: all failed for reasons of one kind: an error of that kind, so that a script which
                fetches five gated repositories sees the exit code that one would give.
        """
        if not self.failures:
            return
        total = len(self.fetched) + len(self.failures)
        kinds = {type(f.error) for f in self.failures}
        kind = PartialError
        if not self.fetched and len(kinds) == 1:
            (kind,) = kinds  # type: ignore[assignment]
        listing = "\n".join(f"{printable(f.source)}: {f.error}" for f in self.failures[:20])
        more = f"\nand {len(self.failures) - 20} more" if len(self.failures) > 20 else ""
        raise kind(
            f"{len(self.failures)} of {total} adapters were not fetched.",
            listing + more,
            "The others are in the zoo." if self.fetched and not self.dry_run else "",
        )


def fetch(
    sources: str | Path | Sequence[str | Path],
    base: str | Path | None = None,
    zoo: Zoo | None = None,
    *,
    names: Sequence[str] | None = None,
    dry_run: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
    max_bytes: int = inspect.MAX_BYTES,
    on_event: OnEvent | None = None,
) -> FetchReport:
    """Bring adapters into the zoo.

    Args:
        sources: ``org/name[@revision][/subfolder]``, folders, or folders of adapter folders.
        base: the base model that they are for. A Hub id must be the one that an adapter declares, unless it
            declares none or a path on somebody's disk. A folder is taken as a copy of the declared base when
            all shapes fit, and is recorded. Where None, the declared base is looked up; where that cannot be
            had, the adapter is kept with a warning that it was not compared.
        zoo: where to; the default zoo where None.
        names: a name for each source, in order; derived from the repository's or folder's name where None.
        dry_run: say what would happen and keep nothing. From the Hub, only listing, config and tensor header
            are read, so values such as NaN are not looked at.
        token: an access token for the Hub; the saved one where None.
        endpoint: another Hub than the default.
        max_bytes: the most that one adapter's files may hold together.
        on_event: told what happens, for progress.

    Returns:
        What became of every source.

    Raises:
        UsageError: no sources, names that do not match them, or two adapters of one name.
        RecycleError: where there is one source only, its error. With several, failures are in the report; see
            `FetchReport.raise_for_failures`.
    """
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    jobs = [source for text in given for source in _expand(Source.parse(text))]
    chosen = _names(jobs, names)
    run = _Run(Zoo() if zoo is None else zoo, _Bases(base), dry_run, token, endpoint, max_bytes)
    report = on_event or (lambda stage, name, text: None)
    fetched: list[Fetched] = []
    failures: list[Failure] = []
    for name, source in zip(chosen, jobs, strict=True):
        report("start", name, source.text)
        try:
            one = _explained(run, name, source)
        except RecycleError as error:
            report("failed", name, str(error))
            if len(jobs) == 1:
                raise
            failures.append(Failure(name, source.text, error))
        else:
            report("kept" if one.kept else "checked", name, str(one.receipt))
            fetched.append(one)
    return FetchReport(tuple(fetched), tuple(failures), dry_run)


@dataclass(frozen=True)
class _Placed:
    """The outcome of comparing an adapter with its base."""

    base: str | None
    path: str | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def stamp(self, receipt: Receipt, more: Sequence[str] = ()) -> Receipt:
        notes = (*receipt.notes, *self.notes, *more)
        return replace(receipt, notes=notes, warnings=(*receipt.warnings, *self.warnings))


@dataclass
class _Bases:
    """The base that was asked for, and the shapes of all that were looked up."""

    asked: str | Path | None
    seen: dict[str, Mapping[str, tuple[int, int]] | RecycleError] = field(default_factory=dict)

    def shapes(self, base: str) -> Mapping[str, tuple[int, int]]:
        if base not in self.seen:
            from recycler.base import linear_shapes

            try:
                self.seen[base] = linear_shapes(base)
            except RecycleError as error:
                self.seen[base] = error
        found = self.seen[base]
        if isinstance(found, RecycleError):
            raise found
        return found

    def check(self, name: str, sites: Mapping[str, tuple[int, int]], declared: str | None) -> _Placed:
        """Compare an adapter's sites with the base it is for; see `fetch`."""
        if self.asked is None:
            return self._check_declared(name, sites, declared)
        asked = str(self.asked)
        if isinstance(self.asked, Path) or inspect.is_folder(asked):
            folder = str(Path(asked).expanduser().resolve())
            match.check_sites(name, sites, self.shapes(folder))
            copied = f", used as a copy of {printable(declared)}" if declared and not _same_path(declared, folder) else ""
            return _Placed(declared, folder, (f"fits the base in {printable(folder)}{copied}",))
        if match.is_hub_id(declared) and not match.same_base(asked, declared):
            raise InputError(
                f"{name} was trained for {printable(declared)}, not for {printable(asked)}.",
                "On another base its update means something else, even where the shapes are the same.",
                f"Use --base {printable(declared)}, or a local folder that holds a copy of it.",
            )
        match.check_sites(name, sites, self.shapes(asked))
        if match.is_hub_id(declared):
            return _Placed(declared)
        said = f"the path {printable(declared)}" if declared else "no base"
        return _Placed(
            asked,
            None,
            (),
            (f"it declares {said}; it fits the shapes of {printable(asked)}, which it may not be for",),
        )

    def _check_declared(self, name: str, sites: Mapping[str, tuple[int, int]], declared: str | None) -> _Placed:
        if declared is None:
            return _Placed(None, None, (), ("NOT CHECKED against a base: it declares none; name one with --base",))
        try:
            shapes = self.shapes(declared)
        except RecycleError as error:
            text = f"NOT CHECKED against its base {printable(declared)}, which could not be had: {error.what}"
            return _Placed(declared, None, (), (text + " Name a folder that holds a copy with --base.",))
        match.check_sites(name, sites, shapes)
        return _Placed(declared)


@dataclass(frozen=True)
class _Run:
    """What is the same for all sources of one call."""

    zoo: Zoo
    bases: _Bases
    dry_run: bool
    token: str | bool | None
    endpoint: str | None
    max_bytes: int

    def one(self, name: str, source: Source) -> Fetched:
        if not self.dry_run:
            return self._keep(name, source)
        done = self._preview_local(name, source) if source.folder is not None else self._preview_hub(name, source)
        held = self.zoo.entries.get(name)
        if held:
            text = f"the zoo holds {name} from {printable(held.source)}; other contents would need --as"
            done = replace(done, receipt=replace(done.receipt, warnings=(*done.receipt.warnings, text)))
        return done

    def _keep(self, name: str, source: Source) -> Fetched:
        with self.zoo.staging() as staged:
            revision: str | None = None
            notes: tuple[str, ...] = ()
            if source.folder is not None:
                copy_files(source.folder, staged, self.max_bytes)
            else:
                got = hub.download(source, staged, max_bytes=self.max_bytes, token=self.token, endpoint=self.endpoint)
                revision, notes = got.revision, got.notes
            adapter, receipt = formats.read(staged, name, source=source.place, revision=revision, max_bytes=self.max_bytes)
            sites = {path: factors.shape for path, factors in adapter.sites.items()}
            placed = self.bases.check(name, sites, adapter.base)
            adapter = replace(adapter, base=placed.base)
            entry, receipt = self.zoo.keep(staged, adapter, placed.stamp(receipt, notes), base_path=placed.path)
        size = sum(fact["size"] for fact in entry.files.values())
        return Fetched(name, entry.source, entry.revision, entry.base, entry.base_path, size, True, receipt)

    def _preview_local(self, name: str, source: Source) -> Fetched:
        assert source.folder is not None
        files = inspect.check_folder(source.folder, self.max_bytes)
        adapter, receipt = formats.read(source.folder, name, source=source.place, max_bytes=self.max_bytes)
        sites = {path: factors.shape for path, factors in adapter.sites.items()}
        placed = self.bases.check(name, sites, adapter.base)
        size = sum((source.folder / file).stat().st_size for file in files)
        return Fetched(name, source.place, None, placed.base, placed.path, size, False, placed.stamp(receipt))

    def _preview_hub(self, name: str, source: Source) -> Fetched:
        access: dict[str, Any] = {"token": self.token, "endpoint": self.endpoint}
        with tempfile.TemporaryDirectory() as folder:
            listing = hub.look(source, max_bytes=self.max_bytes, **access)
            hub.download_files(source, listing, Path(folder), only=(inspect.CONFIG,), **access)
            settings = config.parse_config(config.read_config(Path(folder) / inspect.CONFIG), name)
        header = hub.header(source, listing, **access)
        sites, receipt = formats.plan(settings, header, name, source=source.place)
        placed = self.bases.check(name, {path: site.shape for path, site in sites.items()}, settings.base)
        return Fetched(
            name,
            source.place,
            listing.revision,
            placed.base,
            placed.path,
            listing.size,
            False,
            placed.stamp(receipt),
        )


def _explained(run: _Run, name: str, source: Source) -> Fetched:
    try:
        return run.one(name, source)
    except RecycleError:
        raise
    except OSError as error:
        raise InputError(
            f"{printable(source.text)} could not be read or kept: {printable(error.strerror or error)}.",
            f"The system refused {printable(error.filename)}." if error.filename else "",
            "Check permissions and free space.",
        ) from error


def _same_path(declared: str, folder: str) -> bool:
    return not match.is_hub_id(declared) and str(Path(declared).expanduser().resolve()) == folder


def _expand(source: Source) -> list[Source]:
    """The source itself or, for a folder without a config whose children have one, the children by name."""
    folder = source.folder
    if folder is None or not folder.is_dir() or (folder / inspect.CONFIG).exists():
        return [source]
    children = sorted(p for p in folder.iterdir() if (p / inspect.CONFIG).is_file())
    return [Source.parse(child) for child in children] or [source]


def _names(jobs: Sequence[Source], names: Sequence[str] | None) -> list[str]:
    if not jobs:
        raise UsageError("There is nothing to fetch.", fix="Name a repository on the Hub or a folder.")
    if names is not None and len(names) != len(jobs):
        raise UsageError(
            f"{len(names)} names were given for {len(jobs)} adapters.",
            "Each --as names one adapter, in the order of the sources, and a folder may hold several.",
            "Give as many names as adapters, or none.",
        )
    chosen = [slug(job.stem) for job in jobs] if names is None else [check_name(name) for name in names]
    twice = [name for name, count in Counter(chosen).items() if count > 1]
    if twice:
        owners = [f"{name} ({shorten(j.text for j, n in zip(jobs, chosen, strict=True) if n == name)})" for name in twice]
        raise UsageError(
            f"Several adapters would be called {shorten(owners)}.",
            "A name stands for one adapter.",
            "Give every source a name with --as, in order.",
        )
    return chosen
