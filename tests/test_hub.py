"""The Hub, through the real client against a server on the loopback: pinning, hashes, retries, reasons."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adapters import files, write
from hub_server import Hub, running

from recycler.zoo import formats, hub_errors
from recycler.zoo import hub as client
from recycler.zoo.errors import HubError, InputError, RecycleError, SecurityError, UsageError
from recycler.zoo.hub import Source

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with org/math."""
    with running(monkeypatch, tmp_path / "cache") as server:
        server.add("org/math", write(tmp_path / "repo"))
        yield server


@pytest.fixture
def into(tmp_path: Path) -> Path:
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


def get(hub: Hub, text: str, into: Path, **options: Any) -> client.Download:
    return client.download(Source.parse(text), into, endpoint=hub.url, **options)


@pytest.mark.parametrize(
    ("text", "repo", "revision", "subfolder"),
    [
        ("org/math", "org/math", None, ""),
        ("org/math-7b_v1.0", "org/math-7b_v1.0", None, ""),
        ("org/math@main", "org/math", "main", ""),
        ("org/math@refs/pr/1/sub", "org/math", "refs/pr/1", "sub"),
        ("org/math/sub/adapter", "org/math", None, "sub/adapter"),
        ("hf://org/math@v1/sub", "org/math", "v1", "sub"),
    ],
)
def test_sources(text: str, repo: str, revision: str | None, subfolder: str) -> None:
    source = Source.parse(text)
    assert (source.repo, source.revision, source.subfolder, source.folder) == (
        repo,
        revision,
        subfolder,
        None,
    )


@pytest.mark.parametrize("text", ["", "math", "org/", "org/math/../x", "org/math@", "a b/c", "https://x/y", "org//x"])
def test_no_sources(text: str) -> None:
    with pytest.raises(UsageError, match="neither a folder nor a repository"):
        Source.parse(text)


def test_folders_win_where_they_exist_or_are_written_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "math").mkdir(parents=True)
    assert Source.parse("org/math").folder == Path("org/math")
    for text in ("./x", "../x", "/x", "~/x", "C:\\x"):
        assert Source.parse(text).folder is not None
    assert Source.parse("org/math").stem == "math"


def test_download_is_pinned_and_holds_what_the_repository_holds(hub: Hub, into: Path) -> None:
    repo = hub.repos["org/math"]
    first = repo.refs["main"]
    extra = {"evil.py": b"boom", "optimizer.pt": b"x" * 99, "training_args.bin": b"x"}
    second = repo.commit({p: f.data for p, f in repo.commits[first].items()} | extra)
    got = get(hub, "org/math", into)
    assert got.revision == second and not got.notes
    expected = {path: file.data for path, file in repo.commits[first].items()}
    assert files(into) == expected
    assert got.files == {name: hashlib.sha256(data).hexdigest() for name, data in expected.items()}
    assert not any(path.is_symlink() for path in into.iterdir())
    assert not hub.lines("evil|optimizer|training_args")
    assert all(f"/resolve/{second}/" in line for line in hub.lines("/resolve/"))
    assert get(hub, f"org/math@{first}", into).revision == first


def test_branches_and_subfolders(hub: Hub, into: Path) -> None:
    repo = hub.repos["org/math"]
    main = {path: file.data for path, file in repo.commits[repo.refs["main"]].items()}
    sha = repo.commit({f"adapters/law/{path}": data for path, data in main.items()}, ref="v2")
    with pytest.raises(InputError, match=r"subfolders: adapters/law.*org/math@v2/adapters/law"):
        get(hub, "org/math@v2", into)
    assert get(hub, "org/math@v2/adapters/law", into).revision == sha
    assert files(into) == main


def test_a_token_reaches_the_hub_and_not_the_cdn(hub: Hub, into: Path) -> None:
    hub.repos["org/math"].private = True
    hub.tokens["hf_x"] = {"org/math"}
    get(hub, "org/math", into, token="hf_x")
    assert any(r.headers.get("authorization") == "Bearer hf_x" for r in hub.log if r.origin == "hub")
    assert [r for r in hub.log if r.origin == "cdn"]


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json"])
def test_a_flipped_byte_is_found_and_healed(hub: Hub, into: Path, name: str) -> None:
    body = "GET /repos/" if name == WEIGHTS else "GET /api/resolve-cache/.*adapter_config"
    hub.fault(body, "flip")
    got = get(hub, "org/math", into)
    assert got.notes == (f"{name} was damaged in the cache and fetched again",)
    repo = hub.repos["org/math"]
    assert files(into) == {path: file.data for path, file in repo.commits[repo.refs["main"]].items()}


def test_a_damaged_cache_is_healed(hub: Hub, into: Path, tmp_path: Path) -> None:
    get(hub, "org/math", into)
    (blob,) = [p for p in (tmp_path / "cache").rglob(WEIGHTS)]
    raw = bytearray(blob.read_bytes())
    raw[-1] ^= 1
    blob.resolve().write_bytes(raw)
    assert get(hub, "org/math", into).notes
    assert not get(hub, "org/math", into).notes


def test_wrong_contents_twice_are_refused(hub: Hub, into: Path) -> None:
    hub.fault("GET /repos/", "flip", times=2)
    with pytest.raises(SecurityError, match=r"differ from the Hub's hash, twice") as caught:
        get(hub, "org/math", into)
    assert caught.value.exit_code == 4
    assert not (into / WEIGHTS).exists()


def test_pickles_and_large_files_are_refused_before_anything_is_downloaded(hub: Hub, into: Path) -> None:
    hub.add("org/old", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"})
    with pytest.raises(SecurityError, match=r"adapter_model\.bin"):
        get(hub, "org/old", into)
    with pytest.raises(InputError, match="more than the limit"):
        get(hub, "org/math", into, max_bytes=100)
    hub.add("org/empty", {".gitattributes": b""})
    with pytest.raises(InputError, match="no PEFT adapter"):
        get(hub, "org/empty", into)
    assert not hub.lines("/resolve/")


REASONS: dict[str, tuple[dict[str, Any], str, str]] = {
    "gated": ({"gated": "manual"}, "org/law is gated", "Accept them"),
    "private": ({"private": True}, "org/law was not found", "private"),
    "disabled": ({"disabled": True}, "org/law is disabled", "Choose another"),
}


@pytest.mark.parametrize(("options", "what", "fix"), REASONS.values(), ids=REASONS)
@pytest.mark.parametrize("token", [None, "hf_x"])
def test_reasons(hub: Hub, into: Path, tmp_path: Path, options: dict[str, Any], what: str, fix: str, token: str | None) -> None:
    hub.add("org/law", tmp_path / "repo", **options)
    hub.tokens["hf_x"] = set()
    with pytest.raises(HubError, match=what) as caught:
        get(hub, "org/law", into, token=token)
    assert fix in str(caught.value) and caught.value.exit_code == 5
    hub.tokens["hf_y"] = {"org/law"}
    if not options.get("disabled"):
        get(hub, "org/law", into, token="hf_y")


def test_missing_things(hub: Hub, into: Path) -> None:
    with pytest.raises(HubError, match=r"org/absent was not found.*hf auth login"):
        get(hub, "org/absent", into)
    with pytest.raises(HubError, match="org/math has no revision v9"):
        get(hub, "org/math@v9", into)
    with pytest.raises(HubError, match="access token is not valid"):
        get(hub, "org/math", into, token="hf_wrong")


def test_renamed_repositories_are_followed(hub: Hub, into: Path) -> None:
    hub.renamed["old/math"] = "org/math"
    assert get(hub, "old/math", into).revision == hub.repos["org/math"].refs["main"]
    assert not hub.lines("old/math/resolve")


def test_offline_makes_no_request(hub: Hub, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="offline mode is on"):
        get(hub, "org/math", into)
    assert not hub.log


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("GET /api/models/", {"kind": "status", "status": 503}),
        ("GET /api/models/", {"kind": "status", "status": 429, "headers": {"RateLimit": '"api";r=0;t=0'}}),
        ("GET /api/models/", {"kind": "reset"}),
        ("HEAD /org/math/resolve", {"kind": "status", "status": 503}),
        ("GET /repos/", {"kind": "status", "status": 500}),
        ("GET /repos/", {"kind": "reset"}),
        ("GET /repos/", {"kind": "cut", "keep": 100}),
    ],
)
def test_passing_faults_are_retried(hub: Hub, into: Path, pattern: str, fault: dict[str, Any]) -> None:
    hub.fault(pattern, **fault)
    assert get(hub, "org/math", into).files
    assert hub.faults[0].times == 0


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ({"kind": "status", "status": 429}, "rate limit.*Wait five minutes"),
        ({"kind": "status", "status": 502}, "answered 502"),
        ({"kind": "status", "status": 403}, "refuses access"),
        ({"kind": "reset"}, "cannot be reached"),
        ({"kind": "body", "body": b"<html>"}, "could not be fetched"),
        ({"kind": "body", "body": b"{}"}, "could not be fetched"),
    ],
)
def test_lasting_faults_are_explained(hub: Hub, into: Path, fault: dict[str, Any], what: str) -> None:
    hub.fault("/api/models/", times=99, **fault)
    with pytest.raises(HubError, match=what) as caught:
        get(hub, "org/math", into)
    assert caught.value.what and caught.value.why and caught.value.fix
    tries = len(hub.lines("/api/models/"))
    assert tries == (4 if fault.get("status") in (429, 502) or fault["kind"] == "reset" else 1)


def test_what_the_hub_asks_for_is_waited(hub: Hub, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(client.time, "sleep", waited.append)
    hub.fault("/api/models/", "status", status=429, headers={"RateLimit": '"api";r=0;t=7'})
    hub.fault("/api/models/", "status", status=429, headers={"Retry-After": "3"})
    hub.fault("/api/models/", "status", status=503)
    get(hub, "org/math", into)
    assert waited[:3] == [8, 4, 4]


def test_a_closed_port(into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(HubError, match="cannot be reached"):
        client.download(Source.parse("org/math"), into, endpoint="http://127.0.0.1:9")


def test_metadata_calls_have_a_timeout(hub: Hub, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    seen = {}
    real = HfApi.model_info
    monkeypatch.setattr(HfApi, "model_info", lambda *a, **k: seen.update(k) or real(*a, **k))
    get(hub, "org/math", into)
    assert seen["timeout"]


def test_faults_in_the_program_are_not_blamed_on_the_hub() -> None:
    assert hub_errors.explain("org/math", None, TypeError("bug")) is None


def test_the_header_comes_without_the_weights(hub: Hub, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = Source.parse("org/math")
    listing = client.look(source, endpoint=hub.url)
    assert listing.size == sum(len(data) for data in files(tmp_path / "repo").values())
    shapes = client.header(source, listing, endpoint=hub.url)
    assert shapes == {k: tuple(v.shape) for k, v in load_file(tmp_path / "repo" / WEIGHTS).items()}
    hub.add("org/forged", {"adapter_config.json": b"{}", WEIGHTS: b"PK\x03\x04" + b"\0" * 100})
    forged = Source.parse("org/forged")
    with pytest.raises(SecurityError) as caught:
        client.header(forged, client.look(forged, endpoint=hub.url), endpoint=hub.url)
    assert isinstance(caught.value, RecycleError)


def test_a_composed_model_comes_whole_and_checked(hub: Hub, tmp_path: Path) -> None:
    law = {f"adapters/law/{name}": data for name, data in files(write(tmp_path / "law")).items()}
    model = {"recycle.json": b"{}", "router/router.json": b"{}", "README.md": b"# Model", **law}
    repo = hub.add("org/model", {**model, "evil.py": b"boom", "old.bin": b"x"})
    hub.fault("GET /repos/", "flip")
    folder = client.snapshot("org/model", endpoint=hub.url)
    assert files(folder) == model
    assert formats.read(folder / "adapters" / "law")[1].sites == 4
    assert client.snapshot("org/model", revision=repo.refs["main"], endpoint=hub.url) == folder
    with pytest.raises(InputError, match="data files"):
        client.snapshot("org/model", endpoint=hub.url, max_bytes=10)
    with pytest.raises(HubError, match="org/absent was not found"):
        client.snapshot("org/absent", endpoint=hub.url)


def test_the_server_lists_as_the_hub_does(hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    card = "---\nbase_model: org/base\nlibrary_name: peft\n---\n"
    hub.add("org/law", write(tmp_path / "law", card=card))
    hub.add("org/hidden", write(tmp_path / "hidden", card=card), private=True)
    hub.add("you/law", write(tmp_path / "yours", card=card))
    hub.page = 1
    api = HfApi(endpoint=hub.url)
    found = api.list_models(filter="base_model:adapter:org/base", limit=10)
    assert [model.id for model in found] == ["org/law", "you/law"]
    assert [model.id for model in api.list_models(author="org", search="LA", limit=10)] == ["org/law"]
    assert set(api.list_repo_files("org/law")) == {"README.md", "adapter_config.json", WEIGHTS}


def test_a_peek_is_one_request_or_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    assert "adapter_config.json" in (client.peek("org/math") or [])
    with pytest.raises(HubError, match="org/absent was not found"):
        client.peek("org/absent")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="offline mode"):
        client.peek("org/math")
    with pytest.raises(HubError):
        client.peek("/no/such/folder")
