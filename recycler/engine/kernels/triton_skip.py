"""Rank rows that no token of a tile needs are neither read nor multiplied.

The blocks to work on are listed first, and the matrix kernels loop over the list: an `if` around the loads of a loop would take their
asynchronous copies away. Each is summed in one order by one program: no atomics, and the same bits every time.

Dimensions in names: see `recycler.engine.kernels`.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recycler.engine.kernels.reference import BLOCK

_CHUNK = 64  # blocks that the plan looks at in one go
_DOWN = 256  # bytes of a row that the shrink multiplies in one go: with four in flight, what small GPUs can hold too
_UP = 64  # of O that a program of the expand makes


@triton.jit(do_not_specialize=["N", "R"])
def _plan(
    w_NF,
    column_R,
    blocks_GL,
    before_GL,
    stride,
    N,
    F,
    R,
    L,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of tokens. F is S · E."""
    tile = tl.program_id(0)
    f = tl.arange(0, WIDTH)
    on = tl.zeros([WIDTH], tl.int32)
    for n in range(tile * TILE, min(N, tile * TILE + TILE)):
        on = on | (tl.load(w_NF + n * stride + f, mask=f < F, other=0.0) != 0).to(tl.int32)
    listed = tl.full([], 0, tl.int32)
    tl.store(before_GL + tile * (L + 1), listed)
    for start in range(0, L, CHUNK):
        r = start * BLOCK + tl.arange(0, CHUNK * BLOCK)
        column = tl.load(column_R + r, mask=r < R, other=0).to(tl.int32)
        row = tl.where(r < R, tl.gather(on, column, 0), 0)
        block = tl.max(tl.reshape(row, [CHUNK, BLOCK]), axis=1)
        after = listed + tl.cumsum(block, 0)
        number = start + tl.arange(0, CHUNK)
        tl.store(before_GL + tile * (L + 1) + number + 1, after, mask=number < L)
        tl.store(blocks_GL + tile * L + after - 1, number, mask=(number < L) & (block > 0))
        listed += tl.sum(block, 0)


@triton.jit(do_not_specialize=["N", "R"])
def _shrink(
    x_ND,
    a_RD,
    w_NF,
    column_R,
    blocks_GL,
    before_GL,
    h_NC,
    stride,
    N,
    R,
    L,
    D,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of tokens, one place in its list."""
    tile, place = tl.program_id(1), tl.program_id(0)
    if place >= tl.load(before_GL + tile * (L + 1) + L):
        return
    block = tl.load(blocks_GL + tile * L + place)
    n = tile * TILE + tl.arange(0, TILE)[:, None]
    r = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    d = tl.arange(0, STEP)
    h = tl.zeros([TILE, BLOCK], tl.float32)
    for start in range(0, D, STEP):
        at = start + d
        x = tl.load(x_ND + n * D + at[None, :], mask=(n < N) & (at < D)[None, :], other=0.0)
        a = tl.load(a_RD + r * D + at[:, None], mask=(r < R) & (at < D)[:, None], other=0.0)
        h = tl.dot(x, a, h, input_precision="ieee")
    column = tl.load(column_R + r, mask=r < R, other=0)
    w = tl.load(w_NF + n * stride + column, mask=n < N, other=0.0)
    tl.store(h_NC + n * (L * BLOCK) + r, (h * w).to(h_NC.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["N", "start", "rows"])
def _expand(
    y_NO,
    h_NC,
    b_RO,
    blocks_GL,
    before_GL,
    out_NO,
    start,
    rows,
    N,
    L,
    O,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of tokens, one step of outputs."""
    tile = tl.program_id(1)
    n = tile * TILE + tl.arange(0, TILE)[:, None]
    o = tl.program_id(0) * STEP + tl.arange(0, STEP)[None, :]
    here = (n < N) & (o < O)
    y = tl.load(y_NO + n * O + o, mask=here, other=0.0).to(tl.float32)
    first = tl.load(before_GL + tile * (L + 1) + start // BLOCK)
    last = tl.load(before_GL + tile * (L + 1) + tl.cdiv(start + rows, BLOCK))
    for place in range(first, last):
        r = tl.load(blocks_GL + tile * L + place) * BLOCK + tl.arange(0, BLOCK)
        h = tl.load(h_NC + n * (L * BLOCK) + r[None, :], mask=n < N, other=0.0)
        r = r[:, None] - start
        b = tl.load(b_RO + r * O + o, mask=(r >= 0) & (r < rows) & (o < O), other=0.0)
        y = tl.dot(h, b, y, input_precision="ieee")
    tl.store(out_NO + n * O + o, y.to(out_NO.dtype.element_ty), mask=here)


def plan(w_NSE: Tensor, column_R: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    w_NF = _flat(w_NSE)
    tokens, columns = w_NF.shape
    tiles, blocks = triton.cdiv(tokens, tile), triton.cdiv(len(column_R), BLOCK)
    blocks_GL = torch.empty(tiles, blocks, dtype=torch.int32, device=w_NF.device)
    before_GL = torch.empty(tiles, blocks + 1, dtype=torch.int32, device=w_NF.device)
    _plan[(tiles,)](
        w_NF,
        column_R,
        blocks_GL,
        before_GL,
        w_NF.stride(0),
        tokens,
        columns,
        len(column_R),
        blocks,
        TILE=tile,
        WIDTH=max(128, triton.next_power_of_2(columns)),
        CHUNK=_CHUNK,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return blocks_GL, before_GL


def shrink_skip(
    x_ND: Tensor, a_RD: Tensor, w_NSE: Tensor, column_R: Tensor, blocks_GL: Tensor, before_GL: Tensor, tile: int
) -> Tensor:
    (tiles, blocks), (tokens, width), w_NF = blocks_GL.shape, x_ND.shape, _flat(w_NSE)
    h_NC = torch.empty(tokens, blocks * BLOCK, dtype=x_ND.dtype, device=x_ND.device)
    _shrink[(blocks, tiles)](
        x_ND.contiguous(),
        a_RD.contiguous(),
        w_NF,
        column_R,
        blocks_GL,
        before_GL,
        h_NC,
        w_NF.stride(0),
        tokens,
        len(a_RD),
        blocks,
        width,
        TILE=tile,
        STEP=_DOWN // x_ND.itemsize,
        BLOCK=BLOCK,
        num_warps=4,
        num_stages=4,
    )
    return h_NC


def expand_skip(
    y_NO: Tensor, h_NC: Tensor, b_RO: Tensor, start: int, blocks_GL: Tensor, before_GL: Tensor, tile: int
) -> Tensor:
    (tiles, blocks), (tokens, outputs) = blocks_GL.shape, y_NO.shape
    y_NO = y_NO.contiguous()
    out_NO = torch.empty_like(y_NO)
    _expand[(triton.cdiv(outputs, _UP), tiles)](
        y_NO,
        h_NC,
        b_RO.contiguous(),
        blocks_GL,
        before_GL,
        out_NO,
        start,
        len(b_RO),
        tokens,
        blocks,
        outputs,
        TILE=tile,
        STEP=_UP,
        BLOCK=BLOCK,
        num_warps=4,
        num_stages=4,
    )
    return out_NO


def _flat(w_NSE: Tensor) -> Tensor:
    """[N, S · E], where a row that holds for all tokens stays one row."""
    w_NF = w_NSE.float().flatten(1)
    return w_NF if w_NF.stride(1) == 1 else w_NF.contiguous()
