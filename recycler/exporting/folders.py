"""An export's folder: all of it is made beside the target, then renamed; its manifest is written last."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recycler.composition import replace_folder
from recycler.zoo.documents import read_document
from recycler.zoo.errors import UsageError, shorten
from recycler.zoo.store import require_writable

SCHEMA_VERSION = 1
MANIFEST = "export.json"


def check_output(folder: Path, force: bool) -> None:
    """Raises UsageError when `folder` is in use and may not be replaced."""
    if folder.is_file():
        raise UsageError(f"{folder} is a file.", "", "Choose another --out.", code="E_EXISTS")
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not held:
        return
    if not force:
        raise UsageError(
            f"{folder} is not empty.",
            "Nothing is overwritten unless asked.",
            "Choose another --out, or add --force.",
            code="E_EXISTS",
        )
    if MANIFEST not in held:
        raise UsageError(
            f"{folder} holds something else than an export.",
            "--force replaces exports only.",
            "Choose another --out.",
            code="E_EXISTS",
        )
    strangers = sorted(held - {MANIFEST, *read(folder)["files"]})
    if strangers:
        raise UsageError(
            f"{folder} holds an export, and beside it {shorten(strangers)}.",
            "--force replaces exports only, and that would be lost.",
            "Move it away, or choose another --out.",
            code="E_EXISTS",
        )


@contextmanager
def staged(folder: Path, force: bool) -> Iterator[Path]:
    """A new folder to write to, which takes the place of `folder` when all went well, and is gone where not."""
    check_output(folder, force)
    folder = folder.absolute()
    require_writable(folder.parent)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def finish(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the manifest, with the names of what lies beside it."""
    said = {"schema_version": SCHEMA_VERSION, **facts, "files": sorted(path.name for path in folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf8")
    return said


def read(folder: Path) -> dict[str, Any]:
    """An export's manifest.

    Raises:
        InputError: there is none, it cannot be read, or it is a newer version's.
    """
    return read_document(
        folder / MANIFEST,
        SCHEMA_VERSION,
        _check,
        what="an export",
        make="Make one: recycle export MODEL --to KIND --out DIR",
        again="Export the model again.",
        code="E_MODEL",
    )


def _check(said: dict[str, Any]) -> None:
    if not all(isinstance(name, str) for name in said["files"]) or not isinstance(said["kind"], str):
        raise ValueError("it lists no files")
