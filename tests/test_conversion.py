"""Every convertible kind becomes a plain LoRA that does what PEFT's own model of it does; what cannot is refused by name.

The adapters are written by PEFT itself, with random values in everything it trains. Bone's are MiSS's under its old names, as the
script that PEFT ships for the way back writes them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import Pico
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2Config, GPT2LMHeadModel

from recycler.base import load_base
from recycler.build import read_adapters
from recycler.converting.conversion import Conversion, convert
from recycler.routed import RoutedModel
from recycler.zoo import formats
from recycler.zoo.errors import HubError, InputError, SecurityError, UsageError
from recycler.zoo.store import Zoo

LLAMA, T5 = ["q_proj", "v_proj", "up_proj", "down_proj"], ["q", "v", "wi", "wo"]
Make = Callable[[list[str]], Any]
# Of low rank by construction, with that rank.
LOW: dict[str, tuple[int, Make]] = {
    "VeRA": (6, lambda t: peft.VeraConfig(r=6, target_modules=t)),
    "VeRA from its key": (6, lambda t: peft.VeraConfig(r=6, target_modules=t, save_projection=False, projection_prng_key=7)),
    "MiSS": (4, lambda t: peft.MissConfig(r=4, target_modules=t)),
    "MiSS uneven": (5, lambda t: peft.MissConfig(r=5, target_modules=t)),
    "MiSS mini": (4, lambda t: peft.MissConfig(r=4, mini_r=4, init_weights="mini", target_modules=t)),
    "VB-LoRA": (2, lambda t: peft.VBLoRAConfig(r=2, num_vectors=20, vector_length=8, target_modules=t)),
    "VB-LoRA top-k": (
        2,
        lambda t: peft.VBLoRAConfig(r=2, num_vectors=20, vector_length=8, target_modules=t, save_only_topk_weights=True),
    ),
    "Uni-LoRA": (3, lambda t: peft.UniLoraConfig(r=3, theta_d_length=64, target_modules=t)),
    "DeLoRA": (4, lambda t: peft.DeloraConfig(r=4, target_modules=t)),
    "PSOFT": (4, lambda t: peft.PsoftConfig(r=4, psoft_alpha=4, target_modules=t)),
    "TinyLoRA": (2, lambda t: peft.TinyLoraConfig(r=2, u=3, target_modules=t)),
}
DENSE: dict[str, Make] = {
    "LoHa": lambda t: peft.LoHaConfig(r=3, alpha=6, target_modules=t, rank_pattern={t[0]: 2}, alpha_pattern={t[1]: 9}),
    "LoKr": lambda t: peft.LoKrConfig(r=2, alpha=4, target_modules=t),
    "LoKr, both decomposed": lambda t: peft.LoKrConfig(r=1, alpha=4, target_modules=t, decompose_both=True),
    "RandLoRA": lambda t: peft.RandLoraConfig(r=4, target_modules=t),
    "RandLoRA from its key": lambda t: peft.RandLoraConfig(r=4, target_modules=t, save_projection=False),
    "FourierFT": lambda t: peft.FourierFTConfig(n_frequency=60, scaling=60.0, target_modules=t, n_frequency_pattern={t[1]: 30}),
    "WaveFT": lambda t: peft.WaveFTConfig(n_frequency=60, scaling=5.0, target_modules=t),
    "C3A": lambda t: peft.C3AConfig(block_size=8, target_modules=t),
    "GraLoRA": lambda t: peft.GraloraConfig(r=4, gralora_k=2, hybrid_r=2, target_modules=t),
    "MiSS-bat": lambda t: peft.MissConfig(
        r=4, init_weights="bat", target_modules=[one for one in t if one not in ("v_proj", "v")]
    ),
}


def load(base: Path) -> Any:
    auto: Any = AutoModelForSeq2SeqLM if "t5" in base.name else AutoModelForCausalLM
    return auto.from_pretrained(base).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    result: Tensor = model(input_ids=ids, **more).logits
    return result


def trained(model: Any, config: Any, scale: float = 0.3) -> Any:
    """`model` with an adapter on it whose trained values are moved at random."""
    torch.manual_seed(1)
    made = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    return made.eval()


def write(base: Path, folder: Path, config: Any, scale: float = 0.3) -> tuple[Path, Tensor]:
    """An adapter folder written by PEFT, and the logits of PEFT's own model in memory."""
    model = trained(load(base), config, scale)
    expected = logits(model)
    model.save_pretrained(folder)
    return folder, expected


def off(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, of the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def check(base: Path, converted: Path, expected: Tensor, within: float = 1e-5) -> None:
    """PEFT loads the result with its own LoRA, and a routed model with it at weight 1 does the same."""
    assert off(logits(load(base)), expected) > 1e-2, "the adapter does nothing"
    assert off(logits(PeftModel.from_pretrained(load(base), converted).eval()), expected) < within
    zoo = Zoo(converted.parent / f"{converted.name}-zoo")
    zoo.add(converted, "one", base_path=str(base))
    loaded = load_base(str(base), dtype="float32")
    model = RoutedModel(loaded, read_adapters(zoo, ["one"], loaded))
    with model.only("one"):
        assert off(logits(model), expected) < within


def edit(folder: Path, **changes: Any) -> Path:
    """Changes fields of the config; None as value takes a field out."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    return folder


@pytest.fixture(scope="module")
def loha(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter to do damage to, on a copy."""
    folder, _ = write(llama.base, tmp_path_factory.mktemp("loha") / "loha", DENSE["LoHa"](LLAMA))
    return folder


@pytest.fixture
def broken(loha: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(loha, tmp_path / "broken"))


# --------------------------------------------------------------------------------------------------------- methods that add to W


@pytest.mark.parametrize("kind", LOW)
def test_kinds_of_low_rank_are_converted_whole(llama: Pico, tmp_path: Path, kind: str) -> None:
    rank, make = LOW[kind]
    folder, expected = write(llama.base, tmp_path / "in", make(LLAMA))
    done = convert(folder, tmp_path / "out", base=llama.base)
    assert done.lossless and done.ranks == (rank,) and done.error < 1e-6 and done.sites == 8
    assert done.kind == kind.split(" from ")[0].removesuffix(" uneven").removesuffix(" mini").removesuffix(" top-k")
    check(llama.base, tmp_path / "out", expected)


@pytest.mark.parametrize("kind", DENSE)
def test_other_kinds_are_converted_whole_where_the_rank_allows(llama: Pico, tmp_path: Path, kind: str) -> None:
    """A pico linear has no rank above the default dial, so that nothing is cut."""
    folder, expected = write(llama.base, tmp_path / "in", DENSE[kind](LLAMA))
    done = convert(folder, tmp_path / "out", base=llama.base)
    assert not done.lossless and done.error < 1e-6 and done.kind == kind.split(",")[0].split(" from ")[0]
    check(llama.base, tmp_path / "out", expected)


@pytest.mark.parametrize("kind", ["VeRA", "MiSS", "LoHa", "RandLoRA", "MiSS-bat", "FourierFT", "PSOFT"])
def test_on_an_encoder_decoder(t5: Pico, tmp_path: Path, kind: str) -> None:
    make = DENSE[kind] if kind in DENSE else LOW[kind][1]
    folder, expected = write(t5.base, tmp_path / "in", make(T5))
    done = convert(folder, tmp_path / "out", base=t5.base)
    assert done.error < 1e-6
    check(t5.base, tmp_path / "out", expected)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico GPT-2: its linears are Conv1D, which keep their weight transposed, under names without the model's prefix."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2") / "gpt2"
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    retensor_names(folder)
    return folder


def retensor_names(folder: Path) -> None:
    """As the original files of GPT-2 are: ``h.0.attn.c_attn.weight``."""
    file = folder / "model.safetensors"
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(file).items() if key != "lm_head.weight"}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("init", ["VeRA", "FourierFT", "RandLoRA", "pissa"])
def test_on_linears_that_are_stored_transposed(gpt2: Path, tmp_path: Path, init: str) -> None:
    """c_attn is 32 → 96 and c_proj is square, where a transposed update would pass unnoticed by its shape."""
    targets = ["c_attn", "attn.c_proj"]
    config: Any = {
        "VeRA": peft.VeraConfig(r=4, target_modules=targets, fan_in_fan_out=True),
        "FourierFT": peft.FourierFTConfig(n_frequency=60, scaling=60.0, target_modules=targets, fan_in_fan_out=True),
        "RandLoRA": peft.RandLoraConfig(r=4, target_modules=targets, fan_in_fan_out=True),
    }.get(init) or LoraConfig(r=4, init_lora_weights=init, target_modules=targets, fan_in_fan_out=True)
    folder, expected = write(gpt2, tmp_path / "in", config, 0.2)
    done = convert(folder, tmp_path / "out", base=gpt2)
    assert done.error < 1e-5 and done.sites == 4
    assert off(logits(load(gpt2)), expected) > 1e-2
    assert off(logits(PeftModel.from_pretrained(load(gpt2), tmp_path / "out").eval()), expected) < 2e-5


def test_olora_on_a_transposed_linear_is_refused(gpt2: Path, tmp_path: Path) -> None:
    """PEFT's OLoRA decomposes the weight as it is stored: what it then trains is no start that could be taken out."""
    config = LoraConfig(r=4, init_lora_weights="olora", target_modules=["attn.c_proj"], fan_in_fan_out=True)
    folder, _ = write(gpt2, tmp_path / "in", config)
    assert "stored transposed" in refused(folder, tmp_path, gpt2)


@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_bone_is_miss_under_its_old_name(llama: Pico, tmp_path: Path, variant: str) -> None:
    targets = ["q_proj", "o_proj", "up_proj"]
    made = peft.MissConfig(r=4, init_weights="bat" if variant == "bat" else True, target_modules=targets)
    folder, expected = write(llama.base, tmp_path / "in", made)
    edit(folder, peft_type="BONE", mini_r=None, miss_dropout=None)
    retensor(folder, lambda tensors: {key.replace(".miss_", ".bone_"): tensor for key, tensor in tensors.items()})
    done = convert(folder, tmp_path / "out", base=llama.base)
    assert done.kind == ("Bone" if variant == "bone" else "Bone-bat")
    check(llama.base, tmp_path / "out", expected)


def test_only_the_config_of_the_base_is_read(llama: Pico, tmp_path: Path) -> None:
    """VeRA and its kin need shapes; where the weights are needed, their absence is said."""
    empty = tmp_path / "llama"
    empty.mkdir()
    shutil.copyfile(llama.base / "config.json", empty / "config.json")
    for kind in ("VeRA", "DeLoRA", "Uni-LoRA"):
        folder, expected = write(llama.base, tmp_path / kind, LOW[kind][1](LLAMA))
        convert(folder, tmp_path / f"{kind}-out", base=empty)
        assert off(logits(PeftModel.from_pretrained(load(llama.base), tmp_path / f"{kind}-out").eval()), expected) < 1e-5
    for folder in (write(llama.base, tmp_path / "bat", DENSE["MiSS-bat"](LLAMA))[0], pissa(llama.base, tmp_path / "pissa")[0]):
        with pytest.raises(InputError, match="holds no model"):
            convert(folder, tmp_path / "none", base=empty)
    assert not (tmp_path / "none").exists()


def test_an_adapter_in_bf16_and_a_base_in_bf16(llama: Pico, tmp_path: Path) -> None:
    """Half-precision files are read exactly; ΔW is computed in fp32, as PEFT computes it on a base in fp32."""
    folder, _ = write(llama.base, tmp_path / "in", DENSE["LoHa"](LLAMA))
    retensor(folder, lambda tensors: {key: tensor.bfloat16() for key, tensor in tensors.items()})
    expected = logits(PeftModel.from_pretrained(load(llama.base), folder).eval())
    assert convert(folder, tmp_path / "out", base=llama.base).error < 1e-6
    check(llama.base, tmp_path / "out", expected)


# ------------------------------------------------------------------------------------------------------------------ dials, receipt


@torch.no_grad()
def updates(folder: Path) -> dict[str, Tensor]:
    adapter, _ = formats.read(folder)
    return {path: factors.b_OR.double() @ factors.a_RD.double() for path, factors in adapter.sites.items()}


@pytest.mark.parametrize("dials", [{"rank": 3}, {"energy": 0.9}, {"rank": 5, "energy": 0.999}, {"rank": 2, "energy": 0.1}])
def test_dials_and_the_error_that_is_said(llama: Pico, loha: Path, tmp_path: Path, dials: dict[str, Any]) -> None:
    convert(loha, tmp_path / "whole", base=llama.base)
    done = convert(loha, tmp_path / "cut", base=llama.base, **dials)
    whole, cut = updates(tmp_path / "whole"), updates(tmp_path / "cut")
    errors = {path: float((whole[path] - cut[path]).norm() / whole[path].norm()) for path in whole}
    lost = sum(float((whole[path] - cut[path]).norm()) ** 2 for path in whole)
    total = sum(float(delta.norm()) ** 2 for delta in whole.values())
    assert done.error == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    assert done.kept == pytest.approx(1 - lost / total) and done.worst[1] == pytest.approx(max(errors.values()), rel=1e-4)
    assert done.worst[0] == max(errors, key=lambda path: errors[path])
    assert max(done.ranks) <= dials.get("rank", 99)
    if "rank" not in dials:
        assert all(1 - error**2 >= dials["energy"] - 1e-6 for error in errors.values())


def test_a_wide_update_is_cut_at_the_default_dials(llama: Pico, loha: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("recycler.converting.conversion.LOSSY_RANK", 4)
    done = convert(loha, tmp_path / "out", base=llama.base)
    assert done.ranks == (4,) and 0 < done.error < 0.6  # q_proj's rank is 4, the others' 9
    assert "no rank is above 4" in done.notes[0]
    assert updates(tmp_path / "out").keys() == updates_of(loha, llama, tmp_path).keys()


def updates_of(folder: Path, llama: Pico, tmp_path: Path) -> dict[str, Tensor]:
    convert(folder, tmp_path / "again", base=llama.base, energy=1.0)
    return updates(tmp_path / "again")


def test_lossless_kinds_obey_the_dials_too(llama: Pico, tmp_path: Path) -> None:
    for name, folder in (("vera", write(llama.base, tmp_path / "vera", LOW["VeRA"][1](LLAMA))[0]), ("pissa", pissa(llama.base, tmp_path / "pissa")[0])):  # fmt: skip
        done = convert(folder, tmp_path / f"{name}-out", base=llama.base, rank=2)
        assert done.ranks == (2,) and done.lossless and 0.1 < done.error < 1
        half = convert(folder, tmp_path / f"{name}-half", base=llama.base, energy=0.5)
        assert half.error**2 <= 0.5 + 1e-6 and max(half.ranks) < 8


def test_the_receipt(llama: Pico, loha: Path, tmp_path: Path) -> None:
    done = convert(loha, tmp_path / "out", base=llama.base, rank=2)
    text = "\n".join(done.lines())
    for part in ("LoHa", "8 sites", "rank 2", f"{done.kept:.4%}", f"{done.error:.2g}", done.worst[0]):
        assert part in text
    plain = json.loads(json.dumps(done.to_json()))
    assert plain["worst"] == {"site": done.worst[0], "error": done.worst[1]} and plain["kind"] == "LoHa"
    assert list(plain) == ["kind", "lossless", "ranks", "error", "kept", "worst", "sites", "notes"]
    key, _ = write(llama.base, tmp_path / "key", LOW["VeRA from its key"][1](LLAMA))
    (note,) = convert(key, tmp_path / "key-out", base=llama.base).notes
    assert "key 7" in note


def test_the_same_input_gives_the_same_bytes(llama: Pico, loha: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    for folder in (loha, write(llama.base, tmp_path / "key", LOW["VeRA from its key"][1](LLAMA))[0]):
        results = []
        for name in ("one", "two"):
            into = tmp_path / folder.name / name
            convert(folder, into, base=llama.base, energy=0.99)
            results.append({path.name: path.read_bytes() for path in into.iterdir()})
            torch.rand(3)  # another state of the global generator must not matter
        assert results[0] == results[1]


def test_card_licence_and_declarations_are_kept(llama: Pico, loha: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(loha, tmp_path / "in"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    (folder / "LICENSE").write_text("MIT")
    (folder / "notes.txt").write_text("not the adapter's")
    edit(folder, base_model_name_or_path="org/base", revision="v2", task_type="CAUSAL_LM")
    convert(folder, tmp_path / "out", base=llama.base)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "LICENSE", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base" and config["revision"] == "v2" and config["task_type"] == "CAUSAL_LM"
    assert len(config["target_modules"]) == 8 and config["lora_alpha"] == config["r"]
    adapter, receipt = formats.read(tmp_path / "out")
    assert adapter.licence == "mit" and receipt.scalings == (1.0, 1.0) and receipt.kinds == ("LoRA",)
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values())


# ------------------------------------------------------------------------------------------- PiSSA, OLoRA: the start is taken out


def pissa(base: Path, folder: Path, init: str = "pissa", initial: str | None = None, **options: Any) -> tuple[Path, Tensor]:
    """A LoRA trained from a start that changed the base, saved as it was; and the start itself, where asked for."""
    targets = T5 if "t5" in base.name else LLAMA
    model = get_peft_model(load(base), LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=init, **options))
    assert off(logits(model), logits(load(base))) < 1e-5  # B₀A₀ and what was left of the weights are the base
    if initial:
        model.peft_config["default"].init_lora_weights = True  # type: ignore[assignment]  # as PiSSA's README says
        model.save_pretrained(folder / initial)
        model.peft_config["default"].init_lora_weights = init  # type: ignore[assignment]
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    return folder, logits(model)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2, "v": 2}, "alpha_pattern": {"up_proj": 12, "wi": 12}}]
)
def test_a_start_that_changed_the_base_is_taken_out(world: Pico, tmp_path: Path, init: str, options: dict[str, Any]) -> None:
    folder, expected = pissa(world.base, tmp_path / "in", init, **options)
    done = convert(folder, tmp_path / "out", base=world.base)
    assert done.kind == {"pissa": "PiSSA", "olora": "OLoRA"}[init] and done.lossless
    assert done.ranks == ((4, 8) if "rank_pattern" in options else (8,)) and 0 < done.error < 1e-5
    check(world.base, tmp_path / "out", expected)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
@pytest.mark.parametrize("place", ["pissa_init", "initial_adapter"])
def test_the_initial_adapter_beside_it(llama: Pico, tmp_path: Path, init: str, place: str) -> None:
    """Then the base is not needed at all, and starts that were drawn at random can be taken out too."""
    folder, expected = pissa(llama.base, tmp_path / "in", init, place)
    done = convert(folder, tmp_path / "out", base=None)
    assert done.ranks == (8,)
    check(llama.base, tmp_path / "out", expected)
    moved = Path(shutil.move(folder / place, tmp_path / "elsewhere"))
    given = convert(folder, tmp_path / "given", base=None, initial=moved)
    assert given == done


def test_it_is_what_peft_itself_would_have_written(llama: Pico, tmp_path: Path) -> None:
    """PEFT converts at saving time, when it is told where the initial adapter is."""
    model = get_peft_model(load(llama.base), LoraConfig(r=4, target_modules=LLAMA, init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True  # type: ignore[assignment]
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "in")
    model.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    convert(tmp_path / "in", tmp_path / "ours", base=llama.base)
    ours, theirs = updates(tmp_path / "ours"), updates(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[path], theirs[path], atol=1e-5 * float(theirs[path].norm())) for path in ours)


@pytest.mark.parametrize(
    ("init", "options", "said"),
    [
        ("pissa_niter_4", {}, "initial_adapter"),
        ("pissa", {"use_dora": True}, "PiSSA with DoRA"),
    ],
)
def test_starts_that_cannot_be_taken_out(llama: Pico, tmp_path: Path, init: str, options: dict[str, Any], said: str) -> None:
    folder, _ = write(llama.base, tmp_path / "in", LoraConfig(r=4, target_modules=LLAMA, init_lora_weights=init, **options))
    with pytest.raises(InputError, match=said):
        convert(folder, tmp_path / "out", base=llama.base)


@pytest.mark.parametrize("init", ["corda", "lora_ga", "loftq", "somethingelse"])
def test_starts_from_data_are_refused_without_them(llama: Pico, tmp_path: Path, init: str) -> None:
    folder, _ = write(llama.base, tmp_path / "in", LoraConfig(r=4, target_modules=LLAMA))
    edit(folder, init_lora_weights=init)
    with pytest.raises(InputError, match=f"(?i){init}|LoftQ"):
        convert(folder, tmp_path / "out", base=llama.base)


def test_a_start_of_another_training(llama: Pico, tmp_path: Path) -> None:
    folder, _ = pissa(llama.base, tmp_path / "in", initial="pissa_init")
    write(llama.base, folder / "pissa_init", LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(InputError, match="other sites or shapes"):
        convert(folder, tmp_path / "out", base=llama.base)


def test_an_adapter_that_never_left_its_start(llama: Pico, tmp_path: Path) -> None:
    model = get_peft_model(load(llama.base), LoraConfig(r=4, target_modules=LLAMA, init_lora_weights="pissa"))
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(InputError, match="All 8 updates are zero"):
        convert(tmp_path / "in", tmp_path / "out", base=llama.base)


# ------------------------------------------------------------------------------------------------------------------------- refusals


def refused(folder: Path, tmp_path: Path, base: Path | None, error: type[Exception] = InputError) -> str:
    with pytest.raises(error) as caught:
        convert(folder, tmp_path / "refused", base=base)
    assert not (tmp_path / "refused").exists()
    return str(caught.value)


def test_nothing_is_left_over_and_nothing_missing(llama: Pico, broken: Path, tmp_path: Path) -> None:
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    retensor(
        broken, lambda t: {k: v for k, v in t.items() if k != f"{path}.hada_w1_a"} | {"base_model.model.extra": torch.ones(2)}
    )
    text = refused(broken, tmp_path, llama.base)
    assert f"missing tensors: {path}.hada_w1_a" in text and "no site uses: base_model.model.extra" in text


def test_shapes_must_be_those_of_the_config_and_the_base(
    llama: Pico, t5: Pico, loha: Path, broken: Path, tmp_path: Path
) -> None:
    assert "not in it" in refused(loha, tmp_path, t5.base)
    edit(broken, r=5)
    assert "another shape than the config says" in refused(broken, tmp_path, llama.base)


def test_sites_that_are_no_linears(llama: Pico, tmp_path: Path) -> None:
    folder, _ = write(llama.base, tmp_path / "in", peft.TinyLoraConfig(r=2, u=3, target_modules=["embed_tokens", "q_proj"]))
    assert "embed_tokens" in refused(folder, tmp_path, llama.base)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"from_the_future": 3}, "from_the_future"),
        ({"peft_type": "NEWER"}, "NEWER"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": "PROMPT_TUNING"}, "prompt tuning"),
    ],
)
def test_options_that_a_lora_cannot_say(llama: Pico, broken: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refused(edit(broken, **changes), tmp_path, llama.base)


def test_plain_lora_needs_no_conversion(llama: Pico, tmp_path: Path) -> None:
    assert "read as it is" in refused(llama.adapters["math"], tmp_path, llama.base)


def test_the_base_must_be_known(loha: Path, broken: Path, tmp_path: Path) -> None:
    edit(broken, base_model_name_or_path=None)
    assert "--base" in refused(broken, tmp_path, None)
    edit(broken, base_model_name_or_path="org/nowhere")
    refused(broken, tmp_path, None, HubError)


def test_numbers_that_are_none(llama: Pico, broken: Path, tmp_path: Path) -> None:
    retensor(broken, lambda t: {k: torch.full_like(v, float("nan")) if "layers.1" in k else v for k, v in t.items()})
    assert "NaN" in refused(broken, tmp_path, llama.base)


def test_zero_updates(llama: Pico, broken: Path, tmp_path: Path) -> None:
    retensor(broken, lambda t: {k: 0 * v if "layers.1" in k else v for k, v in t.items()})
    done = convert(broken, tmp_path / "out", base=llama.base)
    assert done.sites == 4 and "4 sites have no update" in done.notes[0]
    retensor(broken, lambda t: {k: 0 * v for k, v in t.items()})
    assert "All 8 updates are zero" in refused(broken, tmp_path, llama.base)


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (LOW["VeRA"][1], {"r": 10**9}),
        (LOW["VB-LoRA"][1], {"num_vectors": 10**10}),
        (DENSE["FourierFT"], {"n_frequency": 10**12}),
        (LOW["Uni-LoRA"][1], {"theta_d_length": 10**11}),
        (DENSE["RandLoRA"], {"r": 10**8}),
        (DENSE["LoHa"], {"r": 10**12}),
        (DENSE["LoHa"], {"rank_pattern": {"q_proj": 10**12}}),
    ],
)
def test_a_config_cannot_ask_for_terabytes(llama: Pico, tmp_path: Path, make: Make, changes: dict[str, Any]) -> None:
    folder, _ = write(llama.base, tmp_path / "in", make(LLAMA))
    refused(edit(folder, **changes), tmp_path, llama.base)


def test_patterns_that_never_finish(llama: Pico, tmp_path: Path) -> None:
    folder, _ = write(llama.base, tmp_path / "in", LOW["Uni-LoRA"][1](LLAMA))
    edit(folder, target_modules=r"(.*a|.*b|.*)*(.*c|.*d|.*)*(.*e|.*)*(.*_x|.*)*zzz")
    refused(folder, tmp_path, llama.base, SecurityError)
    edit(folder, target_modules="all-linear")
    assert "target_modules" in refused(folder, tmp_path, llama.base)


def test_sites_named_by_a_pattern(llama: Pico, tmp_path: Path) -> None:
    """Uni-LoRA's file holds one shared vector: which sites it is for is in the config alone."""
    folder, expected = write(
        llama.base, tmp_path / "in", peft.UniLoraConfig(r=3, theta_d_length=64, target_modules=r".*\.(q|v)_proj")
    )
    assert convert(folder, tmp_path / "out", base=llama.base).sites == 4
    check(llama.base, tmp_path / "out", expected)


def test_forged_and_pickled_weights(llama: Pico, broken: Path, tmp_path: Path) -> None:
    file = broken / "adapter_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-5])
    refused(broken, tmp_path, llama.base)
    file.write_bytes(b"\x80\x04" + data)
    refused(broken, tmp_path, llama.base, SecurityError)
    file.rename(broken / "adapter_model.bin")
    refused(broken, tmp_path, llama.base, SecurityError)


@pytest.mark.parametrize("dials", [{"rank": 0}, {"energy": 0.0}, {"energy": 1.1}])
def test_dials_out_of_range(llama: Pico, loha: Path, tmp_path: Path, dials: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        convert(loha, tmp_path / "out", base=llama.base, **dials)


def test_a_conversion_is_a_value() -> None:
    one = Conversion("LoHa", False, (3, 5), 0.1, ("a", 0.2), 4)
    assert one == Conversion("LoHa", False, (3, 5), 0.1, ("a", 0.2), 4) and one.kept == pytest.approx(0.99)
