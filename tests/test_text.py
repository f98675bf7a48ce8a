"""Shots → token batches."""

from __future__ import annotations

import pytest
import torch
from conftest import Pico
from hypothesis import given
from hypothesis import strategies as st

from recycler import text
from recycler.base import load_base
from recycler.shots import Shot
from recycler.zoo.errors import InputError

SHOTS = [Shot("Add 1 and 2.", " 3"), Shot("Is a liable?", " yes, b is"), Shot("O c", " d")]


def words(base: object, ids: torch.Tensor) -> str:
    return str(base.tokenizer.decode(ids))  # type: ignore[attr-defined]


def test_a_causal_row_scores_its_completion_and_the_end(llama: Pico) -> None:
    base = load_base(str(llama.base))
    batch = text.encode(base, [[shot] for shot in SHOTS])
    for row, shot in enumerate(SHOTS):
        mask = batch.mask_BT["input"][row]
        assert words(base, batch.inputs["input_ids"][row][mask]) == shot.prompt + shot.completion
        labels = batch.labels_BT[row]
        assert words(base, labels[labels != text.IGNORE]) == shot.completion + "</s>"
        assert batch.inputs["position_ids"][row][mask].tolist() == list(range(int(mask.sum())))
        assert not mask[0] or mask.all()  # padded on the left


def test_a_chain_scores_every_completion_and_knows_its_segments(llama: Pico) -> None:
    base = load_base(str(llama.base))
    batch = text.encode(base, [SHOTS, SHOTS[:1]])
    ids, segments = batch.inputs["input_ids"][0], batch.segment_BT["input"][0]
    assert words(base, ids) == "\n\n".join(shot.prompt + shot.completion for shot in SHOTS)
    for number, shot in enumerate(SHOTS):
        lead = "\n\n" if number else ""
        assert words(base, ids[segments == number]) == lead + shot.prompt + shot.completion
    labels = batch.labels_BT[0]
    assert words(base, labels[labels != text.IGNORE]) == "".join(shot.completion for shot in SHOTS) + "</s>"
    assert (batch.segment_BT["input"][1] == -1).sum() == (~batch.mask_BT["input"][1]).sum()


def test_special_tokens_begin_a_context_and_nothing_else(llama: Pico) -> None:
    from tokenizers import processors

    base = load_base(str(llama.base))
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    base.tokenizer.backend_tokenizer.post_processor = bos
    ids = text.encode(base, [SHOTS]).inputs["input_ids"][0].tolist()
    assert ids[0] == 1 and ids.count(1) == 1


def test_an_encoder_decoder_row(t5: Pico) -> None:
    base = load_base(str(t5.base))
    batch = text.encode(base, [[shot] for shot in SHOTS])
    for row, shot in enumerate(SHOTS):
        source = batch.inputs["input_ids"][row][batch.mask_BT["input"][row]]
        assert words(base, source) == shot.prompt + "</s>"
        labels = batch.labels_BT[row]
        answer = labels[labels != text.IGNORE]
        assert words(base, answer) == shot.completion + "</s>"
        shifted = batch.inputs["decoder_input_ids"][row][batch.mask_BT["target"][row]]
        assert shifted.tolist() == [0, *answer[:-1].tolist()]
    with pytest.raises(InputError, match="one example a row"):
        text.encode(base, [SHOTS])


def test_chat_rows_go_through_the_template(llama: Pico) -> None:
    base = load_base(str(llama.base))
    chat = Shot("hi", "hello", (("system", "be brief"), ("user", "hi")))
    assert words(base, torch.tensor(text.prompt_ids(base, chat))) == "[system] be brief\n[user] hi\n[assistant] "
    base.tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        text.prompt_ids(base, chat)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200), st.integers(1, 8))
def test_batches_hold_every_row_once_within_their_limits(lengths: list[int], tokens: int, rows: int) -> None:
    batches = text.by_length(lengths, tokens, rows)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= rows
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens
