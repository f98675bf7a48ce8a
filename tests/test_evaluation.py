"""Evaluation beside the right baselines, and its verdict, on pico models."""

from __future__ import annotations

import json

import pytest
import torch
from way import NAMES, Way, never, one_by_one

import recycler
from recycler import Shots
from recycler.evaluating.evaluation import Evaluation, evaluate
from recycler.zoo.errors import UsageError


def test_evaluation_stands_beside_the_right_baselines(way: Way) -> None:
    model = recycler.load(way.folder)
    shots = Shots({task: rows[:2] for task, rows in Shots.from_files(*way.pico.tasks).items()})
    arrow = recycler.build_router("arrow", zoo=way.zoo)
    result = evaluate(model, shots, routers={"ridge": way.router, "arrow": arrow}, max_new_tokens=4)
    assert result.contenders == ("base", "best single", "uniform", "oracle", "ridge", "arrow")
    assert result.routers == ("ridge", "arrow") and result.tasks == way.profile.tasks
    known = way.router.facts["profile"]
    single = known["best_single"] or "base"
    assert result.chosen["best_single"] == {"adapter": single, "how": "by profile"}
    arrows = recycler.compose(way.zoo, arrow)
    assert model.router is not None and model.router.facts == way.router.facts  # its own router is back
    for task, rows in shots.items():
        prompts = [shot.prompt for shot in rows]
        own = known["owner"].get(task)
        assert result.chosen["oracle"][task] == {"adapter": own or "base", "how": "by profile"}
        with model.disabled():
            assert result.generated["base"][task] == (plain := one_by_one(model, prompts, 4))
        with model.mixture(dict.fromkeys(NAMES, 0.25)):
            assert result.generated["uniform"][task] == one_by_one(model, prompts, 4)
        with model.only(own or "math"):
            assert result.generated["oracle"][task] == (one_by_one(model, prompts, 4) if own else plain)
        with model.only(single if single != "base" else "math"):
            assert result.generated["best single"][task] == (one_by_one(model, prompts, 4) if single != "base" else plain)
        assert result.generated["ridge"][task] == one_by_one(model, prompts, 4)
        assert result.generated["arrow"][task] == one_by_one(arrows, prompts, 4)
    assert "Don't bother" in result.verdict()  # nobody ever answers well here
    data = json.loads(json.dumps(result.to_json()))
    assert data["schema_version"] == 1 and set(data["contenders"]) == set(result.contenders)


def test_nll_of_the_baselines(way: Way) -> None:
    """The profile's shots, evaluated: the same numbers by another way."""
    model = recycler.load(way.folder)
    result = evaluate(model, way.profile.shots, max_new_tokens=1)
    rows = {name: row for row, name in enumerate(("base", *NAMES))}
    for column, task in enumerate(way.profile.tasks):
        for label, name in (("base", "base"), ("oracle", result.chosen["oracle"][task]["adapter"])):
            expected = way.profile.nll[rows[name], column]
            torch.testing.assert_close(torch.tensor(result.nll[label][task]), expected, atol=1e-4, rtol=1e-4)
    assert result.mean("oracle", "nll") <= min(result.mean(c, "nll") for c in ("base", "best single")) + 1e-4


def test_baselines_in_hindsight(way: Way) -> None:
    """A router that was built without shots: whoever scores best on the rows stands behind the baselines."""
    model = recycler.compose(way.zoo, recycler.build_router("arrow", zoo=way.zoo))
    result = evaluate(model, way.profile.shots, owner={way.profile.tasks[0]: "poem"}, max_new_tokens=1)
    nll_RT = way.profile.nll.mean(-1)
    names = ("base", *NAMES)
    assert result.chosen["oracle"][way.profile.tasks[0]] == {"adapter": "poem", "how": "by hand"}
    for column, task in enumerate(way.profile.tasks[1:], 1):
        best = names[int(nll_RT[:, column].argmin())]
        assert result.chosen["oracle"][task] == {"adapter": best, "how": "in hindsight"}
    best = names[int(nll_RT.mean(1).argmin())]
    assert result.chosen["best_single"] == {"adapter": best, "how": "in hindsight"}


def test_a_router_that_is_called_like_a_baseline(way: Way) -> None:
    model = recycler.compose(way.zoo, recycler.build_router("uniform", way.profile, zoo=way.zoo))
    result = evaluate(model, Shots({"math": way.profile.shots["math"]}), max_new_tokens=2)
    assert result.contenders == ("base", "best single", "uniform", "oracle", "uniform router")
    assert result.generated["uniform router"] == result.generated["uniform"]
    assert result.verdict().startswith("Don't bother")


def test_what_evaluation_refuses(way: Way) -> None:
    model = recycler.load(way.folder)
    shots = Shots({"math": way.profile.shots["math"]})
    other = recycler.build_router("uniform", zoo=way.zoo, adapters=["math", "law"])
    before = model.router
    for options, message in (
        ({"owner": {"math": "prose"}}, "no adapter 'prose'"),
        ({"owner": {"prose": "math"}}, "no task 'prose'"),
        ({"routers": {"other": other}}, "The router is for math, law"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(model, shots, progress=lambda steps, what: never(), **options)  # type: ignore[arg-type]
    assert model.router is before
    for nothing in (Shots({}), Shots({"math": []})):
        with pytest.raises(UsageError, match="no rows to evaluate"):
            evaluate(model, nothing)
    model.use(None)
    with pytest.raises(UsageError, match="no router to evaluate"):
        evaluate(model, shots)


def by_hand(**exact: list[float]) -> Evaluation:
    """An evaluation of one task; `ridge` and `arrow` are its routers."""
    table = {name.replace("_", " "): {"math": rows} for name, rows in exact.items()}
    return Evaluation(tuple(table), tuple(c for c in table if c in ("ridge", "arrow")), table, table, {}, {})


def test_verdict() -> None:
    none, half, all_ = [0.0] * 40, [0.0, 1.0] * 20, [1.0] * 40
    helps = by_hand(base=none, best_single=half, uniform=none, oracle=all_, ridge=all_)
    assert helps.verdict() == "Routing helps: ridge 1.000, best single 0.500: +0.500 [+0.350, +0.650]."
    worse = by_hand(base=none, best_single=all_, uniform=none, oracle=all_, ridge=half)
    assert worse.verdict().startswith("Don't bother: routing loses to best single (ridge 0.500, best single 1.000: -0.500 [")
    same = by_hand(base=half, best_single=none, uniform=none, oracle=all_, ridge=half)
    assert same.verdict().startswith("Don't bother: no gain that these rows can show") and "Use base" in same.verdict()
    slight = by_hand(base=none, best_single=none, uniform=half, oracle=all_, ridge=[1.0, *half[1:]])
    assert slight.verdict().startswith("Don't bother: no gain") and "Use uniform" in slight.verdict()
    # The oracle knows the task and is nobody's rival; the best of several routers speaks for routing.
    several = by_hand(base=none, best_single=none, uniform=none, oracle=all_, ridge=none, arrow=half)
    assert several.verdict().startswith("Routing helps: arrow 0.500, base 0.000")


def test_intervals() -> None:
    result = by_hand(base=[0.0] * 50, ridge=[1.0] * 50, arrow=[0.0, 1.0] * 25)
    assert result.interval("base") == (0.0, 0.0) and result.interval("ridge") == (1.0, 1.0)
    low, high = result.interval("arrow")
    assert low < 0.5 < high and 0.24 < high - low < 0.31  # 2 × 1.96 × √(0.25 / 50) = 0.277
    assert result.interval("arrow") == (low, high)  # the same every time
    assert result.interval("ridge", minus="base") == (1.0, 1.0) and result.interval("arrow", minus="arrow") == (0.0, 0.0)
    down, up = result.interval("base", minus="arrow")
    assert down == pytest.approx(-high) and up == pytest.approx(-low)


def test_every_task_counts_the_same() -> None:
    table = {c: {"math": [value] * 90, "law": [0.0] * 10} for c, value in (("base", 0.0), ("ridge", 1.0))}
    result = Evaluation(("base", "ridge"), ("ridge",), table, table, {}, {})
    assert result.mean("ridge") == 0.5 and result.interval("ridge") == (0.5, 0.5)


def test_task_by_task() -> None:
    none, few, half, all_ = [0.0] * 40, [1.0, *[0.0] * 39], [0.0, 1.0] * 20, [1.0] * 40
    table = {
        "base": {"helped": none, "beyond": none, "lost": none, "known": all_, "short": none[:4]},
        "best single": {"helped": none, "beyond": none, "lost": half, "known": all_, "short": none[:4]},
        "ridge": {"helped": half, "beyond": few, "lost": none, "known": all_, "short": few[:4]},
        "arrow": {"helped": none, "beyond": none, "lost": none, "known": none, "short": none[:4]},
    }
    result = Evaluation(tuple(table), ("ridge", "arrow"), table, table, {}, {})
    found = result.by_task()
    assert {task: one["verdict"] for task, one in found.items()} == {
        "helped": "routing helps",
        "beyond": "beyond the zoo: don't bother",  # one right answer of forty is luck
        "lost": "don't bother",  # something helps, and no router
        "known": "beyond the zoo: don't bother",
        "short": "too few rows to tell",  # one of four may be luck, and may be a quarter
    }
    assert found["helped"]["router"] == "ridge" and found["helped"]["gain"] == 0.5 and found["helped"]["interval"][0] > 0.2
    assert found["lost"]["best"] == "best single" and found["lost"]["best_exact"] == 0.5
    assert result.beyond == ("beyond", "known") and result.untold == ("short",)
    assert result.interval("ridge", "base", tasks=["helped"]) == result.interval("ridge", tasks=["helped"])
    narrow, wide = (result.interval("ridge", tasks=["helped"], level=level) for level in (0.5, 0.99))
    assert wide[0] < narrow[0] <= narrow[1] < wide[1]


def test_what_routers_cost(way: Way) -> None:
    model = recycler.load(way.folder)
    result = evaluate(model, Shots({"math": way.profile.shots["math"]}), max_new_tokens=2)
    assert set(result.seconds) == set(result.contenders) and all(a > 0 and b > 0 for a, b in result.seconds.values())
    assert result.size == {"ridge": sum(t.numel() * t.element_size() for t in way.router.tensors().values())}
    data = result.to_json()
    assert data["contenders"]["ridge"]["router_bytes"] == result.size["ridge"]
    assert data["contenders"]["uniform"]["seconds_per_row"] > 0 and set(data["by_task"]) == {"math"}


def test_routers_that_decide_once_a_sequence(way: Way) -> None:
    """Each row's answer is that of the mixture that was decided for it, also where the router wants to be told the task."""
    model = recycler.load(way.folder)
    shots = Shots({task: rows[:2] for task, rows in Shots.from_files(*way.pico.tasks).items()})
    profile = way.profile.assign({name: name for name in NAMES})
    routers = {label: recycler.build_router(label, profile, zoo=way.zoo) for label in ("oracle", "single")}
    result = evaluate(model, shots, routers={"told": routers["oracle"], "one": routers["single"]}, max_new_tokens=4)
    for task, rows in shots.items():
        prompts = [shot.prompt for shot in rows]
        with model.only(task):
            assert result.generated["told"][task] == one_by_one(model, prompts, 4)
    assert result.generated["one"] == result.generated["best single"]
