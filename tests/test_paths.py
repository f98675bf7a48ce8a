"""The paths: they agree with one formula and with each other, and which one is taken depends on shapes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Pico
from hypothesis import given
from hypothesis import strategies as st

import recycler
from recycler.base import load_base
from recycler.build import read_adapters
from recycler.engine.bank import Few
from recycler.engine.chooser import Shape, choose
from recycler.engine.paths import Begun, Dense, Gather, PerSequence, Skip, Sorted, few
from recycler.engine.stack import Slab, Stack
from recycler.routed import RoutedModel
from recycler.routers.select import Policy
from recycler.zoo.errors import UsageError

WIDTHS = (16, 8, 24)  # one input, two outputs
CPU = torch.device("cpu")


def make(ranks: list[list[int]], dtype: torch.dtype = torch.float32, seed: int = 0) -> Stack:
    """Ranks by site and adapter; 0 is absent."""
    torch.manual_seed(seed)
    slabs = [
        {
            e: Slab(torch.randn(rank, WIDTHS[0]).to(dtype), torch.randn(rank, width).to(dtype))
            for e, rank in enumerate(own)
            if rank
        }
        for own, width in zip(ranks, WIDTHS[1:], strict=True)
    ]
    return Stack(slabs, len(ranks[0]), (CPU, dtype), WIDTHS)


def expected(stack: Stack, x_ND: torch.Tensor, w_NSE: torch.Tensor) -> list[torch.Tensor]:
    """Adapter by adapter, in fp64."""
    result = []
    for s, held in enumerate(stack.slabs()):
        total_NO = torch.zeros(len(x_ND), WIDTHS[1 + s], dtype=torch.float64)
        for e, one in held.items():
            w_N1 = w_NSE[:, s if w_NSE.shape[1] > 1 else 0, e, None].double()
            total_NO += w_N1 * (x_ND.double() @ one.a_RD.double().T @ one.b_RO.double())
        result.append(total_NO)
    return result


def some_weights(count: int, sites: int, adapters: int, k: int) -> torch.Tensor:
    """[N, S, E] with at most k that are not 0; the last row has none."""
    w_NSE = torch.randn(count, sites, adapters)
    kept = w_NSE.abs().topk(min(k, adapters), dim=-1).indices
    w_NSE = torch.zeros_like(w_NSE).scatter(-1, kept, w_NSE.gather(-1, kept))
    w_NSE[-1] = 0
    return w_NSE


site_ranks = st.lists(st.sampled_from([0, 1, 3, 4, 8, 17]), min_size=5, max_size=5)


@given(site_ranks, site_ranks, st.integers(1, 3), st.booleans(), st.integers(1, 9), st.integers(0, 99))
def test_paths_are_the_sum_over_adapters(
    one: list[int], two: list[int], k: int, per_site: bool, tokens: int, seed: int
) -> None:
    stack = make([one, two], seed=seed)
    x_ND, w_NSE = torch.randn(tokens, WIDTHS[0]), some_weights(tokens, 2 if per_site else 1, 5, k)
    y = [torch.randn(tokens, width) for width in WIDTHS[1:]]
    paths: list[Begun] = [Dense(stack, x_ND[None], w_NSE[None]), Gather(stack, x_ND, w_NSE, k), Sorted(stack, x_ND, w_NSE, k)]
    paths += [Skip(stack, x_ND, w_NSE)] if len(stack.a_RD) else []
    for s, total_NO in enumerate(expected(stack, x_ND, w_NSE)):
        for path in paths:
            torch.testing.assert_close(path.add(s, y[s]).double(), y[s] + total_NO, rtol=1e-5, atol=2e-5)


@given(site_ranks, site_ranks, st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_sequences_share_what_is_looked_up(one: list[int], two: list[int], k: int, vary: bool, seed: int) -> None:
    """One mixture a sequence, whose size may vary from token to token."""
    stack = make([one, two], seed=seed)
    x_BTD, w_BSE = torch.randn(3, 4, WIDTHS[0]), some_weights(3, 1, 5, k)
    w_BTSE = w_BSE[:, None] * (torch.rand(3, 4, 1, 1) if vary else torch.ones(3, 1, 1, 1))
    path = PerSequence(stack, x_BTD, w_BTSE, k)
    full_NSE = w_BTSE.expand(3, 4, 1, 5).reshape(12, 1, 5)
    for s, total_NO in enumerate(expected(stack, x_BTD.flatten(0, 1), full_NSE)):
        torch.testing.assert_close(path.add(s, torch.zeros(12, WIDTHS[1 + s])).double(), total_NO, rtol=1e-5, atol=2e-5)


@given(site_ranks, site_ranks, st.sets(st.integers(0, 4)))
def test_a_subset_is_what_it_was_there(one: list[int], two: list[int], chosen: set[int]) -> None:
    stack, used = make([one, two]), sorted(chosen)
    part = stack.subset(used)
    x_ND, w_NSE = torch.randn(6, WIDTHS[0]), torch.zeros(6, 1, 5)
    w_NSE[..., used] = torch.randn(6, 1, len(used))
    path = Dense(part, x_ND[None], w_NSE[None][..., used])
    for s, total_NO in enumerate(expected(stack, x_ND, w_NSE)):
        torch.testing.assert_close(path.add(s, torch.zeros(6, WIDTHS[1 + s])).double(), total_NO, rtol=1e-5, atol=2e-5)


def test_few_keeps_the_largest_by_size() -> None:
    value, index = few(torch.tensor([[[0.1, -0.9, 0.0, 0.5]]]), 2)
    assert {(i, round(v, 1)) for i, v in zip(index[0, 0].tolist(), value[0, 0].tolist(), strict=True)} == {(1, -0.9), (3, 0.5)}
    assert few(torch.tensor([[[0.1, -0.9, 0.0]]]), 1)[1].item() == 1
    assert Few.of(torch.tensor([[0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])) == Few((1, 2), 2)
    assert Few.of(torch.zeros(3)) == Few((), 0)
    assert Few.of(torch.zeros(3, requires_grad=True)) == Few((0, 1, 2), 3)  # all of them take gradients


@pytest.mark.parametrize("path", ["dense", "gather", "sorted", "skip"])
@pytest.mark.parametrize("method", ["arrow", "spectr"])
def test_a_whole_model_answers_alike_on_every_path(llama: Pico, method: str, path: Any) -> None:
    zoo = recycler.Zoo(llama.zoo)
    model = recycler.compose(zoo, recycler.build_router(method, zoo=zoo))
    inputs = {"input_ids": torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        chosen = model(**inputs).logits
        model.engine.control.path = path
        torch.testing.assert_close(model(**inputs).logits, chosen, rtol=1e-5, atol=1e-5)
        whole = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        model.engine.control.path = "dense"
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), whole)


@pytest.mark.parametrize("path", [None, "dense", "sequence"])
def test_a_mixture_a_row(llama: Pico, path: Any) -> None:
    """Against each adapter alone; nobody is the base, to the bit."""
    zoo = recycler.Zoo(llama.zoo)
    base = load_base(str(llama.base))
    model = RoutedModel(base, read_adapters(zoo, list(zoo), base))
    inputs = {"input_ids": torch.randint(5, 90, (3, 20), generator=torch.Generator().manual_seed(0))}
    rows_BE = torch.zeros(3, len(zoo))
    rows_BE[0, 1] = rows_BE[2, 2] = 1
    model.engine.control.path = path
    with torch.no_grad():
        with model.mixture(rows_BE):
            together = model(**inputs).logits
        for row, who in enumerate([1, None, 2]):
            with model.mixture({} if who is None else {model.names[who]: 1.0}):
                torch.testing.assert_close(model(**inputs).logits[row], together[row], rtol=1e-5, atol=1e-5)
        with model.disabled():
            bare = model(**inputs).logits
        with model.mixture({}):
            assert torch.equal(model(**inputs).logits, bare)


@torch.no_grad()
@pytest.mark.parametrize("method", ["arrow", "uniform"])
def test_one_gemm_for_base_and_adapters(llama: Pico, method: str) -> None:
    """Routed, with the chosen path overridden, forced and bare; then the base has its weights and forwards again."""
    zoo = recycler.Zoo(llama.zoo)
    model = recycler.compose(zoo, recycler.build_router(method, zoo=zoo))
    ids = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))

    def logits() -> list[torch.Tensor]:
        found = [model(ids).logits]
        with model.only(model.names[0]):
            found.append(model(ids).logits)
        with model.mixture(torch.rand(2, 7, len(zoo), generator=torch.Generator().manual_seed(1))):
            found.append(model(ids).logits)
        with model.disabled():
            found.append(model(ids).logits)
        model.engine.control.path = "sorted"
        found.append(model(ids).logits)
        model.engine.control.path = None
        return found

    before, weights = logits(), {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    plain = sum(not bank.stack.extra[s] for bank in model.engine.banks for s in range(len(bank.group.sites)))
    assert model.engine.join() == plain > 0
    for one, other in zip(logits(), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert torch.equal(
        model.generate(ids, max_new_tokens=4, do_sample=False), model.generate(ids, max_new_tokens=4, do_sample=False)
    )
    torch._dynamo.reset()
    compiled = torch.compile(model.base, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, before[0], rtol=1e-5, atol=1e-5)
    model.engine.detach()
    state = model.base.state_dict()
    assert all(torch.equal(state[name], tensor) and state[name].is_contiguous() for name, tensor in weights.items())
    assert not any("forward" in vars(module) for module in model.base.modules())


@torch.no_grad()
def test_what_makes_no_sense_is_refused(llama: Pico) -> None:
    zoo = recycler.Zoo(llama.zoo)
    model = recycler.compose(zoo, recycler.build_router("arrow", zoo=zoo))
    ids = torch.tensor([[5, 6, 7]])
    for few_columns in (torch.ones(len(zoo) - 1), torch.ones(1, len(zoo) + 1), torch.tensor(1.0)):
        with pytest.raises(UsageError, match="each needs its weight"), model.mixture(few_columns):
            pass
        with pytest.raises(UsageError, match="each needs its weight"), model.merged(few_columns):
            pass
    for tokens, sequences in ((0, 1), (5, 0), (2, 3), (-1, 1)):
        with pytest.raises(UsageError, match="tokens of"):
            model.execution_plan(tokens, sequences)
    model.engine.control.path = "fast"  # type: ignore[assignment]
    with pytest.raises(UsageError, match="no such path"):
        model(ids)


@torch.no_grad()
def test_a_model_that_moves_keeps_nothing_of_where_it_was(llama: Pico) -> None:
    """After forwards on every path, K-concat, and one of its adapters alone, in another dtype: as a model that was made there."""
    zoo = recycler.Zoo(llama.zoo)
    router = recycler.build_router("arrow", zoo=zoo)
    model, fresh = recycler.compose(zoo, router), recycler.compose(zoo, router, dtype="bfloat16")
    ids = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    paths: list[Any] = ["dense", "gather", "sorted", "skip"]
    joined = model.engine.join()

    def logits(of: RoutedModel) -> list[torch.Tensor]:
        found = []
        for path in paths:
            with of.engine.control.set(path=path):
                found.append(of(ids).logits)
        with of.only(of.names[1]):
            found.append(of(ids).logits)
        return found

    logits(model)
    model.to(torch.bfloat16)
    assert len(model.engine.joints) == joined
    for one, other in zip(logits(model), logits(fresh), strict=True):
        # The mean: one GEMM rounds otherwise than two in bf16, which can also turn a tie between adapters.
        assert (one.float() - other.float()).abs().mean() < 0.02 * other.float().abs().max()
    assert all(bank._some is None or bank._some[1].a_RD.dtype == torch.bfloat16 for bank in model.engine.banks)


# ------------------------------------------------------------------------------------------------------------- the chooser

SMALL = {"widths": (576, 960), "k": 2, "device": "cpu", "dtype": torch.float32}


def shape(adapters: int, tokens: int, **given: Any) -> Shape:
    return Shape(
        **{**SMALL, "tokens": tokens, "sequences": 1, "rows": 24 * adapters, "active": 48, "adapters": adapters, **given}
    )


@pytest.mark.parametrize(
    ("adapters", "tokens", "given", "path"),
    [
        (8, 1, {}, "dense"),
        (6, 512, {}, "dense"),
        (64, 1, {}, "gather"),
        (64, 512, {}, "sorted"),
        (64, 512, {"compiling": True}, "dense"),
        (64, 256, {"dtype": torch.bfloat16}, "dense"),
        (64, 1, {"dtype": torch.bfloat16}, "gather"),
        (64, 512, {"active": None, "k": None}, "dense"),
        (64, 512, {"sequences": 8, "sequencewise": True}, "sequence"),
        (64, 8, {"sequences": 8, "sequencewise": True}, "gather"),
        (2, 512, {"sequences": 8, "sequencewise": True}, "dense"),
        (8, 4096, {"device": "cuda", "dtype": torch.bfloat16}, "dense"),
        (256, 4096, {"device": "cuda", "dtype": torch.bfloat16, "rows": 4096}, "sorted"),
        (64, 1, {"device": "cuda", "dtype": torch.bfloat16}, "dense"),
        (256, 1, {"device": "cuda", "dtype": torch.bfloat16, "widths": (4096, 6144), "rows": 12288}, "skip"),
    ],
)
def test_what_is_chosen(adapters: int, tokens: int, given: dict[str, Any], path: str) -> None:
    assert choose(shape(adapters, tokens, **given))[0] == path


@given(st.integers(1, 300), st.integers(1, 5000), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_something_is_chosen_for_every_shape(adapters: int, tokens: int, whole: bool, dtype: torch.dtype) -> None:
    name, why = choose(shape(adapters, tokens, sequencewise=whole, dtype=dtype))
    assert name in ("dense", "gather", "sorted", "sequence") and why


def test_policies_say_how_many_adapters_a_token_has() -> None:
    scores = torch.randn(50, 6)
    for policy in (Policy(), Policy(top_k=3), Policy(policy="null", threshold=0.0), Policy(policy="top_p"), Policy(top_k=None)):
        most = policy.most()
        assert most is None or int((policy.weights(scores) != 0).sum(-1).max()) <= most
    assert Policy(top_k=None).most() is None and Policy(policy="top_p").most() is None
    assert Policy(renormalise=False, shared=True).most() is None
