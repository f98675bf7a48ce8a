"""How each adapter's update looks beside the rest of its zoo: evidence for a person, not a verdict.

Per site: the norm, the spectrum of ΔW (by QR of the factors, never ΔW itself), and on request intruder dimensions. With p_i = σ_i² / Σσ²,
the effective rank is exp(−Σ p_i ln p_i), the stable rank 1 / p_1, and the share of the leading direction p_1. Trained adapters have
shares of 50 to 95 %, so that what tells a collapsed one is the rest, 1 − p_1, compared as a logarithm; and relative to the most it
can be, 1 − 1/R, since one of two ranks always holds half.

Adapters are compared with those of the zoo that declare the same base. Sticking out has many harmless causes: a task far from
the others, a longer training, another rank.

Dimensions in names: R rank, O output width, D input width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from recycler.judging.intruders import EPSILON, TOP, Look, look
from recycler.zoo import match
from recycler.zoo.errors import UsageError, shorten
from recycler.zoo.places import Place, places
from recycler.zoo.similarity import robust_z, singular_values, spread
from recycler.zoo.store import Zoo

if TYPE_CHECKING:
    from recycler.zoo.adapter import Adapter

SCHEMA_VERSION = 1
NOTE = "Evidence, not a verdict: a task unlike the others, longer training or another rank look like this as well."
Progress = Callable[[int, str], Callable[..., None]]

_Z = 3.5  # Iglewicz and Hoaglin (1993), for z by median and MAD
_FEWEST = 4  # adapters, before a median says anything
_NORM_UNIT, _NORM_FACTOR = 0.1, 3.0  # of ln norm; and a factor below three is not worth a word
_REST_UNIT = 0.2  # of ln rest
_REST_FACTOR = math.log(100)  # single sites of sound adapters come within fifty times of what is usual
_SITE_FACTOR = 10.0  # of one site beside the adapter's other sites
_INTRUDER_UNIT, _INTRUDER_LEAST = 0.02, 0.05  # of the share of leading directions that are intruders


@dataclass(frozen=True)
class SiteHealth:
    """One site of one adapter.

    Attributes:
        ratio: of its norm to the median of the adapters that touch this site.
        share: σ1² / Σσ². rest: what the other directions hold, of the most they can, 0 to 1; None for rank 1.
    """

    path: str
    place: Place
    rank: int
    norm: float
    effective_rank: float
    stable_rank: float
    share: float
    rest: float | None
    ratio: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        plain = {key: round(value, 6) if isinstance(value, float) else value for key, value in vars(self).items()}
        del plain["place"]
        return {**plain, "layer": self.place.layer, "kind": self.place.kind}


@dataclass(frozen=True)
class AdapterHealth:
    """One adapter beside its zoo.

    Attributes:
        peers: how many adapters of the same base it was compared with, itself included.
        norm: ‖ΔW‖_F. ratio: to the peers' median. z: robust, of ln norm; None for fewer than four.
        effective_rank, stable_rank, share: the median over its sites.
        looks: where intruders were looked for; None where they were not.
        evidence: what sticks out, a sentence each.
    """

    name: str
    base: str | None
    peers: int
    norm: float
    sites: tuple[SiteHealth, ...] = field(repr=False)
    ratio: float = 1.0
    z: float | None = None
    looks: tuple[Look, ...] | None = field(default=None, repr=False)
    evidence: tuple[str, ...] = ()

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({site.rank for site in self.sites}))

    @property
    def effective_rank(self) -> float:
        return median(site.effective_rank for site in self.sites)

    @property
    def stable_rank(self) -> float:
        return median(site.stable_rank for site in self.sites)

    @property
    def share(self) -> float:
        return median(site.share for site in self.sites)

    @property
    def intruders(self) -> int | None:
        """Over all sites that were looked at."""
        return None if self.looks is None else sum(one.intruders for one in self.looks)

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {
            "name": self.name,
            "base": self.base,
            "peers": self.peers,
            "ranks": list(self.ranks),
            "norm": self.norm,
            "ratio": self.ratio,
            "z": self.z,
            "effective_rank": self.effective_rank,
            "stable_rank": self.stable_rank,
            "share": self.share,
            "intruders": self.intruders,
            "intruder_sites": None if self.looks is None else [one.to_json() for one in self.looks],
            "evidence": list(self.evidence),
            "sites": [site.to_json() for site in self.sites],
        }


@dataclass(frozen=True)
class HealthReport:
    """What `health` found.

    Attributes:
        grid: base → the places where it, or any adapter of it, has a site; the frame of the heat strips.
        unreadable: adapter → why.
        notes: what was bounded or left out.
    """

    adapters: tuple[AdapterHealth, ...]
    grid: Mapping[str | None, frozenset[Place]] = field(repr=False)
    unreadable: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {
            "schema_version": SCHEMA_VERSION,
            "adapters": [one.to_json() for one in self.adapters],
            "unreadable": dict(self.unreadable),
            "intruder_definition": {"top": TOP, "epsilon": EPSILON},
            "notes": list(self.notes),
        }


def health(
    zoo: Zoo | None = None,
    names: Iterable[str] | None = None,
    *,
    base: str | Path | None = None,
    intruders: bool = False,
    sites: int | None = None,
    progress: Progress | None = None,
) -> HealthReport:
    """Look at adapters beside the zoo they are in.

    Args:
        zoo: whose; the default zoo where None.
        names: which to report; all where None. Medians are over all of the zoo that declare the same base.
        base: an id or a folder; by default what the adapters declare. Read only for `intruders`, and for the frame of the strips.
        intruders: load the base and count intruder dimensions; see `recycler.judging.intruders`.
        sites: look at no more than this many sites of each adapter for them, those with the largest σ1(ΔW) / σ_k(W0).
        progress: given the steps and a word, returns what is called at each step.

    Raises:
        UsageError: an unknown name, an empty zoo, or adapters of several bases for `intruders` without `base`.
        HubError, InputError: the base cannot be had, or an adapter does not fit it.
    """
    from recycler.zoo.errors import RecycleError

    zoo = Zoo() if zoo is None else zoo
    wanted = list(zoo.entries if names is None else dict.fromkeys(names))
    entries = {name: zoo.entry(name) for name in wanted}
    if not entries:
        raise UsageError(
            f"The zoo at {zoo.path} is empty.", "", "Run: recycle fetch ORG/NAME, or recycle fetch FOLDER", code="E_EMPTY_ZOO"
        )
    if sites is not None and not intruders:
        raise UsageError("--sites bounds the look for intruders.", "", "Add --intruders.")
    groups = {
        key: some for key, some in match.by_base({n: e.base for n, e in zoo.entries.items()}).items() if set(some) & set(wanted)
    }
    if intruders and base is None and len(groups) > 1:
        raise UsageError(f"These adapters have {len(groups)} bases.", "One is loaded.", "Name adapters of one base, or --base.")
    shapes = _linears(base)
    step = _start(progress, sum(map(len, groups.values())), "reading")
    found: dict[str, AdapterHealth] = {}
    unreadable: dict[str, str] = {}
    refused: RecycleError | None = None
    grid: dict[str | None, frozenset[Place]] = {}
    for declared, members in groups.items():
        spectra = {}
        for name in members:
            try:
                spectra[name] = _spectra(zoo[name])
            except RecycleError as error:
                unreadable[name], refused = error.what, error
            step()
        where = places([*shapes, *(path for some in spectra.values() for path in some)])
        peers = [_adapter(name, declared, len(spectra), some, where) for name, some in spectra.items()]
        found.update((one.name, one) for one in _beside(peers))
        grid[declared] = frozenset(where.values())
    notes: list[str] = []
    readable = [name for name in wanted if name in found]
    if refused is not None and not readable:  # nothing to show but that
        raise refused
    if intruders and readable:
        looks = _look(zoo, readable, base, sites, progress)
        for name, some in looks.items():
            found[name] = replace(found[name], looks=some)
        notes.append(_bound(found, looks, sites))
        found.update((one.name, one) for one in _by_intruders([found[name] for name in looks]))
    if any(found[name].peers < _FEWEST for name in readable):
        notes.append(f"fewer than {_FEWEST} adapters of a base: norms and spectra were not compared")
    return HealthReport(
        tuple(found[name] for name in readable), grid, {n: why for n, why in unreadable.items() if n in entries}, tuple(notes)
    )


def _linears(base: str | Path | None) -> Iterable[str]:
    """The linears of the base that was named, so that what no adapter touches shows as well."""
    from recycler.base import linear_shapes

    return () if base is None else linear_shapes(str(base))


def _spectra(adapter: Adapter) -> dict[str, tuple[int, list[float]]]:
    """Module path → (rank, singular values)."""
    values = spread(lambda factors: singular_values(factors).tolist(), adapter.sites.values())
    return {path: (adapter.sites[path].rank, some) for path, some in zip(adapter.sites, values, strict=True)}


def _adapter(
    name: str, base: str | None, peers: int, spectra: Mapping[str, tuple[int, list[float]]], where: Mapping[str, Place]
) -> AdapterHealth:
    sites = tuple(_site(path, where[path], rank, values) for path, (rank, values) in spectra.items())
    return AdapterHealth(name, base, peers, math.hypot(*(site.norm for site in sites)), sites)


def _site(path: str, place: Place, rank: int, values: Sequence[float]) -> SiteHealth:
    size = math.hypot(*values)
    if not size > 0:
        return SiteHealth(path, place, rank, 0.0, 0.0, 0.0, 0.0, None)
    parts = [(value / size) ** 2 for value in values]
    entropy = -sum(part * math.log(part) for part in parts if part > 0)
    rest = sum(parts[1:]) / (1 - 1 / len(values)) if len(values) > 1 else None
    return SiteHealth(path, place, rank, size, math.exp(entropy), 1 / parts[0], parts[0], rest)


def _beside(peers: Sequence[AdapterHealth]) -> list[AdapterHealth]:
    """Ratios, z and evidence, from the adapters of one base."""
    norms: dict[str, list[float]] = {}
    rests: dict[str, list[float]] = {}
    for one in peers:
        for site in one.sites:
            norms.setdefault(site.path, []).append(site.norm)
            if site.rest is not None:
                rests.setdefault(site.place.kind, []).append(_log(site.rest))
    usual = {path: median(values) for path, values in norms.items()}
    usually = {kind: (median(values), _unit(values)) for kind, values in rests.items()}
    sizes = [one.norm for one in peers]
    whole = median(sizes) if sizes else 1.0
    z = robust_z([math.log(max(size, 1e-300)) for size in sizes], _NORM_UNIT)
    enough = len(peers) >= _FEWEST
    result = []
    for one, own in zip(peers, z, strict=True):
        sites = tuple(replace(site, ratio=_ratio(site.norm, usual[site.path])) for site in one.sites)
        one = replace(one, sites=sites, ratio=_ratio(one.norm, whole), z=own if enough else None)
        evidence = [*_norm_evidence(one), *_spectral_evidence(one, usually)] if enough else []
        result.append(replace(one, evidence=tuple(evidence)))
    return result


def _norm_evidence(one: AdapterHealth) -> Iterable[str]:
    """The norm as a whole, and single sites beside the adapter's other sites."""
    if one.z is not None and abs(one.z) > _Z and not 1 / _NORM_FACTOR < one.ratio < _NORM_FACTOR:
        yield f"its norm is {one.ratio:.3g} times the zoo's median (robust z {one.z:+.1f})"
    own = median(site.ratio for site in one.sites)
    far = {site.path: site.ratio / own for site in one.sites if own > 0 and site.ratio > _SITE_FACTOR * own}
    if far:
        worst = max(far, key=far.__getitem__)
        yield f"at {_of(len(far), one.sites)} its norm is out of proportion with its other sites, at {worst} by {far[worst]:.3g} times"


def _spectral_evidence(one: AdapterHealth, usually: Mapping[str, tuple[float, float]]) -> Iterable[str]:
    """Sites where next to nothing is beside the leading direction (`usually`: class → median and unit of ln rest)."""

    def far(site: SiteHealth) -> bool:
        if site.rest is None:
            return False
        middle, unit = usually[site.place.kind]
        return middle - _log(site.rest) > max(_Z * unit, _REST_FACTOR)

    found = [site for site in one.sites if far(site)]
    if found:
        kinds = Counter(site.place.kind for site in found)
        worst = max(found, key=lambda site: site.share)
        listing = shorten([f"{kind} {count}" for kind, count in kinds.most_common()], 4)
        yield (
            f"at {_of(len(found), one.sites)} one direction holds almost all of the update ({listing}), at {worst.path} "
            f"{worst.share:.2%}: effective rank {worst.effective_rank:.2f} of {worst.rank}"
        )


def _by_intruders(looked: Sequence[AdapterHealth]) -> list[AdapterHealth]:
    """Evidence from intruder dimensions: their share of the leading directions, beside the others' where there are enough."""
    shares = [(one.intruders or 0) / max(sum(len(site.overlaps) for site in one.looks or ()), 1) for one in looked]
    enough = len(looked) >= _FEWEST
    usual = median(shares) if enough else 0.0
    result = []
    for one, share, z in zip(looked, shares, robust_z(shares, _INTRUDER_UNIT), strict=True):
        if share - usual > _INTRUDER_LEAST and (z > _Z or not enough):
            worst = max(one.looks or (), key=lambda site: site.intruders)
            beside = f" (the zoo's median {usual:.1%})" if enough else ""
            text = (
                f"{one.intruders} intruder dimensions, {share:.1%} of the leading directions{beside}, "
                f"most at {worst.path} ({worst.intruders} of {len(worst.overlaps)})"
            )
            one = replace(one, evidence=(*one.evidence, text))
        result.append(one)
    return result


def _look(
    zoo: Zoo, names: Sequence[str], base: str | Path | None, sites: int | None, progress: Progress | None
) -> dict[str, tuple[Look, ...]]:
    from recycler.base import load_base
    from recycler.build import base_of, read_adapters

    loaded = load_base(str(base) if base is not None else base_of(zoo, names))
    for name in names:
        read_adapters(zoo, [name], loaded)  # raises where one does not fit
    return look(loaded.model, names, zoo.__getitem__, sites=sites, progress=progress)


def _bound(found: Mapping[str, AdapterHealth], looks: Mapping[str, Sequence[Look]], sites: int | None) -> str:
    seen, there = sum(map(len, looks.values())), sum(len(found[name].sites) for name in looks)
    text = f"intruders: {seen} of {there} sites were looked at, the {TOP} leading directions each, overlap below {EPSILON}"
    return text + (
        "" if sites is None else f"; at most {sites} sites of an adapter, those with the largest σ1(ΔW) / σ{TOP}(W0)"
    )


def _log(rest: float) -> float:
    return math.log(max(rest, 1e-12))


def _unit(values: Sequence[float]) -> float:
    middle = median(values)
    return max(1.4826 * median(abs(value - middle) for value in values), _REST_UNIT)


def _ratio(value: float, usual: float) -> float:
    return value / usual if usual > 0 else 1.0


def _of(count: int, sites: Sequence[Any]) -> str:
    return f"{count} of {len(sites)} sites"


def _start(progress: Progress | None, steps: int, what: str) -> Callable[..., None]:
    return progress(steps, what) if progress else lambda count=1, note="": None
