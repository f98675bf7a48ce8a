"""A short vector per adapter, whose inner products estimate those of the updates: who is like whom in a zoo of 100,000 without
comparing all pairs.

::

    s_k = K^-½ Σ_sites u_kᵀ (B A) v_k = K^-½ Σ_sites Σ_r (Bᵀu_k)_r (A v_k)_r        k = 1 … K
    E⟨s_i, s_j⟩ = ⟨ΔW_i, ΔW_j⟩

u and v have entries ±1, drawn from a hash of the site's path and shape, so that every machine draws the same and no site's u or v
has to do with another's. ΔW itself is never made. As s depends on BA alone, (A, B) and (G⁻¹A, BG) have the same sketch. An estimated
cosine of unrelated updates is off by about K^-½ (0.06), one of near-copies by much less; it says whom to compare, and
`recycler.zoo.similarity` compares exactly. Random projections of matrices by rank-one tests: Rakhshan and Rabusseau, "Tensorized
Random Projections" (arXiv 2003.05101), in their CP form with one term.

DoRA's magnitude and biases are no part of it, as in `recycler.zoo.similarity`.

Dimensions in names: R rank, D input width, O output width, K the sketch, N adapters.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycler.zoo.adapter import Adapter
from recycler.zoo.errors import RecycleError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from recycler.zoo.store import Zoo

WIDTH = 256
"""K: numbers in a sketch."""
VERSION = 1
_HEADER = f"recycle sketches {VERSION} {WIDTH}".ljust(63).encode() + b"\n"
_RECORD = 32 + 2 * WIDTH
_MANY = 50  # names, from which on the whole list is read rather than one entry after the other
_OFTEN = 50  # new sketches that are kept at once

Progress = Callable[[int, str], Callable[..., None]]


def sketch(adapter: Adapter) -> np.ndarray[Any, Any]:
    """[K] fp64, with the adapter's strength: ‖s‖² estimates ‖ΔW‖². Zeros where the update is zero."""
    import torch

    from recycler.zoo.similarity import one_thread

    total_K = torch.zeros(WIDTH, dtype=torch.float64)
    with one_thread():
        for path, factors in adapter.sites.items():
            out, width = factors.shape
            site = f"{path} {out}x{width}"
            u_OK = _signs("out", out) * _flips(f"{site} out", out)
            v_DK = _signs("in", width) * _flips(f"{site} in", width)
            scale_b, scale_a = _scale(factors.b_OR), _scale(factors.a_RD)  # so that fp32 neither overflows nor vanishes
            seen_RK = (factors.b_OR / scale_b).T @ u_OK
            seen_RK = seen_RK.double() * ((factors.a_RD / scale_a) @ v_DK).double()
            total_K += seen_RK.sum(0) * scale_a * scale_b
    found: np.ndarray[Any, Any] = (total_K / math.sqrt(WIDTH)).numpy()
    return found


def cosine(a_K: np.ndarray[Any, Any], b_K: np.ndarray[Any, Any]) -> float:
    """What two sketches say of the cosine of their updates; 0 where one is zero."""
    return float(unit(a_K) @ unit(b_K))


class Sketches:
    """The sketches of a zoo's weights, by their sha256, in ``cache/sketches.bin``: a line that names the version, then a record each,
    appended: 32 bytes of hash, and the direction [K] in fp16, whose rounding is far below the error of an estimate. Mapped into
    memory, 100,000 are there at once.

    As a file's hash says what its sketch is, none ever gets old. The file may be deleted; what is damaged is made anew. Where it cannot
    be written, `put` keeps nothing and says nothing: a sketch can always be made again.
    """

    def __init__(self, zoo: Path) -> None:
        self.path = zoo / "cache" / "sketches.bin"

    def put(self, found: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Keep some: sha256 → [K], of any length."""
        from filelock import FileLock

        data = b"".join(bytes.fromhex(sha256) + unit(s_K).astype("<f2").tobytes() for sha256, s_K in found.items())
        with suppress(OSError):
            self.path.parent.mkdir(exist_ok=True)
            with FileLock(self.path.with_name(self.path.name + ".lock"), timeout=60), self.path.open("a+b") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(0)
                if stream.read(len(_HEADER)) != _HEADER:  # new, another version's, or damaged
                    stream.truncate(0)
                    data = _HEADER + data
                elif torn := (size - len(_HEADER)) % _RECORD:  # by a process that died
                    stream.truncate(size - torn)
                stream.write(data)

    def load(self, hashes: Sequence[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Unit vectors [N, K] fp32 (zeros where the update is zero), and which of them are there, [N] bool."""
        import numpy as np

        nothing = np.zeros((len(hashes), WIDTH), np.float32), np.zeros(len(hashes), bool)
        kind = np.dtype([("key", "<u8", 4), ("direction", "<f2", WIDTH)])
        try:
            with self.path.open("rb") as stream:
                if stream.read(len(_HEADER)) != _HEADER:
                    return nothing
            count = (self.path.stat().st_size - len(_HEADER)) // _RECORD
            kept = np.memmap(self.path, kind, "r", len(_HEADER), (count,)) if count and hashes else None
        except OSError:
            return nothing
        if kept is None:
            return nothing
        key_N4 = np.frombuffer(bytes.fromhex("".join(hashes)), "<u8").reshape(-1, 4)
        keys_M4 = np.ascontiguousarray(kept["key"])
        order_M = np.argsort(keys_M4[:, 0], kind="stable")
        place_N = np.searchsorted(keys_M4[order_M, 0], key_N4[:, 0]).clip(max=count - 1)
        row_N = order_M[place_N]
        there_N = (keys_M4[row_N] == key_N4).all(1)
        unit_NK = kept["direction"][row_N].astype(np.float32)
        length_N = np.einsum("nk,nk->n", unit_NK, unit_NK)
        there_N &= (np.abs(length_N - 1) < 0.01) | (length_N == 0)
        unit_NK[~there_N] = 0
        return unit_NK, there_N


def sketches_of(
    zoo: Zoo, names: Iterable[str] | None = None, progress: Progress | None = None
) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Unit sketches of adapters, those that are missing made and kept. Adapters whose files cannot be read are left out.

    Args:
        names: which of them; all where None.

    Returns:
        Names, and [N, K] fp32.
    """
    chosen = None if names is None else list(dict.fromkeys(names))
    if chosen is None or len(chosen) > _MANY:
        every = zoo.weights()
        known = dict(every)
        pairs = every if chosen is None else [(n, known[n] if n in known else zoo.entry(n).weights) for n in chosen]
    else:
        pairs = [(name, zoo.entry(name).weights) for name in chosen]
    store = Sketches(zoo.path)
    unit_NK, there_N = store.load([sha256 for _, sha256 in pairs])
    missing = [int(row) for row in (~there_N).nonzero()[0]]
    step = (progress or (lambda steps, what: lambda count=1, note="": None))(len(missing), "sketching")
    made: dict[str, np.ndarray[Any, Any]] = {}
    for count, row in enumerate(missing, 1):
        name, sha256 = pairs[row]
        try:
            made[sha256] = sketch(zoo[name])
            unit_NK[row], there_N[row] = unit(made[sha256]), True
        except (RecycleError, OSError):  # `zoo verify` says what is wrong with it
            pass
        if len(made) >= _OFTEN or (made and count == len(missing)):
            store.put(made)
            made = {}
        step()
    if there_N.all():
        return [name for name, _ in pairs], unit_NK
    return [name for (name, _), there in zip(pairs, there_N, strict=True) if there], unit_NK[there_N]


@lru_cache(maxsize=16)
def _signs(side: str, width: int) -> Tensor:
    """±1, [width, K] fp32, the same everywhere."""
    import numpy as np
    import torch

    bits = np.unpackbits(
        np.frombuffer(hashlib.shake_256(f"{VERSION} {side} {width}".encode()).digest(width * WIDTH // 8), "u1")
    )
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1).view(width, WIDTH)


def _flips(site: str, width: int) -> Tensor:
    """±1, [width, 1] fp32: what makes the same signs another site's own."""
    import numpy as np
    import torch

    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(f"{VERSION} {site}".encode()).digest(-(-width // 8)), "u1"))[:width]
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1)[:, None]


def _scale(factor: Tensor) -> float:
    return float(factor.abs().max()) or 1.0 if factor.numel() else 1.0


def unit(vector_K: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The direction of a sketch, of length 1; zeros where it is zero."""
    size = float(vector_K @ vector_K) ** 0.5
    return vector_K / size if size > 0 else vector_K
