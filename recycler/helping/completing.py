"""Shell completion: click's own scripts, and what may stand where: adapters, profiles, routers, methods, error codes, files.

Names are read from folders and JSON. Nothing here imports torch, or the library: a key press must not wait for it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

SHELLS = ("bash", "zsh", "fish")
_VARIABLE = "_RECYCLE_COMPLETE"
_CLASS = re.compile(r"^class (\w+)\(", re.MULTILINE)

Names = Callable[[click.Context], Iterable[str]]


def script(main: click.Command, shell: str) -> str:
    """The script that a shell reads once, by ``eval``, to complete ``recycle``."""
    kind = get_completion_class(shell)
    assert kind is not None, shell
    made = kind(main, {}, "recycle", _VARIABLE).source()
    if shell == "zsh":  # whose completion is off until it is asked for, and click's script takes it for granted
        first, _, rest = made.partition("\n")
        made = f"{first}\n(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit -i }}\n{rest}"
    return made


def attach(group: click.Group) -> None:
    """Gives every option and argument below `group` that stands for a name or a file its completion."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            attach(command)
            continue
        for param in command.params:
            found = _OF_COMMAND.get((name, str(param.name))) or _OF_PARAM.get(str(param.name))
            if found is not None:
                param.shell_complete = _completion(*found)  # type: ignore[method-assign, assignment]
            elif isinstance(param, click.Argument) and isinstance(param.type, click.types.StringParamType):
                param.shell_complete = _files  # type: ignore[method-assign]


def _completion(names: Names, several: bool = False) -> Callable[[click.Context, str], list[CompletionItem]]:
    """Completes names; `several`: separated by commas. A path where nothing is called so."""

    def complete(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",") if several else ("", "", incomplete)
        taken = set(before.split(","))
        try:
            known = [name for name in names(ctx) if name.startswith(last) and name not in taken]
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            StopIteration,
        ):  # a broken zoo must not break the prompt
            known = []
        return [CompletionItem(f"{before}{comma}{name}") for name in sorted(known)] or _files(ctx, incomplete)

    return complete


def _files(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="file")]


def _zoo(ctx: click.Context) -> Path:
    chosen = ctx.params.get("zoo_path") or os.environ.get("RECYCLE_ZOO") or "~/.cache/recycle/zoo"  # as `Zoo` does
    return Path(chosen).expanduser()


def adapters(ctx: click.Context) -> Iterable[str]:
    """The zoo's."""
    zoo = _zoo(ctx)
    data = json.loads((zoo / "zoo.json").read_text(encoding="utf8"))
    if "journal" in data:  # a large zoo's later ones stand in its index
        import sqlite3

        try:
            with closing(sqlite3.connect(f"{(zoo / 'cache' / 'index.sqlite').absolute().as_uri()}?mode=ro", uri=True)) as index:
                return [name for (name,) in index.execute("SELECT name FROM adapters")]
        except sqlite3.Error:
            pass
    return list(data["adapters"])


def adapters_of_model(ctx: click.Context) -> Iterable[str]:
    """The composed model's that the command line names before."""
    model = ctx.params.get("model_path") or next(
        arg for arg in ctx.args if not arg.startswith("-")
    )  # before an unfinished option
    manifest = json.loads((Path(model).expanduser() / "recycle.json").read_text(encoding="utf8"))
    return ["base", *(record["name"] for record in manifest["adapters"])]


def profiles(ctx: click.Context) -> Iterable[str]:
    return [path.parent.name for path in (_zoo(ctx) / "profiles").glob("*/profile.json")]


def routers(ctx: click.Context) -> Iterable[str]:
    return [path.parent.name for path in (_zoo(ctx) / "routers").glob("*/router.json")]


def methods(ctx: click.Context) -> Iterable[str]:
    """Files whose class is called as they are, and what other packages bring: what `recycler.routers.discovery` finds, without
    importing it."""
    from importlib.metadata import entry_points

    here = Path(__file__).parent.parent / "routers"
    classes = {path.stem: _CLASS.findall(path.read_text(encoding="utf8")) for path in here.glob("*.py")}
    own = [stem for stem, names in classes.items() if stem.replace("_", "") in map(str.lower, names)]
    return {*own, *(point.name for point in entry_points(group="recycler.routers"))}


def codes(ctx: click.Context) -> Iterable[str]:
    from recycler.zoo.error_codes import CATALOGUE

    return CATALOGUE


# By what options and arguments are called in the commands' signatures; whether several are separated by commas.
_OF_PARAM: dict[str, tuple[Names, bool]] = {
    "adapters": (adapters, True),
    "subtract": (adapters, True),
    "add": (adapters, False),
    "remove": (adapters, False),
    "only_adapter": (adapters_of_model, False),
    "profile_name": (profiles, False),
    "router_name": (routers, False),
    "others": (routers, False),
    "method": (methods, False),
    "methods": (methods, True),
}
_OF_COMMAND: dict[tuple[str, str], tuple[Names, bool]] = {  # where the same word means something else elsewhere
    **{(command, "name"): (adapters, False) for command in ("show", "path")},
    **{(command, "names"): (adapters, False) for command in ("remove", "verify", "check", "health", "licences")},
    ("errors", "code"): (codes, False),
}
NAMED = tuple(_OF_PARAM)
"""What stands for a name in every command that has it."""
