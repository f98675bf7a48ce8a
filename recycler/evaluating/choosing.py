"""`build-router auto`: the method that answers left-out shots best, fitted on all of them.

The shots of every task are dealt into folds. Each candidate is fitted as often as there are folds, each time on the others, and
answers the fold that it has not seen; it is judged by the mean exact match over tasks, ties by NLL, and then by what it costs. Who
is clearly behind after some of the folds is spared the others. To see how it does on tasks that no adapter was trained for, a few tasks are taken away together with the adapter that is theirs, and
asked afterwards.

Dimensions in names: R base and adapters, T task, K shot.
"""

from __future__ import annotations

import inspect
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, cast

import torch

from recycler import build, sharding
from recycler.base import Base
from recycler.build import profile_folder, read_adapters, subject
from recycler.evaluating.contenders import DOUBLES, Contender, contenders
from recycler.evaluating.evaluation import bootstrap
from recycler.evaluating.exam import Exam, Paper
from recycler.profiles import Profile
from recycler.routed import RoutedModel
from recycler.routers.base import Router, check_output
from recycler.routers.discovery import make_config, methods
from recycler.scoring import Progress, silent
from recycler.selection import narrowed
from recycler.shots import Shots
from recycler.zoo.errors import InputError, RecycleError, UsageError
from recycler.zoo.store import Zoo, require_writable

_KINDS = ("static", "sequence", "token")


@dataclass(frozen=True)
class AutoConfig:
    """
    Attributes:
        methods: the candidates, as in ``bench-routers --methods``; by default all that need no training.
        folds: into how many parts each task's shots are dealt.
        unseen: how many tasks are taken away with their adapters, to be asked afterwards; 0 saves that time.
        patience: seconds that a candidate's first fit may take, unless it was named in `methods`.
    """

    methods: str | None = None
    folds: int = 4
    unseen: int = 2
    patience: float = 120.0

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise UsageError(
                f"folds={self.folds}.",
                "One part is left out, and something must be left.",
                "Use folds=2 or more.",
                code="E_OPTION",
            )
        if self.unseen < 0:
            raise UsageError(f"unseen={self.unseen}.", "It is a number of tasks.", "Use unseen=0 or more.", code="E_OPTION")
        if not self.patience > 0:
            raise UsageError(
                f"patience={self.patience}.", "It is a number of seconds.", "Use a positive number.", code="E_OPTION"
            )


def auto_config(given: Mapping[str, Any]) -> AutoConfig:
    """From keywords, or from the strings of ``-o key=value``. Raises UsageError as `make_config` does for a method."""

    class Auto:
        Config = AutoConfig

        @staticmethod
        def method() -> str:
            return "auto"

    config: AutoConfig = make_config(cast("type[Router]", Auto), given)
    return config


@dataclass
class Trial:
    """How a candidate did on left-out shots.

    Attributes:
        rows: task → (exact match, NLL) of each.
        unseen: exact match on tasks whose adapter was taken away.
        seconds: of one fit.
        kind: what one of its decisions is for.
        papers: its answers, a fold each.
    """

    rows: dict[str, list[tuple[float, float]]] = field(default_factory=dict, repr=False)
    unseen: float | None = None
    seconds: float = 0.0
    kind: str = "static"
    papers: list[Paper] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, papers: list[Paper], sets: Sequence[tuple[Profile, Exam]], seconds: float = 0.0, kind: str = "static") -> Trial:
        rows: dict[str, list[tuple[float, float]]] = {}
        for paper, (_, exam) in zip(papers, sets, strict=False):  # it may have dropped out after some folds
            for task, exact, nll in zip(exam.tasks, paper.exact, paper.nll, strict=True):
                rows.setdefault(task, []).append((exact, nll))
        return cls(rows, None, seconds, kind, papers)

    @property
    def exact(self) -> float:
        """Mean over tasks of the mean over shots."""
        return _mean([_mean([exact for exact, _ in some]) for some in self.rows.values()])

    @property
    def nll(self) -> float:
        return _mean([_mean([nll for _, nll in some]) for some in self.rows.values()])

    @property
    def order(self) -> tuple[float, float, int, float]:
        """Best first."""
        return -round(self.exact, 6), round(self.nll, 4), _KINDS.index(self.kind), self.seconds

    def to_json(self) -> dict[str, Any]:
        result = {"exact": round(self.exact, 4), "nll": round(self.nll, 4), "folds": len(self.papers)}
        return result | ({} if self.unseen is None else {"unseen": round(self.unseen, 4)}) | {"seconds": round(self.seconds, 1)}


def behind(trial: Trial, leader: Trial) -> bool:
    """Whether the leader is so far ahead, on the same shots, that more of them would not change it: the 99 % interval of the
    difference lies above nothing."""
    ahead = [
        [first - other for (first, _), (other, _) in zip(leader.rows[task], rows, strict=True)]
        for task, rows in trial.rows.items()
    ]
    return bootstrap(ahead, level=0.99)[0] > 0


@wraps(build.build_router)
def build_router(method: str, *given: Any, **options: Any) -> Router:
    """`recycler.build.build_router`, and "auto" beside the methods: several are tried on left-out shots."""
    if method != "auto":
        return build.build_router(method, *given, **options)
    known = inspect.signature(build_auto).parameters
    config = {key: value for key, value in options.items() if key not in known}
    profile = given[0] if given else options.get("profile")
    return build_auto(config, profile, **{key: value for key, value in options.items() if key in known and key != "profile"})


def build_auto(
    config: Mapping[str, Any],
    profile: Profile | str | Path | None,
    *,
    zoo: Zoo | None = None,
    base: str | Base | None = None,
    adapters: Iterable[str] | None = None,
    out: str | Path | None = None,
    assign: Mapping[str, str | Iterable[str]] | None = None,
    subtract: Any = None,
    select: str | None = None,
    count: int | None = None,
    force: bool = False,
    engine: Any = None,
    progress: Progress = silent,
    loading: dict[str, Any] | None = None,
) -> Router:
    """Tries candidates on left-out shots, and fits the best one on all. ``router.report["auto"]`` says how each did.

    Args:
        config: of AutoConfig. The others as of `recycler.build_router`.

    Raises:
        UsageError: no profile, or more folds than shots. InputError: no candidate could be fitted.
    """
    settings = auto_config(config)
    if engine not in (None, "local"):
        raise UsageError(
            "auto has no work that workers could share.",
            "It tries methods that are fitted in one piece.",
            "Leave --engine out.",
        )
    if sharding.together():
        raise UsageError(
            "auto is not for several processes.", "It tries methods in one.", "Name a method, or start one process."
        )
    if profile is None:
        raise UsageError("auto chooses by shots, and no profile was given.", "", "Add --profile NAME.", code="E_NEEDS_PROFILE")
    zoo = Zoo() if zoo is None else zoo
    if out is not None:
        check_output(Path(out), force)
        require_writable(Path(out))
    entries = contenders(settings.methods or _cheap())
    if not isinstance(profile, Profile):
        profile = Profile.load(profile_folder(zoo, profile))
    selection = narrowed(zoo, profile, adapters, assign, select, count)
    adapters = adapters if selection is None else selection.names
    profile, loaded = subject(zoo, profile, base=base, adapters=adapters, assign=assign, loading=loading)
    shots = profile.nll.shape[-1]
    if shots < settings.folds:
        raise UsageError(
            f"Profile {profile.name} has {shots} shot{'s' * (shots > 1)} a task, and folds={settings.folds}.",
            "Each part needs one.",
            "Profile with a larger --kshot, or use -o folds=2.",
            code="E_OPTION",
        )
    work = _Work(zoo, profile, loaded, settings, subtract, progress)
    trials, failed = work.trials(entries)
    if not any(one.label in trials for one in entries):
        why = "; ".join(f"{label}: {text}" for label, text in failed.items())
        raise InputError("None of the candidates could be fitted.", why, "Name others with -o methods=A,B.")
    tried = [one for one in entries if one.label in trials]
    tried = [one for one in tried if len(trials[one.label].papers) == settings.folds]
    work.unseen(trials, tried)
    best = min(tried, key=lambda one: trials[one.label].order)
    given = {"subtract": subtract, **best.keywords}
    router = build.build_router(
        best.method, profile, zoo=zoo, base=loaded, adapters=profile.adapters, progress=progress, **given
    )
    router.report |= {} if selection is None else {"selected": dict(selection.reasons)}
    router.report["auto"] = {
        "chosen": best.label,
        "verdict": _verdict(best.label, trials),
        "folds": settings.folds,
        "table": {label: one.to_json() for label, one in sorted(trials.items(), key=lambda pair: pair[1].order)},
        "failed": failed,
    }
    if out is not None:
        router.save(Path(out), force=force)
    return router


def _cheap() -> list[str]:
    return [name for name, cls in methods().items() if not cls.trains and name not in DOUBLES and name != "random"]


def _verdict(best: str, trials: Mapping[str, Trial]) -> str:
    plain = max(("base", "best single", "uniform"), key=lambda label: trials[label].exact)
    ahead = trials[best].exact - trials[plain].exact
    if ahead <= 0:
        return f"don't bother: on left-out shots {plain} answers as much ({trials[plain].exact:.3f})"
    return f"{best} {trials[best].exact:.3f} exact match on left-out shots, {plain} {trials[plain].exact:.3f}"


class _Work:
    """What all candidates share: the base with its adapters, and the folds."""

    def __init__(self, zoo: Zoo, profile: Profile, loaded: Base, config: AutoConfig, subtract: Any, progress: Progress) -> None:
        self.zoo, self.profile, self.loaded, self.config, self.progress = zoo, profile, loaded, config, progress
        self.subtract = subtract
        self.parts = deal(profile, config.folds)

    def trials(self, entries: Sequence[Contender]) -> tuple[dict[str, Trial], dict[str, str]]:
        """Label → how it did on left-out shots, baselines first; and what went wrong with the others."""
        model = RoutedModel(self.loaded, read_adapters(self.zoo, self.profile.adapters, self.loaded))
        try:
            sets: list[tuple[Profile, Exam]] = []
            for part in self.parts:
                kept = {task: [k for k in range(self.profile.nll.shape[-1]) if k not in part[task]] for task in part}
                rows = [(task, self.profile.shots[task][k]) for task in part for k in part[task]]
                sets.append((keep_shots(self.profile, kept), Exam.of(model, rows)))
            papers: dict[str, list[Paper]] = {"base": [], "best single": [], "uniform": []}
            step = self.progress(2 * len(papers) * sum(len(exam) for _, exam in sets), "baselines")
            for rest, exam in sets:
                single = [float(name == rest.best_single) for name in model.names]
                mixtures_E = [[0.0] * len(single), single, [1 / len(single)] * len(single)]
                found = exam.mixed(model, [torch.tensor(w_E).expand(len(exam), -1) for w_E in mixtures_E], step)
                for label, paper in zip(papers, found, strict=True):
                    papers[label].append(paper)
            trials = {label: Trial.of(some, sets) for label, some in papers.items()}
            failed: dict[str, str] = {}
            racing = {one.label: (one, Trial()) for one in entries}
            for number, (rest, exam) in enumerate(sets, 1):
                for label, (one, trial) in list(racing.items()):
                    try:
                        router, seconds = self._fit(model, one, rest)
                        if not self.config.methods and seconds > self.config.patience:
                            raise UsageError(
                                f"It takes {seconds:.0f} s to fit.", "", "Name it in methods to try it all the same."
                            )
                        some = [*trial.papers, self._answers(model, router, exam)]
                        racing[label] = one, Trial.of(some, sets, max(seconds, trial.seconds), router.granularity)
                    except Exception as error:  # the others go on
                        failed[label] = str(error) if isinstance(error, RecycleError) else f"{type(error).__name__}: {error}"
                        del racing[label]
                if racing and number < len(sets):
                    leader = min((trial for _, trial in racing.values()), key=lambda trial: trial.order)
                    dropped = {label: trial for label, (_, trial) in racing.items() if behind(trial, leader)}
                    trials |= dropped
                    racing = {label: pair for label, pair in racing.items() if label not in dropped}
            trials |= {label: trial for label, (_, trial) in racing.items()}
        finally:
            model.engine.detach()
        return trials, failed

    def unseen(self, trials: Mapping[str, Trial], tried: Sequence[Contender]) -> None:
        """Fills in how candidates do on tasks that were taken away together with their adapters."""
        profile = self.profile
        owned = sorted(task for task, name in profile.owner.items() if name)
        tasks = random.Random(f"{profile.seed} unseen").sample(owned, min(self.config.unseen, len(owned)))
        found: dict[str, list[float]] = {}
        for task in tasks:
            owners = {profile.owner[task], *(name for name, own in profile.own.items() if task in own)}
            names = [name for name in profile.adapters if name not in owners]
            if len(names) < 2 or len(profile.tasks) < 2:
                continue
            rest = without_task(profile.restricted(names), task)
            model = RoutedModel(self.loaded, read_adapters(self.zoo, names, self.loaded))
            try:
                exam = Exam.of(model, [(task, shot) for shot in profile.shots[task]])
                mixture_NE = torch.zeros(len(exam), len(names))
                found.setdefault("base", []).append(_mean(exam.mixed(model, [mixture_NE])[0].exact))
                for one in tried:
                    try:
                        router, _ = self._fit(model, one, rest)
                        paper = self._answers(model, router, exam)
                    except RecycleError:  # such as: without that task no adapter has any
                        continue
                    found.setdefault(one.label, []).append(_mean(paper.exact))
            finally:
                model.engine.detach()
        for label, values in found.items():
            trials[label].unseen = _mean(values)

    def _fit(self, model: RoutedModel, one: Contender, profile: Profile) -> tuple[Router, float]:
        started = time.perf_counter()
        given: dict[str, Any] = {"subtract": self.subtract, **one.keywords}
        with model.disabled():
            router = build.build_router(
                one.method, profile, zoo=self.zoo, base=self.loaded, adapters=model.names, progress=self.progress, **given
            )
        return router, time.perf_counter() - started

    def _answers(self, model: RoutedModel, router: Router, exam: Exam) -> Paper:
        with exam.model_of(model, router) as its:
            return exam.routed(its, router, self.progress(2 * len(exam), f"{router.method()}, left out"))


def deal(profile: Profile, folds: int) -> list[dict[str, list[int]]]:
    """Fold → task → the numbers of its shots; drawn by the profile's seed, a task at a time."""
    count = profile.nll.shape[-1]
    order = {task: random.Random(f"{profile.seed} {task}").sample(range(count), count) for task in profile.tasks}
    return [{task: sorted(numbers[fold::folds]) for task, numbers in order.items()} for fold in range(folds)]


def keep_shots(profile: Profile, kept: Mapping[str, Sequence[int]]) -> Profile:
    """The profile that some of the shots would have given.

    Args:
        kept: task → numbers of shots, as many for each.
    """
    index_TK = torch.tensor([list(kept[task]) for task in profile.tasks])

    def some(scores_RTK: torch.Tensor) -> torch.Tensor:
        return scores_RTK.gather(2, index_TK.expand(len(scores_RTK), -1, -1))

    shots = Shots({task: [profile.shots[task][k] for k in kept[task]] for task in profile.tasks})
    exact = None if profile.exact is None else some(profile.exact)
    return replace(profile, shots=shots, nll=some(profile.nll), exact=exact, key="")


def without_task(profile: Profile, task: str) -> Profile:
    """The profile as it would be without a task."""
    columns = [t for t, other in enumerate(profile.tasks) if other != task]
    assigned = {name: tuple(t for t in tasks if t != task) for name, tasks in profile.assigned.items()}
    return replace(
        profile,
        shots=Shots({other: rows for other, rows in profile.shots.items() if other != task}),
        nll=profile.nll[:, columns],
        exact=None if profile.exact is None else profile.exact[:, columns],
        assigned={name: tasks for name, tasks in assigned.items() if tasks},
        key="",
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
