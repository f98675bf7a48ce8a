"""What routing costs on a CPU, beside PEFT and beside what one would write first; and whether that is as little as it should be.

    python benchmarks/engine.py [--quick] [--counts 8,32,64,128] [--mixed 8,64] [--repeats 5] [--out .bench/engine]

Two layers of SmolLM2-135M's shape, random weights, random adapters of rank 8 on all seven linears (or of ranks 4 to 64), two adapters
a token, chosen anew at every linear by prototypes that all contenders share. In fp32 their logits must agree before anything is
timed. One process, one thread, thread time, contenders interleaved, the minimum of the rounds. Nothing is downloaded.

Prints one row for each claim (benchmarks/README.md says what they are) and writes times.csv, rows.json, machine.json and the cost
against the number of adapters as cost.png and cost.svg.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import peers
import torch
from layers import layer_rows, prototype_row
from peers import ARROW, BASE, DENSE, LOOP, MERGED, OURS, OURS_XLORA, SINGLE, XLORA, Contender, interleaved
from report import DTYPES, Claim, Row, describe, save, show

Times = dict[tuple[str, str, str, int], dict[str, float]]  # (task, dtype, ranks, adapters) → contender → seconds
PREFILL, DECODE, GENERATE = "prefill", "decode", "generate"


@dataclass(frozen=True)
class Size:
    """How much of everything; the smoke test runs less."""

    shape: Mapping[str, int] = field(default_factory=lambda: peers.SMOLLM2)
    prefill: int = 256
    decode: int = 256
    generate: tuple[int, int] = (128, 24)
    repeats: int = 5
    steps: int = 10  # decode steps in a turn


def main() -> None:
    parser = argparse.ArgumentParser(description="What routing costs on a CPU.")
    parser.add_argument("--quick", action="store_true", help="8 and 64 adapters, 3 rounds, nothing compiled: about a minute")
    parser.add_argument("--counts", default="8,32,64,128", help="how many adapters of rank 8")
    parser.add_argument("--mixed", default="8,64", help="how many adapters of ranks 4 to 64")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(".bench/engine"))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.counts, arguments.mixed, arguments.repeats = "8,64", "8", 3
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    machine = describe()
    print(machine["text"], flush=True)
    (arguments.out / "machine.json").write_text(json.dumps(machine, indent=2) + "\n", encoding="utf8")

    size, times = Size(repeats=arguments.repeats), Times()
    for kind, counts in (("equal", arguments.counts), ("mixed", arguments.mixed)):
        for count in map(int, filter(None, counts.split(","))):
            times |= measure(size, kind, count, generates=count == 8 and kind == "equal")
            write_times(times, arguments.out / "times.csv")
    rows = whole_model_rows(times)
    rows.append(compiled_row(size) if not arguments.quick else Row("C8", C8, (), note="left out by --quick"))
    rows += layer_rows(size.shape, 64, 512, size.repeats)
    rows.append(prototype_row(8 if arguments.quick else 64))
    rows.sort(key=lambda row: int(row.name[1:]))
    show(rows)
    save(machine, rows, arguments.out / "rows.json")
    print(plot(times, arguments.out) or f"written: {arguments.out}")


# -- whole models


def measure(size: Size, kind: str, count: int, generates: bool = False) -> Times:
    """Prefill, decode and perhaps generation of every contender, in fp32 and bf16."""
    times = Times()
    with tempfile.TemporaryDirectory() as folder:
        field = peers.Field(size.shape, peers.ranks_of(kind, count), Path(folder) / "adapters")
    ids_BT = torch.randint(2, size.shape["vocab_size"], (1, size.decode + 1), generator=torch.Generator().manual_seed(0))
    for name, dtype in DTYPES.items():
        contenders = field.contenders(dtype)
        if dtype == torch.float32:
            apart = peers.check_agreement(contenders, ids_BT[:, : size.prefill])
            print(f"\n{count} adapters, {kind} ranks: logits agree to {max(apart.values()):.2f}e-5 of the largest")
        tasks = {PREFILL: prefill, DECODE: decode} | ({GENERATE: generate} if generates else {})
        for task, make in tasks.items():
            with torch.no_grad():
                runs = {who: entered(one, make(one, ids_BT, size)) for who, one in contenders.items()}
                turns = {who: size.steps if task == DECODE and contenders[who].caches else 1 for who in runs}
                found = interleaved({who: (run, turns[who]) for who, run in runs.items()}, size.repeats)
            times[task, name, kind, count] = found
            said = "   ".join(f"{who} {seconds / found[BASE]:.2f}" for who, seconds in found.items() if who != BASE)
            print(
                f"  {task:8s} {name}: base {1e3 * found[BASE]:.2f} ms   {said}   [{path_of(contenders[OURS], task, size)}]",
                flush=True,
            )
    return times


def entered(contender: Contender, run: Callable[[], Any]) -> Callable[[], Any]:
    def inside() -> None:
        with contender.enter():
            run()

    return inside


def prefill(contender: Contender, ids_BT: torch.Tensor, size: Size) -> Callable[[], Any]:
    return lambda: contender.model(input_ids=ids_BT[:, : size.prefill], use_cache=False)


def decode(contender: Contender, ids_BT: torch.Tensor, size: Size) -> Callable[[], Any]:
    """One token more; the cache is cut back afterwards. Who cannot cache runs all tokens again."""
    if not contender.caches:
        return lambda: contender.model(input_ids=ids_BT, use_cache=False)
    with contender.enter():
        whole = getattr(contender.model, "_orig_mod", contender.model)  # only the step is compiled, not what fills the cache
        cache = whole(input_ids=ids_BT[:, :-1], use_cache=True).past_key_values

    def step() -> Any:
        output = contender.model(input_ids=ids_BT[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)
        return output

    return step


def generate(contender: Contender, ids_BT: torch.Tensor, size: Size) -> Callable[[], Any]:
    prompt, new = size.generate
    ids_BT = ids_BT[:, :prompt]
    options = {"attention_mask": torch.ones_like(ids_BT), "do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    return lambda: contender.model.generate(input_ids=ids_BT, **options)


def path_of(contender: Contender, task: str, size: Size) -> str:
    tokens = {PREFILL: size.prefill, DECODE: 1, GENERATE: 1}[task]
    banks = contender.model.engine.banks
    return ", ".join(sorted({bank.foresee((1, tokens, bank.group.width))[0] for bank in banks}))


def whole_model_rows(times: Times) -> list[Row]:
    """C1 to C7, C9 and C10, out of the table."""

    def claims(
        key: tuple[str, str, str, int], most: float, who: str = OURS, faster: float = 0, than: str = ARROW
    ) -> list[Claim]:
        found = times.get(key, {})
        if who not in found:
            return []
        made = [Claim(f"{key[1]} × base", found[who] / found[BASE], most)]
        if faster and than in found:
            made.append(Claim(f"{key[1]} times faster than {than}", found[than] / found[who], faster, at_most=False))
        return made

    def anchors(*keys: tuple[str, str, str, int]) -> str:
        parts = []
        for key in keys:
            found = times.get(key, {})
            rivals = {who: found[who] / found[BASE] for who in (ARROW, XLORA, LOOP) if who in found}
            if rivals:
                parts.append(
                    f"{key[1]}: " + ", ".join(f"{who} {ratio:.2f}" for who, ratio in sorted(rivals.items(), key=lambda p: p[1]))
                )
        return "; ".join(parts)

    def row(name: str, measure: str, *parts: tuple[tuple[str, str, str, int], list[Claim]]) -> Row:
        made = tuple(claim for _, claims in parts for claim in claims)
        return Row(name, measure, made, anchors(*(key for key, _ in parts)), "" if made else "so many adapters were not run")

    def at(task: str, dtype: str, count: int) -> tuple[str, str, str, int]:
        return task, dtype, "equal", count

    def part(key: tuple[str, str, str, int], *args: Any, **kwargs: Any) -> tuple[tuple[str, str, str, int], list[Claim]]:
        return key, claims(key, *args, **kwargs)

    return [
        row("C1", "prefill of 256, 8 adapters", part(at(PREFILL, "fp32", 8), 1.20)),
        row("C2", "prefill of 256, 8 adapters", part(at(PREFILL, "bf16", 8), 1.30)),
        row("C3", "prefill of 256, 32 adapters", part(at(PREFILL, "fp32", 32), 1.45)),
        row("C4", "prefill of 256, 64 adapters", part(at(PREFILL, "fp32", 64), 1.45, faster=6)),
        row("C5", "prefill of 256, 64 adapters", part(at(PREFILL, "bf16", 64), 2.40, faster=8)),
        row("C6", "one token after 256, 8 adapters", part(at(DECODE, "fp32", 8), 1.20), part(at(DECODE, "bf16", 8), 1.70)),
        row("C7", "one token after 256, 64 adapters", part(at(DECODE, "fp32", 64), 1.45), part(at(DECODE, "bf16", 64), 1.90)),
        row("C9", "generate 24 after 128, 8 adapters, routed by token", part(at(GENERATE, "fp32", 8), 1.35)),
        row("C10", "the same as X-LoRA, with two caches", part(at(GENERATE, "fp32", 8), 2.60, OURS_XLORA, than=XLORA)),
    ]  # fmt: skip


C8 = "one token after 256, 8 adapters, fp32, compiled as one graph, × PEFT's one LoRA as it is"


def compiled_row(size: Size, count: int = 8, backend: str = "inductor") -> Row:
    """The whole routed base as one graph, which must give the same logits."""
    with tempfile.TemporaryDirectory() as folder:
        field = peers.Field(size.shape, peers.ranks_of("equal", count), Path(folder) / "adapters", without=(ARROW, XLORA))
    contenders = {who: one for who, one in field.contenders(torch.float32).items() if who in (BASE, SINGLE, OURS)}
    ids_BT = torch.randint(2, size.shape["vocab_size"], (1, size.decode + 1), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    whole = torch.compile(contenders[OURS].model.base, fullgraph=True, backend=backend, dynamic=False)
    contenders["ours, compiled"] = Contender(whole)
    contenders["base, compiled"] = Contender(
        torch.compile(peers.bare(size.shape), fullgraph=True, backend=backend, dynamic=False)
    )
    started = time.perf_counter()
    try:
        with torch.no_grad():
            runs = {who: (decode(one, ids_BT, size), size.steps) for who, one in contenders.items()}
            for one, other in (("ours, compiled", OURS), ("base, compiled", BASE)):
                torch.testing.assert_close(runs[one][0]().logits, runs[other][0]().logits, rtol=1e-4, atol=1e-4)
            found = interleaved(runs, size.repeats)
    except Exception as error:
        return Row("C8", C8, (), note=f"could not be compiled: {str(error).strip().splitlines()[0]}")
    note = f"compiled: {found['ours, compiled'] / found['base, compiled']:.2f} × the compiled base; not compiled: "
    note += f"{found[OURS] / found[SINGLE]:.2f} × one LoRA; {time.perf_counter() - started:.0f} s with compiling"
    return Row("C8", C8, (Claim("× one LoRA", found["ours, compiled"] / found[SINGLE], 0.90),), note=note)


# -- what comes out


def write_times(times: Times, file: Path) -> None:
    with file.open("w", newline="", encoding="utf8") as out:
        table = csv.writer(out)
        table.writerow(("task", "dtype", "ranks", "adapters", "contender", "seconds", "times_base"))
        for key, found in times.items():
            table.writerows([*key, who, f"{seconds:.6g}", f"{seconds / found[BASE]:.4f}"] for who, seconds in found.items())


def plot(times: Times, folder: Path) -> str | None:
    """Cost against the number of adapters. Returns what is missing, if anything is."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed. Run: pip install matplotlib"
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for across, task in enumerate((PREFILL, DECODE)):
        for down, dtype in enumerate(DTYPES):
            panel = panels[down][across]
            counts = sorted(count for t, d, kind, count in times if (t, d, kind) == (task, dtype, "equal"))
            for number, who in enumerate((OURS, DENSE, OURS_XLORA, SINGLE, MERGED, LOOP, ARROW, XLORA)):
                found = [times[task, dtype, "equal", count] for count in counts]
                line = [one[who] / one[BASE] for one in found if who in one]
                if line:
                    panel.plot(counts, line, "o-", color=f"C{number}", label=who, linewidth=3 if who == OURS else 1)
            panel.set(xscale="log", yscale="log", title=f"{task}, {dtype}", xlabel="adapters", ylabel="time, × base")
            panel.set_xticks(counts, map(str, counts))
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    if panels[0][0].lines:
        panels[0][0].legend(fontsize="small")
    for kind in ("png", "svg"):
        figure.savefig(folder / f"cost.{kind}")
    return None


if __name__ == "__main__":
    main()
