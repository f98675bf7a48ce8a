"""Where work on a model is done: in this process, or by workers of which each holds the same model.

A piece of work is ``work(model, item)``: a function of some module, given a `Fitting`. Item and result are small and can be sent to
another process. Items are fixed before the first is worked on, so that who works on them, and in which order, changes no result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from recycler.scoring import Fitting
    from recycler.zoo.store import Zoo

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers(Protocol):
    """Those who do the work."""

    @property
    def about(self) -> str:
        """How many they are, for a progress bar; empty where that is nothing to speak of."""
        ...

    def run(self, model: Fitting, work: Callable[[Any, Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        """(number of the item, its result), as each is finished. What `work` raises is raised here."""
        ...


class Local:
    """The work is done here, one item after the other."""

    about = ""

    def run(self, model: Fitting, work: Callable[[Any, Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        alone = type(model)(model.model)  # as any worker's: silent, and without workers of its own
        for number, item in enumerate(items):
            yield number, work(alone, item)


@contextmanager
def connect(engine: str | Workers | None, zoo: Zoo) -> Iterator[Workers]:
    """The workers that ``--engine`` names; they are dismissed in the end.

    Args:
        engine: None or "local"; "ray" (a cluster of this machine, or the one at $RAY_ADDRESS) or ``ray://HOST:PORT``; or workers,
            which stay.
        zoo: workers that can read its folder read adapters there.

    Raises:
        UsageError: there is no such engine, or its package is not installed. RecycleError: no cluster is there.
    """
    if engine is None or engine == "local":
        yield Local()
    elif isinstance(engine, str):
        if engine != "ray" and not engine.removeprefix("ray://").partition(":")[2].isdigit():
            raise UsageError(
                f"There is no engine {engine!r}.",
                "",
                "Use local, ray, or ray://HOST:PORT for a cluster that is there.",
                code="E_OPTION",
            )
        from recycler.ray_workers import Ray

        workers = Ray(engine, zoo)
        try:
            yield workers
        finally:
            workers.close()
    else:
        yield engine
