"""What the shots teach: whose task is whose, scores that PEFT gives too, and runs that go on where they stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico
from torch import Tensor

import recycler
from recycler import Profile, Shots
from recycler.profiles import exact_match, own_tasks
from recycler.shots import Shot
from recycler.zoo.errors import InputError, UsageError

# ------------------------------------------------------------------------------------------------------------- whose task


@pytest.mark.parametrize(
    "table, assigned, expected",
    [
        pytest.param(  # base, then math, law, code; columns math, law, code
            [[3, 3, 3], [1, 2, 2], [2, 1, 2], [2, 2, 1]],
            {},
            {"math": ("math",), "law": ("law",), "code": ("code",)},
            id="each its own",
        ),
        pytest.param(
            [[3, 3, 3], [1, 1, 2], [2, 2, 2.5], [2, 2, 1]],
            {},
            # law is best nowhere; ahead of the mean of all by −1/3, −1/3 and −2/3: the first of the two
            {"math": ("math", "law"), "law": ("math",), "code": ("code",)},
            id="best nowhere falls back",
        ),
        pytest.param(
            [[3, 3, 3], [1, 3, 3], [1, 3, 3], [3, 3, 1]],
            {},
            {"math": ("math",), "law": ("math",), "code": ("code",)},
            id="a duplicate shares",
        ),
        pytest.param(
            [[3, 3, 3], [1, 1, 2], [3, 3, 4], [2, 2, 1]],
            {},
            {"math": ("math", "law"), "law": (), "code": ("code",)},
            id="useless gets none",
        ),
        pytest.param(
            [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
            {},
            {"math": (), "law": (), "code": ()},
            id="nobody helps",
        ),
        pytest.param(
            [[4, 4, 4], [0.1, 2, 0.2], [3, 3, 3], [3, 3, 3]],
            {},
            # best at all three, but nowhere does it remove as large a share of the base's NLL as on its own;
            # the others are behind the mean everywhere, and least so on law
            {"math": ("math",), "law": ("law",), "code": ("law",)},
            id="helps most as a stranger",
        ),
        pytest.param(
            [[3, 3, 3], [1, 2, 2], [2, 1, 2], [2, 2, 1]],
            {"law": ("math",)},
            # math's best task is taken; it is ahead of the mean by −1/3 on law and on code
            {"math": ("law",), "law": ("math",), "code": ("code",)},
            id="by hand, from the best",
        ),
        pytest.param(
            [[3, 3, 3], [1, 2, 2], [4, 4, 4], [2, 2, 1]],
            {"law": ("law", "code")},
            {"math": ("math",), "law": ("law", "code"), "code": ("math",)},
            id="by hand, to a useless one",
        ),
        pytest.param(
            [[3, 3, 3], [1, 2, 2], [2, 1, 2], [2, 2, 1]],
            {"math": ("math", "law", "code")},
            {"math": ("math", "law", "code"), "law": (), "code": ()},
            id="by hand, everything",
        ),
    ],
)
def test_own_tasks(table: list[list[float]], assigned: dict[str, tuple[str, ...]], expected: dict[str, Any]) -> None:
    names = ("math", "law", "code")
    assert own_tasks(names, names, torch.tensor(table, dtype=torch.float), assigned) == expected


def made(nll: Any, exact: Any = None, **facts: Any) -> Profile:
    """A profile of math, law and code from a table of means; three shots a task around it."""
    names = ("math", "law", "code")
    spread = torch.tensor([-0.5, 0.0, 0.5])
    shots = Shots({name: [Shot(f"{name} {i}", "x") for i in range(3)] for name in names})
    nll_RTK = torch.tensor(nll, dtype=torch.float)[..., None] + spread
    exact_RTK = None if exact is None else torch.tensor(exact, dtype=torch.float)[..., None].expand(-1, -1, 3).contiguous()
    return Profile(names, shots, nll_RTK, exact_RTK, **facts)


def test_owner_is_the_best_or_by_hand_or_nobody() -> None:
    profile = made([[3, 3, 1], [1, 2, 2], [2, 2.5, 3], [2, 3, 4]])
    assert profile.owner == {"math": "math", "law": "math"}  # code is nobody's
    by_hand = profile.assign({"code": ["code", "law"]})
    assert by_hand.owner == {"math": "math", "law": "code", "code": "code"}
    assert by_hand.own["code"] == ("code", "law") and profile.assigned == {}


@pytest.mark.parametrize(
    "nll, exact, best",
    [
        ([[3, 3, 3], [1, 3, 3], [2, 2, 2], [9, 9, 1]], None, "law"),
        ([[2, 2, 2], [1, 4, 4], [4, 1, 4], [4, 4, 1]], None, None),
        # exact match counts first ...
        ([[3, 3, 3], [1, 1, 1], [2, 2, 2], [9, 9, 9]], [[0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]], "code"),
        ([[3, 3, 3], [1, 1, 1], [2, 2, 2], [9, 9, 9]], [[1, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]], None),
        # ... and NLL where it says nothing
        ([[3, 3, 3], [2, 2, 2], [1, 1, 1], [9, 9, 9]], [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]], "law"),
        ([[3, 3, 3], [2, 2, 2], [1, 1, 1], [1, 2, 3]], [[0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0]], "math"),
    ],
)
def test_best_single(nll: Any, exact: Any, best: str | None) -> None:
    assert made(nll, exact).best_single == best


@pytest.mark.parametrize(
    "pairs, message",
    [({"poem": ["math"]}, "no adapter 'poem'.*code, law, math"), ({"math": ["poem"]}, "no task 'poem'.*code, law, math")],
)
def test_assigning_what_is_not_there(pairs: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        made([[1, 1, 1]] * 4).assign(pairs)


def test_assign_takes_a_task_or_many() -> None:
    profile = made([[1, 1, 1]] * 4)
    pairs: Any = {"math": "law", "law": (task for task in ("math", "code"))}
    assert profile.assign(pairs).assigned == {"math": ("law",), "law": ("math", "code")}


def test_restricted_to_some_adapters() -> None:
    profile = made([[3, 3, 3], [2, 2, 2], [2.5, 1, 2.5], [1, 3, 1]], hashes={"math": "a", "law": "b", "code": "c"})
    assert profile.own["code"] == ("math", "code") and profile.best_single == "code"
    rest = profile.assign({"code": ["code"]}).restricted(["law", "math"])
    assert rest.adapters == ("law", "math") and rest.hashes == {"law": "b", "math": "a"} and rest.assigned == {}
    assert torch.equal(rest.nll, profile.nll[[0, 2, 1]])
    assert rest.own == {"law": ("law",), "math": ("math", "code")}  # what code was best at is free again
    assert rest.owner == {"math": "math", "law": "law", "code": "math"} and rest.best_single == "law"


@pytest.mark.parametrize(
    "generated, reference, same",
    [
        (" 42", "42", True),
        ("42\nNext question", " 42 ", True),
        ("42.", "42", False),
        ("\n\n42\n", "42", True),
        ("a\nb", "a\nb", True),
        ("a\nb\nc", "a\nb", False),
        ("", "42", False),
    ],
)
def test_exact_match(generated: str, reference: str, same: bool) -> None:
    assert exact_match(generated, reference) is same


# ------------------------------------------------------------------------------------------------------- on the real way


class Steps:
    """A progress that remembers how many steps each stage announced and did; and stops when told to."""

    def __init__(self, stop: Callable[[str, int], bool] = lambda what, done: False) -> None:
        self.announced: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.stop = stop

    def __call__(self, steps: int, what: str) -> Callable[..., None]:
        self.announced[what], self.done[what] = steps, 0

        def step(count: int = 1, note: str = "") -> None:
            self.done[what] += count
            if self.stop(what, self.done[what]):
                raise KeyboardInterrupt

        return step


def shots_of(world: Pico, rows: int | None = None) -> Shots:
    shots = Shots.from_files(*world.tasks)
    return shots if rows is None else Shots({task: some[:rows] for task, some in shots.items()})


def peft_nll(world: Pico, adapter: str | None, rows: list[Shot]) -> list[float]:
    """Mean NLL per completion token, one row at a time, by transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    auto: Any = AutoModelForCausalLM if world.kind == "llama" else AutoModelForSeq2SeqLM
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    model = auto.from_pretrained(world.base, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(world.adapters[adapter])).eval()
    losses = []
    for row in rows:
        prompt = tokenizer(row.prompt).input_ids
        answer = [*tokenizer(row.completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        if world.kind == "llama":
            inputs = {"input_ids": [prompt + answer], "labels": [[-100] * len(prompt) + answer]}
        else:
            inputs = {"input_ids": [prompt], "labels": [answer]}
        with torch.no_grad():
            losses.append(float(model(**{key: torch.tensor(value) for key, value in inputs.items()}).loss))
    return losses


def test_scores_are_those_of_one_adapter_at_a_time(world: Pico) -> None:
    profile = recycler.profile(recycler.Zoo(world.zoo), shots_of(world), 2)
    assert profile.adapters == ("code", "law", "math", "poem") and profile.tasks == tuple(file.stem for file in world.tasks)
    assert profile.nll.shape == (5, 4, 2) and profile.nll.dtype == torch.float32 and profile.exact is None
    for row, adapter in enumerate((None, *profile.adapters)):
        reference = [peft_nll(world, adapter, list(profile.shots[task])) for task in profile.tasks]
        torch.testing.assert_close(profile.nll[row], torch.tensor(reference), atol=1e-4, rtol=1e-4)
    assert (profile.nll[1:] - profile.nll[0]).abs().amax((1, 2)).min() > 1e-2  # every adapter did something


def test_generate(world: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every adapter's answers are compared, each with its row's completion and limit. A pico model never answers well, so the
    comparison is replaced by one that it passes half the time."""

    def fake(generated: str, reference: str) -> bool:
        return sum(map(ord, generated + reference)) % 2 == 0

    monkeypatch.setattr("recycler.profiles.exact_match", fake)
    zoo = recycler.Zoo(world.zoo)
    profile = recycler.profile(zoo, shots_of(world), 1, out=tmp_path / "p", generate=True)
    assert profile.exact is not None and profile.exact.shape == profile.nll.shape
    model = recycler.compose(zoo, recycler.build_router("uniform", zoo=zoo))
    for row, name in enumerate((None, *profile.adapters)):
        for column, shot in enumerate(rows[0] for rows in profile.shots.values()):
            inputs = model.tokenizer(shot.prompt, return_tensors="pt")
            limit = len(model.tokenizer(shot.completion, add_special_tokens=False).input_ids) + 4
            with model.only(name) if name else model.disabled():
                ids = model.generate(**inputs, max_new_tokens=limit, do_sample=False)[0]
            ids = ids[inputs["input_ids"].shape[1] :] if world.kind == "llama" else ids[1:]
            answer = model.tokenizer.decode(ids, skip_special_tokens=True)
            assert profile.exact[row, column, 0] == float(fake(answer, shot.completion)), (name, shot)
    assert 0 < profile.exact.mean() < 1
    loaded = Profile.load(tmp_path / "p")
    assert loaded.exact is not None and torch.equal(loaded.exact, profile.exact)
    assert loaded.to_json()["exact"]["math"]["law"] == float(profile.exact[3, profile.tasks.index("law"), 0])


def test_save_and_load(llama: Pico, tmp_path: Path) -> None:
    zoo, shots = recycler.Zoo(llama.zoo), shots_of(llama)
    odd = {**shots, "odd": [Shot("line\u2028paragraph\u2029next\u0085", "a\n\tü𝛼"), Shot("b", "c")]}
    chat = [Shot(f"q{i}", "yes", (("user", f"q{i}"),)) for i in range(2)]
    profile = recycler.profile(
        zoo,
        Shots({**odd, "chat": chat}),
        2,
        seed=5,
        out=tmp_path / "p",
        adapters=["poem", "law"],
        assign={"law": ["poem", "odd"]},
    )
    assert profile.folder == tmp_path / "p" and profile.name == "p"
    loaded = Profile.load(str(tmp_path / "p"))
    assert torch.equal(loaded.nll, profile.nll) and loaded.exact is None
    assert loaded.shots == profile.shots and loaded.shots.sha256 == profile.shots.sha256
    for key in ("adapters", "base", "hashes", "assigned", "seed", "name", "folder", "tasks", "own", "owner", "best_single"):
        assert getattr(loaded, key) == getattr(profile, key), key
    assert loaded.to_json() == profile.to_json() and loaded.own["law"] == ("poem", "odd")
    assert sorted(file.name for file in (tmp_path / "p").iterdir()) == ["profile.json", "profile.safetensors", "shots.jsonl"]
    data = json.loads((tmp_path / "p" / "profile.json").read_text(encoding="utf8"))
    assert data["schema_version"] == 1 and data["kshot"] == 2 and set(data["nll"]) == {"base", "poem", "law"}
    assert data["nll"]["law"]["chat"] == round(float(profile.nll[2, -1].mean()), 4)
    assert data["adapters"] == {name: zoo.entry(name).files["adapter_model.safetensors"]["sha256"] for name in ("poem", "law")}


def test_where_it_is_kept(llama: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recycler.build import profile_folder

    zoo = recycler.Zoo(tmp_path / "zoo")
    assert profile_folder(zoo, "p16") == zoo.profiles_dir / "p16"
    assert profile_folder(zoo, "./p16") == Path("p16") and profile_folder(zoo, tmp_path) == tmp_path
    with pytest.raises(UsageError, match=r"'My Profile' cannot name a folder of the zoo.*\./My Profile"):
        profile_folder(zoo, "My Profile")
    with pytest.raises(InputError, match=r"holds no profile.*recycle profile FILE"):
        Profile.load(tmp_path)


# Two hundred rows and more are scored before the first are written down, so an interruption needs some more.
def many(llama: Pico) -> Shots:
    return Shots({task: [Shot(f"{task} {i}", f" {i % 7}") for i in range(40)] for task in ("math", "law")})


def run(llama: Pico, folder: Path | None, steps: Steps, **options: Any) -> Profile:
    options = {"kshot": 30, **options}
    return recycler.profile(recycler.Zoo(llama.zoo), many(llama), out=folder, progress=steps, **options)


@pytest.fixture(scope="module")
def whole(llama: Pico) -> Tensor:
    """The scores of a run that nobody interrupted."""
    steps = Steps()
    profile = run(llama, None, steps)
    assert steps.announced == steps.done == {"scoring": 2 * 30 * 5}
    return profile.nll


def interrupted(llama: Pico, folder: Path) -> int:
    """Leaves the journal of a run that was stopped in its second part; returns how many scores it holds."""
    with pytest.raises(KeyboardInterrupt):
        run(llama, folder, Steps(lambda what, done: done > 260))
    assert [file.name for file in folder.iterdir()] == ["journal.jsonl"]
    lines = (folder / "journal.jsonl").read_text(encoding="utf8").splitlines()
    return sum(len(json.loads(line)[1]) for line in lines[1:])


def test_going_on_after_an_interruption(llama: Pico, whole: Tensor, tmp_path: Path) -> None:
    kept = interrupted(llama, tmp_path / "p")
    assert 200 < kept < 300
    with pytest.raises(InputError, match=r"no finished profile\. The run was interrupted\. Run recycle profile again"):
        Profile.load(tmp_path / "p")
    with pytest.raises(InputError, match="no finished profile"):
        recycler.build_router("ridge", tmp_path / "p", zoo=recycler.Zoo(llama.zoo))
    steps = Steps()
    profile = run(llama, tmp_path / "p", steps)
    assert steps.announced == steps.done == {"scoring": 300 - kept}
    assert torch.equal(profile.nll, whole) and torch.equal(Profile.load(tmp_path / "p").nll, whole)
    assert not (tmp_path / "p" / "journal.jsonl").exists()


@pytest.mark.parametrize("torn", ['["nll", [1, 2', '["nll", [0], [9.0]]', "\x00\x00"])
def test_a_last_line_that_was_cut_off_is_ignored(llama: Pico, whole: Tensor, tmp_path: Path, torn: str) -> None:
    kept = interrupted(llama, tmp_path / "p")
    with (tmp_path / "p" / "journal.jsonl").open("a", encoding="utf8") as journal:
        journal.write(torn)  # without its newline: the process died in the middle
    steps = Steps()
    assert torch.equal(run(llama, tmp_path / "p", steps).nll, whole)
    assert steps.done == {"scoring": 300 - kept}


def test_a_journal_cut_in_its_first_line_starts_again(llama: Pico, whole: Tensor, tmp_path: Path) -> None:
    interrupted(llama, tmp_path / "p")
    journal = tmp_path / "p" / "journal.jsonl"
    for cut in (10, 64):
        journal.write_text(journal.read_text(encoding="utf8")[:cut], encoding="utf8")
        kept = interrupted(llama, tmp_path / "p")  # it is a good journal again
        assert kept > 200
    assert torch.equal(run(llama, tmp_path / "p", Steps()).nll, whole)


def test_another_run_does_not_go_on_with_a_strangers_journal(llama: Pico, whole: Tensor, tmp_path: Path) -> None:
    for number, options in enumerate([{"seed": 1}, {"adapters": ["math", "law", "code"]}, {"dtype": "bfloat16"}]):
        folder = tmp_path / str(number)
        interrupted(llama, folder)
        steps = Steps()
        profile = run(llama, folder, steps, **options)
        assert steps.announced == {"scoring": profile.nll.numel()}, options


def test_a_finished_profile_is_not_measured_again(llama: Pico, tmp_path: Path) -> None:
    zoo, shots, out = recycler.Zoo(llama.zoo), shots_of(llama), tmp_path / "p"
    first = recycler.profile(zoo, shots, 2, out=out)
    files = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert len(first.key) == 64 and Profile.load(out).key == first.key
    steps = Steps()
    again = recycler.profile(zoo, shots, 2, out=out, progress=steps)
    assert steps.announced == {} and torch.equal(again.nll, first.nll) and again.to_json() == first.to_json()
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == files
    assert recycler.profile(zoo, shots, 2, out=out, assign={"law": "math"}, progress=steps).own["law"] == ("math",)
    assert steps.announced == {} and Profile.load(out).assigned == {"law": ("math",)}
    other: list[dict[str, Any]] = [{"seed": 1}, {"kshot": 1}, {"adapters": ["math"]}, {"dtype": "bfloat16"}, {"generate": True}]
    for options in other:
        with pytest.raises(UsageError, match=r"profile of another measurement.*--force"):
            recycler.profile(zoo, shots, **{"kshot": 2, **options}, out=out, progress=steps)
    assert steps.announced == {}
    forced = recycler.profile(zoo, shots, 1, out=out, force=True, progress=steps)
    assert steps.done == {"scoring": 20} and Profile.load(out).to_json() == forced.to_json()
    recycler.profile(zoo, shots, 1, out=out, force=True, progress=steps)  # also where nothing changed
    assert steps.announced == {"scoring": 20}


def test_an_interrupted_second_profile_leaves_the_first(llama: Pico, tmp_path: Path) -> None:
    first = run(llama, tmp_path / "p", Steps(), kshot=1)
    with pytest.raises(KeyboardInterrupt):
        run(llama, tmp_path / "p", Steps(lambda what, done: done > 260), force=True)
    assert torch.equal(Profile.load(tmp_path / "p").nll, first.nll)
    steps = Steps()
    run(llama, tmp_path / "p", steps, force=True)
    assert steps.announced["scoring"] < 100 and not (tmp_path / "p" / "journal.jsonl").exists()


def test_two_runs_at_once(llama: Pico, tmp_path: Path) -> None:
    zoo, shots, out = recycler.Zoo(llama.zoo), shots_of(llama), tmp_path / "p"

    def second(what: str, done: int) -> bool:
        with pytest.raises(UsageError, match=r"Another run is writing in .*another --out"):
            recycler.profile(zoo, shots, 1, out=out)
        return False

    recycler.profile(zoo, shots, 1, out=out, progress=Steps(second))
    assert sorted(file.name for file in out.iterdir()) == ["profile.json", "profile.safetensors", "shots.jsonl"]


def test_a_folder_of_something_else(llama: Pico, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf8")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UsageError, match="something else than a profile"):
            recycler.profile(recycler.Zoo(llama.zoo), shots_of(llama), 1, out=out, force=True)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_scores_are_kept_while_answers_are_generated(llama: Pico, tmp_path: Path) -> None:
    zoo, shots = recycler.Zoo(llama.zoo), shots_of(llama)
    options: dict[str, Any] = {"out": tmp_path / "p", "generate": True}
    with pytest.raises(KeyboardInterrupt):
        recycler.profile(zoo, shots, 1, progress=Steps(lambda what, done: what == "answering"), **options)
    steps = Steps()
    profile = recycler.profile(zoo, shots, 1, progress=steps, **options)
    assert steps.announced == {"scoring": 0, "answering": 20}
    assert torch.equal(profile.nll, recycler.profile(zoo, shots, 1).nll)


def test_what_it_refuses(llama: Pico, tmp_path: Path) -> None:
    zoo, shots = recycler.Zoo(llama.zoo), shots_of(llama)
    with pytest.raises(UsageError, match="needs shots"):
        recycler.profile(zoo)
    with pytest.raises(UsageError, match="is empty"):
        recycler.profile(recycler.Zoo(tmp_path / "none"), shots, 1)
    with pytest.raises(UsageError, match=r"No adapters were chosen.*code, law, math, poem"):
        recycler.profile(zoo, shots, 1, adapters=[])
    with pytest.raises(UsageError, match="Not in the zoo: prose"):
        recycler.profile(zoo, shots, 1, adapters=["math", "prose"])
    with pytest.raises(UsageError, match="no task 'prose' in profile p"):
        recycler.profile(zoo, shots, 1, out=tmp_path / "p", assign={"math": ["prose"]})
    with pytest.raises(InputError, match="fewer than 99"):
        recycler.profile(zoo, shots, 99)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("profile.json", "{", "cannot be read"),
        ("profile.json", "[]", "cannot be read"),
        ("profile.json", '{"schema_version": 99}', "^[^(]*newer version. Upgrade recycler.$"),
        ("shots.jsonl", "{}\n", "cannot be read"),
        ("shots.jsonl", '{"task": "math", "prompt": "a", "completion": "b"}\n', "do not fit together"),
        ("shots.jsonl", "", "cannot be read"),
        ("profile.safetensors", "x", "cannot be read"),
    ],
)
def test_a_damaged_profile(tmp_path: Path, file: str, content: str, message: str) -> None:
    made([[1, 1, 1]] * 4).save(tmp_path / "p")
    assert Profile.load(tmp_path / "p").tasks == ("math", "law", "code")
    (tmp_path / "p" / file).write_text(content, encoding="utf8")
    with pytest.raises(InputError, match=message):
        Profile.load(tmp_path / "p")


def test_adapters_that_make_everything_worse(llama: Pico) -> None:
    """What a look at the files cannot show: right shapes, wrong base."""
    shots = Shots.from_files(*llama.tasks[:2])
    nll = torch.tensor([[2.0, 2.0], [1.0, 4.0], [2.6, 2.4], [2.6, 2.7]])[..., None].expand(4, 2, 3)
    profile = Profile(("math", "law", "code"), shots, nll)
    assert profile.harmful == ("code",) and profile.to_json()["harmful"] == ["code"]
