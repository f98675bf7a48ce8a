"""``zoo.json``: one entry per adapter, and the names that an adapter may have.

A small zoo's says everything (``schema_version`` 1). A large one's (2) names a journal beside it, in which later changes stand.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from recycler.zoo import journal
from recycler.zoo.errors import InputError, UsageError
from recycler.zoo.inspect import CONFIG, WEIGHTS, printable

SCHEMA_VERSION, WITH_JOURNAL = 1, 2
HOW_CONVERTED = ("files", "layout", "expert", "rank", "energy")
"""Of `Entry.converted`, what says how to do it again: the originals, how they were read, and how much was kept."""
_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]*")
_MAX_NAME = 96
_BASE = "base"  # the row of every table that uses no adapter
_HEAD = re.compile(rb'\{\s*"schema_version": 2,\s*"journal": "([^"]+)"')  # as `write_manifest` writes it
_WHOLE = b'{\n  "adapters"'
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
        plain = {key: value for key, value in vars(self).items() if key != "name"}
        files = {name: dict(fact) for name, fact in self.files.items()}
        return {
            **plain,
            "files": files,
            "converted": deepcopy(self.converted),
            "ranks": list(self.ranks),
            "kinds": list(self.kinds),
        }


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


State = tuple[int, int, int]
"""What a file is known by: inode, time, size."""


def state_of(path: Path) -> State | None:
    """None where there is no file."""
    try:
        fact = path.stat()
    except OSError:
        return None
    return fact.st_ino, fact.st_mtime_ns, fact.st_size


def journal_of(path: Path) -> Path | None:
    """The journal that a zoo.json names, by its first bytes where it lies as it was written; None where it names none."""
    try:
        with path.open("rb") as stream:
            start = stream.read(200)
        found = _HEAD.match(start)
        if found is None and start.startswith(_WHOLE):
            return None
        name = found[1].decode() if found else json.loads(path.read_text("utf-8"))["journal"]  # formatted by hand
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return path.with_name(name) if journal.is_journal(name) else None


def read_manifest(path: Path) -> dict[str, Entry]:
    """Name → Entry, sorted, as zoo.json and its journal say; empty where there is no zoo.json.

    Raises:
        InputError: one of them is broken, or was written by a newer version, or the journal is missing.
    """
    return read_whole(path)[0]


def read_whole(path: Path) -> tuple[dict[str, Entry], Path | None, int]:
    """As `read_manifest`, with the journal, and how far it was read."""
    try:
        while True:
            before = state_of(path)
            data = json.loads(path.read_text("utf-8"))
            version = data["schema_version"]
            if version not in (SCHEMA_VERSION, WITH_JOURNAL):
                break
            entries = {name: _entry(name, one) for name, one in data["adapters"].items()}
            log, end = None, 0
            if version == WITH_JOURNAL:
                if not journal.is_journal(data["journal"]):
                    raise ValueError(f"{data['journal']!r} is no journal's name")
                log = path.with_name(data["journal"])
                if not log.exists():
                    if state_of(path) != before:  # written whole meanwhile, and the old journal is gone
                        continue
                    raise _journal_missing(path, log)
                for change, place in journal.read(log):
                    changed, removed = parse_change(change)
                    end = place
                    for name in removed:
                        entries.pop(name, None)
                    entries |= changed
            return dict(sorted(entries.items())), log, end
    except (FileNotFoundError, NotADirectoryError):
        return {}, None, 0
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise broken(path, error) from error
    raise InputError(
        f"{path} has schema_version {printable(version)}; this version reads {SCHEMA_VERSION} and {WITH_JOURNAL}.",
        "A newer recycle wrote it.",
        "Update with: pip install -U recycler",
        code="E_NEWER",
    )


def parse_change(change: Mapping[str, Any]) -> tuple[dict[str, Entry], list[str]]:
    """A line of the journal as (what is set, what is removed), checked as zoo.json is."""
    return {name: _entry(name, one) for name, one in change.get("set", {}).items()}, list(change.get("remove", ()))


def parse_entry(name: str, text: str) -> Entry:
    """An entry from its JSON."""
    return _entry(name, json.loads(text))


def broken(path: Path, error: Exception) -> InputError:
    """For a zoo.json or a journal that cannot be read."""
    if isinstance(error, InputError):
        return error
    why = f"{printable(error)} is missing" if isinstance(error, KeyError) else printable(error)
    return InputError(
        f"{path} cannot be read: {why}.",
        "It is the list of what the zoo holds, and was cut or edited by hand.",
        "Restore it, or move it away and fetch the adapters again.",
        code="E_MANIFEST",
    )


def _journal_missing(path: Path, log: Path) -> InputError:
    return InputError(
        f"{path} names the journal {log.name}, which is not beside it.",
        "In a large zoo the two together are the list of what it holds; one alone would lose adapters.",
        "Put the journal back. To hand a large zoo on as one file: recycle zoo list --json > lock.json",
        code="E_MANIFEST",
    )


def _entry(name: str, data: Mapping[str, Any]) -> Entry:
    if not is_slug(name):  # names become paths
        raise ValueError(f"{name!r} is no name")
    files = _files(data["files"])
    if not all(map(_is_file_name, files)) or not {CONFIG, WEIGHTS} <= files.keys():
        raise ValueError(f"the files of {name!r} are not those of an adapter")
    plain = {key: data[key] for key in _KNOWN if key in data or key not in _OPTIONAL} | {"files": files}
    if plain.get("converted") is not None:
        plain["converted"] = {**plain["converted"], "files": _files(plain["converted"]["files"])}
    return Entry(name=name, ranks=tuple(data["ranks"]), kinds=tuple(data["kinds"]), **plain)


@lru_cache(maxsize=1000)
def _is_file_name(name: str) -> bool:
    """Whether it names a file in a folder, and nothing outside of it."""
    return name not in ("", "..") and Path(name).name == name and "\\" not in name


_OPTIONAL = {f.name for f in fields(Entry) if f.default is not MISSING}  # entries of older versions lack them
_KNOWN = {f.name for f in fields(Entry)} - {"name", "ranks", "kinds"}


def _files(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {str(f): {"sha256": str(v["sha256"]), "size": int(v["size"])} for f, v in data.items()}


def write_manifest(path: Path, entries: Mapping[str, Entry], log: Path | None = None) -> None:
    """Write zoo.json whole, under the zoo's lock.

    Args:
        log: the journal that continues it; None for a small zoo.
    """
    data: dict[str, Any] = {"adapters": {name: entries[name].to_json() for name in sorted(entries)}}
    if log is None:
        data["schema_version"] = SCHEMA_VERSION
    else:  # first, so that nobody has to read on to find it
        plain = {name: dict(sorted(one.items())) for name, one in data["adapters"].items()}
        data = {"schema_version": WITH_JOURNAL, "journal": log.name, "adapters": plain}
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as stream:
            json.dump(data, stream, indent=2, sort_keys=log is None, ensure_ascii=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
