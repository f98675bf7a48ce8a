"""One input group's adapters, stacked, and how they run: y += Σ_e w_e · B_e A_e x.

Ranks are concatenated, never padded: the down projections of all adapters and all sites of the group are one matrix, so a
group costs one shrink GEMM and one gate computation, and a site one `addmm`. No tensor of size tokens × adapters × d_out
ever exists. The layout and its cost model are the reason for this file; it knows nothing about models or methods.

Dimensions in names: B batch, T token, D input width, O output width, E adapter, R rank row, S site of the group, K adapter with
something besides factors (a DoRA magnitude, or a bias).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recycler.engine.sites import weight_OD
from recycler.routers.base import Gate
from recycler.routers.policies import strongest
from recycler.routers.protocol import Group, Weights
from recycler.zoo.lowrank import thin_svd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from recycler.zoo.adapter import Factors


@dataclass
class Control:
    """What all banks of one model look at while they run."""

    select: Callable[[Tensor, Group], Tensor] | None = None  # the router's scores → weights
    plan: Any = None  # what the router prepared for this sequence
    forced: Weights | None = None  # a mixture that overrides the router
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
    """The stacked adapters of one group.

    Args:
        group: the sites, their shared input width and stream.
        factors: per site of the group, adapter name → Factors.
        adapters: all adapter names; their order is the order of weights.
        linears: the base's linear per site; read for device, dtype and DoRA's norms, never changed.
        control: shared by all banks of the model.

    Attributes:
        gate: the router's gate, or None while there is no router (then `control.forced` must be set).
        ranks: how many rank-one components act at each token and site where the router decides; None is all (`limit`).
    """

    a_RD: Tensor
    expert_R: Tensor
    slot_R: Tensor

    def __init__(
        self,
        group: Group,
        factors: Mapping[str, Mapping[str, Factors]],
        adapters: Sequence[str],
        linears: Mapping[str, nn.Module],
        control: Control,
    ) -> None:
        super().__init__()
        self.group, self.control = group, control
        self.gate: Gate | None = None
        self.ranks: int | None = None
        self.spectral = False
        self.count = len(adapters)
        self._x: Tensor | None = None
        self._version, self._left = -1, 0
        self._mixed: tuple[Tensor, Tensor] | None = None
        self._leader: list[Bank] = []  # a list, so that it is not taken for a child
        self._leads = False
        self._decision: Tensor | None = None  # [B, T, 1, E], small; the followers' until the next forward

        index = {name: e for e, name in enumerate(adapters)}
        rows: list[Tensor] = []
        expert: list[int] = []
        slot: list[int] = []
        self.spans: list[tuple[int, int]] = []
        self._keys = [f"b{s}_RO" for s in range(len(group.sites))]
        self._dora: list[bool] = []
        self._bias: list[bool] = []
        for s, site in enumerate(group.sites):
            start, ups = len(expert), []
            for name in sorted(factors[site], key=index.__getitem__):
                update = factors[site][name]
                rows.append(update.a_RD)
                expert += [index[name]] * update.rank
                slot += [s * self.count + index[name]] * update.rank
                ups.append(update.b_OR)
            self.spans.append((start, len(expert)))
            self._add_site(s, site, factors[site], index, ups, linears[site])
        device, dtype = placement(linears[group.sites[0]])
        self.register_buffer("a_RD", torch.cat(rows).to(device, dtype), persistent=False)
        self.register_buffer("expert_R", torch.tensor(expert, device=device), persistent=False)
        self.register_buffer("slot_R", torch.tensor(slot, device=device), persistent=False)

    def _add_site(
        self,
        s: int,
        site: str,
        factors: Mapping[str, Factors],
        index: Mapping[str, int],
        ups: list[Tensor],
        linear: nn.Module,
    ) -> None:
        """Registers B of one site, rank-major [R, O], and where adapters have them DoRA's output scales c − 1 and biases of B."""
        device, dtype = placement(linear)
        dora = [name for name in sorted(factors, key=index.__getitem__) if factors[name].magnitude_O is not None]
        scale_KO = None
        if dora:
            w_OD = weight_OD(linear)
            scales = []
            for name in dora:
                update, magnitude_O = factors[name], factors[name].magnitude_O
                assert magnitude_O is not None
                delta_OD = update.b_OR.to(w_OD.device) @ update.a_RD.to(w_OD.device)
                scales.append(magnitude_O.to(w_OD.device) / torch.linalg.vector_norm(w_OD + delta_OD, dim=1))
            order = sorted(factors, key=index.__getitem__)
            for name, c_O in zip(dora, scales, strict=True):
                position = order.index(name)
                ups[position] = ups[position] * c_O.to(ups[position].device)[:, None]
            scale_KO = (torch.stack(scales) - 1).to(device, dtype)
        self.register_buffer(self._keys[s], torch.cat(ups, dim=1).T.contiguous().to(device, dtype), persistent=False)
        self._dora.append(bool(dora))
        self.register_buffer(f"dora{s}_KO", scale_KO, persistent=False)
        dora_K = torch.tensor([index[name] for name in dora], device=device) if dora else None
        self.register_buffer(f"dora{s}_K", dora_K, persistent=False)
        biases = {index[name]: update.bias_O for name, update in factors.items() if update.bias_O is not None}
        self._bias.append(bool(biases))
        if biases:  # in the order of their adapters, so that sums do not depend on the order of a mapping
            bias_KO = torch.stack([biases[e] for e in sorted(biases)]).to(device, dtype)
            self.register_buffer(f"bias{s}_KO", bias_KO, persistent=False)
            self.register_buffer(f"bias{s}_K", torch.tensor(sorted(biases), device=device), persistent=False)

    def follow(self, leader: Bank | None) -> None:
        """Reuses another bank's decisions instead of a gate's; None ends that. A bank that leads must not follow."""
        for before in self._leader:
            before._leads = False
        self._leader = [] if leader is None else [leader._leader[0] if leader._leader else leader]
        for after in self._leader:
            after._leads = True

    def limit(self, ranks: int | None) -> None:
        """Lets only `ranks` components act at each token and site, the largest ones; None ends that.

        The first time, every adapter's factors at a site become those of the SVD of what it adds there (DoRA's scale of B
        included), A = ΣVᵀ and B = U: the products stay what they are, and A x is the size of what each component adds.
        """
        self.ranks = ranks
        if ranks is None or self.spectral:
            return
        self.spectral = True
        for s, (start, stop) in enumerate(self.spans):
            b_RO = self._buffers[self._keys[s]]
            assert b_RO is not None
            lengths = torch.unique_consecutive(self.expert_R[start:stop], return_counts=True)[1].tolist()
            ends = torch.tensor(lengths).cumsum(0).tolist()
            for length, end in zip(lengths, ends, strict=True):
                own, rows = slice(end - length, end), slice(start + end - length, start + end)
                thin = thin_svd(self.a_RD[rows].cpu(), b_RO[own].T.cpu())
                found = len(thin.s_K)  # fewer than there are rows where the rank is above a width
                for part, new in ((self.a_RD[rows], thin.s_K[:, None] * thin.vt_KD), (b_RO[own], thin.u_OK.T)):
                    part.zero_()
                    part[:found] = new.to(part)

    # -- running

    def add(self, s: int, x_BTD: Tensor, y_BTO: Tensor, bias_O: Tensor | None) -> Tensor:
        """The base's output `y_BTO` at site number `s` plus the mixture of updates for input `x_BTD`."""
        h_NR, w_BTSE = self._mix(x_BTD)
        start, stop = self.spans[s]
        if stop - start < h_NR.shape[-1]:
            h_NR = h_NR[:, start:stop]
        if self.ranks is not None and self.control.forced is None:
            h_NR = strongest(h_NR, self.ranks)
        y_NO = y_BTO.reshape(-1, y_BTO.shape[-1])
        # Straight from the dictionary: attribute look-up through nn.Module is felt at one token a step.
        b_RO = self._buffers[self._keys[s]]
        assert b_RO is not None
        if b_RO.dtype == y_NO.dtype:
            out_NO = torch.addmm(y_NO, h_NR, b_RO)
        else:  # a quantised linear may answer in another dtype than the adapters are kept in
            out_NO = y_NO + (h_NR @ b_RO).to(y_NO.dtype)
        if self._dora[s] or self._bias[s]:
            w_BTE = w_BTSE[..., s if w_BTSE.shape[-2] > 1 else 0, :]
            if w_BTE.dim() > y_BTO.dim():  # a model that flattens its tokens before the linear
                w_BTE = w_BTE.flatten(0, -2)
        if self._bias[s]:
            bias_KO = getattr(self, f"bias{s}_KO")
            bias_BTO = w_BTE[..., getattr(self, f"bias{s}_K")].to(bias_KO.dtype) @ bias_KO
            out_NO = (out_NO.view(y_BTO.shape) + bias_BTO.to(out_NO.dtype)).view(out_NO.shape)
        if self._dora[s]:
            dora_K = getattr(self, f"dora{s}_K")
            scale_BTO = w_BTE[..., dora_K].to(y_BTO.dtype) @ getattr(self, f"dora{s}_KO")
            plain_BTO = y_BTO if bias_O is None else y_BTO - bias_O
            out_NO = out_NO + (scale_BTO * plain_BTO).reshape(out_NO.shape)
        return out_NO.view(y_BTO.shape)

    def _mix(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """(weighted A x [B·T, R], weights [B, T, S or 1, E]) of the group, computed by its first site for all of them."""
        if self._x is not x_BTD or self._mixed is None or self._version != _version(x_BTD):
            self._x, self._version, self._left = x_BTD, _version(x_BTD), len(self.spans)
            self._mixed = self._compute(x_BTD)
        mixed = self._mixed
        self._left -= 1
        if self._left <= 0:  # the last consumer lets go, so that nothing outlives the group
            self._x = self._mixed = None
        return mixed

    def _compute(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        w_BTSE = self._weights(x_BTD)
        h_BTR = nn.functional.linear(x_BTD.to(self.a_RD.dtype), self.a_RD)
        columns_R = self.expert_R if w_BTSE.shape[-2] == 1 else self.slot_R
        scale_BTR = w_BTSE.flatten(-2).index_select(-1, columns_R).to(h_BTR.dtype)
        if scale_BTR.dim() > h_BTR.dim():  # a model that flattens its tokens before the linear
            scale_BTR = scale_BTR.flatten(0, -2)
        return (h_BTR * scale_BTR).flatten(0, -2), w_BTSE

    def _weights(self, x_BTD: Tensor) -> Tensor:
        """[B or 1, T or 1, S or 1, E]"""
        control, forced = self.control, self.control.forced
        if forced is None:
            w_BTSE = self._routed(x_BTD)
        elif callable(forced):
            w_BTSE = forced(self.group, x_BTD)
        else:
            w_BTSE = forced.to(x_BTD.device)
            w_BTSE = w_BTSE.view(*w_BTSE.shape[:-1], *([1] * (3 - w_BTSE.dim())), 1, w_BTSE.shape[-1])
        if control.record is not None:
            lead = (*x_BTD.shape[:-1], len(self.spans), self.count)
            full = w_BTSE.detach().expand(lead)
            control.record |= {site: full[..., s, :].float() for s, site in enumerate(self.group.sites)}
        return w_BTSE

    def _routed(self, x_BTD: Tensor) -> Tensor:
        """The router's weights [B or 1, T or 1, S or 1, E]; computed by the gate, or already by the leader's."""
        if self._leader:
            w_BTSE = self._leader[0]._decision
            assert w_BTSE is not None
            return w_BTSE
        if self.gate is None or self.control.select is None:
            raise RuntimeError("this model has no router; set a mixture with model.mixture(...)")
        w_BTSE = self.control.select(self.gate(x_BTD, self.control.plan), self.group)
        if self._leads:
            self._decision = w_BTSE
        return w_BTSE


def placement(linear: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where and in what dtype a linear's input arrives: its own, seen through quantisation and accelerate's offloading."""
    weight = linear.weight
    hook_device = getattr(getattr(linear, "_hf_hook", None), "execution_device", None)
    assert isinstance(weight, Tensor)
    device = weight.device if hook_device is None else torch.device(hook_device)
    if weight.is_floating_point() and weight.dtype.itemsize >= 2:
        return device, weight.dtype
    compute = getattr(linear, "compute_dtype", None)
    return device, compute if isinstance(compute, torch.dtype) else torch.get_default_dtype()


def _version(x: Tensor) -> int:
    """Changes when x is written in place; tensors made in inference mode do not count, and tracing needs no guard."""
    if torch.compiler.is_compiling() or x.is_inference():
        return 0
    return x._version
