"""`recycle serve` where clients are odd, slow or gone, and where the model fails: in this process, so that it can be made to fail."""

from __future__ import annotations

import http.client
import json
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import CliRunner
from conftest import Pico
from prometheus_client.parser import text_string_to_metric_families
from test_conformance import routed
from test_packed import working
from test_serving import CHAT, GREEDY, OKAY, PROMPTS, Running, long, serving, text, until

import recycler
from recycler.chatting import Chat, unseen
from recycler.cli import main
from recycler.routed import RoutedModel
from recycler.serving import wire
from recycler.serving.answers import usage
from recycler.serving.jobs import Job, Piece, Sampling
from recycler.serving.server import Server, bind, url
from recycler.serving.service import Service, Settings
from recycler.serving.static import Static
from recycler.serving.worker import Continuous, Limits

SHAPE = {"message", "type", "param", "code"}
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


class Here(Running):
    """A server in a thread of this process: its `process` is nobody's."""


@contextmanager
def serving_here(service: Service) -> Iterator[Here]:
    bound = bind("127.0.0.1", 0)
    bound.listen()
    server = Server(service)
    thread = threading.Thread(target=lambda: server.run(sockets=[bound]))
    thread.start()
    try:
        until(lambda: server.started)
        yield Here(f"{url(bound)}/v1", None)  # type: ignore[arg-type]
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def folder(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edges") / "model"
    routed(llama, "ridge").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> RoutedModel:
    return recycler.load(folder)


@pytest.fixture(scope="module")
def service(folder: Path) -> Service:
    return Service(recycler.load(folder), Settings(name="model", body_seconds=1.0))


@pytest.fixture(scope="module")
def server(service: Service) -> Iterator[Here]:
    with serving_here(service) as here:
        yield here


def said(answer: bytes) -> dict[str, Any]:
    """The error in a raw answer, whose shape is OpenAI's."""
    found: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert set(found) == {"error"} and set(found["error"]) == SHAPE
    return found["error"]


def everything(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    got = b""
    while part := connection.recv(1 << 16):
        got += part
    return got


# --------------------------------------------------------------------------------------------------- what clients do send


def test_a_message_goes_back_as_it_came(server: Here, model: RoutedModel) -> None:
    """OpenAI's own idiom: the answer's message is the next request's, with a null in every field that it has no value for."""
    client, messages = server.client(), [{"role": "user", "content": "hi"}]
    first = client.chat.completions.create(model="math", messages=messages, temperature=0, max_tokens=5)  # type: ignore[arg-type]
    again: Any = [*messages, first.choices[0].message, {"role": "user", "content": "more"}]
    second = client.chat.completions.create(model="math", messages=again, temperature=0, max_tokens=5)
    whole = [*messages, first.choices[0].message.model_dump(), {"role": "user", "content": "more"}]
    third = client.chat.completions.create(model="math", messages=whole, temperature=0, max_tokens=5)  # type: ignore[arg-type]
    prompt = model.tokenizer.apply_chat_template(
        [{"role": turn["role"], "content": turn["content"]} for turn in whole], tokenize=False, add_generation_prompt=True
    )
    answer = text(model, prompt, {"math": 1.0}, 5)
    assert [made.choices[0].message.content for made in (second, third)] == [answer, answer]


def test_what_holds_anyway_may_be_said(server: Here) -> None:
    """Libraries send defaults and nulls; they change nothing."""
    expected = server.post("/v1/completions", json.dumps({**OKAY, "temperature": 0}).encode())[1]["choices"]
    harmless: dict[str, Any] = {
        "top_p": 1.0, "n": 1, "best_of": 1, "echo": False, "suffix": None, "logit_bias": {}, "frequency_penalty": 0.0, "presence_penalty": 0,
        "user": "u", "seed": None, "stop": None, "stream": False, "stream_options": None, "logprobs": None,
    }  # fmt: skip
    status, made = server.post("/v1/completions", json.dumps({**OKAY, "temperature": 0, **harmless}).encode())
    assert status == 200 and made["choices"] == expected
    chatty = {
        "response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "modalities": ["text"],
        "audio": None, "prediction": None, "reasoning_effort": None, "verbosity": None, "web_search_options": None, "store": False,
        "metadata": {"a": "b"}, "service_tier": "auto", "prompt_cache_retention": "24h", "logprobs": False, "top_logprobs": None,
        "max_completion_tokens": 2, "max_tokens": None,
    }  # fmt: skip
    assert server.post("/v1/chat/completions", json.dumps({**CHAT, **chatty}).encode())[0] == 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modalities": ["text", "audio"]}, "modalities: this is not served"),
        ({"reasoning_effort": "low"}, "reasoning_effort: this is not served"),
        ({"response_format": {"type": "json_object"}}, "response_format.type: Input should be 'text'"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0.content: give a text, or parts"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content: give a text, or parts"),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
            "messages.0.tool_calls: this is not",
        ),
        ({"stop": [""]}, "stop: give a text of 1 to 200 characters"),
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
    ],
)
def test_what_is_not_served_is_said(server: Here, change: dict[str, Any], message: str) -> None:
    status, answer = server.post("/v1/chat/completions", json.dumps({**CHAT, **change}).encode())
    assert status == 400 and answer["error"]["message"].startswith(message)
    assert answer["error"]["param"] == next(iter(change))


def test_a_prompt_that_is_none(server: Here) -> None:
    for wrong in (None, [], 5, [["x"]], [1, "x"]):
        status, answer = server.post("/v1/completions", json.dumps({**OKAY, "prompt": wrong}).encode())
        assert status == 400 and answer["error"]["param"] == "prompt" and "str" not in answer["error"]["message"]


def test_only_the_last_chunk_counts(server: Here) -> None:
    asked: Any = {**GREEDY, "model": "law", "prompt": "q", "stream": True}
    chunks = list(server.client().completions.create(**asked, stream_options={"include_usage": True}))
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0
    assert not any("usage" in chunk.model_fields_set for chunk in server.client().completions.create(**asked))


# ----------------------------------------------------------------------------------------------------------- plain turns


def test_chats_as_plain_turns(folder: Path, model: RoutedModel) -> None:
    """What `recycle chat --plain` answers, whole and streamed."""
    chat = Chat(model, max_new_tokens=9, system="Be brief.", template=False)
    first = chat.ask(PROMPTS[0]).text
    second = chat.ask(PROMPTS[1]).text
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": PROMPTS[0]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": [{"type": "text", "text": PROMPTS[1]}]},
    ]
    with serving_here(Service(recycler.load(folder), Settings(name="model", plain=True))) as server:
        client = server.client()
        made = client.chat.completions.create(model="model", messages=messages, temperature=0, max_tokens=9)
        content = made.choices[0].message.content
        assert content is not None and content.strip() == second and content[:1].strip() == content[:1]
        stream = client.chat.completions.create(model="model", messages=messages, temperature=0, max_tokens=9, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == content
        assert server.health()["chats"] == "plain"
        for wrong in (messages[:3], messages[2:], [messages[0]]):
            with pytest.raises(openai.BadRequestError, match="no plain turns"):
                client.chat.completions.create(model="model", messages=wrong)


def test_a_plain_answer_ends_where_the_next_question_would_begin(model: RoutedModel) -> None:
    said = [" 502\n\nInstruction: And", "\n\nno\nInstruction: And", " Instruction: x", "  "]
    for spoken, expected in zip(said, ["502", "no", "Instruction: x", ""], strict=True):
        events: list[Any] = []
        ids = list(model.tokenizer(spoken).input_ids)
        job = Job(
            ids, model.tokenizer, frozenset(), events.append, len(ids), stop=("\n\nInstruction:", "\nInstruction:"), strip=True
        )
        for token in ids:
            if job.advance(token):
                break
        assert "".join(event.text for event in events) == expected


def test_a_form_that_nobody_was_measured_in_is_said(folder: Path, model: RoutedModel) -> None:
    """The shots were prompts, and the base has a chat template."""
    assert "--plain" in unseen(model)
    ran = CliRunner().invoke(main, ["chat", str(folder)], input="")
    assert "warning: the shots were plain prompts" in ran.stderr and "--plain" in ran.stderr
    assert "warning" not in CliRunner().invoke(main, ["chat", str(folder), "--plain"], input="").stderr
    for options, warned in ([], True), (["--plain"], False):
        with serving(folder, *options) as server:
            server.process.send_signal(signal.SIGTERM)
            assert ("warning: the shots were plain" in server.process.communicate()[1]) == warned
    bare = recycler.load(folder)
    bare.tokenizer.chat_template = None
    assert unseen(bare) == ""  # chats are plain, or refused
    assert bare.router is not None
    bare.tokenizer.chat_template, bare.router.facts["profile"]["chats"] = "{{ messages }}", True
    assert unseen(bare) == ""


# ------------------------------------------------------------------------------------------------------------- the wire


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\x16\x03\x01 hello\r\n\r\n",  # TLS, for one
        b"GET /health HTTP/1.1\r\n\r\n",
        HEAD + b"content-length: -5\r\n\r\n",
        HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http(server: Here, sent: bytes) -> None:
    with socket.create_connection(server.address, timeout=60) as connection:
        connection.sendall(sent)
        got = everything(connection)
    assert got.startswith(b"HTTP/1.1 400 ") and said(got)["code"] == "no_http"
    assert server.get("/health")[0] == 200


def test_a_length_that_nobody_would_read(server: Here) -> None:
    """Answered before anything of it comes."""
    for length in (10**9, 2**63 - 1):
        with socket.create_connection(server.address, timeout=60) as connection:
            connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % length)
            got = everything(connection)
        assert got.startswith(b"HTTP/1.1 413 ") and said(got)["code"] == "too_large"


def test_a_body_that_does_not_come(server: Here) -> None:
    with socket.create_connection(server.address, timeout=60) as connection:
        connection.sendall(HEAD + b'content-length: 500\r\n\r\n{"prompt"')
        got = everything(connection)
    assert got.startswith(b"HTTP/1.1 408 ") and said(got)["code"] == "too_slow"


def test_a_head_that_does_not_come(server: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even byte by byte; and a hundred of them do not keep anybody else out."""
    monkeypatch.setattr(wire, "HEAD_SECONDS", 1.0)
    slow = [socket.create_connection(server.address, timeout=60) for _ in range(100)]
    try:
        assert server.get("/health")[0] == 200
        ends = time.monotonic() + 30
        with pytest.raises(OSError):  # a pipe that is broken, or a connection that was reset
            while time.monotonic() < ends:
                slow[0].sendall(b"x")
                time.sleep(0.1)
        assert all(everything(connection) == b"" for connection in slow[1:])
    finally:
        for connection in slow:
            connection.close()


def test_who_leaves_in_the_middle_of_a_body(server: Here, caplog: pytest.LogCaptureFixture) -> None:
    gone = 'recycle_requests_total{endpoint="/v1/completions",status="499"}'
    before = server.metric(gone)
    with caplog.at_level(logging.WARNING), socket.create_connection(server.address, timeout=60) as connection:
        connection.sendall(HEAD + b'content-length: 500\r\n\r\n{"prompt"')
        connection.close()
        until(lambda: server.metric(gone) == before + 1)
    assert not caplog.records  # no traceback, that anybody could fill a disk with


def test_a_connection_outlives_errors(server: Here) -> None:
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    sent: list[tuple[str, str, bytes | None, int]] = [
        ("POST", "/v1/completions", b"{", 400), ("GET", "/nowhere", None, 404), ("PUT", "/v1/completions", b"{}", 405),
        ("POST", "/v1/completions/", json.dumps(OKAY).encode(), 404), ("POST", "/v1/completions", b"x" * (2 << 20), 413),
        ("POST", "/v1/completions", json.dumps(OKAY).encode(), 200), ("HEAD", "/health", None, 200),
    ]  # fmt: skip
    connection.connect()
    one = connection.sock
    for method, path, body, status in sent:
        connection.request(method, path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        assert response.status == status, (method, path, answer)
        if status >= 400:
            assert set(json.loads(answer)["error"]) == SHAPE
        if status == 405:
            assert json.loads(answer)["error"]["message"] == "Here it is POST."
    assert connection.sock is one
    connection.close()


# ------------------------------------------------------------------------------------------------ failures, and the end


def test_an_error_in_the_model_is_a_500_of_those_it_hit(server: Here, service: Service, model: RoutedModel) -> None:
    client, asked = server.client(), {"model": "math", "prompt": PROMPTS[0], **GREEDY}
    broken = service.model.base.lm_head.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(openai.InternalServerError, match="could not be computed") as raised:
        client.completions.create(**asked)
    assert raised.value.status_code == 500 and set(raised.value.body) == SHAPE  # type: ignore[call-overload]
    assert "ZeroDivision" not in str(raised.value)
    with pytest.raises(openai.InternalServerError):  # a stream that has not begun has a status too
        client.completions.create(**asked, stream=True)
    broken.remove()
    stream, _ = long(client)
    broken = service.model.base.lm_head.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(openai.APIError, match="could not be computed"):
        list(stream)
    broken.remove()
    made = client.completions.create(**asked)
    assert made.choices[0].text == text(model, PROMPTS[0], {"math": 1.0}) and server.health()["active"] == 0


def test_memory_that_runs_out_and_bookkeeping_that_fails(
    server: Here, service: Service, model: RoutedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the step, in it and after it: whoever was there is told, and the next one is answered."""
    import torch

    processor = service.worker.processor  # type: ignore[attr-defined]

    def fail(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    for holder, name in (
        (processor.scheduler, "schedule_batch"),
        (processor.inputs_and_outputs, "get_model_kwargs"),
        (processor.inputs_and_outputs, "prepare_batch_update"),
    ):
        with monkeypatch.context() as broken:
            broken.setattr(holder, name, fail)
            status, answer = server.post("/v1/completions", json.dumps(OKAY).encode())
        assert (status, answer["error"]["type"]) == (500, "server_error"), name
        made = server.client().completions.create(model="math", prompt=PROMPTS[0], **GREEDY)
        assert made.choices[0].text == text(model, PROMPTS[0], {"math": 1.0})
    assert server.health()["status"] == "ok" and server.health()["active"] == 0


def test_a_thread_that_ends_is_said(folder: Path) -> None:
    """Those that waited are told too, and the process lives to say so."""
    service = Service(recycler.load(folder), Settings(limits=Limits(active=1)))

    def end(*args: Any, **options: Any) -> bool:
        raise MemoryError

    with serving_here(service) as server:
        stream, _ = long(server.client())
        waiting: list[tuple[int, Any]] = []
        asking = threading.Thread(target=lambda: waiting.append(server.post("/v1/completions", json.dumps(OKAY).encode())))
        asking.start()
        until(lambda: server.health()["queue"] == 1)
        service.worker.manager._generation_loop_body = end  # type: ignore[attr-defined]
        with pytest.raises(openai.APIError):
            list(stream)
        asking.join(60)
        waiting.append(server.post("/v1/completions", json.dumps(OKAY).encode()))
        assert [(status, answer["error"]["code"]) for status, answer in waiting] == [(503, "failed")] * 2
        assert server.health()["status"] == "failed" and server.get("/health")[0] == 503


def test_a_second_signal_cuts_short_what_runs(folder: Path) -> None:
    for sent in (signal.SIGTERM, signal.SIGINT):
        with serving(folder, "--max-active", "2") as server:
            stream, _ = long(server.client())
            waiting = http.client.HTTPConnection(*server.address, timeout=60)
            body = {"model": "poem", "prompt": PROMPTS[0], "max_tokens": 490, "temperature": 0, "n": 3}
            waiting.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            until(lambda: server.health()["queue"] > 0)
            server.process.send_signal(sent)
            until(lambda: server.health()["status"] == "draining")
            server.process.send_signal(sent)
            response = waiting.getresponse()
            assert response.status == 503 and json.loads(response.read())["error"]["code"] == "stopped"
            with pytest.raises(openai.APIError, match="The server was stopped"):
                list(stream)
            assert server.process.wait(timeout=60) == 6
            assert server.process.stderr is not None
            log = server.process.stderr.read()
            assert "4 answers cut short" in log and "Traceback" not in log


def test_whoever_listens_to_others_is_warned(folder: Path) -> None:
    for options, warned in ([], True), (["--api-key", "sesame"], False):
        ran = CliRunner().invoke(main, ["serve", str(folder / "none"), "--host", "0.0.0.0", "--port", "0", *options])
        assert ("0.0.0.0 can be reached from elsewhere" in ran.stderr) == warned


# ------------------------------------------------------------------------------------------------------ shares and turns


def job(mixture: Mapping[str, float] | None, share: Mapping[str, float] | None = None) -> Job:
    return Job([1], None, frozenset(), lambda event: None, 1, mixture, Sampling(0.0), made=[1], share=share or {})


def test_shares_sum_to_what_there_is() -> None:
    """However many there are: of a thousand equal ones none is below notice."""
    many = usage([job(None, {f"a{n}": 1 / 3000 for n in range(3000)})])["recycle"]
    assert sum(many.values()) == pytest.approx(1, abs=3e-3) and len(many) < 3000  # each is rounded
    few = usage([job(None, {"a": 0.9995, "b": 0.0005}), job(None, {"a": 0.9995, "b": 0.0005})])["recycle"]
    assert few == {"a": 0.9995}
    assert usage([job({"a": -0.5}, {"a": -0.5})])["recycle"] == {"a": -0.5} and usage([job({}, {})])["recycle"] == {}


def test_a_flood_leaves_room_for_others(llama: Pico) -> None:
    """Of those that wait, next is the first one of whose model the fewest run."""
    worker = Static(routed(llama, "ridge"), Limits(active=4, queue=100))
    flood, other, mine = [job({"math": 1.0}) for _ in range(20)], job({"law": 1.0}), [job(None), job(None)]
    worker.submit([*flood, other, *mine])
    assert worker.taken(4) == [flood[0], other, mine[0], flood[1]]
    assert worker.taken(2) == [mine[1], flood[2]] and list(worker.waiting) == flood[3:]
    for one in flood[:3]:
        worker.running.pop(one.name)
    assert worker.taken(1, lambda one: one.mixture is None) == [] and worker.taken(100) == flood[3:]


def test_a_long_prompt_and_short_ones_take_turns(llama: Pico) -> None:
    """A short one does not wait until a long one is read, nor that one until no short ones come."""
    model = routed(llama, "ridge")
    ended: list[int] = []
    texts = ["long " * 90, *(f"a question, and another one: {n}" for n in range(50))]
    jobs = []
    for number, said in enumerate(texts):
        done = threading.Event()

        def emit(event: Any, number: int = number, done: threading.Event = done) -> None:
            if not isinstance(event, Piece):
                ended.append(number)
                done.set()

        ids = list(model.tokenizer(said).input_ids)
        jobs.append((Job(ids, model.tokenizer, frozenset(), emit, 2, {"math": 1.0}, Sampling(0.0)), done))
    with working(Continuous(model, Limits(active=64, queue=64, cache_tokens=8192, batch_tokens=64))) as worker:
        worker.submit([job for job, _ in jobs])
        assert all(done.wait(60) for _, done in jobs)
    assert 3 < ended.index(0) < 40, ended  # 8 steps of 64 tokens; the others take half a step each


def test_metrics_are_named_as_prometheus_has_it(server: Here, service: Service) -> None:
    families = list(text_string_to_metric_families(server.get("/metrics")[1].decode()))
    own = [family for family in families if family.name.startswith("recycle_")]
    assert len(own) >= 7 and all(family.documentation for family in own)
    for family in own:
        if family.type == "counter":
            assert {sample.name for sample in family.samples} <= {f"{family.name}_total"}
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
        for sample in family.samples:
            assert set(sample.labels) <= {"endpoint", "status", "kind", "adapter", "le"}
            assert sample.labels.get("adapter", service.names[0]) in service.names
    assert "process_resident_memory_bytes" in {family.name for family in families}
