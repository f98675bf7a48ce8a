"""What looking at a zoo, searching it and adding to it cost, from 100 adapters to 100,000.

    python benchmarks/zoo_size.py [--sizes 100,1000,10000,100000] [--out FOLDER] [--keep FOLDER]

The adapters are real ones for the library, and tiny: LoRA of rank 2 on two linears of width 16, a config and a card, 2 kB each. Each is
one of 500 directions with noise, so that adapters have neighbours; one in a hundred is a near-copy of the one before. They are written
straight to disk with their entries and sketches, which skips vetting; "add one" goes through `Zoo.add`, vetting and all.

A time is the least of the rounds, on one thread, each with a new `Zoo`, so that whatever a process reads once is read in each. "command"
is a new process, Python's start included. Writes sizes.csv and zoo_size.png. A zoo that --keep left is used again where it is large enough.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything that starts threads

import argparse
import csv
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save

from recycler.zoo.adapter import Adapter, Factors
from recycler.zoo.manifest import Entry, read_manifest
from recycler.zoo.neighbours import alike
from recycler.zoo.sketches import Sketches, sketch
from recycler.zoo.store import Zoo

SITES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
WIDTH, RANK, DIRECTIONS, COPIES = 16, 2, 500, 100
TOPICS = ("math", "law", "code", "poem", "german", "medical", "summary", "translation", "chat", "sql", "biology", "tax")
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base", "r": RANK, "lora_alpha": RANK,
    "target_modules": ["q_proj", "up_proj"], "bias": "none",
}  # fmt: skip
Times = dict[int, dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="100,1000,10000,100000")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(".bench/zoo_size"))
    parser.add_argument("--keep", type=Path, help="leave the zoo in this folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="zoo-size-"))
    try:
        times = measure(folder, [int(size) for size in options.sizes.split(",")], options.rounds)
    finally:
        if options.keep is None:
            shutil.rmtree(folder)
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(times, options.out / "sizes.csv")
    print(table(times))
    print(plot(times, options.out / "zoo_size.png") or f"written: {options.out}")


def measure(folder: Path, sizes: list[int], rounds: int) -> Times:
    """Size → what was done → seconds; the zoo grows from one size to the next."""
    adapters = made()
    times: Times = {}
    entries = dict(read_manifest(folder / "zoo" / "zoo.json"))
    for size in sorted(sizes):
        zoo = Zoo(folder / "zoo")
        grow(zoo, entries, adapters, size)
        times[size] = timed(zoo, folder, size, rounds)
        entries = dict(read_manifest(zoo.manifest))
        print(f"{size}: {', '.join(f'{what} {seconds:.3f}' for what, seconds in times[size].items())}", file=sys.stderr)
    return times


def made() -> Iterator[tuple[str, Adapter, bytes]]:
    """(name, adapter, its weights as a file), without end, the same every time."""
    draw, words = torch.Generator().manual_seed(0), random.Random(0)

    def noise() -> list[torch.Tensor]:
        return [torch.randn(shape, generator=draw) for _ in SITES for shape in ((RANK, WIDTH), (WIDTH, RANK))]

    directions = [noise() for _ in range(DIRECTIONS)]
    number, factors = 0, directions[0]
    while True:
        near = number % COPIES == COPIES - 1
        like = factors if near else words.choice(directions)
        factors = [a + (1e-3 if near else 0.5) * b for a, b in zip(like, noise(), strict=True)]
        name = f"{words.choice(TOPICS)}-{words.choice(TOPICS)}-{number:06d}"
        pairs = list(zip(SITES, factors[::2], factors[1::2], strict=True))
        tensors = {f"base_model.model.{site}.lora_{k}.weight": t for site, a, b in pairs for k, t in (("A", a), ("B", b))}
        yield name, Adapter(name, {site: Factors(a, b) for site, a, b in pairs}), save(tensors)
        number += 1


def grow(zoo: Zoo, entries: dict[str, Entry], adapters: Iterator[tuple[str, Adapter, bytes]], size: int) -> None:
    """Write adapters until there are `size`, then the manifest, whole, as `reindex` leaves it."""
    config = json.dumps(CONFIG).encode()
    found = {}
    if len(entries) >= size:
        return
    while len(entries) < size:
        name, adapter, weights = next(adapters)
        topic = name.rsplit("-", 1)[0].replace("-", " and ")
        card = f"---\nlicense: apache-2.0\ntags: [lora, {name.split('-')[0]}]\n---\n# {name}\nMade for questions on {topic}.\n".encode()
        home = zoo.path / "adapters" / name
        home.mkdir(parents=True)
        files = {"adapter_config.json": config, "adapter_model.safetensors": weights, "README.md": card}
        facts = {}
        for file, data in files.items():
            (home / file).write_bytes(data)
            facts[file] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        entries[name] = Entry(
            name, f"org-{hash_of(name) % 5000}/{name}", hashlib.sha1(name.encode()).hexdigest(), "org/base", None, None, facts,
            "apache-2.0", (RANK,), len(SITES), len(SITES) * 2 * RANK * WIDTH, ("LoRA",), "2026-01-01T00:00:00+00:00", 1.0,
        )  # fmt: skip
        found[entries[name].weights] = sketch(adapter)
    (zoo.path / "cache").mkdir(exist_ok=True)
    Sketches(zoo.path).put(found)
    zoo._fold(entries)  # what `Zoo.add` would have come to, one by one


def timed(zoo: Zoo, folder: Path, size: int, rounds: int) -> dict[str, float]:
    path = zoo.path
    fresh = adapters_to_add(folder / "new", size)
    times = {"index from nothing": seconds(lambda: Zoo(path).index.rebuild(), 1)}
    some = Zoo(path).page(1, size // 2)[0].name
    todo: dict[str, Callable[[], object]] = {
        "open, count, one entry": lambda: (len(Zoo(path)), Zoo(path).entry(some)),
        "a page of 50 from the middle": lambda: Zoo(path).page(50, size // 2),
        "search words": lambda: Zoo(path).search("german tax", 20),
        "search like, by sketches": lambda: alike(Zoo(path), some, 20, exact=False),
        "search like, confirmed": lambda: alike(Zoo(path), some, 20),
        "verify 100 drawn": lambda: Zoo(path).verify(Zoo(path).sample(100)),
        "add one": lambda: Zoo(path).add(next(fresh)),
    }
    todo["add one"]()  # at 1,000 the first one more folds zoo.json and starts a journal
    times |= {what: seconds(do, rounds) for what, do in todo.items()}
    for what, args in {
        "command: list 50": ("list", "--limit", "50"),
        "command: search words": ("search", "german", "tax"),
        "command: search like, by sketches": ("search", "--like", some, "--estimate"),
        "command: search like": ("search", "--like", some),
    }.items():
        times[what] = seconds(lambda args=args: command(path, *args), min(rounds, 3))  # type: ignore[misc]
    return times


def adapters_to_add(folder: Path, size: int) -> Iterator[Path]:
    draw = torch.Generator().manual_seed(size)
    number = 0
    while True:
        home = folder / f"new-{size}-{os.getpid()}-{number}"
        home.mkdir(parents=True)
        tensors = {
            f"base_model.model.{site}.lora_{kind}.weight": torch.randn(shape, generator=draw)
            for site in SITES
            for kind, shape in (("A", (RANK, WIDTH)), ("B", (WIDTH, RANK)))
        }
        (home / "adapter_model.safetensors").write_bytes(save(tensors))
        (home / "adapter_config.json").write_text(json.dumps(CONFIG))
        number += 1
        yield home


def command(path: Path, *args: str) -> None:
    whole = [sys.executable, "-c", "from recycler.cli import main; main()", "zoo", *args, "--zoo", str(path)]
    subprocess.run(whole, check=True, capture_output=True)


def seconds(do: Callable[[], object], rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        do()
        taken.append(time.perf_counter() - start)
    return min(taken)


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def write_csv(times: Times, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["adapters", "what", "seconds"])
        writer.writerows([size, what, f"{value:.6f}"] for size, found in times.items() for what, value in found.items())


def table(times: Times) -> str:
    """Markdown, in milliseconds."""
    rows = ["| ms | " + " | ".join(f"{size:,}" for size in times) + " |", "|---|" + "---:|" * len(times)]
    for what in next(iter(times.values())):
        rows.append(
            f"| {what} | "
            + " | ".join(f"{1000 * found[what]:,.{0 if found[what] > 0.1 else 1}f}" for found in times.values())
            + " |"
        )
    return "\n".join(rows)


def plot(times: Times, path: Path) -> str | None:
    """A picture of it; what is missing for one, else None."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed. Run: pip install matplotlib"
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    panel = figure.subplots()
    for number, what in enumerate(next(iter(times.values()))):
        if what.startswith("index"):
            continue
        line = [found[what] for found in times.values()]
        panel.plot(
            list(times),
            line,
            "o--" if what.startswith("command") else "o-",
            color=f"C{number - 1}" if number <= 10 else "black",
            label=what,
            linewidth=1.5,
        )
    panel.axhline(1, color="0.6", linewidth=1, linestyle=":")
    panel.set(xscale="log", yscale="log", xlabel="adapters in the zoo", ylabel="seconds", title="What a zoo's size costs")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    return None


if __name__ == "__main__":
    main()
