"""Workers on a Ray cluster. Each is a process (`recycler.ray_process`) that loads the base once, if at all, and keeps it for all that
comes.

What travels: items and results, which are small, and adapters that a worker cannot read in the zoo's folder, because that is not
shared or because they were only just made. Of those each is put into Ray's object store once, which keeps one copy a machine.

Where a worker dies another one takes its place, and its item is worked on again. Every worker computes with as many threads as this
process: how a product is shared out can change its last bit.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recycler.base import DTYPES, fingerprint
from recycler.ray_process import Missing, Process, Recipe, Shelf, versions
from recycler.routed import RoutedModel
from recycler.workers import Item, Result
from recycler.zoo.adapter import Adapter, Factors
from recycler.zoo.errors import RecycleError, UsageError
from recycler.zoo.store import Zoo

if TYPE_CHECKING:
    from recycler.scoring import Fitting

_TRIES = 3  # how often an item is given to somebody again whose worker died of it


class Ray:
    """Workers of a Ray cluster: as many as it has room for, each with the threads of this process, or with a GPU.

    Args:
        address: "ray" for the cluster that this process is connected to, else the one at $RAY_ADDRESS, else one of this machine that
            lasts as long as this object; or ``ray://HOST:PORT``.
        zoo: where a model's adapters are read.

    Attributes:
        sent: name → reference of every adapter that was put into the object store, or why it cannot be read here either.

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
        self._held: Any = None  # what is worked on, how it is described, and where the description lies
        self._shelf: Shelf | None = None
        self._shelf_ref: Any = None
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
        self._here, self._coming, self.sent, self._held, self._shelf, self._shelf_ref = [], {}, {}, None, None, None
        if self._ours:
            ray.shutdown()

    @property
    def most(self) -> int:
        return max(_room(torch.get_num_threads()), 1)

    def run(
        self, held: Fitting | Mapping[str, Adapter], work: Callable[[Any, Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result]]:
        import ray

        adapters = held if isinstance(held, Mapping) else {one.name: one for one in _whole(held).adapters}
        device = "cpu" if isinstance(held, Mapping) else held.model.source.device.type
        shelf = self._describe(held if isinstance(held, Mapping) else held.model)
        self._hire(len(items), device)
        todo = deque(range(len(items)))
        busy: dict[Any, tuple[Any, int]] = {}
        load: Counter[Any] = Counter()
        deaths: Counter[int] = Counter()

        def give(actor: Any, number: int) -> None:
            busy[actor.run.remote(shelf, self.sent, work, items[number])] = actor, number
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
                if isinstance(result, Missing):
                    self._send(adapters, result.names)
                    give(actor, number)
                else:
                    yield number, result
        finally:
            for ref in busy:
                with suppress(Exception):  # the cluster itself may be gone
                    ray.cancel(ref)

    def _describe(self, held: RoutedModel | Mapping[str, Adapter]) -> Any:
        """Reference of what workers make it from."""
        import ray

        zoo = isinstance(held, Zoo)  # which may be another one by now
        if held is self._held and not zoo:
            return self._shelf_ref
        shelf = self._recipe(held) if isinstance(held, RoutedModel) else _shelf(held)
        if zoo and shelf == self._shelf:  # what was sent is as it was; what could not be read may have been mended
            self.sent = {name: sent for name, sent in self.sent.items() if not isinstance(sent, RecycleError)}
        else:
            self._held, self._shelf, self._shelf_ref, self.sent = held, shelf, ray.put(shelf), {}
        return self._shelf_ref

    def _recipe(self, model: RoutedModel) -> Recipe:
        base = model.source
        dtype = str(model.base.dtype).removeprefix("torch.")
        self._made += 1
        return Recipe(
            number=self._made,
            base=str(Path(base.id).resolve()) if Path(base.id).is_dir() else base.id,
            revision=base.revision,
            dtype=dtype if dtype in DTYPES else "auto",
            device=base.device.type,
            fingerprint=fingerprint(model.base),
            adapters={one.name: (one.sha256, self._folder(one)) for one in model.adapters},
        )

    def _folder(self, adapter: Adapter) -> Path | None:
        """Where the zoo holds this very adapter; None for one that was made out of others."""
        entry = self.zoo.entries.get(adapter.name)
        same = entry is not None and adapter.sha256 != "" and entry.weights == adapter.sha256
        return self.zoo.folder(adapter.name).resolve() if same else None

    def _send(self, adapters: Mapping[str, Adapter], names: Sequence[str]) -> None:
        """Puts adapters into the object store that are not there yet."""
        import ray

        for name in names:
            if name not in self.sent:
                try:
                    adapter = adapters[name]
                except RecycleError as error:  # for whoever asks for it to meet
                    self.sent[name] = error
                else:
                    self.sent[name] = ray.put(replace(adapter, sites={k: _own(f) for k, f in adapter.sites.items()}))

    def _hire(self, most: int, device: str) -> None:
        """Has workers come until there are so many, as far as the cluster has room."""
        import ray

        threads, gpus = torch.get_num_threads(), int(device == "cuda")
        room = _room(threads, gpus)
        if not room:
            raise RecycleError(
                f"No machine of the cluster has {threads} CPUs{' and a GPU' * gpus}.",
                "Each worker computes as this process does, so that results are the same.",
                f"Set OMP_NUM_THREADS to less than {threads}." if threads > 1 else "Give it more, or leave --engine out.",
                code="E_CLUSTER",
            )
        worker: Any = ray.remote(Process)
        for _ in range(min(most, room) - len(self._here) - len(self._coming)):
            actor = worker.options(num_cpus=threads, num_gpus=gpus).remote(threads)
            self._coming[actor.census.remote()] = actor


def _room(threads: int, gpus: int = 0) -> int:
    """How many workers the cluster has room for."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(int(min(has.get("CPU", 0) // threads, has.get("GPU", 0) if gpus else has.get("CPU", 0))) for has in machines)


def _shelf(adapters: Mapping[str, Adapter]) -> Shelf:
    """Where a zoo's adapters are; others have no folder."""
    if not isinstance(adapters, Zoo):
        return Shelf({name: ("", None) for name in adapters})
    return Shelf({name: (entry.weights, adapters.folder(name).resolve()) for name, entry in adapters.entries.items()})


def _whole(held: Fitting) -> RoutedModel:
    """Its model.

    Raises:
        UsageError: it is in parts.
    """
    spread = getattr(held.model.base, "hf_device_map", None) or {}
    if held.part[1] > 1 or len(set(spread.values())) > 1:
        raise UsageError(
            "The base is in parts, on several devices or in several processes.",
            "Each worker holds a whole one.",
            "Load it on one device, or leave --engine out.",
            code="E_DEVICE",
        )
    return held.model


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


def _same_versions(census: Mapping[str, Any]) -> None:
    mine = versions()
    other = {name: found for name, found in census["versions"].items() if found != mine[name]}
    if other:
        raise RecycleError(
            f"{census['host']} has " + ", ".join(f"{name} {found}" for name, found in other.items()) + ".",
            "Here it is " + ", ".join(f"{name} {mine[name]}" for name in other) + ", and results would not be the same.",
            "Install the same versions everywhere.",
            code="E_CLUSTER",
        )
