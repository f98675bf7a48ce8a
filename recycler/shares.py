"""Who answers each of many prompts, and why: the adapters' shares, and the router's reason where it has one. In more detail, one
prompt at a time: `recycler.seeing.explaining`.

Dimensions in names: B batch, E adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recycler import text

if TYPE_CHECKING:
    from recycler.routed import RoutedModel
    from recycler.shots import Shot

_LEAST = 5e-4  # shares below it are rounded away


@torch.no_grad()
def routing(
    model: RoutedModel, shots: Sequence[Shot], *, batch_size: int = 32, tasks: Sequence[str | None] | None = None
) -> list[dict[str, Any]]:
    """The routing of each prompt, as JSON, by whatever answers it now (the router, or a mixture that overrides it).

    ``shares`` are mean weights over sites and the prompt's tokens, largest first; what is missing to 1 is the base's. ``why`` is the
    router's own reason, from routers that decide once a prompt.

    Args:
        tasks: each row's, for a router that wants to be told.
    """
    result: list[dict[str, Any]] = [{} for _ in shots]
    for numbers in text.by_length([len(text.prompt_ids(model.source, shot)) for shot in shots], rows=batch_size):
        inputs = text.prompts(model.source, [[shots[i]] for i in numbers])
        with nullcontext() if tasks is None else model.labelled([tasks[i] for i in numbers]), model.planned(inputs) as plan:
            shares_BE = _shares(model, inputs)
            why = None if plan is None or model.router is None else model.router.explain(plan)
        for row, i in enumerate(numbers):
            pairs = sorted(zip(model.names, shares_BE[row].tolist(), strict=True), key=lambda pair: (-abs(pair[1]), pair[0]))
            result[i] = {"shares": {name: round(share, 3) for name, share in pairs if abs(share) >= _LEAST}}
            if why is not None:
                result[i]["why"] = why[row]
    return result


def _shares(model: RoutedModel, inputs: dict[str, Tensor]) -> Tensor:
    """[B, E]"""
    if not model.engine.control.enabled:
        return torch.zeros(len(inputs["input_ids"]), len(model.names))
    if not model.source.encoder_decoder:
        inputs = text.causal_inputs(model.source, inputs["input_ids"], inputs["attention_mask"].bool())
    return model.weights_for(inputs).share().cpu()
