"""What ``adapter_config.json`` says that the tensors cannot: kind, rank, α, patterns; what to refuse.

PEFT's configs grow with every release, and a field that is skipped can change what an adapter does. So this is an allow-list:
every known field is in one of three tables, and an unknown one is refused unless it is at its default.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recycler.zoo.errors import InputError, shorten
from recycler.zoo.inspect import MAX_CONFIG, printable
from recycler.zoo.kinds import CONVERTED, READ, Kind, kind_of
from recycler.zoo.untrusted import unique_keys

_MAX_DEPTH = 16
_MAX_ALPHA = 1e6

# Every field of PEFT's LoraConfig, in three groups.
_READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias",
    "init_lora_weights", "base_model_name_or_path", "revision",
}  # fmt: skip
_WITHOUT_EFFECT = {
    # provenance and training only
    "task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout", "merge_weights",
    "runtime_config", "velora_config",
    # which modules: the tensors say so
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
    "ensure_weight_tying",
    # details of an option that is itself checked below
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core",
}  # fmt: skip
_UNSUPPORTED = {
    "bias": "it changes biases of the base",
    "modules_to_save": "it replaces whole modules of the base",
    "trainable_token_indices": "it changes embeddings of single tokens",
    "layer_replication": "it changes the depth of the base",
    "target_parameters": "it adapts bare parameters, such as those of experts, and not linears",
    "enable_lora": "its factors are those of parts of a fused linear",
    "use_qalora": "its A acts on pooled inputs",
    "alora_invocation_tokens": "it acts only after an invocation sequence",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "it truncates the base's weights",
    "monteclora_config": "its factors are random variables",
    "arrow_config": "it is itself a router",
    "megatron_config": "its linears are sharded by Megatron",
}
_CODES = {
    "bias": "E_BIAS",
    "modules_to_save": "E_MODULES_TO_SAVE",
    "trainable_token_indices": "E_VOCABULARY",
    "layer_replication": "E_VOCABULARY",
}
# AdaLoraConfig has all of these beside LoraConfig's. PEFT's AdaLoRA layers look at none of the second group.
_ADALORA_READ = {"init_r"}
_ADALORA_WITHOUT_EFFECT = {
    "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
    "alpha_pattern", "use_rslora",
}  # fmt: skip
_DEFAULTS: dict[str, Any] = {"bias": "none"}
_MASK = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_E(?:\.[^.]+)?")
_MAX_RANK = 2**31
_MAX_PATTERNS = 20_000


@dataclass(frozen=True)
class Settings:
    """What a PEFT config says that the tensors cannot.

    Attributes:
        rank: r or, for AdaLoRA, init_r, which its scale is divided by whatever ranks are left.
        masks: AdaLoRA's rank_pattern: module path → which of the first ranks were kept.
        method: the peft_type.
    """

    rank: int = 8
    alpha: float = 8.0
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    rslora: bool = False
    dora: bool = False
    base: str | None = None
    base_revision: str | None = None
    notes: tuple[str, ...] = ()
    bias: bool = False
    masks: Mapping[str, tuple[bool, ...]] | None = None
    method: str = "LORA"


def parse_config(raw: bytes, where: str) -> Settings:
    """Read the ``adapter_config.json`` of a kind that is read as it is; `where` names the adapter in messages.

    Raises:
        InputError: not a JSON object, wrong types, a kind that must be converted or cannot be used, or options that cannot be
            read exactly; all of them are named.
    """
    config = parse_json(raw, where)
    kind = kind_of(config)
    given = config.get("peft_type")
    if kind.how == "refuse" and given != "LORA":
        raise _unusable(where, given, kind)
    if kind.how == "convert" and given != "LORA":
        raise InputError(
            f"{printable(where)} is no LoRA: its peft_type is {printable(given)} ({kind.name}).",
            "It cannot be read as factors; it must be converted into them.",
            "Fetch it, with --base where its base is not to be had: recycle fetch converts it and says what that loses.",
            code="E_FORMAT",
        )
    problems = Problems(where)
    if kind.how != "read":
        init = printable(config.get("init_lora_weights"))
        problems.add("changed the base's weights", [f"init_lora_weights={init!r} ({kind.name}); {kind.why or 'convert it'}"])
    settings = _lora_settings(config, problems)
    problems.raise_any(
        "Leaving any of it out would change what the adapter does. "
        + (kind.fix if kind.how == "refuse" else "Train it without, or save it with PEFT in a plain form.")
    )
    return settings


def check_convertible(config: Mapping[str, Any], where: str, fields: Iterable[str] | None = None) -> Settings:
    """Vet the parsed config of a kind that is converted, and read what does not depend on the kind: its base, its rank.

    Args:
        fields: the fields of PEFT's config class for it. PEFT drops unknown fields with no more than a warning; here they are
            refused where they are set. Not looked at where None.

    Raises:
        InputError: options that a conversion into LoRA would lose, values of the wrong type, or a kind that is refused.
    """
    kind = kind_of(config, initial=True)
    if kind.how == "refuse":
        raise _unusable(where, config.get("peft_type"), kind)
    problems = Problems(where)
    if config.get("peft_type") == "LORA":
        settings = _lora_settings(config, problems)
    else:
        known = config.keys() if fields is None else set(fields)
        for key, value in config.items():
            if key in _UNSUPPORTED and not _is_default(key, value):
                problems.add("not supported", [f"{_shown(key, value)} ({_UNSUPPORTED[key]})"])
            elif key not in known and not _is_default(key, value):
                problems.add("unknown config fields that are set", [_shown(key, value)])
        plain = {key: config.get(key) for key in ("peft_type", "r", "base_model_name_or_path", "revision")}
        settings = _settings(plain, problems, ())
    problems.raise_any("Leaving any of it out would change what the adapter does. Train it without.")
    return settings


def _unusable(where: str, given: Any, kind: Kind) -> InputError:
    named = f"{printable(given)} ({kind.name})" if given and given != kind.name else kind.name
    return InputError(
        f"{printable(where)} cannot be used: its peft_type is {named}.",
        kind.why,
        kind.fix or f"Read as they are: {READ}. Converted: {CONVERTED}.",
        code="E_FORMAT",
    )


def _lora_settings(config: Mapping[str, Any], problems: Problems) -> Settings:
    """Every field of a LoRA, AdaLoRA or IncreLoRA config, each in use, without effect, or a problem."""
    method = config["peft_type"]
    known = _READ | _WITHOUT_EFFECT
    ignored: set[str] = set()
    if method == "ADALORA":
        known, ignored = known | _ADALORA_READ | _ADALORA_WITHOUT_EFFECT, {"alpha_pattern", "use_rslora"}
    unsupported = _UNSUPPORTED if method == "LORA" else {
        **_UNSUPPORTED,
        "use_dora": f"{method} has no magnitudes",
        "lora_bias": f"{method} has no biases",
    }  # fmt: skip
    notes = []
    for key, value in config.items():
        default, shown = _is_default(key, value), _shown(key, value)
        if key in unsupported:
            if not default:
                problems.add("not supported", [f"{shown} ({unsupported[key]})"])
        elif key in ignored and not default:
            notes.append(f"{shown} has no effect in {method} and was ignored, as PEFT does")
        elif key not in known:
            if default:
                notes.append(f"unknown config field {shown} is at its default and was ignored")
            else:
                problems.add("unknown config fields that are set", [shown])
    if config.get("velora_config"):
        notes.append("velora_config concerns training only and was ignored")
    if config.get("auto_mapping"):
        notes.append("auto_mapping names Python code; it was ignored and nothing was imported")
    if config.get("lora_bias") is True and config.get("use_dora") is True:
        problems.add("not supported", ["lora_bias=true with use_dora=true (PEFT defines no such update)"])
    return _settings({key: value for key, value in config.items() if key not in ignored}, problems, tuple(notes))


def _is_default(key: str, value: Any) -> bool:
    return value in (None, False, "", [], {}) or value == _DEFAULTS.get(key)


def _shown(key: str, value: Any) -> str:
    return f"{printable(key)}={printable(json.dumps(value), 60)}"


def read_config(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(MAX_CONFIG + 1)


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """The config as a dict. Raises InputError where it is no JSON object, too large, nested too deeply, or has a key twice."""
    why = ""
    config: Any = None
    if len(raw) > MAX_CONFIG:
        why = f"It is larger than {MAX_CONFIG:,} bytes."
    else:
        try:
            config = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique_keys)
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
        raise InputError(f"{printable(where)}: adapter_config.json cannot be used.", why, fix, code="E_CONFIG")
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
        return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MAX_RANK

    def is_alpha(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _MAX_ALPHA

    def is_text(value: Any) -> bool:
        return isinstance(value, str) and len(value) <= 500 and value.isprintable()

    def pattern_of(ok: Any) -> Any:
        return lambda value: isinstance(value, dict) and len(value) <= _MAX_PATTERNS and all(map(ok, value.values()))

    def is_flag(value: Any) -> bool:
        return isinstance(value, bool)

    def is_mask(value: Any) -> bool:
        return isinstance(value, list) and len(value) < 100_000 and all(map(is_flag, value))

    alpha_text = f"a number above 0, at most {_MAX_ALPHA:g}"
    method = config.get("peft_type")
    adalora = method == "ADALORA"
    size, one = ("init_r", 12) if adalora else ("r", 8)
    patterns: Any = {} if adalora else get("rank_pattern", {}, pattern_of(is_rank), "patterns → whole numbers above 0")
    masks = get("rank_pattern", {}, pattern_of(is_mask), "modules → lists of true and false") if adalora else {}
    return Settings(
        rank=get(size, one, is_rank, "a whole number above 0"),
        alpha=get("lora_alpha", 8, is_alpha, alpha_text),
        rank_pattern=patterns,
        alpha_pattern=get("alpha_pattern", {}, pattern_of(is_alpha), f"patterns → {alpha_text}"),
        rslora=get("use_rslora", False, is_flag, "true or false"),
        dora=get("use_dora", False, is_flag, "true or false"),
        base=get("base_model_name_or_path", "", is_text, "a model id or a path") or None,
        base_revision=get("revision", "", is_text, "a commit, branch or tag") or None,
        notes=notes,
        bias=get("lora_bias", False, is_flag, "true or false"),
        masks=_by_path(masks, problems) or None,
        method=str(method),
    )


def _by_path(masks: Mapping[str, list[bool]], problems: Problems) -> dict[str, tuple[bool, ...]]:
    """AdaLoRA's rank_pattern, whose keys are the names of its E, by module path."""
    found: dict[str, tuple[bool, ...]] = {}
    for key, mask in masks.items():
        match = _MASK.fullmatch(key)
        if not match or found.setdefault(match["path"], tuple(mask)) != tuple(mask):
            problems.add("wrong config values", [f"rank_pattern: {printable(key)} (the name of a lora_E, once)"])
    return found


def _code(heading: str, item: str) -> str:
    if heading.startswith(("rank in the config", "A and B disagree")):
        return "E_RANK"
    return "E_VOCABULARY" if "embeddings" in heading else _CODES.get(item.partition("=")[0], "E_CONFIG")


class Problems:
    """Collects what is wrong, under headings, so that one error names everything."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.found: dict[str, list[str]] = {}

    def add(self, heading: str, items: list[str]) -> None:
        if items:
            self.found.setdefault(heading, []).extend(items)

    @property
    def code(self) -> str:
        """The one that all problems share, else that of a config which cannot be read exactly."""
        codes = {_code(heading, item) for heading, items in self.found.items() for item in items}
        return codes.pop() if len(codes) == 1 else "E_CONFIG"

    def raise_any(self, fix: str) -> None:
        if self.found:
            text = "; ".join(f"{heading}: {shorten(items)}" for heading, items in self.found.items())
            raise InputError(f"{printable(self.where)} cannot be read exactly.", f"{text}.", fix, code=self.code)
