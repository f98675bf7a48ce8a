"""The site as a reader has it, opened from disk: its links, its anchors, its search, on a desk and on a phone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest

import recycler
from recycler.zoo.error_codes import CATALOGUE

ROOT = Path(__file__).parent.parent
SECONDS = 120  # at most; it takes five


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=SECONDS)
    return folder


def pages(site: Path) -> list[Path]:
    """All but the one that is served for what is not there, whose links begin at a server's root."""
    return [page for page in sorted(site.rglob("*.html")) if page.name != "404.html"]


def anchors(page: Path) -> set[str]:
    return set(re.findall(r'\sid="?([^"\s>]+)', page.read_text(encoding="utf8")))


def path(name: str) -> str:
    """Of a name of the front page: where it is defined."""
    public = getattr(recycler, name)
    return f"{public.__module__}.{public.__qualname__}"


def test_every_link_leads_somewhere(site: Path) -> None:
    known = {page: anchors(page) for page in pages(site)}
    count = 0
    for page in known:
        for link in re.findall(r'<a\s[^>]*href="([^"]*)"', page.read_text(encoding="utf8")):
            file, _, anchor = unescape(link).partition("#")
            if re.match(r"[a-z]+:", file):
                continue
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or target not in known or anchor in known[target], f"{page.name}: {link}"
            count += 1
    assert count > 500


def test_errors_and_names_have_their_place(site: Path) -> None:
    assert {entry.docs for entry in CATALOGUE.values()} == {f"docs/errors.md#{code.lower()}" for code in CATALOGUE}
    assert {code.lower() for code in CATALOGUE} <= anchors(site / "errors.html")
    named = anchors(site / "api.html")
    assert {path(name) for name in recycler.__all__} <= named
    assert {
        f"recycler.routed.RoutedModel.{name}" for name in ("generate", "weights_for", "only", "mixture", "disabled")
    } <= named


def test_each_name_says_what_it_may_raise(site: Path) -> None:
    """Functions of the front page list their parameters, and those that refuse something what they raise."""
    text = (site / "api.html").read_text(encoding="utf8")
    parts = re.split(r'<h3 id="(recycler\.[\w.]+)"', text)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    for name in recycler.__all__:
        if name[0].islower():
            section = sections[path(name)]
            assert "Raises:" in section, name
            assert "Parameters:" in section or name == "load_router", name


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_pages_fit_and_nothing_fails(site: Path, browser: Any, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab, wrong = context.new_page(), []
    tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda request: wrong.append(request.url) if not re.match(r"file:|data:|blob:", request.url) else None)
    for page in pages(site):
        tab.goto(page.as_uri())
        wide = tab.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0 and wrong == [], (page.name, wide, wrong)
    context.close()


def test_search_works_from_disk(site: Path, browser: Any) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    tab.goto((site / "methods" / "ridge.html").as_uri())
    box = tab.locator("input.md-search__input")
    box.click()
    for word, page in (("E_PICKLE", "errors.html"), ("doctor", "help.html"), ("PHATGOOSE", "methods/phatgoose.html")):
        box.fill("")
        box.press_sequentially(word, delay=20)
        tab.wait_for_function(
            "page => [...document.querySelectorAll('.md-search-result__link')].some(link => link.href.includes(page))", arg=page
        )
    context.close()
