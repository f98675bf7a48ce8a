"""Shots: a few examples of each task, read from JSONL, sampled with a seed.

A row is ``{"prompt": ..., "completion": ...}`` or ``{"messages": [..., {"role": "assistant", "content": ...}]}``.
"""

from __future__ import annotations

import glob
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recycler.zoo.errors import InputError, UsageError, shorten

NO_TEXT = "half of a surrogate pair, which is not text"


@dataclass(frozen=True)
class Shot:
    """One example. `messages` are set for chat rows, whose prompt is rendered by the base's chat template when used."""

    prompt: str
    completion: str
    messages: tuple[tuple[str, str], ...] | None = None

    def to_json(self) -> dict[str, Any]:
        if self.messages is None:
            return {"prompt": self.prompt, "completion": self.completion}
        turns = [*self.messages, ("assistant", self.completion)]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}


class Shots(Mapping[str, tuple[Shot, ...]]):
    """Task → its examples, in the order they were read."""

    def __init__(self, tasks: Mapping[str, Iterable[Shot]]) -> None:
        self._tasks = {task: tuple(rows) for task, rows in tasks.items()}

    def __getitem__(self, task: str) -> tuple[Shot, ...]:
        return self._tasks[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __repr__(self) -> str:
        return f"Shots({', '.join(f'{task}: {len(rows)}' for task, rows in self._tasks.items())})"

    @classmethod
    def from_files(cls, *patterns: str | Path) -> Shots:
        """Reads JSONL files; glob patterns are expanded. A task's name is its file's stem.

        Raises:
            UsageError: a pattern matches nothing, or two files have one stem.
            InputError: rows that cannot be used, all of them by file and line.
        """
        files: list[Path] = []
        for pattern in patterns:
            found = sorted(glob.glob(str(pattern))) if glob.has_magic(str(pattern)) else [str(pattern)]
            if not found or not all(Path(f).is_file() for f in found):
                raise UsageError(f"There is no file {pattern}.", "", "Give JSONL files, one task each.", code="E_NO_FILE")
            files += map(Path, found)
        stems = [f.stem for f in files]
        twice = sorted({s for s in stems if stems.count(s) > 1})
        if twice:
            raise UsageError(
                f"Several files are called {', '.join(twice)}.",
                "A task is named by its file's stem.",
                "Rename one.",
                code="E_NAME",
            )
        tasks: dict[str, list[Shot]] = {}
        bad: list[str] = []
        for file in files:
            rows, wrong = read_shots(file, parse_row)
            if not rows and not wrong:
                wrong = [f"{file} (empty)"]
            tasks[file.stem] = [shot for _, shot in rows]
            bad += wrong
        if bad:
            raise InputError(
                f"{len(bad)} row{'s' * (len(bad) > 1)} cannot be used: {shorten(bad, 10)}.",
                "",
                'Each line is {"prompt": "...", "completion": "..."} or {"messages": [...]} ending with the assistant.',
                code="E_SHOTS",
            )
        return cls(tasks)

    @classmethod
    def from_dataset(cls, name: str, split: str = "train", task: str | None = None) -> Shots:
        """Reads a dataset of the Hub whose columns are those of a row. Needs the extra: ``pip install recycler[datasets]``.

        Raises:
            UsageError: the extra is missing. InputError: rows that cannot be used.
        """
        try:
            from datasets import load_dataset
        except ImportError:
            raise UsageError(
                "Reading a dataset needs a package.", "", "Run: pip install 'recycler[datasets]'", code="E_MISSING_EXTRA"
            ) from None
        rows, bad = [], []
        for number, row in enumerate(load_dataset(name, split=split)):
            shot = parse_row(row)
            if isinstance(shot, Shot):
                rows.append(shot)
            else:
                bad.append(f"{name}[{number}] ({shot})")
        if bad:
            raise InputError(f"{len(bad)} rows cannot be used: {shorten(bad, 10)}.", "", "", code="E_SHOTS")
        return cls({task or name.rpartition("/")[2]: rows})

    def sample(self, k: int, seed: int = 0) -> Shots:
        """K rows of each task, without repeats, the same every time: the choice depends on the seed, the task's name and
        its rows, and not on the other tasks.

        Raises:
            UsageError: k < 1. InputError: tasks with fewer than K distinct rows, all of them.
        """
        if k < 1:
            raise UsageError(f"kshot={k}.", "At least one example a task is needed.", "Use --kshot 1 or more.", code="E_OPTION")
        distinct = {task: list(dict.fromkeys(rows)) for task, rows in self.items()}
        short = [f"{task} ({len(rows)})" for task, rows in distinct.items() if len(rows) < k]
        if short:
            raise InputError(
                f"{shorten(short)} hold fewer than {k} distinct rows.",
                "",
                f"Add rows, or use a smaller --kshot than {k}.",
                code="E_SHOTS",
            )
        return Shots({task: random.Random(f"{seed} {task}").sample(rows, k) for task, rows in distinct.items()})

    @property
    def sha256(self) -> str:
        """Hash of tasks and rows, in order."""
        text = json.dumps([[task, [shot.to_json() for shot in rows]] for task, rows in self.items()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def parse_row(row: Any) -> Shot | str:
    """A shot, or what is wrong with the row."""
    shot = _parse(row)
    return NO_TEXT if isinstance(shot, Shot) and not is_text(shot) else shot


def is_text(shot: Shot) -> bool:
    r"""No halves of surrogate pairs: JSON can spell them ("\ud83d"), no tokenizer and no file takes them."""
    try:
        for part in (shot.prompt, shot.completion, *(part for turn in shot.messages or () for part in turn)):
            part.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse(row: Any) -> Shot | str:
    if not isinstance(row, Mapping):
        return "not an object"
    if "messages" in row:
        turns = row["messages"]
        if not isinstance(turns, list) or len(turns) < 2:
            return "messages must be a list of at least two turns"
        if not all(
            isinstance(t, Mapping) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in turns
        ):
            return "every message needs a role and a content, both text"
        if turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip():
            return "the last message must be the assistant's, and not empty"
        pairs = tuple((t["role"], t["content"]) for t in turns)
        return Shot("\n".join(content for _, content in pairs[:-1]), pairs[-1][1], pairs[:-1])
    for key in ("prompt", "completion"):
        if not isinstance(row.get(key), str):
            return f"no text under {key!r}"
    if not row["completion"].strip() or not row["prompt"].strip():
        return "prompt or completion is empty"
    return Shot(row["prompt"], row["completion"])


def _read_rows(file: Path) -> tuple[list[Any], list[str]]:
    """(rows, complaints) of a JSONL file; blank lines are skipped."""
    rows, bad = [], []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(
            f"{file} cannot be read as text ({error}).", "", "Give a JSONL file in UTF-8.", code="E_SHOTS"
        ) from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except (ValueError, RecursionError):
                bad.append(f"{file}:{number} (not JSON)")
    return rows, bad


def read_shots(file: Path, parse: Callable[[Any], Shot | str]) -> tuple[list[tuple[Any, Shot]], list[str]]:
    """(row, Shot) for every row that `parse` can use, and what is wrong with the others, by file and line."""
    rows, bad = _read_rows(file)
    shots = []
    for number, row in rows:
        shot = parse(row)
        if isinstance(shot, Shot):
            shots.append((row, shot))
        else:
            bad.append(f"{file}:{number} ({shot})")
    return shots, bad
