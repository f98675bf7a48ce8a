"""PEFT folders → factors. Tensors are trusted first, the config second; what is not understood is refused by
name.

ΔW = s·B·A at every site, with s = α/r, or α/√r for rsLoRA, and r and α per module where ``rank_pattern`` and
``alpha_pattern`` say so. s is folded into B once, in fp32. Which modules an adapter touches is read from the
tensor names: ``target_modules`` may be a list, a regular expression or "all-linear", and is only a hint.

What other formats put between A and B, or beside them, is folded too (`plans`): LoRA-XS's latent mapping (Bałazy et
al. 2024, arXiv:2405.17604; in a file of PEFT's shape that PEFT itself would misread), the bias of B, AdaLoRA's and
IncreLoRA's singular values (`adalora`). Kinds that are converted or refused are listed in `kinds`.

``fan_in_fan_out`` needs nothing: it says how the *base* stores its weight (GPT-2's Conv1D keeps W
transposed), while A is (R, D) and B is (O, R) either way.

Dimensions in names: R rank, D input width, O output width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycler.zoo import adalora, config, inspect
from recycler.zoo.adapter import Adapter, Factors
from recycler.zoo.config import Problems
from recycler.zoo.errors import InputError, SecurityError, shorten
from recycler.zoo.inspect import Receipt, printable
from recycler.zoo.patterns import first_matches
from recycler.zoo.plans import SitePlan

if TYPE_CHECKING:
    from torch import Tensor

_KEY = re.compile(
    r"base_model\.model\.(?P<path>.+)\."
    r"(?:(?P<part>lora_A|lora_B)(?:\.[^.]+)?\.weight|(?P<bias>lora_B)(?:\.[^.]+)?\.bias"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.[^.]+)?(?:\.weight)?)"
)
# The module is called default_lora_latent_mapping; PEFT takes ".default", its adapter's name, out of every name it saves.
_LATENT = re.compile(r"base_model\.model\.(?P<path>.+?)(?:\.default_|_|\.)lora_latent_mapping\.weight")

FOREIGN = ("LoRA-XS", "IncreLoRA")
"""Kinds that are read here, and that PEFT would misread: a fetch writes them as plain LoRA."""


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
    inspect.check_folder(folder, max_bytes, where=source)
    weights = folder / inspect.WEIGHTS
    settings = config.parse_config(config.read_config(folder / inspect.CONFIG), name)
    shapes = inspect.read_header(weights, f"{source or folder}/{inspect.WEIGHTS}")
    sites, receipt = plan(settings, shapes, name, source=source or str(folder))
    factors, scales = _load(weights, sites, name)
    adapter = Adapter(
        name=name,
        sites=factors,
        base=settings.base,
        source=source or str(folder),
        revision=revision,
        sha256=inspect.hashes(weights)[0],
        licence=inspect.card_licence(folder),
    )
    return adapter, _as_read(receipt, sites, scales)


def plan(
    settings: config.Settings, shapes: Mapping[str, tuple[int, ...]], name: str, *, source: str = ""
) -> tuple[dict[str, SitePlan], Receipt]:
    """Pair tensors to sites from names and shapes alone, so that a header is enough to judge an adapter.

    Returns:
        Module path → how to read it, in the order of the paths, and the receipt. What only values can say is not in it: sites
        whose singular values are all zero, and the scale where the file itself counts the ranks it is divided by.

    Raises:
        InputError: empty tensors, leftovers, missing parts, ranks that disagree; all of them are named.
    """
    problems = Problems(name)
    if adalora.is_adalora(settings, shapes):
        empty = adalora.pruned(shapes)
        inspect.check_header({key: shape for key, shape in shapes.items() if key not in empty} or shapes, name)
        sites, kind, notes = adalora.plan(settings, shapes, problems)
        problems.raise_any(
            "Nothing is ever dropped: every tensor must be placed, and every site complete and of a known scale."
        )
        return sites, _receipt(settings, sites, (kind,), len(shapes), name, source, notes)
    inspect.check_header(shapes, name)
    parts = _sort_tensors(shapes, problems)
    _check_parts(parts, shapes, settings, problems)
    problems.raise_any("Nothing is ever dropped: every tensor must be placed and every site complete.")
    paths = sorted(parts)
    ranks = _resolve(settings.rank_pattern or {}, paths, settings.rank)
    alphas = _resolve(settings.alpha_pattern or {}, paths, settings.alpha)
    sites = {}
    for path in paths:
        a, b = parts[path]["lora_A"], parts[path]["lora_B"]
        rank = shapes[a][0]
        if ranks[path] != rank:
            text = f"{printable(path)} (config {ranks[path]}, tensor {rank})"
            problems.add("rank in the config differs from the tensors, so the scale α/r is ambiguous", [text])
        sites[path] = SitePlan(
            a=(a,),
            b=(b,),
            rank=rank,
            scaling=alphas[path] / (math.sqrt(rank) if settings.rslora else rank),
            shape=(shapes[b][0], shapes[a][1]),
            magnitude=parts[path].get("magnitude"),
            bias=parts[path].get("bias"),
            latent=parts[path].get("latent"),
        )
    problems.raise_any("Correct r and rank_pattern in adapter_config.json; the author knows which scale was trained.")
    return sites, _receipt(settings, sites, _kinds(settings, sites), len(shapes), name, source)


def _sort_tensors(shapes: Mapping[str, tuple[int, ...]], problems: Problems) -> dict[str, dict[str, str]]:
    """Module path → part → tensor name; everything else becomes a problem."""
    parts: dict[str, dict[str, str]] = {}
    for key, shape in shapes.items():
        found = _KEY.fullmatch(key) or _LATENT.fullmatch(key)
        shown = f"{printable(key)} {list(shape)}"
        part = "latent"
        if found and found.re is _KEY:
            part = found["part"] or ("bias" if found["bias"] else "magnitude")
        if "lora_embedding_" in key:
            problems.add("LoRA on embeddings is not supported", [shown])
        elif not found or found["path"].split(".")[-1] == "base_layer":
            problems.add("tensors that are no part of a LoRA on a linear", [shown])
        elif len(shape) != (1 if part in ("bias", "magnitude") else 2):
            problems.add("LoRA on convolutions and stacked experts is not supported; not a matrix", [shown])
        elif parts.setdefault(found["path"], {}).setdefault(part, key) != key:
            problems.add("two tensors for one place", [shown])
    return parts


def _check_parts(
    parts: Mapping[str, Mapping[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
    settings: config.Settings,
    problems: Problems,
) -> None:
    latent = any("latent" in keys for keys in parts.values())
    if latent and (settings.dora or settings.bias):
        problems.add("LoRA-XS knows neither DoRA nor a bias of B", ["use_dora or lora_bias is set"])
    # what the config announces, and what the tensors hold
    optional = (
        ("magnitude", settings.dora, "has a DoRA magnitude while use_dora is not set", "use_dora is set but the magnitude is missing"),
        ("bias", settings.bias, "has a bias lora_B.bias while lora_bias is not set", "lora_bias is set but lora_B.bias is missing"),
        ("latent", latent, "", "the latent mapping of LoRA-XS is missing, which other sites have"),
    )  # fmt: skip
    for path, keys in sorted(parts.items()):
        shown = printable(path)
        for part in ("lora_A", "lora_B"):
            if part not in keys:
                kind = " (LoRA-XS computes it from the base's weights; save it too)" if "latent" in keys else ""
                problems.add(f"{part} is missing{kind}", [shown])
        if "lora_A" not in keys or "lora_B" not in keys:
            continue
        a, b = shapes[keys["lora_A"]], shapes[keys["lora_B"]]
        if a[0] != b[1]:
            problems.add("A and B disagree on the rank", [f"{shown} ({a[0]} and {b[1]})"])
        for part, expected, unexpected, missing in optional:
            if (part in keys) != expected:
                problems.add(missing if expected else unexpected, [shown])
        for part in ("magnitude", "bias"):
            if part in keys and shapes[keys[part]][0] != b[0]:
                called = "DoRA magnitude" if part == "magnitude" else "bias of B"
                problems.add(f"{called} has another width than B", [f"{shown} ({shapes[keys[part]][0]}, {b[0]})"])
        if "latent" in keys and shapes[keys["latent"]] != (a[0], a[0]):
            problems.add("latent mapping is not rank × rank", [f"{shown} ({list(shapes[keys['latent']])}, rank {a[0]})"])


def _resolve(pattern: Mapping[str, Any], paths: list[str], default: Any) -> dict[str, Any]:
    """Path → value, as ``peft.utils.other.get_pattern_key`` picks it: first match, else default."""
    keys = list(pattern)
    matches = first_matches(keys, paths) if keys else [None] * len(paths)
    # PEFT then looks the key up in the dict, so a path written out counts even where it does not match.
    return {
        path: pattern.get(path if found is None else keys[found], default) for path, found in zip(paths, matches, strict=True)
    }


def _kinds(settings: config.Settings, sites: Mapping[str, SitePlan]) -> tuple[str, ...]:
    latent = any(site.latent for site in sites.values())
    named = (("rsLoRA", settings.rslora), ("DoRA", settings.dora), ("LoRA-XS", latent))
    return tuple([kind for kind, used in named if used] or ["LoRA"]) + (("bias",) if settings.bias else ())


def _receipt(
    settings: config.Settings,
    sites: Mapping[str, SitePlan],
    kinds: tuple[str, ...],
    tensors: int,
    name: str,
    source: str,
    notes: tuple[str, ...] = (),
) -> Receipt:
    wide = [printable(path) for path, site in sites.items() if site.rank > min(site.shape)]
    warnings = []
    if wide:
        warnings.append(f"rank above the width of the linear, so the factors are larger than ΔW: {shorten(wide, 3)}")
    warnings += _unusual([site.scaling for site in sites.values() if site.ranknum is None])
    if kinds[-1] in FOREIGN:
        warnings.append(f"PEFT does not know {kinds[-1]} and would load other weights from these files without a word")
    scalings = [site.scaling for site in sites.values()]
    return Receipt(
        name=name,
        source=source,
        tensors=tensors,
        sites=len(sites),
        parameters=_parameters(sites),
        ranks=_ranks(sites),
        kinds=kinds,
        scalings=(min(scalings), max(scalings)),
        targets=tuple(sorted({path.rsplit(".", 1)[-1] for path in sites})),
        base_revision=settings.base_revision,
        notes=(*settings.notes, *notes),
        warnings=tuple(warnings),
    )


def _as_read(receipt: Receipt, sites: Mapping[str, SitePlan], scales: Mapping[str, float]) -> Receipt:
    """The receipt with what only values could say; `scales` has the sites that were kept."""
    kept = {path: sites[path] for path in scales}
    silent = len(sites) - len(kept)
    text = f"{silent} of {len(sites)} sites have singular values that are all zero: no update there"
    return replace(
        receipt,
        sites=len(kept),
        parameters=_parameters(kept),
        ranks=_ranks(kept),
        scalings=(min(scales.values()), max(scales.values())),
        notes=(*receipt.notes, text) if silent else receipt.notes,
        warnings=(*receipt.warnings, *_unusual([scales[path] for path, site in kept.items() if site.ranknum])),
    )


def _parameters(sites: Mapping[str, SitePlan]) -> int:
    return sum(site.rank * sum(site.shape) for site in sites.values())


def _ranks(sites: Mapping[str, SitePlan]) -> tuple[int, ...]:
    return tuple(sorted({site.rank for site in sites.values()}))


def _unusual(scalings: Sequence[float]) -> list[str]:
    high = max(scalings, default=0.0)
    return [f"scaling ×{high:g} is unusual; check lora_alpha"] if high > 100 else []


def _load(weights: Path, sites: Mapping[str, SitePlan], name: str) -> tuple[dict[str, Factors], dict[str, float]]:
    """Site → factors, and site → the scaling that B was multiplied by, without the sites that have no update."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="pt") as stream:
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise SecurityError(
            f"{printable(name)}: {inspect.WEIGHTS} breaks the rules of safetensors: {printable(error)}.",
            "Tensors overlap, leave holes or lie outside the file, so its contents are ambiguous.",
            "Get the file again from its author.",
            code="E_HEADER",
        ) from error
    sites = _check_values(tensors, sites, name)
    factors = {path: site.factors(tensors) for path, site in sites.items()}
    inspect.check_values({f"{path} (B times its scaling)": f.b_OR for path, f in factors.items()}, name)
    biases = {f"{path} (bias of B times its scaling)": f.bias_O for path, f in factors.items() if f.bias_O is not None}
    inspect.check_values(biases, name)
    return factors, {path: site.scale(tensors) for path, site in sites.items()}


def _check_values(tensors: Mapping[str, Tensor], sites: Mapping[str, SitePlan], name: str) -> dict[str, SitePlan]:
    """Refuse what no tensor may hold; the sites that have an update. Zeros are allowed where they can be trained: in a bias, in
    single ranks of IncreLoRA, and in singular values unless those of all sites are zero."""
    silent = {path for path, site in sites.items() if site.values and not any(tensors[key].any() for key in site.values)}
    if silent and len(silent) == len(sites):
        silent = set()
    zeros: set[str] = set()
    counts = [site.ranknum for site in sites.values() if site.ranknum]
    for path, site in sites.items():
        zeros |= set(site.values if path in silent or len(site.values) > 1 else ()) | ({site.bias} if site.bias else set())
    checked = {key: t for key, t in tensors.items() if t.numel() and key not in counts and (key not in zeros or t.any())}
    inspect.check_values(checked, name)
    wrong = [f"{printable(key)} ({float(tensors[key]):g})" for key in counts if not 1 <= float(tensors[key]) < 2**31]
    if wrong:
        raise InputError(
            f"{printable(name)}: not a number of ranks: {shorten(wrong)}.",
            "The scale is α divided by it.",
            "Take it from another checkpoint.",
            code="E_CONFIG",
        )
    return {path: site for path, site in sites.items() if path not in silent}
