"""`recycle zoo check`, `health` and `licences`: the zoo judged as a set."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path

import click

from recycler.options import as_json, in_zoo, open_zoo, print_json, with_base, with_engine


@click.command(name="check")
@click.argument("names", nargs=-1)
@with_base
@click.option(
    "--csv", "csv_file", type=click.Path(dir_okay=False), help="Write the cosines of every two adapters to this file."
)
@click.option("--force", is_flag=True, help="Replace the CSV file.")
@click.option("--strict", is_flag=True, help="Copies, odd norms and missing licences end with exit code 3 too.")
@with_engine
@in_zoo
@as_json
def zoo_check(
    names: tuple[str, ...],
    base: str | None,
    csv_file: str | None,
    force: bool,
    strict: bool,
    engine: str | None,
    zoo_path: str | None,
    as_json: bool,
) -> None:
    """Who can be mixed with whom for a base, at what cost, and why not.

    Compares every adapter (or NAMES) with the base site by site, and with the others: duplicates, near-duplicates (cosine of the
    updates above 0.999) and odd norms. Without --base, each base that adapters declare is judged by itself. Exit code 3 where
    an adapter cannot be used.

    \b
    Examples:
      recycle zoo check --base org/base
      recycle zoo check math law --csv cosines.csv
      recycle zoo check --engine ray      # shared by workers
    """
    from recycler.judging.check_report import check_file
    from recycler.judging.checking import check
    from recycler.judging.zoo_view import check_view
    from recycler.terminal import bars

    if csv_file:
        check_file(Path(csv_file), force)  # before the long work
    with bars() as progress, redirect_stdout(sys.stderr):  # what an engine prints is chatter
        report = check(open_zoo(zoo_path), base, names=names or None, engine=engine, progress=progress)
    if csv_file:
        report.write_csv(Path(csv_file), force=force)
    if as_json:
        print_json(report.to_json())
    else:
        check_view(report)
    report.raise_for_problems(strict=strict)


@click.command(name="health")
@click.argument("names", nargs=-1)
@with_base
@click.option("--intruders", is_flag=True, help="Load the base and count intruder dimensions; minutes.")
@click.option(
    "--sites", type=click.IntRange(min=1), metavar="N", help="Look for them at N sites of each adapter, the likeliest."
)
@in_zoo
@as_json
def zoo_health(
    names: tuple[str, ...], base: str | None, intruders: bool, sites: int | None, zoo_path: str | None, as_json: bool
) -> None:
    """How adapters look beside the rest of the zoo: evidence, not a verdict.

    Norm per layer against the zoo's median (a heat strip), effective rank, how much one direction holds of each update and,
    with --intruders, leading directions of the tuned weights that no direction of the base resembles.

    \b
    Examples:
      recycle zoo health math law
      recycle zoo health --intruders --sites 20
    """
    from recycler.judging.health import health
    from recycler.judging.zoo_view import health_view
    from recycler.terminal import bars

    with bars() as progress:
        report = health(open_zoo(zoo_path), names or None, base=base, intruders=intruders, sites=sites, progress=progress)
    if as_json:
        print_json(report.to_json())
    else:
        health_view(report, named=bool(names))


@click.command(name="licences")
@click.argument("names", nargs=-1)
@click.option("--license-allow", "allow", metavar="LIST", help="Comma-separated licences; any other is an error (exit code 3).")
@click.option("--strict", is_flag=True, help="Missing licences, unrecognised ones and conflicts are errors too.")
@in_zoo
@as_json
def zoo_licences(names: tuple[str, ...], allow: str | None, strict: bool, zoo_path: str | None, as_json: bool) -> None:
    """Which licences the adapters (or NAMES) state, and what they ask together.

    \b
    Examples:
      recycle zoo licences --json
      recycle zoo licences --license-allow apache-2.0,mit,cc-by --strict
    """
    from recycler.judging.zoo_view import licences_view
    from recycler.zoo import licences

    allowed = None if allow is None else licences.parse_list(allow)
    zoo = open_zoo(zoo_path)
    entries = {name: zoo.entry(name) for name in names or zoo.entries}
    stated = {name: entry.licence for name, entry in entries.items()}
    roll = licences.roll_up(stated)
    if as_json:
        adapters = {
            name: {"licence": entry.licence, "ids": list(licences.stated(entry.licence)), "source": entry.source}
            for name, entry in entries.items()
        }
        print_json({**roll.to_json(), "adapters": adapters})
    else:
        licences_view(roll, {name: entry.source for name, entry in entries.items()})
    licences.require(stated, allowed, strict=strict)
