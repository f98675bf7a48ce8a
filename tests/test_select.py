"""Scores → weights: every policy by hand, at its limits, with ties, permuted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from recycler.routers import policies
from recycler.routers.discovery import find, make_config
from recycler.routers.policies import null, shared, standardised, strongest, top_k, top_p, tsallis, tsallis_entropy
from recycler.routers.protocol import Group
from recycler.routers.select import Policy
from recycler.zoo.errors import UsageError

# A grid: scores that differ by less than 1e-9 count as equal, and that is not what most of these are about.
numbers = st.integers(-30 * 1024, 30 * 1024).map(lambda i: i / 1024) | st.just(-math.inf)
scores = st.integers(1, 9).flatmap(lambda e: arrays("float32", (3, e), elements=numbers)).map(torch.from_numpy)
few = st.integers(1, 7).flatmap(lambda e: arrays("float32", (2, e), elements=st.sampled_from([-2.0, 0.0, 1.0, -math.inf])))

ALL: dict[str, Policy] = {
    "one": Policy(top_k=1),
    "two": Policy(),
    "all": Policy(top_k=None, temperature=3.0),
    "two of all": Policy(renormalise=False),
    "mass": Policy(policy="top_p", p=0.6),
    "raw mass": Policy(policy="top_p", p=0.6, renormalise=False),
    "null": Policy(policy="null", threshold=0.5),
    "raw null": Policy(policy="null", threshold=0.5, renormalise=False, top_k=3),
    "hybrid": Policy(policy="tsallis", entropy=0.5),
    "raw hybrid": Policy(policy="tsallis", top_k=1, renormalise=False, q=2.0),
    "standardised": Policy(standardise=2.0),
    "shared": Policy(renormalise=False, shared=True),
    "shared null": Policy(policy="null", threshold=0.5, shared=True, standardise=1.0),
}


@pytest.fixture(params=sorted(ALL))
def policy(request: pytest.FixtureRequest) -> Policy:
    return ALL[request.param]


def on_every_policy(check: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("policy", [pytest.param(ALL[name], id=name) for name in sorted(ALL)])(check)


# ------------------------------------------------------------------------------------------------------------- all of them


@on_every_policy
@given(s=scores)
def test_weights_are_a_mixture(policy: Policy, s: Tensor) -> None:
    w = policy.weights(s)
    assert w.shape == s.shape and w.dtype == torch.float32
    assert torch.isfinite(w).all() and (w >= 0).all() and (w.sum(-1) <= 1 + 1e-5).all()
    assert (w[s == -math.inf] == 0).all()
    available = (s > -math.inf).any(-1)
    if not policy.abstains:
        assert torch.allclose(w.sum(-1)[available], torch.ones(int(available.sum())), atol=1e-5)


@on_every_policy
@given(s=scores, order=st.permutations(range(9)))
def test_permuting_scores_permutes_weights(policy: Policy, s: Tensor, order: list[int]) -> None:
    columns = [i for i in order if i < s.shape[-1]]
    if any(len(set(row[row > -math.inf].tolist())) < int((row > -math.inf).sum()) for row in s):
        return  # ties are cut by position
    torch.testing.assert_close(policy.weights(s[:, columns]), policy.weights(s)[:, columns], rtol=1e-4, atol=1e-6)


@on_every_policy
@given(s=few.map(torch.from_numpy))
def test_of_equal_scores_the_first_is_kept(policy: Policy, s: Tensor) -> None:
    for row, w in zip(s, policy.weights(s), strict=True):
        for value in set(row.tolist()) - {-math.inf}:
            kept = (w[row == value] > float(w[row > -math.inf].min())).tolist()
            assert kept == sorted(kept, reverse=True)


@on_every_policy
def test_what_stands_beside_a_row_changes_nothing(policy: Policy) -> None:
    torch.manual_seed(0)
    s = torch.randn(2, 5, 3, 6)
    whole = policy.weights(s)
    assert torch.equal(whole[1, 2:3], policy.weights(s[1, 2:3]))
    assert torch.equal(policy.weights(s.bfloat16()), policy.weights(s.bfloat16().float()))


@on_every_policy
def test_gradients_are_finite(policy: Policy) -> None:
    s = torch.tensor([[1.0, 3.0, -math.inf, 2.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    policy.weights(s)[:, 1].sum().backward()
    assert s.grad is not None and torch.isfinite(s.grad).all()


@on_every_policy
def test_one_graph(policy: Policy) -> None:
    torch.manual_seed(0)
    s = torch.randn(2, 3, 1, 6)
    torch.compiler.reset()
    compiled = torch.compile(policy.weights, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s), policy.weights(s))


# -------------------------------------------------------------------------------------------------------------------- top-k


@given(scores, st.none() | st.integers(1, 12), st.sampled_from([0.1, 1.0, 7.0]), st.booleans())
def test_top_k_keeps_the_best(s: Tensor, k: int | None, temperature: float, renormalise: bool) -> None:
    w = top_k(s, k, temperature, renormalise)
    for row, weights in zip(s, w, strict=True):
        chosen = weights > 0
        assert int(chosen.sum()) <= (k or len(row))
        if chosen.any() and not chosen.all():
            # nothing that was left out scores higher than something that was kept (underflow to 0 aside)
            left = row[~chosen & (row > row[chosen].min())]
            assert left.numel() == 0


@given(scores, st.integers(1, 5))
def test_two_orders_of_top_k_are_one(s: Tensor, k: int) -> None:
    """Softmax over all, top-k, renormalise: the textbook's, with numpy's stable sort."""
    for row, w in zip(s.double(), top_k(s, k), strict=True):
        if row.max() == -math.inf:
            continue
        p = row.softmax(-1)
        order = sorted(range(len(row)), key=lambda e: (-float(row[e]), e))[:k]
        expected = torch.zeros_like(p)
        expected[order] = p[order] / p[order].sum()
        torch.testing.assert_close(w.double(), expected, atol=1e-6, rtol=1e-4)


def test_top_k_by_hand() -> None:
    s = torch.tensor([0.0, math.log(3.0), math.log(6.0), -math.inf])
    assert top_k(s, 2).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 0])
    assert top_k(s).tolist() == pytest.approx([0.1, 0.3, 0.6, 0])
    assert top_k(s, 2, renormalise=False).tolist() == pytest.approx([0, 0.3, 0.6, 0])
    assert top_k(s, 1).tolist() == [0, 0, 1, 0]
    cold = top_k(s, 2, temperature=0.5).tolist()
    assert cold == pytest.approx([0, 1 / 5, 4 / 5, 0])


def test_limits_of_top_k() -> None:
    s = torch.tensor([[1.0, 2.0, 3.0]])
    assert torch.equal(top_k(s, 3), top_k(s)) and torch.equal(top_k(s, 99), top_k(s))
    assert top_k(s, 3, temperature=1e6).tolist()[0] == pytest.approx([1 / 3] * 3, abs=1e-4)
    assert top_k(s.bfloat16(), 2).dtype == torch.float32


@pytest.mark.parametrize("count", [3, 12, 100, 700])
@pytest.mark.parametrize("size", [0.0, 1.0, -3e4])
def test_ties_of_many(count: int, size: float) -> None:
    """topk itself takes any of them."""
    s = torch.full((4, count), size)
    s[1, 2] = size + 1
    s[2, -1] = size + 1e-3 * (size == 0)  # a difference that can be told
    w = top_k(s, 2)
    first = torch.zeros(count)
    first[:2] = 0.5
    assert torch.equal(w[0], first) and torch.equal(w[3], first)
    assert (w[1] > 0).nonzero().flatten().tolist() == [0, 2]
    assert (w[2] > 0).nonzero().flatten().tolist() == ([0, count - 1] if size == 0 else [0, 1])


# -------------------------------------------------------------------------------------------------------------------- top-p

P = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()


@pytest.mark.parametrize(
    ("p", "kept"), [(0.01, [1]), (0.49, [1]), (0.51, [1, 3]), (0.74, [1, 3]), (0.76, [1, 2, 3]), (0.91, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_one_that_crosses(p: float, kept: list[int]) -> None:
    raw = top_p(P, p, renormalise=False)
    assert raw.nonzero().flatten().tolist() == kept
    assert raw[kept].tolist() == pytest.approx(P.exp()[kept].tolist())
    assert top_p(P, p).sum() == pytest.approx(1)
    assert top_p(P, p)[kept].tolist() == pytest.approx((raw[kept] / raw.sum()).tolist())


@given(scores, st.floats(0.01, 1.0), st.integers(1, 4))
def test_top_p_is_the_smallest_set_that_holds_p(s: Tensor, p: float, least: int) -> None:
    raw, whole = top_p(s, p, renormalise=False, least=least), top_k(s)
    available = (s > -math.inf).any(-1)
    assert (raw.sum(-1)[available] >= p - 1e-5).all()
    for w, full in zip(raw, whole, strict=True):
        kept = w[w > 0]
        if len(kept) > least:
            assert kept.sum() - kept.min() < p + 1e-5
        assert len(kept) >= min(least, int((full > 0).sum()))


@given(scores)
def test_limits_of_top_p(s: Tensor) -> None:
    assert torch.equal(top_p(s, 1.0), top_k(s)) and torch.equal(top_p(s, 0.5, least=None), top_k(s))
    torch.testing.assert_close(top_p(s, 1e-9), top_k(s, 1))


# ------------------------------------------------------------------------------------------------------------- null experts


def literal_adamoe(s: Tensor, threshold: float, k: int) -> Tensor:
    """As the paper says: k nulls behind the real ones, top-k over all, softmax over the real ones that were chosen."""
    count = s.shape[-1]
    longer = torch.cat([s, torch.full((*s.shape[:-1], k), threshold)], -1)
    chosen = torch.zeros_like(longer, dtype=torch.bool)
    chosen.scatter_(-1, longer.sort(dim=-1, descending=True, stable=True).indices[..., :k], True)
    return s.masked_fill(~chosen[..., :count], -math.inf).softmax(-1).nan_to_num(0.0)


@given(few.map(torch.from_numpy) | scores, st.sampled_from([-30.0, -2.0, 0.3, 1.0, 40.0]), st.integers(1, 4))
def test_null_is_top_k_over_adapters_and_nulls(s: Tensor, threshold: float, k: int) -> None:
    torch.testing.assert_close(null(s, threshold, k), literal_adamoe(s, threshold, k))


@given(scores, st.integers(1, 4), st.booleans())
def test_limits_of_null(s: Tensor, k: int, renormalise: bool) -> None:
    torch.testing.assert_close(null(s, -math.inf, k, renormalise=renormalise), top_k(s, k, renormalise=renormalise))
    assert not null(s, math.inf, k, renormalise=renormalise).any()
    assert not null(s, 30.5, k, renormalise=renormalise).any()


def test_null_by_hand() -> None:
    s = torch.tensor([0.0, math.log(3.0), math.log(6.0), -math.inf])
    assert null(s, 0.5, 2).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 0])
    assert null(s, 1.5, 2).tolist() == [0, 0, 1, 0]
    assert null(s, 2.0, 2).tolist() == [0, 0, 0, 0]
    raw = null(s, math.log(5.0), 2, renormalise=False).tolist()  # of 1 + 3 + 6 and the null's 5
    assert raw == pytest.approx([0, 0, 6 / 15, 0])
    assert null(s, math.log(2.0), None, temperature=0.5, renormalise=False).tolist() == pytest.approx([0, 9 / 50, 36 / 50, 0])


# ------------------------------------------------------------------------------------------------------------------- tsallis


@pytest.mark.parametrize("q", [0.5, 1 - 1e-4, 1.0, 1 + 1e-6, 1 + 1e-4, 1.1, 2.0, 3.0])
def test_tsallis_entropy_runs_from_0_to_1(q: float) -> None:
    four = torch.tensor([[4]])
    assert tsallis_entropy(torch.full((1, 4), 0.25), four, q).item() == pytest.approx(1, abs=1e-5)
    assert tsallis_entropy(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), four, q).item() == pytest.approx(0, abs=1e-6)
    assert tsallis_entropy(torch.tensor([[1.0]]), torch.tensor([[1]]), q).item() == 0
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    shannon = float(-(p * p.log()).sum() / math.log(4))
    expected = shannon if abs(q - 1) < 1e-3 else float((1 - (p**q).sum()) / (1 - 4 ** (1 - q)))
    assert tsallis_entropy(p, four, q).item() == pytest.approx(expected, abs=1e-4)


def test_tsallis_keeps_all_where_it_is_undecided() -> None:
    flat, sharp = torch.tensor([0.1, 0.0, 0.05, -0.1]), torch.tensor([5.0, 1.0, 4.0, 0.0])
    w = tsallis(torch.stack([flat, sharp]))
    assert torch.equal(w[0], top_k(flat))
    torch.testing.assert_close(w[1], top_p(sharp, 0.75, least=2))
    assert (w[1] > 0).sum() == 2
    # Counted among those that are there: two of two are undecided, whoever is absent.
    few_there = torch.tensor([0.1, 0.0, -math.inf, -math.inf])
    assert (tsallis(few_there, least=1, p=0.3) > 0).sum() == 2


@given(scores, st.booleans())
def test_limits_of_tsallis(s: Tensor, renormalise: bool) -> None:
    torch.testing.assert_close(tsallis(s, entropy=1.01, least=1, renormalise=renormalise), top_p(s, 0.75, 1.0, renormalise))
    torch.testing.assert_close(tsallis(s, entropy=-0.01), top_k(s))


# ---------------------------------------------------------------------------------------------- dials beside the policy


@given(scores, st.sampled_from([0.5, 1.0, 4.0]))
def test_standardised_scores(s: Tensor, scale: float) -> None:
    for row, z in zip(s.double(), standardised(s, scale), strict=True):
        here = row > -math.inf
        assert (z[~here] == -math.inf).all()
        if here.any():
            spread = row[here].std(correction=0)
            if spread > 1e-5 * row[here].abs().max():
                torch.testing.assert_close(
                    z[here].double(), (row[here] - row[here].mean()) / spread * scale, rtol=1e-2, atol=1e-2
                )
            elif spread == 0:
                assert (z[here] == 0).all()


def test_standardised_scores_have_no_scale_and_no_noise() -> None:
    torch.manual_seed(0)
    s = torch.randn(5, 6)
    torch.testing.assert_close(standardised(1e4 * s + 50), standardised(s), rtol=1e-3, atol=1e-3)
    assert not standardised(torch.full((3, 7), 0.1) * 3).any()  # 0.1 × 3 sums with rounding
    assert standardised(torch.tensor([4.0])).item() == 0
    assert standardised(torch.tensor([1.0, 9.0]), 2.0).tolist() == [-2, 2]


@given(st.integers(1, 6), st.integers(0, 99), st.sampled_from(["two of all", "raw mass", "null", "raw hybrid"]))
def test_shared_is_the_average_with_residuals_routed(count: int, seed: int, name: str) -> None:
    """Against the construction itself: the mean update always on, and each adapter's difference from it at its weight."""
    torch.manual_seed(seed)
    delta_EOD, x, s = torch.randn(count, 5, 4), torch.randn(3, 4), torch.randn(3, count)
    w = ALL[name].weights(s)
    average = delta_EOD.mean(0)
    expected = x @ average.T + torch.einsum("ne,eod,nd->no", w, delta_EOD - average, x)
    ours = torch.einsum("ne,eod,nd->no", shared(w, s), delta_EOD, x)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shared(w, s), w + (1 - w.sum(-1, keepdim=True)) / count)


def test_shared_where_one_is_absent() -> None:
    s = torch.tensor([2.0, -math.inf, 1.0])
    assert shared(torch.tensor([0.4, 0.0, 0.0]), s).tolist() == pytest.approx([0.6, 0, 0.2])
    assert Policy(policy="null", threshold=5.0, shared=True).weights(s[None])[0].tolist() == pytest.approx([1 / 3, 0, 1 / 3])


@given(arrays("float32", (3, 8), elements=st.floats(-9, 9, width=32)).map(torch.from_numpy), st.integers(1, 10))
def test_strongest_components(h: Tensor, count: int) -> None:
    kept = strongest(h, count)
    for before, after in zip(h, kept, strict=True):
        assert ((after == before) | (after == 0)).all()
        left = before[(after == 0) & (before != 0)]
        assert left.numel() == 0 or left.abs().max() < after[after != 0].abs().min()
        assert (after != 0).sum() >= min(count, int((before != 0).sum()))
        if len(set(before.abs().tolist())) == 8:
            assert (after != 0).sum() <= count


@pytest.mark.parametrize(("depth", "k"), [(0.0, 1), (0.24, 1), (0.25, 2), (0.5, 2), (0.76, 4), (0.99, 4)])
def test_a_k_for_each_part_of_the_model(depth: float, k: int) -> None:
    torch.manual_seed(0)
    s = torch.randn(7, 9)
    ours = Policy(top_k="1,2,2,4").weights(s, Group(("a",), 3, depth=depth))
    assert torch.equal(ours, top_k(s, k))
    parted = Policy(policy="null", top_k="1,2,2,4", threshold=-9.0).weights(s, Group(("a",), 3, depth=depth))
    torch.testing.assert_close(parted, top_k(s, k))


# ------------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(("k", "temperature"), [(0, 1.0), (-1, 1.0), (2, 0.0), (2, -1.0), (2, math.nan), (2, math.inf)])
def test_no_policy_is_refused(k: int, temperature: float) -> None:
    with pytest.raises(UsageError):
        Policy(top_k=k, temperature=temperature)


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy": "best"}, {"top_k": "1,0"}, {"top_k": "1,,2"}, {"top_k": "one"}, {"top_k": ""}, {"p": 0.0}, {"p": 1.1},
        {"p": math.nan}, {"threshold": math.nan}, {"threshold": math.inf}, {"quantile": 0.0}, {"quantile": 1.0}, {"q": 0.0},
        {"q": math.inf}, {"entropy": -0.1}, {"entropy": 1.1}, {"standardise": 0.0}, {"standardise": math.nan}, {"ranks": 0},
        {"shared": True}, {"shared": True, "policy": "top_p"}, {"shared": True, "top_k": None, "renormalise": False},
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Policy(**wrong)


def test_what_only_shows_when_it_runs() -> None:
    s = torch.zeros(1, 3)
    assert torch.equal(Policy(policy="null").weights(s), top_k(s, 2))  # as while it is fitted
    with pytest.raises(UsageError, match="one decision for all"):
        Policy(top_k="1,2").weights(s)
    assert Policy(policy="null").weights(s, None, -1.0).any() and not Policy(policy="null").weights(s, None, 1.0).any()
    assert Policy(policy="null", threshold=-1.0).weights(s, None, 1.0).any()  # given by hand goes first


def test_the_command_line_says_it() -> None:
    config = make_config(
        find("arrow"), {"policy": "top_p", "p": "0.8", "renormalise": "false", "top_k": "1,2,4", "ranks": "8", "shared": "true"}
    )
    assert config == Policy(policy="top_p", p=0.8, renormalise=False, top_k="1,2,4", ranks=8, shared=True)
    assert make_config(find("arrow"), {"top_k": "3"}).top_k == 3 and make_config(find("arrow"), {"top_k": "none"}).top_k is None
    with pytest.raises(UsageError, match="policy='best'"):
        make_config(find("arrow"), {"policy": "best"})


def test_who_abstains() -> None:
    whole = [
        Policy(),
        Policy(top_k=None, renormalise=False),
        Policy(policy="top_p"),
        Policy(policy="top_p", p=1, renormalise=False),
    ]
    assert not any(one.abstains for one in whole)
    assert all(ALL[name].abstains for name in ("two of all", "raw mass", "null", "raw hybrid"))


def test_what_a_policy_is_says_where_it_comes_from() -> None:
    for function in (top_p, null, tsallis, standardised, shared, strongest):
        assert "arXiv:" in str(function.__doc__), function
    assert policies.best(torch.zeros(5), 2)[1].tolist() == [0, 1]
