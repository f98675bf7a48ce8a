"""The base pass: before every forward of a routed model, one of its bare base over the same new tokens.

Routers with `base_pass` (X-LoRA) decide by the bare base's hidden states. Those of past tokens never change, so the bare base keeps
a KV cache of its own beside the adapted run's: decoding with the two is exactly what two full passes a token would give, which is
what released X-LoRA runs (it refuses a cache).

The second cache belongs to the first one. A cache that a routed forward has seen becomes a `Paired` one: whatever is done to it
(beams reordered, tokens cropped, rows repeated or selected, a reset, a copy) is done to its companion too.

Encoder–decoders have no base pass: their router reads the encoder's states once a sequence.
"""

from __future__ import annotations

import copy
import inspect
from functools import cache as memoise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache

from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from recycler.engine.bank import Control
    from recycler.routers.base import Router

# Of what a model with a head is given, what asks for outputs that the base pass has no use for.
_OUTPUTS = {"output_attentions", "output_hidden_states", "return_dict"}


class Companion:
    """The base pass of one model, as hooks around its forward. It runs where the router decides: not under another mixture, and
    not while adapters are disabled.

    Args:
        base: a causal language model from transformers.
        control: the model's; during a forward its plan is what the router's `step` made of that forward's states.
    """

    def __init__(self, base: Any, control: Control, router: Router) -> None:
        self.control, self.router = control, router
        self.inner: Any = base.base_model
        self.names = list(inspect.signature(base.forward).parameters)
        self.head_only = (set(self.names) - set(inspect.signature(self.inner.forward).parameters)) | _OUTPUTS
        self._kept: list[
            tuple[Any, Cache | None]
        ] = []  # (the sequence's plan, the cache that is yet to be paired) of this forward
        self._handles = [
            base.register_forward_pre_hook(self._before, with_kwargs=True),
            base.register_forward_hook(self._after, always_call=True),
        ]

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        control = self.control
        if not control.enabled or control.forced is not None:
            return
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        states_BTH, fresh = self._run(inputs)
        self._kept.append((control.plan, fresh))
        control.plan = self.router.step(states_BTH, control.plan)

    @torch.no_grad()
    def _run(self, inputs: dict[str, Any]) -> tuple[Tensor, Cache | None]:
        """The bare base's last hidden states, and its cache where the forward will make one too."""
        given = {name: value for name, value in inputs.items() if name not in self.head_only}
        past = given.get("past_key_values")
        if past is not None:
            given["past_key_values"] = _companion(past)
        with self.control.set(enabled=False):
            output = self.inner(**given)
        return output.last_hidden_state, None if past is not None else getattr(output, "past_key_values", None)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._kept:
            return
        self.control.plan, fresh = self._kept.pop()
        if fresh is not None and output is not None:
            parts = output if isinstance(output, tuple) else output.values()
            for made in parts:
                if isinstance(made, Cache):
                    _pair(made, fresh)


class Paired:
    """What is added to the class of a cache that has a companion."""

    companion: Cache

    def reorder_cache(self, *args: Any, **kwargs: Any) -> None:
        self._both("reorder_cache", *args, **kwargs)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        self._both("crop", *args, **kwargs)

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self._both("reset", *args, **kwargs)

    def batch_repeat_interleave(self, *args: Any, **kwargs: Any) -> None:
        self._both("batch_repeat_interleave", *args, **kwargs)

    def batch_select_indices(self, *args: Any, **kwargs: Any) -> None:
        self._both("batch_select_indices", *args, **kwargs)

    def activate_past_recording(self, *args: Any, **kwargs: Any) -> None:
        self._both("activate_past_recording", *args, **kwargs)

    def _both(self, method: str, *args: Any, **kwargs: Any) -> None:
        getattr(super(), method)(*args, **kwargs)
        getattr(self.companion, method)(*args, **kwargs)


@memoise
def _paired(cls: Any) -> Any:
    # A class and not wrapped methods, so that a copy of the cache changes the copy's companion.
    return type(f"Paired{cls.__name__}", (Paired, cls), {})


def _pair(cache: Cache, companion: Cache) -> None:
    cls: Any = type(cache)
    cache.__class__ = _paired(cls)
    cache.companion = companion  # type: ignore[attr-defined]


def _companion(cache: Cache) -> Cache:
    """The bare base's cache beside an adapted run's, made where that is empty.

    Raises:
        UsageError: the cache holds tokens that the base pass has not seen.
    """
    held = cache.get_seq_length()
    if not isinstance(cache, Paired):
        if int(held) > 0:
            raise _stranger()
        companion = copy.deepcopy(cache)  # the same kind and size
        _pair(cache, companion)
        return companion
    # A static cache counts on the device, and is not asked.
    if isinstance(held, int) and held != cache.companion.get_seq_length():
        raise _stranger()
    return cache.companion


def _stranger() -> UsageError:
    return UsageError(
        "This KV cache holds tokens that the router has not seen.",
        "It decides by the bare base's states, whose own cache runs beside this one; these tokens were run with another mixture.",
        "Start from an empty cache, or from one that this router filled.",
    )
