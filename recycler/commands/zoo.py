"""`recycle zoo`: looking at the zoo, and tidying it."""

from __future__ import annotations

import click

from recycler.commands.check import zoo_check, zoo_health, zoo_licences
from recycler.options import Group, as_json, as_text, in_zoo, open_zoo, print_json


@click.group(name="zoo", cls=Group)
def zoo_group() -> None:
    """Look at the zoo, and tidy it."""


@zoo_group.command(name="list")
@in_zoo
@as_json
def zoo_list(zoo_path: str | None, as_json: bool) -> None:
    """List the adapters."""
    from recycler.terminal import table

    zoo = open_zoo(zoo_path)
    entries = zoo.entries
    if as_json:
        print_json(
            {
                "schema_version": 1,
                "path": str(zoo.path),
                "adapters": {n: e.to_json() for n, e in entries.items()},
            }
        )
        return
    rows = [
        [
            n,
            ", ".join(map(str, e.ranks)),
            str(e.sites),
            ", ".join(e.kinds),
            e.base or "?",
            e.licence or "?",
            e.source,
        ]
        for n, e in entries.items()
    ]
    table(["name", "rank", "sites", "kind", "base", "licence", "source"], rows)


@zoo_group.command(name="show")
@click.argument("name")
@in_zoo
@as_json
def zoo_show(name: str, zoo_path: str | None, as_json: bool) -> None:
    """Everything that is known of one adapter."""
    zoo = open_zoo(zoo_path)
    entry = zoo.entry(name)
    if as_json:
        print_json({"schema_version": 1, "name": name, "folder": str(zoo.folder(name)), **entry.to_json()})
        return
    from recycler.terminal import table

    facts = {"folder": str(zoo.folder(name)), **entry.to_json()}
    facts["files"] = ", ".join(f"{file} ({fact['size']} bytes)" for file, fact in entry.files.items())
    table(["", name], [[key, as_text(value)] for key, value in facts.items()])


@zoo_group.command(name="remove")
@click.argument("names", nargs=-1, required=True)
@in_zoo
@as_json
def zoo_remove(names: tuple[str, ...], zoo_path: str | None, as_json: bool) -> None:
    """Remove adapters; where one is unknown, none."""
    from recycler.terminal import say

    open_zoo(zoo_path).remove(names)
    if as_json:
        print_json({"schema_version": 1, "removed": list(names)})
    say(f"removed {', '.join(names)}")


@zoo_group.command(name="verify")
@click.argument("names", nargs=-1)
@in_zoo
@as_json
def zoo_verify(names: tuple[str, ...], zoo_path: str | None, as_json: bool) -> None:
    """Hash every file again and compare with zoo.json.

    Exit code 4 where contents changed, 3 where files are missing or do not belong there.
    """
    from recycler.terminal import say
    from recycler.zoo.errors import InputError, SecurityError

    zoo = open_zoo(zoo_path)
    problems = zoo.verify(names or None)
    if as_json:
        print_json({"schema_version": 1, "problems": [vars(p) for p in problems]})
    else:
        for problem in problems:
            click.echo(str(problem))
    if problems:
        kind = SecurityError if any(problem.changed for problem in problems) else InputError
        raise kind(
            f"{len(problems)} files differ from zoo.json.",
            "They were vetted as they were then.",
            "Fetch those adapters again: recycle fetch --from zoo.json, or by their sources.",
            code="E_HASH" if kind is SecurityError else "E_FILES",
        )
    say(f"{len(names or zoo)} adapters are as they were fetched")


@zoo_group.command(name="path")
@click.argument("name", required=False)
@in_zoo
@as_json
def zoo_path_command(name: str | None, zoo_path: str | None, as_json: bool) -> None:
    """Print the folder of the zoo, or of one adapter (PEFT loads from there)."""
    zoo = open_zoo(zoo_path)
    path = str(zoo.folder(name) if name else zoo.path)
    if as_json:
        print_json({"schema_version": 1, "path": path})
    else:
        click.echo(path)


for command in (zoo_check, zoo_health, zoo_licences):
    zoo_group.add_command(command)
