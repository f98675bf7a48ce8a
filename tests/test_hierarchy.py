"""Gates in clusters: what they are clusters of, what the best of them are worth, and every way to compute that."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import Pico
from hypothesis import given
from hypothesis import strategies as st
from test_conformance import TEXTS, close, inputs, logits, profile_of
from test_no_sync import NoTraffic, on_fake_cuda

import recycler
from recycler.routed import RoutedModel
from recycler.routers import hierarchy
from recycler.routers.discovery import load_router
from recycler.routers.hierarchy import ClusterGate, Hierarchy, HierarchyConfig, clustered
from recycler.routers.linear import LinearGate, Rows
from recycler.updating import remove_adapter
from recycler.zoo.errors import UsageError

WAYS = {"looked up": (0.0, math.inf), "tiled": (math.inf, 0.0), "one GEMM": (math.inf, math.inf)}


def names(count: int) -> list[str]:
    return [f"a{number:03d}" for number in range(count)]


def families(count: int, width: int, seed: int = 0, absent: int = 0) -> Rows:
    """Rows around eight directions, with offsets; the first `absent` adapters are not here."""
    torch.manual_seed(seed)
    v_ED = torch.randn(8, width)[torch.arange(count) % 8] + 0.3 * torch.randn(count, width)
    offset_E = 0.1 * torch.randn(count)
    offset_E[:absent] = -math.inf
    return Rows(v_ED, offset_E)


def routed(world: Pico, **options: Any) -> RoutedModel:
    zoo = recycler.Zoo(world.zoo)
    adapters = options.pop("adapters", None)
    return recycler.compose(zoo, recycler.build_router("hierarchy", profile_of(world), zoo=zoo, adapters=adapters, **options))


# ----------------------------------------------------------------------------------------------------------------- clusters


def test_clusters_are_the_families() -> None:
    rows = families(64, 32)
    label_E = clustered(rows, 8, False, names(64))
    for family in range(8):
        assert len(label_E[family::8].unique()) == 1
    assert len(label_E.unique()) == 8


def test_a_gate_and_its_opposite_are_one_where_signs_do_not_matter() -> None:
    rows = families(64, 32)
    flipped = Rows(rows.v_ED * torch.tensor([1.0, -1.0]).repeat_interleave(32)[:, None], None)
    label_E = clustered(flipped, 8, True, names(64))
    assert all(len(label_E[family::8].unique()) == 1 for family in range(8))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3), st.booleans())
def test_everybody_who_is_there_is_in_one_cluster_of_limited_size(count: int, wanted: int, absent: int, absolute: bool) -> None:
    absent = min(absent, count)
    rows = families(count, 6, absent=absent)
    label_E = clustered(rows, wanted, absolute, names(count))
    assert (label_E[:absent] == -1).all() and (label_E[absent:] >= 0).all()
    if absent < count:
        sizes = torch.bincount(label_E[absent:])
        here = count - absent
        assert (sizes > 0).all() and int(sizes.max()) <= math.ceil(1.25 * here / min(wanted, here))


def test_numbers_do_not_decide_who_is_with_whom() -> None:
    rows, order = families(30, 16), torch.randperm(30, generator=torch.Generator().manual_seed(1))
    other = clustered(Rows(rows.v_ED[order], None), 5, True, [names(30)[e] for e in order.tolist()])
    assert torch.equal(clustered(Rows(rows.v_ED, None), 5, True, names(30))[order], other)


def test_copies_are_no_trouble() -> None:
    """Fewer different rows than clusters."""
    label_E = clustered(Rows(torch.ones(12, 4)), 6, False, names(12))
    assert (label_E >= 0).all() and int(torch.bincount(label_E).max()) <= 3


# ------------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_every_way_gives_the_local_scores_in_the_best_clusters(
    way: str, absolute: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hierarchy, "_LOOKED_UP", WAYS[way][0])
    monkeypatch.setattr(hierarchy, "_TILED", WAYS[way][1])
    rows = [families(50, 24, 0, absent=2), families(50, 24, 1, absent=5)]
    labels = [clustered(one, 7, absolute, names(50)) for one in rows]
    x_BTD = torch.randn(1, tokens, 24)
    flat = LinearGate(rows, True, absolute)(x_BTD)
    scores = ClusterGate(rows, labels, 3, True, absolute)(x_BTD)
    assert scores.shape == flat.shape == (1, tokens, 2, 50)
    known = scores > -math.inf
    torch.testing.assert_close(scores[known], flat[known], rtol=1e-5, atol=1e-5)
    for s, label_E in enumerate(labels):
        for t in range(tokens):  # whole clusters, three of them, and the absent nowhere
            chosen = label_E[known[0, t, s]].unique()
            assert len(chosen) == 3 and (chosen >= 0).all()
            assert torch.equal(known[0, t, s], torch.isin(label_E, chosen))
    everything = ClusterGate(rows, labels, 99, True, absolute)(x_BTD)
    torch.testing.assert_close(everything, flat, rtol=1e-5, atol=1e-5)


def test_a_token_finds_its_family() -> None:
    rows = families(64, 32)
    gate = ClusterGate([rows], [clustered(rows, 8, False, names(64))], 1, False, False)
    flat = LinearGate([rows], False, False)
    assert torch.equal(gate(rows.v_ED[None]).argmax(-1), flat(rows.v_ED[None]).argmax(-1))


def test_gates_stay_in_fp32() -> None:
    rows = families(20, 8)
    gate = ClusterGate([rows], [clustered(rows, 4, False, names(20))], 2, True, False).to(torch.bfloat16)
    x_BTD = torch.randn(2, 3, 8).to(torch.bfloat16)
    assert gate(x_BTD).dtype == torch.float32 and gate.get_buffer("v_0").dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("local", ["arrow", "ridge"])
def test_all_clusters_are_the_local_router_to_the_bit(world: Pico, local: str) -> None:
    zoo = recycler.Zoo(world.zoo)
    plain = recycler.compose(zoo, recycler.build_router(local, profile_of(world), zoo=zoo))
    for a, b in zip(logits(plain, TEXTS), logits(routed(world, local=local, clusters=2, probe=2), TEXTS), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("local", ["arrow", "ridge", "random"])
def test_one_cluster_of_several(world: Pico, local: str) -> None:
    """The conformance suite's promises where clusters are left out, which its four adapters need not be."""
    options = {"local": local, "clusters": 3, "probe": 1}
    model = routed(world, **options, adapters=("code", "law", "math", "poem"))
    firing = model.weights_for(inputs(model, TEXTS))
    assert all((w_BTE.sum(-1) <= 1 + 1e-5).all() for w_BTE in firing.sites.values())
    labels = model.router.clusters if isinstance(model.router, Hierarchy) else {}
    for site, label_E in labels.items():
        w_BTE = firing.sites[site]
        for c in label_E[label_E >= 0].unique().tolist():  # whoever has a weight has those of one cluster only
            inside = w_BTE[..., label_E == c].sum(-1)
            assert ((inside < 1e-6) | (inside > 1 - 1e-5)).all()
    alone = [logits(model, [text])[0] for text in TEXTS]
    close(logits(model, TEXTS, "left"), alone, 1e-4)
    close(logits(routed(world, **options, adapters=("poem", "math", "code", "law")), TEXTS), logits(model, TEXTS), 2e-4)


def test_saved_loaded_and_one_less(llama: Pico, tmp_path: Any) -> None:
    zoo = recycler.Zoo(llama.zoo)
    router = recycler.build_router("hierarchy", profile_of(llama), zoo=zoo, clusters=3, probe=1, out=tmp_path / "gates")
    again = load_router(tmp_path / "gates")
    assert isinstance(again, Hierarchy) and isinstance(router, Hierarchy) and again.normalise and not again.absolute
    assert all(torch.equal(label_E, again.clusters[site]) for site, label_E in router.clusters.items())
    fewer = remove_adapter(again, "law", zoo=zoo)
    assert isinstance(fewer, Hierarchy)
    assert fewer.adapters == tuple(name for name in router.adapters if name != "law")
    model = recycler.compose(zoo, fewer)
    assert torch.isfinite(torch.cat(logits(model, TEXTS))).all()
    for label_E in fewer.clusters.values():
        assert sorted(set(label_E.tolist()) - {-1}) == [*range(int(label_E.max()) + 1)]


@pytest.mark.parametrize("way", WAYS)
def test_leaving_clusters_out_never_waits(llama: Pico, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hierarchy, "_LOOKED_UP", WAYS[way][0])
    monkeypatch.setattr(hierarchy, "_TILED", WAYS[way][1])
    model = routed(llama, clusters=3, probe=1)
    with on_fake_cuda(model), torch.no_grad():
        ids_BT = torch.zeros(2, 8, dtype=torch.long, device="cuda")
        model.base(ids_BT, use_cache=False)
        with NoTraffic():
            model.base(ids_BT, use_cache=False)


def test_bad_options() -> None:
    for options, match in (
        ({"local": "classifier"}, "no row of numbers"),
        ({"local": "hierarchy"}, "no row of numbers"),
        ({"local": "ridges"}, "no router called"),
        ({"local_options": "sharpnes=3"}, "no option 'sharpnes'"),
    ):
        with pytest.raises(UsageError, match=match):
            HierarchyConfig(**options).local_config()  # type: ignore[arg-type]
    for options in ({"clusters": 0}, {"probe": 0}):
        with pytest.raises(UsageError, match="count"):
            HierarchyConfig(**options)
    assert Hierarchy.needed(HierarchyConfig(local="arrow")) == frozenset()
