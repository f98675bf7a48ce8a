"""Many requests in one packed row, each with its own mixture: every answer is what `generate` gives that request alone."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from conftest import Pico
from test_conformance import TEXTS, routed
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig

import recycler
from recycler.routed import RoutedModel
from recycler.serving import packed
from recycler.serving.jobs import End, Failure, Job, Piece, Sampling
from recycler.serving.service import Service
from recycler.serving.static import Static
from recycler.serving.worker import Continuous, Full, Limits, Worker, ends_of
from recycler.zoo.errors import InputError, UsageError

NEW = 8
LONG = "The same long beginning of a prompt, which fills several pages of keys and values: "
TASKS = {TEXTS[0]: "math", TEXTS[1]: "law", TEXTS[2]: "code"}
MIXTURES: list[Mapping[str, float] | None] = [
    None, {}, {"math": 1.0}, {"law": 1.0}, {"code": 1.0}, {"poem": 1.0}, {"math": 0.5, "poem": 0.5}, {"code": -0.7}, None,
]  # fmt: skip
ASKED = [(text, mixture) for text in [*TEXTS, "q", LONG, LONG + "one", LONG + "two"] for mixture in MIXTURES]


def given(model: RoutedModel, mixture: Mapping[str, float] | None, task: str | None) -> AbstractContextManager[Any]:
    if mixture is None:
        return model.labelled([task])
    return model.mixture(mixture) if mixture else model.disabled()


def alone(model: RoutedModel, text: str, mixture: Mapping[str, float] | None, new: int = NEW) -> list[int]:
    """The tokens that `generate` itself gives."""
    inputs = model.tokenizer(text, return_tensors="pt")
    begins = 1 if model.source.encoder_decoder else inputs["input_ids"].shape[1]
    with given(model, mixture, TASKS.get(text)):
        made = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=new, do_sample=False)
    return list(made[0, begins:].tolist())


class Asked:
    """A job, and what became of it."""

    def __init__(
        self, model: RoutedModel, text: str, mixture: Mapping[str, float] | None, new: int = NEW, **options: Any
    ) -> None:
        self.events: queue.Queue[Any] = queue.Queue()
        sampling = options.pop("sampling", Sampling(0.0))
        ids = list(model.tokenizer(text).input_ids)
        self.job = Job(
            ids, model.tokenizer, ends_of(model), self.events.put, new, mixture, sampling, task=TASKS.get(text), **options
        )  # fmt: skip
        self.text, self.scored = "", []  # type: ignore[var-annotated]

    def wait(self) -> End | Failure:
        while True:
            event = self.events.get(timeout=60)
            if not isinstance(event, Piece):
                assert self.events.empty()
                return event  # type: ignore[no-any-return]
            self.text += event.text
            self.scored += event.scored


@contextmanager
def working(worker: Worker) -> Iterator[Worker]:
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


def ask(worker: Worker, asked: Sequence[Asked]) -> list[End | Failure]:
    worker.submit([one.job for one in asked])
    return [one.wait() for one in asked]


SMALL = Limits(active=16, queue=200, cache_tokens=4096, batch_tokens=48)  # prompts are cut into pieces


@pytest.mark.parametrize("method", ["ridge", "arrow", "uniform", "retrieval", "classifier", "oracle"])
def test_mixed_mixtures_answer_as_one_by_one(llama: Pico, method: str) -> None:
    model = routed(llama, method)
    expected = [alone(model, text, mixture) for text, mixture in ASKED]
    assert len(set(map(tuple, expected))) > len(ASKED) // 2  # else they could be exchanged and nobody would notice
    asked = [Asked(model, text, mixture) for text, mixture in ASKED]
    with working(Continuous(model, SMALL)) as worker:
        ends = ask(worker, asked)
    assert all(isinstance(end, End) for end in ends)
    assert [one.job.made for one in asked] == expected
    assert [one.text for one in asked] == [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    # The model is free again, and as it was.
    assert [alone(model, *ASKED[n]) for n in (0, 2)] == [expected[0], expected[2]]


@pytest.mark.parametrize("method", ["ridge", "retrieval"])
def test_shares_say_who_answered(llama: Pico, method: str) -> None:
    model = routed(llama, method)
    routed_one, fixed, base = (
        Asked(model, TEXTS[0], None),
        Asked(model, TEXTS[1], {"law": 0.25, "code": 0.75}),
        Asked(model, "q", {}),
    )
    with working(Continuous(model, SMALL)) as worker:
        ask(worker, [routed_one, fixed, base])
    assert fixed.job.share == {"code": 0.75, "law": 0.25} and base.job.share == {}
    # All tokens that were run, prompt and answer: the last one is made, and not run.
    whole = torch.tensor([[*routed_one.job.prompt, *routed_one.job.made[:-1]]])
    with model.planned({"input_ids": torch.tensor([routed_one.job.prompt])}):
        share_E = model.weights_for({"input_ids": whole}).share()[0]
    found = torch.tensor([routed_one.job.share.get(name, 0.0) for name in model.names])
    torch.testing.assert_close(found, share_E, rtol=1e-4, atol=1e-5)
    assert float(found.sum()) > 0


def test_a_prefix_is_not_shared(llama: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of one mixture are wrong for another; a base that shares them answers wrongly, as this test would find."""
    model = routed(llama, "arrow")
    order = [{"math": 1.0}, {"poem": 1.0}, {}, None, {"math": 1.0}]
    expected = [alone(model, LONG, mixture) for mixture in order]
    assert len(set(map(tuple, expected))) == 4

    def one_after_the_other() -> list[list[int]]:
        asked = [Asked(model, LONG, mixture) for mixture in order]
        with working(Continuous(model, SMALL)) as worker:
            for one in asked:
                ask(worker, [one])
        return [one.job.made for one in asked]

    assert one_after_the_other() == expected
    monkeypatch.setattr(packed, "unshared", lambda config: config)
    assert one_after_the_other() != expected


def test_a_cache_that_is_too_small_for_all(llama: Pico) -> None:
    """Requests are put back and begun again; nothing of an answer is lost or said twice, draws included."""
    model = routed(llama, "ridge")
    texts = [(LONG + "x" * n, mixture) for n, mixture in enumerate(MIXTURES)]
    expected = [alone(model, text, mixture, 60) for text, mixture in texts]
    draws = Sampling(0.8, 0.9, seed=7)

    def run(tokens: int) -> tuple[list[list[int]], list[int]]:
        asked = [Asked(model, text, mixture, 60) for text, mixture in texts]
        drawn = Asked(model, LONG, {"law": 1.0}, 60, sampling=draws)
        with working(Continuous(model, Limits(active=16, queue=16, cache_tokens=tokens, batch_tokens=64))) as worker:
            ends = ask(worker, [*asked, drawn])
        assert all(isinstance(end, End) for end in ends)
        return [one.job.made for one in asked], drawn.job.made

    roomy, tight = run(4096), run(320)
    assert roomy[0] == tight[0] == expected
    assert roomy[1] == tight[1]


def test_draws_do_not_depend_on_who_is_beside(llama: Pico) -> None:
    model = routed(llama, "ridge")
    options = {"new": 24, "sampling": Sampling(1.0, 1.0, seed=3)}
    alone_, beside, other = (
        Asked(model, "q", {"math": 1.0}, **options),
        Asked(model, "q", {"math": 1.0}, **options),
        Asked(model, "q", {"math": 1.0}, new=24, sampling=Sampling(1.0, 1.0, seed=4)),
    )
    narrow = Asked(model, "q", {"math": 1.0}, new=24, sampling=Sampling(1.5, 1e-6, seed=4))
    with working(Continuous(model, SMALL)) as worker:
        ask(worker, [alone_])
        ask(worker, [beside, other, narrow, *(Asked(model, text, mixture) for text, mixture in ASKED[:9])])
    assert alone_.job.made == beside.job.made != other.job.made
    assert narrow.job.made == alone(model, "q", {"math": 1.0}, 24)  # of the likeliest alone, the likeliest


def test_draws_follow_the_distribution(llama: Pico) -> None:
    model = routed(llama, "ridge")
    with model.only("math"), torch.no_grad():
        p_V = model(**model.tokenizer("q", return_tensors="pt")).logits[0, -1].softmax(-1)
    asked = [Asked(model, "q", {"math": 1.0}, 1, sampling=Sampling(1.0, 1.0, seed=n)) for n in range(400)]
    with working(Continuous(model, Limits(active=64, queue=400, cache_tokens=4096))) as worker:
        ask(worker, asked)
    drawn_V = torch.zeros_like(p_V).index_add(0, torch.tensor([one.job.made[0] for one in asked]), torch.ones(400)) / 400
    top = int(p_V.argmax())
    assert abs(float(drawn_V[top] - p_V[top])) < 4 * float(p_V[top] * (1 - p_V[top]) / 400) ** 0.5
    assert int((drawn_V > 0).sum()) > 20


def test_what_goes_wrong_goes_wrong_alone(llama: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed(llama, "retrieval")
    assert model.router is not None
    decide = type(model.router).decide

    def fussy(self: Any, reader: Any, inputs: Any) -> Any:
        if any("liable" in text for text in reader.texts(inputs)):
            raise UsageError("not this one")
        return decide(self, reader, inputs)

    monkeypatch.setattr(type(model.router), "decide", fussy)
    asked = [Asked(model, TEXTS[n], None) for n in (0, 1, 2)]
    with working(Continuous(model, SMALL)) as worker:
        ends = ask(worker, asked)
        assert isinstance(ends[1], Failure) and "not this one" in str(ends[1].error)
        # A step that fails ends those who were in it; the next ones are answered.
        broken = model.base.lm_head.register_forward_hook(lambda *args: 1 / 0)
        failed = ask(worker, [Asked(model, TEXTS[0], {"math": 1.0}), Asked(model, TEXTS[2], None)])
        broken.remove()
        assert all(isinstance(end, Failure) for end in failed) and worker.idle
        again = Asked(model, TEXTS[0], {"math": 1.0})
        ask(worker, [again])
    for n in (0, 2):
        assert asked[n].job.made == alone(model, TEXTS[n], None)
    assert again.job.made == alone(model, TEXTS[0], {"math": 1.0})


def test_cancelled_jobs_leave(llama: Pico) -> None:
    model = routed(llama, "ridge")
    with working(Continuous(model, Limits(active=2, queue=2, cache_tokens=2048))) as worker:
        long = [Asked(model, TEXTS[0], mixture, 400) for mixture in ({"math": 1.0}, None, {}, {"law": 1.0})]
        worker.submit([one.job for one in long])
        with pytest.raises(Full):
            worker.submit([Asked(model, "q", {}).job])
        long[0].events.get(timeout=60)  # it runs
        worker.cancel([one.job for one in long])
        assert worker.idle
        after = Asked(model, TEXTS[1], None)
        ask(worker, [after])
    assert after.job.made == alone(model, TEXTS[1], None)
    assert all(len(one.job.made) < 400 for one in long)


@pytest.mark.parametrize("method", ["xlora", "glider"])
def test_what_cannot_be_packed_is_batched_otherwise(llama: Pico, method: str) -> None:
    model = routed(llama, method)
    assert method in packed.unpackable(model)
    check_static(model)


def test_an_encoder_decoder(t5: Pico) -> None:
    model = routed(t5, "ridge")
    assert "encoder–decoder" in packed.unpackable(model)
    check_static(model)


def check_static(model: RoutedModel) -> None:
    some = ASKED[:20]
    expected = [alone(model, text, mixture) for text, mixture in some]
    lengths = [3 + n % 6 for n in range(len(some))]  # a batch ends with its longest
    asked = [Asked(model, text, mixture, new) for (text, mixture), new in zip(some, lengths, strict=True)]
    with working(Static(model, Limits(active=8, queue=50))) as worker:
        ends = ask(worker, asked)
    assert all(isinstance(end, End) for end in ends)
    assert [one.job.made for one in asked] == [ids[:new] for ids, new in zip(expected, lengths, strict=True)]
    assert asked[2].job.share == {"math": 1.0} and asked[1].job.share == {}
    assert 0 < sum(asked[0].job.share.values()) < 1.01


def test_components_are_not_packed(llama: Pico) -> None:
    router = recycler.build_router("arrow", zoo=recycler.Zoo(llama.zoo), ranks=3)
    assert "components" in packed.unpackable(recycler.compose(recycler.Zoo(llama.zoo), router))


def test_eager_attention(llama: Pico) -> None:
    """Packed, it has a form of its own, in which nothing else can be run."""
    model = routed(llama, "ridge")
    model.base.set_attn_implementation("eager")
    asked = [Asked(model, text, mixture) for text, mixture in ASKED[:9]]
    expected = [alone(model, text, mixture) for text, mixture in ASKED[:9]]
    with working(Continuous(model, SMALL)) as worker:
        ask(worker, asked)
    assert [one.job.made for one in asked] == expected == [alone(model, text, mixture) for text, mixture in ASKED[:9]]
    reads = routed(llama, "retrieval")
    reads.base.set_attn_implementation("eager")
    assert "eager" in packed.unpackable(reads)


def test_a_base_that_transformers_does_not_batch(llama: Pico) -> None:
    model = routed(llama, "ridge")
    model.base.config.layer_types = ["linear_attention"] * 2
    with pytest.raises(InputError, match=r"cannot batch .* continuously"):
        Continuous(model, SMALL)
    service = Service(model)
    assert service.worker.batching == "static" and "linear_attention" in service.why_static


def test_adapters_on_disk_are_packed_too(llama: Pico, tmp_path: Any) -> None:
    whole = routed(llama, "ridge")
    whole.save_pretrained(tmp_path / "model")
    paged = recycler.load(tmp_path / "model", resident="10MB", packed=tmp_path / "packed")
    some = ASKED[:9]
    asked = [Asked(paged, text, mixture) for text, mixture in some]
    with working(Continuous(paged, SMALL)) as worker:
        ask(worker, asked)
    assert [one.job.made for one in asked] == [alone(whole, text, mixture) for text, mixture in some]


def test_spare_room_is_packed_too(llama: Pico, tmp_path: Any) -> None:
    whole = routed(llama, "ridge")
    whole.save_pretrained(tmp_path / "model")
    roomy = recycler.load(tmp_path / "model", spare=2)
    some = ASKED[:9]
    asked = [Asked(roomy, text, mixture) for text, mixture in some]
    with working(Continuous(roomy, SMALL)) as worker:
        ask(worker, asked)
    assert [one.job.made for one in asked] == [alone(whole, text, mixture) for text, mixture in some]


# ----------------------------------------------------------------------------------------------------------- text and stops


@pytest.mark.parametrize("stop", [("cd",), ("d", "zz"), ("abcdefgh",), ("h!",), ("nothing",), ("ef", "cde")])
@pytest.mark.parametrize("size", [1, 3])
def test_stop_strings(llama: Pico, stop: tuple[str, ...], size: int) -> None:
    """Fed byte by byte, or with characters of several bytes."""
    model = routed(llama, "ridge")
    text = "abcdéfghabcdefgh!" if size == 3 else "abcdefgh!"
    ids = model.tokenizer(text).input_ids
    asked = Asked(model, "q", {}, len(ids), stop=stop)
    for token in ids:
        if asked.job.advance(token):
            break
    asked.job.close()
    end = asked.wait()
    cut = min((at for at in (text.find(one) for one in stop) if at >= 0), default=None)
    assert asked.text == text[:cut]
    assert isinstance(end, End) and end.reason == ("length" if cut is None else "stop")


def test_text_comes_in_whole_characters(llama: Pico) -> None:
    model = routed(llama, "ridge")
    ids = [*model.tokenizer("é€🙂").input_ids, 250]  # and half of one
    asked = Asked(model, "q", {}, len(ids))
    pieces = []
    for token in ids:
        asked.job.advance(token)
        while not asked.events.empty():
            pieces.append(asked.events.get().text)
    assert pieces[:3] == ["é", "€", "🙂"]
    assert "".join(pieces) == model.tokenizer.decode(ids)


def scores(model: RoutedModel, ids: Sequence[int], mixture: Mapping[str, float]) -> Tensor:
    with given(model, mixture, None), torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0]
    return logits.log_softmax(-1)


def test_logprobs_are_those_of_a_plain_forward(llama: Pico) -> None:
    model = routed(llama, "ridge")
    greedy = Asked(model, TEXTS[0], {"math": 1.0}, logprobs=4)
    drawn = Asked(model, TEXTS[0], {"law": 1.0}, logprobs=0, sampling=Sampling(1.7, 0.9, seed=1))
    with working(Continuous(model, SMALL)) as worker:
        ask(worker, [greedy, drawn, *(Asked(model, text, mixture) for text, mixture in ASKED[:9])])
    for one, mixture in ((greedy, {"math": 1.0}), (drawn, {"law": 1.0})):
        logprobs_TV = scores(model, [*one.job.prompt, *one.job.made], mixture)[len(one.job.prompt) - 1 : -1]
        made = [token for token in one.job.made if token not in one.job.ends]
        assert [scored.token for scored in one.scored] == made
        for scored, row_V in zip(one.scored, logprobs_TV, strict=False):
            assert scored.logprob == pytest.approx(float(row_V[scored.token]), abs=1e-4)
            assert [value for _, value in scored.top] == pytest.approx(row_V.topk(len(scored.top)).values.tolist(), abs=1e-4)
    assert all(len(scored.top) == 4 for scored in greedy.scored) and not any(scored.top for scored in drawn.scored)


def test_generate_batch_is_not_disturbed(llama: Pico) -> None:
    """A worker that has stopped leaves a model that batches as before."""
    model = routed(llama, "oracle")
    with working(Continuous(model, SMALL)) as worker:
        ask(worker, [Asked(model, TEXTS[0], {"math": 1.0})])
    options = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=2, pad_token_id=0)
    with model.labelled(["math"]):
        made = model.generate_batch([model.tokenizer(TEXTS[0]).input_ids], options, ContinuousBatchingConfig(num_blocks=16))
    assert made["req_0"].generated_tokens == alone(model, TEXTS[0], {"math": 1.0}, 4)
