"""Choosing candidates before routing, from a profile and from the updates themselves."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from conftest import Pico
from hypothesis import given
from hypothesis import strategies as st

import recycler
from recycler import Profile, Shots
from recycler.selection import narrowed, rankings, select
from recycler.shots import Shot
from recycler.zoo.adapter import Adapter, Factors
from recycler.zoo.errors import InputError, UsageError

SITE = "layers.0.q"


def profile(nll: dict[str, list[float]], exact: dict[str, list[float]] | None = None, **options: object) -> Profile:
    """One of one shot a task; the first row is the base."""
    names = list(nll)
    tasks = Shots({f"t{i}": [Shot("p", "c")] for i in range(len(nll[names[0]]))})
    table = torch.tensor([nll[name] for name in names])[..., None]
    right = None if exact is None else torch.tensor([exact[name] for name in names])[..., None]
    return Profile(tuple(names[1:]), tasks, table, right, **options)  # type: ignore[arg-type]


def updates(**vectors: list[float]) -> dict[str, Adapter]:
    """Adapters whose ΔW are rank one: their cosines are those of the vectors."""
    return {name: Adapter(name, {SITE: Factors(torch.tensor([v]), torch.ones(3, 1))}) for name, v in vectors.items()}


def test_ranks_of_both_scores_are_added() -> None:
    p = profile(
        {"base": [4.0], "a": [1.0], "b": [2.0], "c": [3.0], "d": [3.5]},
        {"base": [0.0], "a": [0.2], "b": [0.9], "c": [0.5], "d": [0.0]},
    )
    # exact: b c a (d, base); NLL: a b c d base; sums b 0+1, a 2+0, c 1+2, d 3+3
    assert rankings(p, 4) == {"t0": ["b", "a", "c", "d"]}
    assert rankings(p, 2) == {"t0": ["b", "a"]}
    without = profile({"base": [4.0], "a": [1.0], "b": [2.0], "c": [3.0]})
    assert rankings(without, 3) == {"t0": ["a", "b", "c"]}


def test_the_base_is_a_candidate_everywhere() -> None:
    """Whoever is no better than the base is none: fewer right answers are not made up for by a lower NLL."""
    p = profile({"base": [2.0, 2.0], "a": [1.0, 2.0], "b": [3.0, 1.0]}, {"base": [0.5, 0.5], "a": [0.4, 0.5], "b": [0.6, 0.5]})
    assert rankings(p) == {"t0": ["b"], "t1": ["b"]}
    found = select(p, 5)
    assert found.names == ("b",) and found.dropped == {"a": "never among a task's best"}
    worse = profile({"base": [1.0], "a": [2.0]})
    with pytest.raises(InputError, match="no adapter is better than the base"):
        select(worse)


def test_each_task_gets_its_best_before_any_gets_a_second() -> None:
    p = profile(
        {"base": [4.0, 4.0, 4.0], "a": [1.0, 4.0, 4.0], "a2": [1.1, 4.0, 4.0], "b": [3.5, 2.0, 4.0], "c": [4.0, 4.0, 3.0]}
    )
    assert select(p, 3).names == ("a", "b", "c")
    assert select(p, 2).names == ("a", "b")  # c takes away the smallest share
    assert select(p, 1).names == ("a",)
    assert select(p, 9).names == ("a", "a2", "b", "c")
    assert select(p, 3).reasons["b"] == "first at t1" and select(p, 9).reasons["a2"] == "second at t0"
    assert select(p, 2).dropped["c"] == "no room for it"


def test_room_is_filled_by_the_least_alike() -> None:
    p = profile({"base": [9.0], "first": [1.0], "near": [2.0], "far": [3.0], "middle": [4.0]})
    zoo = updates(first=[1, 0, 0], near=[1, 0.1, 0], far=[0, 1, 0.1], middle=[0.5, 0, 1])
    assert select(p, 2, zoo, per_task=4).names == ("first", "far")
    by_rank = select(p, 2, per_task=4)
    assert by_rank.names == ("first", "near") and by_rank.redundancy is None

    def redundancy(names: tuple[str, ...]) -> float:
        rows = [torch.nn.functional.normalize(zoo[n].sites[SITE].a_RD[0].double(), dim=0) for n in names]
        return sum(abs(float(a @ b)) for a, b in combinations(rows, 2))

    three = select(p, 3, zoo, per_task=4)
    best = min(combinations(["near", "far", "middle"], 2), key=lambda some: redundancy(("first", *some)))
    assert set(three.names) == {"first", *best}
    assert three.redundancy == pytest.approx(redundancy(three.names), abs=1e-6)


def test_copies_are_taken_once() -> None:
    p = profile({"base": [9.0, 9.0], "a": [1.0, 9.0], "copy": [1.1, 9.0], "b": [9.0, 1.0], "opposite": [9.0, 2.0]})
    zoo = updates(a=[1, 0, 0], copy=[2, 0, 0], b=[0, 1, 0], opposite=[0, -1, 0])
    found = select(p, 4, zoo)
    assert found.names == ("a", "b", "opposite")  # the same direction at another strength is a copy, the opposite one is not
    assert found.dropped == {"copy": "does the same as a"}


def test_what_was_assigned_by_hand_stays() -> None:
    p = profile({"base": [4.0], "a": [1.0], "bad": [5.0]}, assigned={"bad": ("t0",)})
    assert select(p, 1).names == ("bad",) and select(p, 1).reasons == {"bad": "assigned by hand"}
    with pytest.raises(UsageError, match="--count 1 holds fewer"):
        select(profile({"base": [4.0], "a": [1.0], "b": [1.0]}, assigned={"a": ("t0",), "b": ("t0",)}), 1)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 8), st.integers(0, 1000))
def test_what_holds_for_any_profile(adapters: int, tasks: int, count: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    names = tuple(f"a{i}" for i in range(adapters))
    shots = Shots({f"t{i}": [Shot("p", "c")] * 2 for i in range(tasks)})
    nll = torch.rand(adapters + 1, tasks, 2, generator=random)
    exact = (torch.rand(adapters + 1, tasks, 2, generator=random) > 0.5).float()
    p = Profile(names, shots, nll, exact)
    kept = rankings(p)
    useful = {name for some in kept.values() for name in some}
    if not useful:
        return
    found = select(p, count)
    assert set(found.names) <= useful and len(found.names) == min(count, len(useful))
    assert set(found.names) | set(found.dropped) == set(names) and not set(found.names) & set(found.dropped)
    assert set(select(p, len(useful)).names) == useful
    turned = Profile(names[::-1], shots, nll[[0, *range(adapters, 0, -1)]], exact[[0, *range(adapters, 0, -1)]])
    assert set(select(turned, count).names) == set(found.names)  # no matter in which order


@pytest.mark.parametrize("options, message", [({"count": 0}, "count=0"), ({"per_task": 0}, "per_task=0")])
def test_dials_that_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        select(profile({"base": [1.0], "a": [0.5]}), **options)


def test_a_router_of_the_selected(world: Pico) -> None:
    zoo = recycler.Zoo(world.zoo)
    measured = recycler.profile(zoo, Shots.from_files(*world.tasks), kshot=3, assign={name: name for name in ("math", "law")})
    router = recycler.build_router("uniform", measured, zoo=zoo, select="kshot", count=2)
    assert set(router.adapters) == {"math", "law"} and router.report["selected"] == dict.fromkeys(
        ["law", "math"], "assigned by hand"
    )
    for options, message in (
        ({"count": 2}, "Nothing is selected without"),
        ({"select": "best"}, "no selection 'best'"),
    ):
        with pytest.raises(UsageError, match=message):
            recycler.build_router("uniform", measured, zoo=zoo, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no profile was given"):
        narrowed(zoo, None, None, None, "kshot", None)
