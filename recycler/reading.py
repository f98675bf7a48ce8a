"""What routers may read of a prompt: `recycler.routers.protocol.Reader`, over a RoutedModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recycler import sentences, text
from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from recycler.routed import RoutedModel


class Reading:
    """A RoutedModel's prompts, as texts, as embeddings and as the bare base's hidden states."""

    def __init__(self, model: RoutedModel) -> None:
        self.model, self.adapters = model, model.names
        self.width = int(model.base.get_input_embeddings().weight.shape[1])

    @property
    def tasks(self) -> Sequence[str | None] | None:
        return self.model.tasks

    def texts(self, inputs: Mapping[str, Any]) -> list[str]:
        ids_BT, mask_BT = _ids(inputs)
        rows = [ids[mask].tolist() for ids, mask in zip(ids_BT, mask_BT, strict=True)]
        return list(self.model.tokenizer.batch_decode(rows, skip_special_tokens=True))

    def embed(self, texts: Sequence[str], encoder: str) -> Tensor:
        return sentences.embed(texts, encoder)

    @torch.no_grad()
    def states(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        ids_BT, mask_BT = _ids(inputs)
        model = self.model
        with model.disabled():
            if model.source.encoder_decoder:
                output = model.base.get_encoder()(input_ids=ids_BT, attention_mask=mask_BT.long())
                return output.last_hidden_state.float(), mask_BT
            # The hidden states that the head would read; the head itself sees one token.
            plain = text.causal_inputs(model.source, ids_BT, mask_BT)
            output = model.base(**plain, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        return output.hidden_states[-1].float(), mask_BT


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
