"""What `recycle doctor` looks at in a zoo: files, leftovers, lock, bases, and every adapter's numbers and sites. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycler.helping import doctor_checks as checks
from recycler.helping.doctor_notes import Notes
from recycler.zoo import staging
from recycler.zoo.errors import RecycleError, counted, shorten
from recycler.zoo.inspect import printable

if TYPE_CHECKING:
    from recycler.zoo.manifest import Entry
    from recycler.zoo.store import Zoo


def zoo_health(
    notes: Notes,
    zoo: Zoo,
    base: str | None,
    shapes: Mapping[str, tuple[int, int]] | None,
    progress: Callable[[int, str], Callable[..., None]] | None = None,
) -> None:
    """The zoo against its manifest, leftovers and lock; its adapters against their numbers, one another's base, and `shapes`."""
    if not zoo.manifest.exists():
        notes.ok("zoo", f"no zoo at {zoo.path} yet; recycle fetch makes one")
        return
    with notes.during("zoo"):
        entries = zoo.entries
        damaged = _files(notes, zoo)
        _leftovers(notes, zoo)
        _bases(notes, zoo, base)
        whole = [name for name in entries if name not in damaged]
        _norms(notes, {name: entries[name] for name in whole})
        step = (progress or (lambda steps, what: lambda count=1, note="": None))(len(whole), "looking")
        fit = 0
        for name in whole:
            fit += _adapter(notes, zoo, name, shapes)
            step()
        compared = "read" if shapes is None else f"fit {base}"
        notes.ok("zoo", f"{zoo.path}: {counted(len(entries), 'adapter')}, of which {fit} {compared}")


def _files(notes: Notes, zoo: Zoo) -> set[str]:
    """The adapters whose files are not those that were vetted."""
    damaged = set()
    for name, problems in _grouped(zoo.verify()).items():
        strangers = all(problem.what == "not in zoo.json" for problem in problems)
        if strangers:
            notes.suspect(
                "zoo",
                f"{name} lies in the zoo and is not in zoo.json.",
                "It is no part of the zoo.",
                "Move it away.",
                subject=name,
            )
            continue
        damaged.add(name)
        changed = any(problem.changed for problem in problems)
        notes.problem(
            "weights", f"{name} is damaged: {shorten(f'{p.file} {p.what}' for p in problems)}.",
            "Its files are not those that were vetted.",
            f"Run: recycle zoo remove {name}, then fetch it again; or recycle fetch --from {zoo.manifest}",
            code="E_HASH" if changed else "E_FILES", subject=name,
        )  # fmt: skip
    return damaged


def _grouped(problems: Iterable[Any]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for problem in problems:
        groups.setdefault(printable(problem.name), []).append(problem)
    return groups


def _leftovers(notes: Notes, zoo: Zoo) -> None:
    """What a killed process left, and whether somebody is writing just now."""
    from filelock import FileLock, Timeout

    def held(path: Path) -> bool:
        try:
            with FileLock(path, timeout=0):
                return False
        except Timeout:
            return True
        except OSError:  # a zoo that may not be written has no writers here
            return False

    if (zoo.path / ".lock").exists() and held(zoo.path / ".lock"):
        notes.suspect(
            "zoo", "Another process is writing into the zoo.", "What is listed may change.", "Wait for it.", code="E_BUSY"
        )
        return
    bench = staging.bench(zoo.path)
    private = [p for p in bench.glob(f"{staging._PRIVATE}*") if p.suffix != ".lock"]
    dead = [p.name for p in private if not held(p.with_name(p.name + ".lock"))]
    dead += [p.name for p in bench.glob(f"{staging._DOUBT}*")]
    dead += [p.name for p in zoo.path.glob("zoo.json.tmp-*")]
    if dead:
        notes.suspect(
            "zoo", f"{len(dead)} leftovers of a process that was killed: {shorten(dead, 3)}.", "They are no part of the zoo.",
            "The next command that writes sweeps them away.",
        )  # fmt: skip


def _bases(notes: Notes, zoo: Zoo, base: str | None) -> None:
    from recycler.zoo.aliases import same_model
    from recycler.zoo.match import require_one_base

    forced = [name for name, entry in zoo.entries.items() if entry.forced_base]
    if forced:
        notes.suspect(
            "base", f"{shorten(forced)}: put on this base with --force-base.", "They declare another one, where they were trained.",
            "Profile them: one that makes every task worse is named. Else remove them.",
        )  # fmt: skip
    try:
        require_one_base({name: entry.base for name, entry in zoo.entries.items()})
    except RecycleError as error:
        notes.suspect("base", error.what, error.why, "Name adapters of one base with --adapters, or --base.", code=error.code)
    if base is None:
        return
    quantised = [n for n, e in zoo.entries.items() if e.base and same_model(e.base, base) == "quantised copy"]
    if quantised:
        notes.suspect(
            "quantisation", f"{shorten(quantised)}: trained on a quantised copy of {base}.",
            "Their updates also make up for rounding that this base does not have; answers differ a little.",
            "Compare with that copy, if you have it.",
        )  # fmt: skip


def _norms(notes: Notes, entries: Mapping[str, Entry]) -> None:
    """Adapters of one base beside each other."""
    by_base: dict[str, dict[str, float]] = {}
    for name, entry in entries.items():
        by_base.setdefault(entry.base or "", {})[name] = entry.norm or 0.0
    for norms in by_base.values():
        checks.norms(notes, norms, "this zoo")


def _adapter(notes: Notes, zoo: Zoo, name: str, shapes: Mapping[str, tuple[int, int]] | None) -> bool:
    from recycler.zoo.match import place

    try:
        adapter = zoo[name]
        if shapes is not None:
            place(adapter, shapes)
    except RecycleError as error:
        about = "base" if error.code in ("E_SITES", "E_SHAPES", "E_BASE_MISMATCH") else "weights"
        notes.error(about, error, subject=name)
        return False
    return True
