"""Answering files and prompts with a composed model, on pico models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from way import PROMPTS, Way, never, one_by_one

import recycler
from recycler.run import answer_file, answer_prompts
from recycler.zoo.errors import InputError, UsageError


def test_answers_keep_order_and_rows(way: Way, tmp_path: Path) -> None:
    rows = [{"prompt": "x" * (i * 7 % 5 + 1), "id": i, "nested": {"ü": [None, 1.5]}} for i in range(7)]
    rows[3] = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the reference"}], "id": 3}
    source, target = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    source.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf8")
    model = recycler.load(way.folder)
    lines = answer_file(lambda: model, source, target, max_new_tokens=4, batch_size=3)
    written = [json.loads(line) for line in target.read_text(encoding="utf8").split("\n") if line]
    assert [json.loads(line) for line in lines] == written and [row["id"] for row in written] == list(range(7))
    assert [{key: value for key, value in row.items() if key != "generated"} for row in written] == rows
    chat = model.tokenizer.apply_chat_template(rows[3]["messages"][:1], tokenize=False, add_generation_prompt=True)  # type: ignore[index]
    prompts = [chat if i == 3 else str(row["prompt"]) for i, row in enumerate(rows) if i != 3 or way.pico.kind == "llama"]
    answers = [row["generated"] for i, row in enumerate(written) if i != 3 or way.pico.kind == "llama"]
    assert answers == one_by_one(model, prompts, 4)
    assert [path.name for path in target.parent.iterdir()] == ["out.jsonl"]


def test_only_one_adapter_or_none(way: Way) -> None:
    model = recycler.load(way.folder)
    with model.only("code"):
        expected = one_by_one(model, PROMPTS, 4)
    assert answer_prompts(model, PROMPTS, max_new_tokens=4, only="code") == expected
    with model.disabled():
        plain = one_by_one(model, PROMPTS, 4)
    assert answer_prompts(model, PROMPTS, max_new_tokens=4, only="base") == plain != expected
    with pytest.raises(UsageError, match=r"no adapter prose.*code, law, math, poem"):
        answer_prompts(model, PROMPTS, only="prose")


@pytest.mark.parametrize("prompt", ["", " \n", "half \ud83d"])
def test_prompts_that_are_no_text(way: Way, prompt: str) -> None:
    with pytest.raises(UsageError, match="cannot be used"):
        answer_prompts(recycler.load(way.folder), ["fine", prompt])


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "a"}\n{"prompt": 3}\n{"text": "b"}\nnope\n', r"3 rows .*:4 \(not JSON\).*:2 \(no text.*:3 \(no text"),
        (
            '{"messages": []}\n{"messages": [1]}\n[]\n',
            r"3 rows .*:1 \(messages hold no.*:2 \(messages must.*:3 \(not an object",
        ),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', "messages hold no prompt"),
        ('{"prompt": "\\ud83d"}', "surrogate"),
        ("\n", "is empty"),
    ],
)
def test_rows_that_cannot_be_answered(tmp_path: Path, text: str, message: str) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(text, encoding="utf8")
    with pytest.raises(InputError, match=message):
        answer_file(never, source, target)
    assert not target.exists()


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}', encoding="utf8")
    with pytest.raises(UsageError, match=r"exists.*--force"):
        answer_file(never, source, source)
    with pytest.raises(UsageError, match="is a folder"):
        answer_file(never, source, tmp_path, force=True)
    with pytest.raises(UsageError, match="There is no file"):
        answer_file(never, tmp_path / "none.jsonl", None)
