"""What is no LoRA in safetensors, through fetch: pickles, libraries of other projects, kinds that are converted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import CONFIG, files, tensors
from conftest import Pico
from hub_server import Hub, running
from transformers import AutoModelForCausalLM

from recycler.commands.fetch import fetch_command
from recycler.intake.fetching import fetch
from recycler.zoo import importers
from recycler.zoo.errors import HubError, InputError, RecycleError, SecurityError
from recycler.zoo.store import Zoo


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    return Zoo(tmp_path / "zoo")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(monkeypatch, tmp_path / "cache") as server:
        monkeypatch.undo()  # sleep: a sandbox is waited for
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def pickled(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A PEFT adapter as older versions saved it."""
    folder.mkdir(parents=True)
    torch.save(tensors(seed=seed), folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, "base_model_name_or_path": None, **config}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def library(folder: Path, names: list[str]) -> Path:
    """An mttl library: a pickle of tensors and a pickle of facts for every expert."""
    folder.mkdir(parents=True)
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        state = {}
        for layer in range(2):
            state[f"model.layers.{layer}.self_attn.q_proj.lora_a"] = torch.randn(16, 4, generator=generator)
            state[f"model.layers.{layer}.self_attn.q_proj.lora_b"] = torch.randn(4, 16, generator=generator)
        config = {"lora_rank": 4, "lora_alpha": 16.0, "class_name": "mttl.models.modifiers.lora.LoRAConfig"}
        torch.save(state, folder / f"{name}.ckpt")
        torch.save({"expert_name": name, "expert_config": config, "expert_deleted": False}, folder / f"{name}.meta")
    return folder


def other_kind(base: Path, folder: Path, config: Any, seed: int = 0) -> Path:
    """An adapter written by PEFT, with random numbers in all it trains."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


def loha(base: Path, folder: Path) -> Path:
    return other_kind(base, folder, peft.LoHaConfig(r=3, alpha=6, target_modules=["q_proj", "v_proj"]))


def contents(zoo: Zoo) -> dict[str, bytes]:
    return {name: data for name, data in files(zoo.path).items() if not name.endswith(".lock")}


def without_time(zoo: Zoo) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(zoo.manifest.read_text())["adapters"]
    return {name: {**entry, "added": ""} for name, entry in data.items()}


# ------------------------------------------------------------------------------------------------------------------- pickles


def test_pickles_are_refused_unless_allowed(zoo: Zoo, hub: Hub, tmp_path: Path) -> None:
    hub.add("org/old", pickled(tmp_path / "old"))
    hub.add("org/experts", library(tmp_path / "experts", ["math", "law"]))
    for source in ("org/old", "org/experts", tmp_path / "old", tmp_path / "experts"):
        for dry_run in (False, True):
            with pytest.raises(SecurityError, match=r"pickles? only: .*--allow-pickle") as caught:
                fetch(source, zoo=zoo, dry_run=dry_run, endpoint=hub.url)
            assert caught.value.exit_code == 4
    assert not hub.lines("/resolve/") and not zoo.manifest.exists()


def test_a_pickled_adapter(zoo: Zoo, hub: Hub, tmp_path: Path) -> None:
    hub.add("org/old", pickled(tmp_path / "old"))
    plan = fetch("org/old", zoo=zoo, allow_pickle=True, dry_run=True, endpoint=hub.url)
    assert "1 pickles in the layout of peft" in str(plan) and not hub.lines("GET /repos/")
    report = fetch("org/old", zoo=zoo, allow_pickle=True, endpoint=hub.url)
    entry = zoo.entry("old")
    assert report.names == ["old"] and zoo.verify() == [] and entry.licence == "mit"
    assert entry.converted is not None
    assert entry.converted["layout"] == "peft" and set(entry.converted["files"]) == {
        "adapter_model.bin", "adapter_config.json", "README.md",
    }  # fmt: skip
    assert set(entry.files) == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert "opened apart by torch" in str(report)
    site = zoo["old"].sites["model.layers.0.self_attn.q_proj"]
    assert torch.equal(site.a_RD, tensors()["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"])
    asked = len(hub.log)
    again = fetch("org/old", zoo=zoo, allow_pickle=True, endpoint=hub.url)
    assert "already" in str(again) and len(hub.log) == asked + 1
    local = Zoo(tmp_path / "local")
    fetch(tmp_path / "old", zoo=local, allow_pickle=True)
    assert local.entry("old").files == entry.files


def test_a_payload_does_nothing(zoo: Zoo, hub: Hub, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {canary}",)

    folder = pickled(tmp_path / "evil")
    torch.save({"x": Evil()}, folder / "adapter_model.bin")
    hub.add("org/evil", folder)
    for source in ("org/evil", folder):
        with pytest.raises(SecurityError) as caught:
            fetch(source, zoo=zoo, allow_pickle=True, endpoint=hub.url)
        assert caught.value.exit_code == 4
    assert not canary.exists() and not zoo.manifest.exists()


def test_a_library_gives_many_adapters(zoo: Zoo, hub: Hub, tmp_path: Path) -> None:
    folder = library(tmp_path / "experts", ["Math Word", "law", "code"])
    (folder / "law.ckpt").write_bytes((folder / "law.ckpt").read_bytes()[:-300])  # one is cut
    hub.add("org/experts", folder)
    report = fetch("org/experts", zoo=zoo, allow_pickle=True, endpoint=hub.url)
    assert sorted(report.names) == ["code", "math-word"] == sorted(zoo) and zoo.verify() == []
    assert [f.name for f in report.failures] == ["law"] and report.failures[0].error.exit_code == 3
    entry = zoo.entry("math-word")
    assert entry.converted is not None
    assert entry.converted["expert"] == "Math Word" and set(entry.converted["files"]) == {"Math Word.ckpt", "Math Word.meta"}
    named = fetch("org/experts", zoo=zoo, names=["lib"], allow_pickle=True, endpoint=hub.url)
    assert sorted(named.names) == ["lib-code", "lib-math-word"]
    assert sorted(fetch(folder, zoo=Zoo(tmp_path / "other"), allow_pickle=True, layout="mttl").names) == ["code", "math-word"]


def test_layouts_of_the_command_are_those_of_the_library() -> None:
    (option,) = (p for p in fetch_command.params if p.name == "layout")
    assert tuple(option.type.choices) == ("auto", *importers.LAYOUTS)  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------------------- conversions


def test_a_kind_that_is_converted(zoo: Zoo, hub: Hub, llama: Pico, tmp_path: Path) -> None:
    folder = loha(llama.base, tmp_path / "loha")
    hub.add("org/loha", folder)
    plan = fetch("org/loha", llama.base, zoo, dry_run=True, endpoint=hub.url)
    assert "LoHa; it would be converted into LoRA with a loss that is then measured" in str(plan)
    report = fetch("org/loha", llama.base, zoo, endpoint=hub.url)
    entry = zoo.entry("loha")
    assert entry.converted is not None and zoo.verify() == []
    assert entry.converted["kind"] == "LoHa" and entry.converted["error"] < 1e-3 and entry.base_path == str(llama.base)
    assert set(entry.converted["files"]) >= {"adapter_config.json", "adapter_model.safetensors"}
    assert "converted from LoHa: 4 sites" in str(report) and entry.kinds == ("LoRA",)
    asked = len(hub.log)
    fetch("org/loha", llama.base, zoo, endpoint=hub.url)
    assert len(hub.log) == asked + 1
    cut = Zoo(tmp_path / "cut")
    fetch("org/loha", llama.base, cut, rank=2, endpoint=hub.url)
    narrow = cut.entry("loha")
    assert narrow.ranks == (2,) and narrow.converted and narrow.converted["rank"] == 2 and narrow.converted["error"] > 0.01
    with pytest.raises(InputError, match=r"The base \./nowhere is not a folder"):
        fetch("org/loha", "./nowhere", Zoo(tmp_path / "none"), endpoint=hub.url)


def test_a_converted_adapter_from_a_lock(
    zoo: Zoo, hub: Hub, llama: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/loha", loha(llama.base, tmp_path / "loha"))
    hub.add("org/old", pickled(tmp_path / "old"))
    fetch(["org/loha"], llama.base, zoo, rank=3, endpoint=hub.url)
    fetch("org/old", zoo=zoo, allow_pickle=True, endpoint=hub.url)
    report = fetch(lock=zoo.manifest, zoo=Zoo(tmp_path / "one"), endpoint=hub.url)
    assert report.names == ["loha"] and report.failures[0].error.exit_code == 4  # pickles are this person's choice again
    one, two = Zoo(tmp_path / "one"), Zoo(tmp_path / "two")
    for mine in (one, two):
        fetch(lock=zoo.manifest, zoo=mine, allow_pickle=True, endpoint=hub.url).raise_for_failures()
    assert contents(one) == contents(two) and one.verify() == []
    assert {n: d for n, d in contents(one).items() if n != "zoo.json"} == {
        n: d for n, d in contents(zoo).items() if n != "zoo.json"
    }
    assert one.entry("loha").converted == zoo.entry("loha").converted and one.entry("old") == zoo.entry("old")

    from recycler.converting import conversion

    real = conversion.convert

    def rounding_otherwise(folder: Path, into: Path, **options: Any) -> conversion.Conversion:
        from safetensors.torch import load_file, save_file

        done = real(folder, into, **options)
        weights = {key: tensor * (1 + 1e-6) for key, tensor in load_file(into / "adapter_model.safetensors").items()}
        save_file(weights, into / "adapter_model.safetensors")
        return done

    monkeypatch.setattr(conversion, "convert", rounding_otherwise)
    elsewhere = Zoo(tmp_path / "elsewhere")
    report = fetch(lock=zoo.manifest, zoo=elsewhere, allow_pickle=True, endpoint=hub.url)
    (told,) = (one for one in report.fetched if one.name == "loha")
    assert told.receipt and "differs from the lock in its bytes" in " ".join(told.receipt.warnings)
    assert elsewhere.verify() == []
    again = fetch(lock=zoo.manifest, zoo=elsewhere, allow_pickle=True, endpoint=hub.url)
    assert "already" in str(again) and elsewhere.verify() == []


def test_a_start_that_lies_beside_it(zoo: Zoo, hub: Hub, llama: Pico, tmp_path: Path) -> None:
    """CorDA's start cannot be computed again; where it lies beside the adapter, the adapter can be used, from the Hub too."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "corda"
    start = folder / "corda_init"
    other_kind(llama.base, start, peft.LoraConfig(r=2, target_modules=["q_proj"]), seed=1)
    other_kind(llama.base, folder, peft.LoraConfig(r=2, target_modules=["q_proj"]), seed=2)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "corda"}))
    hub.add("org/corda", folder)
    assert "CorDA; it would be converted" in str(fetch("org/corda", llama.base, zoo, dry_run=True, endpoint=hub.url))
    fetch("org/corda", llama.base, zoo, endpoint=hub.url)
    entry = zoo.entry("corda")
    assert entry.ranks == (4,) and entry.converted and "corda_init/adapter_model.safetensors" in entry.converted["files"]
    before, after = (load_file(path / "adapter_model.safetensors") for path in (start, folder))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    scale = config["lora_alpha"] / 2
    expected = scale * (after[key.format("B")] @ after[key.format("A")] - before[key.format("B")] @ before[key.format("A")])
    site = zoo["corda"].sites["model.layers.0.self_attn.q_proj"]
    assert torch.allclose(site.b_OR @ site.a_RD, expected, atol=1e-5)
    local, restored = Zoo(tmp_path / "local"), Zoo(tmp_path / "restored")
    fetch(folder, llama.base, local)
    fetch(lock=zoo.manifest, zoo=restored, endpoint=hub.url)
    assert local.entry("corda").files == entry.files == restored.entry("corda").files
    hub.add("org/alone", {p: d for p, d in files(folder).items() if not p.startswith("corda_init")})
    with pytest.raises(InputError, match="CorDA"):
        fetch("org/alone", llama.base, zoo, endpoint=hub.url)
    save_file({}, start / "adapter_model.safetensors")
    with pytest.raises((InputError, SecurityError)):
        fetch(folder, llama.base, Zoo(tmp_path / "spoilt"))


def test_a_plain_adapter_leaves_its_start_where_it_is(zoo: Zoo, hub: Hub, llama: Pico, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    other_kind(llama.base, folder / "pissa_init", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    other_kind(llama.base, folder, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    hub.add("org/plain", folder)
    fetch("org/plain", llama.base, zoo, endpoint=hub.url)
    assert not hub.lines("pissa_init") and zoo.entry("plain").converted is None


# -------------------------------------------------------------------------------------------------- dry runs of conversions


def on_the_hub(hub: Hub, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """org/base, which the client finds without being told where the Hub is."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    hub.add("org/base", base)


def declaring(folder: Path, **settings: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def refused_alike(zoo: Zoo, hub: Hub, source: Path, base: str | Path | None, error: type[RecycleError], text: str) -> None:
    """From a folder and from the Hub, with and without --dry-run."""
    repo = f"org/odd-{len(hub.repos)}"
    hub.add(repo, source)
    for place in (source, repo):
        for dry_run in (True, False):
            with pytest.raises(error, match=text) as caught:
                fetch(place, base, zoo, dry_run=dry_run, endpoint=hub.url)
            assert caught.value.exit_code == error.exit_code
    assert not zoo.manifest.exists()


def test_a_dry_run_refuses_a_conversion_for_another_base(
    zoo: Zoo, hub: Hub, llama: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_hub(hub, llama.base, monkeypatch)
    hub.add("org/other", llama.base)
    folder = declaring(loha(llama.base, tmp_path / "odd"), base_model_name_or_path="org/base")
    refused_alike(zoo, hub, folder, "org/other", InputError, r"trained for org/base, not for org/other")
    plan = fetch(folder, "org/other", zoo, base_alias=["org/base"], dry_run=True, endpoint=hub.url)
    assert plan.fetched[0].base == "org/other" and "said to be another name of org/other" in str(plan)


def test_a_dry_run_refuses_a_conversion_of_garbage(zoo: Zoo, hub: Hub, llama: Pico, tmp_path: Path) -> None:
    folder = loha(llama.base, tmp_path / "odd")
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 4000)
    refused_alike(zoo, hub, folder, llama.base, SecurityError, "adapter_model.safetensors")


def test_a_dry_run_refuses_a_conversion_that_does_not_fit(zoo: Zoo, hub: Hub, llama: Pico, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = loha(llama.base, tmp_path / "odd")
    weights = folder / "adapter_model.safetensors"
    save_file({name.replace("layers.1.", "layers.7."): tensor for name, tensor in load_file(weights).items()}, weights)
    refused_alike(zoo, hub, folder, llama.base, InputError, r"2 of 4 sites are not in it: model\.layers\.7\.")


def test_a_dry_run_refuses_a_conversion_without_its_base(
    zoo: Zoo, hub: Hub, llama: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_hub(hub, llama.base, monkeypatch)
    folder = declaring(loha(llama.base, tmp_path / "odd"), base_model_name_or_path="org/absent")
    refused_alike(zoo, hub, folder, "org/absent", HubError, "org/absent cannot be had")
    refused_alike(zoo, hub, folder, None, HubError, "org/absent cannot be had")
    refused_alike(zoo, hub, declaring(folder, base_model_name_or_path=None), None, InputError, "its base is not known")
    with pytest.raises(InputError, match="on another machine"):
        fetch(declaring(folder, base_model_name_or_path="//host/share"), zoo=zoo, dry_run=True)


def test_a_dry_run_of_a_conversion_says_the_rest(zoo: Zoo, hub: Hub, llama: Pico, tmp_path: Path) -> None:
    folder = loha(llama.base, tmp_path / "odd")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    hub.add("org/odd", folder)
    silent = loha(llama.base, tmp_path / "silent")
    (silent / "README.md").unlink()
    for source in (folder, "org/odd"):
        (plan,) = fetch(source, llama.base, zoo, license_allow=["mit"], dry_run=True, endpoint=hub.url).fetched
        assert plan.licence == "mit" and plan.base_path == str(llama.base) and "fits the base in" in plan.plan
    assert "states no licence" in str(fetch(silent, llama.base, zoo, license_allow=["mit"], dry_run=True))


# --------------------------------------------------------------------------------------------------- the commit of the base


def test_the_commit_of_the_base_is_recorded(
    zoo: Zoo, hub: Hub, llama: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_hub(hub, llama.base, monkeypatch)
    one, two, three = (
        declaring(other_kind(llama.base, tmp_path / name, peft.LoraConfig(r=2), seed), **said)
        for seed, (name, said) in enumerate(
            {
                "one": {"base_model_name_or_path": "org/base"},
                "two": {"base_model_name_or_path": "org/base", "revision": "v1"},
                "three": {"base_model_name_or_path": None},
            }.items()
        )
    )
    commit = hub.repos["org/base"].refs["main"]
    fetch([one, two, three], zoo=zoo).raise_for_failures()
    assert [zoo.entry(name).base_revision for name in ("one", "two", "three")] == [commit, "v1", None]
    fetch(three, "org/base", zoo)  # the base, said later, comes with its commit
    assert zoo.entry("three").base_revision == commit

    asked = len(hub.log)
    offline, copy, restored = Zoo(tmp_path / "offline"), Zoo(tmp_path / "copy"), Zoo(tmp_path / "restored")
    fetch(one, "org/base", offline, offline=True)
    fetch(one, llama.base, copy)
    assert offline.entry("one").base_revision == commit and copy.entry("one").base_revision is None
    assert len(hub.log) == asked

    hub.repos["org/base"].commit({**files(llama.base), "README.md": b"went on"})
    kept = zoo.manifest.read_bytes()
    fetch([one, three], "org/base", zoo).raise_for_failures()
    assert zoo.manifest.read_bytes() == kept
    fetch(lock=zoo.manifest, zoo=restored).raise_for_failures()
    assert without_time(restored) == without_time(zoo)
