"""PHATGOOSE: one sigmoid gate per adapter and site, trained on the adapter's own tasks; a softmax over all of them at inference.

Muqeeth et al. 2024, Learning to Route Among Specialized Experts for Zero-Shot Generalization (arXiv:2402.05859).

Training, adapter e alone: y = W x + σ(v·x) · ΔW_e x, on the raw x, v from zero (so the gate starts at ½), language-model loss on
the completions. Inference: score = LN(x)·LN(v)/√d, which is √d times the correlation of x and v. That training and inference
differ is the method.

The gates of different adapters are independent columns, so a batch holds rows of many adapters, each forced to its own, and one
backward serves them all (``alone=True`` trains each by itself, as the paper does and as workers can share it: more steps in all, and none
of them knows of another adapter). An adapter without shots of its own has no gate: its score is −∞, not the 0 that a zero gate would give
(0 beats every gate that correlates negatively).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from recycler.routers import columns
from recycler.routers.chains import Chain, few
from recycler.routers.initial import Start, starts
from recycler.routers.linear import LinearRouter, Rows
from recycler.routers.protocol import Batch, Function, Group, Model, Profile, Rowwise, own_shots
from recycler.routers.select import Policy
from recycler.routers.training import descend, ends
from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class PhatgooseConfig(Policy):
    """
    Attributes:
        steps: optimiser steps. The paper takes 100 of 1024 rows each, at a learning rate of 5e-3.
        rows: rows in a step, over all adapters.
        lr: AdamW's learning rate. With so few rows a step a higher one gets further: on twelve real adapters the routed model's
            held-in exact match is 0.33 at 5e-3 and 0.35 at 2e-2 to 3e-2, in the same number of steps.
        tokens: padded tokens in one forward and backward, the dial for memory; a step is split into rows of like length.
        alone: each adapter's gates are trained by themselves, `steps` steps of `rows` of its own rows: as many times the work as there are
            adapters, and what `--engine` shares among workers.
        init: where gates start. "zero" is the paper's; "shots" is each adapter's mean input, less what all share
            (`recycler.routers.initial`). With steps=0 that is the gate, at a temperature of its own.
    """

    steps: int = 45
    rows: int = 24
    lr: float = 3e-2
    tokens: int = 1024
    alone: bool = False
    init: Literal["zero", "shots"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 0 or self.rows < 1 or self.tokens < 1 or not 0 < self.lr < math.inf:
            raise UsageError("steps, rows, tokens and lr must be positive.", "", "", code="E_OPTION")
        if self.steps == 0 and self.init == "zero":
            raise UsageError(
                "steps=0 with init=zero.", "Gates of zero choose nobody.", "Add init=shots, or take steps.", code="E_OPTION"
            )


class Phatgoose(LinearRouter):
    """score = LN(x)·LN(v)/√d. Adapters absent at a site have no gate there and are −∞."""

    Config = PhatgooseConfig
    needs = frozenset({"shots", "scores"})
    paper = "Muqeeth et al. 2024 (arXiv:2402.05859)"
    trains = True
    normalise = True

    @classmethod
    def fit(cls, model: Model, profile: Profile, config: PhatgooseConfig) -> Self:
        rows: list[Chain] = [[row] for row in own_shots(model, profile)]
        known = sorted({chain[0][0] for chain in rows})
        found = starts(model, rows, config.tokens, normalise=config.steps == 0) if config.init == "shots" else {}
        router = cls(model.adapters, config)
        losses: list[float] = []
        if config.steps == 0:
            for group in model.groups:
                for site in group.sites:
                    router.rows[site] = _untrained(found[group.name], _present(model, site, known))
        else:
            lessons = [
                _Lesson(tuple(pupils), [row for row in rows if row[0][0] in pupils], _some(found, pupils), config, profile.seed)
                for pupils in ([[e] for e in known] if config.alone else [known])
            ]
            taught = model.map(_teach, lessons, "gates") if config.alone else [_teach(model, lesson) for lesson in lessons]
            losses = [sum(step) / len(taught) for step in zip(*(losses for _, losses in taught), strict=True)]
            for group in model.groups:
                v_SED = torch.zeros(len(group.sites), len(model.adapters), group.width)
                for lesson, (gates, _) in zip(lessons, taught, strict=True):
                    v_SED[:, list(lesson.pupils)] = gates[group.name]
                for s, site in enumerate(group.sites):
                    router.rows[site] = _rows(v_SED[s], _present(model, site, known))
        router.report = {
            "rows": len(rows),
            **({"loss": ends(losses)} if losses else {}),
            "without_gate": [name for e, name in enumerate(model.adapters) if e not in known],
        }
        return router

    @classmethod
    def spreads(cls, config: PhatgooseConfig) -> bool:
        return config.alone and config.steps > 0

    def extended(self, model: Model, profile: Profile, name: str) -> Self:
        """A router with one gate more at every site, trained on that adapter's own shots; the others' stay as they are."""
        columns.require_next(self, model, name)
        if self.config.init == "shots":
            raise UsageError(
                "These gates started from what sets each adapter's shots apart from all others'.",
                "The others' shots are not kept.",
                "Build it again, or with init=zero.",
                code="E_FIXED",
            )
        new = len(self.adapters)
        rows: list[Chain] = [[(new, shot)] for task in profile.own.get(name, ()) for shot in profile.shots[task]]
        gates, losses = _teach(model, _Lesson((new,), rows, {}, self.config, profile.seed)) if rows else ({}, [])

        def column(group: Group, site: str) -> Tensor | None:
            present = _present(model, site, [new] if rows else [])
            return _rows(gates[group.name][group.sites.index(site)], [0]).v_ED[0] if present else None

        router = columns.extended(self, model, name, column)
        router.report = {"rows": len(rows), **({"loss": ends(losses)} if losses else {})}
        return router

    def without(self, name: str) -> Self:
        """A router without one adapter: its gates are dropped, and the others' stay as they are."""
        return columns.without(self, name)


def _present(model: Model, site: str, known: Sequence[int]) -> list[int]:
    """The adapters that have factors at a site, and a gate."""
    return [e for e in known if model.adapters[e] in model.factors(site)]


def _untrained(start: Start, present: Sequence[int]) -> Rows:
    """Directions over their temperature; inputs are normalised, and directions of normalised inputs have mean 0 already."""
    offset_E = torch.full((len(start.v_ED),), float("-inf"))
    offset_E[list(present)] = 0.0
    return Rows(start.v_ED / start.temperature(present), offset_E)


def _rows(v_ED: Tensor, present: Sequence[int]) -> Rows:
    """Inference rows of one site: LN(v)/√d, −∞ for adapters that are absent or untrained.

    A trained gate that stayed exactly zero would normalise to zero anyway."""
    width = v_ED.shape[-1]
    offset_E = torch.full((len(v_ED),), float("-inf"))
    offset_E[list(present)] = 0.0
    # LN's epsilon (1e-5, as released) matters for small gates; keep it.
    return Rows((nn.functional.layer_norm(v_ED, (width,)) / math.sqrt(width)).cpu(), offset_E)


@dataclass(frozen=True)
class _Lesson:
    """What gates are trained on together.

    Attributes:
        pupils: numbers of the adapters whose gates they are. rows: theirs.
        start: group → v [E of pupils, D] to begin with; zero where there is none.
    """

    pupils: tuple[int, ...]
    rows: Sequence[Chain]
    start: Mapping[str, Tensor]
    config: PhatgooseConfig
    seed: int


def _teach(model: Model, lesson: _Lesson) -> tuple[dict[str, Tensor], list[float]]:
    """Group → v [S, E of pupils, D] on the CPU, and the mean loss of each step."""
    gates = _Gates(model.groups, lesson.pupils, len(model.adapters))
    gates.start(lesson.start)
    losses = gates.learn(model, lesson.rows, lesson.config, lesson.seed)
    return {group.name: gates.of(group).cpu() for group in model.groups}, losses


def _some(found: Mapping[str, Start], pupils: Sequence[int]) -> dict[str, Tensor]:
    """Directions of some adapters, as long as makes v·x about 1: the sigmoid is neither flat nor decided there."""
    some = {}
    for name, start in found.items():
        spread_E = (start.sample_ND @ start.v_ED.T).square().mean(0).sqrt()
        some[name] = (start.v_ED / spread_E.clamp(min=1e-6)[:, None])[list(pupils)]
    return some


class _Gates(nn.Module):
    """v [S, E of pupils, D] per group, trained; as a mixture it gives each row its own adapter at weight σ(v·x)."""

    column_E: Tensor

    def __init__(self, groups: Sequence[Group], pupils: Sequence[int], count: int) -> None:
        super().__init__()
        self.number = {group.name: i for i, group in enumerate(groups)}
        self.v = nn.ParameterList(torch.zeros(len(group.sites), len(pupils), group.width) for group in groups)
        column_E = torch.full((count,), -1)
        column_E[list(pupils)] = torch.arange(len(pupils))
        self.register_buffer("column_E", column_E)
        self.count = count

    def mixture(self, own_B: Tensor) -> Function:
        """Each row's own adapter at its gate."""
        own_BE = nn.functional.one_hot(own_B, self.count).float()
        column_B = self.column_E[own_B]

        def weights(group: Group, x_BTD: Tensor) -> Tensor:
            v_SBD = self.v[self.number[group.name]].index_select(1, column_B)
            gate_BTS = torch.sigmoid(torch.einsum("btd,sbd->bts", x_BTD.float(), v_SBD))
            return gate_BTS[..., None] * own_BE[:, None, None, :]

        return weights

    def of(self, group: Group) -> Tensor:
        """v [S, E of pupils, D], detached."""
        return self.v[self.number[group.name]].detach()

    @torch.no_grad()
    def start(self, start: Mapping[str, Tensor]) -> None:
        for name, v_ED in start.items():
            self.v[self.number[name]].copy_(v_ED)

    def learn(self, model: Model, rows: Sequence[Chain], config: PhatgooseConfig, seed: int) -> list[float]:
        """Mean loss of each step."""

        def mixture(batch: Batch, numbers: Sequence[int]) -> Rowwise:
            told = [rows[i] for i in numbers]
            own_B = torch.tensor([chain[0][0] for chain in told], device=batch.labels_BT.device)
            self.to(own_B.device)
            return Rowwise(self.mixture(own_B), few(told))

        return descend(model, self.parameters(), rows, mixture, config, f"phatgoose {seed}")
