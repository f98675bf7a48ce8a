"""A zoo judged as a set, for a base: who fits, who can be mixed with whom and at what cost, who is whose copy, whose norm is odd.

Without a base, every base that adapters declare is a section of its own. Nothing is loaded but adapters, one at a time, and the
base's config.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from recycler.judging.check_report import Checked, CheckReport, Mix, Section, Verdict
from recycler.workers import Local, Workers, connect
from recycler.zoo import match
from recycler.zoo.aliases import same_model
from recycler.zoo.errors import InputError, RecycleError, UsageError
from recycler.zoo.inspect import WEIGHTS, is_folder, printable
from recycler.zoo.manifest import Entry
from recycler.zoo.places import places
from recycler.zoo.similarity import Similarity, near_duplicates, robust_z
from recycler.zoo.store import Zoo
from recycler.zoo.survey import survey

if TYPE_CHECKING:
    from recycler.zoo.adapter import Adapter

Shapes = Mapping[str, tuple[int, int]]
Progress = Callable[[int, str], Callable[..., None]]

_Z = 3.5  # Iglewicz and Hoaglin (1993), for z by median and MAD
_UNIT = 0.1  # of ln norm: a zoo whose norms agree within 10 % has no outliers within 35 %
_FACTOR = 3.0  # and a factor below this is not worth a word
_HUGE = 1000.0  # wins any gate that looks at norms
_FEWEST = 4  # adapters, before a median says anything


def check(
    zoo: Zoo | None = None,
    base: str | Path | None = None,
    *,
    names: Iterable[str] | None = None,
    engine: str | Workers | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Judge adapters as a set.

    Args:
        zoo: whose; the default zoo where None.
        base: an id or a folder; where None, each base that is declared makes a section.
        names: which adapters; all where None.
        engine: who reads and compares: "ray" or ``ray://HOST:PORT`` for workers (`recycler.workers`); this process where None. The
            report is the same.
        progress: given the steps and a word, returns what is called at each step.

    Raises:
        UsageError: an unknown name, or an empty zoo. HubError, InputError: the base that was named cannot be had.
    """
    zoo = Zoo() if zoo is None else zoo
    entries = {name: zoo.entry(name) for name in (zoo.entries if names is None else dict.fromkeys(names))}
    if not entries:
        raise UsageError(
            f"The zoo at {zoo.path} is empty.", "", "Run: recycle fetch ORG/NAME, or recycle fetch FOLDER", code="E_EMPTY_ZOO"
        )
    sets = (
        [(_spelt(base), list(entries))]
        if base is not None
        else list(match.by_base({n: e.base for n, e in entries.items()}).items())
    )
    bases = [_base_shapes(where, [entries[n] for n in chosen], asked=base is not None) for where, chosen in sets]
    with connect(engine, zoo) as workers:
        alone = isinstance(workers, Local)  # then what was read is kept
        similarity, each, refused = survey(zoo, list(entries), progress=progress, workers=None if alone else workers)
    sites = {name: one.shapes for name, one in each.items()}
    broken = {name: error.what for name, error in refused.items()}
    twins = _Twins(entries, similarity, zoo.__getitem__)
    sections = []
    for (where, chosen), (shapes, note) in zip(sets, bases, strict=True):
        found = [_judge(entries[n], sites.get(n), shapes, broken.get(n, "")) for n in chosen]
        found = _of_one_base(found, where, entries) if base is not None and where is not None else found
        found = [twins.onto(one) for one in _with_norms(found, dict(zip(similarity.names, similarity.norms, strict=True)))]
        sections.append(Section(where, tuple(found), tuple(_mixes(found, sites, shapes)), note))
    return CheckReport(tuple(sections), similarity)


def _spelt(base: str | Path) -> str:
    return str(Path(base).expanduser().resolve()) if isinstance(base, Path) or is_folder(base) else str(base)


def _base_shapes(base: str | None, entries: Sequence[Entry], asked: bool) -> tuple[Shapes | None, str]:
    """(O, D) of the base's linears; None, and why, where it was not asked for by name and cannot be had."""
    from recycler.base import linear_shapes

    if base is None:
        return None, "they declare no base, so their sites were compared with each other only; name one with --base"
    folders = dict.fromkeys(e.base_path for e in entries if e.base_path and Path(e.base_path).is_dir())
    try:
        return linear_shapes(base if asked or not folders else str(next(iter(folders)))), ""
    except RecycleError as error:
        if asked:
            raise
        return None, f"{printable(base)} could not be had, so sites were compared with each other only: {printable(error.what)}"


def _judge(entry: Entry, sites: Shapes | None, shapes: Shapes | None, broken: str) -> Checked:
    verdict: Verdict = "not compared" if shapes is None else "fits"
    why = ""
    if sites is None:
        verdict, why = "unreadable", broken
    elif shapes is not None:
        try:
            match.check_sites(entry.name, sites, shapes)
        except InputError as error:
            verdict, why = "does not fit", error.what
    converted = entry.converted or {}
    return Checked(
        name=entry.name,
        verdict=verdict,
        why=why,
        base=entry.base,
        kinds=entry.kinds,
        converted=printable(converted.get("kind")) if converted else None,
        error=converted.get("error"),
        ranks=entry.ranks,
        sites=entry.sites,
        targets=_targets(sites or {}, shapes),
        parameters=entry.parameters,
        bytes=sum(int(fact["size"]) for fact in entry.files.values()),
        licence=entry.licence,
    )


def _targets(sites: Shapes, shapes: Shapes | None) -> dict[str, tuple[int, int | None]]:
    """Class of linear → (sites touched, sites of the base)."""
    where = places([*sites, *(path for path in shapes or {} if path not in sites)])
    counts: dict[str, tuple[int, int | None]] = {}
    for kind in sorted({where[path].kind for path in sites}):
        here = sum(where[path].kind == kind for path in sites)
        counts[kind] = here, None if shapes is None else sum(where[path].kind == kind for path in shapes)
    return counts


def _of_one_base(found: Sequence[Checked], base: str, entries: Mapping[str, Entry]) -> list[Checked]:
    """Turns away those trained for another base than the one named. A folder is a copy of what most of them declare."""
    wanted: str | None = base
    if is_folder(base):
        declared = match.by_base({one.name: one.base for one in found if match.is_hub_id(one.base)})
        wanted = max(declared, key=lambda one: len(declared[one]), default=None)
    return [_of_base(one, wanted, entries[one.name].forced_base) for one in found]


def _of_base(one: Checked, wanted: str | None, forced: bool) -> Checked:
    if forced:
        one = replace(one, notes=(*one.notes, "it was made for another base, and taken by --force-base"))
    if not one.usable or wanted is None or one.base is None or match.same_base(one.base, wanted):
        return one
    relation = same_model(one.base, wanted)
    shown = printable(one.base)
    if relation == "no" and match.is_hub_id(one.base):
        text = f"it was trained for {shown}, not for {printable(wanted)}, though its sites fit"
        return replace(one, verdict="other base", why=text)
    by_name = f", by its name a {relation} of {printable(wanted)}" if relation in ("quantised copy", "mirror") else ""
    text = f"it declares {shown}{by_name}; to mix it with the others, fetch it again with --base {printable(wanted)}"
    return replace(one, notes=(*one.notes, text))


def _with_norms(found: Sequence[Checked], norms: Mapping[str, float]) -> list[Checked]:
    """Norms beside their median, of the adapters of one section that can be used."""
    sizes = {one.name: norms[one.name] for one in found if one.usable and norms.get(one.name)}
    middle = median(sizes.values()) if sizes else 1.0
    many = len(sizes) >= _FEWEST
    z = dict(zip(sizes, robust_z([math.log(size) for size in sizes.values()], _UNIT), strict=True)) if many else {}
    result = []
    for one in found:
        if one.name in norms and not norms[one.name]:
            one = replace(one, norm=0.0, outlier="its update is zero: A and B cancel out, and it does nothing")
        elif one.name in sizes:
            ratio = sizes[one.name] / middle
            one = replace(one, norm=sizes[one.name], ratio=ratio, z=z.get(one.name), outlier=_odd(ratio, z.get(one.name)))
        elif one.name in norms:
            one = replace(one, norm=norms[one.name])
        result.append(one)
    return result


def _odd(ratio: float, z: float | None) -> str:
    """What is odd about a norm, or nothing."""
    if z is None or (ratio < _HUGE and (abs(z) <= _Z or 1 / _FACTOR < ratio < _FACTOR)):
        return ""
    size = f"{ratio:,.0f} times the zoo's median" if ratio >= 10 else f"{ratio:.3g} times the zoo's median"
    rule = "; an adapter this large wins every gate that looks at norms" if ratio >= _HUGE else ""
    return f"its norm is {size} (robust z {z:+.1f}){rule}"


class _Twins:
    """Who is whose copy, over all adapters."""

    def __init__(self, entries: Mapping[str, Entry], similarity: Similarity, read: Callable[[str], Adapter]) -> None:
        self.similarity = similarity
        files: dict[str, list[str]] = {}
        for name, entry in entries.items():
            files.setdefault(entry.files[WEIGHTS]["sha256"], []).append(name)
        self.copies = {name: [other for other in same if other != name] for same in files.values() for name in same}
        groups, pairs = near_duplicates(similarity, read)
        self.near = {name: [other for other in group if other != name] for group in groups for name in group}
        self.direction = {name: [b if a == name else a for a, b in pairs if name in (a, b)] for name in entries}

    def onto(self, one: Checked) -> Checked:
        return replace(
            one,
            copies=tuple(self.copies[one.name]),
            near=tuple(self.near.get(one.name, ())),
            direction_only=tuple(self.direction[one.name]),
            nearest=self.similarity.nearest(one.name) if one.name in self.similarity.names else None,
        )


def _mixes(found: Sequence[Checked], sites: Mapping[str, Shapes], shapes: Shapes | None) -> list[Mix]:
    """Who can share a model: all that fit; where the base is not known, those that agree wherever they meet."""
    groups: list[tuple[list[Checked], dict[str, tuple[int, int]]]] = []
    for one in (one for one in found if one.usable):
        mine = sites[one.name]
        for members, union in groups:
            agree = all(union.get(path, shape) == shape for path, shape in mine.items())
            if shapes is not None or (agree and (one.base is not None or union.keys() & mine.keys())):
                members.append(one)
                union.update(mine)
                break
        else:
            groups.append(([one], dict(mine)))
    of_base = None if shapes is None else sum(out * width for out, width in shapes.values())
    mixes = []
    for members, _ in groups:
        size = sum(one.parameters for one in members)  # a multiplication and an addition each, as the base's weights cost
        mixes.append(Mix(tuple(one.name for one in members), size, None if of_base is None else size / of_base))
    return mixes
