"""What may enter a zoo beside what can be read: licences, and adapters far stronger than all others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from recycler.zoo import licences, match
from recycler.zoo.aliases import same_model
from recycler.zoo.errors import InputError, shorten
from recycler.zoo.inspect import printable
from recycler.zoo.manifest import Entry

OUTLIER = 1000.0
"""An update so many times the median of the others' drowns them in every mixture; honest adapters of a base differ by tens."""
_ENOUGH = 3


@dataclass(frozen=True)
class Policy:
    """Rules that a person sets for a fetch.

    Attributes:
        allow: licences that may enter, as `licences.parse_list` gives them; any where None.
        strict: what states no licence may not.
        accept_outlier: whatever its norm.
    """

    allow: frozenset[str] | None = None
    strict: bool = False
    accept_outlier: bool = False

    @property
    def asks_licences(self) -> bool:
        return self.allow is not None or self.strict

    def check_licence(self, name: str, licence: str | None) -> tuple[str, ...]:
        """Warnings for the receipt.

        Raises:
            InputError: the licence is not allowed, or there is none and the policy is strict.
        """
        if not self.asks_licences:
            return ()
        if not licences.stated(licence):
            if self.strict:
                raise InputError(
                    f"{name} states no licence.",
                    "Without one nothing is granted, and --strict was given.",
                    "Ask its author to state one, or leave --strict out.",
                    code="E_LICENCE",
                )
            return ("it states no licence, so it is not known to be one that is allowed",)
        if self.allow is not None and not licences.allowed(licence, self.allow):
            raise InputError(
                f"The licence of {name}, {printable(licence)}, is not among those allowed.",
                f"Allowed are {shorten(sorted(self.allow))}.",
                "Leave it out, or add its licence to --license-allow after reading it.",
                code="E_LICENCE",
            )
        return ()

    def check_norm(self, name: str, norm: float | None, base: str | None, others: Iterable[Entry]) -> tuple[str, ...]:
        """Compare ‖ΔW‖_F with that of the adapters in the zoo for the same base; warnings for the receipt.

        Raises:
            InputError: it is an outlier, and those were not accepted.
        """
        sizes = [one.norm for one in others if one.norm and one.name != name and match.same_base(one.base, base)]
        if norm is None or len(sizes) < _ENOUGH or norm <= OUTLIER * median(sizes):
            return ()
        what = f"‖ΔW‖ is {norm:.3g}, {norm / median(sizes):,.0f} times the median of {len(sizes)} others for {printable(base)}"
        if self.accept_outlier:
            return (f"an outlier, accepted: {what}",)
        raise InputError(
            f"{name} is kept out of the zoo: its {what}.",
            "In any mixture it would drown the others; a scale may be wrong, or somebody wants it to win.",
            "Leave it out; or keep it with --accept-outlier, and look at it beside the others: recycle zoo health",
            code="E_OUTLIER",
        )


def check_company(entry: Entry, others: Iterable[Entry], aliases: Sequence[str] = ()) -> None:
    """Compare the base that an adapter declares with those that the others on the same folder declare. A folder is taken at its
    word as a copy of whatever an adapter declares, and shapes cannot tell two models of a family apart: the company can.

    Raises:
        InputError: it stands alone against two others or more, and nobody insisted.
    """
    if entry.forced_base or not entry.base_path or not match.is_hub_id(entry.base):
        return
    mine = str(entry.base)
    peers = [str(o.base) for o in others if o.base_path == entry.base_path and o.name != entry.name and match.is_hub_id(o.base)]
    against = [base for base in peers if same_model(base, mine, aliases) == same_model(mine, base, aliases) == "no"]
    if len(against) < 2 or len(against) <= 2 * (len(peers) - len(against)):
        return
    common = Counter(against).most_common(1)[0][0]
    raise InputError(
        f"{entry.name} was trained for {printable(mine)}; {len(against)} others that use {printable(entry.base_path)} were trained for "
        f"{printable(common)}.",
        "One folder is a copy of one base. On another one its update means something else, even where the shapes are the same.",
        f"Leave it out. If they are the same model, say so: --base-alias {printable(entry.base)}. --force-base takes it as it is.",
        code="E_BASE_MISMATCH",
    )
