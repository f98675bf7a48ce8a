"""Formats beside plain LoRA that are read as they are: against PEFT where PEFT knows them, else against their own formula.

Each is fetched into a zoo and run in a RoutedModel at weight 1: what is compared are logits of the whole model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import PREFIX, files, tensors, write
from conftest import Pico
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import recycler
from recycler.base import load_base
from recycler.build import read_adapters
from recycler.routed import RoutedModel
from recycler.zoo import config as configs
from recycler.zoo import formats, inspect
from recycler.zoo.adapter import Adapter
from recycler.zoo.errors import InputError
from recycler.zoo.kinds import kind_of

# what PEFT has to say of adapters that are meant to be as they are
pytestmark = pytest.mark.filterwarnings("ignore:.*(lora_bias=True|invalid shape|rank_pattern keys)")
IDS = torch.tensor([[5, 6, 7, 40, 41], [9, 100, 101, 12, 3]])
WEIGHTS = "adapter_model.safetensors"


def base_of(world: Pico) -> Any:
    auto: Any = AutoModelForSeq2SeqLM if world.kind == "t5" else AutoModelForCausalLM
    return auto.from_pretrained(world.base).eval()


@torch.no_grad()
def logits(model: Any, kind: str) -> Tensor:
    more = {"decoder_input_ids": IDS[:, :3]} if kind == "t5" else {}
    return model(input_ids=IDS, **more).logits  # type: ignore[no-any-return]


def fetched(world: Pico, folder: Path, zoo: recycler.Zoo) -> tuple[Tensor, inspect.Receipt]:
    """Logits of the base with the adapter alone, as the zoo holds it, and the receipt."""
    report = recycler.fetch([folder], base=world.base, zoo=zoo)
    (name,) = report.names
    base = load_base(str(world.base))
    model = RoutedModel(base, read_adapters(zoo, [name], base))
    with model.only(name):
        return logits(model, world.kind), report.fetched[0].receipt


def written_out(world: Pico, folder: Path, kind: str, ours: Tensor, receipt: inspect.Receipt) -> None:
    """What PEFT would misread lies in the zoo as plain LoRA, which PEFT loads, with the hashes of what it came from."""
    zoo = recycler.Zoo(folder / "zoo")
    entry = zoo.entry("math")
    assert entry.kinds == ("LoRA",) and any(kind in note for note in receipt.notes)
    assert entry.converted is not None and entry.converted["kind"] == kind and not zoo.verify()
    assert entry.converted["files"][WEIGHTS]["sha256"] == inspect.hashes(folder / "math" / WEIGHTS)[0]
    again = PeftModel.from_pretrained(base_of(world), zoo.folder("math")).eval()
    same(ours, logits(again, world.kind), logits(base_of(world), world.kind))
    assert recycler.fetch([folder / "math"], base=world.base, zoo=zoo).names == ["math"]  # the same again is the same


def same(ours: Tensor, theirs: Tensor, bare: Tensor) -> None:
    scale = float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) <= 1e-5 * scale
    assert float((bare - theirs).abs().max()) > 1e-3 * scale, "the adapter does nothing"


def spread(model: nn.Module, size: float = 0.3) -> None:
    """Random factors, as if trained."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * size)


# -------------------------------------------------------------------------------------------------------------- bias of B


@pytest.mark.parametrize("rslora", [False, True])
def test_a_bias_of_b_is_exact(world: Pico, tmp_path: Path, rslora: bool) -> None:
    torch.manual_seed(0)
    task = "SEQ_2_SEQ_LM" if world.kind == "t5" else "CAUSAL_LM"
    targets = ["q", "v", "wo"] if world.kind == "t5" else ["q_proj", "v_proj", "down_proj"]
    options = {"r": 4, "lora_alpha": 3, "rank_pattern": {targets[1]: 2}, "use_rslora": rslora}
    model = get_peft_model(base_of(world), LoraConfig(task_type=task, target_modules=targets, lora_bias=True, **options))
    spread(model)
    model.eval().save_pretrained(tmp_path / "math")
    zoo = recycler.Zoo(tmp_path / "zoo")
    ours, receipt = fetched(world, tmp_path / "math", zoo)
    same(ours, logits(model, world.kind), logits(base_of(world), world.kind))
    assert receipt.kinds == (("rsLoRA", "bias") if rslora else ("LoRA", "bias"))
    assert "LoRA+bias" in str(receipt) and zoo.entry("math").kinds == receipt.kinds
    again = PeftModel.from_pretrained(base_of(world), zoo.folder("math")).eval()
    assert torch.equal(logits(again, world.kind), logits(model, world.kind))


def test_without_its_bias_it_would_be_another_adapter(llama: Pico, tmp_path: Path) -> None:
    """The composed model carries the bias through saving and loading, beside adapters that have none."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], lora_bias=True)
    model = get_peft_model(base_of(llama), config)
    spread(model)
    model.eval().save_pretrained(tmp_path / "bent")
    zoo = recycler.Zoo(tmp_path / "zoo")
    recycler.fetch([tmp_path / "bent", llama.adapters["law"], llama.adapters["poem"]], base=llama.base, zoo=zoo)
    for method in ("uniform", "arrow"):
        made = recycler.compose(zoo, recycler.build_router(method, zoo=zoo))
        made.save_pretrained(tmp_path / method)
        loaded = recycler.load(tmp_path / method)
        assert torch.equal(logits(made, "llama"), logits(loaded, "llama"))
        with loaded.only("bent"):
            same(logits(loaded, "llama"), logits(model, "llama"), logits(base_of(llama), "llama"))
    stripped = load_file(tmp_path / "bent" / WEIGHTS)
    stripped = {key: value for key, value in stripped.items() if not key.endswith("bias")}
    write(tmp_path / "straight", stripped, r=2, target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"lora_bias is set but lora_B\.bias is missing.*layers\.0"):
        formats.read(write(tmp_path / "cut", stripped, r=2, lora_bias=True))
    plain = PeftModel.from_pretrained(base_of(llama), tmp_path / "straight").eval()
    assert (logits(plain, "llama") - logits(model, "llama")).abs().max() > 1e-2


def test_biases_refused_by_name(tmp_path: Path) -> None:
    key = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.bias"
    biases = {k.replace(".weight", ".bias"): torch.ones(len(v)) for k, v in tensors().items() if "lora_B" in k}
    good = {**tensors(), **biases}
    assert formats.read(write(tmp_path / "good", good, lora_bias=True))[1].kinds == ("LoRA", "bias")
    cases = {
        "lora_bias is not set": ({}, good),
        "another width than B.*3, 16": ({"lora_bias": True}, {**good, key: torch.ones(3)}),
        "use_dora=true": ({"lora_bias": True, "use_dora": True}, good),
        r"NaN or infinite.*lora_B\.bias": ({"lora_bias": True}, {**good, key: torch.full((16,), torch.nan)}),
        'lora_bias="yes"': ({"lora_bias": "yes"}, good),
    }
    for expected, (options, weights) in cases.items():
        with pytest.raises(InputError, match=expected):
            formats.read(write(tmp_path / "bad", weights, **options))
    # biases start at zero, and one that stayed there is no damage
    adapter, _ = formats.read(write(tmp_path / "zero", {**good, key: torch.zeros(16)}, lora_bias=True))
    found = {path: factors.bias_O is not None for path, factors in adapter.sites.items()}
    assert found.pop("model.layers.0.self_attn.q_proj") is False and all(found.values())


# ------------------------------------------------------------------------------------------------------------------ AdaLoRA


def adalora(base: Any, seq2seq: bool = False, **options: Any) -> Any:
    given = {"init_r": 5, "target_r": 2, "lora_alpha": 7, "tinit": 1, "tfinal": 3, "total_step": 12, **options}
    targets = ["q", "wo"] if seq2seq else ["q_proj", "v_proj", "up_proj", "down_proj"]
    task = "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM"
    return get_peft_model(base, AdaLoraConfig(task_type=task, target_modules=targets, **given))


@pytest.mark.parametrize("target_r", [1, 3])
def test_adalora_trained_by_peft(world: Pico, tmp_path: Path, target_r: int) -> None:
    """Trained until its ranks are cut, saved and read back: what PEFT holds in memory is what runs here."""
    torch.manual_seed(0)
    model = adalora(base_of(world), world.kind == "t5", target_r=target_r)
    spread(model)  # so that a few steps leave something to see
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(12):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        model.base_model.update_and_allocate(step)
        optimiser.zero_grad()
    model.eval().save_pretrained(tmp_path / "math")
    pattern = json.loads((tmp_path / "math" / "adapter_config.json").read_text())["rank_pattern"]
    ranks = {sum(mask) for mask in pattern.values()}
    assert len(ranks) > 1, "the test wants ranks that differ"
    before = files(tmp_path / "math")
    zoo = recycler.Zoo(tmp_path / "zoo")
    ours, receipt = fetched(world, tmp_path / "math", zoo)
    same(ours, logits(model, world.kind), logits(base_of(world), world.kind))
    assert receipt.kinds == ("AdaLoRA",) and set(receipt.ranks) == ranks - {0}
    assert receipt.tensors == 3 * len(pattern) and receipt.sites == sum(any(mask) for mask in pattern.values())
    held = files(zoo.folder("math"))
    assert held == {name: before[name] for name in held}  # byte for byte as they came
    again = PeftModel.from_pretrained(base_of(world), zoo.folder("math")).eval()
    same(ours, logits(again, world.kind), logits(base_of(world), world.kind))


PATHS = [
    f"model.layers.{n}.{m}" for n in (0, 1) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
]


@given(data=st.data(), init_r=st.integers(1, 6), alpha=st.floats(0.1, 50))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_adalora_with_any_ranks_and_alpha(llama: Pico, tmp_path_factory: Any, data: Any, init_r: int, alpha: float) -> None:
    masks = {p: data.draw(st.lists(st.booleans(), min_size=init_r, max_size=init_r)) for p in PATHS}
    masks[PATHS[0]][0] = True
    folder = tmp_path_factory.mktemp("adalora")
    torch.manual_seed(init_r)
    model = adalora(base_of(llama), init_r=init_r, lora_alpha=alpha)
    spread(model, 0.2)
    # PEFT cuts the ranks while it saves
    model.peft_config["default"].rank_pattern = {f"{path}.lora_E.default": mask for path, mask in masks.items()}
    model.save_pretrained(folder)
    adapter, receipt = formats.read(folder, "math")
    theirs = PeftModel.from_pretrained(base_of(llama), folder).base_model.model
    assert set(adapter.sites) == {path for path, mask in masks.items() if any(mask)}
    for path, factors in adapter.sites.items():
        torch.testing.assert_close(factors.b_OR @ factors.a_RD, theirs.get_submodule(path).get_delta_weight("default"))
        assert factors.rank == sum(masks[path])
    assert receipt.scalings == (pytest.approx(alpha / init_r, rel=1e-4),) * 2
    assert ("rank 0" in " ".join(receipt.notes)) == any(not any(mask) for mask in masks.values())


def adalora_folder(folder: Path, change: Callable[[dict[str, Tensor]], None] = lambda weights: None, **config: Any) -> Path:
    """A small AdaLoRA without PEFT: two sites of rank 3, of init_r 3."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in (0, 1):
        site = f"{PREFIX}model.layers.{layer}.self_attn.q_proj"
        for part, shape in {"lora_A": (3, 16), "lora_E": (3, 1), "lora_B": (16, 3)}.items():
            weights[f"{site}.{part}"] = torch.randn(shape, generator=generator)
    change(weights)
    return write(folder, weights, **{"peft_type": "ADALORA", "init_r": 3, "lora_alpha": 6, "r": 8, **config})


SITE = "model.layers.0.self_attn.q_proj"
Q = f"{PREFIX}{SITE}"


def whole(adapter: Adapter, path: str = SITE) -> Tensor:
    return adapter.sites[path].b_OR @ adapter.sites[path].a_RD


def test_adalora_saved_before_its_ranks_were_cut(tmp_path: Path) -> None:
    """PEFT cuts on saving; a checkpoint of a trainer need not. The config's pattern says which ranks count."""
    full, _ = formats.read(adalora_folder(tmp_path / "full"), "math")
    mask = {f"{SITE}.lora_E": [True, False, True]}
    masked, receipt = formats.read(adalora_folder(tmp_path / "masked", rank_pattern=mask), "math")
    assert receipt.ranks == (2, 3)
    e = load_file(tmp_path / "full" / WEIGHTS)[f"{Q}.lora_E"]
    lost = full.sites[SITE].b_OR[:, 1:2] @ full.sites[SITE].a_RD[1:2]
    torch.testing.assert_close(whole(masked), whole(full) - lost)
    assert float(e[1]) != 0
    torch.testing.assert_close(whole(masked, PATHS[4]), whole(full, PATHS[4]))


def test_a_count_of_ranks_in_the_file_is_what_the_scale_is_divided_by(tmp_path: Path) -> None:
    def count(weights: dict[str, Tensor]) -> None:
        weights[f"{Q}.ranknum"] = torch.tensor([2.0])

    plain, _ = formats.read(adalora_folder(tmp_path / "plain"), "math")
    counted, receipt = formats.read(adalora_folder(tmp_path / "counted", count), "math")
    torch.testing.assert_close(whole(counted), whole(plain) * (3 + 1e-5) / (2 + 1e-5))
    assert receipt.scalings == (pytest.approx(2, rel=1e-4), pytest.approx(3, rel=1e-4))


def test_singular_values_of_zero_are_no_update_unless_all_are(tmp_path: Path) -> None:
    def one(weights: dict[str, Tensor]) -> None:
        weights[f"{Q}.lora_E"].zero_()

    def both(weights: dict[str, Tensor]) -> None:
        for key in weights:
            if key.endswith("lora_E"):
                weights[key].zero_()

    adapter, receipt = formats.read(adalora_folder(tmp_path / "one", one), "math")
    assert list(adapter.sites) == [PATHS[4]] and receipt.sites == 1 and "1 of 2 sites" in receipt.notes[-1]
    assert receipt.parameters == adapter.parameters
    with pytest.raises(InputError, match=r"zero throughout.*lora_E"):
        formats.read(adalora_folder(tmp_path / "both", both), "math")


def _put(key: str, value: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def change(weights: dict[str, Tensor]) -> None:
        if value is None:
            del weights[key]
        else:
            weights[key] = value

    return change


BAD_ADALORA: dict[str, tuple[Callable[[dict[str, Tensor]], None], dict[str, Any], str]] = {
    "no E": (_put(f"{Q}.lora_E", None), {}, r"missing.*layers\.0\.self_attn\.q_proj\.lora_E"),
    "no A": (_put(f"{Q}.lora_A", None), {}, r"missing.*q_proj\.lora_A"),
    "shapes": (_put(f"{Q}.lora_E", torch.ones(2, 1)), {}, "disagree on their shapes"),
    "init_r": (lambda weights: None, {"init_r": 4}, r"α/init_r is ambiguous.*config 4, tensor 3"),
    "pattern": (lambda weights: None, {"rank_pattern": {f"{SITE}.lora_E": [True]}}, "rank_pattern and init_r disagree"),
    "pattern of ranks": (lambda weights: None, {"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
    "pattern's names": (lambda weights: None, {"rank_pattern": {"q_proj": [True] * 3}}, "name of a lora_E"),
    "pattern elsewhere": (lambda weights: None, {"rank_pattern": {"x.lora_E": [True] * 3}}, "have no tensors: x"),
    "leftover": (_put(f"{PREFIX}lm_head.weight", torch.ones(4, 4)), {}, "lm_head"),
    "no prefix": (_put("model.x.lora_A", torch.ones(3, 4)), {}, r"model\.x"),
    "convolution": (_put(f"{Q}.lora_A", torch.ones(3, 4, 1, 1)), {}, "not a matrix"),
    "count": (_put(f"{Q}.ranknum", torch.tensor([0.0])), {}, "not a number of ranks"),
    "counts": (_put(f"{Q}.ranknum", torch.ones(3)), {}, "not one number"),
    "nan": (_put(f"{Q}.lora_E", torch.full((3, 1), torch.nan)), {}, r"NaN.*lora_E \(3 of 3\)"),
    "zero B": (_put(f"{Q}.lora_B", torch.zeros(16, 3)), {}, r"zero throughout.*lora_B"),
    "dora": (lambda weights: None, {"use_dora": True}, "use_dora"),
    "bias": (lambda weights: None, {"lora_bias": True}, "lora_bias"),
    "modules_to_save": (lambda weights: None, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "unknown": (lambda weights: None, {"use_marvel": 1}, "use_marvel"),
    "LORA": (lambda weights: None, {"peft_type": "LORA", "init_r": None}, "singular values.*not ADALORA"),
    "ungathered": (_put(f"{Q}.lora_A", torch.ones(0)), {}, "ZeRO-3"),
}


@pytest.mark.parametrize(("change", "config", "expected"), BAD_ADALORA.values(), ids=BAD_ADALORA)
def test_adalora_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], config: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        formats.read(adalora_folder(tmp_path, change, **config), "math")
    assert caught.value.exit_code == 3 and caught.value.why and caught.value.fix


def test_adalora_pruned_to_nothing_is_refused(tmp_path: Path) -> None:
    def nothing(weights: dict[str, Tensor]) -> None:
        for key, value in weights.items():
            weights[key] = value[:, :0] if key.endswith("lora_B") else value[:0]

    masks = {f"{path}.lora_E": [False] * 3 for path in (SITE, PATHS[4])}
    with pytest.raises(InputError, match="without elements"):
        formats.read(adalora_folder(tmp_path, nothing, rank_pattern=masks), "math")


def test_options_that_adalora_ignores_are_noted(tmp_path: Path) -> None:
    options = {"use_rslora": True, "alpha_pattern": {"q_proj": 99}}
    adapter, receipt = formats.read(adalora_folder(tmp_path / "options", **options), "math")
    torch.testing.assert_close(whole(adapter), whole(formats.read(adalora_folder(tmp_path / "plain"), "math")[0]))
    assert sum("no effect in ADALORA" in note for note in receipt.notes) == 2


# ---------------------------------------------------------------------------------------------------------------- IncreLoRA


class IncreLinear(nn.Module):
    """What a linear of IncreLoRA's loralib holds after training (increlora.py, SVDLinear), so that names come from torch.

    The list's first entries have the starting rank; every later one is a rank that was granted, or the last, in reserve.
    """

    def __init__(self, out: int, width: int, rank: int, granted: int, alpha: float) -> None:
        super().__init__()
        ranks = [rank] + [1] * (granted + 1)
        self.lora_A = nn.ParameterList([nn.Parameter(torch.randn(r, width) * 0.3) for r in ranks])
        self.lora_E = nn.ParameterList([nn.Parameter(torch.randn(r, 1)) for r in ranks])
        self.lora_B = nn.ParameterList([nn.Parameter(torch.randn(out, r) * 0.3) for r in ranks])
        self.lora_E[-1].data.zero_()  # the reserve, as training leaves it when all ranks are granted
        self.ranknum = nn.Parameter(torch.tensor([float(rank + granted)]), requires_grad=False)
        self.alpha = alpha

    def delta(self) -> Tensor:
        down = torch.cat([a * e for a, e in zip(self.lora_A, self.lora_E, strict=True)])
        return torch.cat(list(self.lora_B), dim=1) @ down * self.alpha / (self.ranknum + 1e-5)


def incre_folder(world: Pico, folder: Path, prefix: str = "", **config: Any) -> dict[str, Tensor]:
    """Writes a folder as IncreLoRA's state dict would fill it, with the config that its code does not write; ΔW by site."""
    torch.manual_seed(0)
    layers = {}
    for name, module in base_of(world).named_modules():
        if name.rpartition(".")[2] in ("q_proj", "up_proj"):
            layers[name] = IncreLinear(module.out_features, module.in_features, 2, len(layers), 5.0)
    # PEFT's prefix is not there: IncreLoRA replaces linears in place
    state = {f"{prefix}{name}.{key}": t for name, layer in layers.items() for key, t in layer.state_dict().items()}
    assert f"{prefix}model.layers.1.mlp.up_proj.lora_E.3" in state
    write(folder, state, **{"peft_type": "INCRELORA", "r": 2, "lora_alpha": 5, **config})
    return {name: layer.delta().detach() for name, layer in layers.items()}


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("peft_type", ["INCRELORA", "LORA", "ADALORA"])
def test_increlora_is_its_own_formula(llama: Pico, tmp_path: Path, prefix: str, peft_type: str) -> None:
    """Built from the format that IncreLoRA's code writes (lists of parameters per layer, and ranknum); no file was to be had."""
    deltas = incre_folder(llama, tmp_path / "math", prefix, peft_type=peft_type)
    reference = base_of(llama)
    with torch.no_grad():
        for path, delta in deltas.items():
            reference.get_submodule(path).weight += delta
    ours, receipt = fetched(llama, tmp_path / "math", recycler.Zoo(tmp_path / "zoo"))
    same(ours, logits(reference, "llama"), logits(base_of(llama), "llama"))
    assert receipt.kinds == ("LoRA",) and receipt.ranks == (3, 4, 5, 6)  # 2, those granted, and the reserve
    written_out(llama, tmp_path, "IncreLoRA", ours, receipt)
    _, as_it_came = formats.read(tmp_path / "math")
    assert as_it_came.kinds == ("IncreLoRA",) and "PEFT does not know IncreLoRA" in as_it_came.warnings[0]
    assert as_it_came.scalings == (pytest.approx(5 / 5, rel=1e-4), pytest.approx(5 / 2, rel=1e-4))


def test_increlora_without_its_counts(llama: Pico, tmp_path: Path) -> None:
    """`lora_state_dict` of its loralib keeps only names with "lora_", and so loses ranknum; the config may give it back."""
    deltas = incre_folder(llama, tmp_path / "whole")
    kept = {k: t for k, t in load_file(tmp_path / "whole" / WEIGHTS).items() if "lora_" in k}
    options = {"peft_type": "INCRELORA", "r": 2, "lora_alpha": 5}
    with pytest.raises(InputError, match=r"ranknum is missing.*layers\.0\.self_attn\.q_proj"):
        formats.read(write(tmp_path / "cut", kept, **options))
    counts = {path: 2 + i for i, path in enumerate(deltas)}
    adapter, _ = formats.read(write(tmp_path / "given", kept, rank_pattern=counts, **options))
    for path, delta in deltas.items():
        torch.testing.assert_close(whole(adapter, path), delta)


@pytest.mark.parametrize("lost", ["lora_A.1", "lora_E.2", "lora_B.0"])
def test_a_hole_in_a_list_is_refused(llama: Pico, tmp_path: Path, lost: str) -> None:
    incre_folder(llama, tmp_path / "whole")
    state = load_file(tmp_path / "whole" / WEIGHTS)
    del state[f"model.layers.1.mlp.up_proj.{lost}"]
    with pytest.raises(InputError, match=rf"missing.*layers\.1\.mlp\.up_proj\.{re.escape(lost)}"):
        formats.read(write(tmp_path / "cut", state, peft_type="INCRELORA", r=2))


# ------------------------------------------------------------------------------------------------------------------ LoRA-XS


def xs_model(world: Pico, **options: Any) -> Any:
    """A LoRA-XS model as MohammadrezaBanaei/LoRA-XS sets it up: fixed A and B, and between them a trained linear that is called
    default_lora_latent_mapping. (There A and B are singular vectors of the base; which ones does not matter here.)"""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"], **options)
    model = get_peft_model(base_of(world), config)
    spread(model, 0.5)
    for layer in model.modules():
        if hasattr(layer, "lora_A") and isinstance(layer.lora_A, nn.ModuleDict):
            layer.default_lora_latent_mapping = nn.Linear(4, 4, bias=False)
            mapping = layer.default_lora_latent_mapping
            layer.lora_A["default"].register_forward_hook(lambda module, args, output, mapping=mapping: mapping(output))
    return model.eval()


@pytest.mark.parametrize("saved_by", ["this peft", "peft 0.10", "state dict"])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_xs_is_its_own_formula(llama: Pico, tmp_path: Path, saved_by: str, rslora: bool) -> None:
    """Built from what LoRA-XS's code writes: A, B and the mapping through PEFT's save_pretrained. PEFT 0.10, which it pins, takes
    ".default" out of every name, that of the mapping included."""
    model = xs_model(llama, use_rslora=rslora)
    model.save_pretrained(tmp_path / "math")
    if saved_by != "this peft":
        state = {k: t for k, t in model.state_dict().items() if "lora_" in k}
        if saved_by == "peft 0.10":
            state = {k.replace(".default", ""): t for k, t in state.items()}
            assert any(k.endswith("q_proj_lora_latent_mapping.weight") for k in state)
        save_file({k: t.contiguous() for k, t in state.items()}, tmp_path / "math" / WEIGHTS)
    ours, receipt = fetched(llama, tmp_path / "math", recycler.Zoo(tmp_path / "zoo"))
    same(ours, logits(model, "llama"), logits(base_of(llama), "llama"))
    written_out(llama, tmp_path, "LoRA-XS", ours, receipt)
    _, as_it_came = formats.read(tmp_path / "math")
    assert as_it_came.kinds == (("rsLoRA", "LoRA-XS") if rslora else ("LoRA-XS",))
    assert as_it_came.tensors == 3 * as_it_came.sites and "PEFT does not know LoRA-XS" in as_it_came.warnings[0]


def xs_weights() -> dict[str, Tensor]:
    weights = tensors()
    sites = [key.removesuffix(".lora_A.weight") for key in weights if key.endswith("lora_A.weight")]
    return {**weights, **{f"{site}_lora_latent_mapping.weight": torch.eye(4) * 2 for site in sites}}


def test_lora_xs_refused_by_name(tmp_path: Path) -> None:
    good, mapping = xs_weights(), f"{Q}_lora_latent_mapping.weight"
    plain, xs = (formats.read(write(tmp_path / n, w), "math")[0] for n, w in (("plain", tensors()), ("xs", good)))
    torch.testing.assert_close(whole(xs), 2 * whole(plain))
    cases: Mapping[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
        r"latent mapping of LoRA-XS is missing.*layers\.0": (_without(good, mapping), {}),
        "not rank × rank": ({**good, mapping: torch.ones(3, 3)}, {}),
        "lora_A is missing.*LoRA-XS computes": (_without(good, f"{Q}.lora_A.weight"), {}),
        "two tensors": ({**good, f"{Q}.default_lora_latent_mapping.weight": torch.eye(4)}, {}),
        "zero throughout": ({**good, mapping: torch.zeros(4, 4)}, {}),
        "neither DoRA nor a bias": (good, {"use_dora": True}),
    }
    for expected, (weights, config) in cases.items():
        with pytest.raises(InputError, match=expected):
            formats.read(write(tmp_path / "bad", weights, **config))


def _without(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if key != name}


# ----------------------------------------------------------------------------------------------------------- all of them


@pytest.fixture
def every(llama: Pico, tmp_path: Path) -> dict[str, Path]:
    """One folder of each format, for one base."""
    torch.manual_seed(0)
    made = {name: tmp_path / name for name in ("bent", "pruned", "grown", "fixed")}
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "o_proj"]}
    bent = get_peft_model(base_of(llama), LoraConfig(lora_bias=True, **options))
    spread(bent)
    bent.save_pretrained(made["bent"])
    pruned = adalora(base_of(llama))
    spread(pruned)
    masks = {f"{path}.lora_E": [i <= n % 4 for i in range(5)] for n, path in enumerate(PATHS)}
    pruned.peft_config["default"].rank_pattern = masks
    pruned.save_pretrained(made["pruned"])
    incre_folder(llama, made["grown"], base_model_name_or_path=str(llama.base))
    xs_model(llama).save_pretrained(made["fixed"])
    return made


def test_all_formats_in_one_model(llama: Pico, tmp_path: Path, every: dict[str, Path]) -> None:
    """A mixture is the sum of its updates, and a saved model is bit for bit the one that was saved."""
    zoo = recycler.Zoo(tmp_path / "zoo")
    recycler.fetch([*every.values(), llama.adapters["poem"]], base=llama.base, zoo=zoo).raise_for_failures()
    assert {name: entry.kinds for name, entry in zoo.entries.items()} == {
        "bent": ("LoRA", "bias"), "pruned": ("AdaLoRA",), "grown": ("LoRA",), "fixed": ("LoRA",), "poem": ("DoRA",),
    }  # fmt: skip
    assert not zoo.verify()
    made = recycler.compose(zoo, recycler.build_router("arrow", zoo=zoo))
    made.save_pretrained(tmp_path / "model")
    loaded = recycler.load(tmp_path / "model")
    assert torch.equal(logits(made, "llama"), logits(loaded, "llama"))
    weights = {"bent": 0.5, "pruned": -0.7, "grown": 0.2, "fixed": 1.5}
    merged = base_of(llama)
    with torch.no_grad():
        for name, weight in weights.items():
            for path, factors in zoo[name].sites.items():
                linear = merged.get_submodule(path)
                linear.weight += weight * factors.b_OR @ factors.a_RD
                if factors.bias_O is not None:
                    linear.bias = nn.Parameter(weight * factors.bias_O)
    with loaded.mixture(weights):
        same(logits(loaded, "llama"), logits(merged, "llama"), logits(base_of(llama), "llama"))


@pytest.mark.parametrize("name", ["bent", "pruned", "grown", "fixed"])
def test_a_header_is_enough_to_judge_it(every: dict[str, Path], name: str) -> None:
    """What a preview says without a byte of the weights is what reading says; but for a scale that the file itself counts."""
    adapter, receipt = formats.read(every[name], name)
    raw = configs.read_config(every[name] / inspect.CONFIG)
    sites, planned = formats.plan(configs.parse_config(raw, name), inspect.read_header(every[name] / WEIGHTS), name)
    if name == "grown":
        planned = replace(planned, scalings=receipt.scalings)
    assert replace(planned, source=receipt.source) == receipt
    assert {path: site.shape for path, site in sites.items()} == {path: f.shape for path, f in adapter.sites.items()}
    if name != "fixed":  # the config of a LoRA-XS is that of a LoRA; its tensors tell
        assert kind_of(json.loads(raw)).name == "+".join(receipt.kinds)


@pytest.mark.parametrize(
    "field", ["init_r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias", "r", "beta1"]
)
def test_wrong_values_in_a_config_of_adalora(tmp_path: Path, field: str) -> None:
    """Refused, or without effect."""
    expected = whole(formats.read(adalora_folder(tmp_path / "plain"), "math")[0])
    for value in (None, True, -1, 0, 1e999, "x", [], {}, [[1]], {"q": 1}, {"q": [1]}, {"": [True]}, {"x.lora_E": "yes"}):
        try:
            adapter, _ = formats.read(adalora_folder(tmp_path / "wrong", **{field: value}), "math")
        except InputError as error:
            assert error.why and error.fix
        else:
            if field not in ("lora_alpha", "init_r") or value is not None:  # null is PEFT's default there
                torch.testing.assert_close(whole(adapter), expected)
