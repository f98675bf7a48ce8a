"""Heat maps: a value is how far a cell departs from the page. Blue is above nothing, vermilion below, and nothing is transparent, so
that one picture reads on white paper and on a dark page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from recycler.pictures import canvas
from recycler.pictures.canvas import BLUE, CELL, INK, MUTED, NORMAL, RULE, SMALL, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ON_STRONG = "#fffffe"  # text on a cell that is nearly full: white on any page
_STRONG = 0.93  # from here on white reads better than black: either has a contrast of 4.5
_GAMMA = 0.7  # small values are seen, too
_MOST = 16.0  # inches that a map may be wide or high; then labels are thinned


def extent(count: int, each: float) -> float:
    """Inches for `count` cells."""
    return min(max(count, 1) * each, _MOST)


def colours(values: Any, top: float) -> Any:
    """[..., 4]: RGBA of values where ±`top` is full; nothing where there is no value."""
    import numpy as np
    from matplotlib.colors import to_rgb

    share = np.clip(np.nan_to_num(np.asarray(values, dtype=float)) / (top or 1.0), -1, 1)
    rgba = np.empty((*share.shape, 4))
    rgba[..., :3] = np.where(share[..., None] >= 0, to_rgb(BLUE), to_rgb(VERMILION))
    rgba[..., 3] = np.abs(share) ** _GAMMA
    return rgba


def heat(
    place: Axes,
    values: Sequence[Sequence[float]],
    top: float,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    digits: int | None = 2,
    right: bool = False,
    note: str = "",
) -> None:
    """Cells in an axes that is there.

    Args:
        values: row by row; NaN where there is none.
        top: the value that is full.
        rows, columns: their names.
        digits: writes numbers into cells that have room; None for never.
        right: names of rows stand on the right.
        note: stands below.
    """
    import numpy as np

    grid = np.asarray(values, dtype=float).reshape(len(values), -1)
    count, across = grid.shape
    box = place.get_position()
    made: Any = place.figure
    wide, high = made.get_size_inches() * (box.width, box.height)
    place.imshow(colours(grid, top), interpolation="none", aspect="auto", origin="upper")
    place.set_xlim(-0.5, across - 0.5)
    place.set_ylim(count - 0.5, -0.5)
    place.xaxis.tick_top()
    if right:
        place.yaxis.tick_right()
    steps = [canvas.label_axis(place, which, names, room) for which, names, room in (("x", columns, wide), ("y", rows, high))]
    note = f"one name in {max(steps)} is shown; the CSV has all" if max(steps) > 1 else note
    place.annotate(note, (0, 0), (0, -4), "axes fraction", "offset points", fontsize=SMALL, color=MUTED, va="top")
    if min(wide / across, high / count) >= 0.09:
        place.hlines(np.arange(count + 1) - 0.5, -0.5, across - 0.5, colors=RULE, linewidth=0.5)
        place.vlines(np.arange(across + 1) - 0.5, -0.5, count - 0.5, colors=RULE, linewidth=0.5)
        place.spines[:].set_visible(False)
    else:
        place.spines[:].set_visible(True)
    if digits is not None and wide / across >= 0.42 and high / count >= 0.16:
        strong = np.abs(np.nan_to_num(grid)) / (top or 1.0)
        for r in range(count):
            for c in range(across):
                text = _number(grid[r, c], digits)
                colour = _ON_STRONG if strong[r, c] ** _GAMMA > _STRONG else CELL if strong[r, c] > 0.02 else MUTED
                place.text(c, r, text, ha="center", va="center", fontsize=SMALL, color=colour)


HEAD = 0.75  # inches for title and scale


def above(columns: Sequence[str]) -> float:
    """Inches from the top of a picture to its cells: title, scale, and the names of columns."""
    return HEAD + (canvas.width_of(columns) if canvas.upright(columns) else 0.2) + 0.12


def head(made: Figure, text: str, full: float, low: float, note: str = "", *, beyond: bool = False) -> None:
    """Title and legend: a strip from `low` to `full`.

    Args:
        note: beside it. beyond: cells may be below `low`, too.
    """
    import numpy as np

    title(made, text)
    wide, high = made.get_size_inches()
    made.text(2.55 / wide, 1 - 0.36 / high, note, fontsize=SMALL, color=MUTED, va="center")
    place = canvas.axes(made, 0.1, 0.3, 2.2, 0.12)
    strip = np.linspace(low, full, 256)[None]
    place.imshow(colours(strip, full), interpolation="none", aspect="auto", extent=(low, full, 0, 1))
    place.set_yticks([])
    ticks = [low, 0.0, full] if low < 0 else [low, full / 2, full]
    names = [f"{tick:.2g}".replace("-", "−") for tick in ticks]
    names[0] = f"≤ {names[0]}" if beyond else names[0]
    place.set_xticks(ticks, names)
    place.tick_params(length=0, labelsize=SMALL, labelcolor=MUTED)
    place.spines[:].set_visible(True)


def title(made: Figure, text: str) -> None:
    made.text(0.1 / made.get_size_inches()[0], 1.0, text, fontsize=NORMAL, color=INK, va="top", ha="left", fontweight="bold")


def _number(value: float, digits: int) -> str:
    if value != value:
        return ""
    text = f"{value:.{digits}f}".replace("-", "−")
    return text.lstrip("−") if not text.strip("−0.") else text
