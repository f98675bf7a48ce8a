"""`recycle zoo`: looking at the zoo, and tidying it."""

from __future__ import annotations

import sys

import click

from recycler.commands.check import zoo_check, zoo_health, zoo_licences
from recycler.commands.zoo_search import zoo_clusters, zoo_copies, zoo_search
from recycler.options import Group, as_json, as_text, in_zoo, open_zoo, print_json

_SCREENS = 200  # rows that somebody may scroll back through


@click.group(name="zoo", cls=Group)
def zoo_group() -> None:
    """Look at the zoo, and tidy it."""


@zoo_group.command(name="list")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most so many; on a terminal 200 by default.")
@click.option(
    "--offset", type=click.IntRange(min=0), default=0, metavar="N", help="Leave out the first N, in the order of names."
)
@in_zoo
@as_json
def zoo_list(limit: int | None, offset: int, zoo_path: str | None, as_json: bool) -> None:
    """List the adapters.

    What --json prints, without --limit, is a lock as well: recycle fetch --from takes it.

    \b
    Examples:
      recycle zoo list --limit 50 --offset 100
    """
    from recycler.terminal import say, table

    zoo = open_zoo(zoo_path)
    if limit is None and not as_json and sys.stdout.isatty():
        limit = _SCREENS
    total, entries = len(zoo), zoo.page(limit, offset)
    if as_json:
        print_json(
            {
                "schema_version": 1,
                "path": str(zoo.path),
                "total": total,
                "offset": offset,
                "adapters": {e.name: e.to_json() for e in entries},
            }
        )
        return
    rows = [
        [
            e.name,
            ", ".join(map(str, e.ranks)),
            str(e.sites),
            ", ".join(e.kinds),
            e.base or "?",
            e.licence or "?",
            e.source,
        ]
        for e in entries
    ]
    table(["name", "rank", "sites", "kind", "base", "licence", "source"], rows)
    if len(entries) < total:
        last = offset + len(entries)
        more = f"; go on with --offset {last}" if entries and last < total else ""
        say(f"{offset + 1} to {last} of {total}{more}" if entries else f"none: there are {total}")


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
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Only N adapters, drawn at random.")
@click.option("--seed", default=0, show_default=True, help="Draws the sample; the same every time.")
@in_zoo
@as_json
def zoo_verify(names: tuple[str, ...], sample: int | None, seed: int, zoo_path: str | None, as_json: bool) -> None:
    """Hash every file again and compare with zoo.json.

    \b
    Examples:
      recycle zoo verify --sample 200 --seed 7

    Exit code 4 where contents changed, 3 where files are missing or do not belong there.
    """
    from recycler.terminal import say
    from recycler.zoo.errors import InputError, SecurityError, UsageError

    zoo = open_zoo(zoo_path)
    if names and sample:
        raise UsageError("--sample draws adapters, and some were named.", "", "Leave one of the two out.")
    chosen = tuple(zoo.sample(sample, seed)) if sample else names
    problems = zoo.verify(chosen if names or sample else None)
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
    say(f"{len(chosen or zoo)} adapters{f' of {len(zoo)}' * bool(sample)} are as they were fetched")


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


@zoo_group.command(name="reindex")
@in_zoo
@as_json
def zoo_reindex(zoo_path: str | None, as_json: bool) -> None:
    """Write zoo.json whole, and build anew what is derived from it.

    Never needed: what is stale is noticed. For a large zoo it folds the journal beside zoo.json into it, so that one sorted file
    says everything again.
    """
    from recycler.terminal import say

    zoo = open_zoo(zoo_path)
    count = zoo.reindex()
    if as_json:
        print_json({"schema_version": 1, "path": str(zoo.path), "adapters": count})
    say(f"{count} adapters in {zoo.manifest}")


for command in (zoo_search, zoo_copies, zoo_clusters, zoo_check, zoo_health, zoo_licences):
    zoo_group.add_command(command)
