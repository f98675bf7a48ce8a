"""The GPU kernels, built as they are launched, for GPUs that need not be there: what they cost in registers, and what they copy how.

    python benchmarks/kernel_build.py [--adapters N] [--rank N] [--width N] [--dtype fp16] [--tiles 16 64] [--json]

Prints a line for each kernel, size and architecture: registers a thread, bytes of shared memory, bytes of local memory and its loads
and stores in the machine code (spills: should be 0), copies that run beside the computation (LDGSTS, or TMA's UBLKCP; should not be 0
where a loop is pipelined) and tensor cores' instructions. Needs triton, which brings the tools.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from recycler.engine.kernels import triton_gate, triton_skip

ARCHITECTURES = (80, 90)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
Launch = tuple[str, JITFunction, tuple[Any, ...], dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds the kernels and reads their machine code.")
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--width", type=int, default=4096, help="of inputs and outputs; Llama-8B's where not given")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--tiles", type=int, nargs="+", choices=(16, 32, 64), default=[16, 32, 64], help="of tokens")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sizes = (args.adapters, args.rank, args.width, next(dtype for dtype, kind in KINDS.items() if kind == args.dtype))
    rows = [build(launch, architecture) for launch in launches(*sizes, args.tiles) for architecture in ARCHITECTURES]
    if args.json:
        print(json.dumps(rows))
        return
    print(*(f"{key:>{_width(rows, key)}}" for key in rows[0]), sep="  ")
    for row in rows:
        print(*(f"{value:>{_width(rows, key)}}" for key, value in row.items()), sep="  ")


def launches(adapters: int, rank: int, width: int, kind: torch.dtype, tiles: list[int], sites: int = 3) -> Iterator[Launch]:
    """(what it is, kernel, arguments, options) of every kernel, for a group of sites such as q, k and v."""
    rows = sites * adapters * rank

    def new(*shape: int, dtype: torch.dtype = kind) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    column_R = new(rows, dtype=torch.int64)
    logits_NSE = new(4096, sites, adapters, dtype=torch.float32)
    yield from _launched(triton_gate, "gate", lambda: triton_gate.gate(logits_NSE, 2, 1.0, True))
    for tokens in (1, 4096):
        logits_NSE = new(tokens, sites, adapters, dtype=torch.float32)
        h_NR = new(tokens, rows)
        yield from _launched(
            triton_gate,
            f"gate and scale, {tokens}",
            lambda x=logits_NSE, h=h_NR: triton_gate.gate_scale(x, 2, 1.0, True, h, column_R),
        )
    for tile in tiles:
        w_NSE, lists = new(tile, sites, adapters, dtype=torch.float32), [new(1, rows // 16), new(1, rows // 16 + 1)]
        lists = [part.to(torch.int32) for part in lists]
        if tile == tiles[0]:  # it loops over a tile's tokens, whatever their number
            yield from _launched(triton_skip, "plan", lambda w=w_NSE, t=tile: triton_skip.plan(w, column_R, t))
        x_ND, a_RD, h_NC = new(tile, width), new(rows, width), new(tile, rows)
        yield from _launched(
            triton_skip,
            f"shrink, {tile}",
            lambda x=x_ND, a=a_RD, w=w_NSE, at=lists, t=tile: triton_skip.shrink_skip(x, a, w, column_R, *at, t),
        )
        b_RO = new(rows // sites, width)
        yield from _launched(
            triton_skip,
            f"expand, {tile}",
            lambda y=x_ND, h=h_NC, b=b_RO, at=lists, t=tile: triton_skip.expand_skip(y, h, b, rows // sites, *at, t),
        )


def _launched(module: Any, name: str, call: Callable[[], Any]) -> Iterator[Launch]:
    """What a function would launch."""
    found: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: JITFunction) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **options: found.append((name, self.kernel, args, options))

    kernels = {key: value for key, value in vars(module).items() if isinstance(value, JITFunction)}
    for key, kernel in kernels.items():
        setattr(module, key, Recorder(kernel))
    try:
        call()
    finally:
        for key, kernel in kernels.items():
            setattr(module, key, kernel)
    return iter(found)


def build(launch: Launch, architecture: int) -> dict[str, Any]:
    """Builds one kernel with what is known of its arguments at a launch, and reads it."""
    name, kernel, args, options = launch
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.params):
        value = args[i] if i < len(args) else options[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        signature[parameter.name] = f"*{KINDS[value.dtype]}" if isinstance(value, Tensor) else _kind(value)
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize):
            attributes[(i,)] = [["tt.divisibility", 16]]
    built = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={key: value for key, value in options.items() if key.startswith("num_")},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = [TOOLS / "cuobjdump", "-sass", "--dump-resource-usage", file.name]
        code = subprocess.run(tool, check=True, capture_output=True, text=True).stdout

    def count(pattern: str) -> int:
        return len(re.findall(rf"\b(?:{pattern})\b", code))

    return {
        "kernel": name,
        "sm": architecture,
        "registers": int(re.findall(r"REG:(\d+)", code)[-1]),
        "shared": built.metadata.shared,
        "local": sum(int(re.findall(rf"{kind}:(\d+)", code)[-1]) for kind in ("STACK", "LOCAL")),
        "LDL": count("LDL"),
        "STL": count("STL"),
        "copies": count("LDGSTS|UBLKCP|UTMALDG"),
        "mma": count("HMMA|HGMMA"),
    }


def _kind(value: float) -> str:
    return "fp32" if isinstance(value, float) else "i32"


def _width(rows: list[dict[str, Any]], key: str) -> int:
    return max(len(key), *(len(str(row[key])) for row in rows))


if __name__ == "__main__":
    main()
