"""The one thread that touches the model: it takes jobs from a bounded queue, runs many at once, and feeds each its tokens.

`Continuous` drives transformers' continuous batching: jobs enter and leave between any two steps, whatever their mixtures
(`recycler.serving.packed`). `recycler.serving.static` is for routers and bases that cannot be packed.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import OutputRouter

from recycler.serving import packed, turns
from recycler.serving.jobs import Job, Picks
from recycler.zoo.errors import InputError

if TYPE_CHECKING:
    from recycler.routed import RoutedModel

PAGE = 32  # tokens

log = logging.getLogger("recycler.serving")


STOPPED = RuntimeError("the server stopped")


class Full(Exception):
    """The queue has no room."""


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        active: how many jobs run at once. queue: how many more may wait.
        cache_tokens: how many tokens' keys and values are kept at once, for all jobs together; no single one can be longer.
        batch_tokens: how many tokens one step runs at most; longer prompts take several.
    """

    active: int = 64
    queue: int = 256
    cache_tokens: int = 16384
    batch_tokens: int = 512


def ends_of(model: RoutedModel) -> frozenset[int]:
    """The tokens at which the base ends its answers."""
    ends = model.base.generation_config.eos_token_id
    ends = model.base.config.eos_token_id if ends is None else ends
    return frozenset([ends] if isinstance(ends, int) else ends or ())


class Worker(ABC):
    """Jobs in, events out. `submit` and `cancel` are called from other threads.

    Attributes:
        batching: what /health calls it. context: the longest prompt and answer together, in tokens.
    """

    batching: str
    context: int

    def __init__(self, model: RoutedModel, limits: Limits) -> None:
        self.model, self.limits = model, limits
        self.waiting: deque[Job] = deque()
        self.running: dict[str, Job] = {}
        self.lock = threading.Lock()

    @abstractmethod
    def start(self) -> None:
        """Begins to work."""

    @abstractmethod
    def stop(self) -> None:
        """Ends the thread, and fails what is unfinished; the model is as it was."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether the thread works."""

    @abstractmethod
    def wake(self) -> None:
        """Says that there is something to do."""

    @abstractmethod
    def abandon(self, job: Job) -> None:
        """A running job is not wanted any more."""

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues jobs, all of them or none.

        Raises:
            Full: there are as many as there may be.
        """
        with self.lock:
            if len(self.waiting) + len(self.running) + len(jobs) > self.limits.active + self.limits.queue:
                raise Full
            self.waiting.extend(jobs)
        self.wake()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Frees the slots of jobs whose answers nobody waits for; those that are done stay as they are."""
        for job in jobs:
            with self.lock:
                if job.done:
                    continue
                job.done = True
                if job in self.waiting:
                    self.waiting.remove(job)
                    continue
                held = self.running.pop(job.name, None)
            if held is not None:
                self.abandon(job)

    def taken(self, room: int, wanted: Callable[[Job], bool] = lambda job: True) -> list[Job]:
        """Up to `room` of the waiting jobs, which run from now on. Next is always the first of those of whose model the fewest run:
        a flood of requests for one leaves room for the others. Under the lock.
        """
        lanes = Counter(job.lane for job in self.running.values())
        new: list[Job] = []
        while len(new) < room:
            job = min(filter(wanted, self.waiting), key=lambda job: lanes[job.lane], default=None)
            if job is None:
                break
            self.waiting.remove(job)
            lanes[job.lane] += 1
            new.append(job)
        self.running |= {job.name: job for job in new}
        return new

    def fail_all(self, error: Exception) -> int:
        """Fails all jobs, and says how many."""
        with self.lock:
            waiting, running = list(self.waiting), list(self.running.values())
            self.waiting.clear()
            self.running.clear()
        for job in [*waiting, *running]:
            job.fail(error)
        for job in running:
            self.abandon(job)
        return len(waiting) + len(running)

    def finish(self, job: Job, share: Mapping[str, float]) -> None:
        """A job has all its tokens."""
        with self.lock:
            wanted = self.running.pop(job.name, None) is not None
        if wanted:
            job.share = share
            job.close()

    def fail(self, job: Job, error: Exception) -> None:
        with self.lock:
            wanted = self.running.pop(job.name, None) is not None
        if wanted:
            job.fail(error)


class Continuous(Worker):
    """
    Raises:
        InputError: transformers cannot batch this base continuously.
    """

    batching = "continuous"

    def __init__(self, model: RoutedModel, limits: Limits) -> None:
        super().__init__(model, limits)
        self.mixtures = packed.Mixtures(model)
        self._left: deque[str] = deque()  # names of jobs that the manager was told to drop
        options = GenerationConfig(do_sample=False, eos_token_id=sorted(ends_of(model)) or -1, pad_token_id=0, max_new_tokens=1)
        pages = -(-limits.cache_tokens // PAGE)
        config = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=pages, max_batch_tokens=max(limits.batch_tokens, limits.active),
            max_requests_per_batch=limits.active, auto_switch_to_flash=False, scheduler_type=turns.NAME,
        )  # fmt: skip
        attention = model.base.config._attn_implementation
        try:
            self.manager: Any = model.base.init_continuous_batching(options, packed.unshared(config))
            self.manager.output_router = _Outlet(self._take)
            picks = Picks(self._picking, self.mixtures.tally)
            self.manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([picks]))
            self.mixtures.attach(self.manager)
        except (ValueError, NotImplementedError, AttributeError) as error:
            model.base.set_attn_implementation(attention)
            raise InputError(f"transformers cannot batch {model.source.id} continuously: {error}", "", "") from error
        self.processor = self.manager.batch_processor
        self._guard(self.processor)
        self.context = pages * PAGE

    def start(self) -> None:
        self.manager.start()

    def stop(self) -> None:
        self.fail_all(STOPPED)
        self.manager.stop(hard_stop=True)
        self.manager.destroy()
        self.mixtures.release()

    @property
    def alive(self) -> bool:
        return bool(self.manager.is_running())

    def wake(self) -> None:
        self.manager._wake_up_loop.set()  # what add_request does; we add on the loop's own thread

    def abandon(self, job: Job) -> None:
        self.manager.cancel_request(job.name)
        self._left.append(job.name)  # after that: whoever finds it here finds it cancelled there

    # -- on the loop's thread

    def _guard(self, processor: Any) -> None:
        """Admits jobs before each step, and lets an error end the jobs that it hit and nothing else."""
        prepare, step, update, inputs = (
            processor.prepare_next_batch, processor._generation_step, processor.update_batch, processor.inputs_and_outputs,
        )  # fmt: skip

        def drop(error: Exception) -> None:
            """Where nobody can say whose fault it was."""
            processor.fail_all_requests(error)
            with self.lock:
                left = list(self.running.values())
            for job in left:
                self.fail(job, error)

        def prepared() -> bool:
            try:
                self._admit()
                return bool(prepare())
            except Exception as error:
                log.exception("a batch could not be prepared")
                drop(error)
                return False

        def stepped(model: Any) -> None:
            try:
                step(model)
            except Exception as error:
                log.exception("a batch could not be run")
                processor.handle_batch_error(error)
                inputs.requests_in_batch = []

        def updated() -> None:
            try:
                update()
            except Exception as error:
                log.exception("a batch could not be read")
                drop(error)

        processor.prepare_next_batch, processor._generation_step, processor.update_batch = prepared, stepped, updated

    def _admit(self) -> None:
        while self._left:
            self.mixtures.forget(self._left.popleft())
        with self.lock:
            new = self.taken(self.limits.active - len(self.running))
        for job, row_E in self._decided(new):
            self.mixtures.rows[job.name] = row_E
            self.manager.add_request(
                job.prompt, job.name, max_new_tokens=job.max_tokens, streaming=True, eos_token_id=sorted(job.ends)
            )

    def _decided(self, jobs: Sequence[Job]) -> list[tuple[Job, Tensor | None]]:
        """Each job with its mixture; None where the router decides token by token. A prompt on which the router fails fails alone."""
        names = self.model.names
        rows: dict[str, Tensor | None] = {}
        free = [job for job in jobs if job.mixture is None]
        for job in jobs:
            if job.mixture is not None:
                rows[job.name] = torch.tensor([float(job.mixture.get(name, 0.0)) for name in names])
        try:
            rows |= self._routed(free)
        except Exception:
            for job in free:
                try:
                    rows |= self._routed([job])
                except Exception as error:
                    self.fail(job, error)
        return [(job, rows[job.name]) for job in jobs if job.name in rows]

    def _routed(self, jobs: Sequence[Job]) -> dict[str, Tensor | None]:
        if not jobs:
            return {}
        rows_NE = packed.decided(self.model, [job.prompt for job in jobs], [job.task for job in jobs])
        return {job.name: None if rows_NE is None else rows_NE[n] for n, job in enumerate(jobs)}

    def _picking(self) -> list[Job | None]:
        return [self.running.get(future.state.request_id) for future in self.mixtures.batch if future.has_new_token]

    def _take(self, output: Any) -> None:
        job = self.running.get(output.request_id)
        if job is None:
            return
        try:
            if output.error is not None:
                raise RuntimeError(output.error)
            for token in output.generated_tokens[len(job.made) :]:
                if job.advance(token):
                    break
        except Exception as error:
            self.fail(job, error)
        if job.done or output.is_finished():
            self.finish(job, self._share(job))
            if output.is_finished():
                self.mixtures.forget(job.name)
            else:
                self.abandon(job)

    def _share(self, job: Job) -> Mapping[str, float]:
        row_E = self.mixtures.rows.get(job.name)
        if row_E is None:
            sum_E, tokens = self.mixtures.tallied.get(job.name, (torch.zeros(len(self.model.names)), 1))
            row_E = sum_E / tokens
        return packed.share(self.model.names, row_E)


class _Outlet(OutputRouter):
    """Hands every output to one function, on the loop's thread."""

    def __init__(self, take: Any) -> None:
        super().__init__()
        self.take = take

    def deliver(self, output: Any) -> None:
        self.take(output)

    def deliver_batch(self, outputs: list[Any]) -> None:
        for output in outputs:
            self.take(output)
