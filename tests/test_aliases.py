"""Whether two names mean one base: what is bridged, and that nothing else ever is."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from recycler.zoo.aliases import MIRRORS, hub_id_of, plain_name, same_model

MISTRAL = "mistralai/Mistral-7B-Instruct-v0.2"
PHI = "microsoft/phi-2"
SHA = "0123456789abcdef0123456789abcdef01234567"

FAMILIES = ["phi", "mistral", "Llama", "Qwen2.5", "Instruct", "chat", "hf", "it", "base"]
WORDS = st.sampled_from([*FAMILIES, "7B", "13b", "1.5", "2", "3", "v0.1", "v0.2", "0", "k"])
NAMES = st.lists(WORDS, min_size=1, max_size=5).map("-".join)
ORGS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,12}", fullmatch=True)
ENDINGS = st.sampled_from(
    [
        "-bnb-4bit", "-unsloth-bnb-4bit", "-bnb-8bit", "-4bit", "-8bit", "-4-bit", "-GPTQ", "-AWQ", "-GGUF", "-int4", "-int8",
        "-fp8", "-FP8-dynamic", "-AWQ-INT4", "-GPTQ-4bit-128g", "-exl2", "-nf4", "-Q4_K_M", "-q8_0", "-IQ2_XS", "-w4a16",
        "-quantized.w4a16", "-hqq", "_4bit",
    ]
)  # fmt: skip


@pytest.mark.parametrize(
    ("declared", "base", "expected"),
    [
        (PHI, PHI, "same"),
        ("Microsoft/Phi-2", PHI, "same"),
        (PHI + "/", PHI, "same"),
        ("/data/phi-2", "/data/phi-2/", "same"),
        ("unsloth/mistral-7b-instruct-v0.2-bnb-4bit", MISTRAL, "quantised copy"),
        ("TheBloke/Mistral-7B-Instruct-v0.2-GPTQ", MISTRAL, "quantised copy"),
        ("TheBloke/Mistral-7B-Instruct-v0.2-AWQ", MISTRAL, "quantised copy"),
        ("TheBloke/Mistral-7B-Instruct-v0.2-GGUF", MISTRAL, "quantised copy"),
        ("unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", "meta-llama/Llama-3.2-1B-Instruct", "quantised copy"),
        (MISTRAL, "unsloth/mistral-7b-instruct-v0.2-bnb-4bit", "quantised copy"),
        ("unsloth/phi-2-bnb-4bit", "someone/phi-2-AWQ", "quantised copy"),
        ("unsloth/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B-Instruct", "mirror"),
        ("/home/anon/AI-Models/LLM/Mistral-7B-Instruct-v0.2", MISTRAL, "path"),
        ("/home/anon/Mistral-7B-Instruct-v0.2-GPTQ/", MISTRAL, "path"),
        (f"/storage/ukp/shared/models--microsoft--phi-2/snapshots/{SHA}", PHI, "path"),
        (f"C:\\cache\\models--microsoft--phi-2\\snapshots\\{SHA}", PHI, "path"),
        ("C:\\models\\phi-2", PHI, "path"),
        ("./phi-2", PHI, "path"),
        ("../base/phi-2", PHI, "path"),
        ("phi-2", PHI, "path"),
        ("gpt2", "openai-community/gpt2", "path"),
        (PHI, "/data/phi-2", "path"),
        # the same last name at another organisation may be anything
        ("someone/phi-2", PHI, "no"),
        (f"/x/models--someone--phi-2/snapshots/{SHA}", PHI, "no"),
        ("models/phi-2", PHI, "no"),
        # another size, version or tuning
        ("microsoft/phi-2b", PHI, "no"),
        ("microsoft/phi-1_5", PHI, "no"),
        ("mistralai/Mistral-7B-Instruct-v0.1", MISTRAL, "no"),
        ("unsloth/mistral-7b-instruct-v0.1-bnb-4bit", MISTRAL, "no"),
        ("TheBloke/Mistral-7B-v0.1-AWQ", "mistralai/Mistral-7B-v0.2", "no"),
        ("mistralai/Mistral-7B-v0.2", MISTRAL, "no"),
        ("unsloth/llama-3-8b-bnb-4bit", "meta-llama/Meta-Llama-3-8B", "no"),
        ("/home/anon/Mistral-7B-Instruct-v0.1", MISTRAL, "no"),
        ("/data/model", PHI, "no"),
        (f"/x/models--microsoft--phi-1/snapshots/{SHA}", PHI, "no"),
        (None, PHI, "no"),
        ("", PHI, "no"),
        ("  ", PHI, "no"),
        ("/", PHI, "no"),
    ],
)
def test_names_in_the_wild(declared: str | None, base: str, expected: str) -> None:
    assert same_model(declared, base) == expected


def test_aliases_are_taken_at_their_word() -> None:
    assert same_model("someone/phi-2-copy", PHI, ["someone/phi-2-copy"]) == "alias"
    assert same_model("SomeOne/Phi-2-copy", PHI, ["x/y", "someone/phi-2-copy"]) == "alias"
    assert same_model("unsloth/phi-2-copy-bnb-4bit", PHI, ["someone/phi-2-copy"]) == "quantised copy"
    assert same_model("/data/phi-2-copy", PHI, ["someone/phi-2-copy"]) == "path"
    assert same_model(PHI, PHI, [PHI]) == "same"
    assert same_model("someone/other", PHI, ["someone/phi-2-copy", "", "/"]) == "no"


def test_ids_in_cache_folders() -> None:
    assert hub_id_of(f"/x/models--microsoft--phi-2/snapshots/{SHA}") == "microsoft/phi-2"
    assert hub_id_of("/x/models--gpt2/snapshots/y") == "gpt2"
    assert hub_id_of("/x/models--org--a--b") == "org/a--b"
    assert hub_id_of("/x/my-models--org--a") is None
    assert hub_id_of("microsoft/phi-2") is None


@pytest.mark.parametrize(
    "name", ["phi-2", "model-unsloth", "model-mlx", "model-dynamic", "4bit", "awq", "Mistral-7B-v0.1", "x-8b"]
)
def test_what_is_no_quantised_copy(name: str) -> None:
    assert plain_name(f"org/{name}") == name.casefold()


@given(ORGS, NAMES, ORGS, ENDINGS)
@example("mistralai", "Mistral-7B-v0.1", "TheBloke", "-AWQ")
@example("a", "phi-0", "b", "-q8_0")
def test_a_quantised_copy_is_one_whoever_made_it(org: str, name: str, other: str, ending: str) -> None:
    base, copy = f"{org}/{name}", f"{other}/{name}{ending}"
    assert same_model(copy, base) == same_model(base, copy) == "quantised copy"
    assert same_model(copy.upper(), base) == "quantised copy"
    assert same_model(f"/some/where/{name}{ending}", base) == "path"
    assert plain_name(copy) == name.casefold()


@given(ORGS, NAMES, NAMES, ORGS, st.one_of(st.just(""), ENDINGS), st.one_of(st.just(""), ENDINGS))
def test_another_size_version_or_tuning_never_matches(
    org: str, name: str, other: str, whose: str, ending: str, another: str
) -> None:
    assume(name.casefold() != other.casefold())
    base = f"{org}/{name}{ending}"
    for declared in (
        f"{whose}/{other}{another}",
        f"{org}/{other}{another}",
        f"/models/{other}{another}",
        f"/cache/models--{org}--{other}{another}/snapshots/{SHA}",
        f"D:\\models\\{other}{another}",
        f"{other}{another}",
    ):
        assert same_model(declared, base) == "no"
        assert same_model(base, declared) == "no"


@given(st.text(max_size=40), st.text(max_size=40), st.lists(st.text(max_size=20), max_size=3))
def test_any_text_has_an_answer(declared: str, base: str, aliases: list[str]) -> None:
    found = same_model(declared, base, aliases)
    assert found in ("same", "alias", "quantised copy", "mirror", "path", "no")
    if declared.strip() and re.search(r"\w", declared):
        assert same_model(declared, declared) == "same"
        assert same_model(declared, base, [declared]) in ("same", "alias")


@given(ORGS, ORGS, NAMES)
def test_same_names_elsewhere_are_not_assumed_equal(org: str, other: str, name: str) -> None:
    assume(org.casefold() != other.casefold() and not {org.casefold(), other.casefold()} & set(MIRRORS))
    assert same_model(f"{other}/{name}", f"{org}/{name}") == "no"
