"""Putting banks on a base and taking them off again, by forward hooks: the base's module tree, its weights, its device map
and its quantisation stay as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accelerate.utils import align_module_device
from torch import Tensor, nn

from recycler.companion import Companion
from recycler.engine import room
from recycler.engine.bank import Bank, Control, Few
from recycler.engine.concat import Joint, can_join
from recycler.engine.sites import is_encoder_decoder, trace_groups
from recycler.routers.base import Gate, Router
from recycler.routers.select import Policy
from recycler.routers.static import StaticRouter
from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from recycler.engine.tiers import Shelf
    from recycler.routers.protocol import Group
    from recycler.zoo.adapter import Adapter, Factors


class Attachment(nn.Module):
    """All banks of one model, attached to its base.

    Args:
        base: a causal language model or an encoder–decoder from transformers.
        factors: site → adapter name → Factors; only sites that some adapter touches.
        adapters: all adapter names, in the order of weights.
        router: gives each group its gate; None leaves mixtures to `control.forced`. `use` exchanges it.
        shelf: the adapters packed on disk, paged in as they are used; `factors` then say only which sites there are.
        spare: how many adapters more there is to be room for (`recycler.engine.room`), each as large as the largest is anywhere.

    Raises:
        UsageError: the router chooses among components, and there is a shelf; or `spare` is negative, or beside a shelf.
    """

    def __init__(
        self,
        base: nn.Module,
        factors: Mapping[str, Mapping[str, Factors]],
        adapters: Sequence[str],
        router: Router | None = None,
        groups: tuple[Group, ...] | None = None,
        shelf: Shelf | None = None,
        spare: int | None = None,
    ) -> None:
        super().__init__()
        self.shelf = shelf
        self.columns = None if spare is None else len(adapters) + spare + 1  # of weights, where there is room; the last is null
        if spare is not None and (spare < 0 or shelf is not None):
            raise UsageError(
                f"spare={spare}.",
                "It is a number of adapters." if shelf is None else "Adapters that are paged need no room beside them.",
                "Use 0 or more." if shelf is None else "Leave spare out, or resident.",
                code="E_MEMORY",
            )
        rank = max((update.rank for held in factors.values() for update in held.values()), default=0)
        self.groups = trace_groups(base, factors) if groups is None else groups
        self.control = Control()
        linears = {site: base.get_submodule(site) for site in factors}
        self.banks: list[Bank] = []
        self._handles: list[RemovableHandle] = []
        self._base = [base]  # in a list: the base is not a child
        self.companion: Companion | None = None
        self.joints: dict[str, Joint] = {}
        for group in self.groups:
            more = None if spare is None else (spare, rank)
            bank = Bank(group, {s: factors[s] for s in group.sites}, adapters, linears, self.control, shelf, more)
            self.banks.append(bank)
            for s, site in enumerate(group.sites):
                self._handles.append(linears[site].register_forward_hook(_hook(bank, s, site, self.joints)))
        self.stacked = nn.ModuleList(self.banks)  # so that .to() reaches them
        if shelf is not None:
            shelf.arrange(self.banks)
        self.use(router)

    def use(self, router: Router | None) -> None:
        """Gives every bank its gate, or the bank whose decision it reuses; None takes them away."""
        groups = room.remaining(self.groups, {bank.group.sites[s] for bank in self.banks for s in bank.touched})
        self._put(router, groups, self._gates(router, groups))

    def exchange(self, adapters: Sequence[Adapter], before: Sequence[str], router: Router) -> None:
        """Other adapters and their router, in place; the model is as it was if it raises.

        Args:
            adapters: without factors where they are to stay as they are.
            before: the names of those that are in it.

        Raises:
            UsageError: there is no room.
        """
        filled = room.filled(self.banks, self._base[0], adapters, before)
        groups = room.remaining(self.groups, {site for held in filled for site, some in held.items() if some})
        gates = self._gates(router, groups)
        for bank, held in zip(self.banks, filled, strict=True):
            bank.refill([*held.values()], len(adapters))
        self._put(router, groups, gates)
        for joint in self.joints.values():
            joint.renew()

    def _gates(self, router: Router | None, groups: Sequence[Group | None]) -> list[Gate | None]:
        """Each bank's, made beforehand: one that cannot be leaves the others as they are."""
        ranks = None if router is None else getattr(router.config, "ranks", None)
        if ranks is not None and self.shelf is not None:
            raise UsageError(
                "A model that pages its adapters cannot choose among their components (ranks=).",
                "Their factors would have to be made singular vectors at every miss.",
                "Load it without resident.",
                code="E_MEMORY",
            )
        if router is None:
            return [None] * len(self.banks)
        gates = [room.gate_of(router, group, bank) for bank, group in zip(self.banks, groups, strict=True)]
        return [None if gate is None else gate.to(bank.stack.a_RD.device) for bank, gate in zip(self.banks, gates, strict=True)]

    def _put(self, router: Router | None, groups: Sequence[Group | None], gates: Sequence[Gate | None]) -> None:
        by_name = {group.name: bank for bank, group in zip(self.banks, groups, strict=True) if group is not None}
        ranks = None if router is None else getattr(router.config, "ranks", None)
        for bank, group, gate in zip(self.banks, groups, gates, strict=True):
            bank.limit(ranks)
            bank.gate = gate if bank.room is None else room.taken(bank.gate, gate)
            bank.most = None if router is None else router.most(bank.group)
            bank.fused = _fused(router, bank.most)
            after = None if router is None or gate is not None or group is None else group.after
            kept = bank.leader if group is None and gate is None else None
            bank.follow(kept if after is None else by_name[after])
            bank.fold()
        if router is None or self.columns is None:
            self.control.select = None if router is None else router.weights
        else:
            self.control.select = room.selector(self.control.select, router)
        self.control.few = Few.of(router.weights_E) if isinstance(router, StaticRouter) else None
        self._pass_base(router)

    def widen(self, w_E: Tensor) -> Tensor:
        """Weights [..., E], with zeros for the columns of adapters that there is room for."""
        return w_E if self.columns is None else room.widen(w_E, self.columns)

    def _pass_base(self, router: Router | None) -> None:
        if self.companion is not None:
            self.companion.detach()
        base = self._base[0]
        wanted = router is not None and router.base_pass and not is_encoder_decoder(base)
        self.companion = Companion(base, self.control, router) if wanted and router is not None else None

    def join(self) -> int:
        """K-concat: every site that can computes base and adapters up in one GEMM (`recycler.engine.concat`); opt-in, because
        the base's weights become views. To be called once the model is where it stays. Returns how many sites do."""
        self.separate()
        holders = Counter(id(p) for m in self._base[0].modules() for p in m._parameters.values() if p is not None)
        for bank in self.banks if self.shelf is None else ():
            for s, site in enumerate(bank.group.sites):
                linear = self._base[0].get_submodule(site)
                if isinstance(linear, nn.Linear) and can_join(bank, s, linear, holders):
                    self.joints[site] = Joint(bank, s, linear)
        return len(self.joints)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Attachment:
        joined = bool(self.joints)
        self.separate()
        super()._apply(fn, recurse)
        if joined:  # the base has moved by now
            self.join()
        return self

    def separate(self) -> None:
        """Ends `join`."""
        for joint in self.joints.values():
            joint.detach()
        self.joints.clear()

    def detach(self) -> None:
        """Removes the hooks: the base is as it was."""
        self._pass_base(None)
        self.separate()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _hook(bank: Bank, s: int, site: str, joints: Mapping[str, Joint]) -> Any:
    control = bank.control

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not control.enabled or (joints and site in joints and joints[site].taken):
            return None
        if getattr(module, "_hf_hook", None) is None:
            return bank.add(s, args[0], output, getattr(module, "bias", None))
        with align_module_device(module):  # accelerate has taken an offloaded bias away again
            return bank.add(s, args[0], output, getattr(module, "bias", None))

    return hook


def _fused(router: Router | None, most: int | None) -> tuple[int, float, bool] | None:
    """(k, temperature, renormalise) where a router's weights are a plain top-k."""
    config = None if router is None else router.config
    if router is None or most is None or not isinstance(config, Policy) or type(router).weights is not Router.weights:
        return None
    plain = config.policy == "top_k" and config.standardise is None and type(config).weights is Policy.weights
    return (most, config.temperature, config.renormalise) if plain else None
