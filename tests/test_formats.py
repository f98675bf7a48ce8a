"""PEFT folders → factors: against PEFT itself as the reference, and every refusal by name."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import PREFIX, SHAPES, tensors, write
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.utils.other import get_pattern_key

from recycler.zoo import config, formats, inspect, match, patterns
from recycler.zoo.adapter import Adapter
from recycler.zoo.errors import InputError, RecycleError, SecurityError
from recycler.zoo.kinds import kind_of

Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


def pico_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def pico_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def trained(base: Any, **options: Any) -> Any:
    """A PEFT model whose factors are random, as if trained."""
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + noise if "magnitude" in name else noise
    return model.eval()


def delta(adapter: Adapter, path: str) -> torch.Tensor:
    return adapter.sites[path].b_OR @ adapter.sites[path].a_RD


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_rslora": True},
        {"r": 4, "lora_alpha": 3, "target_modules": r".*\.(0|1)\.mlp\.(up|down)_proj"},
        {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"},
        {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "layers_to_transform": [1]},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.\w+_proj": 6},
            "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 32, ".*down_proj": 5},
        },
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {"k_proj": 1},
            "use_rslora": True,
        },
    ],
    ids=["lora", "rslora", "regex", "all-linear", "layers_to_transform", "patterns", "rslora-patterns"],
)
def test_deltas_are_those_of_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    model = trained(pico_llama(), **options)
    model.save_pretrained(tmp_path)
    adapter, receipt = formats.read(tmp_path, "math")

    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert set(adapter.sites) == set(layers)
    for path, layer in layers.items():
        torch.testing.assert_close(delta(adapter, path), layer.get_delta_weight("default"))
    assert receipt.tensors == 2 * receipt.sites == 2 * len(layers)
    assert receipt.parameters == adapter.parameters
    assert receipt.ranks == adapter.ranks
    assert receipt.kinds == (("rsLoRA",) if options.get("use_rslora") else ("LoRA",))
    assert "+".join(receipt.kinds) == kind_of(json.loads((tmp_path / "adapter_config.json").read_text())).name
    assert "nothing left over" in str(receipt)


def test_conv1d_needs_no_transposition(tmp_path: Path) -> None:
    model = trained(pico_gpt2(), r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    model.save_pretrained(tmp_path)
    adapter, _ = formats.read(tmp_path, "math")
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    # Conv1D keeps W, and so PEFT's ΔW, as (D, O).
    torch.testing.assert_close(delta(adapter, "transformer.h.0.attn.c_attn").T, layer.get_delta_weight("default"))


@pytest.mark.parametrize("rslora", [False, True])
def test_dora_is_exact(tmp_path: Path, rslora: bool) -> None:
    model = trained(
        pico_llama(),
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "up_proj"],
        use_dora=True,
        use_rslora=rslora,
    )
    model.save_pretrained(tmp_path)
    adapter, receipt = formats.read(tmp_path, "math")
    assert receipt.kinds == (("rsLoRA", "DoRA") if rslora else ("DoRA",))
    assert "+".join(receipt.kinds) == kind_of(json.loads((tmp_path / "adapter_config.json").read_text())).name
    for path, factors in adapter.sites.items():
        layer = model.base_model.model.get_submodule(path)
        weight = layer.base_layer.weight
        assert factors.magnitude_O is not None
        scale_O = factors.magnitude_O / (weight + delta(adapter, path)).norm(dim=1)
        x_BD = torch.randn(3, weight.shape[1])
        update_BO = (scale_O - 1) * (x_BD @ weight.T) + scale_O * (x_BD @ delta(adapter, path).T)
        torch.testing.assert_close(update_BO, layer(x_BD) - layer.base_layer(x_BD))


def test_pissa_converted_by_peft_is_read(tmp_path: Path) -> None:
    plain = get_peft_model(pico_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    plain.save_pretrained(tmp_path / "raw")
    plain.save_pretrained(tmp_path / "init")  # the conversion below writes another config here
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data + 0.1
    plain.save_pretrained(tmp_path / "done", path_initial_model_for_weight_conversion=str(tmp_path / "init"))
    with pytest.raises(InputError, match=r"init_lora_weights='pissa'"):
        formats.read(tmp_path / "raw")
    assert formats.read(tmp_path / "done")[1].ranks == (4,)


@pytest.mark.parametrize("kind", ["lora_A.default", "lora_A.math"])
def test_old_names_with_the_adapter_in_them(tmp_path: Path, kind: str) -> None:
    middle = kind.partition(".")[2]
    old = {re.sub(r"(lora_[AB])", rf"\1.{middle}", key): value for key, value in tensors().items()}
    new, _ = formats.read(write(tmp_path / "new"), "math")
    adapter, _ = formats.read(write(tmp_path / "old", old), "math")
    for path in new.sites:
        torch.testing.assert_close(delta(adapter, path), delta(new, path))


@pytest.mark.parametrize("suffix", ["", ".weight", ".default", ".default.weight"])
def test_magnitude_names(tmp_path: Path, suffix: str) -> None:
    weights = tensors("q_proj")
    for path, (out, _) in SHAPES.items():
        if path.endswith("q_proj"):
            weights[f"{PREFIX}{path}.lora_magnitude_vector{suffix}"] = torch.rand(out) + 1
    adapter, _ = formats.read(write(tmp_path, weights, use_dora=True), "math")
    assert all(factors.magnitude_O is not None for factors in adapter.sites.values())


@given(
    alpha=st.floats(0.01, 1000),
    special=st.floats(0.01, 1000),
    rank=st.integers(1, 8),
    other=st.integers(1, 8),
    rslora=st.booleans(),
    key=st.sampled_from(["q_proj", "0.self_attn.q_proj", r"layers\.[01]\.self_attn\.q_proj", r"^model.*q_proj", "x"]),
)
@settings(max_examples=40, deadline=None)
def test_scaling_and_patterns(alpha: float, special: float, rank: int, other: int, rslora: bool, key: str) -> None:
    def hit(path: str) -> bool:
        return get_pattern_key([key], path) == key

    ranks = {path: other if hit(path) else rank for path in SHAPES}
    shapes = {}
    for path, (out, width) in SHAPES.items():
        shapes[f"{PREFIX}{path}.lora_A.weight"] = (ranks[path], width)
        shapes[f"{PREFIX}{path}.lora_B.weight"] = (out, ranks[path])
    chosen = config.Settings(rank, alpha, {key: other}, {key: special}, rslora)
    sites, _ = formats.plan(chosen, shapes, "math")
    for path, site in sites.items():
        a, r = (special if hit(path) else alpha), ranks[path]
        assert site.rank == r
        assert site.scaling == pytest.approx(a / math.sqrt(r) if rslora else a / r)


def test_the_first_of_several_patterns_wins_as_in_peft() -> None:
    keys = ["q_proj", "layers.0.self_attn.q_proj", r".*_proj", "(up|down)_proj"]
    paths = list(SHAPES)
    for order in (keys, keys[::-1]):
        found = patterns.first_matches(order, paths)
        assert [p if i is None else order[i] for i, p in zip(found, paths, strict=True)] == [
            get_pattern_key(order, p) for p in paths
        ]


def test_a_pattern_that_never_ends_is_stopped() -> None:
    with pytest.raises(SecurityError, match="stall"):
        patterns.first_matches(["(a*)*(a*)*b"], ["a" * 60], timeout_s=0.5)


def test_defaults_and_nulls_of_old_configs_are_fine(tmp_path: Path) -> None:
    old: dict[str, Any] = dict.fromkeys(["fan_in_fan_out", "use_rslora", "enable_lora", "bias", "use_marvel"])
    old |= {"merge_weights": True, "modules_to_save": [], "velora_config": {"rank": 1}}
    old |= {"auto_mapping": {"parent_library": "evil"}}
    _, receipt = formats.read(write(tmp_path, **old), "math")
    text = " ".join(receipt.notes)
    assert "use_marvel" in text and "velora_config" in text
    assert "nothing was imported" in text
    assert not receipt.warnings


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "other method": ({"peft_type": "IA3"}, "peft_type.*IA3"),
    "no method": ({"peft_type": None}, "peft_type"),
    "misspelt method": ({"peft_type": "FORZEN_MA_LORA"}, "FORZEN_MA_LORA"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save.*lm_head"),
    "layer_replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "lora_bias": ({"lora_bias": True}, r"lora_bias is set but lora_B\.bias is missing"),
    "enable_lora": ({"enable_lora": [True, False, True]}, "enable_lora.*fused linear"),
    "bias": ({"bias": "all"}, "bias.*all"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "alora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    "kasa": ({"kasa_config": {"beta": 1}}, "kasa_config"),
    "montec": ({"monteclora_config": {"num_samples": 2}}, "monteclora_config"),
    "parameters": ({"target_parameters": ["experts.up"]}, "target_parameters"),
    "arrow": ({"arrow_config": {"top_k": 2}}, "arrow_config"),
    "megatron": ({"megatron_config": {"tp": 2}}, "megatron_config"),
    "pissa": ({"init_lora_weights": "pissa_niter_16"}, "PiSSA.*random numbers"),
    "olora": ({"init_lora_weights": "olora"}, "olora"),
    "corda": ({"init_lora_weights": "corda"}, "corda"),
    "loftq": ({"init_lora_weights": "loftq"}, "loftq"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "lora_ga"),
    "unknown and set": ({"use_marvel": True}, "unknown.*use_marvel"),
    "r of zero": ({"r": 0}, "r=0"),
    "r as text": ({"r": "8"}, 'r="8"'),
    "r as bool": ({"r": True}, "r=true"),
    "negative alpha": ({"lora_alpha": -1}, "lora_alpha=-1"),
    "huge alpha": ({"lora_alpha": 1e30}, "lora_alpha"),
    "alpha not a number": ({"lora_alpha": float("nan")}, "lora_alpha"),
    "patterns as list": ({"rank_pattern": [1]}, "rank_pattern"),
    "pattern values": ({"alpha_pattern": {"q_proj": -2}}, "alpha_pattern"),
    "flags as text": ({"use_rslora": "yes"}, "use_rslora"),
    "base as number": ({"base_model_name_or_path": 7}, "base_model_name_or_path"),
    "not a pattern": ({"rank_pattern": {"(q_proj": 4}}, r"\(q_proj"),
    "rank in config": ({"r": 8}, "ambiguous.*config 8, tensor 4"),
    "dora without magnitude": ({"use_dora": True}, "magnitude is missing"),
}


@pytest.mark.parametrize(("options", "expected"), REFUSED.values(), ids=REFUSED)
def test_configs_refused_by_name(tmp_path: Path, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        formats.read(write(tmp_path, **options), "math")
    assert caught.value.exit_code == 3
    assert caught.value.why and caught.value.fix


def test_every_reason_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        formats.read(write(tmp_path, bias="all", use_marvel=1, lora_alpha=-1, init_lora_weights="olora"), "math")
    assert all(word in str(caught.value) for word in ("bias", "use_marvel", "lora_alpha", "olora"))


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"null", b"[1]", b"\xff\xfe\x00", b"[" * 100_000, b'{"a":' * 500 + b"1" + b"}" * 500],
    ids=["empty", "cut", "null", "list", "utf16", "deep", "deep object"],
)
def test_broken_configs(tmp_path: Path, raw: bytes) -> None:
    write(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(raw)
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        formats.read(tmp_path, "math")


def test_a_config_of_many_megabytes_is_not_parsed(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(b" " * 1_000_001)
    with pytest.raises(InputError, match="larger than"):
        formats.read(tmp_path, "math")


def test_every_field_that_peft_knows_is_known_here() -> None:
    known = config._READ | config._WITHOUT_EFFECT | config._UNSUPPORTED.keys()
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= known
    known |= config._ADALORA_READ | config._ADALORA_WITHOUT_EFFECT
    assert {field.name for field in dataclasses.fields(AdaLoraConfig)} <= known


def test_control_characters_are_spelled_out(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        formats.read(write(tmp_path, **{"evil\x1b[31m": "\u202e1"}), "math")
    assert "\x1b" not in str(caught.value) and "\u202e" not in str(caught.value)
    assert r"\x1b" in str(caught.value)


def _without(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors().items() if key != name}


BROKEN: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "leftover": ({**tensors(), "base_model.model.lm_head.weight": torch.ones(4, 4)}, "lm_head"),
    "no prefix": ({**tensors(), "model.x.lora_A.weight": torch.ones(4, 4)}, "model.x"),
    "nested": ({**tensors(), f"{Q}.base_layer.lora_A.weight": torch.ones(4, 4)}, "base_layer"),
    "bias of B": ({**tensors(), f"{Q}.lora_B.bias": torch.ones(4)}, r"lora_B\.bias"),
    "embedding": ({**tensors(), f"{PREFIX}model.embed.lora_embedding_A": torch.ones(4, 9)}, "embeddings"),
    "convolution": ({**tensors(), f"{Q}x.lora_A.weight": torch.ones(4, 3, 1, 1)}, "convolutions"),
    "no A": (_without(f"{Q}.lora_A.weight"), "lora_A is missing.*layers.0.self_attn.q_proj"),
    "no B": (_without(f"{Q}.lora_B.weight"), "lora_B is missing.*layers.0.self_attn.q_proj"),
    "ranks": ({**tensors(), f"{Q}.lora_B.weight": torch.ones(16, 3)}, "disagree on the rank.*4 and 3"),
    "twice": ({**tensors(), f"{Q}.lora_A.default.weight": torch.ones(4, 16)}, "two tensors for one place"),
    "undeclared dora": ({**tensors(), f"{Q}.lora_magnitude_vector": torch.ones(16)}, "use_dora is not set"),
    "rank zero": ({**tensors(), f"{Q}.lora_A.weight": torch.ones(0, 16)}, "ZeRO-3"),
    "no tensors": ({}, "no tensors at all.*ZeRO-3"),
    "nan": (
        {**tensors(), f"{Q}.lora_A.weight": torch.full((4, 16), torch.nan)},
        r"q_proj\.lora_A\.weight \(64 of 64",
    ),
    "inf": ({**tensors(), f"{Q}.lora_A.weight": torch.full((4, 16), -torch.inf)}, "infinite"),
    "zero B": ({**tensors(), f"{Q}.lora_B.weight": torch.zeros(16, 4)}, "untrained"),
    "integers": ({**tensors(), f"{Q}.lora_B.weight": torch.ones(16, 4, dtype=torch.int8)}, "floating-point"),
}


@pytest.mark.parametrize(("weights", "expected"), BROKEN.values(), ids=BROKEN)
def test_weights_refused_by_name(tmp_path: Path, weights: dict[str, torch.Tensor], expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        formats.read(write(tmp_path, weights), "math")
    assert caught.value.exit_code == 3


def test_half_precision_is_folded_in_fp32(tmp_path: Path) -> None:
    half = {key: value.bfloat16() for key, value in tensors().items()}
    adapter, _ = formats.read(write(tmp_path, half, lora_alpha=3), "math")
    factors = adapter.sites["model.layers.0.self_attn.q_proj"]
    assert factors.b_OR.dtype == factors.a_RD.dtype == torch.float32
    torch.testing.assert_close(factors.b_OR, half[f"{Q}.lora_B.weight"].float() * 0.75, rtol=0, atol=0)


def _header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


ONE = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
FORGED: dict[str, tuple[bytes, type[RecycleError]]] = {
    "pickle": (pickle.dumps({"a": 1}), SecurityError),
    "zip": (b"PK\x03\x04" + b"\0" * 64, SecurityError),
    "huge header": (struct.pack("<Q", 2**63) + b"{" + b"\0" * 64, SecurityError),
    "large header": (struct.pack("<Q", 99_000_000) + b"{" + b"\0" * 64, SecurityError),
    "no json": (_header(b"{nonsense"), SecurityError),
    "deep json": (_header(b'{"a":' * 100_000), SecurityError),
    "duplicate": (_header(b"{" + ONE + b"," + ONE + b"}", b"\0" * 4), SecurityError),
    "negative": (_header(b"{" + ONE.replace(b"[0,4]", b"[-4,0]") + b"}", b"\0" * 4), SecurityError),
    "cut in the data": (_header(b"{" + ONE + b"}", b"\0\0"), InputError),
    "cut in the header": (struct.pack("<Q", 500) + b"{", InputError),
    "seven bytes": (b"\0" * 7, InputError),
}


@pytest.mark.parametrize(("raw", "kind"), FORGED.values(), ids=FORGED)
def test_forged_files(tmp_path: Path, raw: bytes, kind: type[RecycleError]) -> None:
    write(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(raw)
    with pytest.raises(kind) as caught:
        inspect.read_header(weights)
        formats._load(weights, {}, "math")
    assert type(caught.value) is kind
    assert caught.value.exit_code == (4 if kind is SecurityError else 3)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(SecurityError, match=r"adapter_model\.bin.*run any code") as caught:
        formats.read(tmp_path)
    assert caught.value.exit_code == 4


def test_missing_files_and_sizes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a folder"):
        formats.read(tmp_path / "absent")
    with pytest.raises(InputError, match="no PEFT adapter"):
        formats.read(tmp_path)
    with pytest.raises(InputError, match="more than the limit"):
        formats.read(write(tmp_path / "math"), max_bytes=1000)


def test_links_that_escape(tmp_path: Path) -> None:
    write(tmp_path / "math")
    secret = tmp_path / "secret"
    secret.write_text("{}")
    config_file = tmp_path / "math" / "adapter_config.json"
    config_file.unlink()
    config_file.symlink_to(secret)
    with pytest.raises(SecurityError, match=r"adapter_config\.json is a link"):
        formats.read(tmp_path / "math")


def test_a_snapshot_in_the_cache_of_the_hubs_client_is_no_escape(tmp_path: Path) -> None:
    blobs = write(tmp_path / "models--org--math" / "blobs")
    snapshot = tmp_path / "models--org--math" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert formats.read(snapshot, "math")[1].sites == 4


def test_a_full_model_is_no_adapter(tmp_path: Path) -> None:
    for name in ("config.json", "pytorch_model.bin", "training_args.bin"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="no PEFT adapter"):
        formats.read(tmp_path)


def test_unusual_numbers_are_warned_about(tmp_path: Path) -> None:
    _, receipt = formats.read(write(tmp_path, tensors(rank=12), r=12, lora_alpha=2400), "math")
    assert "rank above the width" in receipt.warnings[0] and "v_proj" in receipt.warnings[0]
    assert "×200 is unusual" in receipt.warnings[1]


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "llama3"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("---\nlicense: !!python/object/apply:os.system [ls]\n---\n", None),
        ("---\n: : :\n---\n", None),
        ("no head", None),
        (None, None),
    ],
)
def test_licences(tmp_path: Path, card: str | None, licence: str | None) -> None:
    assert formats.read(write(tmp_path, card=card), "math")[0].licence == licence


def test_receipt(tmp_path: Path) -> None:
    _, receipt = formats.read(write(tmp_path), "math-lora")
    assert str(receipt) == "math-lora: 8 tensors → 4 sites, rank 4, LoRA ×2, nothing left over"
    assert json.loads(json.dumps(receipt.to_json()))["targets"] == ["q_proj", "v_proj"]


def test_place(tmp_path: Path) -> None:
    adapter, _ = formats.read(write(tmp_path), "math")
    assert match.place(adapter, SHAPES) == adapter.sites
    assert match.place(adapter, SHAPES, targets=["q_proj", "v_proj"]) == adapter.sites
    with pytest.raises(InputError, match="2 of 4 sites outside the targets"):
        match.place(adapter, SHAPES, targets=["q_proj"])
    with pytest.raises(InputError, match=r"2 of 4 sites are not in it.*layers\.1.*fewer layers"):
        match.place(adapter, {path: shape for path, shape in SHAPES.items() if ".0." in path})
    with pytest.raises(InputError, match=r"4 of 4 sites differ in shape.*adapter 16×16, base 16×32"):
        match.place(adapter, {path: (out, 2 * width) for path, (out, width) in SHAPES.items()})
    renamed = {path.replace("model.", "model.language_model.", 1): shape for path, shape in SHAPES.items()}
    with pytest.raises(InputError, match=r"prefix.*'model\.layers'.*'model\.language_model\.layers'"):
        match.place(adapter, renamed)
    with pytest.raises(InputError, match="different base"):
        match.place(adapter, {"transformer.h.0.attn.c_attn": (48, 16)})


def test_bases() -> None:
    assert match.require_one_base({"math": "org/Base", "law": "org/base", "code": None}) == "org/Base"
    assert match.require_one_base({"math": None}) is None
    with pytest.raises(InputError, match="2 different bases: org/base: math; org/other: law"):
        match.require_one_base({"math": "org/base", "law": "org/other"})
    assert match.is_hub_id("org/base") and match.is_hub_id("gpt2")
    assert not match.is_hub_id("/home/anon/base") and not match.is_hub_id(None)
