"""Which way to route? Every method on a real zoo, all test rows, on one table beside base, best single, uniform and oracle.

    python benchmarks/quality.py [--adapters FOLDER] [--tasks FOLDER] [--base FOLDER] [--rows N] [--methods arrow,ridge] [--out FOLDER]

FOLDER/kshot/*.jsonl are the only rows that profiles, gates and choices see; FOLDER/test/*.jsonl the ones that are scored, and so
are, where they are, FOLDER/switch/*.jsonl (the same tasks after turns of others) and the rewordings of benchmarks/reword.py. Tasks
whose name begins with --unseen are held out: no adapter was trained for them, and in the first part the profile leaves them out. In
the second part ("held-out, shots") it has their shots too. Methods that mix once for everything then get one such task at a time.

Prints the table of the README, and writes it to README.md of the output folder beside the benches themselves. The same command goes
on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recycler import Profile, Shots
    from recycler.evaluating.benching import Bench

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
SHOTS = "held-out, shots"


def main() -> None:
    parser = argparse.ArgumentParser(description="Every method on a real zoo.")
    parser.add_argument("--adapters", type=Path, default=EXAMPLES / "adapters")
    parser.add_argument("--tasks", type=Path, default=EXAMPLES / "tasks")
    parser.add_argument("--base", type=Path, default=Path(".demo/base"))
    parser.add_argument("--rows", type=int, help="at most this many test rows of each task")
    parser.add_argument("--kshot", type=int, default=16)
    parser.add_argument("--methods", help="as recycle bench-routers --methods; by default all")
    parser.add_argument("--unseen", default="ho_", help="prefix of tasks that are held out; empty for none")
    parser.add_argument("--device")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path(".bench/quality"))
    arguments = parser.parse_args()

    import recycler
    from recycler.evaluating.bench_report import bench_table
    from recycler.evaluating.benching import bench_routers
    from recycler.evaluating.contenders import contenders
    from recycler.routers.discovery import find
    from recycler.terminal import bars, profile_table

    sys.path[:0] = [str(EXAMPLES), str(HERE)]
    from get_base import get_base
    from reword import WORDINGS, reword

    base = get_base(arguments.base)
    zoo = recycler.Zoo(arguments.out / "zoo")
    if not len(zoo):
        recycler.fetch(arguments.adapters, base=base, zoo=zoo).raise_for_failures()

    def unseen(task: str) -> bool:
        return bool(arguments.unseen) and task.startswith(arguments.unseen)

    def read(folder: str) -> Shots:
        found = arguments.tasks / folder
        return recycler.Shots.from_files(found / "*.jsonl") if found.is_dir() else recycler.Shots({})

    def some(shots: Shots, held_out: bool) -> Shots:
        return recycler.Shots({task: rows for task, rows in shots.items() if unseen(task) == held_out})

    kshot, test = read("kshot"), read("test")
    loading: dict[str, Any] = {"device": arguments.device}
    with bars() as progress:
        profile = recycler.profile(
            zoo, some(kshot, False), arguments.kshot, out="held-in", generate=True, progress=progress, **loading
        )
        profile_table(profile)
        common: dict[str, Any] = {"zoo": zoo, "rows": arguments.rows, "progress": progress, "loading": loading}
        common |= {"batch_size": arguments.batch_size}
        reworded = recycler.Shots(
            {
                task: [replace(row, prompt=reword(task, row.prompt, i)) for i, row in enumerate(rows)]
                for task, rows in some(test, False).items()
                if task in WORDINGS
            }
        )
        also = {name: shots for name, shots in (("switch", some(read("switch"), False)), ("reworded", reworded)) if shots}
        first = bench_routers(
            profile, arguments.methods, tasks=some(test, False), held_out=some(test, True) or None, also=also,
            out=arguments.out / "bench", **common,
        )  # fmt: skip
        second: list[Bench] = []
        if some(kshot, True):
            everything = recycler.profile(zoo, kshot, arguments.kshot, out="all", generate=True, progress=progress, **loading)
            entries = contenders(arguments.methods)
            static = [one.label for one in entries if find(one.method).granularity == "static"]
            others = [one.label for one in entries if one.label not in static]
            if others:
                # Each task is its best adapter's own, also where that was trained for another.
                theirs: dict[str, list[str]] = {}
                for task, name in everything.owner.items():
                    theirs.setdefault(name, []).append(task)
                second.append(
                    bench_routers(everything, others, also={SHOTS: some(test, True)}, assign=theirs, out=arguments.out / "shots", **common)
                )  # fmt: skip
            for task, rows in some(test, True).items() if static else ():
                alone, out = only(everything, task), arguments.out / f"shots-{task}"
                if any(alone.own.values()):
                    second.append(bench_routers(alone, static, also={SHOTS: recycler.Shots({task: rows})}, out=out, **common))
    bench_table(first)
    text = report(first, second)
    (arguments.out / "README.md").write_text(text, encoding="utf8")
    print(f"\n{text}")


def only(profile: Profile, task: str) -> Profile:
    """The profile of one task."""
    from recycler.evaluating.choosing import without_task

    for other in profile.tasks:
        if other != task:
            profile = without_task(profile, other)
    return profile


def report(first: Bench, second: list[Bench]) -> str:
    """The table of the first part, with the second's as a column more, and what both conclude."""
    from recycler.evaluating.bench_report import header, rows, verdict

    table = [header(first), *rows(first)]
    if second:
        place = table[0].index("NLL")
        table[0].insert(place, SHOTS)
        for row in table[1:]:
            scores: dict[str, float] = {}
            for bench in second:
                if row[0] in bench.contenders:
                    exact = bench.groups[SHOTS].exact[row[0]]
                    scores = {task: sum(values) / len(values) for task, values in exact.items()} | scores
            row.insert(place, f"{sum(scores.values()) / len(scores):.3f}" if scores else "–")
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in table]
    lines.insert(1, "|---" * len(table[0]) + "|")
    lines += ["", *verdict(first), *(line for bench in second[:1] for line in verdict(bench)[1:]), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
