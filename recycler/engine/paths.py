"""How a stack runs: y += Σ_e w_e · B_e A_e x, in several ways that agree to rounding and differ in what they cost.

A path is begun once for a group's input, and then adds at each of its sites. None of them makes a tensor of tokens × adapters ×
outputs, waits for the device, or has shapes that depend on what was decided.

- dense: one GEMM down with all adapters' rows, weighted, one GEMM up. Work grows with all adapters' ranks.
- gather: each token's adapters' rows are looked up and multiplied with that token alone. Work grows with how many a token has, and
  every token reads its own: for a few tokens and many adapters.
- sorted: tokens are sorted by adapter, and each adapter works on its own (grouped GEMM). For many tokens and many adapters.
- skip: the rank rows that nobody in a tile of tokens needs are not read (Triton kernels). For a few tokens and many adapters on a GPU.
- sequence: as gather, for mixtures that hold for a whole sequence: its tokens share what is looked up.

Dimensions in names: B sequence, T token of it, N token, D input width, O output width, E adapter, R rank row, S site of the group,
K one of a token's adapters, P place in an adapter's longest slab, M a token with one of its adapters.
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from recycler.engine import kernels
from recycler.engine.stack import Stack
from recycler.routers.policies import strongest

Name = Literal["dense", "gather", "sorted", "sequence", "skip"]
NAMES: tuple[Name, ...] = get_args(Name)


class Begun(Protocol):
    """A path at work on one input."""

    def add(self, s: int, y_NO: Tensor) -> Tensor:
        """The base's output at a site plus the mixture of updates [N, O]; where nothing else needs it (`Stack.in_place`), in it."""


class Dense:
    """
    Args:
        w_BTSE: weights [B or 1, T or 1, S or 1, E] beside x [B, T, D] or [N, D].
        ranks: how many rank-one components act at each token and site; all where None.
        h_BTR: A x of all rows, where it is there already.
    """

    def __init__(
        self, stack: Stack, x_BTD: Tensor, w_BTSE: Tensor, ranks: int | None = None, h_BTR: Tensor | None = None
    ) -> None:
        buffers = stack._buffers
        if h_BTR is None:
            h_BTR = torch.nn.functional.linear(x_BTD.to(stack.a_RD.dtype), stack.a_RD)
        columns_R = buffers["expert_R"] if w_BTSE.shape[-2] == 1 else buffers["slot_R"]
        assert columns_R is not None
        w_BTM = w_BTSE.flatten(-2)
        # gather, because index_select along the last axis copies number by number.
        scale_BTR = w_BTM.gather(-1, columns_R.expand(*w_BTM.shape[:-1], -1)).to(h_BTR.dtype)
        if scale_BTR.dim() > h_BTR.dim():  # a model that flattens its tokens before the linear
            scale_BTR = scale_BTR.flatten(0, -2)
        self.h_NR = (h_BTR * scale_BTR).flatten(0, -2)
        self.stack, self.ranks = stack, ranks

    def add(self, s: int, y_NO: Tensor) -> Tensor:
        start, stop = self.stack.spans[s]
        h_NR = self.h_NR if stop - start == self.h_NR.shape[-1] else self.h_NR[:, start:stop]
        if self.ranks is not None:
            h_NR = strongest(h_NR, self.ranks)
        b_RO = self.stack.b_RO(s)
        if b_RO.dtype == y_NO.dtype:
            return y_NO.addmm_(h_NR, b_RO) if self.stack.in_place(s) else torch.addmm(y_NO, h_NR, b_RO)
        return y_NO + (h_NR @ b_RO).to(y_NO.dtype)  # a quantised linear may answer in another dtype than adapters are kept in


class Gather:
    """
    Args:
        w_NSE: weights, one row a token or one for all; at most `k` of each row are not 0.
    """

    def __init__(self, stack: Stack, x_ND: Tensor, w_NSE: Tensor, k: int) -> None:
        rows_SEP, there_SEP = stack.tables()
        count, sites = len(x_ND), len(stack.spans)
        value_NSK, index_NSK = few(w_NSE.expand(count, -1, -1), k)
        at_NSK = index_NSK.expand(-1, sites, -1)
        site_S1 = torch.arange(sites, device=x_ND.device)[:, None]
        self.rows_NSR = rows_SEP[site_S1, at_NSK].flatten(2)
        scale_NSKP = there_SEP[site_S1, at_NSK] * value_NSK.expand(-1, sites, -1)[..., None].to(there_SEP.dtype)
        a_NRD = stack.a_RD[self.rows_NSR.flatten(1)]
        h_NR = torch.bmm(a_NRD, x_ND.to(a_NRD.dtype)[:, :, None])
        self.h_NSR = h_NR.view(count, sites, -1) * scale_NSKP.flatten(2)
        self.stack = stack

    def add(self, s: int, y_NO: Tensor) -> Tensor:
        if not self.stack.places[s]:
            return y_NO
        b_NRO = self.stack.b_RO(s)[self.rows_NSR[:, s] - self.stack.spans[s][0]]
        return y_NO + torch.bmm(self.h_NSR[:, s, None], b_NRO)[:, 0].to(y_NO.dtype)


class Sorted:
    """
    Args:
        w_NSE: as of Gather.
    """

    def __init__(self, stack: Stack, x_ND: Tensor, w_NSE: Tensor, k: int) -> None:
        self.stack, self.x_ND = stack, x_ND.to(stack.a_RD.dtype)
        value_NSK, index_NSK = few(w_NSE.expand(len(x_ND), -1, -1), k)
        self.orders = [_order(value_NSK[:, s], index_NSK[:, s], stack.count) for s in range(w_NSE.shape[1])]

    def add(self, s: int, y_NO: Tensor) -> Tensor:
        token_M, value_M, ends_E = self.orders[s if len(self.orders) > 1 else 0]
        a_EDP, b_EPO = self.stack.padded(s)
        h_MP = torch.nn.functional.grouped_mm(self.x_ND[token_M], a_EDP, offs=ends_E)
        out_MO = torch.nn.functional.grouped_mm(h_MP * value_M[:, None].to(h_MP.dtype), b_EPO, offs=ends_E)
        out_MO = out_MO.to(y_NO.dtype)
        return y_NO.index_add_(0, token_M, out_MO) if self.stack.in_place(s) else y_NO.index_add(0, token_M, out_MO)


class Skip:
    """
    Args:
        w_NSE: as of Gather, however many of a row are not 0.
    """

    def __init__(self, stack: Stack, x_ND: Tensor, w_NSE: Tensor) -> None:
        column_R = stack.expert_R if w_NSE.shape[1] == 1 else stack.slot_R
        w_NSE = w_NSE.expand(len(x_ND), -1, -1).float()
        self.stack, self.skip = stack, kernels.plan(w_NSE, column_R)
        self.h_NR = kernels.shrink_skip(x_ND.to(stack.a_RD.dtype), stack.a_RD, w_NSE, column_R, self.skip)

    def add(self, s: int, y_NO: Tensor) -> Tensor:
        return kernels.expand_skip(y_NO, self.h_NR, self.stack.b_RO(s), self.stack.spans[s][0], self.skip)


class PerSequence:
    """
    Args:
        w_BTSE: weights beside x [B, T, D] (or with 1 for T or for B); at most `k` adapters are in any of a sequence's.
    """

    def __init__(self, stack: Stack, x_BTD: Tensor, w_BTSE: Tensor, k: int) -> None:
        rows_SEP, there_SEP = stack.tables()
        sites = len(stack.spans)
        w_BTSE = w_BTSE.expand(len(x_BTD), -1, -1, -1)
        index_BSK = few(w_BTSE.abs().amax(1), k)[1]
        value_BTSK = w_BTSE.gather(-1, index_BSK[:, None].expand(-1, w_BTSE.shape[1], -1, -1))
        at_BSK = index_BSK.expand(-1, sites, -1)
        site_S1 = torch.arange(sites, device=x_BTD.device)[:, None]
        self.rows_BSR = rows_SEP[site_S1, at_BSK].flatten(2)
        there_BSKP = there_SEP[site_S1, at_BSK]
        scale_BTSKP = value_BTSK.expand(-1, -1, sites, -1)[..., None].to(there_BSKP.dtype) * there_BSKP[:, None]
        a_BRD = stack.a_RD[self.rows_BSR.flatten(1)]
        h_BTR = torch.bmm(x_BTD.to(a_BRD.dtype), a_BRD.transpose(1, 2))
        self.h_BTSR = h_BTR.unflatten(-1, (sites, -1)) * scale_BTSKP.flatten(-2)
        self.stack = stack

    def add(self, s: int, y_NO: Tensor) -> Tensor:
        if not self.stack.places[s]:
            return y_NO
        b_BRO = self.stack.b_RO(s)[self.rows_BSR[:, s] - self.stack.spans[s][0]]
        h_BTR = self.h_BTSR[:, :, s]
        y_BTO = y_NO.view(*h_BTR.shape[:2], -1)
        if b_BRO.dtype == y_NO.dtype:
            out_BTO = y_BTO.baddbmm_(h_BTR, b_BRO) if self.stack.in_place(s) else torch.baddbmm(y_BTO, h_BTR, b_BRO)
            return out_BTO.view(y_NO.shape)
        return (y_BTO + torch.bmm(h_BTR, b_BRO).to(y_NO.dtype)).view(y_NO.shape)


def few(w_NSE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(weights, adapters) [N, S, K] of the k largest by size; those beyond what a row has are 0, whoever they are of."""
    if k == 1:
        index_NSK = w_NSE.abs().argmax(-1, keepdim=True)
    else:
        index_NSK = w_NSE.abs().topk(min(k, w_NSE.shape[-1]), dim=-1, sorted=False).indices
    return w_NSE.gather(-1, index_NSK), index_NSK


def _order(value_NK: Tensor, index_NK: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens by adapter: (token, weight) [M] in that order, and where each adapter's end [E]."""
    index_M = index_NK.flatten()
    order_M = index_M.argsort(stable=True)
    number_E = torch.zeros(count, dtype=torch.int32, device=index_M.device)
    number_E = number_E.scatter_add(0, index_M, torch.ones_like(index_M, dtype=torch.int32))
    return order_M // index_NK.shape[1], value_NK.flatten()[order_M], number_E.cumsum(0, dtype=torch.int32)
