"""Looking for adapters: what is listed, what becomes of each, and what that costs, through the real client."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import CONFIG, PREFIX, SHAPES, files, tensors
from click.testing import CliRunner, Result
from conftest import Pico
from hub_server import Hub, running
from safetensors.torch import save

import recycler
from recycler.cli import main
from recycler.commands.find import SORTS, _verdict
from recycler.intake.search_report import SearchReport
from recycler.zoo import hub_search
from recycler.zoo.errors import HubError, UsageError
from recycler.zoo.preview import MAX_PLACES, Candidate

WEIGHTS = "adapter_model.safetensors"
NAME = "adapter_config.json"
CARD = b"---\nbase_model: org/base\nlicense: apache-2.0\nlibrary_name: peft\n---\n# An adapter\n"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub, empty at first, which is the default one for commands."""
    with running(monkeypatch, tmp_path / "cache") as server:
        yield server


@pytest.fixture
def find(hub: Hub, tmp_path: Path) -> Callable[..., SearchReport]:
    """`recycler.search` at that Hub, with a zoo that remembers."""

    def search(base: str = "org/base", *args: Any, **options: Any) -> SearchReport:
        return recycler.search(base, *args, zoo=recycler.Zoo(tmp_path / "zoo"), endpoint=hub.url, **options)

    return search


@pytest.fixture
def command(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`recycle search` at that Hub."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)

    def run(*args: str) -> Result:
        return CliRunner().invoke(main, ["search", *args, "--zoo", str(tmp_path / "zoo")])

    return run


def adapter(
    weights: Mapping[str, torch.Tensor] | bytes | None = None, *, card: bytes = CARD, **config: Any
) -> dict[str, bytes]:
    """The files of an adapter of org/base."""
    data = weights if isinstance(weights, bytes) else save(dict(tensors() if weights is None else weights))
    return {NAME: json.dumps({**CONFIG, **config}).encode(), WEIGHTS: data, "README.md": card}


def only(report: SearchReport) -> Candidate:
    (one,) = report.candidates
    return one


def resolved(hub: Hub) -> list[str]:
    return hub.lines("/resolve/")


# ------------------------------------------------------------------------------------------------------------ verdicts


def test_what_an_adapter_is_comes_from_a_list_and_two_small_requests(hub: Hub, find: Callable[..., SearchReport]) -> None:
    wide = tensors("q_proj", rank=2) | tensors("mlp", "up_proj", rank=8, seed=1)
    repo = hub.add("org/math", adapter(wide, r=2, rank_pattern={"up_proj": 8}, use_rslora=True), downloads=7, likes=3)
    report = find()
    one = only(report)
    sha = repo.refs["main"]
    assert (one.verdict, one.reason, one.kind, one.ranks) == ("usable", "usable", "rsLoRA", (2, 8))
    assert one.targets == ("q_proj", "up_proj") and one.sites == 4 and one.parameters == sum(t.numel() for t in wide.values())
    assert (one.licence, one.downloads, one.likes, one.gated) == ("apache-2.0", 7, 3, False)
    assert (one.base, one.relation, one.under, one.notes) == ("org/base", "same", "org/base", ())
    assert one.bytes == len(repo.commits[sha][WEIGHTS].data) and one.source == f"org/math@{sha}"
    assert report.usable() == [f"org/math@{sha}"] and report.complete and not report.more
    assert (report.listing_calls, report.resolver_calls, report.cached, report.scanned) == (1, 2, 0, 1)
    assert resolved(hub) == [f"GET /org/math/resolve/{sha}/{file}" for file in (NAME, WEIGHTS)]
    (body,) = [request for request in hub.log if request.origin == "cdn"]
    assert body.headers["Range"] == f"bytes=0-{hub_search.HEAD_BYTES - 1}"


PICKLED = {NAME: b"{}", "adapter_model.bin": b"\x80", "README.md": CARD}


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        ({"README.md": CARD}, "no PEFT adapter: adapter_config.json, adapter_model.safetensors missing"),
        ({".gitattributes": b"", "README.md": CARD}, "no PEFT adapter"),
        ({NAME: b"{}", "README.md": CARD}, "adapter_model.safetensors missing"),
        ({WEIGHTS: b"x", "README.md": CARD}, "adapter_config.json missing"),
        (PICKLED, "pickle only: adapter_model.bin"),
        (adapter() | {"../../x": b""}, "file names that could do harm"),
        (adapter() | {"a\0b": b""}, "file names that could do harm"),
        (adapter() | {"README.MD": b""}, "file names that could do harm"),
        (adapter() | {"CON.txt": b""}, "file names that could do harm"),
    ],
)
def test_what_the_list_of_files_settles_costs_no_request(
    hub: Hub, find: Callable[..., SearchReport], held: dict[str, bytes], reason: str
) -> None:
    hub.add("org/math", held)
    report = find()
    assert only(report).verdict == "refused" and reason in only(report).reason
    assert only(report).fix and not report.usable(convertible=True)
    assert not resolved(hub) and report.resolver_calls == 0


LOHA = {f"{PREFIX}{path}.hada_w{n}_{half}": torch.ones(4, 4) for path in list(SHAPES)[:2] for n in (1, 2) for half in "ab"}


@pytest.mark.parametrize(
    ("weights", "config", "kind", "reason"),
    [
        (LOHA, {"peft_type": "LOHA", "r": 4, "alpha": 8}, "LoHa", "LoHa → LoRA, with the base's shapes; by SVD"),
        (None, {"init_lora_weights": "pissa"}, "PiSSA", "PiSSA → LoRA, with the base's weights; lossless"),
    ],
)
def test_what_can_be_converted_says_what_that_needs(
    hub: Hub, find: Callable[..., SearchReport], weights: Any, config: dict[str, Any], kind: str, reason: str
) -> None:
    hub.add("org/math", adapter(weights, **config))
    one = only(report := find())
    assert (one.verdict, one.kind, one.reason) == ("convertible", kind, reason)
    assert one.ranks == (4,) and one.targets and one.why.startswith(f"{kind} is converted into LoRA")
    assert report.usable() == [] and report.usable(convertible=True) == [one.source] and report.resolver_calls == 2


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
        ({"peft_type": "FORZEN_MA_LORA"}, "FORZEN_MA_LORA"),
        ({"peft_type": None}, "peft_type"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"r": 8}, "rank in the config differs"),
        ({"base_model_name_or_path": "other/base"}, "trained for other/base, not for org/base"),
    ],
)
def test_what_a_fetch_would_refuse_is_refused(
    hub: Hub, find: Callable[..., SearchReport], config: dict[str, Any], reason: str
) -> None:
    hub.add("org/math", adapter(**config))
    one = only(find())
    assert one.verdict == "refused" and reason.casefold() in one.reason.casefold(), one.reason
    with pytest.raises(recycler.RecycleError, match=reason):
        recycler.fetch(one.source, base="org/base", dry_run=True, endpoint=hub.url)


def broken(header: bytes, length: int | None = None, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


ENTRY = b'{"%s": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}' % f"{PREFIX}a.q.lora_A.weight".encode()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cut short"),
        (b"\x04", "cut short"),
        (b"\x80\x02}q\x00X\x04\x00\x00\x00abcd", "not a valid safetensors file"),
        (b"PK\x03\x04" + b"\0" * 60, "not a valid safetensors file"),
        (broken(b"{}", 2**63), "not a valid safetensors file"),
        (broken(b"{}", 99_000_000), "not a valid safetensors file"),
        (broken(b"{" + b"[" * 50_000), "not a valid safetensors file"),
        (broken(ENTRY), "cut short"),
        (broken(ENTRY, body=b"\0" * 400), "not a valid safetensors file"),
        (broken(ENTRY.replace(b"[0, 4]", b"[0, 8]"), body=b"\0" * 8), "not a valid safetensors file"),
        (broken(b"{}"), "no tensors at all"),
        (save({f"{PREFIX}a.q.lora_A.weight": torch.zeros(0)}), "tensors without elements"),
        (save({f"{PREFIX}a.q.lora_A.weight": torch.zeros(2, 2)}), "lora_B is missing"),
    ],
)
def test_broken_weights_are_refused_from_their_first_bytes(
    hub: Hub, find: Callable[..., SearchReport], data: bytes, reason: str
) -> None:
    hub.add("org/bad", adapter(data))
    hub.add("org/good", adapter())
    bad, good = find(sort="created_at").candidates
    assert bad.verdict == "refused" and reason in bad.reason, bad.reason
    assert good.verdict == "usable" and len(resolved(hub)) == 4


def test_a_long_header_is_judged_by_the_config(
    hub: Hub, find: Callable[..., SearchReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_search, "HEAD_BYTES", 300)
    hub.add("org/math", adapter())
    one = only(find())
    assert one.verdict == "usable" and one.reason == "usable, judged by its config alone"
    assert "header of 1 kB not read: rank and targets are the config's" in one.notes
    assert (one.ranks, one.targets, one.sites) == ((4,), ("q_proj", "v_proj"), None)
    assert find().cached == 2


def test_too_large(hub: Hub, find: Callable[..., SearchReport]) -> None:
    hub.add("org/math", adapter())
    assert "more than the limit" in only(find(max_bytes=1000)).reason


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b" " * 1_000_001 + b"{}", b'{"r": 1e999}'])
def test_broken_configs(hub: Hub, find: Callable[..., SearchReport], raw: bytes) -> None:
    hub.add("org/math", adapter() | {NAME: raw})
    assert only(find()).verdict == "refused" and len(resolved(hub)) == 1


def test_several_adapters_in_one_repository(hub: Hub, find: Callable[..., SearchReport], tmp_path: Path) -> None:
    parts = {"lora/math": adapter(), "lora/law": PICKLED, "x y": adapter()}
    held = {f"{place}/{name}": data for place, some in parts.items() for name, data in some.items()}
    sha = hub.add("org/lib", held | {"README.md": CARD}).refs["main"]
    report = find()
    assert [one.name for one in report.candidates] == ["org/lib/lora/law", "org/lib/lora/math", "org/lib/x y"]
    assert [one.verdict for one in report.candidates] == ["refused", "usable", "refused"]
    assert report.usable() == [f"org/lib@{sha}/lora/math"] and report.resolver_calls == 2
    (kept,) = recycler.fetch(report.usable(), endpoint=hub.url, zoo=recycler.Zoo(tmp_path / "other"), dry_run=True).fetched
    assert (kept.revision, kept.source) == (sha, "org/lib/lora/math")


def test_checkpoints_and_many_subfolders(hub: Hub, find: Callable[..., SearchReport]) -> None:
    training = {f"checkpoint-{n}/{name}": data for n in (100, 200) for name, data in adapter().items()}
    hub.add("org/a", adapter() | training | {f"pissa_init/{name}": data for name, data in adapter().items()})
    hub.add("org/b", training | {"README.md": CARD})
    hub.add("org/c", {f"t{n:02}/{name}": data for n in range(60) for name, data in PICKLED.items()} | {"README.md": CARD})
    found = find(limit=None, sort="likes").candidates
    names = [one.name for one in found]
    assert names[:3] == ["org/a", "org/b/checkpoint-100", "org/b/checkpoint-200"]
    assert found[0].notes == ("2 checkpoints of its training are not listed: checkpoint-100, checkpoint-200",)
    assert len(names) == 3 + MAX_PLACES and "it holds 60 adapters, of which 50 are listed" in found[3].notes


# -------------------------------------------------------------------------------------------------------------- access


def test_gated(hub: Hub, find: Callable[..., SearchReport], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/math", adapter(), gated="manual")
    one = only(find())
    assert (one.verdict, one.reason) == ("unknown", f"gated: ask for access at {hub.url}/org/math")
    assert "HF_TOKEN" in one.fix and not resolved(hub)  # nobody without a token is let in, so nothing is asked
    hub.tokens["hf_stranger"], hub.tokens["hf_friend"] = set(), {"org/math"}
    one = only(find(token="hf_stranger"))
    assert (
        one.reason == f"gated: ask for access at {hub.url}/org/math" and "HF_TOKEN" not in one.fix and len(resolved(hub)) == 1
    )
    friend = only(find(token="hf_friend"))
    assert friend.verdict == "usable" and friend.gated and len(resolved(hub)) == 3
    assert _verdict(friend, True) == "gated, usable"
    assert not find(gated=False).candidates and find(gated=True).candidates


def test_a_token_reaches_the_hub_and_no_other_origin(hub: Hub, find: Callable[..., SearchReport]) -> None:
    hub.add("org/math", adapter(), gated="auto")
    hub.tokens["hf_x"] = {"org/math"}
    hub.link = lambda following: following.replace(hub.url, hub.cdn)
    hub.page = 1
    hub.add("org/other", adapter())
    report = find(token="hf_x")
    assert only(report).verdict == "usable"
    assert all(request.headers.get("authorization") == "Bearer hf_x" for request in hub.log if request.origin == "hub")
    # the weights came from there, and the test Hub would have answered 400 to a token
    assert [r.line[:10] for r in hub.log if r.origin == "cdn"] == ["GET /repos"]


def test_private_and_vanished_repositories(hub: Hub, find: Callable[..., SearchReport]) -> None:
    hub.add("org/hidden", adapter(), private=True)
    hub.add("org/gone", adapter())
    hub.add("org/math", adapter())
    hub.fault("/org/gone/resolve", "status", status=404, headers={"X_Error_Code": "RepoNotFound"}, times=99)
    gone, math = find().candidates
    assert gone.name == "org/gone" and gone.verdict == "unknown" and "not found" in gone.reason
    assert math.verdict == "usable"


def test_what_another_commit_answers_is_not_taken(hub: Hub, find: Callable[..., SearchReport]) -> None:
    repo = hub.add("org/math", adapter())
    hub.fault("/resolve/.*config", "status", status=200, headers={"X_Repo_Commit": "f" * 40}, times=99)
    one = only(find())
    assert one.verdict == "unknown" and "from commit ffff" in one.why
    hub.faults.clear()
    hub.fault("/resolve/.*config", "status", status=200, headers={"X_Repo_Commit": repo.refs["main"]}, times=99)
    assert only(find()).verdict == "refused"  # right commit, and the fault's body is no config


# --------------------------------------------------------------------------------------------------------------- bases


def test_the_base_that_an_adapter_declares(hub: Hub, find: Callable[..., SearchReport]) -> None:
    declared = {
        "copy": "unsloth/base-bnb-4bit",
        "disk": "/home/anon/models/base",
        "elsewhere": "/data/model",
        "none": None,
        "other": "org/base2",
    }
    for name, base in declared.items():
        hub.add(f"org/{name}", adapter(base_model_name_or_path=base))
    found = {one.repo: one for one in find().candidates}
    assert {repo: (one.verdict, one.relation) for repo, one in found.items()} == {
        "org/copy": ("usable", "quantised copy"),
        "org/disk": ("usable", "path"),
        "org/elsewhere": ("usable", "no"),
        "org/none": ("usable", "no"),
        "org/other": ("refused", "no"),
    }
    assert "quantised copy" in found["org/copy"].notes[0] and "/data/model" in found["org/elsewhere"].notes[0]
    assert "--base-alias org/base2" in found["org/other"].fix
    again = {one.repo: one for one in find(base_alias=["org/base2"]).candidates}
    assert (again["org/other"].verdict, again["org/other"].relation) == ("usable", "alias")


def test_aliases_have_lists_of_their_own(hub: Hub, find: Callable[..., SearchReport]) -> None:
    card = CARD.replace(b"org/base", b"unsloth/base-bnb-4bit")
    hub.add("org/a", adapter(), downloads=5)
    hub.add("org/b", adapter(card=card, base_model_name_or_path="unsloth/base-bnb-4bit"), downloads=9)
    hub.add("org/c", adapter(), downloads=1)
    report = find(base_alias=["unsloth/base-bnb-4bit"])
    assert [(one.repo, one.under, one.relation) for one in report.candidates] == [
        ("org/b", "unsloth/base-bnb-4bit", "alias"),
        ("org/a", "org/base", "same"),
        ("org/c", "org/base", "same"),
    ]
    assert report.listing_calls == 2 and report.listed_under == ("org/base", "unsloth/base-bnb-4bit")
    assert [one.repo for one in find().candidates] == ["org/a", "org/c"]


def test_sites_are_compared_where_the_base_is_at_hand(
    hub: Hub, find: Callable[..., SearchReport], llama: Pico, tmp_path: Path
) -> None:
    path, folder = next(iter(llama.adapters.items()))
    fits = files(folder) | {"README.md": CARD}
    hub.add("org/fits", fits, downloads=2)
    hub.add("org/other", adapter(), downloads=1)
    with pytest.raises(UsageError, match="base-alias"):
        find(str(llama.base))
    report = find(str(llama.base), base_alias=["org/base"])
    fit, other = report.candidates
    assert fit.verdict == "usable", (path, fit)
    assert other.verdict == "refused" and "does not fit the base" in other.reason
    assert [one.verdict for one in find(str(llama.base), base_alias=["org/base"], check=False).candidates] == ["usable"] * 2
    # by id: one request for the base's config where it is asked for, none where the client's cache has it
    hub.add("org/base", {"config.json": (llama.base / "config.json").read_bytes()})
    assert [one.verdict for one in find().candidates] == ["usable"] * 2
    before = len(resolved(hub))
    report = find(check=True)
    assert report.resolver_calls == 1 and resolved(hub)[before:] == ["GET /org/base/resolve/main/config.json"]
    assert report.candidates[1].verdict == "refused"
    snapshot = tmp_path / "cache" / "models--org--base" / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes((llama.base / "config.json").read_bytes())
    (tmp_path / "cache" / "models--org--base" / "refs").mkdir()
    (tmp_path / "cache" / "models--org--base" / "refs" / "main").write_text("1" * 40)
    report = find()
    assert report.resolver_calls == 0 and report.candidates[1].verdict == "refused"


def test_a_base_that_cannot_be_compared_is_said_to_be(hub: Hub, find: Callable[..., SearchReport], tmp_path: Path) -> None:
    hub.add("org/math", adapter())
    (tmp_path / "base").mkdir()
    for report in (find(check=True), find(str(tmp_path / "base"), base_alias=["org/base"])):
        assert only(report).verdict == "usable" and "sites were not compared with" in report.notes[0]


# ----------------------------------------------------------------------------------------------------- filters, orders


def test_words_are_looked_for_in_ids_tags_and_cards(hub: Hub, find: Callable[..., SearchReport]) -> None:
    def card(more: str) -> bytes:
        return CARD.replace(b"license", more.encode() + b"\nlicense", 1)

    hub.add("org/german-math", adapter())
    hub.add("org/a", adapter(card=card("datasets: [org/GSM8K-german]\ntags: [Math]")))
    hub.add("org/b", adapter(card=card("language: german\ntags: [lora]")))
    hub.add("org/math-only", adapter())
    report = find(text="MATH german")
    assert [one.repo for one in report.candidates] == ["org/german-math", "org/a"] and report.scanned == 4
    assert len(hub.lines("search=german")) == 1 and report.listing_calls == 2
    assert [one.repo for one in find(text="german").candidates] == ["org/german-math", "org/a", "org/b"]
    assert not find(text="french").candidates


def test_scanning_ends(hub: Hub, find: Callable[..., SearchReport], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recycler.intake.searching.SCAN_LIMIT", 30)
    hub.page = 20
    hub.fill(70, adapter())
    report = find(text="0069")
    assert [one.repo for one in report.candidates] == ["org/adapter-0069"] and report.scanned == 30 and report.more
    assert report.notes == ("only the first 30 repositories were scanned; narrow it with --author or --text",)
    assert report.complete
    hub.log.clear()
    assert [one.repo for one in find(text="lora adapter-0061", limit=1).candidates] == ["org/adapter-0061"]
    assert len(hub.lines("/api/models")) == 1  # the Hub's own search finds it, and nothing is scanned


def test_orders_and_filters(hub: Hub, find: Callable[..., SearchReport]) -> None:
    hub.add("org/a", adapter(), downloads=1, likes=3, created="2025-01-01T00:00:00.000Z", modified="2026-01-03T00:00:00.000Z")
    hub.add("org/b", adapter(), downloads=2, likes=1, created="2025-01-03T00:00:00.000Z", modified="2026-01-02T00:00:00.000Z")
    hub.add("me/c", adapter(), downloads=3, likes=2, created="2025-01-02T00:00:00.000Z", modified="2026-01-01T00:00:00.000Z")
    order = {
        sort: "".join(one.repo[-1] for one in find(sort=sort).candidates)
        for sort in ("downloads", "likes", "last_modified", "created_at")
    }
    assert order == {"downloads": "cba", "likes": "acb", "last_modified": "abc", "created_at": "bca"}
    assert [one.repo for one in find(author="me").candidates] == ["me/c"]
    for wrong in ({"sort": "beauty"}, {"limit": 0}, {"base_alias": ["/x"]}):
        with pytest.raises(UsageError):
            find(**wrong)
    with pytest.raises(UsageError):
        find("a b")


def test_a_limit_of_usable_ones(hub: Hub, find: Callable[..., SearchReport]) -> None:
    for number in range(40):
        kinds = [PICKLED, adapter(LOHA, peft_type="LOHA", r=4), adapter()]
        hub.add(f"org/x{number:02}", kinds[number % 3], downloads=100 - number)
    plain = find(limit=6)
    assert [one.verdict for one in plain.candidates] == ["refused", "convertible", "usable"] * 2 and plain.more
    report = find(limit=6, usable_only=True)
    assert [one.repo for one in report.candidates] == [f"org/x{n:02}" for n in range(2, 20, 3)]
    assert len(report.usable()) == 6 and report.more and report.complete
    assert [one.repo for one in find(limit=3, usable_only=True, convertible=True).candidates] == [
        "org/x01",
        "org/x02",
        "org/x04",
    ]
    every = find(limit=None, usable_only=True)
    assert len(every.usable()) == 13 and not every.more and every.scanned == 40


# ------------------------------------------------------------------------------------------------------------ commands


def test_the_command_prints_a_table_and_what_it_cost(hub: Hub, command: Callable[..., Result]) -> None:
    hub.add("org/math", adapter(), downloads=12)
    hub.add("org/law", PICKLED, downloads=3)
    hub.add("org/art", adapter(LOHA, peft_type="LOHA", r=4), downloads=2)
    result = command("--base", "org/base")
    assert result.exit_code == 0, result.output
    assert [line.split("\t") for line in result.stdout.splitlines()] == [
        ["adapter", "downloads", "rank", "targets", "MB", "licence", "verdict"],
        ["org/math", "12", "4", "q_proj, v_proj", "0.0", "apache-2.0", "usable"],
        ["org/law", "3", "?", "", "?", "apache-2.0", "refused: holds its weights as a pickle only: adapter_model.bin"],
        [
            "org/art",
            "2",
            "4",
            "q_proj, v_proj",
            "0.0",
            "apache-2.0",
            "convertible: LoHa → LoRA, with the base's shapes; by SVD",
        ],
    ]
    assert "3 adapters of org/base: 1 usable, 1 convertible, 1 refused" in result.stderr
    assert "3 repositories scanned; 1 listing call, 4 resolver calls, 0 answers from cache" in result.stderr
    assert "1 listing call, 0 resolver calls, 4 answers from cache" in command("--base", "org/base").stderr
    assert "there are more" in command("--base", "org/base", "--limit", "2").stderr
    assert len(command("--base", "org/base", "--usable-only", "--all").stdout.splitlines()) == 2
    assert command("--base", "org/base", "--convertible").exit_code == 2
    assert command("--base", "org/base", "--sort", "beauty").exit_code == 2 and SORTS == hub_search.SORTS


def test_json_has_stable_keys(hub: Hub, command: Callable[..., Result]) -> None:
    sha = hub.add("org/math", adapter(), downloads=12).refs["main"]
    result = command("--base", "org/base", "--json")
    answer = json.loads(result.stdout)
    assert answer.keys() == {
        "schema_version", "base", "listed_under", "complete", "stopped", "wait_s", "scanned", "more", "requests", "notes",
        "candidates",
    }  # fmt: skip
    assert answer["schema_version"] == 1 and answer["requests"] == {"listing": 1, "resolver": 2, "cached": 0}
    (one,) = answer["candidates"]
    assert one.keys() == {
        "name", "source", "repo", "subfolder", "revision", "verdict", "reason", "why", "fix", "kind", "ranks", "targets", "sites",
        "parameters", "bytes", "licence", "downloads", "likes", "gated", "created", "modified", "base", "relation", "under",
        "notes",
    }  # fmt: skip
    assert one["source"] == f"org/math@{sha}" and one["ranks"] == [4]


def test_nothing_found_says_what_to_try(hub: Hub, command: Callable[..., Result]) -> None:
    hub.add("org/math", adapter())
    result = command("--base", "org/bsae", "--text", "x")
    assert result.exit_code == 0 and result.stdout == ""
    for hint in ("No adapter of org/bsae was found that holds these words", "no model org/bsae", "--base-alias", "--text"):
        assert hint in result.stderr
    assert json.loads(command("--base", "org/bsae", "--json").stdout)["candidates"] == []


EVIL = "\x1b[31mred\x1b]0;title\x07\x00\u202egnp.exe\u2066\x9b2J"


def test_no_text_of_the_hub_reaches_the_terminal_as_it_is(hub: Hub, command: Callable[..., Result]) -> None:
    evil = hub.add(f"org/{EVIL}", adapter())
    evil.cards[evil.refs["main"]] = {"base_model": "org/base", "license": EVIL, "tags": [EVIL]}
    config = hub.add("org/config", adapter(base_model_name_or_path=f"/{EVIL}", target_modules=[EVIL], peft_type=EVIL))
    config.cards[config.refs["main"]] = {"base_model": "org/base", "license": [EVIL], "datasets": EVIL}
    hub.add("org/tensors", adapter({f"{PREFIX}{EVIL.replace(chr(0), '')}.lora_A.weight": torch.ones(2, 2)}))
    hub.add("org/folder", {f"{EVIL}/{name}": data for name, data in adapter().items()} | {"README.md": CARD})
    for args in (("--base", "org/base"), ("--base", "org/base", "--json"), ("--base", f"org/base{EVIL}"), ("--base", EVIL)):
        result = command(*args)
        text = "".join(c for c in result.output if c not in "\n\t")
        assert (text.isprintable() and "\\x1b" in text) or result.exit_code == 2, (args, text)
        assert not any(c in result.output for c in "\x1b\x07\x00\u202e\u2066\x9b")
    assert json.loads(command("--base", "org/base", "--json").stdout)["candidates"][0]["verdict"] == "refused"
    assert not hub.lines("(?i)%1b")


def test_offline_says_so_and_opens_no_socket(hub: Hub, command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("a socket was opened"))
    result = command("--base", "org/base")
    assert result.exit_code == 5 and "offline mode is on" in result.stderr and "recycle zoo list" in result.stderr
    assert not hub.log


# --------------------------------------------------------------------------------------------------------- collections


def test_collections(hub: Hub) -> None:
    slug = "org/my-adapters-64f9a55bb3115b4f513ec026"
    hub.collections[slug] = [
        ("model", "org/b"),
        ("dataset", "org/d"),
        ("model", "org/a"),
        ("model", "org/b"),
        ("paper", "2301.1"),
    ]
    assert hub_search.collection(slug, endpoint=hub.url) == ["org/b", "org/a"]
    assert hub_search.collection(f"https://hub.example/collections/{slug}", endpoint=hub.url) == ["org/b", "org/a"]
    with pytest.raises(HubError, match="not found"):
        hub_search.collection("org/none-0", endpoint=hub.url)
    hub.fault("/api/collections", "body", body=b"[]", times=99)
    with pytest.raises(HubError, match="no collection"):
        hub_search.collection(slug, endpoint=hub.url)
    for wrong in ("", "one", "a/../b", "a/b/c"):
        with pytest.raises(UsageError):
            hub_search.collection(wrong, endpoint=hub.url)
