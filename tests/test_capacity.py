"""Adapters that come and go in a model that has room for them: nothing is compiled again, and it answers like a new one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from conftest import Pico
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conformance import close, digest, inputs, logits, profile_of, router_of

import recycler
from recycler.build import read_adapters
from recycler.routed import RoutedModel
from recycler.routers.base import Router
from recycler.routers.discovery import methods
from recycler.updating import add_adapter, remove_adapter
from recycler.zoo.errors import UsageError

IDS = torch.tensor([[5, 6, 7, 8, 9]])
TEXTS = ["Add 3 and b.", "Is 14 liable to e? It is not."]
ALL = ("math", "law", "code", "poem")
# Those that make adapters of their own make them of all others.
EXCHANGED = sorted(
    set(methods()) - {name for name, cls in methods().items() if cls.derive.__func__ is not Router.derive.__func__}
)  # type: ignore[attr-defined]


def fresh(world: Pico, method: str, names: tuple[str, ...], **options: Any) -> RoutedModel:
    """A model of some adapters, composed as usual."""
    return recycler.compose(recycler.Zoo(world.zoo), router_of(world, method, names), **options)


def put(model: RoutedModel, world: Pico, method: str, names: tuple[str, ...]) -> None:
    """Exchanges a model's adapters; those that it holds come without factors."""
    zoo = recycler.Zoo(world.zoo)
    held = {adapter.name: adapter for adapter in model.adapters}
    new = {one.name: one for one in read_adapters(zoo, [name for name in names if name not in held], model.source)}
    model.exchange(
        [held.get(name) or new[name] for name in names], router_of(world, method, names), {n: zoo.folder(n) for n in new}
    )


class Compiled:
    """A model's base, compiled; what would compile it again raises."""

    def __init__(self, model: RoutedModel) -> None:
        torch._dynamo.reset()
        self.model, self.run = model, torch.compile(model.base, fullgraph=True, backend="eager", dynamic=False)

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        with self.model.planned({"input_ids": IDS}):
            return self.run(IDS, use_cache=False).logits


@contextmanager
def never_again() -> Iterator[None]:
    with torch._dynamo.config.patch(error_on_recompile=True), torch.compiler.set_stance("fail_on_recompile"):
        yield


@torch.no_grad()
def expected(world: Pico, method: str, names: tuple[str, ...]) -> torch.Tensor:
    return fresh(world, method, names)(IDS, use_cache=False).logits


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("method", ["arrow", "ridge", "uniform", "skills"])
def test_adapters_come_and_go_and_nothing_is_compiled_again(llama: Pico, method: str) -> None:
    """poem is a DoRA adapter that stays; code is alone at k_proj, which is left without any."""
    first = ("math", "code", "poem")
    model = fresh(llama, method, first, spare=1)
    compiled = Compiled(model)
    same(compiled.logits(), expected(llama, method, first))
    addresses = {name: buffer.data_ptr() for name, buffer in model.engine.named_buffers()}  # a CUDA graph keeps to them
    with never_again():
        for names in [("math", "code", "poem", "law"), ("law", "poem"), first]:
            put(model, llama, method, names)
            same(compiled.logits(), expected(llama, method, names))
    assert {name: buffer.data_ptr() for name, buffer in model.engine.named_buffers()} == addresses


def test_mixtures_stay_compiled_too(llama: Pico) -> None:
    model = fresh(llama, "arrow", ("math", "code"), spare=1)
    compiled = Compiled(model)
    with model.mixture({"math": 0.5, "code": 0.5}):
        compiled.logits()
    put(model, llama, "arrow", ("law", "code", "math"))
    with never_again(), model.mixture({"law": 0.7, "math": 0.2}), torch.no_grad():
        got = compiled.logits()
    with fresh(llama, "arrow", ("math", "law")).mixture({"law": 0.7, "math": 0.2}) as other, torch.no_grad():
        same(got, other(IDS, use_cache=False).logits)
    with never_again(), pytest.raises(RuntimeError, match="recompile"), torch.no_grad():  # it would be noticed
        compiled.run(IDS[:, 1:], use_cache=False)


def test_adapters_in_half_precision(llama: Pico) -> None:
    """Gates and adapters are not in one matrix there."""
    model = fresh(llama, "arrow", ("math", "code"), spare=1, dtype="bfloat16")
    compiled = Compiled(model)
    compiled.logits()
    with never_again():
        put(model, llama, "arrow", ("law", "code", "math"))
        got = compiled.logits()
    with torch.no_grad():
        other = fresh(llama, "arrow", ("law", "code", "math"), dtype="bfloat16")(IDS, use_cache=False).logits
    assert (got - other).abs().max() <= 0.02 * other.abs().max()


@given(
    st.lists(
        st.permutations(ALL).flatmap(lambda names: st.integers(1, 4).map(lambda n: tuple(names[:n]))), min_size=1, max_size=4
    )
)
@settings(max_examples=6)
def test_whoever_comes_and_goes_it_is_the_model_of_those_that_are_there(llama: Pico, steps: list[tuple[str, ...]]) -> None:
    model = fresh(llama, "arrow", ALL, spare=0)
    for names in steps:
        put(model, llama, "arrow", names)
    other = fresh(llama, "arrow", steps[-1])
    close(logits(model, TEXTS), logits(other, TEXTS), 1e-5)
    assert model.names == other.names and set(model.sites) == set(other.sites)
    mine, theirs = model.weights_for(inputs(model, TEXTS)), other.weights_for(inputs(other, TEXTS))
    assert mine.sites.keys() == theirs.sites.keys()
    torch.testing.assert_close(mine.share(), theirs.share())


@pytest.mark.parametrize("method", EXCHANGED)
def test_every_router_answers_as_in_a_new_model(llama: Pico, method: str) -> None:
    model = fresh(llama, method, ("math", "code", "poem"), spare=1)
    put(model, llama, method, ("law", "poem"))
    other = fresh(llama, method, ("law", "poem"))
    close(logits(model, TEXTS), logits(other, TEXTS), 1e-5)
    batch = inputs(model, TEXTS)
    assert torch.equal(model.generate(**batch, max_new_tokens=4), other.generate(**batch, max_new_tokens=4))
    mine, theirs = model.weights_for(batch), other.weights_for(batch)
    assert mine.sites.keys() == theirs.sites.keys()
    torch.testing.assert_close(mine.share(), theirs.share())


@pytest.mark.parametrize(
    "options", [{"shared": True, "renormalise": False}, {"ranks": 2}, {"policy": "null"}, {"policy": "tsallis"}], ids=str
)
def test_every_policy_decides_as_in_a_new_model(llama: Pico, options: dict[str, Any]) -> None:
    zoo = recycler.Zoo(llama.zoo)
    old, new = (
        recycler.build_router("ridge", profile_of(llama), zoo=zoo, adapters=names, **options)
        for names in (("math", "code", "poem"), ("law", "code", "poem", "math"))
    )
    model = recycler.compose(zoo, old, spare=1)
    model.exchange(read_adapters(zoo, new.adapters, model.source), new)
    close(logits(model, TEXTS), logits(recycler.compose(zoo, new), TEXTS), 1e-5)


@pytest.mark.parametrize("path", ["gather", "sorted", "skip", "dense"])
def test_every_path_knows_who_is_there(llama: Pico, path: Any) -> None:
    model = fresh(llama, "arrow", ("math", "code", "poem"), spare=1)
    logits(model, TEXTS)
    put(model, llama, "arrow", ("law", "code", "math", "poem"))
    model.engine.control.path = path
    close(logits(model, TEXTS), logits(fresh(llama, "arrow", ("law", "code", "math", "poem")), TEXTS), 1e-5)


def test_what_does_not_fit_leaves_the_model_as_it_was(llama: Pico, tmp_path: Path) -> None:
    zoo, names = recycler.Zoo(llama.zoo), ("law", "code")
    model = fresh(llama, "arrow", names, spare=1)
    before, bits = logits(model, TEXTS), digest(model.engine)
    big = pico.make_adapter(llama.base, "big", {"r": 30, "target_modules": ["q_proj"]}, tmp_path)
    biased = pico.make_adapter(llama.base, "biased", {"r": 2, "target_modules": ["q_proj"], "lora_bias": True}, tmp_path)
    many = recycler.Zoo(tmp_path / "zoo")
    recycler.fetch([*llama.adapters.values(), big, biased], base=llama.base, zoo=many).raise_for_failures()
    for more, message in [
        (("big",), "rank rows"),
        (("biased",), "0 biases"),
        (("poem",), "0 DoRA magnitudes"),
        (("math", "big"), "room for 3 adapters"),
    ]:
        router = recycler.build_router("uniform", zoo=many, adapters=[*names, *more])
        with pytest.raises(UsageError, match=message):
            model.exchange([*model.adapters, *read_adapters(many, more, model.source)], router)
    router = router_of(llama, "arrow", (*names, "math"))
    math = read_adapters(zoo, ["math"], model.source)
    only_law = fresh(llama, "arrow", ("law",), spare=1)
    with pytest.raises(UsageError, match="where there was no adapter"):
        put(only_law, llama, "arrow", names)
    with pytest.raises(UsageError, match="in this order"):
        model.exchange([*math, *model.adapters], router)
    with pytest.raises(UsageError, match="without factors"):
        model.exchange([*model.adapters, *(fresh(llama, "arrow", ("math",)).adapters)], router)
    assert digest(model.engine) == bits and model.names == names
    assert all(torch.equal(a, b) for a, b in zip(logits(model, TEXTS), before, strict=True))
    with pytest.raises(UsageError, match="no room"):
        fresh(llama, "arrow", names).exchange([*model.adapters, *math], router)
    with pytest.raises(UsageError, match="spare=-1"):
        fresh(llama, "arrow", names, spare=-1)


def test_more_of_a_kind_that_is_there(llama: Pico, tmp_path: Path) -> None:
    """Where there is a DoRA magnitude or a bias there is room for others'."""
    kinds = {"dora": {"use_dora": True}, "biased": {"lora_bias": True}}
    made = [
        pico.make_adapter(llama.base, f"{kind}{n}", {"r": 2, "target_modules": ["v_proj", "o_proj"], **options}, tmp_path)
        for kind, options in kinds.items()
        for n in "ab"
    ]
    zoo = recycler.Zoo(tmp_path / "zoo")
    recycler.fetch(made, base=llama.base, zoo=zoo).raise_for_failures()

    def router(*names: str) -> Router:
        return recycler.build_router("arrow", zoo=zoo, adapters=names)

    model = recycler.compose(zoo, router("doraa", "biaseda"), spare=1)
    compiled = Compiled(model)
    compiled.logits()
    for names in [("doraa", "biaseda", "dorab"), ("biasedb", "dorab", "biaseda"), ("biasedb",)]:
        with never_again():
            model.exchange(read_adapters(zoo, names, model.source), router(*names))
            got = compiled.logits()
        with torch.no_grad():
            same(got, recycler.compose(zoo, router(*names))(IDS, use_cache=False).logits)


def test_what_was_exchanged_is_saved(llama: Pico, tmp_path: Path) -> None:
    """The way that the documentation shows: a router that takes in one adapter more, or lets go of one."""
    zoo = recycler.Zoo(llama.zoo)
    model = fresh(llama, "arrow", ("math", "code"), spare=1)
    grown = add_adapter(router_of(llama, "arrow", ("math", "code")), "law", zoo=zoo)
    model.exchange([*model.adapters, *read_adapters(zoo, ["law"], model.source)], grown, {"law": zoo.folder("law")})
    model.save_pretrained(tmp_path / "model")
    loaded = recycler.load(tmp_path / "model", spare=1)
    close(logits(loaded, TEXTS), logits(fresh(llama, "arrow", ("math", "code", "law")), TEXTS), 1e-5)
    loaded.exchange([one for one in loaded.adapters if one.name != "code"], remove_adapter(grown, "code", zoo=zoo))
    close(logits(loaded, TEXTS), logits(fresh(llama, "arrow", ("math", "law")), TEXTS), 1e-5)
    loaded.save_pretrained(tmp_path / "less")
    assert recycler.load(tmp_path / "less").names == ("math", "law")


def test_joined_weights_follow(llama: Pico) -> None:
    model = fresh(llama, "arrow", ("math", "code"), spare=1)
    assert model.engine.join()
    put(model, llama, "arrow", ("law", "math"))
    close(logits(model, TEXTS), logits(fresh(llama, "arrow", ("law", "math")), TEXTS), 1e-5)


def test_without_spare_nothing_is_padded(llama: Pico) -> None:
    plain, roomy = fresh(llama, "arrow", ALL), fresh(llama, "arrow", ALL, spare=1)
    assert sum(bank.stack.total for bank in plain.engine.banks) == sum(
        update.rank for one in read_adapters(recycler.Zoo(llama.zoo), ALL, plain.source) for update in one.sites.values()
    )
    for bank in roomy.engine.banks:
        assert all((stop - start) % 16 == 0 for start, stop in bank.stack.spans)
    close(logits(roomy, TEXTS), logits(plain, TEXTS), 1e-5)


def test_an_encoder_decoder_exchanges_too(t5: Pico) -> None:
    model = fresh(t5, "arrow", ("math", "code", "poem"), spare=1)
    for names in [("poem", "law", "math", "code"), ("law", "math")]:
        put(model, t5, "arrow", names)
        close(logits(model, TEXTS), logits(fresh(t5, "arrow", names), TEXTS), 1e-5)
