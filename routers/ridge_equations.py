"""Ridge regression from sums: what is solved from G = Σ ω x̂ᵀx̂ and C = Σ ω x̂ᵀy, and what it misses on rows that were left out.

Dimensions in names: D input width with its constant, E adapter, F part of the rows, L candidate λ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Sums = tuple[Tensor, Tensor]  # G [D, D], C [D, E]
RIDGES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)


def total(parts: Sequence[Mapping[str, Sums]]) -> dict[str, Sums]:
    """Sums over all parts at each site."""
    return {site: added([part[site] for part in parts]) for site in parts[0]}


def added(sums_F: Sequence[Sums]) -> Sums:
    g_F, c_F = zip(*sums_F, strict=True)
    return torch.stack(g_F).sum(0), torch.stack(c_F).sum(0)


def solve(sums: Sums, ridge: float) -> Tensor:
    """W [D, E] = (G + λI)⁻¹ C, in fp64 on the way."""
    g_DD = sums[0].double().clone()
    g_DD.diagonal().add_(ridge)
    return torch.cholesky_solve(sums[1].double(), torch.linalg.cholesky(g_DD)).float()


def solve_without(sums_F: Sequence[Sums], ridge: float, known: Sums | None = None) -> list[Tensor]:
    """W for each part, solved without that part.

    Args:
        known: sums of other rows, which are in all of them.
    """
    g_DD, c_DE = added([*sums_F, known] if known else sums_F)
    return [solve((g_DD - g, c_DE - c), ridge) for g, c in sums_F]


def left_out(sums_F: Sequence[Sums], ridge: float | None = None) -> tuple[float, list[Tensor]]:
    """The λ with the least squared error on parts that were left out, and W for each part, solved with it without that part.

    The error of W on rows with the sums G and C is tr YᵀY − 2 tr WᵀC + tr WᵀGW; and of the other rows' G' and C' one
    eigendecomposition G' = QΛQᵀ gives every candidate: W = Q (Λ + λI)⁻¹ QᵀC'.

    Args:
        ridge: λ by hand.
    """
    grid = RIDGES if ridge is None else (ridge,)
    g_FDD, c_FDE = (torch.stack(part).double() for part in zip(*sums_F, strict=True))
    error_L = torch.zeros(len(grid), dtype=torch.float64)
    solved = []
    for g_DD, c_DE in zip(g_FDD, c_FDE, strict=True):
        value_D, q_DD = torch.linalg.eigh(g_FDD.sum(0) - g_DD)
        turned_DE = q_DD.T @ (c_FDE.sum(0) - c_DE)
        w_LDE = q_DD @ torch.stack([turned_DE / (value_D.clamp(min=0) + number)[:, None] for number in grid])
        error_L += ((g_DD @ w_LDE - 2 * c_DE) * w_LDE).sum((1, 2))
        solved.append(w_LDE)
    best = int(error_L.argmin())
    return grid[best], [w_LDE[best].float() for w_LDE in solved]
