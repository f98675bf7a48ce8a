"""Sources → zoo: naming, comparing with the base, many sources at once, dry runs."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import SHAPES, files, tensors, write
from hub_server import Hub, running

import recycler.base
from recycler.intake.fetching import FetchReport, fetch
from recycler.zoo import formats
from recycler.zoo.errors import HubError, InputError, PartialError, RecycleError, SecurityError, UsageError
from recycler.zoo.store import Zoo


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    return Zoo(tmp_path / "zoo")


@pytest.fixture
def pile(tmp_path: Path) -> Path:
    """A folder with the adapters math and law."""
    write(tmp_path / "pile" / "math", seed=1)
    write(tmp_path / "pile" / "law", tensors("up_proj", rank=2, seed=2), r=2)
    return tmp_path / "pile"


@pytest.fixture
def bases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Mapping[str, tuple[int, int]]]:
    """The bases that can be had: org/base, and a copy of it in a folder."""
    (tmp_path / "copy").mkdir()
    known: dict[str, Mapping[str, tuple[int, int]]] = {"org/base": SHAPES, str(tmp_path / "copy"): SHAPES}

    def linear_shapes(base: str) -> Mapping[str, tuple[int, int]]:
        if base not in known:
            raise HubError(f"{base} could not be had.")
        return known[base]

    monkeypatch.setattr(recycler.base, "linear_shapes", linear_shapes)
    return known


@pytest.fixture
def hub(tmp_path: Path, pile: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(monkeypatch, tmp_path / "cache") as server:
        for name in ("math", "law"):
            server.add(f"org/{name}", pile / name)
        yield server


pytestmark = pytest.mark.usefixtures("bases")


def test_folders(zoo: Zoo, pile: Path) -> None:
    events = []
    report = fetch(
        [pile / "math", str(pile / "law")],
        zoo=zoo,
        on_event=lambda stage, name, text: events.append((stage, name)),
    )
    assert report.names == ["math", "law"] and list(zoo) == ["law", "math"] and not report.failures
    assert [(e.source, e.base, e.base_path) for e in zoo.entries.values()] == [
        (str(pile / name), "org/base", None) for name in ("law", "math")
    ]
    assert sorted(events) == [("kept", "law"), ("kept", "math"), ("start", "law"), ("start", "math")]
    assert all(events.index(("start", name)) < events.index(("kept", name)) for name in ("math", "law"))
    assert "math: 8 tensors → 4 sites, rank 4, LoRA ×2, nothing left over" in str(report)
    assert "NOT CHECKED" not in str(report)


def test_a_folder_of_folders(zoo: Zoo, pile: Path) -> None:
    (pile / "notes").mkdir()
    write(pile / "finance" / "tax", seed=3)
    write(pile / "finance" / "tax" / "checkpoint-1", seed=4)  # inside an adapter: part of its training, not entered
    write(pile / ".hidden", seed=5)
    write(pile / "a" / "b" / "c" / "deep", seed=6)
    write(pile / "a" / "b" / "c" / "d" / "deeper", seed=7)
    (pile / "linked").symlink_to(write(pile.parent / "elsewhere" / "x", seed=8))  # an adapter itself, so it is meant
    (pile / "loop").symlink_to(pile)
    assert fetch(pile, zoo=zoo).names == ["a-b-c-deep", "finance-tax", "law", "linked", "math"]


def test_too_many_folders(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recycler.intake.jobs.MAX_FOLDERS", 5)
    for number in range(6):
        (tmp_path / "many" / str(number)).mkdir(parents=True)
    with pytest.raises(InputError, match="more than 5 folders"):
        fetch(tmp_path / "many", zoo=zoo)


def test_the_hub(zoo: Zoo, hub: Hub) -> None:
    report = fetch(["org/math", "org/law@main"], "org/base", zoo, endpoint=hub.url)
    assert report.names == ["math", "law"]
    for name, entry in zoo.entries.items():
        repo = hub.repos[f"org/{name}"]
        assert (entry.source, entry.revision) == (repo.id, repo.refs["main"])
        assert set(entry.files) == set(repo.commits[repo.refs["main"]])
    assert zoo["math"].revision == hub.repos["org/math"].refs["main"]


def test_a_fetched_zoo_needs_no_network(zoo: Zoo, hub: Hub) -> None:
    fetch("org/math", zoo=zoo, endpoint=hub.url)
    asked = len(hub.log)
    assert zoo["math"].sites and not zoo.verify()
    assert len(hub.log) == asked


def test_what_is_held_is_not_fetched_again(zoo: Zoo, hub: Hub, tmp_path: Path) -> None:
    revision = hub.repos["org/math"].refs["main"]
    fetch(["org/math", "org/law"], "org/base", zoo, endpoint=hub.url)
    before = {k: v for k, v in files(zoo.path).items() if not k.endswith(".lock")}
    asked = len(hub.log)
    report = fetch(["org/math", "org/law"], "org/base", zoo, endpoint=hub.url)
    assert sorted(r.path.split("?")[0] for r in hub.log[asked:]) == ["/api/models/org/law", "/api/models/org/math"]
    assert "math is in the zoo already" in str(report) and report.names == ["math", "law"]
    asked = len(hub.log)
    fetch(f"org/math@{revision}", "org/base", zoo, endpoint=hub.url)
    assert len(hub.log) == asked  # at a commit, nothing can have changed
    assert {k: v for k, v in files(zoo.path).items() if not k.endswith(".lock")} == before
    fetch(f"org/math@{revision}", zoo=Zoo(tmp_path / "other"), endpoint=hub.url)
    assert [r.line.split("?")[0] for r in hub.log[asked:]] == [f"GET /api/models/org/math/revision/{revision}"]  # files: cached


def test_a_damaged_copy_is_put_back(zoo: Zoo, hub: Hub) -> None:
    fetch("org/math", zoo=zoo, endpoint=hub.url)
    before = zoo.manifest.read_bytes()
    (zoo.folder("math") / "adapter_model.safetensors").write_bytes(b"damaged")
    (zoo.folder("math") / "README.md").unlink()
    report = fetch("org/math", zoo=zoo, endpoint=hub.url)
    assert "was damaged in the zoo, and is whole again" in str(report)
    assert zoo.verify() == [] and zoo.manifest.read_bytes() == before


def test_a_base_that_was_said_once_stays(zoo: Zoo, tmp_path: Path) -> None:
    folder = write(tmp_path / "math", base_model_name_or_path="/home/anon/models/base")
    fetch(folder, "org/base", zoo)
    fetch(folder, zoo=zoo)
    assert zoo.entry("math").base == "org/base"


def test_many_at_once(zoo: Zoo, hub: Hub, tmp_path: Path) -> None:
    """As many as asked for, and no more; results in the order of the sources, whoever is done first."""
    for seed in range(6):
        hub.add(f"org/topic-{seed}", write(tmp_path / f"t{seed}", seed=seed + 10))
    hub.fault("GET /repos/", "drip", times=99, keep=400, seconds=0.03)
    names = [f"topic-{seed}" for seed in reversed(range(6))]
    kept: list[str] = []
    seen: list[tuple[int, str]] = []
    report = fetch(
        [f"org/{name}" for name in names], zoo=zoo, endpoint=hub.url, jobs=3,
        on_event=lambda stage, name, text: kept.append(name) if stage == "kept" else None,
        progress=lambda steps, what: lambda count=1, note="": seen.append((count, note)),
    )  # fmt: skip
    assert report.names == names and sorted(kept) == sorted(names)
    spans = {}
    for request in hub.log:
        if found := re.search("topic-[0-9]", request.path):
            first, _ = spans.get(found[0], (request.at, 0.0))
            spans[found[0]] = first, request.at
    together = max(sum(a <= moment <= b for a, b in spans.values()) for moment, _ in spans.values())
    assert together == 3
    assert sum(count for count, _ in seen) == 6
    total = sum(one.bytes for one in report.fetched) / 1e6
    assert seen[-1][1] == f"{total:.1f} of {total:.1f} MB"


def test_a_rate_limit_is_told(zoo: Zoo, hub: Hub) -> None:
    hub.fault("GET /api/models/org/math", "status", status=429, headers={"RateLimit": '"api";r=0;t=9'})
    events: list[tuple[str, str]] = []
    fetch(["org/math", "org/law"], zoo=zoo, endpoint=hub.url, on_event=lambda stage, name, text: events.append((stage, text)))
    assert ("waiting", "the Hub asks to wait 10 s; everything waits") in events and len(zoo) == 2


def test_one_failure_among_many_at_once(zoo: Zoo, hub: Hub, tmp_path: Path) -> None:
    hub.fault("GET /api/models/org/math", "stall", times=9)
    hub.add("org/gone", {"README.md": b""}, disabled=True)
    patience_s = 0.3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recycler.zoo.patience.TIMEOUT_S", patience_s)
        report = fetch(["org/math", "org/gone", "org/law"], zoo=zoo, endpoint=hub.url)
    assert report.names == ["law"] and [f.name for f in report.failures] == ["math", "gone"]
    assert {f.error.exit_code for f in report.failures} == {5}


def test_a_fault_in_the_program_stops_nobody_else(zoo: Zoo, pile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = formats.read

    def read(folder: Path, name: str, **options: Any) -> Any:
        if name == "law":
            raise ZeroDivisionError("oops")
        return real(folder, name, **options)

    monkeypatch.setattr(formats, "read", read)
    report = fetch(pile, zoo=zoo)
    assert report.names == ["math"] == list(zoo) and zoo.verify() == []
    assert "A fault in this program: ZeroDivisionError: oops." in str(report.failures[0].error)
    assert report.failures[0].error.exit_code == 1
    with pytest.raises(ZeroDivisionError):  # alone, with its traceback
        fetch(pile / "law", zoo=zoo)
    assert zoo.verify() == []


@pytest.mark.parametrize("when", ["listing", "downloading"])
def test_interrupted(zoo: Zoo, hub: Hub, tmp_path: Path, when: str) -> None:
    """Ctrl-C while one thread waits for a Hub that says nothing: what was finished stays, nothing else is left, and it is soon."""
    hub.fault(
        "GET /api/models/org/law" if when == "listing" else "GET /repos/org/law", "stall", times=9, keep=int(when != "listing")
    )

    def event(stage: str, name: str, text: str) -> None:
        if stage == "kept":
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fetch(["org/law", "org/math"], zoo=zoo, endpoint=hub.url, on_event=event)
    assert time.monotonic() - began < 9  # a silent Hub is given ten seconds and more
    assert list(zoo) == ["math"] and zoo.verify() == []
    assert [p.name for p in (zoo.path / "adapters").iterdir()] == ["math"]


def test_adapters_of_a_base(zoo: Zoo, hub: Hub, tmp_path: Path) -> None:
    card = "---\nbase_model: org/base\nlibrary_name: peft\ntags: [german]\n---\n"
    for seed, name in enumerate(["org/one", "you/math", "org/two", "org/three"]):
        hub.add(name, write(tmp_path / f"s{seed}", seed=20 + seed, card=card), downloads=10 - seed)
    hub.add("org/old", {"README.md": card.encode(), "adapter_config.json": b"{}", "adapter_model.bin": b"x"}, downloads=99)
    report = fetch(base="org/base", zoo=zoo, limit=3, text="german", endpoint=hub.url)
    assert report.names == ["one", "math", "two"]  # usable ones, the most downloaded first
    assert zoo.entry("math").source == "you/math" and zoo.entry("one").revision == hub.repos["org/one"].refs["main"]
    assert any("calls" in note for note in report.notes)
    fetch("org/math", zoo=zoo, names=["three"], endpoint=hub.url)  # a name is taken before the search comes to it
    again = fetch(base="org/base", zoo=zoo, limit=4, text="german", endpoint=hub.url)
    assert again.names == ["one", "math", "two", "org-three"]
    plan = fetch(
        base="org/base", zoo=Zoo(tmp_path / "none"), limit=2, author="you", text="german", dry_run=True, endpoint=hub.url
    )
    assert plan.names == ["math"] and plan.bytes == sum(f["size"] for f in zoo.entry("math").files.values())
    with pytest.raises(InputError, match="Nothing was found"):
        fetch(base="org/base", zoo=zoo, limit=4, text="klingon", endpoint=hub.url)


def test_a_collection(zoo: Zoo, hub: Hub, tmp_path: Path) -> None:
    hub.add("you/math", write(tmp_path / "theirs", seed=30))
    hub.collections["org/best-1a2b"] = [
        ("model", "org/math"),
        ("dataset", "org/rows"),
        ("model", "you/math"),
        ("model", "org/gone"),
    ]
    report = fetch(collection="org/best-1a2b", zoo=zoo, endpoint=hub.url)
    assert report.names == ["org-math", "you-math"] and [f.name for f in report.failures] == ["gone"]
    assert fetch(collection="org/best-1a2b", zoo=zoo, endpoint=hub.url).names == ["org-math", "you-math"]
    with pytest.raises(HubError):
        fetch(collection="org/none-1", zoo=zoo, endpoint=hub.url)


def test_offline(zoo: Zoo, hub: Hub, pile: Path, tmp_path: Path) -> None:
    fetch("org/math", zoo=Zoo(tmp_path / "other"), endpoint=hub.url)  # fills the client's cache
    asked = len(hub.log)
    report = fetch(
        ["org/math", "org/law", pile / "law"], zoo=zoo, names=["math", "law", "here"], offline=True, endpoint=hub.url
    )
    assert report.names == ["math", "here"] and len(hub.log) == asked
    assert zoo.entry("math").revision == hub.repos["org/math"].refs["main"] and zoo.verify() == []
    with pytest.raises(HubError, match="org/law was not fetched: offline mode is on") as caught:
        fetch("org/law", zoo=zoo, offline=True, endpoint=hub.url)
    assert caught.value.exit_code == 5 and len(hub.log) == asked
    with pytest.raises(HubError, match=r"(?s)2 of 2.*org/law.*org/code"):  # all that is missing is listed
        fetch(["org/law", "org/code"], zoo=zoo, offline=True, endpoint=hub.url).raise_for_failures()
    fetch("org/law", zoo=zoo, endpoint=hub.url)  # the mode ends with the call
    assert len(hub.log) > asked


def test_a_renamed_repository(zoo: Zoo, hub: Hub) -> None:
    hub.renamed["old/math"] = "org/math"
    report = fetch("old/math", zoo=zoo, endpoint=hub.url)
    assert "old/math is now called org/math" in str(report) and zoo.entry("math").source == "org/math"


def test_bad_arguments(zoo: Zoo, pile: Path, tmp_path: Path) -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("exclude each other", {"sources": pile, "lock": tmp_path / "zoo.json"}),
        ("exclude each other", {"limit": 3, "base": "org/base", "collection": "org/x"}),
        ("--as names sources", {"names": ["x"], "limit": 3, "base": "org/base"}),
        ("--limit needs --base", {"limit": 3}),
        ("narrow a search", {"sources": pile, "text": "german"}),
        ("is no layout", {"sources": pile, "layout": "zip"}),
        ("sources at once", {"sources": pile, "jobs": 0}),
        ("nothing to fetch", {}),
    ]
    for text, arguments in wrong:
        with pytest.raises(UsageError, match=text):
            fetch(zoo=zoo, **arguments)
    assert not zoo.path.exists()


def test_names(zoo: Zoo, pile: Path, tmp_path: Path) -> None:
    fetch([pile / "math", pile / "law"], zoo=zoo, names=["sums", "cases"])
    assert list(zoo) == ["cases", "sums"]
    with pytest.raises(UsageError, match="1 names were given for 2 adapters"):
        fetch(pile, zoo=zoo, names=["sums"])
    with pytest.raises(UsageError, match="cannot name an adapter"):
        fetch(pile / "math", zoo=zoo, names=["A/B"])
    with pytest.raises(UsageError, match="nothing to fetch"):
        fetch([], zoo=zoo)
    for run in ("a", "b"):
        write(tmp_path / run / "checkpoint")
    with pytest.raises(UsageError, match=r"called checkpoint \(.*a/checkpoint, .*b/checkpoint\).*--as"):
        fetch([tmp_path / "a" / "checkpoint", tmp_path / "b" / "checkpoint"], zoo=zoo)
    assert list(zoo) == ["cases", "sums"]


def test_one_bad_source_raises_its_error(zoo: Zoo, pile: Path) -> None:
    (pile / "math" / "adapter_model.safetensors").write_bytes(b"PK\x03\x04" + b"\0" * 50)
    with pytest.raises(SecurityError, match="looks like a pickle"):
        fetch(pile / "math", zoo=zoo)
    with pytest.raises(InputError, match="not a folder"):
        fetch("./absent", zoo=zoo)
    assert not zoo.manifest.exists()


def test_one_bad_source_among_many(zoo: Zoo, hub: Hub, pile: Path, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad", {**tensors(), "x": torch.ones(1)})
    report = fetch([bad, "org/absent", "org/math", pile / "law"], zoo=zoo, endpoint=hub.url)
    assert report.names == ["math", "law"] == sorted(zoo, reverse=True)
    assert [type(f.error) for f in report.failures] == [InputError, HubError]
    with pytest.raises(PartialError, match=r"(?s)2 of 4 adapters.*bad.*org/absent was not found") as caught:
        report.raise_for_failures()
    assert caught.value.exit_code == 6
    assert zoo.verify() == []


def test_all_bad(zoo: Zoo, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="2 of 2") as same:
        fetch(["org/a", "org/b"], zoo=zoo, endpoint=hub.url).raise_for_failures()
    assert same.value.exit_code == 5
    with pytest.raises(PartialError, match="2 of 2"):
        fetch(["org/a", tmp_path / "absent"], zoo=zoo, endpoint=hub.url).raise_for_failures()


def test_bad_input_leaves_the_zoo_as_it_was(zoo: Zoo, pile: Path, tmp_path: Path) -> None:
    fetch(pile, zoo=zoo)
    before = {k: v for k, v in files(zoo.path).items() if not k.endswith(".lock")}
    bad = write(tmp_path / "bad", r=9)
    with pytest.raises(InputError, match="ambiguous"):
        fetch(bad, zoo=zoo)
    assert {k: v for k, v in files(zoo.path).items() if not k.endswith(".lock")} == before


def test_files_that_cannot_be_read(zoo: Zoo, pile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied", "weights")

    monkeypatch.setattr("shutil.copyfile", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        fetch(pile / "math", zoo=zoo)


def test_a_folder_as_a_copy_of_the_base(zoo: Zoo, pile: Path, tmp_path: Path) -> None:
    report = fetch(pile, tmp_path / "copy", zoo)
    assert [(e.base, e.base_path) for e in zoo.entries.values()] == [("org/base", str(tmp_path / "copy"))] * 2
    assert "used as a copy of org/base" in str(report)


def test_a_base_that_is_declared_by_its_path(zoo: Zoo, tmp_path: Path) -> None:
    folder = write(tmp_path / "math", base_model_name_or_path=str(tmp_path / "copy"))
    (note,) = fetch(folder, tmp_path / "copy", zoo).fetched[0].receipt.notes
    assert note == f"fits the base in {tmp_path / 'copy'}"  # said once


def test_a_folder_that_is_another_base(zoo: Zoo, pile: Path, bases: dict[str, object], tmp_path: Path) -> None:
    bases[str(tmp_path / "copy")] = {path: (2 * out, width) for path, (out, width) in SHAPES.items()}
    with pytest.raises(InputError, match="differ in shape"):
        fetch(pile / "math", tmp_path / "copy", zoo)
    assert not zoo.manifest.exists()


def test_another_hub_id_is_refused_even_where_it_fits(zoo: Zoo, pile: Path, bases: dict[str, object]) -> None:
    bases["org/other"] = SHAPES
    with pytest.raises(InputError, match=r"trained for org/base, not for org/other.*--base org/base"):
        fetch(pile / "math", "org/other", zoo)
    bases["Org/Base"] = SHAPES  # the Hub does not mind the case
    assert fetch(pile / "math", "Org/Base", zoo).names == ["math"]


@pytest.mark.parametrize("declared", [None, "/home/anon/models/base"])
def test_bases_that_are_not_on_the_hub(zoo: Zoo, tmp_path: Path, declared: str | None) -> None:
    folder = write(tmp_path / "math", base_model_name_or_path=declared)
    report = fetch(folder, zoo=zoo)
    assert "NOT CHECKED" in " ".join(report.fetched[0].receipt.warnings)
    report = fetch(folder, "org/base", zoo, names=["sums"])
    assert zoo.entries["sums"].base == "org/base"
    assert "fits the shapes of org/base" in str(report)


def test_a_base_that_cannot_be_had(zoo: Zoo, pile: Path, bases: dict[str, object]) -> None:
    bases.clear()
    report = fetch(pile / "math", zoo=zoo)
    assert "NOT CHECKED against its base org/base" in str(report) and "math" in zoo
    with pytest.raises(HubError):  # asked for by name, it must be had
        fetch(pile / "law", "org/base", zoo)


def test_renamed_modules_are_refused(zoo: Zoo, pile: Path, bases: dict[str, object]) -> None:
    bases["org/base"] = {p.replace("model.", "model.language_model.", 1): s for p, s in SHAPES.items()}
    with pytest.raises(InputError, match=r"4 of 4 sites are not in it.*prefix"):
        fetch(pile / "math", zoo=zoo)


def test_a_dry_run_keeps_nothing(zoo: Zoo, hub: Hub, pile: Path) -> None:
    report = fetch(["org/math", pile / "law"], zoo=zoo, dry_run=True, endpoint=hub.url)
    assert not zoo.path.exists()
    assert report.names == ["math", "law"] and not any(one.kept for one in report.fetched)
    assert "targets q_proj, v_proj, base org/base; nothing was kept" in str(report)
    assert report.fetched[0].revision == hub.repos["org/math"].refs["main"]
    real = fetch(["org/math", pile / "law"], zoo=zoo, endpoint=hub.url)
    for planned, kept in zip(report.fetched, real.fetched, strict=True):
        assert planned.receipt == kept.receipt
        assert planned.bytes == kept.bytes == sum(f["size"] for f in zoo.entries[kept.name].files.values())
    again = fetch("org/math", zoo=zoo, dry_run=True, endpoint=hub.url)
    assert "the zoo holds math" in str(again)


def test_a_dry_run_refuses_as_a_real_one(zoo: Zoo, hub: Hub, tmp_path: Path, bases: dict[str, object]) -> None:
    hub.add("org/odd", write(tmp_path / "odd", bias="all"))
    bases["org/base"] = {}
    for source, text in (("org/odd", "bias"), ("org/math", "not in it")):
        with pytest.raises(InputError, match=text):
            fetch(source, zoo=zoo, dry_run=True, endpoint=hub.url)
    assert not hub.lines(r"^GET /repos/.*") or all(
        "range" in {h.lower() for h in r.headers} for r in hub.log if r.origin == "cdn"
    )


def test_json(zoo: Zoo, hub: Hub, pile: Path) -> None:
    report = fetch([pile / "math", "org/absent"], zoo=zoo, endpoint=hub.url)
    data = json.loads(json.dumps(report.to_json()))
    assert data["schema_version"] == 1 and data["dry_run"] is False
    (kept,), (failed,) = data["fetched"], data["failures"]
    assert set(kept) == {
        "name", "source", "revision", "base", "base_path", "bytes", "kept", "receipt", "licence", "converted", "forced_base",
        "plan",
    }  # fmt: skip
    assert data["bytes"] == kept["bytes"] and data["notes"] == []
    assert (failed["error"], failed["exit_code"], failed["source"]) == ("HubError", 5, "org/absent")


def test_an_empty_report_has_no_failures() -> None:
    FetchReport(()).raise_for_failures()
    assert issubclass(PartialError, RecycleError)
