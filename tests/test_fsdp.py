"""A base in parts over two processes (gloo, on the CPU): the steps of one process, the same router, saved once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from conftest import Pico
from safetensors.torch import load_file, save_file

import recycler
from recycler import sharding
from recycler.base import Base, load_base
from recycler.build import read_adapters
from recycler.profiles import Profile
from recycler.routed import RoutedModel
from recycler.routers import phatgoose, training, xlora
from recycler.routers.discovery import load_router
from recycler.routers.phatgoose import Phatgoose, PhatgooseConfig
from recycler.routers.xlora import XLora, XLoraConfig
from recycler.scoring import Fitting
from recycler.zoo.errors import UsageError

NAMES = ("code", "law", "math", "poem")
# rows=5 and 1: batches that two processes cannot halve. tokens=120: several batches a step.
FITS: dict[str, tuple[Any, Any]] = {
    "xlora": (XLora, XLoraConfig(steps=4, rows=5, tokens=120, lr=1e-2)),
    "layerwise": (XLora, XLoraConfig(steps=3, rows=6, layerwise=True, init="random", depth=2, size=8, dropout=0.0, lr=1e-2)),
    "one_row": (XLora, XLoraConfig(steps=3, rows=1, lr=1e-2)),
    "phatgoose": (Phatgoose, PhatgooseConfig(steps=3, rows=5, tokens=120, lr=1e-2)),
}


def fits(base: Base, zoo: Path, tasks: Sequence[Path], out: Path) -> None:
    """Every one of FITS: its losses and its router, and the base afterwards, into `out`. Runs alone, and as one of two processes."""
    shots = recycler.Shots.from_files(*tasks).sample(4)
    profile = Profile(NAMES, shots, torch.ones(len(NAMES) + 1, len(shots), 4), assigned={name: (name,) for name in NAMES})
    model = RoutedModel(base, read_adapters(recycler.Zoo(zoo), NAMES, base))
    curves: dict[str, list[float]] = {}
    logits: dict[str, torch.Tensor] = {}
    for name, (cls, config) in FITS.items():

        def descend(*args: Any, name: str = name) -> list[float]:
            curves[name] = training.descend(*args)
            return curves[name]

        for module in (xlora, phatgoose):
            module.descend = descend  # type: ignore[attr-defined]
        router = cls.fit(Fitting(model), profile, config)
        save_file(router.tensors(), out / f"{name}.safetensors")
        model.use(router)  # a forward that it decides; X-LoRA's runs the bare base beside it
        logits[name] = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.detach()
        model.use(None)
    for module in (xlora, phatgoose):
        module.descend = training.descend  # type: ignore[attr-defined]
    states_BTH, _ = model.reading.states({"input_ids": torch.tensor([[5, 6, 7, 8]])}, 0.5)
    model.engine.detach()
    whole = {name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in base.model.named_parameters()}
    held = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in base.model.parameters())
    save_file(whole, out / "base.safetensors")
    save_file({**logits, "states": states_BTH.contiguous()}, out / "ran.safetensors")
    (out / "said.json").write_text(json.dumps({"curves": curves, "held": held}))


def worker(rank: int, port: int, base: Path, zoo: Path, tasks: Sequence[Path], out: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    folder = out / str(rank)
    folder.mkdir()
    fits(sharding.load(str(base)), zoo, tasks, folder)
    for what, options in ((base.parent / "t5-bare", {}), (base, {"device_map": "auto"})):
        try:
            sharding.load(str(what), **options)
        except UsageError as error:
            with (folder / "refused.txt").open("a") as file:
                print(error.what, file=file)
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return int(held.getsockname()[1])


@pytest.fixture(scope="module")
def fitted(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process (alone/) and two (0/, 1/) made."""
    out = tmp_path_factory.mktemp("fsdp")
    (out / "alone").mkdir()
    pico.make_base("t5", llama.base.parent / "t5-bare")
    fits(load_base(str(llama.base)), llama.zoo, llama.tasks, out / "alone")
    torch.multiprocessing.spawn(worker, (free_port(), llama.base, llama.zoo, llama.tasks, out), nprocs=2)
    return out


def said(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "said.json").read_text())
    return result


@pytest.mark.parametrize("name", FITS)
def test_the_loss_curve_is_that_of_one_process(fitted: Path, name: str) -> None:
    alone, first, second = (said(fitted / which)["curves"][name] for which in ("alone", "0", "1"))
    assert len(alone) == FITS[name][1].steps and len(set(alone)) == len(alone), "nothing was learned"
    assert first == pytest.approx(alone, rel=1e-5)
    assert second == first


@pytest.mark.parametrize("name", FITS)
def test_the_router_is_that_of_one_process(fitted: Path, name: str) -> None:
    alone, first, second = (load_file(fitted / which / f"{name}.safetensors") for which in ("alone", "0", "1"))
    assert alone.keys() == first.keys() == second.keys()
    for key, tensor in alone.items():
        torch.testing.assert_close(first[key], tensor, rtol=2e-4, atol=2e-5)
        assert torch.equal(first[key], second[key]), "processes would drift apart"


def test_forwards_are_those_of_one_process(fitted: Path) -> None:
    alone, first = (load_file(fitted / which / "ran.safetensors") for which in ("alone", "0"))
    assert alone.keys() == first.keys() == {*FITS, "states"}
    for key, tensor in alone.items():
        torch.testing.assert_close(first[key], tensor, rtol=1e-3, atol=1e-3)


def test_the_base_is_what_it_was_and_lies_in_parts(fitted: Path, llama: Pico) -> None:
    before = dict(load_base(str(llama.base)).model.named_parameters())
    for which in ("0", "1"):
        after = load_file(fitted / which / "base.safetensors")
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert said(fitted / which)["held"] < 0.55 * said(fitted / "alone")["held"]


def test_what_cannot_be_shared_is_refused_everywhere(fitted: Path) -> None:
    for which in ("0", "1"):
        seq2seq, device_map = (fitted / which / "refused.txt").read_text().splitlines()
        assert "it is an encoder–decoder" in seq2seq and "device_map='auto'" in device_map


def test_one_process_is_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sharding.started() == (0, 1) and sharding.leads() and not sharding.together()
    monkeypatch.setenv("WORLD_SIZE", "4")  # of something else: nobody says where to meet
    assert not sharding.together()


# -- the command


def command(pico: Pico, zoo: Path, *more: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    run = ["-m", "recycler.cli", "build-router", *more, "--zoo", str(zoo), "--base", str(pico.base)]
    return subprocess.run([*launch, *run], capture_output=True, text=True, timeout=120)


def test_torchrun_builds_and_saves_once(llama: Pico, tmp_path: Path) -> None:
    zoo, out = recycler.Zoo(llama.zoo), tmp_path / "gates"
    assign = {name: name for name in NAMES}
    shots = recycler.Shots.from_files(*llama.tasks)
    profile = recycler.profile(zoo, shots, kshot=2, out=tmp_path / "p2", assign=assign)
    given = ("--profile", str(tmp_path / "p2"), "-o", "steps=2", "-o", "rows=3", "--out", str(out))
    done = command(llama, llama.zoo, "xlora", *given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(out)], "only one process talks"
    alone = recycler.build_router("xlora", profile, zoo=zoo, steps=2, rows=3)
    made = load_router(out)
    assert made.report["loss"] == alone.report["loss"]
    assert made.facts["base"]["fingerprint"] == alone.facts["base"]["fingerprint"]
    for key, tensor in alone.tensors().items():
        torch.testing.assert_close(made.tensors()[key], tensor, rtol=2e-4, atol=2e-5)
    recycler.compose(zoo, made).engine.detach()


def test_auto_is_for_one_process(llama: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="auto is not for several processes"):
        recycler.build_router("auto", None, zoo=recycler.Zoo(llama.zoo))
