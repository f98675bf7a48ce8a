"""A listed repository → verdicts on the adapters in it, from a config and a header: by the code that judges a download.

Nothing is asked of the Hub where the list of files settles it. Else it is one request for the config and one for the header of
the weights, and none for what is gated to somebody without a token.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from recycler.zoo import config, formats, inspect, match
from recycler.zoo.aliases import Relation, same_model
from recycler.zoo.errors import HubError, InputError, RecycleError, SecurityError, UsageError, shorten
from recycler.zoo.head_cache import Head, HeadCache
from recycler.zoo.hub_requests import StopError, Wire
from recycler.zoo.hub_search import Listed, config_start, weights_start
from recycler.zoo.inspect import CONFIG, WEIGHTS, printable
from recycler.zoo.kinds import Kind, kind_of
from recycler.zoo.safetensors_header import MAX_HEADER, check_header, header_length, parse_header
from recycler.zoo.sources import INITIAL, Source, is_commit

Verdict = Literal["usable", "convertible", "refused", "unknown"]
MAX_PLACES = 50
"""Adapters of one repository that are looked at."""
"""Subfolders that hold the state before training of the adapter above them (PiSSA and its kin), not an adapter of their own."""
_CHECKPOINT = re.compile(r"(checkpoint|step|epoch)[-_]?\d+", re.IGNORECASE)
_HOW: Mapping[Relation, str] = {
    "alias": "an alias you gave",
    "quantised copy": "by its name a quantised copy of the base",
    "mirror": "by its name a copy of the base",
    "path": "on its author's disk, called as the base is",
}


@dataclass(frozen=True)
class Candidate:
    """An adapter on the Hub, and what would become of it. All texts are fit to be shown.

    Attributes:
        revision: the 40-hex commit that was judged; empty where the Hub names none.
        verdict: "usable": read as it is. "convertible": into LoRA, and `reason` says what that needs or loses. "refused", and
            why. "unknown": it could not be looked at, and why.
        reason: a short line. why, fix: in full, and what to do.
        kind: as people write it, e.g. LoRA, rsLoRA, LoHa; empty where unknown. ranks, targets, sites, parameters: from the
            tensors, or where only the config was read, from that; empty or None where unknown.
        bytes: of the weights file.
        licence: as the card states it, None where it does not.
        base: what the adapter declares, None where it declares nothing or was not looked at. relation: of that to the base
            that is asked for. under: the base by whose filter it was found.
        notes: worth knowing before use.
    """

    repo: str
    subfolder: str
    revision: str
    verdict: Verdict = "unknown"
    reason: str = ""
    why: str = ""
    fix: str = ""
    kind: str = ""
    ranks: tuple[int, ...] = ()
    targets: tuple[str, ...] = ()
    sites: int | None = None
    parameters: int | None = None
    bytes: int | None = None
    licence: str | None = None
    downloads: int = 0
    likes: int = 0
    gated: bool = False
    created: str = ""
    modified: str = ""
    base: str | None = None
    relation: str | None = None
    under: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """``org/name`` or ``org/name/subfolder``."""
        return f"{self.repo}/{self.subfolder}" if self.subfolder else self.repo

    @property
    def source(self) -> str:
        """What to fetch, pinned: ``org/name@<commit>/subfolder``."""
        at = f"{self.repo}@{self.revision}" if self.revision else self.repo
        return f"{at}/{self.subfolder}" if self.subfolder else at

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        return {"name": self.name, "source": self.source, **plain}


def places(listed: Listed) -> tuple[list[str], tuple[str, ...]]:
    """Where in a repository adapters lie, as posix folders with "" for its root; and notes on what was left out.

    A repository without any gives its root, for the verdict to say so. Checkpoints of the training are left out where there is
    an adapter outside of them, and so are the initial adapters that belong to another.
    """
    every = sorted(path.removesuffix(CONFIG).rstrip("/") for path in listed.files if path.rsplit("/", 1)[-1] == CONFIG)
    every = [place for place in every if not (_last(place, INITIAL) and _above(place) in every)]
    kept = [place for place in every if not _last(place, _CHECKPOINT)] or every
    notes = []
    if len(kept) < len(every):
        left = [place for place in every if place not in kept]
        notes.append(f"{len(left)} checkpoints of its training are not listed: {printable(shorten(left, 3))}")
    if len(kept) > MAX_PLACES:
        notes.append(f"it holds {len(kept)} adapters, of which {MAX_PLACES} are listed")
    return kept[:MAX_PLACES] or [""], tuple(notes)


def unjudged(listed: Listed, place: str, notes: Sequence[str] = ()) -> Candidate:
    """What the list page alone says of an adapter."""
    return Candidate(
        repo=printable(listed.repo, 200),
        subfolder=printable(place, 300),
        revision=listed.commit or "" if is_commit(listed.commit) else "",
        reason="not looked at",
        licence=_licence(listed),
        downloads=listed.downloads,
        likes=listed.likes,
        gated=listed.gated,
        created=printable(listed.created, 40),
        modified=printable(listed.modified, 40),
        under=printable(listed.under),
        notes=(*listed.notes, *notes),
    )


def judge(
    listed: Listed,
    place: str,
    *,
    wire: Wire,
    cache: HeadCache,
    base: str,
    aliases: Sequence[str] = (),
    shapes: Mapping[str, tuple[int, int]] | None = None,
    max_bytes: int = inspect.MAX_BYTES,
    notes: Sequence[str] = (),
) -> Candidate:
    """The verdict on one adapter, by at most two requests.

    Args:
        place: one of `places`.
        base: what it is wanted for, a Hub id or a folder. aliases: further names of the same weights.
        shapes: module path → (O, D) of every linear of the base, to compare its sites with; not compared where None.
        max_bytes: the most that its files may hold together.
        notes: stand in the result before what is found.

    Raises:
        StopError: nothing more can be asked of the Hub now. What one repository is or does never raises.
    """
    look = _Look(listed, place, unjudged(listed, place, notes), wire, cache, base, aliases, shapes, max_bytes)
    try:
        return look.verdict()
    except StopError:
        raise
    except RecycleError as error:
        if isinstance(error, HubError) and listed.gated:
            return _gated(look.seen, wire)
        verdict: Verdict = "unknown" if isinstance(error, HubError) else "refused"
        return replace(look.seen, verdict=verdict, reason=_short(error, look.seen), why=_full(error), fix=error.fix)


@dataclass
class _Look:
    """One adapter being looked at; `seen` grows."""

    listed: Listed
    place: str
    seen: Candidate
    wire: Wire
    cache: HeadCache
    base: str
    aliases: Sequence[str]
    shapes: Mapping[str, tuple[int, int]] | None
    max_bytes: int

    def verdict(self) -> Candidate:
        self._check_names()
        if self.listed.gated and self.wire.anonymous:
            return _gated(self.seen, self.wire)
        raw = self._start(CONFIG)
        settings = config.parse_json(raw.data, self.seen.name)
        kind = kind_of(settings, initial=self._initial())
        self.seen = replace(self.seen, kind=kind.name, **_claims(settings))
        if kind.how == "convert":
            self._declared(config.check_convertible(settings, self.seen.name).base)
            return self._convertible(kind)
        # a kind that is refused is refused here, by name
        read = config.parse_config(raw.data, self.seen.name)
        self._declared(read.base)
        shapes = self._header()
        if shapes is None:
            return replace(self.seen, verdict="usable", reason="usable, judged by its config alone")
        sites, receipt = formats.plan(read, shapes, self.seen.name)
        if self.shapes is not None:
            match.check_sites(self.seen.name, {path: site.shape for path, site in sites.items()}, self.shapes)
        return replace(
            self.seen,
            verdict="usable",
            reason="usable",
            kind="+".join(receipt.kinds),
            ranks=receipt.ranks,
            targets=tuple(printable(target, 60) for target in receipt.targets),
            sites=receipt.sites,
            parameters=receipt.parameters,
            notes=(*self.seen.notes, *receipt.warnings, *receipt.notes),
        )

    def _check_names(self) -> None:
        """Everything that the list of files settles."""
        name, commit = self.seen.name, self.listed.commit
        if not self.seen.revision:
            raise HubError(f"The Hub names no commit for {name}.", "It cannot be pinned.", "Try again later.")
        try:
            source = Source.parse(f"{self.listed.repo}@{commit}" + (f"/{self.place}" if self.place else ""))
        except UsageError:
            source = None
        if source is None or (source.repo, source.revision, source.subfolder) != (self.listed.repo, commit, self.place):
            raise SecurityError(
                f"{name} has a name that cannot be fetched.",
                "It holds characters that no name has.",
                "Leave it out.",
                code="E_HOSTILE_NAME",
            )
        inspect.check_names(name, self.listed.files)
        prefix = self.place + "/" if self.place else ""
        own = [path.removeprefix(prefix) for path in self.listed.files if path.startswith(prefix)]
        inspect.check_listing(name, dict.fromkeys((path for path in own if "/" not in path), 0))

    def _start(self, file: str) -> Head:
        read = config_start if file == CONFIG else weights_start
        path = f"{self.place}/{file}" if self.place else file
        return read(self.wire, self.cache, self.listed.repo, self.seen.revision, path)

    def _initial(self) -> bool:
        """Whether the state before training lies beside the adapter."""
        prefix = self.place + "/" if self.place else ""
        beside = (path.removeprefix(prefix) for path in self.listed.files if path.startswith(prefix))
        return any(path.endswith("/" + WEIGHTS) and _last(path.removesuffix("/" + WEIGHTS), INITIAL) for path in beside)

    def _header(self) -> dict[str, tuple[int, ...]] | None:
        """Tensor name → shape; None where the header is too long for one range request, of which a note is taken."""
        name = f"{self.seen.name}/{WEIGHTS}"
        head = self._start(WEIGHTS)
        size = head.size or 0
        self.seen = replace(self.seen, bytes=size)
        inspect.check_listing(self.seen.name, {CONFIG: 0, WEIGHTS: size}, self.max_bytes)
        length = header_length(head.data[:9], name, size)
        if 8 + length > len(head.data):
            assert length <= MAX_HEADER
            text = f"header of {length / 1000:,.0f} kB not read: rank and targets are the config's"
            self.seen = replace(self.seen, notes=(*self.seen.notes, text))
            return None
        return parse_header(head.data[8:], name, size)

    def _convertible(self, kind: Kind) -> Candidate:
        shapes = self._header()
        if shapes is not None:
            check_header(shapes, self.seen.name)
            paths = module_paths(shapes, self.shapes or {})
            if self.shapes is not None:  # their shapes are not in these tensors, so it is asked only whether they are there
                match.check_sites(self.seen.name, {path: self.shapes.get(path, (0, 0)) for path in paths}, self.shapes)
            named = sorted({printable(path.rsplit(".", 1)[-1], 60) for path in paths})
            self.seen = replace(self.seen, sites=len(paths) or None, targets=tuple(named) or self.seen.targets)
        loss = "nothing is lost but rounding" if kind.lossless else "the error is measured when it is fetched"
        needs = "" if kind.needs == "nothing" else f", with the base's {kind.needs}"
        return replace(
            self.seen,
            verdict="convertible",
            reason=f"{kind.name} → LoRA{needs}; {'lossless' if kind.lossless else 'by SVD'}",
            why=f"{kind.name} is converted into LoRA{needs}; {loss}.",
        )

    def _declared(self, declared: str | None) -> None:
        """Compare the base that the adapter declares with the one that is asked for."""
        relation = same_model(declared, self.base, self.aliases)
        self.seen = replace(self.seen, base=printable(declared, 200) if declared else None, relation=relation)
        if relation == "same":
            return
        if relation == "no" and match.is_hub_id(declared) and not inspect.is_folder(self.base):
            raise InputError(
                f"{self.seen.name} was trained for {self.seen.base}, not for {printable(self.base)}.",
                "On another base its update means something else, even where the shapes are the same.",
                f"If both hold the same weights, say so: --base-alias {self.seen.base}",
                code="E_BASE_MISMATCH",
            )
        if relation != "no":
            text = f"it declares {self.seen.base}, {_HOW[relation]}"
        elif declared:
            text = f"it declares {self.seen.base}, which by its name need not be the base"
        else:
            text = "its config declares no base; its card does"
        self.seen = replace(self.seen, notes=(*self.seen.notes, text))


def _gated(seen: Candidate, wire: Wire) -> Candidate:
    page = f"{wire.endpoint}/{seen.repo}"
    then = " and set HF_TOKEN" if wire.anonymous else ""
    return replace(
        seen,
        verdict="unknown",
        reason=f"gated: ask for access at {page}",
        why="It is gated: its owner wants you to accept conditions before its files can be read.",
        fix=f"Ask for access at {page}{then}.",
    )


def _claims(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rank and targets as a config claims them, for where the tensors do not say."""
    rank, targets = settings.get("r"), settings.get("target_modules")
    listed = [one for one in targets if isinstance(one, str)] if isinstance(targets, list) else []
    shown = {printable(one.rsplit(".", 1)[-1], 60) for one in listed[:2000]} or (
        {printable(targets, 60)} if isinstance(targets, str) and targets else set()
    )
    return {
        "ranks": (rank,) if type(rank) is int and 0 < rank < 2**31 else (),
        "targets": tuple(sorted(shown)),
    }


def module_paths(shapes: Mapping[str, tuple[int, ...]], known: Collection[str]) -> set[str]:
    """The modules that tensors of any method are named after: those of the base where `known`, else what is before the
    parameter's own name."""
    found = set()
    for name in shapes:
        if name.startswith("base_model.model."):
            path = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")[0]
            above = (".".join(path.split(".")[:depth]) for depth in range(path.count(".") + 1, 0, -1))
            found.add(next((place for place in above if place in known), path))
    return {path for path in found if "." in path}


def _licence(listed: Listed) -> str | None:
    """As the card states it, else the tag that the Hub made of it."""
    stated = listed.card.get("license") or listed.card.get("license_name")
    if stated == "other":
        stated = listed.card.get("license_name") or stated
    if isinstance(stated, list):
        stated = ", ".join(one for one in stated if isinstance(one, str))
    if not isinstance(stated, str) or not stated:
        stated = next((tag.removeprefix("license:") for tag in listed.tags if tag.startswith("license:")), "")
    return printable(stated) or None


def _short(error: RecycleError, seen: Candidate) -> str:
    """The gist of an error in a line, without the adapter's name before it."""
    text = error.why if error.what.endswith("cannot be read exactly.") and error.why else error.what
    for name in (f"{seen.name}/{WEIGHTS}", seen.name):
        text = text.removeprefix(printable(name)).removeprefix(":").strip()
    return printable(text.rstrip("."), 160)


def _full(error: RecycleError) -> str:
    return f"{error.what} {error.why}".strip()


def _last(place: str, pattern: re.Pattern[str]) -> bool:
    return bool(pattern.fullmatch(place.rsplit("/", 1)[-1]))


def _above(place: str) -> str:
    return place.rpartition("/")[0]
