"""What an adapter is fetched from, and what is known of it before and after."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recycler.zoo import inspect
from recycler.zoo.errors import UsageError
from recycler.zoo.inspect import printable

_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>refs/pr/\d+|[A-Za-z0-9][\w.-]*))?"
    r"(?:/(?P<subfolder>[\w.-]+(?:/[\w.-]+)*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
INITIAL = re.compile(r"initial_adapter|(pissa|olora|corda|lora_ga)_init")
"""Subfolders that hold an adapter's state before training, which some kinds cannot be read without."""


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
            return cls(str(text), Path(os.path.expanduser(text)))  # unlike Path's own, leaves an unknown user's home as it is
        found = _ID.fullmatch(text.removeprefix("hf://"))
        if not found or ".." in text:
            raise UsageError(
                f"{printable(text)!r} is neither a folder nor a repository on the Hub.",
                "A repository is written org/name, org/name@revision or org/name@revision/subfolder.",
                "A folder that does not exist yet, or shares a name with one, is written ./folder.",
                code="E_SOURCE",
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

    @property
    def pinned(self) -> bool:
        """Whether the revision is a 40-hex commit, which will always hold the same files."""
        return is_commit(self.revision)


@dataclass(frozen=True)
class FileFact:
    """What the Hub says of a file: bytes, and sha256 (large files) or git blob sha1 (small ones)."""

    path: str
    size: int
    sha256: str | None
    blob: str | None


@dataclass(frozen=True)
class Listing:
    """An adapter's own files at one commit, vetted by name and size.

    Attributes:
        repo: its current name. revision: the 40-hex commit.
        files: name → what is known of it.
        initial: of the files in subfolders called like `INITIAL`, name with subfolder → what is known of it.
        licence: as the repository's card states it, or None.
        notes: what a person should know, such as that the repository was renamed.
        by: who says what the hashes are, for messages.
    """

    repo: str
    revision: str
    files: Mapping[str, FileFact]
    initial: Mapping[str, FileFact] = field(default_factory=dict)
    licence: str | None = None
    notes: tuple[str, ...] = ()
    by: str = "the Hub"

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


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a 40-hex commit, which will always hold the same files."""
    return revision is not None and bool(_COMMIT.fullmatch(revision))
