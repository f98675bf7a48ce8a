"""A zoo is never half-written: processes are killed at random moments and before every step they take on the disk, and two run at
once.

Importing takes most of a short command's time and is of no interest here, so one process imports everything once and forks for
every command; what is forked runs the real command line.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adapters import tensors, write
from hub_server import Hub

from recycler.zoo.store import Zoo

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")

NAMES = [f"org/topic-{n}" for n in range(6)]
SHAPES = {f"model.layers.{layer}.self_attn.{module}": (48, 48) for layer in range(3) for module in ("q_proj", "v_proj")}
KILLS = 20

# Reads {"args", "out", "die"} a line, forks, and answers with the child's pid, then with its exit status. A child with "die" kills
# itself before its n-th step inside that folder: opening a file for writing, renaming, removing, making or locking something.
FORKER = """
import json, os, signal, sys
import huggingface_hub.hf_api, safetensors.torch, torch
import recycler.cli, recycler.intake.fetching, recycler.zoo.formats, recycler.zoo.similarity, recycler.zoo.store
import huggingface_hub.file_download, yaml, rich, filelock

STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "fcntl.flock"}

def watch(folder, number):
    seen = 0
    def hook(event, given):
        nonlocal seen
        if event not in STEPS or (event == "open" and not given[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = str(given[0])  # shutil.rmtree gives names in a folder that it holds open
        if event != "fcntl.flock" and os.path.isabs(path) and not path.startswith(folder):
            return
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    return lambda: seen

for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        sys.stdin.close()
        with open(job["out"], "w") as out:
            os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
        if job["cache"]:
            huggingface_hub.constants.HF_HUB_CACHE = job["cache"]
        count = watch(*job["die"]) if job["die"] else lambda: 0
        try:
            status = recycler.cli.main(job["args"], standalone_mode=False) or 0
        except SystemExit as end:
            status = end.code or 0
        sys.stdout.flush(); sys.stderr.flush()
        if job["count"]:
            with open(job["count"], "w") as out:
                out.write(str(count()))
        os._exit(status if isinstance(status, int) else 1)
    print(pid, flush=True)
    sys.stdin.readline()  # until it is waited for, its id is nobody else's, even where it has ended
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forker:
    """Runs `recycle` commands one after the other, in processes of their own."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **env}
        )

    def start(
        self, *args: Any, die: tuple[Path, int] | None = None, count: Path | None = None, cache: Path | None = None
    ) -> int:
        """The process's id."""
        assert self.process.stdout
        job = {
            "args": [*map(str, args)],
            "out": str(self.folder / "out.txt"),
            "die": die and [str(die[0]), die[1]],
            "count": count and str(count),
            "cache": cache and str(cache),
        }
        self.tell(json.dumps(job))
        return int(self.process.stdout.readline())

    def tell(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def wait(self) -> int:
        """The exit code of the last process; negative where a signal ended it."""
        self.tell("wait")
        assert self.process.stdout
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def run(self, *args: Any, **options: Any) -> int:
        self.start(*args, **options)
        return self.wait()

    @property
    def said(self) -> str:
        return (self.folder / "out.txt").read_text()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Six adapters whose weights come slowly. They declare no base, so that none is looked up."""
    folder = tmp_path_factory.mktemp("repos")
    server = Hub()
    for seed, name in enumerate(NAMES):
        weights = tensors(rank=8, seed=seed, shapes=SHAPES)
        server.add(name, write(folder / str(seed), weights, r=8, base_model_name_or_path=None))
    server.fault("GET /repos/", "drip", times=10**9, keep=4096, seconds=0.03)
    yield server
    server.close()


@pytest.fixture(scope="module")
def forker(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[Forker]:
    made = Forker(tmp_path_factory.mktemp("forker"), HF_ENDPOINT=hub.url, NO_PROXY="127.0.0.1")
    yield made
    made.close()


def sound(path: Path) -> Zoo:
    """The zoo, after checking that everything it lists is whole, and that it lists all there is to see."""
    zoo = Zoo(path)
    names = list(zoo)  # parses zoo.json
    assert [problem for problem in zoo.verify() if problem.name in names] == []
    for name in names:
        assert zoo[name].sites and {p.name for p in zoo.folder(name).iterdir()} == set(zoo.entry(name).files)
    return zoo


def leftovers(path: Path) -> list[str]:
    """What lies in a zoo beside what it lists, its lock and its cache."""
    beside = [p.name for p in path.iterdir() if p.name not in (".lock", "zoo.json", "adapters", "cache")]
    return beside + [p.name for p in (path / "adapters").iterdir() if p.name not in Zoo(path)]


def test_killed_at_random_moments(forker: Forker, tmp_path: Path) -> None:
    forker.start("fetch", *NAMES, "--zoo", tmp_path / "whole", "--jobs", 3, cache=tmp_path / "cache")
    began = time.monotonic()
    assert forker.wait() == 0, forker.said
    full = time.monotonic() - began
    moments = random.Random(0)
    turn = killed = held = 0
    while killed < KILLS:
        turn += 1
        assert turn < 10 * KILLS, "none was killed before it was done"
        # Some start from nothing; others are killed over and over until they are done.
        name = f"new-{turn}" if turn % 2 else f"again-{turn // 12}"
        pid = forker.start("fetch", *NAMES, "--zoo", tmp_path / name, "--jobs", 3, cache=tmp_path / f"cache-{name}")
        time.sleep(moments.uniform(0, full))
        os.kill(pid, signal.SIGKILL)
        killed += forker.wait() == -signal.SIGKILL
        held += 0 < len(sound(tmp_path / name)) < len(NAMES)
    assert held, "no adapter was kept before any was killed"
    for name in ("again-0", "new-1", "new-3"):
        zoo = tmp_path / name
        assert forker.run("fetch", *NAMES, "--zoo", zoo, cache=tmp_path / f"cache-{name}") == 0, forker.said
        assert len(sound(zoo)) == len(NAMES) and Zoo(zoo).verify() == [] and leftovers(zoo) == []


@pytest.mark.parametrize("what", ["fetch", "fetch again", "remove"])
def test_killed_before_every_step(forker: Forker, tmp_path: Path, what: str) -> None:
    """Local folders, so that steps come in one order: every file opened for writing, every rename, every removal."""
    math = write(tmp_path / "math", base_model_name_or_path=None)
    law = write(tmp_path / "law", base_model_name_or_path=None, seed=1)
    args = ["remove", "law"] if what == "remove" else ["fetch", str(law)]

    def fresh(name: str) -> Path:
        path = tmp_path / name
        for folder in (math, law):
            if folder == math or what != "fetch":
                Zoo(path).add(folder)
        if what == "fetch again":  # a damaged copy, which is put back
            (path / "adapters" / "law" / "adapter_model.safetensors").write_bytes(b"damaged")
        return path

    command = (["zoo"] if what == "remove" else []) + args + ["--zoo"]
    path = fresh("counted")
    assert forker.run(*command, path, die=(path, 0), count=tmp_path / "count") == 0, forker.said
    assert Zoo(path).verify() == []
    steps = int((tmp_path / "count").read_text())
    assert steps > 10
    for number in range(1, steps + 1):
        path = fresh(f"zoo-{number}")
        assert forker.run(*command, path, die=(path, number)) == -signal.SIGKILL
        zoo = Zoo(path)
        assert "math" in zoo and not zoo.verify(["math"])
        if what != "fetch again":  # there it was damaged before
            sound(path)
        with zoo.staging():  # the next to write sweeps
            pass
        assert leftovers(path) == [], number
        finished = ["math"] if what == "remove" else ["law", "math"]
        if list(zoo) != finished or what == "fetch again":
            assert forker.run(*command, path) == 0, forker.said
        assert list(zoo) == finished and zoo.verify() == [] and leftovers(path) == []


def test_interrupted_from_the_keyboard(hub: Hub, tmp_path: Path) -> None:
    """A process of its own to its very end, while the Hub says nothing to some of its threads."""
    hub.fault(f"GET /repos/{NAMES[0]}", "stall", times=9, keep=1, seconds=60)
    hub.faults.insert(0, hub.faults.pop())
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "recycler.cli", "fetch", *NAMES, "--zoo", str(tmp_path / "zoo")]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while len(Zoo(tmp_path / "zoo")) < len(NAMES) - 1:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)  # the Hub would be given 60 seconds and more
    finally:
        process.kill()
        hub.faults.pop(0)
    assert process.returncode == 130 and "the same command goes on with the others" in said and "Traceback" not in said
    zoo = sound(tmp_path / "zoo")
    assert len(zoo) == len(NAMES) - 1 and zoo.verify() == [] and leftovers(zoo.path) == []


def test_two_fetch_at_once(forker: Forker, hub: Hub, tmp_path: Path) -> None:
    """Overlapping sets into one zoo, over one cache."""
    forkers = [forker, Forker(tmp_path, HF_ENDPOINT=hub.url, NO_PROXY="127.0.0.1")]
    for one, chosen in zip(forkers, (NAMES[:4], NAMES[2:]), strict=True):
        one.start("fetch", *chosen, "--zoo", tmp_path / "zoo", cache=tmp_path / "cache")
    assert [one.wait() for one in forkers] == [0, 0], [one.said for one in forkers]
    zoo = sound(tmp_path / "zoo")
    assert len(zoo) == len(NAMES) and zoo.verify() == [] and leftovers(zoo.path) == []
    forkers[1].close()
