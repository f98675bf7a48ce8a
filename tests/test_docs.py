"""The documentation runs: every block of every page, as it stands, in a checkout with a pico base. What needs the Hub, or somebody who
types, is parsed by the command's own options instead, and runs elsewhere (`ELSEWHERE`). What pages say of methods, options and
commands is made from the code when the site is built."""

from __future__ import annotations

import glob
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import checkout
import click
import pytest
import yaml
from click.testing import CliRunner

from recycler.cli import main
from recycler.routers.discovery import methods

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FIRST = "tour.md"  # its zoo, profile, gates and model are what the other pages go on with
KINDS_OF_CHANGE = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")  # as keepachangelog.com has them
WAITING = ("serve", "proxy", "chat")
SECONDS = 120  # at most, for a process of its own; it takes six

# Where what a page's marked blocks say is run: the cookbook word for word, the others' commands on pico models.
ELSEWHERE = {
    ("cookbook.md", "hub"): "test_learn_cookbook.py",
    ("adapters.md", "hub"): "test_extract.py",
    ("evaluating.md", "hub"): "test_lm_eval.py",
    ("sharing.md", "hub"): "test_push.py",
    ("sharing.md", "terminal"): "test_proxy.py",
    ("seeing.md", "terminal"): "test_chat.py",
    ("scaling-out.md", "terminal"): "test_ray.py",
}

sys.path.insert(0, str(DOCS))
import hooks  # noqa: E402  (docs/hooks.py)


class Block(NamedTuple):
    """Fenced code, and what stands in the comment before it: nothing, "hub" (needs the Hub), "terminal" (waits for somebody), or
    "server" (runs until the page ends)."""

    language: str
    code: str
    mark: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf8")
    found = re.findall(r"(?:<!-- (\w+) -->\n)?^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)
    assert text.count("```") == 2 * len(found), f"a fence of {page.name} has no language, is indented, or does not end"
    return [Block(language, code, mark) for mark, language, code in found]


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a shell block, split and globbed as a shell does it."""
    line = ""
    for part in code.splitlines():
        line += part + "\n"
        joined = line.replace("\\\n", " ")
        try:
            words = shlex.split(joined, comments=True)
        except ValueError:  # a quotation goes on
            continue
        if not part.endswith("\\"):
            line = ""
            if words:
                yield [found for word in words for found in (sorted(glob.glob(word)) if "*" in word else []) or [word]]


def substituted(word: str) -> str:
    """With what ``$(recycle ...)`` prints in its place."""
    return re.sub(r"\$\(recycle (.+?)\)", lambda found: invoked(shlex.split(found[1])).stdout.rstrip("\n"), word)


def invoked(arguments: list[str]) -> Any:
    done = CliRunner().invoke(main, arguments)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, (arguments, done.output)
    return done


def sh(code: str) -> None:
    for words in commands(code):
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            os.environ[name] = value
        elif words[0] == "recycle":
            assert words[1] not in WAITING, f"mark {words[:3]} as <!-- server --> or <!-- terminal -->: it would not end"
            invoked([substituted(word) for word in words[1:]])
        else:
            subprocess.run(words, check=True, capture_output=True)


def parsed(code: str) -> int:
    """How many commands there are; each must name real commands, options and values."""
    count = 0
    for words in commands(code):
        if words[0] != "export":
            assert words[0] == "recycle", words
            command: Any = main
            arguments = words[1:]
            context = click.Context(main, info_name="recycle")
            while isinstance(command, click.Group):
                command, arguments = command.commands[arguments[0]], arguments[1:]
                context = click.Context(command, parent=context)
            command.parse_args(context, list(arguments))
            count += 1
    return count


@pytest.fixture(scope="module")
def checked_out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout in which the tour has run; the current folder while this module's tests run."""
    folder = checkout.make(tmp_path_factory.mktemp("docs") / "recycler")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RECYCLE_ZOO", str(folder / "unused"))
        run(DOCS / FIRST)
        yield folder


@contextmanager
def server(code: str) -> Iterator[None]:
    """A command that serves, in a process of its own, from when it says its address until it is told to stop."""
    (words,) = commands(code)
    recycle = [sys.executable, "-c", "from recycler.cli import main; main()", *words[1:]]
    with subprocess.Popen(recycle, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline().startswith("http://"), words
            yield
        finally:
            process.terminate()
            process.wait(SECONDS)


def run(page: Path) -> None:
    names: dict[str, Any] = {"__name__": page.stem}
    ports = sorted({port for _, code, _ in blocks(page) for port in re.findall(r"\b812\d\b", code)})
    with ExitStack() as held, ExitStack() as running:
        free = {port: held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for port in ports}
        held.close()
        for language, code, mark in blocks(page):
            for port, other in free.items():  # the one thing that is exchanged
                code = code.replace(port, str(other))
            if mark == "server":
                running.enter_context(server(code))
            elif mark:
                assert mark in ("hub", "terminal") and parsed(code)
            else:
                run_block(page, language, code, names)


def run_block(page: Path, language: str, code: str, names: dict[str, Any]) -> None:
    if language == "sh":
        sh(code)
    elif language == "python":
        exec(compile(code, page.name, "exec"), names)
    else:
        assert language in ("text", "json", "toml", "yaml"), f"{page.name}: who runs {language}?"


def test_the_tour_runs(checked_out: Path) -> None:
    assert (checked_out / ".demo/tour-model/recycle.json").exists()
    assert len((checked_out / ".demo/tour-answers.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != FIRST and blocks(p)], ids=lambda p: str(p.relative_to(DOCS)))
def test_a_page_runs(page: Path, checked_out: Path) -> None:
    os.environ["RECYCLE_ZOO"] = ".demo/tour"
    run(page)


def test_what_does_not_run_here_runs_elsewhere() -> None:
    """Every marked block's commands occur in the tests that are named for its page; and nothing is named in vain."""
    marked = {(page.name, mark) for page in PAGES for _, _, mark in blocks(page) if mark not in ("", "server")}
    assert marked == set(ELSEWHERE)
    for page in PAGES:
        for _, code, mark in blocks(page):
            if mark in ("hub", "terminal") and page.name != "cookbook.md":
                text = (ROOT / "tests" / ELSEWHERE[page.name, mark]).read_text(encoding="utf8")
                verbs = {words[1] for words in commands(code) if words[0] == "recycle"}
                assert all(verb.replace("-", "_") in text or verb in text for verb in verbs), (page.name, verbs)


def test_a_wrong_option_would_be_found() -> None:
    with pytest.raises(click.NoSuchOption):
        parsed("recycle fetch org/name \\\n  --bas org/base\n")
    with pytest.raises(KeyError):
        parsed("recycle fetsch org/name\n")


# -- what is made from the code


def test_every_method_has_its_page() -> None:
    pages = {page.stem for page in (DOCS / "methods").glob("*.md")} - {"index"}
    assert pages == set(hooks.methods()) == {n for n, c in methods().items() if c.__module__.startswith("recycler.routers.")}
    for name in pages:
        text = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf8")
        assert text.startswith(f"# {name}\n") and all(part in text for part in ("**When.**", "**When not.**", "**Cost.**")), (
            name
        )
        assert any(code.startswith(f"recycle build-router {name}") for _, code, _ in blocks(DOCS / "methods" / f"{name}.md")), (
            name
        )


@pytest.mark.parametrize("name", sorted(hooks.methods()))
def test_a_method_page_says_what_the_code_says(name: str) -> None:
    cls = methods()[name]
    page = hooks.rendered((DOCS / "methods" / f"{name}.md").read_text(encoding="utf8"), f"methods/{name}.md")
    rows = {option: (default, what) for option, _, default, what in hooks.option_rows(cls.Config)}
    assert set(rows) == set(cls.Config.__dataclass_fields__) and all(what for _, what in rows.values()), (
        "an option without words"
    )
    listed = set(re.findall(r"^\| `(\w+)` \|", page, flags=re.M))
    policy = "](../policies.md)" in page.split("## Options", 1)[1].split("## Formula", 1)[0]
    assert set(rows) - listed <= ({f for f in rows if policy}) and (not policy or "policy" in rows)
    assert all(word in page for word in sorted(cls.needs)) and "## Formula, source, departures" in page
    first = (sys.modules[cls.__module__].__doc__ or "").split("\n")[0]
    assert hooks.linked(first) in page


def test_the_numbers_are_the_readmes() -> None:
    """Every row of the method, however it is set, without the last column."""
    readme = (ROOT / "README.md").read_text(encoding="utf8").splitlines()
    for name in ("ridge", "glider", "skills"):
        rows = [line.rsplit("|", 2)[0] for line in readme if re.match(rf"\| {name}[ :]", line) and line.count("|") > 10]
        shown = hooks.readme_rows(name).replace("*", "")
        assert rows and all(f"{row}|" in shown for row in rows) and "| oracle |" in shown
    assert hooks.readme_rows("hierarchy") == ""


def test_commands_and_policies_are_all_there() -> None:
    page = hooks.rendered((DOCS / "cli.md").read_text(encoding="utf8"), "cli.md")
    for path, command in hooks.leaves(main):
        assert f"## `{path}`" in page
        assert all(option in page for p in command.params for option in p.opts if option.startswith("--")), path
    policies = hooks.rendered((DOCS / "policies.md").read_text(encoding="utf8"), "policies.md")
    assert all(f"| `{name}` |" in policies for name in methods()["arrow"].Config.__dataclass_fields__)
    known = hooks.rendered((DOCS / "adapters.md").read_text(encoding="utf8"), "adapters.md")
    assert "| `VERA` | VeRA | converted" in known and "| `IA3` | IA3 | refused |" in known


def test_a_heading_that_is_gone_is_said() -> None:
    with pytest.raises(ValueError, match="no heading 'Nowhere'"):
        hooks.include("README.md", "Nowhere")


# -- the site


def test_the_site_builds_and_asks_nobody(tmp_path: Path) -> None:
    """Strictly: a link or a reference that leads nowhere is an error (--quiet would not count it). Built from where users build it."""
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        text = page.read_text(encoding="utf8")
        assert not re.search(r'<(?:script|img|iframe|source)[^>]+(?:src|srcset)="?(?:https?:)?//', text), page
        assert not re.search(r'<link[^>]+rel="?(?:stylesheet|preconnect|icon|preload)"?[^>]+href="?(?:https?:)?//', text), page
        assert "<!-- " not in re.sub(r"<pre.*?</pre>", "", text, flags=re.S) or "include:" not in text, page
    for style in (tmp_path / "site").rglob("recycler.css"):
        assert "@import" not in style.read_text() and "url(" not in style.read_text()
    assert (tmp_path / "site" / "assets" / "cost.png").exists()
    assert not (tmp_path / "site" / "hooks.py").exists()


# -- community files


def test_the_citation_names_every_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf8"))
    assert {"cff-version", "message", "title", "type", "version", "authors", "references"} <= set(cited)
    assert all({"type", "title", "authors", "year", "url"} <= set(one) for one in cited["references"])
    ids = {one["identifiers"][0]["value"] for one in cited["references"]}
    papers = {found for cls in methods().values() for found in re.findall(r"arXiv:\d{4}\.\d{5}", cls.paper)}
    for file in [
        *(ROOT / "routers").glob("*.py"),
        ROOT / "recycler" / "subtraction.py",
    ]:  # methods, policies, what they stand on
        papers |= set(re.findall(r"arXiv:\d{4}\.\d{5}", file.read_text(encoding="utf8")))
    assert papers and papers <= ids, papers - ids
    assert any("SpectR" in one["title"] for one in cited["references"])  # its router names a conference
    assert all(one["url"].endswith(one["identifiers"][0]["value"].removeprefix("arXiv:")) for one in cited["references"])


def test_the_changelog_knows_this_version() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf8")
    version = re.findall(r'^version = "(.+)"', project, flags=re.M)[0]
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf8")
    assert "## [Unreleased]" in text and version in text
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf8"))["version"]) == version


def test_the_changelog_names_every_command() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf8")
    headings = re.findall(r"^#{2,3} .*", text, flags=re.M)
    assert headings[0] == "## [Unreleased]" and set(headings[1:]) <= {f"### {kind}" for kind in KINDS_OF_CHANGE}
    for path, _ in hooks.leaves(main):
        assert re.search(rf"`(?:zoo |plot )?{path.split()[-1]}[` ]", text) or path.startswith("recycle plot "), path


def test_community_files_name_what_is_there() -> None:
    for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text(encoding="utf8")
        for path in re.findall(r"`((?:tests|routers|zoo|examples|docs)/[\w./]+)`", text):
            assert (ROOT / path).exists(), f"{name} names {path}"
        assert not re.search(r"[\w.]+@[\w.]+\.\w+", text), f"{name} names an address"
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf8"), flags=re.M))
    assert set(re.findall(r"make (\w+)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf8"))) <= targets
