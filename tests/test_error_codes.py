"""Error codes: one catalogue, of which every code is raised somewhere; a page that is written from it; and what people meet gets
the code that they look for."""

from __future__ import annotations

import ast
import json
import os
import pty
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from adapters import PREFIX, SHAPES, tensors, write
from click.testing import CliRunner
from conftest import Pico

import recycler
from recycler.cli import main
from recycler.options import Group
from recycler.zoo import errors
from recycler.zoo.error_codes import CATALOGUE, explain, page
from recycler.zoo.errors import InputError, PartialError, RecycleError, UsageError

ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for top in ("zoo", "routers", "recycler")
    for path in sorted((ROOT / top).rglob("*.py"))
    if path.name != "error_codes.py" and not (top == "recycler" and path.relative_to(ROOT / top).parts[0] in ("zoo", "routers"))
]
CLASSES = {cls.__name__: cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, RecycleError)}
Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


def subclasses(cls: type[RecycleError]) -> Iterator[type[RecycleError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from subclasses(child)


def literals() -> dict[str, str]:
    """Every code that the source spells → where, the last of several."""
    found = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"E_[A-Z_]+", node.value):
                found[node.value] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


def raised() -> Iterator[tuple[str, type[RecycleError], str]]:
    """Where an error is made with a code that is written out there: place, class, code."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES):
                continue
            for keyword in node.keywords:
                if keyword.arg == "code" and isinstance(keyword.value, ast.Constant):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", CLASSES[node.func.id], keyword.value.value


def test_every_code_is_in_the_catalogue_and_every_entry_is_raised() -> None:
    spelt = literals()
    assert {code: place for code, place in spelt.items() if code not in CATALOGUE} == {}, "describe them in zoo/error_codes.py"
    assert set(CATALOGUE) - set(spelt) == set(), "nothing raises these"


def test_a_code_has_one_exit_code() -> None:
    """That of the class it is raised as; else the catalogue would say another than the shell sees."""
    places = list(raised())
    assert len(places) > 200
    wrong = [f"{place}: {code} as {cls.__name__}" for place, cls, code in places if CATALOGUE[code].exit != cls.exit_code]
    assert wrong == []


def test_every_error_has_a_code() -> None:
    import recycler.zoo.hub_requests
    import recycler.zoo.hub_search
    import recycler.zoo.store  # noqa: F401  (their classes)

    kinds = set(subclasses(RecycleError))
    assert {"StopError", "PagingError", "UnknownAdapterError", *CLASSES} <= {cls.__name__ for cls in kinds}
    for cls in kinds:
        if not cls.__module__.startswith("recycler."):
            continue
        made = cls("what", "why", "fix")
        assert made.code in CATALOGUE and CATALOGUE[made.code].exit == cls.exit_code
        assert made.docs == f"docs/errors.md#{made.code.lower()}" == CATALOGUE[made.code].docs
        assert cls("what", "why", "fix", code="E_X").code == "E_X"
        assert str(made) == "what why fix", "the code is no part of the text"


def test_the_page_is_that_of_the_catalogue() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf8")
    assert text == page(), "write it again: python -m recycler.zoo.error_codes"
    headings = re.findall(r"^## (\S+)$", text, flags=re.MULTILINE)
    assert headings == list(CATALOGUE) and set(re.findall(r"\(#(\w+)\)", text)) == {code.lower() for code in CATALOGUE}
    for entry in CATALOGUE.values():
        assert entry.title and entry.meaning.endswith(".") and entry.remedy, entry.code


def test_commands_that_remedies_name_are_there() -> None:
    for entry in CATALOGUE.values():
        for words in re.findall(r"`recycle ([a-z -]+)", entry.remedy + entry.meaning):
            command: Any = main
            for word in words.split():
                if not hasattr(command, "commands"):
                    break
                assert word in command.commands, f"{entry.code}: recycle {words}"
                command = command.commands[word]


# ------------------------------------------------------------------------------------------------ what people meet


def made(tmp_path: Path, weights: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    return write(tmp_path / "bad", tensors() if weights is None else weights, **config)


def _pickle(tmp_path: Path) -> Path:
    folder = made(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    return folder


def _cut(tmp_path: Path) -> Path:
    path = made(tmp_path) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    return path.parent


def _forged(tmp_path: Path) -> Path:
    path = made(tmp_path) / "adapter_model.safetensors"
    path.write_bytes(b"\xff" * 64)
    return path.parent


def _link(tmp_path: Path) -> Path:
    folder = made(tmp_path)
    (tmp_path / "secret").write_text("s")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    return folder


def _no_config(tmp_path: Path) -> Path:
    folder = made(tmp_path)
    (folder / "adapter_config.json").unlink()
    return folder


BAD = {
    "E_PICKLE": _pickle,
    "E_TRUNCATED": _cut,
    "E_HEADER": _forged,
    "E_LINK": _link,
    "E_NO_ADAPTER": _no_config,
    "E_NONFINITE": lambda t: made(t, tensors() | {f"{Q}.lora_A.weight": torch.full((4, 16), float("nan"))}),
    "E_EMPTY": lambda t: made(t, tensors() | {f"{Q}.lora_B.weight": torch.zeros(16, 4)}),
    "E_DTYPE": lambda t: made(t, tensors() | {f"{Q}.lora_A.weight": torch.ones(4, 16, dtype=torch.int8)}),
    "E_RANK": lambda t: made(t, r=8),
    "E_FORMAT": lambda t: made(t, peft_type="IA3"),
    "E_BIAS": lambda t: made(t, bias="all"),
    "E_MODULES_TO_SAVE": lambda t: made(t, modules_to_save=["lm_head"]),
    "E_VOCABULARY": lambda t: made(t, trainable_token_indices=[5]),
    "E_CONFIG": lambda t: made(t, some_new_field=7),
    "E_FILES": lambda t: t / "nowhere",
}  # fmt: skip


@pytest.mark.parametrize("code", BAD)
def test_a_bad_adapter_has_its_code(code: str, tmp_path: Path) -> None:
    folder = BAD[code](tmp_path)
    with pytest.raises(RecycleError) as caught:
        recycler.Zoo(tmp_path / "zoo").add(folder)
    assert caught.value.code == code and CATALOGUE[code].exit == caught.value.exit_code


def test_two_problems_of_two_kinds_are_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="modules_to_save") as caught:
        recycler.Zoo(tmp_path / "zoo").add(made(tmp_path, modules_to_save=["lm_head"], bias="all"))
    assert caught.value.code == "E_CONFIG"


def test_bases_that_do_not_match(two_bases: None, tmp_path: Path) -> None:
    zoo = recycler.Zoo(tmp_path / "zoo")

    def code(folder: Path) -> str:
        with pytest.raises(InputError) as caught:
            recycler.fetch(folder, base="org/base", zoo=zoo)
        return caught.value.code

    assert code(made(tmp_path / "other", base_model_name_or_path="org/other")) == "E_BASE_MISMATCH"
    renamed = {key.replace("q_proj", "query"): tensor for key, tensor in tensors().items()}
    assert code(made(tmp_path / "names", renamed)) == "E_SITES"
    assert code(made(tmp_path / "size", tensors(shapes={path: (o, d + 1) for path, (o, d) in SHAPES.items()}))) == "E_SHAPES"


def test_the_code_survives_being_told_again(llama: Pico, tmp_path: Path) -> None:
    """Errors of many adapters: each in the report with its own; one for all where they agree, else that of partial success."""
    zoo = recycler.Zoo(tmp_path / "zoo")
    pickled, cut = _pickle(tmp_path / "a"), _cut(tmp_path / "b")
    report = recycler.fetch([pickled, cut], names=["one", "two"], zoo=zoo)
    facts = [failure.to_json() for failure in report.failures]
    assert [(f["code"], f["exit_code"], f["docs"]) for f in facts] == [
        ("E_PICKLE", 4, "docs/errors.md#e_pickle"),
        ("E_TRUNCATED", 3, "docs/errors.md#e_truncated"),
    ]
    with pytest.raises(PartialError) as caught:
        report.raise_for_failures()
    assert caught.value.code == "E_PARTIAL"
    for text in (str(report), str(caught.value)):
        assert "[E_PICKLE]" in text and "[E_TRUNCATED]" in text
    alike = recycler.fetch([pickled, _pickle(tmp_path / "c")], names=["one", "two"], zoo=zoo)
    with pytest.raises(RecycleError) as same:
        alike.raise_for_failures()
    assert (same.value.code, same.value.exit_code) == ("E_PICKLE", 4)


def test_mistakes_in_a_call_have_their_codes(llama: Pico, tmp_path: Path) -> None:
    zoo = recycler.Zoo(llama.zoo)
    calls: dict[str, Any] = {
        "E_METHOD": lambda: recycler.build_router("prose", zoo=zoo),
        "E_NEEDS_PROFILE": lambda: recycler.build_router("ridge", zoo=zoo),
        "E_OPTION": lambda: recycler.build_router("arrow", zoo=zoo, top_k=0),
        "E_UNKNOWN": lambda: zoo["prose"],
        "E_NO_FILE": lambda: recycler.Shots.from_files(tmp_path / "none.jsonl"),
        "E_EMPTY_ZOO": lambda: recycler.check(recycler.Zoo(tmp_path)),
        "E_MODEL": lambda: recycler.load(tmp_path),
        "E_ROUTER": lambda: recycler.load_router(tmp_path),
    }
    for code, call in calls.items():
        with pytest.raises(RecycleError) as caught:
            call()
        assert caught.value.code == code, caught.value


# ------------------------------------------------------------------------------------------------ the command


def recycle(*args: str) -> Any:
    return CliRunner().invoke(main, list(args))


def test_recycle_errors() -> None:
    assert recycle("errors", "E_PICKLE").stdout == CATALOGUE["E_PICKLE"].section() + "\ndocs/errors.md#e_pickle\n"
    assert recycle("errors", "pickle").stdout == recycle("errors", "E_PICKLE").stdout
    listed = [line.split("\t") for line in recycle("errors").stdout.splitlines()]
    assert [row[0] for row in listed[1:]] == list(CATALOGUE)
    data = json.loads(recycle("errors", "--json").stdout)
    assert data["schema_version"] == 1 and list(data["errors"]) == list(CATALOGUE)
    assert data["errors"]["E_HASH"]["docs"] == "docs/errors.md#e_hash" and data["errors"]["E_HASH"]["exit"] == 4
    assert recycle("errors", "E_PROSE").exit_code == 2
    assert "one of: E_PICKLE, " in recycle("errors", "PICLE").stderr  # of many names, those that look alike come first
    with pytest.raises(UsageError, match="no error code"):
        explain("E_PROSE")


def test_an_error_names_its_code_and_its_anchor(tmp_path: Path) -> None:
    """To a person and to a pipe alike, in the same words."""
    command = [sys.executable, "-m", "recycler.cli", "build-router", "prose"]
    environment = {**os.environ, "RECYCLE_ZOO": str(tmp_path)}
    piped = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = piped.stderr.splitlines()
    assert piped.returncode == 2 and piped.stdout == "" and lines[0] == "error: There is no router called 'prose'."
    assert lines[-1] == "  more: recycle errors E_METHOD, or docs/errors.md#e_method"
    assert CATALOGUE["E_METHOD"].docs in recycle("errors", "E_METHOD").stdout, "and what it names says where it stands"
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, env=environment, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs) as process:
        process.wait()
        os.close(theirs)
        seen = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux says so where the other end is closed
                break
            if not part:
                break
            seen += part
    os.close(ours)
    shown = re.sub(r"\x1b\[[\d;]*m", "", seen.decode()).split("\r\n")
    assert [line for line in shown if line] == lines and b"\x1b[31m" in seen


def test_a_fault_says_where_to_go_on() -> None:
    """Below its traceback, which a report needs."""

    @click.group(cls=Group)
    def program() -> None:
        pass

    @program.command()
    def fail() -> None:
        raise ZeroDivisionError("nobody thought of this")

    error = CliRunner().invoke(program, ["fail"]).exception
    assert isinstance(error, ZeroDivisionError)
    if sys.version_info >= (3, 11):
        shown = "".join(traceback.format_exception(error)).splitlines()
        assert shown[-2].endswith("nobody thought of this") and "recycle errors E_UNEXPECTED" in shown[-1]
