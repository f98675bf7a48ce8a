"""Every method on the same rows: fit each, set it beside base, best single adapter, uniform and oracle, and say which to use.

On disk, a folder: bench.csv (a row for each contender), bench.json (everything, task by task), and journal.jsonl, to which each
contender is added as soon as it is finished. The same command goes on where it stopped; one with more methods adds them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recycler.base import Base
from recycler.build import build_router, profile_folder, read_adapters, subject
from recycler.evaluating.contenders import Contender, contenders
from recycler.evaluating.evaluation import BASELINES, Evaluation, baselines, bootstrap, result_of
from recycler.evaluating.exam import Exam, Paper, gate_bytes, pace
from recycler.journal import Journal, only_one
from recycler.profiles import Profile
from recycler.routed import RoutedModel
from recycler.routers.base import Router
from recycler.routers.static import StaticRouter
from recycler.scoring import Progress, silent
from recycler.selection import narrowed
from recycler.shots import Shots
from recycler.zoo.adapter import Adapter
from recycler.zoo.errors import PartialError, RecycleError, UsageError, shorten
from recycler.zoo.store import Zoo, require_writable

SCHEMA_VERSION = 1
HELD_IN, HELD_OUT = "held-in", "held-out"
_PLAIN = BASELINES[:3]  # what routing has to beat
_NEEDS = {"best single": "scores", "oracle": "scores, task labels"}
_KINDS = ("static", "sequence", "token")  # simplest first


@dataclass(frozen=True)
class Cost:
    """What a contender takes.

    Attributes:
        fit: seconds.
        row, base_row: seconds a row on a few rows with a few tokens each, and the bare base's at the same time.
        adapters, router: bytes beside the base.
        kind: what one of its decisions is for: "static", "sequence" or "token".
        needs: what it was fitted on.
    """

    fit: float = 0.0
    row: float = 0.0
    base_row: float = 0.0
    adapters: int = 0
    router: int = 0
    kind: str = "static"
    needs: str = "nothing"

    @property
    def times(self) -> float:
        """How many times the base's time a row takes."""
        return self.row / self.base_row if self.base_row else float("nan")

    @property
    def order(self) -> tuple[int, float, int, float]:
        """Simplest and cheapest first. Differences of time below a tenth of the base's are noise."""
        return _KINDS.index(self.kind), round(self.times, 1), self.adapters + self.router, self.fit


@dataclass(frozen=True)
class Bench:
    """What a bench found.

    Attributes:
        groups: name of a group of rows → its evaluation; all have the same contenders.
        costs: contender → cost.
        failed: method → why it could not be built.
        profile: name of the profile.
        selected: adapter → why it was chosen, where a selection was asked for.
    """

    groups: Mapping[str, Evaluation]
    costs: Mapping[str, Cost]
    failed: Mapping[str, str] = field(default_factory=dict)
    profile: str = ""
    selected: Mapping[str, str] = field(default_factory=dict)

    @property
    def contenders(self) -> tuple[str, ...]:
        return next(iter(self.groups.values())).contenders

    @property
    def routers(self) -> tuple[str, ...]:
        return next(iter(self.groups.values())).routers

    def mean(self, contender: str) -> float:
        """Exact match: each group counts the same, and in it each task."""
        return sum(group.mean(contender) for group in self.groups.values()) / len(self.groups)

    def difference(self, contender: str, other: str) -> tuple[float, float]:
        """95 % interval of the difference of two means, on the same rows."""
        rows, weights = [], []
        for group in self.groups.values():
            for task in group.tasks:
                rows.append(group.difference(contender, other, task))
                weights.append(1 / len(group.tasks) / len(self.groups))
        return bootstrap(rows, weights=weights)

    @cached_property
    def choice(self) -> tuple[str, str]:
        """(which contender to use, why): the simplest and cheapest of those that are not clearly worse than the best. Where that is
        none of the routers, don't bother."""
        where = f"in the mean of {', '.join(self.groups)}" if len(self.groups) > 1 else f"on {next(iter(self.groups))}"
        if not self.routers:
            return "base", "Nothing to recommend: no method could be built."
        pool = [c for c in self.contenders if not c.startswith("oracle")]  # nor the router that is told the task
        best = max(pool, key=self.mean)
        tied = [c for c in pool if c == best or self.difference(best, c)[0] <= 0]
        plain = [c for c in tied if c in _PLAIN]
        rival = max(_PLAIN, key=self.mean)
        if plain:
            router = max((c for c in self.routers if c in pool), key=self.mean, default="no router")
            numbers = f"{plain[0]} {self.mean(plain[0]):.3f}"
            numbers += f", {router} {self.mean(router):.3f}" if router in pool else ""
            return plain[0], f"Don't bother: no router is clearly better than {plain[0]} {where} ({numbers})."
        chosen = min(tied, key=lambda c: self.costs[c].order)
        cost = self.costs[chosen]
        low, high = self.difference(chosen, rival)
        gain = self.mean(chosen) - self.mean(rival)
        why = f"Use {chosen}: {self.mean(chosen):.3f} exact match {where}, {rival} {self.mean(rival):.3f} "
        why += f"({gain:+.3f} [{low:+.3f}, {high:+.3f}]). "
        others = [c for c in tied if c != chosen]
        if chosen != best:
            low, high = self.difference(chosen, best)
            why += f"{best} has {self.mean(best):.3f}, which these rows do not tell apart "
            why += f"({self.mean(chosen) - self.mean(best):+.3f} [{low:+.3f}, {high:+.3f}]); "
            why += f"{chosen} is the simpler or cheaper one: "
        elif others:
            why += f"Not told apart from it: {shorten(others, 5)}; {chosen} is the simplest or cheapest: "
        else:
            why += "Nothing else comes near it: "
        kinds = {
            "static": "one mixture for everything",
            "sequence": "one decision a prompt",
            "token": "decisions at every token",
        }
        return chosen, f"{why}{kinds[cost.kind]}, fitted in {cost.fit:.0f} s, {cost.times:.1f} × the base's time a row."

    @property
    def beyond(self) -> dict[str, list[str]]:
        """Group → its tasks where nothing scores clearly above the base."""
        return {name: list(group.beyond) for name, group in self.groups.items()} if self.routers else {}

    def raise_for_failures(self) -> None:
        """Raises PartialError where methods could not be built."""
        if self.failed:
            raise PartialError(
                f"{len(self.failed)} of {len(self.failed) + len(self.routers)} methods could not be built: {shorten(self.failed)}.",
                "; ".join(f"{name}: {why}" for name, why in self.failed.items()),
                "The others are in the table.",
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "profile": self.profile,
            "groups": {name: group.to_json() for name, group in self.groups.items()} if self.routers else {},
            "mean": {c: self.mean(c) for c in self.contenders},
            "costs": {c: {**asdict(cost), "times_base": cost.times} for c, cost in self.costs.items()},
            "failed": dict(self.failed),
            "selected": dict(self.selected),
            "recommended": self.choice[0],
            "recommendation": self.choice[1],
            "beyond_the_zoo": self.beyond,
        }


def bench_routers(
    profile: Profile | str | Path,
    methods: str | Iterable[str] | None = None,
    *,
    tasks: Shots | None = None,
    held_out: Shots | None = None,
    also: Mapping[str, Shots] | None = None,
    options: Sequence[str] = (),
    rows: int | None = None,
    zoo: Zoo | None = None,
    base: str | Base | None = None,
    adapters: Iterable[str] | None = None,
    assign: Mapping[str, str | Iterable[str]] | None = None,
    select: str | None = None,
    count: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
    loading: dict[str, Any] | None = None,
) -> Bench:
    """Fits methods on a profile's shots and compares them on other rows.

    Args:
        profile: what they learn from, and what says which adapter is best and whose a task is.
        methods: as `recycler.evaluating.contenders.contenders` reads them; all where None.
        tasks, held_out: rows of tasks that the profile has, and of tasks that it has not.
        also: name → more rows, a column of their own: the same tasks worded otherwise, say.
        options: ``method.key=value``.
        rows: at most so many of each task, from the top.
        select, count: candidates are selected first (`recycler.selection`).
        out: a folder for the results. What is finished there, on the same rows, is not done again, unless `force`.

    Returns:
        The results; methods that failed are in ``failed``, and the others went on.

    Raises:
        UsageError, InputError: what is wrong with all of them.
    """
    zoo = Zoo() if zoo is None else zoo
    given = {name: shots for name, shots in ((HELD_IN, tasks), (HELD_OUT, held_out)) if shots is not None} | dict(also or {})
    if not given:
        raise UsageError("There are no rows to answer.", "", "Give JSONL files, one task each.")
    groups = {name: Shots({task: some[:rows] for task, some in shots.items()}) for name, shots in given.items()}
    for name, shots in groups.items():
        if not shots or not all(shots.values()):
            raise UsageError(f"There are no rows in {name}.", "", "Give JSONL files, one task each.")
    if twice := {HELD_IN, HELD_OUT} & set(also or {}):
        raise UsageError(f"{', '.join(twice)} is a group already.", "", "Give it another name.")
    entries = contenders(methods, options)
    folder = None if out is None else Path(out)
    if folder is not None:
        check_output(folder)
        require_writable(folder)
    if not isinstance(profile, Profile):
        profile = Profile.load(profile_folder(zoo, profile))
    chosen = narrowed(zoo, profile, adapters, assign, select, count)
    adapters = adapters if chosen is None else chosen.names
    profile, loaded = subject(zoo, profile, base=base, adapters=adapters, assign=assign, loading=loading)
    with only_one(folder):
        model = RoutedModel(loaded, read_adapters(zoo, profile.adapters, loaded))
        try:
            settings = f"{max_new_tokens} {loaded.model.dtype} {version('recycler')}"
            key = _key(profile, model.adapters, groups, settings)
            journal = Journal(None if folder is None else folder / "journal.jsonl", key, again=force)
            all_rows = [(task, shot) for shots in groups.values() for task, some in shots.items() for shot in some]
            run = _Run(zoo, profile, model, groups, Exam.of(model, all_rows, max_new_tokens, batch_size), journal, progress)
            run.baselines()
            failed = {one.label: why for one in entries if one.label not in journal and (why := run.contender(one))}
        finally:
            model.engine.detach()
        bench = Bench(run.evaluations(), run.costs(), failed, profile.name, chosen.reasons if chosen else {})
        if folder is not None:
            from recycler.evaluating.bench_report import write

            write(bench, folder)
    return bench


def check_output(folder: Path) -> None:
    """Raises UsageError when `folder` holds something else than a bench."""
    held = {path.name for path in folder.iterdir()} - {".lock"} if folder.is_dir() else set()
    if folder.is_file() or (held and "journal.jsonl" not in held):
        raise UsageError(
            f"{folder} holds something else than a bench.", "Nothing is overwritten.", "Choose another --out.", code="E_EXISTS"
        )


def _key(profile: Profile, adapters: Sequence[Adapter], groups: Mapping[str, Shots], settings: str) -> str:
    measured = sha256(profile.nll.numpy().tobytes() + (b"" if profile.exact is None else profile.exact.numpy().tobytes()))
    parts = [profile.shots.sha256, measured.hexdigest(), dict(profile.base), dict(profile.assigned), profile.seed, settings]
    parts += [[(a.name, a.sha256) for a in adapters], [(name, shots.sha256) for name, shots in groups.items()]]
    return sha256(repr(parts).encode()).hexdigest()


@dataclass
class _Run:
    """A bench at work: what all contenders share."""

    zoo: Zoo
    profile: Profile
    model: RoutedModel
    groups: Mapping[str, Shots]
    exam: Exam
    journal: Journal
    progress: Progress
    chosen: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Adapter → bytes, in the dtype of the base."""
        return {adapter.name: adapter.parameters * self.width for adapter in self.model.adapters}

    @property
    def width(self) -> int:
        return torch.finfo(self.model.source.model.dtype).bits // 8

    def baselines(self) -> None:
        """Answers by forced mixtures."""
        done = self.journal.get("chosen", {})
        mixed: dict[str, list[Tensor]] = {label: [] for label in BASELINES}
        tables = {}
        for name, shots in self.groups.items():
            known = _settled(done[name]) if name in done else self.profile.summary()
            tables[name], chosen = baselines(self.model, shots, known, {}, self.progress)
            self.chosen[name] = done.get(name, chosen)
            for label in BASELINES:
                mixed[label] += [tables[name][label][task] for task, some in shots.items() for _ in some]
        if not done:
            self.journal.write("chosen", self.chosen)
        mixtures = {label: torch.stack(rows) for label, rows in mixed.items()}
        for label in BASELINES:
            if label in self.journal:
                self.exam.remember(self.model, mixtures[label], Paper(**self.journal[label]["paper"]))
        step = self.progress(2 * len(self.exam) * len(BASELINES), "baselines")
        papers = self.exam.mixed(self.model, [*mixtures.values()], step)
        first = next(iter(tables.values()))
        for label, paper in zip(BASELINES, papers, strict=True):
            if label not in self.journal:
                weights_E = next(iter(first["best single" if label == "oracle" else label].values()))
                row, base_row = pace(self.model, self.exam, None if label == "base" else weights_E)
                active = mixtures[label].abs().amax(0) > 0
                size = sum(self.sizes[name] for name, on in zip(self.model.names, active.tolist(), strict=True) if on)
                kind = "sequence" if label == "oracle" else "static"
                self._done(label, paper, Cost(0.0, row, base_row, size, 0, kind, _NEEDS.get(label, "nothing")))

    def contender(self, one: Contender) -> str | None:
        """Fits a method, and has it answer. Returns what went wrong, if something did."""
        started = time.perf_counter()
        try:
            with self.model.disabled():
                router = build_router(
                    one.method, self.profile, zoo=self.zoo, base=self.model.source, adapters=self.profile.adapters,
                    progress=self.progress, **one.keywords,
                )  # fmt: skip
            fit = time.perf_counter() - started
            step = self.progress(2 * len(self.exam), one.label)
            with self.exam.model_of(self.model, router) as model:
                paper = self.exam.routed(model, router, step)
                paces = pace(model, self.exam, router)
        except RecycleError as error:
            return str(error)
        except Exception as error:  # a method that cannot be imported, or is broken, is a row of the table
            return f"{type(error).__name__}: {error}"
        needs = ", ".join(sorted(router.needed(router.config))) or "nothing"
        self._done(one.label, paper, Cost(fit, *paces, self._size(router), gate_bytes(router), router.granularity, needs))
        return None

    def _size(self, router: Router) -> int:
        """Bytes of the adapters that it needs to run."""
        sizes = [self.sizes.get(name, 0) for name in router.adapters]
        if router.derived:
            sizes = [adapter.parameters * self.width for adapter in router.derived]
        if isinstance(router, StaticRouter):
            sizes = [size for size, weight in zip(sizes, router.weights_E.tolist(), strict=True) if weight]
        return sum(sizes)

    def _done(self, label: str, paper: Paper, cost: Cost) -> None:
        self.journal.write(label, {"paper": asdict(paper), "cost": asdict(cost)})

    # -- what came out

    def _labels(self) -> list[str]:
        return [*BASELINES, *(label for label in self.journal if label not in (*BASELINES, "chosen"))]

    def costs(self) -> dict[str, Cost]:
        return {label: Cost(**self.journal[label]["cost"]) for label in self._labels()}

    def evaluations(self) -> dict[str, Evaluation]:
        result, start = {}, 0
        costs = self.costs()
        routers = tuple(label for label in self._labels() if label not in BASELINES)
        for name, shots in self.groups.items():
            tasks = [task for task, some in shots.items() for _ in some]
            span = slice(start, start := start + len(tasks))
            papers = {
                label: Paper(**{kind: values[span] for kind, values in self.journal[label]["paper"].items()})
                for label in self._labels()
            }
            result[name] = result_of(
                tasks, papers, routers, self.chosen[name],
                seconds={label: (cost.row, cost.base_row) for label, cost in costs.items()},
                size={label: costs[label].router for label in routers},
            )  # fmt: skip
        return result


def _settled(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """`Evaluation.chosen` in the form of `Profile.summary`."""
    owners = {task: one["adapter"] for task, one in chosen["oracle"].items()}
    single = chosen["best_single"]["adapter"]
    return {
        "tasks": list(owners),
        "owner": {task: name for task, name in owners.items() if name != "base"},
        "best_single": None if single == "base" else single,
    }
