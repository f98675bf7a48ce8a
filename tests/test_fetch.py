"""Sources → zoo: naming, comparing with the base, many sources at once, dry runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from adapters import SHAPES, files, tensors, write
from hub_server import Hub, running

import recycler.base
from recycler.fetching import FetchReport, fetch
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
    assert events == [("start", "math"), ("kept", "math"), ("start", "law"), ("kept", "law")]
    assert "math: 8 tensors → 4 sites, rank 4, LoRA ×2, nothing left over" in str(report)
    assert "NOT CHECKED" not in str(report)


def test_a_folder_of_folders(zoo: Zoo, pile: Path) -> None:
    (pile / "notes").mkdir()
    assert fetch(pile, zoo=zoo).names == ["law", "math"]


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
    assert set(kept) == {"name", "source", "revision", "base", "base_path", "bytes", "kept", "receipt"}
    assert (failed["error"], failed["exit_code"], failed["source"]) == ("HubError", 5, "org/absent")


def test_an_empty_report_has_no_failures() -> None:
    FetchReport(()).raise_for_failures()
    assert issubclass(PartialError, RecycleError)
