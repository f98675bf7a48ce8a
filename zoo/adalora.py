"""AdaLoRA and IncreLoRA: singular values E between A and B, and ranks that differ from site to site.

AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) starts with ``init_r`` ranks everywhere and prunes. PEFT saves ``lora_A`` [R, D],
``lora_E`` [R, 1] and ``lora_B`` [O, R] with the pruned ranks cut out, and writes which were kept into the config's
``rank_pattern``. Its scale stays α/(init_r + 1e-5) whatever is left. A site that was pruned to rank 0 is an absent site.

IncreLoRA (Zhang et al. 2023, arXiv:2308.12043; its released code is no part of PEFT) grows instead. Its layers hold lists,
``lora_A.0`` [r, D], ``lora_A.1`` [1, D] and so on, the same of E and B, and ``ranknum``, which the scale is divided by. It counts
the ranks that were granted; the list is longer by those in reserve, which take part in the forward with their E.

Dimensions in names: R rank, D input width, O output width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from recycler.zoo.config import Problems, Settings
from recycler.zoo.inspect import printable
from recycler.zoo.plans import RANKNUM_EPS, SitePlan

_KEY = re.compile(r"(?P<path>.+)\.(?P<part>lora_A|lora_B|lora_E|ranknum)(?:\.(?P<index>[^.]+))?")
_PREFIX = "base_model.model."
_PARTS = ("lora_A", "lora_E", "lora_B")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class _Site:
    """Tensor names at one site: part → list index → name; "" is the index of what is no list."""

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    ranknum: str | None = None


def is_adalora(settings: Settings, shapes: Shapes) -> bool:
    """Whether the tensors have singular values between A and B, or the config says that they should."""
    return settings.method in ("ADALORA", "INCRELORA") or any(".lora_E" in key and _KEY.fullmatch(key) for key in shapes)


def pruned(shapes: Shapes) -> set[str]:
    """Tensors of sites that AdaLoRA pruned to rank 0: matrices without elements, and no sign of damage."""
    axis = {"lora_A": 0, "lora_E": 0, "lora_B": 1}
    found = set()
    for key, shape in shapes.items():
        match = _KEY.fullmatch(key)
        if match and match["part"] in axis and len(shape) == 2 and shape[axis[match["part"]]] == 0 < sum(shape):
            found.add(key)
    return found


def plan(settings: Settings, shapes: Shapes, problems: Problems) -> tuple[dict[str, SitePlan], str, tuple[str, ...]]:
    """Pair tensors to sites.

    Returns:
        Module path → how to read it, in the order of the paths; "AdaLoRA" or "IncreLoRA"; and notes.
    """
    lists = settings.method == "INCRELORA" or any(_index(key) > 0 for key in shapes)
    if settings.method == "LORA" and not lists:
        problems.add("has singular values lora_E, while peft_type is LORA and not ADALORA", [f"{len(shapes)} tensors"])
        return {}, "AdaLoRA", ()
    sites = _sort(shapes, problems, lists)
    absent = [path for path, mask in (settings.masks or {}).items() if path not in sites and any(mask)]
    problems.add("rank_pattern names modules that have no tensors", [printable(path) for path in absent])
    made = {path: _plan_site(path, sites[path], shapes, settings, problems, lists) for path in sorted(sites)}
    found = {path: site for path, site in made.items() if site is not None and site.rank > 0}
    empty = sum(site is not None and site.rank == 0 for site in made.values())
    notes = (f"{empty} of {len(made)} sites were pruned to rank 0: no update there",) if empty else ()
    return found, "IncreLoRA" if lists else "AdaLoRA", notes


def _index(key: str) -> int:
    match = _KEY.fullmatch(key)
    index = match["index"] if match else None
    return int(index) if index and index.isdecimal() and len(index) < 7 else -1


def _sort(shapes: Shapes, problems: Problems, lists: bool) -> dict[str, _Site]:
    """Module path → its tensors; everything else becomes a problem."""
    sites: dict[str, _Site] = {}
    for key, shape in shapes.items():
        shown = f"{printable(key)} {list(shape)}"
        match = _KEY.fullmatch(key)
        # IncreLoRA names its tensors as the base names its modules; PEFT has wrapped the base twice.
        path = match["path"].removeprefix(_PREFIX) if match and (lists or match["path"].startswith(_PREFIX)) else ""
        if "lora_embedding_" in key:
            problems.add("LoRA on embeddings is not supported", [shown])
        elif not match or not path or path.split(".")[-1] == "base_layer":
            problems.add("tensors that are no part of an AdaLoRA on a linear", [shown])
        elif match["part"] == "ranknum":
            site = sites.setdefault(path, _Site())
            if shape not in ((), (1,)) or site.ranknum:
                problems.add("not one number", [shown])
            site.ranknum = key
        elif len(shape) != 2:
            problems.add("on convolutions and stacked experts it is not supported; not a matrix", [shown])
        else:
            names = sites.setdefault(path, _Site()).parts.setdefault(match["part"], {})
            index = str(_index(key)) if lists else ""
            if index == "-1":
                problems.add("tensors that are no part of an IncreLoRA on a linear", [shown])
            elif names.setdefault(index, key) != key:
                problems.add("two tensors for one place", [shown])
    return sites


def _plan_site(path: str, site: _Site, shapes: Shapes, settings: Settings, problems: Problems, lists: bool) -> SitePlan | None:
    shown = printable(path)
    order = [str(i) for i in range(max(map(len, site.parts.values()), default=0))] if lists else [""]
    missing = [f"{part}.{i}".rstrip(".") for part in _PARTS for i in order or ["0"] if i not in site.parts.get(part, {})]
    if missing:
        problems.add("missing", [f"{shown}.{name}" for name in missing])
        return None
    a, e, b = (tuple(site.parts[part][i] for i in order) for part in _PARTS)
    rows = _rows(a, e, b, shapes)
    if rows is None:
        problems.add("A, E and B disagree on their shapes", [shown])
        return None
    shape = shapes[b[0]][0], shapes[a[0]][1]
    if lists:
        if site.ranknum is None and path not in (settings.rank_pattern or {}):
            problems.add("ranknum is missing, which the scale is divided by; put it into rank_pattern", [shown])
            return None
        count = float((settings.rank_pattern or {}).get(path, rows))
        return SitePlan(
            a, b, rows, settings.alpha / (count + RANKNUM_EPS), shape, values=e, ranknum=site.ranknum, alpha=settings.alpha
        )
    mask = (settings.masks or {}).get(path, ())
    kept = sum(mask) if mask else settings.rank
    if mask and len(mask) != settings.rank:
        problems.add("rank_pattern and init_r disagree", [f"{shown} ({len(mask)} and {settings.rank})"])
    if rows != kept and rows != len(mask) and site.ranknum is None:
        heading = "rank in the config differs from the tensors, so the scale α/init_r is ambiguous"
        problems.add(heading, [f"{shown} (config {kept}, tensor {rows})"])
    applied = mask if mask and rows == len(mask) != kept else ()  # saved before the ranks were cut out; PEFT would cut now
    scaling = settings.alpha / (settings.rank + RANKNUM_EPS)
    return SitePlan(
        a, b, kept if applied else rows, scaling, shape,
        values=e, ranknum=site.ranknum, alpha=settings.alpha, mask=applied,
    )  # fmt: skip


def _rows(a: Sequence[str], e: Sequence[str], b: Sequence[str], shapes: Shapes) -> int | None:
    """R over the whole list, or None where shapes disagree."""
    total = 0
    for i, (down, value, up) in enumerate(zip(a, e, b, strict=True)):
        rank, width = shapes[down]
        if shapes[value] != (rank, 1) or shapes[up][1] != rank:
            return None
        if i and (width != shapes[a[0]][1] or shapes[up][0] != shapes[b[0]][0]):
            return None
        total += rank
    return total
