"""Hierarchy: the gates of a linear router in clusters. A token meets the clusters' means first, and the adapters of the best few after.

At every input the rows v_e of the local router (ridge, arrow, phatgoose, …) are clustered by direction: spherical k-means, √E clusters
unless told otherwise, none above 1.25 times the mean size (those that are furthest from its middle go to their next best). A cluster's
score is that of its members' mean row, which is the mean of their scores (for |x·v|, where v and −v are the same, rows are turned to the
side of their axis first). The members of the `probe` best clusters have the local router's own scores; all others are −∞, so that
policies see them as absent. With E adapters in C clusters a token needs C + probe · 1.25 E/C rows instead of E: a quarter at 512
adapters, and the share falls as 1/√E.

With as many clusters probed as there are it is the local router, to the bit. Otherwise it loses what lies in a cluster whose mean does
not stand out: that is measured (`python benchmarks/many_tasks.py`). Adapters whose rows are alike cost little to tell from others, and
rows that share nothing (random ones) should not be clustered at all.

Few tokens look their clusters' rows up. Many are sorted by cluster into tiles of 32 that hold tokens of one cluster each, at most
⌈N·probe/32⌉ + C of them, whatever the data. In between one GEMM over all rows is quicker, and what it says of other clusters is left
out. Shapes decide, all three give the same scores, and nothing waits for the device. Scores are still written as [.., E], and policies
still look for the largest of them.

Shazeer et al. 2017, Outrageously Large Neural Networks (arXiv:1701.06538), appendix B, has two levels of gates that are learned with
the model, and multiplies their probabilities. Here the upper level is made of the lower one, as an inverted file is of its vectors
(Douze et al. 2024, The Faiss library, arXiv:2401.08281, whose nlist and nprobe these are), and does not touch its scores.

Dimensions in names: N token, D input width, E adapter, C cluster, M member of a cluster, K cluster that is probed, S site of a group,
P (token, cluster) pair, Q tile.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recycler.routers import columns
from recycler.routers.base import Gate
from recycler.routers.discovery import find, make_config
from recycler.routers.linear import LinearGate, LinearRouter, Rows
from recycler.routers.protocol import Group, Model, Profile
from recycler.routers.select import Policy
from recycler.zoo.errors import InputError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

_TILE = 32  # tokens of one cluster that are multiplied together
# What a row costs that is looked up, and a row of a tile, in rows of one large GEMM.
_LOOKED_UP, _TILED = 3, 150
_LARGEST = 1.25  # cluster, in mean ones: all are padded to it


@dataclass(frozen=True)
class HierarchyConfig(Policy):
    """
    Attributes:
        local: the linear router whose gates are clustered. local_options: its own options, as "sharpness=8,rounds=2".
        clusters: at each input; √E where None, rounded.
        probe: clusters that a token looks into.
    """

    local: str = "ridge"
    local_options: str = ""
    clusters: int | None = None
    probe: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clusters", "probe"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value}.", "It is a count.", f"Use {name}=1 or more.", code="E_OPTION")

    def local_config(self) -> tuple[type[LinearRouter], Any]:
        """The local router's class, and its Config.

        Raises:
            UsageError: its scores are not linear.
        """
        cls = find(self.local)
        if not issubclass(cls, LinearRouter) or issubclass(cls, Hierarchy):
            raise UsageError(
                f"local={self.local}.",
                "It has no row of numbers for each adapter that could be clustered.",
                "Use local=ridge, arrow, phatgoose or average_activation.",
                code="E_OPTION",
            )
        pairs = [part.partition("=") for part in self.local_options.split(",") if part]
        return cls, make_config(cls, {key.strip(): value.strip() for key, _, value in pairs})


class Hierarchy(LinearRouter):
    """score = the local router's in the best clusters, −∞ elsewhere"""

    Config = HierarchyConfig
    needs = frozenset({"shots", "scores"})
    paper = "after Shazeer et al. 2017, hierarchical mixtures (arXiv:1701.06538)"

    def __init__(self, adapters: Sequence[str], config: Any, rows: Mapping[str, Rows] | None = None) -> None:
        super().__init__(adapters, config, rows)
        cls, _ = config.local_config()
        self.normalise, self.absolute = cls.normalise, cls.absolute
        self.clusters: dict[str, Tensor] = {}  # site → the cluster of each adapter [E]; −1 where it is absent

    @classmethod
    def needed(cls, config: HierarchyConfig) -> frozenset[str]:
        local, settings = config.local_config()
        return local.needed(settings)

    @classmethod
    def fit(cls, model: Model, profile: Profile | None, config: HierarchyConfig) -> Self:
        local, settings = config.local_config()
        fitted = local.fit(model, profile, settings)
        return cls.of(fitted, config)

    @classmethod
    def of(cls, local: LinearRouter, config: HierarchyConfig) -> Self:
        """A fitted linear router's gates in clusters."""
        router = cls(local.adapters, config, local.rows)
        for site, rows in router.rows.items():
            router.clusters[site] = clustered(rows, config.clusters, router.absolute, local.adapters)
        sizes = [torch.bincount(label_E[label_E >= 0]) for label_E in router.clusters.values()]
        router.report = {
            "local": {"config": dataclasses.asdict(local.config), "report": local.report},
            "clusters": statistics.median(len(size_C) for size_C in sizes),
            "largest": max(int(size_C.max()) for size_C in sizes),
        }
        return router

    # -- running

    def gate(self, group: Group) -> Gate | None:
        flat = super().gate(group)
        return None if flat is None else self._gate([site for site in group.sites if site in self.rows])

    def score(self, group: Group, site: str, x_BTD: Tensor, plan: Any = None) -> Tensor:
        return self._gate([site if site in self.rows else group.sites[0]]).to(x_BTD.device)(x_BTD)[..., 0, :]

    def _gate(self, sites: Sequence[str]) -> Gate:
        rows = [self.rows[site] for site in sites]
        if all(int(self.clusters[site].max()) < self.config.probe for site in sites):  # all of them
            return LinearGate(rows, self.normalise, self.absolute)
        labels = [self.clusters[site] for site in sites]
        return ClusterGate(rows, labels, self.config.probe, self.normalise, self.absolute)

    # -- later changes, saving

    def without(self, name: str) -> Self:
        """A router without one adapter: it leaves its clusters, and the others stay where they are."""
        keep = columns.rest(self, name)
        router = columns.without(self, name)
        router.clusters = {site: _renumbered(self.clusters[site][keep]) for site in router.rows}
        return router

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {f"{site}.cluster": label_E for site, label_E in self.clusters.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_tensors(tensors)
        self.clusters = {site: tensors[f"{site}.cluster"] for site in self.rows}
        if any(label_E.shape != (len(self.adapters),) for label_E in self.clusters.values()):
            raise InputError("Not every adapter has its cluster.", "", "Build the router again.", code="E_ROUTER")


def clustered(rows: Rows, count: int | None, absolute: bool, names: Sequence[str]) -> Tensor:
    """The cluster of each adapter [E], from 0; −1 where it is absent. By direction, offsets included; what comes of it does not
    depend on how the adapters are numbered.

    Args:
        absolute: v and −v are the same gate.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    offset_E = torch.zeros(len(rows.v_ED)) if rows.offset_E is None else rows.offset_E.float()
    here = [e for e in sorted(range(len(names)), key=names.__getitem__) if float(offset_E[e]) > -math.inf]
    label_E = torch.full((len(names),), -1)
    if not here:
        return label_E
    unit_ED = nn.functional.normalize(torch.cat([rows.v_ED.float(), offset_E[:, None]], 1)[here], dim=1)
    wanted = min(round(math.sqrt(len(names))) if count is None else count, len(here))
    if absolute:
        axis_CD = _apart(unit_ED, wanted)
        cosine_EC = unit_ED @ axis_CD.T
        nearest_E1 = cosine_EC.abs().argmax(1, keepdim=True)
        unit_ED = torch.where(cosine_EC.gather(1, nearest_E1) < 0, -unit_ED, unit_ED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than clusters
        start: Any = axis_CD.numpy() if absolute else "k-means++"
        found = KMeans(wanted, init=start, n_init=1, max_iter=30, random_state=0).fit(unit_ED.numpy())
    middle_CD = nn.functional.normalize(torch.from_numpy(found.cluster_centers_), dim=1)
    label_E[here] = _seated(unit_ED @ middle_CD.T, math.ceil(_LARGEST * len(here) / wanted))
    return _renumbered(label_E)


def _seated(close_EC: Tensor, most: int) -> Tensor:
    """The closest cluster of each adapter [E] that has room: the closest go first, the others to their next best."""
    label_E = torch.full((len(close_EC),), -1)
    room_C = torch.full((close_EC.shape[1],), most)
    while (left := (label_E < 0).nonzero()[:, 0]).numel():
        found, choice = close_EC[left].masked_fill(room_C == 0, -math.inf).max(1)
        for c in choice.unique().tolist():
            asking = (choice == c).nonzero()[:, 0]
            taken = asking[found[asking].argsort(descending=True, stable=True)][: int(room_C[c])]
            label_E[left[taken]] = c
            room_C[c] -= len(taken)
    return label_E


def _apart(unit_ED: Tensor, count: int) -> Tensor:
    """Rows [C, D] whose axes are far from each other's: each is the one furthest from all before it."""
    chosen, closest_E = [0], torch.zeros(len(unit_ED))
    while len(chosen) < count:
        closest_E = closest_E.maximum((unit_ED @ unit_ED[chosen[-1]]).abs())
        closest_E[chosen[-1]] = math.inf
        chosen.append(int(closest_E.argmin()))
    return unit_ED[chosen]


def _signs(unit_ED: Tensor) -> Tensor:
    """±1 [E, 1], so that rows of about one axis lie on one side of it; by power iteration."""
    axis_D = unit_ED[0]
    for _ in range(16):
        axis_D = nn.functional.normalize(unit_ED.T @ (unit_ED @ axis_D), dim=0)
    return torch.where(unit_ED @ axis_D < 0, -1.0, 1.0)[:, None]


def _renumbered(label_E: Tensor) -> Tensor:
    """Without the clusters that nobody is in any more."""
    known = sorted({label for label in label_E.tolist() if label >= 0})
    return torch.tensor([known.index(label) if label >= 0 else -1 for label in label_E.tolist()])


class ClusterGate(Gate):
    """Scores of one group [.., S or 1, E]: −∞ but in each token's best clusters."""

    def __init__(self, rows: Sequence[Rows], labels: Sequence[Tensor], probe: int, normalise: bool, absolute: bool) -> None:
        super().__init__()
        self.normalise, self.absolute, self.probe, self.count = normalise, absolute, probe, len(labels[0])
        self.sites = len(rows)
        for s, (held, label_E) in enumerate(zip(rows, labels, strict=True)):
            for name, tensor in _layout(held, label_E, absolute).items():
                self.register_buffer(f"{name}_{s}", tensor, persistent=False)

    def forward(self, x_BTD: Tensor, plan: Any = None) -> Tensor:
        x_BTD = x_BTD.float()
        if self.normalise:
            x_BTD = nn.functional.layer_norm(x_BTD, x_BTD.shape[-1:])
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        scores_NSE = torch.stack([self._site(s, x_ND) for s in range(self.sites)], 1)
        return scores_NSE.view(*x_BTD.shape[:-1], self.sites, self.count)

    def _site(self, s: int, x_ND: Tensor) -> Tensor:
        """[N, E]"""
        middle_CD, bias_C, member_CM, v_ED, offset_E, label_E = (
            self.get_buffer(f"{name}_{s}") for name in ("middle", "bias", "member", "v", "offset", "label")
        )
        near_NC = x_ND @ middle_CD.T
        near_NC = (near_NC.abs() if self.absolute else near_NC) + bias_C
        best_NK = near_NC.topk(min(self.probe, len(middle_CD)), sorted=False).indices
        (n, k), (c, m) = best_NK.shape, member_CM.shape
        tiles = _tiles(n * k, c)
        if _LOOKED_UP * n * k * m > self.count and _TILED * tiles * m > n * self.count:
            scores_NE = x_ND @ v_ED.T
            scores_NE = (scores_NE.abs() if self.absolute else scores_NE) + offset_E
            known_NC = torch.zeros(n, c + 1, dtype=torch.bool, device=x_ND.device).scatter_(1, best_NK, True)
            return torch.where(known_NC.index_select(1, label_E), scores_NE, -math.inf)
        row_CM = member_CM.clamp(max=self.count - 1)  # whatever stands for nobody is written nowhere
        way = _looked_up if _LOOKED_UP * n * k * m <= self.count else _tiled
        scores_NKM = way(x_ND, v_ED, row_CM, best_NK)
        scores_NKM = (scores_NKM.abs() if self.absolute else scores_NKM) + offset_E[row_CM[best_NK]]
        scores_NE = x_ND.new_full((n, self.count + 1), -math.inf)  # the last column is nobody's
        return scores_NE.scatter_(1, member_CM[best_NK].flatten(1), scores_NKM.flatten(1))[:, :-1]


def _layout(rows: Rows, label_E: Tensor, absolute: bool) -> dict[str, Tensor]:
    """Rows, offsets and clusters (C where absent) of adapters; of clusters who they are, padded to the largest (E is nobody), and
    their members' mean row and offset."""
    count, (adapters, width) = int(label_E.max()) + 1, rows.v_ED.shape
    v_ED = rows.v_ED.float()
    offset_E = torch.zeros(adapters) if rows.offset_E is None else rows.offset_E.float()
    members = [(label_E == c).nonzero()[:, 0] for c in range(count)]
    member_CM = torch.full((count, max(map(len, members))), adapters)
    middle_CD, bias_C = torch.zeros(count, width), torch.zeros(count)
    for c, of in enumerate(members):
        member_CM[c, : len(of)] = of
        middle_CD[c] = (v_ED[of] * _signs(v_ED[of]) if absolute else v_ED[of]).mean(0)
        bias_C[c] = offset_E[of].mean()
    label_E = label_E.masked_fill(label_E < 0, count)
    return {"middle": middle_CD, "bias": bias_C, "member": member_CM, "v": v_ED, "offset": offset_E, "label": label_E}


def _looked_up(x_ND: Tensor, v_ED: Tensor, row_CM: Tensor, best_NK: Tensor) -> Tensor:
    """x·v of the members of each token's clusters [N, K, M]: for few tokens."""
    v_NLD = v_ED[row_CM[best_NK].flatten(1)]  # L: K × M
    return torch.bmm(v_NLD, x_ND[:, :, None])[..., 0].view(*best_NK.shape, -1)


def _tiles(pairs: int, clusters: int) -> int:
    """How many tiles hold any so many pairs."""
    return -(-pairs // _TILE) + min(clusters, pairs)


def _tiled(x_ND: Tensor, v_ED: Tensor, row_CM: Tensor, best_NK: Tensor) -> Tensor:
    """The same for many tokens: those of one cluster side by side, in tiles that hold nobody else's, one GEMM a tile."""
    (n, k), (c, m), d = best_NK.shape, row_CM.shape, x_ND.shape[1]
    cluster_P = best_NK.flatten()
    order_P = cluster_P.argsort()
    sorted_P = cluster_P[order_P]
    pairs_C = torch.zeros(c, dtype=torch.long, device=x_ND.device).scatter_add_(0, cluster_P, torch.ones_like(cluster_P))
    tiles_C = (pairs_C + (_TILE - 1)) // _TILE
    end_C = tiles_C.cumsum(0)
    # A pair's place: the first of its cluster's tiles, and how many of the cluster stand before it.
    before_C = (end_C - tiles_C) * _TILE - (pairs_C.cumsum(0) - pairs_C)
    place_P = before_C[sorted_P] + torch.arange(n * k, device=x_ND.device)
    tiles = _tiles(n * k, c)
    x_QD = x_ND.new_zeros(tiles * _TILE, d).index_copy_(0, place_P, x_ND[order_P // k])
    owner_Q = torch.searchsorted(end_C, torch.arange(tiles, device=x_ND.device), right=True).clamp_(max=c - 1)
    scores_QM = torch.bmm(x_QD.view(tiles, _TILE, d), v_ED[row_CM[owner_Q]].transpose(1, 2)).flatten(0, 1)
    return x_ND.new_empty(n * k, m).index_copy_(0, order_P, scores_QM[place_P]).view(n, k, m)
