"""A push that ends in the middle, and the options of `push_to_hub`: the real client and processes of their own, against a Hub on the
loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico
from hub_server import Hub, running
from way import NAMES, Way, go, logits

import recycler

TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz012345"
ID = "org/routed"


@pytest.fixture(scope="module")
def one(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> Way:
    return go(llama, tmp_path_factory.mktemp("share"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running(monkeypatch, tmp_path / "cache") as hub:
        hub.tokens[TOKEN], hub.writers[TOKEN] = set(), {"org"}
        hub.add("org/base", {"config.json": b"{}"})
        yield hub


def process(hub: Hub, folder: Path, *args: Any) -> subprocess.Popen[str]:
    settings = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "recycler.cli", *map(str, args)]
    return subprocess.Popen(command, env=settings, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def sent(hub: Hub, begin: int = 0) -> int:
    return len([r for r in hub.log[begin:] if r.origin == "cdn" and r.method == "PUT"])


def until(true: Callable[[], bool], running: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert running.poll() is None and time.monotonic() < end, running.communicate()
        threading.Event().wait(0.02)  # time.sleep is none while this Hub runs


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_end_in_the_middle_of_the_files(one: Way, hub: Hub, tmp_path: Path, how: signal.Signals) -> None:
    """Nothing is committed; the same again sends what had not arrived, and what is loaded is whole."""
    large, stalls = len(NAMES) + 1, 2  # weights and gates
    hub.fault("PUT /upload/", "stall", times=stalls, seconds=60)
    push = process(hub, tmp_path, "push", one.folder, ID, "--base-id", "org/base")
    until(lambda: len(hub.uploads) == large - stalls and sent(hub) == large, push)
    push.send_signal(how)
    out, err = push.communicate(timeout=60)
    assert push.returncode == (-9 if how is signal.SIGKILL else 130) and out == "", err
    assert "Traceback" not in err and TOKEN not in err
    there = hub.repos[ID]
    assert set(there.commits[there.refs["main"]]) <= {".gitattributes"}
    arrived, begin = len(hub.uploads), len(hub.log)
    hub.faults.clear()
    done = recycler.push(one.folder, ID, token=TOKEN, base_id="org/base", endpoint=hub.url)
    assert done.changed and sent(hub, begin) == large - arrived == stalls
    loaded = recycler.load(done.pinned, base=one.pico.base, endpoint=hub.url)
    assert torch.equal(logits(loaded), logits(recycler.load(one.folder)))


# Pushes, says that it was interrupted, and lives on, as a notebook does.
NOTEBOOK = """
import sys, recycler
try:
    recycler.push(sys.argv[1], sys.argv[2], base_id="org/base")
except KeyboardInterrupt:
    print("interrupted", flush=True)
sys.stdin.read()
"""


def test_no_commit_follows_an_interruption(one: Way, hub: Hub, tmp_path: Path) -> None:
    """The client's threads send what they have; the one that would make the commit has ended."""
    large = len(NAMES) + 1
    hub.fault("PUT /upload/", "stall", times=1, seconds=5)
    settings = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1",
    }
    notebook = subprocess.Popen(
        [sys.executable, "-c", NOTEBOOK, str(one.folder), ID],
        env=settings,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert notebook.stdin is not None and notebook.stdout is not None
    until(lambda: sent(hub) >= large, notebook)
    notebook.send_signal(signal.SIGINT)
    assert notebook.stdout.readline() == "interrupted\n"
    until(lambda: len(hub.lines("POST .*/verify")) == large, notebook)
    threading.Event().wait(2)  # a commit would come now
    notebook.communicate(timeout=60)
    assert not hub.lines("POST .*/commit/")


def test_push_to_hub_takes_what_transformers_users_give(one: Way, hub: Hub) -> None:
    model = recycler.load(one.folder)
    where: dict[str, Any] = {"token": TOKEN, "base_id": "org/base", "endpoint": hub.url}
    done = model.push_to_hub(ID, private=True, revision="v2", commit_message="The first of them", **where)
    assert hub.repos[ID].private and "recycle.json" not in hub.repos[ID].commits[hub.repos[ID].refs["main"]]
    offered = model.push_to_hub(ID, create_pr=True, **where)
    assert offered.pull_request and "recycle.json" not in hub.repos[ID].commits[hub.repos[ID].refs["main"]]
    for options in ({"revision": "v2"}, {"revision": done.commit}):
        theirs = recycler.RoutedModel.from_pretrained(ID, token=TOKEN, base=one.pico.base, endpoint=hub.url, **options)
        assert theirs.names == NAMES and torch.equal(logits(theirs), logits(model))
    with pytest.raises(TypeError, match="max_shard_size"):  # nothing that is asked for is passed over in silence
        model.push_to_hub(ID, max_shard_size="5GB", **where)


def test_two_pushes_at_once(one: Way, hub: Hub, tmp_path: Path) -> None:
    """Both go on from the same commit: one is made, the other is told; or both are the same, and one finds nothing left to do."""
    hub.add(ID, {".gitattributes": b""})
    pushes = [process(hub, tmp_path, "push", one.folder, ID, "--base-id", "org/base") for _ in range(2)]
    ends = [(push.communicate(timeout=120), push.returncode) for push in pushes]
    assert {code for _, code in ends} <= {0, 5} and 0 in {code for _, code in ends}, ends
    assert all("changed while this was being pushed" in err for (_, err), code in ends if code), ends
    loaded = recycler.load(ID, base=one.pico.base, endpoint=hub.url)
    assert loaded.names == NAMES
