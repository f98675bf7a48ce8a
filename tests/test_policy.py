"""What a person decides about a fetch: which base an adapter may be for, how strong it may be, and under which licence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import SHAPES, tensors, write

import recycler.base
from recycler.intake.fetching import fetch
from recycler.intake.policy import Policy
from recycler.zoo.errors import InputError, UsageError
from recycler.zoo.store import Zoo


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    return Zoo(tmp_path / "zoo")


pytestmark = pytest.mark.usefixtures("two_bases")


def strong(factor: float, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors whose ΔW is `factor` times as large."""
    return {key: tensor * factor if "lora_B" in key else tensor for key, tensor in tensors(seed=seed).items()}


def warnings_of(report: Any) -> str:
    return " ".join(report.fetched[0].receipt.warnings)


# ---------------------------------------------------------------------------------------------------------------- the base


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ("unsloth/base-bnb-4bit", "by its name a quantised copy of org/base"),
        ("/home/anon/models/base", "which is called as this base is"),
        ("/cache/models--org--base/snapshots/" + "0" * 40, "which is called as this base is"),
        (
            "/home/anon/models/what",
            "it declares the path /home/anon/models/what; it fits the shapes of org/base, which it may not",
        ),
        (None, "it declares no base"),
    ],
)
def test_names_that_mean_the_base_are_accepted_and_said(zoo: Zoo, tmp_path: Path, declared: str | None, said: str) -> None:
    report = fetch(write(tmp_path / "math", base_model_name_or_path=declared), "org/base", zoo)
    assert said in warnings_of(report)
    assert (zoo.entry("math").base, zoo.entry("math").forced_base) == ("org/base", False)


def test_an_alias(zoo: Zoo, tmp_path: Path) -> None:
    folder = write(tmp_path / "math", base_model_name_or_path="them/renamed")
    with pytest.raises(
        InputError, match=r"trained for them/renamed, not for org/base.*--base-alias them/renamed.*--force-base"
    ):
        fetch(folder, "org/base", zoo)
    report = fetch(folder, "org/base", zoo, base_alias=["them/renamed"])
    assert not report.fetched[0].receipt.warnings and "another name of org/base" in str(report)
    assert zoo.entry("math").base == "org/base"


def test_another_base_by_force(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "math", base_model_name_or_path="org/other")
    report = fetch(folder, "org/base", zoo, force_base=True)
    assert "FORCED onto org/base: it was trained for org/other" in warnings_of(report)
    assert zoo.entry("math").forced_base and zoo.entry("math").base == "org/base" and report.fetched[0].forced_base
    fetch(folder, zoo=zoo)  # not said again: what is recorded stays
    assert zoo.entry("math").forced_base and zoo.entry("math").base == "org/base"
    with pytest.raises(InputError, match="not in it"):  # not where the shapes do not fit
        fetch(write(tmp_path / "law", tensors(shapes={"x.0.q_proj": (16, 16)})), "org/base", zoo, force_base=True)


# ------------------------------------------------------------------------------------------------------------------ strength


def test_an_outlier_is_kept_out(zoo: Zoo, tmp_path: Path) -> None:
    for seed in range(3):
        fetch(write(tmp_path / f"t{seed}", seed=seed), zoo=zoo)
    odd = write(tmp_path / "odd", strong(5000))
    with pytest.raises(
        InputError, match=r"odd is kept out.*times the median of 3 others for org/base.*--accept-outlier"
    ) as caught:
        fetch(odd, zoo=zoo)
    assert caught.value.exit_code == 3 and "odd" not in zoo
    with pytest.raises(InputError, match="kept out"):
        fetch(odd, zoo=zoo, dry_run=True)
    fetch(write(tmp_path / "loud", strong(500, seed=9)), zoo=zoo)  # strong, but not beyond measure
    report = fetch(odd, zoo=zoo, accept_outlier=True)
    assert "an outlier, accepted" in warnings_of(report) and "odd" in zoo
    assert fetch(odd, zoo=zoo).names == ["odd"]  # accepted once


def test_an_outlier_is_found_whoever_comes_first(zoo: Zoo, tmp_path: Path) -> None:
    odd = write(tmp_path / "a-odd", strong(5000, seed=4))
    rest = [write(tmp_path / f"t{seed}", seed=seed) for seed in range(3)]
    events = []
    report = fetch([odd, *rest], zoo=zoo, jobs=1, on_event=lambda stage, name, text: events.append((stage, name)))
    assert report.names == ["t0", "t1", "t2"] == list(zoo) and zoo.verify() == []
    (failure,) = report.failures
    assert failure.name == "a-odd" and failure.error.exit_code == 3
    assert events.index(("kept", "a-odd")) < events.index(("failed", "a-odd"))


def test_others_are_those_of_its_base(zoo: Zoo, tmp_path: Path) -> None:
    for seed in range(3):
        fetch(write(tmp_path / f"t{seed}", seed=seed, base_model_name_or_path="org/other"), zoo=zoo)
    assert fetch(write(tmp_path / "odd", strong(5000)), zoo=zoo).names == ["odd"]


def test_the_norm_is_that_of_the_update(zoo: Zoo, tmp_path: Path) -> None:
    fetch(write(tmp_path / "math"), zoo=zoo)
    deltas = [f.b_OR.double() @ f.a_RD.double() for f in zoo["math"].sites.values()]
    expected = float(torch.stack([d.square().sum() for d in deltas]).sum().sqrt())
    assert zoo.entry("math").norm == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------------ licences


def test_licences(zoo: Zoo, tmp_path: Path) -> None:
    mit = write(tmp_path / "mit", card="---\nlicense: MIT\n---\n", seed=1)
    nc = write(tmp_path / "nc", card="---\nlicense: cc-by-nc-4.0\n---\n", seed=2)
    none = write(tmp_path / "none", card=None, seed=3)
    report = fetch([mit, nc, none], zoo=zoo, license_allow="mit, apache-2.0")
    assert report.names == ["mit", "none"]
    assert [f.name for f in report.failures] == ["nc"]
    assert "The licence of nc, cc-by-nc-4.0, is not among those allowed. Allowed are apache-2.0, mit." in str(report)
    assert "it states no licence" in " ".join(report.fetched[1].receipt.warnings)
    with pytest.raises(InputError, match=r"none states no licence.*--strict"):
        fetch(none, zoo=Zoo(tmp_path / "strict"), license_allow=["mit"], strict=True)
    with pytest.raises(InputError, match="states no licence"):
        fetch(none, zoo=Zoo(tmp_path / "strict"), strict=True, dry_run=True)
    assert "states no licence" not in str(fetch(none, zoo=Zoo(tmp_path / "lenient")))
    with pytest.raises(UsageError, match="Did you mean"):
        fetch(mit, zoo=zoo, license_allow="apche-2.0")


def test_a_policy_asks_nothing_by_default() -> None:
    assert Policy().check_licence("math", None) == () == Policy().check_norm("math", 1e9, "org/base", [])


# ------------------------------------------------------------------------------------------------------------- the company


def test_one_folder_is_a_copy_of_one_base(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes cannot tell two models of a family apart; what the others declare can, whoever comes first."""
    monkeypatch.setattr(recycler.base, "linear_shapes", lambda base: SHAPES)
    base = tmp_path / "base"
    base.mkdir()
    declared = {"alien": "org/other", "math": "org/base", "law": "unsloth/base-bnb-4bit", "code": "org/base"}
    pile = [write(tmp_path / n, tensors(seed=i), base_model_name_or_path=of) for i, (n, of) in enumerate(declared.items())]
    report = fetch(pile, base=base, zoo=zoo, jobs=1)
    (failure,) = report.failures
    assert (
        failure.name == "alien"
        and "trained for org/other; 3 others" in str(failure.error)
        and "--force-base" in failure.error.fix
    )
    assert sorted(zoo) == ["code", "law", "math"] and not zoo.verify()
    assert fetch(pile[:1], base=base, zoo=zoo, base_alias=["org/other"]).names == ["alien"]
    zoo.remove("alien")
    assert fetch(pile[:1], base=base, zoo=zoo, force_base=True).names == ["alien"]
    two = fetch(pile[:2], base=base, zoo=Zoo(tmp_path / "two"))  # who is the stranger among two?
    assert two.names == ["alien", "math"]


def test_the_same_source_twice_is_one(zoo: Zoo, tmp_path: Path) -> None:
    folder = write(tmp_path / "math", base_model_name_or_path=None)
    assert fetch([folder, str(folder)], zoo=zoo).names == ["math"]
