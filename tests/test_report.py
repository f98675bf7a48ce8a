"""The report as a reader meets it: in Chromium, from disk, without a network, in both themes, on a phone and by keyboard."""

from __future__ import annotations

import inspect
import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest
import torch
from conftest import Pico
from test_pictures import made, parsed, recycle
from way import Way, go

import recycler
from recycler.cli import main
from recycler.pictures import canvas, tasks, tokens
from recycler.pictures.results import read
from recycler.pictures.routing import LayerWeights
from recycler.pictures.similarity import Cosines
from recycler.pictures.tasks import TaskScores
from recycler.seeing.report_page import WANTED, page
from recycler.seeing.reporting import Origin, Report
from recycler.sharing.card import record_evaluation
from recycler.zoo.errors import InputError, UsageError

HOSTILE = '"><script>window.hit = 1</script><img src=x onerror="window.hit = 1">'
ASKED = ["Add 1 and b.", HOSTILE, "O 3 of the long,\nlong poem!"]
SECTIONS = ["results", "cost", "tasks", "routing", "examples", "alike", "licences"]


class Made(NamedTuple):
    way: Way
    bench: Path
    page: Path


@pytest.fixture(scope="module")
def report(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Everything that a page can hold, of a pico model."""
    folder = tmp_path_factory.mktemp("report")
    way = go(llama, folder)
    shots = recycler.Shots.from_files(*llama.tasks)
    held_out = recycler.Shots({"new": shots["poem"]})
    recycler.bench_routers(
        way.profile, "arrow,ridge", tasks=shots, held_out=held_out, rows=2, zoo=way.zoo, out=folder / "bench", max_new_tokens=2
    )
    out = recycler.report(
        way.folder, folder / "report.html", profile=way.profile, bench=folder / "bench",
        prompts=ASKED, max_new_tokens=3, zoo=way.zoo,
    )  # fmt: skip
    return Made(way, folder / "bench", out)


def test_everything_is_there(report: Made, visit: Any) -> None:
    tab = visit(report.page)
    assert [one.get_attribute("id") for one in tab.query_selector_all("main > section")] == SECTIONS
    assert tab.locator("svg[role=img][aria-label]").count() == 5 and tab.locator("main .wide pre, main pre.wide").count() == 0
    assert tab.locator(".verdict").inner_text() == read(report.bench).verdicts[0]
    assert tab.title().startswith("model")
    for label in ("ridge", "arrow", "best single", "oracle"):
        assert tab.locator("#results tbody th", has_text=re.compile(f"^{label}")).count() == 1
    text = tab.locator("#licences").inner_text()
    assert all(name in text for name in report.way.profile.adapters) and "not legal advice" in text
    shown = tab.locator("#tasks svg").text_content()
    assert all(name in shown for name in report.way.profile.adapters)


def test_markup_is_sound(report: Made, visit: Any) -> None:
    """Headings without gaps, headers with a scope, ids that are unique, links that lead somewhere, controls with names."""
    tab = visit(report.page)
    levels = tab.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and all(b <= a + 1 for a, b in pairwise(levels)) and levels.count(1) == 1
    assert tab.evaluate("[...document.querySelectorAll('th')].filter(t => !t.scope).length") == 0
    ids = tab.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    links = tab.evaluate("[...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.getAttribute('href').slice(1))")
    assert set(links) <= set(ids) and len(links) == len(SECTIONS) + 1
    assert tab.evaluate("[...document.querySelectorAll('use')].every(u => document.querySelector(u.getAttribute('href')))")
    assert tab.evaluate("[...document.querySelectorAll('select')].every(s => s.labels.length === 1)")
    boxes = "[...document.querySelectorAll('.wide')].every(b => b.tabIndex === 0 && (b.tagName === 'PRE' || b.ariaLabel))"
    assert tab.evaluate(boxes) and tab.evaluate("document.documentElement.lang") == "en"


def test_an_example_is_picked_by_keyboard(report: Made, visit: Any) -> None:
    tab = visit(report.page)
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "main"
    shown = "[...document.querySelectorAll('.example')].map(e => e.checkVisibility())"
    assert tab.evaluate(shown) == [True, False, False]
    for _ in range(60):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.id") == "example":
            break
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate(shown) == [False, True, False] and "window.hit = 1" in tab.locator("#example-2").inner_text()
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate(shown) == [False, False, True]
    tab.keyboard.press("Tab")  # into the tokens
    assert tab.evaluate("document.activeElement.closest('#example-3') !== null")


def test_without_script_everything_is_readable(report: Made, visit: Any) -> None:
    tab = visit(report.page, java_script_enabled=False)
    assert [tab.locator(f"#example-{number}").is_visible() for number in (1, 2, 3)] == [True] * 3
    assert not tab.locator("#example").is_visible() and tab.locator("#example-2 h3").is_visible()


_COLOURS = """() => {
  const rgb = (text) => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
  const all = [["body", rgb(getComputedStyle(document.body).color)]];
  for (const one of document.querySelectorAll("p, h2, a, figcaption, td, th, dt, dd, summary, li, select"))
    if (one.checkVisibility()) all.push([one.tagName, rgb(getComputedStyle(one).color)]);
  for (const one of document.querySelectorAll("svg text")) {
    const fill = getComputedStyle(one).fill;
    if (fill !== "rgb(255, 255, 254)") all.push(["svg " + one.textContent, rgb(fill)]);
  }
  const lines = [...document.querySelectorAll("#results svg use")].map((u) => rgb(getComputedStyle(u).fill));
  return {paper: rgb(getComputedStyle(document.body).backgroundColor), all, lines};
}"""


def ratio(a: list[float], b: list[float]) -> float:
    def light(colour: list[float]) -> float:
        parts = [part / 255 for part in colour]
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted([light(a), light(b)], reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_dark_and_light(report: Made, visit: Any) -> None:
    """Both are readable, in text and in pictures; and they are not the same."""
    found = {scheme: visit(report.page, color_scheme=scheme).evaluate(_COLOURS) for scheme in ("light", "dark")}
    assert sum(found["light"]["paper"]) > 700 and sum(found["dark"]["paper"]) < 120
    for scheme, colours in found.items():
        assert len(colours["all"]) > 100 and colours["lines"]
        for what, colour in colours["all"]:
            assert ratio(colour, colours["paper"]) >= 4.5, (scheme, what, colour)
        assert all(ratio(colour, colours["paper"]) >= 3 for colour in colours["lines"]), scheme


@pytest.mark.parametrize("width", [320, 360, 1280])
def test_nothing_scrolls_sideways_but_boxes(report: Made, visit: Any, width: int) -> None:
    tab = visit(report.page, viewport={"width": width, "height": 700})
    for detail in tab.query_selector_all("details"):
        detail.evaluate("d => d.open = true")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    if width < 400:
        assert tab.evaluate(
            "[...document.querySelectorAll('table')].some(t => t.parentElement.scrollWidth > t.parentElement.clientWidth)"
        )


def test_the_numbers_are_behind_every_picture(report: Made, visit: Any) -> None:
    tab = visit(report.page)
    links = tab.locator("a[download]")
    found = {}
    for number in range(links.count()):
        link = links.nth(number)
        name = link.get_attribute("download")
        if name.startswith("tokens-"):
            tab.select_option("#example", name.removeprefix("tokens-").removesuffix(".csv"))
        held = unquote(link.get_attribute("href").split(",", 1)[1])
        with tab.expect_download() as download:
            link.click()
        assert download.value.suggested_filename == name
        assert Path(download.value.path()).read_text(encoding="utf8") == held
        found[name] = held
    drawn = {"scores.csv", "cost.csv", "tasks.csv", "routing.csv", "alike.csv"}
    assert set(found) == drawn | {"by-task.csv", "tokens-1.csv", "tokens-2.csv", "tokens-3.csv"}
    model = recycler.load(report.way.folder)
    for number, prompt in enumerate(ASKED, 1):
        told = parsed(canvas.as_csv(tokens.table(recycler.explain(model, prompt, max_new_tokens=3))))
        assert parsed(found[f"tokens-{number}.csv"]) == told
    by_task = parsed(found["by-task.csv"])
    contenders = read(report.bench).contenders
    assert by_task[0] == ["rows of", "task", "rows", *(one.name for one in contenders), "verdict"] and len(by_task) == 6
    for group, task, _, *values, _ in by_task[1:]:
        assert [float(value) for value in values] == pytest.approx([one.tasks[group][task] for one in contenders])
    assert found["tasks.csv"] == canvas.as_csv(tasks.table(TaskScores.of(report.way.profile)))
    rows = parsed(found["scores.csv"])
    assert [row[0] for row in rows[1:]] == [one.name for one in read(report.bench).contenders]
    shown = tab.locator("#tasks tbody tr").evaluate_all("rows => rows.map(r => r.cells[0].textContent)")
    assert shown == [row[0] for row in parsed(found["tasks.csv"])[1:]]


def test_strangers_cannot_write_markup(visit: Any, tmp_path: Path) -> None:
    """Names, licences, sources, tasks, verdicts, reasons."""
    results = made(HOSTILE, "fine", groups=(HOSTILE, "b"))
    results = type(results)(**{**vars(results), "verdicts": (HOSTILE, HOSTILE), "failed": {HOSTILE: HOSTILE}})
    content = Report(
        HOSTILE, {HOSTILE: HOSTILE}, results, HOSTILE,
        TaskScores("nll", (HOSTILE, "b"), (HOSTILE,), [[1.0], [2.0]], [3.0], {HOSTILE: HOSTILE}),
        LayerWeights((HOSTILE, "b"), (HOSTILE,), [[0.5], [0.5]], 1),
        (), Cosines((HOSTILE, "b"), [[1.0, 0.5], [0.5, 1.0]]), [Origin(HOSTILE, HOSTILE, HOSTILE, HOSTILE)], [HOSTILE],
    )  # fmt: skip
    file = tmp_path / "hostile.html"
    file.write_text(page(content), encoding="utf8")
    tab = visit(file)
    assert tab.locator("img").count() == 0 and tab.locator("script").count() == 1
    assert tab.locator("h1").inner_text() == HOSTILE and tab.locator("svg").count() == 5


def test_a_page_of_hundreds(visit: Any, tmp_path: Path) -> None:
    """Hundreds of adapters on fifty tasks: small enough to mail, as long as a person scrolls, names that can be told apart, and every
    number within reach."""
    names = tuple(f"some-organisation-{i % 9}-adapter-of-rank-16-{i:03d}" for i in range(300))
    asked = [f"task_number_{j}" for j in range(50)]
    angle = torch.linspace(0, 3, 300)
    content = Report(
        "large", {}, made(*names[:30]), "",
        TaskScores(
            "nll", names, tuple(asked), [[float((i + j) % 50) for j in range(50)] for i in range(300)], [9.0] * 50,
            {task: names[-1 - j] for j, task in enumerate(asked)},
        ),
        LayerWeights(names, tuple(map(str, range(32))), [[1 / 300] * 32] * 300, 1),
        (), Cosines(names, torch.cos(angle[:, None] - angle[None]).tolist()),
        [Origin(name, f"org/{name}", "0" * 40, "apache-2.0") for name in names],
    )  # fmt: skip
    file = tmp_path / "large.html"
    file.write_text(page(content), encoding="utf8")
    assert file.stat().st_size < 8e6
    tab = visit(file, viewport={"width": 360, "height": 700})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    assert tab.evaluate("document.documentElement.scrollHeight") < 12_000
    shown = [one for one in tab.locator("#tasks svg text").all_text_contents() if "rank" in one or "…" in one]
    assert len(shown) == len(set(shown)) == 60 and all(any(one.endswith(name[-3:]) for one in shown) for name in names[-50:])
    assert "60 of 300" in tab.locator("#tasks svg").text_content()
    assert tab.locator("#tasks tbody tr").count() == 301  # behind a click: a find in the page opens it
    assert tab.locator("#alike table").count() == 1  # the closest pairs; all of them are in the CSV
    assert len(parsed(unquote(tab.locator("#alike a[download]").get_attribute("href").split(",", 1)[1]))) == 301


def test_what_is_missing_names_its_command(report: Made, visit: Any, tmp_path: Path) -> None:
    out = recycler.report(out=tmp_path / "r.html", profile=report.way.profile, zoo=report.way.zoo)
    tab = visit(out)
    drawn = [name for name in SECTIONS if tab.locator(f"#{name} svg").count()]
    assert drawn == ["tasks", "alike"] and tab.locator("#licences tbody tr").count() == 4
    for name in ("results", "cost", "routing", "examples"):
        assert tab.locator(f"#{name} pre").inner_text().strip().split("\n") == list(WANTED[name])
    bare = visit(recycler.report(report.way.folder, out=tmp_path / "m.html", zoo=recycler.Zoo(tmp_path / "none")))
    assert bare.locator("#routing pre").inner_text().strip().split("\n") == list(WANTED["routing"][1:])  # there is a model
    only = recycler.report(out=tmp_path / "b.html", bench=report.bench, zoo=report.way.zoo)
    assert [name for name in SECTIONS if visit(only).locator(f"#{name} svg").count()] == ["results", "cost"]


def test_evaluated_for_the_page_or_kept(report: Made, tmp_path: Path) -> None:
    """Without a bench, the model answers --tasks; without these, what was kept in its folder is shown; and a router's own profile is
    found by itself, unless its adapters changed since."""
    import shutil

    way = report.way
    zoo = Path(shutil.copytree(way.zoo.path, tmp_path / "zoo"))
    shutil.copytree(way.profile.folder, zoo / "profiles" / way.profile.name)  # type: ignore[arg-type]
    model = Path(shutil.copytree(way.folder, tmp_path / "model"))
    out = tmp_path / "r.html"
    done = recycle("report", model, "--tasks", *way.pico.tasks[:2], "--rows", 1, "--max-new-tokens", 2, "--out", out, zoo=zoo)
    assert done.exit_code == 0 and done.stdout == f"{out}\n", done.output
    text = out.read_text(encoding="utf8")
    assert "measured for this page" in text and "profile</dt><dd>p3" in text and text.count('class="example"') == 2
    evaluated = recycler.evaluate(recycler.load(model), recycler.Shots.from_files(way.pico.tasks[0]), max_new_tokens=2)
    record_evaluation(model, evaluated)
    again = recycle("report", model, "--out", out, "--force", zoo=tmp_path / "none")
    assert again.exit_code == 0, again.output
    text = out.read_text(encoding="utf8")
    assert "kept in the model" in text and "profile</dt>" not in text and text.count('class="example"') == 0


def test_bad_input(report: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    way, out = report.way, tmp_path / "r.html"
    (tmp_path / "there.html").write_text("mine", encoding="utf8")
    (tmp_path / "bench.json").write_text(json.dumps({"schema_version": 1}), encoding="utf8")
    for args, code, message in (
        (["--out", out], 2, "nothing to report on"),
        ([way.folder, "--out", tmp_path / "there.html"], 2, "--force"),
        ([way.folder, "--out", tmp_path], 2, "is a folder"),
        (["--profile", "none", "--out", out], 3, "holds no profile"),
        (["--bench", tmp_path / "none", "--out", out], 2, "There is no"),
        (["--bench", tmp_path, "--out", out], 3, "cannot be read"),
        (["--bench", way.folder, "--out", out], 3, "holds no bench"),
        ([tmp_path, "--out", out], 3, "is not a composed model"),
        ([way.folder, "--tasks", "none.jsonl", "--out", out], 2, "There is no file"),
        ([way.folder, "-p", " ", "--out", out], 2, "empty"),
        (["--profile", way.profile.folder, "-p", "a", "--out", out], 2, "answered by a model"),
    ):
        done = recycle("report", *args, zoo=way.zoo.path)
        assert done.exit_code == code and message in " ".join(done.stderr.split()), (args, done.output)
    assert not out.exists() and (tmp_path / "there.html").read_text(encoding="utf8") == "mine"
    with pytest.raises(InputError):
        recycler.report(tmp_path / "nothing", out, zoo=way.zoo)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'recycler\[pictures\]'"):
        recycler.report(way.folder, out, zoo=way.zoo)


def test_python_and_the_command_agree() -> None:
    """The same arguments, with the same defaults."""
    known = inspect.signature(recycler.report).parameters
    command = main.commands["report"]
    given = command.make_context("report", [], resilient_parsing=True).params
    renamed = {"zoo_path": "zoo"}
    for key, value in given.items():
        if key not in ("device", "dtype"):
            default = known[renamed.get(key, key)].default
            assert (value or None) == (default or None), key
    assert set(known) - {renamed.get(key, key) for key in given} == {"progress", "loading"}
