"""A full fine-tune minus its base, as a LoRA adapter: how checkpoints of GaLore, Fira, SST or plain fine-tuning join a zoo.

At every linear ΔW = W_tuned − W_base, and its SVD gives the factors (`recycler.zoo.lowrank`). Both checkpoints are read tensor by
tensor from their safetensors, so that neither model is ever in memory; the headers and one pass of norms come first, so that a
wrong pair is refused before any SVD.

A fine-tune also changes what LoRA cannot carry: norms, embeddings, biases, an output head that is tied to the embedding. These
are listed with their share of the whole change, ‖diff‖² summed over all tensors. Where that share is not small, the adapter is
not the tuned model, whatever its rank.

Dimensions in names: O output width, D input width.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recycler.base import skeleton
from recycler.converting.checkpoint import MAX_BYTES, Checkpoint, Layout
from recycler.converting.conversion import Conversion, Tally
from recycler.scoring import Progress, silent
from recycler.zoo import inspect, lowrank, writing
from recycler.zoo.errors import InputError, UsageError, shorten
from recycler.zoo.inspect import Receipt, printable
from recycler.zoo.manifest import check_name, slug
from recycler.zoo.store import Zoo

ENERGY, RANK = 0.9, 32
"""The dials where none are given, chosen by these figures, so that they are no test of them. SmolLM2-135M, tuned in full on one
task (exact match 0.86, NLL 0.040; the base: 0, 1.03): rank 4 kept 55 % of the linears' change and 0.84 (NLL 0.065), rank 8 69 % and 0.88 (0.050), rank 32 87 % and 0.86 (0.042)."""
OTHER_MODEL = 0.5
"""Median of ‖W_tuned − W_base‖ / ‖W_base‖ over the linears from which on the base is taken for another model."""
_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}  # of a number, to find the coarser
_CHUNK = 1 << 22  # numbers that are compared at once in fp64


@dataclass(frozen=True)
class Left:
    """A tensor that differs and cannot ride on LoRA.

    Attributes:
        change: ‖diff‖ / ‖base‖; None where the base's is zero. share: of ‖diff‖², of all tensors together.
    """

    name: str
    change: float | None
    share: float


@dataclass(frozen=True)
class Extraction:
    """What was extracted, where it is, and what stayed behind.

    Attributes:
        tuned, base: as given, with the revision where they came from the Hub.
        name: in the zoo, or None. folder: where the adapter's files are.
        conversion: ranks and errors of the linears.
        unchanged: linears without any difference.
        left: tensors that differ and are not in the adapter, largest share first.
        change: the median of ‖ΔW‖ / ‖W_base‖ over the linears that differ.
        peak_mb: the most memory that this process has had so far; None where the system does not say.
    """

    tuned: str
    base: str
    name: str | None
    folder: Path
    conversion: Conversion
    unchanged: int
    left: tuple[Left, ...]
    change: float
    peak_mb: int | None
    notes: tuple[str, ...] = ()
    receipt: Receipt | None = None

    @property
    def carried(self) -> float:
        """The share of the whole change, ‖diff‖² over all tensors, that is in the adapter."""
        return (1 - sum(one.share for one in self.left)) * self.conversion.kept

    def lines(self) -> list[str]:
        """The receipt as text."""
        found = self.conversion
        ranks = f"rank {found.ranks[0]}" if len(found.ranks) == 1 else f"ranks {found.ranks[0]}–{found.ranks[-1]}"
        lines = [
            f"{self.name or self.folder.name}: {printable(self.tuned)} − {printable(self.base)} → {found.sites} sites, {ranks}; "
            f"{found.kept:.2%} of the linears' change kept, relative error {found.error:.2g} "
            f"(worst {found.worst[1]:.2g} at {printable(found.worst[0])})",
            f"  the linears changed by {self.change:.2g} of their norm (median); {self.unchanged} did not change",
        ]
        if self.left:
            share = sum(one.share for one in self.left)
            shown = [
                f"{printable(one.name)} ({'was zero' if one.change is None else f'changed by {one.change:.2g}'}, {one.share:.2%})"
                for one in self.left
            ]
            lines.append(
                f"  warning: {len(self.left)} tensors differ that LoRA cannot carry, {share:.2%} of the whole change: "
                f"{shorten(shown, 5)}"
            )
        lines += [f"  note: {text}" for text in self.notes]
        return lines + ([f"  note: at most {self.peak_mb} MB of memory"] if self.peak_mb else [])

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {
            "schema_version": 1,
            "tuned": self.tuned,
            "base": self.base,
            "name": self.name,
            "folder": str(self.folder),
            "conversion": self.conversion.to_json(),
            "unchanged": self.unchanged,
            "left": [vars(one) for one in self.left],
            "carried": self.carried,
            "change": self.change,
            "peak_mb": self.peak_mb,
            "notes": list(self.notes),
        }


def extract(
    tuned: str | Path,
    base: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    name: str | None = None,
    zoo: Zoo | None = None,
    out: str | Path | None = None,
    force_base: bool = False,
    max_bytes: int = MAX_BYTES,
    progress: Progress = silent,
) -> Extraction:
    """Make an adapter from a fine-tuned model and its base, and put it into the zoo or into a folder.

    Args:
        tuned, base: Hub ids (``org/name[@revision]``) or folders, both with safetensors.
        rank: at most this rank at every linear. energy: the least rank that keeps this share of Σσ² at every linear. Of both the
            smaller counts; where neither is given, `ENERGY`, at most `RANK`.
        name: in the zoo; made from the tuned model's name where None.
        zoo: where to; the default zoo where None. out: a new or empty folder instead of the zoo.
        force_base: go on where the base looks like another model.
        max_bytes: the most that each model may have to download.

    Raises:
        InputError: the shapes differ, nothing differs, or the base is another model. SecurityError: pickles.
        HubError: one is not to be had. UsageError: a dial, the name or `out` cannot be used.
    """
    lowrank.check_dials(rank, energy)
    if rank is None and energy is None:
        rank, energy = RANK, ENERGY
    chosen = None if out is not None else check_name(name) if name else slug(_stem(tuned))
    if out is not None and name is not None:
        raise UsageError("A folder and a name exclude each other.", "The name is for the zoo.", "Leave one of them out.")
    if out is not None and Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise UsageError(f"{out} is not empty.", "Nothing is overwritten.", "Choose another --out.", code="E_EXISTS")
    before, after = Checkpoint.open(base, max_bytes=max_bytes), Checkpoint.open(tuned, max_bytes=max_bytes)
    layout = Layout(skeleton(str(before.folder)))
    pairs = _pairs(layout, before, after)
    strangers = _strangers(layout, after, {pair[1] for pair in pairs.values()})
    changes = _compare(layout, before, after, pairs, progress)
    linear = {
        path: changes[path + ".weight"] for path in layout.shapes if path + ".weight" in changes and path not in layout.tied
    }
    moved = {path: one for path, one in linear.items() if one.diff}
    _judge(linear, changes, before, after, force_base)
    tally = Tally()
    step = progress(len(moved), "factorising")
    for path in moved:
        tally.add_dense(path, _delta(layout, before, after, path), rank, energy)
        step()
    whole = sum(one.diff**2 for one in changes.values())
    left = [
        Left(key, one.diff / one.base if one.base else None, one.diff**2 / whole)
        for key, one in changes.items()
        if one.diff and key.removesuffix(".weight") not in moved
    ]
    found = tally.result("full fine-tune", lossless=False)
    texts = [_text(one) for one in (after, before)]
    declared = None if inspect.is_folder(str(base)) else _id(before)
    copy = None if declared else str(before.folder.resolve())
    receipt = None
    with _place(out) as made:
        # In the zoo the folder is recorded as a copy; as the name of a base it would set this adapter apart from the others'.
        written = declared or (None if out is None else copy)
        writing.write_adapter(made, tally.factors, base=written, base_revision=before.revision)
        writing.copy_papers(after.folder, made)
        if chosen is not None:
            zoo = Zoo() if zoo is None else zoo
            source = f"extracted from {texts[0]}, base {texts[1]}"
            _, receipt = zoo.add(made, chosen, source=source, base=declared, base_path=copy)
    folder = zoo.folder(chosen) if zoo is not None and chosen is not None else Path(str(out))
    return Extraction(
        tuned=texts[0],
        base=texts[1],
        name=chosen,
        folder=folder,
        conversion=found,
        unchanged=len(linear) - len(moved),
        left=tuple(sorted(left, key=lambda one: (-one.share, one.name))),
        change=float(torch.tensor([one.relative for one in moved.values()]).median()),
        peak_mb=_peak(),
        notes=_coarse(before, after, pairs) + strangers,
        receipt=receipt,
    )


@dataclass(frozen=True)
class _Change:
    """Frobenius norms of a tensor of the base and of its difference; `diff` is 0 where only the stored precision differs."""

    base: float
    diff: float

    @property
    def relative(self) -> float:
        return self.diff / self.base if self.base else math.inf if self.diff else 0.0


def _pairs(layout: Layout, before: Checkpoint, after: Checkpoint) -> dict[str, tuple[str, str]]:
    """Parameter, or tensor that is no parameter → its names in both checkpoints.

    Raises:
        InputError: some are missing on one side, or have other shapes; all are named.
    """
    pairs: dict[str, tuple[str, str]] = {}
    lacking, shaped = [], []
    for parameter in layout.parameters():
        keys = layout.key(before, parameter), layout.key(after, parameter)
        if keys[0] is None or keys[1] is None:
            lacking.append(f"{printable(parameter)} ({'base' if keys[0] is None else 'tuned'})")
        else:
            pairs[parameter] = keys[0], keys[1]
    used = [{pair[side] for pair in pairs.values()} for side in (0, 1)]
    pairs |= {key: (key, key) for key in before.shapes if key in after.shapes and key not in used[0] and key not in used[1]}
    for key, (one, other) in pairs.items():
        if before.shapes[one] != after.shapes[other]:
            shaped.append(
                f"{printable(key)} ({list(before.shapes[one])} in the base, {list(after.shapes[other])} in the tuned model)"
            )
    for found, what in ((shaped, "have other shapes"), (lacking, "are missing on one side")):
        if found:
            raise InputError(
                f"{printable(after.name)} is not a fine-tune of {printable(before.name)}: {len(found)} tensors {what}: "
                f"{shorten(found, 6)}.",
                "A difference is defined only between tensors of one shape. Resized embeddings, added tokens and other sizes of a "
                "model family all show like this.",
                "Give the base that the tuning started from, with its vocabulary as it was then.",
                code="E_BASE_MISMATCH",
            )
    return pairs


def _strangers(layout: Layout, after: Checkpoint, used: set[str]) -> tuple[str, ...]:
    """A note on tensors of the tuned model that the base has no place for. Second copies of tied weights are not among them.

    Raises:
        InputError: they are weights of layers that the base lacks, or one that is tied in the base has been untied and changed.
    """
    others = [key for key in after.shapes if key not in used]
    strange = []
    for key in others:
        twin = layout.key(after, key)
        if twin is None or twin == key:
            strange.append(key)
        elif not torch.equal(after.tensor(key), after.tensor(twin)):
            raise InputError(
                f"{printable(key)} has weights of its own in {printable(after.name)}; in the base it is tied to {printable(twin)}.",
                "What it became cannot be said as an update of the base.",
                "It cannot become an adapter of this base.",
                code="E_NOT_EXTRACTABLE",
            )
    matrices = [key for key in strange if len(after.shapes[key]) == 2]
    if matrices:
        raise InputError(
            f"{printable(after.name)} holds {len(matrices)} matrices that the base has no place for: "
            f"{shorten(map(printable, matrices), 5)}.",
            "A layer or a head that was added cannot ride on an adapter, and leaving it out would change what the model does.",
            "Give the base that the tuning started from, of the same depth.",
            code="E_NOT_EXTRACTABLE",
        )
    names = shorten(map(printable, strange), 5)  # buffers that older versions saved, such as rotary_emb.inv_freq
    return (f"only in the tuned model, and not in the adapter: {names}",) if strange else ()


def _compare(
    layout: Layout, before: Checkpoint, after: Checkpoint, pairs: Mapping[str, tuple[str, str]], progress: Progress
) -> dict[str, _Change]:
    """Norms of all tensors and of their differences. Linears go by the name of their path."""
    of_linear = {layout.name_of(path): path for path in layout.shapes if path not in layout.tied}
    changes = {}
    step = progress(len(pairs), "comparing")
    for parameter, (one, other) in pairs.items():
        was, now = before.tensor(one), after.tensor(other)
        path = of_linear.get(parameter)
        changes[f"{path}.weight" if path else parameter] = _change(was, now)
        step()
    return changes


def _change(was: Tensor, now: Tensor) -> _Change:
    if not (was.is_floating_point() and now.is_floating_point()):
        return _Change(1.0, 0.0 if torch.equal(was, now) else math.inf)
    coarser = min(was.dtype, now.dtype, key=lambda dtype: _BITS.get(dtype, 0))
    same, base, diff = True, 0.0, 0.0
    for one, other in zip(was.flatten().split(_CHUNK), now.flatten().split(_CHUNK), strict=True):
        same = same and torch.equal(one.to(coarser), other.to(coarser))  # a copy in a coarser type has not changed
        base += float(one.double().square().sum())
        diff += float((other.double() - one.double()).square().sum())
    return _Change(math.sqrt(base), 0.0 if same else math.sqrt(diff))


def _judge(
    linear: Mapping[str, _Change], changes: Mapping[str, _Change], before: Checkpoint, after: Checkpoint, force_base: bool
) -> None:
    """Raises InputError where the two are the same model, differ in no linear, or are not related."""
    pair = f"{printable(after.name)} and {printable(before.name)}"
    broken = [printable(key) for key, one in changes.items() if not math.isfinite(one.diff + one.base)]
    if broken:
        raise InputError(
            f"{pair}: NaN, infinite or whole numbers that differ: {shorten(broken, 6)}.",
            "",
            "Use another checkpoint.",
            code="E_NONFINITE",
        )
    if not any(one.diff for one in changes.values()):
        raise InputError(
            f"{pair} are identical: no tensor differs.",
            "There is nothing to extract.",
            "Check that --tuned is the fine-tuned model, not a copy of the base.",
            code="E_NOT_EXTRACTABLE",
        )
    if not any(one.diff for one in linear.values()):
        differing = [printable(key) for key, one in changes.items() if one.diff]
        raise InputError(
            f"{pair} differ in no linear, only in {shorten(differing, 6)}.",
            "LoRA changes linears; this fine-tune changed others.",
            "It cannot become an adapter.",
            code="E_NOT_EXTRACTABLE",
        )
    middle = float(torch.tensor([one.relative for one in linear.values()]).median())
    if middle >= OTHER_MODEL and not force_base:
        raise InputError(
            f"{printable(before.name)} is not the base of {printable(after.name)}: half of the linears differ by {middle:.2g} of "
            "their norm, or more.",
            "Fine-tuning moves weights by a few hundredths of their norm; two models that were trained apart differ by about 1.4.",
            "Give the base that the tuning started from. If this is it, add --force-base.",
            code="E_BASE_MISMATCH",
        )


def _delta(layout: Layout, before: Checkpoint, after: Checkpoint, path: str) -> Tensor:
    return layout.weight(after, path) - layout.weight(before, path)


def _coarse(before: Checkpoint, after: Checkpoint, pairs: Mapping[str, tuple[str, str]]) -> tuple[str, ...]:
    one, other = next(iter(pairs.values()))
    kinds = [str(c.tensor(key).dtype).removeprefix("torch.") for c, key in ((before, one), (after, other))]
    if kinds[0] == kinds[1]:
        return ()
    return (f"the base is stored in {kinds[0]} and the tuned model in {kinds[1]}: their rounding is part of the difference",)


@contextmanager
def _place(out: str | Path | None) -> Iterator[Path]:
    """A temporary folder or, finished and renamed, `out`."""
    parent = None if out is None else Path(out).absolute().parent
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".extract-") as place:
        work = Path(place) / "adapter"
        work.mkdir()
        yield work
        if out is not None:
            if Path(out).is_dir():
                Path(out).rmdir()
            work.rename(out)


def _stem(tuned: str | Path) -> str:
    from recycler.zoo.hub import Source

    return Source.parse(tuned).stem


def _id(checkpoint: Checkpoint) -> str:
    from recycler.zoo.hub import Source

    return Source.parse(checkpoint.name).repo


def _text(checkpoint: Checkpoint) -> str:
    """A Hub id with its commit, or the folder."""
    return f"{_id(checkpoint)}@{checkpoint.revision}" if checkpoint.revision else str(checkpoint.folder.resolve())


def _peak() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(used / (1e6 if sys.platform == "darwin" else 1e3))
