"""Workers on a Ray cluster. Each is a process that loads the base once, and keeps it for all that comes.

What travels: items and results, which are small, and adapters that a worker cannot read in the zoo's folder, because that is not
shared or because they were only just made. Of those each is put into Ray's object store once, which keeps one copy a machine.

Where a worker dies another one takes its place, and its item is worked on again. Every worker computes with as many threads as this
process: how a product is shared out can change its last bit.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recycler.base import DTYPES, Base, fingerprint, load_base
from recycler.routed import RoutedModel
from recycler.scoring import Fitting
from recycler.workers import Item, Result
from recycler.zoo import formats
from recycler.zoo.adapter import Adapter, Factors
from recycler.zoo.errors import InputError, RecycleError, UsageError
from recycler.zoo.match import place

if TYPE_CHECKING:
    from recycler.zoo.store import Zoo

_TRIES = 3  # how often an item is given to somebody again whose worker died of it
_PACKAGES = ("recycler", "torch", "transformers")


@dataclass(frozen=True)
class _Recipe:
    """How a worker makes the model that its master holds.

    Attributes:
        number: of the model; a worker that holds it makes nothing.
        base, revision, dtype, device: as `load_base` takes them. fingerprint: of what has to come out.
        adapters: name, sha256 and folder of each; None where it lies in none.
    """

    number: int
    base: str
    revision: str | None
    dtype: str
    device: str
    fingerprint: str
    adapters: tuple[tuple[str, str, Path | None], ...]


@dataclass(frozen=True)
class _Missing:
    """What a worker answers that has no access to some adapters."""

    names: tuple[str, ...]


class _Worker:
    """One process: a base, and the model that is worked on now. Runs where Ray says."""

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
        return {"pid": os.getpid(), "host": platform.node(), "versions": _versions(), **loaded}

    def run(self, recipe: _Recipe, sent: Mapping[str, Any], work: Callable[[Any, Any], Any], item: Any) -> Any:
        """What `work` returns, or `_Missing`."""
        if self.number != recipe.number:
            missing = self._hold(recipe, sent)
            if missing:
                return missing
        return work(Fitting(self.model), item)  # type: ignore[arg-type]

    def _hold(self, recipe: _Recipe, sent: Mapping[str, Any]) -> _Missing | None:
        import ray

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
        adapters, missing = [], []
        for name, sha256, folder in recipe.adapters:
            adapter = None
            if name in sent:
                adapter = ray.get(sent[name])
                self.count["received"] += 1
            elif folder is not None:
                with suppress(RecycleError, OSError):  # not here, or another one's
                    adapter = formats.read(folder, name)[0]
                    adapter = replace(adapter, sites=place(adapter, shapes)) if adapter.sha256 == sha256 else None
                    self.count["read"] += adapter is not None
            if adapter is None:
                missing.append(name)
            else:
                adapters.append(adapter)
        if missing:
            return _Missing(tuple(missing))
        self.model, self.number = RoutedModel(self.base, adapters), recipe.number
        return None


class Ray:
    """Workers of a Ray cluster: as many as it has room for, each with the threads of this process, or with a GPU.

    Args:
        address: "ray" for the cluster that this process is connected to, else the one at $RAY_ADDRESS, else one of this machine that
            lasts as long as this object; or ``ray://HOST:PORT``.
        zoo: where adapters are read.

    Attributes:
        sent: name → reference of every adapter that was put into the object store.

    Raises:
        UsageError: ray is not installed. RecycleError: no cluster answers.
    """

    def __init__(self, address: str, zoo: Zoo) -> None:
        try:
            import ray
        except ImportError:
            raise UsageError(
                "The engine ray needs a package.", "", "Run: pip install 'recycler[ray]'", code="E_MISSING_EXTRA"
            ) from None
        self.zoo, self.sent = zoo, dict[str, Any]()
        self._ours = not ray.is_initialized()
        self._here: list[Any] = []  # workers that can be given something
        self._coming: dict[Any, Any] = {}  # reference that is ready when a worker is there → the worker
        self._model: RoutedModel | None = None
        self._recipe: Any = None
        self._made = 0
        if self._ours:
            _start(None if address == "ray" else address)

    @property
    def about(self) -> str:
        count = len(self._here)
        return f"{count} worker{'s' * (count != 1)}"

    def census(self) -> list[dict[str, Any]]:
        """What each worker says of itself."""
        import ray

        found: list[dict[str, Any]] = ray.get([actor.census.remote() for actor in (*self._here, *self._coming.values())])
        return found

    def close(self) -> None:
        """Dismisses the workers, and ends the cluster where it is ours."""
        import ray

        for actor in (*self._here, *self._coming.values()):
            ray.kill(actor)
        self._here, self._coming, self.sent, self._recipe, self._model = [], {}, {}, None, None
        if self._ours:
            ray.shutdown()

    def run(self, model: Fitting, work: Callable[[Any, Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        import ray

        spread = getattr(model.model.base, "hf_device_map", None) or {}
        if model.part[1] > 1 or len(set(spread.values())) > 1:
            raise UsageError(
                "The base is in parts, on several devices or in several processes.",
                "Each worker holds a whole one.",
                "Load it on one device, or leave --engine out.",
                code="E_DEVICE",
            )
        recipe = self._recipe_of(model.model)
        device = model.model.source.device.type
        self._hire(len(items), device)
        todo = deque(range(len(items)))
        busy: dict[Any, tuple[Any, int]] = {}
        load: Counter[Any] = Counter()
        deaths: Counter[int] = Counter()

        def give(actor: Any, number: int) -> None:
            busy[actor.run.remote(recipe, self.sent, work, items[number])] = actor, number
            load[actor] += 1

        try:
            while todo or busy:
                for ahead in (1, 2):  # a second one waits at the worker, where many are left
                    for actor in self._here:
                        if todo and load[actor] < ahead and (ahead == 1 or len(todo) > 2 * len(self._here)):
                            give(actor, todo.popleft())
                [ready], _ = ray.wait([*busy, *self._coming], num_returns=1)
                if ready in self._coming:
                    actor = self._coming.pop(ready)
                    try:
                        _same_versions(_outcome(ready))
                        self._here.append(actor)
                    except _Died:  # others can do it, if there are any
                        if not self._here and not self._coming:
                            raise
                    continue
                actor, number = busy.pop(ready)
                load[actor] -= 1
                try:
                    result = _outcome(ready)
                except _Died:
                    gone = actor in self._here  # else it had two, and this is the other one
                    if gone:
                        self._here.remove(actor)
                    deaths[number] += 1
                    if deaths[number] > _TRIES:
                        raise
                    todo.appendleft(number)
                    if gone:
                        self._hire(len(items), device)
                    continue
                if isinstance(result, _Missing):
                    self._send(model.model, result.names)
                    give(actor, number)
                else:
                    yield number, result
        finally:
            for ref in busy:
                with suppress(Exception):  # the cluster itself may be gone
                    ray.cancel(ref)

    def _recipe_of(self, model: RoutedModel) -> Any:
        import ray

        if model is not self._model:
            base = model.source
            dtype = str(model.base.dtype).removeprefix("torch.")
            recipe = _Recipe(
                number=self._made,
                base=str(Path(base.id).resolve()) if Path(base.id).is_dir() else base.id,
                revision=base.revision,
                dtype=dtype if dtype in DTYPES else "auto",
                device=base.device.type,
                fingerprint=fingerprint(model.base),
                adapters=tuple((one.name, one.sha256, self._folder(one)) for one in model.adapters),
            )
            self._model, self._recipe, self.sent = model, ray.put(recipe), {}
            self._made += 1
        return self._recipe

    def _folder(self, adapter: Adapter) -> Path | None:
        """Where the zoo holds this very adapter; None for one that was made out of others."""
        entry = self.zoo.entries.get(adapter.name)
        same = entry is not None and adapter.sha256 != "" and entry.weights == adapter.sha256
        return self.zoo.folder(adapter.name).resolve() if same else None

    def _send(self, model: RoutedModel, names: Sequence[str]) -> None:
        """Puts adapters into the object store that are not there yet."""
        import ray

        for adapter in model.adapters:
            if adapter.name in names and adapter.name not in self.sent:
                self.sent[adapter.name] = ray.put(replace(adapter, sites={k: _own(f) for k, f in adapter.sites.items()}))

    def _hire(self, most: int, device: str) -> None:
        """Has workers come until there are so many, as far as the cluster has room."""
        import ray

        threads, gpus = torch.get_num_threads(), int(device == "cuda")
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(int(min(has.get("CPU", 0) // threads, has.get("GPU", 0) if gpus else has.get("CPU", 0))) for has in machines)
        if not room:
            raise RecycleError(
                f"No machine of the cluster has {threads} CPUs{' and a GPU' * gpus}.",
                "Each worker computes as this process does, so that results are the same.",
                f"Set OMP_NUM_THREADS to less than {threads}." if threads > 1 else "Give it more, or leave --engine out.",
                code="E_CLUSTER",
            )
        worker: Any = ray.remote(_Worker)
        for _ in range(min(most, room) - len(self._here) - len(self._coming)):
            actor = worker.options(num_cpus=threads, num_gpus=gpus).remote(threads)
            self._coming[actor.census.remote()] = actor


def _start(address: str | None) -> None:
    """Connects this process to a cluster, or starts one."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what ray announces as its future default
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    there = address or os.environ.get("RAY_ADDRESS", "")
    if not there:
        options["include_dashboard"] = False
    host, _, port = there.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():
            socket.create_connection((host, int(port)), timeout=5).close()  # Ray itself tries for minutes
        ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise RecycleError(
            f"No Ray cluster answers{f' at {there}' if there else ''}.",
            str(error).strip().split("\n")[0],
            "See what `ray status` says there, and whether it asks for $RAY_AUTH_TOKEN; --engine ray alone starts a cluster here.",
            code="E_CLUSTER",
        ) from error


def _own(factors: Factors) -> Factors:
    """Tensors with memory of their own: a view of a file would travel with all of it."""
    return replace(factors, **{key: value.clone() for key, value in vars(factors).items() if value is not None})


class _Died(RecycleError):
    """A worker did."""


def _outcome(ref: Any) -> Any:
    """A result; or raises what the work raised, or `_Died`."""
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from None
        raise
    except (ray.exceptions.RayActorError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError) as error:
        raise _Died(
            "Workers die, or cannot be started.",
            str(error).strip().split("\n")[0],
            "See that recycler is installed there, and that memory holds a base and all adapters for every worker; with more threads "
            "each (OMP_NUM_THREADS) there are fewer.",
            code="E_CLUSTER",
        ) from error


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}


def _same_versions(census: Mapping[str, Any]) -> None:
    mine = _versions()
    other = {name: found for name, found in census["versions"].items() if found != mine[name]}
    if other:
        raise RecycleError(
            f"{census['host']} has " + ", ".join(f"{name} {found}" for name, found in other.items()) + ".",
            "Here it is " + ", ".join(f"{name} {mine[name]}" for name in other) + ", and results would not be the same.",
            "Install the same versions everywhere.",
            code="E_CLUSTER",
        )
