"""Batches by `generate`, for what cannot be packed: routers that decide beside the forward, and encoder–decoders.

Jobs that wait run together: those that the router decides in one batch, those with a mixture given in another. A batch ends with its
longest answer; jobs that end before are told so at once, and what arrives meanwhile waits.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from recycler.routed import Firing
from recycler.serving.jobs import Job, Picks
from recycler.serving.packed import share
from recycler.serving.worker import STOPPED, Limits, Worker, log

if TYPE_CHECKING:
    from recycler.routed import RoutedModel


class Static(Worker):
    """One batch after the other."""

    batching = "static"

    def __init__(self, model: RoutedModel, limits: Limits) -> None:
        super().__init__(model, limits)
        self.context = limits.cache_tokens
        self._work = threading.Condition(self.lock)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="recycle-serve")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        with self._work:
            self._closing = True
            self._work.notify()
        self.fail_all(STOPPED)
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def wake(self) -> None:
        with self._work:
            self._work.notify()

    def abandon(self, job: Job) -> None:
        pass  # its row goes on unread, until the batch ends or all of it is done

    def _run(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(lambda: self.waiting or self._closing)
                if self._closing:
                    return
                routed = self.waiting[0].mixture is None
                jobs = self.taken(self.limits.active, lambda job, routed=routed: (job.mixture is None) == routed)  # type: ignore[misc]
            try:
                self._answer(jobs, routed)
            except Exception as error:
                log.exception("a batch could not be run")
                for job in jobs:
                    self.fail(job, error)

    @torch.no_grad()
    def _answer(self, jobs: Sequence[Job], routed: bool) -> None:
        model, tokenizer = self.model, self.model.tokenizer
        side = "right" if model.source.encoder_decoder else "left"
        padded = tokenizer.pad({"input_ids": [list(job.prompt) for job in jobs]}, padding_side=side, return_tensors="pt")
        inputs = {name: padded[name].to(model.source.device) for name in ("input_ids", "attention_mask")}
        config = model.base.generation_config
        options = GenerationConfig(
            do_sample=False, num_beams=1, repetition_penalty=1.0, max_new_tokens=max(job.max_tokens for job in jobs),
            eos_token_id=sorted(jobs[0].ends) or None, pad_token_id=tokenizer.pad_token_id,
            decoder_start_token_id=getattr(config, "decoder_start_token_id", None), bos_token_id=getattr(config, "bos_token_id", None),
        )  # fmt: skip
        record: dict[str, Tensor] = {}
        rows = _Rows(self, jobs, record, inputs["attention_mask"])
        with ExitStack() as stack:
            stack.enter_context(model.engine.control.set(record=record))
            stack.enter_context(model.labelled([job.task for job in jobs]))
            if not routed:
                weights_BE = torch.tensor([[float((job.mixture or {}).get(name, 0.0)) for name in model.names] for job in jobs])
                stack.enter_context(model.mixture(weights_BE))
            model.generate(
                **inputs,
                generation_config=options,
                logits_processor=LogitsProcessorList([Picks(lambda: jobs)]),
                stopping_criteria=StoppingCriteriaList([rows]),
            )
        for job in jobs:  # whatever generate ended by itself
            self.finish(job, rows.shares(jobs.index(job)))


class _Rows(StoppingCriteria):
    """Feeds each job its row's tokens, and adds up who fired."""

    def __init__(self, worker: Worker, jobs: Sequence[Job], record: dict[str, Tensor], mask_BT: Tensor) -> None:
        self.worker, self.jobs, self.record, self.mask_BT = worker, jobs, record, mask_BT.bool().cpu()
        self.sum_BE = torch.zeros(len(jobs), len(worker.model.names))
        self.tokens_B = torch.zeros(len(jobs))

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        self._tally()
        for number, (job, token) in enumerate(zip(self.jobs, input_ids[:, -1].tolist(), strict=True)):
            if not job.done:
                try:
                    job.advance(int(token))
                except Exception as error:
                    self.worker.fail(job, error)
                if job.done:
                    self.worker.finish(job, self.shares(number))
        return torch.tensor([job.done for job in self.jobs], device=input_ids.device)

    def shares(self, number: int) -> Any:
        return share(self.worker.model.names, self.sum_BE[number] / self.tokens_B[number].clamp(min=1))

    def _tally(self) -> None:
        if not self.record:
            return
        first = not bool(self.tokens_B.any())
        firing = Firing(
            self.worker.model.names, {site: w.cpu() for site, w in self.record.items()}, self.mask_BT if first else None
        )
        tokens_B = self.mask_BT.sum(1).float() if first else torch.ones(len(self.jobs))
        self.sum_BE += firing.share() * tokens_B[:, None]
        self.tokens_B += tokens_B
        self.record.clear()
