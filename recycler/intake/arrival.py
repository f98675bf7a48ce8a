"""One source → adapters in the zoo: download or read, convert what is no LoRA, vet, compare with the base, keep.

What takes long, the network, comes before a place in the zoo is made; what takes memory, reading factors, is done for few
adapters at once.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recycler.intake.bases import Bases, Placed, Shapes
from recycler.intake.fetch_report import Failure, Fetched
from recycler.intake.jobs import Job
from recycler.intake.locking import check_against, check_originals, listing_of, originals_of
from recycler.intake.policy import Policy
from recycler.parallel import Tell
from recycler.zoo import config, formats, hub, importers, inspect, match, staging, writing
from recycler.zoo.adapter import Adapter
from recycler.zoo.errors import InputError, RecycleError, SecurityError
from recycler.zoo.inspect import Receipt, printable
from recycler.zoo.kinds import Kind, kind_of
from recycler.zoo.manifest import Entry
from recycler.zoo.sources import INITIAL, Listing
from recycler.zoo.store import Zoo, copy_files, facts_of, norm_of

_AT_ONCE = 2  # adapters whose factors are in memory; a large one takes 4 GB in fp32
_LAYOUT_NAMES = {"peft": "a PEFT pickle", "mttl": "an expert of mttl", "phatgoose": "an expert of PHATGOOSE"}


@dataclass(frozen=True)
class Origin:
    """Where staged files came from: what the manifest records, and what the receipt should say of the way."""

    place: str
    revision: str | None = None
    licence: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Intake:
    """What is the same for all sources of one fetch; see `recycler.fetch`. For any number of threads."""

    zoo: Zoo
    bases: Bases
    policy: Policy = field(default_factory=Policy)
    token: str | bool | None = None
    endpoint: str | None = None
    max_bytes: int = inspect.MAX_BYTES
    allow_pickle: bool = False
    layout: str = "auto"
    rank: int | None = None
    energy: float | None = None
    _room: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_AT_ONCE))

    @property
    def access(self) -> dict[str, Any]:
        return {"token": self.token, "endpoint": self.endpoint}

    def keep(self, job: Job, tell: Tell) -> list[Fetched | Failure]:
        """Bring what a source holds into the zoo: one adapter or, from a library in one place, several.

        Args:
            tell: told ("size", bytes to come) and ("bytes", bytes that came).

        Raises:
            RecycleError: the source was refused, or is not to be had.
        """
        source = job.source
        if source.folder is not None:
            return self._keep_folder(job, source.folder)
        if source.pinned and (held := self._held(job, source.place, source.revision)):
            return [self._again(job, held, ())]
        listing = self.look(job)
        origin = Origin(replace(source, repo=listing.repo).place, listing.revision, listing.licence)
        if held := self._held(job, origin.place, origin.revision):
            return [self._again(job, held, listing.notes)]
        tell("size", listing.size)
        hub.prefetch(source, listing, on_bytes=lambda size: tell("bytes", size), **self.access)
        with self.zoo.staging() as staged:
            got = hub.download_files(source, listing, staged, **self.access)
            return self._settle(job, staged, replace(origin, notes=got.notes))

    def look(self, job: Job) -> Listing:
        """What would be downloaded: as the lock has it, else as the Hub lists it, with the state before training where that is
        needed to read the adapter."""
        if job.pinned is not None:
            return listing_of(job.pinned, job.source, self.max_bytes, allow_pickle=self.allow_pickle)
        listing = hub.look(job.source, max_bytes=self.max_bytes, pick=self._pick(job.source.text), **self.access)
        if not listing.initial or inspect.CONFIG not in listing.files:
            return listing
        (path,) = hub.prefetch(job.source, listing, only=(inspect.CONFIG,), **self.access).values()
        settings = config.parse_json(config.read_config(path), job.name)
        if kind_of(settings).how == "read" or kind_of(settings, initial=True).how != "convert":
            return listing
        return replace(listing, files={**listing.files, **listing.initial})

    def sizes(self, job: Job, folder: Path) -> dict[str, int]:
        """File name → bytes of a local source; nothing where it is no folder, which whoever reads it says.

        Raises:
            InputError: it comes from a lock, and is not here.
        """
        if job.pinned is not None and not folder.is_dir():
            raise InputError(
                f"{job.name} is not here: the lock says that it came from {printable(job.pinned.source)}.",
                "That is no repository on the Hub, and no folder of this machine.",
                "Get that adapter from the lock's owner, or put its folder into adapters/ beside the lock.",
            )
        return _sizes(folder)

    def layout_of(self, names: Mapping[str, int], where: str) -> str | None:
        """How files are laid out, None where they are a PEFT adapter's with safetensors.

        Raises:
            SecurityError: they are pickles, which were not allowed.
        """
        found = importers.layout_of(names) if self.layout in ("auto", "peft") else self.layout
        if self.layout == "peft" and found != "peft":
            found = None
        if found is None or self.allow_pickle:
            return found
        if found == "peft":
            return None  # refused by name where its files are vetted
        pickles = [name for name in importers.files_of(names, found) if inspect.is_pickle(name) or name.endswith(".meta")]
        raise SecurityError(
            f"{printable(where)} holds its weights as pickles only: {', '.join(map(printable, pickles[:3]))}.",
            "Loading a pickle can run any code its author put there.",
            "Ask the author for safetensors, or add --allow-pickle: they are then opened in a process that can do little harm.",
            code="E_PICKLE",
        )

    def _pick(self, where: str) -> hub.Pick:
        def pick(sizes: Mapping[str, int]) -> list[str] | None:
            layout = self.layout_of(sizes, where)
            if layout is None:
                return None
            chosen = importers.files_of(sizes, layout)
            large = [name for name in chosen if sizes[name] > self.max_bytes]
            if large:
                raise InputError(
                    f"{printable(where)}: {printable(large[0])} holds {sizes[large[0]] / 1e6:,.0f} MB.",
                    f"That is more than the limit of {self.max_bytes / 1e6:,.0f} MB.",
                    "If it is meant, raise the limit with --max-size.",
                    code="E_TOO_LARGE",
                )
            return chosen

        return pick

    def _held(self, job: Job, place: str, revision: str | None) -> Entry | None:
        """The zoo's own copy, where it is what would come of this job, so that nothing needs to come."""
        held = self.zoo.held(job.name, place, revision)
        if held is None or (held.converted and (held.converted.get("rank"), held.converted.get("energy")) != self._dials(job)):
            return None
        return held if job.pinned is None or originals_of(held) == originals_of(job.pinned) else None

    def _dials(self, job: Job) -> tuple[Any, Any]:
        """(rank, energy) for a conversion: a lock's, else those asked for."""
        pinned = job.pinned.converted if job.pinned else None
        return (pinned.get("rank"), pinned.get("energy")) if pinned else (self.rank, self.energy)

    def _again(self, job: Job, held: Entry, notes: tuple[str, ...]) -> Fetched:
        """What the zoo holds already, looked at as if it had just come; only a base that was asked for is new."""
        with self._room:
            adapter, receipt = formats.read(self.zoo.folder(held.name), held.name, source=held.source, revision=held.revision)
            placed = _pinned_base(job, self.place(job, _shapes(adapter), adapter.base), receipt, adapter.base)
        warnings = self.policy.check_licence(held.name, held.licence)
        asked = None if self.bases.asked is None else placed.base
        entry, note = self.zoo.record_base(
            held.name, asked, placed.path, base_revision=asked and placed.revision, forced=placed.forced
        )
        return _fetched(entry, placed.stamp(receipt, (*notes, note), warnings))

    def _keep_folder(self, job: Job, folder: Path) -> list[Fetched | Failure]:
        origin = Origin(job.pinned.source if job.pinned else job.source.place)
        layout = self.layout_of(self.sizes(job, folder), str(folder))
        if layout is not None:
            if job.pinned is not None:
                check_originals(job.pinned, folder)
            return self._import(job, folder, layout, origin)
        with self.zoo.staging() as staged:
            self.copy(folder, staged, job.name)
            return self._settle(job, staged, origin)

    def copy(self, folder: Path, into: Path, name: str) -> None:
        """Copy an adapter's own files, and its state before training where it lies beside it and is needed."""
        copy_files(folder, into, self.max_bytes)
        settings = config.parse_json(config.read_config(into / inspect.CONFIG), name)
        if kind_of(settings).how != "read" and kind_of(settings, initial=True).how == "convert":
            for beside in (path for path in sorted(folder.iterdir()) if INITIAL.fullmatch(path.name) and path.is_dir()):
                (into / beside.name).mkdir()
                copy_files(beside, into / beside.name, self.max_bytes)

    def _settle(self, job: Job, staged: Path, origin: Origin) -> list[Fetched | Failure]:
        """Make adapters of files that are on the disk."""
        if job.pinned is not None:
            check_originals(job.pinned, staged)
        layout = self.layout_of(_sizes(staged), job.source.text)
        if layout is not None:
            return self._import(job, staged, layout, origin)
        return [self._one(job, staged, origin)]

    def _import(self, job: Job, folder: Path, layout: str, origin: Origin) -> list[Fetched | Failure]:
        """Pickles → adapters, by `importers`."""
        only = [str(job.pinned.converted["expert"])] if job.pinned and job.pinned.converted else None
        failures: dict[str, RecycleError] = {}
        with self.zoo.staging() as made:
            with self._room:  # as many sandboxes
                found = importers.adapters(
                    folder,
                    layout,
                    self.bases.of(None),
                    made / "parts",
                    only,
                    name=job.name,
                    failures=failures,
                    max_bytes=self.max_bytes,
                )
            if len(found) + len(failures) == 1 and failures:
                (error,) = failures.values()
                raise type(error)(
                    f"{printable(job.source.text)}: {error.what}", error.why, error.fix, code=error.code
                ) from error
            results: list[Fetched | Failure] = []
            for path in found:
                alone = len(found) + len(failures) == 1
                name = job.name if alone else f"{job.name}-{path.name}" if job.given else path.name
                try:
                    results.append(self._imported(replace(job, name=name), folder, path, layout, origin))
                except RecycleError as refused:
                    if alone:
                        raise
                    results.append(Failure(name, f"{job.source.text}: {path.name}", refused))
        return results + [Failure(expert, f"{job.source.text}: {expert}", error) for expert, error in failures.items()]

    def _imported(self, job: Job, folder: Path, part: Path, layout: str, origin: Origin) -> Fetched:
        facts = importers.provenance(part)
        (part / importers.PROVENANCE).unlink()  # it names this machine's walls; what matters is in the manifest
        mine = {name for name in facts["files"]}
        others = {name for name in _sizes(folder) if not inspect.is_pickle(name) and not name.endswith(".meta")}
        originals = {
            name: fact for name, fact in facts_of(folder).items() if name in mine | (others & set(_read_by(folder, layout)))
        }
        converted = {"kind": _LAYOUT_NAMES[layout], "layout": layout, "expert": facts["expert"], "files": originals}
        walls = facts["sandbox"]
        lacking = f"; not on this system: {', '.join(walls['missing'])}" if walls["missing"] else ""
        notes = (*origin.notes, *facts["notes"], f"its pickles were opened apart by torch {walls['torch']}{lacking}")
        with self.zoo.staging() as staged:
            for path in part.iterdir():
                shutil.copyfile(path, staged / path.name)
            return self._one(job, staged, replace(origin, notes=notes), converted)

    def _one(self, job: Job, staged: Path, origin: Origin, converted: Mapping[str, Any] | None = None) -> Fetched:
        """Vet one adapter's files and keep them, converted first where they are no LoRA."""
        with staging.called(staged, job.name, job.source.text):
            return self._of_any_kind(job, staged, origin, converted)

    def _of_any_kind(self, job: Job, staged: Path, origin: Origin, converted: Mapping[str, Any] | None) -> Fetched:
        settings = config.parse_json(config.read_config(staged / inspect.CONFIG), job.name)
        kind = kind_of(settings, initial=any(path.is_dir() for path in staged.iterdir()))
        with self.zoo.staging() as made:
            if kind.how == "convert":
                how, notes = self._convert(job, kind, staged, made)
            elif (foreign := self._write_out(job, staged, made)) is not None:
                how, notes = (
                    {"kind": foreign, "lossless": True, "rank": None, "energy": None},
                    [f"{foreign}, which PEFT does not know; written as plain LoRA, without loss"],
                )
            else:
                return self._vet(job, staged, origin, converted and {**converted, "rank": None, "energy": None})
            originals = converted or {"layout": None, "expert": None, "files": facts_of(staged)}
            with staging.called(made, job.name, job.source.text):
                return self._vet(job, made, replace(origin, notes=(*origin.notes, *notes)), {**originals, **how})

    def _write_out(self, job: Job, staged: Path, made: Path) -> str | None:
        """What is read exactly here, but not by PEFT, written as the plain LoRA that it is; the name of its kind, or None."""
        inspect.check_folder(staged, self.max_bytes)
        settings = config.parse_config(config.read_config(staged / inspect.CONFIG), job.name)
        header = inspect.read_header(staged / inspect.WEIGHTS)
        foreign = next((kind for kind in formats.plan(settings, header, job.name)[1].kinds if kind in formats.FOREIGN), None)
        if foreign is not None:
            with self._room:
                adapter, receipt = formats.read(staged, job.name, max_bytes=self.max_bytes)
                writing.write_adapter(made, adapter.sites, base=adapter.base, base_revision=receipt.base_revision)
                writing.copy_papers(staged, made)
        return foreign

    def _convert(self, job: Job, kind: Kind, staged: Path, made: Path) -> tuple[dict[str, Any], list[str]]:
        """What the manifest says of a conversion, and its lines for the receipt."""
        from recycler.converting.conversion import convert

        rank, energy = self._dials(job)
        with self._room, _converting:
            result = convert(staged, made, base=self.base_to_convert(job), rank=rank, energy=energy, name=job.name)
        return {**result.to_json(), "rank": rank, "energy": energy}, result.lines()

    def base_to_convert(self, job: Job) -> str | None:
        """The base that a conversion asks: the one asked for, else a lock's; the adapter's own where None."""
        base = self.bases.of(None)
        if base is None and job.pinned is not None:
            base = job.pinned.base_path if job.pinned.base_path and Path(job.pinned.base_path).is_dir() else job.pinned.base
        return base

    def _vet(self, job: Job, staged: Path, origin: Origin, converted: Mapping[str, Any] | None) -> Fetched:
        pinned = job.pinned
        with self._room:
            adapter, receipt = formats.read(
                staged, job.name, source=origin.place, revision=origin.revision, max_bytes=self.max_bytes
            )
            placed = self.place(job, _shapes(adapter), adapter.base)
            norm = norm_of(adapter)
            licence = pinned.licence if pinned else adapter.licence or origin.licence
            warnings = self.policy.check_licence(job.name, licence)
            known = self.zoo.entries.get(job.name)
            if known is None:  # what is in was accepted once
                warnings += self.policy.check_norm(job.name, norm, placed.base, self.zoo.peers(placed.base))
            if pinned is not None:
                norm, more = check_against(pinned, facts_of(staged), norm)
                warnings += more
            placed = _pinned_base(job, placed, receipt, adapter.base)
            if self.bases.asked is None and known is not None and known.base:  # said before, and nothing else was said now
                placed = Placed(
                    known.base, known.base_path, placed.notes, placed.warnings, known.forced_base, known.base_revision
                )
            adapter = replace(adapter, base=placed.base, licence=licence)
            entry, receipt = self.zoo.keep(
                staged,
                adapter,
                placed.stamp(receipt, origin.notes, warnings),
                base_path=placed.path,
                base_revision=placed.revision,
                converted=converted,
                forced_base=placed.forced,
                added=pinned.added if pinned else None,
                norm=norm,
            )
        return _fetched(entry, receipt)

    def place(self, job: Job, sites: Shapes, declared: str | None) -> Placed:
        """Compare with the base: the one asked for, else the one that a lock names, else the one declared."""
        pinned = job.pinned
        if self.bases.asked is not None or pinned is None or pinned.base is None or pinned.base == declared:
            return self.bases.check(job.name, sites, declared)
        placed = self.bases.check(job.name, sites, pinned.base)
        said = printable(declared) if declared else "none"
        text = f"it declares the base {said}; the lock names {printable(pinned.base)}" + ", by force" * pinned.forced_base
        return replace(placed, warnings=(*placed.warnings, text), forced=pinned.forced_base)

    def check_norm(self, name: str, adapter: Adapter, base: str | None) -> tuple[str, ...]:
        """As `Policy.check_norm`, beside what the zoo holds now; what it holds already was accepted once."""
        if name in self.zoo.entries:
            return ()
        return self.policy.check_norm(name, norm_of(adapter), base, self.zoo.peers(base))


_converting = threading.Lock()  # PEFT and transformers change settings of the process while they build a model


def _pinned_base(job: Job, placed: Placed, receipt: Receipt, declared: str | None) -> Placed:
    """With the revision of the base that is recorded: a lock's, else what the adapter declares, else what was looked up."""
    if job.pinned is not None and match.same_base(job.pinned.base, placed.base):
        return replace(placed, revision=job.pinned.base_revision)
    own = receipt.base_revision if match.same_base(declared, placed.base) else None
    return replace(placed, revision=own or placed.revision)


def _fetched(entry: Entry, receipt: Receipt) -> Fetched:
    return Fetched(
        name=entry.name,
        source=entry.source,
        revision=entry.revision,
        base=entry.base,
        base_path=entry.base_path,
        bytes=sum(fact["size"] for fact in entry.files.values()),
        kept=True,
        receipt=receipt,
        licence=entry.licence,
        converted=entry.converted,
        forced_base=entry.forced_base,
    )


def _sizes(folder: Path) -> dict[str, int]:
    """File name → bytes; empty where it is no folder, which whoever reads it says."""
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()} if folder.is_dir() else {}


def _shapes(adapter: Adapter) -> dict[str, tuple[int, int]]:
    return {path: factors.shape for path, factors in adapter.sites.items()}


def _read_by(folder: Path, layout: str) -> list[str]:
    return importers.files_of(_sizes(folder), layout)
