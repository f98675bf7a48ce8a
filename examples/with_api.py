"""What examples/flat.py does, with the library: vetted, batched, saved, and with a verdict.

python examples/with_api.py [--base FOLDER] [--adapters FOLDER] [--tasks FOLDER] [--out FOLDER] [--rows 3]
"""

import argparse

import recycler
from recycler.terminal import evaluation_table

parser = argparse.ArgumentParser()
parser.add_argument("--base", default=".demo/base")
parser.add_argument("--adapters", default="examples/adapters")
parser.add_argument("--tasks", default="examples/tasks")
parser.add_argument("--out", default=".demo/with-api")
parser.add_argument("--rows", type=int, default=3)
options = parser.parse_args()

zoo = recycler.Zoo(f"{options.out}/zoo")
recycler.fetch(options.adapters, base=options.base, zoo=zoo).raise_for_failures()
profile = recycler.profile(zoo, recycler.Shots.from_files(f"{options.tasks}/kshot/*.jsonl"), kshot=8)
router = recycler.build_router("ridge", profile, zoo=zoo)
model = recycler.compose(zoo, router, f"{options.out}/model", force=True)
test = recycler.Shots.from_files(f"{options.tasks}/test/*.jsonl")
evaluation_table(recycler.evaluate(model, recycler.Shots({task: rows[: options.rows] for task, rows in test.items()})))
