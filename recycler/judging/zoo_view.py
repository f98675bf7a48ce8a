"""What a person sees of `recycle zoo check`, `health` and `licences`: tables, the matrix of cosines, heat strips; 100 columns at most."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

from recycler.terminal import say, table
from recycler.zoo.inspect import printable
from recycler.zoo.licences import DISCLAIMER, RollUp, terms

if TYPE_CHECKING:
    from recycler.judging.check_report import Checked, CheckReport, Section
    from recycler.judging.health import AdapterHealth, HealthReport
    from recycler.zoo.places import Place

WIDTH = 100
_DRAWN = 24  # adapters, up to which the matrix is drawn
_STRIPS = 12  # adapters, up to which heat strips are drawn for all
_BLOCKS = "▁▂▃▄▅▆▇█"
_NAME = 24


def check_view(report: CheckReport) -> None:
    """The report on stdout: per base a table, who can be mixed, and, for a few adapters, every two of them."""
    for section in report.sections:
        if len(report.sections) > 1:
            click.echo(f"\nbase {printable(section.base or 'not declared')}")
        rows = [_checked_row(one) for one in section.adapters]
        table(["name", "verdict", "read", "rank", "targets", "M par.", "licence", "norm", "×median", "marks"], rows)
        click.echo("")
        for line in section.lines():
            click.echo(_plain(line))
        if 1 < len(section.adapters) <= _DRAWN:
            click.echo("")
            for line in matrix_lines(report, section):
                click.echo(line)
    drawn = all(len(section.adapters) <= _DRAWN for section in report.sections)
    say("marks: = does the same as another, ! norm is odd" + ("" if drawn else "; every cosine is in --json and --csv"))


def _checked_row(one: Checked) -> list[str]:
    low, high = (one.ranks[0], one.ranks[-1]) if one.ranks else (0, 0)
    read = "+".join(one.kinds) if one.converted is None else f"from {one.converted}"
    return [
        _short(one.name),
        one.verdict,
        read,
        str(low) if low == high else f"{low}–{high}",
        _coverage(one),
        f"{one.parameters / 1e6:.2f}",
        _short(one.licence or "none stated", 16),
        "–" if one.norm is None else f"{one.norm:.3g}",
        "–" if one.ratio is None else f"{one.ratio:.3g}",
        "=" * bool(one.near) + "!" * bool(one.outlier),
    ]


def _coverage(one: Checked) -> str:
    """``q_proj v_proj``, with counts where it touches a part of the layers only."""
    parts = []
    for kind, (here, there) in one.targets.items():
        name = kind.removesuffix("_proj")
        parts.append(name if there in (None, here) else f"{name} {here}/{there}")
    return " ".join(printable(part, 30) for part in parts)


def matrix_lines(report: CheckReport, section: Section) -> list[str]:
    """Cosines ×100 between every two, × where they cannot share a model, == where they do the same thing."""
    names = [one.name for one in section.adapters]
    near = {one.name: set(one.near) for one in section.adapters}
    cell = 4 if len(names) <= 18 else 3
    label = min(max(map(len, names)), WIDTH - 4 - cell * len(names), _NAME)
    lines = ["cosine ×100 of the updates; × cannot be mixed, == does the same thing"]
    lines.append(" " * (label + 4) + "".join(f"{number:>{cell}}" for number in range(1, len(names) + 1)))
    for number, a in enumerate(names, 1):
        cells = []
        for b in names[:number]:
            value = report.cosine(a, b)
            text = "×" if value is None else f"{max(min(round(value * 100), 99), -99)}"
            cells.append("·" if a == b else "==" if b in near[a] else text)
        lines.append(f"{number:>3} {_short(a, label):<{label}}" + "".join(f"{text:>{cell}}" for text in cells))
    return lines


def health_view(report: HealthReport, named: bool) -> None:
    """The report on stdout: a table, what sticks out, and heat strips (where adapters were named, are few, or stick out)."""
    rows = [
        [
            _short(one.name),
            f"{one.norm:.3g}",
            f"{one.ratio:.3g}" if one.z is not None else "–",
            ", ".join(map(str, one.ranks)),
            f"{one.effective_rank:.1f}",
            f"{one.stable_rank:.1f}",
            f"{one.share:.0%}",
            "–" if one.intruders is None else str(one.intruders),
            "!" * bool(one.evidence),
        ]
        for one in report.adapters
    ]
    table(["name", "norm", "×median", "rank", "effective", "stable", "σ1 share", "intruders", "marks"], rows, right=1)
    for one in report.adapters:
        if named or len(report.adapters) <= _STRIPS or one.evidence:
            click.echo("")
            for line in strip_lines(one, report.grid[one.base]):
                click.echo(line)
    click.echo("")
    for one in report.adapters:
        for text in one.evidence:
            click.echo(_plain(f"{one.name}: {text}"))
    for name, why in report.unreadable.items():
        click.echo(_plain(f"{name} could not be read: {why}"))
    if not any(one.evidence for one in report.adapters):
        click.echo("nothing sticks out")
    for note in report.notes:
        say(note)
    say(
        "a block is the norm at a layer beside the zoo's median there: ▁ a third or less, ▄ the same, █ 4 times or more; · not touched"
    )
    from recycler.judging.health import NOTE

    say(NOTE)


def strip_lines(one: AdapterHealth, grid: Iterable[Place]) -> list[str]:
    """An adapter's name, and a line of blocks for each class of linears, layers from left to right."""
    layers: dict[str, set[int | None]] = {}
    for place in grid:
        layers.setdefault(place.kind, set()).add(place.layer)
    ratios: dict[tuple[str, int | None], list[float]] = {}
    for site in one.sites:
        ratios.setdefault((site.place.kind, site.place.layer), []).append(site.ratio)
    label = min(max((len(printable(kind)) for kind in layers), default=0), 30)
    room = WIDTH - label - 3
    lines = [one.name]
    for kind in sorted(layers, key=lambda kind: (None in layers[kind], kind)):
        known = sorted(layer for layer in layers[kind] if layer is not None)
        order: list[int | None] = [None] if not known else list(range(known[-1] + 1))
        values = [_worst(ratios.get((kind, layer))) if layer in layers[kind] else -1.0 for layer in order]
        while len(values) > room:  # more layers than columns: two a block, the one further from the median
            values = [max(values[i : i + 2], key=_distance) for i in range(0, len(values), 2)]
        lines.append(f"  {_short(printable(kind), label):<{label}} " + "".join(map(_block, values)))
    return lines


def _worst(ratios: Sequence[float] | None) -> float | None:
    return max(ratios, key=_distance) if ratios else None


def _distance(ratio: float | None) -> float:
    return abs(math.log(max(ratio, 1e-30))) if ratio is not None and ratio >= 0 else -1.0


def _block(ratio: float | None) -> str:
    """· where the adapter does not touch a linear, a space where there is none."""
    if ratio is None:
        return "·"
    if ratio < 0:
        return " "
    step = round(2 * math.log2(max(ratio, 1e-30)))  # a block is √2
    block = _BLOCKS[max(0, min(step + 3, 7))]
    colour = "red" if step >= 6 else "yellow" if step >= 4 else "blue" if step <= -4 else None
    return click.style(block, fg=colour) if colour and sys.stdout.isatty() else block


def licences_view(roll: RollUp, sources: dict[str, str]) -> None:
    """Licence → adapters on stdout, then what they ask together."""
    rows = [[_short(one, 30), ", ".join(terms(one)) or "–", name, printable(sources[name], 40)] for one, names in
            roll.by_licence.items() for name in names]  # fmt: skip
    rows += [["none stated", "–", name, printable(sources[name], 40)] for name in roll.unstated]
    table(["licence", "asks", "adapter", "source"], rows)
    click.echo("")
    for line in roll.lines():
        click.echo(_plain(line))
    say(f"{DISCLAIMER} The base's own licence comes on top of it.")


def _plain(text: str) -> str:
    """A line that is safe on a terminal, folded at the width of the page."""
    width = min(WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 0
    shown = printable(text, 10_000)
    return "\n".join(_fold(shown, width)) if width else shown


def _fold(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)


def _short(text: str, limit: int = _NAME) -> str:
    shown = printable(text, 200)
    return shown if len(shown) <= limit else shown[: max(limit - 1, 1)] + "…"
