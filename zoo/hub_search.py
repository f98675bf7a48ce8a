"""What the Hub's list pages say, and the starts of files: enough to judge an adapter without downloading it.

One request is one page of repositories, with their files, tags and cards. A page says where the next one is, and is not trusted
with it: only pages of the same origin that were not seen before are followed. Everything on a page is somebody's text; what has
the wrong type is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args
from urllib.parse import quote, urlencode, urljoin, urlsplit

from recycler.zoo.config import MAX_CONFIG
from recycler.zoo.errors import HubError, UsageError, choices
from recycler.zoo.head_cache import Head, HeadCache
from recycler.zoo.hub_requests import Answer, Wire
from recycler.zoo.inspect import printable

Sort = Literal["downloads", "likes", "last_modified", "created_at"]
SORTS: tuple[str, ...] = get_args(Sort)
PAGE = 100
"""Repositories asked for at once, at least; a Hub may give fewer."""
MAX_PAGE = 500
HEAD_BYTES = 256_000
"""What is read of a weights file: 97 % of the Hub's safetensors have headers below 100 kB (huggingface_hub, hf_api.py)."""
_MAX_BODY = 32_000_000
_MAX_FILES = 20_000
_EXPAND = ("sha", "tags", "downloads", "likes", "gated", "siblings", "cardData", "library_name", "createdAt", "lastModified")
_WIRE_NAMES: Mapping[str, str] = {"last_modified": "lastModified", "created_at": "createdAt"}
_SLUG = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class PagingError(HubError):
    """The listing leads astray, so that it ends before its end; the pages before that stand."""


@dataclass(frozen=True)
class Listed:
    """A repository as a list page shows it, unjudged; all texts are as the Hub gave them.

    Attributes:
        repo: ``org/name``. commit: what its default branch is at, None where the page does not say.
        files: their paths. card: the YAML of its README, parsed by the Hub.
        created, modified: ISO 8601.
        under: the base by whose filter it was found.
    """

    repo: str
    commit: str | None
    files: tuple[str, ...]
    tags: tuple[str, ...]
    card: Mapping[str, Any]
    downloads: int
    likes: int
    gated: bool
    created: str
    modified: str
    library: str
    under: str = ""
    notes: tuple[str, ...] = field(default=())


class Sortable(Protocol):
    """What has the facts that lists are sorted by."""

    @property
    def downloads(self) -> int: ...
    @property
    def likes(self) -> int: ...
    @property
    def created(self) -> str: ...
    @property
    def modified(self) -> str: ...


def order(one: Sortable, sort: str) -> tuple[int, str]:
    """What it is sorted by, one of `SORTS`; the Hub gives the largest first."""
    number = {"downloads": one.downloads, "likes": one.likes}.get(sort, 0)
    return number, {"last_modified": one.modified, "created_at": one.created}.get(sort, "")


def pages(
    wire: Wire,
    base: str,
    *,
    search: str | None = None,
    author: str | None = None,
    gated: bool | None = None,
    sort: str = "downloads",
    size: int = PAGE,
) -> Iterator[list[Listed]]:
    """The repositories whose cards name `base` as an adapter's base, page by page, one request each.

    Args:
        search: only those whose ids hold this text, as the Hub understands it.
        author: only this user's or organisation's. gated: only gated ones, or only others.
        sort: one of `SORTS`, the largest first.
        size: repositories a page, as far as the Hub gives as many.

    Raises:
        HubError: a page cannot be had. PagingError: there is a next page, but it must not be followed.
    """
    asked: dict[str, Any] = {
        "filter": f"base_model:adapter:{base}",
        "search": search,
        "author": author,
        "gated": None if gated is None else str(gated).lower(),
        "sort": _WIRE_NAMES.get(sort, sort),
        "limit": max(1, min(size, MAX_PAGE)),
        "expand": list(_EXPAND),
    }
    query = urlencode({key: value for key, value in asked.items() if value is not None}, doseq=True)
    url: str | None = f"{wire.endpoint}/api/models?{query}"
    urls: set[str] = set()
    repos: set[str] = set()
    while url is not None:
        urls.add(url)
        items, link = wire.get("api", f"The list of adapters of {base}", url, _page, limit=_MAX_BODY)
        found = [one for item in items if (one := _listed(item, base)) is not None]
        yield found
        if link is None:
            return
        if repos >= {one.repo for one in found}:
            raise _astray(link, "the page brought nothing that was not on those before")
        repos |= {one.repo for one in found}
        url = _following(wire.endpoint, url, link, urls)


def collection(slug: str, *, token: str | bool | None = None, endpoint: str | None = None) -> list[str]:
    """The ids of the models in a collection of the Hub, in its order, by one request.

    Args:
        slug: ``owner/title-0123abcd``, or the address of its page.

    Raises:
        UsageError: it is no slug. HubError: it cannot be had.
    """
    name = slug.rsplit("/collections/", 1)[-1].strip("/")
    if not _SLUG.fullmatch(name):
        raise UsageError(
            f"{printable(slug)!r} is no collection.",
            "A collection is written owner/title-0123abcd.",
            "Copy it from the address of its page, behind /collections/.",
            code="E_SOURCE",
        )

    def read(answer: Answer) -> list[str]:
        found = _json(answer)
        items = found.get("items") if isinstance(found, dict) else None
        if not isinstance(items, list):
            raise ValueError("the answer is no collection")
        kept = (item for item in items if isinstance(item, dict) and item.get("type") == "model")
        return list(dict.fromkeys(_text(item.get("id")) for item in kept if _text(item.get("id"))))

    wire = Wire(token=token, endpoint=endpoint)
    return wire.get("api", f"The collection {name}", f"{wire.endpoint}/api/collections/{quote(name)}", read, limit=_MAX_BODY)


def exists(wire: Wire, repo: str) -> bool | None:
    """Whether the Hub has this model, for all that it tells; None where it cannot be asked. One request."""
    try:
        return wire.get("api", repo, f"{wire.endpoint}/api/models/{quote(repo)}", lambda answer: True, limit=_MAX_BODY)
    except HubError as error:
        return False if "was not found" in error.what else None


def base_config(wire: Wire, base: str) -> bytes:
    """The config.json of a base, by one request. Raises HubError: it cannot be had."""

    def read(answer: Answer) -> bytes:
        if answer.status != 200 or not answer.whole:
            raise ValueError(f"the Hub answered {answer.status} with {len(answer.body):,} bytes")
        return answer.body

    return wire.get("resolvers", base, f"{wire.endpoint}/{quote(base)}/resolve/main/config.json", read, limit=MAX_CONFIG)


def config_start(wire: Wire, cache: HeadCache, repo: str, commit: str, path: str) -> Head:
    """A small file at a commit, cut after what a config may hold; from the cache where it is there.

    Raises:
        HubError: it cannot be had. StopError: nothing more can be asked for now.
    """
    return _start(wire, cache, repo, commit, path, MAX_CONFIG + 1, ranged=False)


def weights_start(wire: Wire, cache: HeadCache, repo: str, commit: str, path: str) -> Head:
    """The length and the JSON header of a safetensors file, by one range request; from the cache where it is there.

    A header that does not fit into `HEAD_BYTES` is cut, to its first bytes; so is what is no safetensors file.

    Raises:
        As `config_start`.
    """
    return _start(wire, cache, repo, commit, path, HEAD_BYTES, ranged=True)


def _start(wire: Wire, cache: HeadCache, repo: str, commit: str, path: str, limit: int, *, ranged: bool) -> Head:
    held = cache.get(repo, commit, path)
    if held is not None:
        return held

    def read(answer: Answer) -> Head:
        if answer.commit is not None and answer.commit != commit:
            raise ValueError(f"it is from commit {printable(answer.commit, 50)}, not {commit}")
        size = _size(answer)
        if answer.status == 416:
            return Head(b"", size)
        if size is not None and len(answer.body) < min(size, limit):
            raise ValueError(f"it has {len(answer.body)} bytes of {size}")
        if not ranged:
            return Head(answer.body, size)
        if size is None:
            raise ValueError("the answer does not say how large the file is")
        header = 8 + int.from_bytes(answer.body[:8], "little")
        return Head(answer.body[: header if header <= len(answer.body) else 16], size)

    url = f"{wire.endpoint}/{quote(repo)}/resolve/{commit}/{quote(path)}"
    head = wire.get("resolvers", repo, url, read, limit=limit, ranged=ranged)
    cache.put(repo, commit, path, head)
    return head


def _size(answer: Answer) -> int | None:
    """Of the whole file, as the answer says."""
    if answer.status == 206:
        found = re.fullmatch(r"bytes 0-\d+/(\d{1,18})", answer.headers.get("content-range", ""))
        if not found:
            raise ValueError("the answer holds another part of the file")
        return int(found[1])
    if answer.status == 416 and answer.headers.get("content-range") == "bytes */0":
        return 0
    if answer.status != 200:
        raise ValueError(f"the Hub answered {answer.status}")
    if answer.whole:
        return len(answer.body)
    said = answer.headers.get("content-length", "")
    return int(said) if re.fullmatch(r"\d{1,18}", said) and "content-encoding" not in answer.headers else None


def _page(answer: Answer) -> tuple[list[Any], str | None]:
    found = _json(answer)
    if not isinstance(found, list):
        raise ValueError("the answer is no list of models")
    return found, answer.next


def _json(answer: Answer) -> Any:
    if answer.status != 200 or not answer.whole:
        raise ValueError(
            f"the Hub answered {answer.status} with {'' if answer.whole else 'more than '}{len(answer.body):,} bytes"
        )
    try:
        return json.loads(answer.body)
    except RecursionError:
        raise ValueError("the answer is nested too deeply") from None


def _following(endpoint: str, url: str, link: str, seen: set[str]) -> str:
    """The next page's address; a relative one counts from this page's."""
    try:
        there = urljoin(url, link)
        same = urlsplit(there)[:2] == urlsplit(endpoint)[:2]
    except ValueError:
        there, same = link, False
    if not same or not there.isprintable() or not there.isascii():
        raise _astray(link, "it leads away from the Hub")
    if there in seen or len(there) > 8_000:
        raise _astray(link, "it leads back to a page that was read")
    return there


def _astray(link: str, why: str) -> PagingError:
    return PagingError(
        "The Hub's list of adapters ends before its end.",
        f"Its next page, {printable(link, 80)}, was not followed: {why}.",
        "What was listed before stands. Run it again later, or narrow the search with --author or --text.",
    )


def _listed(item: Any, base: str) -> Listed | None:
    """A repository from a page; None where it has no id."""
    if not isinstance(item, dict) or not _text(item.get("id")):
        return None
    files = [_text(one.get("rfilename")) for one in _list(item.get("siblings")) if isinstance(one, dict)]
    card = item.get("cardData")
    cut = (f"it has {len(files):,} files, of which {_MAX_FILES:,} were looked at",) if len(files) > _MAX_FILES else ()
    return Listed(
        repo=item["id"],
        commit=_text(item.get("sha")) or None,
        files=tuple(name for name in files[:_MAX_FILES] if name),
        tags=tuple(tag for tag in _list(item.get("tags")) if isinstance(tag, str)),
        card=card if isinstance(card, dict) else {},
        downloads=_count(item.get("downloads")),
        likes=_count(item.get("likes")),
        gated=item.get("gated") not in (None, False),
        created=_text(item.get("createdAt")),
        modified=_text(item.get("lastModified")),
        library=_text(item.get("library_name")),
        under=base,
        notes=cut,
    )


def check_sort(sort: str) -> None:
    """Raises UsageError unless `sort` is one of `SORTS`."""
    if sort not in SORTS:
        raise UsageError(f"{printable(sort)!r} is nothing to sort by.", "", f"Sort by {choices(SORTS)}.")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**63 else 0
