"""Gates of many adapters are learned in shared batches, and nobody pays for adapters that are not in the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Pico
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import recycler
from recycler.base import load_base
from recycler.build import read_adapters
from recycler.profiles import Profile
from recycler.routed import RoutedModel
from recycler.routers.chains import few
from recycler.routers.discovery import find, make_config
from recycler.routers.protocol import Few, Group, Rowwise
from recycler.scoring import Fitting
from recycler.zoo.adapter import Adapter, Factors

METHODS: dict[str, dict[str, Any]] = {
    "phatgoose": {"steps": 3, "rows": 12},
    "ridge": {"chains": 6},
    "average_activation": {},
}


@pytest.fixture
def base(world: Pico) -> Any:
    return load_base(str(world.base), dtype="float64")  # Adam's first steps turn rounding into signs


@pytest.fixture
def shots(world: Pico) -> recycler.Shots:
    return recycler.Shots.from_files(*world.tasks).sample(4)


def profile_of(model: RoutedModel, shots: recycler.Shots) -> Profile:
    own = {name: (name,) for name in model.names if name in shots}
    return Profile(model.names, shots, torch.ones(len(model.names) + 1, len(shots), 4), assigned=own)


def gates(model: RoutedModel, shots: recycler.Shots, method: str) -> dict[str, torch.Tensor]:
    cls = find(method)
    return cls.fit(Fitting(model), profile_of(model, shots), make_config(cls, METHODS[method])).tensors()


def crowd(base: Any, known: list[Adapter], more: int, broken: bool = False) -> RoutedModel:
    """Known adapters, and strangers without tasks beside them; broken ones are NaN."""
    strangers = []
    for number in range(more):
        draw = torch.Generator().manual_seed(number)
        sites = {
            site: Factors(
                torch.randn(4, one.a_RD.shape[1], generator=draw) * (float("nan") if broken else 1.0),
                torch.randn(one.b_OR.shape[0], 4, generator=draw),
            )
            for site, one in {s: f for adapter in known for s, f in adapter.sites.items()}.items()
        }
        strangers.append(Adapter(f"z{number}", sites))
    return RoutedModel(base, [*known, *strangers])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("more", [0, 9])
def test_gates_are_the_same_where_nothing_is_said_of_rows(
    world: Pico, base: Any, shots: recycler.Shots, method: str, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = recycler.Zoo(world.zoo)
    model = crowd(base, read_adapters(zoo, list(zoo), base), more)
    said = gates(model, shots, method)
    mixture = RoutedModel.mixture

    def silent(self: RoutedModel, weights: Any) -> Any:
        return mixture(self, weights.weights if isinstance(weights, Rowwise) else weights)

    monkeypatch.setattr(RoutedModel, "mixture", silent)
    unsaid = gates(model, shots, method)
    model.engine.detach()
    assert said.keys() == unsaid.keys()
    for key, tensor in unsaid.items():
        torch.testing.assert_close(said[key], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["phatgoose", "ridge", "average_activation"])
def test_nobody_multiplies_with_adapters_that_are_not_in_the_batch(
    world: Pico, base: Any, shots: recycler.Shots, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strangers are NaN, and 0 times NaN would be seen."""
    zoo = recycler.Zoo(world.zoo)
    known = read_adapters(zoo, list(zoo), base)
    monkeypatch.setitem(METHODS, "ridge", {"chains": 0})
    alone = crowd(base, known, 0)
    expected = gates(alone, shots, method)
    alone.engine.detach()
    model = crowd(base, known, 9, broken=True)
    found = gates(model, shots, method)
    model.engine.detach()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key][: len(tensor)], tensor, rtol=1e-5, atol=1e-5)


def test_a_step_costs_the_same_in_a_zoo_of_any_size(world: Pico, base: Any, shots: recycler.Shots) -> None:
    zoo = recycler.Zoo(world.zoo)
    known = [replace(one, sites=plain(one)) for one in read_adapters(zoo, list(zoo), base)]
    flops = []
    for more in (12, 60):
        model = crowd(base, known, more)
        with FlopCounterMode(display=False) as counter:
            gates(model, shots, "phatgoose")
        model.engine.detach()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]


def plain(adapter: Adapter) -> dict[str, Factors]:
    return {site: Factors(one.a_RD, one.b_OR) for site, one in adapter.sites.items()}


@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4), min_size=1, max_size=5))
def test_who_is_in_a_batch(rows: list[list[int]]) -> None:
    chains = [[(e, None) for e in row] for row in rows]
    table_BE = torch.zeros(len(rows), 7)
    for b, row in enumerate(rows):
        table_BE[b, row] = 1
    assert few(chains) == Few.of(table_BE)


@pytest.mark.parametrize("path", [None, "dense", "sequence"])
def test_rows_of_several_adapters_each(world: Pico, base: Any, path: Any) -> None:
    """What is said of rows changes nothing, on any path, whatever varies from token to token."""
    zoo = recycler.Zoo(world.zoo)
    model = crowd(base, read_adapters(zoo, list(zoo), base), 9)
    on_BE = torch.zeros(5, 13, dtype=torch.float64)
    on_BE[0, 1] = on_BE[1, 2] = on_BE[1, 7] = on_BE[2, 12] = on_BE[3, 5] = 1  # the last row has nobody

    def weights(group: Group, x_BTD: torch.Tensor) -> torch.Tensor:
        return (x_BTD.mean(-1).sigmoid()[..., None] * on_BE[:, None])[:, :, None]

    ids = torch.randint(5, 90, (5, 20), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids[:, :6]} if world.kind == "t5" else {})}
    with torch.no_grad():
        with model.mixture(weights):
            expected = model(**inputs).logits
        model.engine.control.path = path
        with model.mixture(Rowwise(weights, Few.of(on_BE))):
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-9, atol=1e-9)
    model.engine.detach()
