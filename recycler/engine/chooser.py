"""Which path a group takes: a pure function of shapes, dtype and device, never of what was decided, so that nothing waits for the
device and nothing is compiled twice for the same shapes.

The CPU's numbers are crossovers of ``benchmarks/paths.py`` (576-wide inputs, rank 8, two adapters a token, one thread). They are
stated in breadths: how many times the rank rows that a token has are kept. The GPU's are a roofline of an H100's bandwidth and
launch time, and have not been measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recycler.engine.paths import Name

_BANDWIDTH, _LAUNCH, _BALANCE = 3.0e12, 1.5e-6, 267.0  # bytes a second, seconds, FLOP a byte
_SKIP_TOKENS = 64


@dataclass(frozen=True)
class Shape:
    """What is known of a call before it runs.

    Attributes:
        tokens: in the call. sequences: rows of its batch.
        rows: rank rows that are kept, over the group's sites.
        active: rank rows that one token has at most, over the group's sites; None where a token may have all adapters.
        adapters: how many there are; k: how many of them a token has at most.
        widths: input width, and the sum of output widths.
        sequencewise: all tokens of a sequence have the same mixture.
    """

    tokens: int
    sequences: int
    rows: int
    active: int | None
    adapters: int
    k: int | None
    widths: tuple[int, int]
    dtype: torch.dtype
    device: str
    sequencewise: bool = False
    compiling: bool = False


def choose(shape: Shape) -> tuple[Name, str]:
    """(path, why)"""
    if shape.active is None or shape.k is None:
        return "dense", "a token may have every adapter"
    breadth = shape.rows / max(shape.active, 1)
    said = f"{shape.rows} rank rows are kept, {shape.active} are a token's"
    if shape.sequencewise:
        length = shape.tokens // max(shape.sequences, 1)
        if length >= (16 if shape.dtype == torch.float32 else 32) and breadth > 2:
            return "sequence", f"{said}, and {length} tokens share them"
        if breadth <= 25 or shape.tokens > 16:
            return "dense", f"{said}: one GEMM"
    if shape.device == "cuda":
        return _cuda(shape, said)
    return _cpu(shape, breadth, said)


def _cpu(shape: Shape, breadth: float, said: str) -> tuple[Name, str]:
    tokens, half = shape.tokens, shape.dtype != torch.float32
    assert shape.k is not None
    if tokens * shape.k <= (64 if half else 24) and breadth > (14 if half else 6) + 1.5 * tokens:
        return "gather", f"{said}, and {tokens} tokens look theirs up"
    if half:
        if tokens >= 512 and breadth > 28:
            return "sorted", f"{said}, and {tokens} tokens can be sorted"
    elif breadth > 4.5 + 100 / tokens and not shape.compiling:  # grouped_mm cannot be traced in fp32
        return "sorted", f"{said}, and {tokens} tokens can be sorted"
    return "dense", f"{said}: one GEMM"


def _cuda(shape: Shape, said: str) -> tuple[Name, str]:
    assert shape.k is not None and shape.active is not None
    if shape.tokens <= _SKIP_TOKENS:
        untouched = (1 - shape.k / shape.adapters) ** shape.tokens  # of the adapters, by tokens that choose evenly
        spared = shape.rows * untouched * sum(shape.widths) * shape.dtype.itemsize / _BANDWIDTH
        if spared > 2 * _LAUNCH:
            return "skip", f"{said}; skipping the others spares {1e6 * spared:.0f} µs"
    elif shape.rows > 1000 * shape.k / 2 and shape.dtype != torch.float32:
        return "sorted", f"{said}, and {shape.tokens} tokens can be sorted"
    return "dense", f"{said}: one GEMM"
