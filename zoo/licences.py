"""Licences as adapters state them: one spelling each, what they ask, and what a set of them asks together.

Pure functions over the text of a card. Ids are those of the Hub's cards, which are SPDX's in lower case (``apache-2.0``) with
the model licences beside them (``llama3.1``, ``gemma``). What a licence asks is said in a sentence, for a person to decide;
none of this is legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from recycler.zoo.errors import InputError, UsageError, shorten
from recycler.zoo.inspect import printable

SCHEMA_VERSION = 1
DISCLAIMER = "This is what the cards state, not legal advice."

# What a licence asks, the most restrictive first.
NO_DERIVATIVES = "no-derivatives"
NON_COMMERCIAL = "non-commercial"
MODEL_SPECIFIC = "model-specific"
USE_RESTRICTED = "use-restricted"
SHARE_ALIKE = "share-alike"
UNRECOGNISED = "unrecognised"

SENTENCES: Mapping[str, str] = {
    NO_DERIVATIVES: "no derivatives: changed or combined versions may not be passed on",
    NON_COMMERCIAL: "non-commercial: not for commercial use",
    MODEL_SPECIFIC: "model-specific: the terms of the base model's owner come with it, and some limit who may use it",
    USE_RESTRICTED: "use-restricted: some uses are forbidden, and that must be passed on",
    SHARE_ALIKE: "share-alike: what is built on it must be passed on under the same licence",
    UNRECOGNISED: "unrecognised: read its text",
}

_PERMISSIVE = {
    "afl-3.0", "apache-2.0", "artistic-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "cc-by",
    "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "ecl-2.0",
    "etalab-2.0", "isc", "mit", "ms-pl", "ncsa", "odc-by", "ofl-1.1", "pddl", "postgresql", "unlicense", "wtfpl", "zlib",
}  # fmt: skip
_SHARE_ALIKE = {
    "agpl-3.0", "cc-by-sa", "cc-by-sa-3.0", "cc-by-sa-4.0", "cdla-sharing-1.0", "epl-1.0", "epl-2.0", "eupl-1.1", "eupl-1.2",
    "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "lppl-1.3c", "mpl-2.0", "odbl", "osl-3.0",
}  # fmt: skip
_NON_COMMERCIAL = {
    "apple-amlr", "cc-by-nc", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "fair-noncommercial-research-license",
    "h-research", "intel-research", "deepfloyd-if-license",
}  # fmt: skip
_USE_RESTRICTED = {
    "bigcode-openrail-m", "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "c-uda", "creativeml-openrail-m", "openrail",
    "openrail++",
}  # fmt: skip
_MODEL_SPECIFIC = {
    "gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "apple-ascl", "qwen", "qwen-research",
}  # fmt: skip
_OF_SEVERAL: Mapping[str, tuple[str, ...]] = {
    "cc-by-nc-sa": (NON_COMMERCIAL, SHARE_ALIKE),
    "cc-by-nc-nd": (NO_DERIVATIVES, NON_COMMERCIAL),
    "cc-by-nd": (NO_DERIVATIVES,),
}
_VERSIONS = ("", "-2.0", "-2.5", "-3.0", "-4.0")

TERMS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_PERMISSIVE, ()),
    **dict.fromkeys(_SHARE_ALIKE, (SHARE_ALIKE,)),
    **dict.fromkeys(_NON_COMMERCIAL, (NON_COMMERCIAL,)),
    **dict.fromkeys(_USE_RESTRICTED, (USE_RESTRICTED,)),
    **dict.fromkeys(_MODEL_SPECIFIC, (MODEL_SPECIFIC,)),
    "qwen-research": (NON_COMMERCIAL, MODEL_SPECIFIC),
    **{f"{family}{version}": terms for family, terms in _OF_SEVERAL.items() for version in _VERSIONS},
}
"""Known id → what it asks, most restrictive first; nothing where it asks for attribution at most."""

_WHOLE = {"agpl": "gpl", "gpl": "gpl", "cc-by-sa": "cc-by-sa", "cc-by-nc-sa": "cc-by-nc-sa", "osl": "osl", "gfdl": "gfdl"}
"""Families whose share-alike reaches the whole work → who gets on with whom; LGPL, MPL and EPL ask it of their own part only."""

_NOT_STATED = {"", "unknown", "none", "null", "n-a", "na", "tbd", "not-stated", "unspecified"}
_ALIASES = {
    "apache": "apache-2.0", "apache2": "apache-2.0", "apache-2": "apache-2.0", "asl-2.0": "apache-2.0",
    "cc0": "cc0-1.0", "cc-0": "cc0-1.0", "cc-zero": "cc0-1.0", "creativecommons-zero": "cc0-1.0",
    "gplv2": "gpl-2.0", "gplv3": "gpl-3.0", "gpl2": "gpl-2.0", "gpl3": "gpl-3.0", "agpl": "agpl-3.0", "agplv3": "agpl-3.0",
    "agpl3": "agpl-3.0", "lgplv3": "lgpl-3.0", "lgpl3": "lgpl-3.0", "expat": "mit", "bsd-3": "bsd-3-clause", "bsd3": "bsd-3-clause",
    "bsd-2": "bsd-2-clause", "bsd2": "bsd-2-clause", "new-bsd": "bsd-3-clause", "mozilla-2.0": "mpl-2.0", "mpl": "mpl-2.0",
    "openrail-m": "openrail", "bloom-rail-1.0": "bigscience-bloom-rail-1.0", "boost": "bsl-1.0", "isc-1.0": "isc",
}  # fmt: skip
_SPDX_TAIL = re.compile(r"-(only|or-later)$")


@dataclass(frozen=True)
class Conflict:
    """Two things that licences ask which cannot both be met, or may not be. ``str()`` says it in a line."""

    adapters: tuple[str, ...]
    what: str

    def __str__(self) -> str:
        return f"{shorten(self.adapters, 4)}: {self.what}"


@dataclass(frozen=True)
class RollUp:
    """What a set of adapters asks together.

    Attributes:
        by_licence: licence id → the adapters that state it, sorted; an adapter that states several is under each.
        unstated: the adapters whose cards state none.
        conflicts: what cannot, or may not, be met together.
    """

    by_licence: Mapping[str, tuple[str, ...]]
    unstated: tuple[str, ...] = ()
    conflicts: tuple[Conflict, ...] = ()

    @property
    def single(self) -> str | None:
        """The one licence that every adapter states; None where they differ or one states none."""
        return next(iter(self.by_licence)) if len(self.by_licence) == 1 and not self.unstated else None

    @property
    def strictest(self) -> str | None:
        """The licence that asks the most, None where no adapter states one."""
        return min(self.by_licence, key=lambda one: (_weight(one), one), default=None)

    @property
    def verdict(self) -> str:
        """In a line: the most restrictive terms, from whom, and how many state none."""
        worst = self.strictest
        if self.single:
            asks = terms(self.single)
            return f"all state {self.single}" + (f" ({', '.join(asks)})" if asks else "")
        parts = []
        if worst is not None:
            asks = terms(worst)
            who = shorten(self.by_licence[worst], 3)
            parts.append(f"most restrictive terms: {worst} from {who}" + (f" ({', '.join(asks)})" if asks else ""))
        if self.unstated:
            count = len(self.unstated)
            parts.append(f"{count} adapter{'s state' if count > 1 else ' states'} none, so nothing is granted by it")
        return "; ".join(parts) or "no adapters"

    def lines(self) -> list[str]:
        """The verdict, what every restrictive licence asks, and the conflicts, a line each."""
        restrictive = sorted((one for one in self.by_licence if terms(one)), key=lambda one: (_weight(one), one))
        asks = [f"{one}: {'; '.join(SENTENCES[term] for term in terms(one))}" for one in restrictive]
        return [self.verdict, *asks, *(f"conflict: {one}" for one in self.conflicts)]

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {
            "schema_version": SCHEMA_VERSION,
            "licences": {one: {"terms": list(terms(one)), "adapters": list(names)} for one, names in self.by_licence.items()},
            "not_stated": list(self.unstated),
            "conflicts": [{"adapters": list(one.adapters), "what": one.what} for one in self.conflicts],
            "single": self.single,
            "strictest": self.strictest,
            "verdict": self.verdict,
        }


_LONGEST = 120  # of a licence in a table


def normalise(text: str | None) -> str | None:
    """One licence's id: ``Apache License, Version 2.0`` → ``apache-2.0``; None where nothing is stated.

    A licence that is not known keeps its text, in lower case and with control characters spelled out.
    """
    plain = printable(text or "", 1000).strip().lower()
    if len(plain) > _LONGEST:
        plain = plain[: _LONGEST - 1] + "…"
    tidy = re.sub(r"[\s_,()/]+", "-", plain).strip("-. ")
    if tidy in _NOT_STATED:
        return None
    for candidate in (tidy, _SPDX_TAIL.sub("", tidy), _bare(tidy)):
        known = _ALIASES.get(candidate, candidate)
        if known in TERMS:
            return known
    return plain


def stated(text: str | None) -> tuple[str, ...]:
    """The ids in a card's licence field, which may hold several with commas between; empty where none is stated."""
    whole = normalise(text)
    if whole is None or whole in TERMS:
        return () if whole is None else (whole,)
    return tuple(dict.fromkeys(one for part in (text or "").split(",") if (one := normalise(part)) is not None))


def terms(licence: str) -> tuple[str, ...]:
    """What a normalised licence asks, most restrictive first; ``("unrecognised",)`` where it is not known."""
    return TERMS.get(licence, (UNRECOGNISED,))


def parse_list(text: str) -> set[str]:
    """Licences that a person allows, from ``mit, Apache 2.0, cc-by``. One without a version stands for all its versions.

    Raises:
        UsageError: nothing is named, or something reads like a known licence misspelt.
    """
    allow = {one for part in text.split(",") if (one := normalise(part)) is not None}
    if not allow:
        raise UsageError("No licence is named.", "", "Write for example: --license-allow apache-2.0,mit,cc-by-4.0")
    families = {_family(one) for one in TERMS}
    for one in sorted(one for one in allow if one not in TERMS and _family(one) not in families):  # llama9 may come
        close = get_close_matches(one, TERMS, n=3, cutoff=0.8)
        if close:
            raise UsageError(
                f"{printable(one)!r} is no licence that cards state.",
                "A misspelt licence would allow nothing.",
                f"Did you mean {' or '.join(close)}?",
            )
    return allow


def allowed(licence: str | None, allow: Iterable[str]) -> bool:
    """Whether everything that a card states is in `allow` (as `parse_list` gives it). A card that states none is not."""
    chosen = set(allow)
    found = stated(licence)
    return bool(found) and all(one in chosen or _family(one) in chosen for one in found)


def require(licences: Mapping[str, str | None], allow: set[str] | None, *, strict: bool = False) -> None:
    """Return where every adapter's licence may be used (`licences`: adapter → its card's licence, as written).

    Args:
        allow: as `parse_list` gives it; None allows all.
        strict: a card that states no licence, one that is not recognised, and conflicts are refused too.

    Raises:
        InputError: naming every adapter and what it states.
    """
    problems = []
    for name in sorted(licences):
        found = stated(licences[name])
        if not found:
            problems += [f"{name} (states none)"] if strict else []
        elif allow is not None and not allowed(licences[name], allow):
            problems.append(f"{name} ({', '.join(found)})")
        elif allow is None and strict and any(UNRECOGNISED in terms(one) for one in found):
            problems.append(f"{name} ({', '.join(found)}, not recognised)")
    if strict:
        problems += [str(one) for one in roll_up(licences).conflicts]
    if problems:
        raise InputError(
            f"Licences that are not allowed: {shorten(problems)}.",
            f"Allowed are: {', '.join(sorted(allow))}."
            if allow
            else "--strict asks for licences that are stated, known and agree.",
            "Leave those adapters out, ask their authors, or add to --license-allow what you accept.",
            code="E_LICENCE",
        )


def roll_up(licences: Mapping[str, str | None]) -> RollUp:
    """What a set of adapters asks together (`licences`: adapter → its card's licence, as written)."""
    by_licence: dict[str, list[str]] = {}
    for name in sorted(licences):
        for one in stated(licences[name]):
            by_licence.setdefault(one, []).append(name)
    unstated = tuple(sorted(name for name, text in licences.items() if not stated(text)))
    held = {one: tuple(names) for one, names in sorted(by_licence.items())}
    return RollUp(held, unstated, tuple(_conflicts(held)))


def _conflicts(held: Mapping[str, tuple[str, ...]]) -> Iterable[Conflict]:
    """Three rules, each a plain reading of what the licences say of combined works."""

    def who(wanted: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted({name for one in wanted for name in held[one]}))

    fixed = [one for one in held if NO_DERIVATIVES in terms(one)]
    if fixed and sum(map(len, held.values())) > 1:
        yield Conflict(who(fixed), f"{' and '.join(fixed)} forbids passing on changed versions; a mixture may count as one")
    alike = [one for one in held if _family(one) in _WHOLE]
    if len({_WHOLE[_family(one)] for one in alike}) > 1:
        yield Conflict(who(alike), f"{' and '.join(alike)} each ask that the whole be passed on under their own terms")
    free = [one for one in held if _family(one) in ("gpl", "agpl")]
    limits = {NON_COMMERCIAL, MODEL_SPECIFIC, USE_RESTRICTED, NO_DERIVATIVES}
    limiting = [one for one in held if limits & set(terms(one))]
    if free and limiting:
        text = f"{' and '.join(free)} forbids adding restrictions, and {' and '.join(limiting)} adds some"
        yield Conflict(who([*free, *limiting]), text)


def _bare(tidy: str) -> str:
    """Without the words that people put around a licence's name: ``the-mit-license`` → ``mit``."""
    text = re.sub(r"\b(the|licen[cs]ed?|public|version|software|international|community|agreement|terms|of-use)\b", "-", tidy)
    text = re.sub(r"creative-?commons", "cc", text)
    text = re.sub(r"attribution", "by", text)
    text = re.sub(r"non-?commercial", "nc", text)
    text = re.sub(r"no-?deriv\w*", "nd", text)
    text = re.sub(r"share-?alike", "sa", text)
    text = re.sub(r"gnu-?general|gnu-?gpl", "gpl", text)
    text = re.sub(r"\bv\.?(?=\d)", "", text)
    text = re.sub(r"-+", "-", text).strip("-.")
    text = re.sub(r"^llama-?(\d)(?:\.0)?", r"llama\1", text)
    text = re.sub(r"^by\b", "cc-by", text)
    text = re.sub(r"^cc-(?=nc|sa|nd)", "cc-by-", text)
    return re.sub(r"^(apache|agpl|gpl|lgpl|cc-by(?:-[a-z]+)*|mpl|cc0)-?(\d)(?:\.0)?$", r"\1-\2.0", text)


def _family(licence: str) -> str:
    """Without the version: ``cc-by-nc-4.0`` → ``cc-by-nc``, ``llama3.1`` → ``llama``."""
    return re.sub(r"-?\d[\d.]*[a-z]?$", "", licence)


def _weight(licence: str) -> int:
    """Where the most restrictive of its terms stands; permissive ones come last."""
    order = list(SENTENCES)
    return min((order.index(term) for term in terms(licence)), default=len(order))
