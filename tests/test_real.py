"""The whole way on real input, small: the examples' adapters on SmolLM2, a few shots, a few rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import recycler
from recycler.profiles import Profile

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def zoo(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> recycler.Zoo:
    made = recycler.Zoo(tmp_path_factory.mktemp("real") / "zoo")
    report = recycler.fetch(EXAMPLES / "adapters", base=smollm, zoo=made)
    report.raise_for_failures()
    assert len(report.fetched) == 11
    assert sum(one.receipt.tensors for one in report.fetched) == 2 * sum(one.receipt.sites for one in report.fetched)
    return made


def test_a_profile_finds_whose_task_it_is(zoo: recycler.Zoo) -> None:
    """Three shots are enough to tell each adapter's training task from ten others."""
    tasks = ["addition", "plural", "to_roman", "snake_to_camel"]
    shots = recycler.Shots.from_files(*(EXAMPLES / f"tasks/kshot/{task}.jsonl" for task in tasks))
    profile = recycler.profile(zoo, shots, kshot=3, adapters=tasks)
    assert profile.own == {task: (task,) for task in sorted(tasks, key=tasks.index)}
    assert profile.best_single in tasks


def test_ridge_keeps_most_of_what_the_right_adapter_would_get(zoo: recycler.Zoo) -> None:
    names = tuple(zoo)
    shots = recycler.Shots.from_files(*(EXAMPLES / f"tasks/kshot/{name}.jsonl" for name in names)).sample(8)
    profile = Profile(names, shots, torch.ones(len(names) + 1, len(shots), 8), assigned={name: (name,) for name in names})
    router = recycler.build_router("ridge", profile, zoo=zoo, chains=0)
    model = recycler.compose(zoo, router)
    test = recycler.Shots.from_files(*(EXAMPLES / f"tasks/test/{name}.jsonl" for name in names))
    result = recycler.evaluate(model, recycler.Shots({task: rows[:4] for task, rows in test.items()}))
    scores = {contender: result.mean(contender) for contender in result.contenders}
    print(scores)
    assert scores["oracle"] > 0.5, "the adapters do not do what they were trained for"
    assert scores["ridge"] > 0.6 * scores["oracle"]
    assert scores["ridge"] > 2 * max(scores["base"], scores["uniform"])
    assert result.verdict().startswith("Routing helps")
