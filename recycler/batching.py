"""Continuous batching: the new tokens of many prompts are one row, and nothing there says whose a token is.

Routers that decide token by token, and one mixture for everything, do not mind. Where a mixture holds for a sequence, it is laid
beside the packed tokens (`recycler.serving.packed`).

Dimensions in names: B prompt, E adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import ContinuousBatchingConfig

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
    with model.mixture(rows_BE[0]):
        pack(model)
    with _beside(model, rows_BE):
        return model.base.generate_batch(inputs, *args, **options)


@contextmanager
def _beside(model: RoutedModel, rows_BE: Tensor) -> Iterator[None]:
    """Lays each prompt's mixture beside its tokens in the batches of whatever manager the base makes meanwhile."""
    from recycler.serving.packed import Mixtures, unshared

    base, control = model.base, model.engine.control
    mixtures = Mixtures(model, {f"req_{number}": row_E.cpu() for number, row_E in enumerate(rows_BE)})
    make = base.init_continuous_batching

    def made(generation_config: Any = None, continuous_batching_config: Any = None, workload_hints: Any = None) -> Any:
        given = continuous_batching_config or getattr(generation_config, "continuous_batching_config", None)
        manager = make(generation_config, unshared(given or ContinuousBatchingConfig()), workload_hints)
        mixtures.attach(manager)
        return manager

    with control.set(forced=control.forced, few=control.few, record=None):
        base.init_continuous_batching = made
        try:
            yield
        finally:
            del base.init_continuous_batching
            mixtures.release()


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
            fix = "Use generate_batch: it gives each prompt its own mixture."
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
        return forced[:, : len(model.names)] if isinstance(forced, Tensor) and forced.dim() == 2 else None
    if not isinstance(model.router, SequenceRouter):
        return None
    padded = model.tokenizer.pad({"input_ids": [list(ids) for ids in prompts]}, padding_side="left", return_tensors="pt")
    with model.planned(padded.to(model.source.device)) as plan:
        weights_BE: Tensor = plan.weights_BE
        return weights_BE
