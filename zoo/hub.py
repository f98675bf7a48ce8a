"""The one module that touches the network: adapters from the Hub, pinned, and checked against their hashes.

The client under it, ``huggingface_hub``, does the transfers. What it leaves to its callers is done here and in two files beside:

- it never hashes what it downloads, so contents are compared with the Hub's hashes, and a damaged cache is healed once;
- it takes files of another commit than was asked for, and follows renamed repositories without a word;
- it retries some calls and not others, and some have no time limit: `patience`;
- its errors bury the reason: `hub_errors`;
- its cache holds hashes that it does not use: `client_cache`.

Nothing is imported from it before the first call: it reads its environment when imported, and importing it is slow.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from recycler.zoo import client_cache, inspect
from recycler.zoo.counting import OnBytes, counter
from recycler.zoo.errors import HubError, InputError, SecurityError, shorten
from recycler.zoo.hub_errors import is_busy, is_unspent
from recycler.zoo.inspect import printable
from recycler.zoo.patience import patiently
from recycler.zoo.safetensors_header import header_length, parse_header
from recycler.zoo.sources import INITIAL, Download, FileFact, Listing, Source, is_commit

_PEEK_S = 10.0
_HEAD = 128_000  # nearly all headers of adapters are shorter
_DATA = (".json", ".jsonl", ".safetensors", ".md", ".txt", ".jinja", ".csv", ".svg", ".png")

Pick = Callable[[Mapping[str, int]], Sequence[str] | None]
"""From name → bytes, the names of the files to take; None for an adapter's own, as `inspect.check_listing` vets them."""


def look(
    source: Source,
    *,
    max_bytes: int = inspect.MAX_BYTES,
    pick: Pick | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> Listing:
    """Resolve the revision to a commit and vet the listing there. One request, none offline; nothing is downloaded.

    Args:
        source: a repository.
        max_bytes: the most that the files may hold together.
        pick: chooses other files at the source's place than a PEFT adapter's own.

    Raises:
        HubError: the repository, the revision or the network is not to be had; it says why.
        InputError: it holds no adapter, or too large a one. SecurityError: it holds pickled weights only, or names that
            could do harm.
    """
    licence: str | None = None
    notes: tuple[str, ...] = ()
    if client_cache.is_offline():
        repo = source.repo
        commit, everything, notes = client_cache.look(source)
    else:
        repo, commit, everything, licence = _list(source, token, endpoint)
    prefix = source.subfolder + "/" if source.subfolder else ""
    facts: dict[str, FileFact] = {}
    initial: dict[str, FileFact] = {}
    elsewhere = set()
    for fact in everything:
        name = fact.path.removeprefix(prefix)
        parent, _, file = name.rpartition("/")
        if fact.path.startswith(prefix) and not parent:
            facts[name] = fact
        elif fact.path.startswith(prefix) and INITIAL.fullmatch(parent) and file in (inspect.CONFIG, inspect.WEIGHTS):
            initial[name] = fact
        elif fact.path.endswith("/" + inspect.CONFIG):
            elsewhere.add(printable(fact.path.removesuffix("/" + inspect.CONFIG)))
    sizes = {name: fact.size for name, fact in facts.items()}
    own = pick(sizes) if pick is not None else None
    if own is None and inspect.CONFIG not in facts and elsewhere:
        at = f"@{source.revision}" if source.revision else ""
        raise InputError(
            f"{source.text} has no adapter at this place.",
            f"Its adapters lie in subfolders: {shorten(sorted(elsewhere))}.",
            f"Name one, e.g. {source.repo}{at}/{sorted(elsewhere)[0]}",
            code="E_NO_ADAPTER",
        )
    if own is None:
        own = inspect.check_listing(source.text, sizes, max_bytes)
    if repo != source.repo:
        notes = (f"{printable(source.repo)} is now called {printable(repo)}",)
    return Listing(repo, commit, {name: facts[name] for name in own}, initial, licence, notes)


def download(
    source: Source,
    into: Path,
    *,
    max_bytes: int = inspect.MAX_BYTES,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> Download:
    """Download an adapter's own files into the folder `into`, at one commit, with contents checked.

    Args:
        source: a repository.
        into: an existing folder; the files are plain copies there, not links into the client's cache.
        max_bytes: the most that the files may hold together; checked before anything is downloaded.
        token: an access token; the saved or environment's one where None.
        endpoint: another Hub than the default.

    Raises:
        As `look` and `download_files`.
    """
    listing = look(source, max_bytes=max_bytes, token=token, endpoint=endpoint)
    return download_files(source, listing, into, token=token, endpoint=endpoint)


def prefetch(
    source: Source,
    listing: Listing,
    *,
    only: Collection[str] | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    on_bytes: OnBytes | None = None,
) -> dict[str, Path]:
    """Bring the listed files (of them `only` some) into the client's cache, where `download_files` finds them without a request: what takes long is
    over before a place for the adapter is made. Files that are complete in the cache are not asked for again.

    Returns:
        Name → where it lies in the cache. Contents are not checked: `download_files` does that.

    Raises:
        HubError: the network, or access. SecurityError: they are of another commit than was asked for.
    """
    paths = {}
    for name, fact in listing.files.items():
        if only is not None and name not in only:
            continue
        seen = 0

        def count(size: int) -> None:
            nonlocal seen
            seen += size
            if on_bytes is not None:
                on_bytes(size)

        paths[name] = _cached(source, listing, fact, False, token, endpoint, count)
        count(fact.size - seen)  # what was in the cache already
    return paths


def download_files(
    source: Source,
    listing: Listing,
    into: Path,
    *,
    only: Collection[str] | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> Download:
    """Download the listed files (of them `only` some), with contents checked.

    Raises:
        HubError: the network, or access. SecurityError: contents differ from the hash, even afresh, or are of another commit.
    """
    sums: dict[str, str] = {}
    notes = list(listing.notes)
    for name, fact in listing.files.items():
        if only is None or name in only:
            (into / name).parent.mkdir(exist_ok=True)
            _, sums[name], note = _fetch_file(source, listing, fact, into / name, token, endpoint)
            notes += note
    return Download(into, listing.revision, sums, tuple(notes))


def header(
    source: Source, listing: Listing, *, token: str | bool | None = None, endpoint: str | None = None
) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape of the adapter's weights, by a range request or two: the weights stay on the Hub.

    Raises:
        HubError: it is not to be had. SecurityError: it is no safetensors file, or of another commit. InputError: it is cut short.
    """
    from recycler.zoo.hub_requests import Answer, Wire

    wire = Wire(token=token, endpoint=endpoint)
    fact = listing.files[inspect.WEIGHTS]
    where = f"{source.text}: {inspect.WEIGHTS}"
    url = f"{wire.endpoint}/{quote(listing.repo)}/resolve/{listing.revision}/{quote(fact.path)}"

    def start(size: int) -> bytes:
        def read(answer: Answer) -> Answer:
            if len(answer.body) < min(size, fact.size):
                raise ValueError(f"{len(answer.body)} bytes came where {min(size, fact.size)} were asked for")
            return answer

        answer = wire.get("resolvers", source.repo, url, read, limit=size, ranged=True)
        if answer.commit is not None and answer.commit != listing.revision:
            raise _other_commit(source, answer.commit)
        return answer.body

    head = start(_HEAD)
    length = header_length(head[:9], where, fact.size)
    if 8 + length > len(head):
        head = start(8 + length)
    return parse_header(head[8 : 8 + length], where, fact.size)


def snapshot(
    repo: str,
    *,
    revision: str | None = None,
    max_bytes: int = 16 * inspect.MAX_BYTES,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> Path:
    """Download all data in a repository, at one commit, with contents checked.

    Args:
        repo: ``org/name``. revision: branch, tag or commit; the default branch where None.
        max_bytes: the most that the files may hold together; checked before anything is downloaded.

    Returns:
        The folder in the client's cache. Code and pickles in the repository are not in it.

    Raises:
        HubError: it is not to be had. InputError: too large. SecurityError: contents differ.
    """
    source = replace(Source.parse(repo), revision=revision) if revision else Source.parse(repo)
    name, commit, everything, _ = _list(source, token, endpoint)
    data = {f.path: f for f in everything if f.path.endswith(_DATA) or "LICENSE" in f.path}
    listing = Listing(name, commit, data)
    if not data or listing.size > max_bytes:
        raise InputError(
            f"{source.text} holds {len(data)} data files of {listing.size / 1e6:,.0f} MB.",
            f"It may have at most {max_bytes / 1e6:,.0f} MB." if data else "There is nothing to read.",
            "Check the repository's id, or raise max_bytes.",
            code="E_TOO_LARGE",
        )
    # The path inside the repository leads back up from any file to the folder that holds them all.
    paths = {p: _fetch_file(source, listing, f, None, token, endpoint)[0] for p, f in data.items()}
    path, cached = next(iter(paths.items()))
    return Path(cached).parents[path.count("/")]


def contents(
    source: Source,
    marker: str,
    *,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
) -> Listing:
    """Everything that a repository holds at one commit, names vetted. One request, none offline, where it is what the cache holds.

    Args:
        marker: the file that makes it what is looked for, by which the cache is searched.
        cache_dir: in place of the client's own cache.

    Raises:
        HubError: it is not to be had. SecurityError: names that could do harm.
    """
    if client_cache.is_offline():
        commit, everything, notes = client_cache.contents(source, marker, cache_dir)
        return Listing(source.repo, commit, {fact.path: fact for fact in everything}, notes=notes, by="the cache")
    repo, commit, everything, licence = _list(source, token, endpoint)
    notes = () if repo == source.repo else (f"{printable(source.repo)} is now called {printable(repo)}",)
    return Listing(repo, commit, {fact.path: fact for fact in everything}, licence=licence, notes=notes)


def checked(
    source: Source,
    listing: Listing,
    name: str,
    *,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
    afresh: bool = False,
) -> tuple[Path, tuple[str, ...]]:
    """One of the listed files in the client's cache, with its contents checked, and what there is to say about it.

    Args:
        afresh: fetch it again where it is in the cache.

    Raises:
        As `download_files`.
    """
    fact = listing.files[name]
    path, _, notes = _fetch_file(source, listing, fact, None, token, endpoint, cache_dir=cache_dir, afresh=afresh)
    return path, tuple(notes)


def peek(repo: str, *, revision: str | None = None) -> list[str] | None:
    """The names of the files of a repository, for whoever goes on with the client: one request, and a broken connection is
    known at once, where the client would try for half a minute.

    Returns:
        None where the Hub is not to be had but a config is in the client's cache, so that the cache can be used.

    Raises:
        HubError: neither is to be had; it says why.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        info = patiently(
            Source(repo, None, repo, revision),
            lambda: HfApi().model_info(repo, revision=revision, timeout=_PEEK_S),
            is_busy,
        )
    except HubError:
        try:
            held = try_to_load_from_cache(repo, "config.json", revision=revision)
        except ValueError:  # it is no valid name, which the first error says
            held = None
        if isinstance(held, str):
            return None
        raise
    return [file.rfilename for file in info.siblings or []]


def _list(source: Source, token: str | bool | None, endpoint: str | None) -> tuple[str, str, list[FileFact], str | None]:
    """(current name, 40-hex commit, every file, the card's licence) of a repository."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token)
    # One answer has both the commit and the files with their hashes, so the two cannot disagree.
    info = patiently(
        source,
        lambda: api.model_info(source.repo, revision=source.revision, files_metadata=True, token=token),
        endpoint=endpoint,
    )
    commit = str(info.sha or "")
    if not is_commit(commit):
        raise HubError(
            f"The Hub names no commit for {source.text}.",
            "It cannot be pinned.",
            "Try again later, or name a revision.",
        )
    if source.pinned and commit != source.revision:
        raise _other_commit(source, commit)
    inspect.check_names(source.text, (file.rfilename for file in info.siblings or []))
    facts = []
    for file in info.siblings or []:
        sha256 = file.lfs.sha256 if file.lfs else None
        facts.append(FileFact(file.rfilename, file.size or 0, sha256, None if sha256 else file.blob_id))
    stated = info.card_data.get("license") if info.card_data else None
    return info.id or source.repo, commit, facts, printable(stated) if isinstance(stated, str) and stated else None


def _cached(
    source: Source,
    listing: Listing,
    fact: FileFact,
    afresh: bool,
    token: str | bool | None,
    endpoint: str | None,
    on_bytes: OnBytes | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The file in the client's cache, of the listing's commit; its contents are not checked yet."""
    from huggingface_hub import hf_hub_download

    def call() -> str:
        return hf_hub_download(
            listing.repo,
            fact.path,
            revision=listing.revision,
            token=token,
            endpoint=endpoint,
            force_download=afresh,
            cache_dir=cache_dir,
            tqdm_class=counter(on_bytes),
        )

    path = Path(patiently(source, call, is_unspent, endpoint=endpoint))
    commit = path.parents[fact.path.count("/")].name
    if commit != listing.revision:
        raise _other_commit(source, commit)
    return path


def _fetch_file(
    source: Source,
    listing: Listing,
    fact: FileFact,
    target: Path | None,
    token: str | bool | None,
    endpoint: str | None,
    *,
    cache_dir: str | Path | None = None,
    afresh: bool = False,
) -> tuple[Path, str, list[str]]:
    """Copy one file to `target`, or leave it in the client's cache where that is None.

    Returns:
        Where it is, its sha256, and a note where the cache had to be healed.
    """
    offline = client_cache.is_offline()
    tries = (False,) if offline else (afresh, True)
    for again, anew in enumerate(tries):
        cached = _cached(source, listing, fact, anew, token, endpoint, cache_dir=cache_dir)
        # Hashed after copying, so that what is vetted is what was hashed.
        path = cached if target is None else Path(shutil.copyfile(cached, target))
        sha256, blob = inspect.hashes(path)
        if sha256 == fact.sha256 if fact.sha256 else blob == fact.blob:
            return path, sha256, [f"{path.name} was damaged in the cache and fetched again"] if again else []
        if offline and fact.sha256 is None and fact.blob is None:
            return path, sha256, [f"{path.name} is not checked: this cache keeps no hashes, and no request is made"]
    if target is not None:
        target.unlink()
    raise SecurityError(
        f"{source.text}: the contents of {printable(fact.path)} differ from {listing.by}'s hash"
        + (", twice." if len(tries) > 1 else "."),
        f"Expected {fact.sha256 or fact.blob}, got {sha256 if fact.sha256 else blob}: damaged or changed.",
        "Try again over another network; if it stays so, tell the repository's owner.",
        code="E_HASH",
    )


def _other_commit(source: Source, commit: str) -> SecurityError:
    return SecurityError(
        f"{source.text}: the answer is of commit {printable(commit)}, which is not the one that was asked for.",
        "Contents that are pinned to one commit must not come from another.",
        "Something between here and the Hub changes answers. Try again over another network.",
        code="E_HASH",
    )
