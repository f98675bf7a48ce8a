"""One worker on a Ray cluster: a process, and what it holds between items. Runs where Ray says."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from recycler.base import Base, fingerprint, load_base
from recycler.routed import RoutedModel
from recycler.scoring import Fitting
from recycler.zoo import formats
from recycler.zoo.adapter import Adapter
from recycler.zoo.errors import InputError, RecycleError
from recycler.zoo.inspect import WEIGHTS
from recycler.zoo.match import place

_PACKAGES = ("recycler", "torch", "transformers")


@dataclass(frozen=True)
class Shelf:
    """Where adapters are.

    Attributes:
        adapters: name → (sha256, folder); no folder for one that lies in none.
    """

    adapters: Mapping[str, tuple[str, Path | None]]


@dataclass(frozen=True)
class Recipe(Shelf):
    """How a worker makes the model that its master holds.

    Attributes:
        number: of the model; a worker that holds it makes nothing.
        base, revision, dtype, device: as `load_base` takes them. fingerprint: of what has to come out.
    """

    number: int
    base: str
    revision: str | None
    dtype: str
    device: str
    fingerprint: str


@dataclass(frozen=True)
class Missing:
    """What a worker answers that has no access to some adapters."""

    names: tuple[str, ...]


class _Absent(KeyError):
    """An adapter is neither in a folder nor was it sent."""


class _Adapters(Mapping[str, Adapter]):
    """Adapters by name, each read when it is asked for: what was sent, else what lies in its folder.

    Args:
        sent: name → reference into the object store, or the error that its master met when it read the adapter.
        count: of those read, and those received.
    """

    def __init__(self, shelf: Shelf, sent: Mapping[str, Any], count: Counter[str]) -> None:
        self.shelf, self.sent, self.count = shelf, sent, count

    def __getitem__(self, name: str) -> Adapter:
        import ray

        sha256, folder = self.shelf.adapters[name]
        if name in self.sent:
            there = self.sent[name]
            if isinstance(there, RecycleError):
                raise there
            self.count["received"] += 1
            found: Adapter = ray.get(there)
            return found
        if folder is not None:
            with suppress(RecycleError, OSError):  # not here, or another one's
                adapter = formats.read(folder, name)[0]
                if adapter.sha256 == sha256:
                    self.count["read"] += 1
                    return adapter
        raise _Absent(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shelf.adapters)

    def __len__(self) -> int:
        return len(self.shelf.adapters)

    def absent(self) -> set[str]:
        """Those of which there are no files here, and that were not sent."""
        places = {name: folder for name, (_, folder) in self.shelf.adapters.items() if name not in self.sent}
        return {name for name, folder in places.items() if folder is None or not (folder / WEIGHTS).is_file()}


class Process:
    """A base, and the model that is worked on now."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.base: Base | None = None
        self.base_of: tuple[Any, ...] = ()
        self.model: RoutedModel | None = None
        self.number = -1
        self.count: Counter[str] = Counter()

    def census(self) -> dict[str, Any]:
        """Who this is, and what it has loaded so far: bases, adapters read from folders, adapters received."""
        loaded = {key: self.count[key] for key in ("bases", "read", "received")}
        return {"pid": os.getpid(), "host": platform.node(), "versions": versions(), **loaded}

    def run(self, shelf: Shelf, sent: Mapping[str, Any], work: Callable[[Any, Any], Any], item: Any) -> Any:
        """What `work` returns, given the model where there is a recipe for one, else the adapters; or `Missing`."""
        adapters = _Adapters(shelf, sent, self.count)
        try:
            if not isinstance(shelf, Recipe):
                return work(adapters, item)
        except _Absent as error:
            return Missing(tuple(sorted({str(error.args[0])} | adapters.absent())))
        if self.number != shelf.number and (missing := self._make(shelf, adapters)):
            return missing
        return work(Fitting(self.model), item)  # type: ignore[arg-type]

    def _make(self, recipe: Recipe, adapters: _Adapters) -> Missing | None:
        from recycler.engine.sites import linear_shapes

        if self.model is not None:
            self.model.engine.detach()
            self.model, self.number = None, -1
        wanted = (recipe.base, recipe.revision, recipe.dtype, recipe.device, recipe.fingerprint)
        if self.base is None or self.base_of != wanted:
            self.base = None  # two would not fit
            self.count["bases"] += 1
            base = load_base(recipe.base, revision=recipe.revision, dtype=recipe.dtype, device=recipe.device)
            if fingerprint(base.model) != recipe.fingerprint:
                raise InputError(
                    f"{recipe.base} is another model on {platform.node()} than where the work was ordered.",
                    "",
                    "Put the same base everywhere, or use its id on the Hub.",
                    code="E_BASE_MISMATCH",
                )
            self.base, self.base_of = base, wanted
        shapes = linear_shapes(self.base.model)
        found: dict[str, Adapter] = {}
        for name in adapters:
            with suppress(_Absent):
                found[name] = replace(one := adapters[name], sites=place(one, shapes))
        if missing := [name for name in adapters if name not in found]:
            return Missing(tuple(missing))
        self.model, self.number = RoutedModel(self.base, list(found.values())), recipe.number
        return None


def versions() -> dict[str, str]:
    """Of what has to be the same everywhere."""
    return {name: version(name) for name in _PACKAGES}
