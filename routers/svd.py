"""One adapter that is the weighted sum of all, cut to a rank: the best one of that rank, with its error in the report.

M = Σ_e w_e ΔW_e is never formed: QR of the stacked factors A (Σr × D) and B (O × Σr), SVD of the Σr × Σr core, of which the first k
singular values are kept, in O((D + O)(Σr)²). k is the option ``rank``, or the least with Σσ² ≥ energy · ‖M‖²; without either 99 % of
the energy. Where M has no higher rank than an adapter it is then kept whole. (PEFT cuts to the adapters' highest rank by default,
which costs much: see `merging.RANK`.) DoRA's scale of the base's output and biases are kept whole; the error is relative to all of the
update.

PEFT's ``add_weighted_adapter(..., "svd")`` is the same for plain LoRA, by a full SVD of the dense M; earlier versions apply the
scaling twice.
"""

from __future__ import annotations

from recycler.routers.merging import Merge, Place, ShortConfig, Update, cut, linear


class Svd(Merge):
    """ΔW = the best approximation of Σ w ΔW_e of the rank."""

    Config = ShortConfig
    paper = "Mangrulkar et al., PEFT (add_weighted_adapter, svd); Eckart and Young 1936"

    @classmethod
    def merge(cls, place: Place, config: ShortConfig) -> tuple[Update | None, float, float]:
        whole = linear(place.parts)
        shorter, lost = cut(whole, *config.dials(place))
        return shorter, lost, whole.norm(place.weight)
