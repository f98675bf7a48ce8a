"""Real adapters on the real base: one adapter at weight 1 is PEFT's own forward of it, in fp32, to 1e-5."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import recycler
from recycler.base import load_base
from recycler.build import read_adapters
from recycler.routed import RoutedModel

FOLDER = Path(os.environ.get("RECYCLE_TEST_ADAPTERS") or Path(__file__).parent.parent / "examples" / "adapters")
NAMES = sorted(p.parent.name for p in FOLDER.glob("*/adapter_config.json"))
TEXTS = [
    "Instruction: What is 417 + 85?\nResponse: 502",
    "Instruction: Put 'wander' into the past tense.\nResponse: wandered",
    "Instruction: Roman numeral for 1672:\nResponse: MDCLXXII",
]


def _dora(base: Path, folder: Path) -> Path:
    """A DoRA adapter with random factors and moved magnitudes, written by PEFT."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, use_dora=True, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
            elif "magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.9, 1.1))
    # PEFT records where the base was loaded from; the others declare its id.
    for settings in model.peft_config.values():
        settings.base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(folder / "dora")
    return folder / "dora"


@pytest.fixture(scope="module")
def folders(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("real")
    return {**{name: FOLDER / name for name in NAMES}, "dora": _dora(smollm, folder)}


@pytest.fixture(scope="module")
def model(smollm: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RoutedModel]:
    zoo = recycler.Zoo(tmp_path_factory.mktemp("zoo"))
    recycler.fetch(list(folders.values()), base=smollm, zoo=zoo).raise_for_failures()
    base = load_base(str(smollm), dtype="float32")
    yield RoutedModel(base, read_adapters(zoo, list(zoo), base))


@pytest.fixture(scope="module")
def plain(smollm: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", [*NAMES, "dora"])
@torch.no_grad()
def test_one_adapter_at_weight_one_is_peft(
    model: RoutedModel, plain: torch.nn.Module, folders: dict[str, Path], name: str
) -> None:
    inputs = model.tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    mask = inputs.attention_mask.bool()
    peft = PeftModel.from_pretrained(plain, folders[name], low_cpu_mem_usage=True).eval()
    try:
        theirs = peft(**inputs).logits[mask]
    finally:
        peft.unload()
    with model.only(name):
        ours = model(**inputs).logits[mask]
    with model.disabled():
        bare = model(**inputs).logits[mask]
    scale = float(theirs.abs().max())
    print(f"{name}: largest difference to PEFT {float((ours - theirs).abs().max()) / scale:.1e} of the largest logit")
    assert float((ours - theirs).abs().max()) <= 1e-5 * scale
    assert float((bare - theirs).abs().max()) > 1e-2 * scale  # the adapter does something


@torch.no_grad()
def test_a_batch_of_adapters_is_each_adapter(model: RoutedModel) -> None:
    """Every row its own adapter, in one forward."""
    text = TEXTS[0]
    inputs = model.tokenizer([text] * len(model.names), return_tensors="pt")
    with model.mixture(torch.eye(len(model.names))):
        together = model(**inputs).logits
    for row, name in enumerate(model.names):
        with model.only(name):
            alone = model(input_ids=inputs.input_ids[:1], attention_mask=inputs.attention_mask[:1]).logits[0]
        assert float((together[row] - alone).abs().max()) <= 1e-5 * float(alone.abs().max()), name
