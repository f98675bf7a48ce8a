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


@torch.no_grad()
def test_the_chosen_adapters_are_those_of_exact_scores(zoo: recycler.Zoo, smollm: Path) -> None:
    """In bf16, at every token and site group of real adapters: the two that the router keeps, against scores in fp64."""
    model = recycler.compose(zoo, recycler.build_router("arrow", zoo=zoo, base=str(smollm)), dtype="bfloat16")
    same, seen = 0, 0

    def watch(gate: torch.nn.Module, args: tuple[torch.Tensor, ...], scores: torch.Tensor) -> None:
        nonlocal same, seen
        x, v_ND, offset_N = args[0].double(), gate.v_ND.double(), gate.offset_N
        exact = (x @ v_ND.T).abs() + (0 if offset_N is None else offset_N.double())
        chosen, right = (s.reshape(-1, len(zoo)).topk(2).indices.sort(-1).values for s in (scores, exact))
        same, seen = same + int((chosen == right).all(-1).sum()), seen + len(right)

    gates = [bank.gate for bank in model.engine.banks if bank.gate is not None]
    handles = [gate.register_forward_hook(watch) for gate in gates]
    tests = recycler.Shots.from_files(*(EXAMPLES / f"tasks/kshot/{name}.jsonl" for name in zoo))
    inputs = model.tokenizer([rows[0].prompt for rows in tests.values()], return_tensors="pt", padding=True)
    model(**inputs)
    for handle in handles:
        handle.remove()
    assert seen > 50_000 and same / seen >= 0.9999


@torch.no_grad()
def test_the_real_model_compiles_without_a_break(zoo: recycler.Zoo, smollm: Path) -> None:
    """Two of its layers, real widths, the real adapters; the code of the others is the same."""
    model = recycler.compose(zoo, recycler.build_router("arrow", zoo=zoo, base=str(smollm)))
    model.base.model.layers = model.base.model.layers[:2]
    torch._dynamo.reset()
    ids = torch.tensor([[5, 6, 7, 8]])
    compiled = torch.compile(model.base, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
