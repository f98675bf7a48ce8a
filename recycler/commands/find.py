"""`recycle search`: looking for adapters on the Hub before anything is downloaded."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from recycler.options import as_json, in_zoo, open_zoo, print_json
from recycler.zoo.errors import PartialError, UsageError

if TYPE_CHECKING:
    from recycler.intake.searching import SearchReport
    from recycler.zoo.preview import Candidate

# Of `recycler.zoo.hub_search`, which is not imported for --help.
SORTS = ("downloads", "likes", "last_modified", "created_at")


@click.command(name="search")
@click.option("--base", required=True, help="The base model: a Hub id, or a folder that holds a copy.")
@click.option("--text", metavar="QUERY", help="Words that must all occur in an adapter's id, tags or card.")
@click.option("--author", help="Only this user's or organisation's.")
@click.option("--sort", type=click.Choice(SORTS), default="downloads", show_default=True, help="The largest first.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="At most so many adapters.")
@click.option("--all", "everything", is_flag=True, help="No limit, within 2000 repositories.")
@click.option("--usable-only", is_flag=True, help="Only adapters that can be used as they are; --limit counts these.")
@click.option("--convertible", is_flag=True, help="With --usable-only: those too that can be converted into LoRA.")
@click.option("--base-alias", multiple=True, metavar="ID", help="Another name of the same weights; may be repeated.")
@click.option("--gated/--no-gated", default=None, help="Only gated ones, or only others; both by default.")
@click.option("--check/--no-check", default=None, help="Compare with the base's linears; by default if its config is here.")
@in_zoo
@as_json
def search_command(
    base: str, text: str | None, author: str | None, sort: str, limit: int, everything: bool, usable_only: bool, convertible: bool,
    base_alias: tuple[str, ...], gated: bool | None, check: bool | None, zoo_path: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Find adapters of a base on the Hub, with a verdict on each.

    Ranks, targets and verdicts are read from the Hub's lists and from the first bytes of files. No weights are downloaded, and
    what was read is kept below the zoo for the next time.

    \b
    Examples:
      recycle search --base org/base
      recycle search --base org/base --text "math german" --sort likes --limit 50
      recycle search --base ./base-folder --base-alias org/base --all --json
    """
    from recycler.intake.searching import search
    from recycler.terminal import bars, say

    if convertible and not usable_only:
        raise UsageError(
            "--convertible goes with --usable-only.", "Without that, all adapters are listed.", "Add --usable-only."
        )
    with bars() as progress:
        report = search(
            base, text, author=author, sort=sort, limit=None if everything else limit, base_alias=base_alias, gated=gated,
            check=check, usable_only=usable_only, convertible=convertible, zoo=open_zoo(zoo_path), progress=progress,
            on_event=lambda stage, name, text: say(text),
        )  # fmt: skip
    if as_json:
        print_json(report.to_json())
    elif report.candidates:
        _table(report)
    else:
        say(f"No adapter of {base} was found" + (" that holds these words." if text else "."))
        for hint in _hints(text, author, gated, base_alias):
            say(f"  {hint}")
    for line in report.summary():
        say(line)
    if report.more and not as_json:
        say("there are more: --limit or --all")
    if any(one.verdict != "usable" for one in report.candidates) and not as_json and sys.stdout.isatty():
        say("reasons in full: --json")
    if not report.complete:
        raise PartialError(
            "Not everything was looked at.", report.stopped or "", "Run it again: what was read is not asked for twice."
        )


def _table(report: SearchReport) -> None:
    """The candidates on stdout: in full when piped, shortened to fit where somebody reads."""
    from recycler.terminal import table

    short = sys.stdout.isatty()
    rows = [
        [
            one.name,
            _thousands(one.downloads) if short else str(one.downloads),
            _span(one.ranks),
            _targets(one.targets, short),
            "?" if one.bytes is None else f"{one.bytes / 1e6:.1f}",
            (one.licence or "?")[: 14 if short else None],
            _verdict(one, short),
        ]
        for one in report.candidates
    ]
    table(["adapter", "downloads" if not short else "down", "rank", "targets", "MB", "licence", "verdict"], rows)


def _verdict(one: Candidate, short: bool) -> str:
    """The verdict and its reason: ``refused: holds its weights as a pickle only``. An address is never cut."""
    text = one.verdict if one.reason == one.verdict else f"{one.verdict}: {one.reason.removeprefix(one.verdict + ', ')}"
    if one.gated and "gated" not in text:
        text = f"gated, {text}"
    return text if not short or len(text) <= 64 or "://" in text else text[:63] + "…"


def _span(ranks: tuple[int, ...]) -> str:
    return "?" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{min(ranks)}–{max(ranks)}"


def _targets(targets: tuple[str, ...], short: bool) -> str:
    """``q, k, v, up``: what linears are called, without the ending they share."""
    if not short:
        return ", ".join(targets)
    named = ",".join(target.removesuffix("_proj") for target in targets)
    return named if len(named) <= 20 else named[:19] + "…"


def _thousands(number: int) -> str:
    """1234567 → 1.2M"""
    for unit, size in (("M", 1_000_000), ("k", 1_000)):
        if number >= size:
            return f"{number / size:.{0 if number >= 10 * size else 1}f}{unit}"
    return str(number)


def _hints(text: str | None, author: str | None, gated: bool | None, aliases: tuple[str, ...]) -> list[str]:
    """What to try where nothing was found."""
    hints = ["Check the spelling of the base: lists are by its exact id."]
    if text or author or gated is not None:
        hints.append("Leave out --text, --author or --gated.")
    if not aliases:
        hints.append("Adapters of quantised copies are listed under those: --base-alias org/base-bnb-4bit")
    return [*hints, "An adapter whose card names no base is in no such list: fetch it by its own id."]
