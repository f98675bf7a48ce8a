"""Finding the linears of a base, their shapes, and which of them read the same input.

Knows nothing about adapters or routing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from recycler.routers.protocol import Group, Stream
from recycler.zoo.errors import InputError, shorten

# Two lengths that differ, so that a traced input tells which stream it belongs to.
_LENGTH: Mapping[Stream, int] = {"input": 3, "target": 2}


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(O, D) of a linear layer: nn.Linear, transformers' Conv1D, or a quantised layer that declares its features."""
    out_features, in_features = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(out_features, int) and isinstance(in_features, int):
        return out_features, in_features
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int):
        weight = module.weight  # [D, O]
        assert isinstance(weight, Tensor)
        return weight.shape[1], weight.shape[0]
    return None


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Module path → (O, D) for every linear of a model; works on the meta device."""
    found = ((name, linear_shape(module)) for name, module in model.named_modules())
    return {name: shape for name, shape in found if shape is not None}


@torch.no_grad()
def weight_OD(module: nn.Module) -> Tensor:
    """The weight of a linear as an fp32 [O, D] matrix, dequantised where it is quantised, fetched where accelerate offloads it,
    put together where it lies in parts over several processes (all of them have to ask)."""
    with align_module_device(module):
        weight = held = module.weight
        whole: Any = getattr(weight, "full_tensor", None)
        if whole is not None:
            weight = whole()
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            from peft.utils.integrations import dequantize_module_weight

            weight = dequantize_module_weight(module)
            module.weight = held  # on the CPU, PEFT puts one there that has lost its 8-bit scales
        weight = weight.detach().float()
    return weight.T if type(module).__name__ == "Conv1D" else weight


@torch.no_grad()
def trace_groups(model: Any, sites: Iterable[str]) -> tuple[Group, ...]:
    """Groups of sites, in call order, found by running one tiny forward and looking at who reads which tensor.

    Only sites of one parent module are grouped, so that a group lives on one device and its cached shrink is short-lived
    (cross-attention keys and values of all layers read the same encoder output).

    Raises:
        InputError: the forward does not reach some of the sites.
    """
    calls: list[tuple[str, Tensor]] = []  # keeps the tensors alive, so that identities stay unique
    wanted = set(sites)

    def remember(name: str) -> Any:
        return lambda module, args, output: calls.append((name, args[0]))

    handles = [m.register_forward_hook(remember(n)) for n, m in model.named_modules() if n in wanted]
    was_training = model.training
    try:
        model.eval()
        model(**_tiny_inputs(model))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()

    missing = wanted - {name for name, _ in calls}
    if missing:
        raise InputError(
            f"A forward of the base does not reach {shorten(sorted(missing))}.",
            "Adapters there would load and do nothing.",
            "Remove those adapters from the zoo, or use a base whose forward runs these modules.",
            code="E_SITES",
        )
    lengths = {length: stream for stream, length in _LENGTH.items()}
    groups: dict[tuple[str, int], list[tuple[str, Tensor]]] = {}
    for name, x in calls:
        groups.setdefault((name.rpartition(".")[0], id(x)), []).append((name, x))
    result = []
    latest: dict[tuple[str, Stream], str] = {}
    for (parent, _), members in groups.items():
        x = members[0][1]
        stream: Stream = lengths.get(x.shape[-2], "input") if is_encoder_decoder(model) else "input"
        group = Group(tuple(dict.fromkeys(n for n, _ in members)), x.shape[-1], stream, latest.get((parent, stream)))
        latest[parent, stream] = group.name
        result.append(group)
    return tuple(replace(group, depth=number / len(result)) for number, group in enumerate(result))


def is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _tiny_inputs(model: Any) -> dict[str, Tensor | bool]:
    device = input_device(model)
    inputs: dict[str, Tensor | bool] = {
        "input_ids": torch.ones(1, _LENGTH["input"], dtype=torch.long, device=device),
        "use_cache": False,
    }
    if is_encoder_decoder(model):
        inputs["decoder_input_ids"] = torch.ones(1, _LENGTH["target"], dtype=torch.long, device=device)
    return inputs


def input_device(model: Any) -> torch.device:
    """Where inputs go: to the input embeddings, seen through accelerate's offloading."""
    embeddings = model.get_input_embeddings()
    hooked = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return embeddings.weight.device if hooked is None else torch.device(hooked)
