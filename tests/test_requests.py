"""What a prompt asks for: tails, witnesses, and the routers that decide by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Pico
from hypothesis import given
from hypothesis import strategies as st

import recycler
from recycler.base import load_base
from recycler.build import read_adapters
from recycler.profiles import Profile
from recycler.routed import RoutedModel
from recycler.routers.classifier import Classifier, ClassifierConfig, companions, friends, table
from recycler.routers.discovery import load_router
from recycler.routers.gist import frame, gists
from recycler.routers.glider import Glider, GliderConfig, _threshold
from recycler.routers.requests import Requests, Witnesses, _between, _named, _spans, _spoken, tails
from recycler.routers.retrieval import Retrieval, RetrievalConfig, nearest
from recycler.routers.states import States, last_tokens
from recycler.scoring import Fitting
from recycler.shots import Shot, Shots
from recycler.zoo.errors import UsageError

NAMES = ("code", "law", "math", "poem")
WORDS = {
    "math": [f"Add the numbers {i} and {i + 3}." for i in range(6)],
    "law": [f"Is the tenant liable for damage number {i}?" for i in range(6)],
    "code": [f"Write a Python function that sorts list {i}." for i in range(6)],
    "poem": [f"Compose a verse about the moon, number {i}." for i in range(6)],
}


def shots() -> Shots:
    return Shots({task: [Shot(f"Instruction: {text}\nResponse:", " ok") for text in texts] for task, texts in WORDS.items()})


def profile(nll: torch.Tensor | None = None) -> Profile:
    own = {name: (name,) for name in NAMES}
    return Profile(NAMES, shots(), torch.ones(5, 4, 6) if nll is None else nll, assigned=own)


@pytest.fixture(scope="module")
def fitting(llama: Pico) -> Fitting:
    base = load_base(str(llama.base))
    return Fitting(RoutedModel(base, read_adapters(recycler.Zoo(llama.zoo), NAMES, base)))


def inputs(fitting: Fitting, *prompts: str) -> dict[str, torch.Tensor]:
    return fitting.prompts([[Shot(prompt, "")] for prompt in prompts])


ASKED = {
    "math": "Instruction: What do 44 and 71 add up to?\nResponse:",
    "law": "Instruction: Must the landlord pay, is he liable?\nResponse:",
    "code": "Instruction: I need a Python function for reversing a list.\nResponse:",
    "poem": "Instruction: Give me some verses on the moon.\nResponse:",
}


# ------------------------------------------------------------------------------------------------------------------ tails


def test_tails_begin_at_lines_and_hold_a_few_words() -> None:
    assert tails("a b c d\n\ne f g\nh") == ["a b c d\n\ne f g\nh", "e f g\nh"]
    assert tails("one line of words") == ["one line of words"]
    assert tails("") == [""]


@given(st.text(alphabet="ab \n", max_size=200))
def test_tails_are_suffixes_and_few(text: str) -> None:
    found = tails(text)
    assert found[0] == text and len(found) <= 8 and len(set(found)) == len(found)
    assert all(text.endswith(tail) for tail in found)
    assert all(text[: -len(tail)].endswith("\n") for tail in found[1:])


# -------------------------------------------------------------------------------------------------------------- witnesses


@pytest.mark.parametrize("base", [0.0, 0.5])
def test_tasks_are_told_apart_in_other_words(fitting: Fitting, base: float) -> None:
    """The pico base knows nothing, so its own evidence must not drown the encoder's."""
    requests = Requests.fit(fitting, shots(), Witnesses(state=base, words=base, gist=base / 2), seed=0)
    found = requests.read(fitting, inputs(fitting, *ASKED.values()))
    assert [requests.tasks[c] for c in found.log_p_BC.argmax(-1)] == list(ASKED)
    torch.testing.assert_close(found.log_p_BC.exp().sum(-1), torch.ones(4))


def test_the_last_request_counts_wherever_it_begins(fitting: Fitting) -> None:
    """After answered turns of other tasks; without tails, the whole prompt speaks for what came first. The pico base
    has two layers; the first still knows its words."""
    before = f"{ASKED['poem']} ok\n\n{ASKED['law']} ok\n\n"
    prompts = inputs(fitting, *(before + ASKED[task] for task in ("math", "code")))
    tasks = shots()
    with_tails = Requests.fit(fitting, tasks, Witnesses(depth=0.5), seed=0)
    found = with_tails.read(fitting, prompts)
    assert [with_tails.tasks[c] for c in found.log_p_BC.argmax(-1)] == ["math", "code"]
    assert all("moon" not in tail for tail in found.tails)


_TEXT = st.text(alphabet="ab:\n ", max_size=12)


@given(_TEXT, _TEXT, st.lists(_TEXT, min_size=1, max_size=5))
def test_a_frame_is_what_all_prompts_share_in_whole_words(before: str, after: str, parts: list[str]) -> None:
    prompts = [before + part + after for part in parts]
    found = frame(prompts)
    assert all(
        p.startswith(found[0]) and p.endswith(found[1]) and (found == ("", "") or len(p) > sum(map(len, found)))
        for p in prompts
    )
    assert (not found[0] or found[0][-1].isspace()) and (not found[1] or found[1][0].isspace())
    wordy = [f"{before}: x{i} {part} {i}\n{after}" for i, part in enumerate([*parts, "b"])]
    assert frame(wordy)[0].startswith(f"{before}: ") and frame(wordy)[1].endswith(f"\n{after}")


def test_a_gist_is_of_the_request_alone_whatever_stands_around_it_and_beside_it(fitting: Fitting) -> None:
    plain = [text.removeprefix("Instruction: ").removesuffix("\nResponse:") for text in ASKED.values()]
    edge = frame(list(ASKED.values()))
    assert edge == ("Instruction: ", "\nResponse:")
    together = gists(fitting, [*ASKED.values(), *plain, "a" * 5000], edge)
    torch.testing.assert_close(together[:4], together[4:8])
    for row, text in zip(together, plain, strict=False):
        torch.testing.assert_close(row, gists(fitting, [text], ("", ""))[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(9))
    assert (together[0] - together[1]).norm() > 1e-3


def test_a_gist_ends_with_its_question_in_a_short_context(fitting: Fitting, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fitting.tokens(["a b c " * 20, "a"])
    monkeypatch.setattr(fitting.model.config, "max_position_embeddings", 8)
    cut = fitting.tokens(["a b c " * 20, "a"])
    assert cut["input_ids"].shape == (2, 8) and torch.equal(cut["input_ids"][0], whole["input_ids"][0, -8:])
    assert torch.equal(cut["attention_mask"][1], whole["attention_mask"][1, -8:])
    assert gists(fitting, [ASKED["math"]], ("", "")).isfinite().all()


def test_the_words_are_those_between_what_all_prompts_share(fitting: Fitting) -> None:
    """Against the tokens themselves, in a batch with padding; a text without the frame is taken whole, and so is one that is nothing
    else."""
    shared = ("Instruction: ", "\nResponse:")
    texts = [ASKED["math"], "What do 44 and 71 add up to?", "\nResponse:"]
    spans = _spans(fitting, texts, shared)
    states_BTH, mask_BT = fitting.states(inputs(fitting, *texts), 0.5)
    states_BTH = torch.nn.functional.layer_norm(states_BTH, states_BTH.shape[-1:])
    means = States(fitting, inputs(fitting, *texts), 0.5).mean(spans)
    count = fitting.lengths
    for row, (text, drop, cut) in enumerate(
        zip(texts, (count(["Instruction:"])[0], 0, 0), (count(["\nResponse:"])[0], 0, 0), strict=True)
    ):
        real_TH = states_BTH[row][mask_BT[row]][-count([text])[0] :]
        torch.testing.assert_close(means[row], real_TH[drop : len(real_TH) - cut].mean(0), rtol=1e-4, atol=1e-5)


def test_names_that_say_what_a_task_is_are_heard_and_others_are_not(fitting: Fitting) -> None:
    """Where they are numbers, or wrong, it is as if there were none."""
    says = Requests.fit(fitting, shots(), Witnesses(words=0, state=0, gist=0), seed=0)
    assert says.tensors["names.scale"] > 1
    prompts = inputs(fitting, *ASKED.values())
    for renamed in (
        dict(zip(NAMES, ("t1", "t2", "t3", "t4"), strict=True)),
        dict(zip(NAMES, (*NAMES[1:], NAMES[0]), strict=True)),
    ):
        others = Shots({renamed[task]: some for task, some in shots().items()})
        mute = Requests.fit(fitting, others, Witnesses(words=0, state=0, gist=0), seed=0)
        without = Requests.fit(fitting, others, Witnesses(words=0, state=0, gist=0, names=0), seed=0)
        assert mute.tensors["names.scale"] < 1e-3 and "names" not in without.tensors
        torch.testing.assert_close(mute.read(fitting, prompts).log_p_BC, without.read(fitting, prompts).log_p_BC)


@given(st.integers(0, 1000), st.floats(0, 60))
def test_names_speak_as_loudly_as_the_shots_say(seed: int, k: float) -> None:
    """No other strength makes the shots' tasks likelier."""
    draw = torch.Generator().manual_seed(seed)
    text_ND, name_CD = (torch.nn.functional.normalize(torch.randn(n, 8, generator=draw), dim=1) for n in (30, 4))
    labels = torch.randint(4, (30,), generator=draw)
    found = _named(text_ND, name_CD, labels.tolist())
    near_NC = text_ND @ name_CD.T - found["names.middle"]
    loss = [torch.nn.functional.cross_entropy(scale * near_NC, labels) for scale in (found["names.scale"], k)]
    assert loss[0] <= loss[1] + 1e-5 and found["names.scale"] >= 0


def test_a_name_is_read_as_words() -> None:
    assert [_spoken(name) for name in ("past_tense", "org/word-category.v2", "___")] == [
        "past tense",
        "org word category v2",
        "___",
    ]


def test_a_router_of_before_there_were_gists_and_names_reads_without(fitting: Fitting) -> None:
    requests = Requests.fit(fitting, shots(), Witnesses(gist=0, names=0), seed=0)
    assert not any(name.startswith(("gist", "names")) for name in requests.tensors)
    old = Requests(requests.tasks, Witnesses(), requests.tensors)
    prompts = inputs(fitting, *ASKED.values())
    torch.testing.assert_close(old.read(fitting, prompts).log_p_BC, requests.read(fitting, prompts).log_p_BC)


def test_the_state_is_asked_only_where_tails_disagree() -> None:
    """And only about the tasks that they speak for."""
    claims = [
        torch.tensor([[2.0, 1.0, 0.0], [3.0, 0.0, 0.0]]).log_softmax(-1),  # both tails for the first task
        torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0]]).log_softmax(-1),
    ]
    state_BC = torch.tensor([[0.0, 0.0, 9.0], [0.0, 2.0, 9.0]]).log_softmax(-1)
    first, second = _between(claims, state_BC).exp()
    torch.testing.assert_close(first, torch.ones(3))
    p = torch.tensor([0.0, 2.0]).softmax(-1)
    torch.testing.assert_close(second, torch.stack([p[0], p[1], p[0]]))


def test_the_last_state_is_that_of_the_last_real_token(fitting: Fitting) -> None:
    """Whatever the padding: against each prompt alone."""
    texts = [ASKED["math"], ASKED["law"] + " and then some more"]
    together = last_tokens(fitting, inputs(fitting, *texts), 0.5)
    for row, text in zip(together, texts, strict=True):
        torch.testing.assert_close(row, last_tokens(fitting, inputs(fitting, text), 0.5)[0], rtol=1e-3, atol=1e-4)
    ids = fitting.model.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    torch.testing.assert_close(together, last_tokens(fitting, ids, 0.5), rtol=1e-3, atol=1e-4)


def test_reading_a_middle_layer_runs_none_above(fitting: Fitting) -> None:
    """And gives what transformers says is there."""
    prompt = inputs(fitting, ASKED["math"])
    ran = []
    handles = [
        layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(fitting.model.base.model.layers)
    ]
    states, mask = fitting.states(prompt, 0.5)
    for handle in handles:
        handle.remove()
    assert ran == [0] and mask.all()
    with torch.no_grad(), fitting.model.disabled():
        expected = fitting.model.base(**prompt, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states, expected[1])
    torch.testing.assert_close(fitting.states(prompt, 1.0)[0], expected[-1])


@pytest.mark.parametrize(
    "name, value", [("state", -1), ("words", float("inf")), ("gist", float("nan")), ("depth", 0), ("depth", 1.5)]
)
def test_dials_that_say_nothing(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"^{name}="):
        Witnesses(**{name: value})  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- classifier


def test_a_row_of_the_table_is_the_best_adapter_the_base_or_a_better_mixture(
    fitting: Fitting, monkeypatch: pytest.MonkeyPatch
) -> None:
    nll = torch.full((5, 4, 6), 2.0)
    nll[3, 2] = 1.0  # math, at the task math (shots are in the order of WORDS: math, law, code, poem)
    tasks = list(WORDS)
    nll[1:, 0], nll[1:, 1] = 1.5, 1.5
    nll[1 + NAMES.index("math"), 0] = 1.0
    nll[1 + NAMES.index("law"), 1] = 1.0
    nll[:, 2:] = torch.tensor([1.0, 3.0, 3.0, 3.0, 3.0])[:, None, None]  # nobody helps with the other two
    plain = replace(profile(nll), assigned={})

    def score(model: object, some: object, mixture_E: torch.Tensor, mean: bool = True) -> torch.Tensor:
        law_and_code = mixture_E[NAMES.index("law")] > 0 and mixture_E[NAMES.index("code")] > 0
        return torch.full((6,), 0.4 if law_and_code else 1.2) + 0.01 * torch.arange(6)

    monkeypatch.setattr("recycler.routers.classifier._nll", score)
    rows = dict(zip(tasks, table(fitting, plain, tasks, mix=4).tolist(), strict=True))
    assert rows["code"] == rows["poem"] == [0, 0, 0, 0]
    assert sorted(rows["law"])[:2] == [0, 0] and sum(rows["law"]) == 1  # law and code are better together
    assert dict(zip(tasks, table(fitting, plain, tasks, mix=1).tolist(), strict=True))["law"] == [0, 1, 0, 0]
    by_hand = replace(plain, assigned={"poem": ("law",)})
    assert dict(zip(tasks, table(fitting, by_hand, tasks, mix=4).tolist(), strict=True))["law"] == [0, 0, 0, 1]


def test_friends_keep_what_they_can_do_alone(fitting: Fitting, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, rows = list(NAMES), torch.eye(4)

    def answered(model: object, some: object, mixture_E: torch.Tensor) -> float:
        active = {NAMES[e] for e in mixture_E.nonzero().flatten().tolist()}
        return 1.0 if len(active) == 1 or active == {"code", "math"} else 0.5

    monkeypatch.setattr("recycler.routers.classifier._answered", answered)
    found = friends(fitting, profile(), tasks, rows, torch.rand(4, 4).fill_diagonal_(-1.0))
    assert found.nonzero().tolist() == [[0, 2], [2, 0]]


def classifier(fitting: Fitting, **config: object) -> Classifier:
    return Classifier.fit(fitting, profile(), ClassifierConfig(**{"mix": 1, **config}))  # type: ignore[arg-type]


def test_a_plain_prompt_gets_one_row_and_a_strange_one_the_base(fitting: Fitting) -> None:
    router = classifier(fitting, sure=0.0)
    decision = router.decide(fitting, inputs(fitting, *ASKED.values(), "qqqq zzzz xxxx 9981 %%% @@"))
    assert decision.weights_BE.tolist()[:4] == torch.eye(4)[[NAMES.index(task) for task in ASKED]].tolist()
    assert [list(reason["tasks"]) for reason in decision.why[:4]] == [[task] for task in ASKED]
    strict = classifier(fitting, sure=0.0, unknown=1.0)
    decision = strict.decide(fitting, inputs(fitting, *ASKED.values()))
    assert not decision.weights_BE.any() and all(reason["unknown"] for reason in decision.why)


def test_an_unsure_prompt_is_shared_with_a_friend_that_the_wording_cannot_tell_from_it() -> None:
    friends_CC = torch.eye(3, dtype=torch.bool)
    friends_CC[0, 1] = friends_CC[1, 0] = True
    rows = [  # p, what the wording says, the two tasks
        ([0.7, 0.2, 0.1], [0.4, 0.3, 0.3], (0, 1)),
        ([0.7, 0.2, 0.1], [0.2, 0.7, 0.1], (0, 1)),
        ([0.7, 0.2, 0.1], [0.7, 0.2, 0.1], (0, 0)),  # it is told apart
        ([0.7, 0.1, 0.2], [0.4, 0.1, 0.5], (0, 0)),  # no friend
        ([0.2, 0.2, 0.6], [0.4, 0.4, 0.2], (2, 2)),  # has none
        ([0.95, 0.03, 0.02], [0.4, 0.3, 0.3], (0, 0)),  # sure
    ]
    first_B, second_B = companions(
        torch.tensor([p for p, _, _ in rows]), torch.tensor([w for _, w, _ in rows]), friends_CC, 0.9
    )
    assert list(zip(first_B.tolist(), second_B.tolist(), strict=True)) == [tasks for *_, tasks in rows]
    nobody = companions(torch.tensor([rows[0][0]]), torch.tensor([rows[0][1]]), friends_CC, 0.0)
    assert [one.tolist() for one in nobody] == [[0], [0]]


def test_two_rows_are_mixed_and_one_adapter_is_not_doubled(fitting: Fitting, monkeypatch: pytest.MonkeyPatch) -> None:
    router = classifier(fitting)
    prompt = inputs(fitting, ASKED["math"])
    pair = (torch.tensor([NAMES.index("math")]), torch.tensor([NAMES.index("poem")]))
    monkeypatch.setattr("recycler.routers.classifier.companions", lambda *_: pair)
    assert router.decide(fitting, prompt).weights_BE[0].tolist() == pytest.approx([0, 0, 0.6, 0.6])
    router.table_CE[NAMES.index("poem")] = router.table_CE[NAMES.index("math")]
    assert router.decide(fitting, prompt).weights_BE[0].tolist() == [0, 0, 1, 0]


def test_every_row_has_a_reason_that_json_can_hold(fitting: Fitting) -> None:
    import json

    router = classifier(fitting)
    assert json.loads(json.dumps(router.explain(router.prepare(fitting, inputs(fitting, *ASKED.values())))))


# ---------------------------------------------------------------------------------------------------------------- retrieval


def test_the_nearest_examples_are_the_highest_cosines() -> None:
    torch.manual_seed(0)
    queries, examples = (torch.nn.functional.normalize(torch.randn(n, 16), dim=-1) for n in (3, 40))
    found, numbers = nearest(queries, examples)
    expected = (queries @ examples.T).sort(descending=True)
    torch.testing.assert_close(found, expected.values)
    assert torch.equal(numbers, expected.indices)


def test_the_adapter_with_the_nearest_example_answers(fitting: Fitting, tmp_path: Path) -> None:
    router = Retrieval.fit(fitting, profile(), RetrievalConfig())
    weights = router.decide(fitting, inputs(fitting, *ASKED.values())).weights_BE
    assert weights.tolist() == torch.eye(4)[[NAMES.index(task) for task in ASKED]].tolist()
    less = router.without("law")
    assert less.adapters == ("code", "math", "poem") and len(less.examples_ND) == 18
    kept = load_router(less.save(tmp_path / "less"))
    assert isinstance(kept, Retrieval) and torch.equal(kept.owner_N, less.owner_N)
    with pytest.raises(UsageError, match="no adapter law"):
        less.without("law")


def test_an_adapter_is_added_by_its_examples(fitting: Fitting, llama: Pico) -> None:
    base = load_base(str(llama.base))
    three = Fitting(RoutedModel(base, read_adapters(recycler.Zoo(llama.zoo), NAMES[:3], base)))
    grown = Retrieval.fit(three, profile().restricted(NAMES[:3]), RetrievalConfig()).extended(fitting, profile(), "poem")
    whole = Retrieval.fit(fitting, profile(), RetrievalConfig())
    torch.testing.assert_close(grown.examples_ND, whole.examples_ND)  # to what a batch of another size rounds
    assert torch.equal(grown.owner_N, whole.owner_N)


# ------------------------------------------------------------------------------------------------------------------- glider


def glider(fitting: Fitting, **config: object) -> Glider:
    return Glider.fit(fitting, profile(), GliderConfig(local="ridge", **config))  # type: ignore[arg-type]


def test_scores_are_the_local_ones_plus_one_bias_a_sequence(fitting: Fitting) -> None:
    router = glider(fitting, beta=7.0)
    prompts = inputs(fitting, ASKED["math"], ASKED["poem"])
    plan = router.prepare(fitting, prompts)
    b_BE, _ = router.compass.read(fitting, prompts)  # type: ignore[union-attr]
    torch.testing.assert_close(plan, 7 * b_BE)
    assert b_BE.argmax(-1).tolist() == [NAMES.index("math"), NAMES.index("poem")] and b_BE.abs().max() <= 1 + 1e-5
    group = fitting.groups[0]
    x = torch.randn(2, 3, group.width)
    torch.testing.assert_close(
        router.score(group, group.sites[0], x, plan), router.local.score(group, group.sites[0], x) + plan[:, None]
    )


@pytest.mark.parametrize("text", ["instructions", "requests"])
def test_beta_is_calibrated_on_shots(fitting: Fitting, text: str) -> None:
    router = glider(fitting, text=text)
    facts = router.compass.facts  # type: ignore[union-attr]
    assert {"beta_known", "beta_new", "threshold"} <= set(facts)
    beta = router.compass.beta(torch.tensor([-50.0, 50.0]), None)  # type: ignore[union-attr]
    assert beta.tolist() == [facts["beta_new"], facts["beta_known"]]


def test_a_left_out_adapter_has_no_say(fitting: Fitting) -> None:
    router = glider(fitting, beta=1.0)
    e = NAMES.index("math")
    own, _ = router.compass.read(fitting, inputs(fitting, ASKED["math"]))  # type: ignore[union-attr]
    b_BE, similarity = router.compass.read(fitting, inputs(fitting, ASKED["math"]), without=e)  # type: ignore[union-attr]
    assert own.argmax() == e and b_BE[0, e] == -1 and similarity[0] < own.max()


_COSINES = st.lists(st.integers(-50, 50), min_size=1, max_size=8)


@given(_COSINES, _COSINES)
def test_the_threshold_parts_two_samples_as_well_as_any(near: list[int], far: list[int]) -> None:
    a, b = torch.tensor(near) / 50, torch.tensor(far) / 50
    right = lambda m: float((a >= m).float().mean() + (b < m).float().mean())  # noqa: E731
    assert right(_threshold(a, b)) >= max(right(m / 100) for m in range(-101, 103)) - 1e-6


def test_locals_that_do_not_score_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match="does not score tokens"):
        GliderConfig(local="uniform").local_config()
    with pytest.raises(UsageError, match="local=glider"):
        GliderConfig(local="glider")
    with pytest.raises(UsageError, match="has no option"):
        GliderConfig(local="ridge", local_options="speed=3").local_config()
