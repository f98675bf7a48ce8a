"""Scores → weights. Chosen apart from the method, so that every policy works with every router: ``-o policy=top_p -o p=0.8``.

The policies themselves, with formulas and sources, are in `recycler.routers.policies`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from recycler.routers.policies import null, shared, standardised, top_k, top_p, tsallis
from recycler.routers.protocol import Group
from recycler.zoo.errors import UsageError

Name = Literal["top_k", "top_p", "null", "tsallis"]


@dataclass(frozen=True)
class Policy:
    """How scores become weights: the fields that every method's Config shares.

    Attributes:
        policy: "top_k"; "top_p": as many as hold `p`; "null": top-k among those that reach a threshold, else the base; "tsallis":
            all where the gate is undecided, else as many as hold `p`.
        top_k: how many adapters a token keeps; none keeps all. "1,2,2,4" is one number for each part of the model, of equal depth,
            from the bottom up (MoLA; which parts want more is not settled, so that there is no default). For "tsallis" how many
            are kept at least; "top_p" does not look at it.
        temperature: scores are divided by it.
        renormalise: the kept weights sum to 1; False leaves them as the softmax over all adapters gave them, and the rest to the base.
        p: of "top_p" and "tsallis".
        threshold: of "null"; where none is given, found on the shots when the router is built (`recycler.routers.calibration`).
        quantile: of "null": the share of tokens of other tasks than the adapters' that the threshold found should leave to the base.
        q, entropy: of "tsallis".
        standardise: λ; scores get mean 0 and standard deviation λ first.
        shared: what the policy leaves to the base goes to the average of all adapters.
        ranks: rank-wise experts: of the rank-one components of the kept adapters only so many act, at each token and site.
    """

    policy: Name = "top_k"
    top_k: int | str | None = 2
    temperature: float = 1.0
    renormalise: bool = True
    p: float = 0.75
    threshold: float | None = None
    quantile: float = 0.3
    q: float = 1.1
    entropy: float = 0.9
    standardise: float | None = None
    shared: bool = False
    ranks: int | None = None

    def __post_init__(self) -> None:
        if self.policy not in get_args(Name):
            raise UsageError(f"policy={self.policy!r}.", "", f"Choose {', '.join(get_args(Name))}.", code="E_OPTION")
        if self.top_k is not None and (not (ks := _numbers(self.top_k)) or min(ks) < 1):
            raise UsageError(
                f"top_k={self.top_k}.",
                "At least one adapter must be kept.",
                "Use top_k=1 or more, one such number for each part of the model (top_k=1,2,2,4), or top_k=none for all.",
                code="E_OPTION",
            )
        if not 0 < self.temperature < math.inf:
            raise UsageError(
                f"temperature={self.temperature}.", "It divides the scores.", "Use a positive, finite number.", code="E_OPTION"
            )
        if not 0 < self.p <= 1:
            raise UsageError(
                f"p={self.p}.", "It is a share of the probability.", "Use a number above 0 and at most 1.", code="E_OPTION"
            )
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise UsageError(
                f"threshold={self.threshold}.", "Scores are compared with it.", "Use a finite number.", code="E_OPTION"
            )
        if not 0 < self.quantile < 1:
            raise UsageError(
                f"quantile={self.quantile}.", "It is a share of tokens.", "Use a number between 0 and 1.", code="E_OPTION"
            )
        if not 0 < self.q < math.inf:
            raise UsageError(
                f"q={self.q}.",
                "Probabilities are raised to it.",
                "Use a positive, finite number; 1 is Shannon's.",
                code="E_OPTION",
            )
        if not 0 <= self.entropy <= 1:
            raise UsageError(
                f"entropy={self.entropy}.",
                "It is a share of the largest entropy.",
                "Use a number from 0 to 1.",
                code="E_OPTION",
            )
        if self.standardise is not None and not 0 < self.standardise < math.inf:
            raise UsageError(
                f"standardise={self.standardise}.",
                "Scores are scaled by it.",
                "Use a positive, finite number.",
                code="E_OPTION",
            )
        if self.ranks is not None and self.ranks < 1:
            raise UsageError(
                f"ranks={self.ranks}.",
                "At least one component must act.",
                "Use ranks=1 or more, or ranks=none.",
                code="E_OPTION",
            )
        if self.shared and not self.abstains:
            raise UsageError(
                "shared=true with weights that sum to 1.",
                "The average gets what the policy leaves to the base, and that is nothing.",
                "Add renormalise=false, or policy=null.",
                code="E_OPTION",
            )

    @property
    def abstains(self) -> bool:
        """Whether weights may sum to less than 1."""
        whole = {"top_k": self.top_k is None, "top_p": self.p == 1}.get(self.policy, False)
        return self.policy == "null" or not (self.renormalise or whole)

    @property
    def calibrated(self) -> bool:
        """Whether it takes a threshold that has to be found."""
        return self.policy == "null" and self.threshold is None

    def seen(self, scores_E: Tensor) -> Tensor:
        """Scores as the policy sees them, and compares them with its threshold."""
        return scores_E if self.standardise is None else standardised(scores_E, self.standardise)

    def weights(self, scores_E: Tensor, group: Group | None = None, threshold: float | None = None) -> Tensor:
        """Scores [..., E] → weights of the same shape.

        Args:
            group: where the scores are for; None where they are for all sites.
            threshold: of "null", as it was found for this group; one that was given by hand goes first, and without any
                nothing is left to the base.

        Raises:
            UsageError: there is a number for each part of the model, and one decision for all of it.
        """
        scores_E = self.seen(scores_E)
        k = self.top_k if not isinstance(self.top_k, str) else self._at(group)
        if self.policy == "top_k":
            w_E = top_k(scores_E, k, self.temperature, self.renormalise)
        elif self.policy == "top_p":
            w_E = top_p(scores_E, self.p, self.temperature, self.renormalise)
        elif self.policy == "tsallis":
            w_E = tsallis(scores_E, self.p, self.q, self.entropy, k, self.temperature, self.renormalise)
        else:
            threshold = threshold if self.threshold is None else self.threshold
            w_E = null(scores_E, -math.inf if threshold is None else threshold, k, self.temperature, self.renormalise)
        return shared(w_E, scores_E) if self.shared else w_E

    def most(self, group: Group | None = None) -> int | None:
        """How many weights of a token are not 0 at most; None where all may be."""
        if self.shared or self.policy not in ("top_k", "null"):
            return None
        return self._at(group) if isinstance(self.top_k, str) else self.top_k

    def _at(self, group: Group | None) -> int:
        """The number for a group's part of the model."""
        if group is None:
            raise UsageError(
                f"top_k={self.top_k} with one decision for all of the model.",
                "It has no parts then.",
                "Use one number.",
                code="E_OPTION",
            )
        ks = _numbers(self.top_k)
        return ks[min(int(group.depth * len(ks)), len(ks) - 1)]


def _numbers(k: int | str | None) -> list[int]:
    """ "1,2,2,4" → [1, 2, 2, 4]; nothing where it is no such list."""
    try:
        return [int(part) for part in str(k).split(",")]
    except ValueError:
        return []
