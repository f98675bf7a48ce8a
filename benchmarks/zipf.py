"""Who finds its adapter where: hit rates of memory tiers when a million adapters are asked for by Zipf's law. No model is run.

    python benchmarks/zipf.py                                   # a quarter of a minute
    python benchmarks/zipf.py --adapters 10000 --gpus 8 --rate 200

A request asks for one adapter; the adapter of rank i is asked for in proportion to i^−s. Each tier keeps what was used last, up to
its size, and holds what the tiers above it hold (LRU, as `recycler/engine/tiers.py`). "any" sends a request to any GPU, so that every GPU
and every host keeps the same few; "own" sends all requests for an adapter to one GPU, so that what they keep adds up.

Simulated: tiers begin with the most asked for, then a half of the requests are let through, and the other half are counted. Beside it
Che's approximation of LRU (Che, Tung and Wang 2002): an adapter asked for at rate p is held with 1 − exp(−p·t), t such that the held ones
fill the tier. What it leaves out: whoever asks for an adapter asks for it again soon (sessions), which helps, and that what is popular
changes, which does not. The unit is a whole adapter; the engine pages groups of linears, all of which a token needs.

gpu, host, ssd and store are shares of requests whose adapter is found there first; Che's count the tiers above too. "hot" adapters are
asked for more often than one GPU can answer: however placed, they have to be on several. "distinct" is how many different adapters the
requests in flight on one GPU have (their number by Little's law), as GB: they have to be in its memory at once, whatever the hit rate.
"copies" is what misses of the GPU's memory bring over PCIe, of what it can; "SSD" and "store" the same of a host's disks and of its
network.
"""

from __future__ import annotations

import argparse
import csv
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

FIELDS = ("exponent", "placed", "gpu", "host", "ssd", "store", "che gpu", "che host", "che ssd",
          "hot", "distinct GB", "copies %", "SSD %", "store %", "store GB/s")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Hit rates of memory tiers under Zipf's law.")
    parser.add_argument("--adapters", type=int, default=1_000_000)
    parser.add_argument("--exponents", default="0.6,0.8,1.0,1.2")
    parser.add_argument("--requests", type=int, default=1_000_000, help="simulated ones, for each row")
    parser.add_argument("--mb", type=float, default=83.9, help="an adapter: rank 16 on all linears of Llama-8B, bf16")
    parser.add_argument("--rate", type=float, default=10_000, help="requests a second, on all GPUs together")
    parser.add_argument("--seconds", type=float, default=5.0, help="that a request stays")
    parser.add_argument("--gpus", type=int, default=304)
    parser.add_argument("--gpus-per-host", type=int, default=8)
    parser.add_argument("--gpu-gb", type=float, default=30, help="of a GPU's memory, for adapters")
    parser.add_argument("--host-gb", type=float, default=1000)
    parser.add_argument("--ssd-gb", type=float, default=30_000)
    parser.add_argument("--pcie", type=float, default=50, help="GB/s to one GPU")
    parser.add_argument("--ssd", type=float, default=50, help="GB/s of a host's disks")
    parser.add_argument("--network", type=float, default=12.5, help="GB/s of a host")
    parser.add_argument("--out", type=Path, default=Path(".bench/zipf.csv"))
    given = parser.parse_args()

    rows = [row for s in map(float, given.exponents.split(",")) for row in table(given, s)]
    print("".join(f"{field:>12s}" for field in FIELDS))
    for row in rows:
        print("".join(f"{value:>12s}" if isinstance(value, str) else f"{value:12.3g}" for value in row))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w", newline="", encoding="utf8") as file:
        csv.writer(file).writerows([FIELDS, *rows])


def table(given: argparse.Namespace, exponent: float) -> list[list[float | str]]:
    """One row for requests that go anywhere, one for those that go where the adapter is."""
    p_N = zipf(given.adapters, exponent)
    hosts = given.gpus / given.gpus_per_host
    rows: list[list[float | str]] = []
    for placed, gpus, nodes in (("any", 1.0, 1.0), ("own", float(given.gpus), hosts)):
        sizes = [
            min(int(scale * gb * 1000 / given.mb), given.adapters)
            for scale, gb in ((gpus, given.gpu_gb), (nodes, given.host_gb), (nodes, given.ssd_gb))
        ]
        found = simulated(p_N, sizes, given.requests)
        gpu, host, ssd = found
        per_gpu, per_host, gb = given.rate / given.gpus, given.rate / hosts, given.mb / 1000
        asked = per_gpu * given.seconds
        # Of those in flight on a GPU: any adapter, or one of its own, 1 of so many by rank.
        own_N = p_N if placed == "any" else p_N[:: given.gpus] / p_N[:: given.gpus].sum()
        distinct = float((1 - (1 - own_N) ** asked).sum()) * gb
        rows.append(
            [
                exponent, placed, gpu, host - gpu, ssd - host, 1 - ssd, *(che(p_N, size) for size in sizes),
                int((p_N * given.gpus > 1).sum()), distinct,
                100 * per_gpu * (1 - gpu) * gb / given.pcie, 100 * per_host * (1 - host) * gb / given.ssd,
                100 * per_host * (1 - ssd) * gb / given.network, given.rate * (1 - ssd) * gb,
            ]
        )  # fmt: skip
    return rows


def zipf(count: int, exponent: float) -> np.ndarray:
    """The probability of each adapter, the most asked for first."""
    p_N = np.arange(1, count + 1, dtype=float) ** -exponent
    return p_N / p_N.sum()


def simulated(p_N: np.ndarray, sizes: Sequence[int], requests: int, seed: int = 0) -> list[float]:
    """The share of requests that each tier, or one above it, holds."""
    drawn = np.searchsorted(p_N.cumsum(), np.random.default_rng(seed).random(requests)).clip(max=len(p_N) - 1).tolist()
    result = []
    for size in sizes:
        held = OrderedDict.fromkeys(range(min(size, len(p_N)) - 1, -1, -1))  # the most asked for were used last
        hits = 0
        for number, adapter in enumerate(drawn):
            if adapter in held:
                held.move_to_end(adapter)
                hits += number >= requests // 2
            else:
                held[adapter] = None
                if len(held) > size:
                    held.popitem(last=False)
        result.append(hits / (requests - requests // 2))
    return result


def che(p_N: np.ndarray, size: int) -> float:
    """The hit rate of an LRU of so many, by Che's approximation."""
    if size >= len(p_N):
        return 1.0
    low, high = 0.0, 1.0
    while (1 - np.exp(-p_N * high)).sum() < size:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - np.exp(-p_N * middle)).sum() < size else (low, middle)
    return float((p_N * (1 - np.exp(-p_N * high))).sum())


if __name__ == "__main__":
    main()
