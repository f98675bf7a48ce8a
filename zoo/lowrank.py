"""Linear algebra on low-rank updates: norms, the SVD of ΔW = B·A from its factors, truncation, factors of a dense ΔW.

Factors are never multiplied out: with QR of Aᵀ and of B everything happens in an R × R core, in fp64, which costs little there. A dense ΔW is factorised in fp32, or in fp64 where it turns out to have a low rank.

All factors made here are B = U·Σ and A = Vᵀ, not √Σ on both sides: A then has orthonormal rows and B alone carries the scale, which
is where this project folds scalings anyway; the rows of A are in the order of their importance, so that a shorter adapter is a
prefix of a longer one. Balanced factors matter to further training only. By Eckart and Young no other factors of that rank are
closer to ΔW in the Frobenius norm.

Dimensions in names: R rank, D input width, O output width, K singular values.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from recycler.zoo.adapter import Factors
from recycler.zoo.errors import InputError, UsageError

ROUNDING = 1e-6
"""What is smaller than this, relative to ‖ΔW‖_F, counts as rounding and not as part of an update."""
_SMALL = 256  # matrices up to this are decomposed in fp64 without a sketch
_SKETCH = 320  # the largest rank that is looked for by a sketch; VeRA's usual rank is 256


class Thin(NamedTuple):
    """U [O, K], σ [K] descending, Vᵀ [K, D]; fp64."""

    u_OK: Tensor
    s_K: Tensor
    vt_KD: Tensor


class Factored(NamedTuple):
    """Factors of a dense ΔW, fp32, and their error ‖ΔW − BA‖_F / ‖ΔW‖_F, measured."""

    a_RD: Tensor
    b_OR: Tensor
    error: float


def check_dials(rank: int | None, energy: float | None) -> None:
    """Raises UsageError unless a rank is at least 1 and an energy above 0 and at most 1."""
    if rank is not None and rank < 1:
        raise UsageError(f"A rank of {rank} holds nothing.", "", "Give a whole number above 0.", code="E_OPTION")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(
            f"An energy of {energy:g} cannot be kept.",
            "It is the share of Σσ² that the kept singular values have.",
            "Give a number above 0 and at most 1, such as 0.99.",
            code="E_OPTION",
        )


def thin_svd(a_RD: Tensor, b_OR: Tensor) -> Thin:
    """The SVD of B·A without forming it: QR of Aᵀ and of B, SVD of the core; O((D + O)·R²), fp64."""
    q_DK, r_KR = torch.linalg.qr(a_RD.double().T)
    p_OK, t_KR = torch.linalg.qr(b_OR.double())
    u_KK, s_K, vt_KK = torch.linalg.svd(t_KR @ r_KR.T, full_matrices=False)
    return Thin(p_OK @ u_KK, s_K, vt_KK @ q_DK.T)


def norm(a_RD: Tensor, b_OR: Tensor) -> float:
    """‖B·A‖_F, from the cores of two QRs, in fp64: unlike the trace of Gram matrices it does not square the condition."""
    r_KR = torch.linalg.qr(a_RD.double().T, mode="r").R
    t_KR = torch.linalg.qr(b_OR.double(), mode="r").R
    return float(torch.linalg.matrix_norm(t_KR @ r_KR.T))


def distance(one: Factors, other: Factors) -> float:
    """‖B₁A₁ − B₂A₂‖_F: the norm of the stacked factors. Magnitudes and biases are not looked at."""
    return norm(torch.cat([one.a_RD, other.a_RD]), torch.cat([one.b_OR, -other.b_OR], 1))


def least_rank(s_K: Tensor, energy: float, total: float | None = None) -> int:
    """The least number of singular values with Σσ² ≥ `energy` of the total; at least 1.

    Args:
        s_K: descending. total: ‖ΔW‖², where `s_K` is only the beginning; their own sum where None.
    """
    squares_K = s_K.double().square()
    lost_K = (float(squares_K.sum()) if total is None else total) - squares_K.cumsum(0)
    allowed = (1 - energy) * (float(squares_K.sum()) if total is None else total)
    enough = (lost_K <= allowed).nonzero()
    return int(enough[0]) + 1 if len(enough) else len(s_K)


def truncate(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The best update of at most `rank`; where it has no more, the factors as they are.

    DoRA's magnitude and a bias are kept. A DoRA update is not B·A alone; the error says nothing about what the magnitude makes
    of it.

    Returns:
        The factors, and ‖ΔW − ΔW'‖_F / ‖ΔW‖_F of their products, measured on what is returned.

    Raises:
        UsageError: `rank` is below 1.
    """
    check_dials(rank, None)
    if factors.rank <= rank:
        return factors, 0.0
    thin = thin_svd(factors.a_RD, factors.b_OR)
    b_OR = (thin.u_OK[:, :rank] * thin.s_K[:rank]).float().contiguous()
    shorter = replace(factors, a_RD=thin.vt_KD[:rank].float().contiguous(), b_OR=b_OR)
    whole = float(thin.s_K.norm())
    return shorter, distance(factors, shorter) / whole if whole else 0.0


def factorise(delta_OD: Tensor, rank: int | None = None, energy: float | None = None, *, whole: int = 0) -> Factored | None:
    """Factors of a dense ΔW, by SVD; the same input gives the same bits on one machine.

    Args:
        delta_OD: the update.
        rank: keep at most so many singular values.
        energy: keep the least number of them with Σσ² ≥ `energy`·‖ΔW‖². Of two dials the smaller result counts; without any,
            all that is more than rounding is kept.
        whole: an update of at most this rank is kept whole, whatever the dials say.

    Returns:
        None where the update is zero: the site is absent.

    Raises:
        InputError: it holds NaN or infinite values, or the SVD does not converge. UsageError: a dial is out of range.
    """
    check_dials(rank, energy)
    norm_ = float(torch.linalg.matrix_norm(delta_OD.double()))
    if not math.isfinite(norm_):
        raise InputError(
            "An update holds NaN or infinite values, or its norm overflows.",
            "One such number spreads to every answer.",
            "Take an earlier checkpoint; training diverged or the file is damaged.",
            code="E_NONFINITE",
        )
    if norm_ == 0:
        return None
    thin = _dense_svd(delta_OD, norm_)
    full = least_rank(thin.s_K, 1 - ROUNDING**2, norm_**2)
    keep = full if energy is None or full <= whole else min(full, least_rank(thin.s_K, energy, norm_**2))
    keep = keep if rank is None or full <= whole else min(keep, rank)
    a_RD = thin.vt_KD[:keep].float().contiguous()
    b_OR = (thin.u_OK[:, :keep] * thin.s_K[:keep]).float().contiguous()
    left = torch.linalg.matrix_norm((delta_OD.float() - b_OR @ a_RD).double())
    return Factored(a_RD, b_OR, float(left) / norm_)


def _dense_svd(delta_OD: Tensor, norm_: float) -> Thin:
    """All singular values of a dense matrix, or all that are more than rounding where a sketch shows that there are few.

    Many methods are of low rank by construction, and a full SVD of a large matrix costs a hundred times what the sketch does.
    """
    shorter = min(delta_OD.shape)
    try:
        if shorter <= _SMALL:
            return Thin(*torch.linalg.svd(delta_OD.double(), full_matrices=False))
        found = _sketched(delta_OD.double(), min(_SKETCH, shorter // 2), norm_)
        return found or Thin(*torch.linalg.svd(delta_OD.float(), full_matrices=False))
    except torch.linalg.LinAlgError as error:
        raise InputError(
            f"The SVD of an update does not converge ({error}).",
            "Its values are of wildly different sizes.",
            "Check the adapter: it may be damaged.",
            code="E_CONVERSION",
        ) from error


def _sketched(delta_OD: Tensor, width: int, norm_: float) -> Thin | None:
    """The SVD within the range of ΔW·Ω, Ω random but the same every time; None unless that range holds all of ΔW."""
    random = torch.Generator().manual_seed(0)
    omega_DK = torch.randn(delta_OD.shape[1], width, generator=random, dtype=torch.float64)
    q_OK = torch.linalg.qr(delta_OD @ omega_DK).Q
    inner_KD = q_OK.T @ delta_OD
    left = norm_**2 - float(torch.linalg.matrix_norm(inner_KD)) ** 2  # fp64: right to 1e-16 of norm², that is 1e-8 of the norm
    if left > (ROUNDING * norm_) ** 2:
        return None
    u_KK, s_K, vt_KD = torch.linalg.svd(inner_KD, full_matrices=False)
    return Thin(q_OK @ u_KK, s_K, vt_KD)
