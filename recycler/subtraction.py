"""General-knowledge subtraction: what several general adapters have in common is taken out of every adapter before it is routed.

    ΔW_i' = ΔW_i − (1/G) Σ_g ΔW_g

at every linear that one of them touches, exact for every kind of adapter (`recycler.routers.merging`): factors stacked, rank at most
r_i + Σ r_g, or cut to a rank, with the error that costs. The originals stay as they are: what comes out has names of its own
(``math-minus-en-fr``), is made anew from the zoo's adapters each time, and lies beside the router. The general ones are not routed to.

GenKnowSub (Bagherifard et al. 2025, arXiv:2505.10939), there with Arrow. Its code and PEFT's ``use_gks`` subtract factors, A_i − Ā and
B_i − B̄, whose product is BA − BĀ − B̄A + B̄Ā and depends on how ΔW is written as a product. `Subtract.compat` does that, for
adapters of one rank and scaling, to reproduce the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

from recycler.routers.base import Derived
from recycler.routers.merging import Loss, Part, Update, Weight, cut, factors_of, linear, update_of
from recycler.routers.protocol import Model
from recycler.zoo.errors import InputError, UsageError, shorten
from recycler.zoo.lowrank import check_dials
from recycler.zoo.manifest import check_name

if TYPE_CHECKING:
    from recycler.profiles import Profile


@dataclass(frozen=True)
class Subtract:
    """What is taken out of every adapter.

    Attributes:
        general: names of the general adapters. rank: cut what comes out to this one. compat: subtract factors, as in the paper's code.
    """

    general: tuple[str, ...]
    rank: int | None = None
    compat: bool = False

    def __post_init__(self) -> None:
        if not self.general or len(set(self.general)) < len(self.general):
            raise UsageError(
                "Which adapters to subtract is not clear.", "They are none, or one is named twice.", "Name each once."
            )
        check_dials(self.rank, None)

    def name(self, adapter: str) -> str:
        """What an adapter is called afterwards. Raises UsageError where that is too long."""
        general = sorted(self.general)
        return check_name(f"{adapter}-minus-{'-'.join(general) if len(general) < 4 else len(general)}")


def subtracted(model: Model, subtract: Subtract) -> tuple[Derived, ...]:
    """The adapters of a model but the general ones, without what those have in common.

    Raises:
        InputError: with `compat`, ranks differ or an adapter is no plain LoRA; or what comes out cannot be written as an adapter.
    """
    names = [name for name in model.adapters if name not in subtract.general]
    step = model.progress(len(names), "subtracting")
    made = []
    for name in names:
        updates: dict[str, Update] = {}
        loss = Loss()
        for site in (site for group in model.groups for site in group.sites):
            weight = cache(partial(model.base_weight, site))
            update = (_factor_difference if subtract.compat else _difference)(model, site, name, subtract, weight)
            if update is not None:
                shorter, lost = cut(update, subtract.rank, None) if subtract.rank else (update, 0.0)
                loss.add(site, lost, update.norm(weight) if lost else 0.0, shorter.a_RD.shape[0])
                updates[site] = shorter
        new, general = subtract.name(name), sorted(subtract.general)
        source = f"{name} − mean of {', '.join(general)}"
        factors = factors_of(new, updates, model.base_weight)
        made.append(Derived(new, factors, source=source, parts=(name, *general), facts=loss.report()))
        step()
    return tuple(made)


def _difference(model: Model, site: str, name: str, subtract: Subtract, weight: Weight) -> Update | None:
    factors = model.factors(site)
    shares = {name: 1.0} | dict.fromkeys(sorted(subtract.general), -1 / len(subtract.general))
    parts = [Part(one, w, update_of(factors[one], weight)) for one, w in shares.items() if one in factors]
    return linear(parts) if parts else None


def _factor_difference(model: Model, site: str, name: str, subtract: Subtract, weight: Weight) -> Update | None:
    factors = model.factors(site)
    if name not in factors:
        return None
    held = {one: factors[one] for one in (name, *sorted(subtract.general)) if one in factors}
    if len({one.rank for one in held.values()}) > 1 or any(
        one.magnitude_O is not None or one.bias_O is not None for one in held.values()
    ):
        raise InputError(
            f"The factors of {shorten(held)} cannot be subtracted at {site}.",
            "They are of different ranks, or not all plain LoRA.",
            "Leave compat out: the updates themselves can be.",
        )
    own, rest = update_of(held.pop(name), weight), [update_of(one, weight) for one in held.values()]
    count = len(subtract.general)
    a_RD = own.a_RD - sum(one.a_RD for one in rest) / count
    b_OR = own.b_OR - sum(one.b_OR for one in rest) / count
    return Update(a_RD, b_OR)


def renamed(profile: Profile, names: Mapping[str, str]) -> Profile:
    """A profile under other names of the adapters. Its scores are those that were measured, before anything was subtracted."""

    def new(keys: Sequence[str]) -> tuple[str, ...]:
        return tuple(names[key] for key in keys)

    return replace(
        profile,
        adapters=new(profile.adapters),
        hashes={},
        assigned={names[name]: tasks for name, tasks in profile.assigned.items()},
        key="",
    )
