"""LoraHub: one mixture for a task (or several), found without gradients on a few shots.

    min_w  L(w) + λ · mean_e |w_e|,    L(w) = mean over shots of the NLL a token of W x + Σ_e w_e B_e A_e x,    w ∈ [−1.5, 1.5]^n

by nevergrad, n the `candidates` adapters with the lowest NLL on the shots as the profile has it: a budget of 40 evaluations is tiny
in 20 dimensions. It is searched several times, from w = 0 (the base) as in the paper and then from single candidates, the best first,
each with a seed of its own: NGOpt takes COBYLA for so small a budget, which has no chance in it, so that seeds alone would repeat it.
All results are in the report. Of everything that was evaluated the lowest objective wins among what is no worse in NLL than the base
and the best single adapter, so that on these shots it never ends below either. The result is one mixture w_E at every site and token.

Huang et al. 2023, LoraHub (arXiv:2307.13269). Departures from the released code: updates are mixed, not factors, so that L is not
even in w, adapters may differ in rank, sites, scaling and kind, and the result does not depend on how ΔW is written as a product
(with (Σ w A)(Σ w B) in its place every evaluation would need other factors; that is left out). The L1 term is relative to the NLL as
it is; the code divides the sum of batch means by the number of shots, and so weighs it several times more. ``cat`` with the weights
of the report makes one PEFT adapter of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from recycler.routers.protocol import Model, Profile
from recycler.routers.static import StaticRouter
from recycler.zoo.errors import UsageError, choices, shorten

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class LorahubConfig:
    """Options.

    Attributes:
        task: the tasks of the profile to find it for, comma-separated; all of them where None.
        candidates: how many adapters are searched over, the best on the shots.
        budget: evaluations of a search. seeds: how many searches, each from another start.
        bound: weights lie in [−bound, bound]. l1: λ.
        optimizer: a name in nevergrad's registry: NGOpt, as in the paper, OnePlusOne, CMA, ...
        rows: at most so many shots, the same number of each task.
        tokens: in one forward.
    """

    task: str | None = None
    candidates: int = 8
    budget: int = 40
    seeds: int = 3
    bound: float = 1.5
    l1: float = 0.05
    optimizer: str = "NGOpt"
    rows: int = 64
    tokens: int = 4096

    def __post_init__(self) -> None:
        for name in ("candidates", "budget", "seeds", "rows", "tokens"):
            if getattr(self, name) < 1:
                raise UsageError(
                    f"{name}={getattr(self, name)}.", "At least one is needed.", f"Use {name}=1 or more.", code="E_OPTION"
                )
        if not 0 < self.bound < float("inf"):
            raise UsageError(
                f"bound={self.bound}.",
                "Weights lie between −bound and bound.",
                "Use a positive, finite number.",
                code="E_OPTION",
            )
        if not 0 <= self.l1 < float("inf"):
            raise UsageError(f"l1={self.l1}.", "It weighs the size of weights against NLL.", "Use 0 or more.", code="E_OPTION")


class Point(NamedTuple):
    """Weights over the candidates, their NLL on the shots, and what is minimised."""

    w_N: tuple[float, ...]
    nll: float
    objective: float


class Lorahub(StaticRouter):
    """The weights of lowest K-shot loss that a search without gradients finds."""

    Config = LorahubConfig
    needs: ClassVar[frozenset[str]] = frozenset({"shots", "scores"})
    paper = "Huang et al. 2023 (arXiv:2307.13269)"
    trains = True
    simplex = False

    @classmethod
    def fit(cls, model: Model, profile: Profile, config: LorahubConfig) -> Self:
        tasks = _tasks(profile, config)
        optimizer = _optimizer(config)
        each = max(config.rows // len(tasks), 1)
        shots = [shot for task in tasks for shot in profile.shots[task][:each]]
        names = candidates(model, profile, tasks, each, config.candidates)
        columns = [model.adapters.index(name) for name in names]
        batches = [
            model.encode([[shots[i]] for i in rows]) for rows in model.batches([[shot] for shot in shots], config.tokens)
        ]
        step = model.progress(config.seeds * config.budget + len(names) + 1, "searching")

        known: dict[tuple[float, ...], Point] = {}

        @torch.no_grad()
        def evaluate(w_N: tuple[float, ...]) -> Point:
            step()
            if w_N in known:
                return known[w_N]
            w_E = torch.zeros(len(model.adapters))
            w_E[columns] = torch.tensor(w_N, dtype=torch.float32)
            total = 0.0
            for batch in batches:
                loss_BT = model.nll(batch, w_E)
                total += float((loss_BT.sum(1) / (batch.labels_BT != -100).sum(1)).sum())
            # Four digits: how rows are summed changes the later ones, and with them a search's whole path.
            nll = round(total / len(shots), 4)
            known[w_N] = Point(w_N, nll, nll + config.l1 * sum(map(abs, w_N)) / len(w_N))
            return known[w_N]

        count = len(names)
        base = evaluate((0.0,) * count)
        singles = [evaluate(tuple(float(i == n) for i in range(count))) for n in range(count)]
        starts = [base, *sorted(singles, key=lambda point: point.nll)]
        found = [search(optimizer, evaluate, starts[seed % len(starts)].w_N, config, seed) for seed in range(config.seeds)]
        limit = min(starts[0].nll, starts[1].nll)
        best = min((point for point in known.values() if point.nll <= limit), key=lambda point: point.objective)
        w_E = torch.zeros(len(model.adapters))
        w_E[columns] = torch.tensor(best.w_N, dtype=torch.float32)
        router = cls(model.adapters, config, w_E)
        router.report = {
            "tasks": list(tasks),
            "shots": len(shots),
            "weights": {name: round(w, 4) for name, w in zip(names, best.w_N, strict=True)},
            "nll": best.nll,
            "nll_base": base.nll,
            "nll_best_single": {names[singles.index(starts[1])]: starts[1].nll},
            "nll_of_seeds": [min(points, key=lambda point: point.objective).nll for points in found],
        }
        return router


def candidates(model: Model, profile: Profile, tasks: Sequence[str], each: int, count: int) -> list[str]:
    """The adapters with the lowest mean NLL on the tasks' shots, sorted by name."""
    columns = [list(profile.shots).index(task) for task in tasks]
    nll_R = profile.nll[:, columns, :each].double().mean((1, 2))
    by_nll = {name: float(nll_R[1 + list(profile.adapters).index(name)]) for name in model.adapters}
    return sorted(sorted(by_nll, key=lambda name: (round(by_nll[name], 4), name))[:count])


def search(
    optimizer: Any,
    evaluate: Callable[[tuple[float, ...]], Point],
    start: tuple[float, ...],
    config: LorahubConfig,
    seed: int,
) -> list[Point]:
    """All points that one search evaluates."""
    import nevergrad
    import numpy

    inside = numpy.clip(start, -config.bound, config.bound)
    space = nevergrad.p.Array(init=inside).set_bounds(-config.bound, config.bound)
    space.random_state.seed(seed)
    points = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about budgets that its optimizers find small
        run = optimizer(parametrization=space, budget=config.budget, num_workers=1)
        try:
            for _ in range(config.budget):
                asked = run.ask()
                points.append(evaluate(tuple(float(w) for w in asked.value)))
                run.tell(asked, points[-1].objective)
        finally:
            del (
                run
            )  # some run in a thread, which ends with the last reference; an exception would hold one, and Python wait for it
    return points


def _tasks(profile: Profile, config: LorahubConfig) -> list[str]:
    if config.task is None:
        return list(profile.shots)
    wanted = list(dict.fromkeys(task.strip() for task in config.task.split(",")))
    unknown = [task for task in wanted if task not in profile.shots]
    if unknown:
        raise UsageError(
            f"The profile has no task {shorten(unknown)}.", "", f"Choose {choices(profile.shots)}.", code="E_UNKNOWN"
        )
    return wanted


def _optimizer(config: LorahubConfig) -> Any:
    """The class in nevergrad's registry.

    Raises:
        UsageError: the extra is missing, or there is no such optimizer.
    """
    try:
        import nevergrad
    except ImportError:
        raise UsageError(
            "lorahub searches with a package.", "", "Run: pip install 'recycler[lorahub]'", code="E_MISSING_EXTRA"
        ) from None
    if config.optimizer not in nevergrad.optimizers.registry:
        raise UsageError(
            f"There is no optimizer {config.optimizer!r} in nevergrad.",
            "",
            "Use NGOpt, OnePlusOne, CMA, DE, or another of its names.",
            code="E_OPTION",
        )
    return nevergrad.optimizers.registry[config.optimizer]
