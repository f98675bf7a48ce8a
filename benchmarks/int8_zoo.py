"""What int8 costs the adapters of a zoo: NLL on held-out shots as they are, and with factors rounded to int8.

    python benchmarks/int8_zoo.py ZOO TASKS.jsonl... [--base BASE] [--kshot 8] [--adapters NAME ...]

Every adapter is scored on the shots of every task, by itself at weight 1, in nats a token.
"""

from __future__ import annotations

import argparse

import torch

from recycler.base import load_base
from recycler.build import base_of, read_adapters
from recycler.engine.quantised import round_trip
from recycler.profiles import measure
from recycler.routed import RoutedModel
from recycler.shots import Shots
from recycler.zoo.store import Zoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo")
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--base")
    parser.add_argument("--kshot", type=int, default=8)
    parser.add_argument("--adapters", nargs="+", help="some of the zoo's")
    options = parser.parse_args()
    zoo = Zoo(options.zoo)
    names = options.adapters or list(zoo)
    base = load_base(options.base or base_of(zoo, names))
    model = RoutedModel(base, read_adapters(zoo, names, base))
    shots = Shots.from_files(*options.tasks).sample(options.kshot, 0)
    exact = measure(model, shots)[0].mean(-1)  # [1 + E, tasks]
    for bank in model.engine.banks:
        round_trip(bank.stack)
    change = measure(model, shots)[0].mean(-1) - exact
    print(f"{'adapter':24s} {'NLL':>8s} {'gain':>8s} {'int8':>9s} {'worst':>9s}   nats a token, over {len(shots)} tasks")
    for name, was, by, gain in zip(names, exact[1:], change[1:], exact[0] - exact[1:], strict=True):
        worst = by[by.abs().argmax()]
        print(f"{name:24s} {was.mean():8.4f} {gain.mean():+8.4f} {by.mean():+9.5f} {worst:+9.5f}")
    assert torch.equal(change[0], torch.zeros_like(change[0]))  # the base has nothing to round
    print(f"{'all':24s} {exact[1:].mean():8.4f} {'':8s} {change[1:].mean():+9.5f} {change[1:].abs().max():9.5f}")


if __name__ == "__main__":
    main()
