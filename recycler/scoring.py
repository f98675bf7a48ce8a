"""What profiles, routers and evaluations all do with a RoutedModel: score completions and answer prompts, in mixed batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recycler import sharding, text
from recycler.engine.sites import weight_OD
from recycler.reading import Reading
from recycler.routed import RoutedModel
from recycler.routers.protocol import Batch, Group, Weights
from recycler.sampling import Draws
from recycler.shots import Shot
from recycler.workers import Item, Local, Result, Workers

if TYPE_CHECKING:
    from recycler.zoo.adapter import Factors

Progress = Callable[[int, str], Callable[..., None]]


def silent(steps: int, what: str) -> Callable[..., None]:
    """The progress of a library call: none."""
    return lambda count=1, note="": None


def nll(model: RoutedModel, batch: Batch, weights: Weights | None) -> Tensor:
    """Negative log-likelihood per label [B, T], fp32, 0 where nothing is scored.

    Only the logits of scored positions are computed: the vocabulary is the widest matrix of a small model, and prompts are most
    of the tokens.

    Args:
        weights: a mixture as `RoutedModel.mixture` takes it; None leaves it to the router.
    """
    scored_BT = batch.labels_BT != text.IGNORE

    def scored_only(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][scored_BT], *args[1:])

    handle = model.base.get_output_embeddings().register_forward_pre_hook(scored_only)
    try:
        with model.planned(_prompt_of(batch)) if weights is None else model.mixture(weights):
            logits_NV = model(**batch.inputs, use_cache=False).logits
    finally:
        handle.remove()
    loss_N = torch.nn.functional.cross_entropy(logits_NV.float(), batch.labels_BT[scored_BT], reduction="none")
    return loss_N.new_zeros(scored_BT.shape).masked_scatter(scored_BT, loss_N)


def _prompt_of(batch: Batch) -> dict[str, Tensor]:
    """A batch's prompts, as `generate` would be given them: nothing of the answers is seen. The last token of a causal prompt is
    the one that predicts the first scored token."""
    prompt = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
    if "target" not in batch.mask_BT:
        answered_BT = (batch.labels_BT != text.IGNORE).cumsum(1) > 0
        before_BT = torch.nn.functional.pad(~answered_BT, (1, 0), value=True)[:, :-1]
        prompt["attention_mask"] = prompt["attention_mask"] * before_BT
    return prompt


@torch.no_grad()
def mean_nll(
    model: RoutedModel,
    rows: Sequence[Shot],
    weights_NE: Tensor | None = None,
    *,
    tokens: int = 2048,
    step: Callable[..., None] | None = None,
) -> list[float]:
    """Mean NLL per completion token of each row, in the order of `rows`.

    Args:
        weights_NE: one mixture per row; None leaves them to the router. Rows of different adapters share forwards.
        tokens: padded tokens in one forward.
        step: called with the number of rows after each forward.
    """
    result = [0.0] * len(rows)
    for numbers in text.by_length([shot_length(model, row) for row in rows], tokens):
        batch = text.encode(model.source, [[rows[i]] for i in numbers])
        loss_BT = nll(model, batch, None if weights_NE is None else weights_NE[numbers])
        mean_B = loss_BT.sum(1) / (batch.labels_BT != text.IGNORE).sum(1)
        for i, value in zip(numbers, mean_B.tolist(), strict=True):
            result[i] = value
        if step is not None:
            step(len(numbers))
    return result


@torch.no_grad()
def answer(
    model: RoutedModel,
    rows: Sequence[Shot],
    weights_NE: Tensor | None = None,
    *,
    max_new_tokens: int | Sequence[int] = 64,
    batch_size: int = 32,
    tasks: Sequence[str | None] | None = None,
    seeds: Sequence[int | None] | None = None,
    temperature: float = 1.0,
    step: Callable[..., None] | None = None,
) -> list[str]:
    """Answers, in the order of `rows`; greedy ones, unless seeds are given. Batches hold prompts of like length.

    Args:
        weights_NE: one mixture per row; None leaves them to the router.
        max_new_tokens: a limit for all, or one for each row.
        tasks: each row's, for a router that wants to be told.
        seeds: of each row; it is sampled at `temperature`, whatever else is in its batch. None leaves it greedy.
        step: called with the number of rows after each batch.
    """
    limits = [max_new_tokens] * len(rows) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    result = [""] * len(rows)
    for numbers in text.by_length([shot_length(model, row) for row in rows], rows=batch_size):
        inputs = text.prompts(model.source, [[rows[i]] for i in numbers])
        options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": max(limits[i] for i in numbers)}
        options |= {"eos_token_id": model.source.ends, "pad_token_id": model.tokenizer.pad_token_id}
        if seeds is not None:
            options["logits_processor"] = [Draws([seeds[i] for i in numbers], temperature)]
        told = nullcontext() if tasks is None else model.labelled([tasks[i] for i in numbers])
        with told, nullcontext() if weights_NE is None else model.mixture(weights_NE[numbers]):
            ids_BT = model.generate(**inputs, **options)
        start = 0 if model.source.encoder_decoder else inputs["input_ids"].shape[1]
        for i, ids in zip(numbers, ids_BT[:, start:], strict=True):
            result[i] = model.tokenizer.decode(ids[: limits[i] + (start == 0)], skip_special_tokens=True)
        if step is not None:
            step(len(numbers))
    return result


def shot_length(model: RoutedModel, shot: Shot) -> int:
    """How many tokens a shot has, prompt and completion; computed on its text, to sort by, not to allocate by."""
    return len(text.prompt_ids(model.source, shot)) + len(text.completion_ids(model.source, shot))


class Fitting(Reading):
    """A RoutedModel as routers see it while they are fitted: `recycler.routers.protocol.Model`."""

    def __init__(self, model: RoutedModel, progress: Progress = silent, workers: Workers | None = None) -> None:
        super().__init__(model)
        self.progress = progress
        self.workers = Local() if workers is None else workers
        self.groups: tuple[Group, ...] = model.engine.groups
        self.sites = tuple(name for name, _ in model.base.named_modules() if name in model.factors)
        self.part = sharding.part(model.base)

    def map(self, work: Callable[[Any, Item], Result], items: Sequence[Item], what: str) -> list[Result]:
        step = self.progress(len(items), what)
        results: dict[int, Result] = {}
        for number, result in self.workers.run(self, work, items):
            results[number] = result
            step(1, self.workers.about)
        return [results[number] for number in range(len(items))]

    def factors(self, site: str) -> Mapping[str, Factors]:
        return self.model.factors[site]

    def encode(self, rows: Sequence[Sequence[Shot]]) -> Batch:
        return text.encode(self.model.source, rows)

    def base_weight(self, site: str) -> Tensor:
        return weight_OD(self.model.base.get_submodule(site)).cpu()

    def prompts(self, rows: Sequence[Sequence[Shot]]) -> dict[str, Tensor]:
        return text.prompts(self.model.source, rows)

    @torch.no_grad()
    def observe(self, batch: Batch, weights: Weights) -> None:
        head = {} if self.model.source.encoder_decoder else {"logits_to_keep": 1}
        with self.model.mixture(weights):
            self.model(**batch.inputs, **head, use_cache=False)

    def nll(self, batch: Batch, weights: Weights) -> Tensor:
        return nll(self.model, batch, weights)

    def batches(self, rows: Sequence[Sequence[Shot]], tokens: int) -> Iterator[list[int]]:
        yield from text.by_length([sum(shot_length(self.model, shot) for shot in chain) for chain in rows], tokens)
