"""Hostile and broken files: every one is refused with exit code 3 or 4, or read as the safetensors library reads it. Nothing
crashes, waits, fills the memory, or leaves half an adapter in the zoo."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import corpus
import pytest
import torch
from adapters import SHAPES, files, tensors, write
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from recycler.zoo import formats, inspect, patterns
from recycler.zoo.adapter import Adapter
from recycler.zoo.cards import card_licence
from recycler.zoo.errors import InputError, RecycleError, SecurityError, UsageError
from recycler.zoo.manifest import check_name, slug
from recycler.zoo.store import Zoo

MUTANTS = int(os.environ.get("RECYCLE_TEST_MUTANTS", 10_000))  # fewer for a quick run
SECONDS = 5.0  # of this process's time; guards against hanging, not measures of speed
WALL_SECONDS = 60.0  # that a busy machine may take for it
MEGABYTES, GROWTH = 500, 150  # in all, and beside what importing torch takes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter that is fine until somebody breaks it."""
    made = write(tmp_path / "broken", {})
    (made / inspect.CONFIG).write_bytes(corpus.config())
    (made / inspect.WEIGHTS).write_bytes(corpus.valid())
    return made


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """A zoo that holds something worth keeping."""
    held = Zoo(tmp_path / "zoo")
    held.add(write(tmp_path / "held"))
    return held


def tree(zoo: Zoo) -> dict[str, bytes]:
    return {name: data for name, data in files(zoo.path).items() if name != ".lock"}


def outcome(zoo: Zoo, folder: Path, scaling: float | None = 8 / 2, before: Mapping[str, bytes] | None = None) -> int:
    """0 where the adapter was taken and reads as the library reads it, else the exit code of a refusal that left no trace.

    Args:
        scaling: α/r of the config; what was read is not compared where None.
        before: the zoo's files, where the caller knows them.
    """
    before = tree(zoo) if before is None else before
    code, start, spent = 0, time.monotonic(), time.process_time()
    try:
        zoo.add(folder, "broken")
    except RecycleError as error:
        assert error.exit_code in (3, 4) and error.what and error.why and error.fix
        assert str(error).isprintable() and len(str(error)) < 10_000
        code = error.exit_code
    assert time.process_time() - spent < SECONDS and time.monotonic() - start < WALL_SECONDS
    if not code and scaling is not None:
        assert_read_as_the_library_reads_it(zoo["broken"], folder / inspect.WEIGHTS, scaling)
    if not code:
        zoo.remove("broken")
    assert tree(zoo) == before
    return code


def assert_read_as_the_library_reads_it(adapter: Adapter, weights: Path, scaling: float) -> None:
    """Every number of the file is in the factors, at the place its name says, times α/r; and there is nothing else."""
    placed: dict[str, set[str]] = {}
    for name, tensor in load_file(weights).items():
        path, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        factors = adapter.sites[path]
        placed.setdefault(path, set()).add(part[0])
        if part.startswith("A"):
            assert torch.equal(factors.a_RD, tensor.float())
        else:
            assert part.startswith("B") and torch.equal(factors.b_OR, tensor.float() * scaling)
        assert factors.magnitude_O is None
    assert placed == {path: {"A", "B"} for path in adapter.sites}


# ------------------------------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize("label", corpus.headers())
def test_headers(zoo: Zoo, folder: Path, label: str) -> None:
    raw, code = corpus.headers()[label]
    (folder / inspect.WEIGHTS).write_bytes(raw)
    assert outcome(zoo, folder) == code


def test_a_large_header_is_read(zoo: Zoo, folder: Path) -> None:
    (folder / inspect.WEIGHTS).write_bytes(corpus.lora(3000))
    (folder / inspect.CONFIG).write_bytes(corpus.config(r=1))
    assert outcome(zoo, folder, scaling=8) == 0


def test_cut_at_every_boundary(zoo: Zoo, folder: Path) -> None:
    cuts = dict(corpus.truncations(corpus.valid()))
    assert len(cuts) > 100
    for label, raw in cuts.items():
        (folder / inspect.WEIGHTS).write_bytes(raw)
        assert outcome(zoo, folder) == 3, label


def test_ten_thousand_mutants(zoo: Zoo, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # thousands of adapters are kept and removed
    outcomes: Counter[int] = Counter()
    before = tree(zoo)

    @settings(
        max_examples=MUTANTS, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(corpus.mutants(corpus.valid()))
    def run(raw: bytes) -> None:
        (folder / inspect.WEIGHTS).write_bytes(raw)
        outcomes[outcome(zoo, folder, before=before)] += 1

    run()
    print("outcomes of the mutants:", dict(outcomes))
    assert sum(outcomes.values()) >= MUTANTS
    assert all(outcomes[code] > MUTANTS / 50 for code in (0, 3, 4)), "the mutations no longer reach all outcomes"


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_every_float_that_is_accepted_is_read_as_the_library_reads_it(zoo: Zoo, folder: Path, dtype: str) -> None:
    torch_dtype = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                   "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[dtype]  # fmt: skip
    weights = tensors("q_proj", rank=2, shapes={path: SHAPES[path] for path in SHAPES if path.endswith("q_proj")})
    save_file({name: t.to(torch_dtype) for name, t in weights.items()}, folder / inspect.WEIGHTS)
    assert outcome(zoo, folder) == 0


def test_numbers_that_do_not_fit_into_fp32(zoo: Zoo, folder: Path) -> None:
    for value, said in ((1e300, "infinite"), (1e-300, "zero throughout")):
        for part in (corpus.A, corpus.B):
            weights = load_file(folder / inspect.WEIGHTS)
            weights[part] = torch.full(weights[part].shape, value, dtype=torch.float64)
            save_file(weights, folder / inspect.WEIGHTS)
            with pytest.raises(InputError, match=said):
                zoo.add(folder, "broken")
            (folder / inspect.WEIGHTS).write_bytes(corpus.valid())


WORST = """
import re, sys, time
from pathlib import Path
from recycler.zoo.errors import RecycleError
from recycler.zoo.store import Zoo
import torch, safetensors.torch

def megabytes(what):
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024

zoo = Zoo(sys.argv[1])
for folder in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")  # begins a new high-water mark
    at_first, code, start, spent = megabytes("VmRSS"), 0, time.monotonic(), time.process_time()
    try:
        zoo.add(Path(folder), "broken")
    except RecycleError as error:
        code = error.exit_code
    spent, wall, peak = time.process_time() - spent, time.monotonic() - start, megabytes("VmHWM")
    assert code, folder
    print(Path(folder).name, code, round(spent, 2), round(wall, 2), peak - at_first, peak)
"""


def sparse(path: Path, size: int, head: bytes = b"") -> None:
    """A file that claims `size` bytes and takes none."""
    with path.open("wb") as stream:
        stream.write(head)
        stream.truncate(size)


def bombs(make: Path) -> Iterator[Path]:
    """Folders whose files would grow if anybody let them."""

    def folder(name: str) -> Path:
        made = make / name
        made.mkdir()
        (made / inspect.CONFIG).write_bytes(corpus.config())
        (made / inspect.WEIGHTS).write_bytes(corpus.valid())
        return made

    size = 9_900_000
    fillings = {
        "lists": (b'{"x":[', b"[],", b"[]]}"),
        "objects": (b'{"x":[', b'{"":0},', b"0]}"),
        "metadata": (b'{"__metadata__":{"x":[', b'{"":0},', b"0]}}"),
        "numbers": (b'{"x":[', b"1.5,", b"0]}"),
        "text": (b'{"x":"', b"\\u0041", b'"}'),
        "deep": (b"", b'{"x":', b"0"),
    }
    for name, (start, filling, end) in fillings.items():
        made = folder(name)
        (made / inspect.WEIGHTS).write_bytes(corpus.join(start + filling * (size // len(filling)) + end))
        yield made
    keys = b",".join(b'"%06x":0' % n for n in range(size // 11))
    for name, text in {"keys": b"{%b}" % keys, "keys inside": b'{"x":{%b}}' % keys}.items():
        made = folder(name)
        (made / inspect.WEIGHTS).write_bytes(corpus.join(text))
        yield made
    made = folder("50 GB")
    sparse(made / inspect.WEIGHTS, 50 * 10**9, corpus.valid())
    yield made
    made = folder("terabytes")
    header = {corpus.A: {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}
    (made / inspect.WEIGHTS).write_bytes(corpus.join(header, b"\1" * 64))
    yield made
    made = folder("1.9 GB behind a small header")
    sparse(made / inspect.WEIGHTS, 19 * 10**8, corpus.valid())
    yield made
    made = folder("100,000 tensors")
    (made / inspect.WEIGHTS).write_bytes(corpus.headers()["100,000 tiny tensors"][0])
    yield made
    made = folder("a config of 1 GB")
    sparse(made / inspect.CONFIG, 10**9, b"{")
    yield made
    made = folder("a card of 1 GB")
    sparse(made / inspect.CARD, 10**9, b"---\n")
    yield made
    made = folder("a large config")
    (made / inspect.CONFIG).write_bytes(corpus.config_with("rank_pattern", "[" + ",".join(["[]"] * 300_000) + "]"))
    yield made
    made = folder("20,000 patterns of letters")
    patterns = {rf"(?i:[\u0000-\U0010ffff]){n}": 2 for n in range(20_000)}
    (made / inspect.CONFIG).write_bytes(corpus.config(rank_pattern=patterns))
    yield made


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark of memory is begun anew through /proc")
def test_nothing_fills_the_memory_or_hangs(zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "bombs").mkdir()
    folders = list(bombs(tmp_path / "bombs"))
    before = tree(zoo)
    done = subprocess.run([sys.executable, "-c", WORST, zoo.path, *folders], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert tree(zoo) == before
    lines = [line.rsplit(" ", 5) for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == [folder.name for folder in folders]
    assert all(float(spent) < SECONDS and float(wall) < WALL_SECONDS for _, _, spent, wall, _, _ in lines), done.stdout
    assert all(int(growth) < GROWTH for *_, growth, _ in lines), done.stdout
    if torch.version.cuda is None:  # with CUDA, importing torch alone may take more
        assert all(int(peak) < MEGABYTES for *_, peak in lines), done.stdout


# ----------------------------------------------------------------------------------------------------------------- configs

FIELDS = sorted(
    formats.config._READ
    | formats.config._WITHOUT_EFFECT
    | formats.config._UNSUPPORTED.keys()
    | {"an_unknown_field", "\x1b[31m"}
)


@pytest.mark.parametrize("field", FIELDS)
def test_wrong_values_of_every_field(zoo: Zoo, folder: Path, field: str) -> None:
    """Refused, or without effect: the factors are those of the untouched config."""
    for label, text in corpus.WRONG.items():
        (folder / inspect.CONFIG).write_bytes(corpus.config_with(field, text))
        rslora = field == "use_rslora" and text == "true"
        code = outcome(zoo, folder, 8 / math.sqrt(2) if rslora else 8 / 2)
        assert code in (0, 3), label
        if field in ("r", "lora_alpha", "peft_type") and label != "null":
            assert code == 3, label


CONFIGS: dict[str, tuple[bytes, int]] = {
    "as it was": (corpus.config(), 0),
    "a mark before it": (b"\xef\xbb\xbf" + corpus.config(), 0),
    "empty": (b"", 3),
    "utf-16": (corpus.config().decode().encode("utf-16"), 3),
    "utf-16 without mark": (corpus.config().decode().encode("utf-16-le"), 3),
    "latin-1": (corpus.config_with("note", '"caf\xe9"').decode().encode("latin-1"), 3),
    "a surrogate in utf-8": (corpus.config_with("note", '"X"').replace(b"X", b"\xed\xa0\x80"), 3),
    "NUL behind": (corpus.config() + b"\0", 3),
    "two objects": (corpus.config() * 2, 3),
    "nested 100,000 deep": (corpus.config_with("note", '{"a":' * 100_000 + "1" + "}" * 100_000), 3),
    "lists 100,000 deep": (b"[" * 100_000, 3),
    "20 deep": (corpus.config_with("eva_config", "[" * 20 + "]" * 20), 3),
    "10^5000": (corpus.config_with("r", "1" + "0" * 5000), 3),
    "r twice": (corpus.config_with("r", '2, "r": 4'), 3),
    "r twice, the last is right": (corpus.config_with("r", '4, "r": 2'), 3),
    "r twice, escaped": (corpus.config_with("r", '2, "\\u0072": 2'), 3),
    "a pattern twice": (corpus.config_with("alpha_pattern", '{"q_proj": 1, "q_proj": 8}'), 3),
    "r of zero": (corpus.config(r=0), 3),
    "r of a million": (corpus.config(r=10**6), 3),
    "negative alpha": (corpus.config(lora_alpha=-8), 3),
    "alpha of zero": (corpus.config(lora_alpha=0), 3),
    "alpha of 1e30": (corpus.config(lora_alpha=1e30), 3),
    "alpha of 1e-320": (corpus.config(lora_alpha=1e-320), 3),
    "alpha is NaN": (corpus.config(lora_alpha=float("nan")), 3),
    "alpha is 1e400": (corpus.config_with("lora_alpha", "1e400"), 3),
    "an alpha pattern of NaN": (corpus.config(alpha_pattern={"q_proj": float("nan")}), 3),
    "a rank pattern of zero": (corpus.config(rank_pattern={"q_proj": 0}), 3),
    "100,000 patterns": (corpus.config(rank_pattern={f"q{n}": 2 for n in range(100_000)}), 3),
    "20,000 patterns": (corpus.config(rank_pattern={f"q{n}": 4 for n in range(20_000)}), 0),
    "a pattern of 900 kB": (corpus.config(rank_pattern={"q" * 900_000: 2}), 3),
    "a config of 2 MB": (corpus.config(note=["x" * 2_000_000]), 3),
    "groups 200 deep": (corpus.config(rank_pattern={"(" * 200 + ")" * 200: 4}), 0),
    "no regular expression": (corpus.config(rank_pattern={"(q_proj": 2}), 3),
    "a count that overflows": (corpus.config(rank_pattern={"q{99999999999}": 2}), 3),
}


@pytest.mark.parametrize("label", CONFIGS)
def test_configs(zoo: Zoo, folder: Path, label: str) -> None:
    raw, code = CONFIGS[label]
    (folder / inspect.CONFIG).write_bytes(raw)
    assert outcome(zoo, folder) == code


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=500, suppress_health_check=list(HealthCheck))
@given(changes=st.dictionaries(st.sampled_from(FIELDS) | st.text(), json_values, max_size=4), whole=st.booleans())
def test_any_json_as_config(zoo: Zoo, folder: Path, changes: dict[str, Any], whole: bool) -> None:
    raw = json.dumps(changes).encode() if whole else corpus.config(**changes)
    (folder / inspect.CONFIG).write_bytes(raw)
    assert parsed(raw) in (0, 3, 4)


def parsed(raw: bytes) -> int:
    try:
        formats.config.parse_config(raw, "broken")
    except RecycleError as error:
        assert error.exit_code in (3, 4) and str(error).isprintable()
        return error.exit_code
    return 0


# ---------------------------------------------------------------------------------------------------------------- patterns

BOMBS: dict[str, tuple[str, set[int]]] = {
    "nested stars": ("(a*)*(a*)*b", {4}),
    "overlapping choices": ("(a|a|aa)+$b", {4}),
    "a thousand times a thousand": ("((a{0,1000}){0,1000}){0,1000}b", {4}),
    # a fast machine may be done in time
    "back references": (r"(.*)\1\1\1\1b(.*)*x", {0, 4}),
    "letters that are slow to compile": ("".join(f"(?i:[\\0-\U0010ffff{n}])" for n in range(20)), {0, 4}),
}


@pytest.mark.parametrize(("bomb", "codes"), BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("fields", [["rank_pattern"], ["rank_pattern", "alpha_pattern"]])
def test_patterns_that_never_end(zoo: Zoo, folder: Path, bomb: str, codes: set[int], fields: list[str]) -> None:
    """Refused within the limit, with 50 sites to match and both fields set."""
    long = {f"base_model.model.{'a' * 40}{n}.lora_{part}.weight": torch.ones(2, 2) for n in range(50) for part in "AB"}
    save_file(long, folder / inspect.WEIGHTS)
    (folder / inspect.CONFIG).write_bytes(corpus.config(**{field: {bomb: 2, f"{bomb}c": 2} for field in fields}))
    assert outcome(zoo, folder, scaling=None) in codes


def test_a_plain_path_is_looked_up_as_peft_matches_it() -> None:
    from peft.utils.other import get_pattern_key

    words = ["q_proj", "a.q_proj", "axq_proj", "q-proj", "", ".", "a.", "a.b"]
    paths = [*words, "..", "aab", "b.a.q_proj", "x.axq_proj", "xa.q_proj", "x.aab", "x.a.b.", "model.layers.0.self_attn.q_proj"]
    for first in words:
        for second in words:
            found = patterns.first_matches([first, second], paths)
            for path, hit in zip(paths, found, strict=True):
                expected = get_pattern_key([first, second], path)
                assert expected == path if hit is None else expected == [first, second][hit], (first, second, path)


@settings(max_examples=300)
@given(
    keys=st.lists(st.text("ab.-_", max_size=5), min_size=1, max_size=4),
    paths=st.lists(st.text("ab.-_", max_size=9), min_size=1, max_size=4),
)
def test_lookup_is_matching(keys: list[str], paths: list[str]) -> None:
    compiled = [re.compile(rf"(.*\.)?({key})$") for key in keys]
    assert patterns.first_matches(keys, paths) == [
        next((i for i, one in enumerate(compiled) if one.match(path)), None) for path in paths
    ]


def test_many_plain_patterns_take_no_time() -> None:
    paths = [f"model.layers.{n}.mlp.experts.{m}.up_proj" for n in range(50) for m in range(128)]
    spent = time.process_time()
    assert patterns.first_matches(paths[::-1], paths, timeout_s=WALL_SECONDS) == list(range(len(paths)))[::-1]
    assert time.process_time() - spent < SECONDS


def test_plain_patterns_too_can_take_too_long() -> None:
    keys = [f"{'a' * n}.{'b' * m}" for n in range(100) for m in range(100)]
    with pytest.raises(SecurityError, match=r"took more than 0\.01 s"):
        patterns.first_matches(keys, ["a.b." * 200] * 1000, timeout_s=0.01)


def test_which_modules_is_read_from_the_tensors_and_no_pattern_of_it_ever_runs(
    zoo: Zoo, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """target_modules and its kin may be regular expressions; here nothing compiles them."""
    bomb = "(a*)*(a*)*bomb"
    fields = ["target_modules", "exclude_modules", "layers_pattern", "layers_to_transform"]
    compiled: list[str] = []
    original = re._compile  # type: ignore[attr-defined]

    def watched(pattern: Any, flags: Any) -> Any:
        compiled.append(str(pattern))
        return original(pattern, flags)

    monkeypatch.setattr(re, "_compile", watched)
    monkeypatch.setattr(patterns, "_in_child", lambda *a: pytest.fail("a child was asked to match"))
    re.compile("seen")
    for value in (bomb, [bomb], {bomb: bomb}):
        (folder / inspect.CONFIG).write_bytes(corpus.config(**dict.fromkeys(fields, value)))
        assert outcome(zoo, folder) == 0
    assert "seen" in compiled and not [text for text in compiled if "bomb" in text]


# ------------------------------------------------------------------------------------------------------------------- cards

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} {{<<: [*{chr(97 + n)}, *{chr(97 + n)}]}}\n" for n in range(24)
)
CARDS: dict[str, tuple[bytes, str | None]] = {
    "a licence": (b"---\nlicense: mit\n---\n", "mit"),
    "of windows": (b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n", "mit"),
    "laughs": (f"---\n{LAUGHS}license: *m\n---\n".encode(), None),
    "laughs in a list": (f"---\n{LAUGHS}license: [*m, *m]\n---\n".encode(), None),
    "merges": (f"---\n{MERGES}license: mit\n---\n".encode(), None),
    "itself": (b"---\nlicense: &a [*a]\n---\n", None),
    "an object": (b"---\nlicense: !!python/object/apply:os.system [touch canary]\n---\n", None),
    "a module": (b"---\nlicense: !!python/module:antigravity\n---\n", None),
    "an object elsewhere": (b"---\nx: !!python/object/new:os.system [touch canary]\nlicense: mit\n---\n", None),
    "ANSI": (b'---\nlicense: "\\e[31mmit\\a"\n---\n', r"\x1b[31mmit\x07"),
    "raw ANSI": (b"---\nlicense: \x1b[31mmit\n---\n", None),
    "right to left": ("---\nlicense: \u202etim\n---\n".encode(), r"\u202etim"),
    "C1": (b'---\nlicense: "\\x9b31m"\n---\n', r"\x9b31m"),
    "html": (b"---\nlicense: <img src=x onerror=alert(1)>\n---\n", "<img src=x onerror=alert(1)>"),
    "long": (b"---\nlicense: " + b"m" * 5000 + b"\n---\n", "m" * 120 + "\u2026"),
    "not utf-8": (b"---\nlicense: mit\nauthor: \xff\xfe\n---\n", "mit"),
    "utf-16": ("---\nlicense: mit\n---\n".encode("utf-16"), None),
    "nested 100,000 deep": (b"---\nx: " + b"[" * 100_000 + b"\nlicense: mit\n---\n", None),
    "nested 100,000 deep, closed": (b"---\nx: " + b"{a: " * 50_000 + b"}" * 50_000 + b"\n---\n", None),
    "10 MB of head": (b"---\n" + b"x: y\n" * 1_900_000 + b"license: mit\n---\n", None),
    "100 kB of head": (b"---\n" + b"".join(b"k%d: v\n" % n for n in range(10_000)) + b"license: mit\n---\n", "mit"),
    "9 MB of text": (b"---\nlicense: mit\n---\n" + b"text " * 1_800_000, "mit"),
    "many colons": (b"---\n" + b": " * 50_000 + b"\n---\n", None),
    "many questions": (b"---\n" + b"? " * 50_000 + b"\n---\n", None),
    "many quotes": (b"---\nlicense: '" + b"''" * 50_000 + b"\n---\n", None),
    "a number": (b"---\nlicense: 1" + b"0" * 50_000 + b"\n---\n", None),
    "a date": (b"---\nlicense: 2024-01-01\n---\n", None),
    "no date": (b"---\nlicense: 2024-99-99\n---\n", None),
    "a list of things": (b"---\nlicense: [mit, {a: b}, [c], 7]\n---\n", "mit"),
    "an object of things": (b"---\nlicense: {mit: yes}\n---\n", None),
    "a name of things": (b"---\nlicense: other\nlicense_name: [1, 2]\n---\n", None),
    "a list": (b"---\n[license, mit]\n---\n", None),
    "two documents": (b"---\nlicense: mit\n--- x\n", "mit"),
    "no end": (b"---\nlicense: mit\n", None),
    "empty": (b"", None),
}


@pytest.mark.parametrize("label", CARDS)
def test_cards(zoo: Zoo, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, label: str) -> None:
    raw, licence = CARDS[label]
    (folder / inspect.CARD).write_bytes(raw)
    monkeypatch.chdir(tmp_path)
    spent = time.process_time()
    assert card_licence(folder) == licence
    assert time.process_time() - spent < SECONDS
    assert outcome(zoo, folder) == 0
    assert not (tmp_path / "canary").exists() and "antigravity" not in sys.modules


@settings(max_examples=500)
@given(st.text(st.characters(codec="utf-8")) | st.text("abc:-[]{}&*!|>?'\"#%@`\n, "))
def test_any_text_as_card(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    card = tmp_path_factory.getbasetemp() / inspect.CARD
    card.write_text(f"---\n{text}\n---\n", encoding="utf-8")
    found = card_licence(card.parent)
    assert found is None or found.isprintable()


# ------------------------------------------------------------------------------------------------------- folders and names


def test_links_and_what_is_no_file(zoo: Zoo, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of these is opened, so none can block."""
    secret = tmp_path / "secret.json"
    secret.write_bytes(corpus.config())
    listener = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(tmp_path)  # the name of a socket has at most 100 characters or so
    cases: list[tuple[str, Any, int]] = [
        ("a link that escapes", lambda p: p.symlink_to(secret), 4),
        ("a link up and down", lambda p: p.symlink_to("../secret.json"), 4),
        ("a link to a device", lambda p: p.symlink_to("/dev/zero"), 4),
        ("a link to itself", lambda p: p.symlink_to(p.name), 3),
        ("a link to nothing", lambda p: p.symlink_to("nothing"), 3),
        ("a pipe", os.mkfifo, 3),
        ("a folder", Path.mkdir, 3),
    ]
    for file in (inspect.CONFIG, inspect.WEIGHTS, inspect.CARD, "LICENSE"):
        for label, make, code in cases:
            kept = (folder / file).read_bytes() if (folder / file).exists() else b"text"
            (folder / file).unlink(missing_ok=True)
            make(folder / file)
            expected = 0 if label == "a folder" and file in (inspect.CARD, "LICENSE") else code
            assert outcome(zoo, folder) == expected, (file, label)
            for reader in (formats.read, inspect.check_folder):
                with pytest.raises(RecycleError) if expected else nullcontext():
                    reader(folder)
            (folder / file).rmdir() if label == "a folder" else (folder / file).unlink()
            (folder / file).write_bytes(kept)
    (folder / inspect.CARD).unlink()
    listener.bind(os.path.relpath(folder / inspect.CARD))
    assert outcome(zoo, folder) == 3
    listener.close()
    (folder / inspect.CARD).unlink()
    (folder / "inside.json").write_bytes(corpus.config())
    (folder / inspect.CONFIG).unlink()
    (folder / inspect.CONFIG).symlink_to("inside.json")
    assert outcome(zoo, folder) == 0
    assert not (zoo.path / "adapters" / "broken").exists()


def test_a_card_that_is_a_pipe_is_not_opened(folder: Path) -> None:
    (folder / inspect.CARD).unlink()
    os.mkfifo(folder / inspect.CARD)
    assert card_licence(folder) is None


@pytest.mark.parametrize(
    "make", [lambda p: os.mkfifo(p), lambda p: p.symlink_to("/dev/zero"), Path.mkdir], ids=["pipe", "device", "folder"]
)
@pytest.mark.parametrize("file", [inspect.WEIGHTS, inspect.CONFIG, inspect.CARD])
def test_a_zoo_in_which_a_file_became_something_else(zoo: Zoo, make: Any, file: str) -> None:
    path = zoo.folder("held") / file
    path.unlink()
    make(path)
    with pytest.raises(InputError, match=f"{file} is no regular file"):
        zoo.verify()
    if make is not Path.mkdir or file != inspect.CARD:  # a folder of that name is no card
        with pytest.raises(RecycleError):
            zoo["held"]


def test_a_folder_of_many_files(zoo: Zoo, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert inspect._MAX_FILES == 10_000
    monkeypatch.setattr(inspect, "_MAX_FILES", 100)
    for n in range(98):
        (folder / f"{n}.txt").touch()
    with pytest.raises(InputError, match="more than 100 files"):
        zoo.add(folder, "broken")
    assert outcome(zoo, folder) == 3
    (folder / "0.txt").unlink()
    assert outcome(zoo, folder) == 0


HOSTILE = [
    "../../x", "..", "a/../../x", "/etc/x", "//server/share", "./x", "a//b", "a/", "C:\\x", "C:x", "c:/x", "\\\\server\\share\\x", "a\\b",
    "CON", "con.txt", "NUL.txt", "nul .txt", "a/AUX", "COM1", "com\u00b9.log", "LPT9.tar.gz", "CONIN$", "x:stream", "README.md::$DATA",
    "a\0b", "a\nb", "\x1b[2J", "\u202egnp.exe", "\ud800", "a.", "a ", "a. .", "sub/a. ", " ", ".", "a\u200bb", "a\x9bb",
]  # fmt: skip
FINE = ["README.md", "checkpoint-1/adapter_config.json", "a b.txt", ".gitattributes", "console.txt", "com10.txt", "nullify.py",
        "日本語.txt", "events.out.tfevents.1700000000.host.1.0", "a..b", "...a", "auxiliary/x"]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=map(ascii, HOSTILE))
def test_hostile_names_in_a_listing(name: str) -> None:
    sizes = {inspect.CONFIG: 10, inspect.WEIGHTS: 10}
    with pytest.raises(SecurityError, match="could do harm") as caught:
        inspect.check_listing("org/math", {**sizes, name: 10})
    assert str(caught.value).isprintable()
    with pytest.raises(SecurityError):
        inspect.check_names("org/math", [*FINE, name])


@pytest.mark.parametrize(
    "names",
    [["A.json", "a.json"], ["README.md", "readme.md"], ["a/B", "A/b"], ["caf\u00e9", "cafe\u0301"], ["stra\u00dfe", "STRASSE"]],
)
def test_names_that_fall_together(names: list[str]) -> None:
    with pytest.raises(SecurityError, match="the same file as"):
        inspect.check_names("org/math", [*FINE, *names])


def test_names_that_are_fine() -> None:
    inspect.check_names("org/math", FINE)


@settings(max_examples=1000)
@given(st.text(st.characters(exclude_categories=()), min_size=1) | st.text("./\\:CONconul ~-_", min_size=1))
def test_a_name_that_passes_stays_where_it_is_put(name: str) -> None:
    try:
        inspect.check_names("org/math", [name])
    except SecurityError as error:
        assert str(error).isprintable()
        return
    root = Path("/some/zoo")
    assert (root / name).is_relative_to(root) and ".." not in (root / name).parts
    for pure in (PureWindowsPath, PurePosixPath):
        inside = pure("/root") / name
        assert inside.is_relative_to(pure("/root")) and not pure(name).is_absolute() and not pure(name).is_reserved()
        assert inside.name == name.rsplit("/", 1)[-1]


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(
    st.text(st.characters(exclude_categories=()))
    | st.text("./\\:CONconul ~-_\0", max_size=8)
    | st.sampled_from([*HOSTILE, "base", "zoo.json", ".lock", "adapters"])
)
def test_names_of_adapters_are_slugs_and_nothing_is_written_outside_the_zoo(zoo: Zoo, folder: Path, name: str) -> None:
    def outside() -> set[str]:
        return {str(p) for p in zoo.path.parent.rglob("*") if not p.is_relative_to(zoo.path)} | {
            str(p) for p in zoo.path.iterdir()
        }

    before = outside()
    kept = tree(zoo)
    for make in (check_name, slug):
        try:
            usable = make(name)
        except UsageError as error:
            assert str(error).isprintable()
        else:
            assert re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,95}", usable) and ".." not in Path(usable).parts
            assert not PureWindowsPath(usable).is_reserved() and not usable.endswith(".")
    try:
        entry, _ = zoo.add(folder, name)
    except UsageError:
        assert tree(zoo) == kept
    else:
        assert zoo.folder(entry.name).parent == zoo.path / "adapters" and zoo.folder(entry.name).is_dir()
        zoo.remove(entry.name)
    for call in (zoo.folder, zoo.entry, zoo.remove, zoo.__getitem__):
        with pytest.raises(UsageError):
            call(name)
    assert outside() == before and tree(zoo) == kept


@pytest.mark.parametrize("name", ["../held", "..", "/etc", "a/b", "C:\\x", "", "con\0", "A"])
def test_a_manifest_that_names_a_place_outside(zoo: Zoo, name: str) -> None:
    data = json.loads(zoo.manifest.read_text("utf-8"))
    data["adapters"][name] = data["adapters"]["held"]
    zoo.manifest.write_text(json.dumps(data))
    victim = zoo.path / "held"
    victim.mkdir()
    for call in (lambda: zoo.folder(name), lambda: zoo.remove(name), lambda: zoo[name], zoo.verify, lambda: list(zoo)):
        with pytest.raises(InputError, match=r"zoo\.json"):
            call()
    assert victim.is_dir()


@pytest.mark.parametrize("file", ["../../secret", "..", ".", "", "/etc/passwd", "a/b"])
def test_a_manifest_that_lists_a_file_outside(zoo: Zoo, file: str) -> None:
    data = json.loads(zoo.manifest.read_text("utf-8"))
    data["adapters"]["held"]["files"][file] = {"sha256": "0" * 64, "size": 1}
    zoo.manifest.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"zoo\.json"):
        zoo.verify()
