"""K-concat: base and adapters up in one GEMM, y = [x | h] · [W | Bᵀ]ᵀ, so that the output is written once and not read again.

The base's weight becomes a view of the joint matrix (no second copy is kept), so that it has to be asked for, and is not for
quantised, offloaded or shared weights. It serves the dense path; wherever else the site runs (another path, a mixture of some adapters,
adapters off), it runs as before, on the same weights. A GPU's feature: on a CPU it gains nothing.

Dimensions in names: B batch, T token, D input width, O output width, R rank row of the site.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recycler.engine.paths import Dense

if TYPE_CHECKING:
    from recycler.engine.bank import Bank


class Joint:
    """One site whose linear computes its adapters too, until `detach`.

    Attributes:
        taken: whether the last forward has added the mixture.
    """

    def __init__(self, bank: Bank, s: int, linear: nn.Linear) -> None:
        self.bank, self.s, self.linear, self.taken = bank, s, linear, False
        width = linear.in_features
        self.joint_OK = torch.cat([linear.weight.detach(), bank.stack.b_RO(s).T], 1)
        linear.weight.data = self.joint_OK[:, :width]
        linear.forward = self.forward  # type: ignore[method-assign, assignment]

    def forward(self, x_BTD: Tensor) -> Tensor:
        bank, linear, s = self.bank, self.linear, self.s
        self.taken = bank.control.enabled
        if not self.taken:
            return nn.functional.linear(x_BTD, linear.weight, linear.bias)
        mixed = bank.mix(x_BTD)
        begun, stack, _ = mixed
        if isinstance(begun, Dense) and stack is bank.stack and begun.ranks is None:
            start, stop = stack.spans[s]
            x_NK = torch.cat([x_BTD.flatten(0, -2), begun.h_NR.narrow(1, start, stop - start)], 1)
            return nn.functional.linear(x_NK, self.joint_OK, linear.bias).view(*x_BTD.shape[:-1], -1)
        y_BTO = nn.functional.linear(x_BTD, linear.weight, linear.bias)
        return bank.finish(s, mixed, y_BTO, linear.bias)

    @torch.inference_mode(False)
    @torch.no_grad()
    def renew(self) -> None:
        """Takes over what the stack holds now."""
        self.joint_OK[:, self.linear.in_features :] = self.bank.stack.b_RO(self.s).T

    def detach(self) -> None:
        """Gives the linear its own forward and a weight of its own again."""
        del self.linear.forward
        self.linear.weight.data = self.linear.weight.detach().clone(memory_format=torch.contiguous_format)


def can_join(bank: Bank, s: int, linear: nn.Linear, others: Mapping[int, int]) -> bool:
    """Whether a site can: a plain linear in memory, in the adapters' dtype, whose weight is nobody else's, and plain adapters.

    Args:
        others: how many modules hold a parameter, by its id.
    """
    weight = linear.weight
    return (
        type(linear) is nn.Linear
        and not hasattr(linear, "_hf_hook")
        and weight.dtype == bank.stack.a_RD.dtype
        and weight.device == bank.stack.a_RD.device
        and others.get(id(weight), 1) == 1
        and not bank.stack.extra[s]
        and bool(bank.stack.places[s])
    )
