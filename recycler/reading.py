"""What routers may read of a prompt: `recycler.routers.protocol.Reader`, over a RoutedModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recycler import annotating, sentences, text
from recycler.zoo.errors import InputError, UsageError

if TYPE_CHECKING:
    from recycler.routed import RoutedModel


class Reading:
    """A RoutedModel's prompts, as texts, as embeddings and as the bare base's hidden states."""

    def __init__(self, model: RoutedModel) -> None:
        self.model, self.adapters = model, model.names
        self.width = int(model.base.get_input_embeddings().weight.shape[1])
        self.chains = not model.source.encoder_decoder

    @property
    def tasks(self) -> Sequence[str | None] | None:
        return self.model.tasks

    def texts(self, inputs: Mapping[str, Any]) -> list[str]:
        ids_BT, mask_BT = _ids(inputs)
        rows = [ids[mask].tolist() for ids, mask in zip(ids_BT, mask_BT, strict=True)]
        return list(self.model.tokenizer.batch_decode(rows, skip_special_tokens=True))

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.model.tokenizer(list(texts), add_special_tokens=False).input_ids]

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        size = getattr(self.model.config, "max_position_embeddings", None)
        ids = self.model.tokenizer(list(texts)).input_ids
        return text.padded(self.model.source, [row[-size:] if size else row for row in ids])

    def embed(self, texts: Sequence[str], encoder: str) -> Tensor:
        return sentences.embed(texts, encoder)

    def ask(self, prompts: Sequence[str], llm: str, *, temperature: float = 0.0, seed: int = 0) -> list[str]:
        return annotating.ask(prompts, llm, temperature=temperature, seed=seed)

    @torch.no_grad()
    def states(self, inputs: Mapping[str, Any], depth: float = 1.0) -> tuple[Tensor, Tensor]:
        ids_BT, mask_BT = _ids(inputs)
        model = self.model
        reads = model.base.get_encoder() if model.source.encoder_decoder else model.base.base_model
        plain: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": mask_BT.long()}
        if not model.source.encoder_decoder:
            plain = {**text.causal_inputs(model.source, ids_BT, mask_BT), "use_cache": False}
        with model.disabled():
            states_BTH = reads(**plain).last_hidden_state if depth == 1.0 else _after(reads, depth, plain)
        return states_BTH.float(), mask_BT


class _Enough(Exception):
    """The layer that was asked for has run; those above it need not."""


def _after(reads: nn.Module, depth: float, inputs: Mapping[str, Any]) -> Tensor:
    """What comes out of the layer at `depth`; nothing above it runs."""
    stack = layers(reads)
    found: list[Tensor] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        if not hasattr(reads, "unshard"):  # one in parts over several processes must come to its end
            raise _Enough

    handle = stack[max(round(depth * len(stack)), 1) - 1].register_forward_hook(stop)
    try:
        with suppress(_Enough):
            reads(**inputs)
    finally:
        handle.remove()
    return found[0]


def layers(reads: Any) -> nn.ModuleList:
    """The stack of equal layers that a transformer is."""
    count = reads.config.num_hidden_layers
    stacks = [module for module in reads.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not stacks:
        raise InputError(
            f"{type(reads).__name__} shows no stack of {count} layers.", "", "Read its last layer: depth=1; or none: state=0."
        )
    return stacks[0]


def _ids(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(input_ids [B, T], mask of real tokens [B, T])"""
    ids_BT = inputs.get("input_ids")
    if ids_BT is None:
        raise UsageError(
            "This router reads the prompt, and was given no input_ids.",
            "It cannot read embeddings or encoder outputs.",
            "Pass input_ids, or use a router that decides token by token.",
        )
    mask = inputs.get("attention_mask")
    return ids_BT, torch.ones_like(ids_BT, dtype=torch.bool) if mask is None else mask.bool()
