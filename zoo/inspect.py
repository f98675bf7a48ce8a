"""Vetting, before anything is kept: what a folder or a listing holds, are its numbers usable. And the receipt.

The header of the weights and the card have files of their own, `safetensors_header` and `cards`. Nothing here interprets
LoRA: ``formats`` does. Every check names all offenders at once, so that one run shows all there is to fix. Text that
comes from a file is passed through `printable` before it reaches a message.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycler.zoo.cards import CARD as CARD
from recycler.zoo.cards import card_licence as card_licence
from recycler.zoo.errors import InputError, SecurityError, shorten
from recycler.zoo.safetensors_header import check_header as check_header
from recycler.zoo.safetensors_header import read_header as read_header
from recycler.zoo.untrusted import printable as printable

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"  # what PEFT wrote before safetensors
_EXTRA = re.compile(r"README\.md|LICEN[CS]E(\.(md|txt))?", re.IGNORECASE)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_TRAINER = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")  # state of a run, no weights

MAX_BYTES = 2 * 1024**3  # a rank-64 adapter on every linear of a 70B model, in bf16, is about 1.6 GB
MAX_CONFIG = 1_000_000  # 20,000 patterns are about as much
_MAX_TEXT = 10_000_000  # of a card or a licence
_MAX_FILES = 10_000  # in one folder; an adapter has two, and a training run leaves some dozens beside them

# What Windows takes for a device, whatever follows the first dot.
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\..*)?", re.IGNORECASE)


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


def own_files(names: Collection[str], *, allow_pickle: bool = False) -> list[str]:
    """Of the file names in an adapter's folder, its own: config, weights, card, licence.

    With `allow_pickle`, PEFT's pickled weights count where there are no others.
    """
    weights = PICKLED if allow_pickle and WEIGHTS not in names else WEIGHTS
    return sorted(n for n in names if n in (CONFIG, weights) or _EXTRA.fullmatch(n))


def is_pickle(name: str) -> bool:
    """Whether a file's name is that of pickled weights, and not of a trainer's state."""
    return name.endswith(_PICKLES) and not name.startswith(_TRAINER)


def check_names(where: str, paths: Iterable[str]) -> None:
    """Vet the names of a listing, subfolders included, before any of them becomes a file on this machine or another.

    Args:
        where: the repository, for messages.
        paths: posix paths of all its files.

    Raises:
        SecurityError: names that lead out of the folder, that a system gives another meaning (devices, drives, streams,
            trailing dots), or that fall together where case does not count; all of them are named.
    """
    bad = []
    spelled: dict[str, str] = {}
    for path in paths:
        why = next((reason for part in path.split("/") if (reason := _trap(part))), "")
        if why:
            bad.append(f"{printable(path)!r} ({why})")
            continue
        other = spelled.setdefault(unicodedata.normalize("NFC", path).casefold(), path)
        if other != path:
            bad.append(f"{printable(path)!r} (the same file as {printable(other)!r} on some systems)")
    if bad:
        raise SecurityError(
            f"{printable(where)} lists file names that could do harm: {shorten(bad)}.",
            "Such names are written to escape a folder, or to replace another file.",
            "Nothing was downloaded. Use another copy of the adapter, and tell the Hub of this one.",
            code="E_HOSTILE_NAME",
        )


def _trap(part: str) -> str:
    """What is wrong with one component of a path; nothing where it means the same on every system."""
    if part in ("", ".", ".."):
        return "it leads elsewhere"
    if "\\" in part or ":" in part:
        return "a path, drive or stream on Windows"
    if not part.isprintable():
        return "control characters"
    if part[-1] in ". ":
        return "Windows drops what it ends in"
    return "a device on Windows" if _DEVICE.fullmatch(part) else ""


def check_listing(where: str, sizes: Mapping[str, int], max_bytes: int = MAX_BYTES, *, allow_pickle: bool = False) -> list[str]:
    """Vet a folder by names and sizes alone, before a byte of it is read or downloaded.

    Args:
        where: the folder or repository, for messages.
        sizes: file name → bytes, without subfolders.
        allow_pickle: pickled weights will do where there are no others; the caller converts them in a sandbox.

    Returns:
        The adapter's own files, sorted.

    Raises:
        InputError: the config or the weights are missing, there are too many files, or they are too large.
        SecurityError: the weights are there as a pickle only, or a name could do harm.
    """
    shown = printable(where)
    _check_count(where, len(sizes))
    check_names(where, sizes)
    weights = PICKLED if allow_pickle and PICKLED in sizes and WEIGHTS not in sizes else WEIGHTS
    if weights not in sizes:
        pickles = sorted(printable(n) for n in sizes if is_pickle(n))
        if pickles and (CONFIG in sizes or any(n.startswith("adapter_model") for n in pickles)):
            raise SecurityError(
                f"{shown} holds its weights as a pickle only: {shorten(pickles)}.",
                "Loading a pickle can run any code its author put there.",
                f"Ask the author for {WEIGHTS}, or add --allow-pickle: it is then converted in a process that can do little harm.",
                code="E_PICKLE",
            )
    missing = [name for name in (CONFIG, weights) if name not in sizes]
    if missing:
        raise InputError(
            f"{shown} is no PEFT adapter: {shorten(missing)} missing.",
            "An adapter is a folder with these two files.",
            "Point at the folder that holds them; a checkpoint may lie in a subfolder.",
            code="E_NO_ADAPTER",
        )
    files = own_files(sizes, allow_pickle=allow_pickle)
    swollen = [n for n in files if n != weights and sizes[n] > (MAX_CONFIG if n == CONFIG else _MAX_TEXT)]
    if swollen:
        raise InputError(
            f"{shown}: {shorten(f'{n} ({sizes[n]:,} bytes)' for n in swollen)} larger than such a file can be.",
            f"A config of more than {MAX_CONFIG:,} bytes, or a text of more than {_MAX_TEXT:,}, is none.",
            "Fetch it again, or take it from the checkpoint.",
            code="E_TOO_LARGE",
        )
    total = sum(sizes[n] for n in files)
    if total > max_bytes:
        raise InputError(
            f"{shown} holds {total / 1e6:,.0f} MB, more than the limit of {max_bytes / 1e6:,.0f} MB.",
            "An adapter is small next to its base; a file this large is rarely one.",
            "If it is meant, raise the limit with --max-size.",
            code="E_TOO_LARGE",
        )
    return files


def check_folder(
    folder: Path, max_bytes: int = MAX_BYTES, *, allow_pickle: bool = False, where: str | None = None
) -> list[str]:
    """Vet a local folder by names, sizes and links, and by the header of its weights, before anything is copied from it; the
    adapter's own files, sorted.

    Args:
        allow_pickle: as for `check_listing`.
        where: what a person calls the folder, for messages: the source of staged files; the folder itself where None.

    Raises:
        InputError: not a folder, files missing or not regular files, too many, or too large.
        SecurityError: pickled weights only, a forged header, or a link that leads out of the folder.
    """
    called = str(folder) if where is None else where
    if not folder.is_dir():
        raise InputError(f"{printable(called)} is not a folder.", fix="Give the folder that holds the adapter.", code="E_FILES")
    home = folder.resolve()
    if any("\ud800" <= character <= "\udfff" for character in str(home)):
        raise InputError(
            f"The path of {printable(called)} is not valid UTF-8.",
            "Neither safetensors nor a zoo.json can hold it.",
            "Rename the folder.",
            code="E_FILES",
        )
    # In the Hub client's own cache, snapshots/<sha>/file is a link to blobs/<hash> of the same repository.
    snapshots = (at.parent for at in (home, *home.parents) if at.parent.name == "snapshots")
    allowed = [home, *(at.parent / "blobs" for at in snapshots)]
    sizes: dict[str, int] = {}
    escaping, odd, pickles = [], [], []
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries, 1):
            _check_count(called, count)
            if not own_files([entry.name], allow_pickle=allow_pickle):
                pickles += [entry.name] * is_pickle(entry.name)
                continue
            try:
                fact = entry.stat()
                inside = not entry.is_symlink() or any(map(Path(entry.path).resolve(strict=True).is_relative_to, allowed))
            except (OSError, RuntimeError) as error:  # a link to nothing, or in a circle
                odd.append(f"{entry.name} ({printable(getattr(error, 'strerror', None) or error)})")
                continue
            if not inside:
                escaping.append(entry.name)
            elif stat.S_ISREG(fact.st_mode):
                sizes[entry.name] = fact.st_size
            elif not stat.S_ISDIR(fact.st_mode):
                odd.append(f"{entry.name} (a pipe, socket or device)")
    if escaping:
        raise SecurityError(
            f"{printable(called)}: {shorten(sorted(escaping))} is a link that leads out of the folder.",
            "Following it could copy a file that was never meant to be shared.",
            "Replace the link by the file itself.",
            code="E_LINK",
        )
    if odd:
        raise InputError(
            f"{printable(called)}: not regular files: {shorten(sorted(odd))}.",
            "Reading them could wait, or go on, for ever.",
            "Replace them by files.",
            code="E_FILES",
        )
    if WEIGHTS not in sizes:
        sizes = {**dict.fromkeys(pickles, 0), **sizes}  # only to be named
    files = check_listing(called, sizes, max_bytes, allow_pickle=allow_pickle)
    if WEIGHTS in files:
        read_header(folder / WEIGHTS, f"{called}/{WEIGHTS}")
    return files


def _check_count(where: str, count: int) -> None:
    if count > _MAX_FILES:
        raise InputError(
            f"{printable(where)} holds more than {_MAX_FILES:,} files.",
            "An adapter's folder holds a handful.",
            "Point at the folder that holds the adapter itself.",
            code="E_TOO_LARGE",
        )


def check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse NaN, Inf, whole numbers, and factors that are zero throughout: in fp32, as they will be used.

    Raises:
        InputError: naming every offender, with counts.
    """
    integers = [printable(n) for n, t in tensors.items() if not t.is_floating_point()]
    if integers:
        raise InputError(
            f"{printable(where)}: not floating-point numbers: {shorten(integers)}.",
            "Factors are real numbers; packed or quantised ones cannot be read exactly.",
            "Save the adapter in fp32, bf16 or fp16.",
            code="E_DTYPE",
        )
    broken, zero = [], []
    for name, tensor in tensors.items():
        values = tensor.float()  # a double may be too large or too small for fp32, and torch cannot test 8-bit floats
        low, high = map(float, values.aminmax()) if values.numel() else (0.0, 0.0)  # NaN if there is one
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = values.numel() - int(values.isfinite().sum())
            broken.append(f"{printable(name)} ({bad} of {values.numel()})")
        elif low == high == 0:
            zero.append(printable(name))
    if broken:
        raise InputError(
            f"{printable(where)}: NaN or infinite values in {shorten(broken)}.",
            "One such number spreads to every answer.",
            "Take an earlier checkpoint; training diverged or the file is damaged.",
            code="E_NONFINITE",
        )
    if zero:
        raise InputError(
            f"{printable(where)}: {len(zero)} tensors are zero throughout: {shorten(zero, 3)}.",
            "With A or B zero the update is zero: it is untrained, or DeepSpeed ZeRO-3 saved it ungathered.",
            "Save it again after training, gathered.",
            code="E_EMPTY",
        )


def hashes(path: Path) -> tuple[str, str]:
    """(sha256, git blob sha1) of a file: the two names the Hub gives to contents.

    Raises:
        InputError: it is a pipe, a device or the like, whose contents may never come or never end.
    """
    fact = path.stat()
    if not stat.S_ISREG(fact.st_mode):
        raise InputError(
            f"{printable(path)} is no regular file.",
            "Reading it could wait, or go on, for ever.",
            "Replace it by a file.",
            code="E_FILES",
        )
    sha256, blob = hashlib.sha256(), hashlib.sha1(usedforsecurity=False)
    blob.update(b"blob %d\0" % fact.st_size)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            sha256.update(chunk)
            blob.update(chunk)
    return sha256.hexdigest(), blob.hexdigest()


def is_folder(text: str) -> bool:
    """Whether a person who typed `text` means a local folder: it exists, or is written as a path."""
    written_as_path = text.startswith((".", "/", "~", "\\")) or "\\" in text or re.match(r"[A-Za-z]:", text)
    return bool(written_as_path) or os.path.isdir(text)
