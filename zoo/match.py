"""Which adapters can share one model, and why not.

Shapes decide, not names: every site of an adapter must be a linear of the base with the same (O, D). A
partial fit is no fit; an adapter that lands on some of its sites only gives the base's answers, or half of
its own, without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from recycler.zoo.adapter import Adapter, Factors
from recycler.zoo.errors import InputError, shorten
from recycler.zoo.inspect import printable


def place(
    adapter: Adapter, shapes: Mapping[str, tuple[int, int]], *, targets: Iterable[str] | None = None
) -> dict[str, Factors]:
    """The adapter's factors by module path of the base, all of them.

    Args:
        adapter: what to place.
        shapes: module path → (O, D) of every linear in the base.
        targets: the module paths, or last components of them, where the model routes; all where None.

    Raises:
        InputError: a site is not in the base, has another shape there, or is no target; all are counted.
    """
    check_sites(adapter.name, {path: f.shape for path, f in adapter.sites.items()}, shapes, targets=targets)
    return dict(adapter.sites)


def check_sites(
    name: str,
    sites: Mapping[str, tuple[int, int]],
    shapes: Mapping[str, tuple[int, int]],
    *,
    targets: Iterable[str] | None = None,
) -> None:
    """`place` from shapes alone: `sites` is module path → (O, D) of ΔW. Raises as `place` does."""
    absent = [path for path in sites if path not in shapes]
    if absent:
        raise InputError(
            f"{printable(name)} does not fit the base: {len(absent)} of {len(sites)} sites are not in it: "
            f"{shorten(printable(path) for path in absent)}.",
            "An adapter that is placed in part does not do what it was trained to do.",
            _prefix_hint(absent, sites, shapes),
            code="E_SITES",
        )
    wrong = [
        f"{printable(path)} (adapter {shape[0]}×{shape[1]}, base {shapes[path][0]}×{shapes[path][1]})"
        for path, shape in sites.items()
        if tuple(shape) != tuple(shapes[path])
    ]
    if wrong:
        raise InputError(
            f"{printable(name)} does not fit the base: {len(wrong)} of {len(sites)} sites differ in shape: {shorten(wrong)}.",
            "It was trained for a base of another size.",
            "Give the base that the adapter declares.",
            code="E_SHAPES",
        )
    if targets is not None:
        wanted = set(targets)
        outside = [p for p in sites if p not in wanted and p.rsplit(".", 1)[-1] not in wanted]
        if outside:
            raise InputError(
                f"{printable(name)} has {len(outside)} of {len(sites)} sites outside the targets: "
                f"{shorten(printable(path) for path in outside)}.",
                "Leaving them out would change what the adapter does.",
                "Add them to the targets, or leave this adapter out.",
                code="E_SITES",
            )


def same_base(a: str | None, b: str | None) -> bool:
    """Whether two declared bases are the same Hub id (upper and lower case aside) or the same folder."""
    return a is not None and b is not None and a.rstrip("/").casefold() == b.rstrip("/").casefold()


def is_hub_id(base: str | None) -> bool:
    """Whether a declared base reads as ``org/name`` or ``name``, not as a path on somebody's disk."""
    return base is not None and bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", base))


def on_another_machine(base: str) -> bool:
    """Whether a declared base is a network share (UNC), which a stranger's file must not make us open."""
    return base.startswith(("\\\\", "//"))


def by_base(bases: Mapping[str, str | None]) -> dict[str | None, list[str]]:
    """Adapter names by declared base: the sets that can share a model (`bases`: name → base)."""
    groups: dict[str | None, list[str]] = {}
    spelling: dict[str | None, str | None] = {}
    for name, base in bases.items():
        key = base.rstrip("/").casefold() if base else None
        groups.setdefault(spelling.setdefault(key, base), []).append(name)
    return groups


def require_one_base(bases: Mapping[str, str | None]) -> str | None:
    """The one base that all adapters declare (undeclared ones follow the rest); None where none declares any.

    Raises:
        InputError: they declare different bases; every group is named.
    """
    groups = {base: names for base, names in by_base(bases).items() if base is not None}
    if len(groups) > 1:
        listing = "; ".join(f"{printable(base)}: {shorten(names)}" for base, names in groups.items())
        raise InputError(
            f"These adapters were trained for {len(groups)} different bases: {listing}.",
            "One model has one base.",
            "Choose the adapters of one base, or name a base folder if these are copies of the same model.",
            code="E_BASE_MISMATCH",
        )
    return next(iter(groups), None)


def _prefix_hint(absent: list[str], sites: Mapping[str, tuple[int, int]], shapes: Mapping[str, tuple[int, int]]) -> str:
    """Where all sites would fit under another prefix, say which; else say that the base differs."""
    tails = [_tail(path) for path in sites]
    homes: dict[str, set[str]] = {}
    for path in shapes:
        prefix, tail = _split(path)
        homes.setdefault(tail, set()).add(prefix)
    common = set.intersection(*(homes.get(tail, set()) for tail in tails)) if tails else set()
    mine = {_split(path)[0] for path in sites}
    if len(absent) == len(sites) and common and len(mine) == 1:
        shown, wanted = printable(mine.pop()), printable(sorted(common, key=len)[0])
        return (
            f"All paths differ by their prefix: the adapter says {shown!r} where the base says "
            f"{wanted!r}, as after a rename of the model's classes. Save it again with a current PEFT."
        )
    same = sum(tuple(sites[p]) == tuple(shapes[p]) for p in sites if p in shapes)
    there = len(sites) - len(absent)
    if there and same == there:
        return "The rest fits: is the base of the same family, with fewer layers? Give the one it declares."
    return "This is a different base. Give the one that the adapter declares."


def _split(path: str) -> tuple[str, str]:
    """``model.layers.0.mlp.up_proj`` → (``model.layers``, ``0.mlp.up_proj``)."""
    found = re.search(r"(?:^|\.)(?=\d+(?:\.|$))", path)
    return (path[: found.start()], path[found.end() :]) if found else ("", path)


def _tail(path: str) -> str:
    return _split(path)[1]
