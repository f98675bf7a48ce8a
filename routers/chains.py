"""Chains: several shots of different adapters in one context, each token labelled by its own segment. That is what a conversation
that changes subject looks like, and what gates should have seen before they meet one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recycler.routers.protocol import Few

# A row of a fit: chained (adapter number, shot) segments.
Chain = list[tuple[int, Any]]


def chains(singles: Sequence[Chain], wanted: int | None, length: int, seed: int) -> list[Chain]:
    """Contexts of `length` shots of different adapters, every shot used about equally often.

    Args:
        singles: chains of one shot each; their order matters, the numbers of their adapters do not.
        wanted: how many; half as many as there are singles when None.
        length: shots in one chain; with fewer adapters than that there are no chains.
    """
    rng = random.Random(f"ridge {seed}")
    wanted = len(singles) // 2 if wanted is None else wanted
    if len({chain[0][0] for chain in singles}) < length or length < 2:
        return []
    made: list[Chain] = []
    pool: list[tuple[int, Any]] = []
    while len(made) < wanted:
        chain: Chain = []
        while len(chain) < length:
            if not pool:
                pool = [single[0] for single in singles]
                rng.shuffle(pool)
            taken = {e for e, _ in chain}
            position = next((i for i, (e, _) in enumerate(pool) if e not in taken), None)
            if position is None:  # only adapters that are in the chain are left
                pool = []
                continue
            chain.append(pool.pop(position))
        made.append(chain)
    return made


def labels(rows: Sequence[Chain], segment_BT: Tensor) -> Tensor:
    """[B, T]: the adapter of each token's segment; padding gets that of the first."""
    adapters = [[e for e, _ in chain] for chain in rows]
    width = max(map(len, adapters))
    table = torch.tensor([[*row, *[row[0]] * (width - len(row))] for row in adapters], device=segment_BT.device)
    return table.gather(1, segment_BT.clamp(min=0))


def few(rows: Sequence[Chain]) -> Few:
    """Who is in a batch of rows, and how many of them share one."""
    own = [{e for e, _ in chain} for chain in rows]
    return Few(tuple(sorted(set().union(*own))), max(map(len, own)))
