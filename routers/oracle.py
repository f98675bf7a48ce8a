"""Oracle: told which task a row is of, it uses that task's adapter. The ceiling of what picking one adapter a row can reach.

weights = the one-hot of owner(task): the adapter assigned to the task by hand, else the one with the lowest NLL on its shots; zero,
the base, for a task that nobody helps. `RoutedModel.labelled` says which task each row is of; so does a "task" in the rows that
`recycle run` reads. mttl calls this selector TaskName.

Shapes: table [C, E], weights [B, E].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from recycler.routers.protocol import Model, Profile, Reader
from recycler.routers.sequence import Decision, SequenceRouter
from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class OracleConfig:
    """
    Attributes:
        unlabelled: what a row gets that has no label, or one of a task without shots: the best "single" adapter, or the "base".
    """

    unlabelled: Literal["single", "base"] = "single"


class Oracle(SequenceRouter):
    """weights = table[task]"""

    Config = OracleConfig
    needs = frozenset({"scores"})
    paper = "the task label given, as mttl's TaskName selector (arXiv:2405.11157)"
    abstains = True

    def __init__(self, adapters: Sequence[str], config: Any) -> None:
        super().__init__(adapters, config)
        self.tasks: tuple[str, ...] = ()
        self.table_CE = torch.zeros(0, len(self.adapters))
        self.unlabelled_E = torch.zeros(len(self.adapters))

    @classmethod
    def fit(cls, model: Model, profile: Profile, config: OracleConfig) -> Self:
        router = cls(model.adapters, config)
        router.tasks = tuple(sorted(profile.shots))
        owners = [profile.owner.get(task) for task in router.tasks]
        router.table_CE = torch.stack([_one_hot(router.adapters, owner) for owner in owners])
        if config.unlabelled == "single":
            router.unlabelled_E = _one_hot(router.adapters, profile.best_single)
        router.report = {"tasks": {task: owner or "base" for task, owner in zip(router.tasks, owners, strict=True)}}
        return router

    def decide(self, reader: Reader, inputs: Mapping[str, Any]) -> Decision:
        ids_BT = inputs.get("input_ids")
        told = reader.tasks
        labels: Sequence[str | None] = [None] * (1 if ids_BT is None else len(ids_BT)) if told is None else told
        if ids_BT is not None and len(labels) != len(ids_BT):
            raise UsageError(
                f"{len(labels)} rows are labelled, and the batch has {len(ids_BT)}.",
                "The oracle takes each row's task from `labelled`.",
                "Label each row of the batch, in its order; None where the task is not known.",
            )
        numbers = [self.tasks.index(task) if task in self.tasks else -1 for task in labels]
        weights_BE = torch.cat([self.table_CE, self.unlabelled_E[None]])[numbers]
        why = []
        for task, number, row in zip(labels, numbers, weights_BE.tolist(), strict=True):
            used = self.adapters[row.index(1.0)] if any(row) else "base"
            why.append({"task": task, "adapter": used} | ({} if number >= 0 else {"unlabelled": self.config.unlabelled}))
        return Decision(weights_BE, why)

    def tensors(self) -> dict[str, Tensor]:
        return {"table": self.table_CE, "unlabelled": self.unlabelled_E}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.tasks = tuple(sorted(self.report["tasks"]))
        self.table_CE, self.unlabelled_E = tensors["table"], tensors["unlabelled"]


def _one_hot(adapters: Sequence[str], name: str | None) -> Tensor:
    return torch.tensor([float(other == name) for other in adapters])
