"""What a router is, what it may ask of a model, and how it is found, saved and loaded.

A method is one file in this folder; the file's name is the method's name. It defines a frozen ``Config`` dataclass (which
is the Python keywords, the ``-o key=value`` options and the ``config`` of ``router.json`` at once) and a concrete subclass of
Router. Other packages add methods through the entry-point group ``recycler.routers`` (name = "module:Class").

Dimensions in names: B batch, T token, D input width, E adapter, S site of a group.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
from torch import Tensor, nn

from recycler.routers import select
from recycler.zoo.errors import InputError, UsageError, choices

if TYPE_CHECKING:
    from typing_extensions import Self

    from recycler.zoo.adapter import Factors

SCHEMA_VERSION = 1
Stream = Literal["input", "target"]


# ------------------------------------------------------------------------------------------ what a router may ask of a model


@dataclass(frozen=True)
class Group:
    """Sites that read the same input tensor (q, k and v of one layer, say), so that one gate computation can serve them.

    Attributes:
        sites: module paths in call order; the first names the group.
        width: D, the width of the shared input.
        stream: which tokens it sees: "input" (all of a causal model; the encoder side of an encoder–decoder, cross-attention
            keys and values included) or "target" (the decoder side).
        after: the name of the group that ran before it in the same module on the same stream (q, k and v for the attention
            output; gate and up for down), whose decision it can reuse; None if there is none.
    """

    sites: tuple[str, ...]
    width: int
    stream: Stream = "input"
    after: str | None = None

    @property
    def name(self) -> str:
        return self.sites[0]


@dataclass
class Batch:
    """Tokenised rows, padded.

    Attributes:
        inputs: keyword arguments of the model's forward.
        labels_BT: token ids to predict at each position of the scored stream, −100 where nothing is scored.
        mask_BT: per stream, True at real tokens.
        segment_BT: per stream, which of the row's chained examples a token belongs to; −1 at padding.
    """

    inputs: dict[str, Tensor]
    labels_BT: Tensor
    mask_BT: dict[Stream, Tensor]
    segment_BT: dict[Stream, Tensor]


Weights = Union[Tensor, Callable[[Group, Tensor], Tensor]]  # noqa: UP007  (a runtime alias; 3.10 has no `type`)


class Model(Protocol):
    """The base with its adapters, as a router sees it while it is fitted."""

    adapters: tuple[str, ...]
    groups: tuple[Group, ...]
    chains: bool  # can several examples share one context? (no for encoder–decoder models)

    def factors(self, site: str) -> Mapping[str, Factors]:
        """The adapters that hold factors at `site`, by name."""
        ...

    def encode(self, rows: Sequence[Sequence[Any]]) -> Batch:
        """Tokenises rows of one or more shots each, chained in one context, and pads them."""
        ...

    def observe(self, batch: Batch, weights: Weights) -> None:
        """One forward without gradients and without logits, for what `weights`, as a function, sees on the way."""
        ...

    def nll(self, batch: Batch, weights: Weights) -> Tensor:
        """Negative log-likelihood per label [B, T] (0 where nothing is scored) with the given mixture.

        `weights` is a tensor [E], [B, E] or [B, T, E], or a function of (group, x_BTD) that returns [B, T, S or 1, E].
        """
        ...

    def batches(self, rows: Sequence[Sequence[Any]], tokens: int) -> Iterator[list[int]]:
        """Row numbers in batches of about `tokens` tokens, rows of like length together."""
        ...

    def progress(self, steps: int, what: str) -> Callable[..., None]:
        """A bar of `steps`; call the result as (count=1, note="") after each."""
        ...


class Profile(Protocol):
    """What shots taught us, as a router sees it."""

    shots: Mapping[str, Sequence[Any]]  # task → its K shots
    own: Mapping[str, Sequence[str]]  # adapter → the tasks that are its own
    seed: int


def own_shots(model: Model, profile: Profile) -> list[tuple[int, Any]]:
    """(adapter number, shot) for every shot of every adapter's own tasks, in the order of names: what is drawn from the list
    with a seed does not depend on how the adapters are numbered."""
    numbers = {name: e for e, name in enumerate(model.adapters)}
    return [
        (numbers[name], shot) for name in sorted(numbers) for task in profile.own.get(name, ()) for shot in profile.shots[task]
    ]


# --------------------------------------------------------------------------------------------------------------- the router


@dataclass(frozen=True)
class TopK:
    """Fields that every method's Config shares: how scores become weights."""

    top_k: int | None = 2
    temperature: float = 1.0
    renormalise: bool = True

    def __post_init__(self) -> None:
        select.check(self.top_k, self.temperature)


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
    """

    Config: ClassVar[type[Any]] = TopK
    needs: ClassVar[frozenset[str]] = frozenset()
    paper: ClassVar[str] = ""

    def __init__(self, adapters: Sequence[str], config: Any) -> None:
        super().__init__()
        self.adapters = tuple(adapters)
        self.config = config
        self.facts: dict[str, Any] = {}  # provenance: base, hashes, profile; filled where the router is built
        self.report: dict[str, Any] = {}  # what fitting has to say: losses, times, adapters without shots

    @classmethod
    def method(cls) -> str:
        """The method's name: the name of the file that defines it."""
        return cls.__module__.rsplit(".", 1)[-1]

    # -- what a method defines

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

    def prepare(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        """Called once per sequence, before the first forward; what it returns reaches every `score` as `plan`."""
        return None

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

    def weights(self, scores_E: Tensor) -> Tensor:
        """Scores → weights over the last axis, by the policy of the config."""
        return select.top_k(scores_E, self.config.top_k, self.config.temperature, self.config.renormalise)

    def save(self, folder: str | Path, *, statistics: bool = True, force: bool = False) -> Path:
        """Writes router.safetensors, statistics.safetensors where there are any and they are asked for, and router.json last.

        Raises:
            UsageError: the folder holds a router, and not `force`; or something else than a router.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        check_output(folder, force)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "router.json").unlink(missing_ok=True)
        (folder / "statistics.safetensors").unlink(missing_ok=True)
        for name, tensors in (
            ("router", self.tensors()),
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

    @staticmethod
    def load(folder: str | Path) -> Router:
        """Reads a saved router.

        Raises:
            InputError: the folder holds none, its schema is newer, or its tensors do not fit its manifest.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            manifest = json.loads((folder / "router.json").read_text(encoding="utf8"))
            version, name = manifest["schema_version"], manifest["method"]
        except FileNotFoundError:
            raise InputError(
                f"{folder} holds no router.",
                "There is no router.json in it.",
                "Build one: recycle build-router METHOD --out DIR",
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder}/router.json cannot be read ({error}).", "", "Build the router again.") from None
        if version > SCHEMA_VERSION:
            raise InputError(
                f"{folder} was written with router schema {version}.",
                f"This version reads up to {SCHEMA_VERSION}.",
                "Upgrade recycler.",
            )
        cls = find(name)
        router = cls(manifest["adapters"], make_config(cls, manifest["config"]))
        router.report = manifest.get("report", {})
        own = {"schema_version", "method", "adapters", "config", "report"}
        router.facts = {k: v for k, v in manifest.items() if k not in own}
        try:
            router.load_tensors(load_file(folder / "router.safetensors"))
            if (folder / "statistics.safetensors").exists():
                router.load_statistics(load_file(folder / "statistics.safetensors"))
        except (SafetensorError, OSError, KeyError, RuntimeError) as error:
            raise InputError(f"The tensors in {folder} cannot be read ({error}).", "", "Build the router again.") from None
        return router


def check_output(folder: Path, force: bool) -> None:
    """Raises UsageError when `folder` is in use and may not be replaced."""
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or (held and "router.json" not in held):
        raise UsageError(f"{folder} holds something else than a router.", "Nothing is overwritten.", "Choose another --out.")
    if held and not force:
        raise UsageError(
            f"{folder} holds a router already.",
            "Nothing is overwritten unless asked.",
            "Choose another --out, or add --force.",
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


# ------------------------------------------------------------------------------------------------------------- linear gates


@dataclass
class Rows:
    """The linear gate of one site: scores = (|x̂·v| or x̂·v) + offset.

    Attributes:
        v_ED: one row per adapter, every constant factor folded in.
        offset_E: added to the scores; −∞ removes an adapter that is absent at this site.
    """

    v_ED: Tensor
    offset_E: Tensor | None = None


class LinearRouter(Router):
    """A router whose score is linear in the token's input at the site: Arrow, PHATGOOSE, ridge and their kin.

    A subclass fills `rows` (site → Rows) and says how x is normalised. Rows given only for the first site of a group serve
    the whole group; rows for every site give each its own gate. Either way a group costs one small fp32 GEMM. A group without
    rows reuses the decision of the group it runs after.
    """

    normalise: ClassVar[bool] = False  # non-affine LayerNorm (eps 1e-5) of x first
    absolute: ClassVar[bool] = False

    def __init__(self, adapters: Sequence[str], config: Any, rows: Mapping[str, Rows] | None = None) -> None:
        super().__init__(adapters, config)
        self.rows = dict(rows or {})

    def gate(self, group: Group) -> Gate | None:
        own = [site for site in group.sites if site in self.rows]
        if not own and group.after in self.rows:
            return None
        if own != list(group.sites) and own != [group.sites[0]]:
            missing = [s for s in group.sites if s not in self.rows]
            raise InputError(
                f"The router has no gate for {', '.join(missing)}.",
                "It was built for other adapters or for another base.",
                "Build it again for this zoo.",
            )
        return LinearGate([self.rows[site] for site in own], self.normalise, self.absolute)

    def score(self, group: Group, site: str, x_BTD: Tensor, plan: Any = None) -> Tensor:
        rows = self.rows[site if site in self.rows else group.sites[0]]
        return LinearGate([rows], self.normalise, self.absolute).to(x_BTD.device)(x_BTD)[..., 0, :]

    def tensors(self) -> dict[str, Tensor]:
        stored = {f"{site}.gate": rows.v_ED for site, rows in self.rows.items()}
        stored |= {f"{site}.offset": rows.offset_E for site, rows in self.rows.items() if rows.offset_E is not None}
        return stored

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        sites = [key.removesuffix(".gate") for key in tensors if key.endswith(".gate")]
        self.rows = {site: Rows(tensors[f"{site}.gate"], tensors.get(f"{site}.offset")) for site in sites}
        wrong = [s for s, r in self.rows.items() if r.v_ED.ndim != 2 or r.v_ED.shape[0] != len(self.adapters)]
        if wrong:
            raise InputError(f"The gates at {wrong[0]} are not one row per adapter.", "", "Build the router again.")


class LinearGate(Gate):
    """Scores of one group, [.., S or 1, E], from rows stacked over its sites."""

    v_ND: Tensor
    offset_N: Tensor | None

    def __init__(self, rows: Sequence[Rows], normalise: bool, absolute: bool) -> None:
        super().__init__()
        self.normalise, self.absolute = normalise, absolute
        self.shape = (len(rows), rows[0].v_ED.shape[0])
        self.register_buffer("v_ND", torch.cat([r.v_ED.float() for r in rows]), persistent=False)
        offset = None
        if any(r.offset_E is not None for r in rows):
            zero = torch.zeros(self.shape[1])
            offset = torch.cat([zero if r.offset_E is None else r.offset_E.float() for r in rows])
        self.register_buffer("offset_N", offset, persistent=False)

    def forward(self, x_BTD: Tensor, plan: Any = None) -> Tensor:
        x_BTD = x_BTD.float()
        if self.normalise:
            x_BTD = nn.functional.layer_norm(x_BTD, x_BTD.shape[-1:])
        # Few operations on purpose: at one token a step, each costs as much as a small GEMM.
        if self.absolute:
            scores_N = nn.functional.linear(x_BTD, self.v_ND).abs()
            if self.offset_N is not None:
                scores_N = scores_N + self.offset_N
        else:
            scores_N = nn.functional.linear(x_BTD, self.v_ND, self.offset_N)
        return scores_N.view(*x_BTD.shape[:-1], *self.shape)


# -------------------------------------------------------------------------------------------------- discovery and configuration


@cache
def methods() -> dict[str, type[Router]]:
    """Every method by name: the files of this folder, then the entry points of the group ``recycler.routers``.

    Raises:
        InputError: two of them have one name.
    """
    import recycler.routers as package

    found: dict[str, type[Router]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for cls in vars(module).values():
            if (
                inspect.isclass(cls)
                and issubclass(cls, Router)
                and cls.__module__ == module.__name__
                and not inspect.isabstract(cls)
            ):
                if info.name in found:
                    raise InputError(f"routers/{info.name}.py defines two routers.", "A file is one method.", "Split it.")
                found[info.name] = cls
    for point in entry_points(group="recycler.routers"):
        if point.name in found:
            raise InputError(f"Two routers are called {point.name}.", f"One is {point.value}.", "Rename or uninstall one.")
        found[point.name] = point.load()
    return dict(sorted(found.items()))


def find(name: str) -> type[Router]:
    """The class of a method.

    Raises:
        UsageError: there is no such method.
    """
    try:
        return methods()[name]
    except KeyError:
        raise UsageError(f"There is no router called {name!r}.", "", f"Choose {choices(methods())}.") from None


def options(cls: type[Router]) -> dict[str, tuple[Any, Any]]:
    """Name → (type, default) of a method's Config."""
    hints = get_type_hints(cls.Config)
    return {f.name: (hints[f.name], f.default) for f in dataclasses.fields(cls.Config)}


def make_config(cls: type[Router], given: Mapping[str, Any]) -> Any:
    """A Config from keywords, or from the strings of ``-o key=value``.

    Raises:
        UsageError: an unknown key (all choices are listed) or a value of the wrong type.
    """
    known = options(cls)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise UsageError(
            f"{cls.method()} has no option {', '.join(map(repr, unknown))}.",
            "",
            "Its options: " + ", ".join(f"{k}={v}" for k, (_, v) in known.items()) + ".",
        )
    return cls.Config(**{key: _convert(key, value, known[key][0]) for key, value in given.items()})


def _convert(key: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`; strings are read as the command line gives them."""
    kinds = get_args(kind) if get_origin(kind) is not None and get_origin(kind) is not Literal else (kind,)
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        if type(None) in kinds:
            return None
    elif get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
    elif bool in kinds:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    else:
        for target in kinds:
            if target in (int, float, str) and not isinstance(value, bool):
                try:
                    if target is not int or float(value) == int(value):
                        return target(value)
                except (ValueError, TypeError, OverflowError):
                    continue
    name = " or ".join(getattr(k, "__name__", str(k)).replace("NoneType", "none") for k in kinds)
    raise UsageError(f"{key}={value!r} is not what {key} takes.", f"It takes {name}.", "")
