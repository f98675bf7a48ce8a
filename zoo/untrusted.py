"""What every reader of foreign text needs: characters fit for a terminal, and JSON objects that have one reading."""

from __future__ import annotations

import re
from typing import Any

# What a terminal obeys or hides, tab and line feed aside: control characters, marks that turn the direction of writing, invisible
# ones, separators of lines and paragraphs, and halves of characters, which cannot be written at all.
OBEYED = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def printable(text: object, limit: int = 120) -> str:
    """`text` with control characters, escapes and bidi marks spelled out, cut at `limit` characters."""
    raw = str(text)
    head = raw[:limit]
    if not head.isprintable():
        head = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in head)
    return head + ("…" if len(raw) > limit else "")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An ``object_pairs_hook`` for json, which by itself lets the last of two equal keys win without a word: a person who looks
    at the file may see the first.

    Raises:
        ValueError: a key is there twice; it is named.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {printable(twice, 60)!r} is given twice")
    return found
