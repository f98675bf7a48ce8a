"""X-LoRA's own checkpoints: what PEFT's `XLoraModel` and the package `xlora` save, read as the classifier of `recycler.routers.xlora`.

A folder holds ``xlora_config.json`` and ``xlora_classifier.safetensors`` (the package), or ``adapter_config.json`` of peft_type XLORA and
``adapter_model.safetensors`` (PEFT). Nothing else is read, and no pickle. The adapters themselves come from the zoo, under the
names that the configuration gives them.

Two orders are not in the files. The classifier's columns are the adapters in the order of the configuration's ``adapters``. Under
``layerwise_scalings`` its outputs are sites × adapters, the sites in the order in which the base defines its modules, over all
linears that any of the adapters touches.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recycler.routers.xlora_start import Linear
from recycler.zoo.errors import InputError, UsageError

_FILES = (("xlora_config.json", "xlora_classifier.safetensors"), ("adapter_config.json", "adapter_model.safetensors"))


@dataclass
class Taken:
    """A classifier as `recycler.routers.xlora` holds it.

    Attributes:
        trunk: the linear layers before the last. heads: site (or "all") → the last one's rows [E, H] for it, bias [E].
        settings: fields of its Config; of the folder the name is kept.
    """

    trunk: list[Linear]
    heads: dict[str, Linear]
    settings: dict[str, Any] = field(default_factory=dict)


def read(folder: str | Path, adapters: Sequence[str], sites: Sequence[str], width: int) -> Taken:
    """Reads a checkpoint for a model that holds these adapters.

    Args:
        sites: every site of the model, in the order in which the base defines its modules.
        width: H, of the base's hidden states.

    Raises:
        InputError: it is none, it is incomplete, or it does something that cannot be had exactly here.
        UsageError: the model's adapters are not the checkpoint's.
    """
    folder = Path(folder).expanduser()
    config, weights = _files(folder)
    _refuse(folder, config)
    names = list(config.get("adapters") or {})
    if sorted(names) != sorted(adapters):
        raise UsageError(
            f"{folder} is a classifier over {', '.join(names) or 'no adapter'}; the model holds {', '.join(adapters)}.",
            "Its columns belong to the adapters it was trained with.",
            "Fetch those under these names (recycle fetch FOLDER --as NAME), and choose them with --adapters.",
        )
    layers = _layers(folder, weights, int(config.get("xlora_depth", 1)))
    columns = torch.tensor([names.index(name) for name in adapters])
    layerwise = bool(config.get("layerwise_scalings", False))
    _check_shapes(folder, layers, width, len(names), sites if layerwise else ("all",))
    weight, bias = layers[-1]
    places = list(sites) if layerwise else ["all"]
    w_LEH, b_LE = weight.view(len(places), len(names), -1)[:, columns], bias.view(len(places), -1)[:, columns]
    heads = {site: (w_LEH[i].contiguous(), b_LE[i].contiguous()) for i, site in enumerate(places)}
    kept = config.get("top_k_lora")
    settings = {
        **{"policy": "top_k", "standardise": None, "shared": False, "ranks": None},
        "checkpoint": folder.name,
        "top_k": None if kept is None else int(kept),
        "renormalise": bool(config.get("enable_softmax_topk", False)),  # else the softmax over all stays as it is
        "temperature": float(config.get("softmax_temperature", 1.0)) if config.get("enable_softmax", True) else 1.0,
        "layerwise": layerwise,
        "depth": len(layers),
        "size": len(layers[0][1]) if len(layers) > 1 else int(config.get("xlora_size", 2048)),
    }
    return Taken(layers[:-1], dict(sorted(heads.items())), settings)


def _files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for config, weights in _FILES:
        if (folder / config).is_file() and (folder / weights).is_file():
            try:
                said = json.loads((folder / config).read_text(encoding="utf8"))
                if not isinstance(said, dict):
                    raise ValueError("no object")
                return said, load_file(folder / weights)
            except (ValueError, OSError, SafetensorError) as error:
                raise InputError(
                    f"{folder} cannot be read ({error}).", "", "Save the checkpoint again.", code="E_ROUTER"
                ) from None
    pickled = (folder / "xlora_classifier.pt").exists()
    raise InputError(
        f"{folder} holds no X-LoRA checkpoint.",
        "Its classifier is a pickle, which is not read."
        if pickled
        else f"It needs {' and '.join(_FILES[0])}, or {' and '.join(_FILES[1])}.",
        "Save it with safe_serialization=True." if pickled else "",
        code="E_ROUTER",
    )


def _refuse(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises InputError for what would route differently here."""
    soft, soft_k = config.get("enable_softmax", True), config.get("enable_softmax_topk", False)
    wrong = None
    if config.get("peft_type", "XLORA") != "XLORA":
        wrong = f"It is a checkpoint of {config['peft_type']}."
    elif soft and soft_k:
        wrong = "It takes a softmax of a softmax (enable_softmax and enable_softmax_topk)."
    elif not soft and not soft_k:
        wrong = "Its raw scores are the weights (enable_softmax is off)."
    elif soft_k and config.get("top_k_lora") is None:
        wrong = "It sets enable_softmax_topk without top_k_lora."
    elif config.get("scaling_pass_value", 0.0) != 0.0:
        wrong = "Its first pass is not the bare base (scaling_pass_value is not 0)."
    elif config.get("global_scaling_weight", 1.0) != 1.0:
        wrong = f"It multiplies all updates by {config['global_scaling_weight']} (global_scaling_weight)."
    if wrong:
        raise InputError(
            f"{folder} cannot be taken over exactly.",
            wrong,
            "Fit one instead: recycle build-router xlora --profile NAME",
            code="E_ROUTER",
        )


def _layers(folder: Path, weights: Mapping[str, Tensor], depth: int) -> list[Linear]:
    """The classifier's linear layers in order, fp32; a missing bias is 0 (the package leaves it out)."""
    found: dict[tuple[int, int], Linear] = {}
    for key, tensor in weights.items():
        number = re.search(r"(?:^|\.)(?:layers|inner)\.(\d+)\.weight$", key)
        last = re.search(r"(?:^|\.)last\.weight$", key)
        if number or last:
            bias = weights.get(key.removesuffix("weight") + "bias")
            place = (1, 0) if last else (0, int(number.group(1)) if number else 0)
            found[place] = (tensor.float(), torch.zeros(len(tensor)) if bias is None else bias.float())
    if len(found) != depth:
        raise InputError(
            f"{folder} holds {len(found)} of the classifier's {depth} layers.",
            "PEFT up to 0.21 loses those whose number is also an adapter's name when it saves.",
            "Save the classifier's own state_dict() as xlora_classifier.safetensors beside xlora_config.json.",
            code="E_ROUTER",
        )
    return [found[place] for place in sorted(found)]


def _check_shapes(folder: Path, layers: Sequence[Linear], width: int, adapters: int, places: Sequence[str]) -> None:
    expected = [width, *(len(bias) for _, bias in layers[:-1])]
    fits = all(w.ndim == 2 and w.shape == (len(b), inputs) for (w, b), inputs in zip(layers, expected, strict=True))
    if not fits or len(layers[-1][1]) != len(places) * adapters:
        shapes = " → ".join(str(tuple(w.shape)) for w, _ in layers)
        raise InputError(
            f"The classifier in {folder} does not fit this model: {shapes}.",
            f"It should read {width} numbers, and give {len(places)} × {adapters}: "
            f"{'sites' if len(places) > 1 else 'one set'} × adapters.",
            "Use the base and the adapters it was trained with.",
            code="E_ROUTER",
        )
