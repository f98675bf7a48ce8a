"""`build-router auto`: candidates on left-out shots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico
from way import Way, one_by_one

import recycler
from recycler import Shots
from recycler.base import load_base
from recycler.build import build_router
from recycler.evaluating.choosing import deal, keep_shots, without_task
from recycler.profiles import Profile, measure
from recycler.routed import RoutedModel
from recycler.routers.base import Router
from recycler.routers.discovery import load_router, methods
from recycler.scoring import mean_nll
from recycler.shots import Shot
from recycler.zoo.errors import InputError, UsageError

OWN = {name: name for name in ("code", "law", "math", "poem")}


def test_folds_cover_every_shot_once(way: Way) -> None:
    parts = deal(way.profile, 2)
    for task in way.profile.tasks:
        assert sorted(k for part in parts for k in part[task]) == [0, 1, 2]
        assert abs(len(parts[0][task]) - len(parts[1][task])) <= 1
    assert deal(way.profile, 2) == parts
    assert all(len({len(numbers) for numbers in part.values()}) == 1 for part in parts)


def test_a_profile_of_some_shots_is_what_they_would_have_given(way: Way) -> None:
    kept = {task: [(t + 1) % 3, t % 3] for t, task in enumerate(way.profile.tasks)}
    some = keep_shots(way.profile, kept)
    model = RoutedModel(
        load_base(str(way.pico.base)), recycler.build.read_adapters(way.zoo, some.adapters, load_base(str(way.pico.base)))
    )  # type: ignore[attr-defined]
    nll, _ = measure(model, some.shots)
    torch.testing.assert_close(some.nll, nll, atol=1e-4, rtol=1e-4)
    without = without_task(way.profile.assign(OWN), "law")
    assert without.tasks == tuple(t for t in way.profile.tasks if t != "law")
    assert without.nll.shape == (5, 3, 3) and "law" not in without.assigned
    column = way.profile.tasks.index("poem")
    torch.testing.assert_close(without.nll[:, without.tasks.index("poem")], way.profile.nll[:, column])


def test_auto_fits_the_best_on_all_shots(way: Way, tmp_path: Path) -> None:
    """Nobody answers anything here, so that the lowest NLL on left-out shots decides: computed again, fold by fold."""
    profile = way.profile.assign(OWN)
    candidates = ("ridge:chains=2", "arrow", "ridge:chains=2:top_k=1")
    router = recycler.build_router(
        "auto", profile, zoo=way.zoo, methods=",".join(candidates), folds=3, unseen=1, out=tmp_path / "r"
    )
    table = router.report["auto"]["table"]
    assert set(table) == {"base", "best single", "uniform", *candidates}
    expected: dict[str, float] = {}
    for label in candidates:
        method, *pairs = label.split(":")
        options = dict(pair.split("=") for pair in pairs)
        losses: list[float] = []
        for part in deal(profile, 3):
            kept = {task: [k for k in range(3) if k not in part[task]] for task in part}
            model = recycler.compose(way.zoo, build_router(method, keep_shots(profile, kept), zoo=way.zoo, **options))
            losses += mean_nll(model, [profile.shots[task][k] for task in part for k in part[task]])
        expected[label] = sum(losses) / len(losses)
        assert table[label]["nll"] == pytest.approx(expected[label], abs=2e-3)
        assert table[label]["exact"] == 0 and table[label]["unseen"] == 0
    assert table["base"]["nll"] == pytest.approx(float(profile.nll[0].mean()), abs=2e-3)
    best = min(expected, key=expected.__getitem__)
    assert router.report["auto"]["chosen"] == best and next(iter(table)) in ("best single", "uniform", "base", best)
    assert router.report["auto"]["verdict"].startswith("don't bother")
    method, *pairs = best.split(":")
    alone = build_router(method, profile, zoo=way.zoo, **dict(pair.split("=") for pair in pairs))
    saved = load_router(tmp_path / "r")
    assert saved.method() == method and saved.report["auto"]["chosen"] == best
    for name, tensor in alone.tensors().items():
        assert torch.equal(saved.tensors()[name], tensor)


def test_what_fails_is_said_and_the_others_go_on(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = methods()["arrow"]

    def broken(*args: Any) -> Router:
        raise ImportError("no module")

    monkeypatch.setattr(cls, "fit", broken)
    profile = way.profile.assign(OWN)
    router = recycler.build_router("auto", profile, zoo=way.zoo, methods="arrow,ridge", folds=2, unseen=0)
    assert router.method() == "ridge" and router.report["auto"]["failed"] == {"arrow": "ImportError: no module"}
    with pytest.raises(InputError, match="None of the candidates could be fitted"):
        recycler.build_router("auto", profile, zoo=way.zoo, methods="arrow", folds=2, unseen=0)


def test_candidates_by_default_need_no_training(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    from recycler.evaluating.choosing import _cheap

    found = _cheap()
    assert {"ridge", "arrow"} <= set(found) and not {"phatgoose", "glider", "uniform", "oracle", "random"} & set(found)
    assert "auto" not in methods()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"folds": 1}, "folds=1"),
        ({"unseen": -1}, "unseen=-1"),
        ({"patience": 0}, "patience=0"),
        ({"steps": 3}, "auto has no option 'steps'"),
        ({"folds": 4}, "has 3 shots a task"),
        ({"methods": "nope"}, "no router called 'nope'"),
        ({"methods": "ridge:ridge=-1"}, "ridge=-1"),
    ],
)
def test_what_auto_refuses(way: Way, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recycler.build_router("auto", way.profile, zoo=way.zoo, base="nowhere" if "folds" not in options else None, **options)


def test_auto_needs_a_profile_and_room(way: Way, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no profile was given"):
        recycler.build_router("auto", zoo=way.zoo)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(UsageError, match="something else than a router"):
        recycler.build_router("auto", way.profile, zoo=way.zoo, out=tmp_path / "notes")
    assert isinstance(way.profile, Profile)


def test_whoever_routes_right_is_chosen(llama: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shots whose answers are what each task's own adapter says: then the one that is told the task answers everything, whoever is
    clearly behind is spared the later folds, and a bench of the same rows finds the same."""
    # Random models never stop: an answer is right that begins as the reference does.
    monkeypatch.setattr(
        "recycler.evaluating.exam.exact_match", lambda given, reference: given.startswith(reference.rstrip("\ufffd"))
    )
    zoo = recycler.Zoo(llama.zoo)
    model = recycler.compose(zoo, recycler.build_router("uniform", zoo=zoo))
    shots = {}
    for name in OWN:
        prompts = [f"{'abcdefgh'[i]}{len(name) * i} {name}?" for i in range(4)]
        with model.only(name):
            shots[name] = [Shot(prompt, one_by_one(model, [prompt], 6)[0]) for prompt in prompts]
    assert all(shot.completion.strip() for some in shots.values() for shot in some)
    model.engine.detach()
    measured = recycler.profile(zoo, Shots(shots), kshot=4, assign=OWN)
    router = recycler.build_router("auto", measured, zoo=zoo, methods="single,oracle", folds=4, unseen=0)
    found = router.report["auto"]
    assert router.method() == "oracle" and found["chosen"] == "oracle router", found
    table = found["table"]
    assert table["oracle router"]["exact"] == 1 and table["single"]["exact"] < 0.5
    assert table["single"]["folds"] < 4 == table["oracle router"]["folds"]
    assert found["verdict"].startswith("oracle router 1.000")
    bench = recycler.bench_routers(measured, "single,oracle", tasks=Shots(measured.shots), zoo=zoo)
    assert bench.mean("oracle router") == bench.mean("oracle") == 1 and len(bench.beyond["held-in"]) < 4
    assert bench.choice[0] != "oracle router"  # nobody is told the task
