"""A full fine-tune minus its base, and adapters cut to a rank: what is carried, what is lost, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from adapters import files
from click.testing import CliRunner, Result
from conftest import Pico
from hub_server import Hub, running
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_conversion import load, logits, off
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from way import Way, go

import recycler
from recycler.cli import main
from recycler.converting.extraction import extract
from recycler.run import answer_prompts
from recycler.zoo import formats
from recycler.zoo.errors import HubError, InputError, SecurityError, UsageError
from recycler.zoo.inspect import hashes


def tune(base: Path, folder: Path, *, linears_only: bool = False, steps: int = 8, **saving: Any) -> Path:
    """A pico model fine-tuned in full by AdamW, on one batch, saved as transformers saves it."""
    model = load(base)
    head = model.get_output_embeddings()
    trained = [
        parameter
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if not linears_only or (isinstance(module, torch.nn.Linear) and parameter.ndim == 2 and module is not head)
    ]
    ids = torch.randint(3, 250, (4, 12), generator=torch.Generator().manual_seed(3))
    optimiser = torch.optim.AdamW(trained, lr=3e-3)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        model.zero_grad()
    model.save_pretrained(folder, **saving)
    pico.tokenizer(eos_at_end="t5" in base.name).save_pretrained(folder)
    return folder


def with_adapter(base: Path, adapter: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(load(base), adapter).eval())


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def tuned(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico causal model, tuned in full, in several files."""
    return tune(llama.base, tmp_path_factory.mktemp("tuned") / "llama-tuned", max_shard_size="40KB")


# ----------------------------------------------------------------------------------------------------------------- what it carries


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_more_rank_the_nearer_to_the_tuned_model(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Where only linears were tuned, the adapter of full rank is the tuned model."""
    base = request.getfixturevalue(kind).base
    folder = tune(base, tmp_path / f"{kind}-tuned", linears_only=True)
    expected, bare = logits(load(folder)), logits(load(base))
    errors, distances = [], []
    for rank in (1, 4, 12, 48):
        done = extract(folder, base, rank=rank, out=tmp_path / str(rank))
        assert max(done.conversion.ranks) <= rank and done.left == ()
        errors.append(done.conversion.error)
        distances.append(float((with_adapter(base, tmp_path / str(rank)) - expected).norm() / (bare - expected).norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6
    assert distances == sorted(distances, reverse=True) and distances[0] < 0.9 and distances[2] < 0.2
    assert off(with_adapter(base, tmp_path / "48"), expected) < 1e-4


def test_what_lora_cannot_carry_is_listed(llama: Pico, tuned: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("recycler.converting.extraction._CHUNK", 100)  # tensors are compared piece by piece
    done = extract(tuned, llama.base, rank=48, out=tmp_path / "out")
    one, other = load_file(llama.base / "model.safetensors"), {}
    for shard in tuned.glob("*.safetensors"):
        other |= load_file(shard)
    squares = {key: float((one[key] - other[key]).double().square().sum()) for key in one}
    whole = sum(squares.values())
    assert {left.name: pytest.approx(squares[left.name] / whole) for left in done.left} == {
        left.name: left.share for left in done.left
    }
    assert {left.name for left in done.left} == {key for key in one if "norm" in key or "embed_tokens" in key}
    assert done.left[0].name == "model.embed_tokens.weight"  # the largest share first
    embedding = one["model.embed_tokens.weight"] - other["model.embed_tokens.weight"]
    assert done.left[0].change == pytest.approx(float(embedding.norm() / one["model.embed_tokens.weight"].norm()), rel=1e-5)
    assert done.carried == pytest.approx(1 - sum(left.share for left in done.left), abs=1e-6)
    text = "\n".join(done.lines())
    assert "LoRA cannot carry" in text and "model.embed_tokens.weight" in text
    assert done.conversion.sites == 15 and done.unchanged == 0
    json.dumps(done.to_json(), allow_nan=False)


def test_an_extracted_adapter_is_one_of_the_zoo(llama: Pico, tuned: Path, tmp_path: Path) -> None:
    """It is routed like any other, and alone at weight 1 it is what was extracted."""
    zoo = recycler.Zoo(shutil.copytree(llama.zoo, tmp_path / "zoo"))
    (tuned / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A fine-tune\n")
    done = recycler.extract(tuned, llama.base, zoo=zoo, name="tuned")
    entry = zoo.entry("tuned")
    assert entry.source == f"extracted from {tuned.resolve()}, base {llama.base.resolve()}" and entry.licence == "apache-2.0"
    assert entry.base_path == str(llama.base.resolve()) and zoo.verify() == []
    model = recycler.compose(zoo, recycler.build_router("arrow", zoo=zoo), tmp_path / "model")
    expected = with_adapter(llama.base, zoo.folder("tuned"))
    with model.only("tuned"):
        assert off(logits(model), expected) < 1e-5
    bare, whole = logits(load(llama.base)), logits(load(tuned))
    assert float((expected - whole).norm()) < 0.5 * float((bare - whole).norm())
    assert done.name == "tuned" and done.receipt is not None
    with pytest.raises(UsageError, match="holds another adapter"):
        recycler.extract(tuned, llama.base, zoo=zoo, name="tuned", rank=1)


def test_the_default_dials(llama: Pico, tuned: Path, tmp_path: Path, monkeypatch: Any) -> None:
    done = extract(tuned, llama.base, out=tmp_path / "out")
    assert 0.9 <= done.conversion.kept < 0.97
    monkeypatch.setattr("recycler.converting.extraction.RANK", 2)
    assert extract(tuned, llama.base, out=tmp_path / "two").conversion.ranks == (2,)


def test_the_same_models_give_the_same_bytes(llama: Pico, tuned: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        extract(tuned, llama.base, rank=5, out=tmp_path / name)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_head_that_is_tied_to_the_embedding_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    assert "lm_head.weight" not in load_file(tmp_path / "llama" / "model.safetensors")
    folder = tune(tmp_path / "llama", tmp_path / "tuned")
    done = extract(folder, tmp_path / "llama", out=tmp_path / "out")
    sites = formats.read(tmp_path / "out")[0].sites
    assert "lm_head" not in sites and len(sites) == done.conversion.sites == 14
    assert done.left[0].name == "model.embed_tokens.weight"


def test_a_second_copy_of_a_tied_weight_and_an_untied_one(t5: Pico, tmp_path: Path) -> None:
    """T5 ties its head and both embeddings to one weight; some files hold it several times over."""
    folder = tune(t5.base, tmp_path / "t5-tuned")
    names = load_file(folder / "model.safetensors")
    change(folder, lambda t: t.__setitem__("lm_head.weight", t["shared.weight"].clone()))
    assert "lm_head.weight" not in names and extract(folder, t5.base, out=tmp_path / "out").notes == ()
    change(folder, lambda t: t.__setitem__("extra.inv_freq", torch.ones(3)))
    assert "extra.inv_freq" in extract(folder, t5.base, out=tmp_path / "more").notes[0]
    change(folder, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(InputError, match="tied to"):
        extract(folder, t5.base, out=tmp_path / "none")


def test_only_what_changed_becomes_a_site(llama: Pico, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama.base, tmp_path / "tuned"))
    site = "model.layers.1.mlp.up_proj"

    def edit(tensors: dict[str, Tensor]) -> None:
        update = torch.outer(torch.arange(48.0), torch.ones(32)) / 1000
        tensors[f"{site}.weight"] = tensors[f"{site}.weight"] + update

    done = extract(change(folder, edit), llama.base, rank=8, out=tmp_path / "out")
    sites = formats.read(tmp_path / "out")[0].sites
    assert list(sites) == [site] and sites[site].rank == 1 and done.unchanged == 14 and done.left == ()
    assert done.conversion.error < 1e-4  # W + ΔW was rounded to fp32


def test_a_copy_in_another_type_has_not_changed(llama: Pico, tmp_path: Path) -> None:
    """bf16 rounds every weight; that is no training, and where there was some, it is said that rounding is in it."""
    folder = tmp_path / "bf16"
    load(llama.base).bfloat16().save_pretrained(folder)
    with pytest.raises(InputError, match="identical"):
        extract(folder, llama.base, out=tmp_path / "none")
    change(folder, lambda tensors: tensors["model.layers.0.self_attn.q_proj.weight"].add_(0.1))
    done = extract(folder, llama.base, rank=1, out=tmp_path / "out")
    assert done.conversion.sites == 1 and done.unchanged == 14 and "bfloat16" in done.notes[0]


def test_linears_that_are_stored_transposed(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    change(tmp_path / "gpt2", lambda t: [t.__setitem__(k.removeprefix("transformer."), t.pop(k)) for k in list(t)] and None)
    tune(tmp_path / "gpt2", tmp_path / "tuned")
    done = extract(tmp_path / "tuned", tmp_path / "gpt2", rank=48, out=tmp_path / "out")
    assert any(left.name.endswith("c_attn.bias") for left in done.left)
    expected, bare = logits(load(tmp_path / "tuned")), logits(load(tmp_path / "gpt2"))
    ours = with_adapter(tmp_path / "gpt2", tmp_path / "out")
    assert float((ours - expected).norm()) < 0.6 * float((bare - expected).norm())  # norms, biases and embeddings are not in it


# ---------------------------------------------------------------------------------------------------------------------- refusals


def test_identical_models(llama: Pico, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="identical"):
        extract(Path(shutil.copytree(llama.base, tmp_path / "copy")), llama.base, out=tmp_path / "out")


def test_a_change_of_norms_alone(llama: Pico, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama.base, tmp_path / "tuned"))
    change(folder, lambda tensors: tensors["model.norm.weight"].add_(0.1))
    with pytest.raises(InputError, match=r"no linear, only in model\.norm\.weight"):
        extract(folder, llama.base, out=tmp_path / "out")


def test_resized_embeddings(llama: Pico, tuned: Path, tmp_path: Path) -> None:
    model = load(tuned)
    model.resize_token_embeddings(270)
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(InputError, match=r"embed_tokens\.weight \(\[259, 32\] in the base, \[270, 32\]") as caught:
        extract(tmp_path / "tuned", llama.base, out=tmp_path / "out")
    assert "vocabulary" in caught.value.why + caught.value.fix and not (tmp_path / "out").exists()


def test_a_deeper_model(llama: Pico, tmp_path: Path) -> None:
    """A layer that was added must not be left out without a word; a buffer that older versions saved may be."""

    def buffer(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.layers.0.mlp.up_proj.weight"].add_(0.01)

    older = change(Path(shutil.copytree(llama.base, tmp_path / "older")), buffer)
    assert any("inv_freq" in note for note in extract(older, llama.base, out=tmp_path / "out").notes)
    deeper = Path(shutil.copytree(llama.base, tmp_path / "deeper"))
    change(deeper, lambda tensors: tensors.update({k.replace("layers.1", "layers.2"): t.clone() for k, t in tensors.items()}))
    with pytest.raises(InputError, match=r"matrices that the base has no place for: model\.layers\.2") as caught:
        extract(deeper, llama.base, out=tmp_path / "no")
    assert "depth" in caught.value.fix and not (tmp_path / "no").exists()


def test_another_architecture(llama: Pico, t5: Pico, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing on one side"):
        extract(t5.base, llama.base, out=tmp_path / "out")


def test_another_model_of_the_same_shapes(llama: Pico, tmp_path: Path) -> None:
    torch.manual_seed(77)
    model = load(llama.base)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="is not the base") as caught:
        extract(tmp_path / "other", llama.base, out=tmp_path / "out")
    assert "--force-base" in caught.value.fix
    assert extract(tmp_path / "other", llama.base, out=tmp_path / "out", force_base=True).change > 1


def test_pickles_are_not_opened(llama: Pico, tuned: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama.base, tmp_path / "pickled"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for one, other in ((folder, llama.base), (tuned, folder)):
        with pytest.raises(SecurityError, match="pickled"):
            extract(one, other, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "cannot be used"),
        ('{"weight_map": {"a": "../../secret.safetensors"}}', "is no file of the folder"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "lacks"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "which model.safetensors.index.json says"),
        ('{"weight_map": {"a": 7}}', "is no file of the folder"),
        ("[]", "cannot be used"),
    ],
)
def test_an_index_that_lies(llama: Pico, tuned: Path, tmp_path: Path, index: str, said: str) -> None:
    folder = Path(shutil.copytree(tuned, tmp_path / "tuned"))
    first = sorted(folder.glob("*.safetensors"))[0]
    first.rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=said):
        extract(folder, llama.base, out=tmp_path / "out")


def test_numbers_that_are_none(llama: Pico, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama.base, tmp_path / "tuned"))
    change(folder, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].fill_(math.nan))
    with pytest.raises(InputError, match="NaN"):
        extract(folder, llama.base, out=tmp_path / "out")


def test_what_is_there_is_not_replaced(llama: Pico, tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(UsageError, match="not empty"):
        extract(tuned, llama.base, out=tmp_path / "out")
    with pytest.raises(UsageError, match="exclude each other"):
        extract(tuned, llama.base, out=tmp_path / "new", name="tuned")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_neither_model_is_ever_in_memory(tmp_path: Path) -> None:
    """Two checkpoints of 110 MB each: what the process takes on top of what it takes for a pico model stays far below one."""
    code = """
import resource, sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)
from recycler.converting.extraction import extract
folder, layers = Path(sys.argv[1]), int(sys.argv[2])
if layers:
    config = LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=4)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    model.model.layers[0].self_attn.q_proj.weight.data += 0.01
    model.save_pretrained(folder / "tuned")
else:
    extract(folder / "tuned", folder / "base", rank=4, out=folder / "out")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    peaks = []
    for layers in (1, 42):
        folder = tmp_path / str(layers)
        folder.mkdir()
        for step in (layers, 0):
            run = subprocess.run(
                [sys.executable, "-c", code, str(folder), str(step)], capture_output=True, text=True, check=True
            )
        peaks.append(int(run.stdout.strip().splitlines()[-1]))
    size = sum(path.stat().st_size for path in (tmp_path / "42" / "base").iterdir()) >> 20
    assert size > 100 and peaks[1] - peaks[0] < size / 3, (peaks, size)


# ------------------------------------------------------------------------------------------------------------- the command line, the Hub


def recycle(*args: Any, zoo: Path | None = None) -> Result:
    env = {} if zoo is None else {"RECYCLE_ZOO": str(zoo)}
    result = CliRunner().invoke(main, [str(arg) for arg in args], env=env)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_the_command(llama: Pico, tuned: Path, tmp_path: Path) -> None:
    done = recycle("extract", "--tuned", tuned, "--base", llama.base, "--rank", 4, "--as", "mine", zoo=tmp_path / "zoo")
    assert done.exit_code == 0 and done.stdout == "mine\n", done.output
    for part in ("comparing", "factorising", "relative error", "LoRA cannot carry", "MB of memory"):
        assert part in done.stderr
    data = recycle("extract", "--tuned", tuned, "--base", llama.base, "--out", tmp_path / "out", "--energy", 0.5, "--json")
    plain = json.loads(data.stdout)
    assert plain["schema_version"] == 1 and plain["name"] is None and plain["folder"] == str(tmp_path / "out")
    assert plain["conversion"]["kept"] >= 0.5 and plain["left"][0]["name"] == "model.embed_tokens.weight"
    named = recycle("extract", "--tuned", tuned, "--base", llama.base, "--zoo", tmp_path / "zoo")
    assert named.exit_code == 0 and named.stdout == "llama-tuned\n"
    assert sorted(recycler.Zoo(tmp_path / "zoo")) == ["llama-tuned", "mine"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--rank", "0"), 2),
        (("--energy", "1.5"), 2),
        (("--as", "no such/name"), 2),
        (("--as", "one", "--out", "two"), 2),
        (("--tuned", "{base}"), 3),
        (("--tuned", "{nowhere}"), 3),
        (("--tuned", "{pickled}"), 4),
    ],
)
def test_exit_codes(llama: Pico, tuned: Path, tmp_path: Path, arguments: tuple[str, ...], code: int) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    places = {"base": llama.base, "nowhere": tmp_path / "nowhere", "pickled": pickled}
    given = [argument.format(**places) for argument in arguments]
    result = recycle("extract", "--tuned", tuned, "--base", llama.base, *given, zoo=tmp_path / "zoo")
    assert result.exit_code == code and result.stdout == "", result.output
    assert not (tmp_path / "zoo" / "zoo.json").exists()


def test_from_the_hub(llama: Pico, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both by id: the contents are verified, and the commits are recorded; then again from the cache, without a Hub."""
    with running(monkeypatch, tmp_path / "cache") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"  # made of the endpoint when the client is imported
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        shas = _from_the_hub(hub, llama.base, tuned, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    extract(f"org/tuned@{shas['org/tuned']}", f"org/base@{shas['org/base']}", rank=3, out=tmp_path / "again")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "zoo" / "adapters" / "tuned" / weights).read_bytes()


def _from_the_hub(hub: Hub, base: Path, tuned: Path, tmp_path: Path) -> dict[str, str]:
    shas = {name: hub.add(name, folder).refs["main"] for name, folder in {"org/base": base, "org/tuned": tuned}.items()}
    hub.add("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"\x80"})
    done = extract(f"org/tuned@{shas['org/tuned']}", "org/base", rank=3, zoo=recycler.Zoo(tmp_path / "zoo"))
    entry = recycler.Zoo(tmp_path / "zoo").entry("tuned")
    assert entry.base == "org/base" and entry.base_path is None and entry.base_revision == shas["org/base"]
    assert done.tuned == f"org/tuned@{shas['org/tuned']}" and shas["org/base"] in entry.source
    with pytest.raises(HubError, match="not found"):
        extract("org/none", "org/base", out=tmp_path / "out")
    with pytest.raises(SecurityError, match="pickled"):
        extract("org/pickled", "org/base", out=tmp_path / "out")
    assert not hub.lines("pytorch_model.bin")
    hub.fault("GET /repos/", "flip", times=2)
    hub.add("org/flipped", tuned)
    with pytest.raises(SecurityError, match="differ"):
        extract("org/flipped", "org/base", out=tmp_path / "out")
    return shas


# ----------------------------------------------------------------------------------------------------------- compose with --max-rank


@pytest.fixture(scope="module")
def way(world: Pico, tmp_path_factory: pytest.TempPathFactory) -> Way:
    return go(world, tmp_path_factory.mktemp(world.kind))


def dense(folder: Path) -> dict[str, Tensor]:
    return {path: f.b_OR.double() @ f.a_RD.double() for path, f in formats.read(folder)[0].sites.items()}


def test_adapters_above_the_rank_are_cut_and_the_others_stay(way: Way, tmp_path: Path) -> None:
    model = recycler.compose(way.zoo, way.router, tmp_path / "model", max_rank=3)
    assert sorted(model.truncated) == ["code", "math"]  # ranks 8 and 4; law has 2, poem 3
    records = {one["name"]: one for one in json.loads((tmp_path / "model" / "recycle.json").read_text())["adapters"]}
    for name in way.zoo:
        folder = tmp_path / "model" / "adapters" / name
        assert records[name]["sha256"] == hashes(folder / "adapter_model.safetensors")[0]
        if name not in model.truncated:
            assert files(folder) == files(way.zoo.folder(name)) and "truncated" not in records[name]
            continue
        facts = records[name]["truncated"]
        assert facts["sha256"] == way.zoo[name].sha256 != records[name]["sha256"]
        before, after = dense(way.zoo.folder(name)), dense(folder)
        lost = sum(float((before[path] - after[path]).norm()) ** 2 for path in before)
        whole = sum(float(delta.norm()) ** 2 for delta in before.values())
        best = sum(float(torch.linalg.svdvals(delta)[3:].norm()) ** 2 for delta in before.values())
        assert facts["error"] == pytest.approx(math.sqrt(lost / whole), rel=1e-5) and lost == pytest.approx(best, rel=1e-5)
        assert max(torch.linalg.matrix_rank(delta, rtol=1e-5) for delta in after.values()) == 3
        with model.only(name):  # and PEFT loads what was written
            assert off(logits(model), with_adapter(way.pico.base, folder)) < 1e-5
    card = (tmp_path / "model" / "README.md").read_text()
    assert all(cut.line(name) in card for name, cut in model.truncated.items())


def test_a_cut_model_is_loaded_as_it_was(way: Way, tmp_path: Path) -> None:
    model = recycler.compose(way.zoo, way.router, max_rank=2)
    expected = logits(model)
    model.save_pretrained(tmp_path / "model")
    loaded = recycler.load(tmp_path / "model")
    assert torch.equal(logits(loaded), expected) and loaded.truncated == model.truncated and loaded.warnings == []
    assert answer_prompts(loaded, ["Add 1 and b."], max_new_tokens=4)
    loaded.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "model")


def test_a_rank_that_nobody_exceeds_changes_nothing(way: Way, tmp_path: Path) -> None:
    model = recycler.compose(way.zoo, way.router, tmp_path / "model", max_rank=8)
    assert model.truncated == {} and files(tmp_path / "model" / "adapters") == files(way.folder / "adapters")
    with pytest.raises(UsageError):
        recycler.compose(way.zoo, way.router, tmp_path / "none", max_rank=0)


def test_dora_keeps_its_magnitude_and_the_error_is_that_of_its_update(way: Way, tmp_path: Path) -> None:
    """The magnitude scales another direction now, so that the error is not that of B·A alone."""
    model = recycler.compose(way.zoo, way.router, tmp_path / "model", max_rank=1)
    before, after = way.zoo["poem"].sites, formats.read(tmp_path / "model" / "adapters" / "poem")[0].sites
    base = load(way.pico.base)
    lost = whole = plain_lost = plain_whole = 0.0
    for path, one in before.items():
        other, w = after[path], base.get_submodule(path).weight.detach().double()
        assert one.magnitude_O is not None and other.magnitude_O is not None and torch.equal(one.magnitude_O, other.magnitude_O)
        tuned = [w + f.b_OR.double() @ f.a_RD.double() for f in (one, other)]
        first, second = (one.magnitude_O.double()[:, None] * t / t.norm(dim=1, keepdim=True) for t in tuned)
        lost, whole = lost + float((first - second).norm()) ** 2, whole + float((first - w).norm()) ** 2
        plain_lost += float((tuned[0] - tuned[1]).norm()) ** 2
        plain_whole += float((tuned[0] - w).norm()) ** 2
    cut = model.truncated["poem"]
    assert cut.error == pytest.approx(math.sqrt(lost / whole), rel=1e-4)
    assert abs(cut.error - math.sqrt(plain_lost / plain_whole)) > 1e-3
    with model.only("poem"):
        assert off(logits(model), with_adapter(way.pico.base, tmp_path / "model" / "adapters" / "poem")) < 1e-5


def test_max_rank_on_the_command_line(way: Way, tmp_path: Path) -> None:
    router = way.folder / "router"
    done = recycle("compose", "--router", router, "--out", tmp_path / "model", "--max-rank", 2, zoo=way.zoo.path)
    assert done.exit_code == 0 and done.stdout == f"{tmp_path / 'model'}\n"
    lines = [line for line in done.stderr.splitlines() if "relative error" in line]
    assert [line.split(":")[0] for line in lines] == ["code", "math", "poem"] and "rank 8 → 2" in lines[0]
    assert recycle("compose", "--router", router, "--out", tmp_path / "x", "--max-rank", 0, zoo=way.zoo.path).exit_code == 2


def test_an_edited_record_is_refused(way: Way, tmp_path: Path) -> None:
    recycler.compose(way.zoo, way.router, tmp_path / "model", max_rank=2)
    file = tmp_path / "model" / "recycle.json"
    plain = json.loads(file.read_text())
    plain["adapters"][0]["truncated"] = {"rank": "two"}
    file.write_text(json.dumps(plain))
    with pytest.raises(InputError, match="cannot be read"):
        recycler.load(tmp_path / "model")
