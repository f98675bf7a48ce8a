"""The gist of a request: what the base would say, in one word, that it means.

    This sentence : "{request}" means in one word:"

The state at the end of this, near the top, is about the meaning of the whole, where the mean of the states over its words is about
these. What all prompts begin and end with ("Instruction: ... Response:") is left out first: it tells nothing apart, and with it the
base would begin to answer.

PromptEOL (Jiang et al. 2023, arXiv:2307.16645), whose wording this is. On SmolLM2 other wordings, and examples before it, change
little; asked for the topic or the kind of task, the base knows less.

Dimensions in names: N text, H width of the base.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from recycler.routers.protocol import Reader
from recycler.routers.states import last_tokens

_ASKED = 'This sentence : "{}" means in one word:"'
_DEPTH = 0.95  # above it, a state is less about what was read than about one next word
_MOST = 1000  # characters that are read, about as many as a sentence encoder reads
_AT_ONCE = 32


def frame(prompts: Sequence[str]) -> tuple[str, str]:
    """What all prompts begin and end with, in whole words; nothing, where nothing would be left of one of them."""
    before = _begin(prompts)
    before = before[: max((space.end() for space in re.finditer(r"\s+", before)), default=0)]
    after = _begin([prompt[::-1] for prompt in prompts])[::-1]
    space = re.search(r"\s", after)
    after = after[space.start() :] if space else ""
    if any(len(prompt) <= len(before) + len(after) for prompt in prompts):
        return "", ""
    return before, after


def gists(reader: Reader, texts: Sequence[str], frame: tuple[str, str]) -> Tensor:
    """[N, H], of length 1, on the CPU. What a text has of `frame` is left out."""
    bare = [text.removeprefix(frame[0]).removesuffix(frame[1]).strip() or text for text in texts]
    asked = [_ASKED.format(request[:_MOST]) for request in bare]
    found_NH = torch.zeros(len(texts), reader.width)
    lengths = reader.lengths(asked)
    order = sorted(range(len(asked)), key=lengths.__getitem__)
    for start in range(0, len(order), _AT_ONCE):
        some = order[start : start + _AT_ONCE]
        found_NH[some] = last_tokens(reader, reader.tokens([asked[i] for i in some]), _DEPTH)
    return found_NH


def _begin(texts: Sequence[str]) -> str:
    return os.path.commonprefix(list(texts))  # of characters is what is meant  # noqa: RUF071
