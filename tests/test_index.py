"""Large zoos: the journal and the index say what zoo.json would have said, whatever happened to them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import files, write
from click.testing import CliRunner, Result
from test_kill import Forker, sound

from recycler.cli import main
from recycler.intake.locking import jobs_from_lock
from recycler.zoo import journal, store
from recycler.zoo.entries import Entries
from recycler.zoo.errors import InputError, SecurityError, UsageError
from recycler.zoo.index import Index
from recycler.zoo.manifest import Entry, journal_of, read_manifest
from recycler.zoo.store import Zoo

FACTS = {file: {"sha256": "0" * 64, "size": 1} for file in ("adapter_config.json", "adapter_model.safetensors")}


def entry(name: str, **facts: Any) -> Entry:
    plain: dict[str, Any] = {
        "source": f"org/{name}", "revision": None, "base": "org/base", "base_path": None, "base_revision": None, "files": FACTS,
        "licence": "mit", "ranks": (4,), "sites": 2, "parameters": 64, "kinds": ("LoRA",), "added": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Entry(name=name, **{**plain, **facts})


def recycle(*args: Any) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def agree(zoo: Zoo) -> dict[str, Entry]:
    """What files say of the zoo, after checking that it says the same in every way that it can be asked."""
    truth = read_manifest(zoo.manifest)
    for one in (zoo, Zoo(zoo.path)):
        assert list(one) == list(truth) and len(one) == len(truth) and dict(one.entries) == truth
        assert list(one.entries.values()) == list(truth.values()) and list(one.entries.items()) == list(truth.items())
        assert one.page() == list(truth.values()) and one.page(2, 1) == list(truth.values())[1:3]
        assert one.weights() == [(name, found.weights) for name, found in truth.items()]
    return truth


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / "new" / f"a{n}", seed=n, base_model_name_or_path=None) for n in range(6)]


@pytest.fixture
def large(tmp_path: Path, folders: list[Path]) -> Zoo:
    """Three adapters, with a journal already."""
    zoo = Zoo(tmp_path / "zoo")
    for folder in folders[:3]:
        zoo.add(folder)
    zoo._fold(zoo.entries, stays_large=True)
    return zoo


def test_a_zoo_grows_out_of_one_file(tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SMALL", 3)
    zoo = Zoo(tmp_path / "zoo")
    for folder in folders[:3]:
        zoo.add(folder)
    assert not isinstance(zoo.entries, Entries) and {p.name for p in zoo.path.iterdir()} == {".lock", "adapters", "zoo.json"}
    assert json.loads(zoo.manifest.read_text())["schema_version"] == 1
    zoo.add(folders[3])
    assert isinstance(zoo.entries, Entries) and json.loads(zoo.manifest.read_text())["schema_version"] == 2
    whole = zoo.manifest.read_bytes()
    zoo.add(folders[4], source="org/a4")
    zoo.remove(["a0", "a3"])
    assert zoo.manifest.read_bytes() == whole  # so that adding does not cost more than the adapter
    assert list(agree(zoo)) == ["a1", "a2", "a4"] and zoo.verify() == [] and zoo.entry("a4").source == "org/a4"
    assert {p.name for p in (zoo.path / "adapters").iterdir()} == {"a1", "a2", "a4"} and not list(
        (zoo.path / "staging").iterdir()
    )
    assert zoo.add(folders[1], "again")[1].warnings == ("it has the same weights as a1",)
    assert any("already" in note for note in zoo.add(folders[1])[1].notes)
    with pytest.raises(UsageError, match="another adapter called a1"):
        zoo.add(folders[2], "a1")
    assert zoo.reindex() == 4 and json.loads(zoo.manifest.read_text())["schema_version"] == 2
    zoo.remove("again")
    assert zoo.reindex() == 3  # small again, and one file
    assert json.loads(zoo.manifest.read_text())["schema_version"] == 1 and not list(zoo.path.glob(journal.PATTERN))
    assert list(agree(zoo)) == ["a1", "a2", "a4"] and zoo.verify() == [] and not (zoo.path / "staging").exists()


def test_whatever_is_done_the_index_says_what_the_files_say(tmp_path: Path) -> None:
    """Changes at random, by two processes' worth of zoos, beside a plain dictionary."""
    draw = random.Random(0)
    (tmp_path / "zoo").mkdir()
    zoos = [Zoo(tmp_path / "zoo"), Zoo(tmp_path / "zoo")]
    zoos[0]._fold({}, stays_large=True)
    expected: dict[str, Entry] = {}
    for _ in range(120):
        zoo, name = draw.choice(zoos), f"n{draw.randrange(12):02}"
        if draw.random() < 0.3 and name in expected:
            gone = [name, *draw.sample(sorted(expected.keys() - {name}), min(1, len(expected) - 1))]
            zoo._write({}, gone)
            expected = {n: e for n, e in expected.items() if n not in gone}
        else:
            expected[name] = entry(name, sites=draw.randrange(100), base=draw.choice(["org/base", "org/other", None]))
            zoo._write({name: expected[name]})
        if draw.random() < 0.05:
            zoo.reindex()
            zoo._fold(zoo.entries, stays_large=True)
        assert dict(draw.choice(zoos).entries) == expected
    assert agree(zoos[0]) == dict(sorted(expected.items()))
    assert set(zoos[1].index.bases()) == {one.base for one in expected.values()}
    assert {e.name for e in zoos[1].peers("org/other")} == {n for n, e in expected.items() if e.base == "org/other"}


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "gone": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "none": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"no database " * 1000),
    "pages": lambda path: path.write_bytes(path.read_bytes()[:4096] + b"\xff" * (path.stat().st_size - 4096)),
    "version": lambda path: _sql(path, "PRAGMA user_version = 99"),
    "tables": lambda path: _sql(path, "DROP TABLE meta"),
    "facts": lambda path: _sql(path, "DELETE FROM meta"),
    "no place": lambda path: (shutil.rmtree(path.parent), path.parent.write_text("a file where a folder should be")),
}


def _sql(path: Path, statement: str) -> None:
    with sqlite3.connect(path) as db:
        db.execute(statement)
    db.close()


@pytest.mark.parametrize("how", DAMAGE)
def test_the_index_may_be_lost_or_damaged(large: Zoo, folders: list[Path], how: str) -> None:
    large.add(folders[3])
    agree(large)
    DAMAGE[how](large.index.path)
    zoo = Zoo(large.path)
    assert zoo.entry("a3").sites == 4 and list(agree(zoo)) == ["a0", "a1", "a2", "a3"]
    zoo.add(folders[4])
    zoo.remove("a0")
    assert list(agree(zoo)) == ["a1", "a2", "a3", "a4"] and [one.name for one in zoo.search("a4")] == ["a4"]
    assert large.entry("a4") == zoo.entry("a4")  # one that had the old file open


def test_an_index_of_another_time_is_noticed(large: Zoo, folders: list[Path]) -> None:
    """Put back from a backup, or copied with another zoo: it reads on, or begins again."""
    agree(large)
    old = large.index.path.read_bytes()
    large.add(folders[3])
    agree(large)
    newer = large.index.path.read_bytes()
    large.index.path.write_bytes(old)
    assert "a3" in agree(Zoo(large.path))
    large.remove(["a0", "a1"])
    log = journal_of(large.manifest)
    assert log is not None
    text = log.read_bytes()
    lines = text.splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-1]))  # a disk that lost what was written last
    large.index.path.write_bytes(newer)
    assert list(agree(Zoo(large.path))) == ["a0", "a1", "a2", "a3"]
    log.write_bytes(b"".join(lines[:-2]) + b'{"remove":["a2"]}'.ljust(len(lines[-2]) - 1) + b"\n")  # as long, but another one
    large.index.path.write_bytes(newer)
    assert list(agree(Zoo(large.path))) == ["a0", "a1"]


def test_a_line_without_an_end_does_not_count(large: Zoo, folders: list[Path]) -> None:
    log = journal_of(large.manifest)
    assert log is not None
    before = agree(large)
    for torn in (b"{", b'{"remove":["a0"]}', b'{"set":{"x":' + b" " * 200_000):
        with log.open("ab") as stream:
            stream.write(torn)
        assert agree(large) == before
        large.add(folders[3])
        assert list(agree(large)) == ["a0", "a1", "a2", "a3"]
        large.remove("a3")


@pytest.mark.parametrize(
    "line", ["{", "[]", "7", '{"set": 3}', '{"set": {"a": {}}}', '{"set": {"../x": {}}}', '{"gone": ["a0"]}']
)
def test_broken_journals(large: Zoo, folders: list[Path], line: str) -> None:
    log = journal_of(large.manifest)
    assert log is not None
    with log.open("a") as stream:
        stream.write(line + "\n")
    before = log.read_bytes()
    for call in (
        lambda: list(Zoo(large.path)),
        lambda: large.entry("a0"),
        lambda: large.add(folders[3]),
        lambda: large.reindex(),
    ):
        with pytest.raises(InputError, match="cannot be read") as caught:
            call()
        assert caught.value.code == "E_MANIFEST"
    assert log.read_bytes() == before


def test_a_journal_that_is_missing(large: Zoo, folders: list[Path], tmp_path: Path) -> None:
    """zoo.json alone would be a zoo that lost adapters without a word."""
    large.add(folders[3])
    log = journal_of(large.manifest)
    assert log is not None
    aside = log.rename(tmp_path / "aside")
    for call in (lambda: len(Zoo(large.path)), lambda: large.add(folders[4]), lambda: jobs_from_lock(large.manifest)):
        with pytest.raises(InputError, match=r"names the journal zoo-\w+\.jsonl.*zoo list --json"):
            call()
    aside.rename(log)
    assert list(agree(large)) == ["a0", "a1", "a2", "a3"]
    assert {job.name for job in jobs_from_lock(large.path)} == {"a0", "a1", "a2", "a3"}
    large.manifest.write_text(large.manifest.read_text().replace(log.name, "../zoo-00000000.jsonl"))
    with pytest.raises(InputError, match="no journal"):
        list(Zoo(large.path))
    with pytest.raises(InputError):
        large.add(folders[4])
    assert log.exists()


def test_formatted_by_hand(large: Zoo, folders: list[Path]) -> None:
    data = json.loads(large.manifest.read_text())
    large.manifest.write_text(json.dumps(data, sort_keys=True))
    large.add(folders[3])
    assert list(agree(large)) == ["a0", "a1", "a2", "a3"]


def test_a_large_zoo_of_an_older_version(tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = Zoo(tmp_path / "zoo")
    for folder in folders[:3]:
        zoo.add(folder)
    monkeypatch.setattr(store, "_SMALL_BYTES", 500)
    monkeypatch.setattr(store, "SMALL", 2)
    before = zoo.manifest.read_bytes()
    assert isinstance(Zoo(zoo.path).entries, Entries) and list(agree(Zoo(zoo.path))) == ["a0", "a1", "a2"]
    assert zoo.manifest.read_bytes() == before
    zoo = Zoo(zoo.path)
    zoo.add(folders[3])
    assert list(agree(zoo)) == ["a0", "a1", "a2", "a3"] and journal_of(zoo.manifest)


def test_a_disk_that_is_full(large: Zoo, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    agree(large)
    before = {name: data for name, data in files(large.path).items() if not name.endswith(".lock")}
    for kind in (OSError("disk full"), KeyboardInterrupt()):

        def fail(number: int, kind: BaseException = kind) -> None:
            raise kind

        with monkeypatch.context() as patch:
            patch.setattr(journal.os, "fsync", fail)
            patch.setattr(store.staging, "sync", lambda folder: None)
            with pytest.raises(type(kind)):
                large.add(folders[3])
            with pytest.raises(type(kind)):
                large.remove("a0")
        now = {name: data for name, data in files(large.path).items() if not name.endswith(".lock") and "cache/" not in name}
        assert now.keys() <= before.keys() and all(before[name] == data for name, data in now.items())
        agree(large)
    large.add(folders[3])
    assert list(agree(large)) == ["a0", "a1", "a2", "a3"] and large.verify() == []


def test_a_journal_of_repetitions_is_folded(large: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_SMALL_BYTES", 1000)
    longest = 0
    for turn in range(150):
        large.record_base("a0", f"org/base-{turn}", None)
        log = journal_of(large.manifest)
        assert log is not None
        longest = max(longest, log.stat().st_size)
    assert agree(large)["a0"].base == "org/base-149"
    assert longest < 100 * len(json.dumps(large.entry("a0").to_json())) and len(list(large.path.glob(journal.PATTERN))) == 1


@pytest.fixture(scope="module")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    made = Forker(tmp_path_factory.mktemp("forker"))
    yield made
    made.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("what", ["fetch", "remove", "reindex"])
def test_killed_before_every_step(forker: Forker, large: Zoo, folders: list[Path], tmp_path: Path, what: str) -> None:
    agree(large)
    args = {"fetch": ["fetch", folders[3]], "remove": ["zoo", "remove", "a0", "a2"], "reindex": ["zoo", "reindex"]}[what]
    ends = {"fetch": ["a0", "a1", "a2", "a3"], "remove": ["a1"], "reindex": ["a0", "a1", "a2"]}[what]

    def fresh(name: str) -> Path:
        shutil.copytree(large.path, tmp_path / name)
        agree(Zoo(tmp_path / name))
        return tmp_path / name

    path = fresh("counted")
    assert forker.run(*args, "--zoo", path, die=(path, 0), count=tmp_path / "count") == 0, forker.said
    steps = int((tmp_path / "count").read_text())
    assert steps > 5
    for number in range(1, steps + 1):
        path = fresh(f"zoo-{number}")
        assert forker.run(*args, "--zoo", path, die=(path, number)) == -signal.SIGKILL
        zoo = sound(path)
        assert list(agree(zoo)) in (["a0", "a1", "a2"], ends), number
        with zoo.staging():  # the next to write sweeps
            pass
        assert {p.name for p in (path / "adapters").iterdir()} == set(zoo), number
        if number % 3 == 0:  # and the same command goes on
            assert list(zoo) == ends != ["a0", "a1", "a2"] or forker.run(*args, "--zoo", path) == 0, forker.said
            assert list(agree(Zoo(path))) == ends and Zoo(path).verify() == []
            assert len(list(path.glob(journal.PATTERN))) == (what != "reindex"), number
        shutil.rmtree(path)


def test_processes_add_remove_and_read_at_once(large: Zoo, folders: list[Path]) -> None:
    """Some are killed while they do; whoever looks sees a whole zoo all the time."""
    script = (
        "import sys, itertools; from recycler.zoo.store import Zoo\nzoo = Zoo(sys.argv[1])\n"
        "for n in itertools.count() if sys.argv[2] == 'on' else range(4):\n"
        "    name = f'{sys.argv[2]}-{n % 2}'\n"
        "    zoo.add(sys.argv[3], name) if name not in zoo else zoo.remove(name)\n"
    )
    ends = [subprocess.Popen([sys.executable, "-c", script, large.path, who, folders[3]]) for who in ("x", "y")]
    killed = subprocess.Popen([sys.executable, "-c", script, large.path, "on", folders[4]])
    zoo, looked = Zoo(large.path), 0
    while any(process.poll() is None for process in ends):
        names = list(zoo)
        assert names == sorted(names) and {"a0", "a1", "a2"} <= set(names)
        assert zoo.entry("a1").sites == 4
        looked += 1
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert [process.wait() for process in ends] == [0, 0] and looked > 3
    with zoo.staging():
        pass
    assert zoo.verify() == [] and {n for n in agree(zoo) if n[:2] != "on"} == {"a0", "a1", "a2"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_forks_and_threads_share_a_zoo(large: Zoo, folders: list[Path]) -> None:
    assert list(large) == ["a0", "a1", "a2"]
    if (child := os.fork()) == 0:
        os._exit(0 if list(large) == ["a0", "a1", "a2"] and large.entry("a1").sites == 4 else 1)
    assert os.waitpid(child, 0)[1] == 0
    seen: list[int] = []
    threads = [threading.Thread(target=lambda: seen.extend(len(large) for _ in range(50))) for _ in range(4)]
    for thread in threads:
        thread.start()
    large.add(folders[3])
    for thread in threads:
        thread.join()
    assert len(seen) == 200 and set(seen) <= {3, 4}


def test_words(tmp_path: Path) -> None:
    zoo = Zoo(tmp_path / "zoo")
    card = "---\nlicense: mit\ntags: [lora, german]\n---\n# Sums\nAdds \x1b[31m numbers up.\n"
    zoo.add(write(tmp_path / "sums", card=card), source="org/the-sums")
    zoo.add(write(tmp_path / "german-law", seed=1))
    zoo.add(write(tmp_path / "poems", seed=2, card=None))

    def found(text: str, **how: Any) -> list[str]:
        return [one.name for one in zoo.search(text, **how)]

    assert found("german") == ["german-law", "sums"]  # a name says more than a card
    assert found("german", limit=1, offset=1) == ["sums"]
    assert found("GERM") == found("german") and found("german numb") == ["sums"] and found("german poems") == []
    assert found("the sums") == ["sums"] and found("apache") == ["german-law"] and set(found("org base")) == set(zoo)
    (one,) = zoo.search("numbers")
    assert "numbers up" in one.excerpt and "\x1b" not in one.excerpt and one.entry == zoo.entry("sums")
    for odd in ("", "  ", '"', "*", "-", "()", "\0", "日本", "x" * 100_000):
        assert found(odd) == []
    for operators in ("german OR poems", "german NOT law", 'name:"german"', "german NEAR law", "german)"):
        zoo.search(operators)  # words like all others
    assert found("german OR poems") == []
    zoo.remove("sums")
    zoo.add(write(tmp_path / "sums-2", card=card, seed=3))
    assert found("numbers") == ["sums-2"]
    assert Zoo(tmp_path / "none").search("x") == [] and not (tmp_path / "none").exists()


def test_names_that_are_not_there(large: Zoo) -> None:
    large._write({name: entry(name) for name in ("summaries-german", "math", *(f"z{n}" for n in range(50)))})
    for wrong, meant in (("mahts", "math"), ("sumaries-german", "summaries-german")):
        with pytest.raises(UsageError, match=rf"It holds: {meant}, .* and 35 more") as caught:
            large.entry(wrong)
        assert isinstance(caught.value, KeyError)
    with pytest.raises(UsageError, match="Not in the zoo: nobody"):
        large.remove(["math", "nobody"])
    assert "math" in large and 7 not in large.entries and large.entries.get("nobody") is None


def test_peers_of_a_large_zoo(large: Zoo) -> None:
    """An adapter is judged by others for its base, however that is spelt, and on its folder; not by all of 100,000."""
    many = {f"m{n:03}": entry(f"m{n:03}", base="org/Base", base_path="/somewhere") for n in range(700)}
    large._write(many | {"other": entry("other", base="org/other"), "beside": entry("beside", base="org/x", base_path="/here")})
    names = {one.name for one in large.peers("org/base", "/here")}
    assert 500 <= len(names) <= 501 and names <= many.keys() | {"beside"} and "beside" in names
    assert [one.name for one in large.peers("org/other")] == ["other"]


def test_list_in_pages(large: Zoo) -> None:
    large._write({f"b{n}": entry(f"b{n}", source="org/\x1b[31mred") for n in range(4)})
    args = ("zoo", "list", "--zoo", large.path)
    assert [line.split("\t")[0] for line in recycle(*args).stdout.splitlines()] == ["name", *sorted(large)]
    page = recycle(*args, "--limit", 2, "--offset", 3)
    assert [line.split("\t")[0] for line in page.stdout.splitlines()] == ["name", "b0", "b1"] and "\x1b" not in page.output
    assert "4 to 5 of 7; go on with --offset 5" in page.stderr
    assert "none: there are 7" in recycle(*args, "--offset", 9).stderr
    data = json.loads(recycle(*args, "--limit", 2, "--json").stdout)
    assert (data["total"], data["offset"], list(data["adapters"])) == (7, 0, ["a0", "a1"])
    assert recycle(*args, "--limit", 0).exit_code == 2 and recycle(*args, "--offset", -1).exit_code == 2


def test_what_list_prints_is_a_lock(large: Zoo, folders: list[Path], tmp_path: Path) -> None:
    """One file to hand on, of a zoo that has two."""
    large.add(folders[3])
    (tmp_path / "lock.json").write_text(recycle("zoo", "list", "--json", "--zoo", large.path).stdout)
    assert read_manifest(tmp_path / "lock.json") == dict(large.entries)
    assert recycle("fetch", "--from", tmp_path / "lock.json", "--zoo", tmp_path / "mine").exit_code == 0
    assert dict(Zoo(tmp_path / "mine").entries) == dict(large.entries)


def test_verify_a_sample(large: Zoo) -> None:
    (large.folder("a1") / "adapter_model.safetensors").write_bytes(b"changed")
    found = {seed: recycle("zoo", "verify", "--sample", 1, "--seed", seed, "--zoo", large.path) for seed in range(12)}
    assert {result.exit_code for result in found.values()} == {0, SecurityError.exit_code}
    for seed, result in found.items():
        (drawn,) = large.sample(1, seed)
        assert (result.exit_code == 0) == (drawn != "a1")
        assert ("1 adapters of 3 are as they were" in result.stderr) == (drawn != "a1")
    assert large.sample(99) == list(large)
    assert recycle("zoo", "verify", "--sample", 99, "--zoo", large.path).exit_code == 4
    refused = recycle("zoo", "verify", "a0", "--sample", 1, "--zoo", large.path)
    assert refused.exit_code == 2 and "Leave one of the two out" in refused.stderr


def test_reindex_says_what_there_is(large: Zoo, tmp_path: Path) -> None:
    result = recycle("zoo", "reindex", "--json", "--zoo", large.path)
    assert json.loads(result.stdout) == {"schema_version": 1, "path": str(large.path), "adapters": 3}
    assert recycle("zoo", "reindex", "--zoo", tmp_path / "none").exit_code == 0 and not (tmp_path / "none").exists()


def test_an_index_alone(large: Zoo) -> None:
    """`Index` over a folder, as the store uses it."""
    index = Index(large.path)
    assert index.names() == ["a0", "a1", "a2"] and index.count() == 3 and index.get("nobody") is None
    assert [one.name for one in index.after("a0")] == ["a1", "a2"]
    index.rebuild()
    large._write({"a0": replace(large.entry("a0"), base="org/new")})
    assert [one.name for one in index.of_base("org/new")] == ["a0"] and index.bases() == [None, "org/new"]
    assert index.with_weights(large.entry("a2").weights) == ["a2"]


def test_its_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a handful, so that it does not rot. Nothing here looks at a time."""
    import zoo_size

    monkeypatch.setattr(store, "SMALL", 20)
    monkeypatch.setattr(sys, "argv", ["zoo_size.py", "--sizes", "30", "--rounds", "1", "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    zoo_size.main()
    torch.set_num_threads(threads)
    assert "| add one |" in capsys.readouterr().out and (tmp_path / "zoo_size.png").stat().st_size > 1000
    rows = (tmp_path / "sizes.csv").read_text().splitlines()
    assert rows[0] == "adapters,what,seconds" and len(rows) == 1 + 12
    assert all(float(row.split(",")[-1]) > 0 for row in rows[1:])
