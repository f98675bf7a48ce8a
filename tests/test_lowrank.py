"""Linear algebra on updates: what is truncated is the best of its rank, and the error that is said is the error there is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recycler.zoo import lowrank
from recycler.zoo.adapter import Factors
from recycler.zoo.errors import InputError, UsageError

sizes = st.integers(1, 24)
seeds = st.integers(0, 10_000)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(o: int, d: int, r: int, seed: int) -> Factors:
    return Factors(random(r, d, seed=seed), random(o, r, seed=seed + 1))


def product(one: Factors) -> Tensor:
    """ΔW in fp64: the definition that everything here is held against."""
    return one.b_OR.double() @ one.a_RD.double()


@given(sizes, sizes, sizes, seeds)
def test_the_thin_svd_is_the_svd_of_the_product(o: int, d: int, r: int, seed: int) -> None:
    one = factors(o, d, r, seed)
    thin = lowrank.thin_svd(one.a_RD, one.b_OR)
    dense = torch.linalg.svdvals(product(one))
    assert torch.allclose(thin.s_K[: len(dense)], dense[: len(thin.s_K)], atol=1e-9)
    assert torch.allclose(thin.u_OK * thin.s_K @ thin.vt_KD, product(one), atol=1e-9)
    assert lowrank.norm(one.a_RD, one.b_OR) == pytest.approx(float(product(one).norm()), rel=1e-9)


@given(sizes, sizes, sizes, st.integers(1, 30), seeds)
def test_no_update_of_that_rank_is_closer(o: int, d: int, r: int, rank: int, seed: int) -> None:
    """Eckart and Young: the error is the norm of the singular values that were cut, from torch's own SVD of the dense ΔW."""
    one = factors(o, d, r, seed)
    shorter, error = lowrank.truncate(one, rank)
    s_K = torch.linalg.svdvals(product(one))
    best = float(s_K[rank:].norm() / s_K.norm()) if r > rank else 0.0
    assert error == pytest.approx(best, abs=1e-6)
    assert float((product(one) - product(shorter)).norm() / product(one).norm()) == pytest.approx(error, abs=1e-9)
    assert shorter.shape == one.shape and shorter.rank == (r if r <= rank else min(rank, o, d))
    assert shorter is one or torch.allclose(shorter.a_RD @ shorter.a_RD.T, torch.eye(min(rank, o, d, r)), atol=1e-5)


@given(st.integers(6, 20), st.integers(6, 20), st.integers(2, 6), seeds)
def test_the_gauge_does_not_matter(o: int, d: int, r: int, seed: int) -> None:
    """(A, B) → (G⁻¹A, BG) is the same update, so it is truncated to the same."""
    one = factors(o, d, r, seed)
    g_RR = random(r, r, seed=seed + 2).double() + 3 * torch.eye(r, dtype=torch.float64)
    other = Factors((torch.linalg.inv(g_RR) @ one.a_RD.double()), one.b_OR.double() @ g_RR)
    rank = r - 1
    s_K = torch.linalg.svdvals(product(one))
    (first, e1), (second, e2) = lowrank.truncate(one, rank), lowrank.truncate(other, rank)
    assert e1 == pytest.approx(e2, abs=1e-6)
    if s_K[rank - 1] > 1.05 * s_K[rank]:  # else the best update is not unique
        assert torch.allclose(product(first), product(second), atol=1e-4 * float(s_K[0]))
    assert lowrank.distance(one, other) < 1e-5 * float(s_K.norm())


def test_a_shorter_adapter_is_a_prefix_of_a_longer_one() -> None:
    one = factors(20, 16, 8, 3)
    longer, shorter = lowrank.truncate(one, 5)[0], lowrank.truncate(one, 3)[0]
    assert torch.equal(longer.a_RD[:3], shorter.a_RD) and torch.equal(longer.b_OR[:, :3], shorter.b_OR)


def test_truncation_keeps_magnitude_and_bias() -> None:
    one = Factors(random(4, 6), random(5, 4, seed=1), None, random(5, seed=2))
    assert lowrank.truncate(one, 2)[0].bias_O is one.bias_O
    dora = Factors(random(4, 6), random(5, 4, seed=1), random(5, seed=2).abs())
    assert lowrank.truncate(dora, 2)[0].magnitude_O is dora.magnitude_O


@given(st.integers(2, 24), st.integers(2, 24), st.floats(0.3, 0.9999), st.integers(1, 24), seeds)
def test_the_dials_of_a_dense_update(o: int, d: int, energy: float, rank: int, seed: int) -> None:
    delta_OD = random(o, d, seed=seed)
    squares_K = torch.linalg.svdvals(delta_OD.double()).square()
    share_K = squares_K.cumsum(0) / squares_K.sum()
    least = int((share_K < energy - 1e-12).sum()) + 1
    by_energy, by_rank = lowrank.factorise(delta_OD, energy=energy), lowrank.factorise(delta_OD, rank)
    both = lowrank.factorise(delta_OD, rank, energy)
    assert by_energy and by_rank and both
    assert len(by_energy.a_RD) == least and len(by_rank.a_RD) == min(rank, o, d) and len(both.a_RD) == min(rank, least)
    for found in (by_energy, by_rank, both):
        kept = len(found.a_RD)
        best = math.sqrt(max(0.0, 1 - float(share_K[kept - 1])))
        assert found.error == pytest.approx(best, abs=2e-6)
        assert float((delta_OD - found.b_OR @ found.a_RD).norm() / delta_OD.norm()) == pytest.approx(found.error, abs=1e-6)
    whole = lowrank.factorise(delta_OD, 1, 0.3, whole=min(o, d))
    assert whole and whole.error < 1e-6 and len(whole.a_RD) == min(o, d)


@pytest.mark.parametrize(("o", "d", "r"), [(30, 40, 3), (600, 340, 5), (300, 700, 150), (280, 280, 1)])
def test_an_update_of_low_rank_is_found_to_be_one(o: int, d: int, r: int) -> None:
    """Small ones by SVD, large ones by the sketch, whose result is an SVD too."""
    delta_OD = random(o, r, seed=1) @ random(r, d, seed=2)
    found = lowrank.factorise(delta_OD)
    assert found and found.a_RD.shape == (r, d) and found.error < 3e-6
    assert torch.allclose(found.a_RD @ found.a_RD.T, torch.eye(r), atol=1e-5)
    s_K = torch.linalg.svdvals(delta_OD.double())[:r]
    assert torch.allclose(found.b_OR.double().norm(dim=0), s_K, rtol=1e-4)
    again = lowrank.factorise(delta_OD)
    assert again and torch.equal(found.a_RD, again.a_RD) and torch.equal(found.b_OR, again.b_OR)


def test_a_large_update_of_full_rank() -> None:
    """The sketch does not hold it, so the whole SVD is made; and the error is no better than it can be."""
    delta_OD = random(300, 400, seed=5)
    found = lowrank.factorise(delta_OD, 40)
    s_K = torch.linalg.svdvals(delta_OD.double())
    assert found and found.error == pytest.approx(float(s_K[40:].norm() / s_K.norm()), abs=1e-5)
    whole = lowrank.factorise(delta_OD)
    assert whole and whole.a_RD.shape == (300, 400) and whole.error < 1e-5


def test_no_update_and_no_number() -> None:
    assert lowrank.factorise(torch.zeros(4, 5)) is None
    for wrong in (math.nan, math.inf):
        with pytest.raises(InputError, match="NaN or infinite"):
            lowrank.factorise(torch.full((4, 5), wrong))
    tiny = lowrank.factorise(1e-30 * random(4, 5))
    assert tiny is not None and tiny.error < 1e-5  # small is not zero


@pytest.mark.parametrize(("rank", "energy"), [(0, None), (-1, 0.5), (None, 0.0), (None, 1.5), (None, math.nan)])
def test_dials_out_of_range(rank: int | None, energy: float | None) -> None:
    with pytest.raises(UsageError):
        lowrank.factorise(torch.ones(2, 2), rank, energy)
