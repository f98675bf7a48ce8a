"""The program that opens pickles, in a process of its own; `unpickle` starts it and trusts nothing it says.

A job comes in as JSON on stdin; lines of JSON go out through what was stdout. Every pickle becomes ``<n>.json`` (its plain
values) and ``<n>-<i>.safetensors`` (its tensors; more than one file only where they are very many) in the working folder,
through ``torch.load(weights_only=True)`` alone, with `walls` around it.
"""

from __future__ import annotations

import codecs
import contextlib
import gc
import io
import json
import os
import pickletools
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

from recycler.zoo import walls

_TORCH = (2, 10)
_DEPTH, _NODES, _TEXT = 40, 1_000_000, 20_000
_ENTRIES = 2_000_000  # of a zip
_TENSORS = 40_000  # in one safetensors file, so that its header stays within what is read
_NAME = 1000
_MAGIC = 0x1950A86A20F9469CFC6C  # what torch's older format, a sequence of pickles, begins with


class Refused(Exception):
    """A pickle that is not opened, or not converted: a kind that `unpickle` knows, and names."""

    def __init__(self, kind: str, *names: object) -> None:
        super().__init__(kind, *names)
        self.kind, self.names = kind, [str(name)[:500] for name in names[:200]]


def is_old(torch: str) -> bool:
    """Whether this version can be made to run code even by weights_only: CVE-2025-32434, CVE-2026-24747."""
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in torch.split(".")[:2]) < _TORCH


def main() -> NoReturn:
    """Do a job and end. Whoever calls this in a process that has other things to do loses it."""
    job = json.loads(sys.stdin.buffer.read())
    out = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)

    def say(**facts: Any) -> None:
        os.write(out, json.dumps(facts).encode() + b"\n")

    sys.path += [path for path in job["path"] if path not in sys.path]
    warnings.simplefilter("ignore")
    held = {"no network": walls.leave_network(), "end with the parent": walls.die_with_parent()}
    try:
        import safetensors.torch
        import torch
    except ImportError as error:
        say(unable=f"it cannot import {error.name or error}")
        os._exit(1)
    if is_old(torch.__version__):
        say(old=torch.__version__)
        os._exit(1)
    torch.set_num_threads(1)
    _warm_up(torch, safetensors.torch)
    gc.freeze()  # so that collecting after each pickle costs little
    held |= walls.limit(job["memory"], job["max_bytes"] + 2**24, job["cpu_seconds"])
    held["no new privileges"] = walls.no_new_privileges()
    held["system calls"] = walls.filter_calls()
    pickles = [os.path.realpath(path) for path in job["pickles"]]
    walls.watch(lambda what: say(tried=what[:500]), os.path.realpath(os.getcwd()), set(pickles))
    holding = ["audit hook", *(name for name, ok in held.items() if ok)]
    say(ready=torch.__version__, held=holding, missing=[name for name, ok in held.items() if not ok])
    for number, path in enumerate(pickles):
        say(start=number)
        try:
            count = _convert(torch, safetensors.torch, path, number, job)
        except Refused as error:
            say(done=number, refused=error.kind, names=error.names)
        else:
            say(done=number, tensors=count)
        gc.collect()
    os._exit(0)  # without the interpreter's own end, whose events the hook would stop at


def _convert(torch: Any, safetensors: Any, path: str, number: int, job: Mapping[str, Any]) -> int:
    """Write what a pickle holds; the number of its tensors."""
    try:
        state = _load(torch, path, job["max_bytes"], job["plain"].get(str(number), ()))
        tensors, facts = _sort(torch, state, job["max_bytes"])
        del state
        Path(f"{number}.json").write_text(json.dumps(facts, allow_nan=False), "utf-8")
        names = list(tensors)
        for first in range(0, len(names), _TENSORS):
            some = {name: tensors[name] for name in names[first : first + _TENSORS]}
            safetensors.save_file(some, f"{number}-{first // _TENSORS}.safetensors")
        return len(tensors)
    except Refused:
        raise
    except MemoryError:
        raise Refused("memory") from None
    except RecursionError:
        raise Refused("nested") from None
    except Exception as error:  # whatever damaged bytes lead to; the process can do nothing by now
        memory = isinstance(error, RuntimeError) and "alloc" in str(error)
        raise Refused("memory" if memory else "broken", f"{type(error).__name__}: {error}") from None


def _load(torch: Any, path: str, max_bytes: int, plain: Any) -> Any:
    """The pickle's contents; with `plain`, names of packages, its plain values where only their classes stand in the way."""
    with open(path, "rb") as stream:
        head = stream.read(512)
    zipped = head[:4] == b"PK\x03\x04"
    if zipped:
        _check_zip(path, max_bytes)
    elif head[257:262] == b"ustar":
        raise Refused("tar")
    elif len(head) < 4:
        raise Refused("broken", "it has fewer than four bytes")
    elif head[:1] != b"\x80":
        raise Refused("pickle")
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except UnpicklingError as error:
        asked, ended = _globals(path, zipped)
        refused = sorted(name for name in asked if not _allowed(torch, name))
        if refused and all(name.split(".")[0] in plain for name in refused):
            return plain_values(_opcodes(path, zipped))
        if not refused and not ended:
            raise Refused("broken", "its objects end too early") from None
        why = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
        raise Refused("globals" if refused else "malformed", *(refused or [why])) from None
    except RuntimeError as error:
        if "magic number" in str(error):  # a pickle, and of something else
            raise Refused("pickle") from None
        raise


def _check_zip(path: str, max_bytes: int) -> None:
    """Refuse by the zip's directory alone: sizes, and what is no archive of tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError) as error:
        raise Refused("broken", error) from None
    total = sum(entry.file_size for entry in entries)
    if total > max_bytes or len(entries) > _ENTRIES:
        raise Refused("bomb", f"{os.path.getsize(path):,} bytes unpack to {total:,} in {len(entries):,} files")
    inside = [entry.filename.partition("/")[2] for entry in entries]
    if any(name == "constants.pkl" or name.startswith("code/") for name in inside):
        raise Refused("code")
    if inside.count("data.pkl") != 1:
        raise Refused("pickle")


def _sort(torch: Any, state: Any, max_bytes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors by the path of keys that leads to them, joined by "/"; plain values that JSON can hold)."""
    tensors: dict[str, Any] = {}
    odd: list[str] = []
    left = [_NODES, max_bytes]

    def visit(value: Any, path: tuple[str, ...]) -> Any:
        left[0] -= 1
        if left[0] < 0 or len(path) > _DEPTH:
            raise Refused("nested")
        if isinstance(value, torch.Tensor):
            keep(value, "/".join(path))
        elif isinstance(value, Mapping):
            inside = {_key(key): visit(part, (*path, _key(key))) for key, part in value.items()}
            return {key: part for key, part in inside.items() if "/".join((*path, key)) not in tensors}
        elif isinstance(value, list | tuple | set | frozenset):
            return [visit(part, (*path, str(i))) for i, part in enumerate(value)]
        elif isinstance(value, str):
            return value[:_TEXT].encode("utf-8", "replace").decode()
        elif isinstance(value, int | float) and abs(value) < (2**63 if isinstance(value, int) else float("inf")):
            return value
        elif value is not None:
            return {"__class__": type(value).__name__}
        return None

    def keep(tensor: Any, name: str) -> None:
        if len(name) > _NAME or not name.isprintable():
            raise Refused("names", f"one is called {name[:100]!r}")
        if name in tensors or not name:
            raise Refused("names", f"two tensors are called {name!r}" if name else "it is a single tensor")
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.is_quantized or tensor.is_complex() or tensor.device.type != "cpu":
            odd.append(f"{name} ({type(tensor).__name__}, {tensor.dtype}, {tensor.layout}, {tensor.device.type})")
            return
        left[1] -= tensor.numel() * tensor.element_size()
        if left[1] < 0:  # views may claim more than the file holds
            raise Refused("bomb", f"its tensors claim more than {max_bytes:,} bytes")
        tensors[name] = tensor.detach()

    facts = visit(state, ())
    if odd:
        raise Refused("kind", *odd)
    memories = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    for name, tensor in tensors.items():  # safetensors knows no two names for one memory, and no part of another's
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        if not whole or len(memories) < len(tensors):
            tensors[name] = tensor.clone(memory_format=torch.contiguous_format)
    return tensors, facts if isinstance(facts, dict) else {"value": facts}


def _key(key: Any) -> str:
    text = key if isinstance(key, str) else repr(key) if isinstance(key, int | float | None) else type(key).__name__
    return text[: _NAME + 1].encode("utf-8", "replace").decode()


def _warm_up(torch: Any, safetensors: Any) -> None:
    """Let torch and Python import what they import on first use, while they still may."""
    for codec in ("cp437", "latin-1", "ascii", "raw_unicode_escape"):  # of names in zips, of bytes and texts in pickles
        codecs.lookup(codec)
    state = {"a": torch.nn.Parameter(torch.ones(2, 3)), "b": torch.ones(4, dtype=torch.bfloat16)[::2], "c": [1.5, "é", {}]}
    file, job = "warm-up", {"max_bytes": 10**6, "plain": {"0": ["plain"]}}

    def convert(content: bytes | None = None) -> None:
        if content is not None:
            Path(file).write_bytes(content)
        with contextlib.suppress(Refused):
            _convert(torch, safetensors, file, 0, job)

    for zipped in (True, False):
        torch.save(state, file, _use_new_zipfile_serialization=zipped)
        convert()
        whole = Path(file).read_bytes()
        for content in (whole[:-70], whole[:200], whole.replace(b"torch._utils", b"torch._utilz")):
            convert(content)
    for content in (b"\x80\x02cos\nsystem\n.", b"\x80\x02cplain\nA\n)R.", b"\x80\x04}.", b"\x80\x02X", b"PK\x03\x04", b"odd"):
        convert(content)
    for name in (file, "0.json", "0-0.safetensors"):
        Path(name).unlink(missing_ok=True)


# Pickles as instructions: read, and never carried out


def _opcodes(path: str, zipped: bool) -> Iterator[tuple[Any, Any, int | None]]:
    """The instructions of the pickle that holds the objects."""
    with contextlib.ExitStack() as opened:
        if zipped:
            archive = opened.enter_context(zipfile.ZipFile(path))
            name = next(n for n in archive.namelist() if n.partition("/")[2] == "data.pkl")
            stream: Any = io.BytesIO(archive.read(name))
        else:
            stream = opened.enter_context(open(path, "rb"))
            first = [arg for op, arg, _ in pickletools.genops(stream) if op.name.startswith("LONG")]
            if first == [_MAGIC]:  # then come the protocol and the system's facts, and only then the objects
                for _ in range(2):
                    list(pickletools.genops(stream))
            else:
                stream.seek(0)
        yield from pickletools.genops(stream)


def _globals(path: str, zipped: bool) -> tuple[set[str], bool]:
    """What a pickle asks to import, as far as its instructions can be read; whether that is to their end."""
    asked, texts = set(), ["", ""]
    with contextlib.suppress(Exception):
        for op, arg, _ in _opcodes(path, zipped):
            if op.name in ("GLOBAL", "INST"):
                asked.add(str(arg).replace(" ", "."))
            elif op.name == "STACK_GLOBAL":
                asked.add(".".join(texts))
            elif isinstance(arg, str):
                texts = [texts[-1], arg]
        return asked, True
    return asked, False


def _allowed(torch: Any, name: str) -> bool:
    """Whether weights_only takes this global; False where this version of torch does not say."""
    table: Callable[[], Any] = getattr(torch._weights_only_unpickler, "_get_allowed_globals", dict)
    module, _, attribute = name.rpartition(".")
    known = {"__builtin__": "builtins"}.get(module, module)
    return f"{known}.{attribute}" in table() or (module == "torch" and attribute.endswith("Storage"))


def plain_values(opcodes: Iterator[tuple[Any, Any, int | None]]) -> Any:
    """A pickle's plain values, put together from its instructions: nothing is imported and nothing called.

    An object becomes a dict of its attributes, with the name of its class under ``__class__``.

    Raises:
        Refused: an instruction that plain values do not need.
        Exception: of any kind, where the instructions do not fit together.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def above_mark() -> list[Any]:
        mark = marks.pop()
        items = stack[mark:]
        del stack[mark:]
        return items

    for op, arg, _ in opcodes:
        match op.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack[-1]
            case "MARK":
                marks.append(len(stack))
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if arg is None else arg] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op.name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST" | "EMPTY_SET" | "EMPTY_TUPLE":
                stack.append([])
            case "LIST" | "TUPLE" | "FROZENSET":
                stack.append(above_mark())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(op.name[-1])
                stack[-count:] = [stack[-count:]]
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = [stack.pop()] if op.name == "APPEND" else above_mark()
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS" | "DICT":
                items = [stack.pop(-2), stack.pop()] if op.name == "SETITEM" else above_mark()
                pairs = {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}
                if op.name == "DICT":
                    stack.append({})
                stack[-1].update(pairs)
            case "GLOBAL":
                stack.append(str(arg).replace(" ", "."))
            case "STACK_GLOBAL":
                stack[-2:] = [f"{stack[-2]}.{stack[-1]}"]
            case "REDUCE" | "NEWOBJ":
                stack[-2:] = [{"__class__": stack[-2], "__args__": stack[-1]}]
            case "BUILD":
                state = stack.pop()
                stack[-1].update(state if isinstance(state, dict) else {"__state__": state})
            case _ if isinstance(arg, str | bytes | int | float):
                stack.append(arg)
            case _:
                raise Refused("malformed", f"instruction {op.name}")
    raise Refused("broken", "it ends too early")
