"""Sampling that does not depend on the batch: each row draws from a seed of its own.

The highest of log-probabilities divided by T, each with Gumbel noise added, is a draw from the softmax at temperature T. So greedy
search over noisy scores samples, and rows that are sampled share batches with rows that are not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor


class Draws(LogitsProcessor):
    """Noise for the rows of one `generate` with ``do_sample=False``.

    Args:
        seeds: one a row; None leaves that row greedy.
    """

    def __init__(self, seeds: Sequence[int | None], temperature: float) -> None:
        self.generators = [None if seed is None else torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        noisy_BV = scores_BV.float().clone()
        for row, generator in enumerate(self.generators):
            if generator is not None:
                noise_V = -(-torch.rand(noisy_BV.shape[-1], generator=generator).log()).log()
                noisy_BV[row] = noisy_BV[row] / self.temperature + noise_V.to(noisy_BV.device)
        return noisy_BV
