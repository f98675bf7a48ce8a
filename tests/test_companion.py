"""The base pass and its second KV cache: cached decoding is what two full passes a token give, whatever is done to the cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache

import recycler
from recycler.base import load_base
from recycler.build import read_adapters
from recycler.companion import Paired
from recycler.profiles import Profile
from recycler.routed import RoutedModel
from recycler.routers.xlora import XLora, XLoraConfig
from recycler.scoring import Fitting
from recycler.zoo.errors import UsageError

NAMES = ("code", "law", "math", "poem")
TEXTS = ["Add 3 and b.", "Is 14 liable to e? It is not.", "def f(x)"]


def profile(pico: Pico) -> Profile:
    shots = recycler.Shots.from_files(*pico.tasks).sample(4)
    return Profile(NAMES, shots, torch.ones(5, len(shots), 4), assigned={name: (name,) for name in NAMES})


def routed(pico: Pico, **config: Any) -> RoutedModel:
    base = load_base(str(pico.base))
    model = RoutedModel(base, read_adapters(recycler.Zoo(pico.zoo), NAMES, base))
    model.use(XLora.fit(Fitting(model), profile(pico), XLoraConfig(**config)))
    return model


@pytest.fixture(scope="module")
def model(llama: Pico) -> RoutedModel:
    return routed(llama, layerwise=True, sharpness=40.0)


def prompts(model: RoutedModel, texts: list[str] = TEXTS, side: str = "left") -> dict[str, Tensor]:
    tokens = model.tokenizer(texts, return_tensors="pt", padding=True, padding_side=side)
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}


@torch.no_grad()
def two_passes(model: RoutedModel, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Logits of one forward without any cache, by hand: the bare base's states first, then the mixture that they give."""
    router = model.router
    assert router is not None
    inputs: dict[str, Any] = {"input_ids": ids_BT, "use_cache": False}
    if mask_BT is not None:
        inputs |= {"attention_mask": mask_BT, "position_ids": (mask_BT.cumsum(-1) - 1).clamp(min=0)}
    with model.disabled():
        states_BTH = model.base(**inputs, output_hidden_states=True).hidden_states[-1]
    plan = router.step(states_BTH, None)
    gates = {group.name: router.gate(group) for group in model.engine.groups}
    with model.mixture(lambda group, x: router.weights(gates[group.name](x, plan), group)):  # type: ignore[misc]
        return model.base(**inputs).logits  # type: ignore[no-any-return]


def near(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_a_forward_is_two_passes(model: RoutedModel) -> None:
    batch = prompts(model)
    mask = batch["attention_mask"].bool()
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        ours, bare = model(**batch, position_ids=positions, use_cache=False).logits, two_passes(model, **_named(batch))
        with model.disabled():
            base = model(**batch, position_ids=positions, use_cache=False).logits
    near(ours[mask], bare[mask])
    assert (ours - base)[mask].abs().max() > 1e-2


def _named(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"ids_BT": batch["input_ids"], "mask_BT": batch["attention_mask"]}


@torch.no_grad()
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=12)
def test_any_cut_into_forwards_is_one_forward(model: RoutedModel, lengths: list[int], seed: int) -> None:
    """Token by token, in one piece, or anything between."""
    torch.manual_seed(seed)
    ids_BT = torch.randint(3, 259, (2, sum(lengths)))
    whole = two_passes(model, ids_BT)
    cache, done, parts = None, 0, []
    for length in lengths:
        output = model(input_ids=ids_BT[:, done : done + length], past_key_values=cache, use_cache=True)
        cache, done = output.past_key_values, done + length
        parts.append(output.logits)
    near(torch.cat(parts, 1), whole)
    assert isinstance(cache, Paired) and cache.companion.get_seq_length() == ids_BT.shape[1]


@torch.no_grad()
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
    ],
    ids=["greedy", "beams", "returned", "static", "chunked"],
)
def test_generation_is_two_full_passes_a_token(model: RoutedModel, how: dict[str, Any]) -> None:
    """Left-padded batches; every step's logits against the whole sequence run again without a cache."""
    batch = prompts(model)
    made = model.generate(
        **batch, **how, do_sample=False, max_new_tokens=5, min_new_tokens=5, output_logits=True, return_dict_in_generate=True
    )
    plain = {k: v for k, v in how.items() if k not in ("cache_implementation", "prefill_chunk_size")}
    slow = model.generate(**batch, **plain, use_cache=False, do_sample=False, max_new_tokens=5, min_new_tokens=5)
    assert torch.equal(made.sequences, slow)
    if how.get("num_beams", 1) == 1:
        length = batch["input_ids"].shape[1]
        grown = torch.ones_like(made.sequences)
        grown[:, :length] = batch["attention_mask"]
        whole = two_passes(model, made.sequences, grown)
        near(torch.stack(made.logits, 1), whole[:, length - 1 : -1])


@torch.no_grad()
def test_a_static_cache_serves_one_generation_after_another(model: RoutedModel) -> None:
    """transformers keeps it and resets it."""
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    for texts in (TEXTS, list(reversed(TEXTS))):
        batch = prompts(model, texts)
        static = model.generate(**batch, **options, cache_implementation="static")
        assert torch.equal(static, model.generate(**batch, **options, use_cache=False))


@torch.no_grad()
def test_assisted_decoding_takes_tokens_back_from_both_caches(model: RoutedModel) -> None:
    batch = {k: v[:1, -8:] for k, v in prompts(model, ["abcabcabcabc"]).items()}
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10}
    assisted = model.generate(**batch, **options, prompt_lookup_num_tokens=3)
    assert torch.equal(assisted, model.generate(**batch, **options, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["reorder", "repeat", "select", "crop", "copy", "static"])
def test_what_is_done_to_the_cache_is_done_to_its_companion(model: RoutedModel, kind: str) -> None:
    torch.manual_seed(1)
    ids, new = torch.randint(3, 259, (3, 6)), torch.randint(3, 259, (6, 1))
    given = StaticCache(config=model.config, max_cache_len=12) if kind == "static" else DynamicCache(config=model.config)
    cache = model(input_ids=ids, past_key_values=given).past_key_values
    if kind == "reorder":
        order = torch.tensor([2, 0, 0])
        cache.reorder_cache(order)
        ids = ids[order]
    elif kind == "repeat":
        cache.batch_repeat_interleave(2)
        ids = ids.repeat_interleave(2, 0)
    elif kind == "select":
        cache.batch_select_indices(torch.tensor([1]))
        ids = ids[[1]]
    elif kind == "crop":
        cache.crop(-2)
        ids = ids[:, :-2]
    elif kind == "copy":
        kept = copy.deepcopy(cache)
        model(input_ids=new[:3], past_key_values=cache)
        cache = kept
    new = new[: len(ids)]
    cached = model(input_ids=new, past_key_values=cache).logits[:, -1]
    near(cached, two_passes(model, torch.cat([ids, new], 1))[:, -1])


@torch.no_grad()
def test_a_cache_filled_with_another_mixture_is_refused(model: RoutedModel) -> None:
    ids = prompts(model)["input_ids"]
    with model.only("math"):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(UsageError, match="not seen"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    routed = model(input_ids=ids, use_cache=True).past_key_values
    with model.disabled():
        model(input_ids=ids[:, :1], past_key_values=routed)
    with pytest.raises(UsageError, match="not seen"):
        model(input_ids=ids[:, :1], past_key_values=routed)
    assert model.engine.control.plan is None, "a refused forward leaves no plan behind"


@torch.no_grad()
def test_positional_inputs_tuples_and_labels(model: RoutedModel) -> None:
    ids = prompts(model, TEXTS[:1])["input_ids"]
    expected = two_passes(model, ids)
    near(model(ids).logits, expected)
    near(model(ids, return_dict=False)[0], expected)
    output = model(input_ids=ids, labels=ids, output_hidden_states=True)
    near(output.logits, expected)
    assert output.loss is not None
    tuple_cache = next(part for part in model(ids, return_dict=False, use_cache=True) if isinstance(part, DynamicCache))
    assert isinstance(tuple_cache, Paired)


@torch.no_grad()
def test_embeddings_instead_of_ids(model: RoutedModel) -> None:
    ids = prompts(model, TEXTS[:1])["input_ids"]
    near(model(inputs_embeds=model.base.get_input_embeddings()(ids)).logits, two_passes(model, ids))


def test_it_runs_where_the_router_decides_and_nowhere_else(llama: Pico) -> None:
    model = routed(llama)
    runs: list[int] = []
    handle = model.base.base_model.register_forward_hook(lambda *_: runs.append(1))
    ids = prompts(model)["input_ids"]

    def count(how: Any = None) -> int:
        runs.clear()
        with torch.no_grad():
            if how is None:
                model(input_ids=ids)
            else:
                with how:
                    model(input_ids=ids)
        return len(runs)

    assert (count(), count(model.only("law")), count(model.disabled())) == (2, 1, 1)
    router = model.router
    model.use(None)
    assert count(model.mixture({})) == 1
    model.use(router)
    assert count() == 2
    model.engine.detach()
    handle.remove()
    assert not model.base._forward_pre_hooks and not model.base._forward_hooks


@torch.no_grad()
def test_a_forward_that_fails_leaves_the_plan_as_it_was(model: RoutedModel) -> None:
    ids = prompts(model)["input_ids"]
    with pytest.raises(RuntimeError, match="on purpose"):
        handle = model.base.lm_head.register_forward_pre_hook(_fail)
        try:
            model(input_ids=ids)
        finally:
            handle.remove()
    assert model.engine.control.plan is None
    near(model(input_ids=ids[:1]).logits, two_passes(model, ids[:1]))


def _fail(*_: Any) -> None:
    raise RuntimeError("on purpose")


@torch.no_grad()
def test_frozen_runs_no_pass_beside_decoding(llama: Pico) -> None:
    """One decision at the prompt's last token, for prompt and answer; one pass for it, before the first forward."""
    model = routed(llama, frozen=True)
    batch = prompts(model)
    runs: list[int] = []
    handle = model.base.base_model.register_forward_hook(lambda *_: runs.append(1))
    cached = model.generate(**batch, do_sample=False, max_new_tokens=4, min_new_tokens=4)
    handle.remove()
    assert len(runs) == 1 + 4
    router = model.router
    assert isinstance(router, XLora)
    with model.disabled():
        last = model.base(
            **batch, position_ids=(batch["attention_mask"].cumsum(-1) - 1).clamp(min=0), output_hidden_states=True
        )
    scores = router.step(last.hidden_states[-1][:, -1:], None).input_BTLE
    assert scores is not None
    with model.mixture(router.weights(scores)[:, 0, 0]):
        assert torch.equal(model.base.generate(**batch, do_sample=False, max_new_tokens=4, min_new_tokens=4), cached)


def test_an_encoder_decoder_reads_its_encoder_once(t5: Pico, tmp_path: Path) -> None:
    model = routed(t5, layerwise=True)
    assert model.engine.companion is None
    batch = prompts(model, side="right")
    states_BTH, mask_BT = model.reading.states(batch)
    router = model.router
    assert isinstance(router, XLora)
    plan = router.prepare(model.reading, batch)
    assert plan.input_BTLE is not None and plan.target_BTLE is not None
    torch.testing.assert_close(plan.input_BTLE, router._scores(states_BTH))
    for row in range(len(TEXTS)):
        mean = states_BTH[row][mask_BT[row]].mean(0)
        torch.testing.assert_close(plan.target_BTLE[row, 0], router._scores(mean[None, None])[0, 0])
    with torch.no_grad():
        beams = model.generate(**batch, num_beams=3, do_sample=False, max_new_tokens=4, min_new_tokens=4)
        slow = model.generate(**batch, num_beams=3, do_sample=False, max_new_tokens=4, min_new_tokens=4, use_cache=False)
    assert torch.equal(beams, slow)
