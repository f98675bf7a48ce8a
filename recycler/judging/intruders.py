"""Intruder dimensions: leading singular directions of a tuned weight that no singular direction of the base resembles.

Definition (Shuttleworth et al., 2410.21228), in fp32 or better: with U0 the left singular vectors of W0 and u_1 … u_k those of the k
largest singular values of the tuned weight W, direction j is an intruder where max_i |u0_iᵀ u_j| < ε, over all i; k = 10, ε = 0.5.
W is W0 + BA, or with DoRA (m / ‖W0 + BA‖) ⊙ (W0 + BA). Vectors are compared from the left only, also where W0 is not square.

Every look costs an eigendecomposition of the narrower Gram matrix, in fp64. A site can only have intruders where ΔW is large beside
the base's spectrum, so that a bounded look takes the sites with the largest σ1(ΔW) / σ_k(W0) first.

Dimensions in names: D input width, O output width, M min(O, D), K the leading directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recycler.zoo.similarity import singular_values, spread

if TYPE_CHECKING:
    from torch import Tensor, nn

    from recycler.zoo.adapter import Adapter, Factors

TOP = 10
EPSILON = 0.5
_NULL = 1e-7  # of σ1: the square root of fp64's precision, since the Gram matrix squares σ
_TOGETHER = 12  # sites whose base vectors are in memory at once; adapters are read again for the next ones

Progress = Callable[[int, str], Callable[..., None]]


@dataclass(frozen=True)
class Look:
    """One site of one adapter.

    Attributes:
        overlaps: max_i |u0_iᵀ u_j| of the leading directions j of the tuned weight, the largest singular value first.
        intruders: how many of these are below ε.
    """

    path: str
    overlaps: tuple[float, ...]

    @property
    def intruders(self) -> int:
        return sum(overlap < EPSILON for overlap in self.overlaps)

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {"path": self.path, "intruders": self.intruders, "overlaps": [round(overlap, 4) for overlap in self.overlaps]}


def left_vectors(weight_OD: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Left singular vectors [O, M] and singular values [M] of a matrix, the largest first, fp64; only `count` of them where given."""
    import torch

    w = weight_OD.double()
    wide = w.shape[0] <= w.shape[1]
    squares, vectors = torch.linalg.eigh(w @ w.T if wide else w.T @ w)
    values = squares.clamp_min(0).sqrt().flip(0)[:count]
    vectors = vectors.flip(1)[:, :count]
    if wide:
        return vectors, values
    left = (w @ vectors) / values.clamp_min(1e-300)
    left[:, values <= values[0] * _NULL] = 0  # W v is rounding there, and no direction of W
    return left, values


def tuned(weight_OD: Tensor, factors: Factors) -> Tensor:
    """The weight with an adapter in it, [O, D]."""
    whole: Tensor = weight_OD + factors.b_OR @ factors.a_RD
    if factors.magnitude_O is not None:
        whole = whole * (factors.magnitude_O / whole.norm(dim=1).clamp_min(1e-12))[:, None]
    return whole


def overlaps(base_OM: Tensor, weight_OD: Tensor, count: int = TOP) -> tuple[float, ...]:
    """max_i |u0_iᵀ u_j| of the leading directions of a tuned weight, given the base's left singular vectors (`left_vectors`)."""
    leading_OK, _ = left_vectors(weight_OD, count)
    found: list[float] = (base_OM.T @ leading_OK).abs().max(dim=0).values.tolist()
    return tuple(found)


def look(
    model: nn.Module,
    names: Sequence[str],
    read: Callable[[str], Adapter],
    *,
    sites: int | None = None,
    progress: Progress | None = None,
) -> dict[str, tuple[Look, ...]]:
    """Look for intruders at the sites of adapters, which must fit the model.

    Args:
        model: the base, loaded.
        read: gives an adapter by name; asked several times.
        sites: at most this many of each adapter, those with the largest σ1(ΔW) / σ_k(W0); all where None.

    Returns:
        Adapter → its sites, in the order of the model.
    """
    order = {path: number for number, (path, _) in enumerate(model.named_modules())}
    chosen = {name: sorted(read(name).sites, key=order.__getitem__) for name in names}
    if sites is not None:
        chosen = _worst(model, chosen, read, sites, progress)
    paths = sorted({path for some in chosen.values() for path in some}, key=order.__getitem__)
    step = _start(progress, sum(map(len, chosen.values())), "intruders")
    found: dict[str, list[Look]] = {name: [] for name in names}
    for first in range(0, len(paths), _TOGETHER):
        part = paths[first : first + _TOGETHER]
        weights = {path: _weight(model, path) for path in part}
        vectors = {path: both[0] for path, both in zip(part, spread(left_vectors, weights.values()), strict=True)}
        for name in names:
            mine = [path for path in part if path in chosen[name]]
            adapter = read(name) if mine else None
            jobs = [] if adapter is None else [(path, vectors[path], weights[path], adapter.sites[path]) for path in mine]
            for one in spread(_look_at, jobs):
                found[name].append(one)
                step()
    return {name: tuple(looks) for name, looks in found.items()}


def _look_at(job: tuple[str, Tensor, Tensor, Factors]) -> Look:
    path, base_OM, weight_OD, factors = job
    return Look(path, overlaps(base_OM, tuned(weight_OD, factors)))


def _worst(
    model: nn.Module, chosen: Mapping[str, Sequence[str]], read: Callable[[str], Adapter], sites: int, progress: Progress | None
) -> dict[str, list[str]]:
    """Of each adapter the sites where ΔW is largest beside the base's spectrum."""
    paths = sorted({path for some in chosen.values() for path in some})
    step = _start(progress, len(paths), "spectra")
    level = {}
    spectra = spread(lambda path: float(left_vectors(_weight(model, path), TOP)[1][-1]), paths)
    for path, value in zip(paths, spectra, strict=True):
        level[path] = value
        step()
    result = {}
    for name, some in chosen.items():
        adapter = read(name)
        size = {path: float(singular_values(adapter.sites[path])[0]) / max(level[path], 1e-30) for path in some}
        result[name] = sorted(some, key=lambda path: -size[path])[:sites]
    return result


def _weight(model: nn.Module, path: str) -> Tensor:
    from recycler.engine.sites import weight_OD

    return weight_OD(model.get_submodule(path)).cpu()


def _start(progress: Progress | None, steps: int, what: str) -> Callable[..., None]:
    return progress(steps, what) if progress else lambda count=1, note="": None
