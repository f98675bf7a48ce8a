"""What routers read of the base's own hidden states before a sequence begins.

Dimensions in names: B batch, T token, P part of a prompt, N example, H width of the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recycler.routers.protocol import Reader


def unit(x_NH: Tensor) -> Tensor:
    """Rows of length 1."""
    return torch.nn.functional.normalize(x_NH, dim=-1)


def last_tokens(reader: Reader, inputs: Mapping[str, Any], depth: float) -> Tensor:
    """The base's hidden state at each prompt's last token [B, H], standardised to length 1."""
    return States(reader, inputs, depth).last()


class States:
    """The base's hidden states of a batch of prompts at one depth, standardised, on the CPU."""

    def __init__(self, reader: Reader, inputs: Mapping[str, Any], depth: float) -> None:
        states_BTH, mask_BT = reader.states(inputs, depth)
        self.states_BTH = torch.nn.functional.layer_norm(states_BTH, states_BTH.shape[-1:])
        # How many real tokens there are from each token to the end, itself included; 0 at padding.
        self.left_BT = (mask_BT.flip(1).long().cumsum(1).flip(1)) * mask_BT

    def last(self) -> Tensor:
        """[B, H], of length 1: at each prompt's last token."""
        last_B = (self.left_BT == 1).long().argmax(1)
        return unit(self.states_BTH[torch.arange(len(last_B), device=last_B.device), last_B].cpu())

    def mean(self, spans: Sequence[tuple[int, int]], rows: Sequence[int] | None = None) -> Tensor:
        """[P, H]: means over spans of row `rows`, of every row where None. A span (first, after) goes from the first-to-last token to the
        one before the after-to-last, so that (3, 1) is the third and second to last, and (3, 0) the last three."""
        states_BTH, left_BT = self.states_BTH, self.left_BT
        if rows is not None:
            states_BTH, left_BT = states_BTH[list(rows)], left_BT[list(rows)]
        first_P1, end_P1 = torch.tensor(spans, device=left_BT.device).T[..., None]
        inside_PT = (left_BT <= first_P1) & (left_BT > end_P1)
        share_PT = inside_PT / inside_PT.sum(1, keepdim=True).clamp(min=1)
        return torch.einsum("pt,pth->ph", share_PT, states_BTH).cpu()
