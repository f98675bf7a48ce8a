"""What all pictures share: ink, colours that colour-blind people tell apart, labels that fit, and files.

Sizes are inches. Figures are matplotlib's own objects: nothing goes through pyplot, so that a program's other figures are left alone.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from recycler.zoo.errors import UsageError
from recycler.zoo.store import require_writable
from recycler.zoo.untrusted import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cell = str | float | int | bool | None

# Each is used for one thing only, so that a page can put its own colours in their place (`inline`).
INK, MUTED, RULE, PAPER = "#1b1f24", "#57606b", "#d0d7df", "#ffffff"
CELL = "#000102"  # text on a cell that the page shines through
# Okabe and Ito (2008), told apart with any colour vision; pictures use shapes as well.
BLUE, VERMILION, GREEN = "#0072b2", "#bc4a00", "#00795a"
VARIABLES = {
    INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--paper", CELL: "--cell", BLUE: "--blue", VERMILION: "--vermilion",
    GREEN: "--green",
}  # fmt: skip
SMALL, NORMAL = 8.0, 9.5  # points
FORMATS = (".png", ".svg")
_LINE = 1.35  # a line of text, in its size
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": NORMAL,
    "text.parse_math": False,  # a $ in a name is a $
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.titlecolor": INK,
    "axes.titlesize": NORMAL,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "recycler",
}


def require() -> None:
    """Raises UsageError where matplotlib is missing; to be called before the work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "Pictures need a package.", "", "Run: pip install 'recycler[pictures]'", code="E_MISSING_EXTRA"
        ) from None


@contextmanager
def drawing() -> Iterator[None]:
    """The pictures' style, in a ``with`` block. Raises: as `require`."""
    require()
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the box that stands for it says so
        yield


def figure(width: float, height: float) -> Figure:
    """A blank one that can measure its own text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), facecolor="none")
    FigureCanvasAgg(made)
    return made


def axes(made: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """A place in the figure, in inches from its upper left corner. Labels may stand outside: files are cut to what is drawn."""
    wide, high = made.get_size_inches()
    place: Axes = made.add_axes((left / wide, 1 - (top + height) / high, width / wide, height / high), facecolor="none")
    return place


def short(name: str, limit: int = 28) -> str:
    """A name as a label. A long one loses its middle: adapters of one maker begin alike, and end differently."""
    shown = printable(name, 200)
    return shown if len(shown) <= limit else f"{shown[: limit // 2]}…{shown[limit // 2 + 1 - limit :]}"


def width_of(names: Sequence[str], size: float = NORMAL) -> float:
    """Inches that the longest of some labels takes, roughly."""
    return max((len(short(name)) for name in names), default=0) * size * 0.62 / 72


def thinned(count: int, room: float, size: float = SMALL) -> int:
    """Every how many-th label may be shown, for `count` of them side by side in `room` inches."""
    return max(math.ceil(count * size * _LINE / 72 / room), 1) if count else 1


def upright(names: Sequence[str]) -> bool:
    """Whether names across the top have to stand on end."""
    return any(len(name) > 3 for name in names)


def label_axis(place: Axes, which: str, names: Sequence[str], room: float) -> int:
    """Names along an axis whose cells have the centres 0, 1, ...: as many as fit. Returns every how many-th is shown."""
    axis = place.xaxis if which == "x" else place.yaxis
    size = NORMAL if thinned(len(names), room, NORMAL) == 1 else SMALL
    step = thinned(len(names), room, size)
    axis.set_ticks(range(0, len(names), step), [short(name) for name in names[::step]])
    axis.set_tick_params(length=0, labelsize=size, labelcolor=INK)
    if which == "x" and upright(names):
        axis.set_tick_params(rotation=90)
    return step


# -- files


def as_csv(rows: Sequence[Sequence[Cell]]) -> str:
    """A table as CSV: a header, then rows; numbers to nine digits, None as nothing."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in rows:
        writer.writerow(["" if cell is None else f"{cell:.9g}" if isinstance(cell, float) else cell for cell in row])
    return out.getvalue()


def csv_link(rows: Sequence[Sequence[Cell]]) -> str:
    """A table as CSV, as the address of a link in a page that loads nothing."""
    return "data:text/csv;charset=utf-8," + quote(as_csv(rows).encode("utf8", "replace"))


def check_out(out: str | Path, force: bool = False) -> tuple[Path, Path]:
    """(the picture's file, its CSV's), before any work is done for them.

    Raises:
        UsageError: the ending is no picture's, one of the two exists, or matplotlib is missing. OSError: as `check_free`.
    """
    require()
    path = Path(out).expanduser()
    if path.suffix.lower() not in FORMATS:
        raise UsageError(
            f"{path} is no {' and no '.join(FORMATS)} file.", "The ending says what to draw.", "Use --out picture.png"
        )
    beside = path.with_suffix(".csv")
    check_free(path, force)
    check_free(beside, force, why="The numbers of the picture go there. ")
    return path, beside


def check_free(path: Path, force: bool = False, *, option: str = "--out", why: str = "") -> None:
    """Whether a file may be written, before any work is done for it.

    Args:
        option: that chose it. why: it is written at all.

    Raises:
        UsageError: it is a folder, or it exists and not `force`. OSError: its folder cannot be written.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder.", "", f"Choose a file for {option}.")
    if path.exists() and not force:
        raise UsageError(
            f"{path} exists.",
            f"{why}Nothing is overwritten unless asked.",
            f"Choose another {option}, or add --force.",
            code="E_EXISTS",
        )
    require_writable(path.parent)


def keep(made: Figure, rows: Sequence[Sequence[Cell]], out: str | Path, *, force: bool = False) -> tuple[Path, Path]:
    """Writes a picture, and the CSV behind it beside it: (picture, CSV).

    Raises:
        UsageError: as `check_out`.
    """
    path, beside = check_out(out, force)
    content = rendered(made, path.suffix.lower())
    write_bytes(beside, as_csv(rows).encode("utf8", "replace"))
    write_bytes(path, content)
    return path, beside


def write_bytes(path: Path, content: bytes) -> None:
    """All of a file, or nothing; its folder is made where there is none."""
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def rendered(made: Figure, kind: str = ".png", *, clear: bool = False) -> bytes:
    """A picture's file, the same for the same picture.

    Args:
        kind: ".png" or ".svg". clear: leaves out the paper.
    """
    stream = io.BytesIO()
    known = {"Date": None, "Creator": "recycler"} if kind == ".svg" else {"Software": "recycler"}
    with drawing():
        made.savefig(
            stream, format=kind[1:], dpi=170, bbox_inches="tight", pad_inches=0.08,
            facecolor="none" if clear else PAPER, edgecolor="none", metadata=known,
        )  # fmt: skip
    if kind == ".png":
        return stream.getvalue()
    return stream.getvalue().replace(b"'DejaVu Sans'", b"'DejaVu Sans', Verdana, sans-serif")  # not everybody has it


def inline(made: Figure, name: str, alt: str) -> str:
    """A picture as SVG for a page: its colours are the page's variables (`VARIABLES`), its text is the page's, its ids begin with
    `name`.

    Args:
        alt: what it shows, in words.
    """
    from xml.etree import ElementTree

    root = ElementTree.fromstring(rendered(made, ".svg", clear=True))
    width, height = root.attrib["viewBox"].split()[2:]
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):  # its rules would be the whole page's
                parent.remove(child)
    used = {found for one in root.iter() for value in one.attrib.values() for found in _REFERENCE.findall(value)}
    for one in root.iter():
        one.tag = _local(one.tag)
        held = {_local(key): _REFERENCE.sub(rf"{name}-\g<0>", value) for key, value in one.attrib.items()}
        if held.get("id") in used:
            held["id"] = f"{name}-{held['id']}"
        else:
            held.pop("id", None)
        for key in {"style", "fill", "stroke"} & held.keys():
            held[key] = _FONT.sub("", held[key])
            for colour, variable in VARIABLES.items():
                held[key] = re.sub(colour, f"var({variable})", held[key], flags=re.I)
        one.attrib.clear()
        one.attrib.update(held)
    wide = float(width)
    root.attrib.clear()
    root.attrib |= {
        "role": "img",
        "aria-label": alt,
        "viewBox": f"0 0 {width} {height}",
        "style": f"width: {wide * 4 / 3:.0f}px; min-width: {wide * _READABLE:.0f}px; stroke-linejoin: round",
    }
    return ElementTree.tostring(root, encoding="unicode").strip()


_READABLE = 1.25  # pixels a point, below which a page lets a picture scroll: small text is 10 pixels high then
_REFERENCE = re.compile(r"(?<=#)[\w-]+(?=\))|(?<=^#)[\w-]+$")
_FONT = re.compile(r"font-family: [^;]*;? ?")


def _local(tag: str) -> str:
    """A name without its namespace."""
    return tag.rpartition("}")[2]
