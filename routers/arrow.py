"""Arrow: prototypes from the adapters' own weights. No data, no gradients.

The prototype of an adapter at a site is the first right singular vector of its ΔW, the direction of the input it changes
most. A token's score is the length of its projection on it.

Ostapenko et al. 2024, Towards Modular LLMs by Building and Reusing a Library of LoRAs (arXiv:2405.11157). Differences from
released code: the vector is exact (QR of both factors and an r×r SVD, where PEFT runs 15 power iterations), and updates are
mixed after the factors, Σ w BAx, where mttl mixes the factors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recycler.routers import columns
from recycler.routers.linear import LinearRouter, Rows
from recycler.routers.protocol import Group, Model, Profile
from recycler.routers.select import Policy

if TYPE_CHECKING:
    from typing_extensions import Self

    from recycler.zoo.adapter import Factors


class Arrow(LinearRouter):
    """score = |x · v₁|, x as it is. Adapters absent at a site are −∞ there: the score comes from their own factors."""

    paper = "Ostapenko et al. 2024 (arXiv:2405.11157)"
    absolute = True

    @classmethod
    def fit(cls, model: Model, profile: Profile | None, config: Policy) -> Self:
        count = len(model.adapters)
        widths = {site: group.width for group in model.groups for site in group.sites}
        v_ED = {site: torch.zeros(count, width) for site, width in widths.items()}
        offset_E = {site: torch.full((count,), float("-inf")) for site in widths}
        for index, found in enumerate(model.map(_prototypes, model.adapters, "prototypes")):
            for site, v_D in found.items():
                v_ED[site][index], offset_E[site][index] = v_D, 0.0
        rows = {site: Rows(v_ED[site], offset_E[site]) for site in widths}
        return cls(model.adapters, config, rows)

    @classmethod
    def spreads(cls, config: Policy) -> bool:
        return True

    def extended(self, model: Model, profile: Profile | None, name: str) -> Self:
        def column(group: Group, site: str) -> Tensor | None:
            factors = model.factors(site).get(name)
            return None if factors is None else prototype(factors)

        return columns.extended(self, model, name, column)

    def without(self, name: str) -> Self:
        return columns.without(self, name)


def _prototypes(model: Model, name: str) -> dict[str, Tensor]:
    """Site → the prototype of one adapter, where it has factors."""
    held = {site: model.factors(site) for group in model.groups for site in group.sites}
    return {site: prototype(factors[name]) for site, factors in held.items() if name in factors}


def prototype(factors: Factors) -> Tensor:
    """First right singular vector [D] of ΔW = B A, exact (in fp64) and without forming ΔW.

    Aᵀ = Q_A R_A and B = Q_B R_B give ΔW = Q_B (R_B R_Aᵀ) Q_Aᵀ; the middle is r×r, and Q_A maps its right singular vectors
    back. The sign is fixed (largest entry positive) so that the same weights give the same bytes; scores do not see it.
    """
    q_a, r_a = torch.linalg.qr(factors.a_RD.T.double())
    r_b = torch.linalg.qr(factors.b_OR.double(), mode="r").R
    _, _, vh = torch.linalg.svd(r_b @ r_a.T)
    v_D = q_a @ vh[0]
    return (v_D * torch.sign(v_D[v_D.abs().argmax()])).float()
