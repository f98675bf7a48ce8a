"""How large adapters are and how alike, as updates of the weights, through their factors: ΔW itself is never made.

::

    ⟨ΔW_i, ΔW_j⟩ = Σ_sites tr((B_iᵀB_j)(A_jA_iᵀ))     ‖ΔW_i‖² = ⟨ΔW_i, ΔW_i⟩     cos = ⟨ΔW_i, ΔW_j⟩ / (‖ΔW_i‖ ‖ΔW_j‖)

A site that an adapter does not touch is zero there. All ranks of a site are stacked, so that N adapters cost two matrix products
a site. The result depends on ΔW alone: (A, B) and (G⁻¹A, BG) are the same adapter, and so is a permutation of the rank's rows.
A copy at another strength has cosine 1.

Its bits depend on the adapters alone as well, not on memory, threads or who computes: products are made in tiles whose shapes the
ranks decide, and what sites add to a cosine is added as whole numbers, in any order (`recycler.zoo.survey` shares sites among workers).

Two things are no part of ΔW = BA: DoRA's magnitude and a bias. A cosine compares BA; adapters with either count as near-duplicates
only where these agree as well (`same_extras`), and are alike in direction only otherwise.

Dimensions in names: R rank, D input width, O output width, S the ranks of all adapters at a site, N adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

from recycler.zoo.adapter import Adapter, Factors

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

NEAR = 0.999
"""Adapters whose cosine is above this do the same thing; independent ones stay far below."""
MEMORY = 1e9
"""Bytes that a comparison may use by default."""
_EXTRAS = 1e-3  # relative difference up to which magnitudes or biases agree
_TILE = 256  # ranks: a product of so many by so many stays in a processor's cache
_ONE = 2.0**52  # parts of cosines are added in units of 1 / _ONE; they sum up to at most 1, and fp32 products know less
_CANCELLATION = 100  # where Σ|terms| exceeds the sum by this, fp32 is not enough and the factors are made orthogonal first

Site = tuple[str, int, int]  # module path, O, D: adapters of other bases may use the same path for another shape


@dataclass(frozen=True)
class Measured:
    """What reading one adapter alone says of it.

    Attributes:
        norm: ‖ΔW‖_F, over all sites.
        shapes: module path → (O, D). ranks: R of each, in the same order.
        extras: whether it has a DoRA magnitude or a bias.
        cancelling: where the terms of its update cancel out so far that fp32 is not enough.
    """

    name: str
    norm: float
    shapes: Mapping[str, tuple[int, int]] = field(repr=False)
    ranks: tuple[int, ...] = field(repr=False)
    extras: bool
    cancelling: frozenset[str] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Similarity:
    """What a comparison found.

    Attributes:
        names: the adapters, in the order of rows and columns.
        norms: ‖ΔW‖_F of each, over all sites.
        cosine: [N, N], fp64; 1 on the diagonal, 0 throughout for an adapter whose update is zero.
        extras: those with a DoRA magnitude or a bias, whose cosine says nothing about these.
    """

    names: tuple[str, ...]
    norms: tuple[float, ...]
    cosine: Tensor = field(repr=False)
    extras: frozenset[str] = frozenset()

    @cached_property
    def _row(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.names)}

    def between(self, a: str, b: str) -> float:
        """The cosine of two adapters."""
        return float(self.cosine[self._row[a], self._row[b]])

    def nearest(self, name: str) -> tuple[str, float] | None:
        """The adapter most like this one, and the cosine; None where there is no other."""
        row = self._row[name]
        others = [column for column in range(len(self.names)) if column != row]
        if not others:
            return None
        values = self.cosine[row].tolist()
        best = max(others, key=lambda column: values[column])
        return self.names[best], values[best]

    def pairs(self, above: float = NEAR) -> list[tuple[str, str, float]]:
        """All pairs whose cosine is above a threshold, in order."""
        found = (self.cosine > above).triu(1).nonzero().tolist()
        return [(self.names[i], self.names[j], float(self.cosine[i, j])) for i, j in found]


def site_norm(factors: Factors) -> float:
    """‖BA‖_F at one site, in fp64."""
    return _norm_and_cancellation(factors)[0]


def norm(adapter: Adapter) -> float:
    """‖ΔW‖_F over all sites, in fp64."""
    return math.hypot(*(site_norm(factors) for factors in adapter.sites.values()))


def compare(adapters: Mapping[str, Adapter], names: Sequence[str] | None = None, *, memory: float = MEMORY) -> Similarity:
    """Compare adapters with each other, reading them one at a time (a `Zoo` is such a mapping).

    Args:
        names: which of them; all where None.
        memory: bytes to use, roughly; with less, adapters are read more often.
    """
    comparison = Comparison(memory)
    for name in adapters if names is None else names:
        comparison.add(adapters[name])
    return comparison.finish(adapters.__getitem__)


def near_duplicates(
    similarity: Similarity, read: Callable[[str], Adapter], threshold: float = NEAR
) -> tuple[list[tuple[str, ...]], list[tuple[str, str]]]:
    """Groups of adapters that do the same thing: cosine above `threshold`, and magnitudes and biases that agree.

    Args:
        read: gives an adapter by name; asked only for those that have a magnitude or a bias.

    Returns:
        The groups, transitive (a ≈ b and b ≈ c make one), and the pairs that agree in direction only.
    """
    leader = {name: name for name in similarity.names}

    def lead(name: str) -> str:
        while leader[name] != name:
            leader[name] = name = leader[leader[name]]
        return name

    direction_only = []
    for a, b, _ in similarity.pairs(threshold):
        if lead(a) == lead(b):
            continue
        if similarity.extras & {a, b} and not same_extras(read(a), read(b)):
            direction_only.append((a, b))
            continue
        leader[lead(b)] = lead(a)
    groups: dict[str, list[str]] = {}
    for name in similarity.names:
        groups.setdefault(lead(name), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1], direction_only


def same_extras(a: Adapter, b: Adapter) -> bool:
    """Whether two adapters of the same direction also agree in DoRA magnitude and bias, at every site, within 0.1 %.

    A bias is compared in proportion to the adapter's norm, since both grow with its strength; a magnitude as it is.
    """
    strength = norm(a) or 1.0, norm(b) or 1.0
    for path in a.sites.keys() | b.sites.keys():
        one, other = a.sites.get(path), b.sites.get(path)
        if not _agree(_part(one, "magnitude_O"), _part(other, "magnitude_O"), (1.0, 1.0)):
            return False
        if not _agree(_part(one, "bias_O"), _part(other, "bias_O"), strength):
            return False
    return True


def singular_values(factors: Factors) -> Tensor:
    """σ of BA, descending, [min(R, O, D)], fp64: from the triangles of thin QRs of both factors, so that nothing is squared."""
    import torch

    r_a = torch.linalg.qr(factors.a_RD.double().T, mode="r").R
    r_b = torch.linalg.qr(factors.b_OR.double(), mode="r").R
    values: Tensor = torch.linalg.svdvals(r_b @ r_a.T)
    return values


def robust_z(values: Sequence[float], floor: float) -> list[float]:
    """How far each value lies from the median, in units of 1.4826·MAD (a standard deviation, if most are normal).

    Args:
        floor: the least unit, above 0, so that values which agree closely do not make a trifle an outlier.
    """
    if not values:
        return []
    middle = median(values)
    unit = max(1.4826 * median(abs(value - middle) for value in values), floor)
    return [(value - middle) / unit for value in values]


@contextmanager
def one_thread() -> Iterator[int]:
    """Yields the number of threads there were. For many small products: sharing one out costs more than doing it, and many times that on a machine with other work."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def spread(work: Callable[[T], R], items: Iterable[T], most: int | None = None) -> Iterator[R]:
    """``map``, an item a thread, as many at once as torch may use or `most`, each with one thread inside: those inside a product
    wait for each other at every step, which is slow wherever other programs run too."""
    import torch

    with (
        one_thread() as threads,
        ThreadPoolExecutor(min(threads, most or threads), initializer=lambda: torch.set_num_threads(1)) as pool,
    ):
        yield from pool.map(work, items)


def measure(adapter: Adapter) -> Measured:
    """An adapter by itself."""
    with one_thread():
        found = {path: _norm_and_cancellation(factors) for path, factors in adapter.sites.items()}
    return Measured(
        name=adapter.name,
        norm=math.hypot(*(size for size, _ in found.values())),
        shapes={path: factors.shape for path, factors in adapter.sites.items()},
        ranks=tuple(factors.rank for factors in adapter.sites.values()),
        extras=any(_part(f, "magnitude_O") is not None or _part(f, "bias_O") is not None for f in adapter.sites.values()),
        cancelling=frozenset(path for path, (_, cancellation) in found.items() if cancellation > _CANCELLATION),
    )


class Comparison:
    """Cosines of adapters that are shown one at a time: `add` each, then `finish`.

    Factors are kept for as many sites as the memory allows, from the first in alphabetical order; for the others, `finish` has
    the adapters read again.

    Args:
        memory: bytes to use, roughly.
    """

    def __init__(self, memory: float = MEMORY) -> None:
        self._room, self._work = shares(memory)
        self._found: list[Measured] = []
        self._held = Held(self._room, self._work)

    def add(self, adapter: Adapter) -> Measured:
        """Show one adapter; its name must be new."""
        found = measure(adapter)
        self._held.take(len(self._found), adapter, found.norm, found.cancelling)
        self._found.append(found)
        return found

    def finish(
        self, read: Callable[[str], Adapter], progress: Callable[[int, str], Callable[..., None]] | None = None
    ) -> Similarity:
        """The result.

        Args:
            read: gives an adapter by name again; asked only where memory did not hold all sites.
            progress: given the number of sites and a word, returns what is called at each.
        """
        sums_NN = no_sums(len(self._found))
        sites = {(path, *shape) for one in self._found for path, shape in one.shapes.items()}
        step = progress(len(sites), "comparing") if progress else lambda count=1, note="": None
        while True:
            self._held.into(sums_NN, step)
            if self._held.end is None:
                break
            self._held = Held(self._room, self._work, self._held.end)
            for index, one in enumerate(self._found):
                self._held.take(index, read(one.name), one.norm, one.cancelling)
        return similarity_of(self._found, sums_NN)


def no_sums(count: int) -> Tensor:
    """[N, N], int64: cosines in units of 2⁻⁵² before anything was added. Whole numbers have one sum, in whichever order and groups
    they are added."""
    import torch

    return torch.zeros(count, count, dtype=torch.int64)


def similarity_of(found: Sequence[Measured], sums_NN: Tensor) -> Similarity:
    """What the sums over all sites say, of which those above the diagonal count."""
    import torch

    upper_NN = sums_NN.double().div_(_ONE).triu_(1).clamp_(-1, 1)
    cosine_NN = upper_NN + upper_NN.T
    cosine_NN.diagonal().copy_(torch.tensor([float(one.norm > 0) for one in found]))
    extras = frozenset(one.name for one in found if one.extras)
    return Similarity(tuple(one.name for one in found), tuple(one.norm for one in found), cosine_NN, extras)


def shares(memory: float) -> tuple[float, float]:
    """Bytes to hold factors in, and bytes to work on them with; adapters that are read need some as well."""
    return memory * 0.45, memory * 0.3


class Held:
    """The factors of all adapters at a run of sites, scaled so that each adapter has norm 1.

    Args:
        room: bytes that factors may use. work: that work on them may use on top, roughly.
        start, end: the first site, and the first that is not wanted any more; from None, to None: all.

    Attributes:
        end: as it was given, or the first site that there was no room for.
    """

    def __init__(self, room: float, work: float, start: Site | None = None, end: Site | None = None) -> None:
        self._room, self._work, self._bytes = room, work, 0.0
        self._start, self.end = start, end
        self._sites: dict[Site, list[tuple[int, Tensor, Tensor]]] = {}

    def take(self, index: int, adapter: Adapter, size: float, cancelling: Collection[str]) -> None:
        """Keep what there is room for. Where it overflows, the last sites give way, for this adapter and all before it.
        `size`, its norm, and `cancelling` are as `measure` finds them."""
        if not 0 < size < math.inf:
            return
        with one_thread():
            for path in sorted(adapter.sites):
                factors = adapter.sites[path]
                site = (path, *factors.shape)
                if (self._start is not None and site < self._start) or (self.end is not None and site >= self.end):
                    continue
                a_RD, b_RO = _unit(factors, size, path in cancelling)
                self._sites.setdefault(site, []).append((index, a_RD, b_RO))
                self._bytes += 4.0 * (a_RD.numel() + b_RO.numel())
                while self._bytes > self._room and len(self._sites) > 1:
                    self.end = max(self._sites)
                    self._bytes -= sum(4.0 * (a.numel() + b.numel()) for _, a, b in self._sites.pop(self.end))

    def into(self, sums_NN: Tensor, step: Callable[..., None] = lambda: None) -> None:
        """Add every site's part of the cosines, upper triangle; nothing is held any more then."""
        import torch

        stacks = [sum(4.0 * (a.numel() + b.numel()) for _, a, b in members) for members in self._sites.values()]
        done = spread(_site_cosines, self._sites.values(), max(int(self._work / max(stacks, default=1.0)), 1))
        for members, part_NN in zip(self._sites.values(), done, strict=True):
            index_N = torch.tensor([index for index, _, _ in members])
            sums_NN[index_N[:, None], index_N[None, :]] += part_NN
            step()
        self._sites.clear()


def _site_cosines(members: Sequence[tuple[int, Tensor, Tensor]]) -> Tensor:
    """One site's part of the cosines of its adapters in units of 1 / _ONE, upper triangle: A Aᵀ ∘ BᵀB over all ranks, summed per
    pair of adapters; in tiles, from the diagonal on."""
    import torch

    a_SD = torch.cat([a for _, a, _ in members])
    b_SO = torch.cat([b for _, _, b in members])
    ranks = torch.tensor([a.shape[0] for _, a, _ in members])
    owner_S = torch.repeat_interleave(torch.arange(len(members)), ranks)
    sums_NN = no_sums(len(members))
    ends = [0, *ranks.cumsum(0).tolist()]
    tiles: list[tuple[slice, slice]] = []  # members, and their ranks
    first = 0
    while first < len(members):
        last = first + 1
        while last < len(members) and ends[last + 1] - ends[first] <= _TILE:
            last += 1
        tiles.append((slice(first, last), slice(ends[first], ends[last])))
        first = last
    for number, (rows, row_ranks) in enumerate(tiles):
        row_owner = owner_S[row_ranks] - rows.start
        for columns, column_ranks in tiles[number:]:
            product = a_SD[row_ranks] @ a_SD[column_ranks].T
            product *= b_SO[row_ranks] @ b_SO[column_ranks].T
            by_row = product.new_zeros(rows.stop - rows.start, product.shape[1]).index_add_(0, row_owner, product)
            by_pair = product.new_zeros(columns.stop - columns.start, len(by_row))
            by_pair.index_add_(0, owner_S[column_ranks] - columns.start, by_row.T)
            sums_NN[rows, columns] = by_pair.T.double().mul_(_ONE).round_().long()
    return sums_NN


def _unit(factors: Factors, total: float, cancelling: bool) -> tuple[Tensor, Tensor]:
    """A [R, D] and Bᵀ [R, O] of ΔW / total in fp32, with the two rows of each rank equally long, so that no square overflows."""
    a_RD, b_RO = factors.a_RD.double(), factors.b_OR.double().T
    if cancelling:
        a_RD, b_RO = _orthogonal(a_RD, b_RO)
    a_R, b_R = a_RD.norm(dim=1), b_RO.norm(dim=1)
    length_R = (a_R * b_R / total).sqrt()
    scale_a = (length_R / a_R).nan_to_num(0.0, 0.0, 0.0)  # a rank without an A or a B does nothing
    scale_b = (length_R / b_R).nan_to_num(0.0, 0.0, 0.0)
    return (a_RD * scale_a[:, None]).float(), (b_RO * scale_b[:, None]).float().contiguous()


def _orthogonal(a_RD: Tensor, b_RO: Tensor) -> tuple[Tensor, Tensor]:
    """The same product from orthogonal rows, so that no two terms cancel."""
    from recycler.zoo.lowrank import thin_svd

    thin = thin_svd(a_RD, b_RO.T)
    root = thin.s_K.sqrt()[:, None]
    return root * thin.vt_KD, root * thin.u_OK.T


def _norm_and_cancellation(factors: Factors) -> tuple[float, float]:
    """‖BA‖_F, and by how much the terms of its square exceed their sum."""
    a_RD, b_OR = factors.a_RD.double(), factors.b_OR.double()
    product = (a_RD @ a_RD.T) * (b_OR.T @ b_OR)
    square, terms = float(product.sum()), float(product.abs().sum())
    if terms <= 0:
        return 0.0, 1.0
    if square <= terms * 1e-12:  # lost to rounding: the singular values lose nothing
        square = float(singular_values(factors).square().sum())
        if square <= terms * 1e-28:
            return 0.0, 1.0
    return math.sqrt(square), terms / square


def _part(factors: Factors | None, name: str) -> Any:
    return getattr(factors, name, None)


def _agree(a: Tensor | None, b: Tensor | None, strength: tuple[float, float]) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape:
        return False
    one, other = a.double() / strength[0], b.double() / strength[1]
    return float((one - other).norm()) <= _EXTRAS * float(one.norm())
