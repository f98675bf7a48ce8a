"""Putting banks on a base and taking them off again, by forward hooks: the base's module tree, its weights, its device map
and its quantisation stay as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accelerate.utils import align_module_device
from torch import Tensor, nn

from recycler.companion import Companion
from recycler.engine.bank import Bank, Control, Few
from recycler.engine.concat import Joint, can_join
from recycler.engine.sites import is_encoder_decoder, trace_groups
from recycler.routers.base import Router
from recycler.routers.select import Policy
from recycler.routers.static import StaticRouter
from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from recycler.engine.tiers import Shelf
    from recycler.routers.protocol import Group
    from recycler.zoo.adapter import Factors


class Attachment(nn.Module):
    """All banks of one model, attached to its base.

    Args:
        base: a causal language model or an encoder–decoder from transformers.
        factors: site → adapter name → Factors; only sites that some adapter touches.
        adapters: all adapter names, in the order of weights.
        router: gives each group its gate; None leaves mixtures to `control.forced`. `use` exchanges it.
        shelf: the adapters packed on disk, paged in as they are used; `factors` then say only which sites there are.

    Raises:
        UsageError: the router chooses among components, and there is a shelf.
    """

    def __init__(
        self,
        base: nn.Module,
        factors: Mapping[str, Mapping[str, Factors]],
        adapters: Sequence[str],
        router: Router | None = None,
        groups: tuple[Group, ...] | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        super().__init__()
        self.shelf = shelf
        self.groups = trace_groups(base, factors) if groups is None else groups
        self.control = Control()
        linears = {site: base.get_submodule(site) for site in factors}
        self.banks: list[Bank] = []
        self._handles: list[RemovableHandle] = []
        self._base = [base]  # in a list: the base is not a child
        self.companion: Companion | None = None
        self.joints: dict[str, Joint] = {}
        for group in self.groups:
            bank = Bank(group, {s: factors[s] for s in group.sites}, adapters, linears, self.control, shelf)
            self.banks.append(bank)
            for s, site in enumerate(group.sites):
                self._handles.append(linears[site].register_forward_hook(_hook(bank, s, site, self.joints)))
        self.stacked = nn.ModuleList(self.banks)  # so that .to() reaches them
        if shelf is not None:
            shelf.arrange(self.banks)
        self.use(router)

    def use(self, router: Router | None) -> None:
        """Gives every bank its gate, or the bank whose decision it reuses; None takes them away."""
        by_name = {bank.group.name: bank for bank in self.banks}
        ranks = None if router is None else getattr(router.config, "ranks", None)
        if ranks is not None and self.shelf is not None:
            raise UsageError(
                "A model that pages its adapters cannot choose among their components (ranks=).",
                "Their factors would have to be made singular vectors at every miss.",
                "Load it without resident.",
            )
        for bank in self.banks:
            bank.limit(ranks)
            gate = None if router is None else router.gate(bank.group)
            bank.gate = None if gate is None else gate.to(bank.stack.a_RD.device)
            bank.most = None if router is None else router.most(bank.group)
            bank.fused = _fused(router, bank.most)
            follows = router is not None and gate is None and bank.group.after is not None
            bank.follow(by_name[str(bank.group.after)] if follows else None)
            bank.fold()
        self.control.select = None if router is None else router.weights
        self.control.few = Few.of(router.weights_E) if isinstance(router, StaticRouter) else None
        self._pass_base(router)

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
