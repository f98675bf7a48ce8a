"""Factors → a PEFT LoRA folder: the inverse of `formats`. What PEFT loads from it, and what `formats` reads, is bit for bit what
was given.

Scalings are folded into B already, so α = r everywhere and PEFT's α/r is exactly 1. The sites are written out one by one in
``target_modules``; ranks that differ from the most common one are in ``rank_pattern`` and ``alpha_pattern`` under full paths.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recycler.zoo import inspect
from recycler.zoo.adapter import Factors
from recycler.zoo.errors import InputError

_PREFIX = "base_model.model."


def write_adapter(
    into: Path,
    sites: Mapping[str, Factors],
    *,
    base: str | None,
    base_revision: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` (fp32) into an existing folder.

    Args:
        sites: module path → factors; at least one.
        base: what ``base_model_name_or_path`` says. base_revision, task_type: as PEFT's config has them.

    Raises:
        InputError: no sites, or DoRA's magnitude at some of them only, which PEFT's config cannot say.
    """
    from safetensors.torch import save_file

    dora = {path for path, factors in sites.items() if factors.magnitude_O is not None}
    if not sites or 0 < len(dora) < len(sites):
        raise InputError(
            "An adapter of these sites cannot be written.",
            f"{len(dora)} of its {len(sites)} sites have a DoRA magnitude; PEFT needs all or none, and one site at least.",
            "Split it into two adapters.",
        )
    biased = any(factors.bias_O is not None for factors in sites.values())
    tensors = {}
    for path, factors in sites.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = factors.a_RD.float().contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = factors.b_OR.float().contiguous()
        if factors.magnitude_O is not None:
            tensors[f"{_PREFIX}{path}.lora_magnitude_vector"] = factors.magnitude_O.float().contiguous()
        if biased:
            bias_O = factors.b_OR.new_zeros(factors.b_OR.shape[0]) if factors.bias_O is None else factors.bias_O
            tensors[f"{_PREFIX}{path}.lora_B.bias"] = bias_O.float().contiguous()
    config = _config(sites, bool(dora), biased) | {
        "base_model_name_or_path": base,
        "revision": base_revision,
        "task_type": task_type,
    }
    save_file(tensors, into / inspect.WEIGHTS, metadata={"format": "pt"})
    (into / inspect.CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf8")


def copy_papers(folder: Path, into: Path) -> None:
    """Copy the card and the licence that lie beside an adapter or a model."""
    present = [path.name for path in folder.iterdir() if path.is_file()]
    for name in inspect.own_files(present):
        if name not in (inspect.CONFIG, inspect.WEIGHTS):
            shutil.copyfile(folder / name, into / name)


def _config(sites: Mapping[str, Factors], dora: bool, biased: bool) -> dict[str, Any]:
    ranks = {path: factors.rank for path, factors in sites.items()}
    common = min(Counter(ranks.values()).items(), key=lambda one: (-one[1], one[0]))[0]
    # PEFT takes the first key that a path ends in, so that a longer path must come before one that it ends in.
    others = {path: ranks[path] for path in sorted(ranks, key=lambda path: (-len(path), path)) if ranks[path] != common}
    return {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(sites),
        "use_rslora": False,
        "use_dora": dora,
        "lora_bias": biased,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
