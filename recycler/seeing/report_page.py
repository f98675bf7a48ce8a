"""A report as one HTML file: no script, style, font or picture from elsewhere, readable without its script, in dark and light, on a phone
and by keyboard. The templates lie in ``templates/``; everything that is not markup of this project is escaped there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycler.pictures import canvas, cost, routing, scores, similarity, tasks, tokens
from recycler.pictures.canvas import Cell
from recycler.zoo import licences
from recycler.zoo.untrusted import OBEYED

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

    from recycler.pictures.results import Contender, Results
    from recycler.seeing.reporting import Report

_TEMPLATES = Path(__file__).parent / "templates"
_CELLS = 20_000  # of a table that stands in the page itself; larger ones are in the CSV alone
_PAIRS = 12  # of adapters most alike
_SHORT = 120  # characters of a prompt where examples are listed

BENCH = "recycle bench-routers --profile NAME --tasks test/*.jsonl --out bench/"
WANTED = {
    "results": (BENCH, "recycle report MODEL --bench bench/ --out report.html"),
    "cost": (BENCH, "recycle report MODEL --bench bench/ --out report.html"),
    "tasks": ("recycle profile tasks/*.jsonl --kshot 16 --out NAME", "recycle report --profile NAME --out report.html"),
    "routing": ("recycle compose --router gates/ --out model/", 'recycle report model/ -p "A PROMPT" --out report.html'),
    "examples": ("recycle compose --router gates/ --out model/", 'recycle report model/ -p "A PROMPT" --out report.html'),
    "alike": ("recycle fetch SOURCE...", "recycle report --profile NAME --out report.html"),
    "licences": ("recycle fetch SOURCE...", "recycle zoo licences"),
}
"""Section → the commands that would fill it."""
_OF_A_MODEL = ("routing", "examples")  # whoever has one need not be told how to compose it


@dataclass(frozen=True)
class Picture:
    """A picture in the page, and the numbers behind it."""

    name: str
    svg: str
    rows: Sequence[Sequence[Cell]]
    alt: str

    @classmethod
    def of(cls, name: str, module: Any, data: Any) -> Picture:
        alt = OBEYED.sub("", module.describe(data))
        drawn: Figure = module.draw(data)
        return cls(name, canvas.inline(drawn, name, alt), module.table(data), alt)

    @property
    def csv(self) -> str:
        """The CSV as a link."""
        return canvas.csv_link(self.rows)

    @property
    def small(self) -> bool:
        return len(self.rows) * len(self.rows[0]) <= _CELLS


def page(report: Report) -> str:
    """The whole page."""
    from recycler.seeing.strips import policy, slots, strip_css, strip_html, strip_js

    colours = slots([one for _, one, _ in report.examples])
    composed = "router" in report.facts
    script = _file("report.js") + strip_js()
    roll = licences.roll_up({one.name: one.licence for one in report.origins})
    return _environment().get_template("report.html").render(
        report=report,
        results=report.results,
        table=None if report.results is None else _table(report.results),
        pictures={one.name: one for one in _pictures(report)},
        examples=[
            {
                "title": _line(task, one.prompt), "reference": reference, "strip": strip_html(one, colours),
                "csv": canvas.csv_link(tokens.table(one)),
            }
            for task, one, reference in report.examples
        ],
        closest=[] if report.cosines is None or len(report.cosines.adapters) < 4 else report.cosines.closest(_PAIRS),
        licences=[
            (one, ", ".join(licences.stated(one.licence)) or "none stated", _asks(one.licence)) for one in report.origins
        ],
        roll=roll.lines() if report.origins else [],
        disclaimer=licences.DISCLAIMER,
        wanted={name: lines[composed and name in _OF_A_MODEL :] for name, lines in WANTED.items()},
        style=strip_css() + _file("report.css"),
        script=script,
        policy=policy(script),
        made=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        version=version("recycler"),
    )  # fmt: skip


def _pictures(report: Report) -> list[Picture]:
    found = []
    if report.results is not None:
        found.append(Picture.of("scores", scores, report.results))
        if cost.measured(report.results):
            found.append(Picture.of("cost", cost, report.results))
    if report.scores is not None:
        found.append(Picture.of("tasks", tasks, report.scores))
    if report.routing is not None:
        found.append(Picture.of("routing", routing, report.routing))
    if report.cosines is not None:
        found.append(Picture.of("alike", similarity, report.cosines))
    return found


def _table(results: Results) -> dict[str, Any]:
    """The table of contenders, as text, with the costs that are known; and task by task."""
    every: dict[str, Callable[[Contender], str]] = {
        "× base’s time": lambda one: "–" if one.times is None else f"{one.times:.2f}",
        "adapters, MB": lambda one: "–" if one.adapters is None else f"{one.adapters / 1e6:.1f}",
        "gates, MB": lambda one: "–" if one.gates is None else f"{one.gates / 1e6:.1f}",
        "fit, s": lambda one: "–" if one.fit is None else f"{one.fit:.1f}",
        "needs": lambda one: one.needs or "–",
    }
    costs = {label: of for label, of in every.items() if any(of(one) != "–" for one in results.contenders)}
    rows = []
    for one in results.contenders:
        cells = []
        for group in results.groups:
            mean = one.means[group]
            cells += [f"{mean.exact:.3f}", f"{mean.low:.2f}–{mean.high:.2f}", f"{mean.nll:.2f}"]
        cells += [of(one) for of in costs.values()]
        rows.append((one, cells))
    by_task = []
    for group in results.groups:
        for task in results.rows[group]:
            values = [one.tasks[group].get(task) for one in results.contenders]
            best = max((value for value in values if value is not None), default=0.0)
            verdict = results.by_task.get(group, {}).get(task, "")
            by_task.append((group, task, results.rows[group][task], [(value, value == best > 0) for value in values], verdict))
    head: list[Cell] = ["rows of", "task", "rows", *(one.name for one in results.contenders), "verdict"]
    lines = [[group, task, count, *(value for value, _ in values), verdict] for group, task, count, values, verdict in by_task]
    return {"rows": rows, "costs": list(costs), "by_task": by_task, "csv": canvas.csv_link([head, *lines])}


def _asks(licence: str | None) -> str:
    return ", ".join(dict.fromkeys(term for one in licences.stated(licence) for term in licences.terms(one)))


def _line(task: str | None, prompt: str) -> str:
    flat = " ".join(OBEYED.sub("", prompt).split())
    flat = flat if len(flat) <= _SHORT else flat[: _SHORT - 1] + "…"
    return flat if task is None else f"{task}: {flat}"


def _file(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf8")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: OBEYED.sub("", value) if type(value) is str else value,
    )  # fmt: skip
    made.filters["cell"] = lambda cell: "" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    return made
