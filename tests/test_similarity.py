"""Norms and cosines through the factors, against ΔW written out in fp64; and that only ΔW matters, not how it is factored."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recycler.workers import Local
from recycler.zoo.adapter import Adapter, Factors
from recycler.zoo.errors import InputError
from recycler.zoo.places import places
from recycler.zoo.similarity import (
    Comparison,
    compare,
    near_duplicates,
    norm,
    robust_z,
    same_extras,
    singular_values,
    site_norm,
)
from recycler.zoo.survey import survey

SHAPES = {"layers.0.q": (12, 10), "layers.0.up": (20, 10), "layers.1.q": (12, 10), "layers.1.down": (10, 20)}


def made(name: str, seed: int, rank: int = 3, paths: tuple[str, ...] = tuple(SHAPES), **extras: float) -> Adapter:
    """An adapter of random factors; `magnitude` and `bias` add such vectors, filled with a value."""
    g = torch.Generator().manual_seed(seed)
    sites = {}
    for path in paths:
        out, width = SHAPES[path]
        factors = Factors(torch.randn(rank, width, generator=g), torch.randn(out, rank, generator=g))
        if "magnitude" in extras:
            factors = replace(factors, magnitude_O=torch.full((out,), extras["magnitude"]))
        if "bias" in extras:
            factors = replace(factors, bias_O=torch.full((out,), extras["bias"]))
        sites[path] = factors
    return Adapter(name, sites)


def changed(adapter: Adapter, name: str, change) -> Adapter:  # type: ignore[no-untyped-def]
    return replace(adapter, name=name, sites={path: change(path, factors) for path, factors in adapter.sites.items()})


def dense(adapter: Adapter) -> torch.Tensor:
    """All of ΔW as one vector, zeros where it touches nothing."""
    parts = []
    for path, (out, width) in SHAPES.items():
        factors = adapter.sites.get(path)
        delta = torch.zeros(out, width, dtype=torch.float64)
        parts.append((delta if factors is None else factors.b_OR.double() @ factors.a_RD.double()).flatten())
    return torch.cat(parts)


def reference(adapters: list[Adapter]) -> torch.Tensor:
    flat = torch.stack([dense(one) for one in adapters])
    flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return flat @ flat.T


def by_name(*adapters: Adapter) -> dict[str, Adapter]:
    return {one.name: one for one in adapters}


def test_against_the_matrices_themselves() -> None:
    adapters = [
        made("a", 1, 3),
        made("b", 2, 1, ("layers.0.q", "layers.1.down")),
        made("c", 3, 8, ("layers.0.up",)),
        made("d", 4, 12),  # more ranks than some sites have rows
    ]
    found = compare(by_name(*adapters))
    assert found.names == ("a", "b", "c", "d")
    torch.testing.assert_close(found.cosine, reference(adapters), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.tensor(found.norms, dtype=torch.float64), torch.stack([dense(a).norm() for a in adapters]))
    assert [norm(one) for one in adapters] == list(found.norms)
    assert found.between("b", "c") == 0.0  # no site in common
    assert found.nearest("a") == max(((n, found.between("a", n)) for n in "bcd"), key=lambda one: one[1])


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    ranks=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    memory=st.sampled_from([1.0, 5_000.0, 20_000.0, 1e9]),
)
def test_any_ranks_and_any_memory(seed: int, ranks: list[int], memory: float) -> None:
    """However little memory there is, reading again gives the same cosines."""
    g = torch.Generator().manual_seed(seed)
    paths = tuple(SHAPES)
    chosen = [tuple(path for path in paths if torch.rand(1, generator=g) < 0.7) or paths[:1] for _ in ranks]
    adapters = [made(f"a{i}", seed + i, rank, chosen[i]) for i, rank in enumerate(ranks)]
    found = compare(by_name(*adapters), memory=memory)
    torch.testing.assert_close(found.cosine, reference(adapters), atol=1e-6, rtol=0)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    ranks=st.lists(st.integers(1, 200), min_size=1, max_size=9),
    memory=st.sampled_from([1.0, 5_000.0, 20_000.0, 1e5]),
    silent=st.booleans(),
)
def test_the_same_bits_whoever_compares(seed: int, ranks: list[int], memory: float, silent: bool) -> None:
    """Memory and workers decide which sites are looked at together, and in which order sums are made; nothing of it shows. With
    ranks enough for several tiles, and adapters whose update is zero."""
    g = torch.Generator().manual_seed(seed)
    paths = tuple(SHAPES)
    chosen = [tuple(path for path in paths if torch.rand(1, generator=g) < 0.7) or paths[:1] for _ in ranks]
    adapters = by_name(*(made(f"a{i}", seed + i, rank, chosen[i]) for i, rank in enumerate(ranks)))
    if silent:
        adapters["b"] = changed(made("b", seed), "b", lambda path, f: replace(f, b_OR=f.b_OR * 0))
    alone = compare(adapters)
    shared = survey(adapters, list(adapters), memory=memory, workers=Local())
    for found in (compare(adapters, memory=memory), shared.similarity):
        assert torch.equal(found.cosine, alone.cosine) and found.norms == alone.norms and found.names == alone.names
    assert {name: one.shapes for name, one in shared.found.items()} == {
        name: {path: f.shape for path, f in one.sites.items()} for name, one in adapters.items()
    }
    torch.testing.assert_close(alone.cosine.triu(1), reference(list(adapters.values())).triu(1), atol=1e-6, rtol=0)


def test_threads_change_no_bit() -> None:
    adapters = by_name(*(made(f"a{i}", i, 40) for i in range(9)))
    alone, threads = compare(adapters), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(compare(adapters, memory=30_000.0).cosine, alone.cosine)
    finally:
        torch.set_num_threads(threads)


def test_a_survey_of_what_cannot_be_read() -> None:
    """Whoever looks: the others are compared, and why each cannot be read is told; of nothing comes nothing."""

    class Some(dict[str, Adapter]):
        def __getitem__(self, name: str) -> Adapter:
            if name in ("b", "d"):
                raise InputError(f"{name} is broken.", code="E_HEADER")
            return super().__getitem__(name)

    adapters = Some(by_name(*(made(name, i) for i, name in enumerate("abcde"))))
    for workers in (None, Local()):
        similarity, found, broken = survey(adapters, list(adapters), workers=workers)
        assert similarity.names == tuple(found) == ("a", "c", "e")
        assert {name: (error.what, error.code) for name, error in broken.items()} == {
            name: (f"{name} is broken.", "E_HEADER") for name in "bd"
        }
        nothing = survey(adapters, ["b"], workers=workers)
        assert nothing.similarity.names == () and nothing.similarity.cosine.shape == (0, 0) and list(nothing.broken) == ["b"]


def test_little_memory_reads_again_and_much_does_not() -> None:
    adapters = by_name(*(made(f"a{i}", i) for i in range(4)))
    for memory, again in ((1e9, 0), (4_000.0, 12)):
        asked: list[str] = []
        comparison = Comparison(memory)
        for one in adapters.values():
            comparison.add(one)

        def read(name: str, asked: list[str] = asked) -> Adapter:
            asked.append(name)
            return adapters[name]

        comparison.finish(read)
        assert len(asked) == again


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), condition=st.sampled_from([1.0, 1e2, 1e4]), scale=st.sampled_from([1e-12, 0.1, 3.0, 1e12]))
def test_only_the_update_matters(seed: int, condition: float, scale: float) -> None:
    """Another gauge (A, B) → (G⁻¹A, BG), the ranks in another order, and another strength are the same direction."""
    one, other = made("one", seed, 4), made("other", seed + 1, 4)
    g = torch.Generator().manual_seed(seed)
    q1, q2 = (torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64))[0] for _ in range(2))
    gauge = q1 @ torch.diag(torch.logspace(0, math.log10(condition), 4, dtype=torch.float64)) @ q2
    order = torch.randperm(4, generator=g)

    def turn(path: str, f: Factors) -> Factors:
        a, b = torch.linalg.solve(gauge, f.a_RD.double()), f.b_OR.double() @ gauge
        return Factors(a.float()[order], (b * scale).float()[:, order])

    turned = changed(one, "turned", turn)
    found = compare(by_name(one, other, turned))
    exact = dense(one).norm() * scale
    assert found.norms[2] == pytest.approx(float(exact), rel=1e-6 * condition)
    assert found.between("one", "turned") == pytest.approx(1, abs=1e-5 * max(1, condition / 100))
    assert found.between("other", "turned") == pytest.approx(found.between("other", "one"), abs=1e-4)
    assert near_duplicates(found, by_name(one, other, turned).__getitem__) == ([("one", "turned")], [])


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_neither_small_nor_huge_factors_overflow(size: float) -> None:
    one, two = made("one", 1), made("two", 2)
    lopsided = changed(one, "lopsided", lambda path, f: Factors(f.a_RD * size, f.b_OR * size))
    found = compare(by_name(one, two, lopsided))
    assert found.between("one", "lopsided") == pytest.approx(1, abs=1e-5)
    assert found.between("two", "lopsided") == pytest.approx(found.between("two", "one"), abs=1e-5)
    assert found.norms[2] == pytest.approx(found.norms[0] * size**2, rel=1e-5)


def test_an_update_of_zero_is_like_nothing() -> None:
    """A and B are not zero, their product is."""
    a, b = torch.zeros(2, 10), torch.zeros(12, 2)
    a[0], b[:, 1] = 1, 1
    zero, one = Adapter("zero", {"layers.0.q": Factors(a, b)}), made("one", 1)
    found = compare(by_name(zero, one))
    assert found.norms[0] == 0 and found.cosine.tolist() == [[0, 0], [0, 1]]
    assert near_duplicates(found, by_name(zero, one).__getitem__) == ([], [])


def test_paths_of_two_shapes_do_not_meet() -> None:
    """The same path in bases of different width: nothing in common, and no crash."""
    g = torch.Generator().manual_seed(0)
    wide = Adapter("wide", {"layers.0.q": Factors(torch.randn(2, 16, generator=g), torch.randn(16, 2, generator=g))})
    found = compare(by_name(made("one", 1), wide))
    assert found.between("one", "wide") == 0


def test_groups_are_transitive() -> None:
    """a ≈ b and b ≈ c make one group, though a and c may be a little further apart."""
    a = made("a", 1)
    away = dict(made("x", 9).sites)

    def step(amount: float):  # type: ignore[no-untyped-def]
        return lambda path, f: Factors(
            torch.cat([f.a_RD, away[path].a_RD]), torch.cat([f.b_OR, amount * away[path].b_OR], dim=1)
        )

    b, c, far = changed(a, "b", step(0.04)), changed(a, "c", step(0.08)), changed(a, "far", step(2.0))
    adapters = by_name(a, b, c, far)
    found = compare(adapters)
    assert found.between("a", "b") > 0.999 and found.between("b", "c") > 0.999 > found.between("a", "c")
    assert near_duplicates(found, adapters.__getitem__)[0] == [("a", "b", "c")]


def test_magnitudes_and_biases_must_agree_as_well() -> None:
    plain = made("plain", 1)
    dora, again, other = (made(n, 1, magnitude=m) for n, m in (("dora", 1.0), ("again", 1.0005), ("other", 1.01)))
    bias = made("bias", 1, bias=0.5)
    double = changed(bias, "double", lambda path, f: replace(f, b_OR=f.b_OR * 2, bias_O=f.bias_O * 2))
    kept = changed(bias, "kept", lambda path, f: replace(f, b_OR=f.b_OR * 2))
    adapters = by_name(plain, dora, again, other, bias, double, kept)
    found = compare(adapters)
    assert found.extras == {"dora", "again", "other", "bias", "double", "kept"}
    groups, direction = near_duplicates(found, adapters.__getitem__)
    assert groups == [
        ("dora", "again"),
        ("bias", "double"),
    ]  # a bias of twice the strength belongs to an update of twice the strength
    assert ("plain", "dora") in direction and ("dora", "other") in direction and ("bias", "kept") in direction
    assert not same_extras(dora, plain) and same_extras(plain, changed(plain, "more", lambda path, f: f))


def test_singular_values() -> None:
    for rank in (1, 3, 15):
        for path, factors in made("a", rank, rank).sites.items():
            exact = torch.linalg.svdvals(factors.b_OR.double() @ factors.a_RD.double())
            values = singular_values(factors)
            assert len(values) == min(rank, *SHAPES[path])
            torch.testing.assert_close(values, exact[: len(values)])
            assert site_norm(factors) == pytest.approx(float(exact.norm()))


def test_robust_z() -> None:
    assert robust_z([], 1.0) == []
    assert robust_z([2.0, 2.0, 2.0, 3.0], 0.5) == [0, 0, 0, 2.0]  # the MAD is zero, so the floor is the unit
    z = robust_z([1.0, 2.0, 3.0, 4.0, 100.0], 0.01)
    assert z[2] == 0 and z[4] == pytest.approx(97 / 1.4826)


def test_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    compare(by_name(made("a", 1), made("b", 2)), memory=4_000.0)
    assert torch.get_num_threads() == before


def test_places() -> None:
    llama = places(
        ["model.layers.3.mlp.up_proj", "model.layers.11.mlp.up_proj", "lm_head", "model.layers.0.mlp.experts.7.up_proj"]
    )
    assert llama["model.layers.3.mlp.up_proj"] == (3, "mlp.up_proj") and llama["lm_head"] == (None, "lm_head")
    assert llama["model.layers.0.mlp.experts.7.up_proj"] == (0, "experts.up_proj")
    assert places(["model.layers.3.mlp.up_proj"]) == {"model.layers.3.mlp.up_proj": (3, "up_proj")}
    t5 = places(
        [
            "encoder.block.0.layer.0.SelfAttention.q",
            "decoder.block.0.layer.0.SelfAttention.q",
            "decoder.block.0.layer.1.EncDecAttention.q",
            "decoder.block.1.layer.1.EncDecAttention.k",
        ]
    )
    assert list(t5.values()) == [(0, "encoder.q"), (0, "decoder.SelfAttention.q"), (0, "EncDecAttention.q"), (1, "k")]
