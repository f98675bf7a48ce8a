"""The operators `recycler::…`: the reference everywhere, Triton's for CUDA tensors.

`torch.library.triton_op` would look simpler, and under `torch.compile` it runs its Triton body on a CPU too.

Dimensions in names: see `recycler.engine.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recycler.engine.kernels import reference
from recycler.engine.kernels.reference import BLOCK


class Skip(NamedTuple):
    """Per tile of `tile` tokens the blocks of rank rows that at least one of them needs.

    Attributes:
        blocks_GL: their numbers, ascending, int32; what comes after the last one means nothing.
        before_GL: [G, L + 1] int32: how many of them come before a block, so that those from block i to before j are
            blocks_GL[before_GL[i] : before_GL[j]], and before_GL[-1] is how many there are.
    """

    blocks_GL: Tensor
    before_GL: Tensor
    tile: int


def gate(
    logits_NSE: Tensor,
    k: int,
    temperature: float = 1.0,
    renormalise: bool = True,
    h_NR: Tensor | None = None,
    column_R: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(weights [N, S, E] fp32, h scaled by them): `recycler.routers.policies.top_k`, and what is done with it, in one launch.

    Args:
        logits_NSE: −∞ where an adapter is not available. Of equal ones the one with the lowest index goes first.
        k: k ≥ E keeps all.
        renormalise: the kept weights sum to 1; False leaves them as the softmax over all gave them.
        h_NR: A x of all rank rows, at any precision; None where the rows are not there yet.
        column_R: int64 column in [S · E] of each row's weight: `slot_R`, or `expert_R` where S is 1.
    """
    if h_NR is None:
        return _gate(logits_NSE, k, temperature, renormalise), None
    assert column_R is not None
    return _gate_scale(logits_NSE, k, temperature, renormalise, h_NR, column_R)


def plan(w_NSE: Tensor, column_R: Tensor) -> Skip:
    """Which blocks of rank rows hold a row whose weight is not 0 for one of a tile's tokens.

    Args:
        w_NSE: fp32 weights; a row that holds for all tokens may be expanded.
        column_R: as of `gate`.
    """
    tile = min(64, max(16, 1 << (len(w_NSE) - 1).bit_length()))
    blocks_GL, before_GL = _plan(w_NSE, column_R, tile)
    return Skip(blocks_GL, before_GL, tile)


def shrink_skip(x_ND: Tensor, a_RD: Tensor, w_NSE: Tensor, column_R: Tensor, skip: Skip) -> Tensor:
    """w ⊙ A x [N, C] in the listed blocks; what is in the others means nothing. x and A are of one dtype."""
    return _shrink_skip(x_ND, a_RD, w_NSE, column_R, *skip)


def expand_skip(y_NO: Tensor, h_NC: Tensor, b_RO: Tensor, start: int, skip: Skip) -> Tensor:
    """y + h B [N, O] over the listed blocks of one site, in the dtype of y.

    Args:
        h_NC: of `shrink_skip`. A block at either end of the site is read whole, rows of its neighbour included, and those are
            multiplied by 0: they have to be finite.
        b_RO: the site's rows, which are those from `start` of the group's.
    """
    return _expand_skip(y_NO, h_NC, b_RO, start, *skip)


@torch.library.custom_op("recycler::gate", mutates_args=())
def _gate(logits: Tensor, k: int, temperature: float, renormalise: bool) -> Tensor:
    return reference.gate(logits, k, temperature, renormalise)


@torch.library.custom_op("recycler::gate_scale", mutates_args=())
def _gate_scale(
    logits: Tensor, k: int, temperature: float, renormalise: bool, h: Tensor, column: Tensor
) -> tuple[Tensor, Tensor]:
    w_NSE = reference.gate(logits, k, temperature, renormalise)
    return w_NSE, reference.scaled(h, w_NSE, column)


@torch.library.custom_op("recycler::plan", mutates_args=())
def _plan(w: Tensor, column: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    return reference.plan(w, column, tile)


@torch.library.custom_op("recycler::shrink_skip", mutates_args=())
def _shrink_skip(x: Tensor, a: Tensor, w: Tensor, column: Tensor, blocks: Tensor, before: Tensor, tile: int) -> Tensor:
    return reference.shrink_skip(x, a, w, column, blocks, before, tile)


@torch.library.custom_op("recycler::expand_skip", mutates_args=())
def _expand_skip(y: Tensor, h: Tensor, b: Tensor, start: int, blocks: Tensor, before: Tensor, tile: int) -> Tensor:
    return reference.expand_skip(y, h, b, start, blocks, before, tile)


# Shapes alone, for tracing.


@_gate.register_fake
def _(logits: Tensor, k: int, temperature: float, renormalise: bool) -> Tensor:
    return logits.new_empty(logits.shape, dtype=torch.float32)


@_gate_scale.register_fake
def _(logits: Tensor, k: int, temperature: float, renormalise: bool, h: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape, dtype=torch.float32), h.new_empty(h.shape)


@_plan.register_fake
def _(w: Tensor, column: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    tiles, blocks = -(-w.shape[0] // tile), -(-column.shape[0] // BLOCK)
    return w.new_empty(tiles, blocks, dtype=torch.int32), w.new_empty(tiles, blocks + 1, dtype=torch.int32)


@_shrink_skip.register_fake
def _(x: Tensor, a: Tensor, w: Tensor, column: Tensor, blocks: Tensor, before: Tensor, tile: int) -> Tensor:
    return x.new_empty(x.shape[0], blocks.shape[1] * BLOCK)


@_expand_skip.register_fake
def _(y: Tensor, h: Tensor, b: Tensor, start: int, blocks: Tensor, before: Tensor, tile: int) -> Tensor:
    return y.new_empty(y.shape)


def _triton(module: str, name: str) -> Callable[..., Any]:
    """A launcher, on the device of its first argument. Imported when first needed: who has no GPU should not wait for it."""

    def launch(first: Tensor, *rest: Any) -> Any:
        launcher = getattr(import_module(f"recycler.engine.kernels.{module}"), name)
        with torch.cuda.device_of(first):  # Triton launches on the current one
            return launcher(first, *rest)

    return launch


if find_spec("triton") is not None:
    _gate.register_kernel("cuda", _triton("triton_gate", "gate"))
    _gate_scale.register_kernel("cuda", _triton("triton_gate", "gate_scale"))
    _plan.register_kernel("cuda", _triton("triton_skip", "plan"))
    _shrink_skip.register_kernel("cuda", _triton("triton_skip", "shrink_skip"))
    _expand_skip.register_kernel("cuda", _triton("triton_skip", "expand_skip"))
