"""The doctor on pico models: nothing wrong where nothing is, and of what was planted, the planted defect first."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pico
import pytest
import torch
from click.testing import CliRunner
from conftest import Pico
from safetensors.torch import load_file, save_file

import recycler
from recycler.cli import main
from recycler.helping import doctor_checks as checks
from recycler.helping.doctor import Diagnosis, examine
from recycler.helping.doctor_notes import CAUSES, LEVELS, Notes
from recycler.helping.environment import variables
from recycler.zoo.store import facts_of

WEIGHTS = "adapter_model.safetensors"


class Patient(NamedTuple):
    """A zoo with a profile, a composed model, and their base."""

    zoo: recycler.Zoo
    base: Path
    model: Path

    def examine(self, **options: Any) -> Diagnosis:
        return examine(self.model, zoo=self.zoo, **options)


def _make(world: Pico, folder: Path) -> Patient:
    shutil.copytree(world.zoo, folder / "zoo")
    zoo = recycler.Zoo(folder / "zoo")
    recycler.profile(zoo, recycler.Shots.from_files(*world.tasks), 3, out="p3", base=str(world.base))
    recycler.build_router("ridge", "p3", zoo=zoo, out=folder / "gates")
    recycler.compose(zoo, folder / "gates", folder / "model").engine.detach()
    return Patient(zoo, world.base, folder / "model")


@pytest.fixture(scope="module")
def healthy(world: Pico, tmp_path_factory: pytest.TempPathFactory) -> Patient:
    return _make(world, tmp_path_factory.mktemp("healthy"))


@pytest.fixture(scope="module")
def one(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> Patient:
    return _make(llama, tmp_path_factory.mktemp("one"))


@pytest.fixture
def ill(one: Patient, tmp_path: Path) -> Patient:
    """A copy, to plant a defect in."""
    shutil.copytree(one.zoo.path, tmp_path / "zoo")
    shutil.copytree(one.model, tmp_path / "model")
    shutil.copytree(one.base, tmp_path / "base")
    return Patient(recycler.Zoo(tmp_path / "zoo"), tmp_path / "base", tmp_path / "model")


def first(found: Diagnosis) -> tuple[str, str, str | None, str | None]:
    top = found.findings[0]
    return top.level, top.about, top.code, top.subject


def said(found: Diagnosis, level: str) -> list[str]:
    return [finding.what for finding in found.findings if finding.level == level and finding.about != "hub"]


def tree(*folders: Path) -> Iterator[tuple[str, bytes]]:
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix != ".lock" and path.name != ".lock":
                yield str(path), path.read_bytes()


def test_a_sound_model_has_no_problem_and_is_left_as_it_is(healthy: Patient) -> None:
    before = dict(tree(healthy.zoo.path, healthy.model))
    found = healthy.examine()
    assert found.problems == () and found.exit_code == 0
    # The pico base has a template and plain shots, which is worth a word; nothing else is.
    assert len(said(found, "suspicion")) == 1 and "plain prompts" in said(found, "suspicion")[0]
    fine = " ".join(said(found, "ok"))
    for text in ("as when the model was made", "as it did then", "routed answers differ", "4 adapters, of which 4"):
        assert text in fine, text
    assert dict(tree(healthy.zoo.path, healthy.model)) == before
    assert examine(zoo=healthy.zoo, profile="p3").problems == ()


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(data)


def _corrupt_model(ill: Patient) -> dict[str, Any]:
    _flip(ill.model / "adapters" / "math" / WEIGHTS)
    return {}


def _corrupt_zoo(ill: Patient) -> dict[str, Any]:
    _flip(ill.zoo.folder("law") / WEIGHTS)
    return {}


def _lost(ill: Patient) -> dict[str, Any]:
    (ill.zoo.folder("law") / "adapter_config.json").unlink()
    return {}


def _rewrite(ill: Patient, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Exchanges the weights of a model's adapter, and its hash too: as somebody would who composed it so."""
    path = ill.model / "adapters" / "math" / WEIGHTS
    save_file({key: change(t) if "lora_B" in key else t for key, t in load_file(path).items()}, path)
    manifest = json.loads((ill.model / "recycle.json").read_text())
    for record in manifest["adapters"]:
        if record["name"] == "math":
            record["sha256"] = facts_of(path.parent)[WEIGHTS]["sha256"]
    (ill.model / "recycle.json").write_text(json.dumps(manifest))


def _zero(ill: Patient) -> dict[str, Any]:
    _rewrite(ill, torch.zeros_like)
    return {}


def _without_effect(ill: Patient) -> dict[str, Any]:
    _rewrite(ill, lambda b: b * 1e-12)
    return {}


def _not_finite(ill: Patient) -> dict[str, Any]:
    _rewrite(ill, lambda b: b.index_fill(0, torch.tensor([0]), float("nan")))
    return {}


def _other_base(ill: Patient) -> dict[str, Any]:
    _corrupt_router_order(ill)
    config = ill.base / "model.safetensors"
    save_file({key: t + 0.01 for key, t in load_file(config).items()}, config, {"format": "pt"})
    return {"base": str(ill.base)}


def _corrupt_router_order(ill: Patient) -> None:
    """A second, lesser defect beside the base."""
    (ill.base / "chat_template.jinja").write_text("{% if %}")


def _swapped_tokenizer(ill: Patient) -> dict[str, Any]:
    """Of the same size, with the same special tokens: only that every letter means another."""
    file = ill.base / "tokenizer.json"
    data = json.loads(file.read_text())
    names = [name for name, id in data["model"]["vocab"].items() if id > 2]
    ids = [data["model"]["vocab"][name] for name in names]
    data["model"]["vocab"] |= dict(zip(names, ids[::-1], strict=True))
    file.write_text(json.dumps(data))
    return {"base": str(ill.base)}


def _larger_tokenizer(ill: Patient) -> dict[str, Any]:
    made = pico.tokenizer(eos_at_end=False)
    made.add_tokens(["<new>", "<newer>"])
    made.save_pretrained(ill.base)
    return {"base": str(ill.base)}


def _broken_template(ill: Patient) -> dict[str, Any]:
    (ill.base / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    return {"base": str(ill.base)}


def _deaf_template(ill: Patient) -> dict[str, Any]:
    (ill.base / "chat_template.jinja").write_text("[user] {{ messages | length }}")
    return {"base": str(ill.base)}


def _no_tokenizer(ill: Patient) -> dict[str, Any]:
    (ill.base / "tokenizer.json").unlink()
    return {"base": str(ill.base)}


def _a_shard_is_missing(ill: Patient) -> dict[str, Any]:
    tensors = load_file(ill.base / "model.safetensors")
    (ill.base / "model.safetensors").rename(ill.base / "model-00001-of-00002.safetensors")
    shards = dict.fromkeys(tensors, "model-00001-of-00002.safetensors") | {
        next(iter(tensors)): "model-00002-of-00002.safetensors"
    }
    (ill.base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return {"base": str(ill.base)}


def _no_config(ill: Patient) -> dict[str, Any]:
    (ill.base / "config.json").unlink()
    return {"base": str(ill.base)}


def _shouts(ill: Patient) -> dict[str, Any]:
    _rewrite(ill, lambda b: b * 2000)
    return {}


def _no_gates(ill: Patient) -> dict[str, Any]:
    (ill.model / "router" / "router.safetensors").unlink()
    return {}


def _no_adapter(ill: Patient) -> dict[str, Any]:
    (ill.model / "adapters" / "math" / WEIGHTS).unlink()
    return {}


def _no_router(ill: Patient) -> dict[str, Any]:
    (ill.model / "router" / "router.json").unlink()
    return {}


def _no_model(ill: Patient) -> dict[str, Any]:
    (ill.model / "recycle.json").unlink()
    return {}


def _no_base(ill: Patient) -> dict[str, Any]:
    return {"base": str(ill.base / "nowhere")}


def _changed(ill: Patient) -> dict[str, Any]:
    """The zoo's adapter is another one of that name; it is whole in itself."""
    home = ill.zoo.folder("math")
    save_file({key: t * 1.5 for key, t in load_file(home / WEIGHTS).items()}, home / WEIGHTS)
    manifest = json.loads(ill.zoo.manifest.read_text())
    manifest["adapters"]["math"]["files"] = facts_of(home)
    ill.zoo.manifest.write_text(json.dumps(manifest))
    return {}


PLANTED: dict[Callable[[Patient], dict[str, Any]], tuple[str, str | None, str | None]] = {
    _corrupt_model: ("weights", "E_HASH", "math"),
    _corrupt_zoo: ("weights", "E_HASH", "law"),
    _lost: ("weights", "E_FILES", "law"),
    _zero: ("weights", "E_EMPTY", "math"),
    _not_finite: ("weights", "E_NONFINITE", "math"),
    _without_effect: ("adapters", "E_EMPTY", "math"),
    _other_base: ("base", "E_BASE_MISMATCH", None),
    _no_base: ("base", None, None),
    _swapped_tokenizer: ("tokenizer", None, None),
    _larger_tokenizer: ("tokenizer", None, None),
    _broken_template: ("template", None, None),
    _deaf_template: ("template", None, None),
    _no_router: ("router", "E_ROUTER", None),
    _no_model: ("model", "E_MODEL", None),
    _no_tokenizer: ("base", "E_BASE", None),
    _a_shard_is_missing: ("base", "E_BASE", None),
    _no_config: ("base", "E_BASE", None),
    _shouts: ("adapters", "E_OUTLIER", "math"),
    _no_gates: ("router", "E_ROUTER", None),
    _no_adapter: ("weights", "E_NO_ADAPTER", "math"),
    _changed: ("router", "E_CHANGED", None),
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__.strip("_"))
def test_the_planted_defect_comes_first(ill: Patient, plant: Callable[[Patient], dict[str, Any]]) -> None:
    options = plant(ill)
    found = ill.examine(**options)
    about, code, subject = PLANTED[plant]
    level, *rest = first(found)
    assert level == "problem" and found.exit_code == 3
    assert rest[0] == about and rest[2] == subject, found.findings[0]
    assert code is None or rest[1] == code, found.findings[0]
    assert found.findings[0].fix, "it says what to do"
    missing = {_no_tokenizer: "tokenizer.json", _a_shard_is_missing: "model-00002-of-00002", _no_config: "config.json"}
    assert plant not in missing or missing[plant] in found.findings[0].what
    if plant is _corrupt_model:
        assert any("4 adapters, of which 4" in what for what in said(found, "ok")), "the zoo's own is whole"


def test_an_odd_norm_comes_before_what_is_true_of_many(ill: Patient) -> None:
    """Of a model's adapter, and of the zoo's, by what its manifest recorded."""
    _rewrite(ill, lambda b: b * 300)
    found = ill.examine()
    assert found.exit_code == 0 and first(found) == ("suspicion", "adapters", "E_OUTLIER", "math")
    assert any("plain prompts" in what for what in said(found, "suspicion"))
    manifest = json.loads(ill.zoo.manifest.read_text())
    manifest["adapters"]["law"]["norm"] *= 1e-4
    ill.zoo.manifest.write_text(json.dumps(manifest))
    assert first(examine(zoo=ill.zoo))[1:] == ("adapters", "E_OUTLIER", "law")


def test_a_base_without_a_template(ill: Patient, one: Patient, tmp_path: Path) -> None:
    (ill.base / "chat_template.jinja").unlink()
    plain = ill.examine(base=str(ill.base))
    assert plain.problems == () and "no chat template, and the shots are plain prompts" in said(plain, "ok")
    shutil.rmtree(ill.zoo.profiles_dir)  # nobody knows what the shots were
    assert first(ill.examine(base=str(ill.base))) == ("suspicion", "template", "E_CHAT_TEMPLATE", None)
    rows = [{"messages": [{"role": "user", "content": f"Add {i}."}, {"role": "assistant", "content": "b"}]} for i in range(4)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shots = recycler.Shots.from_files(tmp_path / "sums.jsonl")
    recycler.profile(ill.zoo, shots, 2, out="chats", base=str(one.base))
    found = ill.examine(profile="chats", base=str(ill.base))
    assert first(found)[:3] == ("problem", "template", "E_CHAT_TEMPLATE") and "the shots are chats" in found.findings[0].what


def test_a_router_that_chooses_nobody(ill: Patient, tmp_path: Path) -> None:
    router = recycler.build_router("ridge", "p3", zoo=ill.zoo, policy="null", threshold=1e9)
    recycler.compose(ill.zoo, router, tmp_path / "deaf").engine.detach()
    found = examine(tmp_path / "deaf", zoo=ill.zoo)
    assert found.problems == () and any("leaves all of these prompts to the base" in what for what in said(found, "suspicion"))


def test_a_router_that_always_chooses_the_same(ill: Patient, tmp_path: Path) -> None:
    router = recycler.build_router("ridge", "p3", zoo=ill.zoo, top_k=1)
    recycler.compose(ill.zoo, router, tmp_path / "stuck").engine.detach()
    gates = tmp_path / "stuck" / "router" / "router.safetensors"
    save_file({key: torch.zeros_like(tensor) for key, tensor in load_file(gates).items()}, gates)  # all tie, and the first wins
    found = examine(tmp_path / "stuck", zoo=ill.zoo)
    assert found.problems == () and any("code answers everything" in what for what in said(found, "suspicion"))
    single = recycler.build_router("single", zoo=ill.zoo, adapter="law")
    recycler.compose(ill.zoo, single, tmp_path / "one").engine.detach()
    meant = examine(tmp_path / "one", zoo=ill.zoo)
    assert meant.problems == () and not any("answers everything" in what for what in said(meant, "suspicion"))


def test_composed_with_another_version(ill: Patient) -> None:
    manifest = json.loads((ill.model / "recycle.json").read_text())
    manifest["versions"]["transformers"] = "4.1.0"
    (ill.model / "recycle.json").write_text(json.dumps(manifest))
    assert any("composed with transformers 4.1.0 (now" in what for what in said(ill.examine(), "suspicion"))


def test_sampling_is_named(ill: Patient) -> None:
    (ill.base / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0})
    )
    found = ill.examine(base=str(ill.base))
    assert found.exit_code == 0 and any("samples (temperature 0.6)" in what for what in said(found, "suspicion"))


def test_ends_that_disagree(ill: Patient) -> None:
    for name in ("generation_config.json", "config.json"):
        data = json.loads((ill.base / name).read_text())
        (ill.base / name).write_text(json.dumps({**data, "eos_token_id": 77}))
    assert any("ends texts with id 2, the base with 77" in what for what in said(ill.examine(base=str(ill.base)), "suspicion"))


def test_what_a_killed_process_left_and_who_is_writing(ill: Patient) -> None:
    (ill.zoo.path / "adapters" / ".tmp-dead").mkdir()
    (ill.zoo.path / "zoo.json.tmp-1").write_text("{")
    (ill.zoo.path / "adapters" / "stray").mkdir()
    found = examine(zoo=ill.zoo)
    assert found.exit_code == 0
    assert any("2 leftovers" in what for what in said(found, "suspicion"))
    assert any("stray lies in the zoo" in what for what in said(found, "suspicion"))
    assert (ill.zoo.path / "adapters" / ".tmp-dead").exists()
    script = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(ill.zoo.path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        assert any("Another process is writing" in what for what in said(examine(zoo=ill.zoo), "suspicion"))
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()


def test_a_zoo_on_another_base(ill: Patient, t5: Pico) -> None:
    found = examine(zoo=ill.zoo, base=str(t5.base))
    assert first(found)[:3] == ("problem", "base", "E_SITES")
    assert {finding.subject for finding in found.problems} == {"code", "law", "math", "poem"}


def test_no_zoo_and_a_broken_one(tmp_path: Path) -> None:
    assert examine(zoo=recycler.Zoo(tmp_path / "none")).exit_code == 0
    (tmp_path / "zoo.json").write_text("{")
    assert first(examine(zoo=recycler.Zoo(tmp_path)))[:3] == ("problem", "zoo", "E_MANIFEST")
    absent = examine(zoo=recycler.Zoo(tmp_path / "none"), profile="p3")
    assert first(absent)[:3] == ("problem", "model", "E_PROFILE")


def test_versions_outside_of_the_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "peft-0.1.0.dist-info").mkdir()
    (tmp_path / "peft-0.1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = examine(zoo=recycler.Zoo(tmp_path / "none"))
    assert found.exit_code == 0 and any("peft 0.1.0 (" in what for what in said(found, "suspicion"))


def test_a_library_that_cannot_be_imported(tmp_path: Path) -> None:
    """It alone is named: whatever else fails, fails for that reason."""
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("raise ImportError(\"cannot import name 'x' from 'transformers'\")\n")
    done = subprocess.run(
        [sys.executable, "-m", "recycler.cli", "doctor", "--json"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "RECYCLE_ZOO": str(tmp_path)},
    )  # fmt: skip
    findings = json.loads(done.stdout)["findings"]
    assert done.returncode == 3 and [f["level"] for f in findings].count("problem") == 1
    assert (
        findings[0]["about"] == "installation"
        and "peft cannot be imported" in findings[0]["what"]
        and "name 'x'" in findings[0]["what"]
    )
    assert {f["about"] for f in findings} <= {"installation", "versions"}


def test_a_build_of_torch_that_sees_no_device(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    notes = Notes()
    checks.machine(notes, driver=tmp_path)
    assert notes.found[0].level == "suspicion" and f"torch {torch.__version__} sees no device" in notes.found[0].what
    assert "pytorch.org" in notes.found[0].fix or "CUDA_VISIBLE_DEVICES" in notes.found[0].fix


def test_optional_parts_and_how_to_get_them() -> None:
    notes = Notes()
    checks.extras(notes)
    (found,) = notes.found
    assert found.level == "ok" and found.what.startswith("extras: ")
    for name in ("serve", "pictures", "lm-eval", "ray", "lorahub", "datasets"):
        assert name in found.what
    assert "dev" not in found.what and ("without" in found.what) == ("pip install 'recycler[NAME]'" in found.what)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    notes = Notes()
    checks.disk(notes, {"zoo": tmp_path / "file" / "zoo", "Hub's cache": tmp_path / "new" / "cache"})
    assert [f.what for f in notes.found if f.level == "suspicion"] == [f"The zoo ({tmp_path}/file/zoo) cannot be written."]


def test_a_folder_that_is_no_base(tmp_path: Path) -> None:
    assert checks.missing_files(tmp_path) == ["config.json", "model.safetensors", "tokenizer.json"]
    found = examine(zoo=recycler.Zoo(tmp_path / "none"), base=str(tmp_path))
    assert (
        first(found)[:3] == ("problem", "base", "E_BASE")
        and "config.json, model.safetensors, tokenizer.json" in found.findings[0].what
    )


def test_a_full_disk() -> None:
    if not Path("/proc/self").exists():
        pytest.skip("no file system here has no room at all")
    notes = Notes()
    checks.disk(notes, {"zoo": Path("/proc/zoo")})
    assert notes.found[0].level == "problem" and notes.found[0].what.startswith("Only 0 MB are free for the zoo")


def test_a_base_that_is_not_here_and_may_not_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = examine(zoo=recycler.Zoo(tmp_path), base="org/base")
    assert first(found)[:3] == ("problem", "base", "E_OFFLINE") and "HF_HUB_OFFLINE" in found.findings[0].why


# ------------------------------------------------------------------------------------------------ the command


def recycle(*args: Any, zoo: Path, **env: str) -> Any:
    return CliRunner().invoke(main, [str(arg) for arg in args], env={"RECYCLE_ZOO": str(zoo), **env})


def test_the_command(ill: Patient) -> None:
    result = recycle("doctor", ill.model, "--json", zoo=ill.zoo.path)
    data = json.loads(result.stdout)
    assert result.exit_code == 0 and data["schema_version"] == 1 and data["counts"]["problem"] == 0
    assert [f["level"] for f in data["findings"]] == sorted((f["level"] for f in data["findings"]), key=LEVELS.index)
    assert {f["about"] for f in data["findings"]} <= set(CAUSES)
    assert set(data) == {"schema_version", "counts", "findings"} and set(data["counts"]) == set(LEVELS)
    assert all(set(f) == {"level", "about", "what", "why", "fix", "code", "subject"} for f in data["findings"])
    _corrupt_model(ill)
    result = recycle("doctor", ill.model, zoo=ill.zoo.path)
    assert result.exit_code == 3 and result.stdout.startswith("problem    weights       The weights of math are not those")
    assert "[E_HASH]" in result.stdout.splitlines()[0] and "1 problem and" in result.stderr


def test_no_secret_is_printed(tmp_path: Path) -> None:
    secrets = {
        "HF_TOKEN": "hf_verysecret",
        "RECYCLE_LLM_KEY": "sk-verysecret",
        "HTTPS_PROXY": "http://me:verysecret@127.0.0.1:9",
    }
    for args in (["doctor"], ["doctor", "--json"], ["env"], ["env", "--json"]):
        result = recycle(*args, zoo=tmp_path, **secrets)
        assert result.exit_code == 0 and "verysecret" not in result.output, args
    assert json.loads(result.stdout)["variables"]["HF_TOKEN"] == "(set)"
    assert json.loads(result.stdout)["variables"]["HTTPS_PROXY"] == "http://***@127.0.0.1:9"


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("HTTPS_PROXY", "http://me:verysecret@10.0.0.1:3128", "http://***@10.0.0.1:3128"),
        ("https_proxy", "me:verysecret@10.0.0.1:3128", "***@10.0.0.1:3128"),
        ("ALL_PROXY", "socks5://me:very@sec/ret@host:1", "socks5://***@host:1"),
        ("HF_ENDPOINT", "https://verysecret@hub.example", "https://***@hub.example"),
        ("HF_ENDPOINT", "https://hub.example/?token=verysecret&a=b", "https://hub.example/?token=***&a=***"),
        ("RECYCLE_LLM_ENDPOINT", "https://host/v1?api_key=verysecret#model", "https://host/v1?api_key=***"),
        ("RECYCLE_NOTE", "use hf_verysecretverysecret", "use ***"),
        ("RECYCLE_NOTE", "Authorization: Bearer verysecret", "Authorization: ***"),
        ("HF_HUB_HEADERS", "x: verysecret", "(set)"),
        ("HUGGINGFACE_API_KEY", "", "(empty)"),
        ("NO_PROXY", "localhost,127.0.0.1,.example", "localhost,127.0.0.1,.example"),
        ("RECYCLE_MODEL", "org/model@main", "org/model@main"),
        ("HF_ENDPOINT", "https://hub.example:8443/hf", "https://hub.example:8443/hf"),
    ],
)
def test_what_of_a_variable_may_be_seen(name: str, value: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert variables()[name] == shown and "verysecret" not in shown


def test_env_is_a_table_for_a_report(tmp_path: Path) -> None:
    lines = recycle("env", zoo=tmp_path / "a|b").stdout.splitlines()
    assert lines[:2] == ["| | |", "|---|---|"] and any(line.startswith("| torch | ") for line in lines)
    assert f"| `RECYCLE_ZOO` | `{tmp_path}/a\\|b` |" in lines
