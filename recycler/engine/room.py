"""Room: a model whose adapters can be exchanged for others without being compiled again.

Whatever a compiled graph looks at stays as it is: sizes, addresses, what is there and what is not. A stack with room has columns and rank
rows that are nobody's: the rows are zeros, and belong to the null column, the last one, whose weight is always 0. Gates whose shape
can be kept have a row for every column, which scores −∞ until there is an adapter. Where adapters go, others come into their place.

A gate of another kind, or a router with other options, is put in as `Attachment.use` does: right, and compiled again.

Dimensions in names: B batch, T token, D input width, O output width, E adapter, C column (adapters, room, null), S site of the group,
N rows of a gate (sites × columns).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recycler.engine.stack import Slab, slab
from recycler.routers.base import Gate, Router
from recycler.routers.linear import LinearGate, Rows
from recycler.routers.protocol import Group
from recycler.routers.static import StaticRouter
from recycler.zoo.errors import UsageError, shorten

if TYPE_CHECKING:
    from recycler.engine.bank import Bank
    from recycler.zoo.adapter import Adapter

_MULTIPLE = 16  # rank rows of a site: 16-byte strides in every dtype, and the tile of the skipping kernels
_WHY = "What a model was made with is all that a compiled one can hold: sites, rank rows, columns, kinds of adapters."
_FIX = "Compose it again, with these adapters, and with spare=N for those that may follow."


@dataclass(frozen=True)
class Room:
    """How much a stack can hold.

    Attributes:
        columns: of the weights; the last is null.
        rows: per site, rank rows. scales, biases: per site, adapters with a DoRA scale, or with a bias.
    """

    columns: int
    rows: tuple[int, ...]
    scales: tuple[int, ...]
    biases: tuple[int, ...]

    @classmethod
    def of(cls, slabs: Sequence[Mapping[int, Slab]], count: int, spare: int, rank: int) -> Room:
        """What `count` adapters need now, and `spare` more of a rank. Scales and biases only where there are some."""

        def some(kind: str) -> tuple[int, ...]:
            return tuple(number + spare if (number := _having(held, kind)) else 0 for held in slabs)

        rows = [sum(len(one.a_RD) for one in held.values()) + spare * rank for held in slabs]
        return cls(
            count + spare + 1,
            tuple(-(-number // _MULTIPLE) * _MULTIPLE for number in rows),
            some("scale_O"),
            some("bias_O"),
        )

    def check(self, slabs: Mapping[str, Mapping[int, Slab]], count: int) -> None:
        """Raises UsageError unless there is room for `count` adapters, which have these slabs."""
        if count >= self.columns:
            raise UsageError(
                f"There is room for {self.columns - 1} adapters, and these are {count}.", _WHY, _FIX, code="E_MEMORY"
            )
        for s, (site, held) in enumerate(slabs.items()):
            for what, number, most in (
                ("rank rows", sum(len(one.a_RD) for one in held.values()), self.rows[s]),
                ("DoRA magnitudes", _having(held, "scale_O"), self.scales[s]),
                ("biases", _having(held, "bias_O"), self.biases[s]),
            ):
                if number > most:
                    raise UsageError(
                        f"{site} has room for {most} {what}, and these adapters have {number}.", _WHY, _FIX, code="E_MEMORY"
                    )

    def pad(self, w_BTSE: Tensor) -> Tensor:
        """Weights of some adapters [..., E or C] → of all columns [..., C]."""
        return widen(w_BTSE, self.columns)


def _having(held: Mapping[int, Slab], kind: str) -> int:
    return sum(getattr(one, kind) is not None for one in held.values())


def widen(w_E: Tensor, columns: int) -> Tensor:
    """Weights [..., E] with zeros up to [..., C]."""
    missing = columns - w_E.shape[-1]
    return nn.functional.pad(w_E, (0, missing)) if missing else w_E


def remaining(groups: Sequence[Group], touched: Collection[str]) -> list[Group | None]:
    """Groups as they would be if only the sites that adapters touch had been traced: what a router that was built for these adapters
    knows. None where there is none left. Their depths stay: the layers are where they were."""
    names: dict[str, str | None] = {}
    result: list[Group | None] = []
    for group in groups:
        sites = tuple(site for site in group.sites if site in touched)
        after = None if group.after is None else names[group.after]
        names[group.name] = sites[0] if sites else after
        result.append(replace(group, sites=sites, after=after) if sites else None)
    return result


def gate_of(router: Router, group: Group | None, bank: Bank) -> Gate | None:
    """The router's gate of what remains of a bank's group, in the shape that the bank's gate has, where that can be."""
    room = bank.room
    if room is None:
        return router.gate(bank.group)
    if isinstance(router, StaticRouter):
        router = copy.copy(router)
        router.weights_E = widen(router.weights_E, room.columns)
    if router.granularity != "token":  # whose gates know no sites
        return router.gate(bank.group)
    if group is None:  # nobody is left to score
        return None if bank.leader is not None else _placed(None, (), bank, room)
    gate = router.gate(group)
    if gate is None:
        return None
    at = [bank.group.sites.index(site) for site in group.sites]
    # The average of all adapters (`policies.shared`) divides by how many there are.
    if isinstance(gate, LinearGate) and not getattr(router.config, "shared", False):
        return _placed(gate, at, bank, room)
    return gate if len(at) == len(bank.group.sites) else _Spread(gate, at, len(bank.group.sites))


class _Spread(Gate):
    """The gate of some of a group's sites, for all of them: those where nobody is get the first one's scores.

    Args:
        at: the numbers of the gate's sites.
    """

    at_S: Tensor

    def __init__(self, gate: Gate, at: Sequence[int], sites: int) -> None:
        super().__init__()
        self.gate = gate
        self.register_buffer("at_S", torch.tensor([at.index(s) if s in at else 0 for s in range(sites)]), persistent=False)

    def forward(self, x_BTD: Tensor, plan: Any = None) -> Tensor:
        scores_BTSE: Tensor = self.gate(x_BTD, plan)
        return scores_BTSE if scores_BTSE.shape[-2] == 1 else scores_BTSE.index_select(-2, self.at_S)


def _placed(gate: LinearGate | None, at: Sequence[int], bank: Bank, room: Room) -> LinearGate:
    """A gate's rows among those of all columns, and of the group's sites where it has one for each; the others score −∞.

    Args:
        at: the numbers of the gate's sites in the group.
    """
    old, sites = bank.gate, len(bank.group.sites)
    like = old if gate is None and isinstance(old, LinearGate) else gate
    each = (gate is not None and gate.shape[0] > 1) or (isinstance(old, LinearGate) and old.shape[0] == sites)
    v_SCD = torch.zeros(sites if each else 1, room.columns, bank.group.width)
    offset_SC = torch.full(v_SCD.shape[:2], float("-inf"))
    if gate is not None:
        where, count = list(at) if each else [0], gate.shape[1]
        v_SCD[where, :count] = gate.v_ND.unflatten(0, gate.shape)
        offset_SC[where, :count] = 0.0 if gate.offset_N is None else gate.offset_N.unflatten(0, gate.shape)
    rows = [Rows(v_CD, offset_C) for v_CD, offset_C in zip(v_SCD, offset_SC, strict=True)]
    return LinearGate(rows, like is not None and like.normalise, like is not None and like.absolute)


def filled(
    banks: Sequence[Bank], base: nn.Module, adapters: Sequence[Adapter], before: Sequence[str]
) -> list[dict[str, dict[int, Slab]]]:
    """What each bank is to hold: site → adapter number → slab. Those of adapters that come without factors are views of what it
    holds now. As `Attachment.exchange`."""
    number = {name: e for e, name in enumerate(before)}
    unknown = [one.name for one in adapters if not one.sites and one.name not in number]
    if unknown:
        raise UsageError(
            f"{shorten(unknown)} came without factors.",
            "Only adapters that the model holds already may.",
            "Read them: recycler.build.read_adapters(zoo, names, model.source)",
        )
    here = {site for bank in banks for site in bank.group.sites}
    strange = {site: one.name for one in adapters for site in one.sites if site not in here}
    if strange:
        raise UsageError(
            f"{shorten(sorted(set(strange.values())))} touches {shorten(strange, 3)}, where there was no adapter.",
            _WHY,
            _FIX,
        )
    result = []
    for bank in banks:
        old, slabs = bank.stack.slabs(), {}
        for s, site in enumerate(bank.group.sites):
            linear, held = base.get_submodule(site), {}
            for e, one in enumerate(adapters):
                if site in one.sites:
                    if one.sites[site].shape != (bank.stack.widths[1 + s], bank.stack.widths[0]):
                        raise UsageError(f"{one.name} does not fit {site}.", "It was made for another base.", "Leave it out.")
                    held[e] = slab(one.sites[site], linear)
                elif not one.sites and number[one.name] in old[s]:
                    held[e] = old[s][number[one.name]]
            slabs[site] = held
        assert bank.room is not None
        bank.room.check(slabs, len(adapters))
        result.append(slabs)
    return result


@torch.inference_mode(False)
@torch.no_grad()
def taken(old: Gate | None, new: Gate | None) -> Gate | None:
    """The old gate with the new one's tensors written into its own, where they differ in nothing else; else the new one."""
    if old is None or new is None or type(old) is not type(new) or not _alike(old, new):
        return new
    for name, buffer in old.named_buffers():
        buffer.copy_(new.get_buffer(name))
    return old


_MODULE = frozenset(vars(nn.Module()))


def _alike(one: Gate, other: Gate) -> bool:
    """Whether two gates of a class differ in the numbers in their buffers alone. No where that cannot be told."""
    (a, a_shapes), (b, b_shapes) = (
        (
            {name: value for name, value in vars(gate).items() if name not in _MODULE},
            {name: (buffer.shape, buffer.dtype, buffer.device) for name, buffer in gate.named_buffers()},
        )
        for gate in (one, other)
    )
    plain = all(isinstance(value, (bool, int, float, str, tuple)) for value in (*a.values(), *b.values()))
    whole = not (one._modules or one._parameters or other._modules or other._parameters)
    return plain and whole and a == b and a_shapes == b_shapes


def selector(old: Callable[..., Tensor] | None, router: Router) -> Callable[[Tensor, Group], Tensor]:
    """A router's scores → weights, without its gates; the old one where it does the same."""
    held = getattr(old, "__self__", None)
    if old is not None and type(held) is type(router) and (held.config, held.thresholds) == (router.config, router.thresholds):
        return old
    bare = type(router)(router.adapters, router.config)
    bare.thresholds = dict(router.thresholds)
    return bare.weights
