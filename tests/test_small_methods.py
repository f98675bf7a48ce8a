"""SpectR, average activation, random, single and oracle: their formulas, computed another way, and columns that come and go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico
from hypothesis import given
from hypothesis import strategies as st

import recycler
from recycler.base import load_base
from recycler.build import read_adapters
from recycler.profiles import Profile
from recycler.routed import RoutedModel
from recycler.routers.average_activation import AverageActivation, AverageActivationConfig
from recycler.routers.base import Router
from recycler.routers.discovery import find, load_router, make_config
from recycler.routers.oracle import Oracle, OracleConfig
from recycler.routers.random import Random, RandomConfig
from recycler.routers.single import Single, SingleConfig
from recycler.routers.spectr import Spectr, SpectrConfig
from recycler.run import answer_file
from recycler.scoring import Fitting
from recycler.zoo.adapter import Factors
from recycler.zoo.errors import UsageError

NAMES = ("code", "law", "math", "poem")
COLUMNS = ("arrow", "spectr", "random", "single", "average_activation", "uniform")
TEXTS = ["Add 3 and b.", "O the long, long poem!"]


def profile(pico: Pico, names: tuple[str, ...] = NAMES, better: str | None = None) -> Profile:
    """Every adapter has its task; `better` is the one whose NLL is lowest, None for the base."""
    shots = recycler.Shots.from_files(*pico.tasks).sample(4)
    nll = torch.ones(len(names) + 1, len(shots), 4)
    nll[0 if better is None else names.index(better) + 1] = 0.5
    return Profile(names, shots, nll, assigned={name: (name,) for name in names})


def fitting(pico: Pico, names: tuple[str, ...] = NAMES) -> Fitting:
    base = load_base(str(pico.base))
    return Fitting(RoutedModel(base, read_adapters(recycler.Zoo(pico.zoo), names, base)))


def fit(pico: Pico, method: str, names: tuple[str, ...] = NAMES, better: str | None = "law", **options: Any) -> Router:
    cls = find(method)
    return cls.fit(fitting(pico, names), profile(pico, names, better), make_config(cls, options))


def routed(pico: Pico, router: Router) -> RoutedModel:
    base = load_base(str(pico.base))
    return RoutedModel(base, read_adapters(recycler.Zoo(pico.zoo), router.adapters, base), router)


def ids(model: RoutedModel, texts: list[str] = TEXTS) -> dict[str, torch.Tensor]:
    tokens = model.tokenizer(texts, return_tensors="pt", padding=True)
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}


# ------------------------------------------------------------------------------------------------------------------- spectr


def dense(held: Factors) -> torch.Tensor:
    return held.b_OR.double() @ held.a_RD.double()


@pytest.mark.parametrize("score", ["subspace", "rank", "energy"])
def test_spectr_measures_what_it_says(world: Pico, score: str) -> None:
    """Against a dense SVD, site by site, and what does not touch a site is −∞."""
    router, model = fit(world, "spectr", score=score), fitting(world)
    torch.manual_seed(0)
    for group in model.groups:
        x_BTD = torch.randn(2, 3, group.width)
        scores = router.gate(group)(x_BTD)  # type: ignore[misc]
        for s, site in enumerate(group.sites):
            held = model.factors(site)
            for e, name in enumerate(NAMES):
                if name not in held:
                    assert (scores[..., s, e] == float("-inf")).all()
                    continue
                delta = dense(held[name])
                if score == "energy":
                    expected = (x_BTD.double() @ delta.T).norm(dim=-1) / delta.norm()
                else:
                    v_RD = torch.linalg.svd(delta).Vh[: held[name].rank]
                    expected = (x_BTD.double() @ v_RD.T).norm(dim=-1) / (held[name].rank ** 0.5 if score == "rank" else 1)
                torch.testing.assert_close(scores[..., s, e].double(), expected, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(0.1, 10))
def test_spectr_does_not_see_how_an_update_is_written(seed: int, rank: int, scale: float) -> None:
    """(A, B) → (G⁻¹A, BG), rows that are there twice, and DoRA's magnitude leave the scores alone; so does the sign of x."""
    from recycler.routers.spectr import _Norms, _stacked

    g = torch.Generator().manual_seed(seed)
    a_RD, b_OR = torch.randn(rank, 12, generator=g), torch.randn(9, rank, generator=g)
    gauge = torch.linalg.qr(torch.randn(rank, rank, generator=g)).Q * scale
    other = Factors(torch.linalg.solve(gauge, a_RD), b_OR @ gauge)
    twice = Factors(torch.cat([a_RD, a_RD]), torch.cat([b_OR / 2, b_OR / 2], 1))
    x_ND = torch.randn(5, 12, generator=g)
    for score in ("subspace", "rank", "energy"):
        gate = _Norms([_stacked([Factors(a_RD, b_OR), other, twice, None], 12, score)], None)  # type: ignore[arg-type]
        one, two, three, none = gate(x_ND)[:, 0].unbind(-1)
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one, three, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(gate(-x_ND)[:, 0, 0], one)
        assert (none == float("-inf")).all()


def test_an_update_that_is_zero_scores_zero() -> None:
    from recycler.routers.spectr import _Norms, _stacked

    gate = _Norms([_stacked([Factors(torch.randn(2, 8), torch.zeros(5, 2))], 8, "subspace")], 1)
    assert (gate(torch.randn(3, 8)) == 0).all()


def test_spectr_weighs_equally_as_published(llama: Pico) -> None:
    w = SpectrConfig(top_k=2, equal=True).weights(torch.tensor([[3.0, 1.0, 2.0], [5.0, float("-inf"), float("-inf")]]))
    assert torch.equal(w, torch.tensor([[0.5, 0.0, 0.5], [1.0, 0.0, 0.0]]))
    sites = routed(llama, fit(llama, "spectr", top_k=2, equal=True)).weights_for({"input_ids": torch.tensor([[5, 6, 7]])}).sites
    assert all(set(w.mul(2).round(decimals=5).unique().tolist()) <= {0.0, 1.0, 2.0} for w in sites.values())


def test_spectrs_shortlist_is_arrows(llama: Pico) -> None:
    """LAG: of Arrow's two best the one with the highest score."""
    model = fitting(llama)
    arrow, whole, both = fit(llama, "arrow"), fit(llama, "spectr"), fit(llama, "spectr", shortlist=2, top_k=1)
    torch.manual_seed(0)
    differs = False
    for group in model.groups:
        x_BTD = torch.randn(1, 50, group.width)
        for site in group.sites:
            near = arrow.score(group, site, x_BTD).topk(min(2, len(model.factors(site))), dim=-1).indices
            scores = whole.score(group, site, x_BTD)
            best = near.gather(-1, scores.gather(-1, near).argmax(-1, keepdim=True))[..., 0]
            assert torch.equal(both.score(group, site, x_BTD).argmax(-1), best)
            differs |= not torch.equal(best, scores.argmax(-1))
    assert differs


# -------------------------------------------------------------------------------------------------------- average activation


@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("normalise", ["layer", "length"])
def test_centroids_are_those_of_one_row_at_a_time(world: Pico, pool: str, normalise: str) -> None:
    """Against forwards of single rows without padding, the adapter alone; and the scores against the formula."""
    router, model = fit(world, "average_activation", pool=pool, normalise=normalise), fitting(world)
    assert isinstance(router, AverageActivation)
    for e, name in enumerate(NAMES):
        found: dict[str, list[torch.Tensor]] = {group.name: [] for group in model.groups}

        def weights(group: Any, x: torch.Tensor, e: int = e, found: Any = found) -> torch.Tensor:
            found[group.name].append(x[0].double().mean(0) if pool == "mean" else x[0, -1].double())
            return torch.eye(4)[e].expand(1, 1, 1, 4)

        for shot in profile(world).shots[name]:
            model.observe(model.encode([[shot]]), weights)
        for group in model.groups:
            c = torch.stack(found[group.name]).mean(0)
            x = torch.randn(1, 5, group.width).double()
            if normalise == "layer":
                layer = torch.nn.functional.layer_norm
                expected = layer(x, c.shape) @ layer(c, c.shape) / len(c) ** 0.5
            else:
                expected = x @ c / c.norm() / len(c) ** 0.5
            for site in group.sites:
                score = router.score(group, site, x.float())[..., e].double()
                if name in model.factors(site):
                    torch.testing.assert_close(score, expected, rtol=1e-3, atol=1e-3)
                else:
                    assert (score == float("-inf")).all()


def test_an_adapter_without_shots_has_no_centroid(llama: Pico) -> None:
    some = replace(profile(llama, better="code"), assigned={name: (name,) for name in NAMES if name != "law"})
    router = AverageActivation.fit(fitting(llama), some, AverageActivationConfig())
    assert router.report["without_shots"] == ["law"]
    assert all(rows.offset_E is not None and rows.offset_E[1] == float("-inf") for rows in router.rows.values())
    rest = router.without("poem")  # sites stay that only `law` touches
    assert routed(llama, rest).weights_for(ids(routed(llama, rest))).share()[:, 1].abs().max() == 0


# -------------------------------------------------------------------------------------------------------------------- random


def test_random_gates_are_their_adapters_own(llama: Pico) -> None:
    one, other = fit(llama, "random"), fit(llama, "random", ("poem", "code"), better=None)
    assert isinstance(one, Random) and isinstance(other, Random)
    for site, rows in other.rows.items():
        assert torch.equal(rows.v_ED[1], one.rows[site].v_ED[0])
        assert torch.equal(rows.v_ED[0], one.rows[site].v_ED[3])
    drawn = [row for rows in one.rows.values() for row in rows.v_ED if row.any() and len(row) == 32]
    assert len(drawn) > 20
    assert (torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))).abs().max() < 0.9  # no two are the same
    again = fit(llama, "random", seed=1)
    assert not any(torch.equal(a, again.tensors()[k]) for k, a in one.tensors().items() if k.endswith(".gate"))


def test_random_scores_are_standard_normal(llama: Pico) -> None:
    router, model = fit(llama, "random"), fitting(llama)
    torch.manual_seed(0)
    scores = torch.cat(
        [router.score(g, s, torch.randn(1, 200, g.width) * 7 + 3).flatten() for g in model.groups for s in g.sites]
    )
    scores = scores[scores.isfinite()]
    assert abs(float(scores.mean())) < 0.1 and abs(float(scores.std()) - 1) < 0.1


# -------------------------------------------------------------------------------------------------------------------- single


def test_single_uses_one_adapter(llama: Pico) -> None:
    for router, name in ((fit(llama, "single"), "law"), (fit(llama, "single", adapter="poem"), "poem")):
        model = routed(llama, router)
        batch = ids(model)
        with torch.no_grad():
            ours = model(**batch).logits
            with model.only(name):
                assert torch.equal(ours, model(**batch).logits)
        assert router.report == {"adapter": name}


def test_single_is_the_base_where_that_is_best(llama: Pico) -> None:
    router = fit(llama, "single", better=None)
    assert router.report == {"adapter": "base"} and not router.tensors()["weights"].any()


def test_single_must_be_told(llama: Pico) -> None:
    with pytest.raises(UsageError, match=r"was not told which.*--profile NAME.*adapter=NAME"):
        Single.fit(fitting(llama), None, SingleConfig())
    with pytest.raises(UsageError, match=r"no adapter 'prose'.*code, law, math, poem"):
        Single.fit(fitting(llama), None, SingleConfig(adapter="prose"))
    assert Single.fit(fitting(llama), None, SingleConfig(adapter="math")).weights_E.tolist() == [0, 0, 1, 0]
    with pytest.raises(UsageError, match="law is the adapter that this router uses"):
        fit(llama, "single").without("law")


# -------------------------------------------------------------------------------------------------------------------- oracle


def test_the_oracle_does_as_it_is_told(world: Pico, tmp_path: Path) -> None:
    """Row by row each task's own adapter, after saving and loading too."""
    fit(world, "oracle").save(tmp_path / "gates")
    model = routed(world, load_router(tmp_path / "gates"))
    batch, options = ids(model), {"max_new_tokens": 4, "do_sample": False}
    with model.labelled(["poem", "math"]):
        told = model.generate(**batch, **options)
    expected = []
    for name in ("poem", "math"):
        with model.only(name):
            expected.append(model.generate(**batch, **options))
    assert torch.equal(told[0], expected[0][0]) and torch.equal(told[1], expected[1][1])
    assert model.tasks is None


@pytest.mark.parametrize(
    "unlabelled, better, used", [("single", "law", "law"), ("base", "law", "base"), ("single", None, "base")]
)
def test_rows_without_a_label(llama: Pico, unlabelled: str, better: str | None, used: str) -> None:
    router = fit(llama, "oracle", better=better, unlabelled=unlabelled)
    model = routed(llama, router)
    plan = router.prepare(model.reading, ids(model))
    assert [why["adapter"] for why in router.explain(plan) or []] == [used, used]
    with model.labelled(["prose", "code"]):
        plan = router.prepare(model.reading, ids(model))
    assert router.explain(plan) == [
        {"task": "prose", "adapter": used, "unlabelled": unlabelled},
        {"task": "code", "adapter": "code"},
    ]
    assert plan.weights_BE[1].tolist() == [1, 0, 0, 0]


def test_a_task_that_nobody_helps_is_the_bases(llama: Pico) -> None:
    nobody = replace(profile(llama), assigned={"code": ("code",)})
    router = Oracle.fit(fitting(llama), nobody, OracleConfig())
    assert router.report["tasks"] == {"code": "code", "law": "base", "math": "base", "poem": "base"}
    assert router.table_CE.sum(1).tolist() == [1, 0, 0, 0]


def test_labels_must_fit_the_batch(llama: Pico) -> None:
    model = routed(llama, fit(llama, "oracle"))
    with model.labelled(["math"]), pytest.raises(UsageError, match="1 rows are labelled, and the batch has 2"):
        model(**ids(model))


def test_rows_may_name_their_task(llama: Pico, tmp_path: Path) -> None:
    """`recycle run` tells the oracle; batches are sorted by length, so that labels must follow their rows."""
    import json

    model = routed(llama, fit(llama, "oracle"))
    texts = ["x" * 30, "y", "z" * 12, "what?", "u" * 5]
    tasks = ["poem", "code", None, "math", "prose"]
    rows = [{"prompt": text} | ({} if task is None else {"task": task}) for text, task in zip(texts, tasks, strict=True)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    answers = [
        json.loads(line)["generated"] for line in answer_file(lambda: model, source, None, max_new_tokens=5, batch_size=2)
    ]
    alone = {}
    for name in ("poem", "code", "law", "math"):
        lines = answer_file(lambda: model, source, None, max_new_tokens=5, only=name)
        alone[name] = [json.loads(line)["generated"] for line in lines]
    assert answers == [alone[name][i] for i, name in enumerate(("poem", "code", "law", "math", "law"))]
    assert len(set(zip(*alone.values(), strict=True))) and alone["poem"] != alone["code"]


# ------------------------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("method", COLUMNS)
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_comes_and_goes_and_nothing_else_changes(world: Pico, method: str, name: str) -> None:
    """Any of the four may be the new one: some touch sites that the others do not."""
    names = tuple(other for other in NAMES if other != name)
    small = fit(world, method, names, better=names[0])
    before = {key: tensor.clone() for key, tensor in small.tensors().items()}
    grown = small.extended(fitting(world, (*names, name)), profile(world, (*names, name), names[0]), name)
    whole = fit(world, method, (*names, name), better=names[0])
    assert grown.adapters == (*names, name) and grown.tensors().keys() == whole.tensors().keys()
    for key, tensor in whole.tensors().items():
        torch.testing.assert_close(grown.tensors()[key], tensor, rtol=1e-4, atol=1e-5)
    assert find(method).extends()
    back = grown.without(name)
    assert back.adapters == names and back.tensors().keys() == before.keys()
    for key, tensor in before.items():
        assert torch.equal(back.tensors()[key], tensor) and torch.equal(small.tensors()[key], tensor)
        if method != "uniform" and not key.endswith((".basis", ".scale")):
            assert torch.equal(grown.tensors()[key][: len(tensor)], tensor)
    routed(world, back).weights_for(ids(routed(world, back)))
    with pytest.raises(UsageError, match=f"no adapter {name}"):
        back.without(name)


@pytest.mark.parametrize("method", COLUMNS)
def test_the_new_one_must_come_last(llama: Pico, method: str) -> None:
    small = fit(llama, method, ("code", "law"), better="code")
    with pytest.raises(UsageError, match="the new one last"):
        small.extended(fitting(llama, ("code", "poem", "law")), profile(llama), "poem")
    with pytest.raises(UsageError, match="only adapter"):
        fit(llama, method, ("code",), better=None).without("code")


@pytest.mark.parametrize("method", [m for m in COLUMNS if m not in ("uniform", "single")])
def test_a_column_of_another_model_is_noticed(llama: Pico, method: str) -> None:
    router = fit(llama, method, ("law",))
    group = next(group for group in fitting(llama).groups if "down_proj" in group.name)
    with pytest.raises(recycler.RecycleError, match="no gate for"):
        router.gate(group)


@pytest.mark.parametrize(
    "config, options",
    [
        (SpectrConfig, {"shortlist": 0}),
        (SpectrConfig, {"top_k": 0}),
        (SpectrConfig, {"equal": True, "shared": True, "renormalise": False}),
        (AverageActivationConfig, {"tokens": 0}),
        (RandomConfig, {"temperature": 0}),
    ],
)
def test_options_that_make_no_gates(config: Any, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="=".join(map(str, next(iter(options.items())))).lower()):
        config(**options)


@pytest.mark.parametrize("method, option", [("spectr", "score"), ("average_activation", "pool"), ("oracle", "unlabelled")])
def test_words_that_are_no_choice(method: str, option: str) -> None:
    with pytest.raises(UsageError, match=f"{option}='prose' is not what {option} takes"):
        make_config(find(method), {option: "prose"})


def test_spectr_is_found_as_a_router() -> None:
    assert find("spectr") is Spectr
