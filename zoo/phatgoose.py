"""PHATGOOSE's and GLIDER's checkpoints: LoRAs with s = 1/r, often many in one file.

In r-three/phatgoose an expert at a linear is ``layer1`` (D, R) and ``layer2`` (R, O), and adds ``x·layer1·layer2 / R``
(``FFNExperts`` with ``divide_by_d_bottleneck``); in its first form, before it is made an expert, ``expert_lora_a`` (R, D) and
``expert_lora_b`` (O, R), added with the same scale (``LoRALinear``). GLIDER keeps those experts under PEFT's names, one file
each, or gathered with a number. Names read (``<site>`` is the module's path in Hugging Face's T5)::

    <site>._addons.expert_lora.layer1__<i>    layer2__<i>     (a stem may stand between the two underscores)
    <site>.expert_lora_a                      expert_lora_b
    base_model.model.<site>.lora_A.default.weight             lora_B
    base_model.model.<site>.lora_experts.default.<i>.lora_A.weight

Gates (``router.expert_embeddings``, ``expert_input_gate``, ``lora_gate``) belong to that project's router and are left out, as
are the copies of the base's embeddings which its checkpoints carry; the notes say how many. Anything else is refused.

Dimensions in names: R rank, D input width, O output width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from recycler.zoo.adapter import Factors
from recycler.zoo.errors import InputError, shorten
from recycler.zoo.inspect import printable
from recycler.zoo.parts import Part

if TYPE_CHECKING:
    from torch import Tensor

_FACTORS = (
    # (names, whether the file holds A and B transposed)
    (re.compile(r"(?P<site>.+)\._addons\.expert_lora\.(?P<part>layer1|layer2)_(?P<expert>\w*_\d+)"), True),
    (re.compile(r"base_model\.model\.(?P<site>.+)\.lora_experts\.[^.]+\.(?P<expert>\d+)\.(?P<part>lora_[AB])\.weight"), False),
    (re.compile(r"base_model\.model\.(?P<site>.+)\.(?P<part>lora_[AB])\.(?:[^.]+\.)?weight(?P<expert>)"), False),
    (re.compile(r"(?P<site>.+)\.(?P<part>expert_lora_[ab])(?P<expert>)"), False),
)
_A = {"layer1", "lora_A", "expert_lora_a"}
_LEFT_OUT = {
    "gates": re.compile(
        r"(.+\.)?_addons\.router\.expert_embeddings_\w+|.+\._addons\.expert_lora\.expert_input_gate|.+\.lora_gate\.[^.]+(\.weight)?"
    ),
    "copies of the base's embeddings": re.compile(r"(base_model\.model\.)?((encoder|decoder)\.embed_tokens|shared)\.weight"),
}
_MAX_NAME = 500


def split(
    state: Mapping[str, Tensor], stem: str, *, names: Sequence[str] | None = None, base: str | None = None
) -> Iterator[Part]:
    """The experts of one checkpoint.

    Args:
        state: tensor name → tensor; read one expert at a time.
        stem: the name of a single expert; several are called ``<stem>-<i>``.
        names: the experts' names in their order, instead.
        base: the id of their base, which the files do not name.

    Raises:
        InputError: tensors without a place, halves that are missing or disagree, as many names as there are not experts, or
            experts with the gate of the project's earlier variant inside, which is no linear update.
    """
    experts: dict[str, dict[str, dict[str, tuple[str, bool]]]] = {}
    left: dict[str, int] = {}
    strange = []
    for key in state:
        found, transposed = _match(key)
        if found:
            half = "a" if found["part"] in _A else "b"
            experts.setdefault(found["expert"], {}).setdefault(found["site"], {})[half] = key, transposed
            continue
        what = next((what for what, names_of in _LEFT_OUT.items() if len(key) <= _MAX_NAME and names_of.fullmatch(key)), None)
        if what is None:
            strange.append(printable(key))
        else:
            left[what] = left.get(what, 0) + 1
    if strange or not experts:
        raise InputError(
            f"{printable(stem)} is no checkpoint of PHATGOOSE or GLIDER: "
            + (f"{len(strange)} tensors have no place in one: {shorten(strange)}." if strange else "it holds no experts."),
            "Nothing is ever dropped, so every tensor must be understood.",
            "Name its layout with --layout, or convert it to PEFT's form.",
            code="E_IMPORT",
        )
    order = sorted(experts, key=lambda expert: (expert.rstrip("0123456789"), int("0" + expert.rpartition("_")[2])))
    called = _names(stem, order, names)
    gone = (f"{count} {what} of {printable(stem)} were left out" for what in _LEFT_OUT if (count := left.get(what)))
    notes = ("its scale 1/rank is folded into B", *gone)
    for expert, name in zip(order, called, strict=True):
        yield Part(name, _factors(state, experts[expert], name), base, notes)


def _match(key: str) -> tuple[re.Match[str] | None, bool]:
    if len(key) <= _MAX_NAME:
        for pattern, transposed in _FACTORS:
            found = pattern.fullmatch(key)
            if found:
                return found, transposed
    return None, False


def _names(stem: str, order: Sequence[str], names: Sequence[str] | None) -> list[str]:
    if names is None:
        return [stem] if len(order) == 1 else [f"{stem}-{i}" for i in range(len(order))]
    if len(names) != len(order) or len(set(names)) != len(names):
        raise InputError(
            f"{printable(stem)} holds {len(order)} experts, and {len(set(names))} different names are given for them.",
            "Which is which would be a guess.",
            "Give one name an expert, in their order, or none.",
            code="E_IMPORT",
        )
    return list(names)


def _factors(state: Mapping[str, Tensor], sites: Mapping[str, Mapping[str, tuple[str, bool]]], name: str) -> dict[str, Factors]:
    """Module path → factors, with 1/r folded into B; both halves are there and of one rank."""
    factors: dict[str, Factors] = {}
    wrong = []
    for site, halves in sites.items():
        if set(halves) != {"a", "b"}:
            wrong.append(f"{printable(site)} has one half only")
            continue
        a, b = (state[key].T if transposed else state[key] for key, transposed in (halves["a"], halves["b"]))
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            wrong.append(f"{printable(site)} ({list(a.shape)} and {list(b.shape)})")
            continue
        factors[site] = Factors(a.float(), b.float() / a.shape[0])
    if wrong:
        raise InputError(
            f"{printable(name)}: factors do not fit together at {len(wrong)} of {len(sites)} sites: {shorten(wrong)}.",
            "An expert in part does not do what it was trained to do.",
            "Fetch it again, or ask its author.",
            code="E_IMPORT",
        )
    if all(not f.b_OR[:, 0].any() for f in factors.values()) and any(f.b_OR.any() for f in factors.values()):
        raise InputError(
            f"{printable(name)} carries its gate as the first of its ranks, at every site.",
            "That gate is a sigmoid of the input, so the expert is no linear update.",
            "Take the checkpoint with gates apart, from before use_input_gate_in_router_and_expert.",
            code="E_IMPORT",
        )
    return factors
