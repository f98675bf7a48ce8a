"""Scores → weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from recycler.routers.select import Policy, top_k
from recycler.zoo.errors import UsageError

numbers = st.floats(-30, 30, width=32) | st.just(-math.inf)
scores = st.integers(1, 9).flatmap(lambda e: arrays("float32", (3, e), elements=numbers)).map(torch.from_numpy)


@given(scores, st.none() | st.integers(1, 12), st.sampled_from([0.1, 1.0, 7.0]), st.booleans())
def test_weights_are_a_mixture_of_the_best(s: torch.Tensor, k: int | None, temperature: float, renormalise: bool) -> None:
    w = top_k(s, k, temperature, renormalise)
    assert w.shape == s.shape and torch.isfinite(w).all() and (w >= 0).all()
    assert (w[s == -math.inf] == 0).all()
    available = (s > -math.inf).any(-1)
    assert (w.sum(-1)[~available] == 0).all()
    total = w.sum(-1)[available]
    assert (total <= 1 + 1e-5).all()
    if renormalise or k is None:
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
    for row, weights in zip(s, w, strict=True):
        chosen = weights > 0
        assert int(chosen.sum()) <= (k or len(row))
        if chosen.any() and not chosen.all():
            # nothing that was left out scores higher than something that was kept (underflow to 0 aside)
            left = row[~chosen & (row > row[chosen].min())]
            assert left.numel() == 0


@given(scores, st.integers(1, 5), st.permutations(range(9)))
def test_permuting_scores_permutes_weights(s: torch.Tensor, k: int, order: list[int]) -> None:
    columns = [i for i in order if i < s.shape[-1]]
    if any(len(set(row[row > -math.inf].tolist())) < int((row > -math.inf).sum()) for row in s):
        s = s + torch.arange(s.shape[-1]) * 1e-2  # ties are cut by position; break them first
        if any(len(set(row[row > -math.inf].tolist())) < int((row > -math.inf).sum()) for row in s):
            return
    torch.testing.assert_close(top_k(s[:, columns], k), top_k(s, k)[:, columns])


def test_top_k_by_hand() -> None:
    s = torch.tensor([0.0, math.log(3.0), math.log(6.0), -math.inf])
    assert top_k(s, 2).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 0])
    assert top_k(s).tolist() == pytest.approx([0.1, 0.3, 0.6, 0])
    assert top_k(s, 2, renormalise=False).tolist() == pytest.approx([0, 0.3, 0.6, 0])
    assert top_k(s, 1).tolist() == [0, 0, 1, 0]
    cold = top_k(s, 2, temperature=0.5).tolist()
    assert cold == pytest.approx([0, 1 / 5, 4 / 5, 0])


def test_limits() -> None:
    s = torch.tensor([[1.0, 2.0, 3.0]])
    assert torch.equal(top_k(s, 3), top_k(s)) and torch.equal(top_k(s, 99), top_k(s))
    assert top_k(s, 3, temperature=1e6).tolist()[0] == pytest.approx([1 / 3] * 3, abs=1e-4)
    assert top_k(s.bfloat16(), 2).dtype == torch.float32


@pytest.mark.parametrize(("k", "temperature"), [(0, 1.0), (-1, 1.0), (2, 0.0), (2, -1.0), (2, math.nan), (2, math.inf)])
def test_no_policy_is_refused(k: int, temperature: float) -> None:
    with pytest.raises(UsageError):
        Policy(top_k=k, temperature=temperature)
