"""mttl's experts: expert libraries, and what its trainers save.

In microsoft/mttl a LoRA at a linear is ``lora_a`` (D, R) and ``lora_b`` (R, O), and adds ``x·lora_a·lora_b · lora_alpha/lora_rank``;
both numbers are in the expert's config, with defaults 16 and 4. What is read:

- a library: ``<expert>.ckpt``, a dict of tensors under the base's module paths, beside ``<expert>.meta``, a dict of an
  ``ExpertInfo``; in libraries of 2023 the config in it may be an object, or the whole training config;
- ``mttl_weights.bin`` beside ``mttl_config.json`` (``ExpertModel.save_pretrained``), every name with ``model.`` in front;
- a checkpoint of Lightning's: ``state_dict`` (``module`` under DeepSpeed), ``expert_info``, ``hyper_parameters``.

Tied parameters are saved once; ``tie_params`` says which sites share them, and they are written out at each. Names of phi-2's
first code (``layers.1.mixer.Wqkv``, counted from 1) become those of today, as mttl's own ``convert_library_to_hf_phi2`` does.

Dimensions in names: R rank, D input width, O output width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from recycler.zoo.adapter import Factors
from recycler.zoo.errors import InputError, shorten
from recycler.zoo.inspect import printable
from recycler.zoo.parts import Part

if TYPE_CHECKING:
    from torch import Tensor

PACKAGES = ("mttl", "projects", "src", "numpy", "argparse")  # whose objects a .meta may hold; they are read as plain dicts
_ALPHA, _RANK = 16.0, 4  # of mttl's LoRAConfig
_FACTOR = re.compile(r"(?P<site>.+)\.lora_(?P<half>[ab])")
_TIED = re.compile(r"[\w.]+\.lora_[ab]")
_OLD_PHI = re.compile(r"layers\.(?P<layer>\d{1,4})\.(?P<rest>.+)")
_BASES = {"phi-2": "microsoft/phi-2"}  # mttl's name for a local copy
_MAX_NAME = 500


def split(state: Mapping[str, Tensor], info: Mapping[str, Any], name: str, *, base: str | None = None) -> Iterator[Part]:
    """The one expert of a checkpoint.

    Args:
        state: tensor name → tensor, below whatever key of the file they lie.
        info: an ``ExpertInfo`` as a dict, or an ``ExpertModelConfig``.
        name: what it is called.
        base: the id of its base, where the info names none.

    Raises:
        InputError: another modifier than LoRA, tensors without a place, halves that are missing, or a rank that is not the
            config's, so that the scale is unknown.
    """
    config, training = _configs(info)
    modifier = _modifier(config, training)
    if modifier != "lora":
        raise InputError(
            f"{printable(name)} is an expert of mttl's modifier {printable(modifier)!r}.",
            "Only its LoRA adds an update of low rank to a linear.",
            "Leave it out.",
            code="E_FORMAT",
        )
    alpha, rank = _number(config, "lora_alpha", _ALPHA, name), _number(config, "lora_rank", _RANK, name)
    halves = _halves(state, name)
    scale = f"its scale lora_alpha/lora_rank = {alpha:g}/{rank:g} is folded into B"
    notes = (scale, *_tie(halves, config.get("tie_params"), name))
    factors: dict[str, Factors] = {}
    wrong = []
    for site, keys in halves.items():
        if set(keys) != {"a", "b"}:
            wrong.append(f"{printable(site)} has one half only")
            continue
        a, b = state[keys["a"]], state[keys["b"]]
        if a.ndim != 2 or b.ndim != 2 or not a.shape[1] == b.shape[0] == rank:
            wrong.append(f"{printable(site)} ({list(a.shape)} and {list(b.shape)}, lora_rank {rank:g})")
            continue
        factors[site] = Factors(a.T.float(), b.T.float() * (alpha / rank))
    if wrong:
        raise InputError(
            f"{printable(name)}: factors do not fit together at {len(wrong)} of {len(halves)} sites: {shorten(wrong)}.",
            "Its scale lora_alpha/lora_rank, or a part of it, would be a guess.",
            "Fetch it again, or ask its author.",
            code="E_IMPORT",
        )
    if any(_OLD_PHI.fullmatch(site) and ".mixer." in site for site in factors):
        factors = {_new_phi(site): cut for old, whole in factors.items() for site, cut in _cut(old, whole)}
        notes += ("its names are of phi-2's first code and were brought up to date",)
    declared = info.get("expert_model") or info.get("base_model") or training.get("model")
    known = _BASES.get(declared, declared) if isinstance(declared, str) else None
    yield Part(name, factors, known or base, notes)


def parts_of(state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """(tensors by their names in the model, info) of a trainer's checkpoint, whose tensors lie one level down.

    Returns `state` and `facts` as they are where it is none.
    """
    for key in ("state_dict", "module", "expert_weights", "weights"):
        inner = {name.removeprefix(f"{key}/"): name for name in state if name.startswith(f"{key}/")}
        if inner:
            info = facts.get("expert_info")
            info = dict(info) if isinstance(info, Mapping) else {}
            hyper = facts.get("hyper_parameters")
            if isinstance(hyper, Mapping):
                info.setdefault("training_config", hyper)
            prefix = "model." if key in ("state_dict", "module") else ""
            return _Renamed(state, {name.removeprefix(prefix): full for name, full in inner.items()}), info
    return state, facts


def without_prefix(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`state` with the ``model.`` that an ``ExpertModel`` puts before every name taken off."""
    return _Renamed(state, {name.removeprefix("model."): name for name in state})


class _Renamed(Mapping[str, Any]):
    """Tensors under other names, read when they are asked for."""

    def __init__(self, state: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self.state, self.names = state, names

    def __getitem__(self, name: str) -> Tensor:
        return self.state[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _configs(info: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """(the modifier's config, the training config), either of which may stand for the other in old files."""

    def at(*keys: str) -> Mapping[str, Any]:
        found = [info[key] for key in keys if isinstance(info.get(key), Mapping)]
        return found[0] if found else {}

    config, training = at("expert_config", "modifier_config"), at("training_config")
    return config or training, training or config


def _modifier(config: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    stated = config.get("__model_modifier__") or config.get("model_modifier")
    last = str(config.get("class_name") or config.get("__class__") or "").rpartition(".")[2]
    return str(stated or {"LoRAConfig": "lora"}.get(last, last) or training.get("model_modifier") or "unknown")


def _number(config: Mapping[str, Any], key: str, default: float, name: str) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InputError(
            f"{printable(name)}: its config says {key}={printable(value, 60)}.",
            "The scale is lora_alpha/lora_rank, of numbers above 0.",
            "Ask its author for the numbers that it was trained with.",
            code="E_CONFIG",
        )
    return value


def _halves(state: Mapping[str, Tensor], name: str) -> dict[str, dict[str, str]]:
    """Site → half → tensor name."""
    halves: dict[str, dict[str, str]] = {}
    strange = []
    for key in state:
        found = _FACTOR.fullmatch(key) if len(key) <= _MAX_NAME else None
        if found:
            halves.setdefault(found["site"], {})[found["half"]] = key
        else:
            strange.append(printable(key))
    if strange or not halves:
        raise InputError(
            f"{printable(name)} is no LoRA of mttl's: "
            + (f"{len(strange)} tensors have no place in one: {shorten(strange)}." if strange else "it holds no factors."),
            "Nothing is ever dropped, so every tensor must be understood.",
            "Save the expert alone, with mttl's own code.",
            code="E_IMPORT",
        )
    return halves


def _tie(halves: dict[str, dict[str, str]], tied: object, name: str) -> tuple[str, ...]:
    """Give sites the half that they share with another of the same parent, as ``tie_params`` says.

    mttl's value is a pattern such as ``q_proj.*\\.lora_a|k_proj.*\\.lora_a``, and is read as mttl reads it when it fills in
    what is missing: a list of names, without the signs of the pattern. It is never matched.
    """
    if not tied:
        return ()
    options = str(tied).replace("\\", "").replace(".*", "").split("|")
    if len(options) > 50 or not all(_TIED.fullmatch(option) for option in options):
        raise InputError(
            f"{printable(name)}: its tie_params are {printable(tied)!r}.",
            "Which of its parameters are shared cannot be told from that.",
            "Save the expert with its parameters written out.",
            code="E_IMPORT",
        )
    groups: dict[tuple[str, str], list[str]] = {}  # (what stands before the option, a or b) → sites
    for option in options:
        end, half = option[: -len(".lora_a")], option[-1]
        for site in halves:
            if site == end or site.endswith("." + end):
                groups.setdefault((site.removesuffix(end), half), []).append(site)
    filled = 0
    for (_, half), sites in groups.items():
        source = next((halves[site][half] for site in sites if half in halves[site]), None)
        for site in sites:
            if source and half not in halves[site]:
                halves[site][half] = source
                filled += 1
    return (f"{filled} tied factors were written out",) if filled else ()


def _cut(site: str, factors: Factors) -> Iterator[tuple[str, Factors]]:
    """``Wqkv`` as the three linears that it became: they share A, and each has a third of B's rows."""
    if not site.endswith(".mixer.Wqkv"):
        yield site, factors
        return
    third = factors.b_OR.shape[0] // 3
    for i, linear in enumerate(("q_proj", "k_proj", "v_proj")):
        rows = factors.b_OR[i * third : (i + 1) * third]
        yield f"{site.removesuffix('Wqkv')}{linear}", Factors(factors.a_RD, rows)


def _new_phi(site: str) -> str:
    found = _OLD_PHI.fullmatch(site)
    if not found or found["layer"] == "0":
        raise InputError(
            f"{printable(site)} is a module of neither of phi-2's codes.",
            "Its place in the model would be a guess.",
            "Convert the library with mttl's convert_library_to_hf_phi2.",
            code="E_IMPORT",
        )
    rest = found["rest"].replace("mixer.out_proj", "self_attn.dense").replace("mixer.", "self_attn.")
    return f"model.layers.{int(found['layer']) - 1}.{rest}"
