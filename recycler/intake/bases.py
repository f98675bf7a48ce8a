"""Is an adapter for the base that was asked for? Names decide, then shapes; what was assumed is said in the receipt.

A declared base is a Hub id, a path on somebody's disk, or nothing. The shapes of a base come from its config alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from recycler.zoo import inspect, match
from recycler.zoo.aliases import same_model
from recycler.zoo.errors import InputError, RecycleError
from recycler.zoo.inspect import Receipt, printable

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Placed:
    """The outcome of comparing an adapter with its base.

    Attributes:
        base: the base it is for, None where unknown. path: the folder that served as a copy of it, or None.
        forced: a person said that it is for this base, although it declares another.
        revision: the 40-hex commit of the base whose config was compared; None for a folder, and where none was.
    """

    base: str | None
    path: str | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    forced: bool = False
    revision: str | None = None

    def stamp(self, receipt: Receipt, notes: Sequence[str] = (), warnings: Sequence[str] = ()) -> Receipt:
        """The receipt with what was found here, and with further notes and warnings."""
        return replace(
            receipt,
            notes=(*receipt.notes, *self.notes, *notes),
            warnings=(*receipt.warnings, *self.warnings, *warnings),
        )


@dataclass
class Bases:
    """The base that was asked for, and the shapes of all that were looked up; for any number of threads.

    Attributes:
        asked: a Hub id or a folder; None for whatever an adapter declares.
        aliases: further names of the same weights. force: accept adapters that declare another base, where all shapes fit.
    """

    asked: str | Path | None = None
    aliases: tuple[str, ...] = ()
    force: bool = False
    _seen: dict[str, Shapes | RecycleError] = field(default_factory=dict)
    _revisions: dict[str, str | None] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def folder(self) -> str | None:
        """The folder that was asked for, None where it is an id or nothing was."""
        if self.asked is None or not (isinstance(self.asked, Path) or inspect.is_folder(self.asked)):
            return None
        return str(Path(self.asked).expanduser().resolve())

    def of(self, declared: str | None) -> str | None:
        """The base to work with for an adapter that declares `declared`: what was asked for, else that."""
        return self.folder or (str(self.asked) if self.asked is not None else declared)

    def shapes(self, base: str) -> Shapes:
        """Module path → (O, D) of every linear of a base.

        Raises:
            RecycleError: it cannot be had; the same error every time.
        """
        with self._lock:  # looked up once, whoever asks first
            if base not in self._seen:
                from recycler.base import base_revision, linear_shapes

                try:
                    self._seen[base] = linear_shapes(base)
                    self._revisions[base] = base_revision(base)
                except RecycleError as error:
                    self._seen[base] = error
            found = self._seen[base]
        if isinstance(found, RecycleError):
            raise found
        return found

    def check(self, name: str, sites: Shapes, declared: str | None) -> Placed:
        """Compare an adapter's sites with the base it is for; see `recycler.fetch`.

        Raises:
            InputError: it is for another base, or does not fit. RecycleError: the base that was asked for cannot be had.
        """
        if self.asked is None:
            placed = self._check_declared(name, sites, declared)
        else:
            placed = self._check_asked(name, sites, declared)
        looked_up = self.of(declared)
        return replace(placed, revision=self._revisions.get(looked_up) if looked_up else None)

    def _check_asked(self, name: str, sites: Shapes, declared: str | None) -> Placed:
        folder, asked = self.folder, str(self.asked)
        if folder is not None:
            match.check_sites(name, sites, self.shapes(folder))
            if declared is None or _same_path(declared, folder):
                return Placed(declared, folder, (f"fits the base in {printable(folder)}",))
            if match.is_hub_id(declared):
                return Placed(
                    declared, folder, (f"fits the base in {printable(folder)}, used as a copy of {printable(declared)}",)
                )
            # Somebody else's path says nothing here, and would set this adapter apart from the others on the folder.
            return Placed(None, folder, (f"fits the base in {printable(folder)}; it declares the path {printable(declared)}",))
        relation = same_model(declared, asked, self.aliases)
        if relation == "no" and match.is_hub_id(declared) and not self.force:
            raise InputError(
                f"{name} was trained for {printable(declared)}, not for {printable(asked)}.",
                "On another base its update means something else, even where the shapes are the same.",
                f"Use --base {printable(declared)}, or a local folder that holds a copy of it. If they are the same model, say so: "
                f"--base-alias {printable(declared)}. --force-base takes it where all shapes fit.",
                code="E_BASE_MISMATCH",
            )
        match.check_sites(name, sites, self.shapes(asked))
        if relation == "same":
            return Placed(declared)
        shown, wanted = printable(declared), printable(asked)
        if relation == "alias":
            return Placed(asked, notes=(f"it declares {shown}, which was said to be another name of {wanted}",))
        if relation == "no" and match.is_hub_id(declared):
            text = f"FORCED onto {wanted}: it was trained for {shown}; the shapes fit, what it does there is not known"
            return Placed(asked, warnings=(text,), forced=True)
        if relation in ("quantised copy", "mirror"):
            text = f"it declares {shown}, by its name a {relation} of {wanted}; it fits the shapes"
            return Placed(asked, warnings=(text,))
        said = f"the path {shown}" if declared else "no base"
        named = ", which is called as this base is" if relation == "path" else ""
        text = f"it declares {said}{named}; it fits the shapes of {wanted}, which it may not be for"
        return Placed(asked, warnings=(text,))

    def _check_declared(self, name: str, sites: Shapes, declared: str | None) -> Placed:
        if declared is None:
            return Placed(None, warnings=("NOT CHECKED against a base: it declares none; name one with --base",))
        if match.on_another_machine(declared):
            text = f"NOT CHECKED against its base {printable(declared)}, which is on another machine."
            return Placed(declared, warnings=(text + " Name a folder that holds a copy with --base.",))
        try:
            shapes = self.shapes(declared)
        except RecycleError as error:
            text = f"NOT CHECKED against its base {printable(declared)}, which could not be had: {error.what}"
            return Placed(declared, warnings=(text + " Name a folder that holds a copy with --base.",))
        match.check_sites(name, sites, shapes)
        return Placed(declared)


def _same_path(declared: str, folder: str) -> bool:
    return not match.is_hub_id(declared) and str(Path(os.path.expanduser(declared)).resolve()) == folder
