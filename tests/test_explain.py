"""Explained answers: the numbers are those of forwards that anybody can run, and removing is what it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import Pico
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from way import PROMPTS, Way, never

import recycler
from recycler import Shots, scoring, text
from recycler.base import load_base
from recycler.build import read_adapters
from recycler.cli import main
from recycler.routed import RoutedModel
from recycler.routers.protocol import Group
from recycler.seeing import explaining
from recycler.seeing.explaining import Explanation, explain
from recycler.seeing.pieces import pieces
from recycler.shots import Shot
from recycler.zoo.errors import InputError, UsageError

PROMPT, ANSWER = PROMPTS[0], " héllo"


@pytest.fixture(scope="module")
def model(world: Pico) -> Iterator[RoutedModel]:
    zoo = recycler.Zoo(world.zoo)
    made = recycler.compose(zoo, recycler.build_router("arrow", zoo=zoo))
    yield made
    made.engine.detach()


def logprobs(model: RoutedModel, weights: Any = None, prompt: str = PROMPT, answer: str = ANSWER) -> Tensor:
    """Of the answer and its end, by the scorer that profiles use."""
    batch = text.encode(model.source, [[Shot(prompt, answer)]])
    with torch.no_grad():
        loss_BT = scoring.nll(model, batch, weights)
    return -loss_BT[0][batch.labels_BT[0] != text.IGNORE].double()


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5, check_dtype=False, equal_nan=True)


def test_log_probabilities_are_a_plain_forward_s(model: RoutedModel) -> None:
    found = explain(model, PROMPT, ANSWER)
    close(found.routed_A, logprobs(model))
    with model.disabled():
        close(found.base_A, logprobs(model))
    inputs = text.encode(model.source, [[Shot(PROMPT, ANSWER)]])
    with torch.no_grad(), model.planned(text.prompts(model.source, [[Shot(PROMPT, "")]])):
        logits_BTV = model(**inputs.inputs).logits
    labels_T = inputs.labels_BT[0]
    at = labels_T != text.IGNORE
    by_hand = logits_BTV[0].log_softmax(-1)[at].gather(1, labels_T[at][:, None]).sum()
    assert found.to_json()["logprob"]["routed"] == pytest.approx(float(by_hand), abs=1e-4)


def test_without_the_only_adapter_it_is_the_base(model: RoutedModel) -> None:
    with model.only("math"):
        found = explain(model, PROMPT, ANSWER)
    assert found.fired == ("math",) and found.method == "mixture" and found.why is None
    assert torch.equal(found.without["math"], found.base_A) and not torch.equal(found.routed_A, found.base_A)
    assert found.effect["math"] == float(found.routed_A.sum()) - float(found.base_A.sum())
    assert torch.equal(found.share_TE, torch.tensor([[0.0, 0, 1, 0]]).expand(len(found.tokens), -1))


def test_what_did_not_fire_is_not_removed(model: RoutedModel) -> None:
    with model.mixture({"math": 0.7, "law": 0.1}):
        found = explain(model, PROMPT, ANSWER)
        close(found.routed_A, logprobs(model, {"math": 0.7, "law": 0.1}))
    assert found.fired == ("math", "law") == tuple(found.effect)
    assert found.share == pytest.approx({"math": 0.7, "law": 0.1})
    assert found.base_share(0) == pytest.approx(0.2)
    # The other keeps its weight: nothing is renormalised.
    close(found.without["math"], logprobs(model, {"law": 0.1}))
    close(found.without["law"], logprobs(model, {"math": 0.7}))


def test_nothing_fires_in_the_bare_base(model: RoutedModel) -> None:
    with model.disabled():
        found = explain(model, PROMPT, ANSWER)
    assert found.method == "base" and found.fired == () and not found.share_TE.any() and found.layers == ()
    assert torch.equal(found.routed_A, found.base_A)
    assert found.to_json()["adapters"] == [] and {row["adapter"] for row in found.to_json()["tokens"]} == {None}


def test_an_adapter_that_changes_nothing_has_no_effect(llama: Pico, tmp_path: Path) -> None:
    """It fires with the others, and its update is next to nothing."""
    from safetensors.torch import load_file, save_file

    folder = pico.make_adapter(llama.base, "nothing", {"r": 2, "target_modules": ["q_proj"]}, tmp_path)
    file = folder / "adapter_model.safetensors"
    save_file({key: t * (1 if "lora_A" in key else 1e-20) for key, t in load_file(file).items()}, file)
    zoo = recycler.Zoo(tmp_path / "zoo")
    recycler.fetch([folder, llama.adapters["math"]], base=llama.base, zoo=zoo).raise_for_failures()
    made = recycler.compose(zoo, recycler.build_router("uniform", zoo=zoo))
    found = explain(made, PROMPT, ANSWER)
    assert set(found.fired) == {"math", "nothing"}
    assert found.effect["nothing"] == pytest.approx(0, abs=1e-5) and abs(found.effect["math"]) > 0.01


def test_weights_by_token_are_replayed_by_token(llama: Pico) -> None:
    zoo = recycler.Zoo(llama.zoo)
    made = recycler.compose(zoo, recycler.build_router("arrow", zoo=zoo))
    encoded = text.encode(made.source, [[Shot(PROMPT, ANSWER)]])
    length = encoded.inputs["input_ids"].shape[1]
    weights_BTE = torch.rand(1, length, len(made.names), generator=torch.manual_seed(0))
    with made.mixture(weights_BTE):
        found = explain(made, PROMPT, ANSWER)
    for e, name in enumerate(made.names):
        less_BTE = weights_BTE.clone()
        less_BTE[..., e] = 0
        close(found.without[name], logprobs(made, less_BTE))
    # A prompt's token has the weights it was read with, an answer's those of the token before it.
    close(found.share_TE[: found.begins], weights_BTE[0, : found.begins])
    close(found.share_TE[found.begins :], weights_BTE[0, found.begins - 1 :])


def by_name(names: tuple[str, ...]) -> Callable[[Group, Tensor], Tensor]:
    """Weights that depend on the token, the site and the adapter's name, and not on its number."""

    def weights(group: Group, x_BTD: Tensor) -> Tensor:
        columns = [torch.randn(group.width, generator=torch.manual_seed(sum(map(ord, name)))) for name in names]
        return (x_BTD.float() @ torch.stack(columns, -1)).softmax(-1)[:, :, None]

    return weights


def test_the_order_of_adapters_does_not_matter(world: Pico) -> None:
    base = load_base(str(world.base))
    found: list[Explanation] = []
    for names in (("code", "law", "math", "poem"), ("poem", "math", "code", "law")):
        made = RoutedModel(base, read_adapters(recycler.Zoo(world.zoo), names, base))
        with made.mixture(by_name(names)):
            found.append(explain(made, PROMPT, max_new_tokens=5))
        made.engine.detach()
    one, other = found
    assert one.fired == other.fired and one.tokens == other.tokens
    assert one.effect == pytest.approx(other.effect, abs=1e-4) and one.share == pytest.approx(other.share, abs=1e-5)
    order = [other.adapters.index(name) for name in one.adapters]
    close(one.share_LTE, other.share_LTE[..., order])


def test_shares_are_what_the_model_used(model: RoutedModel) -> None:
    """By token, by layer, and over all: against what `weights_for` records of the prompt."""
    found = explain(model, PROMPT, ANSWER)
    firing = model.weights_for(model.tokenizer(PROMPT, return_tensors="pt"))
    t5 = model.source.encoder_decoder
    reads = {site for group in model.engine.groups for site in group.sites if group.stream == "input"}
    close(found.share_TE[: found.begins], torch.stack([w[0] for site, w in firing.sites.items() if site in reads]).mean(0))
    assert found.layers == (("encoder 0", "encoder 1", "decoder 0", "decoder 1") if t5 else ("0", "1"))
    first = "encoder.block.0." if t5 else "model.layers.0."
    in_first = torch.stack([w[0] for site, w in firing.sites.items() if site.startswith(first)]).mean(0)
    close(found.share_LTE[0, : found.begins], in_first)
    close(found.share_LE[0], found.share_LTE[0].nanmean(0))
    assert found.share_LTE[0, found.begins :].isnan().all() == t5 and found.share_LTE[-1, found.begins :].isfinite().all()
    close(found.share_TE.sum(-1), torch.ones(len(found.tokens)))
    assert list(found.share.values()) == sorted(found.share.values(), reverse=True)


def test_the_answer_is_the_one_that_the_model_gives(model: RoutedModel) -> None:
    found = explain(model, PROMPT, max_new_tokens=7)
    [answered] = scoring.answer(model, [Shot(PROMPT, "")], max_new_tokens=7)
    assert found.answer == answered and len(found.tokens) - found.begins == len(found.routed_A) <= 7
    assert "".join(found.tokens[: found.begins]).removesuffix("</s>") == PROMPT
    given = explain(model, PROMPT, ANSWER)
    assert "".join(given.tokens[given.begins :]) == ANSWER + "</s>" and given.answer == ANSWER
    assert given.special[-1] and not any(given.special[given.begins : -1])


def test_an_empty_answer_is_the_end_alone(model: RoutedModel) -> None:
    found = explain(model, PROMPT, "")
    assert found.tokens[found.begins :] == ("</s>",) and found.answer == ""
    close(found.routed_A, logprobs(model, answer=""))


def test_many_adapters_take_several_forwards(model: RoutedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    one = explain(model, PROMPT, ANSWER)
    monkeypatch.setattr(explaining, "_TOKENS", 1)
    other = explain(model, PROMPT, ANSWER)
    assert one.fired == other.fired and len(one.fired) > 1
    for name in one.fired:
        close(one.without[name], other.without[name])
    close(one.base_A, other.base_A)


@pytest.mark.parametrize("options", [{"ranks": 2}, {"top_k": 1}, {"policy": "top_p", "p": 0.5}], ids=str)
def test_whatever_the_policy_the_replay_is_the_forward(world: Pico, options: dict[str, Any]) -> None:
    """Components are chosen as the router chooses them; paths may differ."""
    zoo = recycler.Zoo(world.zoo)
    made = recycler.compose(zoo, recycler.build_router("arrow", zoo=zoo, **options))
    found = explain(made, PROMPT, ANSWER)
    close(found.routed_A, logprobs(made))
    assert found.method == "arrow" and float(found.routed_A.sum()) != float(found.base_A.sum())


@pytest.mark.parametrize("options", [{"resident": "1MB"}, {"spare": 2}], ids=str)
def test_however_adapters_are_held(way: Way, options: dict[str, Any]) -> None:
    plain, other = (explain(recycler.load(way.folder, **how), PROMPT, max_new_tokens=4) for how in ({}, options))
    assert plain.tokens == other.tokens and plain.fired == other.fired
    assert plain.effect == pytest.approx(other.effect, abs=1e-4)


def test_routers_that_decide_once_say_why(way: Way) -> None:
    zoo = recycler.Zoo(way.pico.zoo)
    profile = recycler.profile(zoo, shots=Shots.from_files(*way.pico.tasks), kshot=3, out=way.profile.folder)
    made = recycler.compose(zoo, recycler.build_router("oracle", profile, zoo=zoo))
    task, owner = next(iter(profile.owner.items()))
    found = explain(made, PROMPT, ANSWER, task=task)
    assert found.fired == (owner,) and found.why is not None and found.to_json()["why"] == found.why
    assert torch.equal(found.without[owner], found.base_A)
    assert {found.owner(i) for i in range(len(found.tokens))} == {owner}
    with made.only(owner):
        close(explain(made, PROMPT, ANSWER).routed_A, found.routed_A)


def test_what_cannot_be_explained(model: RoutedModel) -> None:
    with pytest.raises(UsageError, match="it is empty"):
        explain(model, " \n")
    with pytest.raises(UsageError, match="max_new_tokens=0"):
        explain(model, PROMPT, max_new_tokens=0)
    if not model.source.encoder_decoder:
        with pytest.raises(InputError, match=r"The prompt has \d+ tokens. The base's context is"):
            explain(model, "a " * model.config.max_position_embeddings)
    assert recycler.explain is explain


# ------------------------------------------------------------------------------------------------------------------- pieces


@given(st.lists(st.integers(0, 258), max_size=24))
def test_pieces_together_are_the_text(ids: list[int]) -> None:
    tokenizer = TOKENIZER
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@given(st.text(max_size=12))
def test_a_character_is_its_last_byte_s(written: str) -> None:
    tokenizer = TOKENIZER
    ids = tokenizer(written.encode("utf8", "ignore").decode(), add_special_tokens=False).input_ids
    spoken = tokenizer.decode(ids)
    found = pieces(tokenizer, ids)
    assert "".join(found) == spoken
    if "\ufffd" not in spoken:
        assert [piece for piece in found if piece] == list(spoken)


TOKENIZER = pico.tokenizer(eos_at_end=False)


# ------------------------------------------------------------------------------------------------------------------ command


def recycle(*args: Any) -> Result:
    result = CliRunner().invoke(main, ["explain", *map(str, args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "\x1b" not in result.output
    return result


def test_the_command_prints_tables(way: Way) -> None:
    result = recycle(way.folder, "-p", PROMPT, "--max-new-tokens", 4)
    assert result.exit_code == 0, result.output
    tokens, layers, adapters, rest = result.stdout.split("\n\n")
    found = explain(recycler.load(way.folder), PROMPT, max_new_tokens=4)
    rows = [line.split("\t") for line in tokens.splitlines()]
    assert rows[0] == ["part", "token", "adapter", "share", "log p", "log p of the base"] and len(rows) == len(found.tokens) + 1
    assert [row[0] for row in rows[1:]] == ["prompt"] * found.begins + ["answer"] * (len(found.tokens) - found.begins)
    assert layers.splitlines()[0].split("\t") == ["layer", *found.fired]
    effects = {row[0]: float(row[3]) for row in (line.split("\t") for line in adapters.splitlines()[1:])}
    assert effects.pop("all of them") == pytest.approx(float(found.routed_A.sum() - found.base_A.sum()), abs=0.01)
    assert effects == pytest.approx(found.effect, abs=0.01) and rest == ""
    assert "in nats" in result.stderr


def test_json_is_the_library_s(way: Way) -> None:
    result = recycle(way.folder, "-p", PROMPT, "--answer", ANSWER, "--answer", " b", "--json")
    told = json.loads(result.stdout)
    assert set(told) == {"schema_version", "explanations"} and [one["answer"] for one in told["explanations"]] == [ANSWER, " b"]
    found = explain(recycler.load(way.folder), PROMPT, ANSWER)
    assert told["explanations"][0] == json.loads(json.dumps(found.to_json()))
    one = told["explanations"][0]
    assert set(one) == {"schema_version", "prompt", "answer", "method", "logprob", "adapters", "layers", "tokens"}
    assert set(one["adapters"][0]) == {"name", "share", "share_prompt", "share_answer", "effect", "logprob_without"}
    assert set(one["tokens"][0]) == {"text", "part", "special", "adapter", "shares"}
    assert set(one["tokens"][-1]) == {"text", "part", "special", "adapter", "shares", "logprob", "effects"}
    for adapter in one["adapters"]:
        without = one["logprob"]["routed"] - adapter["effect"]
        assert adapter["logprob_without"] == pytest.approx(without, abs=1e-5)
        assert adapter["effect"] == pytest.approx(
            sum(t["effects"][adapter["name"]] for t in one["tokens"] if "effects" in t), abs=1e-4
        )


def test_mistakes_are_said_before_the_model_is_loaded(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    assert recycle(way.folder, "-p", PROMPT, "--max-new-tokens", 2, "--html", page).exit_code == 0
    before = page.read_text(encoding="utf8")
    assert before.startswith("<!doctype html>") and list(tmp_path.iterdir()) == [page]
    with monkeypatch.context() as patch:
        patch.setattr("recycler.loading.load", lambda *args, **options: never())
        for args, message in (
            (["-p", PROMPT, "--html", page], "exists"),
            (["-p", PROMPT, "--html", tmp_path], "is a folder"),
            (["-p", "a", "-p", "b", "--answer", "c"], "-p was given 2 times, and --answer 1"),
            (["-p", " "], "it is empty"),
            ([], "--prompt"),
        ):
            result = recycle(way.folder, *args)
            assert result.exit_code == 2 and message in result.stderr, args
    assert page.read_text(encoding="utf8") == before
    assert recycle(way.folder, "-p", "b", "--max-new-tokens", 2, "--html", page, "--force").exit_code == 0
    assert page.read_text(encoding="utf8") != before
