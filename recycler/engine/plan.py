"""Which path each group of a model would take, and why: the chooser's answers, put into words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from recycler.engine.attach import Attachment
    from recycler.engine.paths import Name


@dataclass(frozen=True)
class Step:
    """Groups that are alike.

    Attributes:
        groups: their names. sites: the last part of the names of a group's sites.
        path, why: as the chooser says.
        rows: rank rows that are kept for each. adapters: how many are kept there.
        bytes: of the adapters at all of these groups.
    """

    groups: tuple[str, ...]
    sites: tuple[str, ...]
    path: Name
    why: str
    rows: int
    adapters: int
    bytes: int


@dataclass(frozen=True)
class ExecutionPlan:
    """The steps of a forward of `tokens` tokens, those of `sequences` sequences together.

    Attributes:
        steps: in the order of the forward; `str` makes a table of them.
    """

    tokens: int
    sequences: int
    steps: tuple[Step, ...]

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __str__(self) -> str:
        lines = [f"{self.tokens} tokens of {self.sequences} sequences"]
        for step in self.steps:
            lines.append(
                f"{len(step.groups):4d} × {', '.join(step.sites):32s} {step.path:9s} {step.bytes / 1e6:8.1f} MB  {step.why}"
            )
        return "\n".join(lines)


def execution_plan(engine: Attachment, tokens: int, sequences: int = 1) -> ExecutionPlan:
    """What a forward of so many tokens would do, with the router or the mixture that is set now.

    Raises:
        UsageError: there is no such forward.
    """
    if tokens < 1 or not 1 <= sequences <= tokens:
        raise UsageError(
            f"{tokens} tokens of {sequences} sequences.", "", "Each sequence has a token at least, and there is one."
        )
    found: dict[tuple[tuple[str, ...], Name, str, int, int], list[tuple[str, int]]] = {}
    for bank in engine.banks:
        path, why, stack = bank.foresee((sequences, -(-tokens // sequences), bank.group.width))
        sites = tuple(site.rpartition(".")[2] for site in bank.group.sites)
        size = sum(tensor.numel() * tensor.element_size() for tensor in stack.buffers())
        adapters = len({e for held in stack.places for e in held})  # columns may be spare
        found.setdefault((sites, path, why, stack.a_RD.shape[0], adapters), []).append((bank.group.name, size))
    steps = [Step(tuple(name for name, _ in own), *key, sum(size for _, size in own)) for key, own in found.items()]
    return ExecutionPlan(tokens, sequences, tuple(steps))
