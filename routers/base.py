"""What a router is, how it is saved, and how it is loaded.

A method is one file in this folder; the file's name is the method's name (`recycler.routers.discovery`). It defines a frozen
``Config`` dataclass (which is the Python keywords, the ``-o key=value`` options and the ``config`` of ``router.json`` at once) and
a concrete subclass of Router, or of one of the kinds that share work: LinearRouter, SequenceRouter, StaticRouter.

Dimensions in names: B batch, T token, D input width, E adapter, S site of a group.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from recycler.routers.protocol import Group, Model, Reader
from recycler.routers.select import Policy
from recycler.zoo.adapter import Adapter
from recycler.zoo.errors import UsageError
from recycler.zoo.writing import write_adapter

if TYPE_CHECKING:
    from typing_extensions import Self

SCHEMA_VERSION = 1
_THRESHOLD = ".null_threshold"


@dataclass(frozen=True)
class Derived(Adapter):
    """An adapter that was made out of others.

    Attributes:
        parts: their names. facts: what making it has to say, such as its error; goes into the router's report.
    """

    parts: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)


class Gate(nn.Module):
    """The executable part of a router at one group. Its buffers stay fp32 through ``.to(bfloat16)``: logits in bf16 would
    flip the chosen set of about 1 % of tokens at every site."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def forward(self, x_BTD: Tensor, plan: Any = None) -> Tensor:
        """Scores [B, T, S or 1, E] (B and T may be 1 where they are the same for all tokens)."""
        raise TypeError(f"{type(self).__name__} defines no forward")


class Router(nn.Module, ABC):
    """Turns hidden states into weights over adapters. A subclass's constructor works with (adapters, config) alone; what `fit`
    learned is filled in by `load_tensors`.

    Attributes:
        needs: what `fit` reads: any of "shots", "scores", "embeddings", "skills". Empty means that weights suffice.
        paper: where the method comes from.
        granularity: what one decision is for: a "token" at a site, a whole "sequence", or everything ("static"). The mixture of a
            sequence is the same at every site and token, so that answers with the same mixture are the same answers.
        simplex: weights are at least 0 and their sum at most 1.
        abstains: it may leave a token to the base, with weights whose sum is below 1; by its method or by its policy.
        trains: fitting takes gradient steps, or a search: minutes, not seconds.
        base_pass: every forward of the model is preceded by one of the bare base, whose hidden states `step` gets.
    """

    Config: ClassVar[type[Any]] = Policy
    needs: ClassVar[frozenset[str]] = frozenset()
    paper: ClassVar[str] = ""
    granularity: ClassVar[Literal["token", "sequence", "static"]] = "token"
    simplex: ClassVar[bool] = True
    abstains: bool = False  # an instance may differ from its class, by its config
    trains: ClassVar[bool] = False
    base_pass: bool = False  # so may it here

    def __init__(self, adapters: Sequence[str], config: Any) -> None:
        super().__init__()
        self.adapters = tuple(adapters)
        self.config = config
        self.abstains = type(self).abstains or getattr(config, "abstains", False)
        self._calibrated = getattr(config, "calibrated", False)
        self.thresholds: dict[str, float] = {}  # of the null policy, by group; found after fitting (`routers/calibration.py`)
        self.facts: dict[str, Any] = {}  # provenance: base, hashes, profile; filled where the router is built
        self.report: dict[str, Any] = {}  # what fitting has to say: losses, times, adapters without shots
        self.derived: tuple[Adapter, ...] = ()  # adapters that it made itself; they are kept with it

    @classmethod
    def method(cls) -> str:
        """The method's name: the name of the file that defines it."""
        return cls.__module__.rsplit(".", 1)[-1]

    # -- what a method defines

    @classmethod
    def needed(cls, config: Any) -> frozenset[str]:
        """What `fit` reads with this config: `needs`, or less."""
        return cls.needs

    @classmethod
    def spreads(cls, config: Any) -> bool:
        """Whether `fit` leaves its work to `Model.map`, so that several workers can share it."""
        return False

    @classmethod
    @abstractmethod
    def fit(cls, model: Model, profile: Any, config: Any) -> Self:
        """Learns the router. The base and the adapters stay bit-identical.

        Args:
            profile: a Profile; None is possible only for methods that need nothing.
            config: an instance of this class's Config.
        """

    @abstractmethod
    def score(self, group: Group, site: str, x_BTD: Tensor, plan: Any = None) -> Tensor:
        """Scores [B, T, E] at one site. An absent adapter competes with no update, or is −∞, as the method says."""

    def prepare(self, reader: Reader, inputs: Mapping[str, Any]) -> Any:
        """Called once per sequence, before the first forward, with the prompt; what it returns reaches every `score` as `plan`.

        `generate` calls it once, so that a decision made here holds for the whole answer, with a KV cache or without.
        """
        return None

    def step(self, states_BTH: Tensor, plan: Any) -> Any:
        """Called before every forward where `base_pass` is set: the bare base's last hidden states of this forward's tokens
        become the plan of this forward."""
        return plan

    def explain(self, plan: Any) -> list[dict[str, Any]] | None:
        """Why each row of a prepared sequence is routed as it is, as JSON; None where there is nothing to say."""
        return None

    @classmethod
    def derive(cls, model: Model, profile: Any, config: Any) -> Sequence[Adapter]:
        """Adapters that the method makes out of the model's before it is fitted on them instead; none by default."""
        return ()

    # -- later changes

    @classmethod
    def extends(cls) -> bool:
        """Whether an adapter can be added without touching the others (`extended`)."""
        return cls.extended is not Router.extended

    def extended(self, model: Model, profile: Any, name: str) -> Self:
        """The same router with one adapter more, learned from that adapter's own shots alone. `model` holds this router's
        adapters and, as its last one, the new one.

        Raises:
            UsageError: the method learns all adapters together.
        """
        raise UsageError(
            f"{self.method()} cannot take in one adapter more.",
            "It learns all adapters together, so that the others would change too.",
            "Build it again.",
            code="E_FIXED",
        )

    def without(self, name: str) -> Self:
        """The same router without one adapter; the others' columns stay as they are.

        Raises:
            UsageError: it has no such adapter, or the method learns all of them together.
        """
        raise UsageError(
            f"{self.method()} cannot let go of one adapter.",
            "It learns all adapters together, so that the others would change too.",
            "Build it again.",
            code="E_FIXED",
        )

    def gate(self, group: Group) -> Gate | None:
        """The gate of a group. Methods whose sites can share work override this; it must agree with `score`.

        None means that the group reuses the weights that the group `after` which it runs gave the same tokens.
        """
        return _PerSite(self, group)

    def tensors(self) -> dict[str, Tensor]:
        """What `save` stores, keyed ``<module path>.<kind>``."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""

    def statistics(self) -> dict[str, Tensor]:
        """What is kept beside the router so that it can be updated later; not needed to run it."""
        return {}

    def load_statistics(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `statistics`."""

    # -- what every router does

    def weights(self, scores_E: Tensor, group: Group | None = None) -> Tensor:
        """Scores → weights over the last axis, by the policy of the config."""
        found = (self._threshold(group),) if self._calibrated else ()
        weights_E: Tensor = self.config.weights(scores_E, group, *found)
        return weights_E

    def most(self, group: Group) -> int | None:
        """How many adapters a token has at most at a group's sites; None where it may have all."""
        config = self.config
        return config.most(group) if type(self).weights is Router.weights and isinstance(config, Policy) else None

    def _threshold(self, group: Group | None) -> float | None:
        """None while the router is fitted, and at sites that came with an adapter added later."""
        sites = () if group is None else group.sites
        return next((self.thresholds[site] for site in sites if site in self.thresholds), None)

    def save(self, folder: str | Path, *, statistics: bool = True, force: bool = False) -> Path:
        """Writes router.safetensors, what was made beside it, and router.json last.

        Args:
            statistics: also write statistics.safetensors and the adapters that the method made (``adapters/``); a composed model
                has those among its own and needs no statistics.

        Raises:
            UsageError: the folder holds a router, and not `force`; or something else than a router.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        check_output(folder, force)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "router.json").unlink(missing_ok=True)
        (folder / "statistics.safetensors").unlink(missing_ok=True)
        self._save_derived(folder / "adapters", self.derived if statistics else ())
        for name, tensors in (
            ("router", self.tensors() | {f"{site}{_THRESHOLD}": torch.tensor(t) for site, t in self.thresholds.items()}),
            ("statistics", self.statistics() if statistics else {}),
        ):
            if tensors or name == "router":
                save_file(
                    {k: t.detach().cpu().contiguous() for k, t in sorted(tensors.items())},
                    folder / f"{name}.safetensors",
                )
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "method": self.method(),
            "adapters": list(self.adapters),
            "config": dataclasses.asdict(self.config),
            "report": self.report,
            **self.facts,
        }
        (folder / "router.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf8")
        return folder

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `save` wrote to router.safetensors."""
        rest = dict(tensors)
        thresholds = {key: float(rest.pop(key)) for key in tensors if key.endswith(_THRESHOLD)}
        self.thresholds = {key.removesuffix(_THRESHOLD): value for key, value in thresholds.items()}
        self.load_tensors(rest)

    def _save_derived(self, folder: Path, derived: Sequence[Adapter]) -> None:
        """PEFT folders of the adapters that the method made: each loads in PEFT."""
        shutil.rmtree(folder, ignore_errors=True)
        for adapter in derived:
            (folder / adapter.name).mkdir(parents=True)
            write_adapter(folder / adapter.name, adapter.sites, base=adapter.base)


def check_output(folder: Path, force: bool) -> None:
    """Raises UsageError when `folder` is in use and may not be replaced."""
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or (held and "router.json" not in held):
        raise UsageError(
            f"{folder} holds something else than a router.", "Nothing is overwritten.", "Choose another --out.", code="E_EXISTS"
        )
    if held and not force:
        raise UsageError(
            f"{folder} holds a router already.",
            "Nothing is overwritten unless asked.",
            "Choose another --out, or add --force.",
            code="E_EXISTS",
        )


class _PerSite(Gate):
    """Any router's gate, one site after the other."""

    def __init__(self, router: Router, group: Group) -> None:
        super().__init__()
        self._router = [router]  # in a list: the router is not a child of its own gates
        self.group = group

    def forward(self, x_BTD: Tensor, plan: Any = None) -> Tensor:
        router = self._router[0]
        return torch.stack([router.score(self.group, site, x_BTD, plan) for site in self.group.sites], dim=-2)
