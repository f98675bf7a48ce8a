"""Nothing in the hot path waits for the device, shown without one: forwards of routed models on fake CUDA tensors, where reading a
value raises, and copies between host and device are caught."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import Pico
from fake_cuda import Indexing
from test_conformance import FAST
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import StaticCache

import recycler
from recycler.engine.stack import Stack
from recycler.routed import RoutedModel
from recycler.routers import policies
from recycler.routers.discovery import methods


class NoTraffic(TorchDispatchMode):
    """Raises where something goes from host to device or back."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()}
        made = {t.device.type for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        if given and made - given:
            raise AssertionError(f"{func} goes from {given} to {made}")
        return out


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


def _faked(value: Any) -> Any:
    """A plan with its tensors on fake CUDA."""
    if isinstance(value, torch.Tensor):
        return _fake(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: _faked(getattr(value, f.name)) for f in dataclasses.fields(value)})
    if isinstance(value, (tuple, list)):
        return type(value)(map(_faked, value))
    return value


@contextmanager
def on_fake_cuda(model: RoutedModel) -> Iterator[Any]:
    """Every parameter and buffer becomes a fake one on CUDA, and what is made when first asked for. Yields the plan of a prompt.
    The model is not usable afterwards."""
    ids_BT = torch.ones(2, 8, dtype=torch.long)
    assert model.router is not None
    plan = model.router.prepare(model.reading, {"input_ids": ids_BT, "attention_mask": ids_BT})
    with torch.no_grad(), model.engine.control.set(plan=plan):
        model.base(ids_BT, use_cache=False)
    policies._POSITIONS.clear()
    roots: list[torch.nn.Module] = [model.base, model.engine, model.router]
    roots += [bank._some[1] for bank in model.engine.banks if bank._some is not None]
    with FakeTensorMode(), Indexing():
        for module in {id(m): m for root in roots for m in root.modules()}.values():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(_fake(parameter), requires_grad=False)
            module._buffers |= {name: None if b is None else _fake(b) for name, b in module._buffers.items()}
            if isinstance(module, Stack):
                module._tables = None if module._tables is None else _faked(module._tables)
                pairs = module._padded.items()
                module._padded = {
                    s: (torch.empty(b.shape[0], b.shape[1], a.shape[1], dtype=b.dtype, device="cuda").transpose(1, 2), _fake(b))
                    for s, (a, b) in pairs
                }
        placed = getattr(model.router, "_placed", {})  # X-LoRA's classifier, where it has been
        placed |= {torch.device("cuda", 0): _faked(found) for found in list(placed.values())}
        for bank in model.engine.banks:
            if bank._some is not None:
                bank._some = (*bank._some[:2], _fake(bank._some[2]))
        yield _faked(plan)
    policies._POSITIONS.clear()


def composed(world: Pico, method: str, **options: Any) -> RoutedModel:
    zoo = recycler.Zoo(world.zoo)
    profile = recycler.profile(zoo, recycler.Shots.from_files(*world.tasks), kshot=2)
    router = recycler.build_router(method, profile, zoo=zoo, **{**FAST.get(method, {}), **options})
    return recycler.compose(zoo, router, dtype="bfloat16")


@pytest.mark.parametrize("method", sorted(name for name in methods() if name != "oracle"))
def test_prefill_and_decode_never_wait(llama: Pico, method: str) -> None:
    model = composed(llama, method)
    with on_fake_cuda(model) as plan, torch.no_grad(), model.engine.control.set(plan=plan):
        cache = StaticCache(config=model.base.config, max_cache_len=12)
        ids_BT = torch.zeros(2, 8, dtype=torch.long, device="cuda")
        mask_BT = torch.ones(2, 12, dtype=torch.long, device="cuda")
        if model.engine.companion is not None:
            cache = None  # pairs caches of its own making
        model.base(ids_BT, use_cache=False)  # transformers makes a few things once, here
        with NoTraffic():
            prefill = model.base(ids_BT, attention_mask=mask_BT[:, :8], past_key_values=cache, use_cache=cache is not None)
            assert prefill.logits.device.type == "cuda"
            if cache is not None:
                model.base(ids_BT[:, :1], attention_mask=mask_BT[:, :9], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("path", ["dense", "gather", "sorted", "skip"])
def test_no_path_waits(llama: Pico, path: Any) -> None:
    model = composed(llama, "arrow")
    model.engine.control.path = path
    with on_fake_cuda(model), torch.no_grad(), NoTraffic():
        model.base(torch.zeros(2, 8, dtype=torch.long, device="cuda"), use_cache=False)


def test_what_waits_is_caught(llama: Pico) -> None:
    model = composed(llama, "arrow")
    with on_fake_cuda(model), torch.no_grad():
        x = torch.zeros(3, device="cuda")
        with pytest.raises(Exception, match=r"item|scalar"):
            x.sum().item()
        with NoTraffic(), pytest.raises(AssertionError, match="goes from"):
            x.cpu()
