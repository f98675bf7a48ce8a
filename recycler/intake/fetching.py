"""Sources → zoo: find, download or read, vet, compare with the base, keep; many at once. One bad adapter does not stop the others.

Nothing is kept that was not read in full and, where the base can be had, found to fit it site by site. What one run finished,
the next finds: it asks the Hub for nothing that the zoo, or the client's cache, holds already.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from recycler.intake.arrival import Intake
from recycler.intake.bases import Bases
from recycler.intake.fetch_preview import preview
from recycler.intake.fetch_report import Failure, Fetched, FetchReport
from recycler.intake.jobs import Job, jobs_from_list, jobs_of
from recycler.intake.locking import jobs_from_lock
from recycler.intake.policy import Policy, check_company
from recycler.parallel import Tell, run_all
from recycler.zoo import importers, inspect, licences
from recycler.zoo.errors import InputError, RecycleError, UsageError, choices
from recycler.zoo.inspect import printable
from recycler.zoo.patience import pause_of
from recycler.zoo.store import Zoo

__all__ = ["Failure", "FetchReport", "Fetched", "fetch"]

OnEvent = Callable[[str, str, str], None]
"""Called with a stage ("start", "kept", "checked", "failed", "waiting"), the adapter's name, and a text for people."""
Progress = Callable[[int, str], Callable[..., None]]


def fetch(
    sources: str | Path | Sequence[str | Path] | None = None,
    base: str | Path | None = None,
    zoo: Zoo | None = None,
    *,
    names: Sequence[str] | None = None,
    lock: str | Path | None = None,
    collection: str | None = None,
    limit: int | None = None,
    text: str | None = None,
    author: str | None = None,
    base_alias: Sequence[str] | None = None,
    force_base: bool = False,
    dry_run: bool = False,
    offline: bool = False,
    jobs: int = 8,
    allow_pickle: bool = False,
    layout: str = "auto",
    rank: int | None = None,
    energy: float | None = None,
    accept_outlier: bool = False,
    license_allow: str | Collection[str] | None = None,
    strict: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
    max_bytes: int = inspect.MAX_BYTES,
    on_event: OnEvent | None = None,
    progress: Progress | None = None,
) -> FetchReport:
    """Bring adapters into the zoo.

    Args:
        sources: ``org/name[@revision][/subfolder]``, folders, or folders of folders: of one that is no adapter itself, those
            below it, to a depth of four, hidden folders and links not entered.
        base: the base model that they are for. A Hub id must be the one that an adapter declares, unless it declares none, a
            path on somebody's disk, a quantised copy, or an alias. A folder is taken as a copy of the declared base when all
            shapes fit, and is recorded. Where None, the declared base is looked up; where that cannot be had, the adapter is
            kept with a warning that it was not compared.
        zoo: where to; the default zoo where None.
        names: a name for each source, in order; derived from the repository's or folder's name where None.
        lock: somebody's zoo.json in place of sources: every adapter at its commit, under its name, with its hashes.
        collection: a collection on the Hub (``owner/title-id``) in place of sources.
        limit: without any sources, so many usable adapters of the base, as `recycler.search` finds them.
        text, author: narrow that search.
        base_alias: further names of the base's weights.
        force_base: accept adapters that declare another base, where all shapes fit; recorded, with a warning.
        dry_run: say what would happen and keep nothing. From the Hub, only listing, config and tensor header are read, so
            values such as NaN are not looked at.
        offline: make no request: take folders, and what the Hub's client has in its cache.
        jobs: how many sources are under way at once.
        allow_pickle: open pickled weights, in a process of their own that can do little else, and keep what they hold.
        layout: how pickles are laid out: auto, peft, mttl or phatgoose.
        rank, energy: of adapters that are converted, at most this rank, or the least that keeps this share of Σσ².
        accept_outlier: keep an adapter whose ‖ΔW‖ is over 1000 times the median of the others for its base.
        license_allow: licences that may enter, a list or a text with commas. strict: refuse what states none.
        token: an access token for the Hub; the saved one where None.
        endpoint: another Hub than the default.
        max_bytes: the most that one adapter's files may hold together.
        on_event: told what happens, in this thread.
        progress: called with the number of sources and a text; returns what is called as they are done, and as bytes come.

    Returns:
        What became of every source, in their order.

    Raises:
        UsageError: nothing to fetch, options that exclude each other, names that do not match, two adapters of one name.
        RecycleError: where there is one source only, its error. With several, failures are in the report; see
            `FetchReport.raise_for_failures`.
    """
    zoo = Zoo() if zoo is None else zoo
    given = [] if sources is None else [sources] if isinstance(sources, str | Path) else list(sources)
    _check(given, names, lock, collection, limit, text, author, base, layout, jobs)
    allow = licences.parse_list(license_allow) if isinstance(license_allow, str) else license_allow
    bases = Bases(base, tuple(base_alias or ()), force_base)
    if bases.folder is not None and not Path(bases.folder).is_dir():
        raise InputError(
            f"The base {printable(base)} is not a folder.", "", "Give the folder that holds the base, or its id.", code="E_BASE"
        )
    intake = Intake(
        zoo,
        bases,
        Policy(None if allow is None else frozenset(allow), strict, accept_outlier),
        token,
        endpoint,
        max_bytes,
        allow_pickle,
        layout,
        rank,
        energy,
    )
    access: dict[str, Any] = {"token": token, "endpoint": endpoint}
    with ExitStack() as stack:
        if offline:
            from recycler.zoo.client_cache import offline as without_requests

            stack.enter_context(without_requests())
        notes: tuple[str, ...] = ()
        if lock is not None:
            wanted = jobs_from_lock(lock)
        elif collection is not None:
            from recycler.zoo.hub_search import collection as members

            wanted = jobs_from_list(members(collection, **access), zoo)
        elif limit is not None:
            wanted, notes = _search(zoo, str(base), limit, text, author, base_alias or (), max_bytes, progress, access)
        else:
            wanted = jobs_of(given, names, layout=layout)
        if not wanted:
            raise InputError("Nothing was found to fetch.", " ".join(notes), "Loosen the search, or name sources.")
        return _Run(intake, wanted, dry_run, on_event or (lambda *event: None), progress).report(jobs, notes)


class _Run:
    """One fetch under way. All but `_one` runs in the caller's thread."""

    def __init__(
        self, intake: Intake, wanted: Sequence[Job], dry_run: bool, on_event: OnEvent, progress: Progress | None
    ) -> None:
        self.intake, self.wanted, self.dry_run, self.on_event = intake, wanted, dry_run, on_event
        self.step = progress(len(wanted), "fetching") if progress else lambda count=1, note="": None
        self.came = self.known = 0
        self.held = set(intake.zoo.entries)
        self.results: dict[int, list[Fetched | Failure]] = {}

    def report(self, workers: int, notes: tuple[str, ...]) -> FetchReport:
        tasks = [lambda tell, job=job: self._one(job, tell) for job in self.wanted]
        try:
            run_all(tasks, workers, self._done, self._heard)
        finally:
            pause_of(self.intake.endpoint).told = None
        self._judge_together()
        every = [one for index in sorted(self.results) for one in self.results[index]]
        fetched = tuple(one for one in every if isinstance(one, Fetched))
        failures = tuple(one for one in every if isinstance(one, Failure))
        if len(self.wanted) == 1 and not fetched and len(failures) == 1:
            raise failures[0].error
        return FetchReport(fetched, failures, self.dry_run, notes)

    def _one(self, job: Job, tell: Tell) -> list[Fetched | Failure]:
        """In a worker's thread: one source from beginning to end."""
        pause_of(self.intake.endpoint).told = lambda seconds: tell("wait", seconds)
        tell("start", job)
        try:
            return [preview(self.intake, job)] if self.dry_run else self.intake.keep(job, tell)
        except RecycleError as error:
            return [Failure(job.name, job.source.text, error)]
        except OSError as error:
            return [Failure(job.name, job.source.text, _of_the_system(job, error))]

    def _done(self, index: int, outcome: list[Fetched | Failure] | Exception) -> None:
        if isinstance(outcome, Exception):  # a fault in the program: it stops nobody else either
            if len(self.wanted) == 1:
                raise outcome
            outcome = [Failure(self.wanted[index].name, self.wanted[index].source.text, _fault(outcome))]
        self.results[index] = outcome
        for one in outcome:
            if isinstance(one, Failure):
                self.on_event("failed", one.name, str(one.error))
            else:
                self.on_event("kept" if one.kept else "checked", one.name, "\n".join(one.lines()))
        self.step(1, self._note())

    def _heard(self, what: str, about: Any) -> None:
        if what == "start":
            self.on_event("start", about.name, about.source.text)
        elif what == "wait":
            self.on_event("waiting", "", f"the Hub asks to wait {about:.0f} s; everything waits")
        else:
            self.came += about if what == "bytes" else 0
            self.known += about if what == "size" else 0
            self.step(0, self._note())

    def _note(self) -> str:
        return f"{self.came / 1e6:.1f} of {self.known / 1e6:.1f} MB" if self.known else ""

    def _judge_together(self) -> None:
        """Outliers and strangers are known by the others, of which there were too few while the first came; so once more, all that
        are new. What a lock holds was accepted by its owner."""
        zoo = self.intake.zoo
        for index, outcome in self.results.items():
            for place, one in enumerate(outcome):
                if isinstance(one, Failure) or not one.kept or one.name in self.held:
                    continue
                entry = zoo.entry(one.name)
                try:
                    if self.wanted[index].pinned is None:
                        self.intake.policy.check_norm(one.name, entry.norm, entry.base, zoo.peers(entry.base))
                        if not self.intake.bases.force:
                            check_company(entry, zoo.peers(entry.base, entry.base_path), self.intake.bases.aliases)
                except RecycleError as error:
                    zoo.remove(one.name)
                    outcome[place] = Failure(one.name, self.wanted[index].source.text, error)
                    self.on_event("failed", one.name, str(error))


def _search(
    zoo: Zoo,
    base: str,
    limit: int,
    text: str | None,
    author: str | None,
    base_alias: Sequence[str],
    max_bytes: int,
    progress: Progress | None,
    access: dict[str, Any],
) -> tuple[list[Job], tuple[str, ...]]:
    """The jobs that a search finds, and what it says of itself."""
    from recycler.intake.searching import search

    found = search(
        base,
        text,
        author=author,
        limit=limit,
        base_alias=tuple(base_alias),
        usable_only=True,
        zoo=zoo,
        max_bytes=max_bytes,
        progress=progress,
        **access,
    )
    return jobs_from_list(found.usable(), zoo), tuple(found.summary())


def _check(
    given: Sequence[str | Path],
    names: Sequence[str] | None,
    lock: str | Path | None,
    collection: str | None,
    limit: int | None,
    text: str | None,
    author: str | None,
    base: str | Path | None,
    layout: str,
    jobs: int,
) -> None:
    """Raises UsageError unless the arguments go together."""
    ways = {
        "sources": bool(given),
        "--from": lock is not None,
        "--collection": collection is not None,
        "--limit": limit is not None,
    }
    chosen = [way for way, used in ways.items() if used]
    if len(chosen) > 1:
        raise UsageError(
            f"{' and '.join(chosen)} exclude each other.",
            "Adapters are named one by one, by a lock, by a collection, or found by a search.",
            "Give one of them.",
        )
    if names is not None and not given:
        raise UsageError("--as names sources.", "Without sources there is nothing to name.", "Leave it out, or name sources.")
    if limit is not None and base is None:
        raise UsageError(
            "--limit needs --base.", "It takes adapters of a base, as recycle search finds them.", "Name the base."
        )
    if (text or author) and limit is None:
        raise UsageError("--text and --author narrow a search.", "", "Say how many to take: --base ID --limit N")
    if layout not in ("auto", *importers.LAYOUTS):
        raise UsageError(f"{printable(layout)!r} is no layout.", "", f"Choose {choices(('auto', *importers.LAYOUTS))}.")
    if jobs < 1:
        raise UsageError(f"{jobs} sources at once are none.", "", "Give a whole number above 0.")


def _fault(error: Exception) -> RecycleError:
    raised = RecycleError(
        f"A fault in this program: {type(error).__name__}: {printable(error, 300)}.",
        "Nothing of it was kept; the others are not affected.",
        "Fetch it alone to see where, and please report that.",
    )
    raised.__cause__ = error
    return raised


def _of_the_system(job: Job, error: OSError) -> InputError:
    raised = InputError(
        f"{printable(job.source.text)} could not be read or kept: {printable(error.strerror or error)}.",
        f"The system refused {printable(error.filename)}." if error.filename else "",
        "Check permissions and free space.",
        code="E_FILES",
    )
    raised.__cause__ = error
    return raised
