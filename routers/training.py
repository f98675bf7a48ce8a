"""Training what a router learns by gradients: language-model loss on the answers of shots, the base and the adapters frozen."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import nn

from recycler.routers.chains import Chain
from recycler.routers.protocol import Batch, Model, Weights


class Dials(Protocol):
    """The fields of a Config that say how long and how fast to train."""

    @property
    def steps(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def tokens(self) -> int: ...


def descend(
    model: Model,
    parameters: Iterable[nn.Parameter],
    rows: Sequence[Chain],
    mixture: Callable[[Batch, Sequence[int]], Weights],
    dials: Dials,
    seed: str,
) -> list[float]:
    """Mean loss of each step. Every pass over the rows visits each once, in a seeded order.

    Where several processes share a base (`Model.part`), each takes its rows of every batch, and gradients are added up: steps are those
    that one process takes.

    Args:
        mixture: the weights for a batch, given the numbers of its rows; gradients flow through it to `parameters`.
    """
    which, of = model.part
    rng = random.Random(seed)
    trained = list(parameters)
    optimiser = torch.optim.AdamW(trained, lr=dials.lr, weight_decay=0.0, eps=1e-8)
    step = model.progress(dials.steps, "gates")
    losses: list[float] = []
    pool: list[int] = []
    for _ in range(dials.steps):
        while len(pool) < min(dials.rows, len(rows)):
            pool += rng.sample(range(len(rows)), len(rows))
        chosen, pool = pool[: dials.rows], pool[dials.rows :]
        shots = [[shot for _, shot in rows[i]] for i in chosen]
        optimiser.zero_grad(set_to_none=True)
        total = 0.0
        for part in model.batches(shots, dials.tokens):
            # All processes run every batch, or those that do would wait for the others' parts of the base.
            own = part[which::of] or part[:1]
            batch = model.encode([shots[i] for i in own])
            loss_BT = model.nll(batch, mixture(batch, [chosen[i] for i in own]))
            # The mean per row: no adapter's long completions may outvote another's short ones.
            loss = (loss_BT.sum(1) / (batch.labels_BT != -100).sum(1)).sum() / len(chosen) * (which < len(part))
            loss.backward()
            total += float(loss.detach())
        if of > 1:
            total = _add_up(trained, total)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        losses.append(total)
        step(1, f"loss {total:.3f}")
    return losses


def _add_up(parameters: Sequence[nn.Parameter], loss: float) -> float:
    """The loss of all processes; gradients become theirs too. Each has divided by the rows of all, so that the sum is the mean."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(grad.flatten() for grad in grads), grads[0].new_tensor([loss])])
    torch.distributed.all_reduce(flat)
    for p, grad in zip(parameters, flat[:-1].split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p)
    return float(flat[-1])


def ends(losses: Sequence[float]) -> dict[str, float]:
    """The first and the last loss, for a report."""
    return {"first": round(losses[0], 4), "last": round(losses[-1], 4)} if losses else {}
