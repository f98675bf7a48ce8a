"""Does routing help? Every method on a real zoo, all test rows, beside base, best single, uniform and oracle.

    python benchmarks/quality.py [--adapters FOLDER] [--tasks FOLDER] [--base FOLDER] [--rows N] [--methods arrow,ridge] [--out FOLDER]

FOLDER/kshot/*.jsonl are the only rows that profiles, gates and choices see; FOLDER/test/*.jsonl the ones that are scored. Tasks
whose name begins with --unseen are left out of the profile: no adapter was trained for them, and no router knows them. Writes
quality.csv, quality.json and everybody's answers.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
import time
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def main() -> None:
    parser = argparse.ArgumentParser(description="Every method on a real zoo.")
    parser.add_argument("--adapters", type=Path, default=EXAMPLES / "adapters")
    parser.add_argument("--tasks", type=Path, default=EXAMPLES / "tasks")
    parser.add_argument("--base", type=Path, default=Path(".demo/base"))
    parser.add_argument("--rows", type=int, help="at most this many test rows of each task")
    parser.add_argument("--methods", help="comma-separated; by default all but uniform, which is a baseline")
    parser.add_argument("--unseen", default="ho_", help="prefix of tasks that the profile leaves out; empty for none")
    parser.add_argument("--out", type=Path, default=Path(".bench/quality"))
    arguments = parser.parse_args()

    import recycler
    from recycler.routers.discovery import methods
    from recycler.run import write_answers
    from recycler.terminal import bars, evaluation_table, profile_table, say

    sys.path.insert(0, str(EXAMPLES))
    from get_base import get_base

    base = get_base(arguments.base)
    shutil.rmtree(arguments.out, ignore_errors=True)
    zoo = recycler.Zoo(arguments.out / "zoo")
    recycler.fetch(arguments.adapters, base=base, zoo=zoo).raise_for_failures()
    seconds: dict[str, float] = {}

    def unseen(task: str) -> bool:
        return bool(arguments.unseen) and task.startswith(arguments.unseen)

    kshot = recycler.Shots.from_files(arguments.tasks / "kshot/*.jsonl")
    kshot = recycler.Shots({task: rows for task, rows in kshot.items() if not unseen(task)})
    with bars() as progress:
        started = time.perf_counter()
        profile = recycler.profile(zoo, kshot, kshot=16, out="quality", progress=progress)
        seconds["profile"] = time.perf_counter() - started
        profile_table(profile)
        routers = {}
        for name in arguments.methods.split(",") if arguments.methods else [m for m in methods() if m != "uniform"]:
            routers[name] = recycler.build_router(name, profile, zoo=zoo, out=zoo.routers_dir / name, progress=progress)
            seconds[name] = routers[name].report["seconds"]
            say(f"{name}: {routers[name].report}")
        test = recycler.Shots.from_files(arguments.tasks / "test/*.jsonl")
        test = recycler.Shots({task: rows[: arguments.rows] for task, rows in test.items()})
        model = recycler.compose(zoo, next(iter(routers.values())))
        result = recycler.evaluate(model, test, routers=routers, progress=progress)
    evaluation_table(result)

    groups = {"held-in": [t for t in test if not unseen(t)], "held-out": [t for t in test if unseen(t)]}
    rows = []
    for contender in result.contenders:
        for group, tasks in groups.items():
            if tasks:
                mean = sum(sum(result.exact[contender][t]) / len(result.exact[contender][t]) for t in tasks) / len(tasks)
                rows.append({"contender": contender, "group": group, "tasks": len(tasks), "exact": round(mean, 4)})
    print()
    for row in rows:
        print(f"{row['contender']:14s} {row['group']:9s} {row['exact']:.3f}")
    print("fitted in seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    with (arguments.out / "quality.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["contender", "group", "tasks", "exact"])
        writer.writeheader()
        writer.writerows(rows)
    (arguments.out / "quality.json").write_text(json.dumps({**result.to_json(), "seconds": seconds}, indent=2) + "\n")
    write_answers(result, test, arguments.out / "answers")


if __name__ == "__main__":
    main()
