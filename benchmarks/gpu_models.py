"""What the engine's GPU rows run, and how it is timed: the linears of one decoder layer, or a whole model, with random weights on CUDA.

Dimensions in names: D input width, O output width, E adapter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fake_cuda
import peers
import torch
from torch import Tensor, nn

from recycler.engine.attach import Attachment
from recycler.routers.arrow import Arrow
from recycler.routers.linear import Rows
from recycler.routers.protocol import Group
from recycler.routers.select import Policy
from recycler.zoo.adapter import Factors

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
CUDA, HALF = "cuda", torch.bfloat16


def linear(d: int, o: int) -> nn.Linear:
    return placed(nn.Linear(d, o, bias=False, device="meta"))  # type: ignore[return-value]


def placed(model: nn.Module) -> nn.Module:
    """On CUDA with random parameters. Not by `.to`, which cannot exchange fake ones."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                made = 0.02 * torch.randn(value.shape, device=CUDA, dtype=HALF)
                module._parameters[name] = nn.Parameter(made, requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.ops.aten._to_copy(buffer, device=torch.device(CUDA))
    return model


class Linears(nn.Module):
    """The seven linears of a decoder layer, joined without attention."""

    def __init__(self, hidden: int, kv: int, mlp: int) -> None:
        """On the meta device; see `placed`."""
        super().__init__()
        shapes = {
            "q_proj": (hidden, hidden), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (hidden, hidden),
            "gate_proj": (hidden, mlp), "up_proj": (hidden, mlp), "down_proj": (mlp, hidden),
        }  # fmt: skip
        for name, (d, o) in shapes.items():
            setattr(self, name, nn.Linear(d, o, bias=False, device="meta"))
        self.shapes = {name: (o, d) for name, (d, o) in shapes.items()}

    def forward(self, x: Tensor) -> Tensor:
        q, _, _ = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        x = self.o_proj(q)
        return self.down_proj(self.gate_proj(x) * self.up_proj(x))  # type: ignore[no-any-return]


def factors_of(shapes: Mapping[str, tuple[int, int]], count: int, rank: int) -> dict[str, dict[str, Factors]]:
    """Made where they run: 256 adapters of a Llama-8B layer would take minutes on the host."""

    def one(o: int, d: int) -> Factors:
        return Factors(
            torch.randn(rank, d, device=CUDA, dtype=HALF) / d**0.5, 0.05 * torch.randn(o, rank, device=CUDA, dtype=HALF)
        )

    return {site: {f"a{e:03d}": one(o, d) for e in range(count)} for site, (o, d) in shapes.items()}


def prototypes(shapes: Mapping[str, tuple[int, int]], count: int) -> dict[str, Rows]:
    return {site: Rows(nn.functional.normalize(torch.randn(count, d), dim=-1)) for site, (_, d) in shapes.items()}


def plain_linears(shape: tuple[int, int, int]) -> Linears:
    return placed(Linears(*shape))  # type: ignore[return-value]


def routed_linears(shape: tuple[int, int, int], count: int, rank: int) -> tuple[Linears, Attachment]:
    layer = plain_linears(shape)
    names = [f"a{e:03d}" for e in range(count)]
    groups = tuple(Group(sites, layer.shapes[sites[0]][1]) for sites in GROUPS)
    router = Arrow(names, Policy(top_k=peers.TOP_K), prototypes(layer.shapes, count))
    return layer, Attachment(layer, factors_of(layer.shapes, count, rank), names, router, groups)


def peft_single(shape: tuple[int, int, int], rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    with fake_cuda.paused():
        layer = Linears(*shape)
        config = LoraConfig(r=rank, target_modules=[*layer.shapes], init_lora_weights=False)
        model = get_peft_model(layer, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True).eval()
    return placed(model)


class ArrowLike(nn.Module):
    """PEFT's Arrow: its own layer, over the linears' outputs. Building it by PEFT's own way would read adapters from folders."""

    def __init__(self, shape: tuple[int, int, int], count: int, rank: int) -> None:
        from peft.tuners.lora.arrow import ArrowLoraLinearLayer
        from peft.tuners.lora.config import ArrowConfig

        super().__init__()
        self.layer = plain_linears(shape)
        names = [f"task_{e}" for e in range(count)]
        config = ArrowConfig(top_k=peers.TOP_K)
        config.task_adapter_names, config.gks_adapter_names = names, []
        for site, (o, d) in self.layer.shapes.items():
            a = {name: linear(d, rank) for name in names}
            b = {name: linear(rank, o) for name in names}
            arrow = ArrowLoraLinearLayer(d, config)
            arrow.register_buffer("prototypes", torch.randn(count, d, device=CUDA, dtype=HALF))
            self.layer.get_submodule(site).register_forward_hook(self._hook(arrow, a, b, dict.fromkeys(names, 1.0)))

    @staticmethod
    def _hook(arrow: Any, a: Any, b: Any, scaling: Any) -> Any:
        return lambda module, args, output: output + arrow(args[0], a, b, nn.Identity(), scaling)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class Whole:
    """SmolLM2-135M's shape, with or without adapters: prefill, and one token more in a static cache."""

    def __init__(
        self, shape: Mapping[str, int], count: int | None = None, wrap: Callable[[Any], Any] = lambda model: model
    ) -> None:
        with fake_cuda.paused():
            model = wrap(peers.bare(shape, HALF))
        self.model: Any = placed(model)
        if count is not None:
            shapes = peers.sites_of(self.model)
            names = [f"a{e:03d}" for e in range(count)]
            router = Arrow(names, Policy(top_k=peers.TOP_K), prototypes(shapes, count))
            self.engine = Attachment(self.model, factors_of(shapes, count, 8), names, router)

    def prefill(self, tokens: int) -> Callable[[], Any]:
        ids = torch.ones(1, tokens, dtype=torch.long, device=CUDA)
        return lambda: self.model(input_ids=ids, use_cache=False, logits_to_keep=1)

    def decode(self, room: int = 512) -> Callable[[], Any]:
        """Written at the next place each time; what is timed does not depend on how full the cache is."""
        from transformers import StaticCache

        cache = StaticCache(config=self.model.config, max_cache_len=room)
        ids = torch.ones(1, 1, dtype=torch.long, device=CUDA)
        position = torch.full((1, 1), room // 2, dtype=torch.long, device=CUDA)
        return lambda: self.model(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True)


# -- how it is timed


class Clock:
    """CUDA events; in a dry run nothing but one call of everything, and nan for every time."""

    def __init__(self, dry: bool, repeats: int) -> None:
        self.dry, self.repeats = dry, repeats

    @torch.no_grad()
    def ratios(self, runs: Mapping[str, Callable[[], Any]], graphed: bool = False, times: int = 20) -> dict[str, float]:
        """Time of each, × the first."""
        if self.dry:
            for run in runs.values():
                run()
            return dict.fromkeys(runs, math.nan)
        ready = {name: self.captured(run) if graphed else run for name, run in runs.items()}
        best = dict.fromkeys(runs, math.inf)
        for number, (name, run) in itertools.product(range(self.repeats + 1), ready.items()):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(times):
                run()
            stop.record()
            stop.synchronize()
            if number:  # the first round warms up
                best[name] = min(best[name], start.elapsed_time(stop) / times)
        first = best[next(iter(best))]
        return {name: milliseconds / first for name, milliseconds in best.items()}

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    @torch.no_grad()
    def kernels(self, run: Callable[[], Any]) -> float:
        """How many kernels one call launches."""
        run()
        if self.dry:
            return math.nan
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
            run()
            torch.cuda.synchronize()
        return float(sum(e.device_type == torch.autograd.DeviceType.CUDA and "Mem" not in e.name for e in seen.events()))

    @torch.no_grad()
    def peak(self, run: Callable[[], Any]) -> float:
        """GB that one call takes at its highest, beyond what is there before it."""
        run()
        if self.dry:
            return math.nan
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e9

    @contextmanager
    def no_syncs(self) -> Iterator[None]:
        if self.dry:  # fake tensors refuse to be read anyway
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
