"""`recycle zoo health`: planted defects stick out, sound adapters do not, and every number is what its definition says."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters import tensors, write
from click.testing import CliRunner, Result
from conftest import Pico
from safetensors.torch import load_file, save_file

from recycler.base import linear_shapes, load_base
from recycler.cli import main
from recycler.engine.sites import weight_OD
from recycler.judging.health import HealthReport, health
from recycler.judging.intruders import TOP, left_vectors, look, overlaps, tuned
from recycler.judging.zoo_view import strip_lines
from recycler.zoo.adapter import Factors
from recycler.zoo.errors import InputError, UsageError
from recycler.zoo.places import Place
from recycler.zoo.store import Zoo

EXAMPLES = Path(__file__).parent.parent / "examples" / "adapters"
TARGETS = ("q_proj", "o_proj", "up_proj")
Tensors = dict[str, torch.Tensor]


def recycle(*args: object, zoo: Zoo) -> Result:
    result = CliRunner().invoke(main, [*map(str, args), "--zoo", str(zoo.path)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def sticks_out(report: HealthReport) -> set[str]:
    return {one.name for one in report.adapters if one.evidence}


def evidence(report: HealthReport, name: str) -> str:
    return " / ".join(next(one for one in report.adapters if one.name == name).evidence)


def times(factor: float) -> Callable[[str, Tensors], None]:
    def change(b: str, weights: Tensors) -> None:
        weights[b] = weights[b] * factor

    return change


def collapse(b: str, weights: Tensors) -> None:
    """Every rank does the same: ΔW has one direction, of the norm that it had."""
    a = b.replace("lora_B", "lora_A")
    size = (weights[b] @ weights[a]).norm()
    one_a, one_b = weights[a][:1], weights[b][:, :1]
    rank = len(weights[a])
    weights[a] = one_a.repeat(rank, 1) / one_a.norm() / rank
    weights[b] = (one_b / one_b.norm() * size).repeat(1, rank)


@pytest.fixture(scope="module")
def planted(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Eight sound adapters of the pico base, and three with a defect each. ΔW is small beside W0, as in real adapters."""
    folder = tmp_path_factory.mktemp("planted")
    zoo = Zoo(folder / "zoo")
    shapes = linear_shapes(str(llama.base))
    model = load_base(str(llama.base)).model

    def add(name: str, seed: int, change: Callable[[str, Tensors], None] | None = None) -> None:
        weights = tensors(*TARGETS, seed=seed, shapes=shapes)
        for key in sorted(key for key in weights if "lora_B" in key):
            weights[key] = weights[key] * 0.005
            if change is not None:
                change(key, weights)
        zoo.add(write(folder / name, weights, r=4), name, base_path=str(llama.base))

    def intrude(b: str, weights: Tensors) -> None:
        """At one site, one large direction that is equally far from all of the base's."""
        path = b.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        if path != "model.layers.1.self_attn.o_proj":
            return
        base_OM, values = left_vectors(weight_OD(model.get_submodule(path)))
        direction = base_OM.sum(dim=1)
        weights[b][:, 0] = (direction / direction.norm() * 3 * values[0]).float()
        a = b.replace("lora_B", "lora_A")
        weights[a][0] = weights[a][0] / weights[a][0].norm()

    for seed, name in enumerate(("art", "code", "law", "math", "news", "poem", "tax", "zen")):
        add(name, seed)
    add("scaled", 20, times(1000))
    add("collapsed", 21, collapse)
    add("intruder", 22, intrude)
    return zoo


def test_planted_defects_stick_out_and_nothing_else(planted: Zoo) -> None:
    report = health(planted)
    assert sticks_out(report) == {"scaled", "collapsed", "intruder"}
    assert "times the zoo's median (robust z" in evidence(report, "scaled")
    assert "at 6 of 6 sites one direction holds almost all" in evidence(report, "collapsed")
    assert "effective rank 1.00 of 4" in evidence(report, "collapsed") and "norm" not in evidence(report, "collapsed")
    assert "at 1 of 6 sites its norm is out of proportion" in evidence(report, "intruder")
    assert "model.layers.1.self_attn.o_proj" in evidence(report, "intruder")
    assert all(one.intruders is None and one.peers == 11 for one in report.adapters)


def test_intruders_are_counted(planted: Zoo, llama: Pico) -> None:
    report = health(planted, intruders=True)
    each = {one.name: one for one in report.adapters}
    assert "intruder dimensions" in evidence(report, "scaled") and sticks_out(report) == {"scaled", "collapsed", "intruder"}
    assert {one.path: one.intruders for one in each["intruder"].looks or ()}["model.layers.1.self_attn.o_proj"] == 1
    assert each["math"].intruders == 0 and len(each["math"].looks or ()) == 6
    assert "intruders: 66 of 66 sites" in report.notes[0]
    bounded = health(planted, ["math", "intruder"], base=llama.base, intruders=True, sites=1)
    assert [len(one.looks or ()) for one in bounded.adapters] == [1, 1] and "2 of 12 sites" in bounded.notes[0]
    assert [look.path for look in bounded.adapters[1].looks or ()] == ["model.layers.1.self_attn.o_proj"]  # the likeliest first
    assert "1 intruder dimensions, 10.0% of the leading directions, most at" in evidence(bounded, "intruder")


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("size", [0.05, 3.0])
def test_the_definition(shape: tuple[int, int], dora: bool, size: float) -> None:
    """Against full SVDs of W0 and of the tuned weight, written out."""
    g = torch.Generator().manual_seed(sum(shape))
    w = torch.randn(*shape, generator=g)
    factors = Factors(torch.randn(3, shape[1], generator=g), torch.randn(shape[0], 3, generator=g) * size)
    whole = w + factors.b_OR @ factors.a_RD
    if dora:
        magnitude = torch.rand(shape[0], generator=g) + 0.5
        factors = Factors(factors.a_RD, factors.b_OR, magnitude)
        whole = magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True)
    u0 = torch.linalg.svd(w, full_matrices=False).U
    u = torch.linalg.svd(whole, full_matrices=False).U[:, :TOP]
    expected = (u.T @ u0).abs().max(dim=1).values
    found = overlaps(left_vectors(w)[0], tuned(w, factors))
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)
    values = torch.linalg.svdvals(whole)
    torch.testing.assert_close(left_vectors(whole, 4)[1].float(), values[:4], atol=1e-4, rtol=1e-4)


def test_directions_that_the_base_lacks_resemble_nothing() -> None:
    """Where W0 is tall and of low rank, what rounding leaves is no direction of it."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(30, 2, generator=g) @ torch.randn(2, 8, generator=g)
    base_OM, _ = left_vectors(w)
    assert int((base_OM.norm(dim=0) > 0.5).sum()) == 2
    new = torch.linalg.qr(torch.cat([w[:, :2], torch.randn(30, 1, generator=g)], dim=1)).Q[:, 2:]
    found = overlaps(base_OM, w + 100 * new @ torch.ones(1, 8), 1)
    assert found[0] < 0.1


def test_spectra_are_what_they_are_called(tmp_path: Path) -> None:
    """Singular values 2, 1, 1: a share of 2/3, a stable rank of 1.5, an effective rank of exp(entropy)."""
    zoo = Zoo(tmp_path / "zoo")
    g = torch.Generator().manual_seed(0)
    q_a, q_b = (torch.linalg.qr(torch.randn(16, 3, generator=g))[0] for _ in range(2))
    weights = tensors("q_proj", rank=3)
    for key in weights:
        part = q_a.T if "lora_A" in key else q_b * torch.tensor([2.0, 1.0, 1.0])
        weights[key] = part.clone(memory_format=torch.contiguous_format)
    zoo.add(write(tmp_path / "a", weights, r=3, lora_alpha=3), "a")
    (one,) = health(zoo).adapters
    parts = [2 / 3, 1 / 6, 1 / 6]
    for site in one.sites:
        assert site.norm == pytest.approx(math.sqrt(6), rel=1e-5)
        assert site.share == pytest.approx(2 / 3, rel=1e-5) and site.stable_rank == pytest.approx(1.5, rel=1e-5)
        assert site.effective_rank == pytest.approx(math.exp(-sum(p * math.log(p) for p in parts)), rel=1e-5)
        assert site.rest == pytest.approx(0.5, rel=1e-5)  # a third of at most two thirds
    assert one.norm == pytest.approx(math.sqrt(12), rel=1e-5) and one.z is None and not one.evidence


def test_the_real_ones_are_sound(tmp_path: Path, smollm: Path) -> None:
    """Of the examples' adapters none sticks out; the same ones with a planted defect do, also in real weights."""
    zoo = Zoo(tmp_path / "zoo")
    for folder in sorted(EXAMPLES.iterdir()):
        if folder.is_dir():
            zoo.add(folder, base_path=str(smollm))
    report = health(zoo)
    assert len(report.adapters) == 11 and sticks_out(report) == set()
    g = torch.Generator().manual_seed(0)
    folder = Path(shutil.copytree(EXAMPLES / "past_tense", tmp_path / "planted"))
    weights = load_file(folder / "adapter_model.safetensors")
    for key in [k for k in weights if "layers.10." in k and "q_proj" in k]:
        row = torch.randn(weights[key].shape[1 if "lora_A" in key else 0], generator=g)
        row = (row / row.norm() * 5).to(weights[key].dtype)
        if "lora_A" in key:
            weights[key][0] = row
        else:
            weights[key][:, 0] = row
    save_file(weights, folder / "adapter_model.safetensors")
    zoo.add(folder, base_path=str(smollm))
    names = ["past_tense", "word_category", "planted"]
    report = health(zoo, names, intruders=True, sites=3)
    assert [one.name for one in report.adapters] == names and sticks_out(report) == {"planted"}
    assert [one.intruders for one in report.adapters] == [0, 0, 1]
    assert min(min(one.overlaps) for one in report.adapters[2].looks or ()) < 0.3


def test_bases_and_choices(planted: Zoo, llama: Pico, tmp_path: Path) -> None:
    zoo = Zoo(Path(shutil.copytree(planted.path, tmp_path / "zoo")))
    with pytest.raises(UsageError, match="--intruders"):
        health(zoo, sites=3)
    with pytest.raises(UsageError, match="maht"):
        health(zoo, ["maht"])
    with pytest.raises(UsageError, match="is empty"):
        health(Zoo(tmp_path / "none"))
    zoo.add(write(tmp_path / "other", base_model_name_or_path="org/other"))
    with pytest.raises(UsageError, match="2 bases"):
        health(zoo, intruders=True)
    with pytest.raises(InputError, match="other does not fit"):
        health(zoo, ["other"], intruders=True, base=llama.base)
    report = health(zoo)
    assert {one.name: one.peers for one in report.adapters}["other"] == 1 and any("fewer than 4" in n for n in report.notes)
    weights = zoo.folder("math") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    report = health(zoo, ["law", "math"], intruders=True)
    assert [one.name for one in report.adapters] == ["law"] and "not those fetched" in report.unreadable["math"]


def test_every_kind(t5: Pico) -> None:
    """DoRA, rsLoRA and mixed ranks on an encoder–decoder; DoRA's magnitude is part of the tuned weight."""
    zoo = Zoo(t5.zoo)
    report = health(zoo, intruders=True, sites=3)
    assert [one.name for one in report.adapters] == sorted(zoo) and not report.unreadable
    model = load_base(str(t5.base)).model
    (one,) = look(model, ["poem"], zoo.__getitem__, sites=1)["poem"]
    w = weight_OD(model.get_submodule(one.path))
    factors = zoo["poem"].sites[one.path]
    assert factors.magnitude_O is not None
    assert one.overlaps == pytest.approx(overlaps(left_vectors(w)[0], tuned(w, factors)))


def test_the_command(planted: Zoo, llama: Pico) -> None:
    result = recycle("zoo", "health", "--base", llama.base, zoo=planted)
    assert result.exit_code == 0 and "Evidence, not a verdict" in result.stderr
    rows = {line.split("\t")[0]: line.split("\t") for line in result.stdout.split("\n\n")[0].splitlines()}
    assert rows["scaled"][-1] == "!" and rows["math"][-1] == "" and rows["math"][3] == "4" and rows["math"][7] == "–"
    strips = {block.splitlines()[0]: block.splitlines()[1:] for block in result.stdout.split("\n\n")[1:-1]}
    assert set(strips) == set(planted)
    drawn = dict(line.split() for line in strips["scaled"])
    assert drawn["q_proj"] == "██" and drawn["down_proj"] == "··" and drawn["lm_head"] == "·"
    assert set(dict(line.split() for line in strips["math"])["q_proj"]) <= set("▃▄▅")
    assert all(len(line) <= 100 for lines in strips.values() for line in lines)
    assert "\nscaled: its norm is" in result.stdout and "\x1b" not in result.stdout
    alone = recycle("zoo", "health", "math", zoo=planted)
    assert "nothing sticks out" in alone.stdout and "scaled" not in alone.stdout
    assert recycle("zoo", "health", "--sites", 3, zoo=planted).exit_code == 2


def test_json(planted: Zoo) -> None:
    data = json.loads(recycle("zoo", "health", "math", "scaled", "--intruders", "--sites", 2, "--json", zoo=planted).stdout)
    assert data["schema_version"] == 1 and data["intruder_definition"] == {"top": 10, "epsilon": 0.5}
    math_, scaled = data["adapters"]
    assert len(math_["sites"]) == 6 and len(math_["intruder_sites"]) == 2 and math_["evidence"] == []
    assert {"path", "layer", "kind", "norm", "ratio", "share", "rest", "effective_rank", "stable_rank", "rank"} == set(
        math_["sites"][0]
    )
    assert scaled["evidence"] and json.loads(json.dumps(data, allow_nan=False)) == data


def test_strips_of_deep_models_fit() -> None:
    """126 layers on 100 columns: neighbours share a block, which shows the one further from the median."""
    from recycler.judging.health import AdapterHealth, SiteHealth

    places = [Place(layer, "q_proj") for layer in range(126)]
    sites = tuple(
        SiteHealth(f"model.layers.{p.layer}.q_proj", p, 4, 1.0, 2.0, 2.0, 0.5, 0.5, 100.0 if p.layer == 77 else 1.0)
        for p in places
    )
    lines = strip_lines(AdapterHealth("deep", None, 5, 1.0, sites), [*places, Place(3, "v_proj")])
    assert lines[0] == "deep" and all(len(line) <= 100 for line in lines)
    assert lines[1] == "  q_proj " + "".join("█" if block == 38 else "▄" for block in range(63))
    assert lines[2] == "  v_proj    ·"  # layers 0 to 2 have none
