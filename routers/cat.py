"""One adapter that is the weighted sum of all: factors stacked, ΔW = Σ_e w_e ΔW_e exactly, of rank Σ_e r_e.

At a linear A = [A_1; …; A_E] (Σr × D) and B = [w_1 B_1, …, w_E B_E] (O × Σr), with scalings in B; a linear is in it where an adapter
touches it. It gives the same answers as `average`, as one PEFT adapter that any server loads.

PEFT's ``add_weighted_adapter(..., "cat")`` is the same for plain LoRA. It takes ``use_rslora`` and ``use_dora`` over from the first
adapter, so that the result of rsLoRA adapters is √Σr too large, and it leaves magnitudes and biases out.
"""

from __future__ import annotations

from recycler.routers.merging import Merge, MergeConfig, Place, Update, linear


class Cat(Merge):
    """ΔW = Σ w ΔW_e, exact, rank Σ r."""

    paper = "Mangrulkar et al., PEFT (add_weighted_adapter, cat)"

    @classmethod
    def merge(cls, place: Place, config: MergeConfig) -> tuple[Update | None, float, float]:
        return linear(place.parts), 0.0, 0.0
