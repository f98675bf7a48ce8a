"""`recycle fetch`: bringing adapters into the zoo."""

from __future__ import annotations

import sys
from typing import Any

import click

from recycler.options import as_json, in_zoo, open_zoo, print_json, with_base

_LAYOUTS = ("auto", "peft", "mttl", "phatgoose")  # as `fetch` has them; importing them here would make every command wait


@click.command(name="fetch")
@click.argument("sources", nargs=-1)
@click.option("--as", "names", multiple=True, metavar="NAME", help="A name for each source, in order.")
@with_base
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Without sources: so many adapters of the base from the Hub that are usable as they are.",
)
@click.option("--text", metavar="QUERY", help="With --limit: words that must occur in an adapter's id, tags or card.")
@click.option("--author", help="With --limit: only this user's or organisation's.")
@click.option("--collection", metavar="SLUG", help="Instead of sources: a collection on the Hub.")
@click.option("--from", "lock", metavar="ZOO.JSON", help="Instead of sources: somebody's lock, the same zoo again.")
@click.option("--base-alias", multiple=True, metavar="ID", help="Another name of the base's weights; may be repeated.")
@click.option("--force-base", is_flag=True, help="Accept adapters of another base where all shapes fit.")
@click.option(
    "--dry-run", is_flag=True, help="Say what would come, how large, and what is refused by listing and header; keep nothing."
)
@click.option("--offline", is_flag=True, help="Make no request: folders, and what the Hub's client has in its cache.")
@click.option("--jobs", type=click.IntRange(1, 64), default=8, show_default=True, help="Sources under way at once.")
@click.option(
    "--max-size", type=click.IntRange(min=1), metavar="MB", help="The most that one adapter may hold; by default 2147."
)
@click.option("--allow-pickle", is_flag=True, help="Open pickled weights, in a process that can do little else.")
@click.option("--layout", type=click.Choice(_LAYOUTS), default="auto", show_default=True, help="How pickles are laid out.")
@click.option("--rank", type=click.IntRange(min=1), help="Of adapters that are converted, at most this rank; by default 128.")
@click.option(
    "--energy", type=click.FloatRange(0, 1, min_open=True), help="Of those, the share of Σσ² to keep; by default 0.999."
)
@click.option("--accept-outlier", is_flag=True, help="Keep adapters over 1000 times stronger than the others.")
@click.option("--license-allow", metavar="A,B", help="Licences that may enter, with commas between.")
@click.option("--strict", is_flag=True, help="Refuse what states no licence.")
@in_zoo
@as_json
def fetch_command(
    sources: tuple[str, ...], names: tuple[str, ...], max_size: int | None, base_alias: tuple[str, ...], zoo_path: str | None,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Bring adapters into the zoo, vetted and pinned.

    SOURCES are Hub ids (org/name[@revision][/subfolder]), folders, or folders of folders. One bad adapter among many does not
    stop the others (exit code 6, and a summary). Run it again to go on: what is in the zoo is not fetched twice.

    \b
    Examples:
      recycle fetch org/math-lora org/law-lora@v2 --base org/base
      recycle fetch ./adapters --base ./base-folder --dry-run
      recycle fetch --base org/base --limit 20 --text german
      recycle fetch --from their-zoo.json
      recycle fetch org/old-lora --allow-pickle --license-allow apache-2.0,mit --strict
    """
    from recycler.intake.fetching import Failure, FetchReport, fetch
    from recycler.terminal import bars, say
    from recycler.zoo.errors import RecycleError

    def event(stage: str, name: str, text: str) -> None:
        if stage == "waiting" or (stage in ("kept", "checked") and not as_json):  # what failed is said at the end
            say(text)

    size: dict[str, Any] = {} if max_size is None else {"max_bytes": max_size * 10**6}
    try:
        with bars() as progress:
            report = fetch(
                list(sources) or None, zoo=open_zoo(zoo_path), names=list(names) or None, base_alias=list(base_alias) or None,
                on_event=event, progress=progress if sys.stderr.isatty() else None, **options, **size,
            )  # fmt: skip
    except RecycleError as error:  # of one source; programs get it where they look for those of several
        if as_json and len(sources) == 1:
            failure = Failure("", sources[0], error)
            print_json(FetchReport((), (failure,), bool(options["dry_run"])).to_json())
        raise
    for note in report.notes:
        say(note)
    if as_json:
        print_json(report.to_json())
    else:
        if report.dry_run and len(report.fetched) > 1:
            say(f"{len(report.fetched)} adapters, {report.bytes / 1e6:.1f} MB")
        for one in report.fetched:
            click.echo(one.name)
    report.raise_for_failures()
