"""`recycle bench-routers`: every method on one table, and which to use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from recycler.options import as_json, in_zoo, names_of, on_device, open_zoo, pairs_of, print_json, with_base, with_select
from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from recycler.shots import Shots


class Lists(click.Command):
    """Options that take several values at once, as a shell's ``*`` gives them: ``--tasks a.jsonl b.jsonl``."""

    lists = ("--tasks", "--held-out", "--also")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        plain: list[str] = []
        current, taken = "", True  # the list that bare words belong to, and whether it has one already
        for arg in args:
            name, equals, _ = arg.partition("=")
            if arg in self.lists or (name in self.lists and equals):
                current, taken = name, bool(equals)
                plain.append(arg)
            elif arg.startswith("-") and arg != "-":
                current, taken = "", True
                plain.append(arg)
            elif current and taken:
                plain += [current, arg]
            else:
                plain.append(arg)
                taken = True
        return super().parse_args(ctx, plain)


@click.command(name="bench-routers", cls=Lists)
@click.option("--profile", "profile_name", required=True, help="A profile's name in the zoo, or its folder.")
@click.option(
    "--methods", metavar="A,B:KEY=VALUE,...", help="With options after colons; by default every method that is no baseline."
)
@click.option("-o", "--option", "options", multiple=True, metavar="METHOD.KEY=VALUE", help="An option of one of the methods.")
@click.option(
    "--tasks",
    multiple=True,
    metavar="FILE...",
    required=True,
    help="JSONL files, or a folder: rows of tasks that are profiled.",
)
@click.option("--held-out", multiple=True, metavar="FILE...", help="The same of tasks that the profile has not seen.")
@click.option("--also", multiple=True, metavar="NAME=FILE...", help="One column more, of these files; may be repeated.")
@click.option("--rows", type=click.IntRange(min=1), help="At most this many rows of each task, from the top.")
@click.option("--out", type=click.Path(file_okay=False), help="A folder for bench.csv and bench.json.")
@click.option("--adapters", help="Comma-separated names; by default the profile's.")
@with_select
@click.option("--assign", multiple=True, metavar="ADAPTER=TASK", help="Say by hand which task is an adapter's own.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="By default what the reference needs, and a little more.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--force", is_flag=True, help="Measure again what is in --out already, and replace it.")
@with_base
@on_device
@in_zoo
@as_json
def bench_command(
    profile_name: str, methods: str | None, options: tuple[str, ...], tasks: tuple[str, ...],
    held_out: tuple[str, ...], also: tuple[str, ...], rows: int | None, out: str | None, adapters: str | None, select: str | None,
    count: int | None, assign: tuple[str, ...], max_new_tokens: int | None, batch_size: int, force: bool, base: str | None,
    device: str | None, dtype: str, zoo_path: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Fit routing methods and compare them: on the same rows, beside base, best single adapter, uniform and oracle.

    Ends with which one to use and why, or with "don't bother". With --out a method that is finished is kept at once: the same
    command goes on where it stopped, and with more methods it adds them. A method that fails is a row of the table, and the exit
    code is 6.

    \b
    Examples:
      recycle bench-routers --profile p16 --tasks test/*.jsonl
      recycle bench-routers --profile p16 --methods ridge,phatgoose:steps=50 --tasks test/*.jsonl --out bench/
      recycle bench-routers --profile p16 --tasks test/ --held-out new/*.jsonl --also reworded=reworded/
    """
    from recycler.evaluating.bench_report import bench_table
    from recycler.evaluating.benching import bench_routers
    from recycler.terminal import bars

    groups: dict[str, list[str]] = {}
    name = ""
    for item in also:
        named, equals, file = item.partition("=")
        if equals:
            name = named.strip()
        if not name or not (file if equals else item):
            raise UsageError(f"--also {item!r} is not NAME=FILES.", "", "Write --also reworded=FOLDER.")
        groups.setdefault(name, []).append(file if equals else item)
    with bars() as progress:
        bench = bench_routers(
            profile_name, methods, tasks=shots_in(tasks), held_out=shots_in(held_out) if held_out else None,
            also={name: shots_in(files) for name, files in groups.items()}, options=options, rows=rows, zoo=open_zoo(zoo_path),
            base=base, adapters=names_of(adapters), assign=pairs_of(assign), select=select, count=count,
            max_new_tokens=max_new_tokens, batch_size=batch_size, out=out, force=force, progress=progress,
            loading={"device": device, "dtype": dtype},
        )  # fmt: skip
    if as_json:
        print_json(bench.to_json())
    else:
        bench_table(bench)
    bench.raise_for_failures()


def shots_in(files: Sequence[str]) -> Shots:
    """Rows of JSONL files; a folder stands for those in it."""
    from recycler.shots import Shots

    return Shots.from_files(*(Path(file) / "*.jsonl" if Path(file).is_dir() else file for file in files))
