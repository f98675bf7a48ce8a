"""Scores → weights → scaled rank rows, in one launch.

Dimensions in names: see `recycler.engine.kernels`.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from recycler.engine.kernels import reference

_MOST = 256  # adapters: a program holds all scores of a token in registers; where there are more, torch sorts them
_HELD = 1024  # scores that a program holds at most
_TILE = 16  # tokens that a program works on at most
_STEP = 128  # rank rows that a program scales


@triton.jit(do_not_specialize=["N"])
def _kernel(
    logits_NSE,
    w_NSE,
    h_NR,
    column_R,
    out_NR,
    N,
    S,
    E,
    R,
    k,
    temperature,
    ALL: tl.constexpr,
    RENORMALISE: tl.constexpr,
    SCALE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
):
    """A tile of tokens, one site, one step of rank rows: choosing again for every step costs less than another launch."""
    n = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    s = tl.program_id(1)
    e = tl.arange(0, WIDTH)[None, :]
    here = (n < N) & (e < E)
    at = (n * S + s) * E + e
    score = tl.load(logits_NSE + at, mask=here, other=float("-inf"))
    kept = tl.full([TILE, WIDTH], ALL, tl.int1)
    if not ALL:
        rest = score
        for _ in range(k):
            highest = rest == tl.max(rest, axis=1)[:, None]
            hit = e == tl.min(tl.where(highest, e, WIDTH), axis=1)[:, None]  # the lowest index among equals
            kept = kept | hit
            rest = tl.where(hit, float("-inf"), rest)
    top = tl.max(score, axis=1)[:, None]
    share = tl.exp((score - top) / temperature)
    total = tl.sum(tl.where(kept, share, 0.0) if RENORMALISE else share, axis=1)[:, None]
    # Where nobody is available, shares and total are NaN, which is not above 0.
    w = tl.where(kept & (total > 0), share / tl.where(total > 0, total, 1.0), 0.0)
    if tl.program_id(2) == 0:
        tl.store(w_NSE + at, w, mask=here)
    if SCALE:
        r = (tl.program_id(2) * STEP + tl.arange(0, STEP))[None, :]
        column = tl.load(column_R + r, mask=r < R, other=-1).to(tl.int32) - s * E
        own = (column >= 0) & (column < E) & (n < N)  # rows of this site
        column = tl.broadcast_to(tl.where((column >= 0) & (column < E), column, 0), [TILE, STEP])
        h = tl.load(h_NR + n * R + r, mask=own, other=0.0)
        scaled = h.to(tl.float32) * tl.gather(w, column, 1)
        tl.store(out_NR + n * R + r, scaled.to(out_NR.dtype.element_ty), mask=own)


def gate(logits_NSE: Tensor, k: int, temperature: float, renormalise: bool) -> Tensor:
    if logits_NSE.shape[-1] > _MOST:
        return reference.gate(logits_NSE, k, temperature, renormalise)
    return _launch(logits_NSE, k, temperature, renormalise, None, None)[0]


def gate_scale(
    logits_NSE: Tensor, k: int, temperature: float, renormalise: bool, h_NR: Tensor, column_R: Tensor
) -> tuple[Tensor, Tensor]:
    if logits_NSE.shape[-1] > _MOST:
        w_NSE = reference.gate(logits_NSE, k, temperature, renormalise)
        return w_NSE, reference.scaled(h_NR, w_NSE, column_R)
    return _launch(logits_NSE, k, temperature, renormalise, h_NR, column_R)


def _launch(
    logits_NSE: Tensor, k: int, temperature: float, renormalise: bool, h_NR: Tensor | None, column_R: Tensor | None
) -> tuple[Tensor, Tensor]:
    tokens, sites, adapters = logits_NSE.shape
    logits_NSE = logits_NSE.float().contiguous()
    w_NSE = torch.empty_like(logits_NSE)
    h_NR = w_NSE if h_NR is None else h_NR.contiguous()
    scale, rows = column_R is not None, h_NR.shape[-1]
    out_NR = torch.empty_like(h_NR) if scale else w_NSE
    width = max(16, triton.next_power_of_2(adapters))
    tile = min(_TILE, _HELD // width, triton.next_power_of_2(tokens))
    grid = (triton.cdiv(tokens, tile), sites, triton.cdiv(rows, _STEP) if scale else 1)
    _kernel[grid](
        logits_NSE,
        w_NSE,
        h_NR,
        column_R if column_R is not None else w_NSE,
        out_NR,
        tokens,
        sites,
        adapters,
        rows,
        min(k, adapters),
        temperature,
        ALL=k >= adapters,
        RENORMALISE=renormalise,
        SCALE=scale,
        TILE=tile,
        WIDTH=width,
        STEP=_STEP,
        num_warps=4,
    )
    return w_NSE, out_NR
