"""Each token's own text, so that the pieces put together are the text that the tokenizer decodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "\ufffd"  # what decoders make of bytes that are no character, or not yet


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it, special tokens included.

    A character that several tokens make together is the last one's, and theirs is empty. Bytes that make no character are shown as
    the decoder shows them.
    """
    result = [""] * len(ids)
    before = start = 0  # ids[before:start] is done, and is the context in which ids[start:] are decoded
    for i in range(len(ids)):
        known = _decoded(tokenizer, ids[before:start])
        added = _decoded(tokenizer, ids[before : i + 1])[len(known) :]
        if added.endswith(_BROKEN) and i < len(ids) - 1:
            continue
        broken = min(len(added) - len(added.lstrip(_BROKEN)), i - start)  # bytes that came to nothing are their own tokens'
        result[start : start + broken], result[i] = [_BROKEN] * broken, added[broken:]
        before, start = start, i + 1
    return result


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""
