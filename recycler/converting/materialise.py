"""The updates of adapters that are no LoRA, as PEFT itself computes them: one dense ΔW at a time.

PEFT wants a model to put its layers on. It gets a stand-in: the adapter's own sites as plain linears of the right shapes, whose
weights are one zero seen as a matrix, so that no memory and no weights of the base are needed. Only methods whose update
depends on the base's weights get those, and only at their sites.

Nothing is taken on trust: the tensors in the file must be exactly those that PEFT expects, every site of the file must become a
layer, and every ΔW is held against PEFT's own forward pass on random input.

Dimensions in names: B batch, D input width, O output width.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recycler.zoo import inspect
from recycler.zoo.config import Problems, check_convertible
from recycler.zoo.errors import InputError, SecurityError
from recycler.zoo.inspect import printable
from recycler.zoo.match import check_sites
from recycler.zoo.patterns import first_matches

_PREFIX = "base_model.model."
_NAME = "default"  # PEFT's name for the one adapter
_MAX_MADE = 2**31  # numbers that PEFT may have to draw for projections that are not in the file: 8 GB
_OTHER_BASE = "Check adapter_config.json, and that --base is the one it was trained for."
Weight = Callable[[str], Tensor]


def through_peft(
    config: Mapping[str, Any],
    weights: Path,
    name: str,
    shapes: Mapping[str, tuple[int, int]],
    weight: Weight | None,
) -> tuple[int, Iterator[tuple[str, Tensor]]]:
    """The dense updates of an adapter of any additive method, site by site.

    Args:
        config: the parsed adapter_config.json. weights: its safetensors. name: for messages.
        shapes: module path → (O, D) of every linear of the base.
        weight: path → W [O, D] of the base, for methods that depend on it; else None.

    Returns:
        How many sites there are, and an iterator over (module path, ΔW [O, D] fp32), made as it is consumed.

    Raises:
        InputError: left-over or missing tensors, sites that are no linears of the base, options that PEFT would drop, or a
            method that the installed PEFT does not know. SecurityError: the file breaks the rules of its format.
    """
    config, renamed = _as_peft_has_it(config)
    kind, prefix = _method(config, name)
    fields = {one.name for one in dataclasses.fields(kind)}
    check_convertible(config, name, fields)
    header = {key.replace(*renamed): shape for key, shape in inspect.read_header(weights).items()}
    inspect.check_header(header, name)
    paths = _paths(header, prefix) or _matched(config, shapes, name)
    if not paths:
        raise InputError(
            f"{name} has no site in this base.", "Its config names none of the base's linears.", _OTHER_BASE, code="E_SITES"
        )
    check_sites(name, {path: shapes.get(path, (0, 0)) for path in paths}, shapes)
    ordered = [path for path in shapes if path in paths]  # some methods number their layers in the model's order
    tensors = {key.replace(*renamed): tensor for key, tensor in load_tensors(weights).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns where this module refuses
        settings = _settings(config, fields, ordered, header)
        _check_size(settings, header, [shapes[path] for path in ordered], name)
        model = _inject(kind, settings, {path: shapes[path] for path in ordered}, weight, tensors, name)
    layers = {path: model.get_submodule(_PREFIX + path) for path in ordered}
    return len(layers), _deltas(layers, shapes, name)


def _as_peft_has_it(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, str]]:
    """Bone became MiSS: PEFT's own script renames the method and its tensors, and nothing else."""
    if config.get("peft_type") == "BONE":
        return {**config, "peft_type": "MISS"}, (".bone_", ".miss_")
    return dict(config), ("", "")


def _method(config: Mapping[str, Any], name: str) -> tuple[Any, str]:
    """PEFT's config class of the method, and what the names of its tensors begin with."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING

    known = {str(getattr(one, "value", one)): one for one in PEFT_TYPE_TO_CONFIG_MAPPING}
    given = known.get(str(config.get("peft_type")))
    if given is None or given not in PEFT_TYPE_TO_PREFIX_MAPPING:
        raise InputError(
            f"{name} cannot be converted: the installed PEFT does not know {printable(config.get('peft_type'))}.",
            "Its updates are computed by PEFT.",
            "Update it: pip install -U peft",
            code="E_FORMAT",
        )
    return PEFT_TYPE_TO_CONFIG_MAPPING[given], PEFT_TYPE_TO_PREFIX_MAPPING[given]


def _paths(header: Mapping[str, Any], prefix: str) -> set[str]:
    """The module paths in tensor names such as ``base_model.model.<path>.hada_w1_a``; shared tensors have none."""
    found = (key.removeprefix(_PREFIX).rpartition("." + prefix)[0] for key in header if key.startswith(_PREFIX))
    return {path for path in found if path}


def _matched(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], name: str) -> set[str]:
    """The sites that the config names, for files (Uni-LoRA's) that hold nothing but what all sites share."""
    targets = config.get("target_modules")
    also = [key for key in ("exclude_modules", "layers_to_transform", "layers_pattern") if config.get(key)]
    if also or not targets or targets == "all-linear":
        raise InputError(
            f"The sites of {name} are not known: its tensors are shared by all of them.",
            f"Its config says target_modules={printable(targets, 60)}{', ' + ', '.join(also) if also else ''}.",
            "Write the module names out in target_modules.",
        )
    if isinstance(targets, str):  # PEFT: re.fullmatch; matched here where a pattern without end can be stopped
        found = first_matches([rf"\A(?:{targets})"], list(shapes))
        return {path for path, match in zip(shapes, found, strict=True) if match is not None}
    wanted = [str(one) for one in targets]
    return {path for path in shapes if any(path == one or path.endswith("." + one) for one in wanted)}


def load_tensors(weights: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises SecurityError where it breaks the rules of its format."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(weights)
    except SafetensorError as error:
        raise SecurityError(
            f"{printable(weights)} breaks the rules of safetensors: {printable(error)}.",
            "Tensors overlap, leave holes or lie outside the file, so its contents are ambiguous.",
            "Get the file again from its author.",
            code="E_HEADER",
        ) from error


def _settings(config: Mapping[str, Any], fields: set[str], paths: Sequence[str], header: Mapping[str, Any]) -> dict[str, Any]:
    """What PEFT's config class is given: the file's settings, with sites and patterns written out."""
    settings = {key: value for key, value in config.items() if key in fields and value is not None}
    for key, value in list(settings.items()):
        if key.endswith("_pattern") and isinstance(value, dict):  # rank_pattern, alpha_pattern, n_frequency_pattern, ...
            keys = list(value)
            found = zip(paths, first_matches(keys, list(paths)), strict=True) if keys else ()
            given = {path: value.get(path if i is None else keys[i]) for path, i in found if i is not None or path in value}
            settings[key] = dict(sorted(given.items(), key=lambda one: (-len(one[0]), one[0])))
    for key in ("task_type", "auto_mapping", "base_model_name_or_path", "revision", "exclude_modules", "layers_to_transform",
                "layers_pattern", "runtime_config", "peft_version", "eva_config"):  # fmt: skip
        settings.pop(key, None)
    # What is in the file is used, whatever the config says of it.
    for key, mark in {
        "save_projection": ("vera_A", "randlora_A", "tinylora_P"),
        "save_indices": ("unilora_indices",),
        "save_only_topk_weights": ("_topk_indices",),
    }.items():
        if key in fields:
            settings[key] = any(part in tensor for tensor in header for part in mark)
    return settings | {"target_modules": list(paths), "inference_mode": True}


def _check_size(settings: Mapping[str, Any], header: Mapping[str, Any], sites: Sequence[tuple[int, int]], name: str) -> None:
    """A config can ask for terabytes; PEFT allocates before it compares with the file."""
    longest = max(max(shape, default=1) for shape in header.values())
    widest = max(max(shape) for shape in sites)
    asked = {
        key: value
        for key, value in settings.items()
        if isinstance(value, int) and key in ("n_frequency", "num_vectors", "vector_length", "theta_d_length", "u", "mini_r")
    }
    wrong = [f"{key}={value}" for key, value in asked.items() if value > max(longest, 2**20)]
    rank = settings.get("r", 0)
    if isinstance(rank, int) and settings["peft_type"] in ("VERA", "RANDLORA", "VBLORA", "UNILORA", "TINYLORA", "PSOFT"):
        wrong += [f"r={rank}"] * (rank * widest * 4 > _MAX_MADE)
    if wrong:
        raise InputError(
            f"{name} asks for more than its file can hold: {', '.join(wrong)}.",
            "PEFT would set aside gigabytes before it looked at the file.",
            "Correct adapter_config.json, or leave the adapter out.",
            code="E_CONFIG",
        )


def _inject(
    kind: Any,
    settings: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, int]],
    weight: Weight | None,
    tensors: Mapping[str, Tensor],
    name: str,
) -> Any:
    """A stand-in with PEFT's layers on it, holding exactly the tensors of the file."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        model = get_peft_model(_stand_in(shapes, weight), kind(**settings))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        why = "Its config does not fit its tensors, or not this base."
        raise InputError(f"PEFT refuses {name}: {printable(error, 300)}.", why, _OTHER_BASE, code="E_CONVERSION") from error
    problems = Problems(name)
    layers = [p for p, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    problems.add("sites that did not become layers", sorted(set(shapes) - {path.removeprefix(_PREFIX) for path in layers}))
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    problems.add("tensors that no site uses", [printable(key) for key in sorted(tensors.keys() - expected.keys())])
    problems.add("missing tensors", [printable(key) for key in sorted(expected.keys() - tensors.keys())])
    problems.add(
        "tensors of another shape than the config says",
        [
            f"{printable(key)} ({list(tensor.shape)}, not {list(expected[key].shape)})"
            for key, tensor in sorted(tensors.items())
            if key in expected and tensor.shape != expected[key].shape
        ],
    )
    problems.raise_any("Nothing is ever dropped: every tensor must be placed and every site complete.")
    set_peft_model_state_dict(model, dict(tensors))
    return model.eval()


def _stand_in(shapes: Mapping[str, tuple[int, int]], weight: Weight | None) -> nn.Module:
    """Linears at their paths in an otherwise empty model, in order; weights are zeros that take no memory, or the base's."""
    root = nn.Module()
    for path, (o, d) in shapes.items():
        *parents, last = path.split(".")
        place = root
        for part in parents:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        linear = nn.Linear(d, o, bias=False, device="meta")
        held_OD = torch.zeros(()).expand(o, d) if weight is None else weight(path)
        linear.weight = nn.Parameter(held_OD, requires_grad=False)
        place.add_module(last, linear)
    return root


def _deltas(layers: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], name: str) -> Iterator[tuple[str, Tensor]]:
    for path, layer in layers.items():
        with torch.no_grad():
            delta_OD = _delta(layer, shapes[path])
            off = _disagreement(layer, delta_OD)
        if off > 1e-3:
            raise InputError(
                f"PEFT's forward of {name} at {printable(path)} is not that of its own update (off by {off:.2g}).",
                "The method does more than add to the weight, or this version of PEFT has changed it.",
                "Leave it out, and report it with the version of PEFT.",
                code="E_CONVERSION",
            )
        yield path, delta_OD.float()


def _delta(layer: Any, shape: tuple[int, int]) -> Tensor:
    """What the layer adds to its weight. MiSS returns the whole weight, so it is given a zero one, except where its update is
    made of the base's weight."""
    if hasattr(layer, "get_delta_weight_miss"):
        if layer.miss_fn == "bat":
            return layer.get_delta_weight(_NAME, layer.get_base_layer().weight.clone())
        return layer.get_delta_weight_miss(_NAME, torch.zeros(shape))
    return layer.get_delta_weight(_NAME)


def _disagreement(layer: Any, delta_OD: Tensor) -> float:
    """How far PEFT's forward is from the update, relative to it, beyond what rounding beside the base's output explains."""
    random = torch.Generator().manual_seed(0)
    x_BD = torch.randn(4, delta_OD.shape[1], generator=random)
    base_BO = layer.get_base_layer()(x_BD)
    update_BO = layer(x_BD) - base_BO
    off = float((update_BO - x_BD @ delta_OD.float().T).norm()) - 1e-5 * float(base_BO.norm())
    return max(off, 0.0) / (float(update_BO.norm()) + 1e-30)
