"""Adapters of a base on the Hub: found in its lists, judged from configs and headers, before anything is downloaded.

One request lists a page of repositories; an adapter costs at most two more, kept on disk below the zoo, so that the same search
costs only the listing the next time. Threads look at adapters side by side and rest together where the Hub asks for it.
"""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from recycler.intake.search_report import SearchReport, repositories
from recycler.zoo import hub_search, inspect, match
from recycler.zoo.aliases import hub_id_of
from recycler.zoo.client_cache import is_offline
from recycler.zoo.errors import HubError, RecycleError, UsageError
from recycler.zoo.head_cache import HeadCache
from recycler.zoo.hub_requests import StopError, Wire
from recycler.zoo.hub_search import Listed
from recycler.zoo.inspect import printable
from recycler.zoo.preview import Candidate, judge, places, unjudged
from recycler.zoo.store import Zoo

SCAN_LIMIT = 2000
"""Repositories that one search lists at most: 20 pages, of the 500 requests that an anonymous caller has in five minutes."""
WORKERS = 8
_CARD_FIELDS = ("datasets", "language", "tags", "title", "model_name", "pipeline_tag")


def search(
    base: str | Path,
    text: str | None = None,
    *,
    author: str | None = None,
    sort: str = "downloads",
    limit: int | None = 20,
    base_alias: Sequence[str] | None = None,
    gated: bool | None = None,
    check: bool | None = None,
    usable_only: bool = False,
    convertible: bool = False,
    zoo: Zoo | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    max_bytes: int = inspect.MAX_BYTES,
    progress: Callable[[int, str], Callable[..., None]] | None = None,
    on_event: Callable[[str, str, str], None] | None = None,
) -> SearchReport:
    """Adapters of a base on the Hub, each with a verdict; no weights are downloaded.

    Args:
        base: a Hub id, or a folder. A folder needs a name on the Hub: that of the client's cache, or a `base_alias`.
        text: words that must all occur in an adapter's id, tags or card (datasets, language, title), in any case.
        author: only this user's or organisation's.
        sort: downloads, likes, last_modified or created_at, the largest first.
        limit: at most so many adapters; all where None, within `SCAN_LIMIT` repositories.
        base_alias: further names of the same weights, listed too and accepted as what an adapter declares.
        gated: only gated ones, or only others; both where None.
        check: compare sites with the base's linears. Where None, if its config is at hand (a folder, or in the client's
            cache); True costs one more request where it is not.
        usable_only: `limit` counts adapters that can be used as they are; with `convertible`, those too that can be converted.
            Others are looked at and left out.
        zoo: below it, answers are kept (``<zoo>/cache/search``); the default zoo where None.
        token: an access token for the Hub; the saved one where None. endpoint: another Hub than the default.
        max_bytes: the most that one adapter's files may hold together.
        progress: called with a number of steps and a text; returns what is called after each step.
        on_event: called with "listed" or "wait", the base, and a text for people.

    Raises:
        UsageError: the base has no name on the Hub, or an argument is out of its range.
        HubError: the Hub cannot be asked, or is offline. What goes wrong later is in the report.
    """
    hub_search.check_sort(sort)
    if limit is not None and limit < 1:
        raise UsageError(f"A limit of {limit} finds nothing.", "", "Give a whole number above 0.")
    aliases = tuple(base_alias or ())
    ids = _hub_ids(str(base), aliases)
    wire = _wire(ids[0], token, endpoint)
    cache = HeadCache((Zoo() if zoo is None else zoo).path / "cache" / "search")
    run = _Run(str(base), aliases, wire, cache, usable_only, convertible, max_bytes, progress or _silent)
    told = on_event or (lambda *event: None)
    lists = _Lists(wire, ids, text or "", author, gated, sort, limit, told)
    try:
        with wire.telling(lambda seconds: told("wait", str(base), f"the Hub asks to wait {seconds:.0f} s")):
            found = run.collect(lists, limit, check)
    except BaseException:  # Ctrl-C among them: no thread goes on asking
        wire.close()
        raise
    if lists.problems and not lists.scanned:
        raise lists.problems[0]
    notes = list(run.notes)
    if lists.exhausted_scan:
        notes.append(f"only the first {SCAN_LIMIT:,} repositories were scanned; narrow it with --author or --text")
    if not lists.scanned and hub_search.exists(wire, ids[0]) is False:
        notes.append(f"the Hub has no model {printable(ids[0])}, or it is private: check the spelling")
    stopped = [run.stopped] if run.stopped else []
    for one in lists.problems[:1]:
        reason = one.advice if isinstance(one, StopError) else f"{one.what} {one.why}"
        stopped.append(f"the list ends early, after {repositories(lists.scanned)}: {reason}")
    return SearchReport(
        base=str(base),
        listed_under=tuple(ids),
        candidates=tuple(sorted(found, key=lambda one: hub_search.order(one, sort), reverse=True)),
        scanned=lists.scanned,
        more=lists.more,
        listing_calls=wire.counts["api"],
        resolver_calls=wire.counts["resolvers"],
        cached=cache.hits,
        stopped="; ".join(stopped) or None,
        wait_s=wire.stopped.seconds if wire.stopped else None,
        notes=tuple(notes),
    )


class _Lists:
    """The repositories of all lists in one order, each once: those that the Hub finds for the text first, then all others that
    hold its words."""

    def __init__(
        self,
        wire: Wire,
        ids: Sequence[str],
        text: str,
        author: str | None,
        gated: bool | None,
        sort: str,
        limit: int | None,
        told: Callable[[str, str, str], None],
    ) -> None:
        self.words = text.casefold().split()
        self.gated = gated
        self.scanned = self._said = 0
        self.exhausted_scan = False
        self.more = False
        self.problems: list[HubError] = []
        # One more than wanted, so that what is behind the limit is known without another page.
        size = hub_search.MAX_PAGE if limit is None or self.words else max(hub_search.PAGE, limit + 1)
        # The Hub's own search knows ids only. The longest word finds every id that holds them all, and few others.
        searches = [max(self.words, key=len), None] if self.words else [None]

        def order(one: Listed) -> tuple[int, str]:
            return hub_search.order(one, sort)

        def pages(base: str, search: str | None) -> Iterator[Listed]:
            try:
                for page in hub_search.pages(wire, base, search=search, author=author, gated=gated, sort=sort, size=size):
                    yield from sorted(page, key=order, reverse=True)
                    if self.scanned != self._said:  # the second list may hold nothing new
                        self._said = self.scanned
                        told("listed", base, f"{repositories(self.scanned)} listed")
            except HubError as error:
                self.problems.append(error)

        self._all = (
            one for search in searches for one in heapq.merge(*(pages(base, search) for base in ids), key=order, reverse=True)
        )
        self._wanted = self._scan()

    def __iter__(self) -> Iterator[Listed]:
        return self._wanted

    def _scan(self) -> Iterator[Listed]:
        seen: set[str] = set()
        for one in self._all:
            if one.repo in seen:
                continue
            if len(seen) >= SCAN_LIMIT:
                self.exhausted_scan = self.more = True
                return
            seen.add(one.repo)
            self.scanned = len(seen)
            if self.gated in (None, one.gated) and _holds(one, self.words):
                yield one


@dataclass
class _Run:
    """One search: what is the same for all adapters, and what was noticed on the way."""

    base: str
    aliases: tuple[str, ...]
    wire: Wire
    cache: HeadCache
    usable_only: bool
    convertible: bool
    max_bytes: int
    progress: Callable[[int, str], Callable[..., None]]
    notes: list[str] = field(default_factory=list)
    stopped: str | None = None
    shapes: Mapping[str, tuple[int, int]] | None = None

    def collect(self, lists: _Lists, limit: int | None, check: bool | None) -> list[Candidate]:
        """Judge what the lists hold, a batch at a time, until there are `limit` wanted ones."""
        waiting = _places(lists)
        found: list[Candidate] = []
        looked = total = 0
        pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="search")
        try:
            while limit is None or len(found) < limit:
                need = None if limit is None else limit - len(found)
                if need is not None and self.usable_only:
                    need = max(need, WORKERS)
                batch = list(islice(waiting, need))
                if not batch:
                    break
                if not total:
                    self.shapes = self._shapes(check)
                judged, reached = self._judge(pool, batch)
                looked, total = looked + reached, total + len(batch)
                found += [one for one in judged if self._wanted(one)][: None if limit is None else limit - len(found)]
                if reached < len(batch):
                    break
            if limit is not None and len(found) >= limit:  # with words, looking for one more could mean to scan all
                lists.more = bool(lists.words) or next(waiting, None) is not None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()
        if looked < total:
            advice = self.wire.stopped.advice if self.wire.stopped else "run it again"
            self.stopped = f"stopped after {looked} of {total}: {advice}"
        return found

    def _judge(self, pool: ThreadPoolExecutor, batch: Sequence[_Place]) -> tuple[list[Candidate], int]:
        """The verdicts in order, and how many were reached."""
        step = self.progress(len(batch), "looking at adapters")
        judged: list[Candidate] = []
        reached = 0
        for one in pool.map(self._one, batch):
            judged.append(one or unjudged(*batch[len(judged)]))
            reached += one is not None
            step()
        return judged, reached

    def _one(self, at: _Place) -> Candidate | None:
        """The verdict on one adapter; None where the Hub cannot be asked any more."""
        listed, place, notes = at
        try:
            return judge(
                listed,
                place,
                wire=self.wire,
                cache=self.cache,
                base=self.base,
                aliases=self.aliases,
                shapes=self.shapes,
                max_bytes=self.max_bytes,
                notes=notes,
            )
        except StopError:
            return None
        except Exception as error:  # files are made to find a fault in their reader; it must not cost the others
            text = f"a fault in this program: {type(error).__name__}: {printable(error)}"
            return replace(
                unjudged(listed, place, notes), reason=text, why=text, fix="Please report it, with the adapter's name."
            )

    def _wanted(self, one: Candidate) -> bool:
        return not self.usable_only or one.verdict == "usable" or (self.convertible and one.verdict == "convertible")

    def _shapes(self, check: bool | None) -> Mapping[str, tuple[int, int]] | None:
        """Of the base's linears, None where they are not to be compared or not to be had."""
        if check is False:
            return None
        folder = _folder_of(self.base)
        if folder is None and check is None:
            return None
        from recycler.base import linear_shapes

        try:
            if folder is not None:
                return linear_shapes(str(folder))
            with tempfile.TemporaryDirectory() as temporary:
                (Path(temporary) / "config.json").write_bytes(hub_search.base_config(self.wire, self.base))
                return linear_shapes(temporary)
        except Exception as error:  # transformers has many ways to say that it cannot build a model
            reason = error.what if isinstance(error, RecycleError) else f"{type(error).__name__}: {error}"
            self.notes.append(f"sites were not compared with {printable(self.base)}: {printable(reason, 200)}")
            return None


_Place = tuple[Listed, str, tuple[str, ...]]


def _places(lists: Iterable[Listed]) -> Iterator[_Place]:
    for listed in lists:
        found, notes = places(listed)
        for number, place in enumerate(found):
            yield listed, place, notes if number == 0 else ()


def _hub_ids(base: str, aliases: Sequence[str]) -> list[str]:
    """The names of the base on the Hub, its own first."""
    odd = [alias for alias in aliases if not match.is_hub_id(alias)]
    if odd:
        raise UsageError(
            f"{printable(odd[0])!r} is no id of the Hub.",
            "An alias is another name of the base there.",
            "Write org/name.",
            code="E_SOURCE",
        )
    own = (hub_id_of(str(Path(base).expanduser().resolve())) or "") if inspect.is_folder(base) else base
    ids = list(dict.fromkeys(name for name in (own, *aliases) if match.is_hub_id(name)))
    if not ids and inspect.is_folder(base):
        raise UsageError(
            f"{printable(base)} is a folder, and nothing says what it is called on the Hub.",
            "Adapters are listed there by the id of their base.",
            "Add that id: --base-alias org/base",
            code="E_SOURCE",
        )
    if not match.is_hub_id(own) and own:
        raise UsageError(
            f"{printable(base)!r} is neither an id of the Hub nor a folder.", "", "Write --base org/name.", code="E_SOURCE"
        )
    return ids


def _wire(base: str, token: str | bool | None, endpoint: str | None) -> Wire:
    if is_offline():
        raise HubError(
            f"Adapters of {printable(base)} cannot be looked for: offline mode is on.",
            "HF_HUB_OFFLINE is set, and no request is made.",
            "Unset it to search. What is in the zoo needs no network: recycle zoo list",
            code="E_OFFLINE",
        )
    return Wire(token=token, endpoint=endpoint)


def _folder_of(base: str) -> Path | None:
    """Where the base's config lies on this machine, None where it does not."""
    if inspect.is_folder(base):
        return Path(base).expanduser()
    from huggingface_hub import try_to_load_from_cache

    try:
        held = try_to_load_from_cache(base, "config.json")
    except ValueError:
        return None
    return Path(held).parent if isinstance(held, str) else None


def _holds(listed: Listed, words: Sequence[str]) -> bool:
    """Whether every word occurs in the id, the tags or the card."""
    if not words:
        return True
    texts = [listed.repo, *listed.tags]
    for key in _CARD_FIELDS:
        value = listed.card.get(key)
        texts += [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
    everything = "\n".join(texts).casefold()
    return all(word in everything for word in words)


def _silent(steps: int, what: str) -> Callable[..., None]:
    return lambda *args, **options: None
