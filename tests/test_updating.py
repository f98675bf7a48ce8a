"""Adapters that come to a router later, and adapters that go: in Python and by command, and what is said where that cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import Pico

import recycler
from recycler.cli import main
from recycler.profiles import Profile
from recycler.routers.base import Router
from recycler.routers.discovery import load_router, methods
from recycler.updating import add_adapter, remove_adapter
from recycler.zoo.errors import InputError, UsageError

OLD = ("code", "law", "math")


@pytest.fixture
def zoo(llama: Pico) -> recycler.Zoo:
    return recycler.Zoo(llama.zoo)


def profile(pico_: Pico, names: tuple[str, ...], tasks: tuple[str, ...] | None = None) -> Profile:
    """As measured on a zoo that held these adapters alone: every one's own task is called after it."""
    every = recycler.Shots.from_files(*pico_.tasks).sample(4)
    shots = recycler.Shots({task: every[task] for task in (tasks or names)})
    nll = torch.ones(len(names) + 1, len(shots), 4)
    for t, task in enumerate(shots):
        nll[names.index(task) + 1, t] = 0.5
    hashes = {name: recycler.Zoo(pico_.zoo)[name].sha256 for name in names}
    return Profile(names, shots, nll, hashes=hashes, name="p" + str(len(names)))


def built(pico_: Pico, method: str = "ridge", names: tuple[str, ...] = OLD, **options: Any) -> Router:
    return recycler.build_router(method, profile(pico_, names), zoo=recycler.Zoo(pico_.zoo), adapters=names, **options)


# --------------------------------------------------------------------------------------------------------------- all methods


@pytest.mark.parametrize("method", [name for name, cls in methods().items() if cls.extends()])
def test_every_method_that_says_so_can(world: Pico, method: str, tmp_path: Path) -> None:
    """What comes out is a router like any other: it saves, loads, composes, answers; and what went in is as it was."""
    zoo, fast = recycler.Zoo(world.zoo), {"steps": 3} if method == "phatgoose" else {}
    old = built(world, method, **fast)
    before = {key: tensor.clone() for key, tensor in {**old.tensors(), **old.statistics()}.items()}
    grown = add_adapter(old, "poem", profile(world, ("poem",)), zoo=zoo, out=tmp_path / "more")
    assert all(torch.equal(tensor, {**old.tensors(), **old.statistics()}[key]) for key, tensor in before.items())
    loaded = load_router(tmp_path / "more")
    assert loaded.adapters == (*OLD, "poem") == grown.adapters and loaded.config == old.config
    model = recycler.compose(zoo, loaded, tmp_path / "model")
    recycler.load(tmp_path / "model")
    share = model.weights_for(_inputs(model)).share()
    assert share.shape == (1, 4) and torch.isfinite(share).all()
    fewer = remove_adapter(loaded, "poem", zoo=zoo)
    assert fewer.adapters == OLD and set(fewer.facts["hashes"]) == set(OLD)
    rest = recycler.compose(zoo, fewer)
    assert rest.weights_for(_inputs(rest)).share().shape == (1, 3)


def _inputs(model: recycler.RoutedModel) -> dict[str, torch.Tensor]:
    return dict(model.tokenizer(["O the x!"], return_tensors="pt"))


def test_an_order_that_is_not_the_alphabets(llama: Pico, zoo: recycler.Zoo, tmp_path: Path) -> None:
    """The new one is last in the router and first by name; a saved router keeps columns and adapters together."""
    names = ("law", "math", "poem")
    grown = add_adapter(built(llama, "single", names), "code", profile(llama, ("code",)), zoo=zoo, out=tmp_path / "more")
    assert load_router(tmp_path / "more").adapters == (*names, "code")
    one, other = recycler.compose(zoo, grown), recycler.compose(zoo, tmp_path / "more")
    assert one.names == other.names == (*names, "code")
    with torch.no_grad():
        assert torch.equal(one(**_inputs(one)).logits, other(**_inputs(other)).logits)


# -------------------------------------------------------------------------------------------------------------- what it knows


def test_facts_after_a_change(llama: Pico, zoo: recycler.Zoo) -> None:
    old = built(llama)
    grown = add_adapter(old, "poem", profile(llama, ("poem",)), zoo=zoo)
    facts = grown.facts
    assert facts["base"] == old.facts["base"] and facts["hashes"] == {n: zoo[n].sha256 for n in (*OLD, "poem")}
    assert facts["profile"]["owner"] == {n: n for n in (*OLD, "poem")} and facts["profile"]["own"]["poem"] == ["poem"]
    assert facts["updates"] == [{"add": "poem", "profile": "p1"}] and "updates" not in old.facts
    assert grown.report["seconds"] >= 0 and "poem" not in old.facts["hashes"]
    fewer = remove_adapter(grown, "law", zoo=zoo)
    assert fewer.facts["profile"]["owner"] == {n: n for n in ("code", "math", "poem")}
    assert fewer.facts["updates"][1:] == [{"remove": "law"}]


def test_a_profile_of_all_replaces_the_old(llama: Pico, zoo: recycler.Zoo) -> None:
    every = profile(llama, ("poem", *OLD))
    grown = add_adapter(built(llama), "poem", every, zoo=zoo)
    assert grown.facts["profile"] == replace(every, name="p4").restricted((*OLD, "poem")).summary()
    fewer = remove_adapter(grown, "math", every, zoo=zoo)
    assert fewer.facts["profile"] == every.restricted(("code", "law", "poem")).summary()


def test_thresholds_stay(llama: Pico, zoo: recycler.Zoo, tmp_path: Path) -> None:
    """Those of the null policy were found on the shots of all; a newcomer does not move them."""
    for method in ("arrow", "spectr", "average_activation"):
        old = built(llama, method, policy="null")
        assert old.thresholds
        grown = add_adapter(old, "poem", profile(llama, ("poem",)), zoo=zoo, out=tmp_path / method)
        assert grown.thresholds == old.thresholds == load_router(tmp_path / method).thresholds
        assert remove_adapter(grown, "poem", zoo=zoo).thresholds == old.thresholds


def test_nothing_is_learned_again(llama: Pico, zoo: recycler.Zoo) -> None:
    """The others' gates are theirs, to the bit; the new one's is what a build of all would have given it."""
    old, whole = built(llama, "average_activation"), built(llama, "average_activation", (*OLD, "poem"))
    grown = add_adapter(old, "poem", profile(llama, ("poem",)), zoo=zoo)
    for key, tensor in old.tensors().items():
        assert torch.equal(grown.tensors()[key][:3], tensor)
    for key, tensor in whole.tensors().items():
        torch.testing.assert_close(grown.tensors()[key], tensor, rtol=1e-4, atol=1e-5)
    assert grown.report["rows"] == 12 + 4 and grown.report["without_shots"] == []


# ------------------------------------------------------------------------------------------------------------------ refusals


def refusals(pico_: Pico, zoo: recycler.Zoo) -> dict[str, tuple[type[Exception], str, Callable[[], Any]]]:
    ridge, arrow, one = built(pico_), built(pico_, "arrow"), profile(pico_, ("poem",))
    helpless = replace(one, nll=one.nll.flip(0))
    return {
        "twice": (UsageError, "holds law already", lambda: add_adapter(ridge, "law", one, zoo=zoo)),
        "not in the zoo": (UsageError, "Not in the zoo: prose", lambda: add_adapter(ridge, "prose", one, zoo=zoo)),
        "no profile": (UsageError, "no profile of poem was given", lambda: add_adapter(ridge, "poem", zoo=zoo)),
        "another profile": (
            UsageError,
            "p3 knows nothing of poem",
            lambda: add_adapter(ridge, "poem", profile(pico_, OLD), zoo=zoo),
        ),
        "no task": (
            InputError,
            "poem is better than the base at no task",
            lambda: add_adapter(ridge, "poem", helpless, zoo=zoo),
        ),
        "assigned to nothing": (
            UsageError,
            "and none was given",
            lambda: add_adapter(arrow, "poem", zoo=zoo, assign={"poem": "poem"}),
        ),
        "not there": (UsageError, "has no adapter poem", lambda: remove_adapter(arrow, "poem", zoo=zoo)),
        "a stranger's profile": (
            UsageError,
            "p1 knows nothing of",
            lambda: remove_adapter(arrow, "law", one, zoo=zoo),
        ),
    }


def test_refusals(llama: Pico, zoo: recycler.Zoo) -> None:
    for what, (kind, message, call) in refusals(llama, zoo).items():
        with pytest.raises(kind, match=message):
            call()
            raise AssertionError(what)


def test_a_task_by_hand(llama: Pico, zoo: recycler.Zoo) -> None:
    one = profile(llama, ("poem",))
    helpless = replace(one, nll=one.nll.flip(0))
    grown = add_adapter(built(llama), "poem", helpless, zoo=zoo, assign={"poem": "poem"})
    assert grown.facts["profile"]["own"]["poem"] == ["poem"]


@pytest.mark.parametrize("method", ["classifier", "oracle", "xlora"])
def test_methods_that_learn_all_together(llama: Pico, zoo: recycler.Zoo, method: str) -> None:
    router = methods()[method](OLD, methods()[method].Config())
    with pytest.raises(UsageError, match=rf"{method} cannot take in one adapter more.*These do not: .*arrow.*Build it again"):
        add_adapter(router, "poem", zoo=zoo)
    if method != "xlora":  # whose columns can be dropped
        with pytest.raises(UsageError, match=rf"{method} cannot let go of one adapter.*These do not: .*arrow.*Build it again"):
            remove_adapter(router, "law", zoo=zoo)


def test_a_composed_model_has_no_statistics(llama: Pico, zoo: recycler.Zoo, tmp_path: Path) -> None:
    recycler.compose(zoo, built(llama), tmp_path / "model")
    with pytest.raises(UsageError, match="without its statistics"):
        add_adapter(tmp_path / "model" / "router", "poem", profile(llama, ("poem",)), zoo=zoo)
    recycler.compose(zoo, built(llama, "arrow"), tmp_path / "arrow")
    assert len(add_adapter(tmp_path / "arrow" / "router", "poem", zoo=zoo).adapters) == 4  # which needs none


def test_adapters_that_were_made(llama: Pico, zoo: recycler.Zoo) -> None:
    router = built(llama, "arrow")
    router.derived = (zoo["math"],)
    with pytest.raises(UsageError, match="made out of the zoo's"):
        add_adapter(router, "poem", zoo=zoo)


def test_another_base_or_other_weights(llama: Pico, zoo: recycler.Zoo, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    router = built(llama, "arrow")
    other = Path(shutil.copytree(llama.base, tmp_path / "other"))
    model = AutoModelForCausalLM.from_pretrained(llama.base)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
        model.model.embed_tokens.weight.mul_(2)
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)
    model.save_pretrained(other)
    with pytest.raises(InputError, match="is not the base that the router was built on"):
        add_adapter(router, "poem", zoo=zoo, base=str(other))
    router.facts["hashes"]["law"] = "0" * 64
    with pytest.raises(InputError, match="law changed since the router was built"):
        add_adapter(router, "poem", zoo=zoo)


def test_linears_that_the_router_never_saw(llama: Pico, tmp_path: Path) -> None:
    """Methods with statistics of every input cannot learn the old adapters at new ones; the others can."""
    zoo = recycler.Zoo(shutil.copytree(llama.zoo, tmp_path / "zoo"))
    options = {"r": 2, "target_modules": ["down_proj", "gate_proj"]}
    recycler.fetch(pico.make_adapter(llama.base, "odd", options, tmp_path), base=llama.base, zoo=zoo)
    shots = recycler.Shots({"law": recycler.Shots.from_files(*llama.tasks).sample(4)["law"]})
    law = Profile(("law",), shots, torch.tensor([1.0, 0.5])[:, None, None].expand(2, 1, 4))
    odd = replace(law, adapters=("odd",))
    ridge = recycler.build_router("ridge", law, zoo=zoo)
    with pytest.raises(UsageError, match="odd touches sites where this router decides nothing"):
        add_adapter(ridge, "odd", odd, zoo=zoo)
    for method in ("arrow", "spectr", "random", "average_activation"):
        grown = add_adapter(recycler.build_router(method, law, zoo=zoo), "odd", odd, zoo=zoo)
        firing = recycler.compose(zoo, grown).weights_for({"input_ids": torch.tensor([[5, 6, 7]])})
        assert (firing.sites["model.layers.0.mlp.down_proj"] == torch.tensor([0.0, 1.0])).all(), method


# -------------------------------------------------------------------------------------------------------------- by command


def recycle(*args: Any, zoo: Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], env={"RECYCLE_ZOO": str(zoo)})


def ok(*args: Any, zoo: Path) -> Result:
    result = recycle(*args, zoo=zoo)
    assert result.exit_code == 0, result.output
    return result


def test_by_command(llama: Pico, tmp_path: Path) -> None:
    zoo = Path(shutil.copytree(llama.zoo, tmp_path / "zoo"))
    gates, more = tmp_path / "gates", tmp_path / "more"
    tasks = {file.stem: file for file in llama.tasks}
    ok("profile", *(tasks[n] for n in OLD), "--adapters", ",".join(OLD), "--kshot", 2, "--out", "p3", zoo=zoo)
    ok("profile", tasks["poem"], "--adapters", "poem", "--assign", "poem=poem", "--kshot", 2, "--out", "p1", zoo=zoo)
    assign = [part for name in OLD for part in ("--assign", f"{name}={name}")]
    ok("build-router", "ridge", "--profile", "p3", *assign, "--out", gates, zoo=zoo)
    done = ok("build-router", "--add", "poem", "--router", gates, "--profile", "p1", "--out", more, "--json", zoo=zoo)
    assert json.loads(done.stdout)["adapters"] == [*OLD, "poem"] and json.loads(done.stdout)["method"] == "ridge"
    ok("compose", "--router", more, "--out", tmp_path / "model", zoo=zoo)
    assert recycler.load(tmp_path / "model").names == (*OLD, "poem")
    refused = recycle("build-router", "--add", "poem", "--router", gates, "--profile", "p1", "--out", more, zoo=zoo)
    assert refused.exit_code == 2 and "holds a router already" in refused.stderr
    done = ok("build-router", "ridge", "--remove", "law", "--router", more, zoo=zoo)
    assert Path(done.stdout.strip()) == zoo / "routers" / "more-without-law"
    assert load_router(zoo / "routers" / "more-without-law").adapters == ("code", "math", "poem")
    done = ok("build-router", "--add", "law", "--router", "more-without-law", "--profile", "p3", "--assign", "law=law", zoo=zoo)
    assert Path(done.stdout.strip()).name == "more-without-law-with-law"
    assert load_router(gates).adapters == OLD
    ok("build-router", "--remove", "law", "--router", gates, "--out", gates, "--force", zoo=zoo)
    assert load_router(gates).adapters == ("code", "math") and load_router(gates).statistics()


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "Which method?"),
        (["--add", "poem"], "one of --add and --remove, and --router"),
        (["--router", "GATES"], "one of --add and --remove, and --router"),
        (["--add", "poem", "--remove", "law", "--router", "GATES"], "one of --add and --remove"),
        (["--add", "poem", "--router", "none"], "is not a router"),
        (["ridge", "--add", "poem", "--router", "GATES"], "holds a router of arrow, not of ridge"),
        (["--add", "poem", "--router", "GATES", "-o", "top_k=1"], "are for new routers"),
        (["--remove", "law", "--router", "GATES", "--adapters", "law"], "are for new routers"),
        (["--remove", "poem", "--router", "GATES"], "has no adapter poem"),
    ],
)
def test_by_command_wrongly(llama: Pico, tmp_path: Path, args: list[str], message: str) -> None:
    gates = built(llama, "arrow").save(tmp_path / "gates")
    result = recycle("build-router", *(gates if arg == "GATES" else arg for arg in args), zoo=llama.zoo)
    assert result.exit_code in (2, 3) and message in result.stderr, result.output


def test_the_list_says_who_can(llama: Pico) -> None:
    listed = json.loads(ok("routers", "--json", zoo=llama.zoo).stdout)["routers"]
    assert {name for name, row in listed.items() if row["add"]} == {name for name, cls in methods().items() if cls.extends()}
    assert listed["arrow"]["add"] and not listed["oracle"]["add"]
    rows = [line.split("\t") for line in ok("routers", zoo=llama.zoo).stdout.splitlines()]
    assert rows[0][2] == "add" and {row[0] for row in rows[1:] if row[2] == "yes"} >= {"arrow", "ridge", "uniform"}
