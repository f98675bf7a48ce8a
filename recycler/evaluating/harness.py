"""lm-evaluation-harness's tasks for a routed model, which is never shown alone: beside it stand the base, the best single adapter
where a profile named one, and the uniform average, on the same rows.

The model type itself is in `lm_eval_model`.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recycler.evaluating.evaluation import BASELINES, Evaluation
from recycler.evaluating.exam import using
from recycler.routed import RoutedModel
from recycler.routers.base import Router
from recycler.scoring import Progress, silent
from recycler.zoo.errors import InputError, RecycleError, UsageError, shorten

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Harness:
    """What lm-eval measured.

    Attributes:
        contenders: baselines first, then routers.
        routers: which of the contenders are routers.
        scores: contender → task or group → metric, as lm-eval spells it ("acc,none") → value.
        metric: task → the metric that the verdict reads: the task's first that is better when higher and has a value for each row.
        rows: contender → task → that metric's value of each row.
        chosen: the adapter behind "best single", where there is one.
    """

    contenders: tuple[str, ...]
    routers: tuple[str, ...]
    scores: Mapping[str, Mapping[str, Mapping[str, float]]]
    metric: Mapping[str, str]
    rows: Mapping[str, Mapping[str, Sequence[float]]] = field(repr=False)
    chosen: str | None = None

    @cached_property
    def judged(self) -> Evaluation:
        """The rows of all tasks that have a metric to judge by."""
        return Evaluation(self.contenders, self.routers, self.rows, {}, {}, {})

    def verdict(self) -> str:
        """One line: does the best router beat the best of the baselines?"""
        if not self.metric:
            return "No verdict: these tasks have no metric that is better when higher and has a value for each row."
        return self.judged.verdict()

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {
            "schema_version": SCHEMA_VERSION,
            "contenders": {
                c: {
                    "scores": self.scores[c],
                    "router": c in self.routers,
                    **({"mean": self.judged.mean(c), "interval": list(self.judged.interval(c))} if self.metric else {}),
                }
                for c in self.contenders
            },
            "metric": dict(self.metric),
            "rows": {task: len(values) for task, values in self.rows[self.contenders[0]].items()},
            "best_single": self.chosen,
            "verdict": self.verdict(),
        }


def require_lm_eval() -> None:
    """Raises UsageError where lm-eval is not installed; asked before a model is loaded."""
    if find_spec("lm_eval") is None:
        raise UsageError(
            "lm-evaluation-harness is not installed.", "", "Run: pip install 'recycler[lm-eval]'", code="E_MISSING_EXTRA"
        )


def harness(
    model: RoutedModel,
    tasks: Sequence[str],
    *,
    routers: Mapping[str, Router] | None = None,
    path: str | Path | None = None,
    rows: int | None = None,
    batch_size: int = 32,
    progress: Progress = silent,
) -> Harness:
    """Runs lm-eval's tasks for a model's router, and others over the same adapters, beside the baselines.

    Args:
        tasks: names of tasks, groups or tags, or patterns of them.
        routers: label → router, instead of the model's own alone. One whose label is a baseline's gets "router" added to it.
        path: a folder with task files of one's own.
        rows: at most this many of each task, from the top.

    Raises:
        UsageError: lm-eval is not installed, there is no such task, no router, or one for other adapters. InputError: a task
            cannot be loaded.
    """
    require_lm_eval()
    from recycler.lm_eval_model import RecyclerLM

    if path is not None and not Path(path).is_dir():
        raise UsageError(
            f"There is no folder {path}.", "", "Give --lm-eval-path the folder that holds the task files.", code="E_NO_FILE"
        )
    own = model.router
    routers = dict(routers) if routers else {} if own is None else {own.method(): own}
    if not routers:
        raise UsageError("There is no router to evaluate.", "", "Compose a model with one.")
    routers = {f"{label} router" if label in BASELINES else label: router for label, router in routers.items()}
    for router in routers.values():  # those of other adapters are refused before the long work
        with using(model, router):
            pass
    mixtures, single = _baselines(model, [*([own] if own else []), *routers.values()])
    contenders: dict[str, tuple[Router | None, Tensor | None]] = {label: (own, w_E) for label, w_E in mixtures.items()}
    contenders |= {label: (router, None) for label, router in routers.items()}
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found: dict[str, Any] = {}
    step = progress(len(contenders), "lm-eval")
    # On a terminal lm-eval shows its own bars; elsewhere they would be noise.
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO()):
        loaded = _loaded(tasks, path)
    for label, (router_or_own, weights_E) in contenders.items():
        with using(model, router_or_own), nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO()):
            lm = RecyclerLM(model, weights=weights_E, batch_size=batch_size)
            found[label] = _run(lm, loaded, rows)
        step(1, label)
    return _collected(found, tuple(routers), single)


def _baselines(model: RoutedModel, routers: Sequence[Router]) -> tuple[dict[str, Tensor], str | None]:
    """(baseline → its mixture [E], the best single adapter that a router remembers of its profile)."""
    facts = [(router.facts.get("profile") or {}) for router in routers]
    single = next((name for known in facts if (name := known.get("best_single")) in model.names), None)
    count = len(model.names)
    mixtures = {"base": torch.zeros(count)}
    if single is not None:
        mixtures["best single"] = torch.tensor([float(name == single) for name in model.names])
    mixtures["uniform"] = torch.full((count,), 1 / count)
    return mixtures, single


def _loaded(tasks: Sequence[str], path: str | Path | None) -> dict[str, Any]:
    """lm-eval's tasks and groups that were asked for, read once for all contenders."""
    from lm_eval.tasks import TaskManager

    # Its own thousands take seconds to index, and are not needed where all are in one's own folder.
    manager = None if path is None else TaskManager(include_path=str(path), include_defaults=False)
    if manager is None or not all(manager.match_tasks([task]) for task in tasks):
        manager = TaskManager(include_path=None if path is None else str(path))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown or not tasks:
        raise UsageError(
            f"lm-eval has no task {shorten(unknown)}." if unknown else "No tasks were named.",
            "",
            "List them with `lm-eval ls tasks`; --lm-eval-path DIR adds a folder of your own.",
            code="E_UNKNOWN",
        )
    names = list(dict.fromkeys(name for task in tasks for name in manager.match_tasks([task])))
    with _explained(names):
        loaded: dict[str, Any] = manager.load(names)
    return loaded


def _run(lm: Any, loaded: Mapping[str, Any], rows: int | None) -> dict[str, Any]:
    """As lm-eval's `simple_evaluate` with its defaults, without what it finds out about the machine each time."""
    import numpy
    from lm_eval import evaluate
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    numpy.random.seed(DEFAULT_OTHER_SEED)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    with _explained(loaded["tasks"]):
        result: dict[str, Any] = evaluate(lm, loaded, limit=rows, bootstrap_iters=0)
    return result


@contextmanager
def _explained(names: Iterable[str]) -> Iterator[None]:
    """Turns whatever a dataset or a task file does wrong into an error of ours."""
    try:
        yield
    except RecycleError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:
        said = str(error).strip().split("\n")[0]
        raise InputError(
            f"lm-eval could not run {shorten(names)}.",
            f"{type(error).__name__}: {said}",
            "Its own command says more: python -m recycler.lm_eval_model run --help",
        ) from error


def _collected(found: Mapping[str, Mapping[str, Any]], routers: tuple[str, ...], single: str | None) -> Harness:
    scores = {
        label: {
            task: {name: float(value) for name, value in values.items() if _is_score(name, value)}
            for task, values in result["results"].items()
        }
        for label, result in found.items()
    }
    first = next(iter(found.values()))
    metric: dict[str, str] = {}
    for task, samples in first["samples"].items():
        higher = first["higher_is_better"].get(task, {})
        for key in scores[next(iter(found))].get(task, {}):
            name, _, which = key.partition(",")
            values = [sample.get(name) for sample in samples if sample["filter"] == which]
            if higher.get(name) and values and all(isinstance(value, (int, float)) for value in values):
                metric[task] = key
                break
    rows = {
        label: {
            task: [float(s[key.partition(",")[0]]) for s in result["samples"][task] if s["filter"] == key.partition(",")[2]]
            for task, key in metric.items()
        }
        for label, result in found.items()
    }
    return Harness(tuple(found), routers, scores, metric, rows, single)


def _is_score(name: str, value: Any) -> bool:
    return "," in name and "_stderr," not in name and isinstance(value, (int, float))


def harness_table(result: Harness) -> None:
    """Every task's metrics, contenders side by side, the mean with its interval, and the verdict."""
    import click

    from recycler.terminal import say, table

    lines: list[list[str]] = []
    for task, metrics in result.scores[result.contenders[0]].items():
        for key in metrics:
            name, _, which = key.partition(",")
            judged = "*" if result.metric.get(task) == key else ""
            values = [result.scores[c][task].get(key) for c in result.contenders]
            shown = [f"{name}{judged}" + (f" ({which})" if which != "none" else "")]
            lines.append([task, *shown, *("–" if value is None else f"{value:.3f}" for value in values)])
    if result.metric:
        lines.append(["mean of *", "", *(f"{result.judged.mean(c):.3f}" for c in result.contenders)])
        intervals = [result.judged.interval(c) for c in result.contenders]
        lines.append(["95 % interval", "", *(f"{low:.2f}–{high:.2f}" for low, high in intervals)])
    table(["task", "metric", *result.contenders], lines, right=2)
    if result.chosen:
        say(f"best single: {result.chosen} (by profile)")
    click.echo(result.verdict())
