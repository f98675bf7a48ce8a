"""Adapters that are no LoRA become one, and what that loses is measured.

Two ways lead to factors:

- Methods that add to the weights of linears (VeRA, LoHa, LoKr, RandLoRA, MiSS, FourierFT, ...): PEFT computes each ΔW
  (`recycler.converting.materialise`), and its SVD gives the factors (`recycler.zoo.lowrank`), one site at a time.
- LoRA whose start changed the base (PiSSA, OLoRA): PEFT trains B·A on W − s·B₀A₀, so that the update of the base as it was
  is s·(BA − B₀A₀), exactly, of rank 2r. B₀A₀ is the top-r part of W's SVD (PiSSA) or of its QR (OLoRA), computed by PEFT's
  own initialisation; or it is read from the initial adapter where that lies beside the trained one, which is also how CorDA,
  LoRA-GA and the randomised PiSSA can be used. (PEFT's `subtract_mutated_init` does the same when the author asks for it.)

The result is a plain LoRA folder with α = r; the same input gives the same bytes on one machine. The error in the receipt is
always ‖ΔW − BA‖_F / ‖ΔW‖_F as measured on the factors that were written, also where nothing should be lost.

Dimensions in names: R rank, D input width, O output width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recycler.base import skeleton
from recycler.converting.checkpoint import Checkpoint, Layout
from recycler.converting.materialise import Weight, load_tensors, through_peft
from recycler.scoring import Progress, silent
from recycler.zoo import formats, inspect, lowrank, writing
from recycler.zoo.adapter import Factors
from recycler.zoo.config import check_convertible, parse_json, read_config
from recycler.zoo.errors import InputError
from recycler.zoo.inspect import printable
from recycler.zoo.kinds import Kind, kind_of
from recycler.zoo.match import check_sites, on_another_machine
from recycler.zoo.sources import INITIAL

LOSSY_ENERGY, LOSSY_RANK = 0.999, 128
"""Where no dial is given: an update of at most this rank is kept whole, a wider one to this energy, at most at this rank.

Chosen by these figures, so that they are no test of them: on SmolLM2-135M (width 576), after a short training on one task, NLL
as trained and as converted with these (the base: 1.03): LoKr
0.53 and 0.57, with 83 % of ‖ΔW‖² kept; RandLoRA 0.118 and 0.104, 88 %; FourierFT 0.25 and 0.33, 78 %. At rank 32 LoKr has 0.72
and FourierFT 0.92: their updates are not of low rank, and say so.
"""


@dataclass(frozen=True)
class Conversion:
    """What became of an adapter that is no LoRA.

    Attributes:
        kind: what it was. lossless: whether it is of low rank by construction.
        ranks: the distinct ranks of the factors, ascending.
        error: ‖ΔW − BA‖_F / ‖ΔW‖_F over all sites together.
        worst: the site with the largest error of its own, and that error.
        sites: how many linears it touches now; sites whose update was zero are not among them.
    """

    kind: str
    lossless: bool
    ranks: tuple[int, ...]
    error: float
    worst: tuple[str, float]
    sites: int
    notes: tuple[str, ...] = ()

    @property
    def kept(self) -> float:
        """The share of ‖ΔW‖² that was kept: what is lost is orthogonal to what is kept."""
        return 1 - self.error**2

    def lines(self) -> list[str]:
        """The receipt as text."""
        ranks = f"rank {self.ranks[0]}" if len(self.ranks) == 1 else f"ranks {self.ranks[0]}–{self.ranks[-1]}"
        lost = "nothing lost but rounding, " if self.error < 1e-5 else f"{self.kept:.4%} of the update kept, "
        return [
            f"converted from {self.kind}: {self.sites} sites, {ranks}, {lost}relative error {self.error:.2g} "
            f"(worst {self.worst[1]:.2g} at {printable(self.worst[0])})",
            *self.notes,
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {
            "kind": self.kind,
            "lossless": self.lossless,
            "ranks": list(self.ranks),
            "error": self.error,
            "kept": self.kept,
            "worst": {"site": self.worst[0], "error": self.worst[1]},
            "sites": self.sites,
            "notes": list(self.notes),
        }


@dataclass
class Tally:
    """Sites as they are factorised, and how much of ‖ΔW‖² has been lost so far."""

    factors: dict[str, Factors] = field(default_factory=dict)
    zero: list[str] = field(default_factory=list)
    lost: float = 0.0
    total: float = 0.0
    worst: tuple[str, float] = ("", -1.0)

    def add_dense(self, path: str, delta_OD: Tensor, rank: int | None, energy: float | None, whole: int = 0) -> None:
        """Factorise a dense update, as `lowrank.factorise` does; a zero one is an absent site."""
        try:
            found = lowrank.factorise(delta_OD, rank, energy, whole=whole)
        except InputError as error:
            raise InputError(f"{printable(path)}: {error.what}", error.why, error.fix, code=error.code) from error
        if found is None:
            self.zero.append(path)
        else:
            norm = float(torch.linalg.matrix_norm(delta_OD.double()))
            self.add(path, Factors(found.a_RD, found.b_OR), found.error, norm)

    def add(self, path: str, factors: Factors, error: float, norm: float) -> None:
        """Count factors whose relative error is `error`, of an update with Frobenius norm `norm`."""
        self.factors[path] = factors
        self.lost += (error * norm) ** 2
        self.total += norm**2
        if error > self.worst[1]:
            self.worst = path, error

    def result(self, kind: str, lossless: bool, notes: tuple[str, ...] = ()) -> Conversion:
        """The receipt. Raises InputError where every update is zero."""
        if not self.factors:
            raise InputError(
                f"All {len(self.zero)} updates are zero.",
                "The adapter is untrained, or was saved before its weights were gathered.",
                "Take a checkpoint from after training.",
                code="E_EMPTY",
            )
        if self.zero:
            notes = (*notes, f"{len(self.zero)} sites have no update and were left out, such as {printable(self.zero[0])}")
        ranks = tuple(sorted({factors.rank for factors in self.factors.values()}))
        return Conversion(kind, lossless, ranks, math.sqrt(self.lost / self.total), self.worst, len(self.factors), notes)


def convert(
    folder: Path,
    into: Path,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    initial: Path | None = None,
    name: str | None = None,
    progress: Progress = silent,
) -> Conversion:
    """Make a plain LoRA folder from an adapter of a kind that is converted.

    Args:
        folder: the PEFT folder. Only its own files are read, and the initial adapter's in a subfolder.
        into: a new or empty folder for the result; card and licence are copied.
        base: the base it is for: a Hub id or a folder; what the adapter declares where None. Its config alone is read, or
            its weights as well where the method's update depends on them.
        rank: at most this rank at every site. energy: the least rank that keeps this share of Σσ² at every site. Of both the
            smaller rank counts. Where neither is given, updates of at most rank `LOSSY_RANK` and kinds of low rank are kept
            whole, and others to `LOSSY_ENERGY`, at most `LOSSY_RANK`.
        initial: the adapter before training, where its start changed the base; else looked for beside the adapter, in a
            subfolder such as ``initial_adapter`` or ``pissa_init``.
        name: what messages call it; the folder's name where None.

    Raises:
        InputError: it needs no conversion, cannot be converted, is broken, or does not fit the base; or the base is not known.
        SecurityError: pickled or forged weights. HubError: the base is not to be had. UsageError: a dial is out of range.
    """
    lowrank.check_dials(rank, energy)
    name = printable(name or folder.resolve().name)
    inspect.check_folder(folder, where=name)
    config = parse_json(read_config(folder / inspect.CONFIG), name)
    start = initial or _beside(folder)
    kind = kind_of(config, initial=start is not None)
    if kind.how != "convert":
        raise InputError(
            f"{name} is {kind.name}, which is not converted.",
            kind.why or "It is read as it is.",
            kind.fix,
            code="E_FORMAT",
        )
    whole = 0
    if rank is None and energy is None and not kind.lossless:
        rank, energy, whole = LOSSY_RANK, LOSSY_ENERGY, LOSSY_RANK
    on = _Base.of(base, config, kind, name)
    tally = Tally()
    if config.get("peft_type") == "LORA":
        _without_start(folder, name, config, start, on, (rank, energy), tally, progress)
    else:
        count, updates = through_peft(config, folder / inspect.WEIGHTS, name, on.shapes, on.weight)
        step = progress(count, f"converting {name}")
        for path, delta_OD in updates:
            tally.add_dense(path, delta_OD, rank, energy, whole)
            step()
    notes = _notes(config, folder)
    if whole and tally.lost > 1e-10 * tally.total and LOSSY_RANK in {factors.rank for factors in tally.factors.values()}:
        notes += (f"no dial was given, so that no rank is above {LOSSY_RANK}; rank and energy say how much is kept",)
    result = tally.result(kind.name, kind.lossless, notes)
    into.mkdir(parents=True, exist_ok=True)
    writing.write_adapter(
        into,
        tally.factors,
        base=config.get("base_model_name_or_path"),
        base_revision=config.get("revision"),
        task_type=config.get("task_type"),
    )
    writing.copy_papers(folder, into)
    return result


@dataclass(frozen=True)
class _Base:
    """What a conversion may know of the base."""

    shapes: Mapping[str, tuple[int, int]]
    weight: Weight | None
    transposed: frozenset[str] = frozenset()  # linears whose weight is stored as [D, O]

    @classmethod
    def of(cls, base: str | Path | None, config: Mapping[str, Any], kind: Kind, name: str) -> _Base:
        if kind.needs == "nothing":
            return cls({}, None)
        chosen = str(base or config.get("base_model_name_or_path") or "")
        if not chosen:
            raise InputError(
                f"{name} is {kind.name}, and its base is not known.",
                f"Its update cannot be computed without the {kind.needs} of the base, and it declares none.",
                "Name the base with --base.",
                code="E_BASE_UNKNOWN",
            )
        if base is None and on_another_machine(chosen):
            raise InputError(
                f"{name} declares a base on another machine, {printable(chosen)}.",
                "A stranger's file must not make this machine open it.",
                "Name the base with --base.",
                code="E_BASE_UNKNOWN",
            )
        layout = Layout(skeleton(chosen))
        if kind.needs == "shapes":
            return cls(layout.shapes, None)
        checkpoint = Checkpoint.open(chosen)
        return cls(layout.shapes, lambda path: layout.weight(checkpoint, path), frozenset(layout.transposed))


def _notes(config: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """What a person should know of how this method's numbers came about."""
    if config.get("peft_type") == "LORA":
        return (
            "its start was taken out as it is on a base in fp32; on one in bf16, PEFT also rounded what it left of the weights",
        )
    shared = {"VERA": "vera_A", "RANDLORA": "randlora_A"}.get(str(config.get("peft_type")))
    if shared and not any(shared in key for key in inspect.read_header(folder / inspect.WEIGHTS)):
        key = printable(config.get("projection_prng_key"))
        return (
            f"its projections are not in the file and were drawn again from the key {key}; PEFT warns that other versions of "
            "torch may draw others",
        )
    return ()


def _beside(folder: Path) -> Path | None:
    """The initial adapter, where its author left it in a subfolder."""
    found = (path for path in sorted(folder.iterdir()) if path.is_dir() and INITIAL.fullmatch(path.name))
    return next((path for path in found if (path / inspect.CONFIG).is_file()), None)


def _without_start(
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    start: Path | None,
    base: _Base,
    dials: tuple[int | None, float | None],
    tally: Tally,
    progress: Progress,
) -> None:
    """ΔW = s·BA − s₀·B₀A₀ as stacked factors [A; A₀] and [sB, −s₀B₀]."""
    trained, scalings = _as_plain(folder, config, name)
    shapes = {path: factors.shape for path, factors in trained.items()}
    if base.weight is not None:
        check_sites(name, shapes, base.shapes)
    if config["init_lora_weights"] == "olora" and base.transposed & shapes.keys():
        raise InputError(
            f"{name} is OLoRA on linears whose weights are stored transposed (Conv1D).",
            "PEFT's OLoRA decomposes such a weight without turning it, so its start is not a part of the weight.",
            "Train it again with another init_lora_weights.",
            code="E_FORMAT",
        )
    begun: Mapping[str, Factors] = {}
    if start is not None and base.weight is None:
        begun, _ = _as_plain(start, parse_json(read_config(start / inspect.CONFIG), str(start)), f"{name}/{start.name}")
        if {path: factors.shape for path, factors in begun.items()} != shapes:
            raise InputError(
                f"The initial adapter in {printable(start)} has other sites or shapes than {name}.",
                "It is not the state that this training began from.",
                "Put the right one there.",
                code="E_SHAPES",
            )
    step = progress(len(trained), f"converting {name}")
    for path, factors in trained.items():
        if base.weight is None:
            first, off = begun[path], 0.0
        else:
            first, off = _initialised(base.weight(path), str(config["init_lora_weights"]), factors.rank, scalings[path])
        stacked = Factors(torch.cat([factors.a_RD, first.a_RD]), torch.cat([factors.b_OR, -first.b_OR], 1))
        norm = lowrank.norm(stacked.a_RD, stacked.b_OR)
        if norm <= lowrank.ROUNDING * lowrank.norm(factors.a_RD, factors.b_OR):
            tally.zero.append(path)  # it never left its start
        else:
            kept, error = _cut(stacked, *dials)
            tally.add(path, kept, math.hypot(error, off / norm), norm)
        step()


def _cut(factors: Factors, rank: int | None, energy: float | None) -> tuple[Factors, float]:
    if energy is not None:
        least = lowrank.least_rank(lowrank.thin_svd(factors.a_RD, factors.b_OR).s_K, energy)
        rank = min(rank or least, least)
    return (factors, 0.0) if rank is None else lowrank.truncate(factors, rank)


def _as_plain(folder: Path, config: Mapping[str, Any], name: str) -> tuple[dict[str, Factors], dict[str, float]]:
    """B·A of a LoRA folder, whatever its start did to the base, and the scaling that is folded into B; both by path."""
    settings = check_convertible(config, name)
    inspect.check_folder(folder)
    weights = folder / inspect.WEIGHTS
    sites, _ = formats.plan(settings, inspect.read_header(weights), name)
    tensors = load_tensors(weights)
    inspect.check_values(tensors, name)
    return {path: site.factors(tensors) for path, site in sites.items()}, {path: site.scaling for path, site in sites.items()}


def _initialised(weight_OD: Tensor, init: str, rank: int, scaling: float) -> tuple[Factors, float]:
    """The start that PEFT's own initialisation gives at a linear with this weight.

    Returns:
        Factors of s·B₀A₀, and ‖(W_residual + s·B₀A₀) − W‖_F: how far PEFT's residual is from what it was taken from.
    """
    from peft import LoraConfig, get_peft_model

    o, d = weight_OD.shape
    model = nn.Module()
    model.site = nn.Linear(d, o, bias=False, device="meta")
    model.site.weight = nn.Parameter(weight_OD.clone(), requires_grad=False)
    alpha: Any = scaling * rank  # a float, where PEFT's annotation wants an int
    settings = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=init, target_modules=["site"])  # type: ignore[arg-type]
    layer: Any = get_peft_model(model, settings).get_submodule("base_model.model.site")
    with torch.no_grad():
        b_OR = layer.lora_B["default"].weight.float() * layer.scaling["default"]
        first = Factors(layer.lora_A["default"].weight.float().clone(), b_OR)
        residual_OD = layer.get_base_layer().weight.float() + first.b_OR @ first.a_RD - weight_OD
        return first, float(torch.linalg.matrix_norm(residual_OD.double()))
