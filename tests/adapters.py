"""Writes small PEFT adapters without PEFT, so that every kind of damage can be done to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."
# The linears of a two-layer base, (O, D); what `shapes()` of such a base would say.
SHAPES: dict[str, tuple[int, int]] = {
    f"model.layers.{layer}.{module}": shape
    for layer in range(2)
    for module, shape in {
        "self_attn.q_proj": (16, 16),
        "self_attn.v_proj": (8, 16),
        "mlp.up_proj": (32, 16),
        "mlp.down_proj": (16, 32),
    }.items()
}
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "org/base",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
}


def tensors(
    *targets: str, rank: int = 4, seed: int = 0, shapes: Mapping[str, tuple[int, int]] = SHAPES
) -> dict[str, torch.Tensor]:
    """Random A and B for every site whose last component is in `targets` (q_proj and v_proj by default)."""
    wanted = targets or ("q_proj", "v_proj")
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for path, (out, width) in shapes.items():
        if path.rsplit(".", 1)[-1] in wanted:
            made[f"{PREFIX}{path}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
            made[f"{PREFIX}{path}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    return made


def write(
    folder: Path,
    weights: Mapping[str, torch.Tensor] | None = None,
    *,
    card: str | None = "---\nlicense: apache-2.0\n---\n# An adapter\n",
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write an adapter folder; `config` overrides fields of CONFIG, and None as value writes null."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights if weights is not None else tensors(seed=seed)), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Relative posix path → contents of everything under `folder`."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
