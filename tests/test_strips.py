"""Strips as people see them: whose colour a token has, that nothing of strangers gets through, and the page in a browser."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico
from way import PROMPTS

import recycler
from recycler.seeing.explain_page import page, write_page
from recycler.seeing.explaining import LEAD, Explanation, explain
from recycler.seeing.strips import (
    COLOURS,
    DARK,
    OTHER,
    OTHER_DARK,
    details,
    legend_text,
    slots,
    strip_css,
    strip_html,
    strip_js,
    strip_text,
    visible,
)
from recycler.zoo.errors import UsageError

EVIL = '<img src=x onerror=alert(1)>"&\u202e'


def drawn(share_TE: list[list[float]], tokens: list[str] | None = None, **changes: Any) -> Explanation:
    """An explanation with given shares; the last token is the answer."""
    count, adapters = len(share_TE), len(share_TE[0])
    names = tuple("abcdefghijkl"[:adapters])
    one = Explanation(
        prompt="p", answer="w", method="arrow", adapters=names, tokens=tuple(tokens or "tuvwxyz"[:count]), special=(False,) * count,
        begins=count - 1, layers=("0",), share_TE=torch.tensor(share_TE), share_LE=torch.tensor(share_TE).mean(0)[None],
        share_LTE=torch.tensor(share_TE)[None], routed_A=torch.tensor([-0.5]), base_A=torch.tensor([-2.0]),
        without={name: torch.tensor([-1.0 - number]) for number, name in enumerate(names)},
    )  # fmt: skip
    return replace(one, **changes)


def test_whose_a_token_is() -> None:
    one = drawn([[0.9, 0.1], [0.5, 0.5], [0.5 + 0.6 * LEAD, 0.5 - 0.6 * LEAD], [0.3, 0.1], [-0.8, 0.2], [0.0, 0.0]])
    # Somebody's; nobody's lead; just enough of one; the base's; what is subtracted leaves the more to the base; nobody at all.
    assert [one.owner(i) for i in range(6)] == ["a", None, "a", None, None, None]
    assert drawn([[-0.8, 1.8]]).owner(0) == "b" and drawn([[1.0]]).owner(0) == "a"
    assert one.base_share(3) == pytest.approx(0.6)


def test_colours_are_the_same_everywhere() -> None:
    one, other = drawn([[0.9, 0.1, 0], [0.9, 0.1, 0]]), drawn([[0, 0.2, 0.8], [0.0, 0.2, 0.8], [0.8, 0.2, 0]])
    found = slots([one, other])
    assert found == {"a": 0, "c": 1, "b": 2} == slots([other, one])
    eye = torch.eye(12).tolist()
    many = drawn(eye, list("abcdefghijkl"))
    found = slots([many])
    assert sorted(found.values()) == [*range(len(COLOURS)), *[len(COLOURS)] * (12 - len(COLOURS))]
    assert "5 others" in strip_html(many) and legend_text(many, found).plain.count("others") == 1


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def mixed(colour: str, paper: str, strength: float) -> str:
    pairs = ((int(colour[at : at + 2], 16), int(paper[at : at + 2], 16)) for at in (1, 3, 5))
    return "#" + "".join(f"{round(strength * a + (1 - strength) * b):02x}" for a, b in pairs)


def test_text_on_any_colour_can_be_read() -> None:
    """4.5 to 1 (WCAG AA), on the strongest tint, on light and dark pages and in terminals."""
    css = strip_css()
    themes = [re.sub(r"\s", "", block) for block in re.findall(r":root\{([^}]*)\}", css)]
    assert len(themes) == 2
    for block, colours in zip(themes, ((*COLOURS, OTHER), (*DARK, OTHER_DARK)), strict=True):
        told = dict(part.split(":") for part in block.split(";") if part)
        ink, paper, strength = told["--strip-ink"], told["--strip-paper"], float(told["--strip-strength"].rstrip("%")) / 100
        paper = "#ffffff" if paper == "#fff" else paper
        assert contrast(told["--strip-muted"], paper) >= 4.5
        assert min(contrast(ink, mixed(colour, paper, strength)) for colour in colours) >= 4.5
    count = len(COLOURS) + 1
    for e in range(count):
        row = [float(e == other) for other in range(count)]
        [span] = strip_text(drawn([[0.0] * count, row]), {name: n for n, name in enumerate("abcdefgh")}).spans[1:]
        ink, _, ground = str(span.style).partition(" on ")
        assert ink == "black" and contrast("#000000", ground) >= 4.5


def test_a_terminal_s_strip_is_the_text() -> None:
    one = drawn([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]], ["a\n", "[red]\x1b[31m", "\t"])
    text = strip_text(one)
    assert text.plain == "a↵\n[red]\\u001b[31m▸⇥"
    coloured = {text.plain[span.start : span.end] for span in text.spans if "on #" in str(span.style)}
    assert coloured == {"a↵", "⇥"}
    assert visible("") == "·" and visible("\u202e") == "\\u202e"


class Reader(HTMLParser):
    """Tags, and tokens as they are shown."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[str] = []
        self._depth: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        kind = (dict(attrs).get("class") or "").split()
        if tag == "span":
            self._depth.append(kind[0] if kind else "")
        if "strip-t" in kind:
            self.shown.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "span":
            self._depth.pop()

    def handle_data(self, data: str) -> None:
        if self._depth and self._depth[-1] == "strip-t":
            self.shown[-1] += data


def test_a_page_s_strip_is_the_text() -> None:
    one = drawn([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]], ["a\n", "<b>", "&amp;"], special=(False, False, True))
    read = Reader(strip_html(one))
    assert read.shown == ["a↵", "<b>", "&amp;"]
    tokens = [attributes for tag, attributes in read.tags if "strip-t" in (attributes.get("class") or "").split()]
    assert [token["class"] for token in tokens] == ["strip-t strip-c0", "strip-t", "strip-t strip-c1 strip-special"]
    assert all(token["tabindex"] == "0" and token["role"] == "option" for token in tokens)
    assert tokens[0]["aria-label"] == "a↵: a 90%; b 10%"
    assert (
        tokens[2]["aria-label"]
        == "&amp;: b 80%; a 20%; log p -0.50; log p of the base -2.00; effect of b +1.50; effect of a +0.50"
    )
    assert details(one, 2)[0] == ("b", "80%") and details(one, 1)[-1] == ("b", "50%")


def test_nothing_of_strangers_gets_through() -> None:
    without = {EVIL: torch.tensor([-1.0]), "b": torch.tensor([-0.5])}
    one = drawn([[0.9, 0.1], [0.2, 0.8]], [EVIL, EVIL], adapters=(EVIL, "b"), without=without, prompt=EVIL, answer=EVIL, method=EVIL,
                layers=(EVIL,), why={EVIL: EVIL})  # fmt: skip
    html = page([one], title=EVIL)
    read = Reader(html)
    assert not [tag for tag, _ in read.tags if tag == "img"]
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    assert "\u202e" not in html and "http://" not in html and "https://" not in html
    assert [tag for tag, _ in read.tags].count("script") == 1
    assert (
        "url(" not in strip_css()
        and "@import" not in strip_css()
        and "<" not in strip_css() + strip_js().replace("=>", "").replace("< 0", "")
    )


def test_pages_of_many_adapters_stay_short() -> None:
    count = 300
    names = tuple(f"adapter-{number}" for number in range(count))
    shares = torch.rand(40, count, generator=torch.manual_seed(0)).softmax(-1).tolist()
    one = drawn(shares, ["x"] * 40, adapters=names, share_LE=torch.rand(30, count),
                layers=tuple(map(str, range(30))), without={name: torch.tensor([-1.0]) for name in names})  # fmt: skip
    html = page([one])
    assert "and 276 more" in html and len(html) < 200_000
    assert all(len(details(one, i)) <= 12 for i in range(40))


def test_a_page_is_not_overwritten(tmp_path: Path) -> None:
    one, file = drawn([[1.0], [1.0]]), tmp_path / "page.html"
    assert write_page([one], file) == file
    with pytest.raises(UsageError, match="exists"):
        write_page([one], file)
    with pytest.raises(UsageError, match="folder"):
        write_page([one], tmp_path, force=True)
    write_page([one, one], file, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert file.read_text(encoding="utf8").count("<section>") == 2


# ---------------------------------------------------------------------------------------------------------------- a browser


@pytest.fixture(scope="module")
def file(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    zoo = recycler.Zoo(llama.zoo)
    model = recycler.compose(zoo, recycler.build_router("arrow", zoo=zoo))
    found = [explain(model, prompt, max_new_tokens=6) for prompt in (PROMPTS[0], f"{EVIL} " * 12)]
    return write_page(found, tmp_path_factory.mktemp("page") / "page.html")


@pytest.mark.parametrize("width, scheme", [(1100, "light"), (1100, "dark"), (360, "light")])
def test_the_page_in_a_browser(browser: Any, file: Path, width: int, scheme: str, tmp_path: Path) -> None:
    opened = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(file.as_uri())
    assert opened.evaluate("document.documentElement.scrollWidth") == width, "the page scrolls sideways"
    ground = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == (scheme == "dark")

    def shown() -> list[str]:
        script = "[...document.querySelectorAll('.strip-d')].filter((d) => getComputedStyle(d).display != 'none').map((d) => d.innerText)"
        found: list[str] = opened.evaluate(script)
        return found

    assert shown() == []
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.className").startswith("strip-t")
    [first] = shown()
    assert re.search(r"(code|math|law|poem)\s+\d+%", first)
    opened.keyboard.press("ArrowRight")
    [second] = shown()
    opened.keyboard.press("End")
    [last] = shown()
    assert first != second and "log p" in last and "effect of" in last and "log p" not in first
    box = opened.evaluate("(() => { const b = document.activeElement.querySelector('.strip-d').getBoundingClientRect();"
                          " return [b.left, b.right, b.bottom]; })()")  # fmt: skip
    assert box[0] >= 0 and box[1] <= width and box[2] <= 800
    opened.keyboard.press("Escape")
    assert shown() == []
    opened.locator(".strip-t").nth(2).hover()
    assert len(shown()) == 1
    picture = opened.screenshot(path=tmp_path / "page.png")
    assert len(picture) > 5000
    assert said == [] and {url for url in asked if not url.startswith("data:")} == {file.as_uri()}
    opened.close()
