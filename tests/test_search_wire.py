"""Looking for adapters over a bad line: paging that leads astray, limits, silence, damage, and the cache on disk."""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from adapters import CONFIG, tensors
from click.testing import CliRunner
from hub_server import Hub, running
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import recycler
from recycler.cli import main
from recycler.intake.search_report import SearchReport
from recycler.zoo import hub_requests
from recycler.zoo.errors import HubError
from recycler.zoo.head_cache import Head, HeadCache

FILES = {
    "adapter_config.json": json.dumps(CONFIG).encode(),
    "adapter_model.safetensors": save(tensors()),
    "README.md": b"---\nbase_model: org/base\n---\n",
}
LIST = "GET /api/models"
LONG_S = 60  # a guard against hanging, not a measure


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with five adapters, three a page."""
    with running(monkeypatch, tmp_path / "cache") as server:
        server.page = 3
        server.fill(5, FILES)
        yield server


@pytest.fixture
def zoo(tmp_path: Path) -> recycler.Zoo:
    return recycler.Zoo(tmp_path / "zoo")


@pytest.fixture
def find(hub: Hub, zoo: recycler.Zoo) -> Callable[..., SearchReport]:
    def search(**options: Any) -> SearchReport:
        return recycler.search("org/base", **{"limit": None, "zoo": zoo, "endpoint": hub.url, **options})

    return search


def names(report: SearchReport) -> list[str]:
    return [one.repo for one in report.candidates]


def usable(report: SearchReport) -> int:
    return [one.verdict for one in report.candidates].count("usable")


ALL = [f"org/adapter-{number:04}" for number in range(5)]


# -------------------------------------------------------------------------------------------------------------- paging


@pytest.mark.parametrize(("size", "calls"), [(1, 5), (3, 2), (100, 1)])
def test_pages_of_any_size(hub: Hub, find: Callable[..., SearchReport], size: int, calls: int) -> None:
    hub.page = size
    report = find()
    assert names(report) == ALL and usable(report) == 5 and report.complete and not report.more
    assert report.listing_calls == calls == len(hub.lines(LIST)) == len(set(hub.lines(LIST)))
    assert all("limit=" in line for line in hub.lines(LIST))


def test_a_limit_asks_for_no_more_pages_than_it_needs(hub: Hub, find: Callable[..., SearchReport]) -> None:
    report = find(limit=2)
    assert names(report) == ALL[:2] and report.more and (report.listing_calls, report.resolver_calls) == (1, 4)
    assert names(find(limit=5)) == ALL and not find(limit=5).more


def test_a_relative_link_is_followed(hub: Hub, find: Callable[..., SearchReport]) -> None:
    hub.link = lambda following: following.removeprefix(hub.url)
    assert names(report := find()) == ALL and report.complete


@pytest.mark.parametrize("kind", ["itself", "another host", "another scheme", "nonsense", "for ever"])
def test_links_that_lead_astray_are_not_followed(hub: Hub, find: Callable[..., SearchReport], kind: str) -> None:
    links: dict[str, Callable[[str], str]] = {
        "itself": lambda following: re.sub("&cursor=[0-9]+", "", following),
        "another host": lambda following: following.replace(hub.url, hub.cdn),
        "another scheme": lambda following: following.replace("http:", "file:"),
        "nonsense": lambda following: "http://[::1",
        "for ever": lambda following: re.sub("cursor=[0-9]+", f"cursor=0&again={len(hub.log)}", following),
    }
    hub.link = links[kind]
    report = find()
    assert names(report) == ALL[:3] and usable(report) == 3 and not report.complete
    assert report.stopped is not None and "the list ends early, after 3 repositories" in report.stopped
    assert "was not followed" in report.stopped and len(hub.lines(LIST)) == (2 if kind == "for ever" else 1)
    assert not [request for request in hub.log if request.origin == "cdn" and "/api/" in request.path]


def test_a_list_that_ends_early_is_a_partial_success(hub: Hub, zoo: recycler.Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    hub.link = lambda following: "http://elsewhere.example/\x1b[31m"
    result = CliRunner().invoke(main, ["search", "--base", "org/base", "--zoo", str(zoo.path)])
    assert result.exit_code == 6 and len(result.stdout.splitlines()) == 4
    assert "the list ends early" in result.stderr and "\x1b" not in result.output


# ------------------------------------------------------------------------------------------- faults of lists and files


@pytest.mark.parametrize("page", ["cursor=3", LIST])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cut", {"keep": 100}),
        ("body", {"body": b'[{"id": "org/x"'}),
        ("body", {"body": b"<html>"}),
        ("body", {"body": b'{"error": "no list"}'}),
        ("reset", {}),
        ("status", {"status": 503}),
        ("status", {"status": 429, "headers": {"RateLimit": '"api";r=0;t=0'}}),
        ("status", {"status": 429, "headers": {"Retry_After": "1"}}),
        ("status", {"status": 429}),
    ],
)
def test_a_page_is_asked_for_again(
    hub: Hub, find: Callable[..., SearchReport], page: str, kind: str, options: dict[str, Any]
) -> None:
    hub.fault(page, kind, times=2, **options)
    report = find()
    assert names(report) == ALL and report.complete and report.listing_calls == 4 == len(hub.lines(LIST))


@pytest.mark.parametrize("body", [b'[{"id": "org/x"', b"[" * 100_000, b"null", b'"' + b"x" * 1000])
def test_a_list_that_stays_broken(hub: Hub, find: Callable[..., SearchReport], body: bytes) -> None:
    hub.fault("cursor=3", "body", body=body, times=99)
    report = find()
    assert names(report) == ALL[:3] and report.stopped is not None and "ends early" in report.stopped
    hub.fault(LIST, "body", body=body, times=99)
    with pytest.raises(HubError, match="could not be fetched"):
        find()


def test_a_page_too_large_to_be_one(hub: Hub, find: Callable[..., SearchReport], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recycler.zoo.hub_search._MAX_BODY", 500)
    with pytest.raises(HubError, match="more than 500 bytes"):
        find()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refusals_are_final(hub: Hub, find: Callable[..., SearchReport], status: int) -> None:
    hub.fault(LIST, "status", status=status, times=99)
    with pytest.raises(HubError):
        find()
    assert len(hub.lines(LIST)) == 1


@pytest.mark.parametrize(
    ("kind", "options", "verdict"),
    [
        ("reset", {}, "unknown"),
        ("status", {"status": 500}, "unknown"),
        ("status", {"status": 403}, "unknown"),
        ("status", {"status": 302, "headers": {"Location": "/org/adapter-0002/resolve/again"}}, "unknown"),
        ("status", {"status": 206, "headers": {"Content_Range": "bytes 0-255999/5000"}}, "unknown"),
        ("status", {"status": 206, "headers": {"Content_Range": "bytes 9-26/27"}}, "unknown"),
        ("cut", {"keep": 20}, "unknown"),
        ("body", {"body": b"<html>"}, "refused"),
    ],
)
def test_one_bad_repository_does_not_stop_the_others(
    hub: Hub, find: Callable[..., SearchReport], kind: str, options: dict[str, Any], verdict: str
) -> None:
    where = "/resolve-cache/.*adapter-0002/" if kind == "cut" else "/adapter-0002/resolve/"
    hub.fault(where, kind, times=99, **options)
    report = find()
    assert names(report) == ALL and usable(report) == 4 and report.complete
    bad = report.candidates[2]
    assert (bad.verdict, bool(bad.reason)) == (verdict, True) and bad.licence == "mit"


@pytest.mark.parametrize("body", [b'["x"]', b"null", b'{"errors": 5}', b"\xff" * 2000])
def test_error_bodies_are_not_trusted(hub: Hub, find: Callable[..., SearchReport], body: bytes) -> None:
    served: list[str] = []

    def answer(listener: socket.socket) -> None:
        while True:
            try:
                line, _ = listener.accept()
            except OSError:
                return
            with line:
                served.append(line.recv(65_536).decode().split(" ")[1])
                head = f"HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                line.sendall(head.encode() + body)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        hub.cdn = f"http://127.0.0.1:{listener.getsockname()[1]}"
        report = find(limit=1)
    assert [one.verdict for one in report.candidates] == ["unknown"] and len(served) == 1


# ------------------------------------------------------------------------------------------------------ limits, budgets


def test_a_storm_of_limits_is_sat_out_together(
    hub: Hub, find: Callable[..., SearchReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", lambda seconds: waits.append(seconds) if seconds > 0.5 else None)
    hub.page = 100
    hub.fill(40, FILES)
    for i in range(16):  # one each: as nobody really waits here, a thread could run into all of them by itself
        hub.fault(f"adapter-{i:04d}/resolve/.*adapter_config.json", "status", status=429, headers={"Retry_After": "20"})
    report = find()
    assert usable(report) == 40 and report.complete and report.resolver_calls == 80 + 16
    assert waits and max(waits) <= 21


def test_a_budget_that_is_nearly_gone_ends_the_search(hub: Hub, find: Callable[..., SearchReport]) -> None:
    hub.page = 100
    hub.fill(80, FILES)
    hub.budgets["resolvers"] = 100
    report = find()
    assert hub.budgets["resolvers"] >= 1, "the last requests are left for others"
    looked = usable(report)
    assert 30 <= looked < 50 and report.wait_s == 300
    assert report.stopped == f"stopped after {looked} of 80: the anonymous budget is used up; set HF_TOKEN or continue in 300 s"
    left = [one for one in report.candidates if one.verdict == "unknown"]
    assert len(report.candidates) == 80 and {one.reason for one in left} == {"not looked at"} and left[0].downloads
    hub.budgets["resolvers"] = 500
    again = find()
    assert usable(again) == 80 and again.complete and again.cached + again.resolver_calls == 160 and again.cached >= 2 * looked


def test_the_budget_of_a_token(hub: Hub, find: Callable[..., SearchReport]) -> None:
    hub.tokens["hf_x"] = set()
    hub.budgets["resolvers"] = 10
    assert "your token's budget is used up; continue in 300 s" in str(find(token="hf_x").stopped)


def test_a_short_wait_is_waited_for(hub: Hub, find: Callable[..., SearchReport], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.page = 100
    hub.fill(80, FILES)
    hub.budgets["resolvers"], hub.window = 100, 5
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        if seconds > 1:
            waits.append(seconds)
            hub.budgets["resolvers"] = 100

    monkeypatch.setattr("time.sleep", sleep)
    events: list[tuple[str, str, str]] = []
    report = find(on_event=lambda *event: events.append(event))
    assert usable(report) == 80 and report.complete and waits and report.resolver_calls == 160
    assert ("wait", "org/base", "the Hub asks to wait 5 s") in events and (
        "listed",
        "org/base",
        "80 repositories listed",
    ) in events


def test_the_budget_for_lists(hub: Hub, find: Callable[..., SearchReport]) -> None:
    hub.page = 1
    hub.budgets["api"] = 4
    report = find()
    assert names(report) == ALL[:3] and usable(report) == 3
    assert str(report.stopped).startswith(
        "the list ends early, after 3 repositories: the anonymous budget is used up; set HF_TOKEN"
    )


def test_a_limit_that_stays_ends_the_search(hub: Hub, find: Callable[..., SearchReport]) -> None:
    hub.page = 100
    hub.fill(60, FILES)
    hub.fault("/resolve/", "status", status=429, times=9999)
    report = find()
    assert usable(report) == 0 and str(report.stopped).startswith("stopped after 0 of 60: the anonymous budget is used up")
    assert report.resolver_calls <= 8 * 5


# -------------------------------------------------------------------------------------------------- silence, dead ports


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that accepts and says nothing."""
    lines: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                lines.append(listener.accept()[0])
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for line in lines:
            line.close()


def test_silence_ends_in_seconds(
    hub: Hub, find: Callable[..., SearchReport], silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_requests, "TIMEOUT_S", 0.2)
    begun = time.monotonic()
    with pytest.raises(HubError, match="cannot be reached"):
        find(endpoint=silent)
    hub.cdn = silent  # lists and configs answer, weights do not
    report = find()
    assert [one.verdict for one in report.candidates] == ["unknown"] * 5 and report.complete
    assert time.monotonic() - begun < LONG_S


def test_an_answer_that_trickles_ends_too(hub: Hub, find: Callable[..., SearchReport], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_requests, "DEADLINE_S", 0.5)
    stop = threading.Event()

    def trickle(listener: socket.socket) -> None:
        while not stop.is_set():
            try:
                line, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=drip, args=(line,), daemon=True).start()

    def drip(line: socket.socket) -> None:
        with line:
            line.recv(65_536)
            line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while not stop.wait(0.05):
                try:
                    line.sendall(b" ")
                except OSError:
                    return

    begun = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=trickle, args=(listener,), daemon=True).start()
        with pytest.raises(HubError, match="cannot be reached"):
            find(endpoint=f"http://127.0.0.1:{listener.getsockname()[1]}")
        stop.set()
    assert time.monotonic() - begun < LONG_S


def test_a_hub_that_goes_away_is_not_asked_for_everything(hub: Hub, find: Callable[..., SearchReport]) -> None:
    hub.page = 100
    hub.fill(90, FILES)
    hub.fault("/resolve/", "reset", times=9999)
    report = find()
    assert usable(report) == 0 and report.resolver_calls < 90
    assert re.match(r"stopped after \d+ of 90: the Hub stopped answering; run it again later", str(report.stopped))


def test_a_closed_port(hub: Hub, zoo: recycler.Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    result = CliRunner().invoke(main, ["search", "--base", "org/base", "--zoo", str(zoo.path)])
    assert result.exit_code == 5 and "cannot be reached" in result.stderr


def test_ctrl_c_ends_it(hub: Hub, find: Callable[..., SearchReport]) -> None:
    hub.page = 100
    hub.fill(90, FILES)

    def progress(steps: int, what: str) -> Callable[..., None]:
        left = [5]

        def step(count: int = 1, note: str = "") -> None:
            left[0] -= count
            if left[0] == 0:
                raise KeyboardInterrupt

        return step

    with pytest.raises(KeyboardInterrupt):
        find(progress=progress)
    for thread in threading.enumerate():
        if thread.name.startswith("search"):
            thread.join(LONG_S)
            assert not thread.is_alive()
    assert len(hub.lines("/resolve/")) < 180, "it went on asking"
    assert usable(find()) == 90


# ------------------------------------------------------------------------------------------------------------ the cache


def test_the_second_time_only_the_list_is_asked_for(hub: Hub, find: Callable[..., SearchReport]) -> None:
    first = find()
    hub.log.clear()
    second = find()
    assert second.candidates == first.candidates
    assert (second.listing_calls, second.resolver_calls, second.cached) == (2, 0, 10)
    assert not hub.lines("/resolve/")


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "changed", "other", "junk", "bomb", "folder"])
def test_a_damaged_cache_is_asked_for_again_and_healed(
    hub: Hub, zoo: recycler.Zoo, find: Callable[..., SearchReport], damage: str
) -> None:
    first = find()
    entries = sorted((zoo.path / "cache" / "search").iterdir())
    assert len(entries) == 10
    good = entries[0].read_bytes()
    swapped = entries[1].read_bytes()
    entry = json.loads(good)
    bad = {
        "empty": b"",
        "cut": good[: len(good) // 2],
        "flipped": json.dumps({**entry, "data": entry["data"][::-1]}).encode(),
        "changed": json.dumps({**entry, "data": base64.b64encode(zlib.compress(b"{}")).decode()}).encode(),
        "other": swapped,
        "junk": b"[" * 100_000,
        "bomb": json.dumps({**entry, "data": base64.b64encode(zlib.compress(bytes(10**8))).decode()}).encode(),
        "folder": b"",
    }[damage]
    entries[0].unlink()
    if damage == "folder":
        entries[0].mkdir()
    else:
        entries[0].write_bytes(bad)
    again = find()
    assert again.candidates == first.candidates and (again.resolver_calls, again.cached) == (1, 9)
    if damage != "folder":
        assert json.loads(entries[0].read_bytes()) == entry and find().resolver_calls == 0
    assert sorted((zoo.path / "cache" / "search").iterdir()) == entries, "no temporary file is left"


def test_a_new_commit_is_looked_at_and_takes_the_place_of_the_old(
    hub: Hub, zoo: recycler.Zoo, find: Callable[..., SearchReport]
) -> None:
    find()
    repo = hub.repos[ALL[0]]
    sha = repo.commit({**FILES, "adapter_config.json": b"{}"})
    repo.cards[sha] = {"base_model": "org/base"}
    report = find()
    assert report.candidates[0].verdict == "refused" and report.resolver_calls == 1
    assert len(list((zoo.path / "cache" / "search").iterdir())) == 10


def test_a_cache_that_cannot_be_written_costs_only_requests(
    hub: Hub, zoo: recycler.Zoo, find: Callable[..., SearchReport]
) -> None:
    zoo.path.mkdir()
    (zoo.path / "cache").write_text("in the way")
    assert usable(find()) == 5 and find().resolver_calls == 10


@given(st.binary(max_size=2000), st.one_of(st.none(), st.integers(2000, 2**60)), st.text(max_size=20), st.text(max_size=20))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_cache_gives_back_what_it_was_given(tmp_path: Path, data: bytes, size: int | None, repo: str, path: str) -> None:
    cache = HeadCache(tmp_path)
    cache.put(repo, "a" * 40, path, Head(data, size))
    assert cache.get(repo, "a" * 40, path) == Head(data, size)
    assert cache.get(repo, "b" * 40, path) is None and cache.get(repo + "x", "a" * 40, path) is None
    assert HeadCache(None).get(repo, "a" * 40, path) is None


# ------------------------------------------------------------------------------------------------------------- anything

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.just("org/x") | st.just("a" * 40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
ITEM = st.fixed_dictionaries(
    {},
    optional={
        "id": st.just("org/x") | JSON,
        "sha": st.just("a" * 40) | JSON,
        "siblings": st.lists(st.fixed_dictionaries({"rfilename": st.sampled_from(list(FILES)) | JSON}) | JSON, max_size=4)
        | JSON,
        "tags": st.lists(st.text(max_size=5) | JSON, max_size=3) | JSON,
        "cardData": st.dictionaries(st.sampled_from(["license", "license_name", "datasets"]), JSON, max_size=3) | JSON,
        **{key: JSON for key in ("downloads", "likes", "gated", "library_name", "createdAt", "lastModified")},
    },
)


@given(st.lists(ITEM | JSON, max_size=4))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_whatever_is_on_a_page_becomes_a_report(hub: Hub, find: Callable[..., SearchReport], items: list[Any]) -> None:
    hub.faults[:] = []
    hub.fault(LIST, "body", body=json.dumps(items).encode())
    report = find(text=None, check=False)
    text = json.dumps(report.to_json()) + str(report)
    assert text and all(one.verdict in ("refused", "unknown", "usable") for one in report.candidates)
    assert not any("a fault in this program" in one.reason for one in report.candidates)


# ---------------------------------------------------------------------------------------------------- a Hub of some size


def test_five_hundred_adapters(hub: Hub, zoo: recycler.Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """In seconds (4 to 8 on two cores, which the server runs on too), with the cost printed."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    hub.page = 100
    hub.fill(500, FILES)
    begun = time.monotonic()
    arguments = ["search", "--base", "org/base", "--all", "--zoo", str(zoo.path)]
    first = CliRunner().invoke(main, arguments)
    assert first.exit_code == 0 and len(first.stdout.splitlines()) == 501
    assert "500 adapters of org/base: 500 usable" in first.stderr
    assert "500 repositories scanned; 5 listing calls, 1,000 resolver calls, 0 answers from cache" in first.stderr
    per_adapter: dict[str, int] = {}
    for line in hub.lines("/resolve/"):
        per_adapter[line.split("/")[2]] = per_adapter.get(line.split("/")[2], 0) + 1
    assert len(per_adapter) == 500 and set(per_adapter.values()) == {2}
    hub.log.clear()
    second = CliRunner().invoke(main, arguments)
    assert second.stdout == first.stdout and not hub.lines("/resolve/") and len(hub.lines(LIST)) == 5
    assert "5 listing calls, 0 resolver calls, 1,000 answers from cache" in second.stderr
    assert time.monotonic() - begun < 4 * LONG_S
