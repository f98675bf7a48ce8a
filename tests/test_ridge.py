"""Ridge's closed form, its chains, and its updates."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico
from hypothesis import given, settings
from hypothesis import strategies as st

import recycler
from recycler.base import load_base
from recycler.build import read_adapters
from recycler.profiles import Profile
from recycler.routed import RoutedModel
from recycler.routers.chains import chains
from recycler.routers.discovery import load_router
from recycler.routers.linear import Rows
from recycler.routers.ridge import Ridge, RidgeConfig, _chained, _parts, _sharpness
from recycler.routers.ridge_equations import RIDGES, left_out
from recycler.scoring import Fitting
from recycler.text import prompts as text_prompts
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
    made = chains(singles, 20, 3, seed=0)
    assert len(made) == 20
    assert all(len({e for e, _ in chain}) == 3 for chain in made)
    used = [shot for chain in made for _, shot in chain]
    assert set(used) == {shot for [(_, shot)] in singles} and max(map(used.count, used)) <= 4
    assert made == chains(singles, 20, 3, seed=0) != chains(singles, 20, 3, seed=1)


def test_too_few_adapters_for_a_chain() -> None:
    assert chains([[(0, "a")], [(1, "b")]], None, 3, seed=0) == []


@pytest.mark.parametrize("tokens", [16, 4096])
def test_how_rows_are_batched_does_not_matter(llama: Pico, tokens: int) -> None:
    one, other = fit(llama, tokens=tokens).sums, fit(llama, tokens=300).sums
    for site in one:
        torch.testing.assert_close(one[site][0], other[site][0], rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(one[site][1], other[site][1], rtol=1e-4, atol=1e-2)


def test_an_adapter_is_added_from_its_own_shots_alone(llama: Pico, tmp_path: Path) -> None:
    """The same as fitting all of them at once, where no chain joins the new one to the others."""
    small = fit(llama, ("code", "law", "math"), chains=0, ridge=30.0)
    loaded = load_router(small.save(tmp_path / "router"))  # the statistics survive saving
    assert isinstance(loaded, Ridge)
    own = {"poem": ("poem",)}
    shots = recycler.Shots({"poem": profile(llama).shots["poem"]})
    alone = Profile(("poem",), shots, torch.ones(2, 1, 4), assigned=own)
    grown = loaded.extended(fitting(llama), alone, "poem")
    whole = fit(llama, chains=0, ridge=30.0)
    assert grown.adapters == whole.adapters
    for site, rows in whole.rows.items():
        torch.testing.assert_close(grown.rows[site].v_ED, rows.v_ED, rtol=1e-3, atol=1e-3)


def test_a_later_round_sees_what_gates_make_of_the_rows(llama: Pico) -> None:
    """Its sums are those of inputs under the mixture of gates solved without the row's part, collected one row at a time."""
    router, model = fit(llama, chains=0, ridge=3.0, rounds=2), fitting(llama)
    shots = [(e, shot) for e, name in enumerate(NAMES) for shot in profile(llama).shots[name]]
    parts = _parts(shots, router.config)
    deciding = [group for group in model.groups if group.after is None]

    def collect(gates_F: list[Ridge | None]) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """Per part, x̂ and y of every site, each token's row weighted."""
        tokens = [sum(model.encode([[shot]]).mask_BT["input"].sum() for e, shot in shots if e == own) for own in range(4)]
        seen: list[dict[str, list[tuple[torch.Tensor, int]]]] = [{group.name: [] for group in deciding} for _ in parts]
        for f, part in enumerate(parts):
            for [(e, shot)] in part:
                last: dict[str, torch.Tensor] = {}

                def weights(group: Any, x: torch.Tensor, f: int = f, e: int = e, last: Any = last) -> torch.Tensor:
                    if group.after is not None:
                        return last[group.after]
                    seen[f][group.name].append((x[0], e))
                    gates = gates_F[f]
                    w = (
                        torch.eye(4)[e].expand(1, x.shape[1], 4)
                        if gates is None
                        else gates.weights(gates.score(group, group.name, x))
                    )
                    last[group.name] = w[:, :, None]
                    return last[group.name]

                model.observe(model.encode([[shot]]), weights)
        made = []
        for rows_of in seen:
            made.append({})
            for name, rows in rows_of.items():
                x = torch.cat([torch.nn.functional.layer_norm(r, r.shape[-1:]) for r, _ in rows])
                root = torch.cat([torch.full((len(r), 1), float((1600.0 / tokens[e]) ** 0.25)) for r, e in rows])
                y = torch.cat([torch.eye(4)[e].expand(len(r), 4) for r, e in rows])
                made[-1][name] = (torch.cat([x, torch.ones(len(x), 1)], 1) * root, y * root)
        return made

    first = collect([None] * 4)
    gates_F: list[Ridge | None] = []
    for f in range(4):
        gates = Ridge(NAMES, router.config)
        for name in first[0]:
            x, y = (torch.cat([first[g][name][i] for g in range(4) if g != f]) for i in (0, 1))
            w = torch.linalg.solve(x.T @ x + 3.0 * torch.eye(x.shape[1]), x.T @ y) * 10.0
            gates.rows[name] = Rows(w[:-1].T, w[-1])
        gates_F.append(gates)
    second = collect(gates_F)
    for name, (g, c) in router.sums.items():
        x, y = (torch.cat([part[name][i] for part in second]) for i in (0, 1))
        torch.testing.assert_close(g, x.T @ x, rtol=1e-3, atol=1e-1)
        torch.testing.assert_close(c, x.T @ y, rtol=1e-3, atol=1e-1)
    own = fit(llama, chains=0, ridge=3.0).sums
    assert any(not torch.allclose(own[name][0], g, rtol=1e-2, atol=1.0) for name, (g, _) in router.sums.items())


def test_what_cannot_be_added(llama: Pico) -> None:
    small = fit(llama, ("law", "poem"), chains=0)
    with pytest.raises(UsageError, match=r"^code touches sites where this router decides nothing"):  # law: q, v; poem: o, gate
        fit(llama, ("law",), chains=0).extended(fitting(llama, ("law", "code")), profile(llama), "code")
    with pytest.raises(UsageError, match=r"no shots of math.*--assign math=TASK"):
        small.extended(fitting(llama, ("law", "poem", "math")), profile(llama, ("law", "poem")), "math")


@pytest.mark.parametrize("rounds", [1, 2])
def test_an_added_adapter_is_chosen_for_its_own(llama: Pico, rounds: int) -> None:
    names = ("code", "law", "math")
    grown = fit(llama, names, rounds=rounds).extended(fitting(llama), profile(llama), "poem")
    base = load_base(str(llama.base))
    model = RoutedModel(base, read_adapters(recycler.Zoo(llama.zoo), NAMES, base), grown)
    for task in NAMES:
        inputs = text_prompts(model.source, [[shot] for shot in profile(llama).shots[task]])
        share_E = model.weights_for(inputs).share().mean(0)
        assert NAMES[int(share_E.argmax())] == task


def test_an_update_keeps_what_was_found(llama: Pico, tmp_path: Path) -> None:
    """λ and T are kept for each site; the sums of each part are not."""
    router = fit(llama, sharpness=None)
    loaded = load_router(router.save(tmp_path / "router"))
    assert isinstance(loaded, Ridge)
    assert loaded.dials == router.dials == loaded.without("law").dials
    width = {group.name: group.width + 1 for group in fitting(llama).groups}
    kept = sum(tensor.numel() for tensor in loaded.statistics().values())
    assert kept == sum(width[s] * (width[s] + 1) // 2 + width[s] * 4 + 2 for s in router.rows)


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


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(2, 4), st.sampled_from([None, 7.0]))
def test_the_error_on_what_was_left_out_comes_from_sums(seed: int, count: int, ridge: float | None) -> None:
    """Against residuals of solutions on the other parts' tokens themselves."""
    draw = torch.Generator().manual_seed(seed)
    truth = torch.randn(6, 3, generator=draw).double()
    parts = []
    for _ in range(count):
        x = torch.randn(9, 6, generator=draw).double()
        parts.append((x, x @ truth + 3 * torch.randn(9, 3, generator=draw).double(), 0.5 + torch.rand(9, 1, generator=draw)))
    found, w_F = left_out([((w * x).T @ x, (w * x).T @ y) for x, y, w in parts], ridge)
    errors = {}
    for number in RIDGES if ridge is None else (ridge,):
        errors[number], solved = 0.0, []
        for f, (x, y, w) in enumerate(parts):
            rest = [part for other, part in enumerate(parts) if other != f]
            xs, ys = (torch.cat([part[2].sqrt() * part[i] for part in rest]) for i in (0, 1))
            xs = torch.cat([xs, number**0.5 * torch.eye(6).double()])
            solved.append(torch.linalg.lstsq(xs, torch.cat([ys, torch.zeros(6, 3).double()])).solution)
            errors[number] += float((w * (y - x @ solved[-1]) ** 2).sum())
        if number == found:
            for one, other in zip(w_F, solved, strict=True):
                torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-5)
    assert errors[found] <= min(errors.values()) * (1 + 1e-9)


def test_sharpness_has_the_least_cross_entropy(llama: Pico) -> None:
    """Against every token's loss, one row at a time, each under the gates of its own part."""
    model, solved = fitting(llama), fit(llama, ridge=30.0, sharpness=1.0).rows
    shots = [(e, shot) for e, name in enumerate(NAMES) for shot in profile(llama).shots[name]]
    parts = _parts(shots, RidgeConfig(ridge=None, folds=2))
    deciding = [group for group in model.groups if group.after is None]
    gates = {}
    for i, group in enumerate(deciding):  # the flatter the scores, the sharper they must be made
        rows = solved[group.name]
        assert rows.offset_E is not None
        w = torch.cat([rows.v_ED, rows.offset_E[:, None]], 1).T * 0.5**i
        gates[group.name] = [w, w * 0.8]
    gates_F = [{name: w_F[f] for name, w_F in gates.items()} for f in range(2)]
    found = _sharpness(model, parts, gates_F, 4, RidgeConfig(ridge=None))
    seen: dict[str, list[tuple[torch.Tensor, int]]] = {group.name: [] for group in deciding}
    for f, part in enumerate(parts):
        for [(e, shot)] in part:

            def weights(group: Any, x: torch.Tensor, f: int = f, e: int = e) -> torch.Tensor:
                if group.after is None:
                    x_TD = torch.nn.functional.layer_norm(x[0], (group.width,))
                    seen[group.name].append((x_TD @ gates[group.name][f][:-1] + gates[group.name][f][-1], e))
                return torch.eye(4)[e].expand(1, 1, 1, 4)

            model.observe(model.encode([[shot]]), weights)
    for name, scores in seen.items():
        tokens = [sum(len(s) for s, e in scores if e == adapter) for adapter in range(4)]
        losses = {
            t: sum(float(-(s * t).log_softmax(-1)[:, e].sum()) / tokens[e] ** 0.5 for s, e in scores)
            for t in (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0)
        }
        assert found[name] == min(losses, key=losses.__getitem__), name
    assert len(set(found.values())) > 1


def test_no_context_crosses_parts() -> None:
    shots = [(e, f"{e}-{i}") for e in range(5) for i in range(8)]
    config = RidgeConfig(ridge=None, chains=10)
    parts = _parts(shots, config)
    chained = _chained(parts, config, seed=0)
    assert [len(part) for part in parts] == [10] * 4 and sum(map(len, chained)) == 10
    assert sorted(single for part in parts for [single] in part) == sorted(shots)
    for part, made in zip(parts, chained, strict=True):
        assert {e for [(e, _)] in part} == set(range(5))
        assert all([single] in part for chain in made for single in chain)


def test_a_shot_of_two_adapters_is_left_out_for_both() -> None:
    shots = [(0, f"a-{i}") for i in range(3)] + [(1, f"b-{i}") for i in range(3)] + [(1, f"a-{i}") for i in range(3)]
    parts = _parts(shots, RidgeConfig(ridge=None, folds=2))
    held = [{shot for [(_, shot)] in part} for part in parts]
    assert held[0].isdisjoint(held[1]) and sum(map(len, parts)) == 9


@pytest.mark.parametrize("config", [{"ridge": 1.0}, {"ridge": None}])
def test_nothing_is_left_out_where_nothing_is_to_be_found(config: dict[str, float]) -> None:
    """λ by hand; or one shot of each adapter, without which nothing would be known of it."""
    shots = [(e, f"{e}-{i}") for e in range(3) for i in range(4 if config["ridge"] else 1)]
    assert len(_parts(shots, RidgeConfig(**config))) == 1  # type: ignore[arg-type]


def test_a_single_shot_of_each_adapter_is_enough(llama: Pico) -> None:
    shots = profile(llama).shots
    one = replace(profile(llama), shots=recycler.Shots({task: shots[task][:1] for task in shots}), nll=torch.ones(5, 4, 1))
    router = Ridge.fit(fitting(llama), one, RidgeConfig(ridge=None, sharpness=None))
    assert set(router.dials.values()) == {(100.0, 10.0)}


def test_a_task_without_an_adapter_is_given_to_one(llama: Pico) -> None:
    """`--assign math=math,poem`: the shots of both are the adapter's own, and tokens of both choose it."""
    names = ("code", "law", "math")
    zoo = recycler.Zoo(llama.zoo)
    alone = profile(llama, names)
    router = recycler.build_router("ridge", alone, zoo=zoo, adapters=names, top_k=1)
    told = recycler.build_router("ridge", alone.assign({"math": ["math", "poem"]}), zoo=zoo, adapters=names, top_k=1)
    assert (router.report["rows"], told.report["rows"]) == (12, 16)
    model = recycler.compose(zoo, router)
    inputs = text_prompts(model.source, [[shot] for shot in alone.shots["poem"]])
    before = float(model.weights_for(inputs).share()[:, names.index("math")].mean())
    model.use(told)
    assert float(model.weights_for(inputs).share()[:, names.index("math")].mean()) > 0.6 > 0.4 > before


@pytest.mark.parametrize(
    "name, value",
    [("ridge", -5), ("ridge", math.nan), ("ridge", math.inf), ("sharpness", math.nan), ("sharpness", 0), ("sharpness", -1),
     ("folds", 1), ("rounds", 0), ("chains", -1), ("chain_length", 0), ("tokens", 0), ("top_k", 0), ("temperature", math.inf)],
)  # fmt: skip
def test_options_that_make_no_gates(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"^{name}={value}"):
        RidgeConfig(**{name: value})


def test_the_report_names_adapters_without_shots(llama: Pico) -> None:
    assert fit(llama).report["without_shots"] == []
    some = replace(profile(llama), assigned={name: (name,) for name in NAMES if name != "law"})
    assert Ridge.fit(fitting(llama), some, RidgeConfig()).report["without_shots"] == ["law"]
