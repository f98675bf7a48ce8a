"""PEFT folders → factors. Tensors are trusted first, the config second; what is not understood is refused by
name.

ΔW = s·B·A at every site, with s = α/r, or α/√r for rsLoRA, and r and α per module where ``rank_pattern`` and
``alpha_pattern`` say so. s is folded into B once, in fp32. Which modules an adapter touches is read from the
tensor names: ``target_modules`` may be a list, a regular expression or "all-linear", and is only a hint.

``fan_in_fan_out`` needs nothing: it says how the *base* stores its weight (GPT-2's Conv1D keeps W
transposed), while A is (R, D) and B is (O, R) either way.

Dimensions in names: R rank, D input width, O output width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recycler.zoo import config, inspect
from recycler.zoo.adapter import Adapter, Factors
from recycler.zoo.config import Problems
from recycler.zoo.errors import SecurityError, shorten
from recycler.zoo.inspect import Receipt, printable
from recycler.zoo.patterns import first_matches

_KEY = re.compile(
    r"base_model\.model\.(?P<path>.+)\."
    r"(?:(?P<part>lora_A|lora_B)(?:\.[^.]+)?\.weight|(?P<magnitude>lora_magnitude_vector)(?:\.[^.]+)?(?:\.weight)?)"
)


@dataclass(frozen=True)
class SitePlan:
    """How one site will be read: tensor names, rank, scaling, and (O, D)."""

    a: str
    b: str
    magnitude: str | None
    rank: int
    scaling: float
    shape: tuple[int, int]


def read(
    folder: Path | str,
    name: str | None = None,
    *,
    source: str | None = None,
    revision: str | None = None,
    max_bytes: int = inspect.MAX_BYTES,
) -> tuple[Adapter, Receipt]:
    """Read a PEFT LoRA folder exactly, or refuse it.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: the adapter's name; the folder's where None.
        source: where it came from; the folder where None.
        revision: the commit, where it came from the Hub.
        max_bytes: the most that its files may hold together.

    Returns:
        The adapter, its factors in fp32 on the CPU with the scaling folded into B, and the receipt.

    Raises:
        InputError: files, config or tensors are missing, broken, contradictory or not supported.
        SecurityError: pickled or forged weights, links out of the folder, patterns that never finish.
    """
    folder = Path(folder)
    name = name or printable(folder.resolve().name)
    inspect.check_folder(folder, max_bytes)
    weights = folder / inspect.WEIGHTS
    settings = config.parse_config(config.read_config(folder / inspect.CONFIG), name)
    shapes = inspect.read_header(weights)
    sites, receipt = plan(settings, shapes, name, source=source or str(folder))
    adapter = Adapter(
        name=name,
        sites=_load(weights, sites, name),
        base=settings.base,
        source=source or str(folder),
        revision=revision,
        sha256=inspect.hashes(weights)[0],
        licence=inspect.card_licence(folder),
    )
    return adapter, receipt


def plan(
    settings: config.Settings, shapes: Mapping[str, tuple[int, ...]], name: str, *, source: str = ""
) -> tuple[dict[str, SitePlan], Receipt]:
    """Pair tensors to sites from names and shapes alone, so that a header is enough to judge an adapter.

    Returns:
        Module path → how to read it, in the order of the paths, and the receipt.

    Raises:
        InputError: empty tensors, leftovers, missing halves, ranks that disagree; all of them are named.
    """
    inspect.check_header(shapes, name)
    problems = Problems(name)
    parts = _sort_tensors(shapes, problems)
    _check_pairs(parts, shapes, settings, problems)
    problems.raise_any("Nothing is ever dropped: every tensor must be placed and every site complete.")
    paths = sorted(parts)
    ranks = _resolve(settings.rank_pattern or {}, paths, settings.rank)
    alphas = _resolve(settings.alpha_pattern or {}, paths, settings.alpha)
    sites: dict[str, SitePlan] = {}
    for path in paths:
        a, b = parts[path]["lora_A"], parts[path]["lora_B"]
        rank = shapes[a][0]
        if ranks[path] != rank:
            text = f"{printable(path)} (config {ranks[path]}, tensor {rank})"
            problems.add("rank in the config differs from the tensors, so the scale α/r is ambiguous", [text])
        scaling = alphas[path] / (math.sqrt(rank) if settings.rslora else rank)
        shape = shapes[b][0], shapes[a][1]
        sites[path] = SitePlan(a, b, parts[path].get("lora_magnitude_vector"), rank, scaling, shape)
    problems.raise_any("Correct r and rank_pattern in adapter_config.json; the author knows which scale was trained.")
    return sites, _receipt(settings, sites, len(shapes), name, source)


def _sort_tensors(shapes: Mapping[str, tuple[int, ...]], problems: Problems) -> dict[str, dict[str, str]]:
    """Module path → part → tensor name; everything else becomes a problem."""
    parts: dict[str, dict[str, str]] = {}
    for key, shape in shapes.items():
        found = _KEY.fullmatch(key)
        shown = f"{printable(key)} {list(shape)}"
        if "lora_embedding_" in key:
            problems.add("LoRA on embeddings is not supported", [shown])
        elif not found or found["path"].split(".")[-1] == "base_layer":
            problems.add("tensors that are no part of a LoRA on a linear", [shown])
        elif len(shape) != (1 if found["magnitude"] else 2):
            problems.add("LoRA on convolutions and stacked experts is not supported; not a matrix", [shown])
        elif parts.setdefault(found["path"], {}).setdefault(found["part"] or found["magnitude"], key) != key:
            problems.add("two tensors for one place", [shown])
    return parts


def _check_pairs(
    parts: Mapping[str, Mapping[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
    settings: config.Settings,
    problems: Problems,
) -> None:
    for path, keys in sorted(parts.items()):
        shown = printable(path)
        for part in ("lora_A", "lora_B"):
            if part not in keys:
                problems.add(f"{part} is missing", [shown])
        if "lora_A" not in keys or "lora_B" not in keys:
            continue
        a, b = shapes[keys["lora_A"]], shapes[keys["lora_B"]]
        if a[0] != b[1]:
            problems.add("A and B disagree on the rank", [f"{shown} ({a[0]} and {b[1]})"])
        magnitude = keys.get("lora_magnitude_vector")
        if magnitude and not settings.dora:
            problems.add("has a DoRA magnitude while use_dora is not set", [shown])
        if not magnitude and settings.dora:
            problems.add("use_dora is set but the magnitude is missing", [shown])
        if magnitude and shapes[magnitude][0] != b[0]:
            problems.add("DoRA magnitude has another width than B", [f"{shown} ({shapes[magnitude][0]}, {b[0]})"])


def _resolve(pattern: Mapping[str, Any], paths: list[str], default: Any) -> dict[str, Any]:
    """Path → value, as ``peft.utils.other.get_pattern_key`` picks it: first match, else default."""
    keys = list(pattern)
    matches = first_matches(keys, paths) if keys else [None] * len(paths)
    # PEFT then looks the key up in the dict, so a path written out counts even where it does not match.
    return {
        path: pattern.get(path if found is None else keys[found], default) for path, found in zip(paths, matches, strict=True)
    }


def _receipt(settings: config.Settings, sites: Mapping[str, SitePlan], tensors: int, name: str, source: str) -> Receipt:
    scalings = [site.scaling for site in sites.values()]
    wide = [printable(path) for path, site in sites.items() if site.rank > min(site.shape)]
    warnings = []
    if wide:
        warnings.append(f"rank above the width of the linear, so the factors are larger than ΔW: {shorten(wide, 3)}")
    if max(scalings) > 100:
        warnings.append(f"scaling ×{max(scalings):g} is unusual; check lora_alpha")
    kinds = [kind for kind, used in (("rsLoRA", settings.rslora), ("DoRA", settings.dora)) if used] or ["LoRA"]
    return Receipt(
        name=name,
        source=source,
        tensors=tensors,
        sites=len(sites),
        parameters=sum(site.rank * sum(site.shape) for site in sites.values()),
        ranks=tuple(sorted({site.rank for site in sites.values()})),
        kinds=tuple(kinds),
        scalings=(min(scalings), max(scalings)),
        targets=tuple(sorted({path.rsplit(".", 1)[-1] for path in sites})),
        base_revision=settings.base_revision,
        notes=settings.notes,
        warnings=tuple(warnings),
    )


def _load(weights: Path, sites: Mapping[str, SitePlan], name: str) -> dict[str, Factors]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="pt") as stream:
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise SecurityError(
            f"{printable(weights)} breaks the rules of safetensors: {printable(error)}.",
            "Tensors overlap, leave holes or lie outside the file, so its contents are ambiguous.",
            "Get the file again from its author.",
        ) from error
    inspect.check_values(tensors, name)
    factors = {}
    for path, site in sites.items():
        magnitude = tensors[site.magnitude].float() if site.magnitude else None
        b_OR = tensors[site.b].float() * site.scaling
        factors[path] = Factors(tensors[site.a].float().contiguous(), b_OR, magnitude)
    inspect.check_values({f"{path} (B times its scaling)": f.b_OR for path, f in factors.items()}, name)
    return factors
