"""From a request that was read to jobs in a worker: whose answer is wanted, of which tokens, within which limits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recycler.chatting import STOP, plain
from recycler.serving import schema
from recycler.serving.errors import ApiError
from recycler.serving.jobs import Event, Job, Sampling
from recycler.serving.metrics import Metrics
from recycler.serving.packed import unpackable
from recycler.serving.worker import Continuous, Full, Limits, Worker, ends_of
from recycler.zoo.errors import InputError, UsageError, choices

if TYPE_CHECKING:
    from recycler.routed import RoutedModel

BASE = "base"
COMPLETION_TOKENS = 16  # OpenAI's default for completions


@dataclass(frozen=True)
class Settings:
    """
    Attributes:
        name: the routed model's, in `/v1/models`.
        host: what it is bound to; on a loopback address, requests for other hosts are refused.
        api_key: what clients must send; None for nothing.
        plain: chats are written as plain turns (`recycler.chatting.plain`), even where the base has a chat template.
        max_tokens: of one answer. max_request_bytes: of one body, and body_seconds that it may take to come.
        max_answers: to one request, prompts times n.
        limits: the worker's.
    """

    name: str = "routed"
    host: str = "127.0.0.1"
    api_key: str | None = field(default=None, repr=False)
    plain: bool = False
    max_tokens: int = 1024
    max_request_bytes: int = 1 << 20
    body_seconds: float = 60
    max_answers: int = 64
    limits: Limits = field(default_factory=Limits)


class Service:
    """A model at work for clients. From `start` to `stop` it is the worker's alone.

    Attributes:
        context: the longest prompt and answer together, in tokens.
        draining: nothing new is taken in.

    Raises:
        UsageError: an adapter has the name of something else that is served.
    """

    def __init__(self, model: RoutedModel, settings: Settings | None = None) -> None:
        self.model, self.settings = model, settings or Settings()
        settings = self.settings
        self.names = model.names
        for taken in (BASE, settings.name):
            if taken in self.names or settings.name == BASE:
                raise UsageError(
                    f"{taken} is two models.", "Clients name the routed model, an adapter or the base.", "Use --name."
                )
        self.why_static = unpackable(model)
        self.worker = self._worker()
        positions = getattr(model.base.config, "max_position_embeddings", None) or self.worker.context
        self.context = min(self.worker.context, int(positions))
        self.metrics = Metrics(self.worker)
        self.draining = False
        self.ends = ends_of(model)
        # Requests are tokenised beside the model's thread; a tokenizer serves one thread at a time.
        self.tokenizer = copy.deepcopy(model.tokenizer)
        self.spelling = copy.deepcopy(model.tokenizer)
        self.pool = ThreadPoolExecutor(1, "recycle-tokens")
        self.vocabulary = int(model.base.get_input_embeddings().weight.shape[0])

    def _worker(self) -> Worker:
        from recycler.serving.static import Static

        if not self.why_static:
            try:
                return Continuous(self.model, self.settings.limits)
            except InputError as error:
                self.why_static = error.what
        return Static(self.model, self.settings.limits)

    def start(self) -> None:
        self.worker.start()

    def stop(self) -> None:
        self.worker.stop()
        self.pool.shutdown()

    # -- what there is

    @property
    def models(self) -> list[str]:
        return [self.settings.name, *self.names, BASE]

    @property
    def chats(self) -> str:
        """How messages are written out: "plain", "template", or "" where they cannot be."""
        return "plain" if self.settings.plain else "template" if self.tokenizer.chat_template else ""

    def kind(self, name: str) -> str:
        """What a model of this name is: one label for hundreds of adapters."""
        return "routed" if name == self.settings.name else BASE if name == BASE else "adapter"

    def health(self) -> dict[str, Any]:
        worker = self.worker
        status = "failed" if not worker.alive else "draining" if self.draining else "ok"
        why = {"why": self.why_static} if self.why_static else {}
        router = self.model.router
        return {
            "status": status, "model": self.settings.name, "router": None if router is None else router.method(),
            "adapters": len(self.names), "batching": worker.batching, **why, "active": len(worker.running),
            "queue": len(worker.waiting), "context": self.context, "max_tokens": self.settings.max_tokens,
            "chats": self.chats or None,
        }  # fmt: skip

    # -- what is asked

    def mixture(self, body: schema.Request) -> Mapping[str, float] | None:
        """Adapter → weight; None where the router decides.

        Raises:
            ApiError: there is no such model or adapter.
        """
        name = self.settings.name if body.model is None else body.model
        if name not in self.models:
            raise ApiError(
                404, f"There is no model {name[:100]!r} here. /v1/models lists them.", param="model", code="model_not_found"
            )
        given = None if body.recycle is None else body.recycle.mixture
        if given is not None:
            unknown = sorted(set(given) - set(self.names))
            if unknown:
                raise ApiError(
                    400,
                    f"There is no adapter {unknown[0][:60]!r} here; {choices(self.names, unknown[0][:60])}.",
                    param="recycle.mixture",
                )
            if name != self.settings.name:
                raise ApiError(400, f"A mixture goes with the model {self.settings.name}.", param="recycle.mixture")
            return {one: weight for one, weight in given.items() if weight}
        if name == BASE:
            return {}
        if name in self.names:
            return {name: 1.0}
        if self.model.router is None:
            raise ApiError(400, "This model has no router: name an adapter, or give recycle.mixture.", param="model")
        return None

    def prompts(self, body: schema.CompletionRequest | schema.ChatRequest) -> list[list[int]]:
        """Token ids of each prompt. Runs in `pool`.

        Raises:
            ApiError: a prompt cannot be used.
        """
        what = "messages" if isinstance(body, schema.ChatRequest) else "prompt"
        try:
            rows = [self._chat(body)] if isinstance(body, schema.ChatRequest) else self._texts(body.prompt)
        except (UnicodeError, TypeError) as error:
            raise ApiError(400, "The text holds halves of characters.", param=what) from error
        if not all(rows) or not rows:
            raise ApiError(400, "A prompt is empty.", param=what)
        if any(token >= self.vocabulary for row in rows for token in row):
            raise ApiError(400, f"Tokens are numbers below {self.vocabulary}.", param=what)
        return rows

    def _texts(self, prompt: Any) -> list[list[int]]:
        if isinstance(prompt, str):
            prompt = [prompt]
        if prompt and isinstance(prompt[0], int):
            prompt = [prompt]
        return [list(self.tokenizer(one).input_ids) if isinstance(one, str) else list(one) for one in prompt]

    def _chat(self, body: schema.ChatRequest) -> list[int]:
        from jinja2 import TemplateError

        turns = [message.turn() for message in body.messages]
        if self.settings.plain:
            said = plain([("system" if turn["role"] == "developer" else turn["role"], turn["content"]) for turn in turns])
            return list(self.tokenizer(said).input_ids)
        if not self.tokenizer.chat_template:
            what = "This base has no chat template. Use /v1/completions, or start the server with --plain."
            raise ApiError(400, what, param="messages", code="no_chat_template")
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ApiError(400, f"The chat template refuses these messages: {error}", param="messages") from error
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def jobs(
        self,
        body: schema.CompletionRequest | schema.ChatRequest,
        prompts: Sequence[Sequence[int]],
        mixture: Mapping[str, float] | None,
        emit: Callable[[int, Event], None],
    ) -> list[Job]:
        """One job for each of a request's answers, prompt by prompt.

        Raises:
            ApiError: they would be too long, or too many.
        """
        times = body.n or 1
        if len(prompts) * times > self.settings.max_answers:
            raise ApiError(
                400, f"This asks for {len(prompts) * times} answers; {self.settings.max_answers} at most.", param="n"
            )
        seed, plain_turns = body.seed, self.settings.plain and isinstance(body, schema.ChatRequest)
        stops = (*body.stops, *((f"\n{STOP}", STOP) if plain_turns else ()))
        made = []
        for number in range(len(prompts) * times):
            ids = prompts[number // times]
            sampling = Sampling(
                1.0 if body.temperature is None else body.temperature,
                1.0 if body.top_p is None else body.top_p,
                None if seed is None else (seed + number + 2**63) % 2**64 - 2**63,
            )
            made.append(
                Job(
                    ids, self.spelling, self.ends, _numbered(emit, number), self._room(body, len(ids)), mixture, sampling, stops,
                    body.top, None if body.recycle is None else body.recycle.task, strip=plain_turns,
                )
            )  # fmt: skip
        return made

    def _room(self, body: schema.CompletionRequest | schema.ChatRequest, prompt: int) -> int:
        """How many tokens an answer may have."""
        asked = body.max_tokens
        if isinstance(body, schema.ChatRequest):
            asked = body.max_completion_tokens or asked
        most = self.settings.max_tokens
        if asked is not None and asked > most:
            raise ApiError(
                400, f"max_tokens is {asked}, and this server's limit {most}.", param="max_tokens", code="max_tokens_exceeded"
            )
        room = self.context - prompt
        if room < (1 if asked is None else asked):
            raise ApiError(
                400,
                f"The context is {self.context} tokens; the prompt has {prompt}"
                + (f", and max_tokens is {asked}." if asked else "."),
                param="messages" if isinstance(body, schema.ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        if asked is None:
            asked = most if isinstance(body, schema.ChatRequest) else COMPLETION_TOKENS
        return min(asked, room, most)

    def submit(self, jobs: Sequence[Job]) -> None:
        """
        Raises:
            ApiError: the queue is full, or nothing is taken in any more.
        """
        if self.draining:
            raise ApiError(503, "The server is shutting down.", code="draining", headers={"retry-after": "5"})
        if not self.worker.alive:
            raise self.dead()
        try:
            self.worker.submit(jobs)
        except Full as error:
            raise ApiError(
                429, "As many requests wait as may. Try again later.", code="queue_full", headers={"retry-after": "1"}
            ) from error

    @staticmethod
    def dead() -> ApiError:
        return ApiError(503, "The model's thread has ended; the server must be started again.", code="failed")


def _numbered(emit: Callable[[int, Event], None], number: int) -> Callable[[Event], None]:
    return lambda event: emit(number, event)
