"""What gates and profiles cost for each adapter, and whether that grows with the number of adapters in the zoo.

    python benchmarks/gates.py [--base FOLDER] [--counts 12,24,48,96] [--methods phatgoose,ridge,profile] [--quick] [--out CSV]

Adapters are random factors of rank 8 on every linear, each with a task of its own. The base is two layers of SmolLM2-135M's shape with
random weights and a byte's vocabulary (the smaller the base, the more the adapters are felt), or the one that is given. Every
adapter's gate sees the same rows however many adapters there are: its own `--kshot`, twice for methods that take steps (so many as
that takes), once otherwise. A profile scores every adapter on every task; its figures are for one such cell, of `--kshot` rows.

One thread, thread time. "growth" is the exponent p of: seconds for each adapter (or cell) ∝ adaptersᵖ, by least squares; 0 is what is
wanted. "peak" is by how much the resident set grew at its highest while it ran (Linux): what the allocator keeps for later is in it.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recycler.base import Base
    from recycler.profiles import Profile
    from recycler.routed import RoutedModel
    from recycler.shots import Shots

RANK, LENGTH, STATUS = 8, 56, Path("/proc/self/status")  # of adapters; characters of a prompt
FIELDS = ("method", "adapters", "seconds", "each", "per_minute", "peak_mb")


def main() -> None:
    parser = argparse.ArgumentParser(description="What gates and profiles cost for each adapter.")
    parser.add_argument("--base", help="a folder; by default two layers of SmolLM2-135M's shape")
    parser.add_argument("--counts", default="12,24,48,96", help="how many adapters")
    parser.add_argument("--methods", default="phatgoose,ridge,profile", help="any that learns from shots, or profile")
    parser.add_argument("--kshot", type=int, default=4)
    parser.add_argument("--tasks", type=int, default=8, help="tasks that a profile scores every adapter on, at most")
    parser.add_argument("--quick", action="store_true", help="12 and 48 adapters, 2 shots, 4 tasks: about a minute")
    parser.add_argument("--out", type=Path, default=Path(".bench/gates.csv"))
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.counts, arguments.kshot, arguments.tasks = "12,48", 2, 4

    import torch

    from recycler.base import load_base

    torch.set_num_threads(1)
    base = load_base(arguments.base) if arguments.base else small_base()
    counts = [int(count) for count in arguments.counts.split(",")]
    rows = []
    for method in arguments.methods.split(","):
        for count in [counts[0], *counts]:  # the first warms up
            seconds, units, peak = cost(base, method, count, arguments.kshot, arguments.tasks)
            rows.append(
                {
                    "method": method, "adapters": count, "seconds": round(seconds, 3), "each": round(seconds / units, 5),
                    "per_minute": round(60 * units / seconds, 1), "peak_mb": round(peak, 1),
                }
            )  # fmt: skip
            print(rows[-1], file=sys.stderr)
        del rows[-len(counts) - 1]
    show(rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="", encoding="utf8") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        table.writerows(rows)


def cost(base: Base, method: str, count: int, kshot: int, tasks: int) -> tuple[float, int, float]:
    """(seconds, adapters or cells, MB at the highest) of one fit or profile."""
    from recycler.profiles import measure
    from recycler.routed import RoutedModel
    from recycler.routers.discovery import find, make_config
    from recycler.scoring import Fitting
    from recycler.shots import Shots

    model = RoutedModel(base, random_adapters(base, count))
    shots = some_shots(model.names, kshot)
    try:
        if method == "profile":
            some = Shots({task: shots[task] for task in [*shots][:tasks]})
            seconds, peak = spent(lambda: measure(model, some))
            return seconds, (count + 1) * len(some), peak
        cls = find(method)
        options: dict[str, Any] = {}
        if method == "phatgoose":
            options = {"rows": 24, "steps": math.ceil(2 * count * kshot / 24)}
        config = make_config(cls, options)
        seconds, peak = spent(lambda: cls.fit(Fitting(model), own_profile(model, shots), config))
        return seconds, count, peak
    finally:
        model.engine.detach()


def spent(work: Callable[[], object]) -> tuple[float, float]:
    """(thread seconds, MB by which the resident set grew at its highest)"""
    if STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")
    before = _kilobytes("VmRSS")
    started = time.thread_time()
    work()
    return time.thread_time() - started, (_kilobytes("VmHWM") - before) / 1e3


def _kilobytes(field: str) -> float:
    if not STATUS.exists():
        return math.nan
    return next(float(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field))


def show(rows: Sequence[dict[str, Any]]) -> None:
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        unit = "cell" if method == "profile" else "adapter"
        print(f"\n{method:12s}{'adapters':>10s}{'seconds':>10s}{'s / ' + unit:>14s}{unit + 's / min':>16s}{'peak MB':>10s}")
        for row in own:
            print(f"{'':12s}{row['adapters']:10d}{row['seconds']:10.2f}{row['each']:14.4f}{row['per_minute']:16.1f}"
                  f"{row['peak_mb']:10.0f}")  # fmt: skip
        if len(own) > 1:
            print(f"{'':12s}growth of s / {unit}: adapters^{growth(own):.2f}")


def growth(rows: Sequence[dict[str, Any]]) -> float:
    """The slope of log seconds over log adapters."""
    x, y = ([math.log(row[key]) for row in rows] for key in ("adapters", "each"))
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


# -- what it runs on


def small_base() -> Base:
    """Two layers of SmolLM2-135M's shape, random weights, a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from recycler.base import Base

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, pad_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "</s>": 1} | {symbol: i + 2 for i, symbol in enumerate(symbols)}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    built.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<pad>", eos_token="</s>")
    return Base(LlamaForCausalLM(config).eval().requires_grad_(False), tokenizer, "small")


def random_adapters(base: Base, count: int) -> list[Any]:
    import torch

    from recycler.engine.sites import linear_shapes
    from recycler.zoo.adapter import Adapter, Factors

    shapes = {site: shape for site, shape in linear_shapes(base.model).items() if "layers." in site}
    made = []
    for number in range(count):
        draw = torch.Generator().manual_seed(number)
        sites = {
            site: Factors(torch.randn(RANK, d, generator=draw) / d**0.5, 0.02 * torch.randn(o, RANK, generator=draw))
            for site, (o, d) in shapes.items()
        }
        made.append(Adapter(f"a{number:03d}", sites))
    return made


def some_shots(names: Sequence[str], kshot: int) -> Shots:
    """Each task has its own letters, so that gates have something to learn."""
    from recycler.shots import Shot, Shots

    tasks = {}
    for name in names:
        rng = random.Random(name)
        letters = rng.sample("abcdefghijklmnopqrstuvwxyz    ", 12)

        def text(length: int, rng: random.Random = rng, letters: list[str] = letters) -> str:
            return "".join(rng.choices(letters, k=length))

        tasks[name] = [Shot(text(LENGTH + rng.randrange(8)), " " + text(7)) for _ in range(kshot)]
    return Shots(tasks)


def own_profile(model: RoutedModel, shots: Shots) -> Profile:
    """Every adapter is best on the task of its name."""
    import torch

    from recycler.profiles import Profile

    nll = torch.ones(len(model.names) + 1, len(shots), len(next(iter(shots.values()))))
    for e in range(len(model.names)):
        nll[e + 1, e] = 0.5
    return Profile(model.names, shots, nll)


if __name__ == "__main__":
    main()
