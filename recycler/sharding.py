"""A base that fits no device: its weights lie in parts over several processes, one a device (PyTorch's FSDP2); adapters and gates are
whole in each.

    torchrun --nproc-per-node 8 -m recycler.cli build-router xlora --profile p16 -o steps=100

`accelerate launch` starts processes in the same way. The first process reads the base into the host's memory and hands every other one
its part, tensor by tensor. A layer's weights are put together just before it runs and let go after it, so that the engine's hooks see
linears as they always do. Methods that take gradient steps (`recycler.routers.training`) split every batch over the processes and add
gradients up: their steps are those of one process. All others run the same rows in every process, for the memory alone.

Only the first process writes, and talks.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from recycler.base import Base, fingerprint, load_base, load_tokenizer, ready, skeleton
from recycler.reading import layers
from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    import torch

_SET = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by torchrun, for every process it starts


def started() -> tuple[int, int]:
    """(which process this is, how many were started together); (0, 1) for one on its own. Imports nothing."""
    if not all(name in os.environ for name in _SET):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def together() -> bool:
    """Whether several processes were started to share a base."""
    return started()[1] > 1


def leads() -> bool:
    """Whether this is the process that writes and talks."""
    return started()[0] == 0 or not together()


def part(model: Any) -> tuple[int, int]:
    """(which process this is, how many share the model); (0, 1) for a model that is whole."""
    return getattr(model, "shared_by", (0, 1))


def load(
    name: str, *, dtype: str = "auto", device: str | None = None, device_map: Any = None, revision: str | None = None
) -> Base:
    """Loads a base in parts; all processes have to call it.

    Args: as of `recycler.base.load_base`. By default a process takes the CUDA device of its LOCAL_RANK, else the CPU.

    Raises:
        UsageError: it is an encoder–decoder, or quantised; or there is a device map. The others as `load_base`.
    """
    if device_map is not None:
        raise UsageError(
            f"device_map={device_map!r} for a base that several processes share.",
            "Each has the same part of every layer.",
            "Leave it out, or start one process.",
            code="E_DEVICE",
        )
    import torch
    from torch import distributed
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    place = _joined(device)
    which, of = started()
    whole = load_base(name, dtype=dtype, device="cpu", revision=revision).model if which == 0 else None
    told: list[Any] = [None if whole is None else _told(whole)]
    distributed.broadcast_object_list(told, src=0)
    facts = told[0]
    if facts["refused"]:
        raise UsageError(
            f"{name} cannot be shared by processes: it is {facts['refused']}.",
            "Only plain weights of causal models are put together again layer by layer.",
            "Start one process; in Python, device_map='auto' spreads a base over devices.",
            code="E_DEVICE",
        )

    model = skeleton(name, revision=revision)
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):  # on the meta device
        tensor.data = tensor.data.to(facts["dtypes"][key])
    model.generation_config = type(model.generation_config).from_dict(facts["generation"])
    head = model.get_output_embeddings()
    if (
        head.weight is model.get_input_embeddings().weight
    ):  # FSDP lets no two parts share; they are frozen, so that copies stay equal
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    base = ready(model, load_tokenizer(name, revision=revision), name)
    for layer in layers(model.base_model):
        fully_shard(layer)
    fully_shard(model.base_model)  # routers run it without the head
    fully_shard(model, reshard_after_forward=True)
    model.to_empty(device=place)
    parameters = {} if whole is None else dict(whole.named_parameters(remove_duplicate=False))
    for key, held in model.named_parameters(remove_duplicate=False):
        full = parameters[key].detach().to(place) if parameters else torch.empty(held.shape, dtype=held.dtype, device=place)
        held.data.copy_(distribute_tensor(full, held.device_mesh, held.placements))
    buffers = {} if whole is None else dict(whole.named_buffers(remove_duplicate=False))
    for key, buffer in model.named_buffers(remove_duplicate=False):
        if buffers:
            buffer.copy_(buffers[key])
        distributed.broadcast(buffer, 0)
    model.shared_by, model.known_fingerprint = (which, of), facts["fingerprint"]
    return base


def meet() -> None:
    """Waits for all processes."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.barrier()


def _joined(device: str | None) -> torch.device:
    """Where this process keeps its part; it has met the others."""
    import torch
    from torch import distributed

    cuda = torch.cuda.is_available() and device != "cpu"
    place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return place


def _told(whole: Any) -> dict[str, Any]:
    """What the first process says of the base that it has read."""
    tensors = [*whole.named_parameters(), *whole.named_buffers()]  # those that are tied once, as in the skeleton
    quantised = getattr(whole, "is_quantized", False) or any(not p.is_floating_point() for p in whole.parameters())
    return {
        "refused": "an encoder–decoder" if whole.config.is_encoder_decoder else "quantised" if quantised else "",
        "dtypes": {key: tensor.dtype for key, tensor in tensors},
        "generation": whole.generation_config.to_dict(),
        "fingerprint": fingerprint(whole),
    }
