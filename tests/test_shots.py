"""Rows → shots: what is read, what is refused by file and line, and that a sample is the same every time."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycler import Shots
from recycler.shots import Shot, parse_row
from recycler.zoo.errors import InputError, UsageError

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return file


def pairs(count: int, task: str = "math") -> list[dict[str, str]]:
    return [{"prompt": f"{task} {i}", "completion": f"{i}"} for i in range(count)]


def test_prompt_and_completion(tmp_path: Path) -> None:
    shots = Shots.from_files(write(tmp_path / "math.jsonl", {"prompt": "1+1=", "completion": " 2 ", "id": 7}))
    assert list(shots) == ["math"] and len(shots) == 1
    assert shots["math"] == (Shot("1+1=", " 2 "),)  # kept as written: spaces are tokens
    assert shots["math"][0].to_json() == {"prompt": "1+1=", "completion": " 2 "}


def test_messages(tmp_path: Path) -> None:
    (shot,) = Shots.from_files(write(tmp_path / "chat.jsonl", {"messages": TURNS}))["chat"]
    assert shot.completion == "4" and shot.messages == (("system", "Be brief."), ("user", "2+2?"))
    assert shot.to_json() == {"messages": TURNS}
    assert parse_row(shot.to_json()) == shot


@pytest.mark.parametrize(
    "row, complaint",
    [
        ([], "not an object"),
        ("text", "not an object"),
        ({}, "no text under 'prompt'"),
        ({"prompt": "a"}, "no text under 'completion'"),
        ({"prompt": 1, "completion": "b"}, "no text under 'prompt'"),
        ({"prompt": "a", "completion": None}, "no text under 'completion'"),
        ({"prompt": "a", "completion": " \n"}, "empty"),
        ({"prompt": "", "completion": "b"}, "empty"),
        ({"messages": "hi"}, "at least two turns"),
        ({"messages": TURNS[2:]}, "at least two turns"),
        ({"messages": [{"role": "user"}, TURNS[2]]}, "role and a content"),
        ({"messages": [{"role": "user", "content": ["parts"]}, TURNS[2]]}, "role and a content"),
        ({"messages": TURNS[:2]}, "must be the assistant's"),
        ({"messages": [TURNS[1], {"role": "assistant", "content": ""}]}, "must be the assistant's"),
        ({"prompt": "half \ud83d", "completion": "b"}, "surrogate"),
        ({"messages": [{"role": "user", "content": "\udc00"}, TURNS[2]]}, "surrogate"),
    ],
)
def test_bad_row(row: Any, complaint: str) -> None:
    wrong = parse_row(row)
    assert isinstance(wrong, str) and complaint in wrong


def test_all_bad_rows_of_all_files_are_named(tmp_path: Path) -> None:
    math = tmp_path / "math.jsonl"
    math.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": 1}\nnot json\n', encoding="utf8")
    law = write(tmp_path / "law.jsonl", *pairs(1), [])
    (tmp_path / "poem.jsonl").write_text("\n \n", encoding="utf8")
    with pytest.raises(InputError) as error:
        Shots.from_files(math, law, tmp_path / "poem.jsonl")
    for expected in (f"{math}:3 (no text", f"{math}:4 (not JSON)", f"{law}:2 (not an object)", "poem.jsonl (empty)", "4 rows"):
        assert expected in error.value.what
    assert f"{math}:1" not in error.value.what


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^30 rows cannot be used.*and 20 more"):
        Shots.from_files(write(tmp_path / "math.jsonl", *[{"prompt": i} for i in range(30)]))


def test_deep_and_huge_json_is_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "math.jsonl").write_text("[" * 200_000 + "\n" + "9" * 10_000 + "\n", encoding="utf8")
    with pytest.raises(InputError, match=r"math\.jsonl:1 .*math\.jsonl:2 "):
        Shots.from_files(tmp_path / "math.jsonl")


def test_bom_and_crlf_and_blank_lines(tmp_path: Path) -> None:
    rows = [json.dumps(row) for row in pairs(3)]
    (tmp_path / "math.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(rows).encode())
    assert [shot.completion for shot in Shots.from_files(tmp_path / "math.jsonl")["math"]] == ["0", "1", "2"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x1c", "\x0b"])
def test_only_newlines_end_rows(tmp_path: Path, separator: str) -> None:
    row = {"prompt": f"a{separator}b", "completion": f"c{separator}d"}
    text = json.dumps(row, ensure_ascii=False)
    (tmp_path / "math.jsonl").write_text(text + "\n" + text, encoding="utf8")
    assert Shots.from_files(tmp_path / "math.jsonl")["math"] == (Shot(row["prompt"], row["completion"]),) * 2


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "math.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(InputError, match="cannot be read as text"):
        Shots.from_files(tmp_path / "math.jsonl")


def test_patterns(tmp_path: Path) -> None:
    for task in ("poem", "law", "math"):
        write(tmp_path / f"{task}.jsonl", *pairs(2, task))
    assert list(Shots.from_files(str(tmp_path / "*.jsonl"))) == ["law", "math", "poem"]
    assert list(Shots.from_files(str(tmp_path / "poem.jsonl"), tmp_path / "[lm]*.jsonl")) == ["poem", "law", "math"]


@pytest.mark.parametrize("pattern", ["none.jsonl", "*.json", "", "."])
def test_nothing_matches(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(UsageError, match="There is no file"):
        Shots.from_files(str(tmp_path / pattern))


def test_two_files_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    files = [write(tmp_path / "math.jsonl", *pairs(1)), write(tmp_path / "more" / "math.jsonl", *pairs(1))]
    with pytest.raises(UsageError, match="Several files are called math"):
        Shots.from_files(*files)
    with pytest.raises(UsageError, match="Several files are called math"):
        Shots.from_files(files[0], files[0])


def test_sample_is_seeded_and_distinct() -> None:
    repeated = [Shot(str(i % 20), "x") for i in range(60)]
    shots = Shots({"math": repeated})
    first = shots.sample(16, seed=3)
    assert first["math"] == shots.sample(16, seed=3)["math"] and first.sha256 == shots.sample(16, seed=3).sha256
    assert len(set(first["math"])) == 16 and set(first["math"]) <= set(repeated)
    assert first["math"] != shots.sample(16, seed=4)["math"]
    random.seed(0)  # the global generator has no say
    assert shots.sample(16, seed=3)["math"] == first["math"]
    assert {shot.prompt for shot in shots.sample(20)["math"]} == {str(i) for i in range(20)}


def test_sample_is_the_same_on_every_machine() -> None:
    """A pinned choice: profiles made yesterday and elsewhere can be compared with today's."""
    shots = Shots({"math": [Shot(str(i), "x") for i in range(100)]})
    assert [shot.prompt for shot in shots.sample(4)["math"]] == ["91", "23", "55", "67"]


def test_sample_does_not_depend_on_other_tasks() -> None:
    math, law = [Shot(f"m{i}", "x") for i in range(30)], [Shot(f"l{i}", "x") for i in range(30)]
    both = Shots({"law": law, "math": math}).sample(8)
    assert both["math"] == Shots({"math": math}).sample(8)["math"]
    assert [s.prompt[1:] for s in both["law"]] != [s.prompt[1:] for s in both["math"]]  # each task draws its own


def test_too_few_rows_names_all_tasks() -> None:
    rows = [Shot(str(i), "x") for i in range(5)]
    with pytest.raises(InputError, match=r"^law \(4\), poem \(1\) hold fewer than 5 distinct rows"):
        Shots({"math": rows, "law": rows[:4], "poem": rows[:1] * 9}).sample(5)


@pytest.mark.parametrize("k", [0, -1])
def test_sample_of_nothing(k: int) -> None:
    with pytest.raises(UsageError, match=f"kshot={k}"):
        Shots({"math": [Shot("a", "b")]}).sample(k)


def test_hash_sees_every_row_and_the_order() -> None:
    a, b = Shot("a", "1"), Shot("b", "2")
    hashes = {
        Shots(tasks).sha256
        for tasks in ({"math": [a, b]}, {"math": [b, a]}, {"law": [a, b]}, {"math": [a]}, {"math": [a], "law": [b]},
                      {"math": [Shot("a", "1", (("user", "a"),)), b]})
    }  # fmt: skip
    assert len(hashes) == 6


def test_dataset_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'recycler\[datasets\]'"):
        Shots.from_dataset("org/data")


def test_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    asked = []

    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        return pairs(2) if name == "org/math" else [*pairs(1), {"prompt": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    shots = Shots.from_dataset("org/math", split="test")
    assert list(shots) == ["math"] and len(shots["math"]) == 2 and asked == [("org/math", "test")]
    assert list(Shots.from_dataset("org/math", task="sums")) == ["sums"]
    with pytest.raises(InputError, match=r"org/law\[1\] \(no text under 'completion'\)"):
        Shots.from_dataset("org/law")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None, exclude_categories=()), max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["prompt", "completion", "messages", "role", "content", "x"]), inner, max_size=5)
    ),
)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": JSON})


@given(JSON | st.fixed_dictionaries({"prompt": JSON, "completion": JSON}) | st.fixed_dictionaries({"messages": st.lists(TURN)}))
def test_any_json_is_a_shot_or_a_complaint(row: Any) -> None:
    shot = parse_row(row)
    if isinstance(shot, str):
        assert shot
    else:
        assert parse_row(json.loads(json.dumps(shot.to_json(), ensure_ascii=False))) == shot  # and survives being saved
        assert shot.completion.strip()
        (shot.prompt + shot.completion).encode()
