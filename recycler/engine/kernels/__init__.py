"""Four kernels for routed sites on a GPU, and what they mean everywhere else.

    w_NSE, h_NR = gate(logits_NSE, k, 1.0, True, h_NR, expert_R)     # any path: choose, weigh, and scale what came down
    skip = plan(w_NSE, expert_R)                                     # which rank rows do these tokens need at all?
    h_NC = shrink_skip(x_ND, a_RD, w_NSE, expert_R, skip)            # down, those only
    y_NO = expand_skip(y_NO, h_NC, b_RO, start, skip)                # up, those of one site only

Each is an operator of torch (`recycler::…`) with a reference in plain torch, which is what runs on a CPU, and a Triton kernel for
CUDA tensors where triton is installed. Nothing here waits for the device: shapes and grids are those of the worst case, and
what there is less to do is read on the device. For inference: they have no gradient.

Rank rows come in blocks of 16. Blocks lie where they fall, so that one may hold rows of several adapters, or of two sites, and small
ranks cost no padding. R need not be a multiple of 16: rows beyond it are masked, and h is wide enough for whole blocks.

Dimensions in names: N token, D input width, O output width, E adapter, R rank row, S site of the group (1 where all sites share their
weights), G tile of tokens, L block of rank rows, C column of h (R, up to whole blocks).
"""

from recycler.engine.kernels.ops import Skip, expand_skip, gate, plan, shrink_skip
from recycler.engine.kernels.reference import BLOCK

__all__ = ["BLOCK", "Skip", "expand_skip", "gate", "plan", "shrink_skip"]
