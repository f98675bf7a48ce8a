"""A mixture as one PEFT adapter: factors stacked, rank Σ r or the linear's own where that is less, exact. DoRA stays DoRA; where one adapter has DoRA's magnitude and another a
bias of B, which no adapter format has together, DoRA's part becomes a plain update at its full rank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycler.exporting import comparing, mixtures
from recycler.routers.merging import factors_of
from recycler.zoo.inspect import WEIGHTS
from recycler.zoo.lowrank import ROUNDING, check_dials
from recycler.zoo.writing import write_adapter

if TYPE_CHECKING:
    from torch import Tensor

    from recycler.exporting.mixtures import Mixture
    from recycler.routed import RoutedModel
    from recycler.scoring import Progress


def write(model: RoutedModel, mixture: Mixture, folder: Path, rank: int | None, progress: Progress) -> dict[str, Any]:
    """Writes adapter_config.json and adapter_model.safetensors.

    Returns:
        "ranks", "bytes", and where something was cut "cut": the relative error of ΔW over all linears, and the worst one's.

    Raises:
        UsageError: `rank` is below 1.
    """
    check_dials(rank, None)
    factors = mixtures.read_factors(model, mixture.weights)
    held = [one for sites in factors.values() for one in sites.values()]
    both = any(one.magnitude_O is not None for one in held) and any(one.bias_O is not None for one in held)
    step = progress(len({site for sites in factors.values() for site in sites}), "merging")
    shape = mixtures.plain(rank) if both else mixtures.shorter(rank)
    made, loss = mixtures.updates(model, mixture.weights, shape, factors, step)
    write_adapter(
        folder,
        factors_of("The mixture", made, lambda site: mixtures.base_weight(model, site)),
        base=base_id(model),
        base_revision=model.source.revision,
        task_type="SEQ_2_SEQ_LM" if model.source.encoder_decoder else "CAUSAL_LM",
    )
    report = loss.report()
    said: dict[str, Any] = {"ranks": report["ranks"], "bytes": (folder / WEIGHTS).stat().st_size}
    if both:
        said["converted"] = "DoRA's scales became plain updates at full rank: no adapter format has them and a bias of B."
    if report["error"] > ROUNDING:
        said["cut"] = {"rank": rank, "error": report["error"], "worst": report["worst"]}
    return said


def answers(model: RoutedModel, folder: Path, prompts: list[dict[str, Tensor]]) -> list[Tensor]:
    """The logits [T, V] of an exported folder on each prompt, as PEFT loads it."""
    with comparing.in_peft(model, folder) as loaded:
        return comparing.logits(loaded, prompts)


def base_id(model: RoutedModel) -> str:
    """What the base is called: as the router recorded it, else as it was loaded; a folder by its whole path, since what is exported is
    used from elsewhere."""
    facts = (model.router.facts if model.router is not None else {}).get("base") or {}
    named, here = str(facts.get("id") or model.source.id), Path(model.source.id)
    return str(here.resolve()) if here.is_dir() and here.resolve() == Path(named).resolve() else named
