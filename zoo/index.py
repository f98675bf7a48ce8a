"""What a zoo's zoo.json and its journal say, in SQLite: entries one at a time, pages, counts, and words to search by.

The index is derived. It notes how far it has read, and whoever finds more there reads on; whatever is odd about it (another zoo.json,
a journal cut short, a file that is no database) makes it build itself anew. It may be deleted at any time, and where it cannot be
written it is built in memory. So nothing but zoo.json and its journal has to survive a kill.

Kept as ``cache/index.sqlite``; threads may share one.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from recycler.zoo import journal
from recycler.zoo.cards import CARD
from recycler.zoo.manifest import Entry, broken, journal_of, parse_change, parse_entry, read_whole, state_of
from recycler.zoo.untrusted import OBEYED

VERSION = 1
PEERS = 500
"""How many adapters stand for all others where only their typical size or base is asked for."""
_CARD = 2000  # characters of a card that are searched: its head, with tags and languages, and the first paragraphs
_BATCH = 2000
_WORDS = 32  # of a query
_MARK = 2  # a character that no text holds any more
_WAIT = 60.0  # seconds for another process's transaction
_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE adapters (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, base TEXT, base_path TEXT, weights TEXT NOT NULL, entry TEXT NOT NULL
);
CREATE INDEX by_weights ON adapters (weights);
CREATE INDEX by_base ON adapters (base);
CREATE INDEX by_base_path ON adapters (base_path);
CREATE VIRTUAL TABLE texts USING fts5 (name, source, base, licence, card, tokenize='unicode61');
"""
_forked: list[sqlite3.Connection | None] = []
_RANK = "bm25(texts, 10, 5, 2, 2, 1)"  # a word in a name says more than one in a card


@dataclass(frozen=True)
class Found:
    """An adapter that a search found.

    Attributes:
        excerpt: the words around what was found in its card; empty where the card was not it.
    """

    name: str
    entry: Entry
    excerpt: str = ""


class Index:
    """The index of a zoo's folder, brought up to date whenever it is asked.

    Raises, from every method:
        InputError: zoo.json or its journal is broken.
    """

    def __init__(self, zoo: Path) -> None:
        self.zoo = zoo
        self.path = zoo / "cache" / "index.sqlite"
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self._owner = 0
        self._in_memory = False
        self._seen: tuple[Any, ...] | None = None

    def names(self) -> list[str]:
        """All, sorted."""
        return [name for (name,) in self.ask("SELECT name FROM adapters ORDER BY name")]

    def count(self) -> int:
        return int(self.ask("SELECT count(*) FROM adapters")[0][0])

    def get(self, name: str) -> Entry | None:
        rows = self.ask("SELECT entry FROM adapters WHERE name = ?", name)
        return parse_entry(name, rows[0][0]) if rows else None

    def page(self, limit: int, offset: int = 0) -> list[Entry]:
        """At most `limit` entries in the order of names, after the first `offset`."""
        return _entries(self.ask("SELECT name, entry FROM adapters ORDER BY name LIMIT ? OFFSET ?", limit, offset))

    def after(self, name: str, limit: int = _BATCH) -> list[Entry]:
        """At most `limit` entries whose names come after one."""
        return _entries(self.ask("SELECT name, entry FROM adapters WHERE name > ? ORDER BY name LIMIT ?", name, limit))

    def with_weights(self, sha256: str) -> list[str]:
        """The adapters whose weights have this hash."""
        return [n for (n,) in self.ask("SELECT name FROM adapters WHERE weights = ? ORDER BY name", sha256)]

    def hashes(self) -> list[tuple[str, str]]:
        """(name, sha256 of its weights) of all, sorted."""
        return self.ask("SELECT name, weights FROM adapters ORDER BY name")

    def bases(self) -> list[str | None]:
        """The distinct bases. Goes from one to the next through the index, however many adapters each has."""
        found: list[str | None] = [None] if self.ask("SELECT 1 FROM adapters WHERE base IS NULL LIMIT 1") else []
        last = ""
        while rows := self.ask("SELECT base FROM adapters WHERE base > ? ORDER BY base LIMIT 1", last):
            last = rows[0][0]
            found.append(last)
        return found

    def of_base(self, base: str | None, limit: int = PEERS) -> list[Entry]:
        """Some of the adapters that name this base, as it is spelt."""
        return _entries(self.ask("SELECT name, entry FROM adapters WHERE base IS ? LIMIT ?", base, limit))

    def of_base_path(self, path: str, limit: int = PEERS) -> list[Entry]:
        """Some of the adapters that use this folder as their base."""
        return _entries(self.ask("SELECT name, entry FROM adapters WHERE base_path = ? LIMIT ?", path, limit))

    def search(self, text: str, limit: int | None = 20, offset: int = 0) -> list[Found]:
        """Adapters in whose name, source, base, licence or card every word of `text` begins a word; the best first."""
        if not (query := _query(text, " ")):
            return []
        rows = self.ask(
            f"SELECT adapters.name, entry, snippet(texts, 4, char({_MARK}), '', '…', 12) FROM texts JOIN adapters ON adapters.id = texts.rowid"
            f" WHERE texts MATCH ? ORDER BY {_RANK}, adapters.name LIMIT ? OFFSET ?",
            query, -1 if limit is None else limit, offset,
        )  # fmt: skip
        return [Found(name, parse_entry(name, entry), _excerpt(some)) for name, entry, some in rows]

    def matching(self, text: str) -> list[str]:
        """The names of all that `search` finds, sorted."""
        if not (query := _query(text, " ")):
            return []
        sql = "SELECT adapters.name FROM texts JOIN adapters ON adapters.id = texts.rowid WHERE texts MATCH ? ORDER BY adapters.name"
        return [name for (name,) in self.ask(sql, query)]

    def matches(self, text: str) -> int:
        """How many that are."""
        query = _query(text, " ")
        return int(self.ask("SELECT count(*) FROM texts WHERE texts MATCH ?", query)[0][0]) if query else 0

    def near_names(self, name: str) -> list[str]:
        """Names among which a misspelt one may be meant: those that begin as it does, or share a word with it."""
        start = name[:2]
        rows = self.ask("SELECT name FROM adapters WHERE name >= ? AND name < ? LIMIT ?", start, start + "\uffff", _BATCH)
        if query := _query(name, " OR "):
            sql = "SELECT adapters.name FROM texts JOIN adapters ON adapters.id = texts.rowid WHERE texts MATCH ? LIMIT ?"
            rows += self.ask(sql, f"name : ({query})", 200)
        return list(dict.fromkeys(found for (found,) in rows))

    def rebuild(self) -> None:
        """Build it anew, whatever it says."""
        with self._lock:
            self._seen = None
            with suppress(sqlite3.Error, OSError):
                db = self._open()
                with _transaction(db):
                    db.execute("DELETE FROM meta")
            self._refresh()

    def ask(self, sql: str, *values: Any) -> list[Any]:
        """Rows of a query, over what zoo.json and its journal say now."""
        with self._lock:
            self._refresh()
            try:
                return self._open().execute(sql, values).fetchall()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
            self._discard()  # damaged where nobody looked before
            self._seen = None
            self._refresh()
            return self._open().execute(sql, values).fetchall()

    def _refresh(self) -> None:
        manifest = self.zoo / "zoo.json"
        state = state_of(manifest)
        if self._owner != os.getpid():  # a connection does not survive a fork, and its copy must not be closed
            _forked.append(self._db)
            self._db = self._seen = None
        log = self._seen[1] if self._seen and self._seen[0] == state else journal_of(manifest)
        now = (state, log, log and state_of(log))
        if now == self._seen:
            return
        try:
            self._bring(state, log)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and "no such" not in str(error):
                self._open_in_memory()  # it may not be written, or somebody holds it for long
            else:
                self._discard()  # it is damaged
            try:
                self._bring(state, log)
            except sqlite3.Error:
                self._open_in_memory()
                self._bring(state, log)
        self._seen = now

    def _bring(self, state: Any, log: Path | None) -> None:
        """Up to date: read on, or all."""
        db = self._open()
        end = self._reached(db, state, log)
        if end is not None and (log is None or next(journal.read(log, end), None) is None):
            return
        with _transaction(db):
            end = self._reached(db, state, log)  # another process may have done it
            if end is None or log is None:
                if end is None:
                    self._build(db)
                return
            try:
                for change, place in journal.read(log, end):
                    changed, removed = parse_change(change)
                    for name in removed:
                        self._drop(db, name)
                    for entry in changed.values():
                        self._put(db, entry)
                    end = place
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise broken(log, error) from error
            _note(db, state, log, end)

    def _reached(self, db: sqlite3.Connection, state: Any, log: Path | None) -> int | None:
        """How far the index has read the journal; None where what it read is not what is there."""
        noted = dict(db.execute("SELECT key, value FROM meta"))
        if noted.get("manifest") != json.dumps(state) or noted.get("journal") != (log.name if log else ""):
            return None
        end = int(noted["end"])
        if log is None:
            return end
        fact = state_of(log)
        if fact is None or fact[2] < end or journal.last_bytes(log, end).hex() != noted["tail"]:
            return None
        return end

    def _build(self, db: sqlite3.Connection) -> None:
        manifest = self.zoo / "zoo.json"
        while True:
            state = state_of(manifest)
            entries, log, end = read_whole(manifest)
            if state_of(manifest) == state:
                break
        db.execute("DELETE FROM adapters")
        db.execute("DELETE FROM texts")
        for entry in entries.values():
            self._insert(db, entry)
        _note(db, state, log, end)

    def _put(self, db: sqlite3.Connection, entry: Entry) -> None:
        self._drop(db, entry.name)
        self._insert(db, entry)

    def _insert(self, db: sqlite3.Connection, entry: Entry) -> None:
        text = json.dumps(entry.to_json(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        row = db.execute(
            "INSERT INTO adapters (name, base, base_path, weights, entry) VALUES (?, ?, ?, ?, ?)",
            (entry.name, entry.base, entry.base_path, entry.weights, text),
        ).lastrowid
        db.execute(
            "INSERT INTO texts (rowid, name, source, base, licence, card) VALUES (?, ?, ?, ?, ?, ?)",
            (row, entry.name, entry.source, entry.base, entry.licence, self._card(entry)),
        )

    def _card(self, entry: Entry) -> str:
        """The start of an adapter's card, as it lies; what a terminal would obey is gone."""
        if CARD not in entry.files:
            return ""
        try:
            with (self.zoo / "adapters" / entry.name / CARD).open("rb") as stream:
                text = stream.read(4 * _CARD).decode("utf-8", "replace")
        except OSError:
            return ""
        return OBEYED.sub("", text[:_CARD])

    @staticmethod
    def _drop(db: sqlite3.Connection, name: str) -> None:
        for (row,) in db.execute("SELECT id FROM adapters WHERE name = ?", (name,)).fetchall():
            db.execute("DELETE FROM texts WHERE rowid = ?", (row,))
            db.execute("DELETE FROM adapters WHERE id = ?", (row,))

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            self._owner, self._in_memory = os.getpid(), False
            with suppress(OSError):
                self.path.parent.mkdir(exist_ok=True)
            self._db = _connect(self.path)
            try:
                self._prepare(self._db)
            except sqlite3.Error:
                self._close()
                raise
        return self._db

    def _open_in_memory(self) -> None:
        self._close()
        self._owner, self._in_memory = os.getpid(), True
        self._db = _connect(":memory:")
        self._prepare(self._db)

    def _prepare(self, db: sqlite3.Connection) -> None:
        if db.execute("PRAGMA user_version").fetchone()[0] == VERSION:
            return
        with _transaction(db):
            if db.execute("PRAGMA user_version").fetchone()[0] == VERSION:
                return
            for (name,) in db.execute("SELECT name FROM sqlite_master WHERE name IN ('texts', 'adapters', 'meta')").fetchall():
                db.execute(f"DROP TABLE {name}")  # another version's
            for statement in _TABLES.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {VERSION}")

    def _discard(self) -> None:
        self._close()
        for path in (self.path, self.path.with_name(self.path.name + "-journal")):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._db is not None and self._owner == os.getpid():
            self._db.close()
        self._db = None


class _transaction:
    """All or nothing, with the right to write from its start, so that two processes do not both begin and one fail."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db

    def __enter__(self) -> None:
        self.db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.db.execute("COMMIT")
            return
        with suppress(sqlite3.Error):  # SQLite may have rolled back already
            self.db.execute("ROLLBACK")


def _connect(place: Path | str) -> sqlite3.Connection:
    db = sqlite3.connect(place, timeout=_WAIT, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA synchronous = NORMAL")
    return db


def _note(db: sqlite3.Connection, state: Any, log: Path | None, end: int) -> None:
    facts = {
        "manifest": json.dumps(state),
        "journal": log.name if log else "",
        "end": str(end),
        "tail": journal.last_bytes(log, end).hex() if log else "",
    }
    db.executemany("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", facts.items())


def _entries(rows: Iterable[tuple[str, str]]) -> list[Entry]:
    return [parse_entry(name, text) for name, text in rows]


def _query(text: str, joined: str) -> str:
    """The words of a text as beginnings of words, in FTS5's language; none of its operators comes through."""
    return joined.join(f'"{word}"*' for word in re.findall(r"[^\W_]+", text)[:_WORDS])


def _excerpt(some: str) -> str:
    return " ".join(some.replace(chr(_MARK), "").split()) if chr(_MARK) in some else ""
