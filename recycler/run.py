"""Answering files and prompts with a composed model: every row as it came, plus "generated", in the order it came; on request with
"routing" (who answered, and why) or "recruiting" (who was asked, and what each said)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycler.scoring import Progress, answer, silent
from recycler.shots import NO_TEXT, Shot, is_text, read_shots
from recycler.zoo.errors import InputError, UsageError, shorten
from recycler.zoo.store import require_writable

if TYPE_CHECKING:
    from recycler.evaluating.evaluation import Evaluation
    from recycler.routed import RoutedModel
    from recycler.shots import Shots


def answer_file(
    load: Callable[[], RoutedModel],
    source: Path,
    target: Path | None,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    only: str | None = None,
    recruit: bool = False,
    explain: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> list[str]:
    """Answers every row of a JSONL file. The input is checked before the model is loaded. Where a row names its "task", a router that
    wants to be told (`oracle`) is.

    Args:
        target: written only when all is done; None writes nothing.
        only: this adapter alone, or "base".
        recruit: has a `skills` router's recruits answer one by one, and aggregates (see `recycler.recruiting`).
        explain: adds "routing" to each row (see `recycler.shares`).

    Returns:
        The output lines.

    Raises:
        UsageError: the output exists. InputError: rows that cannot be used, all by file and line.
    """
    if target is not None and target.exists() and not force:
        raise UsageError(
            f"{target} exists.",
            "Nothing is overwritten unless asked.",
            "Choose another --output, or add --force.",
            code="E_EXISTS",
        )
    if target is not None and target.is_dir():
        raise UsageError(f"{target} is a folder.", "", "Give --output a file.")
    if not source.is_file():
        raise UsageError(f"There is no file {source}.", "", "Give a JSONL file with a prompt in every row.", code="E_NO_FILE")
    rows, bad = read_shots(source, prompt_of)
    if bad or not rows:
        raise InputError(
            f"{len(bad)} row{'s' * (len(bad) != 1)} cannot be used: {shorten(bad, 10)}." if bad else f"{source} is empty.",
            "",
            'Each line is {"prompt": "..."} or {"messages": [...]}.',
            code="E_SHOTS",
        )
    if target is not None:
        require_writable(target.parent)
    tasks = [row["task"] if isinstance(row.get("task"), str) else None for row, _ in rows]
    shots = [shot for _, shot in rows]
    answers = _answers(load(), shots, max_new_tokens, batch_size, only, progress, tasks, recruit=recruit, explain=explain)
    lines = [_line({**row, **made}) for (row, _), made in zip(rows, answers, strict=True)]
    if target is not None:
        _write(target, lines)
    return lines


def answer_prompts(
    model: RoutedModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    only: str | None = None,
    progress: Progress = silent,
) -> list[str]:
    """Answers plain prompts.

    Raises:
        UsageError: one of them is no text.
    """
    rows = answered_prompts(model, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, only=only, progress=progress)
    return [str(row["generated"]) for row in rows]


def answered_prompts(
    model: RoutedModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    only: str | None = None,
    recruit: bool = False,
    explain: bool = False,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """`answer_prompts` as rows: "prompt", "generated", and what `recruit` and `explain` add."""
    shots = []
    for prompt in prompts:
        shot = prompt_of({"prompt": prompt})
        if not isinstance(shot, Shot):
            raise UsageError(f"The prompt {prompt!r} cannot be used: {shot}.", "", "Give some text.")
        shots.append(shot)
    answers = _answers(model, shots, max_new_tokens, batch_size, only, progress, recruit=recruit, explain=explain)
    return [{"prompt": prompt, **made} for prompt, made in zip(prompts, answers, strict=True)]


def check_answers(folder: Path, force: bool) -> None:
    """Raises UsageError when `folder` is in use and may not be written to."""
    if folder.is_file():
        raise UsageError(f"{folder} is a file.", "", "Give --answers a folder.", code="E_EXISTS")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise UsageError(
            f"{folder} is not empty.",
            "Nothing is overwritten unless asked.",
            "Choose another --answers, or add --force.",
            code="E_EXISTS",
        )
    require_writable(folder)


def write_answers(result: Evaluation, shots: Shots, folder: Path, *, force: bool = False) -> None:
    """Everybody's answers: ``<contender>/<task>.jsonl``, each row with its reference and what was generated.

    Raises:
        UsageError: the folder is not empty, and not `force`.
    """
    check_answers(folder, force)
    for contender, tasks in result.generated.items():
        for task, texts in tasks.items():
            rows = [{**shot.to_json(), "generated": text} for shot, text in zip(shots[task], texts, strict=True)]
            target = folder / contender.replace(" ", "_") / f"{task}.jsonl"
            target.parent.mkdir(parents=True, exist_ok=True)
            _write(target, [json.dumps(row, ensure_ascii=False) + "\n" for row in rows])


def _answers(
    model: RoutedModel,
    shots: Sequence[Shot],
    max_new_tokens: int,
    batch_size: int,
    only: str | None,
    progress: Progress,
    tasks: Sequence[str | None] | None = None,
    *,
    recruit: bool = False,
    explain: bool = False,
) -> list[dict[str, Any]]:
    """What is added to each row."""
    if max_new_tokens < 1 or batch_size < 1:
        raise UsageError("--max-new-tokens and --batch-size must be at least 1.", "", "")
    if recruit and (only is not None or explain):
        raise UsageError(
            f"--recruit does not go with {'--explain' if explain else '--only'}.",
            "Recruits are chosen by the router, and their reasons are in every row.",
            "Leave one of them out.",
        )
    if recruit:
        from recycler.recruiting import solve

        solved = solve(model, shots, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress)
        return [{"generated": one.text, "recruiting": one.to_json()} for one in solved]
    step = progress(len(shots), "answering")
    with _only(model, only):
        texts = answer(model, shots, max_new_tokens=max_new_tokens, batch_size=batch_size, tasks=tasks, step=step)
        if not explain:
            return [{"generated": text} for text in texts]
        from recycler.shares import routing

        reasons = routing(model, shots, batch_size=batch_size, tasks=tasks)
    return [{"generated": text, "routing": reason} for text, reason in zip(texts, reasons, strict=True)]


@contextmanager
def _only(model: RoutedModel, name: str | None) -> Iterator[None]:
    if name is None:
        yield
    elif name == "base":
        with model.disabled():
            yield
    else:
        with model.only(name):
            yield


def prompt_of(row: Any) -> Shot | str:
    """The prompt of a row, or what is wrong with it. A last turn of the assistant is the reference, not the prompt."""
    shot = _parse(row)
    return NO_TEXT if isinstance(shot, Shot) and not is_text(shot) else shot


def _parse(row: Any) -> Shot | str:
    if not isinstance(row, Mapping):
        return "not an object"
    if "messages" in row:
        turns = row["messages"]
        well_formed = isinstance(turns, list) and all(
            isinstance(t, Mapping) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in turns
        )
        if not well_formed:
            return "messages must be a list of turns with role and content"
        pairs = [(t["role"], t["content"]) for t in turns]
        if pairs and pairs[-1][0] == "assistant":
            pairs = pairs[:-1]
        return Shot("", "", tuple(pairs)) if pairs else "messages hold no prompt"
    if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        return "no text under 'prompt'"
    return Shot(row["prompt"], "")


def _line(row: Any) -> str:
    """A row as it came. Readable, unless a field that nobody reads holds what UTF-8 does not."""
    text = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return json.dumps(row) + "\n"


def _write(target: Path, lines: Sequence[str]) -> None:
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    with temporary.open("w", encoding="utf8") as file:
        file.writelines(lines)
    os.replace(temporary, target)
