"""How one site of an adapter becomes factors: which tensors, and the arithmetic that every format ends in.

::

    LoRA, rsLoRA, DoRA    ΔW = s · B A                        + s · b on the output where B has a bias b
    LoRA-XS               ΔW = s · B M A                      M is R×R, A and B are fixed
    AdaLoRA, IncreLoRA    ΔW = α / (n + 1e-5) · B diag(E) A   n is the rank that training started with, or counted up to

Dimensions in names: R rank, D input width, O output width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recycler.zoo.adapter import Factors

if TYPE_CHECKING:
    from torch import Tensor

RANKNUM_EPS = 1e-5  # beside n, in PEFT's AdaLoRA layers and in IncreLoRA's


@dataclass(frozen=True)
class SitePlan:
    """How one site will be read.

    Attributes:
        a: the tensors whose rows together are A. b: whose columns together are B. One each, but in IncreLoRA.
        rank: R of the factors. shape: (O, D) of the linear.
        scaling: what B will be multiplied by; where there is a `ranknum`, what the file's header lets one expect.
        magnitude: DoRA's m. bias: of B. latent: LoRA-XS's M.
        values: AdaLoRA's and IncreLoRA's E. ranknum: a tensor that holds n; then α is `alpha`.
        mask: which rows of A and E and columns of B count; all where empty.
    """

    a: tuple[str, ...]
    b: tuple[str, ...]
    rank: int
    scaling: float
    shape: tuple[int, int]
    magnitude: str | None = None
    bias: str | None = None
    latent: str | None = None
    values: tuple[str, ...] = ()
    ranknum: str | None = None
    alpha: float = 1.0
    mask: tuple[bool, ...] = ()

    def scale(self, tensors: Mapping[str, Tensor]) -> float:
        """What B is multiplied by."""
        return self.scaling if self.ranknum is None else self.alpha / (float(tensors[self.ranknum]) + RANKNUM_EPS)

    def factors(self, tensors: Mapping[str, Tensor]) -> Factors:
        """The factors, in fp32, with the scaling and everything between A and B folded into B."""
        import torch

        a_RD, b_OR = _joined(tensors, self.a, 0), _joined(tensors, self.b, 1)
        if self.latent is not None:
            b_OR = b_OR @ tensors[self.latent].float()
        if self.values:
            b_OR = b_OR * _joined(tensors, self.values, 0).T
        if self.mask:
            kept = torch.tensor(self.mask)
            a_RD, b_OR = a_RD[kept], b_OR[:, kept]
        scale = self.scale(tensors)
        bias_O = None if self.bias is None else tensors[self.bias].float() * scale
        if bias_O is not None and not bias_O.any():
            bias_O = None
        return Factors(
            a_RD=a_RD.contiguous(),
            b_OR=(b_OR * scale).contiguous(),
            magnitude_O=None if self.magnitude is None else tensors[self.magnitude].float(),
            bias_O=bias_O,
        )


def _joined(tensors: Mapping[str, Tensor], names: Sequence[str], axis: int) -> Tensor:
    import torch

    if len(names) == 1:
        return tensors[names[0]].float()
    return torch.cat([tensors[name].float() for name in names], dim=axis)
