"""Files that somebody broke: safetensors and configs, damaged in every way we could think of, with what must come of each.

An outcome is an exit code: 3 (damaged or unusable), 4 (a header that lies), or 0 where the file is odd and yet has one reading.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from adapters import CONFIG, PREFIX, SHAPES, tensors
from hypothesis import strategies as st
from safetensors.torch import save

Header = dict[str, Any]
MAX_DEPTH = 100_000
Q0, Q1 = (f"{PREFIX}model.layers.{n}.self_attn.q_proj" for n in range(2))
A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"


def valid() -> bytes:
    """Two sites of rank 2, one in fp32 and one in fp16: small, so that damage hits something."""
    shapes = {path: SHAPES[path] for path in SHAPES if path.endswith("q_proj")}
    weights = tensors("q_proj", rank=2, shapes=shapes)
    return save({name: t.half() if ".layers.1." in name else t for name, t in weights.items()}, metadata={"format": "pt"})


CONFIG_OF_VALID: Mapping[str, Any] = {**CONFIG, "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}


def split(raw: bytes) -> tuple[Header, bytes]:
    """(header, data)"""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(header: Header | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


# ------------------------------------------------------------------------------------------------------------- safetensors


def truncations(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """`raw` cut at every byte of its length, at every structural character of its JSON, and around every tensor's end."""
    header, _ = split(raw)
    start = 8 + int.from_bytes(raw[:8], "little")
    cuts = {*range(9), start}
    for place, byte in enumerate(raw[8:start], 8):
        if chr(byte) in '{}[],:"':
            cuts |= {place, place + 1}
    for name, info in header.items():
        if name != "__metadata__":
            cuts |= {start + info["data_offsets"][1] + step for step in (-1, 0, 1)}
    for cut in sorted(cuts):
        if cut < len(raw):
            yield f"cut at {cut}", raw[:cut]


def edited(change: Callable[[Header], Any]) -> bytes:
    """The valid file with its header changed in place, or replaced by what `change` returns."""
    header, data = split(valid())
    changed = change(header)
    return join(changed if isinstance(changed, dict | bytes) else header, data)


def _set(key: str, value: Any) -> Callable[[Header], Any]:
    def change(header: Header) -> None:
        header[A][key] = value

    return change


def _raw(old: str, new: str) -> Callable[[Header], bytes]:
    """Edits the JSON as text, for what json.dumps would not write."""

    def change(header: Header) -> bytes:
        text = json.dumps(header, separators=(",", ":"))
        assert text.count(old) >= 1, old
        return text.replace(old, new, 1).encode("utf-8", "surrogatepass")

    return change


def _one(dtype: str, shape: list[int], size: int) -> bytes:
    return join({A: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}, b"\1" * size)


def _many(count: int, width: int = 1) -> bytes:
    """So many tiny tensors that are no LoRA."""
    names = (f"tensor.number.{n}" for n in range(count))
    header = {name: {"dtype": "U8", "shape": [width], "data_offsets": [n, n + 1]} for n, name in enumerate(names)}
    return join(header, b"\1" * count)


def _renamed(name: str) -> bytes:
    return edited(lambda header: {name if key == A else key: value for key, value in header.items()})


@cache
def headers() -> dict[str, tuple[bytes, int]]:
    """Label → (file, exit code)."""
    raw = valid()
    _, data = split(raw)
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length]
    cases: dict[str, tuple[bytes, int]] = {
        "empty": (b"", 3),
        "as it was": (raw, 0),
        "padded with spaces": (join(text.rstrip() + b" " * 9, data), 0),
        "entries in another order": (edited(lambda h: dict(sorted(h.items(), reverse=True))), 0),
        "two at once": (raw + raw, 4),
        "a byte too many": (raw + b"\0", 4),
        "not utf-8": (join(text.replace(b"pt", b"\xff\xfe"), data), 4),
        "a surrogate in utf-8": (edited(_raw('"pt"', '"\ud800"')), 4),
        "utf-16": (join(text.decode().encode("utf-16-le"), data), 4),
        "a mark before it": (join(b"\xef\xbb\xbf" + text, data), 4),
        "a space before it": (join(b" " + text, data), 4),
        "NUL inside": (join(text.replace(b"pt", b"p\0"), data), 4),
        "NUL behind": (join(text.rstrip() + b"\0\0", data), 4),
        "garbage behind": (join(text.rstrip() + b"}", data), 4),
        "two objects": (join(text.rstrip() + b"{}", data), 4),
        "a list": (join(b"[" + text.rstrip() + b"]", data), 4),
        "nothing but a brace": (join(b"{"), 4),
        "a comma too many": (edited(_raw("}}", "},}")), 4),
        "no tensors": (join(b"{}"), 3),
        "no tensors but metadata": (join({"__metadata__": {"format": "pt"}}), 3),
        "40 bytes, as ZeRO-3 leaves them": (join(b"{}" + b" " * 30), 3),
        "a shape of nothing": (join({A: {"dtype": "F32", "shape": [0, 16], "data_offsets": [0, 0]}}), 3),
        "100,000 tiny tensors": (_many(100_000), 3),
        "a scalar": (_one("F32", [], 4), 3),
    }
    for label, n in {
        "0": 0, "1": 1, "one less": length - 1, "one more": length + 1, "2^63": 2**63, "2^64-1": 2**64 - 1, "99 MB": 99_000_000,
        "just too large": 10_000_001,
    }.items():  # fmt: skip
        cases[f"length {label}"] = (struct.pack("<Q", n) + raw[8:], 4)

    deep = "[" * MAX_DEPTH
    for label, change in {
        "shape": _raw('"shape":[2,16]', f'"shape":{deep}'),
        "closed": _raw('"shape":[2,16]', f'"shape":{deep}{"]" * MAX_DEPTH}'),
        "metadata": _raw('{"format":"pt"}', '{"a":' * MAX_DEPTH + "1" + "}" * MAX_DEPTH),
        "top": lambda header: b'{"a":' * MAX_DEPTH,
    }.items():
        cases[f"nested 100,000 deep: {label}"] = (edited(change), 4)

    numbers = {
        "1e999": "1e999", "-1": "-1", "NaN": "NaN", "Infinity": "Infinity", "-Infinity": "-Infinity", "a float": "2.0",
        "true": "true", "null": "null", "text": '"2"', "a list": "[2]", "10^400": "1" + "0" * 400, "10^5000": "1" + "0" * 5000,
        "2^63": str(2**63), "2^64": str(2**64), "hexadecimal": "0x2", "-0.0": "-0.0",
    }  # fmt: skip
    for label, number in numbers.items():
        cases[f"dimension {label}"] = (edited(_raw('"shape":[2,16]', f'"shape":[{number},16]')), 4)
        # A (2, 16) in fp32 comes first in the file
        begin, end = f'"data_offsets":[{number},128]', f'"data_offsets":[0,{number}]'
        cases[f"begin {label}"] = (edited(_raw('"data_offsets":[0,128]', begin)), 4)
        cases[f"end {label}"] = (edited(_raw('"data_offsets":[0,128]', end)), 4)

    entry = '{"dtype":"F32","shape":[2,16],"data_offsets":[0,128]}'
    cases |= {
        "a tensor twice": (edited(_raw(f'"{A}":{entry}', f'"{A}":{entry},"{A}":{entry}')), 4),
        "a tensor twice, escaped": (edited(_raw(f'"{A}":{entry}', f'"{A}":{entry},"\\u0062{A[1:]}":{entry}')), 4),
        "dtype twice": (edited(_raw('"dtype":"F32"', '"dtype":"F32","dtype":"F32"')), 4),
        "metadata twice": (edited(_raw('"__metadata__"', '"__metadata__":{},"__metadata__"')), 4),
        "a key in metadata twice": (edited(_raw('"format":"pt"', '"format":"pt","format":"tf"')), 4),
        "a field too many": (edited(_set("strides", [16, 1])), 4),
        "no dtype": (edited(lambda h: h[A].pop("dtype") and None), 4),
        "no shape": (edited(lambda h: h[A].pop("shape") and None), 4),
        "no offsets": (edited(lambda h: h[A].pop("data_offsets") and None), 4),
        "three offsets": (edited(_set("data_offsets", [0, 128, 128])), 4),
        "one offset": (edited(_set("data_offsets", [0])), 4),
        "an entry that is a list": (edited(lambda h: {**h, A: [h[A]]}), 4),
        "an entry that is null": (edited(lambda h: {**h, A: None}), 4),
        "begin after end": (edited(_set("data_offsets", [128, 0])), 4),
        "overlap": (edited(_set("data_offsets", [4, 132])), 4),
        "the same bytes for two": (edited(lambda h: {**h, B: {**h[B], "data_offsets": h[A]["data_offsets"]}}), 4),
        "a hole at the start": (edited(lambda h: {k: v for k, v in h.items() if k != A}), 4),
        "a hole": (edited(lambda h: {k: v for k, v in h.items() if k != B}), 4),
        "far out of range": (edited(_set("data_offsets", [10**9, 10**9 + 128])), 4),
        "more bytes than its shape": (edited(_set("shape", [2, 15])), 4),
        "fewer bytes than its shape": (edited(_set("shape", [2, 17])), 4),
        "half the bytes of its dtype": (edited(_set("dtype", "F16")), 4),
        "terabytes, and a short file": (
            join({A: {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}, data),
            3,
        ),
        "a product that overflows to 0": (join({A: {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 0]}}), 4),
        "a product that overflows to 128": (edited(_set("shape", [2**61 + 4, 8])), 4),
        "1,000 dimensions": (edited(_set("shape", [1] * 998 + [2, 16])), 4),
        "3 dimensions": (edited(_set("shape", [1, 2, 16])), 3),
    }
    for label, value in {
        "unknown": "F31", "lower case": "f32", "empty": "", "torch's": "float32", "null": None, "a number": 32, "a list": ["F32"],
        "an object": {}, "10 kB": "F" * 10_000,
    }.items():  # fmt: skip
        cases[f"dtype {label}"] = (edited(_set("dtype", value)), 4)
    for dtype, bits in {
        "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F4": 4,
        "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    }.items():  # fmt: skip
        cases[f"dtype {dtype}"] = (_pair(dtype, bits), 3)
    for label, value in {
        "null": None, "a list": ["pt"], "text": "pt", "a number": 1, "a number inside": {"format": 1}, "null inside": {"format": None},
        "an object inside": {"format": {}}, "2 MB": {"format": "x" * 2_000_000},
    }.items():  # fmt: skip
        cases[f"metadata {label}"] = (edited(lambda h, value=value: {**h, "__metadata__": value}), 4)
    for label, (name, code) in {
        "ANSI": ("base_model.model.\x1b[31mred.lora_A.weight", 4),
        "NUL": (f"{A}\0", 4),
        "a newline": (A.replace("q_proj", "q\nproj"), 4),
        "right to left": (A.replace("q_proj", "\u202eq_proj"), 4),
        "10 kB": (A.replace("q_proj", "q" * 10_000), 4),
        "10 kB of dots": (A.replace("q_proj", "." * 10_000), 4),
        "nothing": ("", 3),
        "dots": (A.replace("self_attn", ".."), 3),
        "a path": (A.replace("base_model.model.", "base_model.model.../../"), 3),
    }.items():
        cases[f"name {label}"] = (_renamed(name), code)
    return cases


def _pair(dtype: str, bits: int) -> bytes:
    """A site whose A and B are of a dtype that holds no factors."""
    size = 32 * bits // 8
    return join(
        {
            A: {"dtype": dtype, "shape": [2, 16], "data_offsets": [0, size]},
            B: {"dtype": dtype, "shape": [16, 2], "data_offsets": [size, 2 * size]},
        },
        b"\1" * (2 * size),
    )


def lora(sites: int, width: int = 1) -> bytes:
    """So many sites of rank 1, as tiny as they can be, named as PEFT names them: everything about it is fine but the number."""
    header, at = {}, 0
    for n in range(sites):
        for part, shape in (("lora_A", [1, width]), ("lora_B", [width, 1])):
            name = f"base_model.model.m.{n}.{part}.weight"
            header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + 2 * width]}
            at += 2 * width
    return join(header, b"\0\x3c" * (at // 2))


# --------------------------------------------------------------------------------------------------------------- mutations

VALUES: list[Any] = [
    None, True, 0, 1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, -1, 2**31, 2**63, 2**64, 1.0, 1.5, "", "2", "F32", "F16", "BF16",
    "F64", "I8", "F8_E4M3", "x", [], [0], [2, 16], [16, 2], [1, 32], [32], [0, 128], [128, 256], [256, 320], [0, 0], {}, {"a": 1},
    "__metadata__", A, B, A.replace("A", "B"), A.replace("weight", "default.weight"), A.replace("layers.0", "layers.7"), "\x1b[2J",
]  # fmt: skip


def mutants(raw: bytes) -> st.SearchStrategy[bytes]:
    """`raw` after one to three changes: bytes flipped, inserted, deleted and moved, or its JSON edited with understanding."""
    # Three numbers a change, and the rest by arithmetic: drawing is most of what an example costs.
    change = st.tuples(st.integers(0, 7), st.integers(0, 2**16), st.integers(0, 2**32))
    changes = st.one_of(st.tuples(change), st.tuples(change, change), st.tuples(change, change, change))

    def apply(changes: tuple[tuple[int, int, int], ...]) -> bytes:
        changed = raw
        for kind, at, how in changes:
            changed = _CHANGES[kind](changed, at, how)
        return changed

    return changes.map(apply)


def _place(raw: bytes, at: int) -> int:
    """A place in the file; one in eight in its length, one in four in the data, which are most of the file."""
    start = min(8 + int.from_bytes(raw[:8], "little"), len(raw))
    region, at = at % 8, at // 8
    if region == 0:
        return min(at % 9, len(raw))
    return start + at % (len(raw) - start + 1) if region < 3 else min(8 + at % max(start - 8, 1), len(raw))


def _flip(raw: bytes, at: int, how: int) -> bytes:
    at = _place(raw, at)
    return raw[:at] + bytes([raw[at] ^ (how % 255 + 1)]) + raw[at + 1 :] if at < len(raw) else raw


def _insert(raw: bytes, at: int, how: int) -> bytes:
    at = _place(raw, at)
    chunks = [b'"', b"{", b"}", b",", b"[0,128]", b"\\u0000", b"1e9", b" ", how.to_bytes(8, "little")[: how % 9]]
    return raw[:at] + chunks[how % len(chunks)] + raw[at:]


def _delete(raw: bytes, at: int, how: int) -> bytes:
    at = _place(raw, at)
    return raw[:at] + raw[at + how % 40 + 1 :]


def _splice(raw: bytes, at: int, how: int) -> bytes:
    """Some bytes of one place over those of another."""
    at, source, count = _place(raw, at), _place(raw, how >> 8), how % 40 + 1
    return raw[:at] + raw[source : source + count] + raw[at + count :]


def _edit(raw: bytes, at: int, how: int) -> bytes:
    """One edit of the header as JSON, its length kept true, so that what is wrong is the meaning and not the syntax."""
    kind, value, other = how % 6, copy.deepcopy(VALUES[how // 6 % len(VALUES)]), how // 512
    try:
        header, data = split(raw)
        names = [name for name in header if name != "__metadata__"]
        name, second = names[at % len(names)], names[(at + other) % len(names)]
        field = ("dtype", "shape", "data_offsets")[other % 3]
        if kind == 0:
            header[name][field] = value
        elif kind == 1 and isinstance(header[name][field], list):
            header[name][field][other % 2] = value
        elif kind == 2:
            header[name], header[second] = header[second], header[name]
        elif kind == 3:
            header = {str(value) if key == name else key: info for key, info in header.items()}
        elif kind == 4:
            del header[name]
        else:
            swapped = header[second]["data_offsets"], header[name]["data_offsets"]
            header[name]["data_offsets"], header[second]["data_offsets"] = swapped
        return join(header, data)
    except (ValueError, KeyError, IndexError, TypeError, ZeroDivisionError, AttributeError):
        return raw  # an earlier change left no JSON


_CHANGES = (_flip, _flip, _insert, _delete, _splice, _edit, _edit, _edit)


# ----------------------------------------------------------------------------------------------------------------- configs

WRONG: dict[str, str] = {
    "null": "null", "true": "true", "-1": "-1", "0": "0", "1e400": "1e400", "NaN": "NaN", "text": '"x"', "list": "[]", "object": "{}",
    "nested": '{"a":[{"b":[{"c":1}]}]}', "a huge list": "[" + ",".join(["1"] * 20_000) + "]", "ANSI": '"\\u001b[31m"',
    "right to left": '"\\u202ex"', "half a character": '"\\ud800"', "a huge number": "1" + "0" * 400,
}  # fmt: skip


def config(**fields: Any) -> bytes:
    return json.dumps({**CONFIG_OF_VALID, **fields}).encode()


def config_with(field: str, text: str) -> bytes:
    """The config with one field's value given as JSON text, which need not be JSON."""
    rest = {key: value for key, value in CONFIG_OF_VALID.items() if key != field}
    return (json.dumps(rest)[:-1] + f", {json.dumps(field)}: {text}}}").encode()
