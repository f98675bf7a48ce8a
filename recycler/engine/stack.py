"""The stacked adapters of one input group: what is kept, and in which order. It knows nothing about models, methods or paths.

Ranks are concatenated, never padded: the down projections of all adapters and all sites of the group are one matrix, site by site
and in it adapter by adapter; the up projections are rank-major, so that one adapter is one contiguous slab on both sides.

Dimensions in names: N token, D input width, O output width, E adapter, R rank row, S site of the group, K adapter with something
besides factors (a DoRA magnitude, or a bias), P place in an adapter's longest slab.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from recycler.engine.sites import weight_OD
from recycler.zoo.lowrank import thin_svd

if TYPE_CHECKING:
    from recycler.engine.room import Room
    from recycler.zoo.adapter import Factors


class Slab(NamedTuple):
    """What one adapter adds at one site, in the dtype and on the device where it runs.

    Attributes:
        scale_O: DoRA's factor of the base's output, less 1. bias_O: of B.
    """

    a_RD: Tensor
    b_RO: Tensor
    scale_O: Tensor | None = None
    bias_O: Tensor | None = None


Slabs = Sequence[Mapping[int, Slab]]  # site → adapter → slab


def slab(update: Factors, linear: nn.Module) -> Slab:
    """An adapter's factors at a linear of the base, which is read for DoRA's norms, and for device and dtype."""
    device, dtype = placement(linear)
    b_OR, scale_O = update.b_OR, None
    if update.magnitude_O is not None:
        w_OD = weight_OD(linear)
        delta_OD = update.b_OR.to(w_OD.device) @ update.a_RD.to(w_OD.device)
        c_O = update.magnitude_O.to(w_OD.device) / torch.linalg.vector_norm(w_OD + delta_OD, dim=1)
        b_OR = b_OR * c_O.to(b_OR.device)[:, None]
        scale_O = (c_O - 1).to(device, dtype)
    bias_O = None if update.bias_O is None else update.bias_O.to(device, dtype)
    return Slab(update.a_RD.to(device, dtype), b_OR.T.to(device, dtype), scale_O, bias_O)


class Stack(nn.Module):
    """Slabs of a group's sites, stacked.

    Args:
        slabs: per site, adapter number → slab.
        count: how many adapters there are; their numbers are the columns of the weights.
        room: what is kept free beside them; `count` is its number of columns then.

    Attributes:
        spans: per site, where its rows begin and end.
        places: per site, adapter → where its rows begin and end.
        ranks: the longest slab's rows, of the adapters that it was made with. total: all rows.
    """

    a_RD: Tensor
    expert_R: Tensor
    slot_R: Tensor

    def __init__(
        self,
        slabs: Slabs,
        count: int,
        like: tuple[torch.device, torch.dtype],
        widths: Sequence[int],
        room: Room | None = None,
    ) -> None:
        super().__init__()
        self.count, self.widths = count, tuple(widths)
        device, dtype = like
        expert: list[int] = []
        slot: list[int] = []
        rows: list[Tensor] = []
        self.spans: list[tuple[int, int]] = []
        self.places: list[dict[int, tuple[int, int]]] = []
        self.extra: list[bool] = []  # per site: something besides factors
        for s, held in enumerate(slabs):
            start, places = len(expert), {}
            for e in sorted(held):
                rank = held[e].a_RD.shape[0]
                places[e] = (len(expert), len(expert) + rank)
                rows.append(held[e].a_RD)
                expert += [e] * rank
                slot += [s * count + e] * rank
            ups = [held[e].b_RO for e in sorted(held)]
            free = 0 if room is None else room.rows[s] - (len(expert) - start)
            if free:
                rows.append(torch.zeros(free, widths[0], device=device, dtype=dtype))
                ups.append(torch.zeros(free, widths[1 + s], device=device, dtype=dtype))
                expert += [count - 1] * free
                slot += [s * count + count - 1] * free
            self.spans.append((start, len(expert)))
            self.places.append(places)
            self._keep(f"b{s}_RO", torch.cat(ups) if ups else torch.zeros(0, widths[1 + s], device=device, dtype=dtype))
            self._extras(s, held, device, room)
        self._keep("a_RD", torch.cat(rows) if rows else torch.zeros(0, widths[0], device=device, dtype=dtype))
        self._keep("expert_R", torch.tensor(expert, dtype=torch.long, device=device))
        self._keep("slot_R", torch.tensor(slot, dtype=torch.long, device=device))
        self.total = len(expert)
        self.ranks = self._longest()
        self._tables: tuple[Tensor, Tensor] | None = None
        self._padded: dict[int, tuple[Tensor, Tensor]] = {}

    def _longest(self) -> int:
        return max((stop - start for places in self.places for start, stop in places.values()), default=0)

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def _extras(self, s: int, held: Mapping[int, Slab], device: torch.device, room: Room | None) -> None:
        """DoRA's output scales c − 1 and biases of B, where adapters have them, in the order of their adapters."""
        self.extra.append(False)
        for kind, name, most in (
            ("scale_O", "dora", None if room is None else room.scales[s]),
            ("bias_O", "bias", None if room is None else room.biases[s]),
        ):
            found = {e: value for e, one in sorted(held.items()) if (value := getattr(one, kind)) is not None}
            values, keys = [*found.values()], [*found]
            free = 0 if most is None else most - len(found)
            values += [self._buffers[f"b{s}_RO"].new_zeros(self.widths[1 + s])] * free  # type: ignore[union-attr]
            keys += [self.count - 1] * free
            self.extra[s] |= bool(keys)
            self._keep(f"{name}{s}_KO", torch.stack(values) if keys else None)
            self._keep(f"{name}{s}_K", torch.tensor(keys, device=device) if keys else None)

    def b_RO(self, s: int) -> Tensor:
        # Straight from the dictionary: attribute look-up through nn.Module is felt at one token a step.
        found = self._buffers[f"b{s}_RO"]
        assert found is not None
        return found

    def in_place(self, s: int) -> bool:
        """Whether the base's output may be written over: nobody takes gradients, and no DoRA scales it afterwards."""
        return not (self.extra[s] or torch.is_grad_enabled())

    @torch.inference_mode(False)
    @torch.no_grad()
    def become(self, other: Stack) -> None:
        """Holds what another one of the same shapes does, in its own memory."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                buffer.copy_(other.get_buffer(name))
        self.places = other.places
        self._tables, self._padded = None, {}

    def slabs(self) -> list[dict[int, Slab]]:
        """What it was made of, as views."""
        result = []
        for s, places in enumerate(self.places):
            held = {}
            for e, (start, stop) in places.items():
                first = self.spans[s][0]
                parts: list[Tensor | None] = []
                for name in ("dora", "bias"):
                    keys_K, rows_KO = self._buffers[f"{name}{s}_K"], self._buffers[f"{name}{s}_KO"]
                    keys = [] if keys_K is None else keys_K.tolist()
                    parts.append(rows_KO[keys.index(e)] if rows_KO is not None and e in keys else None)
                held[e] = Slab(self.a_RD[start:stop], self.b_RO(s)[start - first : stop - first], *parts)
            result.append(held)
        return result

    @torch.inference_mode(False)  # what is kept must also serve a later forward that takes gradients
    @torch.no_grad()
    def subset(self, adapters: Sequence[int]) -> Stack:
        """Some of the adapters, renumbered in the given order."""
        number = {e: i for i, e in enumerate(adapters)}
        some = [{number[e]: one for e, one in held.items() if e in number} for held in self.slabs()]
        return Stack(some, len(adapters), (self.a_RD.device, self.a_RD.dtype), self.widths)

    @torch.inference_mode(False)
    @torch.no_grad()
    def tables(self) -> tuple[Tensor, Tensor]:
        """(rows [S, E, P], there [S, E, P]): which rows are whose; 0 and not there where a slab is shorter, or absent."""
        if self._tables is None or not _like(self._tables[1], self.a_RD):
            longest = self._longest()
            rows_SEP = torch.zeros(len(self.spans), self.count, longest, dtype=torch.long)
            there_SEP = torch.zeros(rows_SEP.shape)
            for s, places in enumerate(self.places):
                rows_SEP[s] = self.spans[s][0] if places else 0
                for e, (start, stop) in places.items():
                    rows_SEP[s, e, : stop - start] = torch.arange(start, stop)
                    there_SEP[s, e, : stop - start] = 1
            self._tables = (rows_SEP.to(self.a_RD.device), there_SEP.to(self.a_RD))
        return self._tables

    @torch.inference_mode(False)
    @torch.no_grad()
    def padded(self, s: int) -> tuple[Tensor, Tensor]:
        """(A [E, D, P], B [E, P, O]) of a site, slabs padded to the same multiple of 8. A copy, made when first asked for."""
        found = self._padded.get(s)
        if found is None or not _like(found[0], self.a_RD):
            size = -(-max((stop - start for start, stop in self.places[s].values()), default=1) // 8) * 8
            a_EPD = self.a_RD.new_zeros(self.count, size, self.a_RD.shape[1])
            b_EPO = self.a_RD.new_zeros(self.count, size, self.b_RO(s).shape[1])
            first = self.spans[s][0]
            for e, (start, stop) in self.places[s].items():
                a_EPD[e, : stop - start] = self.a_RD[start:stop]
                b_EPO[e, : stop - start] = self.b_RO(s)[start - first : stop - first]
            self._padded[s] = found = (a_EPD.transpose(1, 2), b_EPO)
        return found

    def spectral(self) -> None:
        """Makes every adapter's factors those of the SVD of what it adds at a site (DoRA's scale of B included), A = ΣVᵀ and
        B = U: the products stay what they are, and A x is the size of what each component adds."""
        for s, held in enumerate(self.slabs()):
            for one in held.values():
                thin = thin_svd(one.a_RD.cpu(), one.b_RO.T.cpu())
                found = len(thin.s_K)  # fewer than there are rows where the rank is above a width
                for part, new in ((one.a_RD, thin.s_K[:, None] * thin.vt_KD), (one.b_RO, thin.u_OK.T)):
                    part.zero_()
                    part[:found] = new.to(part)
            self._padded.pop(s, None)

    def extras(self, s: int, out_NO: Tensor, y_BTO: Tensor, w_BTE: Tensor, bias_O: Tensor | None) -> Tensor:
        """`out_NO` plus what the mixture adds besides factors: biases of B, and DoRA's scale of the base's own output.

        Args:
            y_BTO: the base's output; bias_O: the bias in it, which DoRA does not scale.
        """
        buffers = self._buffers
        if w_BTE.dim() > y_BTO.dim():  # a model that flattens its tokens before the linear
            w_BTE = w_BTE.flatten(0, -2)
        bias_KO, bias_K = buffers[f"bias{s}_KO"], buffers[f"bias{s}_K"]
        if bias_KO is not None and bias_K is not None:
            bias_BTO = w_BTE[..., bias_K].to(bias_KO.dtype) @ bias_KO
            out_NO = (out_NO.view(y_BTO.shape) + bias_BTO.to(out_NO.dtype)).view(out_NO.shape)
        dora_KO, dora_K = buffers[f"dora{s}_KO"], buffers[f"dora{s}_K"]
        if dora_KO is not None and dora_K is not None:
            scale_BTO = (w_BTE[..., dora_K].to(dora_KO.dtype) @ dora_KO).to(y_BTO.dtype)
            plain_BTO = y_BTO if bias_O is None else y_BTO - bias_O
            out_NO = out_NO + (scale_BTO * plain_BTO).reshape(out_NO.shape)
        return out_NO


def _like(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and one.dtype == other.dtype


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
