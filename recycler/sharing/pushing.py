"""A composed model → the Hub: one commit that holds the model's files, or none.

What may be uploaded is settled in `recycler.sharing.publishing` before the Hub is asked for anything. The commit is made on top of what was
looked at, so that nothing which somebody else pushed meanwhile is overwritten unseen; the Hub takes it as a whole, so that an
interrupted push leaves the repository as it was, and the same push goes on with the files that had not arrived.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from recycler.model_folder import CARD, MANIFEST, belongs
from recycler.parallel import run_all
from recycler.sharing.card import record_evaluation
from recycler.sharing.publishing import Public, check_licences, publish
from recycler.zoo.errors import HubError, UsageError, counted, shorten
from recycler.zoo.hub_writing import There, Writer, refusal
from recycler.zoo.inspect import printable
from recycler.zoo.match import is_hub_id

if TYPE_CHECKING:
    from recycler.evaluating.evaluation import Evaluation
    from recycler.routed import RoutedModel

T = TypeVar("T")

SCHEMA_VERSION = 1
_EMPTY = {".gitattributes"}  # what the Hub puts into a new repository


@dataclass(frozen=True)
class Pushed:
    """What a push did, or would do.

    Attributes:
        repo: ``org/name``. url: its page.
        commit: the 40-hex commit that holds the model; None after a dry run.
        pull_request: its page, where one was opened.
        changed: whether the Hub held anything else before.
        files: path → bytes. removed: paths that the repository held of an earlier model.
        notes: what a person should know. card: the model card.
    """

    repo: str
    url: str
    commit: str | None
    pull_request: str | None
    changed: bool
    files: Mapping[str, int]
    removed: tuple[str, ...]
    notes: tuple[str, ...]
    card: str

    @property
    def pinned(self) -> str:
        """What loads exactly this: ``org/name@commit``."""
        return self.repo if self.commit is None else f"{self.repo}@{self.commit}"

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {
            "schema_version": SCHEMA_VERSION,
            "repo": self.repo,
            "url": self.url,
            "commit": self.commit,
            "pull_request": self.pull_request,
            "changed": self.changed,
            "files": dict(self.files),
            "bytes": sum(self.files.values()),
            "removed": list(self.removed),
            "notes": list(self.notes),
            "card": self.card,
        }


def push(
    model: RoutedModel | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    base_id: str | None = None,
    license_allow: Iterable[str] | None = None,
    strict: bool = False,
    widget: Sequence[str] = (),
    datasets: Sequence[str] = (),
    force: bool = False,
    dry_run: bool = False,
    endpoint: str | None = None,
) -> Pushed:
    """Uploads a composed model to the Hub, as one commit; `recycler.load` takes the id then.

    A repository that is not there is made. One that is empty, or holds a composed model, gets a new commit, in which files of that
    model that are gone are removed; earlier commits stay as they are. Where nothing changed there is no commit.

    Args:
        model: its folder; or a model in memory, as `RoutedModel.push_to_hub` does it.
        repo_id: ``org/name``.
        private: of a new repository; the Hub's default where None.
        token: one that may write; the saved or environment's one where None.
        revision: a branch, which is made where it is not there; the default branch where None.
        create_pr: open a pull request instead, for which no right to write is needed.
        base_id: the base's id on the Hub, where the model names a folder.
        license_allow, strict: as `recycler.compose` takes them; a licence that forbids passing on what was combined is refused
            unless it is allowed by name or the repository is private.
        widget: prompts for the card. datasets: ids of datasets, for its header.
        force: also into a repository that holds something else, which stays beside it.
        dry_run: look at everything, and upload nothing.
        endpoint: another Hub than the default.

    Raises:
        InputError: no composed model, or licences. UsageError: the base has no id, or the repository is in use.
        SecurityError: changed weights, secrets, links, files that no model holds. HubError: the Hub does not take it; it says why.
    """
    if not is_hub_id(repo_id) or "/" not in repo_id:
        raise UsageError(
            f"{printable(repo_id)!r} is no id on the Hub.", "", "Write org/name, or your-name/name.", code="E_NAME"
        )
    if not isinstance(model, (str, Path)):
        with _saved(model) as folder:
            return push(
                folder, repo_id, private=private, token=token, commit_message=commit_message, revision=revision, create_pr=create_pr,
                base_id=base_id, license_allow=license_allow, strict=strict, widget=widget, datasets=datasets, force=force,
                dry_run=dry_run, endpoint=endpoint,
            )  # fmt: skip
    public = publish(Path(model).expanduser(), repo_id, base_id=base_id, widget=widget, datasets=datasets)
    hub = Writer(repo_id, token, endpoint)
    unasked: list[str] = []
    try:
        there = hub.look(revision)
    except HubError as error:
        if not dry_run:
            raise refusal(repo_id, error.__cause__ or error, error) from error
        why = error.why if error.code == "E_UNREACHABLE" else error  # the rest speaks of fetching
        there, unasked = There(False, False, None, False, ()), [f"warning: the Hub was not asked. {why}"]
    names = [record["name"] for record in public.manifest["adapters"]]
    removed = _may_be_pushed(repo_id, there, public, names, private=private, force=force)
    notes = check_licences(
        public.manifest, license_allow, strict=strict, shared=not (there.private if there.exists else private)
    )
    notes += unasked or hub.base_notes(public.manifest["base"])
    sizes, url = public.sizes, f"{hub.endpoint}/{repo_id}"
    if dry_run:
        return Pushed(repo_id, url, None, None, True, sizes, removed, tuple(notes), public.card)
    message = commit_message or f"{counted(len(names), 'adapter')}, routed by {public.manifest['router']}"
    parent = hub.prepare(there, revision, private=private, create_pr=create_pr)
    commit, pull_request = _interruptible(
        lambda: hub.commit(public.files, removed, message, revision, parent, create_pr=create_pr)
    )
    return Pushed(repo_id, url, commit, pull_request, commit != parent, sizes, removed, tuple(notes), public.card)


def _interruptible(call: Callable[[], T]) -> T:
    """Runs `call` in a thread. The client waits for threads of its own, deaf to Ctrl-C until all files are sent, and would make the
    commit then; in a thread that is told to end it makes no further request."""
    results: list[T] = []

    def done(number: int, outcome: T | Exception) -> None:
        if isinstance(outcome, Exception):
            raise outcome
        results.append(outcome)

    run_all([lambda tell: call()], 1, done, lambda *what: None)
    return results[0]


@contextmanager
def _saved(model: RoutedModel, evaluation: Evaluation | Mapping[str, Any] | None = None) -> Iterator[Path]:
    """A model's folder for the time of a with statement."""
    folders = model.folders
    with tempfile.TemporaryDirectory(prefix="recycler-") as scratch:
        try:
            folder = model.save_pretrained(Path(scratch) / "model")
        finally:
            model.folders = folders
        if evaluation is not None:
            record_evaluation(folder, evaluation)
        yield folder


def push_model(
    model: RoutedModel, repo_id: str, *, evaluation: Evaluation | Mapping[str, Any] | None = None, **options: Any
) -> Pushed:
    """`push` of a model in memory, by way of a folder that is gone afterwards.

    Args:
        evaluation: for the card, as `recycler.sharing.card.record_evaluation` takes it.
    """
    with _saved(model, evaluation) as folder:
        return push(folder, repo_id, **options)


def _may_be_pushed(
    repo: str, there: There, public: Public, names: Sequence[str], *, private: bool | None, force: bool
) -> tuple[str, ...]:
    """The files of an earlier model that go away.

    Raises:
        UsageError: the repository is in use for something else, or is public where a private one is asked for.
    """
    if there.exists and private and not there.private:
        raise UsageError(
            f"{repo} is there already, and public.",
            "What is pushed to it is seen by everybody.",
            "Choose another name, or make it private in its settings first.",
            code="E_EXISTS",
        )
    held = set(there.files) - _EMPTY
    if held and MANIFEST not in held and not force:
        raise UsageError(
            f"{repo} holds something else than a composed model: {shorten(sorted(map(printable, held)), 5)}.",
            "Nothing is overwritten unless asked.",
            "Choose another name, or add --force: what is there stays beside the model.",
            code="E_EXISTS",
        )
    if MANIFEST not in held:
        return ()
    earlier = {path.split("/")[1] for path in held if path.startswith("adapters/") and path.count("/") == 2}
    return tuple(sorted(path for path in held - set(public.files) if belongs(path, earlier | set(names)) and path != CARD))
