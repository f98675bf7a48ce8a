"""Which path is fastest for one input group, and whether the chooser picks it. The CPU constants in recycler/engine/chooser.py come
from this table.

    python benchmarks/paths.py [--quick] [--counts 8,16,32,64,128] [--tokens 1,4,8,16,32,64,128,256,512] [--tops 1,2,4] [--out .bench/paths.csv]

Groups are those of SmolLM2-135M: 576 → 576, 192, 192 and 576 → 1536, 1536. Adapters have rank 8. All paths run on the same tokens and
weights and must agree in fp32. Times are the paths' own, without the base's linears; one thread, thread time, interleaved, the
minimum of the rounds. In a model the adapters of one group are not those of the next, so here up to 30 groups take turns, or 64 MB
of them: what is read comes from as far away as it would there. (With one group that stays in the cache, dense looks better at a few
tokens than it is.) "pick" is the chooser's; it is good within 15 % of the fastest. After the tokens that choose one by one come mixtures
that hold for a sequence, on the adapters that any of the sequences has.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import torch
from peers import interleaved
from report import DTYPES, describe

from recycler.engine.chooser import Shape, choose
from recycler.engine.paths import Dense, Gather, PerSequence, Sorted
from recycler.engine.stack import Slab, Stack

GROUPS = {"q,k,v": (576, 192, 192), "gate,up": (1536, 1536)}
WIDTH, RANK, GOOD, GATHERED = 576, 8, 1.15, 64  # beyond so many tokens nobody would look rows up
COLD, LAYERS = 64_000_000, 30


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        sequences: 0 where every token chooses; else so many mixtures, each of `tokens` / `sequences` tokens.
    """

    group: str
    dtype: str
    adapters: int
    tokens: int
    k: int
    sequences: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Which path is fastest.")
    parser.add_argument("--counts", default="8,16,32,64,128", help="adapters")
    parser.add_argument("--tokens", default="1,4,8,16,32,64,128,256,512")
    parser.add_argument("--tops", default="1,2,4", help="adapters a token")
    parser.add_argument("--sequences", default="1,8", help="how many sequences, where their mixtures hold")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="8 and 64 adapters, 1, 16 and 256 tokens, two adapters a token")
    parser.add_argument("--out", type=Path, default=Path(".bench/paths.csv"))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.counts, arguments.tokens, arguments.tops, arguments.sequences = "8,64", "1,16,256", "2", "8"
    torch.set_num_threads(1)
    print(describe()["text"])
    counts, tokens, tops, sequences = (_numbers(getattr(arguments, name)) for name in ("counts", "tokens", "tops", "sequences"))
    cases = [
        Case(group, dtype, count, number, k)
        for dtype, k, group, count, number in itertools.product(DTYPES, tops, GROUPS, counts, tokens)
    ]
    cases += [
        Case(group, dtype, max(counts), b * length, k, b)
        for dtype, k, group, b, length in itertools.product(DTYPES, tops, GROUPS, sequences, (1, 16, 64))
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="", encoding="utf8") as file:
        table = csv.writer(file)
        table.writerow((*Case.__dataclass_fields__, "breadth", "path", "seconds", "winner", "pick"))
        missed, lost = [], 0.0
        for case in cases:
            shape, times = measure(case, arguments.repeats)
            winner, pick = min(times, key=times.__getitem__), choose(shape)[0]
            breadth = shape.rows / (shape.active or 1)
            table.writerows(
                [*vars(case).values(), breadth, path, f"{seconds:.4g}", winner, pick] for path, seconds in times.items()
            )
            regret = times.get(pick, times["dense"]) / times[winner]
            lost += regret - 1
            said = "  ".join(f"{path} {1e6 * seconds:.0f}" for path, seconds in times.items())
            where = f"{case.sequences} sequences" if case.sequences else ""
            line = f"{case.dtype} {case.group:8s} E {case.adapters:3d}  T {case.tokens:3d}  k {case.k} {where} breadth {breadth:.0f}: {said} µs"
            line += f"   {winner}" + ("" if regret <= GOOD else f", but {pick} is picked: {regret:.2f} ×")
            if regret > GOOD:
                missed.append(line)
            print(line, flush=True)
    print(
        f"\n{len(cases) - len(missed)} of {len(cases)} picks are within 15 % of the fastest; they cost {lost / len(cases):.1%} on average"
    )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


@torch.no_grad()
def measure(
    case: Case, repeats: int, width: int = WIDTH, outs: Sequence[int] | None = None, cold: int = COLD
) -> tuple[Shape, dict[str, float]]:
    """What the chooser knows of the case, and path → seconds.

    Args:
        cold: bytes of adapters that take turns.

    Raises:
        AssertionError: paths do not agree, in fp32.
    """
    dtype, outs, draw = DTYPES[case.dtype], outs or GROUPS[case.group], torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=draw).to(dtype)

    rows = max(case.sequences, 1)
    count = case.adapters
    w_BTSE = _weights(rows, 1 if case.sequences else case.tokens, count, case.k, draw)
    if case.sequences:  # those whom nobody has are left out, as the engine does
        used = (w_BTSE != 0).flatten(0, -2).any(0)
        w_BTSE, count = w_BTSE[..., used], int(used.sum())
    slabs = [{e: Slab(0.05 * random(RANK, width), 0.05 * random(RANK, o)) for e in range(count)} for o in outs]
    place = (torch.device("cpu"), dtype)
    stack = Stack(slabs, count, place, (width, *outs))
    size = sum(buffer.nbytes for buffer in stack.buffers())
    stacks = [stack, *(Stack(slabs, count, place, (width, *outs)) for _ in range(min(LAYERS, cold // size)))]
    x_BTD = random(rows, case.tokens // rows, width)
    x_ND, w_NSE = x_BTD.flatten(0, 1), w_BTSE.expand(rows, case.tokens // rows, 1, count).flatten(0, 1)
    ys = [random(case.tokens, o) for o in outs]
    k = min(case.k, count)
    begin: dict[str, Callable[[Stack], Any]] = {"dense": lambda stack: Dense(stack, x_BTD, w_BTSE)}
    if case.sequences:
        begin["sequence"] = lambda stack: PerSequence(stack, x_BTD, w_BTSE, k)
    if case.tokens <= GATHERED:
        begin["gather"] = lambda stack: Gather(stack, x_ND, w_NSE, k)
    begin["sorted"] = lambda stack: Sorted(stack, x_ND, w_NSE, k)
    turn = itertools.cycle(stacks)

    def run(path: str) -> list[torch.Tensor]:
        begun = begin[path](next(turn))
        return [begun.add(s, y) for s, y in enumerate(ys)]

    for path in begin:
        for _ in stacks:  # what a stack keeps for a path is made at its first use
            found = run(path)
        if dtype == torch.float32:
            torch.testing.assert_close(found, run("dense"), rtol=1e-4, atol=1e-4)
    turns = max(len(stacks), 2, min(100, 4000 // (case.tokens * count)))
    times = interleaved({path: (lambda path=path: run(path), turns) for path in begin}, repeats)
    active = k * RANK * len(outs)
    shape = Shape(
        case.tokens, rows, stack.a_RD.shape[0], active, count, k, (width, sum(outs)), dtype, "cpu", bool(case.sequences)
    )
    return shape, times


def _weights(rows: int, tokens: int, count: int, k: int, draw: torch.Generator) -> torch.Tensor:
    chosen = torch.rand(rows, tokens, 1, count, generator=draw).topk(k).indices
    return torch.zeros(rows, tokens, 1, count).scatter(-1, chosen, 1 / k)


if __name__ == "__main__":
    main()
