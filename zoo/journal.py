"""What changed in a large zoo since its zoo.json was written whole: one line a change, appended.

``zoo.json`` of a small zoo is written anew at every change. That of a large one names a journal beside it, and the two together
are the truth: what zoo.json says, changed line by line. Adding an adapter then costs the same in a zoo of 100,000 as in one of
1,000.

::

    {"schema_version": 1}
    {"set": {"math": {"source": ..., "files": ..., ...}}}
    {"remove": ["law", "code"]}

A line counts once its end is there. A process that dies while it writes leaves a line without one, which readers ignore and the
next writer cuts off.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
PATTERN = "zoo-*.jsonl"
_NAME = re.compile(r"zoo-[0-9a-f]{8}\.jsonl")


def is_journal(name: object) -> bool:
    """Whether a name that a file gives can be a journal's, and so cannot lead out of the zoo."""
    return isinstance(name, str) and bool(_NAME.fullmatch(name))


def create(zoo: Path) -> Path:
    """A new, empty journal. It means nothing until a zoo.json names it."""
    path = zoo / f"zoo-{uuid.uuid4().hex[:8]}.jsonl"
    with path.open("xb") as stream:
        stream.write(_line({"schema_version": SCHEMA_VERSION}))
        stream.flush()
        os.fsync(stream.fileno())
    return path


def is_empty(path: Path) -> bool:
    """Whether no change stands in it."""
    return path.stat().st_size <= len(_line({"schema_version": SCHEMA_VERSION}))


def append(path: Path, changed: Mapping[str, Mapping[str, Any]], removed: Collection[str] = ()) -> None:
    """Add one change, all of it or nothing; the caller holds the zoo's lock.

    Args:
        changed: name → entry, as zoo.json spells it. removed: names.
    """
    change: dict[str, Any] = {"set": dict(changed)} if changed else {}
    if removed:
        change["remove"] = sorted(removed)
    with path.open("r+b") as stream:
        end = _cut(stream)
        try:
            stream.write(_line(change))
            stream.flush()
            os.fsync(stream.fileno())
        except BaseException:
            os.ftruncate(stream.fileno(), end)
            raise


def read(path: Path, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Changes from a place in the file on, each with the place where it ends.

    Raises:
        ValueError: a line is none of those above.
    """
    with path.open("rb") as stream:
        stream.seek(start)
        end = start
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            change = json.loads(line)
            if end == len(line):  # the first line of the file
                if change != {"schema_version": SCHEMA_VERSION}:
                    raise ValueError(f"{path.name} does not begin as a journal of this version does")
                change = {}
            if not isinstance(change, dict) or not change.keys() <= {"set", "remove"}:
                raise ValueError(f"{path.name}, line {number} from byte {start}: no change to a zoo")
            yield change, end


def last_bytes(path: Path, end: int, count: int = 256) -> bytes:
    """What stands before a place: whoever read up to there knows by it that this is still the same journal."""
    with path.open("rb") as stream:
        stream.seek(max(end - count, 0))
        return stream.read(min(count, end))


def _line(change: Mapping[str, Any]) -> bytes:
    return json.dumps(change, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _cut(stream: Any) -> int:
    """Cut off a line without an end; returns where the file ends then, and is there."""
    end: int = stream.seek(0, os.SEEK_END)
    step = 1 << 16
    place = end
    while place > 0:
        first = max(place - step, 0)
        stream.seek(first)
        found = stream.read(place - first).rfind(b"\n")
        if found >= 0:
            place = first + found + 1
            break
        place = first
    if place < end:
        stream.truncate(place)
    stream.seek(place)
    return place
