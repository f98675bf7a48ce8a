"""What every router promises, on a causal model and an encoder–decoder, with adapters of different ranks, targets and kinds.

A new file in routers/ is tested here on arrival; nothing needs to be registered.
"""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import recycler
from recycler.base import Base, load_base
from recycler.build import read_adapters
from recycler.profiles import Profile
from recycler.routed import RoutedModel
from recycler.routers.base import Router
from recycler.routers.discovery import load_router, methods

METHODS = sorted(methods())
FAST: dict[str, dict[str, Any]] = {  # the same code, fewer steps; and options at which one adapter is itself
    "phatgoose": {"steps": 4, "rows": 8},
    "dare": {"density": 1.0},
    "glider": {"local_options": "steps=4,rows=8"},
    "lorahub": {"budget": 5, "seeds": 1, "rows": 4},
    "magnitude_prune": {"density": 1.0},
    "ties": {"density": 1.0},
}
TEXTS = ["Add 3 and b.", "Is 14 liable to e? It is not.", "def f(x)"]


_PROFILES: dict[str, Profile] = {}
_ROUTERS: dict[Any, Router] = {}


def profile_of(world: Pico) -> Profile:
    if world.kind not in _PROFILES:
        _PROFILES[world.kind] = _profile(world)
    return _PROFILES[world.kind]


def _profile(world: Pico) -> Profile:
    # Random adapters have no tasks of their own; two that shared one would tie exactly, and ties are cut by position.
    own = {name: [name] for name in world.adapters}
    shots = recycler.Shots.from_files(*world.tasks)
    return recycler.profile(recycler.Zoo(world.zoo), shots, kshot=4, dtype="float32", assign=own)


def router_of(world: Pico, method: str, adapters: tuple[str, ...] | None = None) -> Router:
    key = (world.kind, method, adapters)
    if key not in _ROUTERS:
        zoo = recycler.Zoo(world.zoo)
        _ROUTERS[key] = recycler.build_router(method, profile_of(world), zoo=zoo, adapters=adapters, **FAST.get(method, {}))
    return _ROUTERS[key]


def routed(world: Pico, method: str, adapters: tuple[str, ...] | None = None) -> RoutedModel:
    return recycler.compose(recycler.Zoo(world.zoo), router_of(world, method, adapters))


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def inputs(model: RoutedModel, texts: list[str], side: str = "left") -> dict[str, torch.Tensor]:
    tokens = model.tokenizer(texts, return_tensors="pt", padding=True, padding_side=side)
    made = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    if model.source.encoder_decoder:
        made["decoder_input_ids"] = torch.tensor([[0, 70, 71, 72]]).repeat(len(texts), 1)
    return made


@torch.no_grad()
def logits(model: RoutedModel, texts: list[str], side: str = "left") -> list[torch.Tensor]:
    """Logits [T, V] of each text's own tokens."""
    batch = inputs(model, texts, side)
    out = model(**batch).logits
    if model.source.encoder_decoder:
        return list(out)
    return [row[mask.bool()] for row, mask in zip(out, batch["attention_mask"], strict=True)]


def close(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float = 2e-5) -> None:
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(one.abs().max()))


def digest(module: torch.nn.Module) -> str:
    state = hashlib.sha256()
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        state.update(name.encode() + tensor.detach().numpy().tobytes())
    return state.hexdigest()


def reference(world: Pico, name: str) -> RoutedModel | Any:
    auto: Any = AutoModelForSeq2SeqLM if world.kind == "t5" else AutoModelForCausalLM
    return PeftModel.from_pretrained(auto.from_pretrained(world.base), world.adapters[name]).eval()


# ------------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("name", ["math", "law", "code", "poem"])
def test_a_router_over_one_adapter_is_that_adapter(world: Pico, method: str, name: str) -> None:
    """Weight 1 everywhere: the output is PEFT's own, LoRA, rsLoRA and DoRA alike."""
    model = routed(world, method, (name,))
    batch = inputs(model, TEXTS)
    free = methods()[method].abstains or not methods()[method].simplex  # it may give a lone adapter another weight than 1
    with torch.no_grad(), model.only(model.names[0]) if free else nullcontext():
        ours, theirs = model(**batch).logits, reference(world, name)(**batch).logits
        with model.disabled():
            bare = model(**batch).logits
    mask = torch.ones(ours.shape[:2], dtype=torch.bool) if world.kind == "t5" else batch["attention_mask"].bool()
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    assert (ours - bare)[mask].abs().max() > 1e-2  # the adapter does something


def test_weights_of_zero_are_the_base(world: Pico, method: str) -> None:
    model = routed(world, method)
    expected = logits(RoutedModel(load_base(str(world.base)), []), TEXTS)
    with model.mixture({}):
        close(logits(model, TEXTS), expected, 1e-6)
    with model.disabled():
        close(logits(model, TEXTS), expected, 0)
    model.engine.detach()
    close(logits(model, TEXTS), expected, 0)


def test_weights_are_a_mixture(world: Pico, method: str) -> None:
    model, cls = routed(world, method), methods()[method]
    firing = model.weights_for(inputs(model, TEXTS))
    assert set(firing.sites) == set(model.sites)
    for site, w_BTE in firing.sites.items():
        assert torch.isfinite(w_BTE).all(), site
        assert not cls.simplex or ((w_BTE >= 0).all() and (w_BTE.sum(-1) <= 1 + 1e-5).all()), site
    if cls.simplex and not cls.abstains:
        assert torch.allclose(firing.share().sum(-1), torch.ones(len(TEXTS)), atol=1e-4)


def test_the_gate_of_a_group_agrees_with_score(world: Pico, method: str) -> None:
    router, model = router_of(world, method), routed(world, method)
    plan = router.prepare(model.reading, inputs(model, TEXTS[:2]))
    if router.base_pass:
        plan = router.step(torch.randn(2, 5, model.reading.width), plan)
    torch.manual_seed(0)
    for group in model.engine.groups:
        gate = router.gate(group)
        if gate is None:
            assert group.after is not None
            continue
        x_BTD = torch.randn(2, 5, group.width)
        scores = gate(x_BTD, plan).expand(2, 5, len(group.sites), len(router.adapters))
        for s, site in enumerate(group.sites):
            alone = router.score(group, site, x_BTD, plan).expand(2, 5, -1)
            torch.testing.assert_close(scores[..., s, :], alone)


# ------------------------------------------------------------------------------------------------------------ invariances


def test_permuting_adapters_permutes_weights_and_nothing_else(world: Pico, method: str) -> None:
    names = ("code", "law", "math", "poem")
    order = ("poem", "math", "code", "law")
    one, other = routed(world, method, names), routed(world, method, order)
    close(logits(one, TEXTS), logits(other, TEXTS), 2e-4)
    if router_of(world, method, names).derived:
        return  # the model holds what the method made of them
    columns = [order.index(name) for name in names]
    w, v = (m.weights_for(inputs(m, TEXTS)).share() for m in (one, other))
    torch.testing.assert_close(w, v[:, columns], rtol=1e-3, atol=1e-4)


def test_an_adapter_that_is_not_selected_changes_nothing(world: Pico, method: str) -> None:
    """The weights that a router gave three adapters, replayed on a model that holds a fourth at weight 0."""
    small = routed(world, method, ("code", "law", "math"))
    if router_of(world, method, ("code", "law", "math")).derived:
        pytest.skip("the model holds what the method made of them")
    batch = inputs(small, TEXTS)
    fired = small.weights_for(batch).sites
    base = load_base(str(world.base))
    large = RoutedModel(base, read_adapters(recycler.Zoo(world.zoo), ["code", "law", "math", "poem"], base))

    def replay(group: Any, x_BTD: torch.Tensor) -> torch.Tensor:
        # Sites that only the fourth adapter touches were not routed at all.
        zero = torch.zeros(*x_BTD.shape[:2], 3)
        w_BTSE = torch.stack([fired.get(site, zero) for site in group.sites], dim=-2)
        return torch.nn.functional.pad(w_BTSE, (0, 1))

    with large.mixture(replay):
        close(logits(large, TEXTS), logits(small, TEXTS))


def test_a_batch_is_its_rows_and_padding_is_nothing(world: Pico, method: str) -> None:
    model = routed(world, method)
    alone = [logits(model, [text])[0] for text in TEXTS]
    close(logits(model, TEXTS, "left"), alone, 1e-4)
    close(logits(model, TEXTS, "right"), alone, 1e-4)


@torch.no_grad()
def test_a_kv_cache_changes_nothing(world: Pico, method: str) -> None:
    model = routed(world, method)
    batch = inputs(model, TEXTS)
    batch.pop("decoder_input_ids", None)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "output_logits": True}
    cached = model.generate(**batch, **options, return_dict_in_generate=True, use_cache=True)
    plain = model.generate(**batch, **options, return_dict_in_generate=True, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    close(list(cached.logits), list(plain.logits), 1e-4)


# -------------------------------------------------------------------------------------------------- fitting, saving, loading


def test_fitting_leaves_base_and_adapters_as_they_were(world: Pico, method: str) -> None:
    zoo = recycler.Zoo(world.zoo)
    base: Base = load_base(str(world.base))
    before = digest(base.model)
    recycler.build_router(method, profile_of(world), zoo=zoo, base=base, **FAST.get(method, {}))
    assert digest(base.model) == before
    assert zoo.verify() == []
    assert not any(m._forward_hooks for m in base.model.modules()), "hooks are left on the base"


def test_the_same_seed_gives_the_same_router(world: Pico, method: str) -> None:
    one = router_of(world, method).tensors()
    again = recycler.build_router(method, profile_of(world), zoo=recycler.Zoo(world.zoo), **FAST.get(method, {})).tensors()
    assert one.keys() == again.keys()
    assert all(torch.equal(one[key], again[key]) for key in one)


def test_saved_and_loaded_is_bit_identical(world: Pico, method: str, tmp_path: Path) -> None:
    model = routed(world, method)
    model.save_pretrained(tmp_path / "model")
    loaded = recycler.load(tmp_path / "model")
    for a, b in zip(logits(model, TEXTS), logits(loaded, TEXTS), strict=True):
        assert torch.equal(a, b)
    router_of(world, method).save(tmp_path / "router")
    again = load_router(tmp_path / "router")
    assert again.adapters == router_of(world, method).adapters and again.config == router_of(world, method).config
    for kind in ("tensors", "statistics"):
        kept, read = getattr(router_of(world, method), kind)(), getattr(again, kind)()
        assert kept.keys() == read.keys() and all(torch.equal(kept[k], read[k]) for k in kept)


def test_a_method_says_what_it_is(method: str) -> None:
    cls = methods()[method]
    assert cls.method() == method and cls.paper and cls.__doc__
    assert cls.needs <= {"shots", "scores", "embeddings", "skills"}
    cls.Config()  # every option has a default
