"""The engine's benchmarks on a pico shape, so that they do not rot. Nothing here looks at a time."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def scripts() -> Any:
    """The benchmarks' modules, which import one another by their bare names."""
    sys.path.insert(0, str(BENCHMARKS))
    threads = torch.get_num_threads()
    try:
        import engine
        import engine_gpu
        import layers
        import paths
        import peers
        import report

        yield {"engine": engine, "gpu": engine_gpu, "layers": layers, "paths": paths, "peers": peers, "report": report}
    finally:
        sys.path.remove(str(BENCHMARKS))
        torch.set_num_threads(threads)


def test_every_contender_runs_every_task_and_every_row_is_judged(
    scripts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, peers = scripts["engine"], scripts["peers"]
    size = engine.Size(peers.PICO, 16, 16, (8, 3), 1, 1)
    times = engine.measure(size, "equal", 8, generates=True) | engine.measure(size, "mixed", 8)
    every = {peers.BASE, peers.SINGLE, peers.MERGED, peers.XLORA, peers.LOOP, peers.OURS, peers.DENSE, peers.OURS_XLORA}
    assert {(task, dtype, kind) for task, dtype, kind, _ in times} == {
        *((task, dtype, "equal") for task in ("prefill", "decode", "generate") for dtype in ("fp32", "bf16")),
        *((task, dtype, "mixed") for task in ("prefill", "decode") for dtype in ("fp32", "bf16")),
    }
    for (_, _, kind, _), found in times.items():  # PEFT's Arrow takes equal ranks only, where padding does nothing
        assert set(found) == every | {peers.ARROW if kind == "equal" else peers.PADDED}
        assert all(0 < seconds < math.inf for seconds in found.values())
    rows = [*engine.whole_model_rows(times), engine.compiled_row(size, backend="eager")]
    rows += [*scripts["layers"].layer_rows(size.shape, 8, 64, 1), scripts["layers"].prototype_row(2, 1, size.shape)]
    assert {row.name for row in rows} == {f"C{number}" for number in range(1, 15)}
    unjudged = {row.name: row.note for row in rows if row.verdict == "not run"}
    assert unjudged == dict.fromkeys(("C3", "C4", "C5", "C7"), "so many adapters were not run")
    scripts["report"].show(rows)
    assert "agree to" in capsys.readouterr().out
    engine.write_times(times, tmp_path / "times.csv")
    with (tmp_path / "times.csv").open() as file:
        assert len([*csv.DictReader(file)]) == sum(map(len, times.values()))


def test_who_computes_something_else_is_not_timed(scripts: Any, tmp_path: Path) -> None:
    peers = scripts["peers"]
    field = peers.Field(peers.PICO, (4, 4, 4), tmp_path / "adapters", without=(peers.XLORA,))
    contenders = field.contenders(torch.float32)
    peers.check_agreement(contenders, torch.arange(2, 12)[None])
    contenders[peers.LOOP] = contenders[peers.SINGLE]
    with pytest.raises(SystemExit, match=r"loop over adapters and ours do not compute the same"):
        peers.check_agreement(contenders, torch.arange(2, 12)[None])


@pytest.mark.parametrize("sequences", [0, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_paths_are_compared_and_the_chooser_is_asked(scripts: Any, dtype: str, sequences: int) -> None:
    paths = scripts["paths"]
    shape, times = paths.measure(paths.Case("q,k,v", dtype, 4, 8, 2, sequences), 1, width=16, outs=(16, 8))
    assert set(times) == {"dense", "gather", "sorted"} | ({"sequence"} if sequences else set())
    assert shape.tokens == 8 and shape.active == 2 * 8 * 2 and shape.sequencewise == bool(sequences)


def test_every_gpu_row_runs_on_fake_cuda(scripts: Any) -> None:
    gpu, peers = scripts["gpu"], scripts["peers"]
    rowset = gpu.Rowset(gpu.Clock(dry=True, repeats=1), (64, 32, 96), peers.PICO, 128, rivals=True, limit=16)
    rows = gpu.run(rowset, [f"G{number}" for number in range(1, 13)])
    verdicts = {row.name: row.verdict for row in rows}
    assert verdicts.pop("G11") == "pass"  # what would wait raises
    assert set(verdicts.values()) == {"not timed"}


def test_no_cuda_is_said(scripts: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["engine_gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        scripts["gpu"].main()
    assert stopped.value.code == 2 and "no CUDA device" in capsys.readouterr().err
