"""``zoo.json``: one entry per adapter, and the names that an adapter may have."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from recycler.zoo.errors import InputError, UsageError
from recycler.zoo.inspect import CONFIG, WEIGHTS, printable

SCHEMA_VERSION = 1
HOW_CONVERTED = ("files", "layout", "expert", "rank", "energy")
"""Of `Entry.converted`, what says how to do it again: the originals, how they were read, and how much was kept."""
_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]*")
_MAX_NAME = 96
_BASE = "base"  # the row of every table that uses no adapter
_RESERVED = {"con", "prn", "aux", "nul"} | {f"{port}{n}" for port in ("com", "lpt") for n in range(10)}


@dataclass(frozen=True)
class Entry:
    """One line of the manifest.

    Attributes:
        source: a Hub id, with the subfolder where there is one, or a folder.
        revision: the 40-hex commit when it came from the Hub.
        base: the base model it is for, None where unknown.
        base_path: a local folder that serves as a copy of the base, or None.
        base_revision: the commit of the base that it was compared with, or the revision that it declares; None for a folder.
        files: file name → {"sha256", "size"}.
        sites: how many linears it touches. parameters: numbers in its factors.
        added: when, in UTC, ISO 8601.
        norm: ‖ΔW‖_F over all sites together, to six digits, without what DoRA's magnitude and biases add; None in entries
            that an older version wrote.
        converted: None where the files are as they came. Else how they were made: "files", the originals as in `files`, and
            what it took to make these of them.
        forced_base: a person said that it is for `base`, although it declares another.
    """

    name: str
    source: str
    revision: str | None
    base: str | None
    base_path: str | None
    base_revision: str | None
    files: Mapping[str, Mapping[str, Any]] = field(repr=False)
    licence: str | None
    ranks: tuple[int, ...]
    sites: int
    parameters: int
    kinds: tuple[str, ...]
    added: str
    norm: float | None = None
    converted: Mapping[str, Any] | None = field(default=None, repr=False)
    forced_base: bool = False

    @property
    def weights(self) -> str:
        """sha256 of the file that its factors are read from."""
        return str(self.files[WEIGHTS]["sha256"])

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys; the name is the key it is stored under."""
        plain = asdict(self)
        del plain["name"]
        return {**plain, "ranks": list(self.ranks), "kinds": list(self.kinds)}


def slug(text: str) -> str:
    """A name for an adapter from a repository's or folder's name: ``Math LoRA_v2`` → ``math-lora_v2``.

    Raises:
        UsageError: nothing usable is left.
    """
    raw = re.sub(r"[^a-z0-9._-]+", "-", text.lower())[:_MAX_NAME].lstrip("._-").rstrip(".-")
    return check_name(raw, text)


def is_slug(name: str) -> bool:
    """Whether `name` has the form of an adapter's name, and so cannot lead out of a folder."""
    return bool(_SLUG.fullmatch(name))


def check_name(name: str, given: str | None = None) -> str:
    """`name`, if it can name an adapter on every system.

    Raises:
        UsageError: it is no slug, ends in a dot, is too long, is reserved on Windows, or means the base.
    """
    if name == _BASE:
        raise UsageError(
            f"{printable(given or name)!r} cannot name an adapter.",
            "In every table, `base` is the base itself, without adapters.",
            "Choose another with --as.",
            code="E_NAME",
        )
    usable = _SLUG.fullmatch(name) and len(name) <= _MAX_NAME and not name.endswith(".")
    if not usable or name.split(".")[0] in _RESERVED:
        raise UsageError(
            f"{printable(given or name)!r} cannot name an adapter.",
            f"Names become folders: a-z, 0-9, '.', '_', '-', at most {_MAX_NAME}, and not CON or NUL.",
            "Choose another with --as.",
            code="E_NAME",
        )
    return name


def read_manifest(path: Path) -> dict[str, Entry]:
    try:
        data = json.loads(path.read_text("utf-8"))
        version = data["schema_version"]
        if version == SCHEMA_VERSION:
            return {name: _entry(name, data["adapters"][name]) for name in sorted(data["adapters"])}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"{printable(error)} is missing" if isinstance(error, KeyError) else printable(error)
        raise InputError(
            f"{path} cannot be read: {why}.",
            "It is the list of what the zoo holds, and was cut or edited by hand.",
            "Restore it, or move it away and fetch the adapters again.",
            code="E_MANIFEST",
        ) from error
    raise InputError(
        f"{path} has schema_version {printable(version)}; this version reads {SCHEMA_VERSION}.",
        "A newer recycle wrote it.",
        "Update with: pip install -U recycler",
        code="E_NEWER",
    )


def _entry(name: str, data: Mapping[str, Any]) -> Entry:
    if not is_slug(name):  # names become paths
        raise ValueError(f"{name!r} is no name")
    files = _files(data["files"])
    if any(f in ("", "..") or Path(f).name != f or "\\" in f for f in files) or not {CONFIG, WEIGHTS} <= files.keys():
        raise ValueError(f"the files of {name!r} are not those of an adapter")
    optional = {f.name for f in fields(Entry) if f.default is not MISSING}  # entries of older versions lack them
    known = {f.name for f in fields(Entry)} - {"name", "ranks", "kinds"}
    plain = {key: data[key] for key in known if key in data or key not in optional} | {"files": files}
    if plain.get("converted") is not None:
        plain["converted"] = {**plain["converted"], "files": _files(plain["converted"]["files"])}
    return Entry(name=name, ranks=tuple(data["ranks"]), kinds=tuple(data["kinds"]), **plain)


def _files(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {str(f): {"sha256": str(v["sha256"]), "size": int(v["size"])} for f, v in data.items()}


def write_manifest(path: Path, entries: Mapping[str, Entry]) -> None:
    data = {
        "schema_version": SCHEMA_VERSION,
        "adapters": {name: entries[name].to_json() for name in sorted(entries)},
    }
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as stream:
            json.dump(data, stream, indent=2, sort_keys=True, ensure_ascii=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
