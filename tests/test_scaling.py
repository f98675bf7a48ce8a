"""The arithmetic of docs/scaling.md is what it says, and the scripts behind its tables run."""

from __future__ import annotations

import ast
import csv
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf8")


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ZIPF = script("zipf")


def claims() -> Iterator[tuple[str, float, float]]:
    """(expression, its value, what the comment beside it says) of every expression of the page."""
    names: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S):
        lines = code.splitlines()
        for node in ast.parse(code).body:
            source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            if isinstance(node, ast.Expr):
                said = re.search(r"#\s*([\d,.]+\d)", lines[node.lineno - 1])
                assert said is not None, f"nothing is said of {source}"
                yield source, float(eval(source, names)), float(said[1].replace(",", ""))
            else:
                exec(source, names)


def test_the_numbers_of_the_page_are_what_the_code_beside_them_gives() -> None:
    found = list(claims())
    assert len(found) > 25
    for source, value, said in found:
        assert value == pytest.approx(said, rel=0.02), source


def test_the_page_does_not_promise_a_bigger_zoo_than_fits() -> None:
    """Its table is for the memory that the arithmetic leaves."""
    values = {source.split("  #")[0]: value for source, value, _ in claims()}
    assert values["left / 1e9"] > 30 > values["flying"] * values["adapter / 1e6"] / 1e3


# -- zipf.py


@settings(max_examples=20)
@given(st.floats(0.5, 1.3), st.integers(50, 2000), st.integers(1, 40))
def test_an_lru_is_what_che_says(exponent: float, count: int, percent: int) -> None:
    p_N = ZIPF.zipf(count, exponent)
    assert p_N.sum() == pytest.approx(1) and (np.diff(p_N) <= 0).all()
    size = max(count * percent // 100, 1)
    (hits,) = ZIPF.simulated(p_N, [size], 40_000)
    assert hits == pytest.approx(ZIPF.che(p_N, size), abs=0.04)
    assert hits < p_N[:size].sum() + 0.02  # whoever knew the future would keep the most asked for


def test_a_larger_tier_holds_more_and_one_for_all_holds_everything() -> None:
    p_N = ZIPF.zipf(500, 0.9)
    found = ZIPF.simulated(p_N, [5, 50, 499, 500], 20_000)
    assert found == sorted(found) and found[-1] == 1.0 and ZIPF.che(p_N, 500) == 1.0


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "zipf.csv"
    given = [
        "--adapters",
        "4000",
        "--exponents",
        "0.8,1.2",
        "--requests",
        "20000",
        "--gpus",
        "16",
        "--rate",
        "500",
        "--out",
        str(out),
    ]
    given += ["--gpu-gb", "4", "--host-gb", "100", "--ssd-gb", "200"]
    monkeypatch.setattr(sys, "argv", ["zipf.py", *given])
    ZIPF.main()
    with out.open(encoding="utf8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and len(capsys.readouterr().out.splitlines()) == 5
    for row in rows:
        shares = [float(row[tier]) for tier in ("gpu", "host", "ssd", "store")]
        assert sum(shares) == pytest.approx(1) and all(share >= 0 for share in shares)
    for any_gpu, own in zip(rows[::2], rows[1::2], strict=True):
        assert float(own["gpu"]) > float(any_gpu["gpu"]) and float(own["store"]) < float(any_gpu["store"])


# -- many_tasks.py


def test_derived_adapters_are_what_they_are_called() -> None:
    from recycler.zoo.adapter import Adapter, Factors

    many = script("many_tasks")
    torch.manual_seed(0)
    real = [Adapter(f"r{e}", {"site": Factors(torch.randn(3, 8), torch.randn(5, 3))}) for e in range(2)]
    delta = [one.sites["site"].b_OR @ one.sites["site"].a_RD for one in real]

    def update(kind: str) -> torch.Tensor:
        factors = many.Made(0, 1, kind, 9).factors(real, "site")
        return factors.b_OR @ factors.a_RD

    torch.testing.assert_close(update("real"), delta[0])
    torch.testing.assert_close(update("gauge"), delta[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(update("mix"), delta[0] / 3 + 2 * delta[1] / 3, rtol=1e-4, atol=1e-4)
    turned = update("turned")  # another input space: the same singular values, other vectors
    torch.testing.assert_close(torch.linalg.svdvals(turned), torch.linalg.svdvals(delta[0]), rtol=1e-4, atol=1e-4)
    assert (turned - delta[0]).norm() > 0.5 * delta[0].norm()
    assert 0.05 < float((update("noise") - delta[0]).norm() / delta[0].norm()) < 1.0
    rows = torch.eye(2, 8), torch.tensor([0.5, 2.0])
    v_D, offset = many.Made(0, 1, "mix", 9).row(*rows)
    torch.testing.assert_close(v_D, (rows[0][0] + 2 * rows[0][1]) / 3)
    assert float(offset) == pytest.approx(1.5)


def test_gates_alone_are_measured() -> None:
    row = script("many_tasks").synthetic(64, 16)
    assert 0 < row["rows_share"] <= 1.5 and row["bytes_ratio"] >= 1 and row["ratio_1"] > 0
