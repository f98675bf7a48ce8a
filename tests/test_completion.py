"""Completion as shells do it: the real script in a real bash (zsh and fish where they are installed), Tab pressed on a terminal, with
the zoo's own names."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from conftest import Pico

import recycler
from recycler.cli import main
from recycler.helping import completing
from recycler.routers.discovery import methods
from recycler.zoo.error_codes import CATALOGUE

BIN = Path(sys.executable).parent
SECONDS = 60  # at most, for a shell's session; it takes two
# Asks bash what it would offer: the words of a line, the last of which is being typed.
_BASH = """
eval "$(recycle completion bash)"
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
compopt() { local IFS=' '; printf 'compopt %s\\n' "$*"; }  # it works in an interactive completion only
_recycle_completion "$1" "${COMP_WORDS[COMP_CWORD]}" "$1"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def zoo(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo with a profile and a router, and beside it a composed model."""
    folder = tmp_path_factory.mktemp("completion")
    shutil.copytree(llama.zoo, folder / "zoo")
    held = recycler.Zoo(folder / "zoo")
    recycler.profile(held, recycler.Shots.from_files(*llama.tasks), 2, out="p2", base=str(llama.base))
    recycler.build_router("uniform", zoo=held, out=held.routers_dir / "even", base=str(llama.base))
    recycler.compose(held, "even", folder / "model").engine.detach()
    return folder / "zoo"


def environment(zoo: Path) -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RECYCLE_ZOO": str(zoo)}


def bash(zoo: Path, *words: str) -> list[str]:
    done = subprocess.run(
        ["bash", "--norc", "-c", _BASH, "bash", "recycle", *words],
        env=environment(zoo), cwd=zoo.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return [line for line in done.stdout.splitlines() if line]


def offered(zoo: Path, *words: str) -> list[str]:
    """What click answers, in this process; a path as ``file:``."""
    *before, last = words
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECYCLE_ZOO", str(zoo))
        patch.chdir(zoo.parent)
        found = ShellComplete(main, {}, "recycle", "_RECYCLE_COMPLETE").get_completions(before, last)
    return [item.value if item.type == "plain" else f"{item.type}:{item.value}" for item in found]


def test_bash_completes_commands_options_and_names(zoo: Path) -> None:
    assert set(bash(zoo, "build")) == {"build-router"}
    assert "--profile" in bash(zoo, "build-router", "--pro")
    assert bash(zoo, "zoo", "show", "") == ["code", "law", "math", "poem"]
    assert bash(zoo, "build-router", "ridge", "--profile", "p") == ["p2"]
    assert bash(zoo, "compose", "--router", "") == ["even"]
    assert bash(zoo, "run", "model", "--only", "ma") == ["math"]
    assert bash(zoo, "errors", "E_PICK") == ["E_PICKLE"]
    assert bash(zoo, "run", "mo") == ["compopt -o default"], "files are left to the shell"


def typed(shell: list[str], zoo: Path, tmp_path: Path, lines: list[tuple[str, str]]) -> str:
    """All that an interactive shell on a terminal of its own showed; each line is typed, and what it must show is waited for."""
    pid, screen = pty.fork()
    if pid == 0:
        plain = {"HOME": str(tmp_path), "PS1": "$ ", "TERM": "dumb", "HISTFILE": ""}
        os.chdir(zoo.parent)
        os.execvpe(shell[0], shell, {**environment(zoo), **plain})
    seen, end = "", time.monotonic() + SECONDS
    try:
        for line, expected in lines:
            start = len(seen)
            os.write(screen, line.encode())
            while not re.search(expected, seen[start:]):
                assert time.monotonic() < end, f"after {line!r}: {seen[start:]!r} has no {expected!r}"
                if select.select([screen], [], [], 0.2)[0]:
                    seen += os.read(screen, 65536).decode(errors="replace")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.close(screen)
        os.waitpid(pid, 0)
    return seen


@pytest.mark.parametrize("shell", [["bash", "--norc", "-i"], ["zsh", "-f", "-i"]], ids=["bash", "zsh"])
def test_tab_in_a_shell(zoo: Path, tmp_path: Path, shell: list[str]) -> None:
    """The help's own line, typed into a bare shell; then Tab."""
    if shutil.which(shell[0]) is None:
        pytest.skip(f"there is no {shell[0]}")
    typed(shell, zoo, tmp_path, [
        (f'eval "$(recycle completion {shell[0]})"; echo rea""dy\n', "\nready|\rready"),
        ("recycle zoo show po\t", "show poem"),
        ("\x15recycle errors E_PICK\t", "E_PICKLE"),
        ("\x15recycle zoo show \t\t", r"code\s+law\s+math\s+poem"),
        ("\x15recycle build-router ridge --prof\t", "--profile"),
        ("\x15recycle run mod\t", "run model"),
    ])  # fmt: skip


def test_fish(zoo: Path, tmp_path: Path) -> None:
    """Where the help says that its script goes."""
    script = CliRunner().invoke(main, ["completion", "fish"]).stdout
    assert "_RECYCLE_COMPLETE" in script and "--command recycle" in script
    if shutil.which("fish") is None:
        pytest.skip("there is no fish")
    folder = tmp_path / ".config" / "fish" / "completions"
    folder.mkdir(parents=True)
    (folder / "recycle.fish").write_text(script)
    ask = 'complete -C "recycle zoo show po"; complete -C "recycle errors E_PICK"; complete -C "recycle run mod"'
    done = subprocess.run(
        ["fish", "-c", ask], env={**environment(zoo), "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / ".config")},
        cwd=zoo.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["poem", "E_PICKLE", "model/"] and done.stderr == ""


def test_names_of_the_zoo(zoo: Path) -> None:
    assert offered(zoo, "build-router", "--adapters", "math,") == ["math,code", "math,law", "math,poem"]
    assert offered(zoo, "build-router", "--adapters", "math,l") == ["math,law"]
    assert offered(zoo, "build-router", "--add", "p") == ["poem"]
    assert offered(zoo, "zoo", "remove", "math", "c") == ["code"]
    assert offered(zoo, "zoo", "list", "--zoo", "") == ["dir:"]
    assert offered(zoo, "zoo", "show", "--zoo", "nowhere", "") == ["file:"], "an option that was typed before counts"
    assert offered(zoo, "run", "model", "--only", "") == ["base", "code", "law", "math", "poem"]
    assert offered(zoo, "bench-routers", "--methods", "ridge,arr") == ["ridge,arrow"]
    assert offered(zoo, "doctor", "--profile", "") == ["p2"]
    assert offered(zoo, "compose", "--router", "./") == ["file:./"], "a path where no name begins so"
    assert offered(zoo, "completion", "") == list(completing.SHELLS)
    assert offered(zoo, "errors", "") == sorted(CATALOGUE)


def test_methods_are_known_without_importing_them(zoo: Path) -> None:
    assert sorted(completing.methods(click.Context(main))) == sorted(methods())


@pytest.mark.parametrize("broken", ["{", "[]", '{"adapters": 3}', "\xff"])
def test_a_broken_zoo_offers_nothing_and_breaks_nothing(broken: str, tmp_path: Path) -> None:
    (tmp_path / "zoo.json").write_text(broken, encoding="latin1")
    assert offered(tmp_path, "zoo", "show", "") == ["file:"]
    assert offered(tmp_path, "run", "nowhere", "--only", "x") == ["file:x"]


def leaves(group: click.Group = main) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command)
        else:
            yield name, command


def test_every_command_was_given_its_completion() -> None:
    """Also those that were added last; and every argument completes at least files."""
    seen = 0
    for name, command in leaves():
        for param in command.params:
            special: Any = vars(param).get("shell_complete")
            named = str(param.name) in completing.NAMED
            assert special is not None or not named, f"{name}: {param.name}"
            if isinstance(param, click.Argument) and type(param.type) is type(click.STRING):
                assert special is not None, f"{name}: {param.name}"
            seen += named
    assert seen > 10


def test_completing_imports_nothing_heavy(zoo: Path) -> None:
    script = (
        "import sys\nfrom recycler.cli import main\n"
        "try: main(prog_name='recycle')\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'huggingface_hub', 'safetensors', 'rich', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for words in ("recycle zoo show ", "recycle build-router --profile ", "recycle build-router "):
        asked = {
            "_RECYCLE_COMPLETE": "bash_complete",
            "COMP_WORDS": "\n".join(words.split(" ")),
            "COMP_CWORD": str(words.count(" ")),
        }
        done = subprocess.run(
            [sys.executable, "-c", script], env={**environment(zoo), **asked}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and done.stdout, done.stderr
