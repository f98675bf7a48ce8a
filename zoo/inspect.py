"""Vetting, before anything is kept: what a folder holds, what its weights say, are its numbers usable.

Nothing here interprets LoRA: ``formats`` does. Every check names all offenders at once, so that one run shows
all there is to fix. Text that comes from a file is passed through `printable` before it reaches a message.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycler.zoo.errors import InputError, SecurityError, shorten

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
_EXTRA = re.compile(r"README\.md|LICEN[CS]E(\.(md|txt))?", re.IGNORECASE)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_TRAINER = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")  # state of a run, no weights

MAX_BYTES = 2 * 1024**3  # a rank-64 adapter on every linear of a 70B model, in bf16, is about 1.6 GB
MAX_HEADER = 10_000_000  # safetensors allows 100 MB; 10 MB describe about 80,000 tensors, more than any adapter has
_MAX_CARD = 1_000_000


@dataclass(frozen=True)
class Receipt:
    """What reading an adapter found: counts, ranks, scalings, and what a person should know.

    Attributes:
        tensors: tensors in the file, all of them used.
        sites: linears of the base that the adapter touches.
        parameters: numbers in A and B together.
        kinds: of ``LoRA``, ``rsLoRA``, ``DoRA``.
        scalings: the smallest and the largest scaling that was folded into B.
        targets: last components of the site paths, e.g. ``q_proj``.
        base_revision: the revision of the base that the adapter declares, usually None.
        notes: harmless, for the record. warnings: worth reading before use.
    """

    name: str
    source: str
    tensors: int
    sites: int
    parameters: int
    ranks: tuple[int, ...]
    kinds: tuple[str, ...]
    scalings: tuple[float, float]
    targets: tuple[str, ...] = ()
    base_revision: str | None = None
    notes: tuple[str, ...] = field(default=())
    warnings: tuple[str, ...] = field(default=())

    def lines(self) -> list[str]:
        """The receipt as text: one line, then one per warning and note."""
        low, high = self.scalings
        scale = f"×{low:g}" if low == high else f"×{low:g} to ×{high:g}"
        ranks = f"rank {self.ranks[0]}" if len(self.ranks) == 1 else f"ranks {self.ranks[0]}–{self.ranks[-1]}"
        head = f"{self.name}: {self.tensors} tensors → {self.sites} sites, {ranks}, "
        return [
            head + f"{'+'.join(self.kinds)} {scale}, nothing left over",
            *(f"  warning: {text}" for text in self.warnings),
            *(f"  note: {text}" for text in self.notes),
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {
            "name": self.name,
            "source": self.source,
            "tensors": self.tensors,
            "sites": self.sites,
            "parameters": self.parameters,
            "ranks": list(self.ranks),
            "kinds": list(self.kinds),
            "scalings": list(self.scalings),
            "targets": list(self.targets),
            "base_revision": self.base_revision,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


def printable(text: object, limit: int = 120) -> str:
    """`text` with control characters, escapes and bidi marks spelled out, cut at `limit` characters."""
    raw = str(text)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in raw[:limit])
    return shown + ("…" if len(raw) > limit else "")


def own_files(names: Iterable[str]) -> list[str]:
    """Of the file names in an adapter's folder, its own: config, weights, card, licence."""
    return sorted(n for n in names if n in (CONFIG, WEIGHTS) or _EXTRA.fullmatch(n))


def check_listing(where: str, sizes: Mapping[str, int], max_bytes: int = MAX_BYTES) -> list[str]:
    """Vet a folder by names and sizes alone, before a byte of it is read or downloaded.

    Args:
        where: the folder or repository, for messages.
        sizes: file name → bytes, without subfolders.

    Returns:
        The adapter's own files, sorted.

    Raises:
        InputError: the config or the weights are missing, or the files are larger than `max_bytes`.
        SecurityError: the weights are there as a pickle only.
    """
    shown = printable(where)
    if WEIGHTS not in sizes:
        pickles = sorted(printable(n) for n in sizes if n.endswith(_PICKLES) and not n.startswith(_TRAINER))
        if pickles and (CONFIG in sizes or any(n.startswith("adapter_model") for n in pickles)):
            raise SecurityError(
                f"{shown} holds its weights as a pickle only: {shorten(pickles)}.",
                "Loading a pickle can run any code its author put there.",
                f"Ask the author for {WEIGHTS}, or convert it where it can do no harm: load it with "
                "PEFT in a sandbox and call save_pretrained.",
            )
    missing = [name for name in (CONFIG, WEIGHTS) if name not in sizes]
    if missing:
        raise InputError(
            f"{shown} is no PEFT adapter: {shorten(missing)} missing.",
            "An adapter is a folder with these two files.",
            "Point at the folder that holds them; a checkpoint may lie in a subfolder.",
        )
    files = own_files(sizes)
    total = sum(sizes[n] for n in files)
    if total > max_bytes:
        raise InputError(
            f"{shown} holds {total / 1e6:,.0f} MB, more than the limit of {max_bytes / 1e6:,.0f} MB.",
            "An adapter is small next to its base; a file this large is rarely one.",
            "If it is meant, raise max_bytes.",
        )
    return files


def check_folder(folder: Path, max_bytes: int = MAX_BYTES) -> list[str]:
    """Vet a local folder by names, sizes and links; the adapter's own files, sorted.

    Raises:
        InputError: not a folder, files missing, or too large.
        SecurityError: pickled weights only, or a link that leads out of the folder.
    """
    if not folder.is_dir():
        raise InputError(f"{printable(folder)} is not a folder.", fix="Give the folder that holds the adapter.")
    present = [path for path in folder.iterdir() if path.is_file()]
    files = check_listing(str(folder), {path.name: path.stat().st_size for path in present}, max_bytes)
    home = folder.resolve()
    # In the Hub client's own cache, snapshots/<sha>/file is a link to blobs/<hash> of the same repository.
    snapshots = (at.parent for at in (home, *home.parents) if at.parent.name == "snapshots")
    allowed = [home, *(at.parent / "blobs" for at in snapshots)]
    escaping = [n for n in files if not any((folder / n).resolve().is_relative_to(root) for root in allowed)]
    if escaping:
        raise SecurityError(
            f"{printable(folder)}: {shorten(escaping)} is a link that leads out of the folder.",
            "Following it could copy a file that was never meant to be shared.",
            "Replace the link by the file itself.",
        )
    return files


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape, from the header of a safetensors file, reading nothing else.

    Raises:
        SecurityError: it is no safetensors file, or its header lies (huge, ambiguous, out of range).
        InputError: the file ends too early.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(9)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 9:
            raise _truncated(path, size, 9)
        if start[8:] != b"{" or length > MAX_HEADER:
            raise _not_safetensors(path, start)
        if 8 + length > size:
            raise _truncated(path, size, 8 + length)
        raw = start[8:] + stream.read(length - 1)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        shapes = {name: tuple(int(n) for n in info["shape"]) for name, info in header.items()}
        end = max((int(info["data_offsets"][1]) for info in header.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise _not_safetensors(path, start) from error
    if 8 + length + end > size:
        raise _truncated(path, size, 8 + length + end)
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
        )


def check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse NaN, Inf, whole numbers, and factors that are zero throughout.

    Raises:
        InputError: naming every offender, with counts.
    """
    integers = [printable(n) for n, t in tensors.items() if not t.is_floating_point()]
    if integers:
        raise InputError(
            f"{printable(where)}: not floating-point numbers: {shorten(integers)}.",
            "Factors are real numbers; packed or quantised ones cannot be read exactly.",
            "Save the adapter in fp32, bf16 or fp16.",
        )
    broken = []
    for name, tensor in tensors.items():
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            broken.append(f"{printable(name)} ({bad} of {tensor.numel()})")
    if broken:
        raise InputError(
            f"{printable(where)}: NaN or infinite values in {shorten(broken)}.",
            "One such number spreads to every answer.",
            "Take an earlier checkpoint; training diverged or the file is damaged.",
        )
    zero = [printable(name) for name, tensor in tensors.items() if not tensor.any()]
    if zero:
        raise InputError(
            f"{printable(where)}: {len(zero)} tensors are zero throughout: {shorten(zero)}.",
            "With A or B zero the update is zero: it is untrained, or DeepSpeed ZeRO-3 saved it ungathered.",
            "Save it again after training, gathered.",
        )


def hashes(path: Path) -> tuple[str, str]:
    """(sha256, git blob sha1) of a file: the two names the Hub gives to contents."""
    sha256, blob = hashlib.sha256(), hashlib.sha1(usedforsecurity=False)
    blob.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            sha256.update(chunk)
            blob.update(chunk)
    return sha256.hexdigest(), blob.hexdigest()


def card_licence(folder: Path) -> str | None:
    """The licence that the folder's README states in its YAML head; None where there is none."""
    import yaml

    try:
        with (folder / CARD).open("rb") as stream:
            text = stream.read(_MAX_CARD).decode("utf-8", "replace")
        head = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---", text, re.DOTALL)
        card = yaml.safe_load(head.group(1)) if head else None
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return None
    if not isinstance(card, dict):
        return None
    stated = card.get("license") or card.get("license_name")
    if stated == "other":
        stated = card.get("license_name") or stated
    if isinstance(stated, list):
        stated = ", ".join(str(one) for one in stated)
    return printable(stated) if isinstance(stated, str) and stated else None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("duplicate keys")
    return keys


def _truncated(path: Path, size: int, expected: int) -> InputError:
    return InputError(
        f"{printable(path)} is cut short: {size} bytes where at least {expected} are declared.",
        "Tensors are missing from it.",
        "Fetch or copy it again.",
    )


def _not_safetensors(path: Path, start: bytes) -> SecurityError:
    looks = " (it looks like a pickle)" if start[:2] == b"PK" or start[:1] == b"\x80" else ""
    return SecurityError(
        f"{printable(path)} is not a safetensors file{looks}.",
        "Its header cannot be trusted, so nothing in it is read.",
        "Get the file again from its author, saved with safe_serialization.",
    )


def is_folder(text: str) -> bool:
    """Whether a person who typed `text` means a local folder: it exists, or is written as a path."""
    written_as_path = text.startswith((".", "/", "~", "\\")) or "\\" in text or re.match(r"[A-Za-z]:", text)
    return bool(written_as_path) or os.path.isdir(text)
