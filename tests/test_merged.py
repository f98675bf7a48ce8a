"""One mixture in the base's weights: the same answers as beside them, and the weights are put back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico
from test_engine import _Fit, _OneLinear

import recycler
from recycler.base import load_base
from recycler.build import read_adapters
from recycler.engine.attach import Attachment
from recycler.engine.merge import merged
from recycler.routed import RoutedModel
from recycler.zoo.adapter import Factors
from recycler.zoo.errors import UsageError


def model_of(world: Pico, router: str | None = None, **loading: Any) -> RoutedModel:
    zoo = recycler.Zoo(world.zoo)
    if router is not None:
        return recycler.compose(zoo, recycler.build_router(router, zoo=zoo), **loading)
    base = load_base(str(world.base), **loading)
    return RoutedModel(base, read_adapters(zoo, list(zoo), base))


def test_it_answers_as_the_mixture_does(world: Pico) -> None:
    """On a causal model and an encoder–decoder."""
    model = model_of(world)
    before = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    if model.source.encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[0, 5]])
    weights = {model.names[0]: 0.7, model.names[2]: -0.4}
    with torch.no_grad():
        with model.mixture(weights):
            beside = model(**inputs).logits
        with model.merged(weights):
            torch.testing.assert_close(model(**inputs).logits, beside, rtol=1e-4, atol=1e-5)
            assert not torch.equal(model.base.state_dict()[f"{model.sites[0]}.weight"], before[f"{model.sites[0]}.weight"])
    after = model.base.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_router_that_is_one_mixture_needs_no_weights(llama: Pico) -> None:
    model = model_of(llama, "uniform")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        routed = model(ids).logits
        with model.merged():
            torch.testing.assert_close(model(ids).logits, routed, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="no single mixture"), model_of(llama, "arrow").merged():
        pass
    with pytest.raises(UsageError, match="There is no adapter nobody"), model.merged({"nobody": 1.0}):
        pass


def test_paged_adapters_are_read_to_be_merged(llama: Pico, tmp_path: Path) -> None:
    zoo = recycler.Zoo(llama.zoo)
    router = recycler.build_router("uniform", zoo=zoo)
    model = recycler.compose(zoo, router, resident="1MB", packed=tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        routed = model(ids).logits
        with model.merged():
            torch.testing.assert_close(model(ids).logits, routed, rtol=1e-4, atol=1e-5)


def test_an_error_inside_puts_the_weights_back(llama: Pico) -> None:
    model = model_of(llama, "uniform", dtype="bfloat16")
    before = model.base.state_dict()[f"{model.sites[0]}.weight"].clone()
    with pytest.raises(ZeroDivisionError), model.merged():
        1 / 0  # noqa: B018
    assert torch.equal(model.base.state_dict()[f"{model.sites[0]}.weight"], before)
    assert model.engine.control.enabled


@torch.no_grad()
def test_magnitudes_and_biases_go_in_too() -> None:
    torch.manual_seed(0)
    base = _OneLinear(16).requires_grad_(False)
    plain = [Factors(torch.randn(r, 16), torch.randn(16, r)) for r in (2, 3)]
    factors = {
        "law": replace(plain[0], bias_O=torch.randn(16)),
        "poem": replace(plain[1], magnitude_O=torch.rand(16) + 1),
    }
    engine = Attachment(base, {"proj": factors}, list(factors), groups=_Fit.groups(16))
    x, w_E = torch.randn(1, 3, 16), torch.tensor([0.6, 0.8])
    with engine.control.set(forced=w_E):
        beside = base(x)
    with merged(engine, base, w_E):
        torch.testing.assert_close(base(x), beside, rtol=1e-4, atol=1e-5)
    base.proj.bias = None
    with pytest.raises(UsageError, match="has no bias"), merged(engine, base, w_E):
        pass
    base.proj.weight = torch.nn.Parameter(base.proj.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UsageError, match="cannot be written"), merged(engine, base, w_E):
        pass


def test_a_weight_that_others_share_is_left_alone(llama: Pico) -> None:
    model = model_of(llama, "uniform")
    model.base.get_submodule(model.sites[0]).weight = model.base.get_submodule(
        model.sites[0].replace("layers.0", "layers.1")
    ).weight
    with pytest.raises(UsageError, match="shares its weight"), model.merged():
        pass
