"""Policies: scores → weights, one plain function each. `recycler.routers.select` chooses among them.

All take fp32 scores whose last axis runs over adapters (bf16 is widened: its ties flip the chosen set) and return weights of the
same shape: zero where an adapter is not chosen. A score of −∞ means "not available here" and always gets weight zero, also when
nothing else is left. Where Σ w < 1 the rest is the base's: the update is that much smaller. Of equal scores the one with the
lowest index goes first. Nothing here waits for the device.

Dimensions in names: E adapter, K kept adapter, N token, R component.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NOTHING = float("-inf")
_TIE = 2.0**-36  # what a position costs; see `best`
_POSITIONS: dict[tuple[int, torch.device], Tensor] = {}


def top_k(scores_E: Tensor, k: int | None = None, temperature: float = 1.0, renormalise: bool = True) -> Tensor:
    """Softmax over the k highest scores, zero elsewhere: w_e = exp(s_e/T) / Σ_{kept} exp(s/T).

    Top-k before the softmax, or a softmax over all, top-k and renormalising, are the same.

    Args:
        scores_E: [..., E].
        k: how many to keep; None or k ≥ E keeps all.
        temperature: T, must be positive.
        renormalise: True makes the kept weights sum to 1 (PHATGOOSE, Arrow). False leaves them as the softmax over *all*
            adapters gave them (X-LoRA), so that a token which nothing fits gets a small update.
    """
    scores_E = scores_E.float()
    if temperature != 1.0:
        scores_E = scores_E / temperature
    if k is None or k >= scores_E.shape[-1]:
        return _softmax(scores_E)
    top_K, index_K = best(scores_E, k)
    if renormalise:
        w_K = _softmax(top_K)
    else:
        w_K = torch.exp(top_K.float() - torch.logsumexp(scores_E, -1, keepdim=True)).nan_to_num(0.0)
    return torch.zeros_like(scores_E).scatter_(-1, index_K, w_K)


def top_p(
    scores_E: Tensor, p: float = 0.75, temperature: float = 1.0, renormalise: bool = True, least: int | None = 1
) -> Tensor:
    """The fewest adapters whose softmax holds `p`, the one that crosses it included.

    Huang et al. 2024, Harder Tasks Need More Experts in Dynamic Routing (arXiv:2403.07652; Dynamic_MoE), where p = 0.4 and the kept
    weights stay as they are (``renormalise=False``); MoE-PEFT's MixLoRA-Dynamic has p = 0.8. Released code divides probabilities by
    its temperature, which only moves p; here scores are divided. DynMoLE's loses the adapter that crosses.

    Args:
        p: 1 keeps all; towards 0 only the best is kept.
        least: how many are kept in any case; None keeps all.
        renormalise: False leaves the weights as the softmax gave them: between p and 1 in the sum.
    """
    scores_E = scores_E.float()
    if temperature != 1.0:
        scores_E = scores_E / temperature
    count = scores_E.shape[-1]
    if p >= 1 or least is None or least >= count:
        return _softmax(scores_E)
    top_E, index_E = best(scores_E, count)
    p_E = _softmax(top_E)
    kept_E = p_E.cumsum(-1) - p_E < p  # what stands before it does not hold p yet
    if least > 1:
        kept_E = kept_E | (_positions(count, p_E.device) > -_TIE * (least - 0.5))
    w_E = p_E * kept_E
    if renormalise:
        w_E = w_E / w_E.sum(-1, keepdim=True).clamp(min=torch.finfo(w_E.dtype).tiny)
    return torch.zeros_like(scores_E).scatter_(-1, index_E, w_E)


def null(
    scores_E: Tensor, threshold: float, k: int | None = None, temperature: float = 1.0, renormalise: bool = True
) -> Tensor:
    """Top-k among the adapters and k null experts, whose output is zero and whose score is `threshold`: a token that no adapter
    fits is the base's.

    A null expert stands before every adapter below the threshold, so that this keeps those of the k highest scores that reach it,
    weighed among themselves; nobody where none does.

    Zeng et al. 2024, AdaMoE (arXiv:2406.13233), where the nulls' scores are learned with the model, their number is free and k is
    twice as large for it. Nothing is trained here, so that one number is all there is to know of them: it is given, or found on
    shots (`recycler.routers.calibration`).

    Args:
        threshold: −∞ is plain top-k, +∞ the base.
        renormalise: False gives the base the null expert's share (of one: copies are no evidence), and that of adapters not kept.
    """
    scores_E = scores_E.float()
    fit_E = scores_E.masked_fill(scores_E < threshold, _NOTHING)
    w_E = top_k(fit_E, k, temperature)
    if renormalise:
        return w_E
    scores_E = scores_E / temperature
    all_1 = torch.logsumexp(scores_E, -1, keepdim=True)
    all_1 = torch.logaddexp(all_1, torch.full_like(all_1, threshold / temperature))
    return torch.where(w_E > 0, torch.exp(scores_E - all_1), 0.0)


def tsallis(
    scores_E: Tensor,
    p: float = 0.75,
    q: float = 1.1,
    entropy: float = 0.9,
    least: int | None = 2,
    temperature: float = 1.0,
    renormalise: bool = True,
) -> Tensor:
    """All adapters where the gate is undecided, top-p where it is not.

    Undecided is a token whose softmax has a normalised Tsallis entropy above `entropy` (`tsallis_entropy`).

    Li et al. 2025, DynMoLE (arXiv:2504.00661); p, q, `entropy` and `least` as there. Departures: the adapter that crosses p is kept
    (released code leaves it out); entropy is normalised by the number of adapters that are available, not of all; kept weights are
    renormalised unless asked not to, as there.
    """
    scores_E = scores_E.float()
    p_E = top_k(scores_E, None, temperature)
    available_1 = (scores_E > _NOTHING).sum(-1, keepdim=True)
    undecided_1 = tsallis_entropy(p_E, available_1, q) > entropy
    return torch.where(undecided_1, p_E, top_p(scores_E, p, temperature, renormalise, least))


def tsallis_entropy(p_E: Tensor, count_1: Tensor, q: float) -> Tensor:
    """S_q = (1 − Σ p^q) / (q − 1) over its maximum among `count_1` adapters, (1 − N^(1−q)) / (q − 1): [..., 1], from 0 to 1.

    q → 1 is Shannon's. Written with expm1, which is exact near it. One adapter or none has no entropy: 0.
    """
    n_1 = count_1.clamp(min=1).to(p_E.dtype)
    log_E, most_1 = p_E.clamp(min=torch.finfo(p_E.dtype).tiny).log(), n_1.log()
    if abs(q - 1) < 1e-5:
        s_1 = -(p_E * log_E).sum(-1, keepdim=True)
    else:
        s_1 = -(p_E * torch.expm1((q - 1) * log_E)).sum(-1, keepdim=True) / (q - 1)
        most_1 = -torch.expm1((1 - q) * most_1) / (q - 1)
    return torch.where(n_1 > 1, s_1 / most_1.clamp(min=torch.finfo(p_E.dtype).tiny), 0.0)


def standardised(scores_E: Tensor, scale: float = 1.0) -> Tensor:
    """λ (s − μ) / σ over the adapters that are available: scores of mean 0 and standard deviation λ for every token and site.

    Wei et al. 2024, Skywork-MoE (arXiv:2406.06563), there with λ = 1. It makes scores comparable over sites and methods, and takes
    away how sure a gate is: two adapters always score ±λ. Where all score the same (σ = 0, rounding included) all get 0.
    """
    scores_E = scores_E.float()
    here_E = scores_E > _NOTHING
    plain_E = torch.where(here_E, scores_E, 0.0)
    count_1 = here_E.sum(-1, keepdim=True).clamp(min=1)
    off_E = torch.where(here_E, plain_E - plain_E.sum(-1, keepdim=True) / count_1, 0.0)
    sigma_1 = (off_E.square().sum(-1, keepdim=True) / count_1).clamp(min=1e-30).sqrt()
    differ_1 = sigma_1 > 1e-6 * plain_E.abs().amax(-1, keepdim=True)
    return torch.where(here_E, torch.where(differ_1, off_E * (scale / sigma_1), 0.0), _NOTHING)


def shared(weights_E: Tensor, scores_E: Tensor) -> Tensor:
    """The adapters' average always on, and what each has beside it routed: w_e + (1 − Σ w) / E.

    With A the average (1/E) Σ ΔW_e, the mixture A + Σ w_e (ΔW_e − A) is Σ w_e ΔW_e + (1 − Σ w) A, which is a mixture of the
    adapters themselves: nothing has to be factorised. What a policy leaves to the base (Σ w < 1) is the average's instead. An
    adapter that is −∞ adds nothing to the average, and counts in its E.

    After DeepSeekMoE (Dai et al. 2024, arXiv:2401.06066), whose shared experts are trained apart.
    """
    rest_1 = (1 - weights_E.sum(-1, keepdim=True)).clamp(min=0) / weights_E.shape[-1]
    return torch.where(scores_E > _NOTHING, weights_E + rest_1, 0.0)


def strongest(h_NR: Tensor, count: int) -> Tensor:
    """Rank-wise experts: each token's `count` largest components, zero elsewhere.

    Args:
        h_NR: w_e σ v·x for every rank-one component of every adapter at a site, whose u is a unit vector: the size of what the
            component adds to the output. Those that tie with the last one are kept.

    Zhao et al. 2025, SMoRA (arXiv:2501.15103), trains a router over the rows of one LoRA and activates 8 of 64. Rows of a finished
    LoRA mean nothing (ΔW = BA = (BG)(G⁻¹A) for any G), those of its SVD do, and their size needs no router.
    """
    if count >= h_NR.shape[-1]:
        return h_NR
    size_NR = h_NR.abs()
    return h_NR * (size_NR >= size_NR.topk(count, dim=-1).values[..., -1:])


def best(scores_E: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(the k highest scores [..., K], descending, in fp64; their indices), the lower index first where scores are equal.

    topk promises no order among equals, and a stable sort of many adapters takes ten times as long. So a position costs 2⁻³⁶, in
    fp64, which orders equals of up to 65,536 in size and nothing that fp32 weights could tell apart.
    """
    if scores_E.device.type == "mps":  # has no fp64
        top_E, index_E = scores_E.sort(dim=-1, descending=True, stable=True)
        return top_E[..., :k], index_E[..., :k]
    top_K, index_K = (scores_E + _positions(scores_E.shape[-1], scores_E.device)).topk(k, dim=-1)
    return top_K, index_K


def _positions(count: int, device: torch.device) -> Tensor:
    """What positions cost [E], fp64; made once, because at one token a step an operation is felt."""
    if torch.compiler.is_compiling():
        return torch.arange(count, dtype=torch.float64, device=device) * -_TIE
    found = _POSITIONS.get((count, device))
    if found is None:
        with torch.inference_mode(False):
            found = _POSITIONS[count, device] = torch.arange(count, dtype=torch.float64, device=device) * -_TIE
    return found


def _softmax(scores_K: Tensor) -> Tensor:
    """Softmax that gives −∞ weight zero even in a row of nothing but −∞, where softmax itself gives NaN."""
    return scores_K.softmax(-1, dtype=torch.float32).nan_to_num(0.0)
