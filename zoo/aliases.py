"""Whether two names mean one base model: quantised copies, mirrors, folders on somebody's disk, and what a user says.

An adapter declares its base by whatever string its author's script had at hand. These rules are about names alone. They never
bridge a difference in size, version or tuning (phi-1.5 and phi-2, v0.1 and v0.2, with ``-Instruct`` and without), and whoever
asks must say in the receipt what was assumed: only "same" is certain, and even then shapes decide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from recycler.zoo.match import is_hub_id

Relation = Literal["same", "alias", "quantised copy", "mirror", "path", "no"]

MIRRORS = ("unsloth",)
"""Organisations that republish other people's weights unchanged under the same last name."""

# What the name of a quantised copy ends in. At least one ending of the first kind makes it one; the second kind only
# accompanies them, as in -unsloth-bnb-4bit, -gptq-4bit-128g or -fp8-dynamic.
_QUANT = (
    r"gptq|awq|gguf|ggml|exl[23]|hqq|eetq|nf4|fp4|mxfp4|nvfp4|fp8|int[48]|[2-8]-?bits?|w\d{1,2}a\d{1,2}"
    r"|i?q[2-8](?:_(?:k|xx?s))?(?:_[01sml])?"
)
_BESIDE = r"unsloth|bnb|mlx|quantized|quantised|dynamic|\d{2,3}g"
_ENDING = re.compile(rf"[-_.](?:(?P<quant>{_QUANT})|{_BESIDE})\Z")
_CACHED = re.compile(r"(?:\A|/)models--(?P<id>[^/]+)(?:/|\Z)", re.IGNORECASE)


def same_model(declared: str | None, base: str, aliases: Iterable[str] = ()) -> Relation:
    """How the base that an adapter declares relates to the base that is asked for.

    Args:
        declared: a Hub id, or a path on the author's disk, or None.
        base: a Hub id or a folder.
        aliases: further names that the user says mean the same weights (``--base-alias``).

    Returns:
        "same": the same id (upper and lower case aside) or the same path. "alias": one of `aliases`. "quantised copy": equal
        but for endings such as ``-bnb-4bit`` or ``-AWQ``, whoever published it. "mirror": the same last name, at one of
        `MIRRORS`. "path": a folder, or a bare name, that is called as the base is, or a folder of the Hub's cache that spells
        its id. "no": none of these, which for a path means only that nobody knows.
    """
    if not declared or not _normal(declared):
        return "no"
    others = [alias for alias in aliases if _normal(alias)]
    if _normal(declared) == _normal(base):
        return "same"
    if _normal(declared) in map(_normal, others):
        return "alias"
    found = {_relation(declared, name) for name in (base, *others) if _normal(name)}
    return next((kind for kind in _BY_CERTAINTY if kind in found), "no")


_BY_CERTAINTY: tuple[Relation, ...] = ("quantised copy", "mirror", "path")


def plain_name(name: str) -> str:
    """The last component of an id or path, in lower case, without the endings of a quantised copy.

    ``unsloth/Phi-2-bnb-4bit`` → ``phi-2``.
    """
    tail = _tail(name)
    rest, quantised = tail, False
    while (found := _ENDING.search(rest)) and found.start():
        rest, quantised = rest[: found.start()], quantised or bool(found["quant"])
    return rest if quantised else tail


def hub_id_of(path: str) -> str | None:
    """The id that a folder of the Hub's cache spells (``.../models--org--name/snapshots/<sha>``); None for any other path."""
    found = _CACHED.search(path.replace("\\", "/"))
    return found["id"].replace("--", "/", 1) if found else None


def _relation(declared: str, base: str) -> Relation:
    """Of two names that are spelled differently."""
    a, b = _identity(declared), _identity(base)
    on_disk = not (is_hub_id(declared.strip()) and is_hub_id(base.strip()))
    if "/" not in a or "/" not in b:  # a folder's name, or a bare one: an old id of the Hub, or a relative path
        return "path" if plain_name(a) == plain_name(b) else "no"
    if a == b:
        return "path"
    found: Relation = "no"
    if plain_name(a) == plain_name(b):
        if plain_name(a) != _tail(a) or plain_name(b) != _tail(b):
            found = "quantised copy"
        elif {a.split("/")[0], b.split("/")[0]} & set(MIRRORS):
            found = "mirror"
    return "path" if on_disk and found != "no" else found


def _identity(name: str) -> str:
    """``org/name`` where that is known, else the last component; in lower case."""
    if is_hub_id(name.strip()):
        return _normal(name)
    spelled = hub_id_of(name)
    return _normal(spelled) if spelled else _tail(name)


def _tail(name: str) -> str:
    return _normal(name).rsplit("/", 1)[-1]


def _normal(name: str) -> str:
    """In lower case, with the slashes of everybody but Windows, and none at the end."""
    return name.replace("\\", "/").strip().rstrip("/").casefold()
