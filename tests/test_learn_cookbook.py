"""The cookbook, word for word: every command of docs/cookbook.md against a Hub on the loopback that has pico models and adapters under
the ids that the page names. What cannot be shown so is what those repositories hold today."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pico
import pytest
import test_docs as docs
import torch
from click.testing import CliRunner
from conftest import Pico
from hub_server import Hub, running
from test_importers import chosen, library, linear_state, mttl_info, mttl_state, stacked

import recycler
from recycler.cli import main
from recycler.shots import Shot, parse_row
from recycler.zoo.error_codes import CATALOGUE

PAGE = docs.DOCS / "cookbook.md"
TEXT = PAGE.read_text(encoding="utf8")
FLAN, LARGE, XL = "google/flan-t5-base", "google/flan-t5-large", "google/t5-xl-lm-adapt"
MISTRAL, INSTRUCT = "mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.2"
LLAMA, PHI, GRANITE = "meta-llama/Llama-2-13b-hf", "microsoft/phi-2", "ibm-granite/granite-3.3-8b-instruct"
TOKEN = "hf_a_token_of_somebody_with_access"
GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
LAND = ("magicoder", "conllpp", "dbpedia", "cnn", "gsm8k", "customer_support")
FLANV2 = ("ag_news_subset", "anli_r1", "arc_easy", "bool_q", "cola", "copa", "cosmos_qa", "dart")
# Owner → what its repositories, collections and bases are called.
OWNERS = {
    "tanganke": r"flan-t5-base_glue-(cola|mnli|mrpc|qnli|qqp|rte|sst2|stsb)_lora-16",
    "lorahub": r"flan_t5_large-\w+",
    "predibase": r"magicoder|conllpp|dbpedia|cnn|gsm8k|customer_support",
    "Styxxxx": r"llama2_13b_lora-\w+|loraretriever-llama2-13b-loras-\w+",
    "sordonia": r"library-phi_2-v3",
    "r-three": r"P3_Phatgoose",
    "ibm-granite": r"rag-intrinsics-lib|granite-3\.3-8b-rag-agent-lib|granite-3\.3-8b-instruct",
    "google": r"flan-t5-(base|large)|t5-xl-lm-adapt",
    "mistralai": r"Mistral-7B-(v0\.1|Instruct-v0\.2)",
    "meta-llama": r"Llama-2-13b-hf",
    "microsoft": r"phi-2",
}
LOTS = tuple(f"task{number:03}" for number in (81, 249, 280, 308, 350, 391, 442, 513, 587, 664, 738, 843, 1391))


def repository(folder: Path, base: str, licence: str | None = "mit", **config: Any) -> dict[str, bytes]:
    """An adapter's files as the Hub has them: it declares its base, and its card says so too."""
    held = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    told = json.loads(held["adapter_config.json"]) | {"base_model_name_or_path": base, **config}
    card = {"base_model": base, "library_name": "peft"} | ({} if licence is None else {"license": licence})
    head = "".join(f"{key}: {value}\n" for key, value in card.items())
    return {**held, "adapter_config.json": json.dumps(told).encode(), "README.md": f"---\n{head}---\nAn adapter.\n".encode()}


def below(folder: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": data for name, data in files.items()}


def made(world: Pico, name: str, folder: Path) -> Path:
    """A PEFT adapter of rank 4 on q and v, as most of these are."""
    targets = ["q", "v"] if world.kind == "t5" else ["q_proj", "v_proj"]
    return pico.make_adapter(world.base, name, {"r": 4, "lora_alpha": 8, "target_modules": targets}, folder)


def pickled(folder: Path) -> Path:
    from safetensors.torch import load_file

    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    return folder


def fill(hub: Hub, llama: Pico, t5: Pico, folder: Path) -> None:
    """What FIELD's list of zoos says is there, in pico."""
    for repo in (FLAN, LARGE, XL):
        hub.add(repo, t5.base)
    for repo in (MISTRAL, INSTRUCT, PHI, GRANITE):
        hub.add(repo, llama.base)
    hub.add(LLAMA, llama.base, gated="manual")
    hub.tokens[TOKEN] = {LLAMA}
    for task in GLUE:
        hub.add(f"tanganke/flan-t5-base_glue-{task}_lora-16", repository(made(t5, task, folder / "glue"), FLAN, "apache-2.0"))
    for name in re.findall(r"lorahub/(flan_t5_large-\w+)", TEXT):
        hub.add(f"lorahub/{name}", repository(pickled(made(t5, name, folder / "lorahub")), LARGE, None))
    for task in LAND:
        hub.add(f"predibase/{task}", repository(made(llama, task, folder / "land"), MISTRAL, "apache-2.0"))
    for task in LOTS:
        repo = f"Lots-of-LoRAs/Mistral-7B-Instruct-v0.2-4b-r16-{task}"
        hub.add(repo, repository(made(llama, task, folder / "lots"), INSTRUCT))
    for task in FLANV2:
        hub.add(f"Styxxxx/llama2_13b_lora-{task}", repository(made(llama, task, folder / "flanv2"), LLAMA, None))
    slug = re.findall(r"--collection (\S+)", TEXT)
    hub.collections = {one: [("model", f"Styxxxx/llama2_13b_lora-{task}") for task in FLANV2] for one in slug}

    shapes = chosen(llama.base, "q_proj", "v_proj")
    experts = {
        name: (mttl_state(shapes, seed=i), mttl_info(name, PHI)) for i, name in enumerate(("wiki_hop", "duorc", "dream"))
    }
    hub.add("sordonia/library-phi_2-v3", library(folder / "library", experts))
    geese = [linear_state(chosen(t5.base, "q", "k", "v", "o", "wi", "wo"), 3, seed) for seed in (0, 1000, 2000)]
    (folder / "goose").mkdir()
    torch.save(stacked(geese), folder / "goose" / "best.pt")
    hub.add("r-three/P3_Phatgoose", folder / "goose")
    one, two = (repository(made(llama, name, folder / "granite"), GRANITE, "apache-2.0") for name in ("lora", "alora"))
    active = json.loads(two["adapter_config.json"]) | {"alora_invocation_tokens": [5, 6]}
    hub.add("ibm-granite/rag-intrinsics-lib", {
        **below("answerability/lora/granite-3.3-8b-instruct", one),
        **below("answerability/alora/granite-3.3-8b-instruct", {**two, "adapter_config.json": json.dumps(active).encode()}),
    })  # fmt: skip
    hub.add("ibm-granite/granite-3.3-8b-rag-agent-lib", below("answerability_prediction_lora", one))


class Kitchen(NamedTuple):
    folder: Path
    hub: Hub
    said: list[tuple[list[str], Any]]
    """Every command, and what came of it."""


@pytest.fixture(scope="module")
def kitchen(llama: Pico, t5: Pico, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kitchen]:
    """Where the whole page has been cooked, from top to bottom."""
    folder = tmp_path_factory.mktemp("cookbook")
    with pytest.MonkeyPatch.context() as patch, running(patch, folder / "cache") as hub:
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"  # made of the endpoint when the client is imported
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("RECYCLE_ZOO", str(folder / "unused"))
        patch.chdir(folder)
        fill(hub, llama, t5, folder / "made")
        for part in ("tasks", "test"):
            pico.make_tasks(folder / part, rows=20)
        shutil.copy(folder / "test" / "math.jsonl", folder / "prompts.jsonl")
        yield Kitchen(folder, hub, list(cooked(patch)))


def cooked(patch: pytest.MonkeyPatch) -> Iterator[tuple[list[str], Any]]:
    for language, code, _ in docs.blocks(PAGE):
        for words in docs.commands(code) if language == "sh" else ():
            if words[0] == "export":
                name, _, value = words[1].partition("=")
                if name == "RECYCLE_ZOO":
                    patch.setenv(name, value)
                continue
            assert words[0] == "recycle", words
            yield words[1:], CliRunner().invoke(main, words[1:])


def test_every_command_of_the_page_does_its_work(kitchen: Kitchen) -> None:
    assert len(kitchen.said) > 35
    for words, done in kitchen.said:
        assert done.exit_code == 0, (words, done.output, done.exception)
    kept = json.loads((kitchen.folder / "zoos/lots-gates/router.json").read_text())["adapters"]
    assert 1 < len(kept) <= 12
    models = {path.parent.name: json.loads(path.read_text()) for path in kitchen.folder.glob("zoos/*-model/recycle.json")}
    assert {name: len(one["adapters"]) for name, one in models.items()} == {
        "flan-t5-model": len(GLUE), "mistral-model": len(LAND), "lots-model": len(set(kept)), "llama-model": 5,
    }  # fmt: skip
    assert len((kitchen.folder / "zoos" / "mistral-answers.jsonl").read_text().splitlines()) == 20
    held = {path.parent.name: set(recycler.Zoo(path.parent)) for path in kitchen.folder.glob("zoos/*/zoo.json")}
    assert held["mistral-again"] == held["mistral"] == set(LAND) and len(held["llama"]) == len(FLANV2)
    assert len(held["phi"]) == len(held["t5-xl"]) == 3 and held["granite"] == {"answerable", "predicted"}


def said(kitchen: Kitchen, *start: str) -> str:
    return next(done.output for words, done in kitchen.said if words[: len(start)] == list(start))


def test_what_the_page_says_of_searches(kitchen: Kitchen) -> None:
    found = said(kitchen, "search", "--base", FLAN)
    header = next(line for line in found.splitlines() if line.startswith("adapter\t"))
    assert header.split("\t") == ["adapter", "downloads", "rank", "targets", "MB", "licence", "verdict"]
    assert (
        "8 adapters of google/flan-t5-base: 8 usable" in found
        and "2 listing calls, 16 resolver calls, 0 answers from cache" in found
    )
    assert "refused: holds its weights as a pickle only" in said(kitchen, "search", "--base", LARGE)
    assert "all state apache-2.0" in said(kitchen, "zoo", "licences")


def test_the_page_names_zoos_that_are_known() -> None:
    """Ids of repositories and collections are those of the list that the page was written from, and each is in a command."""
    named = {found for _, code, _ in docs.blocks(PAGE) for found in re.findall(r"[\w.-]+/[\w.-]+", code)}
    ids = {one for one in named if one.split("/")[0] in OWNERS}
    assert {one.split("/")[0] for one in ids} == set(OWNERS)
    for owner, pattern in OWNERS.items():
        assert all(re.fullmatch(pattern, one.partition("/")[2]) for one in ids if one.startswith(f"{owner}/")), (owner, ids)


def test_rows_of_the_page_are_rows() -> None:
    rows = [line for language, code, _ in docs.blocks(PAGE) if language == "json" for line in code.splitlines()]
    assert rows and all(isinstance(parse_row(json.loads(row)), Shot) for row in rows)


def test_codes_of_the_page_are_codes() -> None:
    assert set(re.findall(r"`(E_\w+)`", TEXT)) <= set(CATALOGUE)


def test_without_access_to_the_base(kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the page says: adapters come in unchecked, and what needs the base ends with the code that is named."""
    monkeypatch.setenv("RECYCLE_ZOO", str(kitchen.folder / "stranger"))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(kitchen.folder / "cache-of-a-stranger"))
    ended = CliRunner().invoke(main, ["fetch", "Styxxxx/llama2_13b_lora-cola", "--base", LLAMA])
    assert ended.exit_code == 5 and "E_GATED" in ended.output, ended.output
    came = CliRunner().invoke(main, ["fetch", "Styxxxx/llama2_13b_lora-cola"])
    assert came.exit_code == 0 and "NOT CHECKED against its base" in came.output
    ended = CliRunner().invoke(main, ["profile", *map(str, (kitchen.folder / "tasks").glob("*.jsonl")), "--base", LLAMA])
    assert ended.exit_code == 5 and "E_GATED" in ended.output, ended.output
    strict = CliRunner().invoke(main, ["fetch", "Styxxxx/llama2_13b_lora-copa", "--strict"])
    assert strict.exit_code == 3 and "E_LICENCE" in strict.output


def test_an_activated_lora_is_refused(kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECYCLE_ZOO", str(kitchen.folder / "activated"))
    source = "ibm-granite/rag-intrinsics-lib/answerability/alora/granite-3.3-8b-instruct"
    done = CliRunner().invoke(main, ["fetch", source, "--base", GRANITE])
    assert done.exit_code == 3 and "alora_invocation_tokens" in done.output, done.output
