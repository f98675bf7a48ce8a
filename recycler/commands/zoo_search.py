"""`recycle zoo search`, `zoo copies`, `zoo clusters`: a few out of many, before anything is profiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from recycler.options import as_json, in_zoo, open_zoo, print_json
from recycler.zoo.errors import InputError, UsageError

if TYPE_CHECKING:
    from recycler.zoo.adapter import Adapter
    from recycler.zoo.manifest import Entry
    from recycler.zoo.store import Zoo


def _names_only(what: str) -> Callable[..., Any]:
    return click.option("--names", is_flag=True, help=f"Print {what} in one line, with commas: what --adapters takes.")


@click.command(name="search")
@click.argument("text", nargs=-1)
@click.option("--like", metavar="NAME|FOLDER", help="Those whose weights change the base as this adapter does.")
@click.option("--estimate", is_flag=True, help="With --like: by sketches alone, without reading weights.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="At most so many.")
@click.option("--offset", type=click.IntRange(min=0), default=0, metavar="N", help="Leave out the N best; for TEXT alone.")
@_names_only("names")
@in_zoo
@as_json
def zoo_search(
    text: tuple[str, ...], like: str | None, estimate: bool, limit: int, offset: int, names: bool, zoo_path: str | None, as_json: bool
) -> None:  # fmt: skip
    """Find adapters in the zoo by words, or by their weights.

    TEXT is looked for in names, sources, bases, licences and cards; every word must begin a word there. --like ranks by the cosine of
    whole updates: candidates by sketches of 256 numbers, which are made at the first search, then compared exactly. Both together:
    those with the words, most alike first.

    \b
    Examples:
      recycle zoo search german summar
      recycle zoo search math --like gsm8k-lora --limit 10
      SOME=$(recycle zoo search math --limit 40 --names)
      recycle profile tasks/*.jsonl --adapters "$SOME"
    """
    from recycler.terminal import bars, say, table

    words = " ".join(text)
    if not words and not like:
        raise UsageError(
            "A search needs words, or an adapter.", "", "Give TEXT, --like NAME, or both; or see: recycle zoo list"
        )
    if like and offset:
        raise UsageError("--offset goes through what TEXT finds.", "--like has no end to go on to.", "Use --limit.")
    if estimate and not like:
        raise UsageError("--estimate is about --like.", "", "Add --like NAME, or leave it out.")
    zoo = open_zoo(zoo_path)
    found: list[tuple[Entry, dict[str, Any]]]
    if like:
        from recycler.zoo.neighbours import alike

        among = zoo.matching(words) if words else None
        with bars() as progress:
            near = alike(zoo, _target(zoo, like), limit, among, exact=not estimate, progress=_if_long(progress))
        found = [(zoo.entry(one.name), {"cosine": one.cosine, "estimate": one.estimate}) for one in near]
        total = len(zoo) if among is None else len(among)
    else:
        found = [(one.entry, {"excerpt": one.excerpt}) for one in zoo.search(words, limit, offset)]
        total = zoo.index.matches(words) if found else 0
    if as_json:
        print_json({"schema_version": 1, "total": total, "adapters": [{**_brief(e), **more} for e, more in found]})
        return
    if names:
        click.echo(",".join(entry.name for entry, _ in found))
    elif like:
        rows = [[e.name, _cosine(more), _ranks(e), e.base or "?", e.licence or "?", e.source] for e, more in found]
        table(["name", "cosine", "rank", "base", "licence", "source"], rows)
        say(
            "~ estimated by sketches, to about 0.06"
            if any(more["cosine"] is None for _, more in found)
            else "cosines of whole updates"
        )
    else:
        based = len({e.base for e, _ in found}) > 1  # else it says nothing, and the room is dear
        rows = [[e.name, *([e.base or "?"] * based), e.licence or "?", e.source, more["excerpt"]] for e, more in found]
        table(["name", *(["base"] * based), "licence", "source", "in its card"], rows)
    if not found:
        say("nothing was found")
    elif not like and offset + len(found) < total:
        say(f"{offset + 1} to {offset + len(found)} of {total}; go on with --offset {offset + len(found)}")


@click.command(name="copies")
@click.option("--above", type=click.FloatRange(0.9, 1), default=0.999, show_default=True, help="The least cosine.")
@in_zoo
@as_json
def zoo_copies(above: float, zoo_path: str | None, as_json: bool) -> None:
    """Find adapters that do the same as another, without comparing all pairs.

    Candidates are found by sketches, and compared exactly. `recycle zoo check` compares everything with everything, which is better
    up to some hundred adapters: it looks at DoRA's magnitudes and at biases as well.

    \b
    Examples:
      recycle zoo copies --above 0.98 --json
    """
    from recycler.terminal import bars, say, table
    from recycler.zoo.neighbours import copies

    zoo = open_zoo(zoo_path)
    with bars() as progress:
        pairs = copies(zoo, above, progress=_if_long(progress))
    if as_json:
        print_json({"schema_version": 1, "pairs": [{"a": a, "b": b, "cosine": value} for a, b, value in pairs]})
        return
    table(["name", "does the same as", "cosine"], [[b, a, f"{value:.4f}"] for a, b, value in pairs])
    say(f"{len(pairs)} pairs with a cosine above {above:g}, among {len(zoo)} adapters")


@click.command(name="clusters")
@click.argument("text", nargs=-1)
@click.option("--count", type=click.IntRange(min=1), required=True, metavar="K", help="How many clusters.")
@click.option("--seed", default=0, show_default=True, help="Of k-means; the same every time.")
@_names_only("each cluster's centre")
@in_zoo
@as_json
def zoo_clusters(text: tuple[str, ...], count: int, seed: int, names: bool, zoo_path: str | None, as_json: bool) -> None:
    """Group adapters by what their weights do to the base.

    Of the whole zoo, or of those with the words of TEXT. A centre is the adapter nearest to its cluster's mean: one each makes a varied
    set to profile.

    \b
    Examples:
      recycle zoo clusters --count 10
      SOME=$(recycle zoo clusters --count 40 --names)
      recycle profile tasks/*.jsonl --adapters "$SOME"
    """
    from recycler.terminal import bars, say, table
    from recycler.zoo.errors import shorten
    from recycler.zoo.neighbours import clusters

    zoo = open_zoo(zoo_path)
    among: Sequence[str] | None = zoo.matching(" ".join(text)) if text else None
    with bars() as progress:
        groups = clusters(zoo, count, among, seed=seed, progress=_if_long(progress))
    if as_json:
        shown = [{"centre": one.centre, "cosine": one.cosine, "adapters": list(one.names)} for one in groups]
        print_json({"schema_version": 1, "clusters": shown})
    elif names:
        click.echo(",".join(group.centre for group in groups))
    else:
        rows = [
            [one.centre, str(len(one.names)), f"{one.cosine:.2f}" if one.names[1:] else "–", shorten(one.names[1:], 6)]
            for one in groups
        ]
        table(["centre", "adapters", "cosine", "and"], rows)
        say("cosine: the mean over pairs in the cluster; near 0 they have nothing in common")


def _target(zoo: Zoo, like: str) -> str | Adapter:
    """An adapter of the zoo by its name, or one in a folder."""
    from pathlib import Path

    if like in zoo:
        return like
    if Path(like).is_dir():
        from recycler.zoo import formats

        return formats.read(Path(like), "like")[0]
    if "/" in like:
        raise InputError(
            f"There is no folder {like}.", "--like takes an adapter of the zoo, or a folder that holds one.", "", code="E_FILES"
        )
    zoo.entry(like)
    return like


def _if_long(progress: Callable[[int, str], Callable[..., None]]) -> Callable[[int, str], Callable[..., None]]:
    """Bars for what takes a while: making many sketches, not looking up one."""
    return lambda steps, what: progress(steps, what) if steps >= 20 else lambda count=1, note="": None


def _brief(entry: Entry) -> dict[str, Any]:
    whole = entry.to_json()
    return {
        "name": entry.name,
        **{key: whole[key] for key in ("source", "revision", "base", "licence", "ranks", "sites", "parameters")},
    }


def _ranks(entry: Entry) -> str:
    return ", ".join(map(str, entry.ranks))


def _cosine(found: dict[str, Any]) -> str:
    exact = found["cosine"]
    return f"~{found['estimate']:.2f}" if exact is None else f"{exact:.3f}"
