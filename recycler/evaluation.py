"""Is routing worth it? A routed model beside the base, the best single adapter, their average, and each task's own adapter.

Everything that needs no router is answered in shared batches by forced mixtures, on the same engine.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from recycler.profiles import exact_match
from recycler.routed import RoutedModel
from recycler.routers.base import Router
from recycler.scoring import Progress, answer, mean_nll, silent
from recycler.shots import Shot, Shots
from recycler.text import completion_ids
from recycler.zoo.errors import UsageError, choices

SCHEMA_VERSION = 1
BASELINES = ("base", "best single", "uniform", "oracle")
_RESAMPLES = 2000


@dataclass(frozen=True)
class Evaluation:
    """Scores per contender, task and row.

    Attributes:
        contenders: baselines first, then routers.
        routers: which of the contenders are routers.
        exact, nll: contender → task → one value per row.
        generated: contender → task → the answers.
        chosen: which adapters stand behind "best single" and "oracle", and how they were chosen.
    """

    contenders: tuple[str, ...]
    routers: tuple[str, ...]
    exact: Mapping[str, Mapping[str, Sequence[float]]] = field(repr=False)
    nll: Mapping[str, Mapping[str, Sequence[float]]] = field(repr=False)
    generated: Mapping[str, Mapping[str, Sequence[str]]] = field(repr=False)
    chosen: Mapping[str, Any]

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.exact[self.contenders[0]])

    def mean(self, contender: str, score: str = "exact") -> float:
        """Mean over tasks of the mean over rows."""
        return _mean([_mean(rows) for rows in getattr(self, score)[contender].values()])

    def interval(self, contender: str, minus: str | None = None, seed: int = 0) -> tuple[float, float]:
        """95 % bootstrap interval of the mean exact match, or of its difference to another contender on the same rows."""
        rng = random.Random(seed)
        means = []
        for _ in range(_RESAMPLES):
            total = []
            for task, rows in self.exact[contender].items():
                picked = rng.choices(range(len(rows)), k=len(rows))
                other = None if minus is None else self.exact[minus][task]
                total.append(_mean([rows[i] - (other[i] if other else 0.0) for i in picked]))
            means.append(_mean(total))
        means.sort()
        return means[int(0.025 * _RESAMPLES)], means[int(0.975 * _RESAMPLES) - 1]

    def verdict(self) -> str:
        """One line: does the best router beat the best of base, best single and uniform?"""
        plain = [c for c in self.contenders if c not in self.routers and c != "oracle"]
        rival = max(plain, key=self.mean)
        best = max(self.routers, key=self.mean)
        gain = self.mean(best) - self.mean(rival)
        low, high = self.interval(best, minus=rival)
        numbers = f"{best} {self.mean(best):.3f}, {rival} {self.mean(rival):.3f}: {gain:+.3f} [{low:+.3f}, {high:+.3f}]"
        if low > 0:
            return f"Routing helps: {numbers}."
        if high < 0:
            return f"Don't bother: routing loses to {rival} ({numbers})."
        return f"Don't bother: no gain that these rows can show ({numbers}). Use {rival}, or evaluate more rows."

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "contenders": {
                c: {
                    "exact": {task: _mean(rows) for task, rows in self.exact[c].items()},
                    "nll": {task: _mean(rows) for task, rows in self.nll[c].items()},
                    "mean_exact": self.mean(c),
                    "mean_nll": self.mean(c, "nll"),
                    "interval": list(self.interval(c)),
                    "router": c in self.routers,
                }
                for c in self.contenders
            },
            "rows": {task: len(rows) for task, rows in self.exact[self.contenders[0]].items()},
            "chosen": dict(self.chosen),
            "verdict": self.verdict(),
        }


def evaluate(
    model: RoutedModel,
    shots: Shots,
    *,
    routers: Mapping[str, Router] | None = None,
    owner: Mapping[str, str] | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    progress: Progress = silent,
) -> Evaluation:
    """Evaluates a model's router, and others over the same adapters, beside the baselines.

    Which adapter is the best single one, and which is a task's own, comes from the profile the router was built from. Where a
    router knows none (Arrow without shots), or a task was not in it, they are chosen by NLL on the rows evaluated: in
    hindsight, so the baselines only get stronger. `chosen` says which.

    Args:
        routers: label → router, instead of the model's own alone. One whose label is a baseline's gets "router" added to it.
        owner: task → its own adapter, by hand.
        max_new_tokens: per answer; by default what the reference needs and a little more.

    Raises:
        UsageError: there is no router or no row to evaluate, a router is for other adapters, or `owner` names an adapter or a
            task that is not there.
    """
    own_router = model.router
    routers = dict(routers) if routers is not None else {}
    if not routers:
        if own_router is None:
            raise UsageError("There is no router to evaluate.", "", "Compose a model with one.")
        routers = {own_router.method(): own_router}
    routers = {f"{label} router" if label in BASELINES else label: router for label, router in routers.items()}
    _check(model, shots, routers, owner or {})
    rows = [(task, shot) for task, some in shots.items() for shot in some]
    limits = [max_new_tokens or len(completion_ids(model.source, shot)) + 4 for _, shot in rows]
    facts = [r.facts.get("profile") or {} for r in ([own_router] if own_router else []) + list(routers.values())]
    known = next((f for f in facts if f), {})
    names = model.names
    single, owners, chosen = _choose(model, shots, known, dict(owner or {}), progress)

    def one_hot(name: str | None) -> torch.Tensor:
        return torch.tensor([float(other == name) for other in names])

    forced = {
        "base": lambda task: one_hot(None),
        "best single": lambda task: one_hot(single),
        "uniform": lambda task: torch.full((len(names),), 1 / len(names)),
        "oracle": lambda task: one_hot(owners.get(task)),
    }
    texts: dict[str, list[str]] = {}
    losses: dict[str, list[float]] = {}
    labels = [*forced, *routers]
    step = progress(2 * len(rows) * len(labels), "evaluating")
    shots_N = [shot for _, shot in rows]
    # All baselines in one list: a batch then holds rows of one length, whoever answers them.
    weights = torch.stack([forced[label](task) for label in forced for task, _ in rows])
    repeated: list[Shot] = shots_N * len(forced)
    all_losses = mean_nll(model, repeated, weights, step=step)
    all_texts = answer(model, repeated, weights, max_new_tokens=limits * len(forced), batch_size=batch_size, step=step)
    for number, label in enumerate(forced):
        span = slice(number * len(rows), (number + 1) * len(rows))
        losses[label], texts[label] = all_losses[span], all_texts[span]
    try:
        for label, router in routers.items():
            model.use(router)
            losses[label] = mean_nll(model, shots_N, step=step)
            texts[label] = answer(model, shots_N, max_new_tokens=limits, batch_size=batch_size, step=step)
    finally:
        model.use(own_router)

    def by_task(values: Sequence[Any]) -> dict[str, list[Any]]:
        table: dict[str, list[Any]] = {task: [] for task in shots}
        for (task, _), value in zip(rows, values, strict=True):
            table[task].append(value)
        return table

    matches = {
        label: [float(exact_match(text, shot.completion)) for text, shot in zip(texts[label], shots_N, strict=True)]
        for label in labels
    }
    return Evaluation(
        contenders=tuple(labels),
        routers=tuple(routers),
        exact={label: by_task(matches[label]) for label in labels},
        nll={label: by_task(losses[label]) for label in labels},
        generated={label: by_task(texts[label]) for label in labels},
        chosen=chosen,
    )


def _check(model: RoutedModel, shots: Shots, routers: Mapping[str, Router], owner: Mapping[str, str]) -> None:
    """Finds what is wrong before the long work."""
    if not shots or not all(shots.values()):
        raise UsageError("There are no rows to evaluate.", "", "Give JSONL files, one task each.")
    for task, name in owner.items():
        if task not in shots:
            raise UsageError(f"There is no task {task!r} here.", "", f"Choose {choices(shots)}.")
        if name not in model.names:
            raise UsageError(f"There is no adapter {name!r} in this model.", "", f"Choose {choices(model.names)}.")
    own = model.router
    try:
        for router in routers.values():
            model.use(router)
    finally:
        model.use(own)


def _choose(
    model: RoutedModel, shots: Shots, known: Mapping[str, Any], owners: dict[str, str], progress: Progress
) -> tuple[str | None, dict[str, str], dict[str, Any]]:
    """(best single adapter or None for the base, task → own adapter, how they were chosen)."""
    by_profile = {task: name for task, name in known.get("owner", {}).items() if task in shots and task not in owners}
    how = {task: "by hand" for task in owners} | {task: "by profile" for task in by_profile}
    owners = {**by_profile, **owners}
    # A profile that scored a task and found nobody better than the base settles it too.
    scored = set(known.get("tasks", ()))
    open_tasks = [task for task in shots if task not in owners and task not in scored]
    single = known.get("best_single")
    how_single = "by profile"
    if open_tasks or "best_single" not in known:
        tasks = list(shots) if "best_single" not in known else open_tasks
        jobs = [(task, shot) for task in tasks for shot in shots[task]]
        count = len(model.names) + 1
        weights = torch.eye(count)[:, 1:].repeat(len(jobs), 1)
        repeated = [shot for _, shot in jobs for _ in range(count)]
        losses_NR = torch.tensor(mean_nll(model, repeated, weights, step=progress(len(repeated), "choosing baselines")))
        losses_NR = losses_NR.view(len(jobs), count)
        mean_R = {task: losses_NR[[i for i, (t, _) in enumerate(jobs) if t == task]].mean(0) for task in tasks}
        for task in open_tasks:
            index = int(mean_R[task].argmin())
            how[task] = "in hindsight"
            if index:
                owners[task] = model.names[index - 1]
        if "best_single" not in known:
            index = int(torch.stack(list(mean_R.values())).mean(0).argmin())
            single, how_single = (model.names[index - 1] if index else None), "in hindsight"
    chosen = {
        "best_single": {"adapter": single or "base", "how": how_single},
        "oracle": {task: {"adapter": owners.get(task, "base"), "how": how.get(task, "by profile")} for task in shots},
    }
    return single, owners, chosen


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
