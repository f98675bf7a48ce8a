"""Sketches of updates: what they estimate and do not depend on, and who is found by them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import tensors, write
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from recycler.cli import main
from recycler.zoo import neighbours, sketches
from recycler.zoo.adapter import Adapter, Factors
from recycler.zoo.errors import InputError, UsageError
from recycler.zoo.neighbours import alike, clusters, copies
from recycler.zoo.similarity import compare, norm
from recycler.zoo.sketches import _HEADER, WIDTH, Sketches, cosine, sketch, sketches_of
from recycler.zoo.store import Zoo

WEIGHTS = "adapter_model.safetensors"


def adapter(seed: int, ranks: dict[str, int], out: int = 12, width: int = 8, scale: float = 1.0) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    return Adapter(
        f"a{seed}",
        {
            path: Factors(torch.randn(rank, width, generator=draw), scale * torch.randn(out, rank, generator=draw))
            for path, rank in ranks.items()
        },
    )


def inner(a: Adapter, b: Adapter) -> float:
    """⟨ΔW_a, ΔW_b⟩, by the updates themselves."""

    def update(one: Factors) -> torch.Tensor:
        return one.b_OR.double() @ one.a_RD.double()

    return sum(float((update(a.sites[site]) * update(b.sites[site])).sum()) for site in a.sites.keys() & b.sites.keys())


def recycle(*args: Any) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_inner_products_are_unbiased() -> None:
    """Every path draws other signs, so the same two updates under many paths are as many estimates."""
    a, b = adapter(1, {"s": 2}), adapter(2, {"s": 3})
    b = Adapter(
        "b",
        {
            "s": Factors(
                torch.cat([a.sites["s"].a_RD, b.sites["s"].a_RD]), torch.cat([a.sites["s"].b_OR * 0.5, b.sites["s"].b_OR], 1)
            )
        },
    )
    for one, other in ((a, b), (a, a), (b, b)):
        found = []
        for n in range(400):
            pair = [Adapter(x.name, {f"layers.{n}": x.sites["s"]}) for x in (one, other)]
            found.append(float(sketch(pair[0]) @ sketch(pair[1])))
        error = np.std(found) / len(found) ** 0.5
        assert abs(np.mean(found) - inner(one, other)) < 4 * error
        assert error < 0.02 * (inner(one, one) * inner(other, other)) ** 0.5


def test_sites_do_not_mix() -> None:
    """The same factors at two sites, or at a site of another shape, are no more alike than strangers."""
    one = adapter(1, {"q": 2}).sites["q"]
    found = [float(sketch(Adapter("a", {f"l{n}.q": one})) @ sketch(Adapter("b", {f"l{n}.v": one}))) for n in range(200)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 200**0.5
    both = Adapter("c", {"q": one, "v": one})
    assert np.allclose(sketch(both), sketch(Adapter("a", {"q": one})) + sketch(Adapter("b", {"v": one})))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(-6, 6), st.booleans())
def test_the_gauge_changes_nothing(seed: int, rank: int, power: float, padded: bool) -> None:
    """(A, B) and (G⁻¹A, BG), rows permuted, more rank than needed: the same update, the same sketch."""
    one = adapter(seed, {"q": rank, "v": rank})
    draw = torch.Generator().manual_seed(seed + 1)
    orthogonal = torch.linalg.qr(torch.randn(rank, rank, generator=draw, dtype=torch.float64)).Q
    gauge = orthogonal * torch.logspace(-1, 1, rank, dtype=torch.float64) * 10**power
    turned = {}
    for path, site in one.sites.items():
        a_RD, b_OR = torch.linalg.solve(gauge, site.a_RD.double()), site.b_OR.double() @ gauge
        if padded:
            a_RD, b_OR = torch.cat([a_RD, a_RD]), torch.cat([0.25 * b_OR, 0.75 * b_OR], 1)
        turned[path] = Factors(a_RD.float(), b_OR.float())
    before, after = sketch(one), sketch(Adapter("g", turned))
    assert np.linalg.norm(before - after) < 1e-4 * np.linalg.norm(before)


def test_cosines_are_near_the_exact_ones() -> None:
    paths = {f"layers.{n}.q": 2 for n in range(4)}
    some = [adapter(seed, paths) for seed in range(20)]
    mixed = Adapter(
        "m",
        {
            p: Factors(
                torch.cat([some[0].sites[p].a_RD, some[1].sites[p].a_RD]),
                torch.cat([some[0].sites[p].b_OR, some[1].sites[p].b_OR], 1),
            )
            for p in paths
        },
    )
    every = {one.name: one for one in [*some, mixed]}
    exact = compare(every)
    errors = [cosine(sketch(every[a]), sketch(every[b])) - exact.between(a, b) for a, b in combinations(every, 2)]
    assert np.std(errors) < 2 * WIDTH**-0.5 and max(map(abs, errors)) < 0.5
    for one in some:
        assert abs(np.linalg.norm(sketch(one)) / norm(one) - 1) < 0.35


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_strength(scale: float) -> None:
    """Far beyond what fp32 could square; a copy at another strength has the same direction."""
    one, other = adapter(1, {"q": 2}), adapter(1, {"q": 2}, scale=scale)
    assert cosine(sketch(one), sketch(other)) == pytest.approx(1, abs=1e-6)
    assert np.linalg.norm(sketch(other)) == pytest.approx(scale * np.linalg.norm(sketch(one)), rel=1e-5)


def test_updates_that_are_nothing() -> None:
    nothing = Adapter("n", {"q": Factors(torch.randn(2, 8), torch.zeros(12, 2))})
    for one in (nothing, Adapter("none", {})):
        assert not sketch(one).any() and cosine(sketch(one), sketch(adapter(1, {"q": 2}))) == 0.0


def test_every_machine_draws_the_same() -> None:
    """Sketches are kept, and compared with those that a later version makes."""
    one = Adapter("a", {"model.layers.0.q": Factors(torch.eye(2, 5), torch.eye(7, 2))})
    assert [round(float(x) * WIDTH**0.5) for x in sketch(one)[:12]] == PINNED


PINNED = [-2, 0, 0, 0, 0, -2, 0, 0, 0, -2, 0, 0]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Three families of four around a direction each, and in the first a near-copy in another gauge."""
    folder = tmp_path_factory.mktemp("families")
    zoo = Zoo(folder / "zoo")
    for family, seed in (("math", 1), ("law", 2), ("poem", 3)):
        centre = tensors(seed=seed)
        for n in range(4):
            noise = tensors(seed=100 * seed + n)
            made = {key: value + 0.3 * noise[key] for key, value in centre.items()}
            zoo.add(write(folder / f"{family}-{n}", made, card=f"# {family}\nnumber {n}\n"))
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0))).Q
    first = {key: value + 0.3 * tensors(seed=100)[key] for key, value in tensors(seed=1).items()}
    other = {key: turn.T @ value if "lora_A" in key else 3 * (value @ turn) for key, value in first.items()}
    zoo.add(write(folder / "math-copy", {key: value.contiguous() for key, value in other.items()}))
    return zoo


def test_who_is_like_whom(zoo: Zoo) -> None:
    exact = compare(zoo)
    found = alike(zoo, "math-0", 4)
    assert [one.name for one in found] == sorted(set(zoo) - {"math-0"}, key=lambda name: -exact.between("math-0", name))[:4]
    assert found[0].name == "math-copy"
    for one in found:
        assert one.cosine == pytest.approx(exact.between("math-0", one.name), abs=1e-5) and abs(one.estimate - one.cosine) < 0.3
    quick = alike(zoo, "math-0", 4, exact=False)
    assert quick[0].name == "math-copy" and all(one.cosine is None for one in quick)
    assert [one.estimate for one in quick] == sorted((one.estimate for one in quick), reverse=True)
    assert [one.name for one in alike(zoo, "math-0", 9, ["law-0", "math-0", "law-1"])] in (
        ["law-0", "law-1"],
        ["law-1", "law-0"],
    )
    stranger = replace(zoo["law-2"], name="x", source="elsewhere")
    assert alike(zoo, stranger, 1)[0].name == "law-2" and alike(zoo, "math-0", 3, []) == []
    with pytest.raises(UsageError, match="Not in the zoo"):
        alike(zoo, "nobody")


@pytest.mark.parametrize("flat", [True, False])
def test_copies_are_those_of_all_pairs(zoo: Zoo, monkeypatch: pytest.MonkeyPatch, flat: bool) -> None:
    if not flat:
        monkeypatch.setattr(neighbours, "_FLAT", 5)
    exact = compare(zoo)
    for above in (0.999, 0.9):
        assert [(a, b) for a, b, _ in copies(zoo, above)] == [(a, b) for a, b, _ in exact.pairs(above)] or above == 0.9
    assert [(a, b) for a, b, _ in copies(zoo, 0.999)] == [("math-0", "math-copy")]
    everything = copies(zoo, 0.5, -1.0)
    assert flat is False or [pair[:2] for pair in everything] == [pair[:2] for pair in exact.pairs(0.5)]


@pytest.mark.parametrize("exactly", [True, False])
def test_clusters_are_the_families(zoo: Zoo, monkeypatch: pytest.MonkeyPatch, exactly: bool) -> None:
    if not exactly:
        monkeypatch.setattr(neighbours, "_EXACT", 2)
    found = clusters(zoo, 3)
    assert [{name.split("-")[0] for name in one.names} for one in found].count({"math"}) == 1
    assert sorted(len(one.names) for one in found) == [4, 4, 5] and all(one.centre == one.names[0] for one in found)
    means = compare(zoo)
    for one in found:
        pairs = [means.between(a, b) for a, b in combinations(one.names, 2)]
        assert one.cosine == pytest.approx(sum(pairs) / len(pairs), abs=1e-3 if exactly else 0.15)
    assert found == clusters(zoo, 3) and len(clusters(zoo, 2, ["law-1", "law-2", "poem-0"])) == 2
    for count in (0, 14):
        with pytest.raises(UsageError, match="--count 1 to 13"):
            clusters(zoo, count)


def test_sketches_are_kept_by_contents(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Zoo(tmp_path / "zoo")
    shutil.copytree(zoo.path, mine.path)
    names, unit_NK = sketches_of(mine)
    assert names == list(mine) and np.allclose(np.linalg.norm(unit_NK, axis=1), 1, atol=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(sketches, "sketch", lambda adapter: pytest.fail("made again"))
        again, same_NK = sketches_of(Zoo(mine.path))
        assert again == names and np.allclose(same_NK, unit_NK, atol=1e-3)
        assert sketches_of(mine, ["poem-1", "law-0"])[0] == ["poem-1", "law-0"]
    mine.remove("math-0")
    mine.add(write(tmp_path / "new", seed=77), "math-0")  # other weights under the same name
    names, unit_NK = sketches_of(mine)
    fresh = sketch(mine["math-0"])
    assert names == list(mine) and cosine(unit_NK[names.index("math-0")].astype(float), fresh) == pytest.approx(1, abs=1e-4)
    for damage in (b"", b"no sketches" * 999, _HEADER + b"\xff" * 5000, _HEADER):
        (mine.path / "cache" / "sketches.bin").write_bytes(damage)
        assert np.allclose(sketches_of(mine)[1], unit_NK, atol=1e-3) and np.allclose(sketches_of(mine)[1], unit_NK, atol=1e-3)
    shutil.rmtree(mine.path / "cache")
    (mine.path / "cache").write_text("where no folder can be made")
    assert np.allclose(sketches_of(mine)[1], unit_NK, atol=1e-3)


def test_a_large_zoo_sketches_what_comes_in(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Zoo(tmp_path / "zoo")
    mine.add(write(tmp_path / "a", seed=1))
    assert not (mine.path / "cache").exists()
    mine._fold(mine.entries, stays_large=True)
    entry, _ = mine.add(write(tmp_path / "b", seed=2))
    assert Sketches(mine.path).load([entry.weights])[1].all()
    assert sketches_of(mine)[0] == ["a", "b"]


def test_damaged_adapters_are_left_out(zoo: Zoo, tmp_path: Path) -> None:
    mine = Zoo(tmp_path / "zoo")
    shutil.copytree(zoo.path, mine.path, ignore=shutil.ignore_patterns("cache"))
    (mine.folder("law-0") / WEIGHTS).write_bytes(b"damaged")
    assert sketches_of(mine)[0] == [name for name in mine if name != "law-0"]
    assert "law-0" not in {one.name for one in alike(mine, "law-1", 20)}
    assert sum(len(one.names) for one in clusters(mine, 3)) == 12
    with pytest.raises((InputError, ValueError)):
        alike(mine, "law-0")
    with pytest.raises(InputError, match="Only 0 adapters can be read"):
        clusters(mine, 1, ["law-0"])


def test_from_the_command_line(zoo: Zoo, tmp_path: Path) -> None:
    in_zoo = ("--zoo", zoo.path)
    result = recycle("zoo", "search", "--like", "math-0", "--limit", 3, *in_zoo)
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert lines[0][:2] == ["name", "cosine"] and lines[1][:2] == ["math-copy", "1.000"] and len(lines) == 4
    quick = recycle("zoo", "search", "--like", "math-0", "--estimate", "--names", *in_zoo)
    assert quick.stdout.strip().split(",")[0] == "math-copy"
    both = json.loads(recycle("zoo", "search", "poem", "--like", "math-0", "--json", *in_zoo).stdout)
    assert {one["name"] for one in both["adapters"]} == {f"poem-{n}" for n in range(4)} and both["total"] == 4
    assert (
        both["schema_version"] == 1
        and {"name", "cosine", "estimate", "base", "licence", "source"} <= both["adapters"][0].keys()
    )
    folder = write(tmp_path / "mine", tensors(seed=2))
    assert recycle("zoo", "search", "--like", folder, "--names", "--limit", 4, *in_zoo).stdout.count("law-") == 4
    words = recycle("zoo", "search", "law", "numb", "--limit", 3, *in_zoo)
    assert [line.split("\t")[0][:4] for line in words.stdout.splitlines()[1:]] == ["law-"] * 3 and "1 to 3 of 4" in words.stderr
    nothing = recycle("zoo", "search", "nowhere", *in_zoo)
    assert nothing.exit_code == 0 and "nothing was found" in nothing.stderr
    pairs = json.loads(recycle("zoo", "copies", "--json", *in_zoo).stdout)["pairs"]
    assert [(one["a"], one["b"]) for one in pairs] == [("math-0", "math-copy")]
    centres = recycle("zoo", "clusters", "--count", 3, "--names", *in_zoo).stdout.strip().split(",")
    assert {name.split("-")[0] for name in centres} == {"math", "law", "poem"}
    some = json.loads(recycle("zoo", "clusters", "poem", "--count", 2, "--json", *in_zoo).stdout)
    assert sorted(name for one in some["clusters"] for name in one["adapters"]) == [f"poem-{n}" for n in range(4)]
    assert recycle("zoo", "copies", "--zoo", tmp_path / "none").exit_code == 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["search"], "needs words"), (["search", "x", "--estimate"], "Add --like"), (["search", "--like", "nobody"], "Not in the zoo"),
        (["search", "--like", "no/such/folder"], "There is no folder"), (["search", "--like", "math-0", "--offset", "3"], "Use --limit"),
        (["search", "x", "--limit", "0"], "--limit"), (["clusters"], "--count"), (["clusters", "--count", "99"], "--count 1 to 13"),
        (["clusters", "nowhere", "--count", "2"], "2 clusters of 0"), (["copies", "--above", "0.5"], "--above"),
    ],
)  # fmt: skip
def test_bad_input(zoo: Zoo, args: list[str], says: str) -> None:
    result = recycle("zoo", *args, "--zoo", zoo.path)
    assert result.exit_code in (2, 3) and says in result.stderr and not result.stdout
