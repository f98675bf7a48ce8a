"""What the kernels compute, in plain torch: static shapes, nothing that waits for the device.

Dimensions in names: see `recycler.engine.kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recycler.routers.policies import top_k

BLOCK = 16  # rank rows; the least that tensor cores multiply with


def gate(logits_NSE: Tensor, k: int, temperature: float, renormalise: bool) -> Tensor:
    return top_k(logits_NSE, k, temperature, renormalise)


def scaled(h_NR: Tensor, w_NSE: Tensor, column_R: Tensor) -> Tensor:
    return (h_NR.float() * w_NSE.flatten(1)[:, column_R]).to(h_NR.dtype)


def plan(w_NSE: Tensor, column_R: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    tiles, blocks = -(-len(w_NSE) // tile), -(-len(column_R) // BLOCK)
    on_NR = w_NSE.flatten(1)[:, column_R] != 0
    on_NR = torch.nn.functional.pad(on_NR, (0, blocks * BLOCK - on_NR.shape[1], 0, tiles * tile - on_NR.shape[0]))
    on_GL = on_NR.view(tiles, tile, blocks, BLOCK).any(3).any(1)
    before_GL = torch.nn.functional.pad(on_GL.cumsum(1, dtype=torch.int32), (1, 0))
    number_L = torch.arange(blocks, dtype=torch.int32, device=w_NSE.device)
    # A listed block goes to where it stands among the listed ones, all others to one place behind them that is cut off.
    place_GL = torch.where(on_GL, before_GL[:, :-1], blocks).long()
    blocks_GL = before_GL.new_zeros(tiles, blocks + 1).scatter(1, place_GL, number_L.expand(tiles, -1))
    return blocks_GL[:, :-1].contiguous(), before_GL


def shrink_skip(
    x_ND: Tensor, a_RD: Tensor, w_NSE: Tensor, column_R: Tensor, blocks_GL: Tensor, before_GL: Tensor, tile: int
) -> Tensor:
    h_NR = torch.nn.functional.linear(x_ND, a_RD)
    h_NC = torch.nn.functional.pad(scaled(h_NR, w_NSE, column_R), (0, blocks_GL.shape[1] * BLOCK - len(column_R)))
    return torch.where(_listed(before_GL, tile, len(x_ND)), h_NC, 0.0)


def expand_skip(
    y_NO: Tensor, h_NC: Tensor, b_RO: Tensor, start: int, blocks_GL: Tensor, before_GL: Tensor, tile: int
) -> Tensor:
    h_NC = torch.where(_listed(before_GL, tile, len(h_NC)), h_NC, 0.0)
    h_NR = h_NC[:, start : start + len(b_RO)]
    if b_RO.dtype == y_NO.dtype:
        return torch.addmm(y_NO, h_NR, b_RO)
    return y_NO + (h_NR @ b_RO).to(y_NO.dtype)


def _listed(before_GL: Tensor, tile: int, tokens: int) -> Tensor:
    """[N, C]"""
    on_GL = before_GL[:, 1:] > before_GL[:, :-1]
    return on_GL.repeat_interleave(tile, 0, output_size=len(on_GL) * tile)[:tokens].repeat_interleave(
        BLOCK, 1, output_size=on_GL.shape[1] * BLOCK
    )
