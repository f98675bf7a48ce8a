"""One mixture for a whole run: W + Σ_e w_e ΔW_e takes the place of W, and the adapters cost nothing.

The weights themselves are kept on the CPU meanwhile and put back afterwards, to the bit: what was added in a rounded dtype cannot be
taken away again. On Llama-8B writing the weights takes about ten decode steps' worth of adapters.

Dimensions in names: D input width, O output width, E adapter, R rank row, S site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from recycler.engine.attach import Attachment
    from recycler.engine.bank import Bank
    from recycler.engine.stack import Slab


@contextmanager
def merged(engine: Attachment, base: nn.Module, weights_E: Tensor) -> Iterator[None]:
    """Adds a mixture to the base's weights for the length of a ``with`` block. Sums are in fp32 and rounded once.

    Args:
        weights_E: one weight an adapter, on the CPU.

    Raises:
        UsageError: a linear is quantised, is on disk, or shares its weight, or has no bias to take an adapter's.
    """
    used = [e for e, weight in enumerate(weights_E.tolist()) if weight]
    kept: list[tuple[Tensor, Tensor]] = []
    linears = {site: base.get_submodule(site) for bank in engine.banks for site in bank.group.sites}
    shares = [(site, held) for bank in engine.banks for site, held in zip(bank.group.sites, _held(bank, used), strict=True)]
    _check(base, linears, [site for site, held in shares if any(one.bias_O is not None for one in held.values())])
    try:
        with torch.no_grad():
            for site, held in shares:
                if held:
                    _add(held, linears[site], weights_E, kept)
        with engine.control.set(enabled=False):
            yield
    finally:
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)


def _check(base: nn.Module, linears: dict[str, nn.Module], biased: list[str]) -> None:
    instead = "Use `mixture`, which leaves the weights alone."
    owners: dict[int, int] = {}
    for module in base.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for site, linear in linears.items():
        weight = linear.weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dtype.itemsize < 2 or weight.is_meta:
            raise UsageError(
                f"{site} cannot be written.", "Its weight is quantised, or not in memory.", instead, code="E_MERGE"
            )
        if owners.get(id(weight), 1) > 1:
            raise UsageError(
                f"{site} shares its weight with another module.", "Merging would change both.", instead, code="E_MERGE"
            )
    for site in biased:
        if getattr(linears[site], "bias", None) is None:
            raise UsageError(f"{site} has no bias that could take the adapters'.", "", instead, code="E_MERGE")


def _held(bank: Bank, used: list[int]) -> list[dict[int, Slab]]:
    """Per site, what the adapters of the mixture add there; read from disk where they are paged."""
    slabs = bank.stack.slabs() if bank.shelf is None else bank.shelf.slabs(bank, tuple(used))
    return [{e: held[e] for e in used if e in held} for held in slabs]


def _add(held: Mapping[int, Slab], linear: nn.Module, weights_E: Tensor, kept: list[tuple[Tensor, Tensor]]) -> None:
    weight, bias_O = linear.weight, getattr(linear, "bias", None)
    assert isinstance(weight, Tensor)
    w_OD = weight.float().T if type(linear).__name__ == "Conv1D" else weight.float()
    total_OD, more_O = w_OD.clone(), None if bias_O is None else bias_O.float().clone()
    for e, one in held.items():
        share = float(weights_E[e])
        total_OD += share * (one.b_RO.float().T @ one.a_RD.float())
        if one.scale_O is not None:
            total_OD += share * one.scale_O.float()[:, None] * w_OD
        if one.bias_O is not None and more_O is not None:
            more_O += share * one.bias_O.float()
    kept.append((weight, weight.detach().cpu().clone()))
    weight.copy_(total_OD.T if type(linear).__name__ == "Conv1D" else total_OD)
    if bias_O is not None and more_O is not None:
        kept.append((bias_O, bias_O.detach().cpu().clone()))
        bias_O.copy_(more_O)
