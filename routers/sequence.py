"""Routers that decide once a sequence, from its prompt: one mixture for all its tokens, at every site.

Dimensions in names: B batch, T token, E adapter.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from recycler.routers.base import Gate, Router
from recycler.routers.protocol import Group, Reader
from recycler.zoo.errors import UsageError


@dataclass
class Decision:
    """What was decided for the rows of a batch.

    Attributes:
        weights_BE: each row's mixture.
        why: a reason for each row, as JSON.
    """

    weights_BE: Tensor
    why: list[dict[str, Any]] = field(default_factory=list)


class SequenceRouter(Router):
    """A router whose `decide` reads the prompt and gives each row its mixture.

    The decision is made before the first forward of a sequence and holds for all of it, prompt included: with the right adapter
    for a row its answer is that adapter's own, to the last bit that a batch can give. In a forward that is given prompt and answer
    at once, all of it counts as the prompt; `RoutedModel.planned` says otherwise.
    """

    granularity: ClassVar[Literal["token", "sequence", "static"]] = "sequence"

    @abstractmethod
    def decide(self, reader: Reader, inputs: Mapping[str, Any]) -> Decision:
        """The mixture of each row of a batch of prompts."""

    def prepare(self, reader: Reader, inputs: Mapping[str, Any]) -> Decision:
        decision = self.decide(reader, inputs)
        return replace(decision, weights_BE=on_device(decision.weights_BE, inputs))

    def explain(self, plan: Decision) -> list[dict[str, Any]] | None:
        return plan.why or None

    def gate(self, group: Group) -> Gate:
        return _PerSequence()

    def score(self, group: Group, site: str, x_BTD: Tensor, plan: Any = None) -> Tensor:
        """The weights [B, 1, E] (or [N, 1, E] of a model that flattens its tokens): nothing is left for a policy to do."""
        return for_input(_need(plan).weights_BE, x_BTD)

    def weights(self, scores_E: Tensor, group: Group | None = None) -> Tensor:
        return scores_E


def on_device(rows_BE: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Moved to where the prompt is, once: every site would otherwise wait for its own copy."""
    ids_BT = inputs.get("input_ids")
    return rows_BE if ids_BT is None else rows_BE.to(ids_BT.device)


def for_input(rows_BE: Tensor, x_BTD: Tensor) -> Tensor:
    """One row of numbers per sequence → [B, 1, E] beside an input whose batch may have been widened (beams, several samples a
    prompt) or flattened to [N, D]."""
    rows_BE = rows_BE.to(x_BTD.device)
    times, rest = divmod(x_BTD.shape[0], rows_BE.shape[0])
    if rest:
        raise UsageError(
            f"{rows_BE.shape[0]} prompts were decided on, and {x_BTD.shape[0]} rows are run.",
            "Whose mixture a row has is not known.",
            "Run all rows of the prompts that were prepared, or prepare those that are run.",
        )
    return (rows_BE if times == 1 else rows_BE.repeat_interleave(times, 0))[:, None]


def _need(plan: Any) -> Decision:
    if not isinstance(plan, Decision):
        raise UsageError(
            "This router decides by the prompt, and was given none.", "", "Call the model, not its parts; or use `planned`."
        )
    return plan


class _PerSequence(Gate):
    def forward(self, x_BTD: Tensor, plan: Any = None) -> Tensor:
        return for_input(_need(plan).weights_BE, x_BTD)[..., None, :]


def one_hot(numbers_B: Tensor, count: int) -> Tensor:
    """[B, E] with a 1 at each row's adapter; a row of zeros, the base, where the number is −1."""
    weights_BE = torch.zeros(len(numbers_B), count)
    chosen = numbers_B >= 0
    weights_BE[chosen] = torch.nn.functional.one_hot(numbers_B[chosen], count).float()
    return weights_BE
