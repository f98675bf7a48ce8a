"""One answer token by token: each in the colour of the adapter that was at work on it, as in a page's strip (`recycler.seeing.strips`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from unicodedata import combining, east_asian_width

from recycler.pictures import canvas
from recycler.pictures.canvas import INK, MUTED, NORMAL, RULE, SMALL, Cell
from recycler.seeing.strips import COLOURS, OTHER, Slots, legend, slots, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from recycler.seeing.explaining import Explanation

_COLUMNS = 92  # cells a line
_CELL = NORMAL * 0.602 / 72  # inches, of a letter of DejaVu Sans Mono
_LINE = 0.27  # inches
_LINES = 56  # of tokens, the last ones: the answer is among them
_LISTED = 24  # adapters with columns of their own in the CSV
_STRENGTH = 0.55  # of a colour under a share of 1, so that ink on it reads

Piece = tuple[int, int, str]  # token, first cell, text: a token may go on in the next line


def draw(data: Explanation) -> Figure:
    """Legend, prompt, answer. Of a very long prompt the end is drawn."""
    from recycler.pictures.heat import title

    colours = slots([data])
    parts = [("prompt", lines(data, 0, data.begins)), ("answer", lines(data, data.begins, len(data.tokens)))]
    room = max(_LINES - len(parts[1][1]), 8)
    cut = max(len(parts[0][1]) - room, 0)
    parts = [("prompt", parts[0][1][cut:]), ("answer", parts[1][1][:_LINES])]
    with canvas.drawing():
        keys = _keys(data, colours)
        wide = _COLUMNS * _CELL + 0.4
        top = 0.36 + 0.22 * len(keys)
        made = canvas.figure(wide, top + sum(0.34 + _LINE * len(rows) for _, rows in parts) + 0.1)
        title(made, f"Who answered, token by token: {canvas.short(data.method)}")
        place = canvas.axes(made, 0, 0, wide, made.get_size_inches()[1])
        place.set_axis_off()
        place.set_xlim(0, wide)
        place.set_ylim(made.get_size_inches()[1], 0)
        for number, row in enumerate(keys):
            for at, slot, name in row:
                _ground(place, at, 0.3 + 0.22 * number, 0.2, 0.12, slot, 1.0)
                place.text(at + 0.26, 0.37 + 0.22 * number, name, fontsize=SMALL, color=MUTED, va="center")
        for name, rows in parts:
            note = f", from its line {cut + 1} on; the CSV has all" if name == "prompt" and cut else ""
            place.text(0.25, top + 0.18, name + note, fontsize=SMALL, color=MUTED, va="center")
            top += 0.34
            place.plot([0.14, 0.14], [top, top + _LINE * len(rows)], color=RULE if name == "prompt" else INK, linewidth=2)
            for pieces in rows:
                for token, cell, text in pieces:
                    _token(place, data, token, 0.25 + cell * _CELL, top, text, colours)
                top += _LINE
        return made


def lines(data: Explanation, start: int, stop: int) -> list[list[Piece]]:
    """Tokens as they stand in lines of a picture: a line ends where the text's does, or where it is full."""
    found: list[list[Piece]] = [[]]
    at = 0
    for token in range(start, stop):
        for line in visible(data.tokens[token]).splitlines(keepends=True):
            rest = line.rstrip("\n")
            while rest:
                if at >= _COLUMNS:
                    found.append([])
                    at = 0
                text = _fitting(rest, _COLUMNS - at)
                found[-1].append((token, at, text))
                at += max(cells(text), 1)
                rest = rest[len(text) :]
            if line.endswith("\n"):
                found.append([])
                at = 0
    return found if found[-1] else found[:-1] or found


def cells(text: str) -> int:
    """How many letters wide a text is."""
    return sum(0 if combining(letter) else 2 if east_asian_width(letter) in "WF" else 1 for letter in text)


def _fitting(text: str, room: int) -> str:
    """As much of a text as there is room for, and at least a letter."""
    end = 1
    while end < len(text) and cells(text[: end + 1]) <= room:
        end += 1
    return text[:end]


def _keys(data: Explanation, colours: Slots) -> list[list[tuple[float, int | None, str]]]:
    """(inches from the left, colour, name), in as many lines as they take."""
    named: list[tuple[int | None, str]] = [
        (slot, canvas.short(names[0]) if len(names) == 1 else f"{len(names)} others") for slot, names in legend(data, colours)
    ]
    found: list[list[tuple[float, int | None, str]]] = [[]]
    at = 0.1
    for slot, name in [*named, (None, "no colour: the base, or nobody in the lead")]:
        step = 0.45 + canvas.width_of([name], SMALL) if slot is not None else 2.6
        if found[-1] and at + step > _COLUMNS * _CELL + 0.3:
            found.append([])
            at = 0.1
        found[-1].append((at, slot, name))
        at += step
    return found


def _token(place: Axes, data: Explanation, token: int, left: float, top: float, text: str, colours: Slots) -> None:
    owner = data.owner(token)
    if owner is not None:
        share = min(1.0, abs(float(data.share_TE[token, data.adapters.index(owner)])))
        _ground(place, left, top + 0.03, cells(text) * _CELL, _LINE - 0.06, colours.get(owner, len(COLOURS)), share)
    place.text(
        left, top + _LINE / 2 - 0.01, text, fontsize=NORMAL, color=MUTED if data.special[token] else INK, va="center",
        family=["DejaVu Sans Mono"],
    )  # fmt: skip


def _ground(place: Axes, left: float, top: float, width: float, height: float, slot: int | None, share: float) -> None:
    """A tint with a line of the full colour below it; a line alone where there is no colour."""
    from matplotlib.patches import Rectangle

    colour = RULE if slot is None else (*COLOURS, OTHER)[slot]
    seam = 0.006
    if slot is not None:
        place.add_patch(Rectangle((left, top), width - seam, height, facecolor=colour, alpha=share * _STRENGTH, linewidth=0))
    place.add_patch(Rectangle((left, top + height - 0.025), width - seam, 0.025, facecolor=colour, linewidth=0))


def table(data: Explanation) -> list[list[Cell]]:
    """A token a row: whose it is and by what share, log-probabilities where it is of the answer, everybody's share and effect."""
    names = data.chief(_LISTED)
    numbers = [data.adapters.index(name) for name in names]
    head: list[Cell] = [
        "part",
        "token",
        "adapter",
        "share",
        "log p",
        "log p of the base",
        "share of the base",
        "share of others",
    ]
    rows = [head + [f"share of {name}" for name in names] + [f"effect of {name}" for name in names]]
    for i, token in enumerate(data.tokens):
        a, owner, share_E = i - data.begins, data.owner(i), data.share_TE[i]
        own = None if owner is None else float(share_E[data.adapters.index(owner)])
        told: list[Cell] = [float(data.routed_A[a]), float(data.base_A[a])] if a >= 0 else [None, None]
        base = data.base_share(i)
        shares: Sequence[float] = share_E[numbers].tolist()
        rest_E = share_E.clone()
        rest_E[numbers] = 0
        effects: list[Cell] = [float(data.effect_A(name)[a]) if a >= 0 else None for name in names]
        rows.append(["prompt" if a < 0 else "answer", token, owner, own, *told, base, float(rest_E.sum()), *shares, *effects])
    return rows


def describe(data: Explanation) -> str:
    owners = [data.owner(i) for i in range(len(data.tokens))]
    told = sorted({name: owners.count(name) for name in owners if name is not None}.items(), key=lambda pair: -pair[1])
    first = ", ".join(f"{name} leads on {count}" for name, count in told[:5])
    return f"Strip of {len(owners)} tokens{': ' if first else ''}{first}."
