"""What a bench looks like: the table on a terminal, in Markdown, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from recycler.evaluating.benching import Bench
from recycler.evaluating.evaluation import BEYOND, UNTOLD
from recycler.journal import write_text
from recycler.terminal import say, table


def header(bench: Bench) -> list[str]:
    first = next(iter(bench.groups))
    columns = []
    for name in bench.groups:
        columns += [name, "95 %"] if name == first else [name]
    return ["method", *columns, "NLL", "fit s", "× base", "MB", "gates MB", "needs"]


def rows(bench: Bench) -> Iterator[list[str]]:
    """One for each contender, and one for each method that failed."""
    first = next(iter(bench.groups))
    for label in bench.contenders:
        cost, cells = bench.costs[label], []
        for name, group in bench.groups.items():
            cells.append(f"{group.mean(label):.3f}")
            if name == first:
                low, high = group.interval(label)
                cells.append(f"{low:.2f}–{high:.2f}")
        times = "–" if math.isnan(cost.times) else f"{cost.times:.2f}"
        fit = f"{cost.fit:.1f}" if label in bench.routers else "–"
        sizes = [f"{size / 1e6:.1f}" for size in (cost.adapters, cost.router)]
        yield [label, *cells, f"{bench.groups[first].mean(label, 'nll'):.2f}", fit, times, *sizes, cost.needs]
    width = len(header(bench))
    for label, why in bench.failed.items():
        yield [label, *["–"] * (width - 2), f"failed: {why}"]


def bench_table(bench: Bench) -> None:
    """On stdout: the table and what to use. On stderr: how to read it, and what failed."""
    table(header(bench), list(rows(bench)), right=1)
    tasks = ", ".join(f"{name}: {len(group.tasks)} tasks" for name, group in bench.groups.items())
    say(f"mean exact match, and its interval, on {tasks}; NLL on the first; MB of adapters and of gates beside the base")
    for name, group in bench.groups.items():
        hindsight = [task for task, one in group.chosen["oracle"].items() if one["how"] == "in hindsight"]
        if hindsight:
            say(f"{name}: oracle chosen in hindsight, by NLL on these rows, for {', '.join(hindsight)}")
    for name, why in bench.selected.items():
        say(f"selected {name}: {why}")
    for line in verdict(bench):
        click.echo(line)


def verdict(bench: Bench) -> list[str]:
    """What to use, and where nothing helps."""
    lines = [bench.choice[1]]
    if bench.routers:
        for name, group in bench.groups.items():
            by_task = group.by_task()
            for kind, what in (
                (BEYOND, f"Beyond the zoo, {name}: don't bother with"),
                (UNTOLD, f"Too few rows to tell, {name}:"),
            ):
                scores = [
                    f"{task} (base {one['base_exact']:.2f}, best {one['best_exact']:.2f})"
                    for task, one in by_task.items()
                    if one["verdict"] == kind
                ]
                if scores:
                    lines.append(f"{what} {', '.join(scores)}.")
    return lines


def markdown(bench: Bench) -> str:
    """The table for a README."""
    head = header(bench)
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows(bench)]
    return "\n".join([*lines, "", *verdict(bench), ""])


def as_csv(bench: Bench) -> str:
    """A row for each contender, in full precision."""
    out = io.StringIO()
    names = ["contender", "router"]
    for name in bench.groups:
        names += [f"{name} exact", f"{name} low", f"{name} high", f"{name} nll"]
    names += [
        "mean exact",
        "fit seconds",
        "ms per row",
        "times base",
        "adapter bytes",
        "router bytes",
        "kind",
        "needs",
        "failed",
    ]
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for label in bench.contenders:
        cost = bench.costs[label]
        row: dict[str, Any] = {"contender": label, "router": label in bench.routers, "mean exact": bench.mean(label)}
        for name, group in bench.groups.items():
            low, high = group.interval(label)
            row |= {f"{name} exact": group.mean(label), f"{name} low": low, f"{name} high": high}
            row[f"{name} nll"] = group.mean(label, "nll")
        row |= {"fit seconds": cost.fit, "ms per row": cost.row * 1e3, "times base": cost.times, "kind": cost.kind}
        row |= {"adapter bytes": cost.adapters, "router bytes": cost.router, "needs": cost.needs}
        writer.writerow(row)
    for label, why in bench.failed.items():
        writer.writerow({"contender": label, "router": True, "failed": why})
    return out.getvalue()


def write(bench: Bench, folder: Path) -> None:
    """bench.csv, and bench.json last."""
    write_text(folder / "bench.csv", as_csv(bench))
    write_text(folder / "bench.json", json.dumps(bench.to_json(), indent=2, ensure_ascii=False) + "\n")
