"""Fake CUDA tensors on a machine without CUDA: shapes, dtypes and devices are checked, values do not exist, and reading one raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode


@contextmanager
def mode() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True), Indexing():
        yield


def paused() -> AbstractContextManager[Any]:
    """Real tensors, for as long as something is built that fakes are in the way of. Nothing changes where there are none."""
    return unset_fake_temporarily()


class Indexing(TorchFunctionMode):
    """x[...], x[...] = y, x.copy_(y) and x.contiguous() out of other operations: a build without CUDA refuses them for fake tensors too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and args[0].device.type == "cuda":
            return _index(*args)
        if func is torch.Tensor.__setitem__ and args[0].device.type == "cuda":
            return torch.ops.aten.copy_(_index(*args[:2]), args[2])
        if func is torch.Tensor.copy_ and args[0].device.type == "cuda":
            return torch.ops.aten.copy_(*args[:2])
        if func is torch.Tensor.contiguous and args[0].device.type == "cuda":
            return args[0].clone(memory_format=torch.contiguous_format)
        return func(*args, **(kwargs or {}))


def _index(x: torch.Tensor, key: Any) -> torch.Tensor:
    parts = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in [part for part in parts if not isinstance(part, torch.Tensor)]:
        place = next(i for i, part in enumerate(parts) if part is Ellipsis)
        given = sum(part is not None and part is not Ellipsis for part in parts)
        parts[place : place + 1] = [slice(None)] * (x.dim() - given)
    at, tensors = 0, list[torch.Tensor | None]()
    for part in parts:
        if isinstance(part, int):
            x = x.select(at, part)
            continue
        if part is None:
            x = x.unsqueeze(at)
        elif isinstance(part, slice) and part != slice(None):
            x = torch.ops.aten.slice(x, at, part.start, part.stop, part.step or 1)
        tensors.append(part if isinstance(part, torch.Tensor) else None)
        at += 1
    return x if all(t is None for t in tensors) else torch.ops.aten.index(x, tensors)
