"""Who scores what: exact match of every contender with its 95 % interval, a panel for each group of rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from recycler.pictures import canvas
from recycler.pictures.canvas import BLUE, GREEN, INK, MUTED, RULE, SMALL, VERMILION, Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from recycler.pictures.results import Results

# kind → colour, shape, and what it means: shapes tell them apart where colours do not.
KINDS = {
    "baseline": (MUTED, "o", "needs no router"),
    "static": (GREEN, "s", "one mixture for everything"),
    "sequence": (BLUE, "D", "one decision a prompt"),
    "token": (VERMILION, "^", "decisions at every token"),
    "router": (BLUE, "P", "router"),
}
_TICKS = 40  # tasks; with more, a tick for each would be a bar


def draw(data: Results) -> Figure:
    """Baselines on top, routers below from the best on; a pale tick is one task's mean, the line marks the best of base, best single
    and uniform, which routing has to beat."""
    from recycler.pictures.heat import title

    with canvas.drawing():
        first = data.groups[0]
        routers = sorted((one for one in data.contenders if one.kind != "baseline"), key=lambda one: -one.means[first].exact)
        rows = [one for one in data.contenders if one.kind == "baseline"] + routers
        plain = [one for one in rows if one.kind == "baseline" and one.name != "oracle"]
        each = 3.6 if len(data.groups) == 1 else 2.6
        high = 0.27 * len(rows)
        left = canvas.width_of([one.name for one in rows]) + 0.2
        made = canvas.figure(left + (each + 0.5) * len(data.groups), high + 1.2)
        title(made, "Exact match, mean over tasks, with 95 % intervals")
        more = {"|": "one task", "--": "best without a router"} if plain else {"|": "one task"}
        legend(made, [one.kind for one in rows], more)
        for number, group in enumerate(data.groups):
            place = canvas.axes(made, left + number * (each + 0.5), 0.85, each, high)
            place.set_title(f"{canvas.short(group)}: {_counted(data, group)}", fontsize=SMALL, color=MUTED, pad=4)
            place.set_xlim(-0.02, 1.02)
            place.set_ylim(len(rows) - 0.5, -0.5)
            place.hlines(range(len(rows)), 0, 1, colors=RULE, linewidth=0.5, zorder=0)
            if plain:
                place.axvline(
                    max(one.means[group].exact for one in plain), color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1
                )
            for r, one in enumerate(rows):
                colour, shape, _ = KINDS[one.kind]
                values = list(one.tasks[group].values())
                if 1 < len(values) <= _TICKS:
                    place.scatter(
                        values, [r] * len(values), marker="|", s=34, color=colour, alpha=0.4, linewidths=0.8, zorder=2
                    )
                mean = one.means[group]
                _whisker(place, mean.exact, mean.low, mean.high, r, colour, shape)
                place.annotate(f"{mean.exact:.2f}", (1.03, r), fontsize=SMALL, color=INK, va="center", annotation_clip=False)
            place.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
            place.tick_params(length=0, labelsize=SMALL)
            place.set_yticks(range(len(rows)), [canvas.short(one.name) for one in rows] if number == 0 else [""] * len(rows))
            place.tick_params(axis="y", labelsize=canvas.NORMAL)
            place.spines[["left", "bottom"]].set_visible(False)
        return made


def _counted(data: Results, group: str) -> str:
    counts = data.rows[group]
    return f"{len(counts)} task{'s' * (len(counts) != 1)}, {sum(counts.values())} rows"


def _whisker(place: Axes, value: float, low: float, high: float, row: float, colour: str, shape: str) -> None:
    place.plot([low, high], [row, row], color=colour, linewidth=1.6, solid_capstyle="butt", zorder=3)
    place.vlines([low, high], row - 0.14, row + 0.14, colors=colour, linewidth=1.2, zorder=3)
    place.plot([value], [row], marker=shape, markersize=5.5, color=colour, zorder=4, clip_on=False)


def legend(made: Figure, kinds: Iterable[str], more: Mapping[str, str] | None = None) -> None:
    """Shapes and what they mean, in a line below the title; `more` are marks that stand for something else, in grey."""
    held = set(kinds)
    marks = [KINDS[kind] for kind in KINDS if kind in held] + [(MUTED, mark, words) for mark, words in (more or {}).items()]
    steps = [0.36 + 0.064 * len(words) for _, _, words in marks]
    place = canvas.axes(made, 0.1, 0.27, sum(steps), 0.2)
    place.set_axis_off()
    place.set_xlim(0, sum(steps))
    place.set_ylim(-0.5, 0.5)
    at = 0.07
    for (colour, mark, words), step in zip(marks, steps, strict=True):
        if mark == "--":
            place.plot([at - 0.06, at + 0.08], [0, 0], color=colour, linewidth=1, linestyle=(0, (2, 1)))
        else:
            place.plot([at], [0], marker=mark, markersize=5, color=colour, linestyle="none")
        place.text(at + 0.12, 0, words, fontsize=SMALL, color=MUTED, va="center")
        at += step


def table(data: Results) -> list[list[Cell]]:
    """Every contender, in the order of the table, and its mean, interval, and NLL in each group."""
    head: list[Cell] = ["contender", "kind"]
    for group in data.groups:
        head += [f"{group} exact", f"{group} low", f"{group} high", f"{group} nll"]
    rows = [head]
    for one in data.contenders:
        rows.append([one.name, one.kind, *(value for group in data.groups for value in one.means[group])])
    return rows


def describe(data: Results) -> str:
    parts = []
    for group in data.groups:
        told = [f"{one.name} {one.means[group].exact:.2f}" for one in data.contenders]
        parts.append(f"{group}, {_counted(data, group)}: {', '.join(told)}")
    return f"Exact match with intervals. {'. '.join(parts)}."
