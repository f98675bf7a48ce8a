"""Scores → weights. Chosen apart from the method, so that every policy works with every router.

A policy takes fp32 scores whose last axis runs over adapters and returns weights of the same shape: zero where an adapter
is not chosen. A score of −∞ means "not available here" and always gets weight zero, also when nothing else is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recycler.routers.protocol import Group
from recycler.zoo.errors import UsageError


@dataclass(frozen=True)
class Policy:
    """How scores become weights: the fields that every method's Config shares.

    Attributes:
        top_k: how many adapters a token keeps; None keeps all.
        temperature: scores are divided by it.
        renormalise: the kept weights sum to 1; False leaves them as the softmax over all adapters gave them.
    """

    top_k: int | None = 2
    temperature: float = 1.0
    renormalise: bool = True

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(
                f"top_k={self.top_k}.", "At least one adapter must be kept.", "Use top_k=1 or more, or top_k=none for all."
            )
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"temperature={self.temperature}.", "It divides the scores.", "Use a positive, finite number.")

    def weights(self, scores_E: Tensor, group: Group | None = None) -> Tensor:
        """Scores [..., E] → weights of the same shape.

        Args:
            group: where the scores are for; None where they are for all sites.
        """
        return top_k(scores_E, self.top_k, self.temperature, self.renormalise)


def top_k(scores_E: Tensor, k: int | None = None, temperature: float = 1.0, renormalise: bool = True) -> Tensor:
    """Softmax over the k highest scores, zero elsewhere.

    Args:
        scores_E: [..., E]; computed in fp32 whatever comes in, because bf16 ties flip the chosen set.
        k: how many to keep; None or k ≥ E keeps all.
        temperature: scores are divided by it; must be positive.
        renormalise: True makes the kept weights sum to 1 (PHATGOOSE, Arrow). False leaves them as the softmax over *all*
            adapters gave them (X-LoRA), so that a token which nothing fits gets a small update.
    """
    scores_E = scores_E.float()
    if temperature != 1.0:
        scores_E = scores_E / temperature
    if k is None or k >= scores_E.shape[-1]:
        return _softmax(scores_E)
    top_K, index_K = scores_E.topk(k, dim=-1)
    if renormalise:
        w_K = _softmax(top_K)
    else:
        w_K = torch.exp(top_K - torch.logsumexp(scores_E, -1, keepdim=True)).nan_to_num(0.0)
    return torch.zeros_like(scores_E).scatter_(-1, index_K, w_K)


def _softmax(scores_K: Tensor) -> Tensor:
    """Softmax that gives −∞ weight zero even in a row of nothing but −∞, where softmax itself gives NaN."""
    return scores_K.softmax(-1).nan_to_num(0.0)
