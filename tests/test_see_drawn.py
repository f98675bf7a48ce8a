"""What is drawn is the data: pictures read back, mark by mark, and a page's table cell by cell."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from recycler.pictures import canvas, cost, heat, routing, scores, similarity, tasks
from recycler.pictures.results import Contender, Mean, Results
from recycler.pictures.routing import LayerWeights
from recycler.pictures.similarity import Cosines
from recycler.pictures.tasks import TaskScores
from recycler.seeing.report_page import page
from recycler.seeing.reporting import Origin, Report

ADAPTERS = ("math", "law", "code", "poem", "chess")
TASKS = ("sums", "cases", "functions")


def labels(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def mapped(made: Any) -> tuple[Any, dict[tuple[str, str], float]]:
    """(axes, (row, column) → what the cell's colour stands for, in parts of the full value; blue is above nothing)."""
    place = next(one for one in made.axes if one.images and len(labels(one.yaxis)) > 1)
    rgba = place.images[0].get_array()
    found = {}
    for r, row in enumerate(labels(place.yaxis)):
        for c, column in enumerate(labels(place.xaxis)):
            *rgb, alpha = rgba[r, c].tolist()
            sign = {canvas.BLUE: 1, canvas.VERMILION: -1}[to_hex(rgb)]
            found[row, column] = sign * alpha ** (1 / heat._GAMMA)
    return place, found


def test_the_map_of_tasks() -> None:
    rng = random.Random(0)
    values = [[rng.uniform(1, 5) for _ in TASKS] for _ in ADAPTERS]
    data = TaskScores("nll", ADAPTERS, TASKS, values, [3.0, 2.5, 4.0], {"sums": "poem", "functions": "law"})
    place, found = mapped(tasks.draw(data))
    gains = {(name, task): data.base[c] - values[r][c] for r, name in enumerate(ADAPTERS) for c, task in enumerate(TASKS)}
    assert set(found) == set(gains)
    full = max(gains.values())
    for key, gain in gains.items():
        assert found[key] == pytest.approx(max(gain / full, -1), abs=1e-6), key
    marked = [one for one in place.patches if isinstance(one, Rectangle)]
    rows, columns = labels(place.yaxis), labels(place.xaxis)
    assert {(columns[round(m.get_x() + 0.5)], rows[round(m.get_y() + 0.5)]) for m in marked} == set(data.owner.items())
    numbers = {
        (rows[round(t.get_position()[1])], columns[round(t.get_position()[0])]): t.get_text()
        for t in place.texts
        if t.get_text()
    }
    assert numbers == {key: f"{gain:.2f}".replace("-", "−") for key, gain in gains.items()}


def test_the_map_of_layers() -> None:
    values = [[0.1, 0.05], [0.0, 0.3], [0.4, 0.1], [-0.1, 0.2], [0.2, 0.1]]
    _, found = mapped(routing.draw(LayerWeights(ADAPTERS, ("first", "second"), values, 3)))
    told = {name: row for name, row in zip(ADAPTERS, values, strict=True)} | {routing.BASE: [0.4, 0.25]}
    assert {row for row, _ in found} == set(told)
    for (row, column), value in found.items():
        assert value == pytest.approx(told[row][("first", "second").index(column)] / 0.4, abs=1e-6)


def test_the_map_of_the_alike_and_its_tree() -> None:
    rng = random.Random(1)
    values = [[0.0] * 5 for _ in ADAPTERS]
    for i in range(5):
        values[i][i] = 1.0
        for j in range(i):
            values[i][j] = values[j][i] = rng.uniform(-0.1, 0.3)
    values[1][4] = values[4][1] = 0.9
    made = similarity.draw(Cosines(ADAPTERS, values))
    place, found = mapped(made)
    for (row, column), value in found.items():
        i, j = ADAPTERS.index(row), ADAPTERS.index(column)
        assert value == pytest.approx(0 if i == j else values[i][j] / 0.9, abs=1e-6)
    assert labels(place.yaxis) == labels(place.xaxis)
    # The first two to join are the two most alike, and its branches end at their rows.
    tree = next(
        one for one in made.axes if any(isinstance(c, LineCollection) and len(c.get_segments()) == 4 for c in one.collections)
    )
    segments = next(c for c in tree.collections if isinstance(c, LineCollection)).get_segments()
    first = min(segments, key=lambda points: points[:, 0].max())
    ends = sorted({float(y) for y in first[:, 1]})
    rows = [labels(place.yaxis)[round(y)] for y in ends]
    assert set(rows) == {"law", "chess"} and first[:, 0].max() == pytest.approx(0.1)
    for y in ends:  # the same heights on paper
        assert tree.transData.transform((0, y))[1] == pytest.approx(place.transData.transform((0, y))[1], abs=0.5)
    assert labels(tree.xaxis)[1] == "0.90"


def table_of(seed: int) -> Results:
    rng = random.Random(seed)

    def contender(name: str, kind: str) -> Contender:
        means = {}
        for group in ("in", "out"):
            exact = rng.uniform(0.2, 0.8)
            means[group] = Mean(exact, exact - rng.uniform(0.02, 0.1), exact + rng.uniform(0.02, 0.1), 1.0)
        each = {group: {"a": rng.random(), "b": rng.random()} for group in means}
        return Contender(name, kind, means, each, rng.uniform(1, 3), rng.randrange(1000, 10**6), 5, rng.uniform(3, 9))

    kinds = {"base": "baseline", "uniform": "baseline", "arrow": "token", "average": "static", "classifier": "sequence"}
    return Results(
        tuple(contender(*pair) for pair in kinds.items()),
        ("in", "out"),
        {"in": {"a": 3, "b": 3}, "out": {"a": 3}},
        ("Use it.",),
    )


def test_scores_and_their_intervals() -> None:
    data = table_of(2)
    made = scores.draw(data)
    panels = [place for place in made.axes if place.get_title(loc="left")]
    names = labels(panels[0].yaxis)
    assert len(panels) == 2 and set(names) == {one.name for one in data.contenders}
    for place, group in zip(panels, data.groups, strict=True):
        for one in data.contenders:
            row, mean = names.index(one.name), one.means[group]
            colour, shape, _ = scores.KINDS[one.kind]
            drawn = [line for line in place.lines if set(line.get_ydata()) == {row}]
            bars = [list(line.get_xdata()) for line in drawn if len(line.get_xdata()) == 2]
            dots = [
                (line.get_xdata()[0], line.get_marker(), to_hex(line.get_color()))
                for line in drawn
                if len(line.get_xdata()) == 1
            ]
            assert [pytest.approx([mean.low, mean.high])] == bars and dots == [(mean.exact, shape, colour)]
    told = [text.get_text() for text in panels[1].texts]
    assert told == [f"{next(c for c in data.contenders if c.name == name).means['out'].exact:.2f}" for name in names]


def test_costs_and_their_intervals() -> None:
    data = table_of(3)
    made = cost.draw(data)
    panels = [place for place in made.axes if place.get_xlabel()]
    for place, label, of in zip(panels, ("time", "gates"), (lambda c: c.times, lambda c: c.gates), strict=True):
        assert label in place.get_xlabel()
        dots = {
            (float(line.get_xdata()[0]), float(line.get_ydata()[0])): line.get_marker()
            for line in place.lines
            if len(line.get_xdata()) == 1
        }
        assert dots == {(float(of(one)), one.means["in"].exact): scores.KINDS[one.kind][1] for one in data.contenders}
        whiskers = {
            (float(points[0][0]), round(float(points[:, 1].min()), 9), round(float(points[:, 1].max()), 9))
            for lines in place.collections for points in lines.get_segments()
        }  # fmt: skip
        assert whiskers == {(float(of(c)), round(c.means["in"].low, 9), round(c.means["in"].high, 9)) for c in data.contenders}


def test_a_page_s_tables_are_the_data(visit: Any, tmp_path: Path) -> None:
    """Every contender's mean, interval and NLL; every task; every adapter's licence, source and revision."""
    data = table_of(4)
    origins = [
        Origin("math", "org/math", "0123456789abcdef", "apache-2.0"), Origin("law", "folder", None, None),
        Origin("code", "org/code", None, "cc-by-nc-4.0"),
    ]  # fmt: skip
    file = tmp_path / "page.html"
    file.write_text(page(Report("page", results=data, results_from="from there", origins=origins)), encoding="utf8")
    tab = visit(file)
    read = "(s) => [...document.querySelectorAll(s + ' tbody tr')].map((r) => [...r.cells].map((c) => c.textContent.trim()))"
    rows = tab.evaluate(read, "#results h3 + .wide")
    assert [row[0] for row in rows] == [one.name for one in data.contenders]
    for row, one in zip(rows, data.contenders, strict=True):
        told: list[str] = []
        for group in data.groups:
            mean = one.means[group]
            told += [f"{mean.exact:.3f}", f"{mean.low:.2f}–{mean.high:.2f}", f"{mean.nll:.2f}"]
        assert row[1:7] == told and row[7] == f"{one.times:.2f}"
    by_task = tab.evaluate(read, "#results details")
    assert by_task[1] == ["b", "in", "3", *(f"{one.tasks['in']['b']:.2f}" for one in data.contenders), ""]
    assert tab.locator("#results td.best").count() == 3  # the best on each task
    licences = tab.evaluate(read, "#licences")
    assert [row[0] for row in licences] == ["math", "law", "code"]
    assert [row[1] for row in licences] == ["apache-2.0", "none stated", "cc-by-nc-4.0"]
    assert [row[3] for row in licences] == ["org/math", "folder", "org/code"]
    assert [row[4] for row in licences] == ["0123456789", "–", "–"]
    assert licences[2][2] != "–" and "cc-by-nc-4.0" in tab.locator("#licences ul").inner_text()
