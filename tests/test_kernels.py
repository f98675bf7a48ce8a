"""The kernels: on a CPU their references; in Triton's interpreter (`test_triton_computes_the_same`) and built for GPUs themselves.

The interpreter has to be chosen before triton is imported, so that it has a process of its own, in which this file runs again with
Triton's kernels in the place of the references. Its bf16 is wrong, so that nothing here is in bf16.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from recycler.engine.kernels import BLOCK, Skip, expand_skip, gate, ops, plan, reference, shrink_skip

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OPERATORS = (ops._gate, ops._gate_scale, ops._plan, ops._shrink_skip, ops._expand_skip)
ROOT = Path(__file__).parents[1]
HERE = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install triton)")
NOTHING = float("-inf")

if INTERPRETED:
    for operator in OPERATORS:
        operator.register_kernel("cpu", operator._backend_fns["cuda"])


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nothing was written to holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class World:
    """One group: ranks per site and adapter (0: absent), and everything stacked as a bank does it."""

    ranks: tuple[tuple[int, ...], ...]
    tokens: int
    dtype: torch.dtype = torch.float32
    width: int = 24
    shared: bool = False  # all sites have the same weights
    ties: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)

        def new(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=random) * scale).to(self.dtype)

        set_ = object.__setattr__
        sites, adapters = len(self.ranks), len(self.ranks[0])
        there = [(s, e, self.ranks[s][e]) for s in range(sites) for e in range(adapters)]
        set_(self, "factors", {(s, e): (new(r, self.width, scale=0.2), new(r, 20 + s, scale=0.5)) for s, e, r in there})
        set_(self, "a_RD", torch.cat([self.factors[s, e][0] for s, e, _ in there]))
        set_(self, "b_RO", [torch.cat([self.factors[s, e][1] for e in range(adapters)]) for s in range(sites)])
        column = [e if self.shared else s * adapters + e for s, e, r in there for _ in range(r)]
        set_(self, "column_R", torch.tensor(column, dtype=torch.long))
        set_(self, "starts", [sum(map(sum, self.ranks[:s])) for s in range(sites)])
        set_(self, "x_ND", new(self.tokens, self.width))
        set_(self, "y_NO", [new(self.tokens, 20 + s) for s in range(sites)])
        logits_NSE = torch.randn(self.tokens, 1 if self.shared else sites, adapters, generator=random)
        if self.ties:
            logits_NSE = logits_NSE.round()
        if not self.shared:
            logits_NSE.masked_fill_(torch.tensor(self.ranks) == 0, NOTHING)
        set_(self, "logits_NSE", logits_NSE)

    def formula(self, w_NSE: Tensor, s: int) -> Tensor:
        """y + Σ_e w_e B_e A_e x, adapter by adapter in fp64."""
        out_NO = self.y_NO[s].double()
        for e in range(w_NSE.shape[-1]):
            a_RD, b_RO = self.factors[s, e]
            w_N = w_NSE[:, 0 if self.shared else s, e].double()
            out_NO = out_NO + w_N[:, None] * (self.x_ND.double() @ a_RD.double().T @ b_RO.double())
        return out_NO


@st.composite
def worlds(draw: st.DrawFn) -> World:
    adapters = draw(st.integers(1, 7))
    row = st.tuples(*[st.sampled_from([0, 3, 4, 8, 16, 40])] * adapters)
    return World(
        ranks=tuple(draw(st.lists(row, min_size=1, max_size=3).filter(lambda rows: any(map(any, rows))))),
        tokens=draw(st.sampled_from([1, 2, 15, 16, 17, 33, 64, 70])),
        dtype=draw(st.sampled_from([torch.float32, torch.float16])),
        width=draw(st.sampled_from([8, 64, 136])),
        shared=draw(st.booleans()),
        ties=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


def chosen(scores: list[float], k: int, temperature: float, renormalise: bool) -> list[float]:
    """Top-k of one token in plain Python: the higher score first, then the lower index."""
    kept = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]
    top = max(scores)
    share = [0.0 if s == NOTHING else math.exp((s - top) / temperature) for s in scores]
    total = sum(share[e] for e in (kept if renormalise else range(len(scores))))
    return [share[e] / total if e in kept and total else 0.0 for e in range(len(scores))]


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    tolerance = 1e-2 if dtype == torch.float16 else 3e-6
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


# -- what they compute, on whatever runs here


@HERE
@given(worlds(), st.integers(1, 8), st.sampled_from([1.0, 0.3, 4.0]), st.booleans())
def test_gate(world: World, k: int, temperature: float, renormalise: bool) -> None:
    h_NR = (world.x_ND @ world.a_RD.T).contiguous()
    before_NR = h_NR.clone()
    w_NSE, scaled_NR = gate(world.logits_NSE, k, temperature, renormalise, h_NR, world.column_R)
    expected = [[chosen(row.tolist(), k, temperature, renormalise) for row in rows] for rows in world.logits_NSE]
    assert w_NSE.dtype == torch.float32
    close(w_NSE, torch.tensor(expected, dtype=torch.float64))
    assert scaled_NR is not None and scaled_NR.dtype == world.dtype
    close(scaled_NR, h_NR.double() * w_NSE.double().flatten(1)[:, world.column_R], world.dtype)
    assert torch.equal(h_NR, before_NR)
    alone_NSE, nothing = gate(world.logits_NSE, k, temperature, renormalise)
    assert nothing is None and torch.equal(alone_NSE, w_NSE)


def test_gate_gives_ties_to_the_lowest_index() -> None:
    logits_NSE = torch.tensor([[[1.0, 2, 2, 2, 0]], [[0, 0, 0, 0, 0]], [[NOTHING, NOTHING, 3, NOTHING, 3]], [[NOTHING] * 5]])
    w_NSE, _ = gate(logits_NSE, 2)
    assert w_NSE[:, 0].tolist() == [[0, 0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0, 0], [0, 0, 0.5, 0, 0.5], [0] * 5]


@pytest.mark.parametrize("adapters", [16, 17, 200, 256, 300])
def test_gate_with_many_adapters(adapters: int) -> None:
    logits_NSE = torch.randn(5, 2, adapters, generator=torch.Generator().manual_seed(0))
    close(gate(logits_NSE, 3)[0], reference.gate(logits_NSE, 3, 1.0, True))


@HERE
@given(worlds(), st.integers(1, 3), st.sampled_from([16, 32, 64]))
def test_plan(world: World, k: int, tile: int) -> None:
    w_NSE = reference.gate(world.logits_NSE, k, 1.0, True)
    skip = Skip(*ops._plan(w_NSE, world.column_R, tile), tile)
    columns = world.column_R.tolist()
    for g in range(-(-world.tokens // tile)):
        on = (w_NSE[g * tile : (g + 1) * tile].flatten(1) != 0).any(0).tolist()
        wanted = sorted({r // BLOCK for r, column in enumerate(columns) if on[column]})
        before = skip.before_GL[g].tolist()
        assert before == [sum(block < i for block in wanted) for i in range(-(-len(columns) // BLOCK) + 1)]
        assert skip.blocks_GL[g, : before[-1]].tolist() == wanted


def test_plan_of_a_thousand_blocks() -> None:
    """More blocks than a program looks at in one go, and more adapters than a warp."""
    column_R = torch.arange(300).repeat_interleave(53)
    w_NSE = torch.zeros(1, 1, 300)
    w_NSE[..., [0, 63, 150, 200]] = 0.25
    skip = plan(w_NSE.expand(3, -1, -1), column_R)
    expected = reference.plan(w_NSE.expand(3, -1, -1), column_R, 16)
    count = int(expected[1][0, -1])
    assert count > 12 and torch.equal(skip.before_GL, expected[1])
    assert torch.equal(skip.blocks_GL[:, :count], expected[0][:, :count])


@HERE
@given(worlds(), st.integers(1, 3), st.sampled_from([16, 64]))
def test_the_skip_path_is_the_formula_and_reads_nothing_else(world: World, k: int, tile: int) -> None:
    w_NSE, _ = gate(world.logits_NSE, k)
    skip = Skip(*ops._plan(w_NSE, world.column_R, tile), tile)
    rows = len(world.column_R)
    listed_GR = (skip.before_GL[:, 1:] > skip.before_GL[:, :-1]).repeat_interleave(BLOCK, 1)[:, :rows]
    unread_R = ~listed_GR.any(0)
    a_RD = world.a_RD.masked_fill(unread_R[:, None], torch.nan)
    h_NC = shrink_skip(world.x_ND, a_RD, w_NSE, world.column_R, skip)
    listed_NR = listed_GR.repeat_interleave(tile, 0)[: world.tokens]
    expected_NR = (world.x_ND.double() @ world.a_RD.double().T) * w_NSE.double().flatten(1)[:, world.column_R]
    close(h_NC[:, :rows][listed_NR], expected_NR[listed_NR], world.dtype)
    h_NC[:, :rows].masked_fill_(~listed_NR, torch.nan)
    for s, start in enumerate(world.starts):
        b_RO = world.b_RO[s]
        if INTERPRETED:  # the reference multiplies by 0 instead
            b_RO = b_RO.masked_fill(unread_R[start : start + len(b_RO), None], torch.nan)
        first, last = start // BLOCK * BLOCK, -(-(start + len(b_RO)) // BLOCK) * BLOCK
        others_C = (torch.arange(h_NC.shape[1]) < first) | (torch.arange(h_NC.shape[1]) >= last)
        y_NO = expand_skip(world.y_NO[s], h_NC.masked_fill(others_C, torch.nan), b_RO, start, skip)
        assert y_NO.dtype == world.dtype
        close(y_NO, world.formula(w_NSE, s), world.dtype)


def test_weights_that_hold_for_all_tokens_and_outputs_of_another_dtype() -> None:
    world = World(((4, 8, 0), (16, 4, 4)), tokens=20, dtype=torch.float16)
    w_NSE = torch.tensor([[[0.5, 0, 0.5], [0.25, 0, 0.75]]]).expand(20, -1, -1)
    skip = plan(w_NSE, world.column_R)
    assert skip.tile == 32
    h_NC = shrink_skip(world.x_ND, world.a_RD, w_NSE, world.column_R, skip)
    y_NO = expand_skip(world.y_NO[1].float(), h_NC, world.b_RO[1], world.starts[1], skip)
    assert y_NO.dtype == torch.float32
    close(y_NO, world.formula(w_NSE, 1), torch.float16)


def test_nobody_is_chosen() -> None:
    world = World(((4, 20), (16, 4)), tokens=3)
    w_NSE = torch.zeros(3, 2, 2)
    skip = plan(w_NSE, world.column_R)
    h_NC = shrink_skip(world.x_ND, world.a_RD.fill_(torch.nan), w_NSE, world.column_R, skip)
    if INTERPRETED:
        assert h_NC.isnan().all()  # as it was found
    assert torch.equal(expand_skip(world.y_NO[1], h_NC, world.b_RO[1], 24, skip), world.y_NO[1])


# -- that they are proper operators


def test_opcheck() -> None:
    world = World(((4, 8, 0), (16, 4, 4)), tokens=20)
    w_NSE = reference.gate(world.logits_NSE, 2, 1.0, True)
    lists = reference.plan(w_NSE, world.column_R, 16)
    h_NC = reference.shrink_skip(world.x_ND, world.a_RD, w_NSE, world.column_R, *lists, 16)
    for operator, args in (
        (ops._gate, (world.logits_NSE, 2, 1.0, True)),
        (ops._gate_scale, (world.logits_NSE, 2, 1.0, True, h_NC[:, :36].contiguous(), world.column_R)),
        (ops._plan, (w_NSE, world.column_R, 16)),
        (ops._shrink_skip, (world.x_ND, world.a_RD, w_NSE, world.column_R, *lists, 16)),
        (ops._expand_skip, (world.y_NO[1], h_NC, world.b_RO[1], 12, *lists, 16)),
    ):
        torch.library.opcheck(operator, args)


def routed(x_ND: Tensor, a_RD: Tensor, b_RO: Tensor, y_NO: Tensor, column_R: Tensor, logits_NSE: Tensor) -> Tensor:
    """The second of two sites, once by way of all rows and once by way of those that are needed."""
    w_NSE, h_NR = gate(logits_NSE, 2, 1.0, True, x_ND @ a_RD.T, column_R)
    assert h_NR is not None
    skip = plan(w_NSE, column_R)
    h_NC = shrink_skip(x_ND, a_RD, w_NSE, column_R, skip)
    start = len(a_RD) - len(b_RO)
    return torch.stack([torch.addmm(y_NO, h_NR.narrow(1, start, len(b_RO)), b_RO), expand_skip(y_NO, h_NC, b_RO, start, skip)])


def test_one_graph_for_all_decisions() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(routed, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        world = World(((4, 8, 0), (16, 4, 4)), tokens=20, seed=seed)
        args = (world.x_ND, world.a_RD, world.b_RO[1], world.y_NO[1], world.column_R, world.logits_NSE)
        with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
            both = compiled(*args)
        close(both[0], both[1])
        close(both[1], world.formula(gate(world.logits_NSE, 2)[0], 1))


@pytest.mark.parametrize("tokens", [1, 64])
def test_nothing_on_a_gpu_waits_for_it(tokens: int) -> None:
    """Under fake tensors anything that needs a value raises."""
    with FakeTensorMode():

        def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        logits_NSE, column_R = new(tokens, 2, 5, dtype=torch.float32), new(100, dtype=torch.long)
        both = routed(new(tokens, 64), new(100, 64), new(60, 48), new(tokens, 48), column_R, logits_NSE)
    assert both.shape == (2, tokens, 48) and both.device.type == "cuda" and both.dtype == torch.bfloat16


# -- Triton


def test_nobody_has_to_have_triton() -> None:
    code = """import sys, torch
sys.modules["triton"] = None
from recycler.engine.kernels import gate, ops
print("cuda" in ops._gate._backend_fns, gate(torch.eye(2)[None], 1)[0].tolist())"""
    done = _python("-c", code)
    assert done.stdout.strip() == "False [[[1.0, 0.0], [0.0, 1.0]]]", done.stderr


@needs_triton
def test_triton_computes_the_same() -> None:
    """All that is said above of what they compute, of Triton's kernels in its interpreter."""
    tests = "gate or plan or skip_path or weights_that or nobody_is"
    done = _python("-m", "pytest", __file__, "--noconftest", "-p", "no:cacheprovider", "-k", tests, TRITON_INTERPRET="1")
    assert done.returncode == 0 and "12 passed" in done.stdout, done.stdout + done.stderr


@needs_triton
def test_triton_builds_for_gpus(tmp_path: Path) -> None:
    """In bf16, without a GPU: nothing is spilled, and the matrix kernels copy while they multiply."""
    done = _python(str(ROOT / "benchmarks/kernel_build.py"), "--tiles", "16", "64", "--json", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {(row["kernel"].split(",")[0], row["sm"]) for row in rows} == {
        (kernel, sm) for kernel in ("gate", "gate and scale", "plan", "shrink", "expand") for sm in (80, 90)
    }
    for row in rows:
        assert row["registers"] <= 128 and row["LDL"] == row["STL"] == row["local"] == 0, row
        if row["kernel"].startswith(("shrink", "expand")):
            assert row["copies"] > 0 and row["mma"] > 0, row


def _python(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *args], env=kept | environment, cwd=ROOT, capture_output=True, text=True)
