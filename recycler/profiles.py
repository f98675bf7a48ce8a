"""What the shots teach about a zoo: a score for the base and every adapter on every task, and which tasks are whose.

On disk, a folder: profile.json (what was measured, as a table), shots.jsonl (the rows), profile.safetensors (every row's score).
A run that was interrupted left journal.jsonl, and goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recycler.journal import LOCK, write_text
from recycler.scoring import Fitting, Progress, answer, mean_nll, shot_length, silent
from recycler.shots import Shot, Shots, parse_row
from recycler.text import by_length, completion_ids
from recycler.workers import Workers
from recycler.zoo.errors import InputError, RecycleError, UsageError, choices

if TYPE_CHECKING:
    from recycler.routed import RoutedModel

SCHEMA_VERSION = 1
_HARM = 0.5  # nats a token: far above what an unrelated task's adapter costs by chance
BASE = "base"  # the first row of every score: no adapter


@dataclass(frozen=True)
class Profile:
    """Scores of the base and every adapter on K shots of every task.

    Attributes:
        adapters: names, in the order of the scores' rows 1..N; row 0 is the base.
        shots: task → its K shots.
        nll: [N+1, tasks, K], mean token NLL of the completion.
        exact: [N+1, tasks, K], 1.0 where the generated answer matched; None when nothing was generated.
        base: id, path, revision and fingerprint of the base.
        hashes: adapter → sha256 of its weights.
        assigned: adapter → tasks given by hand.
        seed: of the sample of shots.
        name, folder: where it is kept.
        key: sha256 of everything the scores depend on; the same key means that the same was measured.
    """

    adapters: tuple[str, ...]
    shots: Shots
    nll: Tensor = field(repr=False)
    exact: Tensor | None = field(default=None, repr=False)
    base: Mapping[str, Any] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    assigned: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    seed: int = 0
    name: str = "profile"
    folder: Path | None = None
    key: str = ""

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.shots)

    @cached_property  # as what follows: asked for again and again, for every adapter
    def own(self) -> dict[str, tuple[str, ...]]:
        """Adapter → the tasks that are its own (see `own_tasks`); a task may be nobody's."""
        return own_tasks(self.adapters, self.tasks, self.nll.mean(-1), self.assigned)

    @cached_property
    def owner(self) -> dict[str, str]:
        """Task → the adapter to use when the task is known: the one assigned by hand, else the one with the lowest NLL,
        where that is below the base's; tasks that nobody helps are left out."""
        by_hand = {task: name for name, tasks in self.assigned.items() for task in tasks}
        best = _best(self.adapters, self.tasks, self.nll.mean(-1))
        return {task: by_hand.get(task) or best[task] for task in self.tasks if task in by_hand or task in best}

    @property
    def best_single(self) -> str | None:
        """The one adapter to use everywhere: highest mean exact match where answers were generated, and of several such, or
        where none were, lowest mean NLL. None if the base itself is as good."""
        nll_R = self.nll.mean((1, 2)).tolist()
        wrong_R = [0.0] * len(nll_R) if self.exact is None else (-self.exact.mean((1, 2))).tolist()
        index = min(range(len(nll_R)), key=lambda r: (wrong_R[r], nll_R[r]))
        return self.adapters[index - 1] if index else None

    @property
    def harmful(self) -> tuple[str, ...]:
        """Adapters that raise the base's mean NLL on every task by more than `_HARM`: trained for another base of the same
        shapes, or broken in a way that no look at the files shows."""
        nll_RT = self.nll.mean(-1)
        worse_R = (nll_RT > nll_RT[0] + _HARM).all(-1).tolist()
        return tuple(name for name, worse in zip(self.adapters, worse_R[1:], strict=True) if worse)

    def summary(self) -> dict[str, Any]:
        """What a router remembers of the profile it was built from."""
        return {
            "name": self.name,
            "tasks": list(self.tasks),
            "own": {k: list(v) for k, v in self.own.items()},
            "owner": self.owner,
            "best_single": self.best_single,
            "chats": any(shot.messages is not None for rows in self.shots.values() for shot in rows),
        }

    def to_json(self) -> dict[str, Any]:
        """The scores as a table: means over shots."""
        rows = (BASE, *self.adapters)
        table = {"nll": self.nll} if self.exact is None else {"nll": self.nll, "exact": self.exact}
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "base": dict(self.base),
            "kshot": self.nll.shape[-1],
            "seed": self.seed,
            "key": self.key,
            "tasks": list(self.tasks),
            "adapters": dict(self.hashes) if self.hashes else dict.fromkeys(self.adapters, ""),
            "assigned": {k: list(v) for k, v in self.assigned.items()},
            **{
                key: {
                    row: {task: round(value, 4) for task, value in zip(self.tasks, values, strict=True)}
                    for row, values in zip(rows, scores.mean(-1).tolist(), strict=True)
                }
                for key, scores in table.items()
            },
            "own": {k: list(v) for k, v in self.own.items()},
            "best_single": self.best_single,
            "harmful": list(self.harmful),
        }

    def assign(self, pairs: Mapping[str, str | Iterable[str]]) -> Profile:
        """The same profile with own tasks given by hand; a task alone may stand for a list of one.

        Raises:
            UsageError: an adapter or a task that is not in the profile.
        """
        given = {name: (tasks,) if isinstance(tasks, str) else tuple(tasks) for name, tasks in pairs.items()}
        for name, tasks in given.items():
            if name not in self.adapters:
                raise UsageError(
                    f"There is no adapter {name!r} in profile {self.name}.",
                    "",
                    f"Choose {choices(self.adapters)}.",
                    code="E_UNKNOWN",
                )
            for task in tasks:
                if task not in self.tasks:
                    raise UsageError(
                        f"There is no task {task!r} in profile {self.name}.",
                        "",
                        f"Choose {choices(self.tasks)}.",
                        code="E_UNKNOWN",
                    )
        return replace(self, assigned={**self.assigned, **given})

    def restricted(self, names: Sequence[str]) -> Profile:
        """The profile of some of the adapters: own tasks, owners and the best single one are theirs."""
        rows = [0, *(self.adapters.index(name) + 1 for name in names)]
        return replace(
            self,
            adapters=tuple(names),
            nll=self.nll[rows],
            exact=None if self.exact is None else self.exact[rows],
            hashes={name: self.hashes[name] for name in names if name in self.hashes},
            assigned={name: tasks for name, tasks in self.assigned.items() if name in names},
            key="",
        )

    # -- on disk

    def save(self, folder: Path) -> Path:
        """Writes the folder; profile.json last."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "profile.json").unlink(missing_ok=True)  # of an earlier one: never beside other scores
        rows = [{"task": task, **shot.to_json()} for task, shots in self.shots.items() for shot in shots]
        write_text(folder / "shots.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        scores = {"nll": self.nll} if self.exact is None else {"nll": self.nll, "exact": self.exact}
        save_file({k: v.contiguous() for k, v in scores.items()}, folder / "profile.safetensors.tmp")
        os.replace(folder / "profile.safetensors.tmp", folder / "profile.safetensors")
        # Not sorted by key: the order of adapters is that of the scores' rows.
        write_text(folder / "profile.json", json.dumps(self.to_json(), indent=2) + "\n")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Profile:
        """Reads a saved profile.

        Raises:
            InputError: the folder holds none, or a run that was not finished, or what it holds cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        if not (folder / "profile.json").exists():
            half = (folder / "journal.jsonl").exists()
            raise InputError(
                f"{folder} holds no {'finished ' * half}profile.",
                "The run was interrupted." * half,
                "Run recycle profile again with the same arguments; it goes on where it stopped." if half
                else "Make one: recycle profile FILE... --kshot 16 --out NAME",
                code="E_PROFILE",
            )  # fmt: skip
        try:
            data = json.loads((folder / "profile.json").read_text(encoding="utf8"))
            if data["schema_version"] > SCHEMA_VERSION:
                raise InputError(f"{folder} was written by a newer version.", "", "Upgrade recycler.", code="E_NEWER")
            shots: dict[str, list[Shot]] = {task: [] for task in data["tasks"]}
            # not splitlines: texts may hold U+2028 and the like
            for line in (folder / "shots.jsonl").read_text(encoding="utf8").rstrip("\n").split("\n"):
                row = json.loads(line)
                shot = parse_row(row)
                if not isinstance(shot, Shot):
                    raise ValueError(f"a row of shots.jsonl: {shot}")
                shots[row["task"]].append(shot)
            scores = load_file(folder / "profile.safetensors")
            if any(scores["nll"].shape != (len(data["adapters"]) + 1, len(shots), len(rows)) for rows in shots.values()):
                raise ValueError("scores and shots do not fit together")
            return cls(
                adapters=tuple(data["adapters"]),
                shots=Shots(shots),
                nll=scores["nll"],
                exact=scores.get("exact"),
                base=data["base"],
                hashes=data["adapters"],
                assigned={k: tuple(v) for k, v in data["assigned"].items()},
                seed=data["seed"],
                name=data["name"],
                folder=folder,
                key=data.get("key", ""),
            )
        except RecycleError:
            raise
        except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
            raise InputError(
                f"The profile in {folder} cannot be read ({error}).", "", "Make it again.", code="E_PROFILE"
            ) from None


def check_output(folder: Path) -> None:
    """Raises UsageError when `folder` is in use for something else than a profile."""
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or (held - {LOCK} and not held & {"profile.json", "journal.jsonl"}):
        raise UsageError(
            f"{folder} holds something else than a profile.",
            "Nothing is overwritten.",
            "Choose another --out.",
            code="E_EXISTS",
        )


def own_tasks(
    adapters: Sequence[str], tasks: Sequence[str], nll_RT: Tensor, assigned: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Adapter → its own tasks: where it gains most over the base.

    Every adapter lowers the NLL of every task that asks for short answers, so a task is a candidate for the one adapter that
    gains most on it. Of an adapter's candidates the one counts on which it removes the largest share of the base's NLL (all of
    them where they tie): a task that it merely helps most as a stranger is not its own, and gates that learn it as such get
    worse at the rest. An adapter trained for several tasks gets them by hand, in `assigned`. An adapter
    without a candidate (a duplicate, or a weak one) gets the task where it is furthest ahead of the others' mean, if it improves
    on the base there; one that improves nothing gets none.

    Args:
        nll_RT: mean NLL, row 0 the base, then one per adapter.
        assigned: adapter → tasks by hand; these replace its own, and nobody else gets them.
    """
    taken = {task for given in assigned.values() for task in given}
    best = _best(adapters, tasks, nll_RT)
    won: dict[str, list[int]] = {}
    for t, task in enumerate(tasks):
        if task in best and task not in taken:
            won.setdefault(best[task], []).append(t)
    own: dict[str, tuple[str, ...]] = {}
    mean_T = nll_RT[1:].mean(0)
    for e, name in enumerate(adapters, 1):
        if name in assigned:
            own[name] = tuple(assigned[name])
            continue
        removed = {tasks[t]: 1 - float(nll_RT[e, t] / nll_RT[0, t]) for t in won.get(name, ())}
        mine = [task for task, share in removed.items() if share >= max(removed.values()) - 1e-6]
        if not mine:
            lead = {
                task: float(mean_T[t] - nll_RT[e, t])
                for t, task in enumerate(tasks)
                if nll_RT[e, t] < nll_RT[0, t] and task not in taken
            }
            mine = [max(lead, key=lead.__getitem__)] if lead else []
        own[name] = tuple(mine)
    return own


def _best(adapters: Sequence[str], tasks: Sequence[str], nll_RT: Tensor) -> dict[str, str]:
    """Task → the adapter with the lowest NLL, where that is below the base's."""
    index_T = nll_RT.argmin(0).tolist()
    return {task: adapters[i - 1] for task, i in zip(tasks, index_T, strict=True) if i}


def measure(
    model: RoutedModel,
    shots: Shots,
    *,
    generate: bool = False,
    journal: Path | None = None,
    key: str = "",
    tokens: int = 2048,
    progress: Progress = silent,
    workers: Workers | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scores the base and every adapter of `model` on every shot: (nll, exact), each [N+1, tasks, K].

    A forward holds rows of many adapters; how they are batched depends neither on where an earlier run stopped nor on who computes.

    Args:
        generate: also answer every prompt, and compare.
        journal: finished rows are written there, and read again after an interruption.
        key: whatever else the scores depend on; a journal of another key is thrown away.
        tokens: padded tokens in one forward.
        workers: who computes; this process where None.
    """
    count = len(model.names) + 1
    tasks = list(shots)
    k = len(shots[tasks[0]])
    jobs = [(e, shot) for task in tasks for shot in shots[task] for e in range(count)]
    done = _Journal(journal, f"{model.names} {shots.sha256} {key}")
    fitting = Fitting(model, progress, workers)
    lengths = {shot: shot_length(model, shot) for task in tasks for shot in shots[task]}

    def run(what: str, work: Callable[[Any, _Block], list[float]], **limits: int) -> Tensor:
        blocks = by_length([lengths[shot] for _, shot in jobs], **limits)
        todo = [numbers for numbers in blocks if any((what, i) not in done for i in numbers)]
        step = progress(sum(map(len, todo)), "scoring" if what == "nll" else "answering")
        for number, values in fitting.workers.run(fitting, work, [[jobs[i] for i in numbers] for numbers in todo]):
            step(len(values), fitting.workers.about)
            done.write(what, todo[number], values)
        scores = torch.tensor([done[what, i] for i in range(len(jobs))])
        return scores.view(len(tasks), k, count).permute(2, 0, 1).contiguous()

    nll = run("nll", _score, tokens=tokens)
    return nll, run("exact", _match, rows=32) if generate else None


_Block = list[tuple[int, Shot]]  # what one forward holds: (adapter's number, 0 for the base; shot)


def _mixtures(model: RoutedModel, block: _Block) -> Tensor:
    return torch.eye(len(model.names) + 1)[[e for e, _ in block], 1:]


def _score(fitting: Fitting, block: _Block) -> list[float]:
    """Mean NLL of each."""
    rows, model = [shot for _, shot in block], fitting.model
    return mean_nll(model, rows, _mixtures(model, block), tokens=sys.maxsize)


def _match(fitting: Fitting, block: _Block) -> list[float]:
    """1.0 for each whose answer matched."""
    rows, model = [shot for _, shot in block], fitting.model
    limits = [len(completion_ids(model.source, row)) + 4 for row in rows]
    texts = answer(model, rows, _mixtures(model, block), max_new_tokens=limits, batch_size=len(rows))
    return [float(exact_match(text, row.completion)) for text, row in zip(texts, rows, strict=True)]


def exact_match(generated: str, reference: str) -> bool:
    """The first line of the answer, stripped, equals the stripped reference (a reference of several lines: the whole)."""
    reference = reference.strip()
    generated = generated.strip()
    return (generated if "\n" in reference else generated.split("\n")[0].strip()) == reference


class _Journal:
    """Finished scores, on disk as they come. A line that was cut off is ignored, and so is another run's journal."""

    def __init__(self, path: Path | None, run: str) -> None:
        self.path, self.scores = path, dict[tuple[str, int], float]()
        key = hashlib.sha256(run.encode()).hexdigest()
        if path is None:
            return
        lines = path.read_text(encoding="utf8").split("\n") if path.exists() else []
        if lines and lines[0] == key:
            for line in lines[1:-1]:
                what, numbers, values = json.loads(line)
                self.scores |= {(what, i): v for i, v in zip(numbers, values, strict=True)}
            write_text(path, "\n".join([key, *lines[1:-1]]) + "\n")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(key + "\n", encoding="utf8")

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self.scores

    def __getitem__(self, key: tuple[str, int]) -> float:
        return self.scores[key]

    def write(self, what: str, numbers: list[int], values: list[float]) -> None:
        self.scores |= {(what, i): v for i, v in zip(numbers, values, strict=True)}
        if self.path is not None:
            with self.path.open("a", encoding="utf8") as file:
                file.write(json.dumps([what, numbers, values]) + "\n")
