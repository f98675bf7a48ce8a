"""Answers as OpenAI's clients read them: whole bodies and streamed chunks, of completions and of chats.

``usage.recycle`` is this server's own: adapter → its mean weight over the tokens of the request, prompt included, the largest first;
of hundreds the last ones are left out that have less than a thousandth together.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recycler.serving.jobs import Job, Piece, Scored

Spell = Callable[[int], str]  # a token's own text

LEAST = 1e-3


@dataclass
class Choice:
    """One answer as it grows."""

    job: Job
    text: str = ""
    scored: list[Scored] = field(default_factory=list)
    reason: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.scored += piece.scored


def usage(jobs: Sequence[Job], times: int = 1) -> dict[str, Any]:
    """Tokens, and who answered. A prompt that is answered several times counts once.

    Args:
        times: answers to each prompt.
    """
    prompt = sum(len(job.prompt) for job in jobs[::times])
    made = sum(len(job.made) for job in jobs)
    weights = [len(job.prompt) + len(job.made) for job in jobs]
    share: dict[str, float] = {}
    for job, weight in zip(jobs, weights, strict=True):
        for name, part in job.share.items():
            share[name] = share.get(name, 0.0) + part * weight / sum(weights)
    shown, left = {}, sum(map(abs, share.values()))
    for name, part in sorted(share.items(), key=lambda item: -abs(item[1])):
        if left < LEAST:
            break
        shown[name], left = round(part, 6), left - abs(part)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "recycle": shown,
    }


class Completions:
    """`/v1/completions`"""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, spell: Spell, top: int | None) -> None:
        self.spell, self.top = spell, top

    def full(self, number: int, choice: Choice) -> dict[str, Any]:
        return {"index": number, "text": choice.text, "logprobs": self._logprobs(choice.scored), "finish_reason": choice.reason}

    def opening(self, number: int) -> dict[str, Any] | None:
        return None

    def delta(self, number: int, piece: Piece) -> dict[str, Any]:
        return {"index": number, "text": piece.text, "logprobs": self._logprobs(piece.scored), "finish_reason": None}

    def closing(self, number: int, reason: str) -> dict[str, Any]:
        return {"index": number, "text": "", "logprobs": None, "finish_reason": reason}

    def _logprobs(self, scored: Sequence[Scored]) -> dict[str, Any] | None:
        if self.top is None:
            return None
        return {
            "tokens": [self.spell(one.token) for one in scored],
            "token_logprobs": [one.logprob for one in scored],
            "top_logprobs": [{self.spell(token): value for token, value in reversed(one.top)} for one in scored]
            if self.top
            else None,
            "text_offset": [one.offset for one in scored],
        }


class Chats:
    """`/v1/chat/completions`"""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, spell: Spell, top: int | None) -> None:
        self.spell, self.top = spell, top

    def full(self, number: int, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"index": number, "message": message, "logprobs": self._logprobs(choice.scored), "finish_reason": choice.reason}

    def opening(self, number: int) -> dict[str, Any] | None:
        return {"index": number, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def delta(self, number: int, piece: Piece) -> dict[str, Any]:
        return {
            "index": number,
            "delta": {"content": piece.text},
            "logprobs": self._logprobs(piece.scored),
            "finish_reason": None,
        }

    def closing(self, number: int, reason: str) -> dict[str, Any]:
        return {"index": number, "delta": {}, "logprobs": None, "finish_reason": reason}

    def _logprobs(self, scored: Sequence[Scored]) -> dict[str, Any] | None:
        if self.top is None:
            return None
        return {
            "content": [
                {**self._token(one.token, one.logprob), "top_logprobs": [self._token(*other) for other in one.top]}
                for one in scored
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.spell(token)
        whole = "�" not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


def envelope(form: Completions | Chats, model: str, *, streamed: bool) -> dict[str, Any]:
    """What all bodies and chunks of one request begin with."""
    kind = form.chunk if streamed else form.whole
    return {"id": f"{form.prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def models(names: Sequence[str], created: int) -> dict[str, Any]:
    """`/v1/models`"""
    return {"object": "list", "data": [model(name, created) for name in names]}


def model(name: str, created: int) -> Mapping[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "recycler"}
