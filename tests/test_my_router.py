"""examples/my_router.py, installed as a stranger's package would be, keeps every promise of tests/test_conformance.py."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import test_conformance
import torch
from click.testing import CliRunner
from conftest import Pico

import recycler
from recycler.cli import main
from recycler.routers import discovery
from recycler.routers.discovery import methods
from recycler.zoo.errors import InputError

ROOT = Path(__file__).parent.parent
GROUP = "recycler.routers"
INVARIANTS = [
    check
    for name, check in vars(test_conformance).items()
    if name.startswith("test_") and "method" in inspect.signature(check).parameters
]


def install(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> None:
    """What pip would have left."""
    monkeypatch.setattr(discovery, "entry_points", lambda group: points if group == GROUP else ())
    methods.cache_clear()


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    install(monkeypatch, EntryPoint("my_router", "my_router:MyRouter", GROUP))
    yield "my_router"
    methods.cache_clear()


@pytest.mark.parametrize("check", INVARIANTS, ids=lambda check: check.__name__)
def test_it_keeps_the_promises(check: Callable[..., None], world: Pico, mine: str, tmp_path: Path) -> None:
    asked = inspect.signature(check).parameters
    known: dict[str, Any] = {"world": world, "method": mine, "tmp_path": tmp_path}
    for name in ("math", "law", "code", "poem") if "name" in asked else ("",):
        check(**{key: {**known, "name": name}[key] for key in asked})


def test_the_promises_are_all_there() -> None:
    assert len(INVARIANTS) >= 10


def test_the_command_line_knows_it(llama: Pico, mine: str, tmp_path: Path) -> None:
    assert "my_router" in CliRunner().invoke(main, ["routers"]).stdout
    options = ["-o", "per_norm=true", "-o", "top_k=1", "--zoo", str(llama.zoo), "--out", str(tmp_path / "gates")]
    done = CliRunner().invoke(main, ["build-router", mine, *options])
    assert done.exit_code == 0, done.output
    router = discovery.load_router(tmp_path / "gates")
    assert router.config.per_norm and router.config.top_k == 1
    zoo = recycler.Zoo(llama.zoo)
    firing = recycler.compose(zoo, router).weights_for({"input_ids": torch.tensor([[5, 6, 7]])})
    assert set(firing.sites["model.layers.0.mlp.down_proj"].unique().tolist()) == {0.0, 1.0}


def test_it_scores_what_it_says(llama: Pico, mine: str) -> None:
    router = recycler.build_router(mine, zoo=recycler.Zoo(llama.zoo))
    model = test_conformance.routed(llama, "arrow")
    group = model.engine.groups[0]
    x_BTD = torch.randn(1, 3, group.width)
    held = recycler.Zoo(llama.zoo)[router.adapters[0]].sites[group.name]
    expected = (x_BTD @ (held.b_OR @ held.a_RD).T).norm(dim=-1)
    torch.testing.assert_close(router.score(group, group.name, x_BTD)[..., 0], expected, rtol=1e-4, atol=1e-4)


def test_a_name_that_would_not_load_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved router names its module; an entry point of another name could not be found again."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    install(monkeypatch, EntryPoint("loudest", "my_router:MyRouter", GROUP))
    with pytest.raises(InputError, match=r"loudest is defined in my_router.py.*my_router = "):
        methods()
    methods.cache_clear()
