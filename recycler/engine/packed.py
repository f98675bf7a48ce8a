"""One adapter as a file that a model can page in: what `stack.slab` makes of it, once, for one base.

Read as it came, an adapter costs its whole file at every miss: fp32, scales to fold, B transposed, DoRA's norms over the base's
weights. Packed, a miss is a read of bytes that are used as they are: rank-major, in the base's dtype (or int8), sites in the order of
the base's modules, so that one group of one adapter is one contiguous range in all models we know.

A packed file is a safetensors file of one uint8 tensor, ``slabs``. Its metadata say what lies there: ``layout``, a JSON list of
[site, rank, D, O, kinds, dtype] in file order (kinds: q for int8, s for DoRA's output scale, b for a bias), ``sums``, a CRC-32 of each
site's bytes, ``adapter``, facts about where it came from, and ``check``, a CRC-32 of the other three. Every part (A, B, their int8
scales, the output scale, the bias) begins at a multiple of 64 bytes.

Files are read, not mapped: a mapped file that somebody cuts short kills the process, reading one raises; and what was read is held
as long as the budget says, not as long as the kernel likes. Sums are compared at every read (4 GB/s): damage is never computed with.

Dimensions in names: R rank, D input width, O output width.
"""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recycler.engine.quantised import dequantise, quantise
from recycler.engine.stack import Slab
from recycler.zoo.errors import InputError

VERSION = 1
ALIGN = 64
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Place(NamedTuple):
    """A site in a packed file.

    Attributes:
        number: in file order. rank, width, out: R, D and O. kinds, dtype: as in the layout.
        start, size: bytes, from the first of the tensor.
    """

    number: int
    rank: int
    width: int
    out: int
    kinds: str
    dtype: torch.dtype
    start: int
    size: int


class Packed:
    """A packed file, opened: where its sites lie. The bytes stay on disk.

    Raises:
        InputError: it is damaged, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length) if length < 1 << 27 else b"")
            facts, (_, stop) = header["__metadata__"], header["slabs"]["data_offsets"]
            intact = int(facts["check"]) == _check(facts)
            self.sites: Mapping[str, Place] = _places(facts["layout"])
            self.sums: list[int] = json.loads(facts["sums"])
            self.adapter: dict[str, Any] = json.loads(facts["adapter"])
            self._start, self.size = 8 + length, sum(place.size for place in self.sites.values())
            intact &= self.size == stop == path.stat().st_size - self._start and len(self.sums) == len(self.sites)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, f"its header cannot be read ({type(error).__name__})") from None
        if not intact:
            raise _damaged(path, "its header or its length is not what was written")

    def places(self, sites: Sequence[str]) -> list[tuple[int, Place]]:
        """(number in `sites`, place) of those sites where the adapter has something."""
        return [(s, self.sites[site]) for s, site in enumerate(sites) if site in self.sites]

    def read(self, places: Iterable[Place], *, pinned: bool = False) -> Tensor:
        """The bytes of some sites, one behind the other, in memory of their own.

        Raises:
            InputError: they are not those that were written.
        """
        places = list(places)
        buffer = torch.empty(sum(place.size for place in places), dtype=torch.uint8, pin_memory=pinned)
        view, at = buffer.numpy().data, 0
        try:
            with self.path.open("rb", buffering=0) as stream:
                for place in places:
                    part = view[at : at + place.size]
                    stream.seek(self._start + place.start)
                    # One call reads it all from a regular file, unless the file ends.
                    if stream.readinto(part) != place.size or zlib.crc32(part) != self.sums[place.number]:
                        raise _damaged(self.path, "its bytes are not those that were written")
                    at += place.size
        except OSError as error:
            raise _damaged(self.path, str(error)) from None
        return buffer


def slabs(buffer: Tensor, places: Sequence[tuple[int, Place]], dtype: torch.dtype) -> dict[int, Slab]:
    """Site number → slab, from what `Packed.read` gave, wherever it lies now: views where the dtype is the file's."""
    found, at = {}, 0
    for s, place in places:
        parts = []
        for kind, shape in _parts(place):
            size = _bytes(kind, shape)
            parts.append(buffer[at : at + size].view(kind).view(shape))
            at += _aligned(size)
        extra = iter(parts[4 if "q" in place.kinds else 2 :])
        if "q" in place.kinds:
            a_RD, b_RO = dequantise(parts[0], parts[1], dtype), dequantise(parts[2], parts[3], dtype)
        else:
            a_RD, b_RO = parts[0].to(dtype), parts[1].to(dtype)
        scale_O, bias_O = (next(extra).to(dtype) if mark in place.kinds else None for mark in "sb")
        found[s] = Slab(a_RD, b_RO, scale_O, bias_O)
    return found


def write(path: Path, sites: Mapping[str, Slab], adapter: Mapping[str, Any], *, int8: bool = False) -> None:
    """Packs an adapter's slabs, in the order given; a file that was there is replaced in one step."""
    layout, sums, chunks = [], [], []
    for site, one in sites.items():
        kinds = "q" * int8 + "s" * (one.scale_O is not None) + "b" * (one.bias_O is not None)
        factors = [*quantise(one.a_RD), *quantise(one.b_RO)] if int8 else [one.a_RD, one.b_RO]
        data = b"".join(_padded(part) for part in (*factors, one.scale_O, one.bias_O) if part is not None)
        dtype = str(one.a_RD.dtype).removeprefix("torch.")
        layout.append([site, len(one.a_RD), one.a_RD.shape[1], one.b_RO.shape[1], kinds, dtype])
        sums.append(zlib.crc32(data))
        chunks.append(data)
    size = sum(map(len, chunks))
    facts = {"layout": json.dumps(layout), "sums": json.dumps(sums), "adapter": json.dumps(dict(adapter))}
    facts["check"] = str(_check(facts))
    header = {"__metadata__": facts, "slabs": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.writelines(chunks)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@lru_cache(maxsize=256)  # adapters trained by one recipe share one layout, and this is most of what each of them would hold
def _places(layout: str) -> dict[str, Place]:
    places, start = {}, 0
    for number, (site, rank, width, out, kinds, dtype) in enumerate(json.loads(layout)):
        place = Place(number, rank, width, out, kinds, _DTYPES[dtype], start, 0)
        places[site] = place = place._replace(size=sum(_aligned(_bytes(*part)) for part in _parts(place)))
        start += place.size
    return places


def _parts(place: Place) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """(dtype, shape) of what lies at a place, in order."""
    parts: list[tuple[torch.dtype, tuple[int, ...]]] = []
    for width in (place.width, place.out):
        parts.append((torch.int8 if "q" in place.kinds else place.dtype, (place.rank, width)))
        parts += [(torch.float32, (place.rank, 1))] * ("q" in place.kinds)
    return parts + [(place.dtype, (place.out,)) for mark in "sb" if mark in place.kinds]


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _padded(part: Tensor) -> bytes:
    data: bytes = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return data + bytes(_aligned(len(data)) - len(data))


def _check(facts: Mapping[str, str]) -> int:
    return zlib.crc32("\n".join(facts[key] for key in ("layout", "sums", "adapter")).encode())


def _damaged(path: Path, what: str) -> InputError:
    return InputError(
        f"The packed adapter {path} is damaged: {what}.",
        "Whoever computes with it gets other answers than the adapter's.",
        "Delete it, and load the model again: it is made from the adapter's own files.",
        code="E_MODEL",
    )
