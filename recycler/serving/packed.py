"""Whose mixture a token has, where the new tokens of many requests are one row.

transformers' continuous batching packs the next tokens of all requests into [1, T]. Before each such batch, `Mixtures` looks up what
every request in it is to be run with, and lays it beside the packed tokens:

- all requests have mixtures of their own: a tensor of weights [1, T, E], and the engine multiplies with nobody else;
- all are the router's to decide, token by token: nothing is forced;
- some of each: a function that asks the router and keeps to the mixtures where there are some.

Keys and values of a prefix depend on its mixture, so that requests which begin alike must not share them: `unshared`.

Dimensions in names: T packed token, N request in the batch, E adapter, S site of a group, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig

from recycler.routers.base import Router
from recycler.routers.protocol import Few, Function, Group
from recycler.routers.sequence import Decision, SequenceRouter
from recycler.routers.static import StaticRouter

if TYPE_CHECKING:
    from recycler.routed import RoutedModel


def unshared(config: ContinuousBatchingConfig) -> ContinuousBatchingConfig:
    """The configuration under which a packed batch may hold several mixtures: no prefix is shared, and what is laid beside a batch
    on the host is there when the batch runs."""
    return replace(
        config,
        allow_block_sharing=False,
        use_async_batching=False,
        use_cuda_graph=False,
        varlen_compile_config=None,
        decode_compile_config=None,
        default_compile_level=0,
    )


def unpackable(model: RoutedModel) -> str:
    """Why this model's router cannot run in packed batches; "" where it can."""
    router = model.router
    if model.source.encoder_decoder:
        return "the base is an encoder–decoder"
    if isinstance(router, SequenceRouter) and "eager" in str(model.base.config._attn_implementation):
        return "the base's attention is eager, and packed it cannot read a prompt beside the batch"
    if router is None or isinstance(router, SequenceRouter):
        return ""
    if router.base_pass or type(router).prepare is not Router.prepare:
        return f"{router.method()} decides beside the forward, or for a whole row"
    if any(bank.ranks is not None for bank in model.engine.banks):
        return f"{router.method()} chooses among components, which a given mixture does not"
    return ""


def decided(model: RoutedModel, prompts: Sequence[Sequence[int]], tasks: Sequence[str | None] | None = None) -> Tensor | None:
    """What the router decides once for each prompt, [N, E]; None from one that decides token by token.

    Raises:
        UsageError: as the router does.
    """
    router = model.router
    if isinstance(router, StaticRouter):
        return router.weights_E.expand(len(prompts), -1)
    if not isinstance(router, SequenceRouter):
        return None
    padded = model.tokenizer.pad({"input_ids": [list(ids) for ids in prompts]}, padding_side="left", return_tensors="pt")
    with torch.no_grad(), model.labelled(tasks or [None] * len(prompts)):
        plan: Decision = router.prepare(model.reading, padded.to(model.source.device))
    return plan.weights_BE.float().cpu()


class Mixtures:
    """The mixtures of a manager's requests. While it is attached, the model is the manager's alone.

    Attributes:
        rows: request id → weights [E]; None for a request whose tokens the router decides. Requests that are not in it are refused
            by a KeyError: nobody is run with a mixture that nobody chose.
        tallied: request id → (sum of weights over tokens, mean over sites [E]; tokens), of those the router decides.
    """

    def __init__(self, model: RoutedModel, rows: Mapping[str, Tensor | None] | None = None) -> None:
        self.model = model
        self.rows: dict[str, Tensor | None] = dict(rows or {})
        self.tallied: dict[str, tuple[Tensor, int]] = {}
        self.batch: list[Any] = []  # what runs now, in the order of its tokens
        self._banks = {bank.group.name: bank for bank in model.engine.banks}
        self._few = model.engine.control.few  # the router's own

    def attach(self, manager: Any) -> None:
        """Lays mixtures beside every batch of a manager of transformers, whose batch processor is made here."""
        manager.warmup()
        inputs = manager.batch_processor.inputs_and_outputs
        prepare = inputs.prepare_batch_tensors

        def prepared(requests_in_batch: Sequence[Any], *args: Any, **options: Any) -> None:
            prepare(requests_in_batch, *args, **options)
            self.lay(requests_in_batch, inputs.num_q_tokens)

        inputs.prepare_batch_tensors = prepared

    def release(self) -> None:
        """The model is as it was."""
        control = self.model.engine.control
        control.forced, control.few, control.record = None, self._few, None
        self.rows.clear()
        self.batch = []

    def forget(self, name: str) -> None:
        """A request that is done."""
        self.rows.pop(name, None)
        self.tallied.pop(name, None)

    def lay(self, batch: Sequence[Any], tokens: int) -> None:
        """Puts the mixtures of a batch where the engine looks; what is beyond its tokens, up to `tokens`, is padding."""
        self.batch = list(batch)
        control, model = self.model.engine.control, self.model
        rows = [self.rows[_parent(future.state.request_id)] for future in batch]
        lengths = [future.query_length for future in batch]
        device = model.source.device
        control.record = {} if any(row is None for row in rows) else None
        if all(row is None for row in rows):
            control.forced, control.few = None, self._few
            return
        empty_E = torch.zeros(len(model.names))
        rows_NE = torch.stack([empty_E if row is None else row for row in rows])
        length_N = torch.tensor(lengths)
        weights_TE = rows_NE.repeat_interleave(length_N, 0)
        padding = tokens - len(weights_TE)
        weights_TE = model.engine.widen(torch.nn.functional.pad(weights_TE, (0, 0, 0, padding))).to(device)
        if all(row is not None for row in rows):
            # One row holds everybody's tokens: at most as many adapters are in it as are in any of its mixtures.
            used = Few.of(rows_NE).used
            control.forced, control.few = weights_TE[None], Few(used, len(used))
            return
        free_T = torch.tensor([row is None for row in rows]).repeat_interleave(length_N)
        free_T = torch.nn.functional.pad(free_T, (0, padding)).to(device)
        control.forced, control.few = self._mixed(weights_TE[None, :, None], free_T[None, :, None, None]), None

    def _mixed(self, fixed_1T1E: Tensor, free_1T11: Tensor) -> Function:
        def weights(group: Group, x_BTD: Tensor) -> Tensor:
            routed_BTSE = self._banks[group.name].routed(x_BTD)
            return torch.where(free_1T11, routed_BTSE, fixed_1T1E.to(routed_BTSE.dtype))

        return weights

    def tally(self) -> None:
        """Adds up who fired in the forward that just ran, for the requests whose tokens the router decides."""
        record = self.model.engine.control.record
        if not record:
            return
        share_TE = torch.stack([w_BTE[0] for w_BTE in record.values()]).mean(0).cpu()
        record.clear()
        start = 0
        for future in self.batch:
            name, length = future.state.request_id, future.query_length
            if name in self.rows and self.rows[name] is None:
                sum_E, tokens = self.tallied.get(name, (torch.zeros(share_TE.shape[-1]), 0))
                self.tallied[name] = sum_E + share_TE[start : start + length].sum(0), tokens + length
            start += length


def _parent(name: str) -> str:
    """Of several answers to one prompt, all have the prompt's mixture."""
    return name.partition("__child")[0]


def share(names: Sequence[str], weights_E: Tensor) -> Mapping[str, float]:
    """Who has a part, largest first."""
    found = {name: weight for name, weight in zip(names, weights_E.tolist(), strict=True) if weight}
    return dict(sorted(found.items(), key=lambda item: -abs(item[1])))
