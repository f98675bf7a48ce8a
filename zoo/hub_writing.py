"""Writing to the Hub: the client under it, with its errors explained for whoever writes, and tries again where it has none.

A commit is made on top of what was looked at, so that nothing which somebody else pushed meanwhile is overwritten unseen.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from recycler.zoo.errors import HubError, shorten
from recycler.zoo.hub_errors import explain, is_busy, is_limit, is_passing
from recycler.zoo.inspect import printable
from recycler.zoo.patience import patiently
from recycler.zoo.sources import Source


@dataclass(frozen=True)
class There:
    """What is in the repository now. `commit` is None where there is none, or no such branch; `branch` whether that is there."""

    exists: bool
    branch: bool
    commit: str | None
    private: bool
    files: tuple[str, ...]


class Writer:
    """A repository to write to, at one Hub with one token."""

    def __init__(self, repo: str, token: str | bool | None, endpoint: str | None) -> None:
        from huggingface_hub import HfApi, constants

        self.repo, self.asked = repo, Source(repo, None, repo)
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.api = HfApi(endpoint=endpoint, token=token)

    def look(self, revision: str | None) -> There:
        """What the repository holds at a branch; where that is not there, at the default one."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        for branch in dict.fromkeys((revision, None)):
            try:
                info = patiently(
                    self.asked,
                    partial(self.api.model_info, self.repo, revision=branch),
                    endpoint=self.api.endpoint,
                )
            except HubError as error:
                if isinstance(error.__cause__, RevisionNotFoundError):
                    continue
                if isinstance(error.__cause__, RepositoryNotFoundError):
                    return There(False, False, None, False, ())
                raise
            files = tuple(file.rfilename for file in info.siblings or [])
            return There(True, branch == revision, info.sha, bool(info.private), files)
        return There(True, False, None, False, ())

    def base_notes(self, base: Mapping[str, Any]) -> list[str]:
        """Whether whoever loads the model will find its base."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        asked = Source(base["id"], None, base["id"], base.get("revision"))
        try:
            info = patiently(
                asked, lambda: self.api.model_info(asked.repo, revision=asked.revision), is_busy, endpoint=self.api.endpoint
            )
        except HubError as error:
            if isinstance(error.__cause__, (RepositoryNotFoundError, RevisionNotFoundError)):
                where = f"{asked.repo}@{asked.revision}" if asked.revision else asked.repo
                return [
                    f"warning: the base {printable(where)} is not on the Hub, as far as this token sees: loading will need --base"
                ]
            return []
        return [f"note: the base {printable(asked.repo)} is private"] if info.private else []

    def prepare(self, there: There, revision: str | None, *, private: bool | None, create_pr: bool) -> str | None:
        """Makes the repository and the branch; the commit that the new one goes on from."""
        made = not there.exists
        if made:
            with _explained(self.repo):
                patiently(
                    self.asked, lambda: self.api.create_repo(self.repo, private=private), is_busy, endpoint=self.api.endpoint
                )
        if revision is not None and not there.branch and not create_pr and not revision.startswith("refs/pr/"):
            with _explained(self.repo):
                patiently(
                    self.asked,
                    lambda: self.api.create_branch(self.repo, branch=revision, exist_ok=True),
                    is_busy,
                    endpoint=self.api.endpoint,
                )
        return self.look(revision).commit if made else there.commit

    def commit(
        self,
        files: Mapping[str, Path | bytes],
        removed: Iterable[str],
        message: str,
        revision: str | None,
        parent: str | None,
        *,
        create_pr: bool,
    ) -> tuple[str, str | None]:
        """(the commit, the page of the pull request). The commit is `parent` where nothing was left to change.

        Raises:
            HubError: the Hub refuses it, or is not to be had; or its .gitignore leaves files out.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        left, tried = set(removed), False

        def once() -> Any:
            # Made afresh for each try: after one whose answer was lost, nothing is left to change, and the client says so.
            nonlocal left, tried
            left &= set(self.look(revision).files) if tried else left
            tried = True
            operations: list[Any] = [CommitOperationAdd(path, held) for path, held in files.items()]
            operations += [CommitOperationDelete(path) for path in sorted(left)]
            return self.api.create_commit(
                self.repo, operations, commit_message=message, revision=revision, parent_commit=parent, create_pr=create_pr
            )

        with _explained(self.repo), _quiet():
            # A pull request whose answer was lost would be opened twice.
            info = patiently(self.asked, once, is_limit if create_pr else _at_the_commit, endpoint=self.api.endpoint)
        lacking = set(files) - set(self.look(info.oid).files)
        if lacking:
            raise HubError(
                f"{self.repo} did not take {shorten(sorted(lacking), 5)}.",
                "Its .gitignore leaves them out, most likely; without them the model cannot be loaded.",
                "Remove that file from the repository, and push again.",
            )
        return str(info.oid), info.pr_url


def _at_the_commit(error: BaseException) -> bool:
    """Whether another try may help: the client itself tries everything else again."""
    found = [
        e.response.request if getattr(e, "response", None) is not None else vars(e).get("_request") for e in _causes(error)
    ]
    request = next((one for one in found if one is not None), None)
    return request is not None and "/commit/" in str(request.url) and (is_busy(error) or is_passing(error))


def _causes(error: BaseException | None) -> Iterator[Any]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Errors of the client as those of whoever wants to write."""
    try:
        yield
    except HubError as error:
        raise refusal(repo, error.__cause__ or error, error) from error
    except Exception as error:
        raise refusal(repo, error, None) from error


def refusal(repo: str, error: BaseException, known: HubError | None) -> BaseException:
    """What whoever wanted to write should read, the error itself where it is a fault in the program.

    Args:
        known: what a reader would be told.
    """
    answer = next((r for e in _causes(error) if (r := getattr(e, "response", None)) is not None), None)
    status = answer.status_code if answer is not None else None
    said = printable(answer.headers.get("x-error-message", ""), 200) if answer is not None else ""
    kept = "The repository is as it was; what had arrived need not be sent again."
    if status in (401, 403, 404):
        return HubError(
            f"The Hub does not let you write to {repo}.",
            f"It says: {said}" if said else "The access token is missing, not valid, or may only read.",
            "Log in with a token that may write there: hf auth login. To a repository that is there, anybody may offer it: --create-pr",
            code="E_AUTH",
        )
    if status in (409, 412):
        return HubError(
            f"{repo} changed while this was being pushed." if status == 412 else f"The Hub refuses {repo}: it is in use.",
            f"It says: {said}"
            if said
            else "It is there already and your token does not see it, or another change is under way.",
            "Look at what is there now, and push again.",
            code="E_CONFLICT",
        )
    if status == 429:
        return HubError(
            f"The Hub's rate limit was reached while pushing to {repo}.",
            kept,
            "Wait five minutes, and push again.",
            code="E_RATE_LIMIT",
        )
    if status is not None and status >= 500:
        return HubError(
            f"The Hub answered {status} while {repo} was being pushed.", kept, "Push again later.", code="E_UNREACHABLE"
        )
    if status is not None:
        return HubError(f"The Hub refuses what was pushed to {repo} ({status}).", f"It says: {said}", "Check the model's card.")
    found = known or (explain(repo, None, error) if isinstance(error, Exception) else None)
    if found is not None and found.code in ("E_OFFLINE", "E_RATE_LIMIT", "E_NOT_FOUND"):
        return found
    if found is not None or any(type(e) is RuntimeError for e in _causes(error)):  # what the Xet store's client raises
        last = [*_causes(error)][-1]
        return HubError(
            f"{repo} could not be pushed.",
            f"{type(last).__name__}: {printable(last)}. {kept}",
            "Check the network, and push again. To go around the Xet store, set HF_HUB_DISABLE_XET=1.",
            code="E_UNREACHABLE",
        )
    return error


@contextmanager
def _quiet() -> Iterator[None]:
    """The client's remarks are for whoever calls it; what there is to say is in `Pushed`."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logging.set_verbosity(before)
