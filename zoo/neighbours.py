"""Who is like whom in a zoo of any size: by sketches first, and what they find is compared exactly.

Sketches of 100,000 adapters lie in one matrix of 256 columns, which FAISS searches in a fraction of a second; no adapter is read but those
that are named in the end. `recycler.zoo.similarity` is the exact comparison, of all pairs.

Dimensions in names: K the sketch, N adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recycler.zoo.adapter import Adapter
from recycler.zoo.errors import InputError, RecycleError, UsageError
from recycler.zoo.sketches import WIDTH, Progress, sketch, sketches_of, unit

if TYPE_CHECKING:
    import numpy as np

    from recycler.zoo.store import Zoo

_EXACT = 500  # adapters up to which clusters are found on exact cosines
_FLAT = 20_000  # adapters up to which every sketch is compared with every other
_RECHECK = 2  # candidates that are compared exactly, for each one that is wanted


@dataclass(frozen=True)
class Alike:
    """An adapter that is like another one.

    Attributes:
        estimate: the cosine by sketches. cosine: the exact one; None where it was not asked for, or its files cannot be read.
    """

    name: str
    estimate: float
    cosine: float | None = None


@dataclass(frozen=True)
class Cluster:
    """Adapters that are more like one another than like the rest.

    Attributes:
        centre: the adapter nearest to their mean. names: all of them, the nearest first.
        cosine: the mean cosine of two of them; 1 where there is one.
    """

    centre: str
    names: tuple[str, ...]
    cosine: float


def alike(
    zoo: Zoo,
    to: str | Adapter,
    limit: int = 10,
    among: Iterable[str] | None = None,
    *,
    exact: bool = True,
    progress: Progress | None = None,
) -> list[Alike]:
    """The adapters of a zoo that are most like one, by the cosine of whole updates.

    Args:
        to: one of the zoo's, by name, which is then left out; or one that was read elsewhere.
        among: only these.
        exact: read the best candidates, and order them by their exact cosines. Without, nothing but sketches is read.

    Raises:
        UnknownAdapterError, InputError: it is not there, or cannot be read.
    """
    import faiss
    import numpy as np

    wanted = None if among is None else list(among)
    if isinstance(to, str):
        own_NK = sketches_of(zoo, [to])[1]
        unit_K = own_NK[0] if len(own_NK) else unit(sketch(zoo[to]))  # the second says why it cannot be read
    else:
        unit_K = unit(sketch(to))
    names, unit_NK = sketches_of(zoo, wanted, progress)
    if not names or limit < 1:
        return []
    most = min(limit * _RECHECK + 1, len(names))  # one more, as an adapter is most like itself
    estimate_1N, row_1N = faiss.knn(unit_K.astype(np.float32)[None], unit_NK, most, metric=faiss.METRIC_INNER_PRODUCT)
    near = [(names[row], float(value)) for row, value in zip(row_1N[0], estimate_1N[0], strict=True)]
    near = [(name, value) for name, value in near if name != to][: limit * _RECHECK]
    if not exact:
        return [Alike(name, value) for name, value in near[:limit]]
    adapter = zoo[to] if isinstance(to, str) else to
    confirmed = [Alike(name, value, _exactly(zoo, adapter, name)) for name, value in near]
    return sorted(confirmed, key=lambda one: (-(one.estimate if one.cosine is None else one.cosine), one.name))[:limit]


def copies(
    zoo: Zoo, threshold: float, estimate: float | None = None, progress: Progress | None = None
) -> list[tuple[str, str, float]]:
    """Pairs whose exact cosine is above a threshold, out of those whose estimate is above another; without comparing all pairs of
    updates.

    Args:
        estimate: by default a margin below `threshold` that near-copies do not miss.
    """
    import faiss
    import numpy as np

    names, unit_NK = sketches_of(zoo, None, progress)
    if len(names) < 2:
        return []
    index: Any
    if len(names) > _FLAT:  # cells of like vectors, of which each looks into its own and some beside
        cells = 4 * int(len(names) ** 0.5)
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(WIDTH), WIDTH, cells, faiss.METRIC_INNER_PRODUCT)
        index.train(unit_NK[:: max(len(names) // (40 * cells), 1)])
        index.nprobe = 16
    else:
        index = faiss.IndexFlatIP(WIDTH)
    index.add(unit_NK)
    margin = max(1 - 2 * (1 - threshold) - 0.002, 0.0) if estimate is None else estimate
    pairs: set[tuple[int, int]] = set()
    step = (progress or (lambda steps, what: lambda count=1, note="": None))(len(names), "searching")
    for first in range(0, len(names), 1024):
        block = unit_NK[first : first + 1024]
        ends, _, columns = index.range_search(block, margin)
        rows = first + np.repeat(np.arange(len(block)), np.diff(ends).astype(np.intp))
        pairs |= {(int(a), int(b)) for a, b in zip(rows, columns, strict=True) if a < b}
        step(len(block))
    found = []
    read: dict[int, Adapter] = {}
    for a, b in sorted(pairs):
        if a not in read:
            read = {a: zoo[names[a]]}  # pairs come by their first
        if (value := _exactly(zoo, read[a], names[b])) is not None and value > threshold:
            found.append((names[a], names[b], value))
    return found


def clusters(
    zoo: Zoo, count: int, names: Iterable[str] | None = None, *, seed: int = 0, progress: Progress | None = None
) -> list[Cluster]:
    """Adapters in groups by direction: k-means on unit vectors whose inner products are the cosines of whole updates. Up to some
    hundred adapters these cosines are exact; beyond, the vectors are sketches.

    After "Towards Modular LLMs by Building and Reusing a Library of LoRAs" (arXiv 2405.11157), which clusters the factors
    themselves; those are not unique, and two trainings from different starts would never meet.

    Raises:
        UsageError: `count` is below 1, or above the number of adapters.
    """
    import numpy as np
    from sklearn.cluster import KMeans, MiniBatchKMeans

    wanted = list(zoo) if names is None else list(dict.fromkeys(names))
    if not 1 <= count <= len(wanted):
        raise UsageError(
            f"{count} clusters of {len(wanted)} adapters.", "", f"Use --count 1 to {max(len(wanted), 1)}.", code="E_OPTION"
        )
    if len(wanted) <= _EXACT:
        wanted, unit_NK = _embedded(zoo, wanted, progress)
    else:
        wanted, unit_NK = sketches_of(zoo, wanted, progress)
    if len(wanted) < count:
        raise InputError(
            f"Only {len(wanted)} adapters can be read.", "", "See what is wrong: recycle zoo verify", code="E_FILES"
        )
    kind = KMeans if len(wanted) <= 5000 else MiniBatchKMeans
    labels_N = kind(count, n_init=4, random_state=seed).fit_predict(unit_NK)
    groups = []
    for label in range(count):
        rows = np.flatnonzero(labels_N == label)
        if not len(rows):
            continue
        mean_K = unit_NK[rows].mean(0)
        near = unit_NK[rows] @ mean_K
        ordered = [wanted[row] for row in rows[np.argsort(-near, kind="stable")]]
        size = len(rows)
        pairs = (size * float(mean_K @ mean_K) - 1) / (size - 1) if size > 1 else 1.0  # ‖Σ‖² is all pairs, each with itself too
        groups.append(Cluster(ordered[0], tuple(ordered), pairs))
    return sorted(groups, key=lambda group: (-len(group.names), group.centre))


def _embedded(zoo: Zoo, names: Sequence[str], progress: Progress | None) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Rows whose inner products are the exact cosines: from the eigenvectors of their matrix."""
    import numpy as np

    from recycler.zoo.similarity import compare

    step = (progress or (lambda steps, what: lambda count=1, note="": None))(len(names), "reading")
    here = []
    for name in names:
        try:
            zoo[name]
            here.append(name)
        except (RecycleError, OSError):
            pass
        step()
    values_N, vectors_NN = np.linalg.eigh(compare(zoo, here).cosine.numpy())
    return here, vectors_NN * np.sqrt(np.clip(values_N, 0, None))


def _exactly(zoo: Zoo, adapter: Adapter, name: str) -> float | None:
    """The exact cosine; None where the other cannot be read."""
    from dataclasses import replace

    from recycler.zoo.similarity import Comparison

    try:
        other = replace(zoo[name], name="b")
    except (RecycleError, OSError):
        return None
    comparison = Comparison()
    pair = {"a": replace(adapter, name="a"), "b": other}
    for one in pair.values():
        comparison.add(one)
    return comparison.finish(pair.__getitem__).between("a", "b")
