"""Pictures: the numbers behind them are the data, they are files that open, they fit hundreds of names, and who cannot tell red from
green can read them."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import Pico
from hypothesis import given
from hypothesis import strategies as st
from way import NAMES, PROMPTS, Way

import recycler
from recycler.cli import main
from recycler.evaluating.evaluation import BEYOND, UNTOLD
from recycler.pictures import canvas, cost, heat, results, routing, scores, similarity, tasks
from recycler.pictures.results import Contender, Mean, Results
from recycler.pictures.routing import LayerWeights
from recycler.pictures.similarity import Cosines
from recycler.pictures.tasks import TaskScores
from recycler.shots import Shot
from recycler.zoo.errors import InputError, UsageError

HOSTILE = ['a "quoted", name', "</text><script>", "$x_1$ & €", "=1+1", "line\nfeed \x1b[31m", "名前"]
names = st.lists(
    st.sampled_from(HOSTILE) | st.text(st.characters(codec="utf8", exclude_characters="\r"), min_size=1, max_size=12),
    min_size=1, max_size=6, unique=True,
)  # fmt: skip
numbers = st.floats(-50, 50, allow_nan=False)


def parsed(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


def same(text: str, value: float) -> bool:
    return math.isclose(float(text), value, rel_tol=1e-8, abs_tol=1e-12)


@st.composite
def task_scores(draw: st.DrawFn) -> TaskScores:
    rows, columns = draw(names), draw(names)
    line = st.lists(numbers, min_size=len(columns), max_size=len(columns))
    values = draw(st.lists(line, min_size=len(rows), max_size=len(rows)))
    owner = draw(st.dictionaries(st.sampled_from(columns), st.sampled_from(rows)))
    return TaskScores(draw(st.sampled_from(["nll", "exact"])), tuple(rows), tuple(columns), values, draw(line), owner)


@given(task_scores())
def test_the_csv_of_tasks_is_the_data(data: TaskScores) -> None:
    head, base, *rows = parsed(canvas.as_csv(tasks.table(data)))
    assert head[1:] == list(data.tasks) and base[0] == "base"
    assert all(same(text, value) for text, value in zip(base[1:], data.base, strict=True))
    found = {row[0]: row[1:] for row in rows}
    assert set(found) == set(data.adapters) and len(rows) == len(data.adapters)
    for name, values in zip(data.adapters, data.values, strict=True):
        assert all(same(text, value) for text, value in zip(found[name], values, strict=True))


@given(task_scores())
def test_specialists_lie_on_the_diagonal(data: TaskScores) -> None:
    """Down the picture the best task goes from left to right, and whoever helps nowhere comes last."""
    gains = data.gains()
    rows = [gains[e] for e in data.order()]
    helps = [max(row) > 0 for row in rows]
    assert helps == sorted(helps, reverse=True)
    best = [row.index(max(row)) for row, good in zip(rows, helps, strict=True) if good]
    assert best == sorted(best)
    sign = -1 if data.score == "nll" else 1
    assert gains[0][0] == pytest.approx(sign * (data.values[0][0] - data.base[0]))


@given(st.data())
def test_the_csv_of_routing_and_cosines_is_the_data(draw: st.DataObject) -> None:
    rows, layers = draw.draw(names), draw.draw(names)
    values = [[draw.draw(numbers) for _ in layers] for _ in rows]
    head, *lines = parsed(canvas.as_csv(routing.table(LayerWeights(tuple(rows), tuple(layers), values, 1))))
    assert len(head) == len(layers) + 1 and [line[0] for line in lines] == [*rows, "base"]
    for line, row in zip(lines, values, strict=False):
        assert all(same(text, value) for text, value in zip(line[1:], row, strict=True))
    square = [[draw.draw(st.floats(-1, 1)) for _ in rows] for _ in rows]
    square = [[1.0 if i == j else square[max(i, j)][min(i, j)] for j in range(len(rows))] for i in range(len(rows))]
    head, *lines = parsed(canvas.as_csv(similarity.table(Cosines(tuple(rows), square))))
    assert set(head[1:]) == set(rows) and [line[0] for line in lines] == head[1:]
    for line in lines:
        for other, text in zip(head[1:], line[1:], strict=True):
            assert same(text, square[rows.index(line[0])][rows.index(other)])


MEAN = Mean(0.5, 0.25, 0.75, 1.5)


def made(*labels: str, groups: tuple[str, ...] = ("held-in",)) -> Results:
    plain = [
        Contender(n, "baseline", dict.fromkeys(groups, MEAN), {g: {"t": 0.5} for g in groups}, 1.0, 0, 10)
        for n in ("base", "uniform")
    ]
    kinds = ("token", "sequence", "static", "router")
    routers = [
        Contender(
            label, kinds[i % 4], {g: Mean(i / len(labels), 0.0, 1.0, 2.0) for g in groups}, {g: {"t": 0.5, "u": 0.25} for g in groups},
            1.2 + i / 10, 1000 * (i + 1) ** 4, 10**6, 3.5, "shots",
        )
        for i, label in enumerate(labels)
    ]  # fmt: skip
    return Results((*plain, *routers), groups, {g: {"t": 4} for g in groups}, ("Use it.",), True)


@pytest.mark.parametrize("module, data", [
    (tasks, TaskScores("nll", tuple(HOSTILE), tuple(HOSTILE), [[float(i - j) for j in range(6)] for i in range(6)], [0.0] * 6, {})),
    (tasks, TaskScores("exact", ("one",), ("task",), [[0.0]], [0.0], {"task": "one"})),
    (routing, LayerWeights(tuple(HOSTILE), ("0", "1"), [[0.2, -0.1]] * 6, 2)),
    (routing, LayerWeights(("one",), ("0",), [[0.0]], 1)),
    (similarity, Cosines(tuple(HOSTILE), [[float(i == j) for j in range(6)] for i in range(6)])),
    (similarity, Cosines(("one",), [[1.0]])),
    (scores, made(*HOSTILE, groups=("held-in", "</svg>"))), (cost, made(*HOSTILE)), (cost, made("one")),
])  # fmt: skip
def test_pictures_are_files_that_open(module: Any, data: Any, tmp_path: Path) -> None:
    """PNG and SVG, also of one adapter, of nothing but zeros, and of names that are markup; twice the same, the same bytes."""
    drawn = module.draw(data)
    picture, beside = canvas.keep(drawn, module.table(data), tmp_path / "a.svg")
    assert parsed(beside.read_text(encoding="utf8"))[0] == [str(cell) for cell in module.table(data)[0]]
    root = ElementTree.parse(picture).getroot()
    assert root.tag.endswith("svg") and not any(one.tag.endswith("script") for one in root.iter())
    assert canvas.rendered(module.draw(data), ".svg") == picture.read_bytes()
    canvas.keep(drawn, module.table(data), tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "a.svg", "b.csv", "b.png"]
    inline = ElementTree.fromstring(canvas.inline(drawn, "here", 'say "<b>"'))
    assert inline.attrib["aria-label"] == 'say "<b>"' and all(
        one.get("id", "here-").startswith("here-") for one in inline.iter()
    )
    assert module.describe(data)


def overlaps(figure: Any) -> list[tuple[str, str]]:
    """Labels of one axis that cover each other."""
    found = []
    renderer = figure.canvas.get_renderer()
    for axis in [axis for place in figure.axes if place.axison for axis in (place.xaxis, place.yaxis)]:
        with canvas.drawing():
            labels = [label for label in axis.get_ticklabels() if label.get_text()]
            boxes = [(label.get_text(), label.get_window_extent(renderer).shrunk(0.9, 0.9)) for label in labels]
        found += [(a, b) for (a, one), (b, other) in pairwise(boxes) if one.overlaps(other)]
    return found


@pytest.mark.parametrize("count", [3, 40, 100, 300])
def test_hundreds_of_names_fit(count: int) -> None:
    adapters = tuple(f"org-{i % 7}-adapter-{i:03d}" for i in range(count))
    many = tuple(f"task_number_{i}" for i in range(min(count, 100)))
    values = [[float((i + j) % 7) for j in range(len(many))] for i in range(count)]
    angle = torch.linspace(0, 3, count)
    cosines = torch.cos(angle[:, None] - angle[None]).tolist()
    for drawn in (
        tasks.draw(TaskScores("nll", adapters, many, values, [3.0] * len(many), {})),
        routing.draw(LayerWeights(adapters, tuple(map(str, range(32))), [[1 / count] * 32] * count, 4)),
        similarity.draw(Cosines(adapters, cosines)),
        scores.draw(made(*adapters[:40])),
    ):
        wide, high = drawn.get_size_inches()
        assert wide < 23 and high < 23
        assert overlaps(drawn) == []
    drawn = cost.draw(made(*adapters[:40]))
    assert {text.get_text() for text in drawn.axes[-1].texts} >= set(adapters[:40])


def linear(colour: str) -> torch.Tensor:
    value = torch.tensor([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return torch.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def contrast(a: torch.Tensor, b: torch.Tensor) -> float:
    weight = torch.tensor([0.2126, 0.7152, 0.0722])
    one, other = sorted([float(a @ weight), float(b @ weight)])
    return (other + 0.05) / (one + 0.05)


def test_colours_are_told_apart_without_red_and_green() -> None:
    """Under Machado et al. (2009), severity 1, for protanopia and deuteranopia; and kinds differ in shape besides."""
    seen = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    }
    for matrix in seen.values():
        blue, vermilion = (torch.tensor(matrix) @ linear(colour) for colour in (canvas.BLUE, canvas.VERMILION))
        assert float((blue - vermilion).norm()) > 0.25
    shapes = [shape for kind, (_, shape, _) in scores.KINDS.items() if kind != "router"]
    assert len(set(shapes)) == len(shapes)


@pytest.mark.parametrize("paper, ink", [("#ffffff", "#000000"), ("#14171b", "#ffffff")])
def test_numbers_in_cells_are_readable(paper: str, ink: str) -> None:
    """At every strength, in both themes: what is drawn over a cell has a contrast of 4.5."""
    page = torch.tensor([int(paper[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    for share in torch.linspace(-1, 1, 101).tolist():
        *rgb, alpha = heat.colours([[share]], 1.0)[0, 0].tolist()
        blended = alpha * torch.tensor(rgb) + (1 - alpha) * page
        cell = linear("#" + "".join(f"{round(255 * part):02x}" for part in blended.tolist()))
        text = "#ffffff" if alpha > heat._STRONG else ink
        assert contrast(linear(text), cell) >= 4.45, (share, alpha)


# --------------------------------------------------------------------------------------------------- from the library's objects


def test_weights_by_layer(way: Way) -> None:
    """Each prompt counts the same, whatever its length and its batch; what is missing to 1 is the base's."""
    model = recycler.load(way.folder)
    found = LayerWeights.of(model, [Shot(prompt, "") for prompt in PROMPTS])
    expected: dict[str, list[torch.Tensor]] = {}
    for prompt in PROMPTS:
        firing = model.weights_for(dict(model.tokenizer(prompt, return_tensors="pt")))
        for path, layer in routing.layers(firing.sites).items():
            expected.setdefault(layer, []).append(firing.sites[path].mean((0, 1)))
    assert found.adapters == NAMES and found.layers == tuple(expected) and found.prompts == 2
    for i, layer in enumerate(found.layers):
        mean = torch.stack(expected[layer]).mean(0).tolist()
        assert [row[i] for row in found.values] == pytest.approx(mean, abs=1e-5)
        assert found.bare()[i] == pytest.approx(1 - sum(mean), abs=1e-5)
    stacks = {"llama": ("0", "1"), "t5": ("encoder 0", "encoder 1", "decoder 0", "decoder 1")}
    assert found.layers == stacks[way.pico.kind]


def test_layers_are_named_and_in_order() -> None:
    paths = ["lm_head", "model.layers.10.mlp.up_proj", "model.layers.2.self_attn.q_proj", "model.layers.2.mlp.experts.7.up"]
    assert list(dict.fromkeys(routing.layers(paths).values())) == ["2", "10", "lm_head"]


def test_cosines_do_not_depend_on_factors(llama: Pico) -> None:
    """(G⁻¹A, BG) is the same adapter: the two are neighbours, whatever else is in the zoo."""
    zoo = recycler.Zoo(llama.zoo)
    torch.manual_seed(0)

    def turned(name: str) -> Any:
        adapter = zoo[name]
        sites = {}
        for path, factors in adapter.sites.items():
            gauge = torch.randn(factors.rank, factors.rank)
            sites[path] = replace(factors, a_RD=torch.linalg.solve(gauge, factors.a_RD), b_OR=factors.b_OR @ gauge)
        return replace(adapter, name=f"{name}-turned", sites=sites)

    held = {name: zoo[name] for name in zoo} | {one.name: one for one in (turned("math"), turned("law"))}
    found = Cosines.of(list(held), held.__getitem__)
    at = {name: found.order.index(i) for i, name in enumerate(found.adapters)}
    for name in ("math", "law"):
        pair = found.values[found.adapters.index(name)][found.adapters.index(f"{name}-turned")]
        assert pair == pytest.approx(1, abs=1e-4) and abs(at[name] - at[f"{name}-turned"]) == 1
    assert {frozenset(pair[:2]) for pair in found.closest(2)} == {frozenset((n, f"{n}-turned")) for n in ("math", "law")}


def test_scores_of_a_profile(way: Way) -> None:
    data = TaskScores.of(way.profile)
    assert data.score == "nll" and data.adapters == NAMES and data.owner == way.profile.owner
    nll = way.profile.nll.mean(-1)
    assert data.gains()[1][2] == pytest.approx(float(nll[0, 2] - nll[2, 2]), rel=1e-5)
    exact = torch.zeros_like(way.profile.nll)
    exact[2] = 1
    generated = replace(way.profile, exact=exact)
    assert TaskScores.of(generated).score == "exact" and TaskScores.of(generated).gains()[1] == [1.0] * 4
    assert TaskScores.of(generated, "nll").score == "nll"
    with pytest.raises(UsageError, match="--generate"):
        TaskScores.of(way.profile, "exact")


# ------------------------------------------------------------------------------------------------------------- the command line


def recycle(*args: Any, zoo: Path | None = None) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args], env={} if zoo is None else {"RECYCLE_ZOO": str(zoo)})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def bench(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a folder of results, a profile)."""
    folder = tmp_path_factory.mktemp("bench")
    shots = recycler.Shots.from_files(*llama.tasks)
    zoo = recycler.Zoo(llama.zoo)
    profile = recycler.profile(zoo, shots=shots, kshot=2, out=folder / "p2")
    recycler.bench_routers(profile, "arrow,retrieval", tasks=shots, rows=2, zoo=zoo, out=folder / "bench", max_new_tokens=2)
    return folder / "bench", folder / "p2"


def test_results_are_what_the_bench_wrote(bench: tuple[Path, Path], tmp_path: Path) -> None:
    data = json.loads((bench[0] / "bench.json").read_text(encoding="utf8"))
    found = results.read(bench[0])
    assert {one.name for one in found.contenders} == set(data["costs"]) and found.groups == ("held-in",)
    head, *rows = parsed(canvas.as_csv(cost.table(found)))
    for row in rows:
        told = dict(zip(head, row, strict=True))
        group = data["groups"]["held-in"]["contenders"][told["contender"]]
        assert same(told["exact"], group["mean_exact"]) and same(told["low"], group["interval"][0])
        assert same(told["times base"], data["costs"][told["contender"]]["times_base"])
        assert int(told["gate bytes"]) == data["costs"][told["contender"]]["router"]
    assert {one.name: one.kind for one in found.contenders}["arrow"] == "token"
    lone = tmp_path / "eval.json"
    lone.write_text(json.dumps(data["groups"]["held-in"]), encoding="utf8")
    again = results.read(lone)
    assert [one.means["all rows"] for one in again.contenders] == [one.means["held-in"] for one in found.contenders]
    assert again.helps is False and again.verdicts[0].startswith("Don't bother")
    first, *_ = data["groups"]["held-in"]["by_task"]
    for verdict, said in ((BEYOND, "Beyond the zoo"), (UNTOLD, "Too few rows to tell")):
        data["groups"]["held-in"]["by_task"][first]["verdict"] = verdict
        assert any(line.startswith(f"{said}, held-in") and first in line for line in results.parse(data, lone).verdicts)
    lone.rename(tmp_path / "evaluation.json")  # as `eval --record` keeps it in a model's folder
    assert results.read(tmp_path) == again


def test_every_kind_from_the_command_line(way: Way, bench: tuple[Path, Path], tmp_path: Path) -> None:
    kinds: list[tuple[list[Any], str]] = [
        (["tasks", "--profile", way.profile.folder], "mean nll"),
        (["routing", way.folder, "-p", PROMPTS[0]], "adapter"),
        (["routing", way.folder, *way.pico.tasks[:2], "--rows", 1], "adapter"),
        (["similarity", "--model", way.folder], "adapter"),
        (["similarity", "math", "law"], "adapter"),
        (["scores", bench[0]], "contender"),
        (["cost", bench[0] / "bench.json"], "contender"),
    ]
    for number, (args, first) in enumerate(kinds):
        out = tmp_path / f"{number}.png"
        done = recycle("plot", *args, "--out", out, zoo=way.pico.zoo)
        assert done.exit_code == 0, done.output
        assert done.stdout == f"{out}\n" and str(out.with_suffix(".csv")) in done.stderr
        assert out.read_bytes()[:4] == b"\x89PNG" and parsed(out.with_suffix(".csv").read_text("utf8"))[0][0] == first
    assert {row[0] for row in parsed((tmp_path / "4.csv").read_text("utf8"))} == {"adapter", "math", "law"}
    refused = recycle("plot", "scores", bench[0], "--out", tmp_path / "0.png")
    assert refused.exit_code == 2 and "exists" in refused.stderr and "--force" in refused.stderr
    (tmp_path / "0.png").unlink()
    assert recycle("plot", "scores", bench[0], "--out", tmp_path / "0.png").exit_code == 2  # its CSV is there
    assert recycle("plot", "scores", bench[0], "--out", tmp_path / "0.png", "--force").exit_code == 0


def test_bad_input(llama: Pico, bench: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "journal.jsonl").write_text("key\n", encoding="utf8")
    (tmp_path / "list.json").write_text("[]", encoding="utf8")
    (tmp_path / "other.json").write_text('{"schema_version": 1, "groups": {"a": {"contenders": {"b": 1}}}}', encoding="utf8")
    (tmp_path / "newer.json").write_text('{"schema_version": 99}', encoding="utf8")
    (tmp_path / "text.json").write_bytes("\udcff".encode("utf8", "surrogatepass"))
    (tmp_path / "held.csv").write_text("of another picture", encoding="utf8")
    out = ["--out", tmp_path / "x.png"]
    for args, code, message in (
        (["tasks", "--profile", "none", *out], 3, "holds no profile"),
        (["tasks", "--profile", bench[1], "--score", "exact", *out], 2, "--generate"),
        (["routing", tmp_path, "-p", "a", *out], 3, "is not a composed model"),
        (["routing", tmp_path, *out], 2, "-p TEXT"),
        (["routing", tmp_path, "-p", " ", *out], 2, "empty"),
        (["similarity", "maths", "law", *out], 2, "Not in the zoo: maths"),
        (["similarity", "law", *out], 2, "no two adapters"),
        (["similarity", "--zoo", tmp_path / "empty", *out], 2, "no two adapters"),
        (["scores", tmp_path / "none", *out], 2, "There is no"),
        (["scores", tmp_path, *out], 3, "bench-routers"),
        (["scores", tmp_path / "half", *out], 3, "interrupted"),
        (["scores", tmp_path / "list.json", *out], 3, "cannot be read"),
        (["cost", tmp_path / "other.json", *out], 3, "cannot be read"),
        (["cost", tmp_path / "text.json", *out], 3, "cannot be read"),
        (["cost", tmp_path / "newer.json", *out], 3, "newer version"),
        (["cost", bench[0], "--out", tmp_path / "x.jpg"], 2, "--out picture.png"),
        (["cost", bench[0], "--out", tmp_path / "held.svg"], 2, "held.csv exists. The numbers of the picture go there."),
        (["cost", bench[0], "--out", tmp_path / "x.svg" / ".." / ".." / tmp_path.name], 2, "is no .png"),
    ):
        done = recycle("plot", *args, zoo=llama.zoo)
        assert done.exit_code == code and message in " ".join(done.stderr.split()), (args, done.output)
        assert done.stdout == ""
    assert not (tmp_path / "x.png").exists() and not (tmp_path / "x.csv").exists()
    with pytest.raises(InputError):
        results.parse({"schema_version": 1, "groups": {}}, tmp_path)


def test_without_matplotlib(llama: Pico, bench: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for args in (
        ["plot", "scores", bench[0], "--out", tmp_path / "x.png"],
        ["report", "--bench", bench[0], "--out", tmp_path / "x.html"],
    ):
        done = recycle(*args, zoo=llama.zoo)
        assert done.exit_code == 2 and "pip install 'recycler[pictures]'" in done.stderr
    assert list(tmp_path.iterdir()) == []
