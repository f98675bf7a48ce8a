"""Merging adapters exactly: the maths that average, cat, svd, ties, dare and magnitude_prune share, and what kind of router they are.

Whatever kind of adapter it is, at a linear with weight W it adds ``S ⊙ (W x) + B A x + b`` (`Update`): a plain LoRA has S = 0, DoRA
has S = c − 1 and c ⊙ B for B, with c = m / ‖W + BA‖; b is the bias of B, where it has one. Sums of updates are updates, so that a sum
with weights is exact: factors stacked, rank Σ r (`linear`). Where S ≠ 0 it is again one DoRA adapter: c' = 1 + S, B' = B / c',
m' = c' ‖W + B'A‖.

Methods that choose entries of ΔW (TIES, DARE, pruning) work on the dense ``S ⊙ W + B A``, one linear at a time, and factorise what
comes out. PEFT's ``ties``, ``dare_*`` and ``magnitude_prune`` choose in A and in B apart, and its ``linear`` adds A's and B's: none
of these is a function of ΔW, and the same adapter written as (G⁻¹A, BG) merges to something else. Its ``*_svd`` kinds are.

Dimensions in names: E adapter, R rank, D input width, O output width.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from recycler.routers.base import Derived
from recycler.routers.protocol import Model
from recycler.routers.static import StaticRouter
from recycler.zoo import lowrank
from recycler.zoo.adapter import Factors
from recycler.zoo.errors import InputError, UsageError, choices, shorten

if TYPE_CHECKING:
    from typing_extensions import Self

Weight = Callable[[], Tensor]  # gives W [O, D], fp32; asked only where a DoRA update needs it
ENERGY, RANK = 0.99, 128
"""Where no dial is given: what has no higher rank than one of the adapters is kept whole, the rest to this energy, at most at this
rank. On SmolLM2-135M and twelve adapters of ranks 8 and 16, NLL (the base: 4.96) of svd at rank 16, 32, 64 and whole: 2.84, 1.70, 1.47,
1.49; of ties at 16, 32, 64, 128 and 99 % (rank 142 to 468): 4.41, 4.34, 4.29, 4.28, 4.26."""
_LEAST = 1e-6  # c' at least, in size: a row whose base output is to vanish keeps a millionth of it, so that DoRA can say it


@dataclass(frozen=True)
class Update:
    """``x ↦ S ⊙ (W x) + B A x + b`` at one linear."""

    a_RD: Tensor
    b_OR: Tensor
    scale_O: Tensor | None = None
    bias_O: Tensor | None = None

    def dense(self, weight: Weight) -> Tensor:
        """S ⊙ W + B A [O, D]; fp32, or fp64 where there is an S, so that it can be taken out again."""
        if self.scale_O is None:
            return self.b_OR.float() @ self.a_RD.float()
        return self.b_OR.double() @ self.a_RD.double() + self.scale_O.double()[:, None] * weight().double()

    def norm(self, weight: Weight) -> float:
        """‖S ⊙ W + B A‖_F."""
        if self.scale_O is None:
            return lowrank.norm(self.a_RD, self.b_OR)
        return float(torch.linalg.matrix_norm(self.dense(weight)))


@dataclass(frozen=True)
class Part:
    """One adapter's share of a merge at one linear."""

    name: str
    weight: float
    update: Update


@dataclass(frozen=True)
class Place:
    """One linear to merge at.

    Attributes:
        site: its module path. parts: the adapters that touch it, sorted by name. total: Σ|w| over all adapters, also those that are
            absent here. weight: gives W.
    """

    site: str
    parts: Sequence[Part]
    total: float
    weight: Weight

    def scale(self) -> Tensor | None:
        """Σ w · S [O], None where no update has an S."""
        return _total((part.weight, part.update.scale_O) for part in self.parts)


def update_of(factors: Factors, weight: Weight) -> Update:
    """An adapter's update at a linear, in fp64."""
    a_RD, b_OR = factors.a_RD.double(), factors.b_OR.double()
    if factors.magnitude_O is None:
        return Update(a_RD, b_OR, None, None if factors.bias_O is None else factors.bias_O.double())
    norm_O = torch.linalg.vector_norm(weight().double() + b_OR @ a_RD, dim=1)
    c_O = torch.where(norm_O > 0, factors.magnitude_O.double() / norm_O, 1.0)
    return Update(a_RD, c_O[:, None] * b_OR, c_O - 1)


def linear(parts: Sequence[Part]) -> Update:
    """Σ w_e · update_e, exact: rank Σ r."""
    return Update(
        torch.cat([part.update.a_RD for part in parts]),
        torch.cat([part.weight * part.update.b_OR for part in parts], dim=1),
        _total((part.weight, part.update.scale_O) for part in parts),
        _total((part.weight, part.update.bias_O) for part in parts),
    )


def _total(terms: Iterable[tuple[float, Tensor | None]]) -> Tensor | None:
    """Σ w · t of those that are there; None where none is."""
    found = [weight * tensor for weight, tensor in terms if tensor is not None]
    return torch.stack(found).sum(0) if found else None


def cut(update: Update, rank: int | None, energy: float | None, whole: int = 0) -> tuple[Update, float]:
    """The best update with a shorter B A, S and b as they are, and ‖difference‖_F, measured. The dials, and `whole`, are those of
    `lowrank.factorise`."""
    thin = lowrank.thin_svd(update.a_RD, update.b_OR)
    full = lowrank.least_rank(thin.s_K, 1 - lowrank.ROUNDING**2)
    keep = full if energy is None or full <= whole else min(full, lowrank.least_rank(thin.s_K, energy))
    keep = keep if rank is None or full <= whole else min(keep, rank)
    if update.a_RD.shape[0] <= max(keep, whole):
        return update, 0.0
    a_RD, b_OR = thin.vt_KD[:keep].contiguous(), (thin.u_OK[:, :keep] * thin.s_K[:keep]).contiguous()
    lost = lowrank.norm(torch.cat([update.a_RD.double(), a_RD]), torch.cat([update.b_OR.double(), -b_OR], dim=1))
    return Update(a_RD, b_OR, update.scale_O, update.bias_O), lost


def factors_of(name: str, updates: Mapping[str, Update], weight: Callable[[str], Tensor]) -> dict[str, Factors]:
    """Updates per module path as one adapter can hold them. Where one needs a DoRA magnitude all get one, because PEFT's config has
    all or none; a plain update's is ‖W + BA‖, so that c = 1.

    Raises:
        InputError: one update scales the base's output and one has a bias.
    """
    scaled = [site for site, update in updates.items() if update.scale_O is not None]
    biased = [site for site, update in updates.items() if update.bias_O is not None]
    if scaled and biased:
        raise InputError(
            f"{name} would need DoRA's magnitude (at {shorten(scaled, 2)}) and a bias of B (at {shorten(biased, 2)}).",
            "No adapter format has both.",
            "Choose adapters without one of the two, with --adapters or by weights.",
        )
    return {site: _dora(update, weight(site)) if scaled else _plain(update) for site, update in updates.items()}


def _plain(update: Update) -> Factors:
    a_RD, b_OR = _fp32(update.a_RD, update.b_OR)
    return Factors(a_RD, b_OR, None, None if update.bias_O is None else update.bias_O.float())


def _dora(update: Update, weight_OD: Tensor) -> Factors:
    scale_O = torch.zeros(weight_OD.shape[0]) if update.scale_O is None else update.scale_O
    c_O = 1 + scale_O.double()
    c_O = torch.where(c_O.abs() < _LEAST, torch.where(c_O < 0, -_LEAST, _LEAST), c_O)
    a_RD, b_OR = _fp32(update.a_RD, update.b_OR.double() / c_O[:, None])
    norm_O = torch.linalg.vector_norm(weight_OD + b_OR @ a_RD, dim=1)
    return Factors(a_RD, b_OR, (c_O * norm_O).float())


def _fp32(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.float().contiguous() for tensor in tensors)


@dataclass
class Loss:
    """What was lost on the way to low rank, over all linears."""

    lost: float = 0.0
    total: float = 0.0
    worst: tuple[str, float] = ("", -1.0)
    ranks: set[int] = field(default_factory=set)

    def add(self, site: str, lost: float, norm: float, rank: int) -> None:
        """lost: ‖ΔW − ΔW'‖_F; norm: ‖ΔW‖_F."""
        self.lost, self.total = self.lost + lost**2, self.total + norm**2
        self.ranks.add(rank)
        if norm and lost / norm > self.worst[1]:
            self.worst = (site, lost / norm)

    def report(self) -> dict[str, Any]:
        """The relative error over all linears together, the worst one's, and the ranks."""
        error = math.sqrt(self.lost / self.total) if self.total else 0.0
        ranks = [min(self.ranks), max(self.ranks)] if self.ranks else []
        worst = [self.worst[0], float(f"{self.worst[1]:.4g}")] if error else None
        return {"error": float(f"{error:.4g}"), "worst": worst, "ranks": ranks}


# --------------------------------------------------------------------------------------------------------------- the router


@dataclass(frozen=True)
class MergeConfig:
    """What all merges can be told.

    Attributes:
        weights: ``mean`` (1/E each), ``sum`` (1 each), or by name, taken as they are: ``math=0.5,law=1``; others get 0. They may be
            negative.
        scale: multiplies them all (task arithmetic's λ).
    """

    weights: str = "mean"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale == 0:
            raise UsageError(
                f"scale={self.scale}.", "It multiplies every weight.", "Use a finite number that is not 0.", code="E_OPTION"
            )
        if self.weights not in ("mean", "sum") and not any(self._named().values()):
            raise UsageError(
                f"weights={self.weights!r}.",
                "All of them are 0: that is the base.",
                "Give one adapter another weight.",
                code="E_OPTION",
            )

    def _named(self) -> dict[str, float]:
        """Raises UsageError unless it reads name=number,name=number."""
        named: dict[str, float] = {}
        for item in self.weights.split(","):
            name, equals, text = (part.strip() for part in item.partition("="))
            try:
                value = float(text) if equals and name and name not in named else math.nan
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                raise UsageError(
                    f"weights={self.weights!r}.",
                    f"{item.strip()!r} is no weight.",
                    "Write mean, sum, or math=0.5,law=1",
                    code="E_OPTION",
                )
            named[name] = value
        return named

    def mixture(self, adapters: Sequence[str]) -> dict[str, float]:
        """Adapter → weight, sorted by name, those of weight 0 left out.

        Raises:
            UsageError: a name that is not among `adapters`.
        """
        if self.weights in ("mean", "sum"):
            each = self.scale / (len(adapters) if self.weights == "mean" else 1)
            return dict.fromkeys(sorted(adapters), each)
        named = self._named()
        unknown = sorted(set(named) - set(adapters))
        if unknown:
            raise UsageError(f"weights name {shorten(unknown)}, which is not merged here.", "", f"Choose {choices(adapters)}.")
        return {name: self.scale * named[name] for name in sorted(named) if named[name]}


@dataclass(frozen=True)
class ShortConfig(MergeConfig):
    """A merge that is given a low rank.

    Attributes:
        rank: at most so many singular values at each linear. energy: the least number with Σσ² ≥ energy · ‖ΔW‖². Of two dials the
            smaller result counts; without any what has no higher rank than one of the adapters is kept whole, the rest to 99 % of
            its energy, at most at rank 128.
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        lowrank.check_dials(self.rank, self.energy)

    def dials(self, place: Place) -> tuple[int | None, float | None, int]:
        """(rank, energy, the rank up to which all is kept whole)."""
        if self.rank is None and self.energy is None:
            return RANK, ENERGY, max(part.update.a_RD.shape[0] for part in place.parts)
        return self.rank, self.energy, 0


class Merge(StaticRouter):
    """One adapter made of all of them, named after the method, at weight 1. It is saved as a PEFT folder beside the router."""

    Config: ClassVar[type[Any]] = MergeConfig

    @classmethod
    @abstractmethod
    def merge(cls, place: Place, config: Any) -> tuple[Update | None, float, float]:
        """(the merged update, or None where nothing is left of it; ‖what was lost‖_F; ‖what was to be kept‖_F) at one linear."""

    @classmethod
    def derive(cls, model: Model, profile: Any, config: Any) -> tuple[Derived, ...]:
        weights = config.mixture(model.adapters)
        updates: dict[str, Update] = {}
        loss = Loss()
        sites = [site for group in model.groups for site in group.sites]
        step = model.progress(len(sites), "merging")
        for site in sites:
            weight = cache(partial(model.base_weight, site))
            factors = model.factors(site)
            parts = [Part(name, w, update_of(factors[name], weight)) for name, w in weights.items() if name in factors]
            if parts:
                update, lost, norm = cls.merge(Place(site, parts, sum(map(abs, weights.values())), weight), config)
                if update is not None:
                    updates[site] = update
                    loss.add(site, lost, norm, update.a_RD.shape[0])
            step()
        if not updates:
            raise InputError(
                "The merge is empty.", "At no linear is there anything left of the updates.", "Choose others.", code="E_EMPTY"
            )
        name = cls.method()
        made = factors_of(name, updates, model.base_weight)
        return (Derived(name, made, source=f"{name} of {', '.join(weights)}", parts=tuple(weights), facts=loss.report()),)

    @classmethod
    def fit(cls, model: Model, profile: Any, config: Any) -> Self:
        return cls(model.adapters, config, torch.ones(len(model.adapters)))


class Deltas:
    """The dense updates of a linear, (name, weight, ΔW [O, D]); made anew each time they are gone through, so that one is held at a
    time."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def __iter__(self) -> Iterator[tuple[str, float, Tensor]]:
        for part in self.place.parts:
            yield part.name, part.weight, part.update.dense(self.place.weight)


class DenseMerge(Merge):
    """A merge that chooses entries of ΔW."""

    Config: ClassVar[type[Any]] = ShortConfig

    @classmethod
    @abstractmethod
    def blend(cls, deltas: Iterable[tuple[str, float, Tensor]], total: float, key: str, config: Any) -> Tensor:
        """The merged tensor of (name, weight, tensor), gone through as often as it takes.

        Args:
            total: Σ|w| over all adapters, also those that are absent here.
            key: what random draws at this place are named after.
        """

    @classmethod
    def merge(cls, place: Place, config: Any) -> tuple[Update | None, float, float]:
        merged_OD = cls.blend(Deltas(place), place.total, place.site, config)
        biases = [(part.name, part.weight, part.update.bias_O) for part in place.parts if part.update.bias_O is not None]
        bias_O = cls.blend(biases, place.total, f"{place.site} bias", config) if biases else None
        norm = float(torch.linalg.matrix_norm(merged_OD.double()))
        scale_O = place.scale()
        if scale_O is not None:  # what DoRA says by itself does not have to be of low rank
            merged_OD = merged_OD - scale_O[:, None] * place.weight().double()
        rank, energy, whole = config.dials(place)
        found = lowrank.factorise(merged_OD, rank, energy, whole=whole)
        if found is not None:
            lost = found.error * float(torch.linalg.matrix_norm(merged_OD.double()))
            return Update(found.a_RD, found.b_OR, scale_O, bias_O), lost, norm
        if scale_O is None and bias_O is None:
            return None, 0.0, norm
        nothing = merged_OD.new_zeros
        return Update(nothing(1, merged_OD.shape[1]), nothing(merged_OD.shape[0], 1), scale_O, bias_O), 0.0, norm


def keep_largest(delta: Tensor, density: float) -> Tensor:
    """The ⌈density · n⌉ entries of the largest size, and those as large as the smallest of them; zero elsewhere."""
    count = math.ceil(round(density * delta.numel(), 6))  # 0.28 of 25 is 7, which floats do not know
    if count >= delta.numel():
        return delta
    size = delta.abs()
    return torch.where(size >= size.flatten().kthvalue(delta.numel() - count + 1).values, delta, 0.0)


def agree(deltas: Iterable[tuple[str, float, Tensor]], total: float, signs: str) -> Tensor:
    """TIES's last two steps: every entry elects a sign, and those that have it are averaged.

        γ = sign Σ_e w_e v_e           (signs = "total")
        γ = sign Σ_e sign(w_e v_e)     ("frequency"; a tie is settled by the total)
        m = total · Σ_{e ∈ A} w_e v_e / Σ_{e ∈ A} |w_e|,    A = {e : sign(w_e v_e) = γ}

    A sum of 0 counts as positive. Where all adapters are there and agree, m is Σ w v.
    """
    mass = votes = None
    for _, w, v in deltas:
        mass = w * v if mass is None else mass + w * v
        if signs == "frequency":
            votes = (w * v).sign() if votes is None else votes + (w * v).sign()
    assert mass is not None
    elected = mass if votes is None else torch.where(votes == 0, mass, votes)
    positive = elected >= 0
    merged, shares = torch.zeros_like(mass), torch.zeros_like(mass)
    for _, w, v in deltas:
        signed = w * v
        joins = torch.where(positive, signed > 0, signed < 0)
        merged += torch.where(joins, signed, 0.0)
        shares += abs(w) * joins
    return torch.where(shares > 0, total * merged / shares.clamp(min=torch.finfo(shares.dtype).tiny), 0.0)


def check_density(density: float) -> None:
    """Raises UsageError unless it is above 0 and at most 1."""
    if not 0 < density <= 1:
        raise UsageError(
            f"density={density}.",
            "It is the share of entries that are kept.",
            "Use a number above 0 and at most 1, such as 0.2.",
            code="E_OPTION",
        )
