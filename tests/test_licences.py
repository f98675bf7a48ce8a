"""Licences: one spelling each, what they ask, what a set of them asks, and where that decides what may go into a model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from adapters import tensors, write
from click.testing import CliRunner, Result
from conftest import Pico
from hypothesis import given
from hypothesis import strategies as st

import recycler
from recycler.cli import main
from recycler.sharing.card import card
from recycler.zoo.errors import InputError, UsageError
from recycler.zoo.licences import SENTENCES, TERMS, allowed, normalise, parse_list, require, roll_up, stated, terms
from recycler.zoo.store import Zoo


def recycle(*args: object, zoo: Zoo) -> Result:
    result = CliRunner().invoke(main, [*map(str, args), "--zoo", str(zoo.path)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("apache-2.0", "apache-2.0"),
        ("Apache 2.0", "apache-2.0"),
        ("Apache License, Version 2.0", "apache-2.0"),
        ("APACHE", "apache-2.0"),
        ("The MIT License", "mit"),
        ("MIT license", "mit"),
        ("cc-by-nc", "cc-by-nc"),
        ("CC BY-NC 4.0", "cc-by-nc-4.0"),
        ("cc-by-nc-4", "cc-by-nc-4.0"),
        ("Creative Commons Attribution-NonCommercial 4.0 International", "cc-by-nc-4.0"),
        ("Attribution-NonCommercial-NoDerivatives 4.0", "cc-by-nc-nd-4.0"),
        ("CC-BY-SA-4.0", "cc-by-sa-4.0"),
        ("CC0", "cc0-1.0"),
        ("GPLv3", "gpl-3.0"),
        ("GPL-3.0-or-later", "gpl-3.0"),
        ("AGPL-3.0-only", "agpl-3.0"),
        ("BSD 3-Clause", "bsd-3-clause"),
        ("llama2", "llama2"),
        ("Llama 2", "llama2"),
        ("LLaMA 3.1 Community License Agreement", "llama3.1"),
        ("llama-3.0", "llama3"),
        ("gemma", "gemma"),
        ("Gemma Terms of Use", "gemma"),
        ("OpenRAIL++", "openrail++"),
        ("My own licence v2", "my own licence v2"),
        ("mit\x1b[31m", "mit\\x1b[31m"),
        ("", None),
        (None, None),
        ("unknown", None),
        ("None", None),
    ],
)
def test_spellings(text: str | None, expected: str | None) -> None:
    assert normalise(text) == expected
    assert normalise(normalise(text)) == expected


@given(st.text(max_size=60))
def test_any_text_is_safe_and_settles(text: str) -> None:
    once = normalise(text)
    assert once is None or (once.isprintable() and normalise(once) == once)
    assert all(one.isprintable() for one in stated(text))
    roll_up({"a": text, "b": "mit"}).to_json()


@pytest.mark.parametrize("known", sorted(TERMS))
def test_known_ids_are_their_own_spelling(known: str) -> None:
    assert normalise(known) == known == normalise(known.upper())
    assert set(terms(known)) <= set(SENTENCES)


def test_what_they_ask() -> None:
    assert terms("mit") == terms("apache-2.0") == terms("cc-by-4.0") == ()
    assert terms("cc-by-nc-nd-4.0") == ("no-derivatives", "non-commercial")
    assert terms("cc-by-nc-sa-4.0") == ("non-commercial", "share-alike")
    assert terms("llama3.1") == terms("gemma") == ("model-specific",)
    assert terms("gpl-3.0") == ("share-alike",) and terms("my own") == ("unrecognised",)


def test_several_on_one_card() -> None:
    assert stated("mit, apache-2.0") == ("mit", "apache-2.0") and stated("mit, MIT License") == ("mit",)
    assert stated("Apache License, Version 2.0") == ("apache-2.0",) and stated("unknown") == ()


def test_what_is_allowed() -> None:
    allow = parse_list("Apache 2.0, mit,cc-by")
    assert allow == {"apache-2.0", "mit", "cc-by"}
    for text in ("apache-2.0", "MIT", "cc-by-4.0", "CC BY 3.0", "mit, apache-2.0"):
        assert allowed(text, allow), text
    for other in ("cc-by-nc-4.0", "cc-by-sa-4.0", "mit, gpl-3.0", "my own", None, "", "unknown"):
        assert not allowed(other, allow), other
    assert allowed("llama3.1", parse_list("llama")) and not allowed("llama3.1", parse_list("llama3"))
    assert allowed("house rules", parse_list("house rules"))
    assert parse_list("llama9") == {"llama9"}  # there may be one some day


def test_lists_that_allow_nothing_are_rejected() -> None:
    for text in ("", " , ", "unknown"):
        with pytest.raises(UsageError, match="No licence is named"):
            parse_list(text)
    with pytest.raises(UsageError, match=r"apahce-2\.0.*Did you mean apache-2\.0"):
        parse_list("mit,apahce-2.0")


def test_the_roll_up() -> None:
    roll = roll_up({"french": "CC BY-NC 4.0", "math": "mit", "law": None, "poem": "unknown", "code": "MIT"})
    assert roll.by_licence == {"cc-by-nc-4.0": ("french",), "mit": ("code", "math")} and roll.unstated == ("law", "poem")
    assert roll.single is None and roll.strictest == "cc-by-nc-4.0" and not roll.conflicts
    assert roll.verdict.startswith("most restrictive terms: cc-by-nc-4.0 from french (non-commercial); 2 adapters state none")
    assert roll.lines()[1:] == ["cc-by-nc-4.0: non-commercial: not for commercial use"]
    alike = roll_up({"a": "Apache 2.0", "b": "apache-2.0"})
    assert alike.single == "apache-2.0" and alike.verdict == "all state apache-2.0" and alike.lines() == [alike.verdict]
    assert roll_up({"a": None}).verdict.startswith("1 adapter states none") and roll_up({}).verdict == "no adapters"
    assert roll_up({"a": "house rules", "b": "mit"}).strictest == "house rules"  # nobody knows what it asks


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (("mit", "apache-2.0"), None),
        (("mit", "gpl-3.0"), None),
        (("gpl-3.0", "agpl-3.0"), None),
        (("mpl-2.0", "gpl-3.0"), None),
        (("cc-by-nc-4.0", "llama2"), None),
        (("gpl-3.0", "cc-by-nc-4.0"), "forbids adding restrictions"),
        (("agpl-3.0", "gemma"), "forbids adding restrictions"),
        (("cc-by-sa-4.0", "cc-by-nc-sa-4.0"), "each ask that the whole"),
        (("cc-by-nd-4.0", "mit"), "a mixture may count as one"),
        (("mit", None), None),
    ],
)
def test_conflicts(pair: tuple[str, str | None], expected: str | None) -> None:
    conflicts = roll_up(dict(zip("ab", pair, strict=True))).conflicts
    assert [expected in str(one) for one in conflicts if expected] == [True] * bool(expected) and bool(conflicts) == bool(
        expected
    )


def test_a_single_adapter_has_no_conflict() -> None:
    assert not roll_up({"a": "cc-by-nd-4.0"}).conflicts


def test_require() -> None:
    cards = {"a": "mit", "b": None, "c": "house rules", "d": "gpl-3.0", "e": "cc-by-nc-4.0"}
    require(cards, None)
    with pytest.raises(InputError, match=r"c \(house rules\), d \(gpl-3\.0\)") as caught:
        require(cards, parse_list("mit,cc-by-nc"))
    assert "b (" not in str(caught.value) and caught.value.why and caught.value.fix
    with pytest.raises(InputError, match=r"b \(states none\), c \(house rules, not recognised\).*forbids adding"):
        require(cards, None, strict=True)
    require({"a": "mit", "c": "house rules"}, parse_list("mit,house rules"), strict=True)


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    made = Zoo(tmp_path / "zoo")
    cards = {"free": "apache-2.0", "french": "cc-by-nc-4.0", "mine": None}
    for seed, (name, licence) in enumerate(cards.items()):
        text = "# A card" if licence is None else f"---\nlicense: {licence}\n---\n"
        made.add(write(tmp_path / name, tensors(seed=seed), card=text))
    return made


def test_the_command(zoo: Zoo) -> None:
    result = recycle("zoo", "licences", zoo=zoo)
    assert result.exit_code == 0
    rows = [line.split("\t")[:3] for line in result.stdout.split("\n\n")[0].splitlines()]
    assert rows[1:] == [["apache-2.0", "–", "free"], ["cc-by-nc-4.0", "non-commercial", "french"], ["none stated", "–", "mine"]]
    assert "most restrictive terms: cc-by-nc-4.0 from french" in result.stdout
    assert result.output.count("not legal advice") == 1
    data = json.loads(recycle("zoo", "licences", "--json", zoo=zoo).stdout)
    assert (
        data["schema_version"] == 1 and data["not_stated"] == ["mine"] and data["adapters"]["french"]["ids"] == ["cc-by-nc-4.0"]
    )
    assert data["licences"]["cc-by-nc-4.0"] == {"terms": ["non-commercial"], "adapters": ["french"]}
    assert recycle("zoo", "licences", "free", "--license-allow", "Apache 2.0", "--strict", zoo=zoo).exit_code == 0
    for options, code in (
        (["--license-allow", "apache-2.0,cc-by-nc"], 0),
        (["--license-allow", "apache-2.0"], 3),
        (["--license-allow", "apache-2.0,cc-by-nc", "--strict"], 3),
        (["--strict"], 3),
        (["--license-allow", "apahce-2.0"], 2),
        (["maht"], 2),
    ):
        assert recycle("zoo", "licences", *options, zoo=zoo).exit_code == code, options


def test_compose_asks(llama: Pico, tmp_path: Path) -> None:
    """Licences are judged before the base is loaded, and nothing is written where they do not pass."""
    zoo = Zoo(tmp_path / "zoo")
    for name, licence in (("math", "mit"), ("law", "cc-by-nc-4.0")):
        folder = llama.adapters[name]
        copy = tmp_path / name
        copy.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (copy / file).write_bytes((folder / file).read_bytes())
        (copy / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
        zoo.add(copy, base_path=str(llama.base))
    recycler.build_router("uniform", zoo=zoo, base=str(llama.base), out=tmp_path / "gates")
    command = ["compose", "--router", tmp_path / "gates", "--out", tmp_path / "model"]
    refused = recycle(*command, "--license-allow", "mit", zoo=zoo)
    assert refused.exit_code == 3 and "law (cc-by-nc-4.0)" in refused.stderr and not (tmp_path / "model").exists()
    with pytest.raises(InputError, match="law"):
        recycler.compose(zoo, tmp_path / "gates", license_allow=["mit"], base="/nowhere")
    done = recycle(*command, "--license-allow", "mit,cc-by-nc-4.0", "--strict", zoo=zoo)
    assert done.exit_code == 0 and "licences: most restrictive terms: cc-by-nc-4.0 from law" in done.stderr
    _, header, text = (tmp_path / "model" / "README.md").read_text(encoding="utf8").split("---\n", 2)
    facts = yaml.safe_load(header)
    assert facts["license"] == "other" and facts["license_name"]
    assert "| cc-by-nc-4.0 | non-commercial: not for commercial use | law |" in text and text.count("not legal advice") == 1


@pytest.mark.parametrize(
    ("cards", "license_", "says"),
    [
        (("mit", "MIT License"), "mit", "all state mit"),
        (("mit", None), "other", "not stated for b"),
        ((None, None), None, "none stated"),
        (("gpl-3.0", "cc-by-nc-4.0"), "other", "in conflict: a, b: gpl-3.0 forbids"),
        (("x | <script>", "x | <script>"), "other", "all state x"),
    ],
)
def test_the_card(cards: tuple[str | None, str | None], license_: str | None, says: str) -> None:
    facts: dict[str, object] = {}
    router = SimpleNamespace(facts=facts, method=lambda: "uniform", paper="", config=SimpleNamespace())
    adapters = [
        {"name": name, "source": "org/\u202ex\x1b[31m", "revision": None, "licence": licence, "sha256": "0" * 64}
        for name, licence in zip("ab", cards, strict=True)
    ]
    model = SimpleNamespace(router=router, truncated={})
    _, header, text = card(model, {"base": {"id": "org/base"}, "adapters": adapters}).split("---\n", 2)  # type: ignore[arg-type]
    assert yaml.safe_load(header).get("license") == license_ and "<script>" not in header
    assert says in text and "<script>" not in text and "\u202e" not in text and "\x1b" not in text
