"""Starts of files that were read from the Hub, on disk: a file at a commit never changes, so it is asked for once.

One small file an entry, ``<sha256 of repository and path>.json``, which names the commit: a newer commit takes its place, so
that the cache holds at most one entry for every file ever looked at. Whatever is wrong with an entry, it is as if it were
absent; whatever is wrong with the folder, nothing is cached.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_VERSION = 1
_MAX_ENTRY = 2_000_000
_MAX_DATA = 2_000_000


@dataclass(frozen=True)
class Head:
    """The start of a file at a commit.

    Attributes:
        data: the first bytes.
        size: of the whole file in bytes, None where the Hub did not say.
    """

    data: bytes
    size: int | None


class HeadCache:
    """Repository, commit and path → Head. With `folder` None it holds nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.hits = 0  # entries that `get` found
        self._lock = threading.Lock()

    def get(self, repo: str, commit: str, path: str) -> Head | None:
        """The entry, None where there is none for this commit, or a damaged one."""
        if self.folder is None:
            return None
        try:
            with self._file(repo, path).open("rb") as stream:
                entry: Any = json.loads(stream.read(_MAX_ENTRY))
            about = {"version": _VERSION, "repo": repo, "commit": commit, "path": path}
            if any(entry[key] != value for key, value in about.items()):
                return None
            unpacked = zlib.decompressobj()
            data = unpacked.decompress(base64.b64decode(entry["data"], validate=True), _MAX_DATA)
            size = entry["size"]
            whole = unpacked.eof and hashlib.sha256(data).hexdigest() == entry["sha256"]
            sound = whole and (size is None or (type(size) is int and size >= len(data)))
        except (OSError, ValueError, KeyError, TypeError, zlib.error, RecursionError):
            return None
        if not sound:
            return None
        with self._lock:
            self.hits += 1
        return Head(data, size)

    def put(self, repo: str, commit: str, path: str, head: Head) -> None:
        """Keep `head`, in place of whatever was there for this file."""
        if self.folder is None or len(head.data) > _MAX_DATA:
            return
        entry = {
            "version": _VERSION,
            "repo": repo,
            "commit": commit,
            "path": path,
            "size": head.size,
            "sha256": hashlib.sha256(head.data).hexdigest(),
            "data": base64.b64encode(zlib.compress(head.data)).decode(),
        }
        target = self._file(repo, path)
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.folder, prefix=".tmp-", delete=False) as stream:
                temporary = stream.name
                json.dump(entry, stream)
            os.replace(temporary, target)
        except OSError:  # a full disk, or a zoo that may only be read: the next search asks again
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    def _file(self, repo: str, path: str) -> Path:
        assert self.folder is not None
        return self.folder / (hashlib.sha256(f"{repo}\n{path}".encode("utf-8", "replace")).hexdigest()[:40] + ".json")
