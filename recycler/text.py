"""Shots and prompts → padded token batches, for causal and encoder–decoder bases alike.

Causal rows are padded on the left, so that answers end together and only their logits need computing; position ids are given
explicitly, so that padding changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recycler.base import Base
from recycler.routers.protocol import Batch
from recycler.shots import Shot
from recycler.zoo.errors import InputError

IGNORE = -100
SEPARATOR = "\n\n"  # between chained examples


def prompt_ids(base: Base, shot: Shot, *, first: bool = True) -> list[int]:
    """Token ids of a shot's prompt; chat rows go through the base's chat template.

    Args:
        first: False inside a chain, where special tokens such as a beginning of text do not belong.

    Raises:
        InputError: a chat row, and the base has no chat template.
    """
    if shot.messages is None:
        return list(base.tokenizer(shot.prompt, add_special_tokens=first).input_ids)
    if not base.tokenizer.chat_template:
        raise InputError(
            f"{base.id} has no chat template.",
            "Rows with messages need one.",
            "Use rows with prompt and completion, or an instruct base.",
            code="E_CHAT_TEMPLATE",
        )
    turns = [{"role": role, "content": content} for role, content in shot.messages]
    text = base.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(base.tokenizer(text, add_special_tokens=False).input_ids)


def completion_ids(base: Base, shot: Shot) -> list[int]:
    """Token ids of a shot's completion, without the end token. Tokenised apart from the prompt, as generation meets it."""
    return list(base.tokenizer(shot.completion, add_special_tokens=False).input_ids)


def encode(base: Base, rows: Sequence[Sequence[Shot]]) -> Batch:
    """Tokenises rows of chained shots. Every completion is scored, and the end token after the last one.

    Raises:
        InputError: a chain of several shots for an encoder–decoder, where the last answer alone is decoded.
    """
    if base.encoder_decoder:
        return _encode_pair(base, rows)
    end = base.tokenizer.eos_token_id
    separator = list(base.tokenizer(SEPARATOR, add_special_tokens=False).input_ids)
    ids_B, labels_B, segments_B = [], [], []
    for chain in rows:
        ids: list[int] = []
        scored: list[bool] = []
        segments: list[int] = []
        for number, shot in enumerate(chain):
            prompt, completion = prompt_ids(base, shot, first=number == 0), completion_ids(base, shot)
            prompt = separator + prompt if number else prompt
            ids += prompt + completion
            scored += [False] * len(prompt) + [True] * len(completion)
            segments += [number] * (len(prompt) + len(completion))
        # position t predicts token t + 1
        targets = [*ids[1:], end]
        is_scored = [*scored[1:], True]
        ids_B.append(ids)
        labels_B.append([t if s else IGNORE for t, s in zip(targets, is_scored, strict=True)])
        segments_B.append(segments)
    device = base.device
    segment_BT = _pad(segments_B, -1, device, left=True)
    mask_BT = segment_BT >= 0
    inputs = causal_inputs(base, _pad(ids_B, base.tokenizer.pad_token_id, device, left=True), mask_BT)
    return Batch(inputs, _pad(labels_B, IGNORE, device, left=True), {"input": mask_BT}, {"input": segment_BT})


def causal_inputs(base: Base, ids_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
    """Forward's keyword arguments for padded causal rows."""
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT.long()}
    if "position_ids" in inspect.signature(base.model.forward).parameters:
        inputs["position_ids"] = (mask_BT.long().cumsum(-1) - 1).clamp(min=0)
    return inputs


def _encode_pair(base: Base, rows: Sequence[Sequence[Shot]]) -> Batch:
    if any(len(chain) != 1 for chain in rows):
        raise InputError("An encoder–decoder takes one example a row.", "Its decoder holds one answer.", "")
    device, end = base.device, base.tokenizer.eos_token_id
    start = base.model.config.decoder_start_token_id
    sources = [prompt_ids(base, chain[0]) for chain in rows]
    answers = [[*completion_ids(base, chain[0]), end] for chain in rows]
    pad = base.tokenizer.pad_token_id
    ids_BT = _pad(sources, pad, device)
    labels_BT = _pad(answers, IGNORE, device)
    decoder_BT = _pad([[start, *answer[:-1]] for answer in answers], pad, device)
    source_BT = _pad([[0] * len(s) for s in sources], -1, device)
    target_BT = _pad([[0] * len(a) for a in answers], -1, device)
    inputs = {
        "input_ids": ids_BT,
        "attention_mask": (source_BT >= 0).long(),
        "decoder_input_ids": decoder_BT,
        "decoder_attention_mask": (target_BT >= 0).long(),
    }
    masks = {"input": source_BT >= 0, "target": target_BT >= 0}
    return Batch(inputs, labels_BT, masks, {"input": source_BT, "target": target_BT})  # type: ignore[arg-type]


def prompts(base: Base, rows: Sequence[Sequence[Shot]]) -> dict[str, Tensor]:
    """Inputs of `generate` for a batch of prompts: rows of chained shots up to where the last one's answer would begin."""
    separator = list(base.tokenizer(SEPARATOR, add_special_tokens=False).input_ids)
    ids = []
    for chain in rows:
        row: list[int] = []
        for number, shot in enumerate(chain):
            row += (separator if number else []) + prompt_ids(base, shot, first=number == 0)
            row += completion_ids(base, shot) if number < len(chain) - 1 else []
        ids.append(row)
    return padded(base, ids)


def padded(base: Base, ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Rows of token ids as the base takes them together: ``input_ids`` and ``attention_mask`` [B, T]."""
    left = not base.encoder_decoder
    mask_BT = _pad([[1] * len(row) for row in ids], 0, base.device, left)
    return {"input_ids": _pad(ids, base.tokenizer.pad_token_id, base.device, left), "attention_mask": mask_BT}


def by_length(lengths: Sequence[int], tokens: int | None = None, rows: int | None = None) -> list[list[int]]:
    """Row numbers in batches of like length, longest first, each within `tokens` padded tokens and `rows` rows."""
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        last = batches[-1] if batches else []
        fits = last and (tokens is None or (len(last) + 1) * lengths[last[0]] <= tokens) and (rows is None or len(last) < rows)
        if fits:
            last.append(number)
        else:
            batches.append([number])
    return batches


def _pad(rows: Sequence[Sequence[int]], value: int, device: Any, left: bool = False) -> Tensor:
    width = max(map(len, rows))
    padded = [[value] * (width - len(r)) + list(r) if left else list(r) + [value] * (width - len(r)) for r in rows]
    return torch.tensor(padded, device=device)
