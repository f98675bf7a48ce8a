"""Sharing a composed model: the real client against a Hub on the loopback, from the folder to the Hub and back."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import Pico
from hub_server import Hub, running
from test_offline import run as process
from way import NAMES, Way, go, logits

import recycler
from recycler.cli import main
from recycler.run import answer_prompts
from recycler.sharing import pushing
from recycler.sharing.card import record_evaluation
from recycler.sharing.publishing import check_licences, publish
from recycler.zoo.errors import HubError, InputError, SecurityError, UsageError

TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz012345"
ID = "org/routed"
WEIGHTS = "adapters/math/adapter_model.safetensors"


@pytest.fixture(scope="module")
def one(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> Way:
    return go(llama, tmp_path_factory.mktemp("push"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running(monkeypatch, tmp_path / "cache") as hub:
        hub.tokens[TOKEN], hub.writers[TOKEN] = set(), {"org"}
        hub.tokens["reader"] = set()
        hub.add("org/base", {"config.json": b"{}"})
        yield hub


@pytest.fixture
def model(one: Way, tmp_path: Path) -> Path:
    """A composed model of its own, to change."""
    return Path(shutil.copytree(one.folder, tmp_path / "model"))


def push(folder: Any, hub: Hub, repo: str = ID, **options: Any) -> pushing.Pushed:
    return recycler.push(folder, repo, **{"token": TOKEN, "base_id": "org/base", "endpoint": hub.url, **options})


def load(hub: Hub, name: str = ID, **options: Any) -> recycler.RoutedModel:
    return recycler.load(name, **{"endpoint": hub.url, **options})


def held(hub: Hub, repo: str = ID, ref: str = "main") -> dict[str, bytes]:
    there = hub.repos[repo]
    return {path: file.data for path, file in there.commits[there.refs[ref]].items() if path != ".gitattributes"}


def recycle(*args: Any) -> Any:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text(encoding="utf8"))
    path.write_text(json.dumps(change(data) or data), encoding="utf8")


# ---------------------------------------------------------------------------------------------------------- there and back


def test_there_and_back(way: Way, hub: Hub) -> None:
    mine = recycler.load(way.folder)
    expected = logits(mine)
    done = mine.push_to_hub(ID, token=TOKEN, base_id="org/base", endpoint=hub.url)
    assert not push(mine, hub).changed  # the model itself, or its folder
    assert mine.folders["math"] == way.folder / "adapters" / "math"  # as before
    assert done.changed and done.commit == hub.repos[ID].refs["main"] and set(done.files) == set(held(hub))
    theirs = load(hub, base=way.pico.base)
    assert torch.equal(logits(theirs), expected) and theirs.names == NAMES and theirs.warnings == []
    for by in (done.pinned, f"hf://{ID}"):
        again = recycler.RoutedModel.from_pretrained(by, base=way.pico.base, endpoint=hub.url)
        assert torch.equal(logits(again), expected)
    for request in hub.log:  # tokens stay with the Hub
        assert request.origin == "hub" or not any(name.lower() == "authorization" for name in request.headers)


def test_nothing_of_this_disk_goes_out(model: Path, one: Way, hub: Hub) -> None:
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    push(model, hub)
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before
    for path, data in held(hub).items():
        assert str(one.pico.base).encode() not in data and str(one.pico.base.parent).encode() not in data, path
    told = json.loads(held(hub)["recycle.json"])
    assert told["base"]["id"] == "org/base" and "path" not in told["base"]
    assert {a["source"] for a in told["adapters"]} == {"local"}
    assert json.loads(held(hub)["adapters/law/adapter_config.json"])["base_model_name_or_path"] == "org/base"


def test_the_card_is_one_the_hub_reads(model: Path, one: Way, hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard, metadata_load

    edit(model / "recycle.json", lambda data: data["adapters"][1].update(source="org/law/v2", revision="a" * 40, licence="mit"))
    loaded = recycler.load(one.folder)
    result = recycler.evaluate(loaded, recycler.Shots.from_files(*one.pico.tasks), max_new_tokens=2)
    readme = record_evaluation(model, result)
    assert result.verdict() in readme.read_text(encoding="utf8")
    push(model, hub, widget=["Add 1 and 2.", "two\nlines: 'x'"], datasets=["org/shots"])
    (tmp_path / "README.md").write_bytes(held(hub)["README.md"])
    facts = metadata_load(tmp_path / "README.md")
    assert facts["base_model"] == ["org/base", "org/law"] and facts["base_model_relation"] == "merge"
    assert (
        facts["library_name"] == "recycler"
        and facts["pipeline_tag"] == "text-generation"
        and facts["datasets"] == ["org/shots"]
    )
    assert [one["text"] for one in facts["widget"]] == ["Add 1 and 2.", "two\\nlines: 'x'"]
    card = ModelCard((tmp_path / "README.md").read_text(encoding="utf8"))
    scores = {one.dataset_name: one.metric_value for one in card.data.eval_results or []}
    assert scores["math"] == round(sum(result.exact["ridge"]["math"]) / len(result.exact["ridge"]["math"]), 4)
    assert card.data.model_name == "routed" and len(scores) == len(result.tasks) + 1
    assert f"| exact match | rows | {' | '.join(result.contenders)} |" in card.text
    assert f'recycler.load("{ID}")' in card.text and f"org/law/v2@{'a' * 40}" in card.text and "| math |" in card.text
    assert f"sha256:{json.loads(held(hub)['recycle.json'])['adapters'][2]['sha256']}" in card.text
    assert json.loads(held(hub)["evaluation.json"])["verdict"] == result.verdict()


def test_an_evaluation_that_is_none(model: Path) -> None:
    for facts in ({}, {"contenders": {}, "rows": {}, "verdict": "", "by_task": {}, "chosen": {}}, {"contenders": {"a": 3}}):
        with pytest.raises(InputError, match="is no evaluation"):
            record_evaluation(model, facts)
    assert not (model / "evaluation.json").exists()
    (model / "evaluation.json").write_text("[]")
    with pytest.raises(InputError, match="is no evaluation"):
        publish(model, ID, base_id="org/base")


def test_a_model_with_an_evaluation_can_be_replaced(model: Path, one: Way) -> None:
    (model / "evaluation.json").write_text("{}")
    recycler.compose(one.zoo, one.router, model, force=True)
    assert not (model / "evaluation.json").exists()


# ------------------------------------------------------------------------------------------------------------- again, and later


def test_the_same_again_is_no_commit(model: Path, hub: Hub) -> None:
    first = push(model, hub)
    asked = len(hub.log)
    second = push(model, hub)
    assert (second.commit, second.changed) == (first.commit, False)
    assert not [r for r in hub.log[asked:] if "/commit/" in r.path or r.origin == "cdn"]


def test_a_later_push_leaves_earlier_commits_alone(model: Path, one: Way, hub: Hub, tmp_path: Path) -> None:
    first = push(model, hub)
    before = logits(load(hub, base=one.pico.base))
    router = recycler.build_router("uniform", zoo=one.zoo, adapters=["law", "math"])
    recycler.compose(one.zoo, router, tmp_path / "less")
    second = push(tmp_path / "less", hub)
    assert second.commit != first.commit and len(second.removed) == 6
    assert not [path for path in held(hub) if "/code/" in path]
    for name, options in ((first.pinned, {}), (ID, {"revision": first.commit}), (ID, {})):
        loaded = load(hub, name, base=one.pico.base, **options)
        assert loaded.names == (("law", "math") if name == ID and not options else NAMES)
        assert len(loaded.names) == 2 or torch.equal(logits(load(hub, name, base=one.pico.base, **options)), before)
    with pytest.raises(UsageError, match="names a revision"):
        load(hub, first.pinned, revision="main")
    with pytest.raises(HubError, match="has no revision"):
        load(hub, revision="absent")


def test_branches_and_pull_requests(model: Path, one: Way, hub: Hub) -> None:
    hub.add(ID, {".gitattributes": b""})
    push(model, hub, revision="v2")
    assert held(hub) == {} and "recycle.json" in held(hub, ref="v2")
    loaded = load(hub, revision="v2", base=one.pico.base)
    assert loaded.names == NAMES
    offered = push(model, hub, create_pr=True, token="reader")
    assert offered.pull_request and offered.pull_request.endswith("/discussions/1") and held(hub) == {}
    theirs = load(hub, f"{ID}@refs/pr/1", base=one.pico.base)
    assert theirs.names == NAMES


def test_what_is_there_is_not_overwritten(model: Path, hub: Hub) -> None:
    hub.add(ID, {"weights.gguf": b"mine", "README.md": b"mine"})
    with pytest.raises(UsageError, match=r"something else than a composed model: README.md, weights.gguf"):
        push(model, hub)
    assert held(hub) == {"weights.gguf": b"mine", "README.md": b"mine"}
    push(model, hub, force=True)
    assert held(hub)["weights.gguf"] == b"mine" and "recycle.json" in held(hub)
    push(model, hub)  # a composed model now
    assert held(hub)["weights.gguf"] == b"mine"


def test_private_is_private(model: Path, hub: Hub) -> None:
    hub.add("org/public", {".gitattributes": b""})
    with pytest.raises(UsageError, match="there already, and public"):
        push(model, hub, "org/public", private=True)
    push(model, hub, private=True)
    assert hub.repos[ID].private
    push(model, hub, private=True)
    with pytest.raises(HubError, match="no such model on the Hub"):
        load(hub)


def test_somebody_else_pushes_meanwhile(model: Path, hub: Hub) -> None:
    push(model, hub)
    edit(model / "recycle.json", lambda data: data["versions"].update(recycler="9"))

    def meanwhile() -> None:
        hub.push = lambda: None
        hub.repos[ID].commit({"theirs": b"x"})

    hub.push = meanwhile
    with pytest.raises(HubError, match="changed while this was being pushed") as caught:
        push(model, hub)
    assert held(hub) == {"theirs": b"x"} and caught.value.exit_code == 5


# ----------------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("where", "status", "says"),
    [
        ("GET /api/models/org/routed", 500, "answered 500"),
        ("GET /api/models/org/routed", 429, "rate limit"),
        ("POST /api/repos/create", 403, "does not let you write"),
        ("POST /api/repos/create", 409, "it is in use"),
        ("POST /api/repos/create", 503, "answered 503"),
        ("POST .*/preupload/", 401, "does not let you write"),
        ("POST .*/preupload/", 500, "answered 500"),
        ("POST .*/lfs/objects/batch", 429, "rate limit"),
        ("PUT /upload/", 403, "does not let you write"),
        ("PUT /upload/", 500, "answered 500"),
        ("POST .*/lfs/objects/verify", 422, r"refuses what was pushed to org/routed \(422\)"),
        ("POST .*/commit/", 401, "does not let you write"),
        ("POST .*/commit/", 403, "does not let you write"),
        ("POST .*/commit/", 409, "it is in use"),
        ("POST .*/commit/", 429, "rate limit"),
        ("POST .*/commit/", 500, "answered 500"),
    ],
)
def test_the_hub_refuses(model: Path, hub: Hub, where: str, status: int, says: str) -> None:
    hub.fault(where, "status", status=status, times=99)
    with pytest.raises(HubError, match=says) as caught:
        push(model, hub)
    assert caught.value.exit_code == 5 and caught.value.why and caught.value.fix and "fetched" not in str(caught.value)
    assert ID not in hub.repos or held(hub) == {}
    hub.faults.clear()
    assert push(model, hub).changed  # the same again goes through


def test_a_passing_fault_is_no_failure(model: Path, hub: Hub) -> None:
    for where in ("GET /api/models/org/routed", "POST /api/repos/create", "PUT /upload/", "POST .*/commit/"):
        hub.fault(where, "status", status=503)
    hub.fault("POST .*/commit/", "break", times=1)  # the commit is made, and its answer lost
    done = push(model, hub)
    assert done.commit == hub.repos[ID].refs["main"] and len(hub.repos[ID].commits) == 2 and "recycle.json" in held(hub)


def test_a_lost_answer_after_files_went(model: Path, one: Way, hub: Hub, tmp_path: Path) -> None:
    push(model, hub)
    router = recycler.build_router("uniform", zoo=one.zoo, adapters=["law"])
    recycler.compose(one.zoo, router, tmp_path / "less")
    hub.fault("POST .*/commit/", "break")
    done = push(tmp_path / "less", hub)
    assert len(done.removed) == 9 and len(hub.repos[ID].commits) == 3 and done.commit == hub.repos[ID].refs["main"]


def test_a_lost_answer_is_no_second_pull_request(model: Path, hub: Hub) -> None:
    hub.add(ID, {".gitattributes": b""})
    hub.fault("POST .*/commit/", "break", times=9)
    with pytest.raises(HubError, match="could not be pushed"):
        push(model, hub, create_pr=True)
    assert hub.repos[ID].pulls == 1


def test_files_that_the_repository_ignores(model: Path, hub: Hub) -> None:
    push(model, hub)
    hub.repos[ID].commit({".gitignore": b"*.json\n", "recycle.json": b"{}"})
    with pytest.raises(HubError, match=r"did not take .*router/router.json"):
        push(model, hub)


def test_nobody_is_there(model: Path, hub: Hub) -> None:
    with pytest.raises(HubError, match=f"{ID} could not be pushed"):
        push(model, hub, endpoint="http://127.0.0.1:1")
    told = push(model, hub, endpoint="http://127.0.0.1:1", dry_run=True)
    assert any("was not asked" in note and "fetched" not in note for note in told.notes)
    for name in ("routed", "org/ro uted", "org/routed@main", "org/routed/sub", "./routed"):
        with pytest.raises(UsageError, match="no id on the Hub"):
            push(model, hub, name)


def test_without_a_token(model: Path, hub: Hub) -> None:
    for token in (False, "reader", "unknown"):
        with pytest.raises(HubError, match="hf auth login") as caught:
            push(model, hub, token=token)
        assert caught.value.code == "E_AUTH" and ID not in hub.repos


def test_what_no_model_holds_is_not_uploaded(model: Path, hub: Hub, tmp_path: Path) -> None:
    def refused(kind: type[Exception], says: str, **options: Any) -> None:
        asked = len(hub.log)
        with pytest.raises(kind, match=says):
            push(model, hub, **options)
        assert len(hub.log) == asked  # before anything is asked for

    for stray in (".env", "adapters/math/optimizer.pt", "router/code.py", "adapters/prose/adapter_config.json"):
        (model / stray).parent.mkdir(exist_ok=True)
        (model / stray).write_text("x")
        refused(SecurityError, "files that no composed model has")
        (model / stray).unlink()
    (model / "adapters" / "prose").rmdir()
    (tmp_path / "secret").write_text("x")
    (model / "adapters" / "math" / "LICENSE").symlink_to(tmp_path / "secret")
    refused(SecurityError, "holds links")
    (model / "adapters" / "math" / "LICENSE").unlink()
    card = model / "adapters" / "math" / "README.md"
    before = card.read_text()
    card.write_text(f"use {TOKEN}")
    refused(SecurityError, "looks like a secret stands in adapters/math/README.md")
    card.write_text(f"trained in {Path.home()}{os.sep}work")
    refused(SecurityError, "A path of this disk stands in adapters/math/README.md")
    card.write_text(before)
    refused(UsageError, "--base-id org/base", base_id=None)
    refused(UsageError, "is no id on the Hub", base_id="../base")
    refused(UsageError, "is no id on the Hub", repo="routed")
    with pytest.raises(HubError, match="is no valid name on the Hub"):
        push(model, hub, "org/rou--ted")
    refused(UsageError, "is no id on the Hub", repo="org/routed/sub")
    (model / "router" / "router.safetensors").rename(tmp_path / "gone")
    refused(InputError, "lacks a part of the model: router/router.safetensors")
    (tmp_path / "gone").rename(model / "router" / "router.safetensors")
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:-1] + b"\x01")
    refused(SecurityError, "The weights of math in .* are not those that were composed")
    with pytest.raises(InputError, match="is not a composed model"):
        push(tmp_path / "nothing", hub)


def test_a_placeholder_is_no_secret(model: Path) -> None:
    (model / "adapters" / "math" / "README.md").write_text("set HF_TOKEN=hf_" + "x" * 34)
    assert "recycle.json" in publish(model, ID, base_id="org/base").files


def test_licences(model: Path, hub: Hub) -> None:
    edit(model / "recycle.json", lambda data: data["adapters"][0].update(licence="cc-by-nd-4.0"))
    with pytest.raises(InputError, match=r"forbid passing it on: code \(cc-by-nd-4.0\).*--license-allow cc-by-nd-4.0"):
        push(model, hub)
    with pytest.raises(InputError, match="states none"):
        push(model, hub, strict=True)
    with pytest.raises(InputError, match="not allowed"):
        push(model, hub, license_allow=["mit"])
    assert ID not in hub.repos
    push(model, hub, license_allow=["cc-by-nd-4.0"])
    push(model, hub, "org/mine", private=True)
    manifest = {"adapters": [{"name": "math", "licence": "mit"}]}
    assert check_licences(manifest, ["mit"], strict=True, shared=True) == ["licences: all state mit"]


def test_a_base_that_is_not_there(model: Path, hub: Hub) -> None:
    assert not any("will need --base" in note for note in push(model, hub).notes)
    assert any("base org/none is not on the Hub" in note for note in push(model, hub, base_id="org/none").notes)


# ------------------------------------------------------------------------------------------------------------------- loading


def test_only_a_models_files_come(model: Path, one: Way, hub: Hub, tmp_path: Path) -> None:
    push(model, hub)
    more = {
        "evil.py": b"boom",
        "adapters/math/evil.bin": b"x",
        "adapters/evil/adapter_config.json": b"{}",
        "router/x.pkl": b"x",
    }
    hub.repos[ID].commit({**held(hub), **more})
    asked = len(hub.log)
    load(hub, base=one.pico.base, cache_dir=tmp_path / "there")
    assert not [r.path for r in hub.log[asked:] if "evil" in r.path or "pkl" in r.path]
    came = {path.name for path in (tmp_path / "there").rglob("*")}
    assert "recycle.json" in came and not {"evil.py", "evil.bin", "evil", "x.pkl"} & came


@pytest.mark.parametrize("name", ["../evil", "adapters/../../evil", "/etc/evil", "adapters/math/con", "C:/evil"])
def test_names_that_could_do_harm(model: Path, hub: Hub, name: str) -> None:
    push(model, hub)
    hub.repos[ID].commit({**held(hub), name: b"x"})
    with pytest.raises(SecurityError):
        load(hub)


@pytest.mark.parametrize("name", ["../../evil", "base", "a/b", "", 3])
def test_an_adapter_with_such_a_name(model: Path, hub: Hub, name: Any) -> None:
    push(model, hub)
    told = json.loads(held(hub)["recycle.json"])
    told["adapters"][0]["name"] = name
    hub.repos[ID].commit({**held(hub), "recycle.json": json.dumps(told).encode()})
    with pytest.raises(InputError, match=r"recycle\.json cannot be read"):
        load(hub)


def test_contents_that_were_changed(model: Path, one: Way, hub: Hub, tmp_path: Path) -> None:
    push(model, hub)
    hub.fault("GET /repos/", "flip")  # on the way, once
    assert any("fetched again" in text for text in load(hub, base=one.pico.base).warnings)
    hub.fault("GET /repos/", "flip", times=99)
    with pytest.raises(SecurityError, match="differ from the Hub's hash, twice") as caught:
        load(hub, base=one.pico.base, cache_dir=tmp_path / "fresh")
    assert caught.value.exit_code == 4
    hub.faults.clear()
    files = held(hub)
    hub.repos[ID].commit({**files, WEIGHTS: files["adapters/law/adapter_model.safetensors"]})  # by who may write there
    with pytest.raises((SecurityError, InputError)) as changed:
        load(hub, base=one.pico.base)
    assert changed.value.exit_code in (3, 4)
    forged = bytearray(files[WEIGHTS])
    forged[-2] ^= 1
    hub.repos[ID].commit({**files, WEIGHTS: bytes(forged)})
    with pytest.raises(SecurityError, match=r"not those that were composed.*push it again"):
        load(hub, base=one.pico.base)


def test_parts_that_are_missing(model: Path, hub: Hub) -> None:
    push(model, hub)
    for gone in ("router/router.json", WEIGHTS):
        hub.repos[ID].commit({path: data for path, data in held(hub).items() if path != gone})
        with pytest.raises(InputError, match="lacks a part of the model"):
            load(hub)
    hub.add("org/lora", {"adapter_config.json": b"{}"})
    with pytest.raises(InputError, match=r"is not a composed model.*recycle fetch"):
        load(hub, "org/lora")


def test_a_repository_that_was_renamed(model: Path, one: Way, hub: Hub) -> None:
    push(model, hub)
    hub.renamed["org/old"] = ID
    assert "org/old is now called org/routed" in load(hub, "org/old", base=one.pico.base).warnings
    assert load(hub, local_files_only=True, base=one.pico.base).names == NAMES


def test_a_strangers_folder_is_not_opened(model: Path, one: Way, hub: Hub) -> None:
    push(model, hub)
    told = json.loads(held(hub)["recycle.json"])
    for base in ({"id": str(one.pico.base)}, {"id": "../base"}, {"id": 3}):
        hub.repos[ID].commit({**held(hub), "recycle.json": json.dumps({**told, "base": {**told["base"], **base}}).encode()})
        with pytest.raises(InputError, match="names no base that is on the Hub"):
            load(hub)
    told["base"]["path"] = str(one.pico.base)
    hub.repos[ID].commit({**held(hub), "recycle.json": json.dumps(told).encode()})
    with pytest.raises(HubError, match="The base org/base cannot be had"):  # and not the folder
        load(hub)


def test_what_cannot_be_had(model: Path, hub: Hub) -> None:
    with pytest.raises(HubError, match="There is no folder org/absent, and no such model on the Hub"):
        load(hub, "org/absent")
    with pytest.raises(HubError, match="org/absent was not found"):
        load(hub, "hf://org/absent")
    push(model, hub)
    hub.repos[ID].gated = "manual"
    with pytest.raises(HubError, match="is gated") as caught:
        load(hub)
    assert caught.value.code == "E_GATED" and "hf auth login" in caught.value.fix
    hub.fault("GET /api/models/org/routed", "status", status=429, times=99)
    with pytest.raises(HubError, match="rate limit") as caught:
        load(hub)
    assert caught.value.exit_code == 5
    with pytest.raises(UsageError, match="names no model on the Hub"):
        load(hub, "hf://routed")
    with pytest.raises(UsageError, match="names no model on the Hub"):
        load(hub, "hf://org/routed@main/sub")


def test_a_folder_comes_first(model: Path, one: Way, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(one.folder, tmp_path / ID)
    asked = len(hub.log)
    mine = load(hub)
    assert mine.folders["math"] == Path(ID) / "adapters" / "math" and mine.warnings == [] and len(hub.log) == asked
    with pytest.raises(UsageError, match=r"is a folder here.*hf://org/routed"):
        load(hub, revision="main")
    push(model, hub)
    theirs = load(hub, f"hf://{ID}", base=one.pico.base)
    assert theirs.folders["math"] != mine.folders["math"]
    again = load(hub)
    assert again.folders == mine.folders and "hf://org/routed" in again.warnings[0]  # now that both are here


def test_without_the_network(model: Path, one: Way, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = push(model, hub)
    with pytest.raises(HubError, match="is not in the client's cache"):
        load(hub, local_files_only=True, base=one.pico.base)
    expected = logits(mine := load(hub, base=one.pico.base))
    hub.repos[ID].commit({"x": b""})  # a branch is what it was when it was last seen
    asked = len(hub.log)
    for name, options in ((ID, {}), (first.pinned, {}), (ID, {"revision": "main"})):
        found = load(hub, name, local_files_only=True, base=one.pico.base, **options)
        assert torch.equal(logits(found), expected)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = load(hub, base=one.pico.base)
    assert torch.equal(logits(found), expected) and len(hub.log) == asked
    blob = (mine.folders["math"] / "adapter_model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x01")
    with pytest.raises(SecurityError, match="differ from the cache's hash"):
        load(hub, base=one.pico.base)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    healed = load(hub, first.pinned, base=one.pico.base)
    assert torch.equal(logits(healed), expected)
    asked = len(hub.log)
    load(hub, first.pinned, base=one.pico.base, force_download=True)
    assert len([r for r in hub.log[asked:] if r.origin == "cdn"]) == len(NAMES) + 1


# ------------------------------------------------------------------------------------------------------------ the command line


@pytest.fixture
def at_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Commands name no Hub: they take the client's."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE"
    monkeypatch.setattr(template, hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def test_a_dry_run_uploads_nothing(model: Path, at_hub: Hub) -> None:
    done = recycle("push", model, ID, "--base-id", "org/base", "--dry-run", "--widget", "Add 1.")
    assert done.exit_code == 0 and "nothing was uploaded" in done.stderr, done.output
    assert {r.method for r in at_hub.log} == {"GET"} and ID not in at_hub.repos
    table, _, card = done.stdout.partition("\n\n---\n")
    assert f"{WEIGHTS}\t{(model / WEIGHTS).stat().st_size:,}" in table.split("\n") and "# 4 adapters on org/base" in card
    assert yaml.safe_load(card.split("---\n")[0])["widget"] == [{"text": "Add 1."}]
    told = json.loads(recycle("push", model, ID, "--base-id", "org/base", "--dry-run", "--json").stdout)
    assert told["schema_version"] == 1 and told["commit"] is None and told["bytes"] == sum(told["files"].values())


def test_the_command(model: Path, one: Way, at_hub: Hub) -> None:
    done = recycle("push", model, ID, "--base-id", "org/base", "--private", "--message", "the first")
    assert done.exit_code == 0 and done.stdout == f"{ID}@{at_hub.repos[ID].refs['main']}\n" and at_hub.repos[ID].private
    again = recycle("push", model, ID, "--base-id", "org/base", "--json")
    assert json.loads(again.stdout)["changed"] is False and "no commit was made" in again.stderr
    assert TOKEN not in done.output + again.output
    for verb, *args in (
        ["run", "-p", "a", "--max-new-tokens", 2],
        ["eval", one.pico.tasks[0], "--rows", 1, "--max-new-tokens", 2],
        ["explain", "-p", "Add 1.", "--max-new-tokens", 2],
    ):
        by_id = recycle(verb, done.stdout.strip(), *args, "--base", one.pico.base)
        assert by_id.exit_code == 0 and by_id.stdout, by_id.output
    assert "fetching org/routed" in recycle("run", ID, "-p", "a", "--base", one.pico.base, "--max-new-tokens", 2).stderr
    for args, code in (
        (["--base-id", "nonsense/"], 2),
        ([], 2),
        (["--base-id", "org/base", "--strict"], 3),
        (["--base-id", "org/base", "--license-allow", "mitt"], 2),
    ):
        assert recycle("push", model, ID, *args).exit_code == code, args
    (model / ".env").write_text("x")
    refused = recycle("push", model, ID, "--base-id", "org/base")
    assert refused.exit_code == 4 and refused.stderr.startswith("error: ")


def test_python_and_the_command_have_the_same_defaults() -> None:
    known = dict(inspect.signature(recycler.push).parameters)
    defaults = main.commands["push"].make_context("push", [], resilient_parsing=True).params
    assert set(known) - set(defaults) == {"token", "endpoint"} and set(defaults) - set(known) == {"as_json"}
    for name, parameter in known.items():
        if parameter.default is not parameter.empty and name in defaults:
            assert defaults[name] == parameter.default, name


def test_processes_of_their_own(one: Way, hub: Hub, tmp_path: Path) -> None:
    """Pushed, and run by id with the base from the Hub too; then again without a network."""
    hub.add("org/base", one.pico.base)
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
    run = ["-p", "Add 1 and 2.", "--max-new-tokens", 4]
    there = process([["push", one.folder, ID, "--base-id", "org/base"], ["run", ID, *run]], tmp_path, **settings)
    assert there.returncode == 0 and TOKEN not in there.stdout + there.stderr, there.stderr
    pinned, _, answer = there.stdout.partition("\n")
    assert answer == answer_prompts(recycler.load(one.folder), [run[1]], max_new_tokens=4)[0] + "\n"
    asked = len(hub.log)
    offline = process([["run", pinned, *run]], tmp_path, sockets=False, HF_HUB_OFFLINE="1", **settings)
    assert offline.returncode == 0 and offline.stdout == answer and len(hub.log) == asked, offline.stderr
