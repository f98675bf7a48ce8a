"""A zoo larger than the memory it may take: a stream of requests, each of one adapter, to a model that pages its adapters.

    python benchmarks/big_zoo.py [BASE] [--adapters 1000] [--resident 1GB] [--adapter-dtype int8] [--out FOLDER]

Adapters are noise, of rank 8 on every linear but the head. The first 20 are written as PEFT folders, read and packed as any other;
the rest are packed straight away, which saves time and runs the same engine. With --out they are kept, and used again.

Who is asked for follows Zipf's law. Times are medians, one thread, beside the same base with 8 adapters in memory, the same prompts and
the same number of adapters in a batch. Memory is what the kernel says of this process, its peak since the adapters were made.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from recycler.base import Base, load_base
from recycler.engine.packed import Packed, write
from recycler.engine.sites import linear_shapes
from recycler.engine.stack import Slab
from recycler.engine.tiers import Shelf, parse_size
from recycler.routed import RoutedModel
from recycler.routers.oracle import Oracle, OracleConfig
from recycler.shelving import Shelving
from recycler.zoo.adapter import Adapter, Factors
from recycler.zoo.writing import write_adapter

RANK, REAL, SMALL = 8, 20, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default=".demo/base")
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--resident", default="1GB")
    parser.add_argument("--adapter-dtype", choices=["int8"])
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--new", type=int, default=8)
    parser.add_argument("--zipf", type=float, default=1.1, help="the exponent")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = options.out or Path(tempfile.mkdtemp(prefix="big-zoo-"))
    try:
        run(load_base(options.base), folder, options)
    finally:
        if options.out is None:
            shutil.rmtree(folder)


def run(base: Base, folder: Path, options: argparse.Namespace) -> None:
    shapes = {site: shape for site, shape in linear_shapes(base.model).items() if site != "lm_head"}
    small = [Adapter(f"a{e}", noise(shapes, e)) for e in range(SMALL)]
    start = time.perf_counter()
    shelf = make_shelf(base, shapes, folder, options)
    print(
        f"{len(shelf.packed)} adapters, {shelf.size / 1e9:.2f} GB on disk, made or found in {time.perf_counter() - start:.0f} s"
    )

    draw = requests(options, SMALL)
    in_memory = routed(base, small, None)
    before = [timed(in_memory, next(draw), options) for _ in range(min(options.batches, 15))]
    extra = in_memory.extra_bytes
    in_memory.engine.detach()
    del in_memory, small

    reset_peak()
    draw = requests(options, len(shelf.packed))
    model = routed(base, [Adapter(f"a{e:05}", {}) for e in range(len(shelf.packed))], shelf)
    after = [timed(model, next(draw), options) for _ in range(options.batches)]
    print(
        f"batches of {options.rows} × {options.tokens} tokens and {options.new} new ones; who is asked for: 1/rank^{options.zipf}"
    )
    print(f"all in memory, {SMALL} adapters    {statistics.median(before):7.0f} ms a batch, {extra / 1e6:.0f} MB of adapters")
    print(
        f"paged, {len(shelf.packed)} adapters          {statistics.median(after):7.0f} ms a batch, {model.extra_bytes / 1e6:.0f} MB of adapters"
    )
    print(shelf)
    print(", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in memory().items()))


def noise(shapes: dict[str, tuple[int, int]], seed: int) -> dict[str, Factors]:
    draw = torch.Generator().manual_seed(seed)
    return {
        site: Factors(torch.randn(RANK, d, generator=draw) / d, torch.randn(o, RANK, generator=draw) / 50)
        for site, (o, d) in shapes.items()
    }


def make_shelf(base: Base, shapes: dict[str, tuple[int, int]], folder: Path, options: argparse.Namespace) -> Shelf:
    """Packs adapters, or finds them packed."""
    shelving = Shelving(options.resident, options.adapter_dtype, folder / "packed")
    packed: list[Packed] = []
    for e in range(min(REAL, options.adapters)):
        home = folder / "adapters" / f"a{e}"
        if not home.exists():
            home.mkdir(parents=True)
            write_adapter(home, noise(shapes, e), base=base.id)
        shelving.add(base, home, home.name)
    packed += shelving.shelf().packed
    few = [noise(shapes, -1 - e) for e in range(4)]
    for e in range(REAL, options.adapters):
        path = folder / "packed" / f"{e}-{options.adapter_dtype}.safetensors"
        if not path.exists():
            made = {}
            for site, one in few[e % len(few)].items():
                shift = 1 + e // len(few)
                made[site] = Slab(one.a_RD.roll(shift, 1).to(base.model.dtype), one.b_OR.T.roll(shift, 1).to(base.model.dtype))
            write(path, made, {"base": base.id}, int8=options.adapter_dtype == "int8")
        packed.append(Packed(path))
    return Shelf(packed, parse_size(options.resident))


def routed(base: Base, adapters: list[Adapter], shelf: Shelf | None) -> RoutedModel:
    """A model that is told who answers each row."""
    router = Oracle([adapter.name for adapter in adapters], OracleConfig())
    router.tasks, router.table_CE = router.adapters, torch.eye(len(adapters))
    return RoutedModel(base, adapters, router, shelf=shelf)


def requests(options: argparse.Namespace, count: int) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Prompts of random tokens, and whose they are; which adapters are asked for most is drawn, too."""
    draw = torch.Generator().manual_seed(1)
    weights_E = torch.arange(1, count + 1).float().pow(-options.zipf)[torch.randperm(count, generator=draw)]
    while True:
        ids_BT = torch.randint(100, 40_000, (options.rows, options.tokens), generator=draw)
        yield ids_BT, torch.multinomial(weights_E, options.rows, replacement=True, generator=draw).tolist()


def timed(model: RoutedModel, request: tuple[torch.Tensor, list[int]], options: argparse.Namespace) -> float:
    """Milliseconds of a generation."""
    ids_BT, whose = request
    start = time.perf_counter()
    with model.labelled([model.names[e] for e in whose]):
        model.generate(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=options.new, min_new_tokens=options.new, do_sample=False)  # fmt: skip
    return 1000 * (time.perf_counter() - start)


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def memory() -> dict[str, float]:
    """Bytes: the peak, and what is held now, of this process's own and of mapped files."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    found = {line[0].rstrip(":"): 1024 * float(line[1]) for line in lines if line[0] in ("VmHWM:", "RssAnon:", "RssFile:")}
    return {"peak (VmHWM)": found["VmHWM"], "RssAnon": found["RssAnon"], "RssFile": found["RssFile"]}


if __name__ == "__main__":
    main()
