"""A mixture merged into the base: full weights, which load without recycler and cost nothing beside the base.

W + Σ w ΔW is added up in fp64 and rounded once, to the dtype that the base has. In bf16 that rounding is what an export like this loses:
an update that is small beside its weight keeps few of its bits.

Dimensions in names: D input width, O output width.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from recycler.base import quiet
from recycler.engine.sites import linear_shape
from recycler.exporting import comparing, mixtures
from recycler.routers.merging import Loss
from recycler.zoo.errors import UsageError, shorten

if TYPE_CHECKING:
    from recycler.exporting.mixtures import Mixture
    from recycler.routed import RoutedModel
    from recycler.routers.merging import Update
    from recycler.scoring import Progress

_SHARD = "5GB"
_INSTEAD = "Export it as an adapter, which leaves the base alone: --to peft"


def write(model: RoutedModel, mixture: Mixture, folder: Path, progress: Progress) -> dict[str, Any]:
    """Writes config, generation config, tokenizer and weights (safetensors, in shards).

    Returns:
        "dtype", "linears", and "rounding": what rounding to that dtype does to ΔW, as a relative error over all linears, and the worst one's.

    Raises:
        UsageError: a weight that has to change is quantised, offloaded or shared; or an adapter's bias finds none in the base.
    """
    from transformers import AutoTokenizer

    factors = mixtures.read_factors(model, mixture.weights)
    sites = [site for site in model.sites if any(site in held for held in factors.values())]
    _check(model, sites)
    step = progress(len(sites), "merging")
    made, _ = mixtures.updates(model, mixture.weights, lambda update, weight: (update, 0.0), factors, step)
    loss = Loss()
    base = model.base
    state = dict(base.state_dict())
    for site in list(made):
        state |= _changed(base.get_submodule(site), site, made.pop(site), partial(mixtures.base_weight, model, site), loss)
    with quiet():
        base.save_pretrained(folder, state_dict=state, max_shard_size=_SHARD)
        where = {"revision": model.source.revision, "trust_remote_code": False}
        AutoTokenizer.from_pretrained(model.source.id, **where).save_pretrained(folder)
    rounding = {key: value for key, value in loss.report().items() if key != "ranks"}
    return {"dtype": str(base.dtype).removeprefix("torch."), "linears": len(sites), "rounding": rounding}


def _check(model: RoutedModel, sites: list[str]) -> None:
    """Everything that is in the way, before anything is written."""
    base: Any = model.base
    if getattr(base.config, "quantization_config", None) is not None or getattr(base, "is_quantized", False):
        raise UsageError(
            "The base is quantised.", "What is merged into its few bits is mostly lost.", _quantised_fix(), code="E_MERGE"
        )
    owners = Counter(id(p) for module in base.modules() for p in module._parameters.values() if p is not None)
    linears = {site: base.get_submodule(site) for site in sites}
    away = [s for s, m in linears.items() if m.weight.is_meta or hasattr(m, "_hf_hook")]
    odd = [s for s, m in linears.items() if not m.weight.is_floating_point() or m.weight.dtype.itemsize < 2]
    shared = [s for s, m in linears.items() if owners[id(m.weight)] > 1]
    for found, what, fix in (
        (away, "offloaded by accelerate", "Load it whole, on the CPU if need be: --device cpu"),
        (odd, "quantised", _quantised_fix()),
        (shared, "shared with another module, which merging would change too", _INSTEAD),
    ):
        if found:
            raise UsageError(
                f"The mixture cannot be merged: the weight of {shorten(found, 3)} is {what}.", "", fix, code="E_MERGE"
            )


def _quantised_fix() -> str:
    return f"Give --base the unquantised model. Or: {_INSTEAD[0].lower()}{_INSTEAD[1:]}"


def _changed(module: Any, site: str, update: Update, weight: Any, loss: Loss) -> dict[str, Tensor]:
    """The new tensors of a linear, in the old ones' dtype and layout."""
    old, bias_O = module.weight, getattr(module, "bias", None)
    assert linear_shape(module) is not None
    added_OD = update.dense(weight).double()
    total_OD = weight().double() + added_OD
    rounded_OD = total_OD.to(old.dtype)
    loss.add(site, float((rounded_OD - total_OD).norm()), float(added_OD.norm()), 0)
    turned = type(module).__name__ == "Conv1D"
    found = {f"{site}.weight": (rounded_OD.T if turned else rounded_OD).contiguous()}
    if update.bias_O is not None:
        if bias_O is None:
            raise UsageError(
                f"{site} has no bias that could take the adapters'.",
                "An adapter of this mixture adds one (lora_bias).",
                _INSTEAD,
                code="E_MERGE",
            )
        found[f"{site}.bias"] = (bias_O.detach().cpu().double() + update.bias_O).to(bias_O.dtype)
    return found


def answers(model: RoutedModel, folder: Path, prompts: list[dict[str, Tensor]]) -> list[Tensor]:
    """The logits [T, V] of an exported folder on each prompt, as transformers loads it: a second copy of the base, for a moment."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto: Any = AutoModelForSeq2SeqLM if model.source.encoder_decoder else AutoModelForCausalLM
    with quiet():
        loaded = auto.from_pretrained(folder, dtype="auto", use_safetensors=True, trust_remote_code=False)
    return comparing.logits(loaded.to(model.source.device).eval(), prompts)
