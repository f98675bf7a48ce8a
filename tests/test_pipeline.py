"""The whole way in Python on pico models: fetch → profile → build_router → compose → load → run → evaluate."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from adapters import files
from conftest import Pico
from safetensors.torch import load_file, save_file
from torch import Tensor

import recycler
from recycler import Profile, Router, Shots
from recycler.base import load_base
from recycler.evaluation import Evaluation, evaluate
from recycler.run import answer_file, answer_prompts, check_answers
from recycler.zoo.errors import HubError, InputError, SecurityError, UsageError

NAMES = ("code", "law", "math", "poem")
PROMPTS = ["Add 1 and b.", "O 3 of the long, long poem!"]


class Way(NamedTuple):
    """One pico world, and what was made from it once."""

    pico: Pico
    zoo: recycler.Zoo
    profile: Profile
    router: Router
    folder: Path  # the composed model


@pytest.fixture(scope="module")
def way(world: Pico, tmp_path_factory: pytest.TempPathFactory) -> Way:
    """Made once. Tests that change something copy it."""
    folder = tmp_path_factory.mktemp("way")
    zoo = recycler.Zoo(world.zoo)
    profile = recycler.profile(zoo, shots=Shots.from_files(*world.tasks), kshot=3, out=folder / "p3")
    router = recycler.build_router("ridge", profile, zoo=zoo, out=folder / "gates")
    recycler.compose(zoo, router, folder / "model").engine.detach()
    return Way(world, zoo, profile, router, folder / "model")


@pytest.fixture
def model(way: Way, tmp_path: Path) -> Path:
    """A composed model to do damage to."""
    return Path(shutil.copytree(way.folder, tmp_path / "model"))


def logits(model: Any, prompt: str = PROMPTS[0]) -> Tensor:
    inputs = dict(model.tokenizer(prompt, return_tensors="pt"))
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[0, 9, 42]])
    with torch.no_grad():
        result: Tensor = model(**inputs).logits
    return result


def one_by_one(model: Any, prompts: list[str], new: int) -> list[str]:
    """Greedy answers, a prompt at a time, by `generate` itself."""
    texts = []
    for prompt in prompts:
        inputs = model.tokenizer(prompt, return_tensors="pt")
        start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        ids = model.generate(**inputs, max_new_tokens=new, do_sample=False)[0, start:]
        texts.append(model.tokenizer.decode(ids, skip_special_tokens=True))
    return texts


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
    loaded = Router.load(tmp_path / "gates")
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
    assert "not stated for code, law, math, poem" in text and "ridge=30.0" in text


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
    assert facts["license"] == "mit | <b>odd</b>" and "<b>" not in text
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
    assert recycler.Router.load(out).method() == "arrow"


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


# -------------------------------------------------------------------------------------------------------------- answering


def test_answers_keep_order_and_rows(way: Way, tmp_path: Path) -> None:
    rows = [{"prompt": "x" * (i * 7 % 5 + 1), "id": i, "nested": {"ü": [None, 1.5]}} for i in range(7)]
    rows[3] = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the reference"}], "id": 3}
    source, target = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    source.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf8")
    model = recycler.load(way.folder)
    lines = answer_file(lambda: model, source, target, max_new_tokens=4, batch_size=3)
    written = [json.loads(line) for line in target.read_text(encoding="utf8").split("\n") if line]
    assert [json.loads(line) for line in lines] == written and [row["id"] for row in written] == list(range(7))
    assert [{key: value for key, value in row.items() if key != "generated"} for row in written] == rows
    chat = model.tokenizer.apply_chat_template(rows[3]["messages"][:1], tokenize=False, add_generation_prompt=True)  # type: ignore[index]
    prompts = [chat if i == 3 else str(row["prompt"]) for i, row in enumerate(rows) if i != 3 or way.pico.kind == "llama"]
    answers = [row["generated"] for i, row in enumerate(written) if i != 3 or way.pico.kind == "llama"]
    assert answers == one_by_one(model, prompts, 4)
    assert [path.name for path in target.parent.iterdir()] == ["out.jsonl"]


def test_only_one_adapter_or_none(way: Way) -> None:
    model = recycler.load(way.folder)
    with model.only("code"):
        expected = one_by_one(model, PROMPTS, 4)
    assert answer_prompts(model, PROMPTS, max_new_tokens=4, only="code") == expected
    with model.disabled():
        plain = one_by_one(model, PROMPTS, 4)
    assert answer_prompts(model, PROMPTS, max_new_tokens=4, only="base") == plain != expected
    with pytest.raises(UsageError, match=r"no adapter prose.*code, law, math, poem"):
        answer_prompts(model, PROMPTS, only="prose")


@pytest.mark.parametrize("prompt", ["", " \n", "half \ud83d"])
def test_prompts_that_are_no_text(way: Way, prompt: str) -> None:
    with pytest.raises(UsageError, match="cannot be used"):
        answer_prompts(recycler.load(way.folder), ["fine", prompt])


def never() -> Any:
    raise AssertionError("the model was loaded before the input was checked")


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "a"}\n{"prompt": 3}\n{"text": "b"}\nnope\n', r"3 rows .*:4 \(not JSON\).*:2 \(no text.*:3 \(no text"),
        (
            '{"messages": []}\n{"messages": [1]}\n[]\n',
            r"3 rows .*:1 \(messages hold no.*:2 \(messages must.*:3 \(not an object",
        ),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', "messages hold no prompt"),
        ('{"prompt": "\\ud83d"}', "surrogate"),
        ("\n", "is empty"),
    ],
)
def test_rows_that_cannot_be_answered(tmp_path: Path, text: str, message: str) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(text, encoding="utf8")
    with pytest.raises(InputError, match=message):
        answer_file(never, source, target)
    assert not target.exists()


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}', encoding="utf8")
    with pytest.raises(UsageError, match=r"exists.*--force"):
        answer_file(never, source, source)
    with pytest.raises(UsageError, match="is a folder"):
        answer_file(never, source, tmp_path, force=True)
    with pytest.raises(UsageError, match="There is no file"):
        answer_file(never, tmp_path / "none.jsonl", None)


# ------------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_stands_beside_the_right_baselines(way: Way) -> None:
    model = recycler.load(way.folder)
    shots = Shots({task: rows[:2] for task, rows in Shots.from_files(*way.pico.tasks).items()})
    arrow = recycler.build_router("arrow", zoo=way.zoo)
    result = evaluate(model, shots, routers={"ridge": way.router, "arrow": arrow}, max_new_tokens=4)
    assert result.contenders == ("base", "best single", "uniform", "oracle", "ridge", "arrow")
    assert result.routers == ("ridge", "arrow") and result.tasks == way.profile.tasks
    known = way.router.facts["profile"]
    single = known["best_single"] or "base"
    assert result.chosen["best_single"] == {"adapter": single, "how": "by profile"}
    arrows = recycler.compose(way.zoo, arrow)
    assert model.router is not None and model.router.facts == way.router.facts  # its own router is back
    for task, rows in shots.items():
        prompts = [shot.prompt for shot in rows]
        own = known["owner"].get(task)
        assert result.chosen["oracle"][task] == {"adapter": own or "base", "how": "by profile"}
        with model.disabled():
            assert result.generated["base"][task] == (plain := one_by_one(model, prompts, 4))
        with model.mixture(dict.fromkeys(NAMES, 0.25)):
            assert result.generated["uniform"][task] == one_by_one(model, prompts, 4)
        with model.only(own or "math"):
            assert result.generated["oracle"][task] == (one_by_one(model, prompts, 4) if own else plain)
        with model.only(single if single != "base" else "math"):
            assert result.generated["best single"][task] == (one_by_one(model, prompts, 4) if single != "base" else plain)
        assert result.generated["ridge"][task] == one_by_one(model, prompts, 4)
        assert result.generated["arrow"][task] == one_by_one(arrows, prompts, 4)
    assert "Don't bother" in result.verdict()  # nobody ever answers well here
    data = json.loads(json.dumps(result.to_json()))
    assert data["schema_version"] == 1 and set(data["contenders"]) == set(result.contenders)


def test_nll_of_the_baselines(way: Way) -> None:
    """The profile's shots, evaluated: the same numbers by another way."""
    model = recycler.load(way.folder)
    result = evaluate(model, way.profile.shots, max_new_tokens=1)
    rows = {name: row for row, name in enumerate(("base", *NAMES))}
    for column, task in enumerate(way.profile.tasks):
        for label, name in (("base", "base"), ("oracle", result.chosen["oracle"][task]["adapter"])):
            expected = way.profile.nll[rows[name], column]
            torch.testing.assert_close(torch.tensor(result.nll[label][task]), expected, atol=1e-4, rtol=1e-4)
    assert result.mean("oracle", "nll") <= min(result.mean(c, "nll") for c in ("base", "best single")) + 1e-4


def test_baselines_in_hindsight(way: Way) -> None:
    """A router that was built without shots: whoever scores best on the rows stands behind the baselines."""
    model = recycler.compose(way.zoo, recycler.build_router("arrow", zoo=way.zoo))
    result = evaluate(model, way.profile.shots, owner={way.profile.tasks[0]: "poem"}, max_new_tokens=1)
    nll_RT = way.profile.nll.mean(-1)
    names = ("base", *NAMES)
    assert result.chosen["oracle"][way.profile.tasks[0]] == {"adapter": "poem", "how": "by hand"}
    for column, task in enumerate(way.profile.tasks[1:], 1):
        best = names[int(nll_RT[:, column].argmin())]
        assert result.chosen["oracle"][task] == {"adapter": best, "how": "in hindsight"}
    best = names[int(nll_RT.mean(1).argmin())]
    assert result.chosen["best_single"] == {"adapter": best, "how": "in hindsight"}


def test_a_router_that_is_called_like_a_baseline(way: Way) -> None:
    model = recycler.compose(way.zoo, recycler.build_router("uniform", way.profile, zoo=way.zoo))
    result = evaluate(model, Shots({"math": way.profile.shots["math"]}), max_new_tokens=2)
    assert result.contenders == ("base", "best single", "uniform", "oracle", "uniform router")
    assert result.generated["uniform router"] == result.generated["uniform"]
    assert result.verdict().startswith("Don't bother")


def test_what_evaluation_refuses(way: Way) -> None:
    model = recycler.load(way.folder)
    shots = Shots({"math": way.profile.shots["math"]})
    other = recycler.build_router("uniform", zoo=way.zoo, adapters=["math", "law"])
    before = model.router
    for options, message in (
        ({"owner": {"math": "prose"}}, "no adapter 'prose'"),
        ({"owner": {"prose": "math"}}, "no task 'prose'"),
        ({"routers": {"other": other}}, "The router is for math, law"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(model, shots, progress=lambda steps, what: never(), **options)  # type: ignore[arg-type]
    assert model.router is before
    for nothing in (Shots({}), Shots({"math": []})):
        with pytest.raises(UsageError, match="no rows to evaluate"):
            evaluate(model, nothing)
    model.use(None)
    with pytest.raises(UsageError, match="no router to evaluate"):
        evaluate(model, shots)


def by_hand(**exact: list[float]) -> Evaluation:
    """An evaluation of one task; `ridge` and `arrow` are its routers."""
    table = {name.replace("_", " "): {"math": rows} for name, rows in exact.items()}
    return Evaluation(tuple(table), tuple(c for c in table if c in ("ridge", "arrow")), table, table, {}, {})


def test_verdict() -> None:
    none, half, all_ = [0.0] * 40, [0.0, 1.0] * 20, [1.0] * 40
    helps = by_hand(base=none, best_single=half, uniform=none, oracle=all_, ridge=all_)
    assert helps.verdict() == "Routing helps: ridge 1.000, best single 0.500: +0.500 [+0.350, +0.650]."
    worse = by_hand(base=none, best_single=all_, uniform=none, oracle=all_, ridge=half)
    assert worse.verdict().startswith("Don't bother: routing loses to best single (ridge 0.500, best single 1.000: -0.500 [")
    same = by_hand(base=half, best_single=none, uniform=none, oracle=all_, ridge=half)
    assert same.verdict().startswith("Don't bother: no gain that these rows can show") and "Use base" in same.verdict()
    slight = by_hand(base=none, best_single=none, uniform=half, oracle=all_, ridge=[1.0, *half[1:]])
    assert slight.verdict().startswith("Don't bother: no gain") and "Use uniform" in slight.verdict()
    # The oracle knows the task and is nobody's rival; the best of several routers speaks for routing.
    several = by_hand(base=none, best_single=none, uniform=none, oracle=all_, ridge=none, arrow=half)
    assert several.verdict().startswith("Routing helps: arrow 0.500, base 0.000")


def test_intervals() -> None:
    result = by_hand(base=[0.0] * 50, ridge=[1.0] * 50, arrow=[0.0, 1.0] * 25)
    assert result.interval("base") == (0.0, 0.0) and result.interval("ridge") == (1.0, 1.0)
    low, high = result.interval("arrow")
    assert low < 0.5 < high and 0.24 < high - low < 0.31  # 2 × 1.96 × √(0.25 / 50) = 0.277
    assert result.interval("arrow") == (low, high)  # the same every time
    assert result.interval("ridge", minus="base") == (1.0, 1.0) and result.interval("arrow", minus="arrow") == (0.0, 0.0)
    down, up = result.interval("base", minus="arrow")
    assert down == pytest.approx(-high) and up == pytest.approx(-low)


def test_every_task_counts_the_same() -> None:
    table = {c: {"math": [value] * 90, "law": [0.0] * 10} for c, value in (("base", 0.0), ("ridge", 1.0))}
    result = Evaluation(("base", "ridge"), ("ridge",), table, table, {}, {})
    assert result.mean("ridge") == 0.5 and result.interval("ridge") == (0.5, 0.5)
