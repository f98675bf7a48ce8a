"""Who does the same: cosines of the adapters' updates ΔW, whatever their factors, in the order of a dendrogram."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from recycler.pictures import canvas
from recycler.pictures.canvas import INK, MUTED, Cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from recycler.zoo.adapter import Adapter

Progress = Callable[[int, str], Callable[..., None]]
_LEAST = 0.1  # of the scale: cosines of strangers are not blown up to look like kinship


@dataclass(frozen=True)
class Cosines:
    """Plain cosines.

    Attributes:
        adapters: names.
        values: [N, N], symmetric; 1 on the diagonal, 0 throughout for an update that is zero.
    """

    adapters: tuple[str, ...]
    values: Sequence[Sequence[float]]

    @classmethod
    def of(cls, names: Sequence[str], read: Callable[[str], Adapter], progress: Progress | None = None) -> Cosines:
        """Compares adapters, one in memory at a time (`recycler.zoo.similarity`).

        Args:
            read: gives an adapter by name; asked again where memory does not hold all factors.
        """
        from recycler.zoo.similarity import Comparison

        comparison = Comparison()
        step = progress(len(names), "reading") if progress else None
        for name in names:
            comparison.add(read(name))
            if step:
                step()
        found = comparison.finish(read, progress)
        return cls(found.names, found.cosine.tolist())

    @cached_property
    def tree(self) -> Any:
        """Average linkage of 1 − cosine, scipy's [N−1, 4]; leaves are ordered so that neighbours are alike. None for fewer than two."""
        import numpy as np
        from scipy.cluster.hierarchy import linkage
        from scipy.spatial.distance import squareform

        if len(self.adapters) < 2:
            return None
        apart = 1 - np.asarray(self.values, dtype=float)
        np.fill_diagonal(apart, 0.0)
        return linkage(squareform(apart.clip(0, 2), checks=False), "average", optimal_ordering=len(self.adapters) <= 400)

    @property
    def order(self) -> list[int]:
        """Rows in the order of the dendrogram's leaves."""
        from scipy.cluster.hierarchy import leaves_list

        return list(range(len(self.adapters))) if self.tree is None else [int(leaf) for leaf in leaves_list(self.tree)]

    def closest(self, count: int = 3) -> list[tuple[str, str, float]]:
        """The pairs most alike."""
        pairs = [(a, b, self.values[i][j]) for i, a in enumerate(self.adapters) for j, b in enumerate(self.adapters[:i])]
        return sorted(pairs, key=lambda pair: -pair[2])[:count]


def draw(data: Cosines) -> Figure:
    """The dendrogram on the left, cosines beside it. The diagonal, 1 everywhere, is left out."""
    from recycler.pictures.heat import above, extent, head, heat

    with canvas.drawing():
        order = data.order
        count = len(order)
        side = extent(count, 0.46 if count <= 16 else 0.26 if count <= 40 else 0.155)
        rows = [[float("nan") if i == j else data.values[i][j] for j in order] for i in order]
        values = [value for row in rows for value in row if value == value]
        full, low = max([_LEAST, *map(abs, values)]), min([0.0, *values])
        names = [data.adapters[i] for i in order]
        trunk = 0.0 if data.tree is None else min(max(1.2, side / 6), 1.8)
        top, left = above(names), trunk + 0.18
        made = canvas.figure(left + side + canvas.width_of(names) + 0.2, top + side + 0.2)
        head(made, "Adapters alike: cosine of their updates ΔW", full, -full if low < -full / 20 else 0.0)
        heat(canvas.axes(made, left, top, side, side), rows, full, rows=names, columns=names, right=True)
        if data.tree is not None:
            _tree(canvas.axes(made, 0.1, top, trunk, side), data.tree, count)
        return made


def _tree(place: Any, tree: Any, count: int) -> None:
    from matplotlib.collections import LineCollection
    from scipy.cluster.hierarchy import dendrogram

    found = dendrogram(tree, no_plot=True)
    # A leaf lies at 5, 15, 25, ... there, and at 0, 1, 2, ... here.
    far, first = float(tree[:, 2].max()), float(tree[:, 2].min())
    near = max(first - max((far - first) * 0.15, 1e-6), 0.0)  # leaves begin a little before the first two join
    lines = [
        [(max(x, near), (y - 5) / 10) for x, y in zip(d, i, strict=True)]
        for i, d in zip(found["icoord"], found["dcoord"], strict=True)
    ]
    place.add_collection(LineCollection(lines, colors=INK, linewidths=1.0 if count <= 60 else 0.6))
    place.set_xlim(far + (far - near) * 0.03, near)
    place.set_ylim(count - 0.5, -0.5)
    place.set_yticks([])
    place.xaxis.tick_top()
    place.set_xticks([far, first], [_cosine(1 - end) for end in (far, first)])
    for tick, side in zip(place.get_xticklabels(), ("left", "right"), strict=True):
        tick.set_horizontalalignment(side)
    place.tick_params(labelsize=canvas.SMALL, labelcolor=MUTED, length=2)
    place.set_xlabel("joined at cosine", fontsize=canvas.SMALL, color=MUTED)
    place.xaxis.set_label_position("top")
    place.spines[["left", "bottom"]].set_visible(False)
    place.spines["top"].set_visible(True)


def _cosine(value: float) -> str:
    text = f"{value:.2f}".replace("-", "−")
    return text.lstrip("−") if not text.strip("−0.") else text


def table(data: Cosines) -> list[list[Cell]]:
    """The cosines, in the order of the picture."""
    order = data.order
    rows: list[list[Cell]] = [["adapter", *(data.adapters[i] for i in order)]]
    return rows + [[data.adapters[i], *(data.values[i][j] for j in order)] for i in order]


def describe(data: Cosines) -> str:
    pairs = ", ".join(f"{a} and {b} {value:.2f}" for a, b, value in data.closest())
    return f"Dendrogram and heat map of {len(data.adapters)} adapters' cosines. " + (f"Most alike: {pairs}." if pairs else "")
