"""Somebody's zoo.json as a lock: the same zoo again, byte for byte, or a reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import files, tensors, write
from hub_server import Hub, running

from recycler.intake.fetching import fetch
from recycler.zoo.errors import HubError, InputError, PartialError, SecurityError
from recycler.zoo.store import Zoo

WEIGHTS = "adapter_model.safetensors"


pytestmark = pytest.mark.usefixtures("two_bases")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(monkeypatch, tmp_path / "cache") as server:
        for seed, name in enumerate(("math", "law", "code")):
            server.add(f"org/{name}", write(tmp_path / "repos" / name, seed=seed))
        path = write(tmp_path / "repos" / "deep" / "sub" / "dir", seed=9)
        server.add("org/deep", path.parents[1])
        yield server


@pytest.fixture
def theirs(hub: Hub, tmp_path: Path) -> Zoo:
    """Somebody's zoo: named by hand, one at an older commit, one in a subfolder, one for a base that it does not declare."""
    zoo = Zoo(tmp_path / "theirs")
    old = hub.repos["org/law"].refs["main"]
    sources = ["org/math", f"org/law@{old}", "org/deep/sub/dir"]
    fetch(sources, zoo=zoo, names=["sums", "cases", "deep"], endpoint=hub.url)
    foreign = write(tmp_path / "repos" / "foreign", seed=5, base_model_name_or_path="org/other")
    hub.add("org/foreign", foreign)
    fetch("org/foreign", "org/base", zoo, force_base=True, endpoint=hub.url)
    hub.repos["org/law"].commit({"README.md": b"gone"})  # the branch went on
    text = zoo.manifest.read_text().replace('"added": "2', '"added": "1')  # another time
    zoo.manifest.write_text(text)
    return zoo


def restore(theirs: Zoo, into: Path, hub: Hub, **options: Any) -> Zoo:
    zoo = Zoo(into)
    fetch(lock=theirs.manifest, zoo=zoo, endpoint=hub.url, **options).raise_for_failures()
    return zoo


def contents(zoo: Zoo) -> dict[str, bytes]:
    return {name: data for name, data in files(zoo.path).items() if not name.endswith(".lock")}


def edited(theirs: Zoo, path: Path, **changes: Any) -> Path:
    """A copy of the lock with the entry `sums` changed."""
    data = json.loads(theirs.manifest.read_text())
    data["adapters"] = {"sums": {**data["adapters"]["sums"], **changes}}
    path.write_text(json.dumps(data))
    return path


def test_the_same_lock_gives_the_same_zoo(theirs: Zoo, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = len(hub.log)
    one = restore(theirs, tmp_path / "one", hub)
    assert not [r for r in hub.log[asked:] if r.path.startswith("/api/models")]  # the lock says what the hashes are
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another machine"))
    two = restore(theirs, tmp_path / "two", hub, jobs=1)
    assert contents(one) == contents(two) == contents(theirs)
    assert one.verify() == [] and one.entry("foreign").forced_base
    assert one.entry("cases").revision != hub.repos["org/law"].refs["main"]


def test_again_asks_for_nothing(theirs: Zoo, hub: Hub, tmp_path: Path) -> None:
    zoo = restore(theirs, tmp_path / "mine", hub)
    asked, before = len(hub.log), contents(zoo)
    zoo.remove("sums")
    restore(theirs, tmp_path / "mine", hub)  # files that were fetched before are in the client's cache
    assert len(hub.log) == asked and contents(zoo) == before


def test_a_folder_of_a_zoo_is_its_lock(theirs: Zoo, hub: Hub, tmp_path: Path) -> None:
    assert fetch(lock=theirs.path, zoo=Zoo(tmp_path / "mine"), endpoint=hub.url).names == ["cases", "deep", "foreign", "sums"]


def test_contents_that_differ_are_refused(theirs: Zoo, hub: Hub, tmp_path: Path) -> None:
    """Row 7: both hashes are shown, and nothing is kept."""
    (entry,) = (e for e in theirs.entries.values() if e.name == "sums")
    forged = "0" * 64
    facts = {**entry.files, WEIGHTS: {**entry.files[WEIGHTS], "sha256": forged}}
    lock = edited(theirs, tmp_path / "zoo.json", files=facts)
    zoo = Zoo(tmp_path / "mine")
    with pytest.raises(SecurityError, match=rf"differ from the lock's hash.*Expected {forged}, got {entry.weights}") as caught:
        fetch(lock=lock, zoo=zoo, endpoint=hub.url)
    assert caught.value.exit_code == 4 and not zoo.entries
    with pytest.raises(HubError, match="has no revision 1111"):
        fetch(lock=edited(theirs, tmp_path / "zoo.json", revision="1" * 40), zoo=zoo, endpoint=hub.url)


def test_local_folders(hub: Hub, tmp_path: Path) -> None:
    folder = write(tmp_path / "local", seed=3)
    theirs = Zoo(tmp_path / "theirs")
    fetch(folder, zoo=theirs)
    one = restore(theirs, tmp_path / "one", hub)
    assert contents(one) == contents(theirs)
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (folder / WEIGHTS).write_bytes(raw)
    (folder / "LICENSE").write_text("mine")
    for dry_run in (False, True):
        with pytest.raises(
            SecurityError, match=r"not what the lock describes.*the lock says [0-9a-f]{64}, here it is [0-9a-f]{64}"
        ):
            fetch(lock=theirs.manifest, zoo=Zoo(tmp_path / "two"), dry_run=dry_run)
    shutil.rmtree(folder)  # gone, but the whole zoo was handed on
    assert contents(restore(theirs, tmp_path / "three", hub)) == contents(theirs)
    alone = tmp_path / "alone" / "zoo.json"
    alone.parent.mkdir()
    shutil.copy(theirs.manifest, alone)
    with pytest.raises(InputError, match=r"local is not here: the lock says that it came from .*no folder of this machine"):
        fetch(lock=alone, zoo=Zoo(tmp_path / "four"))


def test_what_is_gone_does_not_stop_the_rest(theirs: Zoo, hub: Hub, tmp_path: Path) -> None:
    del hub.repos["org/math"]
    shutil.rmtree(tmp_path / "cache")
    zoo = Zoo(tmp_path / "mine")
    report = fetch(lock=theirs.manifest, zoo=zoo, endpoint=hub.url)
    assert report.names == ["cases", "deep", "foreign"] and "org/math was not found" in str(report.failures[0].error)
    with pytest.raises(PartialError):
        report.raise_for_failures()


def test_a_dry_run(theirs: Zoo, hub: Hub, tmp_path: Path) -> None:
    report = fetch(lock=theirs.manifest, zoo=Zoo(tmp_path / "mine"), dry_run=True, endpoint=hub.url)
    assert report.bytes == sum(f["size"] for e in theirs.entries.values() for f in e.files.values())
    assert not (tmp_path / "mine").exists()


def test_a_norm_that_is_not_so(theirs: Zoo, hub: Hub, tmp_path: Path) -> None:
    """What the lock says of the strength is not believed: it decides who is an outlier."""
    lock = edited(theirs, tmp_path / "zoo.json", norm=1e-6)
    zoo = Zoo(tmp_path / "mine")
    report = fetch(lock=lock, zoo=zoo, endpoint=hub.url)
    assert "the lock says 1e-06" in " ".join(report.fetched[0].receipt.warnings)  # type: ignore[union-attr]
    assert zoo.entry("sums").norm == theirs.entry("sums").norm


def test_the_licence_is_as_recorded(theirs: Zoo, hub: Hub, tmp_path: Path) -> None:
    zoo = Zoo(tmp_path / "mine")
    fetch(lock=edited(theirs, tmp_path / "zoo.json", licence="mit"), zoo=zoo, endpoint=hub.url)
    assert zoo.entry("sums").licence == "mit"


@pytest.mark.parametrize(
    "changes",
    [
        {"source": 7}, {"revision": ["x"]}, {"licence": {}}, {"norm": "much"}, {"source": "../.."},
        {"files": {"adapter_config.json": {"sha256": "x", "size": 1}, WEIGHTS: {"sha256": "x", "size": 1}}},
        {"files": {"adapter_config.json": {"sha256": "0" * 64, "size": -1}, WEIGHTS: {"sha256": "0" * 64, "size": 1}}},
        {"converted": {"files": {"../../x": {"sha256": "0" * 64, "size": 1}}}},
        {"converted": {}}, {"converted": 3},
    ],
)  # fmt: skip
def test_locks_that_are_none(theirs: Zoo, hub: Hub, tmp_path: Path, changes: dict[str, Any]) -> None:
    asked = len(hub.log)
    lock = edited(theirs, tmp_path / "zoo.json", **changes)
    with pytest.raises((InputError, SecurityError)) as caught:
        fetch(lock=lock, zoo=Zoo(tmp_path / "mine"), endpoint=hub.url)
    assert caught.value.exit_code in (3, 4) and len(hub.log) == asked and not (tmp_path / "mine" / "zoo.json").exists()


def test_files_that_are_no_locks(tmp_path: Path) -> None:
    for name, text in {
        "a": "{",
        "b": '{"schema_version": 9, "adapters": {}}',
        "c": '{"schema_version": 1, "adapters": {}}',
    }.items():
        (tmp_path / name).write_text(text)
    for name in ("a", "b", "c", "absent", "."):
        with pytest.raises(InputError):
            fetch(lock=tmp_path / name, zoo=Zoo(tmp_path / "mine"))


def test_old_manifests_are_read(tmp_path: Path) -> None:
    """zoo.json as versions before this one wrote it."""
    zoo = Zoo(tmp_path / "zoo")
    zoo.add(write(tmp_path / "math"))
    data = json.loads(zoo.manifest.read_text())
    for key in ("norm", "converted", "forced_base"):
        del data["adapters"]["math"][key]
    zoo.manifest.write_text(json.dumps(data))
    entry = zoo.entry("math")
    assert (entry.norm, entry.converted, entry.forced_base) == (None, None, False)
    assert zoo.verify() == [] and torch.equal(
        zoo["math"].sites["model.layers.0.self_attn.q_proj"].a_RD,
        tensors()["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"],
    )
    zoo.add(write(tmp_path / "law", seed=1))
    assert list(zoo) == ["law", "math"]
