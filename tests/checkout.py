"""A checkout as users have it after `make demo`, with pico contents: what documentation and examples say runs in it word for word.

Names, file layouts and prompts are the real ones; the base is a pico model, and so are the adapters, of which it holds five.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pico

ROOT = Path(__file__).parent.parent
ADAPTERS = {
    "addition": {"r": 8, "lora_alpha": 32, "target_modules": "all-linear"},
    "number_to_words": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "past_tense": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "plural": {"r": 4, "lora_alpha": 8, "target_modules": ["up_proj", "gate_proj", "down_proj"]},
    "to_roman": {"r": 16, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
}
TASKS = (*ADAPTERS, "ho_third_person")


def make(folder: Path) -> Path:
    """The checkout; `folder` is created."""
    base = pico.make_base("llama", folder / ".demo" / "base")
    examples = folder / "examples"
    shutil.copytree(
        ROOT / "examples", examples, ignore=shutil.ignore_patterns("adapters", "tasks", "__pycache__", ".ipynb_checkpoints")
    )
    for name, options in ADAPTERS.items():
        pico.make_adapter(base, name, options, examples / "adapters")
    for part, rows in (("kshot", 16), ("test", 3)):
        (examples / "tasks" / part).mkdir(parents=True)
        for task in TASKS:
            lines = (ROOT / "examples" / "tasks" / part / f"{task}.jsonl").read_text(encoding="utf8").splitlines()[:rows]
            (examples / "tasks" / part / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf8")
    return folder
