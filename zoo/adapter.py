"""An adapter: a name, where it came from, its base, and its low-rank factors per site.

At site m the adapter adds ``B A x`` to the base's ``W x``. Whatever scaling the file's format has (α/r, α/√r, per-module
patterns) is folded into B once, in fp32, when the adapter is read; nothing downstream knows about scalings.

DoRA is kept exactly. It replaces W + BA by ``c ⊙ (W + BA)`` with ``c = m / ‖W + BA‖`` per output row, so its update is
``(c − 1) ⊙ (W x) + c ⊙ (B A x)``. Only m is the adapter's own; c needs the base and is computed where both meet.

Where B has a bias b (``lora_bias``), the update is ``B A x + b``, b with the same scaling folded in.

Dimensions in names: R rank, D input width, O output width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The update of one adapter at one site. All tensors are fp32 on the CPU.

    Attributes:
        a_RD: the down projection A.
        b_OR: the up projection B with the scaling folded in.
        magnitude_O: DoRA's magnitude m, or None for a plain low-rank update.
        bias_O: the bias of B with the scaling folded in, or None: the update is ``B A x + bias``. Never beside a magnitude.
    """

    a_RD: Tensor
    b_OR: Tensor
    magnitude_O: Tensor | None = None
    bias_O: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a_RD.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, D), the shape of ΔW and of the linear it belongs to."""
        return self.b_OR.shape[0], self.a_RD.shape[1]


@dataclass(frozen=True)
class Adapter:
    """A named set of factors, one per site (module path in the base model, e.g. ``model.layers.0.mlp.up_proj``).

    Attributes:
        name: the adapter's slug, unique in its zoo.
        sites: module path → Factors. An absent site means no update there.
        base: the base model the adapter declares, or None if it declares none.
        source: where it came from: a Hub id or a folder.
        revision: the 40-hex commit when it came from the Hub.
        sha256: hash of its weight file.
        licence: as its card states it, or None.
    """

    name: str
    sites: Mapping[str, Factors] = field(repr=False)
    base: str | None = None
    source: str = ""
    revision: str | None = None
    sha256: str = ""
    licence: str | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks over its sites, ascending."""
        return tuple(sorted({f.rank for f in self.sites.values()}))

    @property
    def parameters(self) -> int:
        """How many numbers A and B hold, over all sites."""
        return sum(f.a_RD.numel() + f.b_OR.numel() for f in self.sites.values())
