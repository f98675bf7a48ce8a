"""What a user of transformers tries first: a pipeline, `from_pretrained`, `push_to_hub`, and a folder that a pipeline saved."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TextStreamer, pipeline
from way import NAMES, PROMPTS, Way, go, logits, one_by_one

import recycler
from recycler.routed import RoutedModel
from recycler.zoo.errors import UsageError

GREEDY: Any = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}


@pytest.fixture(scope="module")
def one(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Way:
    return go(llama, tmp_path_factory.mktemp("transformers"))


@pytest.fixture(scope="module")
def model(one: Way) -> RoutedModel:
    return recycler.load(one.folder)


def generator(model: RoutedModel, **options: Any) -> Any:
    return pipeline("text-generation", model=model, tokenizer=model.tokenizer, **options)  # type: ignore[call-overload]


def test_a_pipeline_answers_as_the_model_does(model: RoutedModel) -> None:
    """One prompt, several, several at once, and on a device that is named."""
    expected = one_by_one(model, PROMPTS, 5)
    assert len(set(expected)) == 2
    for options in ({}, {"device": "cpu"}, {"device": -1}):
        answers = generator(model, **options)
        assert answers(PROMPTS[0], **GREEDY)[0]["generated_text"] == expected[0]
    assert [one[0]["generated_text"] for one in answers(PROMPTS, **GREEDY)] == expected
    together = generator(model)
    together.tokenizer.padding_side = "left"
    assert [one[0]["generated_text"] for one in together(PROMPTS, batch_size=2, **GREEDY)] == expected
    with model.only("law"):
        assert together(PROMPTS[0], **GREEDY)[0]["generated_text"] == one_by_one(model, PROMPTS[:1], 5)[0]


def test_a_pipeline_chats(model: RoutedModel) -> None:
    turns = [{"role": "user", "content": "Add 1 and b."}]
    text = model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = model.tokenizer(text, return_tensors="pt", add_special_tokens=False)
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    said = generator(model)(turns, max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert said[0] == turns[0] and said[-1]["role"] == "assistant"
    assert said[-1]["content"] == model.tokenizer.decode(ids, skip_special_tokens=True)


def test_a_pipeline_streams(model: RoutedModel, capsys: pytest.CaptureFixture[str]) -> None:
    streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = generator(model)(PROMPTS[1], streamer=streamer, **GREEDY)[0]["generated_text"]
    assert answer and capsys.readouterr().out.strip() == answer.strip()


def test_transformers_has_no_complaint(model: RoutedModel, one: Way, caplog: pytest.LogCaptureFixture) -> None:
    """A model that is not in its table is called unsupported, with the names of all that are; the others stay as they are."""
    log = logging.getLogger("transformers")
    log.addHandler(caplog.handler)
    try:
        generator(model)
    finally:
        log.removeHandler(caplog.handler)
    assert "not supported" not in caplog.text
    assert type(AutoModelForCausalLM.from_pretrained(one.pico.base)) is type(model.base)
    with pytest.raises(ValueError, match="recycler"):
        AutoConfig.for_model("recycler")  # no configuration of that name


def test_what_a_pipeline_saved_is_loaded(model: RoutedModel, tmp_path: Path) -> None:
    """It puts the tokenizer's files beside the model's, which nothing minds."""
    generator(model).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer_config.json").exists()
    for again in (recycler.load(tmp_path / "saved"), RoutedModel.from_pretrained(tmp_path / "saved")):
        assert again.names == NAMES and torch.equal(logits(again), logits(model))
        expected = one_by_one(model, PROMPTS, 5)
        assert [a[0]["generated_text"] for a in generator(again)(PROMPTS, **GREEDY)] == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_from_pretrained_takes_what_transformers_takes(one: Way, dtype: Any) -> None:
    loaded = RoutedModel.from_pretrained(str(one.folder), dtype=dtype, device_map="cpu")
    assert loaded.base.dtype == torch.bfloat16 and loaded.device.type == "cpu"
    with pytest.raises(UsageError, match="no dtype 'int8'"):
        RoutedModel.from_pretrained(one.folder, dtype=torch.int8)
