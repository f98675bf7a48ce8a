"""The export ladder: what other software loads answers as the routed model does, to rounding, or as far off as it says."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from click.testing import CliRunner
from conftest import Pico
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from way import logits

import recycler
from recycler.base import load_base
from recycler.build import read_adapters
from recycler.cli import main
from recycler.exporting import comparing
from recycler.exporting.comparing import difference
from recycler.exporting.mixtures import share
from recycler.exporting.options import Option, mixtures, nearest
from recycler.exporting.proxy import Chooser
from recycler.routed import RoutedModel
from recycler.routers.average import Average
from recycler.routers.classifier import Classifier, ClassifierConfig
from recycler.routers.merging import MergeConfig
from recycler.routers.oracle import Oracle, OracleConfig
from recycler.routers.xlora import XLora, XLoraConfig
from recycler.scoring import Fitting
from recycler.zoo.errors import InputError, UsageError

PLAIN = ("code", "law", "math")  # mixed ranks and targets, one rsLoRA; poem is DoRA, tilt has a bias of B
TILT = {"r": 5, "lora_alpha": 10, "target_modules": ["q_proj", "o_proj"], "lora_bias": True}
PROMPTS = ["Add 1 and b.", "O 3 of the long, long poem!"]


@pytest.fixture(scope="module")
def zoo(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> recycler.Zoo:
    """The pico zoo, and an adapter with a bias."""
    folder = tmp_path_factory.mktemp("tilted")
    tilt = pico.make_adapter(llama.base, "tilt", TILT, folder)
    made = recycler.Zoo(folder / "zoo")
    recycler.fetch([*llama.adapters.values(), tilt], base=llama.base, zoo=made).raise_for_failures()
    return made


@pytest.fixture(scope="module")
def routed(zoo: recycler.Zoo) -> RoutedModel:
    """Arrow over all of them: decides token by token."""
    return recycler.compose(zoo, recycler.build_router("arrow", zoo=zoo))


@pytest.fixture(scope="module")
def plain(zoo: recycler.Zoo) -> RoutedModel:
    """Arrow over those that are plain LoRA."""
    return recycler.compose(zoo, recycler.build_router("arrow", zoo=zoo, adapters=PLAIN))


def in_peft(base: Path, folder: Path) -> Any:
    """A fresh copy of the base, and the adapter on it, by PEFT alone."""
    auto: Any = AutoModelForSeq2SeqLM if "t5" in base.name else AutoModelForCausalLM
    return with_tokenizer(PeftModel.from_pretrained(auto.from_pretrained(base), folder).eval(), base)


def with_tokenizer(model: Any, base: Path) -> Any:
    model.tokenizer = AutoTokenizer.from_pretrained(base)
    return model


def same(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def mixed(model: RoutedModel, weights: dict[str, float], prompt: str = PROMPTS[0]) -> Tensor:
    with model.mixture(weights):
        return logits(model, prompt)


# ---------------------------------------------------------------------------------------------------------------- one adapter


def test_a_static_router_is_one_adapter(world: Pico, tmp_path: Path) -> None:
    """DoRA, rsLoRA, mixed ranks and targets together; nothing is lost, and the model that was exported is as it was."""
    zoo = recycler.Zoo(world.zoo)
    model = recycler.compose(zoo, recycler.build_router("uniform", zoo=zoo))
    before = [logits(model, prompt) for prompt in PROMPTS]
    modules, state = list(map(type, model.base.modules())), set(vars(model.base))
    done = recycler.export(model, "peft", tmp_path / "out")
    assert [torch.equal(logits(model, prompt), first) for prompt, first in zip(PROMPTS, before, strict=True)] == [True, True]
    assert list(map(type, model.base.modules())) == modules and set(vars(model.base)) == state
    theirs = in_peft(world.base, tmp_path / "out")
    for prompt, first in zip(PROMPTS, before, strict=True):
        same(logits(theirs, prompt), first)
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (
        facts == dict(done.facts)
        and facts["kind"] == "peft"
        and facts["mixture"]["weights"] == dict.fromkeys(model.names, 0.25)
    )
    assert list(facts["differences"]) == ["from the mixture itself"]  # which is the routed model
    assert facts["differences"]["from the mixture itself"]["max"] < 1e-5 and "cut" not in facts
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(name in card for name in model.names) and "Licences:" in card and str(tmp_path) not in card


def test_a_mixture_of_plain_adapters_has_the_sum_of_their_ranks(routed: RoutedModel, llama: Pico, tmp_path: Path) -> None:
    weights = {"math": 0.7, "law": -0.3}
    done = recycler.export(routed, "peft", tmp_path / "out", mixture=weights, prompts=PROMPTS)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    shapes = {key: list(tensor.shape) for key, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items()}
    assert not config["use_dora"] and shapes["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0] == 6
    assert shapes["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"][0] == 4
    theirs = in_peft(llama.base, tmp_path / "out")
    same(logits(theirs), mixed(routed, weights))
    assert [a["name"] for a in done.facts["adapters"]] == ["law", "math"]
    # Beside the routed model it is as far off as it says.
    prompts = [dict(routed.tokenizer(prompt, return_tensors="pt")) for prompt in PROMPTS]
    found = difference(comparing.logits(routed, prompts), comparing.logits(theirs, prompts))
    said = done.facts["differences"]["from the routed model"]
    assert found.max == pytest.approx(said["max"], rel=1e-3) and found.kl == pytest.approx(said["kl"], rel=1e-3)
    assert found.kl > 1e-3 and said["prompts"] == 2 and any("the routed model" in line for line in done.lines())


def test_ranks_add_up_to_no_more_than_a_linear_has(llama: Pico, tmp_path: Path) -> None:
    """As of hundreds of adapters: nothing is lost, and the file is no larger than need be."""
    wide = {"r": 24, "lora_alpha": 24, "target_modules": ["q_proj"]}
    zoo = recycler.Zoo(tmp_path / "zoo")
    for name in ("one", "two", "three"):
        recycler.fetch([pico.make_adapter(llama.base, name, wide, tmp_path)], base=llama.base, zoo=zoo).raise_for_failures()
    model = recycler.compose(zoo, recycler.build_router("uniform", zoo=zoo))
    done = recycler.export(model, "peft", tmp_path / "out")
    assert done.facts["ranks"] == [32, 32] and "cut" not in done.facts  # 72 in all, of a linear of 32 × 32
    weights = tmp_path / "out" / "adapter_model.safetensors"
    assert done.facts["bytes"] == weights.stat().st_size
    assert f"one adapter of rank 32, {weights.stat().st_size / 1e6:.1f} MB" in done.lines()
    same(logits(in_peft(llama.base, tmp_path / "out")), logits(model))


@pytest.mark.parametrize("names", [("tilt", "math"), ("tilt", "poem"), ("tilt", "poem", "law", "code")])
def test_biases_alone_and_beside_dora(routed: RoutedModel, llama: Pico, tmp_path: Path, names: tuple[str, ...]) -> None:
    """No adapter format has both, so that DoRA's part becomes plain, at full rank."""
    weights = {name: 1.5 / len(names) for name in names}
    done = recycler.export(routed, "peft", tmp_path / "out", mixture=weights)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_bias"] and not config["use_dora"] and ("converted" in done.facts) == ("poem" in names)
    same(logits(in_peft(llama.base, tmp_path / "out"), PROMPTS[1]), mixed(routed, weights, PROMPTS[1]))


def test_a_rank_is_cut_and_the_error_measured(plain: RoutedModel, zoo: recycler.Zoo, tmp_path: Path) -> None:
    weights = {"code": 0.5, "math": 0.5}
    done = recycler.export(plain, "peft", tmp_path / "out", mixture=weights, rank=3)
    assert done.facts["ranks"] == [3, 3] and done.facts["cut"]["rank"] == 3
    lost = total = 0.0
    for site in zoo["code"].sites:
        delta = sum(0.5 * zoo[n].sites[site].b_OR @ zoo[n].sites[site].a_RD for n in weights if site in zoo[n].sites)
        assert isinstance(delta, Tensor)
        squares = torch.linalg.svdvals(delta.double()) ** 2
        lost, total = lost + float(squares[3:].sum()), total + float(squares.sum())
    assert done.facts["cut"]["error"] == pytest.approx(math.sqrt(lost / total), rel=1e-3)
    assert done.facts["differences"]["from the mixture itself"]["max"] > 1e-2
    assert any("relative error" in line for line in done.lines())


def test_the_mean_share_on_prompts(world: Pico, tmp_path: Path) -> None:
    zoo = recycler.Zoo(world.zoo)
    routed = recycler.compose(zoo, recycler.build_router("arrow", zoo=zoo))
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    done = recycler.export(routed, "peft", tmp_path / "out", mean_of=file)
    shares = [routed.weights_for(routed.tokenizer(prompt, return_tensors="pt")).share()[0] for prompt in PROMPTS]
    expected = torch.stack(shares).mean(0)
    found = done.facts["mixture"]["weights"]
    torch.testing.assert_close(torch.tensor([found.get(name, 0.0) for name in routed.names]), expected, rtol=1e-4, atol=1e-5)
    assert "2 prompts" in done.facts["mixture"]["how"] and done.facts["differences"]["from the routed model"]["prompts"] == 2


# ------------------------------------------------------------------------------------------------------------- merged weights


def test_merged_weights_are_a_model_of_their_own(world: Pico, tmp_path: Path) -> None:
    zoo = recycler.Zoo(world.zoo)
    model = recycler.compose(zoo, recycler.build_router("uniform", zoo=zoo))
    before = {key: tensor.clone() for key, tensor in model.base.state_dict().items()}
    expected = [logits(model, prompt) for prompt in PROMPTS]
    recycler.export(model, "merged", tmp_path / "out")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.base.state_dict().items())
    auto: Any = AutoModelForSeq2SeqLM if world.kind == "t5" else AutoModelForCausalLM
    theirs = with_tokenizer(auto.from_pretrained(tmp_path / "out").eval(), tmp_path / "out")
    for prompt, first in zip(PROMPTS, expected, strict=True):
        same(logits(theirs, prompt), first)
    assert theirs.generation_config.to_dict() == model.base.generation_config.to_dict()
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "export.json"} <= held
    kept = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert kept == json.loads((world.base / "tokenizer.json").read_text())


def routed_in_fp32(zoo: recycler.Zoo) -> RoutedModel:
    return recycler.compose(zoo, recycler.build_router("arrow", zoo=zoo, adapters=["math"]))


def test_merging_rounds_once_to_the_bases_dtype(llama: Pico, zoo: recycler.Zoo, tmp_path: Path) -> None:
    base = load_base(str(llama.base), dtype="bfloat16")
    model = recycler.compose(zoo, recycler.build_router("arrow", zoo=zoo, adapters=PLAIN), base=base)
    done = recycler.export(model, "merged", tmp_path / "out", mixture={"math": 1.0})
    assert done.facts["dtype"] == "bfloat16" and 0 < done.facts["differences"]["from the mixture itself"]["max"] < 0.5
    site = "model.layers.1.mlp.up_proj"
    factors = zoo["math"].sites[site]
    exact = base.model.get_submodule(site).weight.double() + factors.b_OR.double() @ factors.a_RD.double()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written[f"{site}.weight"], exact.to(torch.bfloat16))
    untouched = "model.layers.1.input_layernorm.weight"
    assert torch.equal(written[untouched], base.model.state_dict()[untouched])
    # What that does to the update is measured, and said; and the weights are the base's too, with a licence of its own.
    lost = exact.to(torch.bfloat16).double() - exact
    rounding, update = done.facts["rounding"], factors.b_OR.double() @ factors.a_RD.double()
    assert 0 < rounding["error"] <= rounding["worst"][1] and float(lost.norm() / update.norm()) <= rounding["worst"][1] * 1.001
    assert any(line.startswith("rounded to bfloat16: ΔW with a relative error of ") for line in done.lines())
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "- rounding to bfloat16: " in readme and "license: mit" not in readme
    whole = recycler.export(routed_in_fp32(zoo), "merged", tmp_path / "fp32", mixture={"math": 1.0})
    assert whole.facts["rounding"]["error"] < 1e-5


def test_what_cannot_be_merged(routed: RoutedModel, llama: Pico, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"q_proj has no bias.*--to peft"):
        recycler.export(routed, "merged", tmp_path / "out", mixture={"tilt": 1.0})
    base = load_base(str(llama.base))
    model = RoutedModel(base, read_adapters(recycler.Zoo(llama.zoo), ["math"], base))
    linear = base.model.get_submodule("model.layers.0.self_attn.q_proj")
    kept, other = linear.weight, base.model.get_submodule("model.layers.1.self_attn.q_proj")
    other.weight = kept
    with pytest.raises(UsageError, match="shared with another module"):
        recycler.export(model, "merged", tmp_path / "out", mixture={"math": 1.0})
    other.weight = torch.nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UsageError, match="quantised"):
        recycler.export(model, "merged", tmp_path / "out", mixture={"math": 1.0})
    base.model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UsageError, match="The base is quantised"):
        recycler.export(model, "merged", tmp_path / "out", mixture={"math": 1.0})
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------------------- X-LoRA


def x_lora(zoo: recycler.Zoo, llama: Pico, names: tuple[str, ...] = PLAIN, **options: Any) -> RoutedModel:
    """A classifier of random weights, sharp enough to tell tokens apart."""
    base = load_base(str(llama.base))
    fitting = Fitting(RoutedModel(base, read_adapters(zoo, names, base)))
    shots = recycler.Shots.from_files(*llama.tasks).sample(2)
    scores = torch.ones(len(names) + 1, len(shots), 2)
    profile = recycler.Profile(names, shots, scores, assigned={name: (name,) for name in names if name in shots})
    given = {"normalise": False, "init": "random", "steps": 1, "rows": 2, "chains": 0, **options}
    router = XLora.fit(fitting, profile, XLoraConfig(**given))
    torch.manual_seed(1)
    router.trunk = [(torch.randn_like(w) * 0.5, torch.randn_like(b)) for w, b in router.trunk]
    router.heads = {name: (torch.randn_like(w) * 0.5, torch.randn_like(b)) for name, (w, b) in sorted(router.heads.items())}
    fitting.model.engine.detach()
    return recycler.compose(zoo, router)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": None, "temperature": 0.5},
        {"top_k": None, "layerwise": True},
        {"top_k": 2, "depth": 3, "size": 16, "layerwise": True},
        {"top_k": 2, "renormalise": False, "temperature": 2.0},
    ],
    ids=["plain", "layerwise", "deep, softmax after top-k", "top-k"],
)
def test_x_lora_is_pefts(zoo: recycler.Zoo, llama: Pico, tmp_path: Path, options: dict[str, Any]) -> None:
    """Adapters of different ranks and targets; PEFT alone loads the folder where it came to lie."""
    model = x_lora(zoo, llama, **options)
    done = recycler.export(model, "xlora", tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(llama.base)
    base.config.use_cache = False
    theirs = with_tokenizer(PeftModel.from_pretrained(base, tmp_path / "out").eval(), llama.base)
    for prompt in PROMPTS:
        same(logits(theirs, prompt), logits(model, prompt))
        assert (mixed(model, dict.fromkeys(PLAIN, 1 / 3), prompt) - logits(model, prompt)).abs().max() > 1e-2
    assert done.facts["called"] == {str(e): name for e, name in enumerate(PLAIN)}
    assert model.base.config.use_cache  # put back


def test_other_routers_are_not_x_lora(zoo: recycler.Zoo, llama: Pico, plain: RoutedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="The router is arrow, not xlora"):
        recycler.export(plain, "xlora", tmp_path / "out")
    for options, says in (
        ({"normalise": True}, r"reads LN\(H\).*-o normalise=false"),
        ({"frozen": True, "policy": "top_p"}, "decides once a prompt; its policy is top_p"),
        ({"ranks": 2, "standardise": 1.0}, "scores are standardised; it chooses components"),
    ):
        with pytest.raises(InputError, match=says):
            recycler.export(x_lora(zoo, llama, **options), "xlora", tmp_path / "out")
    with pytest.raises(InputError, match=r"poem has DoRA.*tilt has a bias"):
        recycler.export(x_lora(zoo, llama, ("math", "poem", "tilt")), "xlora", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------------------------- servers


def test_adapters_for_vllm(zoo: recycler.Zoo, llama: Pico, tmp_path: Path) -> None:
    """No DoRA, one rank at all sites, nothing in patterns: and each, in PEFT, is the adapter that it was."""
    names = ("code", "law", "math", "poem")
    model = recycler.compose(zoo, recycler.build_router("arrow", zoo=zoo, adapters=names))
    done = recycler.export(model, "vllm", tmp_path / "out")
    for name in names:
        config = json.loads((tmp_path / "out" / "adapters" / name / "adapter_config.json").read_text())
        ranks = {
            tensor.shape[0]
            for key, tensor in load_file(tmp_path / "out" / "adapters" / name / "adapter_model.safetensors").items()
            if "lora_A" in key
        }
        assert ranks == {config["r"]} and config["lora_alpha"] == config["r"] and not config["rank_pattern"]
        assert not (config["use_dora"] or config["use_rslora"] or config["lora_bias"] or config.get("modules_to_save"))
        same(logits(in_peft(llama.base, tmp_path / "out" / "adapters" / name)), mixed(model, {name: 1.0}))
    words = shlex.split(done.facts["serve"])
    assert words[:3] == ["vllm", "serve", str(llama.base)] and words[words.index("--max-lora-rank") + 1] == "32"
    assert words[words.index("--lora-modules") + 1 :] == [f"{name}={tmp_path / 'out' / 'adapters' / name}" for name in names]
    assert "adapters/poem" in (tmp_path / "out" / "serve.sh").read_text() and done.facts["cut"] == {}
    assert recycler.load(tmp_path / "out" / "model").names == names
    # What is lost is what the nearest single adapter loses.
    prompts = comparing.inputs_of(model, comparing.DEFAULT)
    options = [Option(one["name"], one["weights"], one["model"]) for one in done.facts["options"]]
    single, whole = [], comparing.logits(model, prompts)
    for inputs in prompts:
        with model.mixture(nearest(share(model, inputs), model.names, options)[0].weights):
            single += comparing.logits(model, [inputs])
    assert done.facts["differences"]["from the routed model"]["kl"] == pytest.approx(difference(whole, single).kl, rel=1e-2)


def test_what_a_server_cannot_have(zoo: recycler.Zoo, routed: RoutedModel, t5: Pico, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tilt has a bias of B, which vllm does not add.*--remove tilt"):
        recycler.export(routed, "vllm", tmp_path / "out")
    theirs = recycler.Zoo(t5.zoo)
    other = recycler.compose(theirs, recycler.build_router("uniform", zoo=theirs))
    with pytest.raises(InputError, match="encoder–decoder"):
        recycler.export(other, "lorax", tmp_path / "out")
    base = load_base(str(t5.base))
    with pytest.raises(UsageError, match="no router"):
        recycler.export(RoutedModel(base, read_adapters(theirs, ["math"], base)), "vllm", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_cut_for_a_server(zoo: recycler.Zoo, tmp_path: Path) -> None:
    model = recycler.compose(zoo, recycler.build_router("average", zoo=zoo, adapters=["math", "poem"]))
    done = recycler.export(model, "lorax", tmp_path / "out", rank=4)
    assert set(done.facts["cut"]) == {"poem", "mix-1"} and done.facts["rank"] == 4  # math has no more
    assert 0 < done.facts["cut"]["poem"]["error"] < 1 and done.facts["chosen"] == {"mix-1": 8}
    models = {one["name"]: one["model"] for one in done.facts["options"]}
    assert models == {n: str(tmp_path / "out" / "adapters" / n) for n in ("math", "poem", "mix-1")} | {"base": ""}
    assert shlex.split(done.facts["serve"])[0] == "lorax-launcher"


def test_a_router_with_a_table_loses_nothing(zoo: recycler.Zoo, llama: Pico, tmp_path: Path) -> None:
    """Its rows are adapters of their own, and each prompt gets the one that it would have had; by the proxy's reading, too."""
    base = load_base(str(llama.base))
    fitting = Fitting(RoutedModel(base, read_adapters(zoo, PLAIN, base)))
    shots = recycler.Shots.from_files(*llama.tasks).sample(3)
    profile = recycler.Profile(PLAIN, shots, torch.ones(4, 4, 3), assigned={name: (name,) for name in PLAIN})
    router = Classifier.fit(fitting, profile, ClassifierConfig(mix=1, sure=0.0, unknown=0.0, state=0.0, words=0.0))
    router.table_CE = torch.tensor(
        [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.5, 0.2, 0.3]]
    )  # code, law, math, poem
    fitting.model.engine.detach()
    done = recycler.export(recycler.compose(zoo, router), "vllm", tmp_path / "out", prompts=PROMPTS)
    assert done.facts["chosen"] == {"mix-1": 1, "mix-2": 1} and done.differences["the routed model"].max < 1e-4
    assert any("code 0.5, math 0.3, law 0.2 (mix-2)" in line for line in done.lines())
    assert any(line.strip() == f"sh {done.folder / 'serve.sh'}" for line in done.lines())
    assert "(mix-2)" in (tmp_path / "out" / "README.md").read_text()
    chooser = Chooser(recycler.load(tmp_path / "out" / "model"), [Option(**one) for one in done.facts["options"]])
    assert [chooser.choose({"prompt": prompt}).name for prompt in PROMPTS] == ["mix-1", "mix-2"]


def test_mixtures_of_a_table() -> None:
    router = Oracle(("a", "b", "c"), OracleConfig())
    router.table_CE = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0, 0], [0.5, 0.5, 0], [0, 0.3, 0.7]])
    assert mixtures(router) == [{"a": 0.5, "b": 0.5}, {"b": pytest.approx(0.3), "c": pytest.approx(0.7)}]
    router.friends_CC = torch.eye(5, dtype=torch.bool)  # as a classifier's
    router.friends_CC[0, 1] = router.friends_CC[1, 0] = True
    assert mixtures(router)[-1] == {"a": 0.75, "b": 0.25}
    static = Average(("a", "b"), MergeConfig())
    static.weights_E = torch.tensor([0.0, 1.0])
    assert mixtures(static) == []


@pytest.mark.parametrize(
    "weights, expected",
    [
        ((0.9, 0.1), "a"), ((0.1, 0.8), "b"), ((0.1, 0.2), "base"), ((0.0, 0.0), "base"), ((0.52, 0.48), "mix-1"),
        ((0.3, 0.4), "mix-1"), ((0.4, 0.0), "base"), ((0.5, 0.0), "a"), ((1.0, -0.2), "a"),
    ],
)  # fmt: skip
def test_the_nearest_option(weights: tuple[float, float], expected: str) -> None:
    """The largest share, the base's included, or a mixture that is nearer."""
    options = [
        Option("a", {"a": 1.0}, "a"),
        Option("b", {"b": 1.0}, "b"),
        Option("mix-1", {"a": 0.5, "b": 0.5}, "m"),
        Option("base", {}, ""),
    ]
    assert nearest(torch.tensor(weights), ("a", "b"), options)[0].name == expected


# ----------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "to, options, says",
    [
        ("gguf", {}, "no export to 'gguf'"),
        ("peft", {}, "arrow decides by the input.*--mean-of"),
        ("peft", {"mixture": {"prose": 1.0}}, "no adapter prose"),
        ("peft", {"mixture": {"math": math.nan}}, "finite"),
        ("peft", {"mixture": {"math": 0.0}}, "Every weight of this mixture is 0"),
        ("peft", {"mixture": {"math": 1.0}, "mean_of": PROMPTS}, "exclude each other"),
        ("peft", {"mixture": {"math": 1.0}, "rank": 0}, "rank of 0"),
        ("vllm", {"mixture": {"math": 1.0}}, "--mixture does not go with --to vllm"),
        ("xlora", {"mean_of": PROMPTS}, "--mean-of does not go with --to xlora"),
        ("merged", {"mixture": {"math": 1.0}, "rank": 4}, "--rank does not go with --to merged"),
        ("merged", {"mixture": {"math": 1.0}, "mixtures": 4}, "--mixtures does not go with --to merged"),
        ("vllm", {"mixtures": 4}, "--mixtures needs prompts"),
        ("vllm", {"rank": 513}, "ranks of 1 to 512"),
        ("peft", {"mixture": {"math": 1.0}, "prompts": "none.jsonl"}, "no file none.jsonl"),
        ("peft", {"mixture": {"math": 1.0}, "base": "org/base"}, "loaded already"),
    ],
)
def test_calls_that_are_off(plain: RoutedModel, tmp_path: Path, to: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        recycler.export(plain, to, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_prompts_that_are_none(plain: RoutedModel, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(InputError, match="1 prompts cannot be used"):
        recycler.export(plain, "peft", tmp_path / "out", mean_of=file)
    with pytest.raises(InputError, match="no prompts"):
        recycler.export(plain, "peft", tmp_path / "out", mean_of=[])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl"]


@pytest.mark.parametrize("to", ["peft", "merged", "vllm"])
def test_what_answers_otherwise_is_not_kept(zoo: recycler.Zoo, tmp_path: Path, to: str) -> None:
    """As where an adapter's files are others by now than those in memory."""
    model = recycler.compose(zoo, recycler.build_router("uniform", zoo=zoo, adapters=["math", "poem"]))
    model.folders["math"] = zoo.folder("code")
    with pytest.raises(InputError, match=f"The export as {to} does not answer as the mixture it was made of: logits differ"):
        recycler.export(model, to, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_only_exports_are_replaced(plain: RoutedModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    recycler.export(plain, "peft", out, mixture={"math": 1.0})
    with pytest.raises(UsageError, match="not empty"):
        recycler.export(plain, "peft", out, mixture={"math": 1.0})
    recycler.export(plain, "vllm", out, force=True)
    assert not (out / "adapter_config.json").exists() and (out / "serve.sh").exists()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"beside it notes\.txt"):
        recycler.export(plain, "peft", out, mixture={"math": 1.0}, force=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("mine")
    with pytest.raises(UsageError, match="something else than an export"):
        recycler.export(plain, "peft", tmp_path / "other", mixture={"math": 1.0}, force=True)
    with pytest.raises(UsageError, match="is a file"):
        recycler.export(plain, "peft", out / "notes.txt", mixture={"math": 1.0}, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


# --------------------------------------------------------------------------------------------------------------- command line


def recycle(*args: Any) -> Any:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_the_command(plain: RoutedModel, llama: Pico, tmp_path: Path) -> None:
    folder = plain.save_pretrained(tmp_path / "model")
    done = recycle("export", folder, "--to", "peft", "--out", tmp_path / "a", "--mixture", "math=0.5, law=0.5")
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "a"), done.stderr
    assert "mixture: law 0.5, math 0.5 (given)" in done.stderr and "beside the routed model: logits differ by" in done.stderr
    same(logits(in_peft(llama.base, tmp_path / "a")), mixed(plain, {"math": 0.5, "law": 0.5}))
    done = recycle("export", folder, "--to", "vllm", "--out", tmp_path / "v", "--json", "--prompts", llama.tasks[0])
    said = json.loads(done.stdout)
    assert said["schema_version"] == 1 and said["kind"] == "vllm" and said["folder"] == str(tmp_path / "v")
    assert recycle("export", folder, "--to", "vllm", "--out", tmp_path / "v").exit_code == 2
    wrong = recycle("export", folder, "--to", "peft", "--out", tmp_path / "b", "--mixture", "math")
    assert wrong.exit_code == 2 and "'math' is no weight" in wrong.stderr
    assert recycle("export", tmp_path / "none", "--to", "peft", "--out", tmp_path / "b", "--mixture", "math=1").exit_code == 3
    assert not (tmp_path / "b").exists()
