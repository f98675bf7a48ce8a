"""The header of a safetensors file, read strictly: names and shapes, before a byte of the weights is touched.

The format is 8 bytes that hold a length N, N bytes of JSON (name → dtype, shape, data_offsets), and the tensors. Its own rules
forbid overlaps, holes and duplicate names, yet parsers differ in what they let pass. Here a file has one reading or none: what
this module accepts, the safetensors library reads in the same way.

A file may claim anything, so the work is bounded by N alone, and N by `MAX_HEADER`: the JSON is decoded one tensor at a time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recycler.zoo.errors import InputError, SecurityError, shorten
from recycler.zoo.untrusted import printable, unique_keys

MAX_HEADER = 10_000_000  # safetensors allows 100 MB; 10 MB describe about 80,000 tensors, more than any adapter has
# Characters of one value in the JSON. Metadata is free text; PEFT writes {"format": "pt"}.
_MAX_NAME, _MAX_ENTRY, _MAX_METADATA = 1_000, 2_000, 1_000_000
_METADATA = "__metadata__"
_MAX_PATH = 300  # in a message; the file's name comes last

# dtype → bits of one number, for what torch can hold.
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64,
}  # fmt: skip
_UNREADABLE = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
_KNOWN = {**_BITS, **_UNREADABLE}
_SPACE = re.compile(r"[ \t\r\n]*")
_decode = json.JSONDecoder(object_pairs_hook=unique_keys).raw_decode


def read_header(path: Path, where: str | None = None) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape, from the header of a safetensors file, reading nothing else.

    Args:
        where: what a person calls the file, for messages; its path where None.

    Raises:
        SecurityError: it is no safetensors file, or its header lies (huge, ambiguous, with holes or overlaps).
        InputError: the file ends too early, or holds numbers that torch has no type for.
    """
    where = str(path) if where is None else where
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(9)
        length = header_length(start, where, size)
        raw = start[8:] + stream.read(length - 1)
    return parse_header(raw, where, size)


def header_length(start: bytes, where: str, size: int) -> int:
    """N, the bytes of JSON that follow the first 8, from the first nine bytes of a file of `size` bytes.

    Raises:
        SecurityError: it is no safetensors file, or N is absurd. InputError: the file is shorter than that.
    """
    length = int.from_bytes(start[:8], "little")
    if size < 9 or len(start) < 9:
        raise _cut_short(where, size, 9)
    if start[8:9] != b"{":
        looks = ", it looks like a pickle" if start[:2] == b"PK" or start[:1] == b"\x80" else ""
        raise _forged(where, f"it does not start with a header{looks}")
    if not 2 <= length <= MAX_HEADER:
        raise _forged(where, f"its header is said to have {length:,} bytes")
    if 8 + length > size:
        raise _cut_short(where, size, 8 + length)
    return length


def parse_header(raw: bytes, where: str, size: int) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape, from the JSON of a header.

    Args:
        raw: the N bytes of JSON.
        where: the file, for messages.
        size: the bytes of the whole file.

    Raises:
        As `read_header`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    spans: list[tuple[int, int, str]] = []
    unreadable = []
    try:
        for name, info in _members(raw.decode("utf-8")):
            if name == _METADATA:
                _check_metadata(info)
                continue
            dtype, shape, begin, end = _entry(name, info)
            shapes[name] = shape
            spans.append((begin, end, name))
            if dtype in _UNREADABLE:
                unreadable.append(f"{printable(name)} ({dtype})")
        full = _check_spans(spans)
    except (ValueError, RecursionError) as error:
        raise _forged(where, printable(error)) from error
    if 8 + len(raw) + full > size:
        raise _cut_short(where, size, 8 + len(raw) + full)
    if 8 + len(raw) + full < size:
        raise _forged(where, f"{size - 8 - len(raw) - full:,} bytes belong to no tensor")
    if unreadable:
        raise InputError(
            f"{printable(where)}: numbers that torch cannot hold: {shorten(unreadable)}.",
            "Packed or quantised factors cannot be read exactly.",
            "Save the adapter in fp32, bf16 or fp16.",
            code="E_DTYPE",
        )
    return shapes


def check_header(shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse a file without tensors or with tensors of no elements, as DeepSpeed ZeRO-3 leaves them.

    Raises:
        InputError: naming every empty tensor.
    """
    empty = [printable(name) for name, shape in shapes.items() if 0 in shape]
    if not shapes or empty:
        what = f"{len(empty)} tensors without elements: {shorten(empty)}" if empty else "no tensors at all"
        raise InputError(
            f"{printable(where)} holds {what}.",
            "DeepSpeed ZeRO-3 writes such files when weights are saved without gathering them first.",
            "Save it again with stage3_gather_16bit_weights_on_model_save, or from a gathered checkpoint.",
            code="E_EMPTY",
        )


def _members(text: str) -> Iterator[tuple[str, Any]]:
    """Key and value of every member of the outer object, each decoded by itself.

    Decoding all at once would let 10 MB of small objects grow to hundreds, and nest as deeply as they like.
    """
    seen = set()
    at = _skip(text, 1)
    more = text[at : at + 1] != "}"
    while more:
        name, at = _value(text, at, _MAX_NAME)
        if not isinstance(name, str) or not name.isprintable():
            raise ValueError(f"a tensor is called {printable(name, 60)!r}")
        if name in seen:
            raise ValueError(f"the tensor {printable(name, 60)!r} is given twice")
        seen.add(name)
        at = _skip(text, at)
        if text[at : at + 1] != ":":
            raise ValueError(f"nothing is said of {printable(name, 60)!r}")
        value, at = _value(text, _skip(text, at + 1), _MAX_METADATA if name == _METADATA else _MAX_ENTRY)
        yield name, value
        at = _skip(text, at)
        more = text[at : at + 1] == ","
        at = _skip(text, at + 1) if more else at
    if text[at : at + 1] != "}" or _skip(text, at + 1) != len(text):
        raise ValueError("its header is not one JSON object")


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found
    return found.end()


def _value(text: str, at: int, limit: int) -> tuple[Any, int]:
    """The JSON value that starts at `at`, and where it ends; at most `limit` characters."""
    value, length = _decode(text[at : at + limit])
    return value, at + length


def _check_metadata(info: Any) -> None:
    if not isinstance(info, dict) or not all(isinstance(value, str) for value in info.values()):
        raise ValueError("its metadata are not texts by name")


def _entry(name: str, info: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, first byte and byte after the last, of one tensor."""

    def is_count(value: Any) -> bool:
        return type(value) is int and 0 <= value < 2**63  # a bool is no count, nor is 4.0

    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{printable(name, 60)!r} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    bits = _KNOWN.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise ValueError(f"{printable(name, 60)!r} has the dtype {printable(dtype, 20)!r}, which does not exist")
    if not isinstance(shape, list) or not all(map(is_count, shape)):
        raise ValueError(f"{printable(name, 60)!r} has the shape {printable(shape, 60)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise ValueError(f"{printable(name, 60)!r} has the data_offsets {printable(offsets, 60)}")
    begin, end = offsets
    if math.prod(shape) * bits != (end - begin) * 8:
        raise ValueError(f"{printable(name, 60)!r} is {dtype} {printable(shape, 60)} in {end - begin} bytes")
    return dtype, tuple(shape), begin, end


def _check_spans(spans: list[tuple[int, int, str]]) -> int:
    """The bytes of all tensors together, which follow one another without overlap or hole."""
    full = 0
    for begin, end, name in sorted(spans):
        if begin != full:
            raise ValueError(f"{printable(name, 60)!r} {'overlaps another tensor' if begin < full else 'comes after a hole'}")
        full = end
    return full


def _cut_short(where: str, size: int, expected: int) -> InputError:
    return InputError(
        f"{printable(where, _MAX_PATH)} is cut short: {size:,} bytes where at least {expected:,} are declared.",
        "Tensors are missing from it.",
        "Fetch or copy it again.",
        code="E_TRUNCATED",
    )


def _forged(where: str, why: str) -> SecurityError:
    return SecurityError(
        f"{printable(where, _MAX_PATH)} is not a valid safetensors file: {why}.",
        "Its header cannot be trusted, so nothing in it is read.",
        "Get the file again from its author, saved with safe_serialization.",
        code="E_HEADER",
    )
