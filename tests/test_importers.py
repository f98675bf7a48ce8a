"""Zoos of other projects, in: what their own forward does at a linear is what the imported adapter does at weight 1.

No released file of mttl, PHATGOOSE or GLIDER is at hand here. The fixtures write what those projects' code writes: names, shapes,
transposes and extras were read from microsoft/mttl (``Expert``, ``ExpertLibrary``, ``ExpertModel.save_pretrained``,
``LightningEfficientCheckpoint``), r-three/phatgoose (``LoRALinear``, ``FFNExperts``, ``put_index_to_lora``,
``run_concatenate``) and GLIDER's ``convert_phatgoose_p3_checkpoint_to_peft_lora``. The references in the tests are those
projects' formulas, on pico models, and not our own code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import adapters
import pytest
import torch
from conftest import Pico
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import recycler
from recycler.base import linear_shapes, load_base
from recycler.build import read_adapters
from recycler.routed import RoutedModel
from recycler.zoo import formats, importers
from recycler.zoo.errors import InputError, RecycleError, SecurityError, UsageError

Forward = Callable[[str, Tensor], Tensor]
"""(site, x) → what the project adds to W x there."""


# References


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def chosen(base: Path, *targets: str) -> dict[str, tuple[int, int]]:
    """Module path → (O, D) of the base's linears whose last component is one of `targets`."""
    return {path: shape for path, shape in linear_shapes(str(base)).items() if path.rsplit(".", 1)[-1] in targets}


@torch.no_grad()
def same_as(world: Pico, folder: Path, sites: Iterable[str], added: Forward, tmp_path: Path) -> None:
    """An imported folder, through fetch, at weight 1, against the project's formula in hooks on a plain model."""
    seq2seq = world.kind == "t5"
    ids = torch.tensor([[5, 80, 33, 120, 7, 200, 41], [9, 10, 99, 150, 61, 77, 2]])
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if seq2seq:
        inputs["decoder_input_ids"] = ids[:, :4]
    plain: Any = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(world.base).eval()
    bare = plain(**inputs).logits
    for site in sites:
        module = plain.get_submodule(site)
        module.register_forward_hook(lambda _, args, out, site=site: out + added(site, args[0]))
    theirs = plain(**inputs).logits
    zoo = recycler.Zoo(tmp_path / "zoo-of-one")
    recycler.fetch(folder, base=world.base, zoo=zoo)
    base = load_base(str(world.base), dtype="float32")
    model = RoutedModel(base, read_adapters(zoo, list(zoo), base))
    with model.only(next(iter(zoo))):
        ours = model(**inputs).logits
    scale = float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) <= 1e-5 * scale
    assert float((bare - theirs).abs().max()) > 1e-2 * scale


# mttl


def mttl_state(shapes: Mapping[str, tuple[int, int]], rank: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """``lora_a`` (D, R) and ``lora_b`` (R, O), as parameters of a state dict."""
    state = {}
    for number, (path, (out, width)) in enumerate(shapes.items()):
        state[f"{path}.lora_a"] = random((width, rank), seed + 2 * number)
        state[f"{path}.lora_b"] = random((rank, out), seed + 2 * number + 1)
    return state


def mttl_info(name: str, base: str | None = "org/base", **config: Any) -> dict[str, Any]:
    """``MetadataEntry.asdict()``."""
    fields = {"modify_modules": ".*", "modify_layers": "q_proj|v_proj", "tie_params": None, "lora_rank": 4, "lora_alpha": 16.0}
    rest = {"lora_dropout": 0.05, "lora_init_b_random": False, "class_name": "mttl.models.modifiers.lora.LoRAConfig"}
    return {
        "expert_name": name,
        "class_name": "mttl.models.library.expert_library.MetadataEntry",
        "expert_task_name": f"{name}_task",
        "parent_node": None,
        "expert_config": {**fields, **rest, **config},
        "training_config": {"model": base, "dataset": "sordonia/flan-10k-flat", "model_modifier": "lora", "optimizer": "adamw"},
        "expert_model": base,
        "expert_deleted": False,
    }


def mttl_forward(state: Mapping[str, Tensor], alpha: float = 16.0, rank: int = 4) -> Forward:
    return lambda site, x: (x @ state[f"{site}.lora_a"]) @ state[f"{site}.lora_b"] * (alpha / rank)


def library(folder: Path, experts: Mapping[str, tuple[dict[str, Tensor], dict[str, Any]]]) -> Path:
    folder.mkdir()
    for name, (state, info) in experts.items():
        torch.save(state, folder / f"{name}.ckpt")
        torch.save(info, folder / f"{name}.meta")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nNumber of experts present in the library: 2\n")
    torch.save({"data": [1.0], "config": {}}, folder / "one.embeddings.bin")
    return folder


def test_an_mttl_library_becomes_its_experts(world: Pico, tmp_path: Path) -> None:
    targets = ("q", "v", "wi", "o") if world.kind == "t5" else ("q_proj", "v_proj", "down_proj")
    shapes = chosen(world.base, *targets)
    states = {
        name: mttl_state(shapes, seed=seed) for seed, name in ((0, "wiqa_what_is_the_final_step"), (1000, "ai2 ARC Easy"))
    }
    folder = library(tmp_path / "lib", {name: (state, mttl_info(name)) for name, state in states.items()})
    assert importers.layout_of(path.name for path in folder.iterdir()) == "mttl"
    before = adapters.files(folder)
    made = importers.adapters(folder, "auto", None, tmp_path / "into")
    assert [path.name for path in made] == ["ai2-arc-easy", "wiqa_what_is_the_final_step"]
    assert adapters.files(folder) == before
    for name, path in zip(sorted(states), made, strict=True):
        adapter, receipt = formats.read(path)
        assert adapter.base == "org/base" and adapter.licence == "mit"
        assert receipt.ranks == (4,) and receipt.sites == len(shapes)
        facts = importers.provenance(path)
        assert facts["layout"] == "mttl" and facts["expert"] == name and facts["base"] == "org/base"
        assert facts["files"].keys() == {f"{name}.ckpt", f"{name}.meta"}
        ckpt = folder / f"{name}.ckpt"
        expected = {"sha256": importers.inspect.hashes(ckpt)[0], "size": ckpt.stat().st_size}
        assert facts["files"][ckpt.name] == expected
        assert "audit hook" in facts["sandbox"]["held"]
    same_as(world, made[1], shapes, mttl_forward(states["wiqa_what_is_the_final_step"]), tmp_path)


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    folder = library(tmp_path / "lib", {"one": (mttl_state(adapters.SHAPES), mttl_info("one"))})
    made = [importers.adapters(folder, "mttl", None, tmp_path / into)[0] for into in ("a", "b")]
    assert adapters.files(made[0]) == adapters.files(made[1])


def test_alpha_and_rank_are_the_experts_own(llama: Pico, tmp_path: Path) -> None:
    """mttl's PEFT import and merges take one expert's numbers for all; here each has its own."""
    shapes = chosen(llama.base, "q_proj", "v_proj")
    experts = {
        "low": (mttl_state(shapes, 2), mttl_info("low", lora_rank=2, lora_alpha=1)),
        "high": (mttl_state(shapes, 8), mttl_info("high", lora_rank=8, lora_alpha=64.0)),
    }
    low, high = sorted(importers.adapters(library(tmp_path / "lib", experts), "auto", None, tmp_path / "into"), reverse=True)
    same_as(llama, low, shapes, mttl_forward(experts["low"][0], 1, 2), tmp_path / "l")
    same_as(llama, high, shapes, mttl_forward(experts["high"][0], 64, 8), tmp_path / "h")


@pytest.mark.parametrize(
    "tie", ["q_proj.lora_a|k_proj.lora_a|v_proj.lora_a", r"q_proj.*\.lora_a|k_proj.*\.lora_a|v_proj.*\.lora_a"]
)
def test_tied_parameters_are_written_out(llama: Pico, tmp_path: Path, tie: str) -> None:
    """Saved once: q, k and v of one attention share A, and only the first of them has it in the file."""
    shapes = chosen(llama.base, "q_proj", "k_proj", "v_proj", "o_proj")
    full = mttl_state(shapes)
    for path in shapes:
        if path.endswith(("k_proj", "v_proj")):
            full[f"{path}.lora_a"] = full[f"{path.rpartition('.')[0]}.q_proj.lora_a"]
    state = {name: t for name, t in full.items() if not name.endswith(("k_proj.lora_a", "v_proj.lora_a"))}
    folder = library(tmp_path / "lib", {"one": (state, mttl_info("one", tie_params=tie))})
    (made,) = importers.adapters(folder, "auto", None, tmp_path / "into")
    assert importers.provenance(made)["notes"] == [
        "its scale lora_alpha/lora_rank = 16/4 is folded into B",
        "4 tied factors were written out",
    ]
    same_as(llama, made, shapes, mttl_forward(full), tmp_path)


def test_ties_that_cannot_be_read_and_halves_that_are_missing(tmp_path: Path) -> None:
    state = mttl_state(adapters.SHAPES)
    site = next(iter(adapters.SHAPES))
    half = {name: t for name, t in state.items() if name != f"{site}.lora_a"}
    experts = {
        "pattern": (half, mttl_info("pattern", tie_params="(a+)+$|.*lora_a.*")),
        "half": (half, mttl_info("half")),
        "more": ({**state, "model.lm_head.weight": torch.ones(2, 2)}, mttl_info("more")),
        "rank": (state, mttl_info("rank", lora_rank=8)),
        "alpha": (state, mttl_info("alpha", lora_alpha="16")),
        "ia3": (state, mttl_info("ia3", class_name="mttl.models.modifiers.ia3.IA3Config")),
        "skilled": (state, mttl_info("skilled", class_name="mttl.models.modifiers.lora.SkilledLoRAConfig")),
        "old-kind": (state, {"expert_name": "old-kind", "expert_config": {"__model_modifier__": "kv_adapter"}}),
        "gone": (state, {**mttl_info("gone"), "expert_deleted": True}),
        "nothing": ({}, mttl_info("nothing")),
        "good": (state, mttl_info("good")),
    }
    failures: dict[str, RecycleError] = {}
    made = importers.adapters(library(tmp_path / "lib", experts), "auto", None, tmp_path / "into", failures=failures)
    assert [path.name for path in made] == ["good"]
    said = {
        "pattern": "tie_params", "half": "one half only", "more": "model.lm_head.weight", "rank": "lora_rank 8",
        "alpha": "lora_alpha=16", "ia3": "IA3Config", "skilled": "SkilledLoRAConfig", "old-kind": "kv_adapter",
        "gone": "expert_deleted", "nothing": "no tensors",
    }  # fmt: skip
    assert failures.keys() == said.keys()
    for name, text in said.items():
        assert type(failures[name]) is InputError and text in str(failures[name]), failures[name]
    assert sorted(path.name for path in (tmp_path / "into").iterdir()) == ["good"]


def test_the_names_of_phi_2s_first_code(tmp_path: Path) -> None:
    """Counted from 1, with q, k and v in one linear; as ``convert_library_to_hf_phi2`` has it."""
    shapes = {f"layers.{n}.mixer.{m}": s for n in (1, 2) for m, s in (("Wqkv", (48, 16)), ("out_proj", (16, 16)))}
    state = mttl_state(shapes)
    folder = library(tmp_path / "lib", {"one": (state, mttl_info("one", "phi-2"))})
    (made,) = importers.adapters(folder, "auto", None, tmp_path / "into")
    adapter, _ = formats.read(made)
    assert adapter.base == "microsoft/phi-2"
    names = ("q_proj", "k_proj", "v_proj", "dense")
    assert set(adapter.sites) == {f"model.layers.{n}.self_attn.{m}" for n in (0, 1) for m in names}
    for n in (1, 2):
        whole = (state[f"layers.{n}.mixer.Wqkv.lora_a"] @ state[f"layers.{n}.mixer.Wqkv.lora_b"]).T * 4
        parts = [adapter.sites[f"model.layers.{n - 1}.self_attn.{m}"] for m in names[:3]]
        assert torch.allclose(torch.cat([f.b_OR @ f.a_RD for f in parts]), whole, atol=1e-6)


def test_a_library_of_2023_whose_config_is_an_object(tmp_path: Path) -> None:
    """Its class is not here, and is not needed: the object is read as a dict, and nothing is run."""
    folder = library(tmp_path / "lib", {"one": (mttl_state(adapters.SHAPES), {})})
    body = b"}(X\x05\x00\x00\x00modelX\x08\x00\x00\x00org/baseX\x0e\x00\x00\x00model_modifierX\x04\x00\x00\x00lora"
    body += b"X\x09\x00\x00\x00lora_rankK\x04X\x0a\x00\x00\x00lora_alphaK\x20u"
    info = (
        b"\x80\x02}(X\x0b\x00\x00\x00expert_nameX\x03\x00\x00\x00oneX\x0d\x00\x00\x00expert_configcmttl.config\nConfig\n)\x81"
    )
    _replace_pickle(folder / "one.meta", info + body + b"bu.")
    (made,) = importers.adapters(folder, "auto", None, tmp_path / "into")
    adapter, receipt = formats.read(made)
    assert adapter.base == "org/base"
    site = next(iter(adapters.SHAPES))
    state = torch.load(folder / "one.ckpt")
    expected = (state[f"{site}.lora_a"] @ state[f"{site}.lora_b"]).T * 8
    assert torch.allclose(adapter.sites[site].b_OR @ adapter.sites[site].a_RD, expected, atol=1e-5)
    assert receipt.sites == len(adapters.SHAPES)


def test_a_meta_that_runs_something_is_refused(tmp_path: Path) -> None:
    folder = library(tmp_path / "lib", {"one": (mttl_state(adapters.SHAPES), {})})
    canary = tmp_path / "canary"
    _replace_pickle(
        folder / "one.meta", b"\x80\x02cos\nsystem\nX\x40\x00\x00\x00" + f"touch {canary}".ljust(64)[:64].encode() + b"\x85R."
    )
    with pytest.raises(SecurityError, match=r"os\.system"):
        importers.adapters(folder, "auto", None, tmp_path / "into")
    assert not canary.exists() and not list((tmp_path / "into").iterdir())


def test_what_mttls_trainers_save(llama: Pico, tmp_path: Path) -> None:
    shapes = chosen(llama.base, "q_proj", "v_proj")
    state = mttl_state(shapes)
    info = mttl_info("law", str(llama.base))
    config = {
        "class_name": "mttl.models.expert_model.ExpertModelConfig", "base_model": "org/base", "task_name": "t",
        "expert_name": "law", "modifier_config": info["expert_config"],
    }  # fmt: skip
    model = tmp_path / "expert-model"
    model.mkdir()
    torch.save({f"model.{name}": t for name, t in state.items()}, model / "mttl_weights.bin")
    (model / "mttl_config.json").write_text(json.dumps(config))
    torch.save(json.dumps({}), model / "loading_kwargs.json")

    lightning = tmp_path / "lightning"
    lightning.mkdir()
    package = {"state_dict": {f"model.{name}": t for name, t in state.items()}, "hyper_parameters": {"model": "org/base"}}
    torch.save({**package, "expert_info": info}, lightning / "checkpoint.ckpt")
    for n, folder in enumerate((model, lightning)):
        assert importers.layout_of(path.name for path in folder.iterdir()) == "mttl"
        (made,) = importers.adapters(folder, "auto", None, tmp_path / f"into-{n}")
        assert made.name == "law"
        same_as(llama, made, shapes, mttl_forward(state), tmp_path / f"zoo-{n}")


def test_only_some_experts_of_a_library(tmp_path: Path) -> None:
    experts = {name: (mttl_state(adapters.SHAPES, seed=n), mttl_info(name)) for n, name in enumerate(("One Two", "b", "c"))}
    folder = library(tmp_path / "lib", experts)
    names = [path.name for path in folder.iterdir()]
    assert importers.files_of(names, "mttl", ["one-two"]) == ["One Two.ckpt", "One Two.meta", "README.md"]
    assert len(importers.files_of(names, "mttl")) == 7
    made = importers.adapters(folder, "mttl", None, tmp_path / "into", ["one-two", "c"])
    assert [path.name for path in made] == ["c", "one-two"]
    with pytest.raises(UsageError, match="nobody"):
        importers.adapters(folder, "mttl", None, tmp_path / "again", ["nobody"])


# PHATGOOSE and GLIDER


def linear_state(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, Tensor]:
    """``LoRALinear``: A (R, D) and B (O, R)."""
    state = {}
    for number, (path, (out, width)) in enumerate(shapes.items()):
        state[f"{path}.expert_lora_a"] = random((rank, width), seed + 2 * number)
        state[f"{path}.expert_lora_b"] = random((out, rank), seed + 2 * number + 1)
    return state


def linear_forward(state: Mapping[str, Tensor], rank: int) -> Forward:
    return lambda site, x: x @ (state[f"{site}.expert_lora_b"] @ state[f"{site}.expert_lora_a"] / rank).T


def as_expert(state: Mapping[str, Tensor], index: int, joint: str = "__") -> dict[str, Tensor]:
    """``put_index_to_lora``, ``use_input_gate_as_router``, ``update_checkpoint``: transposed views, and a gate each."""
    made = {}
    for name, tensor in state.items():
        site, _, part = name.rpartition(".")
        layer = "layer1" if part == "expert_lora_a" else "layer2"
        made[f"{site}._addons.expert_lora.{layer}{joint}{index}"] = tensor.T
        if layer == "layer1":
            made[f"{site}._addons.router.expert_embeddings{joint}{index}"] = random((tensor.shape[1],), 7)
    return made


@pytest.fixture
def goose(t5: Pico) -> tuple[dict[str, tuple[int, int]], list[dict[str, Tensor]]]:
    shapes = chosen(t5.base, "q", "k", "v", "o", "wi", "wo")
    return shapes, [linear_state(shapes, 3, seed) for seed in (0, 1000, 2000)]


def stacked(states: Iterable[Mapping[str, Tensor]], joint: str = "__") -> dict[str, Tensor]:
    embeddings = random((20, 32), 1)
    made = {"encoder.embed_tokens.weight": embeddings, "decoder.embed_tokens.weight": embeddings}
    for index, state in enumerate(states):
        made |= as_expert(state, index, joint)
    return made


def test_a_stacked_checkpoint_is_split(t5: Pico, goose: Any, tmp_path: Path) -> None:
    shapes, states = goose
    folder = tmp_path / "P3_Phatgoose"
    folder.mkdir()
    torch.save(stacked(states), folder / "best.pt")
    torch.save(stacked(states[:1]), folder / "finish.pt")  # an earlier step; best is what the project concatenates
    assert importers.layout_of(path.name for path in folder.iterdir()) == "phatgoose"
    made = importers.adapters(folder, "auto", "google/t5-xl-lm-adapt", tmp_path / "into")
    assert [path.name for path in made] == [f"p3_phatgoose-{i}" for i in range(3)]
    facts = importers.provenance(made[1])
    assert facts["layout"] == "phatgoose" and facts["base"] == "google/t5-xl-lm-adapt" and facts["files"].keys() == {"best.pt"}
    gates = 3 * len(shapes)
    assert facts["notes"] == [
        "its scale 1/rank is folded into B",
        f"{gates} gates of p3_phatgoose were left out",
        "2 copies of the base's embeddings of p3_phatgoose were left out",
    ]
    for number in (0, 2):
        same_as(t5, made[number], shapes, linear_forward(states[number], 3), tmp_path / str(number))


def test_the_forms_that_phatgoose_and_glider_give_an_expert(goose: Any) -> None:
    """The first form, one expert with its gate, an expert list, stems of experts, GLIDER's one by one and gathered."""
    shapes, states = goose
    peft = [
        {
            f"base_model.model.{site}.lora_{h}.default.weight": s[f"{site}.expert_lora_{h.lower()}"]
            for site in shapes
            for h in "AB"
        }
        for s in states
    ]
    gates = {f"base_model.model.{site}.lora_gate.default": random((shape[1],), 3) for site, shape in shapes.items()}
    gathered = {
        f"base_model.model.{site}.lora_experts.default.{i}.lora_{h}.weight": s[f"{site}.expert_lora_{h.lower()}"]
        for i, s in enumerate(states)
        for site in shapes
        for h in "AB"
    }
    gathered |= {f"{name}.weight": gate.expand(3, -1) for name, gate in gates.items()}
    single = {**as_expert(states[1], 0), **{f"{site}._addons.expert_lora.expert_input_gate": torch.ones(4) for site in shapes}}
    names = ["P3Agnews", "P3Quail", "P3Wiqa"]
    cases: dict[str, tuple[Mapping[str, Tensor], list[str] | None, dict[str, int]]] = {
        "linear": (states[1], None, {"linear": 1}),
        "single": (single, None, {"single": 1}),
        "listed": (stacked(states), names, dict(zip(names, range(3), strict=True))),
        "stems": (stacked(states, "_new_"), None, {"stems-0": 0, "stems-1": 1, "stems-2": 2}),
        "glider": ({**peft[2], **gates}, None, {"glider": 2}),
        "gathered": (gathered, None, {"gathered-0": 0, "gathered-1": 1, "gathered-2": 2}),
    }
    x = torch.eye(max(width for _, width in shapes.values()))
    for case, (state, given, expected) in cases.items():
        parts = list(importers.split(state, {"name": case, "names": given, "base": "org/base"}, "phatgoose"))
        assert [part.name for part in parts] == list(expected), case
        for part in parts:
            assert set(part.sites) == set(shapes) and part.base == "org/base"
            forward = linear_forward(states[expected[part.name]], 3)
            for site, factors in part.sites.items():
                theirs = forward(site, x[: factors.shape[1], : factors.shape[1]]).T
                assert torch.allclose(factors.b_OR @ factors.a_RD, theirs, atol=1e-6), (case, site)


def test_glider_keeps_one_expert_a_file(t5: Pico, goose: Any, tmp_path: Path) -> None:
    shapes, states = goose
    folder = tmp_path / "p3-lora-checkpoints"
    folder.mkdir()
    for n, task in enumerate(("p3paws", "p3quartz")):
        factors = {
            f"base_model.model.{site}.lora_{h}.default.weight": states[n][f"{site}.expert_lora_{h.lower()}"]
            for site in shapes
            for h in "AB"
        }
        torch.save({**factors, "base_model.model.encoder.embed_tokens.weight": torch.ones(3, 3)}, folder / f"{task}_best.pt")
    made = importers.adapters(folder, "auto", None, tmp_path / "into")
    assert [path.name for path in made] == ["p3paws", "p3quartz"]
    same_as(t5, made[1], shapes, linear_forward(states[1], 3), tmp_path)


def test_checkpoints_that_are_not_what_they_should_be(goose: Any) -> None:
    shapes, states = goose
    one = as_expert(states[0], 0)
    site = next(iter(shapes))
    key = f"{site}._addons.expert_lora."
    inside = dict(one)
    for path in shapes:  # use_input_gate_in_router_and_expert
        layer1, layer2 = (f"{path}._addons.expert_lora.layer{n}__0" for n in (1, 2))
        inside[layer1] = torch.cat([torch.ones(one[layer1].shape[0], 1), one[layer1]], 1)
        inside[layer2] = torch.cat([torch.zeros(1, one[layer2].shape[1]), one[layer2]], 0)
    wrong = {
        "half": ({name: t for name, t in one.items() if name != key + "layer2__0"}, "one half only"),
        "shape": ({**one, key + "layer2__0": torch.ones(5, 32)}, "do not fit together"),
        "more": ({**one, "lm_head.weight": torch.ones(2)}, "lm_head.weight"),
        "adapter": ({f"{site}._addons.expert.layer1__0": torch.ones(2, 2)}, "no place"),
        "long": ({**one, "a." * 400 + "b": torch.ones(1)}, "no place"),
        "inside": (inside, "carries its gate"),
    }
    for name, (state, text) in wrong.items():
        with pytest.raises(InputError, match=text):
            list(importers.split(state, {"name": name}, "phatgoose"))
    with pytest.raises(InputError, match="3 experts, and 2 different names"):
        list(importers.split(stacked(states), {"name": "x", "names": ["a", "b"]}, "phatgoose"))


def test_one_expert_of_a_stack_by_the_name_that_a_list_gives_it(goose: Any, tmp_path: Path) -> None:
    _, states = goose
    folder = tmp_path / "names"
    folder.mkdir()
    torch.save(stacked(states), folder / "best.pt")
    (folder / "experts.txt").write_text("a\nb\nc\n")
    made = importers.adapters(folder, "phatgoose", None, tmp_path / "into", ["b"])
    assert [path.name for path in made] == ["b"]
    with pytest.raises(UsageError, match="No adapter is called d"):
        importers.adapters(folder, "phatgoose", None, tmp_path / "again", ["d"])


# PEFT's own pickles


def test_a_pickled_peft_adapter_is_the_safetensors_one(world: Pico, tmp_path: Path) -> None:
    """As in LoraHub's zoos: adapter_config.json beside adapter_model.bin, in both of torch's formats."""
    for name in ("law", "poem"):  # rsLoRA, DoRA
        source = world.adapters[name]
        folder = tmp_path / name
        folder.mkdir()
        weights = load_file(source / "adapter_model.safetensors")
        torch.save(weights, folder / "adapter_model.bin", _use_new_zipfile_serialization=name != "law")
        for file in ("adapter_config.json", "README.md"):
            (folder / file).write_bytes((source / file).read_bytes())
        assert importers.layout_of(path.name for path in folder.iterdir()) == "peft"
        (made,) = importers.adapters(folder, "auto", None, tmp_path / "into")
        assert made.name == name
        theirs, ours = formats.read(source, name)[0], formats.read(made, name)[0]
        assert ours.sites.keys() == theirs.sites.keys()
        for site, factors in theirs.sites.items():
            assert torch.equal(ours.sites[site].a_RD, factors.a_RD) and torch.equal(ours.sites[site].b_OR, factors.b_OR)
        assert (made / "adapter_config.json").read_bytes() == (source / "adapter_config.json").read_bytes()
        facts = importers.provenance(made)
        assert facts["layout"] == "peft" and facts["files"].keys() == {"adapter_model.bin", "adapter_config.json"}


def test_a_peft_pickle_with_a_payload_leaves_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'canary'}",)

    folder = adapters.write(tmp_path / "evil")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({**adapters.tensors(), "x": Evil()}, folder / "adapter_model.bin")
    before = adapters.files(folder)
    with pytest.raises(SecurityError, match="system") as refused:
        importers.adapters(folder, "auto", None, tmp_path / "into")
    assert refused.value.exit_code == 4
    assert not (tmp_path / "canary").exists() and not list((tmp_path / "into").iterdir())
    assert adapters.files(folder) == before


# Folders


def test_layouts_by_file_names() -> None:
    peft, bin_ = "adapter_config.json", "adapter_model.bin"
    cases: dict[tuple[str, ...], str | None] = {
        (peft, bin_): "peft",
        (peft, bin_, "adapter_model.safetensors"): None,
        (peft, "adapter_model.safetensors", "best.pt"): None,
        (bin_,): None,
        ("a.ckpt", "a.meta", "b.meta"): "mttl",
        ("a.meta",): None,
        ("checkpoint.ckpt",): "mttl",
        ("mttl_config.json", "mttl_weights.bin"): "mttl",
        ("best.pt",): "phatgoose",
        ("p3paws_best.pt", "p3quail_best.pt"): "phatgoose",
        ("training_args.pt",): None,
        ("model.safetensors", "config.json"): None,
        (): None,
    }
    for names, layout in cases.items():
        assert importers.layout_of(names) == layout, names
    assert importers.files_of([peft, bin_, "optimizer.pt", "LICENSE"], "peft") == [peft, bin_, "LICENSE"]
    tasks = ["p3paws_best.pt", "p3quail_best.pt", "README.md"]
    assert importers.files_of(tasks, "phatgoose", ["p3quail"]) == ["p3quail_best.pt", "README.md"]
    with pytest.raises(UsageError, match="no layout"):
        importers.files_of(tasks, "zip")


def test_folders_that_hold_nothing_to_import(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a folder"):
        importers.adapters(tmp_path / "absent", "auto", None, tmp_path / "into")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="any known layout"):
        importers.adapters(empty, "auto", None, tmp_path / "into")
    with pytest.raises(InputError, match="this layout"):
        importers.adapters(empty, "mttl", None, tmp_path / "into")


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder = library(tmp_path / "lib", {"one": (mttl_state(adapters.SHAPES), mttl_info("one"))})
    (folder / "one.meta").rename(tmp_path / "elsewhere.meta")
    (folder / "one.meta").symlink_to(tmp_path / "elsewhere.meta")
    with pytest.raises(SecurityError, match="leads out"):
        importers.adapters(folder, "auto", None, tmp_path / "into")


def test_names_become_slugs_and_do_not_replace_each_other(tmp_path: Path) -> None:
    experts = {name: (mttl_state(adapters.SHAPES, seed=n), mttl_info(name)) for n, name in enumerate(("A b", "a-B", "con"))}
    failures: dict[str, RecycleError] = {}
    made = importers.adapters(library(tmp_path / "lib", experts), "auto", None, tmp_path / "into", failures=failures)
    assert [path.name for path in made] == ["a-b"]
    assert importers.provenance(made[0])["expert"] == "A b"
    assert "there already" in str(failures["a-B"]) and isinstance(failures["con"], UsageError)


def _replace_pickle(file: Path, pickled: bytes) -> None:
    """Write a torch zip whose pickle is this one."""
    import zipfile

    with zipfile.ZipFile(file, "w") as writer:
        for name, data in {"a/data.pkl": pickled, "a/byteorder": b"little", "a/version": b"3\n"}.items():
            writer.writestr(name, data)
