"""SpectR: how much of a token lies in the subspace that an adapter reads. No data, no gradients.

Exact thin SVD ΔW = U Σ Vᵀ (V [D, r] orthonormal) per adapter and site. Scores of a token x at a site:

- "subspace", as published: ‖Vᵀx‖, the length of x's projection on the row space of ΔW. It grows with the rank.
- "rank": ‖Vᵀx‖/√r, which takes that out.
- "energy": ‖Σ Vᵀx‖/‖ΔW‖_F = ‖ΔW x‖/‖ΔW‖_F, which counts a direction as much as the adapter uses it.

Where Arrow looks at the first right singular vector alone, this looks at all of them: with σ₁ ≈ σ₂ the first is anybody's guess.

SpectR (COLM 2025; llm_merging/merging/SpectR.py) keeps the 4 highest and weighs them equally (``-o top_k=4 -o equal=true``). Here
the default is the softmax of the two highest. On twelve real adapters of ranks 2 to 16 and three shots of each task its mean NLL is
2.01, the published weights' 2.26 (exact match of these 36 rows does not tell them apart); that of "rank" is 2.48, of "energy" 2.23,
of random gates 1.95, of uniform 1.49.
Differences from released code: the SVD is exact (there: randomised, 50 iterations) and V stays fp32 (there: bf16); the scaling is each
adapter's own (there: 2 for all); updates are mixed after the factors, Σ w BAx, where it mixes A* = Vᵀ and B* = UΣ apart, whose
cross terms join bases that have nothing to do with each other. LAG (arXiv:2507.05346) is ``-o shortlist=K -o top_k=1``: of Arrow's
K best the one with the highest score.

Shapes: one GEMM with V of all adapters and sites of a group, z [.., R]; squares, weighted, summed by adapter in another, [.., N].
DoRA's magnitudes are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from recycler.routers import columns
from recycler.routers.base import Gate, Router
from recycler.routers.protocol import Group, Model, Profile
from recycler.routers.select import Policy
from recycler.zoo.errors import InputError, UsageError
from recycler.zoo.lowrank import ROUNDING, thin_svd

if TYPE_CHECKING:
    from typing_extensions import Self

    from recycler.zoo.adapter import Factors

Score = Literal["subspace", "rank", "energy"]


@dataclass(frozen=True)
class SpectrConfig(Policy):
    """
    Attributes:
        score: "subspace", "rank" or "energy"; see above.
        equal: the adapters that are kept weigh the same, as published; False weighs them by the softmax of their scores.
        shortlist: score only the so many adapters whose first right singular vector is closest (LAG); all when None.
    """

    score: Score = "subspace"
    equal: bool = False
    shortlist: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shortlist is not None and self.shortlist < 1:
            raise UsageError(
                f"shortlist={self.shortlist}.", "It is a count.", "Use 1 or more, or none for all.", code="E_OPTION"
            )
        if self.equal and self.shared:
            raise UsageError(
                "equal=true with shared=true.",
                "The average keeps all adapters, and all would weigh the same.",
                "",
                code="E_OPTION",
            )

    def weights(self, scores_E: Tensor, group: Group | None = None, threshold: float | None = None) -> Tensor:
        weights_E = super().weights(scores_E, group, threshold)
        if not self.equal:
            return weights_E
        kept_E = (weights_E > 0).to(weights_E.dtype)
        return kept_E * (weights_E.sum(-1, keepdim=True) / kept_E.sum(-1, keepdim=True).clamp(min=1))


@dataclass
class Spectra:
    """What is known of one site.

    Attributes:
        v_RD: right singular vectors of all adapters, each adapter's together, its first one first.
        scale_R: what each counts in the norm.
        rank_E: how many rows are whose; 0 where an adapter is absent.
    """

    v_RD: Tensor
    scale_R: Tensor
    rank_E: Tensor

    def __add__(self, other: Spectra) -> Spectra:
        pairs = zip((self.v_RD, self.scale_R, self.rank_E), (other.v_RD, other.scale_R, other.rank_E), strict=True)
        return Spectra(*(torch.cat(pair) for pair in pairs))

    def keep(self, numbers: Sequence[int]) -> Spectra:
        ranks = self.rank_E.tolist()
        parts = list(zip(self.v_RD.split(ranks), self.scale_R.split(ranks), strict=True))
        return Spectra(
            torch.cat([parts[e][0] for e in numbers]), torch.cat([parts[e][1] for e in numbers]), self.rank_E[list(numbers)]
        )


class Spectr(Router):
    """score = ‖Vᵀx‖, x as it is. Adapters absent at a site are −∞ there: the score comes from their own factors."""

    Config = SpectrConfig
    paper = "Fleshman and Van Durme 2025 (arXiv:2504.03454)"

    def __init__(self, adapters: Sequence[str], config: Any, spectra: Mapping[str, Spectra] | None = None) -> None:
        super().__init__(adapters, config)
        self.spectra = dict(spectra or {})

    @classmethod
    def fit(cls, model: Model, profile: Profile | None, config: SpectrConfig) -> Self:
        spectra = {}
        step = model.progress(len(model.groups), "spectra")
        for group in model.groups:
            for site in group.sites:
                held = model.factors(site)
                spectra[site] = _stacked([held.get(name) for name in model.adapters], group.width, config.score)
            step()
        return cls(model.adapters, config, spectra)

    def extended(self, model: Model, profile: Profile | None, name: str) -> Self:
        columns.require_next(self, model, name)
        spectra = {}
        for group in model.groups:
            nobody = _stacked([None] * len(self.adapters), group.width, self.config.score)
            for site in group.sites:
                new = _stacked([model.factors(site).get(name)], group.width, self.config.score)
                spectra[site] = self.spectra.get(site, nobody) + new
        return columns.keeping(self, type(self)(model.adapters, self.config, spectra))

    def without(self, name: str) -> Self:
        keep = columns.rest(self, name)
        spectra = {site: one.keep(keep) for site, one in self.spectra.items()}
        touched = {site: one for site, one in spectra.items() if one.rank_E.any()}
        return columns.keeping(self, type(self)([self.adapters[e] for e in keep], self.config, touched))

    def gate(self, group: Group) -> Gate:
        missing = [site for site in group.sites if site not in self.spectra]
        if missing:
            raise InputError(
                f"The router has no gate for {', '.join(missing)}.",
                "It was built for other adapters or for another base.",
                "Build it again for this zoo.",
                code="E_ROUTER",
            )
        return _Norms([self.spectra[site] for site in group.sites], self.config.shortlist)

    def score(self, group: Group, site: str, x_BTD: Tensor, plan: Any = None) -> Tensor:
        return _Norms([self.spectra[site]], self.config.shortlist).to(x_BTD.device)(x_BTD)[..., 0, :]

    def tensors(self) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for site, one in self.spectra.items():
            stored |= {f"{site}.basis": one.v_RD, f"{site}.scale": one.scale_R, f"{site}.rank": one.rank_E}
        return stored

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        sites = [key.removesuffix(".basis") for key in tensors if key.endswith(".basis")]
        self.spectra = {site: Spectra(*(tensors[f"{site}.{part}"] for part in ("basis", "scale", "rank"))) for site in sites}
        wrong = [
            s
            for s, one in self.spectra.items()
            if one.rank_E.shape != (len(self.adapters),) or one.rank_E.sum() != len(one.v_RD)
        ]
        if wrong:
            raise InputError(
                f"The bases at {wrong[0]} are not those of its adapters.", "", "Build the router again.", code="E_ROUTER"
            )


def _stacked(held: Sequence[Factors | None], width: int, score: Score) -> Spectra:
    """The spectra of adapters at one site, in their order."""
    whole = Spectra(torch.zeros(0, width), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    for factors in held:
        v_RD, scale_R = (whole.v_RD[:0], whole.scale_R[:0]) if factors is None else _spectrum(factors, score)
        whole = whole + Spectra(v_RD, scale_R, torch.tensor([len(v_RD)]))
    return whole


def _spectrum(factors: Factors, score: Score) -> tuple[Tensor, Tensor]:
    """Right singular vectors [R, D] and what each counts in the norm [R]. Directions that are rounding are left out; an update
    that is zero keeps one, which counts nothing."""
    thin = thin_svd(factors.a_RD, factors.b_OR)
    rank = max(int((thin.s_K > ROUNDING * thin.s_K[0]).sum()), 1)
    s_R = thin.s_K[:rank]
    counts = {"subspace": torch.ones_like(s_R), "rank": torch.full_like(s_R, rank**-0.5), "energy": s_R / s_R.norm()}
    scale_R = counts[score] if s_R[0] else torch.zeros_like(s_R)
    return thin.vt_KD[:rank].float().contiguous(), scale_R.float()


class _Norms(Gate):
    """Scores of one group, [.., S, E]."""

    v_RD: Tensor
    square_RN: Tensor
    offset_N: Tensor
    first_N: Tensor

    def __init__(self, spectra: Sequence[Spectra], shortlist: int | None) -> None:
        super().__init__()
        self.shortlist, self.shape = shortlist, (len(spectra), len(spectra[0].rank_E))
        rank_N = torch.cat([one.rank_E for one in spectra])
        scale_R = torch.cat([one.scale_R for one in spectra])
        owner_R = torch.repeat_interleave(torch.arange(len(rank_N)), rank_N)
        self.register_buffer("v_RD", torch.cat([one.v_RD for one in spectra]), persistent=False)
        # Sums by adapter as a second GEMM: unlike scattered additions its result is the same every time, on every device.
        square_RN = torch.nn.functional.one_hot(owner_R, len(rank_N)) * scale_R.square()[:, None]
        self.register_buffer("square_RN", square_RN, persistent=False)
        self.register_buffer("offset_N", torch.zeros(len(rank_N)).masked_fill(rank_N == 0, float("-inf")), persistent=False)
        first_N = (rank_N.cumsum(0) - rank_N).clamp(max=len(owner_R) - 1)
        self.register_buffer("first_N", first_N, persistent=False)

    def forward(self, x_BTD: Tensor, plan: Any = None) -> Tensor:
        z_R = torch.nn.functional.linear(x_BTD.float(), self.v_RD)
        scores = ((z_R.square() @ self.square_RN).sqrt() + self.offset_N).view(*x_BTD.shape[:-1], *self.shape)
        if self.shortlist is not None and self.shortlist < self.shape[1]:
            arrow = (z_R[..., self.first_N].abs() + self.offset_N).view_as(scores)
            last = arrow.topk(self.shortlist, dim=-1).values[..., -1:]
            scores = scores.masked_fill(arrow < last, float("-inf"))
        return scores
