"""The one module that touches the network: adapters from the Hub, pinned, and checked against their hashes.

The client under it, ``huggingface_hub``, does the transfers. What it leaves to its callers is done here:

- it never hashes what it downloads, so contents are compared with the Hub's hashes, and a damaged cache is
healed once; - it does not retry metadata calls, so `patiently` does;
- its errors bury the reason, so `hub_errors.explain` digs it out.

Nothing is imported from it before the first call: it reads its environment when imported, and importing it is
slow.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from recycler.zoo import inspect
from recycler.zoo.errors import HubError, InputError, SecurityError, UsageError, shorten
from recycler.zoo.hub_errors import explain, is_busy, is_passing, pause
from recycler.zoo.inspect import printable

_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>refs/pr/\d+|[A-Za-z0-9][\w.-]*))?"
    r"(?:/(?P<subfolder>[\w.-]+(?:/[\w.-]+)*))?"
)
_DATA = (".json", ".jsonl", ".safetensors", ".md", ".txt", ".jinja", ".csv", ".svg", ".png")
_TIMEOUT_S = 30.0
_TRIES = 4

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Where an adapter is to come from: a local folder, or a repository on the Hub.

    Attributes:
        text: as given.
        folder: the local folder, None for a repository.
        repo: ``org/name``. revision: branch, tag or commit, or None. subfolder: posix path.
    """

    text: str
    folder: Path | None = None
    repo: str = ""
    revision: str | None = None
    subfolder: str = ""

    @classmethod
    def parse(cls, text: str | Path) -> Source:
        """Read ``org/name[@revision][/subfolder]``, or a folder: one that exists, or one written as a path
        (starting with ``.``, ``/`` or ``~``).

        Raises:
            UsageError: it is neither.
        """
        if isinstance(text, Path) or inspect.is_folder(text):
            return cls(str(text), Path(text).expanduser())
        found = _ID.fullmatch(text.removeprefix("hf://"))
        if not found or ".." in text:
            raise UsageError(
                f"{printable(text)!r} is neither a folder nor a repository on the Hub.",
                "A repository is written org/name, org/name@revision or org/name@revision/subfolder.",
                "A folder that does not exist yet, or shares a name with one, is written ./folder.",
            )
        return cls(text, None, found["repo"], found["revision"], found["subfolder"] or "")

    @property
    def stem(self) -> str:
        """The last part of the folder, subfolder or repository: what a name is derived from."""
        if self.folder is not None:
            return self.folder.resolve().name
        return (self.subfolder or self.repo).rsplit("/", 1)[-1]

    @property
    def place(self) -> str:
        """The repository and subfolder without the revision, or the folder: what a manifest records."""
        if self.folder is not None:
            return str(self.folder.resolve())
        return f"{self.repo}/{self.subfolder}" if self.subfolder else self.repo


@dataclass(frozen=True)
class FileFact:
    """What the Hub says of a file: bytes, and sha256 (large files) or git blob sha1 (small ones)."""

    path: str
    size: int
    sha256: str | None
    blob: str | None


@dataclass(frozen=True)
class Listing:
    """An adapter's own files at one commit, vetted by name and size. `repo` is its current name."""

    repo: str
    revision: str
    files: Mapping[str, FileFact]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(fact.size for fact in self.files.values())


@dataclass(frozen=True)
class Download:
    """Verified files in `folder`, at the 40-hex commit `revision`; `files` is name → sha256."""

    folder: Path
    revision: str
    files: Mapping[str, str]
    notes: tuple[str, ...] = ()


def look(
    source: Source,
    *,
    max_bytes: int = inspect.MAX_BYTES,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> Listing:
    """Resolve the revision to a commit and vet the listing there. One request; nothing is downloaded.

    Raises:
        HubError: the repository, the revision or the network is not to be had; it says why.
        InputError: it holds no adapter, or too large a one. SecurityError: it holds pickled weights only.
    """
    repo, commit, everything = _list(source, token, endpoint)
    prefix = source.subfolder + "/" if source.subfolder else ""
    facts: dict[str, FileFact] = {}
    elsewhere = set()
    for fact in everything:
        name = fact.path.removeprefix(prefix)
        if fact.path.startswith(prefix) and "/" not in name:
            facts[name] = fact
        elif fact.path.endswith("/" + inspect.CONFIG):
            elsewhere.add(printable(fact.path.removesuffix("/" + inspect.CONFIG)))
    if inspect.CONFIG not in facts and elsewhere:
        at = f"@{source.revision}" if source.revision else ""
        raise InputError(
            f"{source.text} has no adapter at this place.",
            f"Its adapters lie in subfolders: {shorten(sorted(elsewhere))}.",
            f"Name one, e.g. {source.repo}{at}/{sorted(elsewhere)[0]}",
        )
    own = inspect.check_listing(source.text, {name: f.size for name, f in facts.items()}, max_bytes)
    return Listing(repo, commit, {name: facts[name] for name in own})


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
        HubError: the network, or access. SecurityError: contents differ from the hash, even afresh.
    """
    sums: dict[str, str] = {}
    notes: list[str] = []
    for name, fact in listing.files.items():
        if only is None or name in only:
            _, sums[name], note = _fetch_file(source, listing, fact, into / name, token, endpoint)
            notes += note
    return Download(into, listing.revision, sums, tuple(notes))


def header(
    source: Source, listing: Listing, *, token: str | bool | None = None, endpoint: str | None = None
) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape of the adapter's weights, by a range request: the weights stay on the Hub.

    Raises:
        HubError: it is not to be had. SecurityError: it is no safetensors file.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    api = HfApi(endpoint=endpoint, token=token)
    path = listing.files[inspect.WEIGHTS].path
    try:
        data = patiently(
            source,
            lambda: api.parse_safetensors_file_metadata(listing.repo, path, revision=listing.revision, token=token),
        )
    except SafetensorsParsingError as error:
        raise SecurityError(
            f"{source.text}: {inspect.WEIGHTS} is not a safetensors file.",
            "Its header cannot be trusted, so nothing in it is read.",
            "Ask its author to save it with safe_serialization.",
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in data.tensors.items()}


def snapshot(
    repo: str,
    *,
    revision: str | None = None,
    max_bytes: int = 16 * inspect.MAX_BYTES,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> Path:
    """Download a composed model: all data in the repository, at one commit, with contents checked.

    Args:
        repo: ``org/name``. revision: branch, tag or commit; the default branch where None.
        max_bytes: the most that the files may hold together; checked before anything is downloaded.

    Returns:
        The folder in the client's cache. Code and pickles in the repository are not in it.

    Raises:
        HubError: it is not to be had. InputError: too large. SecurityError: contents differ.
    """
    source = replace(Source.parse(repo), revision=revision) if revision else Source.parse(repo)
    name, commit, everything = _list(source, token, endpoint)
    data = {f.path: f for f in everything if f.path.endswith(_DATA) or "LICENSE" in f.path}
    listing = Listing(name, commit, data)
    if not data or listing.size > max_bytes:
        raise InputError(
            f"{source.text} holds {len(data)} data files of {listing.size / 1e6:,.0f} MB.",
            f"A composed model has some, and at most {max_bytes / 1e6:,.0f} MB." if data else "That is no model.",
            "Check the repository's id, or raise max_bytes.",
        )
    # The path inside the repository leads back up from any file to the folder that holds them all.
    paths = {p: _fetch_file(source, listing, f, None, token, endpoint)[0] for p, f in data.items()}
    path, cached = next(iter(paths.items()))
    return Path(cached).parents[path.count("/")]


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
            lambda: HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT_S / 3),
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


def _list(source: Source, token: str | bool | None, endpoint: str | None) -> tuple[str, str, list[FileFact]]:
    """(current name, 40-hex commit, every file) of a repository."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token)
    # One answer has both the commit and the files with their hashes, so the two cannot disagree. Unlike the
    # listing of a tree it takes a timeout.
    info = patiently(
        source,
        lambda: api.model_info(source.repo, revision=source.revision, files_metadata=True, timeout=_TIMEOUT_S, token=token),
    )
    commit = str(info.sha or "")
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise HubError(
            f"The Hub names no commit for {source.text}.",
            "It cannot be pinned.",
            "Try again later, or name a revision.",
        )
    facts = []
    for file in info.siblings or []:
        sha256 = file.lfs.sha256 if file.lfs else None
        facts.append(FileFact(file.rfilename, file.size or 0, sha256, None if sha256 else file.blob_id))
    return info.id or source.repo, commit, facts


def _fetch_file(
    source: Source,
    listing: Listing,
    fact: FileFact,
    target: Path | None,
    token: str | bool | None,
    endpoint: str | None,
) -> tuple[Path, str, list[str]]:
    """Copy one file to `target`, or leave it in the client's cache where that is None.

    Returns:
        Where it is, its sha256, and a note where the cache had to be healed.
    """
    from huggingface_hub import hf_hub_download

    for afresh in (False, True):
        cached = patiently(
            source,
            lambda afresh=afresh: hf_hub_download(  # type: ignore[misc]
                listing.repo,
                fact.path,
                revision=listing.revision,
                token=token,
                endpoint=endpoint,
                force_download=afresh,
            ),
        )
        path = Path(cached)
        if target is not None:  # hashed after copying, so that what is vetted is what was hashed
            path = Path(shutil.copyfile(cached, target))
        sha256, blob = inspect.hashes(path)
        if sha256 == fact.sha256 if fact.sha256 else blob == fact.blob:
            return path, sha256, [f"{path.name} was damaged in the cache and fetched again"] if afresh else []
    if target is not None:
        target.unlink()
    raise SecurityError(
        f"{source.text}: the contents of {printable(fact.path)} differ from the Hub's hash, twice.",
        f"Expected {fact.sha256 or fact.blob}, got {sha256 if fact.sha256 else blob}: damaged or changed.",
        "Try again over another network; if it stays so, tell the repository's owner.",
    )


def patiently(source: Source, call: Callable[[], T], passing: Callable[[BaseException], bool] = is_passing) -> T:
    """Run `call`, again after a pause where the Hub was busy or the connection broke; explain the rest."""
    for attempt in range(_TRIES):
        try:
            return call()
        except Exception as error:
            failure = explain(source.repo, source.revision, error)
            if failure is None:
                raise
            if attempt == _TRIES - 1 or not passing(error):
                raise failure from error
            time.sleep(pause(error, attempt))
    raise AssertionError("unreachable")
