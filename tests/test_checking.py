"""`recycle zoo check`: who fits, who can share a model and at what cost, who is whose copy, whose norm is odd."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from adapters import tensors, write
from click.testing import CliRunner, Result
from conftest import Pico

import recycler
from recycler.base import linear_shapes
from recycler.cli import main
from recycler.judging.checking import check
from recycler.zoo.errors import InputError, UsageError
from recycler.zoo.store import Zoo

TARGETS = ("q_proj", "v_proj", "up_proj")


def recycle(*args: object, zoo: Path | Zoo) -> Result:
    result = CliRunner().invoke(main, [*map(str, args), "--zoo", str(getattr(zoo, "path", zoo))])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def pico_shapes(llama: Pico) -> dict[str, tuple[int, int]]:
    return dict(linear_shapes(str(llama.base)))


@pytest.fixture
def made(tmp_path: Path, pico_shapes: dict[str, tuple[int, int]]) -> Zoo:
    """Six independent adapters of the pico base, and five that something is to be said about."""
    zoo = Zoo(tmp_path / "zoo")

    def add(name: str, weights: dict[str, torch.Tensor], rank: int = 4, base: str = "org/base", **config: object) -> None:
        zoo.add(write(tmp_path / name, weights, r=rank, base_model_name_or_path=base, **config), name)

    one = tensors(*TARGETS, seed=1, shapes=pico_shapes)
    for seed, name in enumerate(("art", "code", "law", "math", "news", "poem"), 1):
        add(name, tensors(*TARGETS, seed=seed, shapes=pico_shapes))
    add("art-again", one)
    add("art-strong", {key: value * 1.5 if "lora_B" in key else value for key, value in one.items()})
    g = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=g))[0]
    add("law-turned", {
        key: turn.T @ value if "lora_A" in key else value @ turn
        for key, value in tensors(*TARGETS, seed=3, shapes=pico_shapes).items()
    })  # fmt: skip
    huge = tensors(*TARGETS, seed=20, shapes=pico_shapes)
    add("huge", {key: value * 5000 if "lora_B" in key else value for key, value in huge.items()})
    add("tiny-base", tensors(*TARGETS, seed=21), base="org/base")  # the shapes of adapters.SHAPES, a narrower model
    return zoo


def found(zoo: Zoo, llama: Pico) -> tuple[recycler.judging.checking.CheckReport, dict[str, recycler.judging.checking.Checked]]:  # type: ignore[name-defined]
    report = check(zoo, str(llama.base))
    (section,) = report.sections
    return report, {one.name: one for one in section.adapters}


def test_what_is_said_of_each(made: Zoo, llama: Pico) -> None:
    _, each = found(made, llama)
    assert list(each) == sorted(made)
    assert {name for name, one in each.items() if one.verdict != "fits"} == {"tiny-base"}
    assert each["tiny-base"].verdict == "does not fit" and "differ in shape" in each["tiny-base"].why
    math = each["math"]
    assert (math.kinds, math.ranks, math.sites, math.licence, math.error) == (("LoRA",), (4,), 6, "apache-2.0", None)
    assert math.targets == {"q_proj": (2, 2), "up_proj": (2, 2), "v_proj": (2, 2)}
    assert math.bytes == sum(fact["size"] for fact in made.entry("math").files.values())
    exact = math_norm(made, "math")
    assert math.norm == pytest.approx(exact, rel=1e-6)


def math_norm(zoo: Zoo, name: str) -> float:
    deltas = [f.b_OR.double() @ f.a_RD.double() for f in zoo[name].sites.values()]
    return float(torch.cat([delta.flatten() for delta in deltas]).norm())


def test_copies_are_found_and_nothing_else(made: Zoo, llama: Pico) -> None:
    _, each = found(made, llama)
    assert each["art"].copies == ("art-again",) and each["art-again"].copies == ("art",) and each["law"].copies == ()
    near = {name: set(one.near) for name, one in each.items() if one.near}
    art, law = {"art", "art-again", "art-strong"}, {"law", "law-turned"}
    assert near == {name: group - {name} for group in (art, law) for name in group}
    assert each["law-turned"].nearest == ("law", pytest.approx(1, abs=1e-6))
    assert each["math"].nearest is not None and abs(each["math"].nearest[1]) < 0.5


def test_an_odd_norm_is_found_and_nothing_else(made: Zoo, llama: Pico) -> None:
    _, each = found(made, llama)
    assert {name for name, one in each.items() if one.outlier} == {"huge"}
    assert "wins every gate" in each["huge"].outlier and each["huge"].z is not None and each["huge"].z > 10
    assert each["huge"].ratio is not None and 3000 < each["huge"].ratio < 8000


def test_who_can_share_a_model_and_what_it_costs(made: Zoo, llama: Pico, pico_shapes: dict[str, tuple[int, int]]) -> None:
    report, _ = found(made, llama)
    (mix,) = report.sections[0].mixes
    assert set(mix.names) == set(made) - {"tiny-base"}
    assert mix.parameters == sum(made[name].parameters for name in mix.names)
    assert mix.flops == pytest.approx(mix.parameters / sum(out * width for out, width in pico_shapes.values()))
    assert report.cosine("math", "tiny-base") is None and report.cosine("math", "law") is not None
    text = "\n".join(report.lines())
    assert "these 10 can share one model" in text and "cannot be used: tiny-base" in text
    assert f"{mix.parameters * 2 / 1e6:.1f} MB in bf16" in text
    # the very same as compose counts
    router = recycler.build_router("uniform", zoo=made, adapters=mix.names, base=str(llama.base))
    model = recycler.compose(made, router, base=str(llama.base))
    assert model.extra_bytes >= mix.parameters * 4  # padding of ranks may come on top


def test_by_declared_base(tmp_path: Path, llama: Pico, pico_shapes: dict[str, tuple[int, int]]) -> None:
    """Without --base every declared base is judged by itself; with one, adapters of another are turned away though they fit."""
    zoo = Zoo(tmp_path / "zoo")
    for seed, (name, base) in enumerate({"a": "org/one", "b": "org/One", "c": "org/two", "d": "org/one-bnb-4bit"}.items()):
        folder = write(tmp_path / name, tensors(*TARGETS, seed=seed, shapes=pico_shapes), base_model_name_or_path=base)
        zoo.add(folder, base_path=str(llama.base))
    sections = {section.base: section for section in check(zoo).sections}
    assert {base: [one.name for one in section.adapters] for base, section in sections.items()} == {
        "org/one": ["a", "b"],
        "org/two": ["c"],
        "org/one-bnb-4bit": ["d"],
    }
    assert all(one.verdict == "fits" for section in sections.values() for one in section.adapters)  # by the folder recorded
    report = check(zoo, llama.base)
    (section,) = report.sections
    each = {one.name: one for one in section.adapters}
    assert [each[name].verdict for name in "abcd"] == ["fits", "fits", "other base", "fits"]
    assert "trained for org/two, not for org/one" in each["c"].why
    assert any("quantised copy of org/one" in note for note in each["d"].notes) and not each["a"].notes
    assert section.mixes[0].names == ("a", "b", "d")


def test_a_base_that_cannot_be_had(tmp_path: Path) -> None:
    """Sites are compared with each other; who disagrees about a shape cannot share a model."""
    zoo = Zoo(tmp_path / "zoo")
    other = {path: (out * 2, width) for path, (out, width) in {"model.layers.0.mlp.up_proj": (8, 16)}.items()}
    zoo.add(write(tmp_path / "a", tensors("up_proj", seed=1), base_model_name_or_path="org/gone"))
    zoo.add(write(tmp_path / "b", tensors("q_proj", seed=2), base_model_name_or_path="org/gone"))
    zoo.add(write(tmp_path / "c", tensors("up_proj", seed=3, shapes=other), base_model_name_or_path="org/gone"))
    (section,) = check(zoo).sections
    assert [one.verdict for one in section.adapters] == ["not compared"] * 3 and "could not be had" in section.note
    assert [mix.names for mix in section.mixes] == [("a", "b"), ("c",)] and section.mixes[0].flops is None
    result = recycle("zoo", "check", zoo=zoo)
    assert result.exit_code == 0 and "these 2 can share one model: a, b" in result.stdout
    refused = recycle("zoo", "check", "--base", "org/gone", zoo=zoo)
    assert refused.exit_code == 5


def test_no_base_declared(tmp_path: Path) -> None:
    zoo = Zoo(tmp_path / "zoo")
    for name, target, base in (("a", "q_proj", None), ("b", "q_proj", None), ("c", "up_proj", None)):
        zoo.add(write(tmp_path / name, tensors(target, seed=ord(name)), base_model_name_or_path=base))
    (section,) = check(zoo).sections
    assert section.base is None and "--base" in section.note
    assert [mix.names for mix in section.mixes] == [("a", "b"), ("c",)]  # nothing says that c is for the same model


def test_an_adapter_that_cannot_be_read(made: Zoo, llama: Pico) -> None:
    weights = made.folder("math") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    report, each = found(made, llama)
    assert each["math"].verdict == "unreadable" and "not those fetched" in each["math"].why and each["math"].norm is None
    assert "math" not in report.similarity.names and report.cosine("math", "law") is None


def test_choosing_and_mistyping(made: Zoo, llama: Pico, tmp_path: Path) -> None:
    assert recycler.check is check
    (section,) = check(made, llama.base, names=["math", "law"]).sections
    assert [one.name for one in section.adapters] == ["math", "law"]
    assert section.adapters[0].z is None  # two adapters have no outlier
    with pytest.raises(UsageError, match="maht"):
        check(made, names=["maht"])
    with pytest.raises(UsageError, match="is empty"):
        check(Zoo(tmp_path / "none"))


def test_problems_by_strictness(made: Zoo, llama: Pico) -> None:
    report, _ = found(made, llama)
    with pytest.raises(InputError, match=r"1 adapter cannot be used: tiny-base \(does not fit\)"):
        report.raise_for_problems()
    made.remove(["tiny-base"])
    report, _ = found(made, llama)
    report.raise_for_problems()
    with pytest.raises(InputError, match=r"art \(does the same as art-again, art-strong\).*huge \(its norm"):
        report.raise_for_problems(strict=True)
    made.remove(["art-again", "art-strong", "law-turned", "huge"])
    found(made, llama)[0].raise_for_problems(strict=True)


def test_the_command(made: Zoo, llama: Pico, tmp_path: Path) -> None:
    table = tmp_path / "cosines.csv"
    result = recycle("zoo", "check", "--base", llama.base, "--csv", table, zoo=made)
    assert result.exit_code == 3 and "error: 1 adapter cannot be used: tiny-base" in result.stderr
    rows = {line.split("\t")[0]: line.split("\t") for line in result.stdout.split("\n\n")[0].splitlines()}
    assert rows["tiny-base"][1] == "does not fit" and rows["art"][-1] == "=" and rows["huge"][-1] == "!"
    assert rows["math"][4] == "q up v" and rows["math"][-1] == ""
    assert "do the same thing: law, law-turned" in result.stdout
    matrix = result.stdout.split("\n\n")[2].splitlines()
    numbers = {line.split()[1]: line.split()[2:] for line in matrix[2:]}
    assert numbers["art-again"][0] == "==" and set(numbers["tiny-base"][:-1]) == {"×"}
    with table.open(newline="") as stream:
        read = {row["adapter"]: row for row in csv.DictReader(stream)}
    assert list(read) == sorted(made) and read["art"]["art-again"] == "1.000000" == read["math"]["math"]
    assert read["art"]["tiny-base"] == "" and float(read["math"]["law"]) == pytest.approx(float(read["law"]["math"]))
    again = recycle("zoo", "check", "--base", llama.base, "--csv", table, zoo=made)
    assert again.exit_code == 2 and "exists" in again.stderr
    assert recycle("zoo", "check", "math", "--base", llama.base, "--csv", table, "--force", zoo=made).exit_code == 0
    assert table.read_text() == "adapter,math\nmath,1.000000\n"
    strict = ["zoo", "check", "--base", llama.base, "--strict"]
    assert recycle(*strict, "math", "law", zoo=made).exit_code == 0
    assert recycle(*strict, "law", "law-turned", zoo=made).exit_code == 3


def test_json(made: Zoo, llama: Pico) -> None:
    result = recycle("zoo", "check", "--base", llama.base, "--json", zoo=made)
    data = json.loads(result.stdout)
    assert result.exit_code == 3 and data["schema_version"] == 1
    (section,) = data["sections"]
    each = {one["name"]: one for one in section["adapters"]}
    assert each["law"]["near"] == ["law-turned"] and each["law"]["nearest"] == {"name": "law-turned", "cosine": 1.0}
    assert each["law"]["targets"]["q_proj"] == {"sites": 2, "of": 2} and each["tiny-base"]["verdict"] == "does not fit"
    assert section["mixes"][0]["bytes_bf16"] == 2 * section["mixes"][0]["parameters"]
    names, cosine = data["similarity"]["names"], data["similarity"]["cosine"]
    assert names == sorted(made) and cosine[names.index("law")][names.index("law-turned")] == 1.0
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_the_page_is_narrow_and_clean(made: Zoo, llama: Pico, tmp_path: Path) -> None:
    """No control character of a card reaches the terminal, and the matrix fits 100 columns with 24 adapters."""
    from recycler.judging.zoo_view import matrix_lines

    card = '---\nlicense: "mit\\e[31m\\u202E"\n---\n'
    made.add(write(tmp_path / "odd", tensors("q_proj", seed=50), card=card), "odd")
    result = recycle("zoo", "check", "--base", llama.base, zoo=made)
    assert "odd" in result.stdout and not any(c in result.stdout + result.stderr for c in ("\x1b", "\u202e"))
    zoo = Zoo(tmp_path / "many")
    for seed in range(24):
        zoo.add(write(tmp_path / f"many-{seed}", tensors("q_proj", seed=seed)), f"a-name-of-many-characters-{seed:02}")
    report = check(zoo)
    lines = matrix_lines(report, report.sections[0])
    assert len(lines) == 26 and max(map(len, lines)) <= 100


def test_t5_and_every_kind(t5: Pico, tmp_path: Path) -> None:
    """An encoder–decoder with rsLoRA, DoRA and mixed ranks: all fit, and the classes are told apart."""
    zoo = Zoo(Path(shutil.copytree(t5.zoo, tmp_path / "zoo")))
    report = check(zoo, t5.base)
    (section,) = report.sections
    each = {one.name: one for one in section.adapters}
    assert all(one.verdict == "fits" for one in section.adapters) and len(section.mixes) == 1
    assert each["poem"].kinds == ("DoRA",) and "poem" in report.similarity.extras
    assert {"encoder.q", "decoder.SelfAttention.q", "EncDecAttention.q"} <= set(each["law"].targets)
    zoo.add(zoo.folder("poem"), "poem-copy")
    again = {one.name: one for one in check(zoo, t5.base).sections[0].adapters}
    assert again["poem"].near == ("poem-copy",) == again["poem"].copies


def test_a_copy_with_another_magnitude(t5: Pico, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    zoo = Zoo(Path(shutil.copytree(t5.zoo, tmp_path / "zoo")))
    folder = Path(shutil.copytree(zoo.folder("poem"), tmp_path / "louder"))
    file = folder / "adapter_model.safetensors"
    save_file({key: value * 1.3 if "magnitude" in key else value for key, value in load_file(file).items()}, file)
    zoo.add(folder)
    each = {one.name: one for one in check(zoo, t5.base).sections[0].adapters}
    assert each["poem"].near == () and each["poem"].direction_only == ("louder",)
    assert "same low-rank direction" in "\n".join(check(zoo, t5.base).lines())


def test_converted_and_forced_are_said(made: Zoo, llama: Pico) -> None:
    """What the manifest says of conversions and forced bases is in the report."""
    data = json.loads(made.manifest.read_text())
    data["adapters"]["math"]["converted"] = {"kind": "LoHa", "error": 0.0123, "files": {}}
    data["adapters"]["law"]["forced_base"] = True
    made.manifest.write_text(json.dumps(data))
    report, each = found(Zoo(made.path), llama)
    assert each["math"].error == 0.0123 and each["math"].converted == "LoHa"
    assert "math: came as LoHa and was made into LoRA, relative error 0.012" in report.lines()
    assert any("--force-base" in note for note in each["law"].notes)
