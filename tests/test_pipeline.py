"""The whole way in Python on pico models: fetch → profile → build_router → compose → load → run → evaluate."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from adapters import files
from conftest import Pico
from safetensors.torch import load_file, save_file
from way import NAMES, PROMPTS, Way, logits, never, one_by_one

import recycler
from recycler import Shots
from recycler.base import load_base
from recycler.routers.discovery import load_router
from recycler.run import answer_file, answer_prompts, check_answers
from recycler.zoo.errors import HubError, InputError, SecurityError, UsageError


@pytest.fixture
def model(way: Way, tmp_path: Path) -> Path:
    """A composed model to do damage to."""
    return Path(shutil.copytree(way.folder, tmp_path / "model"))


# ------------------------------------------------------------------------------------------------------------ the whole way


def test_the_whole_way(way: Way) -> None:
    assert way.router.adapters == NAMES and way.router.facts["profile"]["tasks"] == list(way.profile.tasks)
    model = recycler.load(way.folder)
    assert model.names == NAMES and model.warnings == []
    texts = answer_prompts(model, PROMPTS, max_new_tokens=5)
    assert texts == one_by_one(model, PROMPTS, 5)
    with model.disabled():
        bare = logits(model)
    assert not torch.allclose(logits(model), bare, atol=1e-2)  # the adapters had a say
    for row in model.weights_for(model.tokenizer(PROMPTS[0], return_tensors="pt")).top(2):
        assert {name for name, _ in row} <= set(NAMES)
    assert recycler.RoutedModel.from_pretrained(way.folder).names == NAMES


def test_base_and_adapters_stay_as_they_are(llama: Pico, tmp_path: Path) -> None:
    zoo = recycler.Zoo(shutil.copytree(llama.zoo, tmp_path / "zoo"))
    before = {**files(llama.base), **files(zoo.path / "adapters")}
    base = recycler.base.load_base(str(llama.base))  # type: ignore[attr-defined]
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    hooks = sum(len(module._forward_hooks) for module in base.model.modules())
    profile = recycler.profile(zoo, Shots.from_files(*llama.tasks), 2, base=base)
    recycler.build_router("phatgoose", profile, zoo=zoo, base=base, steps=2)
    assert sum(len(module._forward_hooks) for module in base.model.modules()) == hooks  # nothing is left attached
    model = recycler.compose(zoo, recycler.build_router("arrow", zoo=zoo, base=base), tmp_path / "model", base=base)
    logits(model)
    assert {**files(llama.base), **files(zoo.path / "adapters")} == before
    after = base.model.state_dict()
    assert weights.keys() == after.keys() and all(torch.equal(after[name], weights[name]) for name in weights)


@pytest.mark.parametrize("method", ["ridge", "arrow", "uniform", "phatgoose"])
def test_save_and_load_a_router(way: Way, tmp_path: Path, method: str) -> None:
    options: dict[str, Any] = {"steps": 2} if method == "phatgoose" else {}
    router = recycler.build_router(method, way.profile, zoo=way.zoo, out=tmp_path / "gates", **options)
    loaded = load_router(tmp_path / "gates")
    assert (loaded.method(), loaded.adapters, loaded.config) == (method, NAMES, router.config)
    assert json.dumps(loaded.facts, sort_keys=True) == json.dumps(router.facts, sort_keys=True)
    first = recycler.compose(way.zoo, router, tmp_path / "model")
    expected = logits(first)
    first.engine.detach()
    for source in (tmp_path / "gates", str(tmp_path / "gates"), loaded):
        model = recycler.compose(way.zoo, source)
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(recycler.load(tmp_path / "model")), expected)


def test_statistics_stay_where_the_router_was_built(way: Way) -> None:
    assert (way.folder.parent / "gates" / "statistics.safetensors").exists()
    assert sorted(file.name for file in (way.folder / "router").iterdir()) == ["router.json", "router.safetensors"]


def test_a_router_without_a_profile(way: Way) -> None:
    model = recycler.compose(way.zoo, recycler.build_router("arrow", zoo=way.zoo))
    assert model.router is not None and model.router.facts["profile"] is None
    assert len(answer_prompts(model, PROMPTS, max_new_tokens=2)) == 2


def test_a_router_of_some_adapters_knows_only_them(way: Way) -> None:
    """Baselines of an evaluation must be adapters of the model."""
    for kept in (["poem", "law"], ["math"]):
        router = recycler.build_router("ridge", way.profile, zoo=way.zoo, adapters=kept)
        known = router.facts["profile"]
        assert router.adapters == tuple(kept) and set(known["own"]) == set(kept)
        assert set(known["owner"].values()) <= set(kept) and known["best_single"] in (None, *kept)
        assert known["owner"] == way.profile.restricted(kept).owner


def test_profiles_are_found_by_name_and_by_folder(llama: Pico, tmp_path: Path) -> None:
    zoo = recycler.Zoo(shutil.copytree(llama.zoo, tmp_path / "zoo"))
    recycler.profile(zoo, Shots.from_files(*llama.tasks), 1, out="p1")
    by_name = recycler.build_router("ridge", "p1", zoo=zoo)
    by_folder = recycler.build_router("ridge", str(zoo.path / "profiles" / "p1"), zoo=zoo, out=zoo.routers_dir / "gates")
    assert by_name.facts == by_folder.facts and by_name.facts["profile"]["name"] == "p1"
    assert recycler.compose(zoo, "gates").names == NAMES
    with pytest.raises(UsageError, match=r"learns from shots.*Profiles in the zoo: p1\.") as error:
        recycler.build_router("ridge", zoo=zoo)
    assert error.value.exit_code == 2


def test_adapters_that_help_nowhere(way: Way) -> None:
    """Nothing to learn from is said, and not saved as a router that chooses nobody; tasks given by hand are enough."""
    import dataclasses

    nll = way.profile.nll.clone()
    nll[0] = 0.0
    useless = dataclasses.replace(way.profile, nll=nll)
    with pytest.raises(InputError, match=r"none of code, law, math, poem is better than the base.*--assign") as error:
        recycler.build_router("ridge", useless, zoo=way.zoo)
    assert error.value.exit_code == 3
    assert recycler.build_router("ridge", useless, zoo=way.zoo, assign={"law": "math"}).facts["profile"]["own"]["law"] == [
        "math"
    ]
    assert recycler.build_router("arrow", useless, zoo=way.zoo).adapters == NAMES


# ------------------------------------------------------------------------------------------------------- the directory


def test_what_lies_in_a_composed_directory(way: Way) -> None:
    assert sorted(path.name for path in way.folder.iterdir()) == ["README.md", "adapters", "recycle.json", "router"]
    data = json.loads((way.folder / "recycle.json").read_text(encoding="utf8"))
    assert data["schema_version"] == 1 and data["router"] == "ridge"
    assert data["base"]["path"] == str(way.pico.base.resolve()) and len(data["base"]["fingerprint"]) == 16
    assert set(data["versions"]) == {"recycler", "torch", "transformers", "peft"}
    entries = way.zoo.entries
    assert [(a["name"], a["source"], a["sha256"]) for a in data["adapters"]] == [
        (name, entries[name].source, entries[name].files["adapter_model.safetensors"]["sha256"]) for name in NAMES
    ]
    for name in NAMES:  # byte for byte as fetched
        assert files(way.folder / "adapters" / name) == files(way.zoo.folder(name))
    base = (way.pico.base / "model.safetensors").stat().st_size
    held = {path: data for path, data in files(way.folder).items() if not path.startswith(("adapters/", "router/"))}
    assert set(held) == {"README.md", "recycle.json"} and sum(map(len, held.values())) < base / 4  # no copy of the base


def test_adapters_inside_load_in_peft(way: Way) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto: Any = AutoModelForCausalLM if way.pico.kind == "llama" else AutoModelForSeq2SeqLM
    model = recycler.load(way.folder)
    for name in NAMES:
        theirs = PeftModel.from_pretrained(auto.from_pretrained(way.pico.base), str(way.folder / "adapters" / name)).eval()
        theirs.tokenizer = model.tokenizer
        with model.only(name):
            torch.testing.assert_close(logits(model), logits(theirs), atol=1e-4, rtol=1e-4)


def test_the_card(way: Way) -> None:
    _, header, text = (way.folder / "README.md").read_text(encoding="utf8").split("---\n", 2)
    facts = yaml.safe_load(header)
    assert facts["library_name"] == "recycler" and "lora" in facts["tags"] and "license" not in facts
    assert facts["base_model"] == []  # folders of somebody's disk are no Hub ids
    for name in NAMES:
        assert f"| {name} |" in text
    assert "not stated for code, law, math, poem" in text and "top_k=2" in text


def test_the_card_of_adapters_from_the_hub(way: Way, tmp_path: Path) -> None:
    import dataclasses

    model = recycler.compose(way.zoo, way.router)
    model.adapters = tuple(
        dataclasses.replace(a, source=f"org/{a.name}", revision="a" * 40, licence="mit | <b>odd</b>") for a in model.adapters
    )
    way.router.facts["base"], before = {**way.router.facts["base"], "id": "org/base"}, way.router.facts["base"]
    try:
        model.save_pretrained(tmp_path / "model")
    finally:
        way.router.facts["base"] = before
    _, header, text = (tmp_path / "model" / "README.md").read_text(encoding="utf8").split("---\n", 2)
    facts = yaml.safe_load(header)
    assert facts["base_model"] == ["org/base", "org/code", "org/law", "org/math", "org/poem"]
    assert facts["license"] == "other" and "<b>" not in header + text
    table = [line for line in text.split("\n") if line.startswith("| math |")]
    assert len(table) == 1 and table[0].count("|") == 7 and "aaaaaaaaaaaa" in table[0]


def test_nothing_is_overwritten_unless_asked(way: Way, tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    recycler.compose(way.zoo, way.router, target)  # empty is as good as new
    before = files(target)
    with pytest.raises(UsageError, match=r"is not empty.*add --force"):
        recycler.compose(way.zoo, way.router, target)
    assert files(target) == before
    recycler.compose(way.zoo, recycler.build_router("uniform", zoo=way.zoo), target, force=True)
    assert json.loads((target / "recycle.json").read_text(encoding="utf8"))["router"] == "uniform"
    model = recycler.load(target)
    model.save_pretrained(target, force=True)  # over the very folder it was read from
    assert torch.equal(logits(recycler.load(target)), logits(model))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_force_replaces_models_only(way: Way, model: Path, tmp_path: Path) -> None:
    for folder, file in ((tmp_path / "thesis", "chapter.txt"), (model, "notes.txt")):
        folder.mkdir(exist_ok=True)
        (folder / file).write_text("years of work", encoding="utf8")
        before = files(folder)
        with pytest.raises(UsageError, match="--force replaces models only"):
            recycler.compose(way.zoo, way.router, folder, force=True)
        assert files(folder) == before
    with pytest.raises(UsageError, match="is a file"):
        recycler.compose(way.zoo, way.router, tmp_path / "thesis" / "chapter.txt", force=True)


@pytest.mark.parametrize("broken", ["recycler.composition.card", "recycler.routers.base.Router.save", "shutil.copytree"])
def test_nothing_half_written_is_left(
    way: Way, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    before = files(model)
    composed = recycler.compose(way.zoo, way.router)

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(broken, fail)
    for target in (tmp_path / "new", model):
        with pytest.raises(OSError, match="no space left"):
            composed.save_pretrained(target, force=True)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and files(model) == before
    composed.save_pretrained(tmp_path / "new")
    assert torch.equal(logits(recycler.load(tmp_path / "new")), logits(composed))


def test_a_model_without_a_router_is_not_saved(way: Way, tmp_path: Path) -> None:
    model = recycler.compose(way.zoo, way.router)
    model.use(None)
    with pytest.raises(UsageError, match="no router to save"):
        model.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- what does not fit together


def retouched(weights: Path) -> None:
    """Other weights of the same shapes."""
    save_file({key: tensor * 2 for key, tensor in load_file(weights).items()}, weights)


def test_tampered_weights(model: Path) -> None:
    retouched(model / "adapters" / "math" / "adapter_model.safetensors")
    with pytest.raises(SecurityError, match=r"weights of math .* are not those that were composed.*Compose") as error:
        recycler.load(model)
    assert error.value.exit_code == 4


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data.update(schema_version=2), "newer version. Upgrade recycler.$"),
        (lambda data: data.pop("base"), "cannot be read"),
        (lambda data: data["adapters"][0].pop("sha256"), "cannot be read"),
        (lambda data: data["adapters"][0].update(name="../../math"), "cannot be read"),
        (lambda data: data["adapters"].reverse(), "built for other adapters"),
        (lambda data: data["adapters"].pop(), "built for other adapters"),
    ],
)
def test_a_manifest_that_is_off(model: Path, change: Any, message: str) -> None:
    data = json.loads((model / "recycle.json").read_text(encoding="utf8"))
    change(data)
    (model / "recycle.json").write_text(json.dumps(data), encoding="utf8")
    with pytest.raises(InputError, match=message) as error:
        recycler.load(model)
    assert error.value.exit_code == 3


@pytest.mark.parametrize("part", ["recycle.json", "router/router.json", "router/router.safetensors", "adapters/law"])
def test_a_part_is_missing(model: Path, part: str) -> None:
    shutil.rmtree(model / part) if (model / part).is_dir() else (model / part).unlink()
    with pytest.raises(InputError) as error:
        recycler.load(model)
    assert error.value.what and str(model) in str(error.value)


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a composed model"):
        recycler.load(tmp_path)
    with pytest.raises(InputError, match="is not a composed model"):
        recycler.load(tmp_path / "none")


def test_a_router_and_a_zoo_that_do_not_fit(llama: Pico, tmp_path: Path) -> None:
    zoo = recycler.Zoo(shutil.copytree(llama.zoo, tmp_path / "zoo"))
    profile = recycler.profile(zoo, Shots.from_files(*llama.tasks), 1)
    router = recycler.build_router("ridge", profile, zoo=zoo)
    zoo.remove("law")
    with pytest.raises(InputError, match=r"The router needs law, .*Fetch them, or build the router again") as error:
        recycler.compose(zoo, router, tmp_path / "model")
    assert error.value.exit_code == 3 and not (tmp_path / "model").exists()
    changed = Path(shutil.copytree(llama.adapters["law"], tmp_path / "law"))
    retouched(changed / "adapter_model.safetensors")
    recycler.fetch(changed, llama.base, zoo)
    with pytest.raises(InputError, match="law changed since the router was built"):
        recycler.compose(zoo, router)
    with pytest.raises(InputError, match="law changed since profile profile was measured"):
        recycler.build_router("ridge", profile, zoo=zoo)
    assert recycler.build_router("ridge", profile, zoo=zoo, adapters=["math", "poem"]).adapters == ("math", "poem")
    with pytest.raises(UsageError, match="knows nothing of verse"):
        recycler.fetch(llama.adapters["poem"], llama.base, zoo, names=["verse"])
        recycler.build_router("ridge", profile, zoo=zoo, adapters=["math", "verse"])
    with pytest.raises(UsageError, match=r"given.*--profile"):
        recycler.build_router("arrow", zoo=zoo, assign={"math": ["math"]})


def test_a_moved_model_and_a_moved_base(way: Way, model: Path, tmp_path: Path) -> None:
    expected = logits(recycler.load(way.folder))
    (tmp_path / "elsewhere").mkdir()
    moved = model.rename(tmp_path / "elsewhere" / "renamed")
    assert torch.equal(logits(recycler.load(moved)), expected)
    copy = Path(shutil.copytree(way.pico.base, tmp_path / way.pico.kind))
    by_copy = recycler.load(str(moved), base=str(copy))
    assert by_copy.warnings == [] and torch.equal(logits(by_copy), expected)
    by_copy.save_pretrained(tmp_path / "again")
    data = json.loads((tmp_path / "again" / "recycle.json").read_text(encoding="utf8"))
    assert data["base"]["path"] == str(copy)  # the base that is there now
    assert torch.equal(logits(recycler.compose(way.zoo, way.router, base=str(copy))), expected)


def test_another_base_is_said_aloud(way: Way, tmp_path: Path) -> None:
    other = Path(shutil.copytree(way.pico.base, tmp_path / way.pico.kind))
    retouched(other / "model.safetensors")
    for model in (recycler.load(way.folder, base=str(other)), recycler.compose(way.zoo, way.router, base=str(other))):
        assert len(model.warnings) == 1 and "is not the base that the router was built on" in model.warnings[0]


def test_gates_are_not_fitted_on_another_base_than_the_profiles(llama: Pico, tmp_path: Path) -> None:
    zoo = recycler.Zoo(llama.zoo)
    profile = recycler.profile(zoo, Shots.from_files(*llama.tasks), 1)
    other = Path(shutil.copytree(llama.base, tmp_path / "llama"))
    same = recycler.build_router("ridge", profile, zoo=zoo, base=str(other))
    assert same.facts["base"]["path"] == str(other)
    retouched(other / "model.safetensors")
    with pytest.raises(InputError, match=r"not the base that profile profile was measured on.*run recycle profile again"):
        recycler.build_router("arrow", profile, zoo=zoo, base=str(other))


def test_a_base_of_pickles(llama: Pico, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama.base, tmp_path / "llama"))
    (base / "model.safetensors").unlink()
    torch.save({}, base / "pytorch_model.bin")
    with pytest.raises(SecurityError, match=r"are pickled \(pytorch_model.bin\).*save_pretrained") as error:
        recycler.compose(recycler.Zoo(llama.zoo), recycler.build_router("uniform", zoo=recycler.Zoo(llama.zoo)), base=str(base))
    assert error.value.exit_code == 4
    (base / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="is not a model folder"):
        load_base(str(base))


def test_a_base_out_of_reach_is_known_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    with pytest.raises(HubError, match=r"The base org/base cannot be had.*cannot be reached"):
        load_base("org/base")
    out, err = capfd.readouterr()
    assert time.monotonic() - started < 5 and out + err == ""


@pytest.mark.parametrize("options", [{"device": "foo"}, {"device": "cuda:99"}, {"device": "meta"}, {"dtype": "int8"}])
def test_devices_and_dtypes_that_do_not_serve(llama: Pico, options: Any) -> None:
    with pytest.raises(UsageError, match=r"cannot be used.*cpu|There is no dtype"):
        load_base(str(llama.base), **options)


def test_a_router_is_not_overwritten_unless_asked(llama: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo, out = recycler.Zoo(llama.zoo), tmp_path / "gates"
    router = recycler.build_router("uniform", zoo=zoo, out=out)
    before = (out / "router.json").read_bytes()
    with pytest.raises(UsageError, match=r"holds a router already.*--force"):
        router.save(out)
    with monkeypatch.context() as patched:
        patched.setattr("recycler.build.load_base", never)  # refused before the long work
        with pytest.raises(UsageError, match=r"holds a router already.*--force"):
            recycler.build_router("arrow", zoo=zoo, out=out)
        with pytest.raises(UsageError, match="something else than a router"):
            recycler.build_router("arrow", zoo=zoo, out=tmp_path, force=True)
    assert (out / "router.json").read_bytes() == before
    recycler.build_router("arrow", zoo=zoo, out=out, force=True)
    assert recycler.load_router(out).method() == "arrow"


def test_outputs_are_tried_before_the_long_work(way: Way, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf8")
    with pytest.raises(NotADirectoryError, match="file/below"):
        answer_file(never, way.pico.tasks[0], tmp_path / "file" / "below" / "out.jsonl")
    with pytest.raises(NotADirectoryError, match="file/gates"):
        recycler.build_router("arrow", zoo=way.zoo, base="org/none", out=tmp_path / "file" / "gates")
    with pytest.raises(NotADirectoryError, match="file/answers"):
        check_answers(tmp_path / "file" / "answers", False)
    check_answers(tmp_path / "new" / "answers", False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_base_is_gone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    data = json.loads((model / "recycle.json").read_text(encoding="utf8"))
    for base in ({"id": "org/base"}, {"id": "org/base", "path": "/no/such/folder"}, {"id": "/no/such/folder"}):
        (model / "recycle.json").write_text(json.dumps({**data, "base": base}), encoding="utf8")
        with pytest.raises(HubError, match=f"The base {base['id']} cannot be had.*give --base a folder") as error:
            recycler.load(model)
        assert error.value.exit_code == 5
    with pytest.raises(InputError, match=r"is not a model folder|is not a base that can be used"):
        recycler.load(model, base=str(model))
