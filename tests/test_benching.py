"""Every method on one table, on pico models, and what is kept of it."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import Pico
from way import Way

import recycler
from recycler import Shots
from recycler.cli import main
from recycler.evaluating.bench_report import markdown, rows, verdict
from recycler.evaluating.benching import Bench, Cost, bench_routers
from recycler.evaluating.contenders import contenders
from recycler.evaluating.evaluation import BASELINES, evaluate, result_of
from recycler.evaluating.exam import Exam, Paper
from recycler.journal import Journal
from recycler.routers.discovery import methods
from recycler.zoo.errors import PartialError, UsageError

OWN = {name: name for name in ("code", "law", "math", "poem")}
METHODS = "ridge:chains=2,arrow,random"


def some(way: Way, *tasks: str, count: int = 2) -> Shots:
    shots = Shots.from_files(*way.pico.tasks)
    return Shots({task: shots[task][-count:] for task in (tasks or tuple(shots))})


def bench(way: Way, methods: str | None = METHODS, **options: Any) -> Bench:
    given = {"tasks": some(way, "math", "law"), "also": {"reworded": some(way, "math", count=1)}, "max_new_tokens": 3} | options
    return bench_routers(way.profile.assign(OWN), methods, zoo=way.zoo, **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def done(way: Way, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, Path]:
    folder = tmp_path_factory.mktemp("bench") / "out"
    return bench(way, held_out=some(way, "poem"), out=folder), folder


def test_a_bench_says_what_evaluation_says(way: Way, done: tuple[Bench, Path]) -> None:
    result, _ = done
    assert result.contenders == (*BASELINES, *METHODS.split(",")) and not result.failed
    assert list(result.groups) == ["held-in", "held-out", "reworded"]
    profile = way.profile.assign(OWN)
    routers = {
        "ridge:chains=2": recycler.build_router("ridge", profile, zoo=way.zoo, chains=2),
        "arrow": recycler.build_router("arrow", profile, zoo=way.zoo),
        "random": recycler.build_router("random", profile, zoo=way.zoo),
    }
    model = recycler.compose(way.zoo, routers["arrow"])
    for name, shots in (
        ("held-in", some(way, "math", "law")),
        ("held-out", some(way, "poem")),
        ("reworded", some(way, "math", count=1)),
    ):
        alone = evaluate(model, shots, routers=routers, max_new_tokens=3)
        assert result.groups[name].generated == alone.generated
        assert result.groups[name].chosen == alone.chosen
        for label in result.contenders:
            for task in shots:
                torch.testing.assert_close(
                    torch.tensor(result.groups[name].nll[label][task]),
                    torch.tensor(alone.nll[label][task]),
                    atol=1e-4,
                    rtol=1e-4,
                )
    assert result.choice[0] == "base" and result.choice[1].startswith("Don't bother")  # nobody ever answers well here


def test_costs(way: Way, done: tuple[Bench, Path]) -> None:
    result, _ = done
    sizes = {name: way.zoo[name].parameters * 4 for name in way.profile.adapters}
    assert result.costs["base"].adapters == 0 and result.costs["uniform"].adapters == sum(sizes.values())
    single = way.profile.assign(OWN).best_single
    assert result.costs["best single"].adapters == (sizes[single] if single else 0)
    assert result.costs["oracle"].adapters == sizes["math"] + sizes["law"] + sizes["poem"]
    arrow = recycler.build_router("arrow", zoo=way.zoo)
    assert result.costs["arrow"].router == sum(t.numel() * t.element_size() for t in arrow.tensors().values())
    for cost in result.costs.values():
        assert cost.row > 0 and cost.base_row > 0 and cost.times == cost.row / cost.base_row
    assert result.costs["arrow"].fit > 0 and result.costs["arrow"].kind == "token" and result.costs["arrow"].needs == "nothing"
    assert "shots" in result.costs["ridge:chains=2"].needs


def test_what_is_written(done: tuple[Bench, Path]) -> None:
    result, folder = done
    assert {path.name for path in folder.iterdir()} == {"bench.csv", "bench.json", "journal.jsonl"}
    data = json.loads((folder / "bench.json").read_text())
    assert data == json.loads(json.dumps(result.to_json())) and data["schema_version"] == 1
    assert set(data["groups"]["held-out"]["contenders"]) == set(result.contenders)
    with (folder / "bench.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["contender"] for row in table] == list(result.contenders)
    for row in table:
        assert float(row["held-out nll"]) == pytest.approx(result.groups["held-out"].mean(row["contender"], "nll"))
        assert int(row["adapter bytes"]) == result.costs[row["contender"]].adapters
    text = markdown(result).splitlines()
    assert len({line.count("|") for line in text if line.startswith("|")}) == 1
    assert text[1].count("-") == 3 * (text[0].count("|") - 1) and result.choice[1] in text


def test_a_bench_goes_on_where_it_stopped(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bench"
    fitted: list[str] = []
    for name in ("ridge", "arrow", "random"):
        cls = methods()[name]

        def fit(model: Any, profile: Any, config: Any, name: str = name, real: Any = cls.fit) -> Any:
            fitted.append(name)
            if name == "random" and fitted.count("random") == 1:
                raise KeyboardInterrupt
            return real(model, profile, config)

        monkeypatch.setattr(cls, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        bench(way, out=folder)
    assert fitted == ["ridge", "arrow", "random"] and {p.name for p in folder.iterdir()} == {"journal.jsonl"}
    with (folder / "journal.jsonl").open("a") as file:
        file.write('["random", {"paper": {"nl')  # killed in the middle of a line
    result = bench(way, out=folder)
    assert fitted == ["ridge", "arrow", "random", "random"]
    assert result.contenders == (*BASELINES, *METHODS.split(","))
    assert result.to_json()["groups"] == json.loads((folder / "bench.json").read_text())["groups"]
    more = bench(way, "uniform", out=folder)  # with other methods: they join
    assert more.contenders == (*result.contenders, "uniform router") and len(fitted) == 4
    assert more.groups["held-in"].generated["uniform router"] == more.groups["held-in"].generated["uniform"]
    again = bench(way, "arrow", out=folder, force=True)
    assert fitted[4:] == ["arrow"] and again.contenders == (*BASELINES, "arrow")
    for changed in ({"rows": 1}, {"max_new_tokens": 4}, {"adapters": ["math", "law"]}):
        with pytest.raises(UsageError, match="another measurement"):
            bench(way, "arrow", out=folder, **changed)


def test_a_method_that_fails_is_a_row(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any) -> Any:
        raise UsageError("This needs a package.", "", "Run: pip install 'recycler[text]'")

    def broken(*args: Any) -> Any:
        raise RuntimeError("shapes")

    monkeypatch.setattr(methods()["arrow"], "fit", missing)
    monkeypatch.setattr(methods()["random"], "fit", broken)
    result = bench(way)
    assert result.routers == ("ridge:chains=2",)
    assert result.failed == {
        "arrow": "This needs a package. Run: pip install 'recycler[text]'",
        "random": "RuntimeError: shapes",
    }
    table = {row[0]: row for row in rows(result)}
    assert len({len(row) for row in table.values()}) == 1 and table["random"][-1] == "failed: RuntimeError: shapes"
    with pytest.raises(PartialError, match="2 of 3 methods could not be built: arrow, random"):
        result.raise_for_failures()
    nothing = bench(way, "arrow")
    assert nothing.choice == ("base", "Nothing to recommend: no method could be built.")
    assert nothing.to_json()["groups"] == {} and list(rows(nothing))[-1][0] == "arrow" and verdict(nothing)


def test_the_command(way: Way, tmp_path: Path) -> None:
    profile = tmp_path / "p"
    way.profile.assign(OWN).save(profile)
    folder = way.pico.tasks[0].parent
    call = ["bench-routers", "--profile", str(profile), "--zoo", str(way.zoo.path), "--methods", "arrow", "--rows", "1",
            "--max-new-tokens", "2", "--tasks", str(way.pico.tasks[0]), str(way.pico.tasks[1]), "--also", f"all={folder}"]  # fmt: skip
    result = CliRunner().invoke(main, [*call, "--json", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert set(data["groups"]["held-in"]["rows"]) == {file.stem for file in way.pico.tasks[:2]}
    assert len(data["groups"]["all"]["rows"]) == len(way.pico.tasks) and (tmp_path / "out" / "bench.csv").exists()
    result = CliRunner().invoke(main, [*call, "--held-out", str(way.pico.tasks[2]), "-o", "arrow.top_k=1"])
    assert result.exit_code == 0 and "arrow:top_k=1" in result.stdout and "on't bother" in result.stdout
    assert result.stdout.splitlines()[0].split("\t")[:5] == ["method", "held-in", "95 %", "held-out", "all"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for more, message in (
        (["--out", str(tmp_path / "mine")], "something else than a bench"),
        (["--also", "nothing"], "is not NAME=FILES"),
        (["-o", "arrow.steps=1"], "no option 'steps'"),
        (["--methods", "nope"], "no router called 'nope'"),
        (["--count", "2"], "Nothing is selected"),
        (["--also", f"held-in={folder}"], "a group already"),
    ):
        result = CliRunner().invoke(main, [*call[: None if "--also" not in more else -2], *more])
        assert result.exit_code == 2 and message in " ".join(result.stderr.split()), (more, result.output)


def test_how_methods_are_written() -> None:
    assert [one.label for one in contenders("ridge,phatgoose:steps=20:top_k=1,arrow")] == [
        "ridge", "phatgoose:steps=20:top_k=1", "arrow",
    ]  # fmt: skip
    assert contenders(["ridge"], ["ridge.chains=2"])[0].options == {"chains": "2"}
    assert contenders("arrow:subtract=en+fr")[0].keywords == {"subtract": ("en", "fr")}
    assert not {"uniform", "oracle", "single"} & {one.method for one in contenders()}
    for text, more, message in (
        ("ridge,ridge", (), "named twice"),
        ("ridge:", (), "not METHOD:KEY=VALUE"),
        ("ridge:nope=1", (), "no option 'nope'"),
        ("ridge:ridge=few", (), "ridge='few'"),
        ("ridge", ("arrow.top_k=1",), "arrow is not among"),
        ("ridge", ("top_k=1",), "not METHOD.KEY=VALUE"),
        ("", (), "No methods were named"),
    ):
        with pytest.raises(UsageError, match=message):
            contenders(text, more)


def made(kinds: dict[str, str], **exact: list[float]) -> Bench:
    """A bench of one task; kinds says which contenders are routers, and what each decides for."""
    papers = {label.replace("_", " "): Paper(values, values, [""] * len(values)) for label, values in exact.items()}
    chosen: Any = {"best_single": {"adapter": "a", "how": "by hand"}, "oracle": {"t": {"adapter": "a", "how": "by hand"}}}
    group = result_of(["t"] * len(next(iter(exact.values()))), papers, tuple(kinds), chosen)
    costs = {label: Cost(kind=kinds.get(label, "static"), row=1.0, base_row=1.0) for label in papers}
    return Bench({"held-in": group}, costs)


def test_the_recommendation() -> None:
    none, half, most, all_ = [0.0] * 60, [0.0, 1.0] * 30, [1.0] * 59 + [0.0], [1.0] * 60
    plain = {"base": none, "best_single": half, "uniform": none, "oracle": all_}
    clear = made({"ridge": "token", "arrow": "token"}, **plain, ridge=all_, arrow=half)
    assert clear.choice[0] == "ridge" and "Nothing else comes near it" in clear.choice[1]
    tied = made({"ridge": "token", "retrieval": "sequence"}, **plain, ridge=all_, retrieval=most)
    assert tied.choice[0] == "retrieval" and "ridge has 1.000, which these rows do not tell apart" in tied.choice[1]
    same = made({"ridge": "token"}, **plain, ridge=half)
    assert same.choice[0] == "best single" and same.choice[1].startswith("Don't bother")
    ahead = made({"ridge": "token"}, **plain, ridge=[1.0, *half[1:]])
    assert ahead.choice[0] == "best single"
    nothing = made({"ridge": "token"}, base=none, best_single=none, uniform=none, oracle=none, ridge=none)
    assert nothing.choice[0] == "base" and nothing.beyond == {"held-in": ["t"]}
    assert any(
        line.startswith("Beyond the zoo, held-in: don't bother with t (base 0.00, best 0.00)") for line in verdict(nothing)
    )


def test_groups_count_the_same() -> None:
    chosen: Any = {"best_single": {"adapter": "a", "how": "by hand"}, "oracle": {}}

    def group(tasks: int, value: float) -> Any:
        names = [f"t{i}" for i in range(tasks) for _ in range(10)]
        papers = {c: Paper([v] * len(names), [v] * len(names), [""] * len(names)) for c, v in (("base", 0.0), ("ridge", value))}
        return result_of(names, papers, ("ridge",), chosen)

    result = Bench({"held-in": group(9, 1.0), "held-out": group(1, 0.0)}, {})
    assert result.mean("ridge") == 0.5 and result.difference("ridge", "base") == (0.5, 0.5)


def test_a_row_is_answered_once_with_a_mixture(way: Way) -> None:
    """Two that mix a row alike share the answer, and it is the one that each would have given."""
    model = recycler.load(way.folder)
    shots = some(way, "math", "law")
    exam = Exam.of(model, [(task, shot) for task in shots for shot in shots[task]], 3)
    asked: list[int] = []
    real = exam._marks

    def counted(model: Any, numbers: list[int], *rest: Any) -> Any:
        asked.extend(numbers)
        return real(model, numbers, *rest)

    exam._marks = counted  # type: ignore[method-assign]
    one = torch.eye(4)[0].expand(len(exam), -1)
    half = one.clone()
    half[0] = torch.eye(4)[1]
    first, second, third = exam.mixed(model, [one, half, one])
    assert sorted(asked) == [0, *range(len(exam))] and first == third and first.generated[1:] == second.generated[1:]
    assert exam.mixed(model, [half]) == [second] and len(asked) == len(exam) + 1
    assert exam.routed(model, recycler.build_router("single", way.profile, zoo=way.zoo)) is not None
    fresh = Exam.of(model, [(task, shot) for task in shots for shot in shots[task]], 3)
    fresh.remember(model, half, second)
    fresh._marks = None  # type: ignore[assignment]
    assert fresh.mixed(model, [half]) == [second]


def test_a_journal_of_another_key(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    Journal(path, "a").write("x", 1)
    assert dict(Journal(path, "a")) == {"x": 1}
    with pytest.raises(UsageError, match="another measurement"):
        Journal(path, "b")
    assert dict(Journal(path, "b", again=True)) == {} and dict(Journal(None, "c")) == {}


def test_the_benchmark_runs(
    llama: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """benchmarks/quality.py, both parts, on pico models: one task is held out, and static methods get its shots alone."""
    for folder in ("kshot", "test", "switch"):
        (tmp_path / "tasks" / folder).mkdir(parents=True)
        for file in llama.tasks:
            name = f"ho_{file.name}" if file.stem == "poem" else file.name
            (tmp_path / "tasks" / folder / name).write_text(file.read_text())
    script = Path(__file__).parent.parent / "benchmarks" / "quality.py"
    call = [
        "--adapters",
        str(next(iter(llama.adapters.values())).parent),
        "--tasks",
        str(tmp_path / "tasks"),
        "--base",
        str(llama.base),
    ]
    call += ["--rows", "1", "--kshot", "2", "--methods", "arrow,single", "--out", str(tmp_path / "out")]
    for _ in range(2):  # the second time nothing is left to do
        monkeypatch.setattr("sys.argv", ["quality.py", *call])
        monkeypatch.setattr("sys.path", list(sys.path))
        runpy.run_path(str(script), run_name="__main__")
        text = (tmp_path / "out" / "README.md").read_text()
        assert text in capsys.readouterr().out
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
        assert lines[0][:6] == ["method", "held-in", "95 %", "held-out", "switch", "held-out, shots"]
        assert [line[0] for line in lines[2:]] == [*BASELINES, "arrow", "single"]
        assert {line[5] for line in lines[2:]} == {"0.000"}
        monkeypatch.setattr("recycler.evaluating.benching._Run.contender", lambda *args: "again")
