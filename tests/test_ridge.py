"""Ridge's closed form, its chains, and its updates."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Pico

import recycler
from recycler.base import load_base
from recycler.build import read_adapters
from recycler.profiles import Profile
from recycler.routed import RoutedModel
from recycler.routers.discovery import load as load_router
from recycler.routers.ridge import Ridge, RidgeConfig, _chains
from recycler.scoring import Fitting
from recycler.zoo.errors import UsageError

NAMES = ("code", "law", "math", "poem")


def profile(pico: Pico, names: tuple[str, ...] = NAMES) -> Profile:
    shots = recycler.Shots.from_files(*pico.tasks).sample(4)
    nll = torch.ones(len(names) + 1, len(shots), 4)
    return Profile(names, shots, nll, assigned={name: (name,) for name in names})


def fitting(pico: Pico, names: tuple[str, ...] = NAMES) -> Fitting:
    base = load_base(str(pico.base))
    return Fitting(RoutedModel(base, read_adapters(recycler.Zoo(pico.zoo), names, base)))


def fit(pico: Pico, names: tuple[str, ...] = NAMES, **config: object) -> Ridge:
    return Ridge.fit(fitting(pico, names), profile(pico, names), RidgeConfig(**config))  # type: ignore[arg-type]


def test_the_gates_are_the_least_squares_solution(llama: Pico) -> None:
    """Against an augmented least-squares solve on inputs collected one row at a time, without padding."""
    router = fit(llama, chains=0, ridge=3.0, sharpness=5.0)
    model = fitting(llama)
    group = model.groups[-2]
    assert group.after is None and group.name in router.rows
    inputs, labels = [], []
    tokens = torch.zeros(4)

    for number, name in enumerate(NAMES):
        for shot in profile(llama).shots[name]:

            def weights(g: object, x: torch.Tensor, number: int = number) -> torch.Tensor:
                if g == group:
                    inputs.append(x[0])
                    labels.append(torch.full((x.shape[1],), number))
                    tokens[number] += x.shape[1]
                return torch.eye(4)[number].expand(1, 1, 1, 4)

            model.observe(model.encode([[shot]]), weights)
    x = torch.nn.functional.layer_norm(torch.cat(inputs), (group.width,)).double()
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    y = torch.nn.functional.one_hot(torch.cat(labels), 4).double()
    weight = (1600.0 / tokens[torch.cat(labels)]).sqrt().sqrt()[:, None].double()  # squared again by least squares
    x, y = x * weight, y * weight
    penalty = 3.0**0.5 * torch.eye(x.shape[1]).double()
    w = torch.linalg.lstsq(torch.cat([x, penalty]), torch.cat([y, torch.zeros(x.shape[1], 4).double()])).solution * 5.0
    rows = router.rows[group.name]
    assert rows.offset_E is not None
    torch.testing.assert_close(rows.v_ED, w[:-1].T.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rows.offset_E, w[-1].float(), rtol=1e-3, atol=1e-3)


def test_one_decision_a_block_or_one_at_every_input(llama: Pico) -> None:
    kinds = {inputs: {s.rpartition(".")[2] for s in fit(llama, inputs=inputs).rows} for inputs in ("block", "all")}
    assert kinds["block"] == {"q_proj", "gate_proj"}
    assert kinds["all"] == {"q_proj", "o_proj", "gate_proj", "down_proj"}


def test_sites_of_a_block_share_one_decision(llama: Pico) -> None:
    base = load_base(str(llama.base))
    model = RoutedModel(base, read_adapters(recycler.Zoo(llama.zoo), NAMES, base), fit(llama))
    sites = model.weights_for({"input_ids": torch.tensor([[5, 6, 7, 8]])}).sites
    layer = "model.layers.1"
    assert torch.equal(sites[f"{layer}.self_attn.q_proj"], sites[f"{layer}.self_attn.o_proj"])
    assert torch.equal(sites[f"{layer}.mlp.gate_proj"], sites[f"{layer}.mlp.down_proj"])
    assert not torch.equal(sites[f"{layer}.self_attn.q_proj"], sites[f"{layer}.mlp.gate_proj"])


def test_chains_hold_different_adapters_and_use_every_shot() -> None:
    singles = [[(e, f"{e}-{i}")] for e in range(5) for i in range(6)]
    chains = _chains(singles, RidgeConfig(chains=20, chain_length=3), seed=0)
    assert len(chains) == 20
    assert all(len({e for e, _ in chain}) == 3 for chain in chains)
    used = [shot for chain in chains for _, shot in chain]
    assert set(used) == {shot for [(_, shot)] in singles} and max(map(used.count, used)) <= 4
    assert chains == _chains(singles, RidgeConfig(chains=20), seed=0) != _chains(singles, RidgeConfig(chains=20), seed=1)


def test_too_few_adapters_for_a_chain() -> None:
    assert _chains([[(0, "a")], [(1, "b")]], RidgeConfig(chain_length=3), seed=0) == []


@pytest.mark.parametrize("tokens", [16, 4096])
def test_how_rows_are_batched_does_not_matter(llama: Pico, tokens: int) -> None:
    one, other = fit(llama, tokens=tokens).sums, fit(llama, tokens=300).sums
    for site in one:
        torch.testing.assert_close(one[site][0], other[site][0], rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(one[site][1], other[site][1], rtol=1e-4, atol=1e-2)


def test_an_adapter_is_added_from_its_own_shots_alone(llama: Pico, tmp_path: Path) -> None:
    """The same as fitting all of them at once, where no chain joins the new one to the others."""
    small = fit(llama, ("code", "law", "math"), chains=0)
    loaded = load_router(small.save(tmp_path / "router"))  # the statistics survive saving
    assert isinstance(loaded, Ridge)
    own = {"poem": ("poem",)}
    shots = recycler.Shots({"poem": profile(llama).shots["poem"]})
    alone = Profile(("poem",), shots, torch.ones(2, 1, 4), assigned=own)
    grown = loaded.extended(fitting(llama), alone, "poem")
    whole = fit(llama, chains=0)
    assert grown.adapters == whole.adapters
    for site, rows in whole.rows.items():
        torch.testing.assert_close(grown.rows[site].v_ED, rows.v_ED, rtol=1e-3, atol=1e-3)


def test_an_adapter_is_taken_out(llama: Pico) -> None:
    """The others' columns stay what they were: its tokens remain, as examples of none of them."""
    whole = fit(llama)
    rest = whole.without("law")
    assert rest.adapters == ("code", "math", "poem")
    for site, rows in rest.rows.items():
        torch.testing.assert_close(rows.v_ED, whole.rows[site].v_ED[[0, 2, 3]])
    with pytest.raises(UsageError, match="no adapter law"):
        rest.without("law")


def test_a_composed_model_has_no_statistics_to_update_from(llama: Pico, tmp_path: Path) -> None:
    fit(llama).save(tmp_path / "bare", statistics=False)
    loaded = load_router(tmp_path / "bare")
    assert isinstance(loaded, Ridge) and loaded.rows
    with pytest.raises(UsageError, match="without its statistics"):
        loaded.without("law")


@pytest.mark.parametrize(
    "name, value",
    [("ridge", -5), ("ridge", math.nan), ("ridge", math.inf), ("sharpness", math.nan), ("sharpness", 0), ("sharpness", -1),
     ("chains", -1), ("chain_length", 0), ("tokens", 0), ("top_k", 0), ("temperature", math.inf)],
)  # fmt: skip
def test_options_that_make_no_gates(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"^{name}={value}"):
        RidgeConfig(**{name: value})


def test_the_report_names_adapters_without_shots(llama: Pico) -> None:
    assert fit(llama).report["without_shots"] == []
    some = replace(profile(llama), assigned={name: (name,) for name in NAMES if name != "law"})
    assert Ridge.fit(fitting(llama), some, RidgeConfig()).report["without_shots"] == ["law"]
