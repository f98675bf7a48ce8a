"""Where a composed model is: a folder, or a repository on the Hub, of which then those files come that such a model holds and no
others, all of one commit and checked against the Hub's hashes.

What the model's own recycle.json says of its adapters is compared when it is loaded, as for any folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from recycler import model_folder
from recycler.parallel import Tell, run_all
from recycler.scoring import Progress, silent
from recycler.zoo import client_cache, hub, inspect
from recycler.zoo.errors import HubError, InputError, UsageError, shorten
from recycler.zoo.inspect import printable
from recycler.zoo.sources import Listing, Source

MAX_BYTES = 16 * inspect.MAX_BYTES
_MAX_MANIFEST = 50_000_000  # of 100,000 adapters it is less
_WORKERS = 8
_PREFIX = "hf://"


@dataclass(frozen=True)
class Found:
    """A model's folder; where it came from the Hub, the repository and the 40-hex commit; and what a person should know."""

    folder: Path
    repo: str | None = None
    commit: str | None = None
    notes: tuple[str, ...] = ()


def find(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    endpoint: str | None = None,
    progress: Progress = silent,
) -> Found:
    """The folder of a composed model, brought from the Hub where it is not on this disk.

    Args:
        path_or_id: a folder, or ``org/name[@revision]``. A folder comes first where one is spelled like an id; ``hf://org/name``
            means the Hub.
        revision: branch, tag or commit; the default branch where None. Whichever it is, the files are those of one commit.
        token: an access token; the saved or environment's one where None.
        cache_dir: in place of the client's own cache.
        local_files_only: make no request; as ``HF_HUB_OFFLINE`` does.
        force_download: fetch files again that are in the cache.
        endpoint: another Hub than the default.

    Raises:
        HubError: it is not to be had. InputError: it is no composed model, or too large. SecurityError: a file differs from the
            Hub's hash, or has a name that could do harm. UsageError: a revision of a folder, or two revisions.
    """
    text = str(path_or_id)
    asked_there = text.startswith(_PREFIX)
    source = None if isinstance(path_or_id, Path) else _source(text)
    if source is None or (not asked_there and Path(text).exists()):
        if revision is not None or force_download:
            raise UsageError(
                f"{printable(text)} is a folder here, and has no revisions.",
                "A folder comes before a model of the Hub that is spelled like it.",
                f"Write {_PREFIX}{printable(text)} for the one on the Hub." if source else "Leave the revision out.",
                code="E_OPTION",
            )
        note = (
            f"{printable(text)} is the folder here; the Hub's model of that name, which the cache holds too, is {_PREFIX}{text}"
        )
        held = source is not None and client_cache.home(source.repo, cache_dir).is_dir()
        return Found(Path(text).expanduser(), notes=(note,) if held else ())
    if revision is not None and source.revision not in (None, revision):
        raise UsageError(f"{printable(text)} names a revision, and {revision} is another.", "", "Give one.", code="E_OPTION")
    source = replace(source, revision=revision or source.revision)
    try:
        with client_cache.offline(local_files_only):
            return _pull(source, token, endpoint, cache_dir, force_download, progress)
    except HubError as error:
        if asked_there:
            raise
        what = f"There is no folder {printable(text)}, and no such model on the Hub."
        if error.code not in ("E_NOT_FOUND", "E_OFFLINE"):
            what = f"There is no folder {printable(text)}, and the Hub does not give a model of that name."
        raise HubError(what, f"{error.what} {error.why}".strip(), error.fix, code=error.code) from error


def _source(text: str) -> Source | None:
    """What `text` means on the Hub; None where it can only be a path."""
    if inspect.is_folder(text) and not Path(text).is_dir():  # written as a path
        return None
    try:
        source = Source.parse(_PREFIX + text.removeprefix(_PREFIX))
    except UsageError:
        source = None
    if source is None or source.subfolder or not source.repo:
        if text.startswith(_PREFIX):
            raise UsageError(
                f"{printable(text)!r} names no model on the Hub.",
                "",
                f"Write {_PREFIX}org/name, or {_PREFIX}org/name@revision.",
            )
        return None
    return source


def _pull(
    source: Source,
    token: str | bool | None,
    endpoint: str | None,
    cache_dir: str | Path | None,
    afresh: bool,
    progress: Progress,
) -> Found:
    listing = hub.contents(source, model_folder.MANIFEST, token=token, endpoint=endpoint, cache_dir=cache_dir)
    fact = listing.files.get(model_folder.MANIFEST)
    if fact is None or fact.size > _MAX_MANIFEST:
        raise InputError(
            f"{printable(source.repo)} on the Hub is not a composed model.",
            f"There is no {model_folder.MANIFEST} in it."
            if fact is None
            else f"Its {model_folder.MANIFEST} is too large for one.",
            "Check the id. An adapter is fetched into a zoo: recycle fetch ID",
            code="E_MODEL",
        )

    def bring(path: str) -> tuple[Path, tuple[str, ...]]:
        return hub.checked(source, listing, path, token=token, endpoint=endpoint, cache_dir=cache_dir, afresh=afresh)

    manifest, notes = bring(model_folder.MANIFEST)
    folder = manifest.parent
    names = {record["name"] for record in model_folder.read_manifest(folder)["adapters"]}
    rest = [path for path in _files(source, listing, names) if path != model_folder.MANIFEST]
    outcomes: dict[int, tuple[Path, tuple[str, ...]]] = {}
    step = progress(len(rest), f"fetching {printable(listing.repo)}")

    def task(path: str) -> Callable[[Tell], tuple[Path, tuple[str, ...]]]:
        return lambda tell: bring(path)

    def done(number: int, outcome: tuple[Path, tuple[str, ...]] | Exception) -> None:
        if isinstance(outcome, Exception):
            raise outcome  # the others need not be waited for
        outcomes[number] = outcome
        step()

    run_all([task(path) for path in rest], _WORKERS, done, lambda *what: None)
    notes += tuple(note for _, (_, found) in sorted(outcomes.items()) for note in found)
    if not source.pinned and not client_cache.is_offline():
        client_cache.remember(replace(source, repo=listing.repo), listing.revision, cache_dir)
    return Found(folder, listing.repo, listing.revision, (*listing.notes, *notes))


def _files(source: Source, listing: Listing, names: set[str]) -> list[str]:
    """The model's files, of all that the repository holds."""
    missing = [path for path in model_folder.required(names) if path not in listing.files]
    if missing:
        raise InputError(
            f"{printable(source.repo)} lacks a part of the model: {shorten(missing, 5)}.",
            f"{listing.by} does not list it.",
            "Fetch it with the network, or tell its owner, who has to push it again.",
            code="E_MODEL",
        )
    files = [path for path in listing.files if model_folder.belongs(path, names)]
    size = sum(listing.files[path].size for path in files)
    if size > MAX_BYTES:
        raise InputError(
            f"{printable(source.repo)} holds {size / 1e9:,.0f} GB.",
            f"Models of more than {MAX_BYTES / 1e9:,.0f} GB are not fetched unasked.",
            "Bring it with `hf download`, and load that folder.",
            code="E_TOO_LARGE",
        )
    return files
