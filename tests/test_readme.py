"""The README's commands and code run as they stand, on a pico model: only the paths of the base and the data are exchanged."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch
from conftest import Pico

import recycler
from recycler.base import load_base
from recycler.build import read_adapters
from recycler.engine.sites import linear_shapes
from recycler.routed import RoutedModel
from recycler.routers.base import Router
from recycler.scoring import Fitting

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf8")


def blocks(language: str, section: str) -> list[str]:
    """Fenced code of a language in a section, up to the next heading of the same level or above."""
    text = README.split(f"## {section}\n", 1)[1]
    text = re.split(r"^## ", text, flags=re.M)[0]
    found = re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)
    assert found, section
    return found


def on_pico(code: str, pico: Pico, folder: Path) -> str:
    swaps = {
        "examples/tasks/kshot/*.jsonl": f"{pico.tasks[0].parent}/*.jsonl",
        "examples/tasks/test/*.jsonl": f"{pico.tasks[0].parent}/*.jsonl",
        "examples/tasks/test/p*.jsonl": f"{pico.tasks[0].parent}/p*.jsonl",
        "examples/tasks/test/plural.jsonl": str(pico.tasks[0]),
        "examples/adapters": str(next(iter(pico.adapters.values())).parent),
        ".demo/base": str(pico.base),
        ".demo/": f"{folder}/",
        "--kshot 16": "--kshot 4",
        "plural=0.5,past_tense=0.5": "poem=0.5,law=0.5",
        '"addition"': '"math"',
        '"plural"': '"poem"',
        '"past_tense"': '"law"',
    }
    for old, new in swaps.items():
        code = code.replace(old, new)
    return code


def test_the_quickstart_commands_run(llama: Pico, tmp_path: Path) -> None:
    lines = [*blocks("sh", "Quickstart"), *blocks("sh", "See it, serve it, share it")]
    script = on_pico("set -eu\n" + "\n".join(lines), llama, tmp_path)
    assert ".demo" not in script and "examples/" not in script
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mean exact match" in done.stdout and "on't bother" in done.stdout
    assert len((tmp_path / "plural.jsonl").read_text().splitlines()) == 6
    made = ("why.html", "alike.svg", "alike.csv", "report.html", "one-adapter/export.json", "routed/evaluation.json")
    assert [name for name in made if not (tmp_path / name).is_file()] == []


def test_the_quickstart_code_runs(llama: Pico, tmp_path: Path) -> None:
    names: dict[str, object] = {}
    for section in ("Quickstart", "How it runs"):
        exec(compile(on_pico(blocks("python", section)[0], llama, tmp_path), "README.md", "exec"), names)


def test_the_example_router_routes(llama: Pico) -> None:
    module = ModuleType("loudest")
    sys.modules["loudest"] = module
    exec(compile(blocks("python", "Routers")[0], "README.md", "exec"), vars(module))
    base = load_base(str(llama.base))
    adapters = read_adapters(recycler.Zoo(llama.zoo), list(llama.adapters), base)
    fitting = RoutedModel(base, adapters)
    router = module.Loudest.fit(Fitting(fitting), None, module.Loudest.Config())
    fitting.engine.detach()
    assert isinstance(router, Router)
    model = RoutedModel(base, adapters, router)
    firing = model.weights_for({"input_ids": torch.tensor([[5, 6, 7]])})
    share = firing.share()
    assert set(firing.sites) <= set(linear_shapes(base.model)) and torch.allclose(share.sum(-1), torch.ones(1))


def test_the_tree_names_every_file() -> None:
    """Each in the section of its folder, once, and no file that is not there."""
    root = Path(__file__).parent.parent
    tree = README.split("## The tree", 1)[1].split("```")[1]
    named: dict[str, list[str]] = {}
    folder = ""
    for line in tree.splitlines():
        if found := re.match(r"( *)(\w+)/(?:\s|$)", line):
            folder = f"recycler/{found[2]}" if found[1] else found[2]
        elif found := re.match(r" +(\w+\.py) ", line):
            named.setdefault(folder, []).append(found[1])
    packages = [path.parent.name for path in (root / "recycler").glob("*/__init__.py")]
    assert set(named) == {"recycler", *(p if p in ("zoo", "routers") else f"recycler/{p}" for p in packages)}
    for folder, files in named.items():
        assert sorted(files) == sorted(p.name for p in (root / folder).glob("*.py") if p.name != "__init__.py"), folder
