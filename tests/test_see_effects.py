"""What an adapter was worth, computed again without this library: transformers' own model, the files' factors, plain hooks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from conftest import Pico
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM
from way import PROMPTS, Way

import recycler
from recycler.routed import RoutedModel
from recycler.seeing import explaining
from recycler.seeing.explaining import Explanation, explain
from recycler.zoo.errors import UsageError

NAMES = ("code", "law", "math")  # plain LoRA, one of them rsLoRA
PROMPT, ANSWER = "Add 1 to 🤖.\nمرحبا", " 日本"


@pytest.fixture(scope="module")
def zoo(world: Pico, tmp_path_factory: pytest.TempPathFactory) -> recycler.Zoo:
    made = recycler.Zoo(tmp_path_factory.mktemp("effects") / "zoo")
    recycler.fetch([world.adapters[name] for name in NAMES], base=world.base, zoo=made).raise_for_failures()
    return made


@pytest.fixture(scope="module", params=["uniform", "oracle", "ridge", "arrow"])
def model(request: pytest.FixtureRequest, world: Pico, zoo: recycler.Zoo) -> Iterator[RoutedModel]:
    """Routers that never decide, once a prompt, and at every token of every layer."""
    shots = None if request.param in ("uniform", "arrow") else recycler.Shots.from_files(*world.tasks[:3])
    profile = None if shots is None else recycler.profile(zoo, shots=shots, kshot=2)
    made = recycler.compose(zoo, recycler.build_router(request.param, profile, zoo=zoo))
    yield made
    made.engine.detach()


def factors(folder: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Module path → (A, B, scale), as PEFT defines them."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf8"))
    held = load_file(folder / "adapter_model.safetensors")
    rank = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    paths = {re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", key) for key in held}
    at = "base_model.model.{}.lora_{}.weight"
    return {
        path: (held[at.format(path, "A")], held[at.format(path, "B")], config["lora_alpha"] / rank) for path in sorted(paths)
    }


class Plain:
    """transformers' own model, with adapters added by hand."""

    def __init__(self, world: Pico) -> None:
        auto: Any = AutoModelForSeq2SeqLM if world.kind == "t5" else AutoModelForCausalLM
        self.base = auto.from_pretrained(world.base).eval()
        self.adapters = {name: factors(world.adapters[name]) for name in NAMES}

    @torch.no_grad()
    def logprobs(self, inputs: dict[str, Tensor], labels: list[int], weights: dict[str, Tensor]) -> Tensor:
        """Of the labels, the last tokens; weights by module path [T, E], in the order of NAMES."""
        with ExitStack() as stack:
            for path, module in self.base.named_modules():
                if path in weights:
                    stack.callback(module.register_forward_hook(self._adding(path, weights[path])).remove)
            logits_TV = self.base(**inputs).logits[0, -len(labels) :]
        return logits_TV.double().log_softmax(-1).gather(1, torch.tensor(labels)[:, None])[:, 0]

    def _adding(self, path: str, w_TE: Tensor) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], y_BTO: Tensor) -> Tensor:
            for e, name in enumerate(NAMES):
                if path in self.adapters[name]:
                    a_RD, b_OR, scale = self.adapters[name][path]
                    y_BTO = y_BTO + w_TE[None, :, e, None] * scale * (args[0] @ a_RD.T @ b_OR.T)
            return y_BTO

        return hook


def by_hand(plain: Plain, model: RoutedModel, found: Explanation, t5: bool) -> dict[str | None, Tensor]:
    """Log-probabilities with everybody (None), and without each, under the weights that the model itself says it used."""
    tokenizer = model.tokenizer
    asked = tokenizer(found.prompt).input_ids
    answered = [*tokenizer(found.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    if t5:
        inputs = {"input_ids": torch.tensor([asked]), "decoder_input_ids": torch.tensor([[0, *answered[:-1]]])}
    else:
        inputs = {"input_ids": torch.tensor([[*asked, *answered[:-1]]])}
    with model.planned({"input_ids": torch.tensor([asked]), "attention_mask": torch.ones(1, len(asked)).long()}):
        used = {path: w_BTE[0] for path, w_BTE in model.weights_for(inputs).sites.items()}
    result: dict[str | None, Tensor] = {}
    for out in (None, *NAMES):
        kept = torch.tensor([float(name != out) for name in NAMES])
        result[out] = plain.logprobs(inputs, answered, {path: w_TE * kept for path, w_TE in used.items()})
    return result


def test_effects_are_those_of_plain_forwards(world: Pico, model: RoutedModel) -> None:
    assert model.names == NAMES
    found = explain(model, PROMPT, ANSWER)
    expected = by_hand(Plain(world), model, found, world.kind == "t5")
    with_all = expected.pop(None)
    torch.testing.assert_close(found.routed_A, with_all, atol=1e-4, rtol=1e-4)
    assert set(found.fired) == (set(NAMES) if found.method != "oracle" else set(found.fired)) and found.fired
    for name in found.fired:
        torch.testing.assert_close(found.without[name], expected[name], atol=1e-4, rtol=1e-4)
        assert found.effect[name] == pytest.approx(float(with_all.sum() - expected[name].sum()), abs=1e-3)
    # Not small change that any computation would give: each takes away something of its own.
    assert all(abs(value) > 1e-2 for value in found.effect.values())
    plain = {name for name in NAMES if name not in found.fired}
    assert all(torch.allclose(expected[name], with_all) for name in plain)


def test_a_mixture_is_that_of_merged_weights(world: Pico, zoo: recycler.Zoo, model: RoutedModel) -> None:
    """The same without hooks: W + Σ w·scale·BA, in the file's own weights."""
    mixture = {"code": 0.2, "law": 0.5, "math": -0.3}
    with model.mixture(mixture):
        found = explain(model, PROMPT, ANSWER)
    answered = [*model.tokenizer(ANSWER, add_special_tokens=False).input_ids, model.tokenizer.eos_token_id]
    asked = model.tokenizer(PROMPT).input_ids
    for out in (None, *NAMES):
        plain = Plain(world)
        modules = dict(plain.base.named_modules())
        for name, weight in mixture.items():
            for path, (a_RD, b_OR, scale) in plain.adapters[name].items():
                modules[path].weight.data += (0 if name == out else weight) * scale * b_OR @ a_RD
        inputs = (
            {"input_ids": torch.tensor([asked]), "decoder_input_ids": torch.tensor([[0, *answered[:-1]]])}
            if world.kind == "t5" else {"input_ids": torch.tensor([[*asked, *answered[:-1]]])}
        )  # fmt: skip
        expected = plain.logprobs(inputs, answered, {})
        torch.testing.assert_close(found.routed_A if out is None else found.without[out], expected, atol=1e-4, rtol=1e-4)


def test_tables_show_the_largest_effects_too(way: Way) -> None:
    """A small share with a large effect is not cut off by large shares with none."""
    found = explain(recycler.load(way.folder), PROMPTS[0], max_new_tokens=3)
    assert found.chief(10) == found.fired and found.chief(0) == ()
    names = tuple(f"a{number}" for number in range(9))
    shares = torch.arange(9, 0, -1).float() / 45
    quiet = {name: found.routed_A.clone() for name in names}
    quiet["a8"] = quiet["a8"] - 5
    one = explaining.Explanation(
        **{**vars(found), "adapters": names, "without": quiet, "share_TE": shares.expand(len(found.tokens), -1)}
    )
    assert one.chief(3) == ("a0", "a1", "a8")


def test_an_answer_ends_where_the_context_does(tmp_path: Path) -> None:
    """No token is asked for at a position that the base does not have."""
    base = tmp_path / "llama"
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=2, max_position_embeddings=24, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ).save_pretrained(base)  # fmt: skip
    pico.tokenizer(eos_at_end=False).save_pretrained(base)
    adapter = pico.make_adapter(base, "math", {"r": 2, "target_modules": ["q_proj"]}, tmp_path)
    zoo = recycler.Zoo(tmp_path / "zoo")
    recycler.fetch([adapter], base=base, zoo=zoo).raise_for_failures()
    made = recycler.compose(zoo, recycler.build_router("uniform", zoo=zoo))
    found = explain(made, "x" * 20, max_new_tokens=64)
    assert found.begins == 20 and len(found.tokens) <= 24


def test_what_no_tokenizer_takes(way: Way) -> None:
    model = recycler.load(way.folder)
    for prompt, answer in (("a \udcff b", None), ("a", "\ud83d")):
        with pytest.raises(UsageError, match="cannot be used"):
            explain(model, prompt, answer)


def test_removals_are_counted(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for three hundred of them sees how far they are; where it is one forward there is no bar."""
    told: list[tuple[int, str]] = []
    steps: list[int] = []

    def progress(total: int, what: str) -> Any:
        told.append((total, what))
        return lambda count=1, note="": steps.append(count)

    model = recycler.load(way.folder)
    explain(model, PROMPTS[0], max_new_tokens=3, progress=progress)
    assert told == []
    monkeypatch.setattr(explaining, "_TOKENS", 1)
    found = explain(model, PROMPTS[0], max_new_tokens=3, progress=progress)
    assert told == [(len(found.fired) + 1, "without each")] and sum(steps) == len(found.fired) + 1
