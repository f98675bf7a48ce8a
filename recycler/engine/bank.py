"""One input group's adapters at work: weights from the router or a given mixture, and the path that applies them.

The sites of a group read the same input, so that the first of them computes the weights and what the path can share for all.
The layout is in `stack`, the paths are in `paths`, which one is taken says `chooser`.

Dimensions in names: B batch, T token, D input width, O output width, E adapter, S site of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recycler.engine import kernels
from recycler.engine.chooser import Shape, choose
from recycler.engine.paths import NAMES, Begun, Dense, Gather, Name, PerSequence, Skip, Sorted
from recycler.engine.room import Room
from recycler.engine.sites import linear_shape
from recycler.engine.stack import Slabs, Stack, placement, slab
from recycler.routers.base import Gate
from recycler.routers.linear import LinearGate
from recycler.routers.protocol import Few, Function, Group
from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from recycler.engine.tiers import Shelf
    from recycler.zoo.adapter import Factors


@dataclass
class Control:
    """What all banks of one model look at while they run."""

    select: Callable[[Tensor, Group], Tensor] | None = None  # the router's scores → weights
    plan: Any = None  # what the router prepared for this sequence
    forced: Tensor | Function | None = None  # a mixture that overrides the router
    replayed: bool = False  # the forced mixture is one that the router made: it chooses among components as the router does
    few: Few | None = None  # of the plan or the forced mixture, where it holds for whole sequences
    path: Name | None = None  # overrides the chooser, where that path can be taken
    enabled: bool = True
    record: dict[str, Tensor] | None = None  # site → weights [B, T, E], filled when not None

    @contextmanager
    def set(self, **changes: Any) -> Iterator[None]:
        """Changes fields for the length of a ``with`` block."""
        before = {key: getattr(self, key) for key in changes}
        try:
            for key, value in changes.items():
                setattr(self, key, value)
            yield
        finally:
            for key, value in before.items():
                setattr(self, key, value)


class Bank(nn.Module):
    """The adapters of one group.

    Args:
        group: the sites, their shared input width and stream.
        factors: per site of the group, adapter name → Factors.
        adapters: all adapter names; their order is the order of weights.
        linears: the base's linear per site; read for device, dtype and DoRA's norms, never changed.
        control: shared by all banks of the model.
        shelf: what lies on disk and is paged in; `factors` are empty then.
        spare: (adapters, of which rank) to keep room for.

    Attributes:
        room: what there is; None where nothing is spare.
        count: how many adapters there are.
        stack: what is kept; nothing where there is a shelf.
        gate: the router's gate, or None while there is no router (then `control.forced` must be set).
        most: how many adapters the router gives a token at most here; None is all.
        fused: top-k, temperature and renormalise of a policy that one kernel computes; None leaves it to the router.
        ranks: how many rank-one components act at each token and site where the router decides; None is all (`limit`).
    """

    def __init__(
        self,
        group: Group,
        factors: Mapping[str, Mapping[str, Factors]],
        adapters: Sequence[str],
        linears: Mapping[str, nn.Module],
        control: Control,
        shelf: Shelf | None = None,
        spare: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.group, self.control, self.count = group, control, len(adapters)
        self.shelf = shelf
        self.gate: Gate | None = None
        self.most: int | None = None
        self.fused: tuple[int, float, bool] | None = None
        self.ranks: int | None = None
        self.is_spectral = False
        self._x: Tensor | None = None
        self._version, self._left = -1, 0
        self._begun: tuple[Begun | None, Stack, Tensor] | None = None
        self._some: tuple[tuple[int, ...], Stack, Tensor] | None = None
        self._fold: tuple[Tensor, LinearGate, Stack, int, int] | None = None
        self._choices: dict[tuple[Any, ...], tuple[Name, str]] = {}
        self._leader: list[Bank] = []  # a list, so that it is not taken for a child
        self._leads = False
        self._decision: Tensor | None = None  # [B, T, 1, E], small; the followers' until the next forward

        index = {name: e for e, name in enumerate(adapters)}
        slabs = [{index[name]: slab(update, linears[s]) for name, update in factors[s].items()} for s in group.sites]
        widths = [group.width, *((linear_shape(linears[s]) or (0,))[0] for s in group.sites)]
        self.room = None if spare is None else Room.of(slabs, self.count, *spare)
        columns = self.count if self.room is None else self.room.columns
        self.stack = Stack(slabs, columns, placement(linears[group.sites[0]]), widths, self.room)

    @property
    def touched(self) -> Sequence[int]:
        """The numbers of the sites where there are adapters."""
        sites = range(len(self.group.sites))
        return sites if self.room is None else [s for s in sites if self.stack.places[s]]

    def refill(self, slabs: Slabs, count: int) -> None:
        """Takes in other adapters for which there is room, in place."""
        stack = self.stack
        stack.become(Stack(slabs, stack.count, (stack.a_RD.device, stack.a_RD.dtype), stack.widths, self.room))
        self.count, self._some = count, None
        if self.is_spectral:
            stack.spectral()

    @property
    def leader(self) -> Bank | None:
        """Whose decisions it reuses."""
        return self._leader[0] if self._leader else None

    def follow(self, leader: Bank | None) -> None:
        """Reuses another bank's decisions instead of a gate's; None ends that. A bank that leads must not follow."""
        for before in self._leader:
            before._leads = False
        self._leader = [] if leader is None else [leader._leader[0] if leader._leader else leader]
        for after in self._leader:
            after._leads = True

    def limit(self, ranks: int | None) -> None:
        """Lets only `ranks` components act at each token and site, the largest ones; None ends that.

        The first time, every adapter's factors become singular vectors (`Stack.spectral`).
        """
        self.ranks = ranks
        if ranks is not None and not self.is_spectral:
            self.is_spectral = True
            self._some = None
            self.stack.spectral()

    # -- running

    def add(self, s: int, x_BTD: Tensor, y_BTO: Tensor, bias_O: Tensor | None) -> Tensor:
        """The base's output `y_BTO` at site number `s` plus the mixture of updates for input `x_BTD`."""
        return self.finish(s, self.mix(x_BTD), y_BTO, bias_O)

    def finish(self, s: int, mixed: tuple[Begun | None, Stack, Tensor], y_BTO: Tensor, bias_O: Tensor | None) -> Tensor:
        """What is left for one site to do, once its group has been through `mix`."""
        begun, stack, w_BTSE = mixed
        if begun is None:  # nobody is in the mixture
            return y_BTO
        out_NO = begun.add(s, y_BTO.reshape(-1, y_BTO.shape[-1]))
        if stack.extra[s]:
            w_BTE = w_BTSE[..., s if w_BTSE.shape[-2] > 1 else 0, :]
            out_NO = stack.extras(s, out_NO, y_BTO, w_BTE, bias_O)
        return out_NO.view(y_BTO.shape)

    def mix(self, x_BTD: Tensor) -> tuple[Begun | None, Stack, Tensor]:
        """The path at work on the group's input, begun by its first site for all of them; whose it is, and the weights."""
        if self._x is not x_BTD or self._begun is None or self._version != _version(x_BTD):
            self._x, self._version, self._left = x_BTD, _version(x_BTD), len(self.group.sites)
            self._begun = self._begin(x_BTD)
        begun = self._begun
        self._left -= 1
        if self._left <= 0:  # the last consumer lets go, so that nothing outlives the group
            self._x = self._begun = None
        return begun

    def fold(self) -> None:
        """Puts the gate's rows under the adapters', where both are fp32: a token's scores come out of the GEMM that takes it down.
        The adapters' rows become a view, so that they are kept once."""
        gate, before = self.gate, self._fold
        if before is not None and gate is before[1]:  # other numbers in the same gate
            before[0][before[3] :] = before[1].rows()
            return
        self.unfold()
        a_RD = self.stack.a_RD
        if isinstance(gate, LinearGate) and a_RD.dtype == torch.float32 and gate.v_ND.device == a_RD.device and len(a_RD):
            ag_MD = torch.cat([a_RD, gate.rows()])
            self.stack.a_RD = ag_MD[: len(a_RD)]
            self._fold = (ag_MD, gate, self.stack, len(a_RD), len(gate.v_ND))

    def unfold(self) -> None:
        """Ends that."""
        if self._fold is not None:
            self._fold = None
            self.stack.a_RD = self.stack.a_RD.clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Bank:
        self.unfold()
        super()._apply(fn, recurse)
        self._some = None  # what was made of it, or chosen for it, where it was before
        self._choices.clear()
        self.fold()
        return self

    def _begin(self, x_BTD: Tensor) -> tuple[Begun | None, Stack, Tensor]:
        fold, control = self._fold, self.control
        if fold is not None and control.forced is None and control.few is None and self._goes_dense(x_BTD):
            # Straight from what `fold` put together: attribute look-up through nn.Module is felt at one token a step.
            ag_MD, gate, whole, rows, count = fold
            z_BTM = nn.functional.linear(x_BTD, ag_MD)
            w_BTSE = self._decided(gate.finish(z_BTM.narrow(-1, rows, count), x_BTD))
            if control.record is not None:
                self._take_down(w_BTSE, x_BTD)
            return Dense(whole, x_BTD, w_BTSE, self.ranks, z_BTM.narrow(-1, 0, rows)), whole, w_BTSE
        w_BTSE = self._weights(x_BTD)
        stack, number_E = self._kept(x_BTD.shape) if self.shelf is None else self.shelf.serve(self, x_BTD, w_BTSE)
        if stack is None:
            return None, self.stack, w_BTSE
        if number_E is not None:
            w_BTSE = w_BTSE.index_select(-1, number_E)
        few, k, ranks = self.control.few, self._k(), self._ranks()
        if k is None or w_BTSE.dim() != x_BTD.dim() + 1:
            return Dense(stack, x_BTD, w_BTSE, ranks), stack, w_BTSE
        path = self.control.path or self.choose(stack, x_BTD.shape, k, few is not None)[0]
        x_ND = x_BTD.flatten(0, -2)
        if path == "sequence" and few is not None and x_BTD.dim() == 3:
            return PerSequence(stack, x_BTD, w_BTSE, k), stack, w_BTSE
        if path in ("gather", "sorted", "skip"):
            w_NSE = w_BTSE.expand(*x_BTD.shape[:-1], -1, -1).flatten(0, -3)
            if path == "skip" and (x_BTD.requires_grad or w_BTSE.requires_grad):  # its kernels have no gradients
                return Dense(stack, x_BTD, w_BTSE), stack, w_BTSE
            if path == "skip":
                return Skip(stack, x_ND, w_NSE), stack, w_BTSE
            return (Gather if path == "gather" else Sorted)(stack, x_ND, w_NSE, k), stack, w_BTSE
        if path not in NAMES:
            raise UsageError(f"path={path!r}.", "There is no such path.", f"Choose {', '.join(NAMES)}, or None.")
        return Dense(stack, x_BTD, w_BTSE), stack, w_BTSE

    def _kept(self, shape: Sequence[int]) -> tuple[Stack | None, Tensor | None]:
        """The stack that serves now, and its adapters' numbers where it is not all of them; nothing where nobody is wanted."""
        few = self.control.few
        if few is None or torch.compiler.is_compiling():
            return self.stack, None
        if not few.used:
            return None, None
        # Where sequences look up their own rows they can do so among all, and spare a copy that the next batch would not ask for.
        many = len(few.used) > 2 * few.k and not any(self.stack.extra) and self.control.path in (None, "sequence")
        if many and self.choose(self.stack, shape, self._k(), True)[0] == "sequence":
            return self.stack, None
        return self._of(few.used)

    def _k(self) -> int | None:
        """How many adapters a token has at most; None where it may have all, or where components are chosen among."""
        if self._ranks() is not None or (self.room is not None and torch.compiler.is_compiling()):
            return None  # what is compiled with room is the dense path, whoever is in the mixture
        if self.control.few is not None:
            return self.control.few.k
        return self.most if self.control.forced is None else None

    def _ranks(self) -> int | None:
        return self.ranks if self.control.forced is None or self.control.replayed else None

    def foresee(self, shape: Sequence[int]) -> tuple[Name, str, Stack]:
        """The path that an input of a shape [B, T, D] would take now, why, and the stack that it would run on."""
        stack, _ = self._kept(shape)
        if stack is None:
            return "dense", "nobody is in the mixture: nothing runs", self.stack
        name, why = self.choose(stack, shape, self._k(), self.control.few is not None)
        return (self.control.path, "asked for", stack) if self.control.path else (name, why, stack)

    def _goes_dense(self, x_BTD: Tensor) -> bool:
        path, k = self.control.path, self._k()
        return k is None or (path or self.choose(self.stack, x_BTD.shape, k, False)[0]) == "dense"

    def choose(self, stack: Stack, shape: Sequence[int], k: int | None, sequencewise: bool) -> tuple[Name, str]:
        """The path for an input of a shape, and why. Remembered: at one token a step, asking is felt."""
        compiling = torch.compiler.is_compiling()
        key = (tuple(shape), k, sequencewise, stack.count, stack.total)
        if not compiling and key in self._choices:
            return self._choices[key]
        tokens = 1
        for size in shape[:-1]:
            tokens *= size
        active = None if k is None else k * stack.ranks * len(stack.spans)
        a_RD = stack.a_RD
        choice = choose(
            Shape(
                tokens, shape[0] if len(shape) == 3 else 1, a_RD.shape[0], active, stack.count, k,
                (stack.widths[0], sum(stack.widths[1:])), a_RD.dtype, a_RD.device.type, sequencewise,
                compiling,
            )
        )  # fmt: skip
        if not compiling:
            if len(self._choices) >= _REMEMBERED:  # a server sees every length there is
                self._choices.clear()
            self._choices[key] = choice
        return choice

    def _of(self, used: tuple[int, ...]) -> tuple[Stack | None, Tensor | None]:
        """A stack of some of the adapters and their numbers; all of it where they are most of all. The last one is kept: the
        forwards of a generation, and batches of the same task, ask for the same."""
        if self.shelf is not None:
            return self.shelf.stack(self, used)
        if 4 * len(used) > 3 * self.count:
            return self.stack, None
        some = self._some
        device = self.stack.a_RD.device
        if some is None or some[0] != used or some[2].device != device:
            self._some = some = (used, self.stack.subset(used), _numbers(used, device))
        return some[1], some[2]

    def _weights(self, x_BTD: Tensor) -> Tensor:
        """[B or 1, T or 1, S or 1, E]"""
        forced = self.control.forced
        if forced is None:
            w_BTSE = self.routed(x_BTD)
        elif callable(forced):
            w_BTSE = forced(self.group, x_BTD)
        else:
            w_BTSE = forced.to(x_BTD.device)
            w_BTSE = w_BTSE.view(*w_BTSE.shape[:-1], *([1] * (3 - w_BTSE.dim())), 1, w_BTSE.shape[-1])
        if self.room is not None:
            w_BTSE = self.room.pad(w_BTSE)
        self._take_down(w_BTSE, x_BTD)
        return w_BTSE

    def _take_down(self, w_BTSE: Tensor, x_BTD: Tensor) -> None:
        if self.control.record is not None:
            lead = (*x_BTD.shape[:-1], len(self.group.sites), w_BTSE.shape[-1])
            full = w_BTSE.detach().expand(lead)[..., : self.count]
            self.control.record |= {self.group.sites[s]: full[..., s, :].float() for s in self.touched}

    def routed(self, x_BTD: Tensor) -> Tensor:
        """The router's weights [B or 1, T or 1, S or 1, E]; computed by the gate, or already by the leader's."""
        if self._leader:
            w_BTSE = self._leader[0]._decision
            assert w_BTSE is not None
            return w_BTSE
        if self.gate is None or self.control.select is None:
            raise RuntimeError("this model has no router; set a mixture with model.mixture(...)")
        return self._decided(self.gate(x_BTD, self.control.plan))

    def _decided(self, scores_BTSE: Tensor) -> Tensor:
        assert self.control.select is not None
        if self.fused is not None and scores_BTSE.is_cuda and not scores_BTSE.requires_grad:
            w_NSE, _ = kernels.gate(scores_BTSE.flatten(0, -3), *self.fused)
            w_BTSE = w_NSE.view(scores_BTSE.shape)
        else:
            w_BTSE = self.control.select(scores_BTSE, self.group)
        if self.room is not None:
            w_BTSE = self.room.pad(w_BTSE)
        if self._leads:
            self._decision = w_BTSE
        return w_BTSE


_REMEMBERED = 256  # shapes


@torch.inference_mode(False)
def _numbers(used: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(used, dtype=torch.long, device=device)


def _version(x: Tensor) -> int:
    """Changes when x is written in place; tensors made in inference mode do not count, and tracing needs no guard."""
    if torch.compiler.is_compiling() or x.is_inference():
        return 0
    return x._version
