"""Symbolic-MoE: profiles and draws by hand calculation, skills of both kinds, and recruits that answer one by one."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import Pico
from hypothesis import given
from hypothesis import strategies as st

import recycler
from recycler import recruiting
from recycler.cli import main
from recycler.recruiting import Candidate
from recycler.routed import RoutedModel
from recycler.routers import skill_words, skills
from recycler.routers.discovery import load_router, make_config
from recycler.routers.skills import Skills, SkillsConfig
from recycler.run import answer_prompts
from recycler.shots import Shot
from recycler.zoo.errors import InputError, UsageError

# Words stand for directions: what is nearest is known beforehand.
AXES = {"algebra": 0, "sums": 0, "law": 1, "court": 1, "rhyme": 2}


@dataclass
class Table:
    """What skills read of a profile."""

    adapters: tuple[str, ...]
    shots: dict[str, list[Shot]]
    nll: torch.Tensor
    exact: torch.Tensor | None = None


class Reader:
    """A Model of words: a text's keywords are its words, a word's embedding its axis and a little of an own one."""

    def __init__(self, adapters: tuple[str, ...] = ("math", "law")) -> None:
        self.adapters, self.asked = adapters, 0

    def prompts(self, rows: Any) -> Any:
        return [chain[-1].prompt for chain in rows]

    def texts(self, inputs: Any) -> list[str]:
        return list(inputs)

    def embed(self, texts: Any, encoder: str) -> torch.Tensor:
        rows = []
        for text in texts:
            x = torch.zeros(8)
            for word in text.split():
                x[AXES.get(word, 6)] += 1
            x[7] = 0.1 * (len(text) % 3)
            rows.append(torch.nn.functional.normalize(x, dim=0) if x.any() else x)
        return torch.stack(rows)

    def ask(self, prompts: Any, llm: str, *, temperature: float = 0.0, seed: int = 0) -> list[str]:
        self.asked += len(prompts)
        return [", ".join(prompt.rpartition("\n</input")[0].rpartition(">\n")[2].split()) for prompt in prompts]


def shot(prompt: str) -> Shot:
    return Shot(prompt, "x")


def table(exact: list[list[list[float]]] | None = None) -> Table:
    """Two tasks of two shots. NLL of the base, math and law."""
    shots = {"sums": [shot("algebra"), shot("algebra sums")], "cases": [shot("law"), shot("law sums")]}
    nll = torch.tensor([[[2.0, 2.0], [2.0, 2.0]], [[0.5, 0.45], [3.0, 1.0]], [[2.0, 0.5], [0.2, 1.5]]])
    return Table(("math", "law"), shots, nll, None if exact is None else torch.tensor(exact))


def fitted(config: SkillsConfig | None = None, profile: Table | None = None, reader: Any = None) -> tuple[Skills, Any]:
    reader = reader or Reader()
    return Skills.fit(reader, profile or table(), config or SkillsConfig(llm="words")), reader


# ---------------------------------------------------------------------------------------------------------- hand calculation


def test_who_is_right() -> None:
    """Within 0.1 nats of the best; an exact match where there was one."""
    near = [[[0, 0], [0, 0]], [[1, 1], [0, 1]], [[0, 1], [1, 0]]]
    assert skills.right(table()).int().tolist() == near  # type: ignore[arg-type]
    exact = [[[1.0, 0], [0, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 1]]]
    found = skills.right(table(exact)).int().tolist()  # type: ignore[arg-type]
    assert found == [[[1, 0], [0, 0]], [[0, 1], [0, 0]], [[0, 1], [1, 1]]]


def test_a_profile_counts_signs_by_skill() -> None:
    router, reader = fitted()
    assert list(router.skills) == ["algebra", "law", "sums"] and reader.asked == 4 * 5
    # shots in the order of their tasks' names: law, law sums, algebra, algebra sums
    expected = {
        "algebra": [-1 - 1, 1 + 1, -1 + 1],
        "law": [-1 - 1, -1 + 1, 1 - 1],
        "sums": [-1 - 1, 1 + 1, -1 + 1],
    }
    assert {name: row for name, row in zip(router.skills, router.profile_VC.tolist(), strict=False)} == expected
    assert router.profile_VC[-1].tolist() == [0, 0, 0]
    # G = -6, 4, 0 → raised by 7: 1, 11, 7 → squared: 1, 121, 49
    assert router.report["strength"] == {"base": round(1 / 171, 4), "math": round(121 / 171, 4), "law": round(49 / 171, 4)}


@pytest.mark.parametrize(
    "total, expected",
    [
        ({"a": 3, "b": 1}, {"a": 9, "b": 1}),
        ({"a": 3, "b": 0}, {"a": 16, "b": 1}),  # zero strength is not "never"
        ({"a": 0, "b": 0}, {"a": 1, "b": 1}),
        ({"a": -2, "b": 4}, {"a": 1, "b": 49}),
        ({"a": -5}, {"a": 1}),
    ],
)
def test_global_strengths(total: dict[str, int], expected: dict[str, int]) -> None:
    assert skills.strengths(total) == expected


@pytest.mark.parametrize(
    "local, expected",
    [
        ({"a": 2, "b": 1, "c": -1}, {"a": 2 * 9, "b": 1 * 1, "c": 0}),
        ({"a": 0, "b": 3, "c": 0}, {"a": 0, "b": 3, "c": 0}),
        ({"a": -3, "b": -1, "c": 0}, {"a": 1 * 9, "b": 3 * 1, "c": 4 * 4}),  # all negative: raised to 1 and above
        ({"a": 0, "b": 0, "c": 0}, {"a": 9, "b": 1, "c": 4}),
        ({}, {"a": 9, "b": 1, "c": 4}),  # no keyword: strength alone
    ],
)
def test_recruitment_scores(local: dict[str, int], expected: dict[str, int]) -> None:
    assert skills.scores(local, {"a": 9, "b": 1, "c": 4}) == expected


def test_draws_follow_the_probabilities() -> None:
    shares = {"a": 6, "b": 3, "c": 0, "d": 1}
    drawn = sum((skills.draw(shares, 3, f"prompt {i}") for i in range(4000)), Counter())
    assert drawn["c"] == 0 and drawn.total() == 12_000
    for name, share in shares.items():
        p = share / 10
        assert abs(drawn[name] / 12_000 - p) <= 4 * (p * (1 - p) / 12_000) ** 0.5
    assert max(skills.draw({"a": 1, "b": 1}, 3, f"{i}")["a"] for i in range(50)) == 3  # with replacement


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 10**6), min_size=1), st.randoms(use_true_random=False), st.text()
)
def test_draws_do_not_depend_on_the_order(shares: dict[str, int], rng: Any, key: str) -> None:
    shares["a"] = shares.get("a", 0) + 1
    items = list(shares.items())
    rng.shuffle(items)
    assert skills.draw(dict(items), 3, key) == skills.draw(shares, 3, key)


def test_a_prompt_is_recruited_for_by_hand() -> None:
    router, reader = fitted()
    found = router.recruit(reader, ["algebra law", "unheard", "algebra algebra", "court"])
    first, unknown, twice, near = found
    assert [(word, skill) for word, skill, _ in first.matches] == [("algebra", "algebra"), ("law", "law")]
    assert first.local == {"base": -4, "math": 2, "law": 0}
    assert first.probability == {"base": 0, "math": 1, "law": 0} and first.drawn == {"math": 3}
    assert unknown.keywords == ["unheard"] and not unknown.matches and not unknown.local
    assert unknown.probability == pytest.approx({"base": 1 / 171, "math": 121 / 171, "law": 49 / 171})
    assert twice.local == {"base": -2, "math": 2, "law": 0}  # one keyword: answers name it once
    assert near.matches[0][1] == "law" and near.local == {"base": -2, "math": 0, "law": 0}
    # all at or below zero: (L + 3)·G = 1·1, 3·121, 3·49
    assert near.probability == pytest.approx({"base": 1 / 511, "math": 363 / 511, "law": 147 / 511})


def test_keywords_that_mean_the_same_skill_count_twice() -> None:
    router, reader = fitted()
    [one] = router.recruit(reader, ["law court"])
    assert [skill for _, skill, _ in one.matches] == ["law", "law"] and one.local == {"base": -4, "math": 0, "law": 0}


def test_the_floor_lets_only_near_words_through() -> None:
    router, reader = fitted(SkillsConfig(llm="words", floor=-1.0))
    assert router.recruit(reader, ["unheard"])[0].matches
    router, reader = fitted(SkillsConfig(llm="words", floor=1.0))
    assert not router.recruit(reader, ["court"])[0].matches


def test_no_keywords_at_all() -> None:
    """A model that says nothing: strength alone, from shots without keywords."""

    class Mute(Reader):
        def ask(self, prompts: Any, llm: str, *, temperature: float = 0.0, seed: int = 0) -> list[str]:
            return [""] * len(prompts)

    router, reader = fitted(reader=Mute())
    assert not router.skills and router.profile_VC.tolist() == [[-4, 2, 0]]
    [one] = router.recruit(reader, ["algebra"])
    assert one.probability == pytest.approx({"base": 1 / 75, "math": 49 / 75, "law": 25 / 75})
    json.dumps(one.to_json())


def test_weights_are_draws_and_the_reason_names_them() -> None:
    router, reader = fitted(SkillsConfig(llm="words", recruits=4))
    decision = router.decide(reader, ["court", "unheard", "algebra"])
    assert ((decision.weights_BE * 4) % 1 == 0).all() and (decision.weights_BE.sum(-1) <= 1).all()
    for weights, why in zip(decision.weights_BE.tolist(), decision.why, strict=True):
        assert {n: w * 4 for n, w in zip(router.adapters, weights, strict=True) if w} == {
            n: c for n, c in why["recruits"].items() if n != "base"
        }
    assert decision.why[0]["skills"] == [{"keyword": "court", "skill": "law", "similarity": pytest.approx(1, abs=0.1)}]
    assert router.explain(decision) == decision.why


@pytest.mark.parametrize("text", ["algebra", "unheard", "court sums"])
def test_a_prompt_is_dealt_with_alone(text: str) -> None:
    """Neither its batch nor the order of adapters matters."""
    router, reader = fitted()
    alone = router.recruit(reader, [text])[0]
    assert router.recruit(reader, ["law", text, "rhyme"])[1].to_json() == alone.to_json()
    profile = table()
    turned = replace(profile, adapters=("law", "math"), nll=profile.nll[[0, 2, 1]])
    other, _ = fitted(profile=turned, reader=Reader(("law", "math")))
    assert other.recruit(reader, [text])[0].to_json() == alone.to_json()
    draws = {
        str(sorted(fitted(SkillsConfig(llm="words", seed=s))[0].recruit(reader, ["unheard"])[0].drawn.items()))
        for s in range(9)
    }
    assert len(draws) > 1


def test_a_lesson_can_be_left_out() -> None:
    router, reader = fitted()
    lesson = next(one for one in router.lessons if one.text == "algebra")
    [without] = router.recruit(reader, ["algebra"], [lesson])
    assert without.local == {"base": -1, "math": 1, "law": 1}
    assert router.recruit(reader, ["algebra"])[0].local == {"base": -2, "math": 2, "law": 0}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"recruits": 0}, "Somebody has to answer"),
        ({"floor": 2}, "cosine"),
        ({"aggregator": "best"}, "aggregator"),
        ({"k": 2}, "no option 'k'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_config(Skills, options)


# ---------------------------------------------------------------------------------------------------- skills without a model


def test_clusters_are_named_by_what_tells_them_apart() -> None:
    texts = [f"the {w} rhyme" for w in ("rhyme", "poem", "verse")] + [f"the {w} law" for w in ("law", "court", "judge")]
    x_ND = Reader().embed([t.split()[2] for t in texts], "")
    x_ND[:, 7] = torch.arange(6) * 1e-3  # all distinct
    labels, centres_VD = skill_words.clusters(torch.nn.functional.normalize(x_ND, dim=-1).repeat(2, 1))
    assert len(set(labels)) == 2 and len({*labels[:3], *labels[6:9]}) == 1
    names = skill_words.names(texts * 2, labels)
    assert {name.split()[0] for name in names} == {"rhyme", "law"} and not any("the" in name.split() for name in names)
    torch.testing.assert_close(centres_VD.norm(dim=-1), torch.ones(2))
    assert skill_words.clusters(x_ND.repeat(2, 1))[0] == labels  # the same every time


def test_names_are_all_different_also_of_texts_without_words() -> None:
    assert skill_words.names(["1 2", "3"], [0, 1]) == ["skill 1", "skill 2"]
    names = skill_words.names(["same", "same", "same"], [0, 1, 2])
    assert len(set(names)) == 3


def test_the_tail_that_asks_is_read() -> None:
    """Earlier turns hide nothing: the nearest tail speaks."""
    router, reader = fitted(SkillsConfig())
    [one] = router.recruit(reader, ["rhyme rhyme rhyme\nlaw law law"])
    assert one.keywords == ["law law law"] and "law" in one.matches[0][1]


# --------------------------------------------------------------------------------------------------------------- real models


@pytest.fixture(scope="module")
def profiles() -> dict[str, Any]:
    return {}


def built(world: Pico, profiles: dict[str, Any], **options: Any) -> Any:
    zoo = recycler.Zoo(world.zoo)
    if world.kind not in profiles:
        own = {name: [name] for name in world.adapters}
        shots = recycler.Shots.from_files(*world.tasks)
        profiles[world.kind] = recycler.profile(zoo, shots, kshot=4, dtype="float32", assign=own)
    return recycler.build_router("skills", profiles[world.kind], zoo=zoo, **options)


def test_saved_routers_recruit_the_same(world: Pico, profiles: dict[str, Any], tmp_path: Path) -> None:
    router = built(world, profiles, out=tmp_path / "gates")
    chosen = router.report["aggregator"]
    assert (
        chosen["chosen"] == router.aggregator and set(chosen["exact"]) == set(recruiting.AGGREGATORS) and chosen["shots"] == 16
    )
    model = recycler.compose(recycler.Zoo(world.zoo), router)
    again = load_router(tmp_path / "gates")
    assert isinstance(again, Skills) and again.aggregator == router.aggregator
    texts = ["Add 3 and b.", "something else entirely"]
    one, other = (r.recruit(model.reading, texts) for r in (router, again))
    assert [r.to_json() for r in one] == [r.to_json() for r in other]
    again.report["skills"].pop()
    with pytest.raises(InputError, match="Build the router again"):
        again.load_tensors(router.tensors())


def test_an_adapter_comes_and_goes_alone(llama: Pico, profiles: dict[str, Any]) -> None:
    from recycler.updating import add_adapter, remove_adapter

    zoo = recycler.Zoo(llama.zoo)
    full = built(llama, profiles)
    less = remove_adapter(full, "math", zoo=zoo)
    assert isinstance(less, Skills) and less.adapters == ("code", "law", "poem")
    grown = add_adapter(less, "math", profiles["llama"], zoo=zoo)
    assert isinstance(grown, Skills) and grown.adapters == ("code", "law", "poem", "math")
    assert torch.equal(grown.profile_VC[:, :4], full.profile_VC[:, [0, 1, 2, 4]])
    assert torch.equal(grown.profile_VC[:, 4].sum(), full.profile_VC[:, 3].sum())
    with pytest.raises(UsageError, match="cannot let go of prose"):
        full.without("prose")


def test_recruits_answer_as_they_would_alone(world: Pico, profiles: dict[str, Any]) -> None:
    model = recycler.compose(recycler.Zoo(world.zoo), built(world, profiles, aggregator="strongest", recruits=5))
    shots = [Shot(text, "") for text in ("Add 3 and b.", "O 4 of the e!", "nothing that is known here")]
    solved = recruiting.solve(model, shots, max_new_tokens=5, batch_size=4)
    for one, solution in zip(shots, solved, strict=True):
        assert sum(solution.recruitment.drawn.values()) == len(solution.candidates) == 5
        assert solution.text == solution.candidates[0].text and solution.aggregator == "strongest"
        firsts = {c.recruit: c.text for c in reversed(solution.candidates)}
        for name, said in firsts.items():
            assert said == answer_prompts(model, [one.prompt], max_new_tokens=5, only=name)[0]
    alone = [recruiting.solve(model, [one], max_new_tokens=5)[0].to_json() for one in shots]
    assert [s.to_json() for s in solved] == alone  # samples too
    said = {c.text for s in solved for c in s.candidates}
    assert len(said) > 3


@pytest.mark.parametrize("how", recruiting.AGGREGATORS)
def test_every_aggregator_answers(llama: Pico, profiles: dict[str, Any], how: str) -> None:
    model = recycler.compose(recycler.Zoo(llama.zoo), built(llama, profiles))
    shots = [Shot("what is known to nobody", ""), Shot("", "", (("user", "Add 3 and b."),))]
    for solution in recruiting.solve(model, shots, aggregator=how, max_new_tokens=4):
        assert solution.aggregator == how and (how == "synthesis" or solution.text in [c.text for c in solution.candidates])
        if how in ("own", "base") and len({c.text for c in solution.candidates}) > 1:
            best = max(solution.candidates, key=lambda c: getattr(c, how))
            assert solution.text == best.text


def test_likelihoods_are_the_recruits_own(llama: Pico, profiles: dict[str, Any]) -> None:
    from recycler.scoring import mean_nll

    model = recycler.compose(recycler.Zoo(llama.zoo), built(llama, profiles))
    some = [Candidate("math", " 3"), Candidate("base", " 44")]
    recruiting.weigh(model, [Shot("Add 3 and b.", "")], [some], own=True, base=True)
    w_NE = torch.tensor([[float(name == "math") for name in model.names], [0.0] * 4])
    rows = [Shot("Add 3 and b.", " 3"), Shot("Add 3 and b.", " 44")]
    assert [c.own for c in some] == pytest.approx([-x for x in mean_nll(model, rows, w_NE)])
    assert [c.base for c in some] == pytest.approx([-x for x in mean_nll(model, rows, w_NE * 0)])


def test_picking() -> None:
    some = [Candidate("a", "Yes", -3.0, -1.0), Candidate("b", "no ", -2.0, -4.0), Candidate("c", "No\nmore", -1.0, -2.0)]
    picked = {how: recruiting.pick(some, how) for how in recruiting.AGGREGATORS if how != "synthesis"}
    assert picked == {"strongest": "Yes", "majority": "no ", "own": "No\nmore", "base": "Yes"}
    assert recruiting.pick(some[:2], "majority") == "Yes"  # a tie: the likeliest recruit
    told = recruiting.synthesis(Shot("Is it?", ""), some).prompt
    assert told.startswith("Is it?\n") and all(one.text.strip() in told for one in some)
    chat = recruiting.synthesis(Shot("", "", (("user", "Is it?"),)), some).messages
    assert chat is not None and len(chat) == 1 and chat[0][1].startswith("Is it?\n")


def test_the_best_aggregator_on_the_shots_is_kept(
    llama: Pico, profiles: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What recruits say is given here; of the others only `own` finds the right answer, and ties go to the simplest."""
    router = built(llama, profiles)
    model = recycler.compose(recycler.Zoo(llama.zoo), router)
    assert "aggregator" not in router.report and router.aggregator == "majority"

    def gathered(right: float) -> Any:
        def gather(model: RoutedModel, shots: Any, recruited: Any, limits: Any, *rest: Any, **more: Any) -> Any:
            return [
                [Candidate("law", "wrong"), Candidate("code", "wrong"), Candidate("math", s.completion, right)] for s in shots
            ]

        return gather

    def weigh(model: RoutedModel, shots: Any, candidates: Any, **which: bool) -> None:
        for one in (one for some in candidates for one in some):
            one.own, one.base = (0.0 if one.own is None else one.own), (0.0 if one.text == "wrong" else -1.0)

    monkeypatch.setattr(recruiting, "weigh", weigh)
    monkeypatch.setattr(recruiting, "gather", gathered(1.0))
    recruiting.settle(model, router)
    assert router.aggregator == "own" and router.report["aggregator"]["exact"]["own"] == 1.0
    monkeypatch.setattr(recruiting, "gather", gathered(-1.0))
    recruiting.settle(model, router)
    assert router.aggregator == "strongest" and set(router.report["aggregator"]["exact"].values()) == {0.0}


def test_others_recruit_nobody(llama: Pico) -> None:
    model = recycler.compose(recycler.Zoo(llama.zoo), recycler.build_router("arrow", zoo=recycler.Zoo(llama.zoo)))
    with pytest.raises(UsageError, match=r"arrow recruits nobody.*build-router skills"):
        recruiting.solve(model, [Shot("a", "")])


# ------------------------------------------------------------------------------------------------------------ on the command line


@pytest.fixture(scope="module")
def composed(llama: Pico, profiles: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skills") / "model"
    recycler.compose(recycler.Zoo(llama.zoo), built(llama, profiles), folder)
    return folder


def ran(*arguments: str) -> list[Any]:
    result = CliRunner().invoke(main, ["run", *arguments, "--max-new-tokens", "4"])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_rows_say_who_was_recruited_and_why(composed: Path, tmp_path: Path) -> None:
    [row] = ran(str(composed), "-p", "Add 3 and b.", "--recruit")
    assert set(row) == {"prompt", "generated", "recruiting"}
    told = row["recruiting"]
    assert set(told) == {"keywords", "skills", "local", "global", "probability", "recruits", "candidates", "aggregator"}
    assert sum(told["recruits"].values()) == len(told["candidates"]) == 3
    assert row["generated"] in [one["text"] for one in told["candidates"]]
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "Add 3 and b.", "id": 7}\n{"prompt": "other"}\n')
    rows = ran(str(composed), "--input", str(source), "--recruit")
    assert rows[0] == {**row, "id": 7} and len(rows) == 2
    wrong = CliRunner().invoke(main, ["run", str(composed), "-p", "a", "--recruit", "--only", "math"])
    assert wrong.exit_code == 2 and "--recruit does not go with --only" in wrong.output


def test_rows_say_how_they_were_routed(composed: Path) -> None:
    plain = ran(str(composed), "-p", "Add 3 and b.", "-p", "other")
    rows = ran(str(composed), "-p", "Add 3 and b.", "-p", "other", "--explain")
    assert [{k: v for k, v in row.items() if k != "routing"} for row in rows] == plain
    for row in rows:
        drawn = {name: count for name, count in row["routing"]["why"]["recruits"].items() if name != "base"}
        assert row["routing"]["shares"] == pytest.approx({name: count / 3 for name, count in drawn.items()}, abs=1e-3)
    [only] = ran(str(composed), "-p", "a", "--explain", "--only", "math")
    assert only["routing"] == {"shares": {"math": 1.0}}
    [bare] = ran(str(composed), "-p", "a", "--explain", "--only", "base")
    assert bare["routing"] == {"shares": {}}


def test_every_kind_of_router_is_explained(world: Pico) -> None:
    """Shares of a padded batch are those of its rows alone."""
    from recycler.shares import routing

    zoo = recycler.Zoo(world.zoo)
    shots = [Shot("Add 3 and b, and then some more.", ""), Shot("O!", "")]
    for method in ("arrow", "uniform"):
        model = recycler.compose(zoo, recycler.build_router(method, zoo=zoo))
        found = routing(model, shots)
        for one, row in zip(shots, found, strict=True):
            assert set(row) == {"shares"} and list(row["shares"].values()) == sorted(row["shares"].values(), reverse=True)
            [alone] = routing(model, [one])
            assert row["shares"] == pytest.approx(alone["shares"], abs=2e-3)
    assert found[0]["shares"] == dict.fromkeys(sorted(model.names), 0.25)
