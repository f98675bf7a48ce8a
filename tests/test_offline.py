"""The network: none after a fetch, and through the client's own settings before it. In processes of their own, since the client reads
its environment when it is imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from adapters import write
from conftest import Pico
from hub_server import Hub

from recycler.zoo.store import Zoo

# Loaded by Python before anything else. Attempts are written down as well, since what is raised here could be swallowed.
NO_SOCKETS = """
import os, sys

def hook(event, given):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto",
                 "socket.sendmsg", "socket.bind"):
        with open(os.environ["ATTEMPTS"], "a") as out:
            out.write(f"{event} {given}\\n")
        raise OSError(f"the network is blocked: {event}")

sys.addaudithook(hook)
"""
# Runs several commands in one process, as importing takes most of the time, and ends with the first that fails.
COMMANDS = """
import json, sys
from recycler.cli import main

for args in json.loads(sys.argv[1]):
    try:
        status = main(args, standalone_mode=False) or 0
    except SystemExit as end:
        status = end.code or 0
    if status:
        sys.exit(status)
"""


def run(
    commands: Sequence[Sequence[Any]], folder: Path, *, sockets: bool = True, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run `recycle` with each list of arguments. Without `sockets`, no connection may even be tried."""
    settings = {**os.environ, "NO_PROXY": "127.0.0.1", "RECYCLE_ZOO": str(folder / "zoo"), **env}
    if not sockets:
        (folder / "blocked").mkdir()
        (folder / "blocked" / "sitecustomize.py").write_text(NO_SOCKETS)
        settings |= {"PYTHONPATH": str(folder / "blocked"), "ATTEMPTS": str(folder / "attempts")}
    command = [sys.executable, "-c", COMMANDS, json.dumps([[str(arg) for arg in args] for args in commands])]
    done = subprocess.run(command, env=settings, cwd=folder, capture_output=True, text=True, check=False)
    if not sockets:
        attempts = folder / "attempts"
        assert not attempts.exists(), attempts.read_text()
    return done


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    server.add("org/math", write(tmp_path / "math", base_model_name_or_path=None))
    yield server
    server.close()


def test_the_block_blocks(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(AssertionError, match=r"socket\.getaddrinfo"):
        run([["fetch", "org/math"]], tmp_path, sockets=False, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
    assert not hub.log


def test_after_a_fetch_nothing_needs_the_network(llama: Pico, tmp_path: Path) -> None:
    shutil.copytree(llama.zoo, tmp_path / "zoo")
    tasks = llama.tasks[:2]
    done = run(
        [
            ["zoo", "verify"],
            ["zoo", "list"],
            ["fetch", llama.adapters["math"], "--as", "again", "--base", llama.base],
            ["profile", *tasks, "--kshot", 2, "--out", "p2"],
            ["build-router", "arrow", "--out", tmp_path / "arrow"],
            ["build-router", "ridge", "--profile", "p2", "--out", tmp_path / "gates"],
            ["compose", "--router", tmp_path / "gates", "--out", tmp_path / "model"],
            ["run", tmp_path / "model", "-p", "Add 2 and 3.", "--max-new-tokens", 3],
            ["eval", tmp_path / "model", *tasks, "--rows", 1, "--max-new-tokens", 2],
            ["compose", "--router", tmp_path / "gates", "--out", tmp_path / "small", "--max-rank", 1],
            ["zoo", "check", "--base", llama.base],
            ["zoo", "health"],
            ["zoo", "licences"],
            ["zoo", "show", "again"],
            ["zoo", "path", "again"],
            ["fetch", "--from", tmp_path / "zoo" / "zoo.json", "--zoo", tmp_path / "same"],
            ["zoo", "remove", "again"],
        ],
        tmp_path,
        sockets=False,
        HF_HOME=str(tmp_path / "hf"),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "recycle.json").exists() and "mean exact match" in done.stdout
    zoo, same = Zoo(tmp_path / "zoo"), Zoo(tmp_path / "same")
    assert (
        tmp_path / "small" / "recycle.json"
    ).exists() and f"{zoo.path / same.folder('again').relative_to(same.path)}\n" in done.stdout
    assert set(same) == {*zoo, "again"} and "again" not in zoo and same.verify() == []


def test_a_base_that_only_the_cache_holds(llama: Pico, tmp_path: Path) -> None:
    commit = "a" * 40
    home = tmp_path / "hf" / "hub" / "models--org--pico"
    shutil.copytree(llama.base, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    folder = Path(shutil.copytree(llama.adapters["math"], tmp_path / "math"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/pico"}))
    done = run(
        [
            ["fetch", folder, "--base", "org/pico"],
            ["build-router", "arrow", "--out", tmp_path / "arrow"],
            ["compose", "--router", tmp_path / "arrow", "--out", tmp_path / "model"],
            ["run", tmp_path / "model", "-p", "Add 2 and 3.", "--max-new-tokens", 3],
        ],
        tmp_path,
        sockets=False,
        HF_HOME=str(tmp_path / "hf"),
        HF_HUB_OFFLINE="1",
    )
    assert done.returncode == 0, done.stderr
    assert Zoo(tmp_path / "zoo").entry("math").base == "org/pico" and "NOT CHECKED" not in done.stderr


def test_offline_takes_what_the_cache_holds(tmp_path: Path, hub: Hub) -> None:
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    assert run([["fetch", "org/math", "--zoo", tmp_path / "one"]], tmp_path, **settings).returncode == 0
    asked = len(hub.log)
    commands = [["fetch", "org/math", "--zoo", tmp_path / "two", "--offline"], ["fetch", "org/law", "--offline"]]
    done = run(commands, tmp_path, sockets=False, **settings)
    assert done.returncode == 5 and "org/law was not fetched: offline mode is on" in done.stderr and done.stdout == "math\n"
    assert Zoo(tmp_path / "two").verify() == [] and len(hub.log) == asked
    done = run([["fetch", "org/math", "--zoo", tmp_path / "three"]], tmp_path, HF_HUB_OFFLINE="1", **settings)
    assert done.returncode == 0 and len(hub.log) == asked


def test_the_clients_settings_are_honoured(tmp_path: Path, hub: Hub) -> None:
    """HF_ENDPOINT, HF_HOME and HF_TOKEN, with nothing of the kind said on the command line."""
    hub.repos["org/math"].private = True
    hub.tokens["hf_secret"] = {"org/math"}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    without = run([["fetch", "org/math"]], tmp_path, **settings)
    assert without.returncode == 5 and "hf auth login" in without.stderr
    done = run([["fetch", "org/math"]], tmp_path, HF_TOKEN="hf_secret", **settings)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "hf" / "hub" / "models--org--math" / "blobs").iterdir())
    sent = {(r.origin, r.headers.get("authorization")) for r in hub.log[-6:]}
    assert ("hub", "Bearer hf_secret") in sent and ("cdn", "Bearer hf_secret") not in sent and "hf_secret" not in done.stderr


def test_a_search_honours_the_clients_settings_too(tmp_path: Path, hub: Hub) -> None:
    hub.add("org/gated", write(tmp_path / "gated", base_model_name_or_path="org/base"), gated="manual")
    hub.repos["org/gated"].cards[hub.repos["org/gated"].refs["main"]] = {"base_model": "org/base", "library_name": "peft"}
    hub.tokens["hf_secret"] = {"org/gated"}
    search = [["search", "--base", "org/base", "--no-check", "--json"]]
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    for zoo, token in (("one", {}), ("two", {"HF_TOKEN": "hf_secret"})):
        asked = len(hub.log)
        done = run(search, tmp_path, RECYCLE_ZOO=str(tmp_path / zoo), **settings, **token)
        assert done.returncode == 0 and "hf_secret" not in done.stdout + done.stderr, done.stderr
        sent = {(r.origin, r.headers.get("authorization", r.headers.get("Authorization"))) for r in hub.log[asked:]}
        assert ("hub", f"Bearer {token['HF_TOKEN']}" if token else None) in sent
        assert not token or all(who == (f"Bearer {token['HF_TOKEN']}" if origin == "hub" else None) for origin, who in sent)
    assert [one["verdict"] for one in json.loads(done.stdout)["candidates"]] == ["usable"]  # read with the token


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_over_tls(tmp_path: Path) -> None:
    """As the real Hub: a missing repository is a bare 401, which means something else over plain http."""
    pem = tmp_path / "server.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", pem, "-out", tmp_path / "public.pem"],
        capture_output=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("this openssl makes no such certificate")
    pem.write_text(pem.read_text() + (tmp_path / "public.pem").read_text())
    hub = Hub(pem)
    hub.add("org/math", write(tmp_path / "math", base_model_name_or_path=None))
    try:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        trusted = {**settings, "SSL_CERT_FILE": str(tmp_path / "public.pem")}
        done = run([["fetch", "org/math"], ["fetch", "org/absent"]], tmp_path, **trusted)
        assert done.stdout == "math\n" and done.returncode == 5 and "org/absent was not found" in done.stderr
        done = run([["fetch", "org/math", "--zoo", tmp_path / "other"]], tmp_path, **settings)
        assert (
            done.returncode == 5 and "the Hub cannot be reached" in done.stderr and "CERTIFICATE_VERIFY_FAILED" in done.stderr
        )
    finally:
        hub.close()


def test_weights_that_lie_in_a_xet_store(tmp_path: Path, hub: Hub) -> None:
    """The client's own Xet code, against a store in a folder: most weights on the Hub are stored so."""
    pytest.importorskip("hf_xet")
    store = tmp_path / "store"
    store.mkdir()
    weights = tmp_path / "math" / "adapter_model.safetensors"
    script = (
        "import sys, hf_xet\n"
        "(made,) = hf_xet.upload_files([sys.argv[1]], f'local://{sys.argv[2]}', None, None, None, 'model')\n"
        "print(made.hash)"
    )
    made = subprocess.run([sys.executable, "-c", script, weights, store], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"this hf_xet has no local store: {made.stderr.strip()[-200:]}")
    hub.xet = {hub.repos["org/math"].commits[hub.repos["org/math"].refs["main"]][weights.name].sha256: made.stdout.strip()}
    hub.xet_store = f"local://{store}"
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "0"}
    lost = hub.add("org/law", write(tmp_path / "law", seed=1, base_model_name_or_path=None))
    hub.xet[lost.commits[lost.refs["main"]][weights.name].sha256] = "0" * 64  # the store does not have it
    done = run([["fetch", "org/math"], ["fetch", "org/law"]], tmp_path, **settings)
    assert done.stdout == "math\n", done.stderr
    assert hub.lines("xet-read-token") and not hub.lines("GET /repos/") and Zoo(tmp_path / "zoo").verify() == []
    assert done.returncode == 5 and "org/law could not be fetched from the Hub's Xet store" in done.stderr
