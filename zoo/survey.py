"""A zoo measured, and all of its adapters compared with each other: here, or by workers, to the same bits.

Workers are given two kinds of items: a few adapters to measure; then, once all are measured, a run of sites, in alphabetical order,
at which to compare them all. What comes back of the second is N(N − 1)/2 whole numbers, and these are added here. Adapters are read
anew for every run, so there are as few of them as memory allows and workers can share.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from recycler.zoo.adapter import Adapter
from recycler.zoo.errors import RecycleError
from recycler.zoo.similarity import (
    MEMORY,
    Comparison,
    Held,
    Measured,
    Similarity,
    Site,
    measure,
    no_sums,
    shares,
    similarity_of,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Progress = Callable[[int, str], Callable[..., None]]
_FEW = 8  # adapters that are measured at a time


class Workers(Protocol):
    """Of `recycler.workers.Workers`, what is needed here."""

    @property
    def about(self) -> str: ...

    @property
    def most(self) -> int: ...

    def run(self, held: Any, work: Callable[[Any, Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]: ...


class Survey(NamedTuple):
    """What was found.

    Attributes:
        similarity: of the adapters that could be read.
        found: what each says alone. broken: why others could not be read.
    """

    similarity: Similarity
    found: Mapping[str, Measured]
    broken: Mapping[str, RecycleError]


def survey(
    adapters: Mapping[str, Adapter],
    names: Sequence[str],
    *,
    progress: Progress | None = None,
    workers: Workers | None = None,
    memory: float = MEMORY,
) -> Survey:
    """Measure adapters and compare every two.

    Args:
        adapters: where they are read; a `Zoo`, or any mapping where there are no workers.
        progress: given the steps and a word, returns what is called at each step.
        workers: who does it; this process where None.
        memory: bytes to use, roughly, in each process.
    """
    progress = progress or (lambda steps, what: lambda count=1, note="": None)
    if workers is not None:
        return _shared(adapters, names, progress, workers, memory)
    step = progress(len(names), "reading")
    comparison, found, broken = Comparison(memory), dict[str, Measured](), dict[str, RecycleError]()
    for name in names:
        try:
            adapter = adapters[name]
        except RecycleError as error:
            broken[name] = error
        else:
            found[name] = comparison.add(adapter)
        step()
    return Survey(comparison.finish(adapters.__getitem__, progress), found, broken)


def _shared(
    adapters: Mapping[str, Adapter], names: Sequence[str], progress: Progress, workers: Workers, memory: float
) -> Survey:
    few = [names[start : start + _FEW] for start in range(0, len(names), _FEW)]
    results: dict[str, Measured | RecycleError] = {}
    step = progress(len(names), "reading")
    for number, some in workers.run(adapters, measured, few):
        results.update(zip(few[number], some, strict=True))
        step(len(some), workers.about)
    found = {name: one for name in names if isinstance(one := results[name], Measured)}
    broken = {name: one for name in names if isinstance(one := results[name], RecycleError)}
    rows = tuple(_Row(one.name, one.norm, one.cancelling) for one in found.values())
    sizes = _sizes(found.values())
    room, work = shares(memory)
    runs = _runs(sizes, room, workers.most)
    ends = [*(run[0] for run in runs[1:]), None]
    items = [_Run(rows, run[0], end, work) for run, end in zip(runs, ends, strict=True)] if runs else []
    sums_NN = no_sums(len(found))
    step = progress(len(sizes), "comparing")
    for number, packed in workers.run(adapters, compared, items):
        _add(packed, sums_NN)
        step(len(runs[number]), workers.about)
    return Survey(similarity_of(list(found.values()), sums_NN), found, broken)


def measured(adapters: Mapping[str, Adapter], names: Sequence[str]) -> list[Measured | RecycleError]:
    """A worker's first kind of item: what each adapter says, or why it cannot be read."""

    def one(name: str) -> Measured | RecycleError:
        try:
            return measure(adapters[name])
        except RecycleError as error:
            return error

    return [one(name) for name in names]


class _Row(NamedTuple):
    """Of an adapter, what is needed to compare it: see `Measured`."""

    name: str
    norm: float
    cancelling: frozenset[str]


class _Run(NamedTuple):
    """Sites from `start` on, before `end`, at which `rows` are to be compared, with so many bytes on top of the factors."""

    rows: tuple[_Row, ...]
    start: Site
    end: Site | None
    work: float


def compared(adapters: Mapping[str, Adapter], run: _Run) -> np.ndarray[Any, Any]:
    """A worker's second kind of item: what these sites add to the cosines, row after row, right of the diagonal. Whole numbers in numpy,
    which Ray hands over without a copy."""
    import torch

    held, sums_NN = Held(math.inf, run.work, run.start, run.end), no_sums(len(run.rows))
    for index, row in enumerate(run.rows):
        held.take(index, adapters[row.name], row.norm, row.cancelling)
    held.into(sums_NN)
    return torch.cat([sums_N[number + 1 :] for number, sums_N in enumerate(sums_NN)]).numpy()


def _add(packed: np.ndarray[Any, Any], sums_NN: Tensor) -> None:
    import torch

    at = 0
    for number, sums_N in enumerate(sums_NN):
        count = len(sums_N) - number - 1
        sums_N[number + 1 :] += torch.tensor(packed[at : at + count])
        at += count


def _sizes(found: Collection[Measured]) -> dict[Site, int]:
    """Site → bytes of all factors there, in alphabetical order."""
    sizes: Counter[Site] = Counter()
    for one in found:
        for (path, (out, width)), rank in zip(one.shapes.items(), one.ranks, strict=True):
            sizes[path, out, width] += 4 * rank * (out + width)
    return dict(sorted(sizes.items()))


def _runs(sizes: Mapping[Site, int], room: float, workers: int) -> list[list[Site]]:
    """The sites in runs that are about equal, have room, and give all workers as many. A run costs all the reading, however short it
    is, so there are as few as that allows."""
    total, before = sum(sizes.values()), 0.0
    count = workers * math.ceil(total / room / workers)
    runs: dict[int, list[Site]] = {}
    for site, size in sizes.items():
        runs.setdefault(int((before + size / 2) / total * count), []).append(site)
        before += size
    return list(runs.values())
