"""What ``adapter_config.json`` says that the tensors cannot: rank, α, patterns, rsLoRA, DoRA; what to refuse.

PEFT's LoraConfig grows with every release, and a field that is skipped can change what an adapter does. So
this is an allow-list: every known field is in one of three tables, and an unknown one is refused unless it is
at its default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recycler.zoo.errors import InputError, shorten
from recycler.zoo.inspect import printable

MAX_CONFIG = 1_000_000
_MAX_DEPTH = 16
_MAX_ALPHA = 1e6

# Every field of PEFT's LoraConfig, in three groups.
_READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "init_lora_weights", "base_model_name_or_path", "revision",
}  # fmt: skip
_WITHOUT_EFFECT = {
    # provenance and training only
    "task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout",
    "runtime_config", "velora_config",
    # which modules: the tensors say so
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
    "ensure_weight_tying",
    # details of an option that is itself checked below
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core",
}  # fmt: skip
_UNSUPPORTED = {
    "bias": "it changes biases of the base",
    "lora_bias": "B has a bias",
    "modules_to_save": "it replaces whole modules of the base",
    "trainable_token_indices": "it changes embeddings of single tokens",
    "layer_replication": "it changes the depth of the base",
    "target_parameters": "it adapts bare parameters, such as those of experts, and not linears",
    "use_qalora": "its A acts on pooled inputs",
    "alora_invocation_tokens": "it acts only after an invocation sequence",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "it truncates the base's weights",
    "monteclora_config": "its factors are random variables",
    "arrow_config": "it is itself a router",
    "megatron_config": "its linears are sharded by Megatron",
}
_DEFAULTS: dict[str, Any] = {"bias": "none"}
# These leave the base as it is. All others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change its weights.
_HARMLESS_INITS = {"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"}


@dataclass(frozen=True)
class Settings:
    """What a PEFT config says that the tensors cannot."""

    rank: int = 8
    alpha: float = 8.0
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    rslora: bool = False
    dora: bool = False
    base: str | None = None
    base_revision: str | None = None
    notes: tuple[str, ...] = ()


def parse_config(raw: bytes, where: str) -> Settings:
    """Read ``adapter_config.json``; `where` names the adapter in messages.

    Raises:
        InputError: not a JSON object, wrong types, another PEFT method, or options that cannot be read
            exactly; all of them are named.
    """
    config = _parse_json(raw, where)
    problems = Problems(where)
    kind = config.get("peft_type")
    if kind != "LORA":
        problems.add("peft_type", [f"{printable(kind)!r}; only LORA can be read (with rsLoRA and DoRA)"])
        problems.raise_any("Convert it to LoRA with PEFT, where PEFT can.")
    notes = []
    for key, value in config.items():
        default = value in (None, False, "", [], {}) or value == _DEFAULTS.get(key)
        shown = f"{printable(key)}={printable(json.dumps(value), 60)}"
        if key in _UNSUPPORTED and not default:
            problems.add("not supported", [f"{shown} ({_UNSUPPORTED[key]})"])
        elif key not in _READ | _WITHOUT_EFFECT | _UNSUPPORTED.keys():
            if default:
                notes.append(f"unknown config field {shown} is at its default and was ignored")
            else:
                problems.add("unknown config fields that are set", [shown])
    if config.get("velora_config"):
        notes.append("velora_config concerns training only and was ignored")
    if config.get("auto_mapping"):
        notes.append("auto_mapping names Python code; it was ignored and nothing was imported")
    init = printable(config.get("init_lora_weights", True)).lower()
    if init not in _HARMLESS_INITS:
        problems.add("changes the base's weights", [f"init_lora_weights={init!r}"])
    settings = _settings(config, problems, tuple(notes))
    problems.raise_any(
        "Leaving any of it out would change what the adapter does. Save it with PEFT in a plain form: PiSSA "
        "and its kin with path_initial_model_for_weight_conversion, others by training without it."
    )
    return settings


def read_config(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(MAX_CONFIG + 1)


def _parse_json(raw: bytes, where: str) -> dict[str, Any]:
    why = ""
    config: Any = None
    if len(raw) > MAX_CONFIG:
        why = f"It is larger than {MAX_CONFIG:,} bytes."
    else:
        try:
            config = json.loads(raw.decode("utf-8-sig"))
        except RecursionError:
            why = "It is nested too deeply."
        except ValueError as error:
            why = f"It is not valid JSON: {printable(error)}."
    if not why and not isinstance(config, dict):
        why = "It is not a JSON object."
    if not why and _deeper(config, _MAX_DEPTH):
        why = "It is nested too deeply."
    if why:
        fix = "Fetch it again, or take it from the checkpoint."
        raise InputError(f"{printable(where)}: adapter_config.json cannot be used.", why, fix)
    return dict(config)


def _deeper(value: Any, depth: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(depth == 0 or _deeper(child, depth - 1) for child in children)


def _settings(config: Mapping[str, Any], problems: Problems, notes: tuple[str, ...]) -> Settings:
    """The fields in use, type-checked. None means PEFT's default, as in configs that older versions wrote."""

    def get(key: str, default: Any, ok: Any, expected: str) -> Any:
        value = default if config.get(key) is None else config[key]
        if ok(value):
            return value
        problems.add("wrong config values", [f"{key}={printable(json.dumps(value), 60)} ({expected})"])
        return default

    def is_rank(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31

    def is_alpha(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _MAX_ALPHA

    def is_text(value: Any) -> bool:
        return isinstance(value, str) and len(value) <= 500 and value.isprintable()

    def pattern_of(ok: Any) -> Any:
        return lambda value: isinstance(value, dict) and len(value) <= 20_000 and all(map(ok, value.values()))

    def is_flag(value: Any) -> bool:
        return isinstance(value, bool)

    alpha_text = f"a number above 0, at most {_MAX_ALPHA:g}"
    return Settings(
        rank=get("r", 8, is_rank, "a whole number above 0"),
        alpha=get("lora_alpha", 8, is_alpha, alpha_text),
        rank_pattern=get("rank_pattern", {}, pattern_of(is_rank), "patterns → whole numbers above 0"),
        alpha_pattern=get("alpha_pattern", {}, pattern_of(is_alpha), f"patterns → {alpha_text}"),
        rslora=get("use_rslora", False, is_flag, "true or false"),
        dora=get("use_dora", False, is_flag, "true or false"),
        base=get("base_model_name_or_path", "", is_text, "a model id or a path") or None,
        base_revision=get("revision", "", is_text, "a commit, branch or tag") or None,
        notes=notes,
    )


class Problems:
    """Collects what is wrong, under headings, so that one error names everything."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.found: dict[str, list[str]] = {}

    def add(self, heading: str, items: list[str]) -> None:
        if items:
            self.found.setdefault(heading, []).extend(items)

    def raise_any(self, fix: str) -> None:
        if self.found:
            text = "; ".join(f"{heading}: {shorten(items)}" for heading, items in self.found.items())
            raise InputError(f"{printable(self.where)} cannot be read exactly.", f"{text}.", fix)
