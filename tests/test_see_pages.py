"""Pages for everybody: by keyboard, on paper, on a phone, read aloud, from right to left, and of long prompts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from test_pictures import made, parsed
from test_report import HOSTILE, Made, ratio, report  # noqa: F401  (a fixture)
from test_strips import drawn

import recycler
from recycler.pictures import canvas, tokens
from recycler.pictures.tasks import TaskScores
from recycler.seeing.explain_page import write_page
from recycler.seeing.report_page import page
from recycler.seeing.reporting import Origin, Report

PHONE = {"viewport": {"width": 390, "height": 664}}
_RING = """() => {
  const one = document.activeElement, style = getComputedStyle(one), box = one.getBoundingClientRect();
  const panel = [...document.querySelectorAll(".strip-d")].find((d) => getComputedStyle(d).display !== "none");
  const rgb = (text) => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
  return {tag: one.tagName, width: parseFloat(style.outlineWidth), line: style.outlineStyle, ring: rgb(style.outlineColor),
          paper: rgb(getComputedStyle(document.body).backgroundColor), top: box.top, bottom: box.bottom, left: box.left,
          under: panel ? panel.getBoundingClientRect().top : innerHeight};
}"""


@pytest.fixture(scope="module")
def why(report: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A page of `recycle explain`."""
    model = recycler.load(report.way.folder)
    found = [recycler.explain(model, prompt, max_new_tokens=4) for prompt in ("Add 1 and b.", HOSTILE)]
    return write_page(found, tmp_path_factory.mktemp("why") / "why.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["report", "why"])
def test_the_focus_is_seen_wherever_it_goes(report: Made, why: Path, visit: Any, scheme: str, which: str) -> None:  # noqa: F811
    """Every stop of the tab key has a ring that stands out (WCAG 2.4.7, 1.4.11) and is not under the panel of numbers (2.4.11)."""
    tab = visit(report.page if which == "report" else why, color_scheme=scheme, reduced_motion="reduce", **PHONE)
    tags: list[str] = []
    for _ in range(80):
        tab.keyboard.press("Tab")
        found = tab.evaluate(_RING)
        if found["tag"] == "BODY":
            break
        tags.append(found["tag"])
        assert found["line"] != "none" and found["width"] >= 2 and ratio(found["ring"], found["paper"]) >= 3, found
        if found["tag"] == "SPAN":  # a token; and at the end of its strip
            tab.keyboard.press("End")
            found = tab.evaluate(_RING)
            assert found["bottom"] <= found["under"] and found["top"] >= 0, found
    else:
        raise AssertionError("the tab key goes on and on")
    wanted = {"A", "DIV", "SUMMARY", "SPAN"} | ({"SELECT", "SUMMARY"} if which == "report" else set())
    assert wanted <= set(tags) and tags.count("SPAN") == (1 if which == "report" else 2)  # a strip is one stop


def test_it_is_read_aloud(report: Made, why: Path, visit: Any) -> None:  # noqa: F811
    """Pictures have words, tables have headers, tokens say whose they are."""
    said = visit(report.page).locator("main").aria_snapshot()
    for name in (
        "Exact match with intervals",
        "Scatter plots of exact match",
        "Heat map of 4 adapters on 4 tasks",
        "Dendrogram and",
    ):
        assert re.search(rf'img "{name}', said), name
    assert re.search(r'columnheader "contender"', said) and re.search(r'rowheader "ridge', said)
    assert re.search(r'combobox "Example"', said) and re.search(r'listbox "Tokens', said)
    assert any("%" in told for told in re.findall(r'option "[^"]*"', said))
    assert re.search(r'link "Tokens as CSV"', said)
    explained = visit(why).locator("main").aria_snapshot()
    assert explained.count("listbox") == 2 and re.search(r'rowheader "(code|math|law|poem)"', explained)


@pytest.mark.parametrize("which", ["report", "why"])
def test_on_paper_nothing_is_cut(report: Made, why: Path, visit: Any, which: str) -> None:  # noqa: F811
    tab = visit(report.page if which == "report" else why, viewport={"width": 718, "height": 1000})  # A4 less its margins
    tab.locator(".strip-t").first.focus()
    tab.emulate_media(media="print")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 718
    shown = "[...document.querySelectorAll('.strip-d, .skip, nav')].some((e) => e.checkVisibility())"
    assert not tab.evaluate(shown)
    boxes = "[...document.querySelectorAll('.wide')].filter((b) => b.scrollWidth > b.clientWidth + 1 || b.scrollHeight > b.clientHeight + 1).length"  # fmt: skip
    assert tab.evaluate(boxes) == 0
    kept = tab.evaluate("getComputedStyle(document.querySelector('.strip-t')).printColorAdjust")
    assert kept == "exact"


def test_small_text_is_not_too_small_on_a_phone(report: Made, visit: Any) -> None:  # noqa: F811
    """Pictures scroll in their boxes rather than shrink."""
    tab = visit(report.page, **PHONE)
    sizes = tab.evaluate(
        "[...document.querySelectorAll('svg')].map((s) => Math.min(...[...s.querySelectorAll('text')].map("
        "(t) => parseFloat(getComputedStyle(t).fontSize))) * s.getBoundingClientRect().width / s.viewBox.baseVal.width)"
    )
    assert len(sizes) == 5 and min(sizes) >= 9.9
    assert tab.evaluate("document.documentElement.scrollWidth") == 390


def test_tables_keep_their_heads(visit: Any, tmp_path: Path) -> None:
    """A long table scrolls in a box of its own, below its headers and beside its names."""
    names = tuple(f"adapter-{number:03d}" for number in range(300))
    scores = TaskScores("nll", names, tuple(f"task {j}" for j in range(50)), [[1.0] * 50] * 300, [2.0] * 50, {})
    origins = [Origin(name, f"org/{name}", None, "mit") for name in names]
    file = tmp_path / "large.html"
    file.write_text(page(Report("large", scores=scores, origins=origins, results=made(*names[:60]))), encoding="utf8")
    tab = visit(file, **PHONE)
    assert tab.evaluate("document.documentElement.scrollHeight") < 9000
    tab.locator("#tasks summary").click()
    box = tab.locator("#tasks .wide:has(> table)")
    box.evaluate("b => b.scrollTo(2000, 4000)")
    at = box.evaluate(
        "b => { const r = b.getBoundingClientRect(), h = b.querySelector('thead th').getBoundingClientRect();"
        " const n = document.elementFromPoint(r.left + 9, r.top + r.height / 2).closest('th');"
        " return [h.top - r.top, h.left - r.left, n && n.textContent]; }"
    )
    assert abs(at[0]) < 2 and abs(at[1]) < 2 and re.fullmatch(r"adapter-\d+", at[2])
    tab.emulate_media(media="print")  # where nobody scrolls
    high = tab.locator("#licences .wide").evaluate("b => [b.clientHeight, b.scrollHeight, getComputedStyle(b).overflowY]")
    assert high[0] == high[1] > 3000 and high[2] == "visible"


def test_from_right_to_left(visit: Any, tmp_path: Path) -> None:
    """The part's own letters decide; arrows go where they point."""
    words = ["مر", "حبا", " ", "بال", "عالم", "ok"]
    one = drawn([[0.9, 0.1]] * len(words), words)
    tab = visit(write_page([one], tmp_path / "rtl.html"))
    parts = tab.evaluate("[...document.querySelectorAll('.strip-part')].map((p) => getComputedStyle(p).direction)")
    assert parts == ["rtl", "ltr"]
    lefts = tab.evaluate("[...document.querySelectorAll('.strip-t')].map((t) => t.getBoundingClientRect().left)")
    assert lefts[0] > lefts[1] > lefts[4]
    tab.keyboard.press("Tab")
    tab.keyboard.press("Tab") if tab.evaluate("document.activeElement.tagName") != "SPAN" else None
    told = "document.activeElement.firstChild.textContent"
    assert tab.evaluate(told) == "مر"
    tab.keyboard.press("ArrowLeft")
    assert tab.evaluate(told) == "حبا"
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate(told) == "مر"
    assert tab.evaluate("getComputedStyle(document.querySelector('.strip-t:focus .strip-d')).direction") == "ltr"


def test_a_long_prompt(visit: Any, tmp_path: Path) -> None:
    """Two thousand tokens of forty adapters: small enough to mail, and still one stop of the tab key."""
    count, names = 2000, tuple(f"adapter-{number}" for number in range(40))
    shares = torch.rand(count, 40, generator=torch.manual_seed(0)).mul(9).softmax(-1)
    one = replace(
        drawn([[1.0]] * 2), adapters=names, tokens=tuple(f"w{i} " if i % 90 else "\n" for i in range(count)), special=(False,) * count,
        begins=count - 1, share_TE=shares, share_LE=torch.rand(30, 40), layers=tuple(map(str, range(30))),
        without={name: torch.tensor([-1.0]) for name in names},
    )  # fmt: skip
    file = write_page([one], tmp_path / "long.html")
    assert file.stat().st_size < 3e6
    tab = visit(file, **PHONE)
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    tab.keyboard.press("Tab")
    tab.keyboard.press("End")
    assert "log p" in tab.locator(".strip-t:focus .strip-d").inner_text()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.download") == "tokens-1.csv"
    link = tab.locator("a[download]")
    with tab.expect_download() as download:
        link.click()
    held = Path(download.value.path()).read_text(encoding="utf8")
    assert (
        parsed(held) == parsed(canvas.as_csv(tokens.table(one))) == parsed(unquote(link.get_attribute("href").split(",", 1)[1]))
    )


def test_the_policy_lets_no_other_script_run(report: Made, why: Path, browser: Any, tmp_path: Path) -> None:  # noqa: F811
    """What slipped through escaping would not run either."""
    for number, source in enumerate((report.page, why)):
        file = tmp_path / f"{number}.html"
        text = source.read_text(encoding="utf8")
        assert re.search(r"script-src (&#39;|')sha256-", text)
        file.write_text(
            text.replace("<main", "<script>window.hit = 1</script><b onclick='window.hit = 1'>x</b><main", 1), encoding="utf8"
        )
        tab = browser.new_page()
        tab.goto(file.as_uri())
        tab.locator("b", has_text="x").first.click()
        assert tab.evaluate("window.hit") is None
        tab.close()


def test_the_reference_stands_beside_the_answer(report: Made, visit: Any, tmp_path: Path) -> None:  # noqa: F811
    way = report.way
    out = recycler.report(way.folder, tmp_path / "r.html", profile=way.profile, max_new_tokens=2, zoo=way.zoo)
    tab = visit(out)
    shots = [shot for some in way.profile.shots.values() for shot in some]
    assert tab.locator(".said").count() == tab.locator(".example").count() > 1
    assert tab.locator(".said").first.inner_text() in {shot.completion.strip() for shot in shots}


def test_a_finger_is_enough(report: Made, visit: Any) -> None:  # noqa: F811
    """A touch shows a token's numbers; the next one, the next token's; one elsewhere, none."""
    tab = visit(report.page, has_touch=True, is_mobile=True, reduced_motion="reduce", **PHONE)
    panels = "[...document.querySelectorAll('.strip-d')].filter((d) => getComputedStyle(d).display !== 'none').map((d) => d.innerText)"
    tab.locator(".example:not([hidden]) .strip-t").nth(1).tap()
    [first] = tab.evaluate(panels)
    tab.locator(".example:not([hidden]) .strip-t").last.tap()
    [last] = tab.evaluate(panels)
    assert first != last and "log p" in last
    tab.locator("#examples-title").tap()
    assert tab.evaluate(panels) == []
