"""The zoo on disk: what is kept, what is not, and that no failure leaves anything half done."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import files, tensors, write

from recycler.zoo import store
from recycler.zoo.errors import InputError, SecurityError, UsageError
from recycler.zoo.manifest import check_name, slug
from recycler.zoo.store import Zoo


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    return Zoo(tmp_path / "zoo")


@pytest.fixture
def math(tmp_path: Path) -> Path:
    return write(tmp_path / "math", seed=1)


@pytest.fixture
def law(tmp_path: Path) -> Path:
    return write(tmp_path / "law", tensors("up_proj", rank=2, seed=2), r=2)


def contents(zoo: Zoo) -> dict[str, bytes]:
    """The zoo's files; lock files come and go with the library that makes them."""
    return {name: data for name, data in files(zoo.path).items() if not name.endswith(".lock")}


def test_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECYCLE_ZOO", str(tmp_path / "env"))
    assert Zoo().path == tmp_path / "env"
    assert Zoo("~/x").path == Path.home() / "x"
    monkeypatch.delenv("RECYCLE_ZOO")
    assert Zoo().path == Path.home() / ".cache" / "recycle" / "zoo"


def test_looking_touches_nothing(zoo: Zoo) -> None:
    assert list(zoo) == [] and len(zoo) == 0 and "math" not in zoo and zoo.verify() == []
    zoo.remove([])
    with pytest.raises(UsageError):
        zoo.remove("math")
    assert not zoo.path.exists()


def test_add_and_read(zoo: Zoo, math: Path, law: Path) -> None:
    zoo.add(law)
    entry, receipt = zoo.add(math, revision="a" * 40, source="org/math", base_path="/base")
    assert list(zoo) == ["law", "math"] and len(zoo) == 2 and "math" in zoo
    assert zoo.entries["math"] == zoo.entry("math") == entry
    assert (entry.source, entry.revision, entry.base, entry.base_path) == (
        "org/math", "a" * 40, "org/base", "/base",
    )  # fmt: skip
    assert (entry.ranks, entry.sites, entry.kinds, entry.licence) == ((4,), 4, ("LoRA",), "apache-2.0")
    assert receipt.sites == 4
    adapter = zoo["math"]
    assert (adapter.name, adapter.source, adapter.base) == ("math", "org/math", "org/base")
    assert adapter.sha256 == entry.files["adapter_model.safetensors"]["sha256"]
    assert adapter.parameters == entry.parameters
    assert zoo.folder("math") == zoo.path / "adapters" / "math"
    assert zoo.profiles_dir == zoo.path / "profiles" and zoo.routers_dir == zoo.path / "routers"


def test_looking_at_entries_reads_no_factors(zoo: Zoo, math: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.add(math)
    monkeypatch.setattr(store.formats, "read", lambda *a, **k: pytest.fail("read"))
    assert len(zoo) == 1 and "math" in zoo and list(zoo) == ["math"] and zoo.entries["math"].sites == 4


def test_peft_loads_from_the_zoo(zoo: Zoo, math: Path) -> None:
    from peft import PeftConfig
    from safetensors.torch import load_file

    zoo.add(math)
    assert PeftConfig.from_pretrained(zoo.folder("math")).r == 4
    assert load_file(zoo.folder("math") / "adapter_model.safetensors").keys() == tensors().keys()


def test_manifest_is_small_sorted_and_complete(zoo: Zoo, math: Path, law: Path) -> None:
    zoo.add(math)
    zoo.add(law)
    text = zoo.manifest.read_text("utf-8")
    data = json.loads(text)
    assert text == json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert data["schema_version"] == 1
    assert set(data["adapters"]["law"]) == {
        "source", "revision", "base", "base_path", "base_revision", "files", "licence", "ranks", "sites",
        "parameters", "kinds", "added", "norm", "converted", "forced_base",
    }  # fmt: skip


def test_only_its_own_files_are_copied(zoo: Zoo, math: Path) -> None:
    for name in ("LICENSE", "evil.py", "optimizer.pt", "adapter_model.bin", "notes.txt"):
        (math / name).write_text("x")
    (math / "checkpoint-1").mkdir()
    zoo.add(math)
    kept = {"adapter_config.json", "adapter_model.safetensors", "README.md", "LICENSE"}
    assert {p.name for p in zoo.folder("math").iterdir()} == kept


def test_same_again_is_a_no_op(zoo: Zoo, math: Path) -> None:
    zoo.add(math)
    before = contents(zoo)
    _, receipt = zoo.add(math)
    assert any("already" in note for note in receipt.notes)
    assert contents(zoo) == before


def test_a_base_that_becomes_known_is_recorded(zoo: Zoo, math: Path) -> None:
    first, _ = zoo.add(math)
    second, receipt = zoo.add(math, base_path="/base")
    assert second.base_path == zoo.entries["math"].base_path == "/base" and second.added == first.added
    assert any("base was recorded" in note for note in receipt.notes)
    assert zoo.add(math)[0].base_path == "/base"


def test_other_contents_need_another_name(zoo: Zoo, math: Path, law: Path) -> None:
    zoo.add(math)
    before = contents(zoo)
    with pytest.raises(UsageError, match=r"another adapter called math.*--as.*recycle zoo remove math") as caught:
        zoo.add(law, "math")
    assert caught.value.exit_code == 2
    assert contents(zoo) == before
    zoo.add(law, "math-2")
    assert list(zoo) == ["math", "math-2"]


def test_twins_are_warned_about(zoo: Zoo, math: Path) -> None:
    assert not zoo.add(math)[1].warnings
    assert zoo.add(math, "sums")[1].warnings == ("it has the same weights as math",)


def test_another_process_is_noticed(zoo: Zoo, math: Path, law: Path) -> None:
    zoo.add(math)
    assert list(zoo) == ["math"]
    Zoo(zoo.path).add(law)
    assert list(zoo) == ["law", "math"]


def test_unknown_names_list_the_choices(zoo: Zoo, math: Path, law: Path) -> None:
    with pytest.raises(KeyError, match="It holds nothing yet"):
        zoo["math"]
    zoo.add(law)
    zoo.add(math)
    with pytest.raises(UsageError, match=r"maht\. It holds: math, law\.") as caught:
        zoo["maht"]
    assert isinstance(caught.value, KeyError) and "\\n" not in str(caught.value)
    assert zoo.get("maht") is None


def test_remove(zoo: Zoo, math: Path, law: Path) -> None:
    zoo.add(math)
    zoo.add(law)
    with pytest.raises(UsageError, match="tax"):
        zoo.remove(["math", "tax"])
    assert list(zoo) == ["law", "math"]
    zoo.remove("math")
    assert list(zoo) == ["law"] and not (zoo.path / "adapters" / "math").exists()
    assert zoo.verify() == []


def test_verify_finds_every_difference(zoo: Zoo, math: Path, law: Path) -> None:
    zoo.add(math)
    zoo.add(law)
    assert zoo.verify() == []
    weights = zoo.folder("math") / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    (zoo.folder("law") / "README.md").unlink()
    (zoo.folder("law") / "new.txt").write_text("x")
    (zoo.path / "adapters" / "stray").mkdir()
    found = {(p.name, p.file.split("/")[-1], p.what.split(":")[0]) for p in zoo.verify()}
    assert found == {
        ("math", "adapter_model.safetensors", "changed"),
        ("law", "README.md", "missing"),
        ("law", "new.txt", "not in zoo.json"),
        ("stray", "stray", "not in zoo.json"),
    }
    assert [p.name for p in zoo.verify(["math"])] == ["math"]
    with pytest.raises(UsageError):
        zoo.verify(["tax"])
    with pytest.raises(SecurityError, match=r"are not those fetched.*recycle zoo remove math"):
        zoo["math"]
    shutil.rmtree(zoo.folder("math"))
    assert len(zoo.verify(["math"])) == 3


@pytest.mark.parametrize("moment", ["copying", "reading", "hashing", "renaming", "writing", "interrupted"])
def test_nothing_is_left_after_a_failure(zoo: Zoo, math: Path, law: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    zoo.add(math)
    before = contents(zoo)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt if moment == "interrupted" else OSError("disk full")

    targets = {
        "copying": (store.shutil, "copyfile"),
        "reading": (store.formats, "read"),
        "hashing": (store.inspect, "hashes"),
        "renaming": (Path, "rename"),
        "writing": (Path, "replace"),
        "interrupted": (store, "write_manifest"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*targets[moment], fail)
        with pytest.raises((OSError, KeyboardInterrupt)):
            zoo.add(law)
    assert contents(zoo) == before
    assert [p.name for p in (zoo.path / "adapters").iterdir()] == ["math"]
    zoo.add(law)
    assert zoo.verify() == []


def test_bad_input_leaves_nothing(zoo: Zoo, math: Path, tmp_path: Path) -> None:
    zoo.add(math)
    before = contents(zoo)
    bad = write(tmp_path / "bad", {**tensors(), "x": torch.ones(1)})
    with pytest.raises(InputError):
        zoo.add(bad)
    assert contents(zoo) == before


def test_leftovers_of_a_killed_process_are_swept(zoo: Zoo, math: Path, law: Path) -> None:
    script = (
        "import os, sys; from recycler.zoo.store import Zoo\n"
        "with Zoo(sys.argv[1]).staging() as folder:\n"
        "    (folder / 'half').write_text('x'); os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, zoo.path]).returncode == 9
    assert list((zoo.path / "adapters").glob(".tmp-*/half"))
    shutil.copytree(math, zoo.path / "adapters" / "law")  # killed between renaming and the manifest
    with zoo.staging() as mine:
        zoo.add(law)  # sweeps what is dead, not what is alive
        assert mine.is_dir()
    assert [p.name for p in (zoo.path / "adapters").iterdir()] == ["law"]
    assert zoo.verify() == []


def test_what_a_killed_process_noted_is_finished(zoo: Zoo, math: Path, law: Path, tmp_path: Path) -> None:
    """Folders in doubt are removed if nothing lists them; nothing else is, and nothing outside of the zoo."""
    zoo.add(math)
    zoo.add(law)
    shutil.copytree(math, zoo.path / "adapters" / "half")
    shutil.copytree(math, zoo.path / "adapters" / "by-hand")  # nobody noted it, so it may be somebody's
    precious = tmp_path / "precious"
    precious.mkdir()
    (zoo.path / "adapters" / ".doubt-1").write_text("half\nmath\n../../precious\n")
    (zoo.path / "zoo.json.tmp-1").write_text("{")
    with zoo.staging():
        pass
    left = {p.name for p in (zoo.path / "adapters").iterdir()} | {p.name for p in zoo.path.iterdir()}
    assert left - {".lock"} == {"adapters", "zoo.json", "math", "law", "by-hand"} and precious.is_dir()
    assert [p.name for p in zoo.verify()] == ["by-hand"]


def test_two_processes_add_at_once(zoo: Zoo, tmp_path: Path) -> None:
    names = [f"{topic}-{n}" for topic in ("math", "law") for n in range(4)]
    for seed, name in enumerate(names):
        write(tmp_path / name, seed=seed)
    script = "import sys; from recycler.zoo.store import Zoo\nfor f in sys.argv[2:]: Zoo(sys.argv[1]).add(f)"
    halves = [[tmp_path / n for n in names if n.startswith(topic)] for topic in ("math", "law")]
    running = [subprocess.Popen([sys.executable, "-c", script, zoo.path, *half]) for half in halves]
    assert [process.wait() for process in running] == [0, 0]
    assert list(zoo) == sorted(names) and zoo.verify() == []


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '{"schema_version": 1}', '{"schema_version": 1, "adapters": {"math": {}}}',
        '{"schema_version": 1, "adapters": {"../../x": {}}}', '{"schema_version": 99, "adapters": {}}',
    ],
)  # fmt: skip
def test_broken_manifests(zoo: Zoo, math: Path, text: str) -> None:
    zoo.path.mkdir(parents=True)
    zoo.manifest.write_text(text)
    for call in (lambda: list(zoo), lambda: zoo["math"], lambda: zoo.add(math)):
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.fix and caught.value.exit_code == 3
    assert zoo.manifest.read_text() == text


def test_a_zoo_that_cannot_be_written(tmp_path: Path, math: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        Zoo(tmp_path / "file").add(math)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Math LoRA_v2", "math-lora_v2"),
        ("law", "law"),
        ("--law.", "law"),
        ("Ünïcode", "n-code"),
        ("v1.0", "v1.0"),
    ],
)
def test_slugs(text: str, name: str) -> None:
    assert slug(text) == name


@pytest.mark.parametrize("name", ["", "Math", "a/b", "..", ".hidden", "con", "nul.txt", "com1", "a.", "a" * 97, "a\0"])
def test_unusable_names(name: str) -> None:
    with pytest.raises(UsageError, match="--as"):
        check_name(name)


def test_the_base_keeps_its_name() -> None:
    for give in (check_name, slug):
        with pytest.raises(UsageError, match=r"'base' cannot name an adapter.*is the base itself.*--as"):
            give("base")
    assert slug("Base-2") == "base-2"


def test_unusable_folder_names_are_errors() -> None:
    for text in ("CON", "日本", "..."):
        with pytest.raises(UsageError):
            slug(text)


def test_importing_is_light() -> None:
    script = (
        "import sys, recycler.zoo, recycler.zoo.store, recycler.intake.fetching\n"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
