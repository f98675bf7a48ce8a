"""Is routing worth it? A routed model beside the base, the best single adapter, their average, and each task's own adapter.

Everything that needs no router is answered in shared batches by forced mixtures, on the same engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recycler.evaluating.exam import Exam, Paper, gate_bytes, pace
from recycler.routed import RoutedModel
from recycler.routers.base import Router
from recycler.scoring import Progress, mean_nll, silent
from recycler.shots import Shots
from recycler.zoo.errors import UsageError, choices

SCHEMA_VERSION = 1
BASELINES = ("base", "best single", "uniform", "oracle")
BEYOND = "beyond the zoo: don't bother"
UNTOLD = "too few rows to tell"
_NOTEWORTHY = 0.1  # a gain that is not clear, and that nobody should be told to forget
_RESAMPLES = 4000


@dataclass(frozen=True)
class Evaluation:
    """Scores per contender, task and row.

    Attributes:
        contenders: baselines first, then routers.
        routers: which of the contenders are routers.
        exact, nll: contender → task → one value per row.
        generated: contender → task → the answers.
        chosen: which adapters stand behind "best single" and "oracle", and how they were chosen.
        seconds: contender → (seconds a row, the bare base's at the same time), on a few rows with a few tokens each.
        size: router → bytes it takes beside base and adapters.
    """

    contenders: tuple[str, ...]
    routers: tuple[str, ...]
    exact: Mapping[str, Mapping[str, Sequence[float]]] = field(repr=False)
    nll: Mapping[str, Mapping[str, Sequence[float]]] = field(repr=False)
    generated: Mapping[str, Mapping[str, Sequence[str]]] = field(repr=False)
    chosen: Mapping[str, Any]
    seconds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    size: Mapping[str, int] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.exact[self.contenders[0]])

    def mean(self, contender: str, score: str = "exact") -> float:
        """Mean over tasks of the mean over rows."""
        return _mean([_mean(rows) for rows in getattr(self, score)[contender].values()])

    def interval(
        self, contender: str, minus: str | None = None, seed: int = 0, level: float = 0.95, tasks: Sequence[str] | None = None
    ) -> tuple[float, float]:
        """Bootstrap interval of the mean exact match, or of its difference to another contender on the same rows.

        Args:
            level: of confidence. tasks: only these.
        """
        rows = [self.difference(contender, minus, task) for task in (self.tasks if tasks is None else tasks)]
        return bootstrap(rows, level, seed)

    def difference(self, contender: str, minus: str | None, task: str) -> list[float]:
        """Exact match row by row, less another contender's on the same rows."""
        own = self.exact[contender][task]
        return list(own) if minus is None else [a - b for a, b in zip(own, self.exact[minus][task], strict=True)]

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

    def by_task(self) -> dict[str, dict[str, Any]]:
        """Task by task: does the best router beat the base there, and does anything?

        The best of many is looked for on the rows that judge it, so that each comparison with the base must hold at 95 % divided
        among all of them (Bonferroni). ``verdict`` is "routing helps"; "don't bother" where something scores clearly above the base,
        and no router; where nothing does, "too few rows to tell" if something gains a tenth all the same, else "beyond the zoo:
        don't bother".
        """
        level = 1 - 0.05 / max(len(self.contenders) - 1, 1)
        result = {}
        for task in self.tasks:
            gain = {c: _mean(self.difference(c, "base", task)) for c in self.contenders}
            low = {c: self.interval(c, "base", level=level, tasks=[task])[0] for c in self.contenders if gain[c] > 0}
            clear = [c for c in low if low[c] > 0]
            router = max(self.routers, key=gain.__getitem__)
            best = max(self.contenders, key=gain.__getitem__)
            if router in clear:
                said = "routing helps"
            elif clear:
                said = "don't bother"
            else:
                said = UNTOLD if gain[best] >= _NOTEWORTHY else BEYOND
            result[task] = {
                "router": router,
                "router_exact": _mean(self.exact[router][task]),
                "base_exact": _mean(self.exact["base"][task]),
                "gain": gain[router],
                "interval": list(self.interval(router, "base", level=level, tasks=[task])),
                "best": best,
                "best_exact": _mean(self.exact[best][task]),
                "verdict": said,
            }
        return result

    @property
    def beyond(self) -> tuple[str, ...]:
        """Tasks where nothing scores clearly above the base, nor seems to."""
        return self._told(BEYOND)

    @property
    def untold(self) -> tuple[str, ...]:
        """Tasks where something seems to score above the base, and there are too few rows to say so."""
        return self._told(UNTOLD)

    def _told(self, verdict: str) -> tuple[str, ...]:
        return tuple(task for task, found in self.by_task().items() if found["verdict"] == verdict)

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
                    **(
                        {"seconds_per_row": self.seconds[c][0], "base_seconds_per_row": self.seconds[c][1]}
                        if c in self.seconds
                        else {}
                    ),
                    **({"router_bytes": self.size[c]} if c in self.size else {}),
                }
                for c in self.contenders
            },
            "rows": {task: len(rows) for task, rows in self.exact[self.contenders[0]].items()},
            "chosen": dict(self.chosen),
            "verdict": self.verdict(),
            "by_task": self.by_task(),
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
    facts = [r.facts.get("profile") or {} for r in ([own_router] if own_router else []) + list(routers.values())]
    # What a profile says of adapters that a router was merged from is nothing this model could be set beside.
    known = next((f for f in facts if f and {*f["owner"].values(), f["best_single"]} <= {*model.names, None}), {})
    rows = [(task, shot) for task, some in shots.items() for shot in some]
    plain, chosen = baselines(model, shots, known, owner or {}, progress)
    exam = Exam.of(model, rows, max_new_tokens, batch_size)
    labels = [*BASELINES, *routers]
    step = progress(2 * len(rows) * len(labels), "evaluating")
    mixed = {label: torch.stack([plain[label][task] for task, _ in rows]) for label in BASELINES}
    mixed |= {label: w_NE for label, router in routers.items() if (w_NE := exam.mixtures(model, router)) is not None}
    # All mixtures in one list: a batch then holds rows of one length, whoever answers them.
    papers = dict(zip(mixed, exam.mixed(model, [*mixed.values()], step), strict=True))
    papers |= {label: exam.routed(model, router, step) for label, router in routers.items() if label not in papers}
    paces = {label: pace(model, exam, plain[label][rows[0][0]]) for label in BASELINES[:3]}
    paces["oracle"] = paces["best single"]  # whichever it is, one adapter
    paces |= {label: pace(model, exam, router) for label, router in routers.items()}
    return result_of(
        [task for task, _ in rows],
        {label: papers[label] for label in labels},
        tuple(routers),
        chosen,
        seconds=paces,
        size={label: gate_bytes(router) for label, router in routers.items()},
    )


def result_of(
    tasks: Sequence[str],
    papers: Mapping[str, Paper],
    routers: tuple[str, ...],
    chosen: Mapping[str, Any],
    *,
    seconds: Mapping[str, tuple[float, float]] | None = None,
    size: Mapping[str, int] | None = None,
) -> Evaluation:
    """Contenders' answers to the same rows, sorted by task.

    Args:
        tasks: each row's.
    """

    def by_task(values: Sequence[Any]) -> dict[str, list[Any]]:
        table: dict[str, list[Any]] = {task: [] for task in dict.fromkeys(tasks)}
        for task, value in zip(tasks, values, strict=True):
            table[task].append(value)
        return table

    tables = {
        kind: {label: by_task(getattr(paper, kind)) for label, paper in papers.items()}
        for kind in ("exact", "nll", "generated")
    }
    return Evaluation(tuple(papers), routers, **tables, chosen=chosen, seconds=seconds or {}, size=size or {})


def _check(model: RoutedModel, shots: Shots, routers: Mapping[str, Router], owner: Mapping[str, str]) -> None:
    """Finds what is wrong before the long work."""
    if not shots or not all(shots.values()):
        raise UsageError("There are no rows to evaluate.", "", "Give JSONL files, one task each.")
    for task, name in owner.items():
        if task not in shots:
            raise UsageError(f"There is no task {task!r} here.", "", f"Choose {choices(shots, task)}.", code="E_UNKNOWN")
        if name not in model.names:
            raise UsageError(
                f"There is no adapter {name!r} in this model.", "", f"Choose {choices(model.names, name)}.", code="E_UNKNOWN"
            )
    own = model.router
    try:
        for router in routers.values():
            model.use(router)
    finally:
        model.use(own)


def baselines(
    model: RoutedModel,
    shots: Shots,
    known: Mapping[str, Any],
    owner: Mapping[str, str],
    progress: Progress = silent,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(baseline → task → its mixture [E], which adapters stand behind them and how they were chosen).

    Args:
        known: what a router remembers of its profile (`Profile.summary`), or nothing.
        owner: task → its own adapter, by hand.
    """
    single, owners, chosen = _choose(model, shots, known, dict(owner), progress)
    names = model.names

    def one_hot(name: str | None) -> Tensor:
        return torch.tensor([float(other == name) for other in names])

    return {
        "base": {task: one_hot(None) for task in shots},
        "best single": {task: one_hot(single) for task in shots},
        "uniform": {task: torch.full((len(names),), 1 / len(names)) for task in shots},
        "oracle": {task: one_hot(owners.get(task)) for task in shots},
    }, chosen


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


def bootstrap(
    rows: Sequence[Sequence[float]], level: float = 0.95, seed: int = 0, weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """Interval of the mean over tasks of the mean over rows: rows are drawn again with replacement, within their task. The same
    seed draws the same rows, whoever's scores they are.

    Args:
        rows: each task's values.
        weights: of the tasks; by default all count the same.
    """
    generator = torch.Generator().manual_seed(seed)
    mean_R = torch.zeros(_RESAMPLES, dtype=torch.float64)
    for values, weight in zip(rows, weights or [1 / len(rows)] * len(rows), strict=True):
        drawn_RN = torch.randint(len(values), (_RESAMPLES, len(values)), generator=generator)
        mean_R += torch.tensor(values, dtype=torch.float64)[drawn_RN].mean(1) * weight
    mean_R = mean_R.sort().values
    tail = (1 - level) / 2
    low, high = float(mean_R[int(tail * _RESAMPLES)]), float(mean_R[-1 - int(tail * _RESAMPLES)])
    return round(low, 12), round(high, 12)  # a difference of nothing is nothing, and not 1e-17


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
