"""Tokens drawn: as a picture with its CSV, and in terminals with sixteen colours or none."""

from __future__ import annotations

import io
import math
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from conftest import Pico
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from rich.color import Color, ColorSystem
from rich.console import Console
from test_pictures import linear, parsed, recycle, same
from test_strips import EVIL, contrast, drawn
from way import PROMPTS, Way

import recycler
from recycler.pictures import canvas, cost, tasks, tokens
from recycler.pictures.results import Contender, Mean, Results
from recycler.pictures.tasks import TaskScores
from recycler.seeing.explaining import explain
from recycler.seeing.strips import (
    COLOURS,
    DARK,
    FEW,
    OTHER,
    OTHER_DARK,
    direction,
    legend_text,
    slots,
    strip_html,
    strip_text,
    visible,
)

written = st.lists(st.text(st.characters(codec="utf8"), max_size=30) | st.sampled_from(["\n", "\n\n", "x" * 300, "日本" * 99, "\t"]), min_size=2, max_size=12)  # fmt: skip


@given(written)
def test_lines_of_a_picture_are_the_text(texts: list[str]) -> None:
    """Nothing is lost, nothing is drawn over something else, and no line is wider than the picture."""
    one = replace(drawn([[1.0]] * len(texts)), tokens=tuple(texts))
    found = tokens.lines(one, 0, len(texts))
    shown = "".join(text for row in found for _, _, text in row)
    assert shown == "".join(visible(text) for text in texts).replace("\n", "")
    assert [number for row in found for number, _, _ in row] == sorted(number for row in found for number, _, _ in row)
    for row in found:
        at = 0
        for _, cell, text in row:
            assert cell == at
            at += max(tokens.cells(text), 1)
        assert at <= tokens._COLUMNS + 1


def test_a_picture_of_tokens_opens(tmp_path: Path) -> None:
    """Every token's text is text in the SVG; strangers' markup stays text; the same twice."""
    one = drawn([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5], [0.2, 0.8]], [EVIL, "$x$ 日本\n", "<|end|>", "\t"], adapters=("</svg>", "b"),
                without={"</svg>": torch.tensor([-1.0]), "b": torch.tensor([-0.75])})  # fmt: skip
    picture, beside = canvas.keep(tokens.draw(one), tokens.table(one), tmp_path / "a.svg")
    root = ElementTree.parse(picture).getroot()
    shown = "".join("".join(part.itertext()) for part in root.iter() if part.tag.endswith("}text"))
    assert "<|end|>" in shown and "$x$ 日本↵" in shown and "</svg>" in shown and "<img" in shown and "\u202e" not in shown
    assert not any(part.tag.endswith(("}script", "}img")) for part in root.iter())
    assert canvas.rendered(tokens.draw(one), ".svg") == picture.read_bytes()
    assert canvas.rendered(tokens.draw(one), ".png")[:4] == b"\x89PNG"
    rows = parsed(beside.read_text(encoding="utf8"))
    assert [row[1] for row in rows[1:]] == list(one.tokens) and tokens.describe(one).startswith("Strip of 4 tokens")


def test_the_csv_of_tokens_is_the_data(way: Way) -> None:
    one = explain(recycler.load(way.folder), PROMPTS[0], max_new_tokens=4)
    head, *rows = parsed(canvas.as_csv(tokens.table(one)))
    assert len(rows) == len(one.tokens) and head[8:] == [f"{what} of {n}" for what in ("share", "effect") for n in one.fired]
    for i, row in enumerate(rows):
        told = dict(zip(head, row, strict=True))
        assert told["token"] == one.tokens[i] and told["adapter"] == (one.owner(i) or "")
        assert float(told["share of others"]) == 0 and same(told["share of the base"], one.base_share(i))
        a = i - one.begins
        scores = [float(one.routed_A[a]), float(one.base_A[a])] if a >= 0 else []
        assert [float(told[key]) for key in ("log p", "log p of the base") if told[key]] == pytest.approx(scores)
        for name in one.fired:
            assert same(told[f"share of {name}"], float(one.share_TE[i, one.adapters.index(name)]))
            if i >= one.begins:
                assert same(told[f"effect of {name}"], float(one.effect_A(name)[i - one.begins]))
            else:
                assert told[f"effect of {name}"] == told["log p"] == ""


def test_a_long_prompt_leaves_the_answer_in_the_picture() -> None:
    one = replace(drawn([[1.0]] * 3001), tokens=("word " * 3,) * 3000 + ("ANSWER",))
    made = tokens.draw(one)
    texts = [text.get_text() for text in made.axes[0].texts]
    assert "ANSWER" in texts and made.get_size_inches()[1] < 20 and any("the CSV has all" in text for text in texts)
    assert len(tokens.table(one)) == 3002


def test_the_command_draws_what_explain_says(way: Way, tmp_path: Path) -> None:
    out = tmp_path / "t.svg"
    done = recycle("plot", "tokens", way.folder, "-p", PROMPTS[0], "--answer", " ok", "--out", out)
    assert done.exit_code == 0 and done.stdout == f"{out}\n", done.output
    one = explain(recycler.load(way.folder), PROMPTS[0], " ok")
    assert parsed(out.with_suffix(".csv").read_text("utf8")) == parsed(canvas.as_csv(tokens.table(one)))
    for args, message in (
        (["-p", " "], "it is empty"), (["-p", "a \udcff"], "cannot be used"), (["-p", "a", "--answer", "\udcff"], "cannot be used"),
        (["-p", "a", "--out", tmp_path / "t.gif"], "--out picture.png"), (["-p", "a"], "exists"),
    ):  # fmt: skip
        refused = recycle("plot", "tokens", way.folder, "--out", out, *args)
        assert refused.exit_code == 2 and message in " ".join(refused.stderr.split()), refused.output


def test_bytes_that_are_no_text_are_said(way: Way, tmp_path: Path) -> None:
    for args in (["explain", way.folder], ["plot", "routing", way.folder, "--out", tmp_path / "x.png"],
                 ["report", way.folder, "--out", tmp_path / "x.html"]):  # fmt: skip
        refused = recycle(*args, "-p", "a \udcff")
        assert refused.exit_code == 2 and "cannot be used" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_pages_and_pictures_go_where_they_can(way: Way, tmp_path: Path) -> None:
    """Asked before the work; folders are made."""
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf8")
    for args in (["explain", way.folder, "-p", "a", "--html", file / "x.html"], ["report", way.folder, "--out", file / "x.html"],
                 ["plot", "tokens", way.folder, "-p", "a", "--out", file / "x.png"]):  # fmt: skip
        refused = recycle(*args)
        assert refused.exit_code != 0 and "Traceback" not in refused.output and "file" in refused.stderr
    out = tmp_path / "new" / "er" / "x.html"
    assert recycle("explain", way.folder, "-p", "a", "--max-new-tokens", 2, "--html", out).exit_code == 0
    assert [path.name for path in out.parent.iterdir()] == ["x.html"]


# ------------------------------------------------------------------------------------------------------------------- terminals


def printed(text: Any, system: ColorSystem) -> str:
    stream = io.StringIO()
    name: Any = {ColorSystem.STANDARD: "standard", ColorSystem.EIGHT_BIT: "256", ColorSystem.TRUECOLOR: "truecolor"}[system]
    Console(file=stream, force_terminal=True, color_system=name, width=200, legacy_windows=False).print(text)
    return stream.getvalue()


def test_sixteen_colours_are_told_apart() -> None:
    """Every adapter with a colour has one of its own there, and the others' is nobody's."""
    count = len(COLOURS) + 1
    one = drawn(torch.eye(count).tolist(), list("abcdefgh"))
    colours = slots([one])
    for system, few in ((ColorSystem.STANDARD, True), (ColorSystem.EIGHT_BIT, False), (ColorSystem.TRUECOLOR, False)):
        raw = printed(strip_text(one, colours, few=few), system)
        grounds = re.findall(r"\x1b\[30;([\d;]+)m", raw)
        assert len(grounds) == count == len(set(grounds)), system
        assert set(grounds) == set(re.findall(r"\x1b\[([\d;]+)m {3}", printed(legend_text(one, colours, few=few), system)))
    assert len({Color.parse(name).number for name in FEW}) == len(FEW) == count


def test_a_legend_says_whose_colour_it_is() -> None:
    """In pages, terminals and pictures, a token has the colour beside which its adapter's name stands."""
    names = tuple("abcdef")
    one = drawn([[float(e == other) for e in range(6)] for other in (3, 1, 3, 5, 0)], list("tuvwx"))
    colours = {name: 5 - number for number, name in enumerate(names)}
    html = strip_html(one, colours)
    whose = dict(re.findall(r'<li><i class="(strip-c\d)"></i>([a-f])</li>', html))
    assert [whose[found] for found in re.findall(r'class="strip-t (strip-c\d)"', html)] == list("dbdfa")

    raw = printed(legend_text(one, colours), ColorSystem.TRUECOLOR)
    named = {ground: name for ground, name in re.findall(r"\x1b\[([\d;]+)m {3}\x1b\[0m ([a-f]) ", raw)}
    shown = re.findall(r"\x1b\[30;([\d;]+)m", printed(strip_text(one, colours), ColorSystem.TRUECOLOR))
    assert [named[ground] for ground in shown] == list("dbdfa")

    place = tokens.draw(one).axes[0]
    solid = [patch for patch in place.patches if patch.get_alpha() is not None]
    keys = {to_hex(patch.get_facecolor()): patch for patch in solid[:4]}  # the legend comes first
    beside = {text.get_text(): text for text in place.texts}
    for colour, patch in keys.items():
        [name] = [name for name, text in beside.items() if name in names and _near(text, patch)]
        under = [text.get_text() for text in place.texts for other in solid[4:] if to_hex(other.get_facecolor()) == colour
                 and abs(text.get_position()[0] - other.get_x()) < 0.01 and 0 < text.get_position()[1] - other.get_y() < 0.3]  # fmt: skip
        assert [one.owner(one.tokens.index(token)) for token in under] == [name] * len(under) and under, name


def _near(text: Any, patch: Any) -> bool:
    x, y = text.get_position()
    return 0.2 < x - patch.get_x() < 0.3 and abs(y - patch.get_y()) < 0.15


@pytest.fixture(scope="module")
def folder(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A composed model."""
    zoo, out = recycler.Zoo(llama.zoo), tmp_path_factory.mktemp("tokens") / "model"
    recycler.compose(zoo, recycler.build_router("arrow", zoo=zoo), out).engine.detach()
    return out


@pytest.mark.parametrize("env, strip", [({"TERM": "xterm-256color"}, True), ({"TERM": "xterm-256color", "NO_COLOR": "1"}, False),
                                         ({"TERM": "dumb"}, False)], ids=str)  # fmt: skip
def test_without_colours_a_strip_would_say_nothing(folder: Path, env: dict[str, str], strip: bool) -> None:
    """Then the tokens come as a table, as they do in a pipe."""
    master, slave = pty.openpty()
    args = [
        sys.executable,
        "-c",
        "from recycler.cli import main; main()",
        "explain",
        str(folder),
        "-p",
        "Add 1.",
        "--answer",
        " b",
    ]
    given = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLORTERM")}
    ran = subprocess.Popen(args, stdout=slave, stderr=subprocess.DEVNULL, env={**given, "COLUMNS": "120", **env})
    os.close(slave)
    said = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        if not part:
            break
        said += part
    assert ran.wait() == 0
    os.close(master)
    shown = said.decode()
    assert ("no colour: the base" in shown) == strip and ("log p of the base" in shown) != strip
    assert "effect" in shown and ("\x1b[30;48" in shown) == strip


# --------------------------------------------------------------------------------------------------------------------- colours


def test_colours_are_told_apart_with_any_vision() -> None:
    """Each from each, and from the grey of the others, under Machado et al. (2009), severity 1, in OKLab."""
    eyes = {
        "all": torch.eye(3).tolist(),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    for palette in ((*COLOURS, OTHER), (*DARK, OTHER_DARK)):
        for eye in eyes.values():
            seen = [oklab((torch.tensor(eye) @ linear(colour)).clamp(0, 1)) for colour in palette]
            apart = [float((a - b).norm()) for i, a in enumerate(seen) for b in seen[:i]]
            assert min(apart) > 0.07  # a just noticeable difference is about 0.02


def oklab(rgb: torch.Tensor) -> torch.Tensor:
    """Björn Ottosson (2020)."""
    first = torch.tensor([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                          [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
    second = torch.tensor([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                           [0.0259040371, 0.7827717662, -0.8086757660]])  # fmt: skip
    return second @ (first @ rgb).pow(1 / 3)


def test_ink_on_a_picture_s_tokens_can_be_read() -> None:
    for colour in (*COLOURS, OTHER):
        parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        ground = "#" + "".join(f"{round(tokens._STRENGTH * part + (1 - tokens._STRENGTH) * 255):02x}" for part in parts)
        assert contrast(canvas.INK, ground) >= 4.5, colour


def test_the_direction_of_writing() -> None:
    assert [direction(texts) for texts in (["1 + ", "a"], ["«", "مرحبا", "a"], ["12", "שלום"], [], ["日"], ["🤖", "a"])] == [
        "ltr", "rtl", "rtl", "ltr", "ltr", "ltr",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------- labels


@given(st.text(st.characters(codec="utf8"), max_size=60), st.integers(8, 40))
def test_a_label_keeps_both_ends(name: str, limit: int) -> None:
    shown = canvas.short(name, limit)
    full = canvas.short(name, 1000)
    assert len(shown) <= limit and (shown == full if len(full) <= limit else full.startswith(shown.split("…")[0]))
    if len(full) > limit:
        assert full.endswith(shown[limit // 2 + 1 :]) and len(shown) == limit


def test_a_name_is_never_on_another_s_point() -> None:
    """Points beside each other, as of `average` and `uniform`, which do the same."""

    def contender(name: str, kind: str, exact: float, times: float) -> Contender:
        return Contender(name, kind, {"g": Mean(exact, exact - 0.05, exact + 0.05, 1.0)}, {"g": {"t": exact}}, times, 0, 10)

    near = [contender("uniform", "baseline", 0.1, 1.44), contender("average", "static", 0.1, 1.46),
            contender("single", "baseline", 0.15, 1.31), contender("base", "baseline", 0.0, 1.0),
            contender("ridge", "token", 0.6, 2.5), contender("mean", "static", 0.1, 1.45)]  # fmt: skip
    made = cost.draw(Results(tuple(near), ("g",), {"g": {"t": 4}}, ("Use it.",), True))
    place, renderer = made.axes[1], made.canvas.get_renderer()  # type: ignore[attr-defined]
    dots = {one.name: place.transData.transform((one.times or 0, one.means["g"].exact)) for one in near}
    boxes = {text.get_text(): text.get_window_extent(renderer) for text in place.texts if text.get_text()}
    assert set(boxes) == set(dots)
    for name, box in boxes.items():
        x, y = dots[name]
        end = (box.x0 if x < box.x0 + 1 else box.x1, (box.y0 + box.y1) / 2)
        beside = abs(end[1] - y) < box.height / 3  # else a line leads from the name to its point
        assert min(dots, key=lambda other: math.dist(end, dots[other])) == name or not beside, name


def test_of_hundreds_those_that_matter_are_drawn() -> None:
    count = 300
    values = [[5.0 + (e % 7) / 10 for _ in range(20)] for e in range(count)]
    values[299] = [5.1] * 19 + [4.0]
    values[123] = [1.0] * 20
    names = tuple(f"a{e:03d}" for e in range(count))
    data = TaskScores("nll", names, tuple(f"t{j}" for j in range(20)), values, [5.2] * 20, {"t3": "a299"})
    shown = data.shown()
    assert len(shown) == len(set(shown)) == 60 and {299, 123} <= set(shown)
    assert shown == [e for e in data.order() if e in set(shown)] and len(tasks.table(data)) == 302
    few = TaskScores("nll", names[:9], ("t",), [[1.0]] * 9, [2.0], {})
    assert few.shown() == few.order()
    assert any("60 of 300" in text.get_text() for text in tasks.draw(data).axes[-1].texts)


def test_encoder_decoder_tokens(t5: Pico) -> None:
    zoo = recycler.Zoo(t5.zoo)
    made = recycler.compose(zoo, recycler.build_router("arrow", zoo=zoo))
    one = explain(made, PROMPTS[0], " ok")
    assert [row[0] for row in tokens.table(one)[1:]] == ["prompt"] * one.begins + ["answer"] * (len(one.tokens) - one.begins)
    assert len(canvas.rendered(tokens.draw(one))) > 5000
