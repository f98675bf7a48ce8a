"""Where a site lies, read from its module path: in which layer, and which linear of it.

``model.layers.3.mlp.up_proj`` is ``up_proj`` of layer 3; ``decoder.block.0.layer.1.EncDecAttention.q`` is ``EncDecAttention.q`` of
layer 0. The name of a class is as short as it can be without meaning two things: T5 has three linears called ``q`` in a pair of
layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple


class Place(NamedTuple):
    """A site's layer (None outside the layers, as for ``lm_head``) and its class."""

    layer: int | None
    kind: str


def places(paths: Iterable[str]) -> dict[str, Place]:
    """Module path → Place. Experts of one layer are one class."""
    split = {path: _split(path) for path in paths}
    keys = list(dict.fromkeys((prefix, tail) for prefix, _, tail in split.values()))
    names = {key: _candidates(*key) for key in keys}
    label = {}
    for key in keys:
        others = {name for other in keys if other != key for name in names[other]}
        label[key] = next((name for name in names[key] if name not in others), names[key][-1])
    return {path: Place(layer, label[prefix, tail]) for path, (prefix, layer, tail) in split.items()}


def _split(path: str) -> tuple[str, int | None, tuple[str, ...]]:
    """What is before the first number, the number, and what is after it, without further numbers."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if re.fullmatch(r"[0-9]{1,9}", part)), None)
    if at is None:
        return "", None, tuple(parts)
    return ".".join(parts[:at]), int(parts[at]), tuple(part for part in parts[at + 1 :] if not part.isdigit())


def _candidates(prefix: str, tail: tuple[str, ...]) -> list[str]:
    """From the shortest name to the longest: the tail's end, the whole tail, the tail behind the prefix's first word, all."""
    names = [".".join(tail[-count:]) for count in range(1, len(tail) + 1)] or [prefix]
    if not prefix:
        return names
    return [*names, *(f"{prefix.split('.')[0]}.{name}" for name in names), ".".join([prefix, *tail])]
