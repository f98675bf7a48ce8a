"""Quality against cost: exact match over the time a row takes, and over the bytes of gates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from recycler.pictures import canvas
from recycler.pictures.canvas import INK, MUTED, PAPER, RULE, SMALL, Cell
from recycler.pictures.scores import KINDS, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from recycler.pictures.results import Contender, Results

_SIDE = 3.4  # inches, of a panel


def measured(data: Results) -> list[Contender]:
    """Contenders whose time or gates are known."""
    return [one for one in data.contenders if one.times is not None or one.gates is not None]


def draw(data: Results) -> Figure:
    """Exact match on the first group, over × the base's time on the left, over the gates' bytes on the right. Up and to the left is
    better."""
    from recycler.pictures.heat import title

    with canvas.drawing():
        group = data.groups[0]
        made = canvas.figure(2 * _SIDE + 1.3, _SIDE + 1.2)
        title(made, f"Quality against cost: exact match on {canvas.short(group)}, with 95 % intervals")
        legend(made, [one.kind for one in measured(data)])
        panels: list[tuple[str, Callable[[Contender], float | None], bool]] = [
            ("× the base's time a row", lambda one: one.times, False),
            ("bytes of gates", lambda one: None if one.gates is None else float(one.gates), True),
        ]
        for number, (label, of, bytes_) in enumerate(panels):
            place = canvas.axes(made, 0.4 + number * (_SIDE + 0.5), 0.65, _SIDE, _SIDE)
            _panel(place, data, group, of, bytes_)
            place.set_xlabel(label, fontsize=SMALL, color=MUTED)
        return made


def _panel(place: Axes, data: Results, group: str, of: Callable[[Contender], float | None], bytes_: bool) -> None:
    points = [(cost, one) for one in data.contenders if (cost := of(one)) is not None]
    place.grid(True)
    place.set_ylim(-0.04, 1.04)
    place.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    if bytes_:
        low = min((cost for cost, _ in points if cost > 0), default=1e3)
        high = max((cost for cost, _ in points), default=0.0)
        first, last = int(math.log10(low)), max(math.ceil(math.log10(max(high, 1.0))), int(math.log10(low)) + 1)
        decades = range(first, last + 1, (last - first) // 5 + 1)
        place.set_xscale("symlog", linthresh=10.0**first, linscale=0.6)  # linear below it, so that nothing has its place
        place.set_xlim(-0.25 * 10.0**first, 10.0**last * 2)
        place.set_xticks([0.0, *(10.0**n for n in decades)], ["0", *(_bytes(10.0**n) for n in decades)])
        place.set_xticks([], minor=True)
    else:
        high = max((cost for cost, _ in points), default=1.0)
        place.set_xlim(min(0.9, *(cost for cost, _ in points), 1.0) - 0.02, max(high * 1.15, 1.5))
    place.tick_params(labelsize=SMALL, length=0, labelcolor=MUTED)
    place.spines[["left", "bottom"]].set_color(RULE)
    for cost, one in points:
        colour, shape, _ = KINDS[one.kind]
        mean = one.means[group]
        place.vlines(cost, mean.low, mean.high, colors=colour, linewidth=1.3, alpha=0.7, zorder=2)
        place.plot([cost], [mean.exact], marker=shape, markersize=5.5, color=colour, linestyle="none", zorder=3, clip_on=False)
    _names(place, [(cost, one.means[group].exact, canvas.short(one.name, 22)) for cost, one in points])


def _names(place: Axes, points: list[tuple[float, float, str]]) -> None:
    """Names beside their points, each where it covers no other and no point; with a thin line where it had to move away."""
    canvas_: Any = place.figure.canvas
    renderer = canvas_.get_renderer()
    box = place.get_window_extent(renderer)
    inch = place.figure.dpi
    around = {"facecolor": PAPER, "alpha": 0.75, "linewidth": 0, "pad": 0.6}  # over whiskers
    dots = [tuple(place.transData.transform((x, y))) for x, y, _ in points]
    taken: list[tuple[float, float, float, float]] = [(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    steps = sorted(((dx, dy) for dx in (-1, 1) for dy in range(-14, 15)), key=lambda at: abs(at[1]) * 1.0 + (at[0] < 0) * 0.5)
    for (x, y), (cost, value, name) in sorted(zip(dots, points, strict=True), key=lambda one: -one[0][1]):
        text = place.annotate(name, (cost, value), xytext=(7, 0), textcoords="offset points", fontsize=SMALL, color=INK, va="center", annotation_clip=False, bbox=around)  # fmt: skip
        size = text.get_window_extent(renderer)
        others = [dot for dot in dots if math.dist(dot, (x, y)) > 1]
        best: tuple[float, int, int, tuple[float, float, float, float]] | None = None
        for rank, (dx, dy) in enumerate(steps):
            left = x + 0.09 * inch if dx > 0 else x - 0.09 * inch - size.width
            bottom = y - size.height / 2 + dy * size.height * 0.55
            found = (left, bottom, left + size.width, bottom + size.height)
            over = sum(_common(found, other) for other in taken)
            # A name that is nearer to somebody else's point would be read as that point's: it rather moves away.
            end = (found[0] if dx > 0 else found[2], (found[1] + found[3]) / 2)
            over += 40 * sum(math.dist(end, dot) < math.dist(end, (x, y)) for dot in others)
            over += 1e4 * (found[2] > box.x1 + 0.5 * inch or found[0] < box.x0 or found[1] < box.y0 or found[3] > box.y1 + 4)
            if best is None or over * 20 + rank * 2 < best[0]:
                best = (over * 20 + rank * 2, dx, dy, found)
        assert best is not None
        _, dx, dy, found = best
        taken.append(found)
        points_up = dy * size.height * 0.55 / inch * 72
        text.set_position((6.5 if dx > 0 else -6.5, points_up))
        text.set_horizontalalignment("left" if dx > 0 else "right")
        if dy:
            edge = (6 if dx > 0 else -6, points_up)
            place.annotate("", (cost, value), xytext=edge, textcoords="offset points", arrowprops={"arrowstyle": "-", "color": RULE, "lw": 0.7, "shrinkA": 0, "shrinkB": 2})  # fmt: skip


def _common(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0.0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)


def _bytes(value: float) -> str:
    if value <= 0:
        return "0"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.0f} {unit}"
    return f"{value:.0f} B"


def table(data: Results) -> list[list[Cell]]:
    """Every contender that was measured, its exact match on the first group, and what it costs; empty where that is not known."""
    group = data.groups[0]
    head: list[Cell] = ["contender", "kind", "exact", "low", "high", "times base", "gate bytes", "adapter bytes", "fit seconds"]
    return [
        head,
        *([one.name, one.kind, *one.means[group][:3], one.times, one.gates, one.adapters, one.fit] for one in measured(data)),
    ]


def describe(data: Results) -> str:
    group = data.groups[0]
    told = [
        f"{one.name} {one.means[group].exact:.2f}"
        + (f" at {one.times:.1f} times the base's time" if one.times is not None else "")
        + (f" with {_bytes(one.gates)} of gates" if one.gates else "")
        for one in measured(data)
    ]
    return f"Scatter plots of exact match against cost: {', '.join(told)}."
