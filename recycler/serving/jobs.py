"""One answer in the making: from its prompt's tokens to text, whoever runs the model.

A worker hands a job the scores of its next token (`pick`), then the token that was chosen (`advance`). The job turns tokens into
text, looks for stop strings, and emits what can no longer change: `Piece`, ..., then one `End` or `Failure`. A stop string may span
tokens, so that text which could become one is held back; so is half a character.

Dimensions in names: V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, Union

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from recycler.sampling import Draws

GREEDY = 1e-3  # below this temperature the likeliest token is as good as certain
HALF = "�"  # what a decoder writes for bytes that are no character yet

_NUMBERS = count()


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability, before temperature and top-p, and the likeliest ones beside it."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    offset: int = 0  # where its text begins in the answer


@dataclass(frozen=True)
class Piece:
    """Text that follows what was emitted before, and the tokens that it is of."""

    text: str
    scored: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class End:
    """The last of a job's events: it ended by itself or at a stop string ("stop"), or at its limit ("length")."""

    reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Failure:
    """The last of a job's events: it could not be answered."""

    error: Exception


Event = Union[Piece, End, Failure]  # noqa: UP007  (a runtime alias; 3.10 has no `type`)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. A temperature of 0 takes the likeliest; the same seed draws the same tokens, whoever is beside them."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None

    def processors(self) -> LogitsProcessorList | None:
        """Scores → noisy scores whose highest is the draw; None where the likeliest is taken."""
        if self.temperature < GREEDY:
            return None
        seed = secrets.randbits(63) if self.seed is None else self.seed
        warpers: list[LogitsProcessor] = []
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList([*warpers, Draws([seed], 1.0)])


@dataclass(eq=False)
class Job:
    """
    Attributes:
        prompt: token ids.
        emit: is called with every event, from the worker's thread.
        mixture: adapter → weight; empty for the base, None to let the router decide.
        logprobs: how many of the likeliest tokens to report beside each; None for no log-probabilities.
        task: for a router that wants to be told (`oracle`).
        strip: leave out the space that the text begins with.
        made: the tokens so far, the end token included.
        share: adapter → its mean weight over the tokens that were run; filled at the end.
    """

    prompt: Sequence[int]
    tokenizer: Any
    ends: frozenset[int]
    emit: Callable[[Event], None]
    max_tokens: int
    mixture: Mapping[str, float] | None = None
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    task: str | None = None
    strip: bool = False
    made: list[int] = field(default_factory=list)
    share: Mapping[str, float] = field(default_factory=dict)
    done: bool = False

    def __post_init__(self) -> None:
        self.name = f"job-{next(_NUMBERS)}"
        self.reason: Literal["stop", "length"] = "length"
        self._processors = self.sampling.processors()
        self._scored: Scored | None = None
        self._held: list[Scored] = []  # of tokens whose text is not out yet
        self._text, self._out = "", 0  # all text so far, and how much of it was emitted
        self._begin, self._read = 0, 0  # tokens: where decoding begins, and up to where it gave whole characters

    # -- tokens

    @property
    def lane(self) -> tuple[str, ...] | None:
        """Whose model it asks for."""
        return None if self.mixture is None else tuple(sorted(self.mixture))

    @property
    def plain(self) -> bool:
        """The highest score is taken, and nothing else is asked."""
        return self._processors is None and self.logprobs is None

    def pick(self, scores_V: Tensor) -> Tensor:
        """Scores of the next token → scores whose highest is the one to take."""
        final_V = scores_V.float()
        if self._processors is not None:
            nothing: Any = None  # none of them reads tokens
            final_V = self._processors(nothing, final_V[None])[0]
        if self.logprobs is not None:
            logprobs_V = scores_V.float().log_softmax(-1)
            token = int(final_V.argmax())
            value, index = logprobs_V.topk(min(self.logprobs, len(logprobs_V)))
            self._scored = Scored(token, float(logprobs_V[token]), tuple(zip(index.tolist(), value.tolist(), strict=True)))
        return final_V

    def advance(self, token: int) -> bool:
        """Takes in a token; True when that was the last one."""
        self.made.append(token)
        scored, self._scored = self._scored, None
        ended = token in self.ends
        if not ended:
            if scored is not None:
                self._held.append(Scored(scored.token, scored.logprob, scored.top, len(self._text)))
            self._decode()
        stopped = self._find_stop()
        if ended or stopped:
            self.reason = "stop"
        self.done = ended or stopped or len(self.made) >= self.max_tokens
        if self.done and not stopped:
            self._text = self._whole(self._text)
        self._release(len(self._text) if self.done else len(self._text) - self._might_stop())
        return self.done

    def close(self) -> None:
        """Says that it ended."""
        self.done = True
        self.emit(End(self.reason))

    def fail(self, error: Exception) -> None:
        """Says that it failed."""
        self.done = True
        self.emit(Failure(error))

    # -- text

    def _spell(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _decode(self) -> None:
        """Decodes the last few tokens with and without the new ones: what a token is worth may depend on those before it."""
        known, now = self._spell(self.made[self._begin : self._read]), self._spell(self.made[self._begin :])
        if len(now) > len(known) and not now.endswith(HALF):
            self._text += now[len(known) :]
            self._begin, self._read = self._read, len(self.made)

    def _whole(self, text: str) -> str:
        """All of the answer at once, where that begins as what is out already; it may end in half a character."""
        tokens = self.made[:-1] if self.made[-1] in self.ends else self.made
        whole = self._spell(tokens)
        cut = min((at for at in (whole.find(one) for one in self.stop) if at >= 0), default=len(whole))
        return whole[:cut] if whole.startswith(text[: self._out]) else text

    def _find_stop(self) -> bool:
        found = [at for at in (self._text.find(one, max(self._out - len(one), 0)) for one in self.stop) if at >= 0]
        if found:
            self._text = self._text[: min(found)]
        return bool(found)

    def _might_stop(self) -> int:
        """How much of the end could be the beginning of a stop string."""
        longest = 0
        for one in self.stop:
            for length in range(min(len(one) - 1, len(self._text) - self._out), longest, -1):
                if self._text.endswith(one[:length]):
                    longest = length
                    break
        return longest

    def _release(self, upto: int) -> None:
        text = self._text[self._out : upto]
        if self.strip:
            text = text.lstrip()
            self.strip = not text
        self._out = max(self._out, upto)
        ended = self.done and self.reason != "stop"
        scored = [one for one in self._held if one.offset < self._out or ended]
        self._held = self._held[len(scored) :]
        if text or scored:
            self.emit(Piece(text, tuple(scored)))


class Picks(LogitsProcessor):
    """`Job.pick` for the rows of a batch.

    Args:
        jobs: gives the batch's jobs, one a row; None for a row that is nobody's.
    """

    supports_continuous_batching = True

    def __init__(self, jobs: Callable[[], Sequence[Job | None]], before: Callable[[], None] = lambda: None) -> None:
        self.jobs, self.before = jobs, before

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.before()
        rows = [(row, job) for row, job in enumerate(self.jobs()) if job is not None and not job.done and not job.plain]
        if not rows:
            return scores
        scores = scores.float().clone()
        for row, job in rows:
            scores[row] = job.pick(scores[row])
        return scores
