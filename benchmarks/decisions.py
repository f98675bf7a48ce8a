"""Routers that decide once a sequence, on every row: how often they pick the task's own adapter, and what they keep of its score.

    python benchmarks/decisions.py [--adapters FOLDER] [--tasks FOLDER] [--base FOLDER] [--rows N] [--methods classifier,classifier:sure=0]

Two mixtures that are the same give the same answer, so that a router that is right costs nothing beside the oracle: this is the
short way to the figures of `quality.py` that need all rows. FOLDER/kshot/*.jsonl are the only rows that anything learns from. Prints,
for plain, switched and reworded prompts (`reword.py` has two sets of words) of the tasks that adapters were trained for, and for the
held-out tasks (--unseen) without and with their shots: the router's exact match, that of each task's own adapter, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recycler import RoutedModel, Router, Shots

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"


def main() -> None:
    parser = argparse.ArgumentParser(description="What deciding once a sequence keeps of each task's own adapter.")
    parser.add_argument("--adapters", type=Path, default=EXAMPLES / "adapters")
    parser.add_argument("--tasks", type=Path, default=EXAMPLES / "tasks")
    parser.add_argument("--base", type=Path, default=Path(".demo/base"))
    parser.add_argument("--rows", type=int, help="at most this many test rows of each task")
    parser.add_argument("--methods", default="classifier,retrieval")
    parser.add_argument("--unseen", default="ho_", help="prefix of tasks that are held out")
    parser.add_argument("--out", type=Path, default=Path(".bench/decisions"))
    arguments = parser.parse_args()

    import recycler
    from recycler.evaluating.contenders import contenders
    from recycler.terminal import bars

    sys.path[:0] = [str(EXAMPLES), str(HERE)]
    from get_base import get_base
    from reword import WORDINGS, reword

    base = get_base(arguments.base)
    zoo = recycler.Zoo(arguments.out / "zoo")
    if not len(zoo):
        recycler.fetch(arguments.adapters, base=base, zoo=zoo).raise_for_failures()

    def read(folder: str, held_out: bool) -> Shots:
        found = arguments.tasks / folder
        tasks = recycler.Shots.from_files(found / "*.jsonl") if found.is_dir() else {}
        return recycler.Shots(
            {t: rows[: arguments.rows] for t, rows in tasks.items() if t.startswith(arguments.unseen) == held_out}
        )

    plain, held_out = read("test", False), read("test", True)

    def otherwise(curt: bool) -> Shots:
        return recycler.Shots(
            {
                task: [replace(row, prompt=reword(task, row.prompt, i, curt)) for i, row in enumerate(rows)]
                for task, rows in plain.items()
                if task in WORDINGS
            }
        )

    groups = {"held-in": plain, "reworded": otherwise(False), "curt": otherwise(True), "switch": read("switch", False)}
    kshot = read("kshot", False)
    everything = recycler.Shots({**kshot, **read("kshot", True)})
    lines = []
    with bars() as progress:
        profile = recycler.profile(zoo, kshot, 16, out="decisions-held-in", progress=progress)
        whole = recycler.profile(zoo, everything, 16, out="decisions-all", progress=progress)
        exam: Exam | None = None
        for one in contenders(arguments.methods):
            method = one.label
            router = recycler.build_router(one.method, profile, zoo=zoo, progress=progress, **one.keywords)
            exam = exam or Exam(recycler.compose(zoo, router))
            # A task that is not its own adapter's is the best one's, so that methods that learn from own tasks see it.
            theirs: dict[str, list[str]] = {}
            for task, name in whole.owner.items():
                theirs.setdefault(name, []).append(task)
            knowing = recycler.build_router(one.method, whole, zoo=zoo, assign=theirs, progress=progress, **one.keywords)
            for group, shots, used in (
                *((group, shots, router) for group, shots in groups.items()),
                ("held-out", held_out, router),
                ("held-out, 16 shots", held_out, knowing),
            ):
                if shots:
                    line = exam.compare(method, group, shots, used, whole.owner)
                    lines.append(line)
                    print(f"{line['method']:20s} {line['group']:20s} {line['exact']:.3f} of {line['own']:.3f} ({line['kept']:.1%})"
                          f"  right {line['right']:.3f}  {line['tasks']}", flush=True)  # fmt: skip
    (arguments.out / "decisions.json").write_text(json.dumps(lines, indent=2) + "\n")


class Exam:
    """Answers, each row with each mixture once."""

    def __init__(self, model: RoutedModel) -> None:
        self.model, self.known = model, dict[tuple[str, tuple[float, ...]], float]()

    def compare(self, method: str, group: str, shots: Shots, router: Router, owner: dict[str, str]) -> dict[str, object]:
        """A router beside each task's own adapter."""
        import torch

        from recycler import text

        rows = [(task, shot) for task, some in shots.items() for shot in some]
        started = time.perf_counter()
        decided = []
        for start in range(0, len(rows), 32):
            prompt = text.prompts(self.model.source, [[shot] for _, shot in rows[start : start + 32]])
            decided.append(router.prepare(self.model.reading, prompt).weights_BE)
        seconds = time.perf_counter() - started
        weights_NE = torch.cat(decided)
        own_NE = torch.tensor([[float(name == owner.get(task)) for name in self.model.names] for task, _ in rows])
        scores = {who: self.score(rows, mixtures) for who, mixtures in (("own", own_NE), ("exact", weights_NE))}
        means = {who: sum(tasks.values()) / len(tasks) for who, tasks in scores.items()}
        return {
            "method": method, "group": group, **{who: round(mean, 4) for who, mean in means.items()},
            "kept": round(means["exact"] / means["own"], 4) if means["own"] else 0.0,
            "right": round(float((weights_NE.argmax(-1) == own_NE.argmax(-1)).float().mean()), 4),
            "milliseconds": round(1000 * seconds / len(rows), 1),
            "tasks": {task: [round(scores[who][task], 2) for who in ("exact", "own")] for task in shots},
        }  # fmt: skip

    def score(self, rows: list[tuple[str, object]], weights_NE: object) -> dict[str, float]:
        """Exact match of each task."""
        from recycler.profiles import exact_match
        from recycler.scoring import answer
        from recycler.text import completion_ids

        keys = [(shot.prompt, tuple(row)) for (_, shot), row in zip(rows, weights_NE.tolist(), strict=True)]  # type: ignore[attr-defined]
        new = [i for i, key in enumerate(keys) if key not in self.known]
        limits = [len(completion_ids(self.model.source, rows[i][1])) + 4 for i in new]  # type: ignore[arg-type]
        texts = answer(self.model, [rows[i][1] for i in new], weights_NE[new], max_new_tokens=limits, batch_size=64)  # type: ignore[index, misc]
        for i, said in zip(new, texts, strict=True):
            self.known[keys[i]] = float(exact_match(said, rows[i][1].completion))  # type: ignore[attr-defined]
        found: dict[str, list[float]] = {}
        for (task, _), key in zip(rows, keys, strict=True):
            found.setdefault(task, []).append(self.known[key])
        return {task: sum(values) / len(values) for task, values in found.items()}


if __name__ == "__main__":
    main()
