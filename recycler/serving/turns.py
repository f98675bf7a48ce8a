"""Whose prompt is read next, where several wait.

transformers' own scheduler reads prompts in the order they came, so that a few words wait until a long text before them is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.generation.continuous_batching.requests import RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

NAME = "recycle-turns"


class Turns(FIFOScheduler):
    """Answers in the making go first, and in every step. Of prompts, those with the least left to read have one step, those that came
    first the next: a short one waits for two steps at most, and a long one gets half of them whatever comes in between."""

    _shortest = False

    def _process_candidates(self, candidates: Sequence[RequestState], *args: Any, **options: Any) -> Any:
        self._shortest = not self._shortest
        if self._shortest:
            candidates = sorted(candidates, key=_left)
        return super()._process_candidates(list(candidates), *args, **options)


def _left(state: RequestState) -> int:
    """Tokens of a prompt that are still to be read."""
    return 0 if state.status == RequestStatus.DECODING else len(state.remaining_prefill_tokens)


SCHEDULER_MAPPING[NAME] = Turns
