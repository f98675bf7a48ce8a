"""What a config says about its adapter's kind, beside what PEFT itself says of that method."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from recycler.zoo import config as configs
from recycler.zoo.errors import InputError
from recycler.zoo.kinds import CONVERTED, READ, Kind, kind_of

TYPES = sorted(str(kind.value) for kind in PeftType)
# What a method needs to be set up on a pico model, where its defaults are made for larger ones or it has none.
OPTIONS: dict[str, dict[str, Any]] = {
    "VERA": {"r": 4},
    "VBLORA": {"r": 2, "num_vectors": 8, "vector_length": 4, "topk": 2},
    "UNILORA": {"r": 4, "theta_d_length": 64},
    "DELORA": {"r": 4},
    "TINYLORA": {"r": 2, "u": 4},
    "LOHA": {"r": 3},
    "LOKR": {"r": 4},
    "RANDLORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 50},
    "WAVEFT": {"n_frequency": 50},
    "C3A": {"block_size": 16},
    "GRALORA": {"r": 4, "gralora_k": 2, "hybrid_r": 0},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
}
CONVERTIBLE = sorted(kind for kind in TYPES if kind_of({"peft_type": kind}).how == "convert")


def _known(kind: Kind) -> bool:
    return "no method that this version knows" not in kind.why


@pytest.mark.parametrize("peft_type", TYPES)
def test_every_type_of_the_installed_peft_has_a_kind(peft_type: str) -> None:
    kind = kind_of({"peft_type": peft_type})
    assert _known(kind), f"PEFT has a new method: find out how {peft_type} becomes factors, or why not"
    assert bool(kind.why) == bool(kind.fix) == (kind.how == "refuse")
    if kind.how != "refuse":
        assert kind.name in (READ if kind.how == "read" else CONVERTED)
    assert kind.how == "convert" or (kind.lossless and kind.needs == "nothing")


@pytest.mark.parametrize("given", [None, "", "lora", "FORZEN_MA_LORA", "\x1b[31m", 7, ["LORA"], {}])
def test_what_nobody_knows_is_refused_with_what_is_possible(given: Any) -> None:
    kind = kind_of({"peft_type": given})
    assert kind.how == "refuse" and not (given and _known(kind))
    assert "AdaLoRA" in kind.fix and "LoHa" in kind.fix
    assert "\x1b" not in kind.name


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "LoRA"),
        ({"use_rslora": True}, "rsLoRA"),
        ({"use_dora": True}, "DoRA"),
        ({"use_dora": True, "use_rslora": True}, "rsLoRA+DoRA"),
        ({"lora_bias": True}, "LoRA+bias"),
        ({"init_lora_weights": "gaussian"}, "LoRA"),
        ({"init_lora_weights": None, "use_dora": None}, "LoRA"),
        ({"init_lora_weights": "orthogonal"}, "LoRA"),
    ],
)
def test_options_of_lora_that_leave_the_base_alone_are_read(options: dict[str, Any], name: str) -> None:
    assert kind_of({"peft_type": "LORA", **options}) == Kind(name, "read")


@pytest.mark.parametrize(
    ("init", "name", "alone", "needs"),
    [
        ("pissa", "PiSSA", "convert", "weights"),
        ("OLoRA", "OLoRA", "convert", "weights"),
        ("pissa_niter_16", "PiSSA", "refuse", "nothing"),
        ("corda", "CorDA", "refuse", "nothing"),
        ("lora_ga", "LoRA-GA", "refuse", "nothing"),
    ],
)
def test_starts_that_changed_the_base(init: str, name: str, alone: str, needs: str) -> None:
    kind = kind_of({"peft_type": "LORA", "init_lora_weights": init})
    assert (kind.name, kind.how, kind.needs) == (name, alone, needs)
    assert alone == "convert" or (init in kind.why and "initial_adapter" in kind.fix)
    # with the initial adapter beside it, no base is needed: ΔW = s(BA − B₀A₀)
    assert kind_of({"peft_type": "LORA", "init_lora_weights": init}, initial=True) == Kind(name, "convert")
    for option in ("use_dora", "lora_bias"):
        assert kind_of({"peft_type": "LORA", "init_lora_weights": init, option: True}, initial=True).how == "refuse"


@pytest.mark.parametrize("init", ["loftq", "pissa_", "marvel", "[1]"])
def test_starts_that_cannot_be_taken_out(init: str) -> None:
    for initial in (False, True):
        assert kind_of({"peft_type": "LORA", "init_lora_weights": init}, initial=initial).how == "refuse"


def test_bone_is_miss_as_it_was_called_before() -> None:
    for peft_type, name in (("MISS", "MiSS"), ("BONE", "Bone")):
        assert kind_of({"peft_type": peft_type}) == Kind(name, "convert", needs="shapes")
        assert kind_of({"peft_type": peft_type, "init_weights": "mini"}) == Kind(name, "convert", needs="shapes")
        bat = kind_of({"peft_type": peft_type, "init_weights": "bat"})
        assert bat == Kind(f"{name}-bat", "convert", lossless=False, needs="weights")
    assert kind_of({"peft_type": "PSOFT", "psoft_svd": "lowrank"}).how == "refuse"


@cache
def _weights(base: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(base).state_dict()  # type: ignore[no-any-return]


def _base(path: Path, zero: bool = False) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path)
    if zero:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    return model


def _deltas(model: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            if hasattr(layer, "miss_block"):  # what PEFT calls MiSS's delta is the whole new weight
                weight = layer.get_base_layer().weight.data
                found[name] = layer.get_delta_weight_miss("default", weight.clone()) - weight
            else:
                found[name] = layer.get_delta_weight("default")
    return found


@pytest.mark.parametrize("peft_type", CONVERTIBLE)
def test_peft_converts_what_is_called_convertible_and_needs_what_is_said(llama: Pico, tmp_path: Path, peft_type: str) -> None:
    """Saved from one base and loaded on a base of zeros, an update is the same exactly where only shapes are needed."""
    kind = kind_of({"peft_type": peft_type})
    torch.manual_seed(0)
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "up_proj"], **OPTIONS[peft_type]}
    model = get_peft_model(_base(llama.base), PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)](**options))
    assert model.supports_lora_conversion()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path)
    theirs = _deltas(PeftModel.from_pretrained(_base(llama.base), tmp_path))
    assert len(theirs) == 4 and all(delta.abs().max() > 1e-4 for delta in theirs.values())
    bare = _deltas(PeftModel.from_pretrained(_base(llama.base, zero=True), tmp_path))
    same = all(torch.allclose(theirs[path], bare[path], rtol=1e-4, atol=1e-6) for path in theirs)
    assert same == (kind.needs == "shapes")
    rank = OPTIONS[peft_type].get("r", 0)
    low = all(torch.linalg.matrix_rank(delta, rtol=1e-5) <= rank for delta in theirs.values())
    assert low == kind.lossless


def test_what_a_conversion_would_lose_is_refused_beforehand() -> None:
    good = {"peft_type": "LOHA", "r": 4, "base_model_name_or_path": "org/base", "module_dropout": 0.1}
    fields = {"peft_type", "r", "base_model_name_or_path", "module_dropout", "modules_to_save"}
    settings = configs.check_convertible(good, "math", fields)
    assert (settings.base, settings.rank, settings.method) == ("org/base", 4, "LOHA")
    with pytest.raises(InputError, match=r"modules_to_save.*whole modules"):
        configs.check_convertible({**good, "modules_to_save": ["lm_head"]}, "math", fields)
    with pytest.raises(InputError, match=r"unknown.*use_marvel"):
        configs.check_convertible({**good, "use_marvel": 1}, "math", fields)
    with pytest.raises(InputError, match=r"IA3.*scales rows") as caught:
        configs.check_convertible({"peft_type": "IA3"}, "math")
    assert "recycle extract" in caught.value.fix
    pissa = {"peft_type": "LORA", "r": 4, "init_lora_weights": "pissa"}
    assert configs.check_convertible(pissa, "math").rank == 4
    with pytest.raises(InputError, match="alora_invocation_tokens"):
        configs.check_convertible({**pissa, "alora_invocation_tokens": [1]}, "math")


def test_a_kind_that_must_be_converted_is_not_read_as_it_is() -> None:
    with pytest.raises(InputError, match=r"no LoRA.*LOHA.*recycle fetch converts"):
        configs.parse_config(b'{"peft_type": "LOHA"}', "math")
