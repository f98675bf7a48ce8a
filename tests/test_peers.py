"""Logits and weights beside released implementations, fp32, on pico adapters of equal rank and targets (peers take no others).

PEFT's Arrow finds its prototypes by 15 power iterations from a random start, ours are exact: the adapters here have one direction
that stands out (σ₁ ≫ σ₂), so that both find it to the last bits. A low temperature multiplies what fp32 rounds in the scores: at 0.3
PEFT's own logits in fp32 and fp64 are 4e-5 apart, and so much is allowed there instead of 1e-5. Its X-LoRA loads adapters as "0", "1", … whatever they are
called, and then activates them by the names they were given, so that only these very names work: here PEFT gets those, and the zoo
proper ones. mttl does not install beside this transformers: its PHATGOOSE selector is computed here from its formula, not run.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico
from peft import PeftModel, XLoraConfig, get_peft_model
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import ArrowConfig
from pico import make_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import recycler
from recycler.routed import RoutedModel
from recycler.routers.phatgoose import Phatgoose, PhatgooseConfig, _rows
from recycler.routers.protocol import Group

NAMES = ("law", "math", "poem")
EQUAL: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]}
TEXTS = ["Add 3 and b.", "Is 14 liable to e? It is not.", "def f(x)"]


@pytest.fixture(scope="module")
def equal(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """Three adapters of one rank and one set of targets, each with one direction that stands out at every site."""
    folder = tmp_path_factory.mktemp("equal")
    adapters = {name: make_adapter(llama.base, name, EQUAL, folder) for name in NAMES}
    for place in adapters.values():
        file = place / "adapter_model.safetensors"
        tensors = load_file(file)
        for key in tensors:
            if "lora_B" in key:
                tensors[key][:, 0] *= 8
        save_file(tensors, file, metadata={"format": "pt"})
    zoo = recycler.Zoo(folder / "zoo")
    recycler.fetch(list(adapters.values()), base=llama.base, zoo=zoo).raise_for_failures()
    return llama._replace(adapters=adapters, zoo=zoo.path)


def batch_of(model: RoutedModel) -> dict[str, Tensor]:
    tokens = model.tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    positions = (tokens.attention_mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, "position_ids": positions}


@torch.no_grad()
def agree(ours: RoutedModel, theirs: Any, tolerance: float = 1e-5) -> None:
    batch = batch_of(ours)
    mask = batch["attention_mask"].bool()
    one, other = ours(**batch, use_cache=False).logits[mask], theirs(**batch, use_cache=False).logits[mask]
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))
    with ours.disabled():
        assert (ours(**batch, use_cache=False).logits[mask] - one).abs().max() > 1e-2  # the adapters do something


@pytest.mark.parametrize(
    "top_k, temperature, tolerance", [(1, 1.0, 1e-5), (2, 1.0, 1e-5), (2, 0.7, 1e-5), (3, 2.0, 1e-5), (2, 0.3, 4e-5)]
)
def test_arrow_is_pefts(equal: Pico, top_k: int, temperature: float, tolerance: float) -> None:
    zoo = recycler.Zoo(equal.zoo)
    router = recycler.build_router("arrow", zoo=zoo, adapters=NAMES, top_k=top_k, temperature=temperature)
    paths = [str(equal.adapters[name]) for name in NAMES]
    theirs = create_arrow_model(
        AutoModelForCausalLM.from_pretrained(equal.base),
        paths,
        ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0),
    ).eval()
    agree(recycler.compose(zoo, router), theirs, tolerance)


def xlora_of_peft(pico: Pico, order: tuple[str, ...], **options: Any) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(pico.base)
    base.config.use_cache = False
    adapters = {str(i): str(pico.adapters[name]) for i, name in enumerate(order)}
    torch.manual_seed(3)
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=adapters, **options)
    model = get_peft_model(base, config).eval()
    for parameter in model.base_model.internal_xlora_classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # scalings that differ
    return model


def saved(model: PeftModel, order: tuple[str, ...], folder: Path) -> Path:
    """The classifier as the package `xlora` lays it out, the adapters under their names."""
    folder.mkdir()
    tuner = model.base_model
    kept = {"layerwise_scalings", "top_k_lora", "enable_softmax", "enable_softmax_topk", "softmax_temperature", "xlora_depth"}
    said = {key: value for key, value in tuner.xlora_config.to_dict().items() if key in kept | {"xlora_size", "hidden_size"}}
    said["adapters"] = {name: f"./{name}" for name in order}
    (folder / "xlora_config.json").write_text(json.dumps(said))
    save_file(tuner.internal_xlora_classifier.state_dict(), folder / "xlora_classifier.safetensors")
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layerwise_scalings": True, "softmax_temperature": 0.5},
        {"xlora_depth": 3, "xlora_size": 16, "layerwise_scalings": True},
        {"top_k_lora": 2},
        {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    ],
    ids=["plain", "layerwise", "deep", "top-k", "softmax after top-k"],
)
def test_xlora_is_pefts(equal: Pico, options: dict[str, Any], tmp_path: Path) -> None:
    """Through a checkpoint, whose columns are in another order than the model's adapters."""
    order = ("poem", "law", "math")
    theirs = xlora_of_peft(equal, order, **options)
    zoo = recycler.Zoo(equal.zoo)
    checkpoint = saved(theirs, order, tmp_path / "checkpoint")
    router = recycler.build_router("xlora", zoo=zoo, adapters=NAMES, checkpoint=str(checkpoint), out=tmp_path / "router")
    assert router.adapters == NAMES
    agree(recycler.compose(zoo, router), theirs)
    agree(recycler.compose(zoo, tmp_path / "router"), theirs)


@torch.no_grad()
def test_cached_xlora_answers_as_pefts_uncached(equal: Pico, tmp_path: Path) -> None:
    theirs = xlora_of_peft(equal, NAMES, layerwise_scalings=True)
    zoo = recycler.Zoo(equal.zoo)
    router = recycler.build_router(
        "xlora", zoo=zoo, adapters=NAMES, checkpoint=str(saved(theirs, NAMES, tmp_path / "checkpoint"))
    )
    ours = recycler.compose(zoo, router)
    batch = batch_of(ours)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    assert torch.equal(ours.generate(**inputs, **options, use_cache=True), theirs.generate(**inputs, **options))


def test_phatgoose_weights_are_mttls_formula() -> None:
    """mttl's selector: softmax over all of LN(x)·LN(v)/√d, the two largest, divided by their sum. In fp64, by hand."""
    torch.manual_seed(0)
    width, count = 24, 5
    v_ED, x_BTD = torch.randn(count, width) * 0.1, torch.randn(2, 7, width) * 3 + 1
    group = Group(("m.q",), width)
    router = Phatgoose([f"a{e}" for e in range(count)], PhatgooseConfig(), {"m.q": _rows(v_ED, range(count))})
    ours = router.weights(router.score(group, "m.q", x_BTD), group)

    def normal(z: Tensor) -> Tensor:
        z = z.double()
        return (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    p_BTE = (normal(x_BTD) @ normal(v_ED).T / math.sqrt(width)).softmax(-1)
    kept, index = p_BTE.topk(2, -1)
    expected = torch.zeros_like(p_BTE).scatter_(-1, index, kept / kept.sum(-1, keepdim=True))
    torch.testing.assert_close(ours, expected.float(), rtol=1e-5, atol=1e-6)
