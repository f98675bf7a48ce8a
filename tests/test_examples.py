"""The examples run, in a checkout with a pico base: the flat script says what the library says, the application's `routers` and
recycler's do not meet, the notebook goes through from top to bottom."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkout
import pytest
import torch

import recycler
from recycler.zoo import formats

SECONDS = 120  # a limit for processes, which take ten


@pytest.fixture(scope="module")
def checked_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout.make(tmp_path_factory.mktemp("examples") / "recycler")


@pytest.fixture
def grad() -> Iterator[None]:
    yield
    torch.set_grad_enabled(True)


def run(script: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """The names that a script leaves."""
    names: dict[str, Any] = {"__name__": "__main__", "__file__": str(script)}
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    exec(compile(script.read_text(encoding="utf8"), str(script), "exec"), names)
    return names


def test_the_flat_script_is_the_method(
    checked_out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], grad: None
) -> None:
    """It says what it found; each adapter alone is what the library's exact reader says, and all at once their mean."""
    monkeypatch.chdir(checked_out)
    names = run(checked_out / "examples" / "flat.py", monkeypatch, "--shots", "2", "--rows", "1")
    lines = capsys.readouterr().out.splitlines()
    adapters = sorted(checkout.ADAPTERS)
    assert lines[0].startswith(f"{len(adapters)} adapters on 14 linears") and lines[1] == "2 gates from 2 examples of each task"
    assert lines[2].split()[:4] == ["task", "base", "uniform", "routed"]
    assert [line.split()[0] for line in lines[3:-1]] == adapters and lines[-1].startswith("exact match")
    assert len(names["right"]) == 3 and all(0 <= share <= 1 for share in names["right"].values())
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[3:-1]]
    assert all(share >= 100 / len(adapters) for share in shares)  # who fired most has more than everybody's share

    zoo = recycler.Zoo(checked_out / "flat-zoo")
    recycler.fetch("examples/adapters", base=".demo/base", zoo=zoo).raise_for_failures()
    ours = recycler.compose(zoo, recycler.build_router("uniform", zoo=zoo))
    ids = torch.tensor([[5, 80, 12, 9, 200, 33]])
    for e, name in enumerate(adapters):
        for linear, factors in formats.read(checked_out / "examples" / "adapters" / name)[0].sites.items():
            a_RD, b_OR = names["factors"][linear][e]
            torch.testing.assert_close(b_OR @ a_RD, factors.b_OR @ factors.a_RD)
        names["forced_E"] = torch.eye(len(adapters))[e]
        with ours.only(name):
            torch.testing.assert_close(names["model"](input_ids=ids).logits, ours(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    names["forced_E"] = torch.full((len(adapters),), 1 / len(adapters))
    torch.testing.assert_close(names["model"](input_ids=ids).logits, ours(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    names["forced_E"] = None
    names["model"](input_ids=ids)
    assert torch.allclose(names["now_TE"].sum(-1), torch.ones(6)) and ((names["now_TE"] > 0).sum(-1) == 2).all()


def test_the_flat_script_refuses_what_it_cannot_read(
    checked_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grad: None
) -> None:
    folder = tmp_path / "adapters" / "plural"
    folder.mkdir(parents=True)
    config = json.loads((checked_out / "examples/adapters/plural/adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(SystemExit, match="plural is no plain LoRA"):
        run(checked_out / "examples" / "flat.py", monkeypatch, "--adapters", str(tmp_path / "adapters"))


def test_the_flat_script_is_flat() -> None:
    """Under 150 lines, and nothing imported but torch, transformers, safetensors and the standard library."""
    text = (checkout.ROOT / "examples" / "flat.py").read_text(encoding="utf8")
    assert len(text.splitlines()) < 150
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]  # type: ignore[union-attr]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers", "safetensors"}


def test_the_same_with_the_api(checked_out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(checked_out)
    out = checked_out / "api"
    names = run(checked_out / "examples" / "with_api.py", monkeypatch, "--out", str(out), "--rows", "1")
    said = capsys.readouterr().out
    assert "ridge" in said and "oracle" in said and "mean exact match" in said
    assert (out / "model" / "recycle.json").exists() and names["model"].names == tuple(sorted(checkout.ADAPTERS))


@pytest.fixture(scope="module")
def model(checked_out: Path) -> Path:
    zoo = recycler.Zoo(checked_out / "app-zoo")
    recycler.fetch(checked_out / "examples" / "adapters", base=checked_out / ".demo" / "base", zoo=zoo).raise_for_failures()
    recycler.compose(zoo, recycler.build_router("arrow", zoo=zoo), checked_out / "app-model")
    return checked_out / "app-model"


ASK = """
import json, sys
from fastapi.testclient import TestClient
import main, routers, recycler.routers
from main import app
with TestClient(app) as client:
    json.dump({
        "health": client.get("/health").json(),
        "answers": client.post("/answers", json={"prompts": ["What is 4 + 5?", "O!"], "max_new_tokens": 3}).json(),
        "empty": client.post("/answers", json={"prompts": []}).status_code,
        "theirs": routers.__file__, "ours": recycler.routers.__file__,
        "methods": len(__import__("recycler.routers.discovery").routers.discovery.methods()),
    }, sys.stdout)
"""


def test_an_application_with_routers_of_its_own(checked_out: Path, model: Path) -> None:
    """In a process of its own, from its own folder, as uvicorn starts it."""
    app = checked_out / "examples" / "fastapi_app"
    done = subprocess.run(
        [sys.executable, "-c", ASK], cwd=app, env={**os.environ, "MODEL": str(model)}, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert Path(said["theirs"]) == app / "routers" / "__init__.py" and Path(said["ours"]).parent.name == "routers"
    assert said["ours"] != said["theirs"] and said["methods"] > 15
    assert said["health"] == {"adapters": sorted(checkout.ADAPTERS)} and said["empty"] == 422
    assert [set(one) for one in said["answers"]] == [{"text", "shares"}] * 2
    assert all(sum(one["shares"].values()) == pytest.approx(1, abs=0.01) for one in said["answers"])


def test_the_notebook_runs(checked_out: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    file = checked_out / "examples" / "tour.ipynb"
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code"), "outputs of somebody's machine"
    NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(file.parent)}}).execute()
    said = [output.text for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs if "text" in output]
    assert any("What is 417 + 85?" in text for text in said) and "oracle" in said[-1]


def test_the_tour_names_every_example() -> None:
    text = (checkout.ROOT / "docs" / "tour.md").read_text(encoding="utf8")
    beside = {"adapters", "tasks", "__pycache__", "demo.py", "get_base.py", ".ipynb_checkpoints"}  # what the page itself uses
    for path in (checkout.ROOT / "examples").iterdir():
        assert path.name in beside or f"`{path.name}{'/' * path.is_dir()}`" in text, path.name
    lines = len((checkout.ROOT / "examples" / "flat.py").read_text(encoding="utf8").splitlines())
    assert f"one script of {round(lines, -1)} lines" in text
