"""Mixtures for servers that apply one adapter a request: found on prompts, written exactly, and chosen by the proxy."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico
from peft import PeftModel
from transformers import AutoModelForCausalLM
from way import PROMPTS, go, logits

import recycler
from recycler.exporting import comparing
from recycler.exporting.mixtures import share
from recycler.exporting.options import Option, asked_for
from recycler.exporting.proxy import Chooser
from recycler.routed import RoutedModel

ASKED = [*PROMPTS, "def f7(x): return x", "Is 14 liable to e?"]
SINGLE = [{"a": 1.0}, {"b": 1.0}, {"c": 1.0}, {"d": 1.0}, {}]


@pytest.fixture(scope="module")
def model(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> RoutedModel:
    """Ridge decides token by token, so that each prompt has a share of its own."""
    return recycler.load(go(llama, tmp_path_factory.mktemp("servers")).folder)


def read(done: recycler.Export) -> list[Option]:
    return [Option(**one) for one in done.facts["options"]]


# ---------------------------------------------------------------------------------------------------------- which are wanted


def test_the_mixture_that_shortens_the_way_most_comes_first() -> None:
    shares = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0.6, 0.4, 0, 0], [0, 0, 0.7, 0.3], [0, 1.0, 0, 0]])
    assert asked_for(shares, "abcd", SINGLE, 1) == [{"a": 0.5, "b": 0.5}]
    assert asked_for(shares, "abcd", SINGLE, 2)[1] == pytest.approx({"c": 0.7, "d": 0.3})
    every = asked_for(shares, "abcd", SINGLE, 9)
    assert len(every) == 3 and every[2] == pytest.approx({"a": 0.6, "b": 0.4})  # then all have what they want
    assert asked_for(shares, "abcd", [*SINGLE, *every], 9) == [] == asked_for(shares, "abcd", SINGLE, 0)


def test_a_mixture_joins_few_and_keeps_the_bases_part() -> None:
    """What is left out is given to the others in proportion; a part of the base's is no adapter's."""
    (found,) = asked_for(torch.tensor([[0.4, 0.2, 0.1, 0.1]]), "abcd", SINGLE, 1)
    assert (
        len(found) == 3 and sum(found.values()) == pytest.approx(0.8) and found["a"] == pytest.approx(2 * found["b"], rel=1e-5)
    )
    assert asked_for(torch.tensor([[0.95, 0.03, 0.02, 0.0]]), "abcd", SINGLE, 3) == []  # "a" alone is what it would be cut to
    (half,) = asked_for(torch.tensor([[0.6, 0.0, 0.0, 0.0]]), "abcd", SINGLE, 3)
    assert half == pytest.approx({"a": 0.6})
    (apart,) = asked_for(torch.tensor([[1.2, -0.4, 0.0, 0.0]]), "abcd", SINGLE, 1)
    assert apart == pytest.approx({"a": 1.2, "b": -0.4})
    assert asked_for(torch.zeros(2, 4), "abcd", SINGLE, 3) == []  # the base


# --------------------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("kind", ["vllm", "lorax"])
def test_mixtures_of_prompts_are_exact_adapters(model: RoutedModel, llama: Pico, tmp_path: Path, kind: str) -> None:
    bare = recycler.export(model, kind, tmp_path / "bare", prompts=ASKED)
    done = recycler.export(model, kind, tmp_path / "out", mean_of=ASKED, mixtures=3)
    mixed = [one for one in read(done) if one.name.startswith("mix-")]
    assert 1 <= len(mixed) <= 3 and all(2 <= len(one.weights) <= 3 for one in mixed)
    for one in mixed:
        folder = tmp_path / "out" / "adapters" / one.name
        theirs: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama.base), str(folder)).eval()
        theirs.tokenizer = model.tokenizer
        for prompt in PROMPTS:
            with model.mixture(one.weights):
                torch.testing.assert_close(logits(theirs, prompt), logits(model, prompt), rtol=1e-4, atol=1e-4)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["r"] <= done.facts["rank"] and not config["rank_pattern"] and not config["use_dora"]
    # A request's answer is nearer to the routed model's than with single adapters alone, and by what the report says.
    asked, near = {}, {}
    for name, export in (("bare", bare), ("out", done)):
        said = export.facts["differences"]
        assert said["from the adapters that requests get"]["max"] < 1e-4
        asked[name], near[name] = export.facts["chosen"], said["from the routed model"]["kl"]
    assert near["out"] < near["bare"] and not any(one.startswith("mix-") for one in asked["bare"])
    assert sum(count for one, count in asked["out"].items() if one.startswith("mix-")) >= len(mixed)
    lines = done.lines()
    assert f"4 adapters alone, {len(mixed)} mixture{'s' * (len(mixed) > 1)}; largest rank {done.facts['rank']}" in lines
    assert all(f"({one.name})" in " ".join(lines) + (tmp_path / "out" / "README.md").read_text() for one in mixed)
    if kind == "vllm":
        words = shlex.split(done.facts["serve"])
        named = dict(word.split("=") for word in words[words.index("--lora-modules") + 1 :])
        assert set(named) == {*model.names, *(one.name for one in mixed)} and all(Path(at).is_dir() for at in named.values())
        assert int(words[words.index("--max-lora-rank") + 1]) >= done.facts["rank"]


def test_the_proxy_chooses_them(model: RoutedModel, tmp_path: Path) -> None:
    done = recycler.export(model, "vllm", tmp_path / "out", mean_of=ASKED, mixtures=2)
    chooser = Chooser(recycler.load(tmp_path / "out" / "model"), read(done))
    picked = [chooser.choose({"prompt": prompt}).name for prompt in ASKED]
    assert {name: picked.count(name) for name in dict.fromkeys(picked)} == done.facts["chosen"]
    assert any(name.startswith("mix-") for name in picked)
    assert chooser.choose({"model": "mix-1", "prompt": "a"}).name == "mix-1"  # by name, too


def test_how_many(model: RoutedModel, tmp_path: Path) -> None:
    found = {}
    for count in (None, 8, 1, 0):
        done = recycler.export(model, "vllm", tmp_path / str(count), mean_of=ASKED, mixtures=count, prompts=ASKED[:1])
        found[count] = [one.name for one in read(done)]
    assert found[None] == found[8] and [len(found[count]) for count in (1, 0)] == [6, 5] and len(found[8]) > 6


def test_a_mixture_that_is_cut_says_so(model: RoutedModel, tmp_path: Path) -> None:
    done = recycler.export(model, "vllm", tmp_path / "out", mean_of=ASKED, mixtures=1, rank=2)
    assert 0 < done.facts["cut"]["mix-1"]["error"] < 1 and done.facts["rank"] == 2
    assert any(line.startswith("mix-1: ΔW with a relative error of") for line in done.lines())


def test_a_router_with_a_table_is_given_nothing_more(llama: Pico, tmp_path: Path) -> None:
    """Its own mixture is already what every prompt wants."""
    zoo = recycler.Zoo(llama.zoo)
    static = recycler.compose(zoo, recycler.build_router("uniform", zoo=zoo))
    done = recycler.export(static, "vllm", tmp_path / "out", mean_of=ASKED)
    assert [one.name for one in read(done)] == [*static.names, "mix-1", "base"]
    torch.testing.assert_close(share(static, comparing.inputs_of(static, comparing.DEFAULT)[0]), torch.full((4,), 0.25))


def test_names_like_a_mixtures_are_adapters(llama: Pico, tmp_path: Path) -> None:
    """An adapter may be called mix-1; the mixture gets another name."""
    zoo = recycler.Zoo(tmp_path / "zoo")
    sources = [llama.adapters["math"], llama.adapters["law"]]
    recycler.fetch(sources, base=llama.base, zoo=zoo, names=["mix-1", "mix-tape"]).raise_for_failures()
    own = recycler.compose(zoo, recycler.build_router("uniform", zoo=zoo))
    done = recycler.export(own, "vllm", tmp_path / "out", prompts=["a"])
    assert [one.name for one in read(done)] == ["mix-1", "mix-tape", "mix-2", "base"]
    assert "2 adapters alone, 1 mixture; largest rank" in done.lines()[0]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "(mix-2)" in card and "(mix-1)" not in card and "(mix-tape)" not in card


# ------------------------------------------------------------------------------------------------------------ where the base lies


def test_a_base_in_a_folder_is_named_by_its_whole_path(llama: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """serve.sh changes into its own folder, and adapters are loaded from anywhere."""
    shutil.copytree(llama.base, tmp_path / "ours")
    monkeypatch.chdir(tmp_path)
    zoo = recycler.Zoo("zoo")
    bare = [tmp_path / name for name in ("math", "law")]
    for folder in bare:
        shutil.copytree(llama.adapters[folder.name], folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "ours"}))
    recycler.fetch([str(folder) for folder in bare], base="ours", zoo=zoo).raise_for_failures()
    done = recycler.export(recycler.compose(zoo, recycler.build_router("uniform", zoo=zoo)), "vllm", "out", prompts=["a"])
    whole = str((tmp_path / "ours").resolve())
    assert shlex.split(done.facts["serve"])[2] == whole and shlex.quote(whole) in Path("out/serve.sh").read_text()
    assert json.loads(Path("out/adapters/law/adapter_config.json").read_text())["base_model_name_or_path"] == whole
    card = Path("out/README.md").read_text()
    assert "ours" not in card and str(tmp_path) not in card
