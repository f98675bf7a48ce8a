"""Where work on a model, or on a zoo, is done: in this process, or by workers of which each holds the same.

A piece of work is ``work(held, item)``: a function of some module, given a `Fitting` or, where no base is needed, adapters by name.
Item and result can be sent to another process, and of results no more than two a worker wait to be taken. Items are fixed before the
first is worked on, so that who works on them, and in which order, changes no result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from recycler.scoring import Fitting
    from recycler.zoo.adapter import Adapter
    from recycler.zoo.store import Zoo

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers(Protocol):
    """Those who do the work."""

    @property
    def about(self) -> str:
        """How many they are, for a progress bar; empty where that is nothing to speak of."""
        ...

    @property
    def most(self) -> int:
        """How many there may be, to cut work by."""
        ...

    def run(
        self, held: Fitting | Mapping[str, Adapter], work: Callable[[Any, Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result]]:
        """(number of the item, its result), as each is finished. What `work` raises is raised here.

        Args:
            held: what `work` is given: a model, or adapters by name, such as a `Zoo`; of these each is read when it is asked for.
        """
        ...


class Local:
    """The work is done here, one item after the other."""

    about, most = "", 1

    def run(
        self, held: Fitting | Mapping[str, Adapter], work: Callable[[Any, Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result]]:
        # as any worker's: silent, and without workers of its own
        alone = held if isinstance(held, Mapping) else type(held)(held.model)
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
