"""Continuous batching: the new tokens of many prompts are one row, and nothing there says whose a token is.

Routers that decide token by token, and one mixture for everything, do not mind. Where a mixture holds for a sequence, prompts with the
same one run together, one mixture after the other.

Dimensions in names: B prompt, E adapter, M distinct mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from recycler.routers.base import Router
from recycler.routers.sequence import SequenceRouter
from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from recycler.routed import RoutedModel


def generate(model: RoutedModel, inputs: Sequence[Sequence[int]], *args: Any, **options: Any) -> dict[str, Any]:
    """`RoutedModel.generate_batch`."""
    rows_BE = _mixtures(model, inputs)
    if rows_BE is None:
        pack(model)
        return model.base.generate_batch(inputs, *args, **options)
    if len(rows_BE) != len(inputs):
        raise UsageError(f"There are {len(rows_BE)} mixtures for {len(inputs)} prompts.", "", "Give each prompt its own.")
    results: list[tuple[int, Any]] = []
    mixtures_ME, number_B = rows_BE.unique(dim=0, return_inverse=True)
    for m, weights_E in enumerate(mixtures_ME):
        rows = (number_B == m).nonzero()[:, 0].tolist()
        with model.mixture(weights_E):
            pack(model)
            made = model.base.generate_batch([inputs[i] for i in rows], *args, **options)
        for name, output in made.items():  # req_N, or req_N__child#C of several answers to one prompt
            number, mark, child = name.removeprefix("req_").partition("__")
            row = rows[int(number)]
            output.request_id = f"req_{row}{mark}{child}"
            results.append((row, output))
    return {output.request_id: output for _, output in sorted(results, key=lambda result: result[0])}


def pack(model: RoutedModel) -> None:
    """Readies the base for rows that are packed.

    Raises:
        UsageError: what is decided for a row, or beside it, would be lost.
    """
    # A manager that was kept shares keys and values with prompts that begin alike, whatever the mixture they were run with.
    model.base.destroy_cached_continuous_batching_manager()
    control, router, what, fix = model.engine.control, model.router, "", "Use generate."
    forced = control.forced
    if model.source.encoder_decoder:
        what = "an encoder–decoder"
    elif control.enabled and forced is not None:
        what = "a mixture for each row or token" if isinstance(forced, Tensor) and forced.dim() > 1 else ""
    elif control.enabled and router is not None and (router.base_pass or type(router).prepare is not Router.prepare):
        what = router.method()
        if isinstance(router, SequenceRouter):
            fix = "Use generate_batch: prompts with the same mixture run together."
    if what:
        raise UsageError(
            f"Continuous batching cannot run {what}.",
            "It packs all prompts' tokens into one row and one cache: nothing there is a prompt's own, or runs beside it.",
            fix,
        )


def _mixtures(model: RoutedModel, prompts: Sequence[Sequence[int]]) -> Tensor | None:
    """Each prompt's mixture [B, E], where that is how they are given or decided."""
    control, forced = model.engine.control, model.engine.control.forced
    if not control.enabled or not prompts:
        return None
    if forced is not None:
        return forced if isinstance(forced, Tensor) and forced.dim() == 2 else None
    if not isinstance(model.router, SequenceRouter):
        return None
    padded = model.tokenizer.pad({"input_ids": [list(ids) for ids in prompts]}, padding_side="left", return_tensors="pt")
    with model.planned(padded.to(model.source.device)) as plan:
        weights_BE: Tensor = plan.weights_BE
        return weights_BE
