"""lm-evaluation-harness on routed models: what it is told is what the model says, decided on contexts alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import Pico

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import recycler
from recycler.cli import main
from recycler.evaluating.harness import harness, require_lm_eval
from recycler.lm_eval_model import RecyclerLM
from recycler.lm_eval_model import main as run_lm_eval
from recycler.routed import RoutedModel
from recycler.zoo.errors import InputError, UsageError

ROUTERS = ("retrieval", "ridge", "uniform")  # once a sequence, token by token, once for everything
CONTEXTS = ["Add 1 and b.", "O 3 of the long, long poem!", "def f3(x): return xd"]
PAIRS = [(context, answer) for context in CONTEXTS for answer in (" m1", " l", " p22")]
# The same tokens, and the context ends elsewhere: what is decided on it is another mixture.
PAIRS += [
    ("O 3 of the long,", " long poem! m1"),
    ("Add 1 and b. O 3 of", " the"),
    ("Add 1 and b.", " O 3 of the"),
    ("", "Is it?"),
]


class World(NamedTuple):
    pico: Pico
    models: dict[str, Path]
    tasks: Path


@pytest.fixture(scope="module")
def world(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Composed models with each kind of router, and a folder of task files."""
    folder, zoo = tmp_path_factory.mktemp("lm-eval"), recycler.Zoo(llama.zoo)
    profile = recycler.profile(zoo, shots=recycler.Shots.from_files(*llama.tasks), kshot=2, out=folder / "p2")
    for method in ROUTERS:
        router = recycler.build_router(method, profile, zoo=zoo, out=folder / "routers" / method)
        recycler.compose(zoo, router, folder / method).engine.detach()
    return World(llama, {method: folder / method for method in ROUTERS}, write_tasks(folder / "tasks"))


def write_tasks(folder: Path) -> Path:
    """A multiple-choice task, a generated one, and a perplexity."""
    folder.mkdir()
    data = folder / "rows.jsonl"
    rows = [{"q": CONTEXTS[i % 3], "choices": [" m1", " l2", " c"], "gold": i % 3} for i in range(5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
    kinds = {
        "pico_choice": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: gold\n"
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n",
        "pico_answer": "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{choices[gold]}}'\n"
        "generation_kwargs:\n  until: ['zz']\n  max_gen_toks: 5\nmetric_list:\n  - metric: exact_match\n",
        "pico_text": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{q}}'\n"
        "metric_list:\n  - metric: word_perplexity\n",
    }
    for name, rest in kinds.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{rest}", encoding="utf8")
    return folder


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def loglikelihoods(lm: HFLM, pairs: list[tuple[str, str]] = PAIRS) -> list[tuple[float, bool]]:
    scores: list[tuple[float, bool]] = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    return scores


@torch.no_grad()
def direct(model: RoutedModel, context: str, answer: str) -> tuple[float, bool]:
    """One pair, by the model itself: decided on the context, scored on the answer."""
    first = model.tokenizer(context, return_tensors="pt").input_ids if context else torch.tensor([[1]])
    second = model.tokenizer(answer, return_tensors="pt", add_special_tokens=False).input_ids
    with model.planned({"input_ids": first, "attention_mask": torch.ones_like(first)}):
        logits_TV = model(input_ids=torch.cat([first, second], 1)[:, :-1]).logits[0, first.shape[1] - 1 :]
    scores_T = logits_TV.log_softmax(-1).gather(1, second[0][:, None])
    return float(scores_T.sum()), bool((logits_TV.argmax(-1) == second[0]).all())


def close(some: list[tuple[float, bool]], others: list[tuple[float, bool]]) -> bool:
    values = [torch.tensor([score for score, _ in scores]) for scores in (some, others)]
    return torch.allclose(*values, atol=1e-4) and [greedy for _, greedy in some] == [greedy for _, greedy in others]


# ------------------------------------------------------------------------------------------------------------ the model type


@pytest.mark.parametrize("method", ROUTERS)
def test_loglikelihoods_are_the_models_own(world: World, method: str) -> None:
    """Whatever the batch."""
    model = recycler.load(world.models[method])
    expected = [direct(model, *pair) for pair in PAIRS]
    assert len({round(score, 3) for score, _ in expected}) == len(PAIRS)
    for batch_size in (1, 4):
        lm = RecyclerLM(model, batch_size=batch_size)
        assert lm.decides_on_contexts == (method == "retrieval")
        assert close(loglikelihoods(lm), expected)
        assert lm.logits_cache and model.engine.control.plan is None
    if method == "retrieval":
        assert close(loglikelihoods(RecyclerLM(model, batch_size="auto", max_batch_size=2)), expected)


def test_a_continuation_is_not_seen(world: World) -> None:
    """Deciding on context and continuation together would say something else."""
    model = recycler.load(world.models["retrieval"])
    leaked = 0
    for (context, answer), (score, _) in zip(PAIRS, loglikelihoods(RecyclerLM(model)), strict=True):
        with model.planned(dict(model.tokenizer(context + answer, return_tensors="pt"))):
            leaked += abs(direct(model, context, answer)[0] - score) > 1e-3
    assert leaked


def test_long_contexts_are_decided_on_as_the_model_sees_them(world: World) -> None:
    """lm-eval cuts them from the left."""
    model = recycler.load(world.models["retrieval"])
    lm = RecyclerLM(model, batch_size=2, max_length=24)
    pairs = [("Is it liable? " * 9 + CONTEXTS[0], " m1"), (CONTEXTS[0], " m1")]
    cut = (pairs[0][0] + pairs[0][1])[-25:].removesuffix(" m1")
    assert close(loglikelihoods(lm, pairs), [direct(model, cut, " m1"), direct(model, *pairs[1])])


def test_texts_without_a_context(world: World) -> None:
    texts = ["Add 1 and b.", "O"]
    for method in ROUTERS:
        model = recycler.load(world.models[method])
        scores = RecyclerLM(model, batch_size=2).loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in texts]))
        assert scores == pytest.approx([direct(model, "", text)[0] for text in texts], abs=1e-4)


@pytest.mark.parametrize("method", ROUTERS)
def test_answers_are_the_models_own(world: World, method: str) -> None:
    model = recycler.load(world.models[method])
    asked = [(context, {"until": ["zz"], "max_gen_toks": 6}) for context in CONTEXTS]
    expected = []
    for context in CONTEXTS:
        inputs = model.tokenizer(context, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(model.tokenizer.decode(ids, skip_special_tokens=True))
    for batch_size in (1, 4):
        lm = RecyclerLM(str(world.models[method]), batch_size=batch_size)
        assert lm.generate_until(requests("generate_until", asked), disable_tqdm=True) == expected


def test_one_adapter_is_what_lm_eval_makes_of_it_with_peft(world: World) -> None:
    base = str(world.pico.base)
    texts = requests("loglikelihood_rolling", [(context,) for context in CONTEXTS])
    asked = requests("generate_until", [(context, {"until": ["zz"], "max_gen_toks": 6}) for context in CONTEXTS])
    # Without its sharing of forwards, which takes the wrong tokens where contexts end elsewhere.
    plain = loglikelihoods(HFLM(base, device="cpu", logits_cache=False))
    assert close(loglikelihoods(RecyclerLM(str(world.models["retrieval"]), only="base", batch_size=4)), plain)
    for name in ("math", "poem"):  # poem has DoRA
        theirs = loglikelihoods(HFLM(base, peft=str(world.pico.adapters[name]), device="cpu", logits_cache=False))
        ours = RecyclerLM(str(world.models["retrieval"]), only=name, batch_size=4)
        assert close(loglikelihoods(ours), theirs) and not close(theirs, plain)
        peft = HFLM(base, peft=str(world.pico.adapters[name]), device="cpu")
        assert ours.loglikelihood_rolling(texts) == pytest.approx(peft.loglikelihood_rolling(texts), abs=1e-3)
        assert ours.generate_until(asked) == peft.generate_until(asked)


def test_another_router_and_what_makes_no_sense(world: World) -> None:
    folder = world.models["ridge"].parent / "routers" / "ridge"
    lm = RecyclerLM(str(world.models["uniform"]), router=folder)
    assert close(loglikelihoods(lm), loglikelihoods(RecyclerLM(str(world.models["ridge"]))))
    info = lm.get_model_info()
    assert info["router"] == "ridge" and set(info["adapters"]) == {"math", "law", "code", "poem"} and json.dumps(info)
    with pytest.raises(UsageError, match="no adapter prose"):
        RecyclerLM(str(world.models["uniform"]), only="prose")
    with pytest.raises(UsageError, match="both given"):
        RecyclerLM(str(world.models["uniform"]), only="math", weights=torch.zeros(4))
    with pytest.raises(InputError, match="not a composed model"):
        RecyclerLM(str(world.tasks))


def test_an_encoder_decoder(t5: Pico, tmp_path: Path) -> None:
    zoo = recycler.Zoo(t5.zoo)
    model = recycler.compose(zoo, recycler.build_router("arrow", zoo=zoo), tmp_path / "model")
    lm = RecyclerLM(model, batch_size=2)
    pairs = [(CONTEXTS[0], "m1"), (CONTEXTS[1], "longer")]
    expected = []
    for context, answer in pairs:
        labels = model.tokenizer(answer, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            scores_TV = model(**model.tokenizer(context, return_tensors="pt"), labels=labels).logits[0].log_softmax(-1)
        expected.append(float(scores_TV.gather(1, labels[0][:, None]).sum()))
    assert [score for score, _ in loglikelihoods(lm, pairs)] == pytest.approx(expected, abs=1e-3)
    answers = lm.generate_until(requests("generate_until", [(CONTEXTS[0], {"until": ["zz"], "max_gen_toks": 5})]))
    assert len(answers) == 1


# ------------------------------------------------------------------------------------------------------------ beside baselines


def test_a_router_is_never_shown_alone(world: World) -> None:
    model = recycler.load(world.models["ridge"])
    own = model.router
    found = harness(model, ["pico_*"], path=world.tasks, batch_size=2)
    assert found.contenders[-2:] == ("uniform", "ridge") and found.contenders[0] == "base" and found.routers == ("ridge",)
    assert model.router is own and model.engine.control.forced is None
    single = own.facts["profile"]["best_single"]  # type: ignore[union-attr]
    assert ("best single" in found.contenders) == (single is not None) and found.chosen == single
    assert found.metric == {"pico_choice": "acc,none", "pico_answer": "exact_match,none"}
    for who, lm in (("base", HFLM(str(world.pico.base), device="cpu")), ("ridge", RecyclerLM(model))):
        manager = TaskManager(include_path=str(world.tasks), include_defaults=False)
        theirs: Any = simple_evaluate(lm, tasks=list(found.scores[who]), task_manager=manager, bootstrap_iters=0)
        for task, scores in found.scores[who].items():
            assert scores and scores == pytest.approx({key: theirs["results"][task][key] for key in scores}, rel=1e-4)
        assert sum(found.rows[who]["pico_choice"]) / 5 == pytest.approx(theirs["results"]["pico_choice"]["acc,none"])
    data = json.loads(json.dumps(found.to_json()))
    assert (
        data["schema_version"] == 1
        and data["rows"] == {"pico_choice": 5, "pico_answer": 5}
        and data["contenders"]["ridge"]["router"]
    )
    assert data["verdict"] == found.verdict() and ("Don't bother" in found.verdict() or "Routing helps" in found.verdict())
    text = harness(model, ["pico_text"], path=world.tasks, rows=2)
    assert text.metric == {} and text.verdict().startswith("No verdict") and json.dumps(text.to_json())


def recycle(*args: Any) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output and "\x1b" not in result.output
    return result


def test_the_command(world: World) -> None:
    given = ["eval", world.models["ridge"], "--lm-eval", "pico_choice,pico_answer", "--lm-eval-path", world.tasks]
    shown = recycle(*given, "--limit", 3, "--router", world.models["ridge"].parent / "routers" / "retrieval")
    assert shown.exit_code == 0, shown.output
    lines = [line.split("\t") for line in shown.stdout.splitlines()]
    head = [name for name in lines[0] if name != "best single"]
    assert head == ["task", "metric", "base", "uniform", "ridge", "retrieval"]
    assert [line[:2] for line in lines[1:-1]] == [
        ["pico_choice", "acc*"], ["pico_choice", "acc_norm"], ["pico_answer", "exact_match*"], ["mean of *", ""], ["95 % interval", ""],
    ]  # fmt: skip
    assert "lm-eval: " in shown.stderr and "it/s" not in shown.stderr
    data = json.loads(recycle(*given, "--rows", 2, "--json").stdout)
    assert data["rows"] == {"pico_choice": 2, "pico_answer": 2} and {"base", "uniform", "ridge"} <= set(data["contenders"])


@pytest.mark.parametrize(
    "args, code, message",
    [
        ([], 2, "One of FILES and --lm-eval is needed"),
        (["FILE", "--lm-eval", "pico_choice"], 2, "One of FILES and --lm-eval is needed"),
        (["FILE", "--lm-eval-path", "TASKS"], 2, "--lm-eval-path goes with --lm-eval"),
        (
            ["--lm-eval", "pico_choice", "--answers", "x", "--assign", "math=a"],
            2,
            "--assign, --answers does not go with --lm-eval",
        ),
        (["--lm-eval", "pico_choice", "--lm-eval-path", "none"], 2, "There is no folder none"),
        (["--lm-eval", ",", "--lm-eval-path", "TASKS"], 2, "No tasks were named"),
        (["--lm-eval", "pico_choice,pico_prose", "--lm-eval-path", "TASKS"], 2, "lm-eval has no task pico_prose"),
        (["--lm-eval", "broken", "--lm-eval-path", "BROKEN"], 3, "lm-eval could not run broken"),
    ],
)
def test_mistakes(world: World, tmp_path: Path, args: list[str], code: int, message: str) -> None:
    text = (world.tasks / "pico_choice.yaml").read_text(encoding="utf8")
    (tmp_path / "broken.yaml").write_text(
        text.replace("pico_choice", "broken").replace(str(world.tasks), "/nowhere"), encoding="utf8"
    )
    named = {"FILE": world.pico.tasks[0], "TASKS": world.tasks, "BROKEN": tmp_path}
    result = recycle("eval", world.models["uniform"], *[named.get(arg, arg) for arg in args])
    assert result.exit_code == code and message in " ".join(result.stderr.split()) and result.stdout == "", result.output


def test_without_lm_eval(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    with pytest.raises(UsageError, match=r"pip install 'recycler\[lm-eval\]'"):
        require_lm_eval()
    result = recycle("eval", world.tasks, "--lm-eval", "pico_choice")  # said before the model is looked for
    assert result.exit_code == 2 and "pip install 'recycler[lm-eval]'" in result.stderr


def test_lm_evals_own_way(world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, with model arguments as its command line gives them. lm-eval looks for no models of other packages: this module is
    its command line with this one registered."""
    assert get_model("recycler") is RecyclerLM
    manager = TaskManager(include_path=str(world.tasks), include_defaults=False)
    given = f"pretrained={world.models['ridge']},only=math,dtype=float32"
    found = simple_evaluate(
        "recycler", given, ["pico_choice"], batch_size="2", device="cpu", task_manager=manager, bootstrap_iters=0
    )
    assert found["config"]["model"] == "recycler" and found["config"]["router"] is None
    assert found["results"]["pico_choice"]["acc,none"] in [i / 5 for i in range(6)]
    if not torch.cuda.is_available():  # its command line asks for cuda:0 unless told otherwise
        assert RecyclerLM(world.models["ridge"], device="cuda:0").device.type == "cpu"
    monkeypatch.setattr(sys, "argv", ["recycler.lm_eval_model", "run", "--help"])
    with pytest.raises(SystemExit) as end:
        run_lm_eval()
    assert not end.value.code and "--model_args" in capsys.readouterr().out
