"""The Hub, through the real client against a server on the loopback: pinning, hashes, retries, reasons."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import files, write
from hub_server import Hub, running
from huggingface_hub import hf_hub_download
from safetensors.torch import save

from recycler.zoo import client_cache, formats, hub_errors, patience
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
    got = get(hub, "old/math", into)
    assert got.revision == hub.repos["org/math"].refs["main"]
    assert got.notes == ("old/math is now called org/math",)
    assert not hub.lines("old/math/resolve")


def test_offline_makes_no_request(hub: Hub, into: Path, tmp_path: Path) -> None:
    law = {f"sub/law/{name}": data for name, data in files(tmp_path / "repo").items()}
    hub.add("org/law", law)
    with (
        client_cache.offline(),
        pytest.raises(HubError, match=r"org/math was not fetched: offline mode is on, and it is not in"),
    ):
        get(hub, "org/math", into)
    assert not hub.log
    client.look(Source.parse("org/math"), endpoint=hub.url)
    source = Source.parse("org/math")
    client.download_files(source, client.look(source, endpoint=hub.url), into, only=["adapter_config.json"], endpoint=hub.url)
    asked = len(hub.log)
    with client_cache.offline(), pytest.raises(HubError, match="in the client's cache without its weights"):
        get(hub, "org/math", into)
    assert len(hub.log) == asked
    online = get(hub, "org/math", into)
    (into / "law").mkdir()
    get(hub, "org/law/sub/law", into / "law")
    asked = len(hub.log)
    with client_cache.offline():
        assert get(hub, "org/math", into) == online
        assert get(hub, f"org/math@{online.revision}", into).files == online.files
        assert get(hub, "org/law/sub/law", into / "law").revision == hub.repos["org/law"].refs["main"]
        held = next(path for path in (tmp_path / "cache").rglob(WEIGHTS) if "math" in str(path))
        held.resolve().write_bytes(b"damaged")
        with pytest.raises(SecurityError, match=f"{WEIGHTS} differ from the Hub's hash"):
            get(hub, "org/math", into)
    assert len(hub.log) == asked


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("GET /api/models/", {"kind": "status", "status": 503}),
        ("GET /api/models/", {"kind": "status", "status": 429, "headers": {"RateLimit": '"api";r=0;t=0'}}),
        ("GET /api/models/", {"kind": "reset"}),
        ("HEAD /org/math/resolve", {"kind": "status", "status": 503}),
        ("GET /repos/", {"kind": "status", "status": 500}),
        ("GET /repos/", {"kind": "status", "status": 403}),  # a link that expired
        ("GET /repos/", {"kind": "status", "status": 429, "headers": {"Retry-After": "0"}}),
        ("HEAD /org/math/resolve", {"kind": "reset"}),
        ("GET /repos/", {"kind": "reset"}),
        ("GET /repos/", {"kind": "break", "keep": 1000}),
        ("GET /repos/", {"kind": "cut", "keep": 100}),
    ],
)
def test_passing_faults_are_retried(hub: Hub, into: Path, pattern: str, fault: dict[str, Any]) -> None:
    hub.fault(pattern, **fault)
    assert get(hub, "org/math", into).files
    assert hub.faults[0].times == 0


@pytest.mark.parametrize(
    ("pattern", "status", "what"),
    [
        ("HEAD /org/math/resolve", 503, "answered 503"),  # all of these arrive as "not in the cache"
        ("HEAD /org/math/resolve", 404, "was not found"),
        ("HEAD /org/math/resolve", 403, "refuses access"),
        ("GET /repos/", 416, "answered 416"),
    ],
)
def test_buried_reasons(hub: Hub, into: Path, pattern: str, status: int, what: str) -> None:
    hub.fault(pattern, "status", times=99, status=status)
    with pytest.raises(HubError, match=what):
        get(hub, "org/math", into)


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ({"kind": "status", "status": 429}, "rate limit.*Wait five minutes"),
        ({"kind": "status", "status": 502}, "answered 502"),
        ({"kind": "status", "status": 403}, "refuses access"),
        ({"kind": "status", "status": 401}, "org/math was not found.*missing or private"),  # bare, as over plain http
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
    monkeypatch.setattr("time.sleep", waited.append)
    hub.fault("/api/models/", "status", status=429, headers={"RateLimit": '"api";r=0;t=7'})
    hub.fault("/api/models/", "status", status=503)
    get(hub, "org/math", into)
    assert waited[0] == pytest.approx(8, abs=0.5)  # and again before what follows, as no time passes here
    assert 2.0 in waited  # the second try of the other kind


def test_a_closed_port_is_known_soon(into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    endpoint = "http://127.0.0.1:9/"
    for source in ("org/math", "org/law"):
        with pytest.raises(HubError, match="cannot be reached"):
            client.download(Source.parse(source), into, endpoint=endpoint)
    assert waited == [1.0]  # one more try, and none for the second adapter


def test_a_pause_longer_than_any_limit_is_an_error(hub: Hub, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    for pattern in ("GET /api/models/", "HEAD /org/math/resolve"):  # the client itself would sleep through the second
        hub.fault(pattern, "status", status=429, headers={"Retry-After": "99999"})
        with pytest.raises(HubError, match="asks to wait 1,667 minutes"):
            get(hub, "org/math", into)
    assert not waited


def test_a_pause_is_shared(hub: Hub, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread is told to wait while it downloads, which the client does by itself; the other waits as well."""
    monkeypatch.undo()  # sleep, and keep the cache: nothing here is in it
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub.add("org/law", {"adapter_config.json": b"{}", WEIGHTS: b"x" * 100})
    hub.fault("HEAD /org/math/resolve", "status", status=429, headers={"Retry-After": "1"})
    hub.fault("GET /api/models/org/law", "drip", keep=200, seconds=0.05)  # so that it is under way meanwhile
    threads = [threading.Thread(target=get, args=(hub, name, into / name)) for name in ("org/math", "org/law")]
    for name in ("org/math", "org/law"):
        (into / name).mkdir(parents=True)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = next(r.at for r in hub.log if "/math/resolve" in r.path)
    assert all((into / name / WEIGHTS).exists() for name in ("org/math", "org/law"))
    assert not [r.line for r in hub.log if refused + 0.5 < r.at < refused + 1.9]
    assert [r for r in hub.log if "/law/resolve" in r.path and r.at > refused + 1.9]


def test_a_listing_that_says_nothing_ends(hub: Hub, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "TIMEOUT_S", 0.3)
    hub.fault("GET /api/models/", "stall", times=9)
    with pytest.raises(HubError, match="cannot be reached"):
        get(hub, "org/math", into)
    assert len(hub.lines()) == 2


def test_a_listing_that_drips_ends(hub: Hub, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "SLOW_S", 0.3)
    hub.fault("GET /api/models/", "drip", times=9, keep=1, seconds=0.01)
    with pytest.raises(HubError, match=r"only \d+ bytes came in"):
        get(hub, "org/math", into)


@pytest.mark.parametrize("times", [1, 99])
def test_a_body_that_stops_coming(hub: Hub, into: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.fault("GET /repos/", "stall", keep=1000, times=times)
    if times == 1:
        assert get(hub, "org/math", into).files
    else:
        with pytest.raises(HubError, match="cannot be reached"):
            get(hub, "org/math", into)
    assert len(hub.lines("GET /repos/")) == min(times + 1, 6)  # the client's own tries, not again times ours


def test_a_cut_body_goes_on_where_it_was_cut(hub: Hub, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 512)
    hub.fault("GET /repos/", "cut", keep=1000)
    assert get(hub, "org/math", into).files
    first, second = (r for r in hub.log if r.origin == "cdn")
    assert "Range" not in first.headers and second.headers["Range"] == "bytes=512-"


def test_bytes_are_counted(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 512)
    hub.fault("GET /repos/", "cut", keep=1000)
    source, came = Source.parse("org/math"), []
    listing = client.look(source, endpoint=hub.url)
    client.prefetch(source, listing, endpoint=hub.url, on_bytes=came.append)
    assert sum(came) == listing.size and len(came) > 4
    asked, came = len(hub.log), []
    client.prefetch(source, listing, endpoint=hub.url, on_bytes=came.append)
    assert sum(came) == listing.size and len(hub.log) == asked  # from the cache, without a request


def test_files_of_another_commit_are_refused(hub: Hub, into: Path) -> None:
    repo = hub.repos["org/math"]
    first = repo.refs["main"]
    other = repo.commit({path: file.data for path, file in repo.commits[first].items()})
    hub.fault("HEAD /org/math/resolve.*safetensors", "header", headers={"X-Repo-Commit": first})
    with pytest.raises(SecurityError, match=f"is of commit {first}"):
        get(hub, "org/math", into)
    hub.fault("GET /api/models/", "body", body=json.dumps(repo.info(other, True)).encode())
    with pytest.raises(SecurityError, match=f"is of commit {other}"):
        get(hub, f"org/math@{first}", into)
    assert not (into / WEIGHTS).exists()


def test_a_connection_that_fails_elsewhere_is_survived(hub: Hub, into: Path) -> None:
    """The client closes its one session for all threads when a connection of any of them fails."""
    from huggingface_hub.utils import close_session

    closed = []

    def closing() -> None:
        while not closed:
            if hub.lines("GET /repos/"):
                close_session()
                closed.append(True)

    hub.fault("GET /repos/", "drip", keep=100, seconds=0.01)
    thread = threading.Thread(target=closing)
    thread.start()
    assert get(hub, "org/math", into).files
    thread.join()
    assert closed and len(hub.lines("GET /repos/")) == 2


def test_a_size_that_is_wrong(hub: Hub, into: Path) -> None:
    hub.fault("HEAD /org/math/resolve.*safetensors", "header", times=9, headers={"X-Linked-Size": "7"})
    with pytest.raises(HubError, match="Consistency check failed"):
        get(hub, "org/math", into)


def test_names_that_could_do_harm_are_refused_before_anything_is_written(hub: Hub, into: Path, tmp_path: Path) -> None:
    files_of = {path: file.data for path, file in hub.repos["org/math"].commits[hub.repos["org/math"].refs["main"]].items()}
    hub.add("org/law", {**files_of, "../../evil.json": b"x"})
    with pytest.raises(SecurityError, match=r"evil\.json"):
        get(hub, "org/law", into)
    assert not hub.lines("/resolve/") and not list(tmp_path.rglob("evil*"))


def test_faults_in_the_program_are_not_blamed_on_the_hub() -> None:
    assert hub_errors.explain("org/math", None, TypeError("bug")) is None


def test_the_header_comes_without_the_weights(hub: Hub, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = Source.parse("org/math")
    listing = client.look(source, endpoint=hub.url)
    assert listing.size == sum(len(data) for data in files(tmp_path / "repo").values())
    shapes = client.header(source, listing, endpoint=hub.url)
    assert shapes == {k: tuple(v.shape) for k, v in load_file(tmp_path / "repo" / WEIGHTS).items()}
    long = {f"{'x' * 200}.{number}": torch.zeros(1) for number in range(1000)}  # a header longer than is asked for at first
    hub.add("org/long", {"adapter_config.json": b"{}", WEIGHTS: save(long)})
    asked = len(hub.log)
    many = Source.parse("org/long")
    assert len(client.header(many, client.look(many, endpoint=hub.url), endpoint=hub.url)) == 1000
    assert len([r for r in hub.log[asked:] if r.origin == "cdn"]) == 2
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
    hub.add("org/base", {"config.json": b"{}"})
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    hf_hub_download("org/base", "config.json")
    hub.log.clear()
    assert "adapter_config.json" in (client.peek("org/math") or []) and hub.lines() == ["GET /api/models/org/math"]
    with pytest.raises(HubError, match="org/absent was not found"):
        client.peek("org/absent")
    assert hub.lines()[1:] == ["GET /api/models/org/absent"]
    assert client.peek("org/base") == ["config.json"]  # the Hub comes first
    hub.fault("api/models/org", "status", status=500, times=99)
    assert client.peek("org/base") is None
    with pytest.raises(HubError, match="org/math"):
        client.peek("org/math")
    asked = len(hub.log)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="offline mode"):
        client.peek("org/math")
    assert client.peek("org/base") is None
    with pytest.raises(HubError):
        client.peek("/no/such/folder")
    assert len(hub.log) == asked
