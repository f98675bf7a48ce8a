"""What judging a zoo as a set found: per adapter, per base, and between every two; as sentences, JSON and CSV."""

from __future__ import annotations

import csv
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from recycler.zoo.errors import InputError, UsageError, shorten
from recycler.zoo.similarity import Similarity

SCHEMA_VERSION = 1
Verdict = Literal["fits", "not compared", "does not fit", "other base", "unreadable"]


@dataclass(frozen=True)
class Checked:
    """One adapter, as the check found it.

    Attributes:
        verdict: "fits"; "not compared": the base could not be had; "does not fit"; "other base": trained for another one;
            "unreadable".
        why: for the last three, what is wrong.
        kinds: as the receipt named them. converted: what it was before it was made into LoRA, and error: the relative error
            of that, where it was measured; both None for adapters that are read as they came.
        targets: class of linear → (sites it touches, sites of the base; the latter None where the base is not known).
        bytes: of its files.
        norm: ‖BA‖_F over all sites. ratio: to the median of its section. z: robust, of ln norm; None for fewer than four.
        outlier: what is odd about its norm, or "".
        copies: adapters with the very same weight file. near: other adapters that do the same (cosine above 0.999).
        direction_only: adapters with the same BA but another DoRA magnitude or bias.
        nearest: the adapter most like it, and the cosine.
        notes: worth knowing.
    """

    name: str
    verdict: Verdict
    why: str
    base: str | None
    kinds: tuple[str, ...]
    converted: str | None
    error: float | None
    ranks: tuple[int, ...]
    sites: int
    targets: Mapping[str, tuple[int, int | None]]
    parameters: int
    bytes: int
    licence: str | None
    norm: float | None = None
    ratio: float | None = None
    z: float | None = None
    outlier: str = ""
    copies: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    direction_only: tuple[str, ...] = ()
    nearest: tuple[str, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether it may go into a model of this base."""
        return self.verdict in ("fits", "not compared")

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        plain = dict(vars(self))
        plain["targets"] = {name: {"sites": here, "of": there} for name, (here, there) in self.targets.items()}
        plain["nearest"] = None if self.nearest is None else {"name": self.nearest[0], "cosine": round(self.nearest[1], 6)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


@dataclass(frozen=True)
class Mix:
    """Adapters that can share one model, and what that costs.

    Attributes:
        parameters: in all factors together: 2 bytes each in bf16, 4 in fp32.
        flops: added per token with every adapter in use, relative to the base's linears; None where the base is not known.
    """

    names: tuple[str, ...]
    parameters: int
    flops: float | None

    @property
    def text(self) -> str:
        head = f"these {len(self.names)} can share one model" if len(self.names) > 1 else "this one can be used alone"
        size = f"{self.parameters / 1e6:.1f} M parameters, {self.parameters * 2 / 1e6:.1f} MB in bf16, "
        size += f"{self.parameters * 4 / 1e6:.1f} MB in fp32"
        cost = "" if self.flops is None else f", {self.flops:+.1%} FLOPs per token with all of them in use"
        return f"{head}: {shorten(self.names)} ({size}{cost})"

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        size = self.parameters
        return {
            "names": list(self.names),
            "parameters": size,
            "bytes_bf16": 2 * size,
            "bytes_fp32": 4 * size,
            "flops": self.flops,
        }


@dataclass(frozen=True)
class Section:
    """The adapters of one base.

    Attributes:
        base: its id or folder; None for adapters that declare none.
        note: why sites were not compared with the base, or "".
        mixes: who can share one model.
    """

    base: str | None
    adapters: tuple[Checked, ...]
    mixes: tuple[Mix, ...]
    note: str = ""

    @cached_property
    def _mix_of(self) -> dict[str, int]:
        return {name: number for number, mix in enumerate(self.mixes) for name in mix.names}

    def mixable(self, a: str, b: str) -> bool:
        """Whether two adapters can share a model."""
        return a in self._mix_of and self._mix_of[a] == self._mix_of.get(b)

    @property
    def unusable(self) -> list[Checked]:
        return [one for one in self.adapters if not one.usable]

    def lines(self) -> list[str]:
        """What the set is good for, in sentences: mixes, who is left out and why, copies, norms."""
        lines = [self.note] if self.note else []
        lines += [mix.text for mix in self.mixes]
        for one in self.unusable:
            lines.append(f"cannot be used: {one.name}: {one.why}")
        seen: set[str] = set()
        for one in self.adapters:
            if one.near and one.name not in seen:
                seen.update([one.name, *one.near])
                same = " (the very same weights)" if set(one.near) <= set(one.copies) else ""
                alike = shorten([one.name, *one.near])
                lines.append(f"do the same thing{same}: {alike}; each copy counts again in averages and votes")
            for other in one.direction_only:
                if one.name < other:
                    text = "have the same low-rank direction, but another DoRA magnitude or bias"
                    lines.append(f"{one.name} and {other} {text}")
        lines += [f"{one.name}: {one.outlier}" for one in self.adapters if one.outlier]
        for one in self.adapters:
            if one.converted:
                lost = "" if one.error is None else f", relative error {one.error:.2g}"
                lines.append(f"{one.name}: came as {one.converted} and was made into LoRA{lost}")
            lines += [f"{one.name}: {note}" for note in one.notes]
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {
            "base": self.base,
            "note": self.note or None,
            "adapters": [one.to_json() for one in self.adapters],
            "mixes": [mix.to_json() for mix in self.mixes],
        }


@dataclass(frozen=True, eq=False)
class CheckReport:
    """What `check` found.

    Attributes:
        sections: one for the base that was named, or one for each that the adapters declare.
        similarity: norms and cosines of all adapters that could be read.
    """

    sections: tuple[Section, ...]
    similarity: Similarity = field(repr=False)

    def lines(self) -> list[str]:
        """The report in sentences, section by section."""
        return [line for section in self.sections for line in section.lines()]

    def cosine(self, a: str, b: str) -> float | None:
        """The cosine of two adapters that can share a model, None for two that cannot."""
        mixable = any(section.mixable(a, b) for section in self.sections)
        return self.similarity.between(a, b) if mixable else None

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys; cosines in the order of ``similarity.names``."""
        rows = [[round(value, 6) for value in row] for row in self.similarity.cosine.tolist()]
        return {
            "schema_version": SCHEMA_VERSION,
            "sections": [section.to_json() for section in self.sections],
            "similarity": {"names": list(self.similarity.names), "cosine": rows},
        }

    def write_csv(self, path: Path, *, force: bool = False) -> None:
        """The cosines as a table, an adapter a row and a column; empty where two cannot share a model.

        Raises:
            UsageError: the file is there, and `force` is not set.
        """
        check_file(path, force)
        names = [one.name for section in self.sections for one in section.adapters]
        temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
        try:
            with temporary.open("w", encoding="utf-8", newline="") as stream:
                table = csv.writer(stream, lineterminator="\n")
                table.writerow(["adapter", *names])
                for a in names:
                    values = [self.cosine(a, b) for b in names]
                    table.writerow([a, *("" if value is None else f"{value:.6f}" for value in values)])
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def raise_for_problems(self, *, strict: bool = False) -> None:
        """Return where every adapter can be used.

        Args:
            strict: copies, odd norms and missing licences are problems too.

        Raises:
            InputError: naming every adapter with a problem.
        """
        adapters = [one for section in self.sections for one in section.adapters]
        problems = [f"{one.name} ({one.verdict})" for one in adapters if not one.usable]
        if strict:
            problems += [f"{one.name} ({text})" for one in adapters if one.usable for text in _strictly(one)]
        if problems:
            count = len(problems)
            plain = f"{count} adapter{'s' * (count > 1)} cannot be used"
            raise InputError(
                f"{f'{count} problem' + 's' * (count > 1) if strict else plain}: {shorten(problems)}.",
                "--strict was given." if strict else "A model needs all of its adapters to fit one base.",
                "Remove them (recycle zoo remove NAME), or leave them out when you choose adapters (--adapters).",
            )


def check_file(path: Path, force: bool) -> None:
    """Raises UsageError when a file is there and may not be replaced."""
    if path.exists() and not force:
        raise UsageError(
            f"{path} exists.", "Nothing is overwritten unless asked.", "Choose another file, or add --force.", code="E_EXISTS"
        )


def _strictly(one: Checked) -> list[str]:
    texts = [one.outlier] if one.outlier else []
    if one.near:
        texts.append(f"does the same as {shorten(one.near, 3)}")
    if not one.licence:
        texts.append("states no licence")
    return texts
