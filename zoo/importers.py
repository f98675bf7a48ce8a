"""Zoos that are not PEFT-shaped, and PEFT's own pickles → PEFT folders.

===========  ====================================================  ==========================================
layout       files                                                 read by
===========  ====================================================  ==========================================
peft         adapter_config.json, adapter_model.bin                here (LoraHub's zoos, older repositories)
mttl         <expert>.ckpt + <expert>.meta; mttl_weights.bin +      `mttl`
             mttl_config.json; checkpoint.ckpt
phatgoose    best.pt, <task>_best.pt; experts.json or experts.txt  `phatgoose` (GLIDER too)
             may name the experts
===========  ====================================================  ==========================================

All these are pickles, and are opened by `unpickle` alone. What is written is vetted as if it had been downloaded so.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycler.zoo import formats, inspect, match, mttl, phatgoose, unpickle
from recycler.zoo.errors import InputError, RecycleError, SecurityError, UsageError, choices, shorten
from recycler.zoo.inspect import CONFIG, PICKLED, WEIGHTS, printable
from recycler.zoo.manifest import slug
from recycler.zoo.parts import Part, Tensors, write
from recycler.zoo.unpickle import Report
from recycler.zoo.writing import copy_papers

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LAYOUTS", "Part", "adapters", "files_of", "layout_of", "provenance", "split", "write"]

LAYOUTS = ("peft", "mttl", "phatgoose")
PROVENANCE = "provenance.json"
_MTTL_PAIR = ("mttl_weights.bin", "mttl_config.json")
_CHECKPOINT = re.compile(r"(?P<stem>.*?)(?P<joint>^|[_.-])(?P<step>best|finish|last)\.pt")
_LISTS = ("experts.json", "experts.txt")
_MAX_LIST = 1_000_000
_SECONDS_PER_BYTE = 1 / 10e6  # beside what one file may take however small


def layout_of(names: Iterable[str]) -> str | None:
    """The layout that a folder's file names show, or None. A folder with adapter_model.safetensors needs no importer."""
    present = set(names)
    if {CONFIG, PICKLED} <= present and WEIGHTS not in present:
        return "peft"
    if CONFIG in present:
        return None
    if _pairs(present) or set(_MTTL_PAIR) <= present or any(name.endswith(".ckpt") for name in present):
        return "mttl"
    return "phatgoose" if any(_CHECKPOINT.fullmatch(name) for name in present) else None


def files_of(names: Iterable[str], layout: str, only: Collection[str] | None = None) -> list[str]:
    """Of a folder's file names, those that `adapters` reads, sorted: what has to be downloaded.

    Raises:
        UsageError: no such layout, or `only` names experts that no file is named after.
    """
    present = sorted(set(names))
    about = [name for name in inspect.own_files(present) if name not in (CONFIG, WEIGHTS)]
    if layout == "peft":
        return sorted({CONFIG, PICKLED} & set(present)) + about
    if layout == "phatgoose":
        files = [name for name in present if name.endswith(".pt")]
        # A file of many experts is needed whatever is chosen from it.
        chosen = [name for name in files if _wanted(_stem(name, ""), only)] if len(files) > 1 else files
        return (chosen or files) + [name for name in _LISTS if name in present] + about
    if layout != "mttl":
        raise UsageError(f"{printable(layout)!r} is no layout.", f"It is {choices(LAYOUTS)}.", "Choose with --layout.")
    if set(_MTTL_PAIR) <= set(present):
        return [*_MTTL_PAIR, *about]
    pairs = _pairs(present)
    if not pairs:
        return [name for name in present if name.endswith(".ckpt")] + about
    chosen = [stem for stem in pairs if _wanted(stem, only)]
    if not chosen:
        raise UsageError(
            f"No expert is called {shorten(map(printable, only or ()))}.",
            f"There are {shorten(pairs)}.",
            "Choose of these.",
            code="E_UNKNOWN",
        )
    return [file for stem in chosen for file in (f"{stem}.ckpt", f"{stem}.meta")] + about


def split(state: Mapping[str, Tensor], facts: Mapping[str, Any], layout: str) -> Iterator[Part]:
    """The adapters that a file of tensors holds.

    Args:
        state: tensor name → tensor; only those of one adapter are read at a time.
        facts: ``name`` (of the adapter, or the stem of several names), ``base`` (an id or None), and by layout: ``info`` (mttl:
            what describes the expert) or ``names`` (phatgoose: the experts' names in order, or None).
        layout: "mttl" or "phatgoose"; PEFT's own pickles hold one adapter and need no splitting.

    Raises:
        InputError: the tensors are not those of this layout; see `mttl.split` and `phatgoose.split`.
    """
    name, base = str(facts["name"]), facts.get("base")
    if layout == "mttl":
        yield from mttl.split(state, facts.get("info") or {}, name, base=base)
    else:
        yield from phatgoose.split(state, name, names=facts.get("names"), base=base)


def adapters(
    folder: Path,
    layout: str,
    base: str | None,
    into: Path,
    only: Collection[str] | None = None,
    *,
    name: str | None = None,
    failures: dict[str, RecycleError] | None = None,
    max_bytes: int = inspect.MAX_BYTES,
    seconds: float = unpickle.SECONDS,
) -> list[Path]:
    """Write every adapter of a folder of pickles as a PEFT folder of its own.

    Args:
        folder: its files lie directly in it.
        layout: one of LAYOUTS, or "auto": what the file names show.
        base: the base that the adapters are for, used where they name none. An id is written into their configs.
        into: where the folders go, each under its adapter's slug.
        only: names of adapters; all where None.
        name: what an adapter is called whose file is only called ``best.pt`` or adapter_model.bin; the folder's name where None.
        failures: where given, an adapter that cannot be read goes in here by name, and the others are written; else its
            error is raised.
        max_bytes: the most that one file, or its tensors unpacked, may hold.
        seconds: of wall clock for one file, to which time for its size is added.

    Returns:
        The folders, sorted; `provenance` says where each came from.

    Raises:
        UsageError: `layout` is none, or `only` names adapters that are not there.
        InputError: nothing of this layout is in the folder, or what is there is damaged.
        SecurityError: a pickle that is more than tensors, see `unpickle.open_pickles`; a link out of the folder.
    """
    if not folder.is_dir():
        raise InputError(
            f"{printable(folder)} is not a folder.", fix="Give the folder that holds the adapters.", code="E_FILES"
        )
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    found = layout_of(sizes) if layout == "auto" else layout
    files = files_of(sizes, found, only) if found else []
    pickles = [file for file in files if file.endswith((".bin", ".ckpt", ".meta", ".pt"))]
    if found is None or not pickles:
        raise InputError(
            f"{printable(folder)} holds no adapters of {'any known' if found is None else 'this'} layout.",
            "Known are peft (adapter_model.bin), mttl (.ckpt with .meta) and phatgoose (best.pt).",
            "Point at the folder that holds such files, and name the layout with --layout.",
            code="E_NO_ADAPTER",
        )
    _refuse_links(folder, files)
    run = _Import(folder, found, base if match.is_hub_id(base) else None, into, only, name or slug(folder.resolve().name))
    largest = max(sizes[file] for file in pickles)
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into, prefix=".import-") as work:
        plain = {place: mttl.PACKAGES for place, file in enumerate(pickles) if file.endswith(".meta")}
        limits: dict[str, Any] = {"max_bytes": max_bytes, "seconds": seconds + largest * _SECONDS_PER_BYTE}
        opened = unpickle.open_pickles([folder / file for file in pickles], work, plain=plain, **limits)
        collected: dict[str, RecycleError] = {}
        folders = run.write(dict(zip(pickles, opened, strict=True)), collected)
    if collected and failures is None:
        raise next(iter(collected.values()))
    if failures is not None:
        failures.update(collected)
    missing = [one for one in only or () if not any(_wanted(had, [one]) for had in (*run.seen, *collected))]
    if missing:
        raise UsageError(
            f"No adapter is called {shorten(map(printable, missing))}.",
            f"There are {shorten(map(printable, run.seen))}.",
            "Choose of these.",
            code="E_UNKNOWN",
        )
    return sorted(folders)


def provenance(folder: Path) -> dict[str, Any]:
    """Where an adapter that `adapters` wrote came from, as plain values: ``layout``, ``expert`` (its name there), ``files`` (name
    → sha256 and size of the originals), ``base``, ``notes``, and ``sandbox`` (how its pickles were opened)."""
    return dict(json.loads((folder / PROVENANCE).read_text("utf-8")))


@dataclass
class _Import:
    """One call of `adapters`."""

    folder: Path
    layout: str
    base: str | None
    into: Path
    only: Collection[str] | None
    name: str

    def __post_init__(self) -> None:
        self.seen: list[str] = []

    def write(self, opened: Mapping[str, Report | RecycleError], failures: dict[str, RecycleError]) -> list[Path]:
        folders: dict[str, Path] = {}
        for label, group in self._groups(opened):
            reports: dict[str, Report] = {}
            try:
                for file in group:
                    report = opened[file]
                    if isinstance(report, RecycleError):
                        raise report
                    reports[file] = report
                for part in self._parts(label, reports):
                    self.seen.append(part.name)
                    if _wanted(part.name, self.only):
                        target = self.into / slug(part.name)
                        if target.exists():
                            raise InputError(
                                f"{printable(target)} is there already.",
                                "Two adapters of one name would replace each other.",
                                "Import them one at a time, into different folders.",
                                code="E_IMPORT",
                            )
                        folders[target.name] = self._keep(part, target, reports)
            except RecycleError as error:
                failures[label] = error
        return list(folders.values())

    def _groups(self, opened: Iterable[str]) -> list[tuple[str, list[str]]]:
        """(name, the pickles that make it up)."""
        present = list(opened)
        if self.layout == "mttl" and _pairs(present):
            return [(stem, [f"{stem}.ckpt", f"{stem}.meta"]) for stem in _pairs(present)]
        if self.layout == "mttl":
            return [(Path(file).stem if len(present) > 1 else self.name, [file]) for file in present]
        if self.layout == "peft":
            return [(self.name, present)]
        stems = {_stem(file, self.name): file for file in reversed(present)}  # best before finish and last
        return [(stem, [stems[stem]]) for stem in sorted(stems)]

    def _parts(self, label: str, reports: Mapping[str, Report]) -> Iterator[Part | _Whole]:
        weights, *about = reports.values()
        if not weights.weights:
            raise InputError(
                f"{printable(label)} holds no tensors.", "There is nothing to import.", "Fetch it again.", code="E_EMPTY"
            )
        if self.layout == "peft":
            yield _Whole(label, weights.weights)
            return
        with Tensors(weights.weights) as state:
            facts: dict[str, Any] = {"name": label, "base": self.base}
            shown: Mapping[str, Tensor] = state
            if self.layout == "phatgoose":
                facts["names"] = self._expert_names()
            elif about:
                facts["info"] = about[0].facts
                if about[0].facts.get("expert_deleted") is True:
                    raise InputError(
                        f"{printable(label)} was removed from its library.",
                        "Its .meta says expert_deleted, and mttl would not load it.",
                        "Leave it out.",
                        code="E_IMPORT",
                    )
            elif _MTTL_PAIR[0] in reports:
                facts["info"] = _read_json(self.folder / _MTTL_PAIR[1])
                shown = mttl.without_prefix(state)
            else:
                shown, facts["info"] = mttl.parts_of(state, weights.facts)
            if self.layout == "mttl" and not isinstance(facts["info"], Mapping):
                raise InputError(
                    f"{printable(label)}: what describes it is no object.",
                    "Its scale is unknown.",
                    "Fetch it again.",
                    code="E_IMPORT",
                )
            if self.layout == "mttl" and not about:
                facts["name"] = facts["info"].get("expert_name") or label
            yield from split(shown, facts, self.layout)

    def _expert_names(self) -> list[str] | None:
        for file in _LISTS:
            path = self.folder / file
            if path.is_file():
                with path.open("rb") as stream:
                    text = stream.read(_MAX_LIST).decode("utf-8", "replace")
                lines = _read_json(path) if file.endswith(".json") else [line.strip() for line in text.splitlines()]
                return [str(line) for line in lines if line]
        return None

    def _keep(self, part: Part | _Whole, target: Path, reports: Mapping[str, Report]) -> Path:
        try:
            if isinstance(part, Part):
                base, notes = part.base, part.notes
                write(part, target)
                formats.read(target, part.name)
            else:  # of any kind; whoever keeps it vets it as that kind
                base, notes = None, ()
                target.mkdir(parents=True)
                part.write(target)
                shutil.copyfile(self.folder / CONFIG, target / CONFIG)
            copy_papers(self.folder, target)
            read = [*reports, *(file for file in (CONFIG, _MTTL_PAIR[1], *_LISTS) if (self.folder / file).is_file())]
            first = next(iter(reports.values()))
            facts = {
                "schema_version": 1,
                "layout": self.layout,
                "expert": part.name,
                "files": {file: _fact(self.folder / file) for file in read},
                "base": base,
                "notes": list(notes),
                "sandbox": {"torch": first.torch, "held": list(first.held), "missing": list(first.missing)},
            }
            text = json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False)
            (target / PROVENANCE).write_text(text + "\n", encoding="utf-8", newline="\n")
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
        return target


@dataclass(frozen=True)
class _Whole:
    """An adapter whose tensors have PEFT's names already."""

    name: str
    weights: tuple[Path, ...]

    def write(self, folder: Path) -> None:
        if len(self.weights) > 1:
            raise InputError(
                f"{printable(self.name)} holds too many tensors.",
                "No adapter has so many.",
                "Leave it out.",
                code="E_TOO_LARGE",
            )
        shutil.move(self.weights[0], folder / WEIGHTS)


def _fact(path: Path) -> dict[str, Any]:
    return {"sha256": inspect.hashes(path)[0], "size": path.stat().st_size}


def _pairs(names: Iterable[str]) -> list[str]:
    present = set(names)
    return sorted(stem for name in present if (stem := name.removesuffix(".meta")) != name and f"{stem}.ckpt" in present)


def _stem(file: str, name: str) -> str:
    """What a PHATGOOSE or GLIDER checkpoint is called: ``p3paws_best.pt`` → p3paws, ``best.pt`` → `name`."""
    found = _CHECKPOINT.fullmatch(file)
    return (found["stem"] if found else file.removesuffix(".pt")) or name


def _wanted(name: str, only: Collection[str] | None) -> bool:
    """By its name as it is, or as it will be in the zoo."""
    return only is None or any(name == one or _soft_slug(name) == _soft_slug(one) for one in only)


def _soft_slug(name: str) -> str:
    try:
        return slug(name)
    except UsageError:
        return name


def _refuse_links(folder: Path, files: Iterable[str]) -> None:
    """A link may lead within its folder or, in the Hub client's cache, to the blobs of the same repository."""
    home = folder.resolve()
    snapshots = (at.parent for at in (home, *home.parents) if at.parent.name == "snapshots")
    allowed = [home, *(at.parent / "blobs" for at in snapshots)]
    escaping = [file for file in files if not any((folder / file).resolve().is_relative_to(root) for root in allowed)]
    if escaping:
        raise SecurityError(
            f"{printable(folder)}: {shorten(map(printable, escaping))} is a link that leads out of the folder.",
            "Following it could copy a file that was never meant to be shared.",
            "Replace the link by the file itself.",
            code="E_LINK",
        )


def _read_json(path: Path) -> Any:
    try:
        with path.open("rb") as stream:
            raw = stream.read(_MAX_LIST + 1)
        if len(raw) > _MAX_LIST:
            raise ValueError(f"larger than {_MAX_LIST:,} bytes")
        return json.loads(raw.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{printable(path)} cannot be used: {printable(error)}.",
            "It says what the tensors mean.",
            "Fetch it again.",
            code="E_IMPORT",
        ) from error
