"""Results that are finished, on disk as they come, so that a long run that is killed loses only what it was at."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from recycler.zoo.errors import UsageError


class Journal(Mapping[str, Any]):
    """Name → what was written down under it. A line that was cut off is ignored.

    Args:
        path: None keeps everything in memory.
        key: of everything that the results depend on.
        again: begins anew, whatever is there.

    Raises:
        UsageError: it holds results of another key, and not `again`.
    """

    def __init__(self, path: Path | None, key: str, again: bool = False) -> None:
        self.path, self._held = path, dict[str, Any]()
        if path is None:
            return
        lines = path.read_text(encoding="utf8").split("\n")[:-1] if path.exists() and not again else []
        if lines and lines[0] != key:
            raise UsageError(
                f"{path.parent} holds results of another measurement.",
                "Its rows, adapters, profile, base or dtype differ, and nothing is overwritten unless asked.",
                "Choose another --out, or add --force.",
                code="E_EXISTS",
            )
        self._held = dict(json.loads(line) for line in lines[1:])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "\n".join(lines or [key]) + "\n")

    def __getitem__(self, name: str) -> Any:
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def write(self, name: str, value: Any) -> None:
        self._held[name] = value
        if self.path is not None:
            with self.path.open("a", encoding="utf8") as file:
                file.write(json.dumps([name, value]) + "\n")


LOCK = ".lock"  # the file that says that somebody writes in a folder


@contextmanager
def only_one(folder: Path | None) -> Iterator[None]:
    """Keeps a second run out of a folder; None keeps nobody out.

    Raises:
        UsageError: another run is writing there now.
    """
    if folder is None:
        yield
        return
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(
            f"Another run is writing in {folder}.",
            "Two at once would mix their results.",
            "Wait, or choose another --out.",
            code="E_WRITING",
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
        lock.release()


def write_text(path: Path, content: str) -> None:
    """All of a file, or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content, encoding="utf8")
    os.replace(temporary, path)
