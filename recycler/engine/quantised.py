"""Adapters in int8: symmetric, one scale for each rank row of A and of B.

Both scales belong to a rank row, so that Σ_r w · s_r t_r · (q_A x)_r q_B could take them into the gate's multiplier. Here they go back
in when an adapter is promoted, in the dtype in which it runs: every path, DoRA and the kernels then work as they are, and what is
halved (bf16) or quartered (fp32) is what lies on disk and what waits in memory.

Of a Gaussian row some 4σ long at most, a step is 4σ/127 and its error 1/√12 of that: 0.9 % of a row, about 1.3 % of B A x.

Dimensions in names: R rank row, D any width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from recycler.engine.stack import Stack

MOST = 127  # −128 is left out, so that what is negated stays in range


@torch.no_grad()
def quantise(x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [R, D], scales [R, 1] in fp32): x ≈ q · scale, every number within half a step of what it was. A row of zeros stays one."""
    x_RD = x_RD.float()
    scale_R1 = x_RD.abs().amax(1, keepdim=True) / MOST
    # The smallest fp32 numbers have no 127th: their row's step is the smallest there is.
    scale_R1 = scale_R1.clamp(min=torch.finfo(torch.float32).tiny)
    return (x_RD / scale_R1).round().clamp(-MOST, MOST).to(torch.int8), scale_R1


def dequantise(q_RD: Tensor, scale_R1: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantise`, rounded to `dtype`."""
    return (q_RD * scale_R1).to(dtype)


@torch.no_grad()
def round_trip(stack: Stack) -> None:
    """Makes every adapter of a stack what it would be after int8, in place: for measuring what that costs."""
    for held in stack.slabs():
        for one in held.values():
            for part in (one.a_RD, one.b_RO):
                part.copy_(dequantise(*quantise(part), part.dtype))
    stack._padded.clear()
