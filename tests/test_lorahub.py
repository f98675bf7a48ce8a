"""LoraHub's search: what it minimises, what it is never worse than, and that it finds a planted mixture."""

from __future__ import annotations

import builtins
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Pico
from torch import Tensor

import recycler
from recycler.base import load_base
from recycler.build import read_adapters
from recycler.profiles import Profile
from recycler.routed import RoutedModel
from recycler.routers.lorahub import Lorahub, LorahubConfig, candidates
from recycler.scoring import Fitting, mean_nll
from recycler.zoo.adapter import Factors
from recycler.zoo.errors import UsageError

NAMES = ("code", "law", "math", "poem")


@pytest.fixture(scope="module")
def profile(llama: Pico) -> Profile:
    shots = recycler.Shots.from_files(*llama.tasks)
    own = {name: [name] for name in NAMES}
    return recycler.profile(recycler.Zoo(llama.zoo), shots, kshot=4, dtype="float32", assign=own)


def build(llama: Pico, profile: Profile, **config: Any) -> Lorahub:
    router = recycler.build_router("lorahub", profile, zoo=recycler.Zoo(llama.zoo), **{"budget": 12, "seeds": 1, **config})
    assert isinstance(router, Lorahub)
    return router


def model(llama: Pico) -> RoutedModel:
    base = load_base(str(llama.base))
    return RoutedModel(base, read_adapters(recycler.Zoo(llama.zoo), NAMES, base))


def test_it_is_never_worse_than_base_and_best_single_on_its_shots(llama: Pico, profile: Profile) -> None:
    """By another way of scoring: one row at a time. Even where the L1 term would rather have the base."""
    for l1, budget in ((0.05, 12), (100.0, 1)):
        router = build(llama, profile, task="math,law", l1=l1, budget=budget)
        shots = [shot for task in ("math", "law") for shot in profile.shots[task]]
        scorer = model(llama)

        def score(w_E: Tensor, shots: Any = shots, scorer: RoutedModel = scorer) -> float:
            return sum(mean_nll(scorer, shots, w_E.repeat(len(shots), 1), tokens=1)) / len(shots)

        rivals = [score(torch.zeros(4)), *(score(row) for row in torch.eye(4))]
        index = {name: e for e, name in enumerate(router.adapters)}
        w_E = router.weights_E[[index[name] for name in NAMES]]
        assert score(w_E) <= min(rivals) + 1e-4
        assert router.report["nll"] == pytest.approx(score(w_E), abs=1e-3)
        assert router.report["nll_base"] == pytest.approx(rivals[0], abs=1e-3)


def test_it_finds_a_planted_mixture(llama: Pico, profile: Profile) -> None:
    """Shots answered by 1.2 · math − 0.5 · law: the search gets closer to that than where it starts from."""
    scorer = model(llama)
    fitting = Fitting(scorer)
    target = torch.tensor([0.0, -0.5, 1.2, 0.0])

    def nll(batch: Any, w_E: Tensor) -> Tensor:
        return (batch.labels_BT != -100).float() * (0.1 + (w_E - target).square().sum())

    fitting.nll = nll  # type: ignore[method-assign, assignment]
    aligned = profile.restricted(NAMES)
    router = Lorahub.fit(fitting, aligned, LorahubConfig(budget=150, seeds=2, l1=0.0))
    assert float((router.weights_E - target).norm()) < 0.2
    assert len(router.report["nll_of_seeds"]) == 2 and max(router.report["nll_of_seeds"]) < 0.3
    bounded = Lorahub.fit(fitting, aligned, LorahubConfig(budget=60, seeds=3, l1=0.0, bound=0.25))
    searched = bounded.weights_E.abs().max() <= 0.25
    assert searched or bounded.weights_E.tolist() == [0, 0, 1, 0]  # the best single one is no worse


def test_the_l1_term_is_a_mean_over_candidates(llama: Pico, profile: Profile) -> None:
    fitting = Fitting(model(llama))
    fitting.nll = lambda batch, w: (batch.labels_BT != -100).float()  # type: ignore[method-assign, assignment]
    flat = Lorahub.fit(fitting, profile.restricted(NAMES), LorahubConfig(budget=20, seeds=1))
    assert flat.weights_E.tolist() == [0.0] * 4  # where nothing helps, nothing is added


def test_the_loss_is_not_even_where_updates_are_mixed(llama: Pico, profile: Profile) -> None:
    """With factors mixed, Σ w A · Σ w B, w and −w are one model; that is why updates are mixed here."""
    scorer, shots = model(llama), list(profile.shots["math"])
    w_E = torch.tensor([0.4, -0.2, 0.7, 0.0])

    def exact(w_E: Tensor) -> float:
        return sum(mean_nll(scorer, shots, w_E.repeat(len(shots), 1)))

    assert abs(exact(w_E) - exact(-w_E)) > 1e-2

    base = load_base(str(llama.base))
    plain = read_adapters(recycler.Zoo(llama.zoo), ["math"], base)[0]
    other = replace(plain, name="twin", sites={s: Factors(f.a_RD.flip(0) * 0.5, f.b_OR) for s, f in plain.sites.items()})

    def factor(w: tuple[float, float]) -> float:
        sites = {
            site: Factors(w[0] * f.a_RD + w[1] * other.sites[site].a_RD, w[0] * f.b_OR + w[1] * other.sites[site].b_OR)
            for site, f in plain.sites.items()
        }
        mixed = RoutedModel(base, [replace(plain, name="mixed", sites=sites)])
        losses = mean_nll(mixed, shots, torch.ones(len(shots), 1))
        mixed.engine.detach()
        return sum(losses)

    assert factor((0.4, -0.9)) == pytest.approx(factor((-0.4, 0.9)), rel=1e-6)


def test_the_best_on_the_shots_are_searched_over(llama: Pico, profile: Profile) -> None:
    fitting = Fitting(model(llama))
    tasks, column = ["law"], list(profile.shots).index("law")
    mean_E = {name: float(profile.nll[1 + profile.adapters.index(name), column].mean()) for name in NAMES}
    assert candidates(fitting, profile, tasks, 4, 2) == sorted(sorted(mean_E, key=mean_E.__getitem__)[:2])
    router = build(llama, profile, task="law", candidates=2)
    assert int((router.weights_E != 0).sum()) <= 2 and set(router.report["weights"]) == set(
        candidates(fitting, profile, tasks, 4, 2)
    )


def test_the_number_of_shots_is_limited_evenly(llama: Pico, profile: Profile) -> None:
    assert build(llama, profile, rows=8, budget=1).report["shots"] == 8
    assert build(llama, profile, rows=2, budget=1).report["shots"] == 4  # one of each task at least
    assert build(llama, profile, rows=8, task="law", budget=1).report["shots"] == 4


def test_seeds_and_optimizers(llama: Pico, profile: Profile) -> None:
    one = build(llama, profile, optimizer="OnePlusOne", seeds=2)
    assert torch.equal(one.weights_E, build(llama, profile, optimizer="OnePlusOne", seeds=2).weights_E)
    with pytest.raises(UsageError, match="no optimizer 'Adam'"):
        build(llama, profile, optimizer="Adam")


def test_tasks_that_are_not_there(llama: Pico, profile: Profile) -> None:
    with pytest.raises(UsageError, match="no task novel"):
        build(llama, profile, task="novel, law")
    with pytest.raises(UsageError, match="no profile"):
        recycler.build_router("lorahub", zoo=recycler.Zoo(llama.zoo))


def test_a_search_that_fails_leaves_no_thread(llama: Pico, profile: Profile) -> None:
    """Python would wait for it at its end, and never come to one."""
    fitting = Fitting(model(llama))
    calls = iter(range(10))

    def nll(batch: Any, w_E: Tensor) -> Tensor:
        if next(calls) > 7:
            raise KeyboardInterrupt
        return (batch.labels_BT != -100).float()

    fitting.nll = nll  # type: ignore[method-assign, assignment]
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt) as kept:
        Lorahub.fit(fitting, profile.restricted(NAMES), LorahubConfig(optimizer="Cobyla"))
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and "Messaging" in type(thread).__name__:
            thread.join(5)
    assert kept and threading.active_count() == before


def test_searches_start_from_different_places(llama: Pico, profile: Profile) -> None:
    starts = [build(llama, profile, task="law", budget=1, seeds=seeds).report["nll_of_seeds"] for seeds in (1, 3)]
    assert len(starts[1]) == 3 and starts[1][0] == starts[0][0] and len(set(starts[1])) == 3


def test_without_nevergrad_it_says_what_to_install(llama: Pico, profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "nevergrad":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match=r"pip install 'recycler\[lorahub\]'"):
        build(llama, profile)


@pytest.mark.parametrize(
    "name, value",
    [("candidates", 0), ("budget", 0), ("seeds", 0), ("rows", 0), ("tokens", 0), ("bound", 0), ("bound", float("inf")), ("l1", -1),
     ("l1", float("nan"))],
)  # fmt: skip
def test_options_that_make_no_search(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"^{name}={value}"):
        LorahubConfig(**{name: value})  # type: ignore[arg-type]
