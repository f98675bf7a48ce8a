"""`recycle fetch` as it is typed: what goes to stdout and stderr, and the exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from adapters import tensors, write
from click.testing import CliRunner, Result

from recycler.cli import main
from recycler.zoo.store import Zoo


@pytest.fixture
def pile(tmp_path: Path) -> Path:
    for seed, name in enumerate(("math", "law")):
        write(tmp_path / "pile" / name, seed=seed, base_model_name_or_path=None)
    return tmp_path / "pile"


def recycle(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_names_are_data_and_the_rest_is_talk(pile: Path, tmp_path: Path) -> None:
    plan = recycle("fetch", pile, "--zoo", tmp_path / "zoo", "--dry-run")
    assert plan.exit_code == 0 and plan.stdout == "law\nmath\n" and not (tmp_path / "zoo").exists()
    size = sum(p.stat().st_size for p in pile.rglob("*") if p.is_file())
    assert f"2 adapters, {size / 1e6:.1f} MB" in plan.stderr and "nothing was kept" in plan.stderr
    done = recycle("fetch", pile, "--zoo", tmp_path / "zoo", "--jobs", 1)
    assert done.exit_code == 0 and done.stdout == "law\nmath\n"
    assert "fetching" not in done.stderr and "\x1b" not in done.stderr  # no bar where there is no terminal
    data = json.loads(recycle("fetch", pile, "--zoo", tmp_path / "zoo", "--json").stdout)
    assert [one["name"] for one in data["fetched"]] == ["law", "math"] and data["bytes"] > 0


def test_a_lock(pile: Path, tmp_path: Path) -> None:
    recycle("fetch", pile, "--zoo", tmp_path / "theirs")
    done = recycle("fetch", "--from", tmp_path / "theirs" / "zoo.json", "--zoo", tmp_path / "mine")
    assert done.exit_code == 0 and done.stdout == "law\nmath\n"
    assert Zoo(tmp_path / "mine").manifest.read_bytes() == Zoo(tmp_path / "theirs").manifest.read_bytes()
    (pile / "law" / "adapter_config.json").write_text("{}")
    changed = recycle("fetch", "--from", tmp_path / "theirs" / "zoo.json", "--zoo", tmp_path / "other")
    assert changed.exit_code == 6 and "not what the lock describes" in changed.stderr and changed.stdout == "math\n"


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        ([], 2, "nothing to fetch"),
        (["PILE", "--limit", "3"], 2, "exclude each other"),
        (["--limit", "3"], 2, "--limit needs --base"),
        (["PILE", "--jobs", "0"], 2, "--jobs"),
        (["PILE", "--layout", "zip"], 2, "--layout"),
        (["PILE", "--energy", "2"], 2, "--energy"),
        (["PILE", "--as", "x"], 2, "1 names were given for 2 adapters"),
        (["PILE", "--license-allow", "apche-2.0"], 2, "Did you mean apache-2.0"),
        (["PILE", "--license-allow", "cc0-1.0"], 3, "is not among those allowed"),
        (["BARE", "--license-allow", "mit", "--strict"], 3, "states no licence"),
        (["PILE", "--base", "./nowhere"], 3, "is not a folder"),
        (["--from", "absent.json"], 3, "There is no lock absent.json"),
        (["org/math", "--offline"], 5, "offline mode is on, and it is not in the client's cache"),
        (["--base", "org/base", "--limit", "2", "--offline"], 5, "offline"),
        (["--collection", "org/best-1", "--offline"], 5, "offline"),
    ],
)
def test_exit_codes(pile: Path, tmp_path: Path, args: list[str], code: int, text: str) -> None:
    bare = write(tmp_path / "bare", tensors(seed=7), card=None, base_model_name_or_path=None)
    given = [{"PILE": str(pile), "BARE": str(bare)}.get(arg, arg) for arg in args]
    done = recycle("fetch", *given, "--zoo", tmp_path / "zoo")
    assert done.exit_code == code and text in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "zoo" / "zoo.json").exists()


def test_json_of_one_source_that_is_refused(tmp_path: Path) -> None:
    bad = write(tmp_path / "bad", peft_type="IA3")
    done = recycle("fetch", bad, "--zoo", tmp_path / "zoo", "--json")
    (failure,) = json.loads(done.stdout)["failures"]
    assert done.exit_code == failure["exit_code"] == 3 and "IA3" in failure["message"] and failure["source"] == str(bad)
