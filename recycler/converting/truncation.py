"""Adapters cut to a rank when a model is composed, and what that changes.

The best update of the rank takes the place of B·A at every site that has more (`recycler.zoo.lowrank`). For plain LoRA the error
is that of ΔW itself. DoRA keeps its definition: the magnitude stays, and the direction is that of W plus the shorter B·A. Its
update is c ⊙ (W + BA) − W with c = m / ‖W + BA‖, so its error is measured on that, with the base's weights, one site at a time:
cutting B·A also turns the direction that m scales. A bias of B is kept as it is.

Dimensions in names: O output width, D input width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recycler.zoo import config, formats, inspect, lowrank, writing
from recycler.zoo.adapter import Adapter, Factors
from recycler.zoo.inspect import printable


@dataclass(frozen=True)
class Truncation:
    """What cutting an adapter to a rank changed.

    Attributes:
        rank: the most that was allowed. before: the largest rank that it had.
        sites: how many sites were cut, of `of`.
        error: ‖ΔW − ΔW'‖_F / ‖ΔW‖_F over all sites together. worst: the site with the largest error of its own, and that.
        sha256: of the whole adapter's weights, as the zoo holds them.
    """

    rank: int
    before: int
    sites: int
    of: int
    error: float
    worst: tuple[str, float]
    sha256: str

    def line(self, name: str) -> str:
        """The receipt."""
        return (
            f"{name}: rank {self.before} → {self.rank} at {self.sites} of {self.of} sites, relative error {self.error:.2g} "
            f"(worst {self.worst[1]:.2g} at {printable(self.worst[0])})"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        plain = vars(self) | {"worst": {"site": self.worst[0], "error": self.worst[1]}}
        return dict(plain)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Truncation:
        """As `to_json` wrote it. Raises KeyError, TypeError or ValueError where it is something else."""
        worst = str(data["worst"]["site"]), float(data["worst"]["error"])
        rank, before, sites, of = (int(data[key]) for key in ("rank", "before", "sites", "of"))
        return cls(rank, before, sites, of, float(data["error"]), worst, str(data["sha256"]))


def truncate(
    adapter: Adapter, rank: int, folder: Path, into: Path, weight: Callable[[str], Tensor]
) -> tuple[Adapter, Truncation] | None:
    """Cut an adapter to a rank, and write what is left as a PEFT folder.

    Args:
        folder: its PEFT files; card and licence are copied. into: a new folder.
        weight: module path → W [O, D] of the base, fp32; asked for DoRA's sites only.

    Returns:
        The adapter as read back from `into`, and what was lost; None where no site has a higher rank, and then nothing is written.
    """
    if max(adapter.ranks) <= rank:
        return None
    sites: dict[str, Factors] = {}
    lost = total = 0.0
    cut, worst = 0, ("", -1.0)
    for path, factors in adapter.sites.items():
        sites[path], error = lowrank.truncate(factors, rank)
        norm = lowrank.norm(factors.a_RD, factors.b_OR)
        if factors.magnitude_O is not None:
            error, norm = _dora_error(factors, sites[path], weight(path))
        lost, total = lost + (error * norm) ** 2, total + norm**2
        if factors.rank > rank:
            cut += 1
            worst = (path, error) if error > worst[1] else worst
    into.mkdir(parents=True)
    said = config.parse_json(config.read_config(folder / inspect.CONFIG), adapter.name)
    writing.write_adapter(
        into,
        sites,
        base=said.get("base_model_name_or_path"),
        base_revision=said.get("revision"),
        task_type=said.get("task_type"),
    )
    writing.copy_papers(folder, into)
    written, _ = formats.read(into, adapter.name, source=adapter.source, revision=adapter.revision)
    error = math.sqrt(lost / total) if total else 0.0
    facts = Truncation(rank, max(adapter.ranks), cut, len(sites), error, worst, adapter.sha256)
    return replace(written, base=adapter.base, licence=adapter.licence), facts


def _dora_error(whole: Factors, cut: Factors, weight_OD: Tensor) -> tuple[float, float]:
    """Relative error and norm of DoRA's update c ⊙ (W + BA) − W."""
    first_OD, second_OD = (_dora_weight(factors, weight_OD) for factors in (whole, cut))
    norm = float(torch.linalg.matrix_norm((first_OD - weight_OD).double()))
    off = float(torch.linalg.matrix_norm((first_OD - second_OD).double()))
    return off / norm if norm else 0.0, norm


def _dora_weight(factors: Factors, weight_OD: Tensor) -> Tensor:
    assert factors.magnitude_O is not None
    tuned_OD = weight_OD + factors.b_OR @ factors.a_RD
    return (factors.magnitude_O / tuned_OD.norm(dim=1))[:, None] * tuned_OD
