"""Rows to answer, and everybody's answers to them: each row with each mixture once, whoever asks.

A static router, and one that decides once a sequence, is a list of mixtures, one a row; so are the base, a single adapter and the
uniform average. Rows that two of them mix alike have the same answer, and most of what a good router decides is what another one
decided before it. Routers that decide token by token are run as they are.

Dimensions in names: N row, E adapter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from recycler import text
from recycler.profiles import exact_match
from recycler.routers.base import Router
from recycler.routers.sequence import Decision
from recycler.routers.static import StaticRouter
from recycler.scoring import answer, mean_nll
from recycler.shots import Shot

if TYPE_CHECKING:
    from recycler.routed import RoutedModel

Step = Callable[..., None]
Key = tuple[int, bytes]  # a row's number and its mixture
Mark = tuple[float, str]  # NLL and answer of one row
PACE_ROWS, PACE_TOKENS = 8, 8


@dataclass
class Paper:
    """One contender's answers.

    Attributes:
        nll, exact, generated: one a row.
    """

    nll: list[float]
    exact: list[float]
    generated: list[str]


@dataclass
class Exam:
    """The rows, how they are answered, and what is known of them already.

    Attributes:
        tasks, shots: one a row.
        limits: most new tokens of each row.
        batch_size: rows answered at once.
        known: model → (row, mixture) → mark.
    """

    tasks: list[str]
    shots: list[Shot]
    limits: list[int]
    batch_size: int = 32
    known: WeakKeyDictionary[RoutedModel, dict[Key, Mark]] = field(default_factory=WeakKeyDictionary, repr=False)

    @classmethod
    def of(
        cls, model: RoutedModel, rows: Sequence[tuple[str, Shot]], max_new_tokens: int | None = None, batch_size: int = 32
    ) -> Exam:
        """Args:
        max_new_tokens: per answer; by default what the reference needs and a little more.
        """
        limits = [max_new_tokens or len(text.completion_ids(model.source, shot)) + 4 for _, shot in rows]
        return cls([task for task, _ in rows], [shot for _, shot in rows], limits, batch_size)

    def __len__(self) -> int:
        return len(self.shots)

    @torch.no_grad()
    def mixtures(self, model: RoutedModel, router: Router) -> Tensor | None:
        """[N, E]: what the router makes of each row; None from one whose mixture is not the same at all sites and tokens."""
        if isinstance(router, StaticRouter):
            return router.weights_E.float().cpu().expand(len(self), -1)
        if router.granularity != "sequence":
            return None
        weights_NE = torch.zeros(len(self), len(router.adapters))
        lengths = [len(text.prompt_ids(model.source, shot)) for shot in self.shots]
        for numbers in text.by_length(lengths, rows=self.batch_size):
            inputs = text.prompts(model.source, [[self.shots[i]] for i in numbers])
            with model.labelled([self.tasks[i] for i in numbers]):
                plan = router.prepare(model.reading, inputs)
            if not isinstance(plan, Decision):
                return None
            weights_NE[numbers] = plan.weights_BE.detach().float().cpu()
        return weights_NE

    def mixed(self, model: RoutedModel, mixtures: Sequence[Tensor], step: Step | None = None) -> list[Paper]:
        """Answers by mixtures, [N, E] each. Rows of all of them share batches."""
        known = self.known.setdefault(model, {})
        keys = [_keys(w_NE) for w_NE in mixtures]
        todo: dict[Key, Tensor] = {}
        for w_NE, theirs in zip(mixtures, keys, strict=True):
            todo |= {key: w_NE[key[0]] for key in theirs if key not in known and key not in todo}
        if step is not None:
            step(2 * (len(mixtures) * len(self) - len(todo)))
        if todo:
            marks = self._marks(model, [i for i, _ in todo], torch.stack([*todo.values()]), step)
            known |= dict(zip(todo, marks, strict=True))
        return [self._paper([known[key] for key in theirs]) for theirs in keys]

    def remember(self, model: RoutedModel, mixtures_NE: Tensor, paper: Paper) -> None:
        """Takes down answers of an earlier run."""
        marks = zip(paper.nll, paper.generated, strict=True)
        self.known.setdefault(model, {}).update(zip(_keys(mixtures_NE), marks, strict=True))

    def routed(self, model: RoutedModel, router: Router, step: Step | None = None) -> Paper:
        """A router's answers. The model has its own router again afterwards."""
        mixtures_NE = self.mixtures(model, router)
        if mixtures_NE is not None:
            return self.mixed(model, [mixtures_NE], step)[0]
        with using(model, router):
            return self._paper(self._marks(model, list(range(len(self))), None, step))

    @contextmanager
    def model_of(self, model: RoutedModel, router: Router) -> Iterator[RoutedModel]:
        """The model that a router runs on: this one, or one of the adapters that it made itself."""
        if not router.derived:
            yield model
            return
        from recycler.routed import RoutedModel

        with model.disabled():
            other = RoutedModel(model.source, router.derived, router)
            try:
                yield other
            finally:
                other.engine.detach()

    def _marks(self, model: RoutedModel, numbers: list[int], weights_NE: Tensor | None, step: Step | None) -> list[Mark]:
        shots = [self.shots[i] for i in numbers]
        losses = mean_nll(model, shots, weights_NE, step=step)
        limits = [self.limits[i] for i in numbers]
        texts = answer(model, shots, weights_NE, max_new_tokens=limits, batch_size=self.batch_size, step=step)
        return list(zip(losses, texts, strict=True))

    def _paper(self, marks: Sequence[Mark]) -> Paper:
        exact = [float(exact_match(given, shot.completion)) for (_, given), shot in zip(marks, self.shots, strict=True)]
        return Paper([loss for loss, _ in marks], exact, [given for _, given in marks])


def _keys(mixtures_NE: Tensor) -> list[Key]:
    return [(i, w_E.tobytes()) for i, w_E in enumerate(mixtures_NE.numpy())]


class using:
    """``with using(model, router):`` that router, and the model's own afterwards."""

    def __init__(self, model: RoutedModel, router: Router | None) -> None:
        self.model, self.router, self.before = model, router, model.router

    def __enter__(self) -> RoutedModel:
        self.model.use(self.router)
        return self.model

    def __exit__(self, *error: object) -> None:
        self.model.use(self.before)


@torch.no_grad()
def pace(model: RoutedModel, exam: Exam, who: Router | Tensor | None, repeats: int = 3) -> tuple[float, float]:
    """Seconds that a row takes, and what it takes the bare base in the same minute: one batch of a few rows, each answered with
    the same few tokens, in turns; the least of the repeats.

    Args:
        who: a router, a mixture [E], or None for the base, which is then both.
    """
    count = min(PACE_ROWS, len(exam))
    rows = [i * len(exam) // count for i in range(count)]
    inputs = text.prompts(model.source, [[exam.shots[i]] for i in rows])
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "min_new_tokens": PACE_TOKENS, "max_new_tokens": PACE_TOKENS}
    options |= {"eos_token_id": model.source.ends, "pad_token_id": model.tokenizer.pad_token_id}

    def seconds() -> float:
        started = time.perf_counter()
        model.generate(**inputs, **options).tolist()  # waits for the device
        return time.perf_counter() - started

    best = [float("inf"), float("inf")]
    router = who if isinstance(who, Router) else None
    with using(model, router), model.labelled([exam.tasks[i] for i in rows]):
        for _ in range(repeats):
            if isinstance(who, Tensor):
                with model.mixture(who):
                    best[0] = min(best[0], seconds())
            elif who is not None:
                best[0] = min(best[0], seconds())
            with model.disabled():
                best[1] = min(best[1], seconds())
    if who is None:
        best[0] = best[1]
    return best[0] / count, best[1] / count


def gate_bytes(router: Router) -> int:
    """What a router itself takes beside base and adapters."""
    return sum(tensor.numel() * tensor.element_size() for tensor in router.tensors().values())
