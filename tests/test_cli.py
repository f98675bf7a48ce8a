"""The command line as a person and a script meet it: the whole way, what goes to which stream, exit codes, and that it says
what the library says."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import Pico

import recycler
from recycler.base import load_base
from recycler.cli import main
from recycler.run import answer_file, answer_prompts
from recycler.zoo.errors import RecycleError

ROOT = Path(__file__).parent.parent
NAMES = ["code", "law", "math", "poem"]
PROMPTS = [
    {"prompt": "Add 1 and b.", "id": 7},
    {"prompt": "O the long, long poem!", "tags": ["ü"]},
    {"prompt": "f", "id": None},
]


def recycle(*args: Any, zoo: Path | None = None) -> Result:
    """Runs a command in this process."""
    env = {} if zoo is None else {"RECYCLE_ZOO": str(zoo)}
    result = CliRunner().invoke(main, [str(arg) for arg in args], env=env)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "\x1b" not in result.output and "Traceback" not in result.output
    return result


def ok(*args: Any, zoo: Path | None = None) -> Result:
    result = recycle(*args, zoo=zoo)
    assert result.exit_code == 0, result.output
    return result


def commands(group: click.Group = main, path: str = "recycle") -> Iterator[tuple[str, click.Command]]:
    """Every leaf, by what a person types."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


class Way(NamedTuple):
    """What the commands left and said, step by step."""

    pico: Pico
    zoo: Path
    gates: Path
    model: Path
    said: dict[str, Result]


@pytest.fixture(scope="module")
def way(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> Way:
    """The whole way by commands alone. Tests that change something copy it."""
    folder = tmp_path_factory.mktemp("cli")
    zoo, gates, model = folder / "zoo", folder / "gates", folder / "model"
    said = {
        "fetch": ok("fetch", *llama.adapters.values(), "--base", llama.base, zoo=zoo),
        "profile": ok("profile", *llama.tasks, "--kshot", 2, "--out", "p2", zoo=zoo),
        "build-router": ok("build-router", "ridge", "--profile", "p2", "-o", "top_k=1", "--out", gates, zoo=zoo),
        "compose": ok("compose", "--router", gates, "--out", model, zoo=zoo),
    }
    return Way(llama, zoo, gates, model, said)


def test_the_whole_way(way: Way) -> None:
    assert way.said["fetch"].stdout.split() == sorted(NAMES, key=list(way.pico.adapters).index)
    assert "16 tensors → 8 sites" in way.said["fetch"].stderr
    lines = [line.split("\t") for line in way.said["profile"].stdout.splitlines()]
    assert lines[0] == ["task", "base", *NAMES] and [line[0] for line in lines[1:]] == [file.stem for file in way.pico.tasks]
    assert all(sum(cell.endswith("*") for cell in line) == 1 for line in lines[1:])
    assert "kept as" in way.said["profile"].stderr and "scoring: 40/40" in way.said["profile"].stderr
    assert way.said["build-router"].stdout.strip() == str(way.gates) and "seconds:" in way.said["build-router"].stderr
    assert way.said["compose"].stdout.strip() == str(way.model) and "4 adapters on 14 sites" in way.said["compose"].stderr
    model = recycler.load(way.model)
    assert model.names == tuple(NAMES) and model.router is not None and model.router.config.top_k == 1


def test_what_python_makes_is_the_same(way: Way) -> None:
    """The same steps in Python, and the same files come out."""
    zoo = recycler.Zoo(way.zoo)
    profile = recycler.profile(zoo, recycler.Shots.from_files(*way.pico.tasks), 2)
    kept = recycler.Profile.load(zoo.profiles_dir / "p2")
    assert torch.equal(profile.nll, kept.nll) and profile.own == kept.own and profile.base == kept.base
    router = recycler.build_router("ridge", kept, zoo=zoo, top_k=1)
    loaded = recycler.load_router(way.gates)
    assert router.config == loaded.config and router.facts == loaded.facts
    assert all(torch.equal(tensor, loaded.tensors()[key]) for key, tensor in router.tensors().items())


def test_run_keeps_order_and_adds_one_field(way: Way, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS), encoding="utf8")
    result = ok("run", way.model, "--input", source, "--output", target, "--max-new-tokens", 3, "--batch-size", 2)
    assert result.stdout == "" and "answering: 3/3" in result.stderr
    rows = [json.loads(line) for line in target.read_text(encoding="utf8").split("\n") if line]
    assert [list(row) for row in rows] == [[*row, "generated"] for row in PROMPTS]
    assert [{**row, "generated": answer["generated"]} for row, answer in zip(PROMPTS, rows, strict=True)] == rows
    piped = ok("run", way.model, "--input", source, "--max-new-tokens", 3)
    assert piped.stdout == target.read_text(encoding="utf8")
    refused = recycle("run", way.model, "--input", source, "--output", target)
    assert refused.exit_code == 2 and "exists" in refused.stderr and "--force" in refused.stderr
    before = target.read_text(encoding="utf8")
    source.write_text("[]\n", encoding="utf8")
    failed = recycle("run", way.model, "--input", source, "--output", target, "--force")
    assert failed.exit_code == 3 and target.read_text(encoding="utf8") == before
    assert not (tmp_path / "none.jsonl").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_run_a_prompt(way: Way) -> None:
    model = recycler.load(way.model)
    expected = answer_prompts(model, ["Add 1 and b."], max_new_tokens=3)[0]
    assert ok("run", way.model, "-p", "Add 1 and b.", "--max-new-tokens", 3).stdout == expected + "\n"
    plain = answer_prompts(model, ["Add 1 and b."], max_new_tokens=3, only="base")[0]
    assert (
        ok("run", way.model, "-p", "Add 1 and b.", "--max-new-tokens", 3, "--only", "base").stdout == plain + "\n" != expected
    )


def test_run_with_adapters_on_disk(way: Way) -> None:
    """The same answer, and what was read; a size that is none is refused."""
    plain = recycle("run", way.model, "-p", "Add 1 and b.", "--max-new-tokens", 4)
    paged = recycle("run", way.model, "-p", "Add 1 and b.", "--max-new-tokens", 4, "--resident", "1MB")
    assert paged.exit_code == 0 and paged.stdout == plain.stdout
    assert "held" in paged.stderr and "held" not in plain.stderr
    wrong = recycle("run", way.model, "-p", "Add 1 and b.", "--resident", "a lot")
    assert wrong.exit_code == 2 and "Traceback" not in wrong.stderr and wrong.stderr.startswith("error: ")


def test_run_several_prompts(way: Way) -> None:
    """Answers may have several lines: with more than one, each says whose it is."""
    prompts = ["Add 1 and b.", "O the\nlong poem!"]
    answers = answer_prompts(recycler.load(way.model), prompts, max_new_tokens=3)
    said = ok("run", way.model, "-p", prompts[0], "-p", prompts[1], "--max-new-tokens", 3).stdout
    assert [json.loads(line) for line in said.rstrip("\n").split("\n")] == [
        {"prompt": prompt, "generated": answer} for prompt, answer in zip(prompts, answers, strict=True)
    ]


def test_profile_again(way: Way, tmp_path: Path) -> None:
    zoo = Path(shutil.copytree(way.zoo, tmp_path / "zoo"))
    again = ["profile", *way.pico.tasks, "--out", "p2", "--kshot"]
    result = ok(*again, 2, zoo=zoo)
    assert result.stdout == way.said["profile"].stdout
    assert "measured before" in result.stderr and "scoring" not in result.stderr
    refused = recycle(*again, 1, zoo=zoo)
    assert refused.exit_code == 2 and "another measurement" in refused.stderr and refused.stdout == ""
    assert "scoring: 20/20" in ok(*again, 1, "--force", zoo=zoo).stderr


def test_eval(way: Way, tmp_path: Path) -> None:
    ok("build-router", "arrow", "--out", tmp_path / "arrow", zoo=way.zoo)
    ok("build-router", "uniform", "--out", way.zoo / "routers" / "even", zoo=way.zoo)
    result = ok(
        "eval", way.model, way.pico.tasks[0], way.pico.tasks[1], "--rows", 1, "--router", tmp_path / "arrow", "--router", "even",
        "--zoo", way.zoo, "--assign", "law=math", "--answers", tmp_path / "answers",
    )  # fmt: skip
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert lines[0] == ["task", "rows", "base", "best single", "uniform", "oracle", "ridge", "arrow", "even"]
    assert [line[0] for line in lines[1:6]] == ["math", "law", "mean exact match", "95 % interval", "mean NLL"]
    assert "Don't bother" in lines[-1][0] and "best single:" in result.stderr
    answers = [
        json.loads(line) for line in (tmp_path / "answers" / "best_single" / "math.jsonl").read_text("utf8").splitlines()
    ]
    assert [set(row) for row in answers] == [{"prompt", "completion", "generated"}]
    again = ["eval", way.model, way.pico.tasks[0], "--rows", 1, "--answers", tmp_path / "answers"]
    refused = recycle(*again)
    assert refused.exit_code == 2 and "is not empty" in refused.stderr and "--force" in refused.stderr
    ok(*again, "--force")
    data = json.loads(ok("eval", way.model, way.pico.tasks[0], "--rows", 1, "--assign", "law=math", "--json").stdout)
    assert data["schema_version"] == 1 and data["chosen"]["oracle"]["math"] == {"adapter": "law", "how": "by hand"}
    assert set(data["contenders"]) == {"base", "best single", "uniform", "oracle", "ridge"} and data["rows"] == {"math": 1}
    kept = shutil.copytree(way.model, tmp_path / "kept")
    ok("eval", kept, way.pico.tasks[0], "--rows", 1, "--record")
    card = (kept / "README.md").read_text("utf8")
    assert json.loads((kept / "evaluation.json").read_text("utf8"))["rows"] == {"math": 1} and "best single" in card
    refused = recycle("eval", "org/model", way.pico.tasks[0], "--record")
    assert refused.exit_code == 2 and "--record" in refused.stderr


def test_json_parses_and_has_a_version(way: Way, tmp_path: Path) -> None:
    for args in (
        ["fetch", way.pico.adapters["math"], "--json"],
        ["zoo", "list", "--json"],
        ["zoo", "show", "math", "--json"],
        ["zoo", "verify", "--json"],
        ["zoo", "path", "--json"],
        ["zoo", "check", "--base", way.pico.base, "--json"],
        ["zoo", "health", "--json"],
        ["zoo", "licences", "--json"],
        ["zoo", "remove", "poem", "--zoo", shutil.copytree(way.zoo, tmp_path / "zoo"), "--json"],
        ["profile", way.pico.tasks[0], "--kshot", 1, "--out", tmp_path / "p1", "--json"],
        ["routers", "--json"],
        ["build-router", "uniform", "--out", tmp_path / "gates", "--json"],
        ["bench-routers", "--profile", "p2", "--methods", "arrow", "--tasks", way.pico.tasks[0], "--rows", 1, "--json"],
        ["eval", way.model, way.pico.tasks[0], "--rows", 1, "--json"],
    ):
        data = json.loads(ok(*args, zoo=way.zoo).stdout)  # nothing else is on stdout
        assert data["schema_version"] == 1, args
    with_json = {path for path, command in commands() if any("--json" in p.opts for p in command.params)}
    assert with_json == {f"recycle {name}" for name in (
        "fetch", "zoo list", "zoo show", "zoo remove", "zoo verify", "zoo path", "zoo check", "zoo health", "zoo licences",
        "profile", "routers", "build-router", "bench-routers", "eval",
        "search", "extract", "explain", "export", "push", "doctor", "env", "errors", "zoo reindex", "zoo search", "zoo copies",
        "zoo clusters",  # with tests of their own
    )}  # fmt: skip


def test_the_zoo(way: Way, tmp_path: Path) -> None:
    zoo = Path(shutil.copytree(way.zoo, tmp_path / "zoo"))
    assert [line.split("\t")[0] for line in ok("zoo", "list", zoo=zoo).stdout.splitlines()] == ["name", *NAMES]
    assert ok("zoo", "path", zoo=zoo).stdout == f"{zoo}\n"
    assert ok("zoo", "path", "law", "--zoo", zoo).stdout == f"{zoo / 'adapters' / 'law'}\n"
    assert "LoRA" in ok("zoo", "show", "math", zoo=zoo).stdout
    assert ok("zoo", "verify", zoo=zoo).stdout == ""
    (zoo / "adapters" / "law" / "adapter_config.json").write_text("{}", encoding="utf8")
    spoilt = recycle("zoo", "verify", zoo=zoo)
    assert spoilt.exit_code == 4 and spoilt.stdout.startswith("law: adapter_config.json: changed")
    (zoo / "adapters" / "law" / "adapter_config.json").unlink()
    assert recycle("zoo", "verify", zoo=zoo).exit_code == 3
    assert recycle("zoo", "remove", "law", "prose", zoo=zoo).exit_code == 2 and "law" in recycler.Zoo(zoo)
    assert ok("zoo", "remove", "law", "math", zoo=zoo).stdout == "" and list(recycler.Zoo(zoo)) == ["code", "poem"]


# ------------------------------------------------------------------------------------------------------------ exit codes


USAGE: list[tuple[list[str], str]] = [
    (["build-router", "prose"], "Choose one of: arrow, average, average_activation, "),
    (["build-router", "ridge", "--profile", "p2", "-o", "rigde=1"], "Its options: policy=top_k, top_k=2, temperature=1.0"),
    (["build-router", "ridge", "--profile", "p2", "-o", "top_k=many"], "top_k=many"),
    (["build-router", "ridge", "--profile", "p2", "-o", "top_k"], "-o KEY=VALUE"),
    (["build-router", "ridge", "--profile", "p2", "-o", "out=x"], "Use --out"),
    (
        ["build-router", "ridge", "--profile", "p2", "-o", "progress=x"],
        "no option 'progress'. Its options: policy=top_k, top_k=2",
    ),
    (["build-router", "ridge", "--profile", "p2", "-o", "method=x"], "no option 'method'. Its options: policy=top_k, top_k=2"),
    (
        ["build-router", "ridge", "--profile", "p2", "-o", "loading=x"],
        "no option 'loading'. Its options: policy=top_k, top_k=2",
    ),
    (["build-router", "ridge", "--profile", "p2", "-o", "ridge=nan"], "ridge=nan"),
    (["build-router", "ridge", "--profile", "p2", "--out", "GATES"], "holds a router already"),
    (["build-router", "arrow", "--device", "foo"], "The device 'foo' cannot be used."),
    (["build-router", "ridge"], "Profiles in the zoo: p2."),
    (["build-router", "arrow", "--adapters", "math,prose"], "Not in the zoo: prose."),
    (["build-router", "arrow", "--adapters", ","], "No adapters were chosen."),
    (["build-router", "arrow", "--dtype", "float33"], "There is no dtype 'float33'"),
    (["profile"], "recycle profile tasks/*.jsonl"),
    (["profile", "none.jsonl"], "There is no file none.jsonl"),
    (["profile", "TASK", "--kshot", "0"], "--kshot 1 or more"),
    (["profile", "TASK", "--kshot", "1", "--assign", "math"], "--assign ADAPTER=TASK"),
    (["profile", "TASK", "--kshot", "1", "--assign", "math=prose"], "no task 'prose'"),
    (["profile", "TASK", "--kshot", "1", "--out", "Two Words"], "'Two Words' cannot name a folder of the zoo"),
    (["compose", "--router", "GATES", "--out", "MODEL"], "add --force"),
    (["run", "MODEL"], "One of --input and -p"),
    (["run", "MODEL", "-p", "a", "--input", "TASK"], "One of --input and -p"),
    (["run", "MODEL", "-p", "a", "--output", "out.jsonl"], "--output goes with --input"),
    (["run", "MODEL", "-p", ""], "cannot be used"),
    (["run", "MODEL", "-p", "a", "--only", "prose"], "Choose one of: code, law, math, poem"),
    (["run", "MODEL", "-p", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
    (["run", "MODEL", "-p", "a", "--batch-size", "0"], "--batch-size"),
    (["run", "MODEL", "--input", "none.jsonl"], "There is no file none.jsonl"),
    (["eval", "MODEL", "none.jsonl"], "There is no file none.jsonl"),
    (["eval", "MODEL", "TASK", "--assign", "prose=math"], "no adapter 'prose'"),
    (["eval", "MODEL", "TASK", "--answers", "TASK"], "is a file"),
    (["fetch", "MATH", "--as", "base"], "is the base itself"),
    (["fetch", "MATH", "--as", "Con/con"], "cannot name an adapter"),
    (["fetch", "MATH", "org/math"], "Several adapters would be called math"),
    (["zoo", "show", "maht"], "Not in the zoo: maht. It holds: math"),
    (["zoo", "remvoe"], "remvoe"),
    (["prose"], "prose"),
]


@pytest.mark.parametrize("args, message", USAGE, ids=[" ".join(args) for args, _ in USAGE])
def test_usage_errors(way: Way, args: list[str], message: str) -> None:
    named = {"MODEL": way.model, "GATES": way.gates, "TASK": way.pico.tasks[0], "MATH": way.pico.adapters["math"]}
    result = recycle(*[named.get(arg, arg) for arg in args], zoo=way.zoo)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split()) and result.stdout == ""


def test_rejected_input(way: Way, tmp_path: Path) -> None:
    bad = tmp_path / "math.jsonl"
    bad.write_text('{"prompt": "a"}\nnope\n', encoding="utf8")
    for args in (["profile", bad], ["eval", way.model, bad], ["run", way.model, "--input", tmp_path / "law.jsonl"]):
        (tmp_path / "law.jsonl").write_text("1\n", encoding="utf8")
        result = recycle(*args, zoo=way.zoo)
        assert result.exit_code == 3 and ".jsonl:1" in result.stderr and "Each line is" in result.stderr
    assert recycle("run", tmp_path, "-p", "a").exit_code == 3
    assert recycle("profile", way.pico.tasks[0], "--kshot", 99, zoo=way.zoo).exit_code == 3
    assert recycle("build-router", "ridge", "--profile", "none", zoo=way.zoo).exit_code == 3
    assert recycle("compose", "--router", "none", "--out", tmp_path / "model", zoo=way.zoo).exit_code == 3


def test_security_refusals(way: Way, tmp_path: Path) -> None:
    pickled = tmp_path / "evil"
    shutil.copytree(way.pico.adapters["math"], pickled)
    (pickled / "adapter_model.safetensors").unlink()
    torch.save({}, pickled / "adapter_model.bin")
    result = recycle("fetch", pickled, "--base", way.pico.base, zoo=tmp_path / "zoo")
    assert result.exit_code == 4 and "evil" in result.stderr and result.stdout == ""
    model = Path(shutil.copytree(way.model, tmp_path / "model"))
    shutil.copy(way.pico.adapters["law"] / "adapter_config.json", model / "adapters" / "math")
    shutil.copy(way.pico.adapters["law"] / "adapter_model.safetensors", model / "adapters" / "math")
    assert recycle("run", model, "-p", "a").exit_code == 4


def test_what_cannot_be_had(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = recycle("build-router", "arrow", "--base", "org/base", "--out", tmp_path / "gates", zoo=way.zoo)
    assert result.exit_code == 5 and "The base org/base cannot be had." in result.stderr and not (tmp_path / "gates").exists()
    result = recycle("run", "org/model", "-p", "a")
    assert result.exit_code == 5 and "There is no folder org/model, and no such model on the Hub." in result.stderr


def test_one_bad_among_many(way: Way, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(way.pico.adapters["law"], tmp_path / "bad"))
    (bad / "adapter_config.json").write_text('{"peft_type": "PROSE"}', encoding="utf8")
    sources = [way.pico.adapters["math"], bad, way.pico.adapters["poem"]]
    result = recycle("fetch", *sources, "--base", way.pico.base, zoo=tmp_path / "zoo")
    assert result.exit_code == 6 and "1 of 3 adapters were not fetched" in result.stderr and "PROSE" in result.stderr
    assert result.stdout.split() == ["math", "poem"] == list(recycler.Zoo(tmp_path / "zoo"))
    as_json = recycle("fetch", *sources, "--base", way.pico.base, "--json", zoo=tmp_path / "zoo")
    assert as_json.exit_code == 6 and [f["name"] for f in json.loads(as_json.stdout)["failures"]] == ["bad"]


# ------------------------------------------------------------------------------------------------- help, streams, processes


@pytest.mark.parametrize("path, command", list(commands()), ids=[path for path, _ in commands()])
def test_every_command_has_help(path: str, command: click.Command) -> None:
    result = ok(*path.split()[1:], "--help")
    assert (command.help or "").strip() and (command.help or "").split("\n")[0] in result.stdout.replace("\n  ", " ")
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name not in ("max_new_tokens", "batch_size", "help"):
            assert parameter.help, f"{path} {parameter.opts[0]} says nothing"


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    assert [path for path, _ in commands() if not re.search(rf"{path}\b", readme)] == []


def test_examples_in_help_name_real_options() -> None:
    by_path = dict(commands())
    checked = 0
    for command in (main, *by_path.values()):
        for line in re.findall(r"^ *(recycle .*)$", command.help or "", re.MULTILINE):
            path = next((p for p in by_path if line.startswith(p + " ")), None)
            assert path is not None, line
            known = {opt for parameter in by_path[path].params for opt in parameter.opts}
            assert set(re.findall(r" (--?[a-z][\w-]*)", line)) <= known, line
            checked += 1
    assert checked > 10


def process(*args: Any, zoo: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "RECYCLE_ZOO": str(zoo)}
    command = [sys.executable, "-m", "recycler.cli", *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf8", check=False, **options)


def test_what_failed_is_said_once(way: Way, tmp_path: Path) -> None:
    good, bad = way.pico.adapters["math"], tmp_path / "absent"
    for sources in ([bad], [bad, good], [bad, tmp_path / "gone"]):
        result = recycle("fetch", *sources, "--base", way.pico.base, zoo=tmp_path / "zoo")
        assert result.exit_code and result.stderr.count("absent is not a folder") == 1, result.stderr


def test_max_size(way: Way, tmp_path: Path) -> None:
    big = Path(shutil.copytree(way.pico.adapters["math"], tmp_path / "big"))
    (big / "README.md").write_bytes(b" " * 1_100_000)
    result = recycle("fetch", big, "--base", way.pico.base, "--max-size", 1, zoo=tmp_path / "zoo")
    assert result.exit_code == 3 and "1 MB" in result.stderr
    ok("fetch", big, "--base", way.pico.base, "--max-size", 2, zoo=tmp_path / "zoo")


@pytest.mark.parametrize("kind", ["a file in the way", "a full disk", "a full disk, by safetensors"])
def test_the_system_refuses(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    out = tmp_path / "file" / "gates"
    (tmp_path / "file").write_text("", encoding="utf8")
    if kind != "a file in the way":
        from safetensors import SafetensorError

        error = SafetensorError("I/O error: No space left") if "safetensors" in kind else OSError(28, "No space left", "x")

        def full(*args: Any, **options: Any) -> None:
            raise error

        monkeypatch.setattr("safetensors.torch.save_file", full)
        out = tmp_path / "gates"
    result = recycle("build-router", "uniform", "--out", out, zoo=way.zoo)
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and result.stdout == ""
    assert ("Not a directory" if kind == "a file in the way" else "No space left") in result.stderr
    assert "Check permissions and free space." in result.stderr


def test_interrupted(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("recycler.build.measure", stop)
    result = recycle("profile", way.pico.tasks[0], "--kshot", 1, "--out", tmp_path / "p", zoo=way.zoo)
    assert result.exit_code == 130 and result.stderr == "interrupted; the same command goes on where it stopped\n"
    monkeypatch.setattr("recycler.composition.load", stop)
    result = recycle("run", way.model, "-p", "a")
    assert result.exit_code == 130 and result.stderr == "interrupted; nothing unfinished was kept\n"

    def muddle(*args: Any, **options: Any) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("half of it was imported") from None  # as libraries do

    monkeypatch.setattr("recycler.composition.load", muddle)
    result = recycle("run", way.model, "-p", "a")
    assert result.exit_code == 130 and result.stderr == "interrupted; nothing unfinished was kept\n"


def test_bars_have_a_rate_and_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    from recycler.terminal import bars

    with bars() as progress:
        step = progress(2, "scoring")
        for _ in range(2):
            time.sleep(0.01)
            step()
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue())
    assert re.search(r"scoring .*2/2 +\d+(\.\d)?/s .*0:00:0", shown), shown


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom recycler.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: assert not end.code, end\n"
        "heavy = {'torch', 'transformers', 'peft', 'huggingface_hub', 'safetensors', 'rich', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for args in (["--help"], ["--version"], ["zoo", "--help"], ["run", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *args], capture_output=True, text=True, encoding="utf8", check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout and "\x1b" not in done.stdout


def test_piped_output_is_data_alone(way: Way) -> None:
    done = process("run", way.model, "--input", way.pico.tasks[0], "--max-new-tokens", 2, zoo=way.zoo)
    rows = [json.loads(line) for line in done.stdout.split("\n") if line]
    assert done.returncode == 0 and len(rows) == 6 and all("generated" in row for row in rows)
    assert "answering: 6/6" in done.stderr and "\x1b" not in done.stdout + done.stderr and "Warning" not in done.stderr


def test_errors_of_a_process(tmp_path: Path) -> None:
    done = process("build-router", "prose", zoo=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.split("\n")[0] == "error: There is no router called 'prose'."
    assert done.stderr.split("\n")[1].startswith("  Choose one of: arrow")


def test_colours_on_a_terminal_and_nothing_of_strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The label is red where a person looks; escape codes that came in with a name are gone everywhere."""
    from recycler.terminal import complain, say

    def shown(color: bool) -> str:
        @click.command()
        def command() -> None:
            complain(RecycleError("what \x1b[31mhappened\x07", "why\x1b]0;title", "fix"))
            say("said \x1b[2J")

        return CliRunner().invoke(command, color=color).stderr

    more = "  more: recycle errors E_UNEXPECTED, or docs/errors.md#e_unexpected\n"
    assert shown(False) == f"error: what [31mhappened\n  why]0;title\n  fix\n{more}said [2J\n"
    assert shown(True).startswith("\x1b[31m\x1b[1merror:\x1b[0m what [31mhappened\n  why]0;title\n")


# ------------------------------------------------------------------------------------------------ in step with the library


# Command → the library function behind it, and the options whose keyword there has another name.
BEHIND: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "search": (recycler.search, {"zoo_path": "zoo"}),
    "fetch": (recycler.fetch, {"zoo_path": "zoo"}),
    "extract": (recycler.extract, {"zoo_path": "zoo"}),
    "zoo check": (recycler.check, {"zoo_path": "zoo"}),
    "profile": (recycler.profile, {"files": "shots", "datasets": "shots", "zoo_path": "zoo"}),
    "build-router": (recycler.build_router, {"profile_name": "profile", "options": "config", "zoo_path": "zoo"}),
    "compose": (recycler.compose, {"router_name": "router", "zoo_path": "zoo"}),
    "run": (answer_file, {"model_path": "load", "input_file": "source", "output_file": "target", "only_adapter": "only"}),
    "export": (recycler.export, {"model_path": "model"}),
    "eval": (recycler.evaluate, {"model_path": "model", "files": "shots", "others": "routers", "assign": "owner"}),
}
# Not the library's business: what is printed, what `load` takes, which rows and files an evaluation reads and writes.
ELSEWHERE = {"as_json": (), "lm_eval": ("eval",), "lm_eval_path": ("eval",), "prompts": ("run",), "rows": ("eval",), "answers": ("eval",), "record": ("eval",), "base": ("run", "eval"), "resident": ("run",),
             "force": ("eval", "zoo check"), "csv_file": ("zoo check",), "strict": ("zoo check",), "zoo_path": ("eval",), "max_size": ("fetch",), "everything": ("search",),
             "subtract_rank": ("build-router",), "add": ("build-router",), "remove": ("build-router",), "router_name": ("build-router",)}  # fmt: skip
# The command keeps its result in the zoo where Python hands it back.
KEPT = {("profile", "out"): "profile"}


@pytest.mark.parametrize("name", BEHIND)
def test_the_same_defaults(name: str) -> None:
    function, renamed = BEHIND[name]
    known = inspect.signature(function).parameters
    loading = inspect.signature(load_base).parameters
    command = dict(commands())[f"recycle {name}"]
    defaults = command.make_context(name, [], resilient_parsing=True).params
    compared = 0
    for parameter in command.params:
        key = str(parameter.name)
        if key in ELSEWHERE and (not ELSEWHERE[key] or name in ELSEWHERE[key]):
            continue
        if key in ("device", "dtype"):
            keyword = loading[key]
        else:
            assert renamed.get(key, key) in known, f"recycle {name} has {parameter.opts[-1]}, {function.__name__} has not"
            keyword = known[renamed.get(key, key)]
        given = defaults[key]
        if parameter.required or keyword.kind is keyword.VAR_KEYWORD:
            continue
        if (name, key) in KEPT:
            assert given == KEPT[name, key] and keyword.default is None
            continue
        default = None if keyword.default is keyword.empty else keyword.default
        assert (None if given == () else given) == default, f"{parameter.opts[-1]} is {given!r}, {keyword.name} is {default!r}"
        compared += 1
    assert compared >= 2
    mentioned = {renamed.get(str(parameter.name), str(parameter.name)) for parameter in command.params}
    python_only = {"progress", "on_event", "loading", "token", "endpoint", "max_bytes"}
    python_only |= {
        "resident",
        "adapter_dtype",
        "packed",
        "spare",
    }  # how a loaded model holds its adapters: nothing of it is saved
    assert set(known) - mentioned - python_only == set(), "Python can do what the command cannot"


def test_answers_have_one_set_of_defaults() -> None:
    one, other = inspect.signature(answer_file).parameters, inspect.signature(answer_prompts).parameters
    shared = set(one) & set(other)
    assert shared == {"max_new_tokens", "batch_size", "only", "progress"}
    assert all(one[name].default == other[name].default for name in shared)


def both(way: Way) -> Iterator[tuple[list[Any], Callable[[], Any]]]:
    """One mistake, made in both languages."""
    zoo, task = recycler.Zoo(way.zoo), way.pico.tasks[0]
    shots = recycler.Shots.from_files(task)
    yield ["build-router", "prose"], lambda: recycler.build_router("prose", zoo=zoo)
    yield ["build-router", "ridge"], lambda: recycler.build_router("ridge", zoo=zoo)
    yield (
        ["build-router", "arrow", "-o", "steps=3", "-o", "colour=red"],
        lambda: recycler.build_router("arrow", zoo=zoo, steps=3, colour="red"),
    )
    yield ["build-router", "arrow", "-o", "top_k=0"], lambda: recycler.build_router("arrow", zoo=zoo, top_k=0)
    yield ["build-router", "ridge", "--profile", "none"], lambda: recycler.build_router("ridge", "none", zoo=zoo)
    yield ["build-router", "arrow", "--adapters", "prose"], lambda: recycler.build_router("arrow", zoo=zoo, adapters=["prose"])
    yield ["zoo", "check", "--engine", "spark"], lambda: recycler.check(zoo, engine="spark")
    yield ["profile", "none.jsonl"], lambda: recycler.Shots.from_files("none.jsonl")
    yield ["profile", task, "--kshot", 99], lambda: recycler.profile(zoo, shots, 99)
    yield (
        ["profile", task, "--kshot", 1, "--out", "p1", "--assign", "prose=math"],
        lambda: recycler.profile(zoo, shots, 1, out="p1", assign={"prose": ["math"]}),
    )
    yield ["compose", "--router", "none", "--out", "x"], lambda: recycler.compose(zoo, "none", "x")
    yield ["compose", "--router", way.gates, "--out", way.model], lambda: recycler.compose(zoo, way.gates, way.model)
    yield ["run", way.zoo, "-p", "a"], lambda: recycler.load(way.zoo)
    yield (
        ["eval", way.model, task, "--assign", "math=prose"],
        lambda: recycler.evaluate(recycler.load(way.model), shots, owner={"prose": "math"}),
    )
    yield ["fetch", way.zoo / "none"], lambda: recycler.fetch(way.zoo / "none", zoo=zoo)


def test_the_same_errors(way: Way) -> None:
    for args, call in both(way):
        with pytest.raises(RecycleError) as error:
            call()
        result = recycle(*args, zoo=way.zoo)
        more = f"more: recycle errors {error.value.code}, or {error.value.docs}"
        said = [f"error: {error.value.what}", *(f"  {part}" for part in (error.value.why, error.value.fix, more) if part)]
        assert result.exit_code == error.value.exit_code, args
        assert result.stderr.rstrip("\n").split("\n")[-len(said) :] == said, args
