"""`recycle serve` as its clients meet it: a process, OpenAI's own client, many streams at once, bad input, and the end.

What a packed batch answers is tested in test_packed.py; here it goes over HTTP.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
import torch
from click.testing import CliRunner
from conftest import Pico
from test_conformance import routed
from test_packed import given

import recycler
from recycler.cli import main
from recycler.routed import RoutedModel
from recycler.serving.server import bind
from recycler.serving.service import Service, Settings
from recycler.zoo.errors import UsageError

NEW = 12
PROMPTS = ["Add 1 and b.", "Is 3 liable to a?", "O 3 of the long, long poem!", "def f1(x): return"]
MODELS = ["model", "math", "law", "code", "poem", "base"]


class Running(NamedTuple):
    """A server in a process of its own."""

    url: str
    process: subprocess.Popen[str]

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").removesuffix("/v1").rpartition(":")
        return host, int(port)

    def client(self, key: str = "any") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60)

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
        return self.send("GET", path, headers=headers)

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        try:
            connection.request(method, path, body, {} if headers is None else dict(headers))
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
        status, answer = self.send("POST", path, body, {"content-type": "application/json", **headers})
        return status, json.loads(answer)

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.get("/health")[1])
        return found

    def metric(self, line: str) -> float:
        """The value of a line of /metrics that begins so; 0 where there is none."""
        text = self.get("/metrics")[1].decode()
        return sum(float(one.rpartition(" ")[2]) for one in text.splitlines() if one.startswith(line))


def until(true: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.02)


@contextmanager
def serving(folder: Path, *options: str, **environment: str) -> Iterator[Running]:
    command = [sys.executable, "-m", "recycler.cli", "serve", str(folder), "--port", "0", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), process.stderr.read()
        yield Running(url, process)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def folder(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving") / "model"
    routed(llama, "ridge").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> RoutedModel:
    return recycler.load(folder)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with serving(folder) as running:
        yield running


def mixture(name: str) -> Mapping[str, float] | None:
    return None if name == "model" else {} if name == "base" else {name: 1.0}


def ids(model: RoutedModel, prompt: str, mixture: Mapping[str, float] | None, new: int = NEW) -> list[int]:
    inputs = model.tokenizer(prompt, return_tensors="pt")
    with given(model, mixture, None):
        made = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    return list(made[0, inputs["input_ids"].shape[1] :].tolist())


def text(model: RoutedModel, prompt: str, mixture: Mapping[str, float] | None, new: int = NEW) -> str:
    return str(model.tokenizer.decode(ids(model, prompt, mixture, new), skip_special_tokens=True))


GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": NEW}


# ---------------------------------------------------------------------------------------------------------------- answers


def test_models(server: Running) -> None:
    client = server.client()
    assert [one.id for one in client.models.list()] == ["model", "code", "law", "math", "poem", "base"]
    assert client.models.retrieve("math").id == "math"
    with pytest.raises(openai.NotFoundError, match="no model 'prose'"):
        client.models.retrieve("prose")


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_itself(server: Running, model: RoutedModel, name: str) -> None:
    for prompt in PROMPTS:
        made = server.client().completions.create(model=name, prompt=prompt, **GREEDY)
        expected = ids(model, prompt, mixture(name))
        assert made.choices[0].text == model.tokenizer.decode(expected, skip_special_tokens=True)
        assert made.choices[0].finish_reason == ("stop" if expected[-1] == 2 else "length")
        assert made.usage is not None
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(prompt), len(expected))
        share = made.usage.model_dump()["recycle"]
        if name == "model":
            whole = torch.tensor([[*model.tokenizer(prompt).input_ids, *expected[:-1]]])
            top = [one for one in model.weights_for({"input_ids": whole}).top(4)[0] if one[1] >= 1e-3]
            assert list(share) == [adapter for adapter, _ in top]
            assert list(share.values()) == pytest.approx([weight for _, weight in top], abs=1e-4)
        else:
            assert share == ({} if name == "base" else {name: 1.0})


def test_a_mixture_in_the_body(server: Running, model: RoutedModel) -> None:
    weights = {"math": 0.5, "poem": 0.25}
    made = server.client().completions.create(
        model="model", prompt=PROMPTS[0], extra_body={"recycle": {"mixture": weights}}, **GREEDY
    )
    assert made.choices[0].text == text(model, PROMPTS[0], weights)
    assert made.usage is not None and made.usage.model_dump()["recycle"] == weights


@pytest.mark.parametrize("name", ["model", "law"])
def test_chats(server: Running, model: RoutedModel, name: str) -> None:
    turns: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    prompt = model.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    client, expected = server.client(), text(model, prompt, mixture(name))
    whole = client.chat.completions.create(model=name, messages=turns, temperature=0, max_completion_tokens=NEW)
    assert whole.choices[0].message.content == expected and whole.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(
        model=name, messages=turns, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_is_what_the_whole_is(server: Running, model: RoutedModel) -> None:
    stream = list(
        server.client().completions.create(model="poem", prompt=PROMPTS[1], stream=True, **{**GREEDY, "max_tokens": 40})
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == text(model, PROMPTS[1], {"poem": 1.0}, 40)
    assert len(stream) > 3 and stream[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_stop(server: Running, model: RoutedModel, stream: bool) -> None:
    whole = text(model, PROMPTS[0], {"code": 1.0}, 40)
    stop = next(whole[n : n + 2] for n in range(6, len(whole)) if "�" not in whole[n : n + 2] and whole[n : n + 2].strip())
    asked: dict[str, Any] = {
        "model": "code",
        "prompt": PROMPTS[0],
        "stop": ["never there", stop],
        "temperature": 0,
        "max_tokens": 40,
    }
    made: Any = server.client().completions.create(**asked, stream=stream)
    choices = [chunk.choices[0] for chunk in made] if stream else [made.choices[0]]
    assert "".join(choice.text for choice in choices) == whole[: whole.find(stop)]
    assert choices[-1].finish_reason == "stop"
    if not stream:
        assert made.usage.completion_tokens < 40


def test_logprobs(server: Running, model: RoutedModel) -> None:
    made = server.client().completions.create(model="math", prompt=PROMPTS[0], logprobs=3, **GREEDY)
    answer = ids(model, PROMPTS[0], {"math": 1.0})
    prompt = model.tokenizer(PROMPTS[0]).input_ids
    with model.only("math"), torch.no_grad():
        logprobs_TV = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    own = [float(row_V[token]) for row_V, token in zip(logprobs_TV, answer, strict=True)]
    found = made.choices[0].logprobs
    assert found is not None and found.token_logprobs == pytest.approx(own, abs=1e-4)
    assert found.tokens == [model.tokenizer.decode([token]) for token in answer]
    assert found.text_offset is not None and found.text_offset[0] == 0
    turns: Any = [{"role": "user", "content": "hi"}]
    chat = server.client().chat.completions.create(model="math", messages=turns, logprobs=True, top_logprobs=2, **GREEDY)
    content = chat.choices[0].logprobs and chat.choices[0].logprobs.content
    assert content and all(one.logprob == one.top_logprobs[0].logprob > one.top_logprobs[1].logprob for one in content)
    assert all(bytes(one.bytes).decode() == one.token for one in content if one.bytes is not None)


def test_seeds(server: Running) -> None:
    client = server.client()

    def drawn(seed: int | None, **options: Any) -> list[str]:
        made = client.completions.create(model="model", prompt=PROMPTS[2], max_tokens=20, seed=seed, **options)
        return [choice.text for choice in made.choices]

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(-(2**63)) != drawn(None) != drawn(None)
    assert drawn(1, n=3) == drawn(1) + drawn(2) + drawn(3)
    assert drawn(1, top_p=1e-9) == drawn(2, temperature=0)


def test_several_prompts_and_tokens(server: Running, model: RoutedModel) -> None:
    client = server.client()
    made = client.completions.create(model="law", prompt=PROMPTS, **GREEDY)
    assert [choice.text for choice in made.choices] == [text(model, prompt, {"law": 1.0}) for prompt in PROMPTS]
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    tokens = [list(model.tokenizer(prompt).input_ids) for prompt in PROMPTS]
    assert client.completions.create(model="law", prompt=tokens, **GREEDY).choices == made.choices
    assert client.completions.create(model="law", prompt=tokens[1], **GREEDY).choices[0].text == made.choices[1].text
    assert made.usage is not None and made.usage.prompt_tokens == sum(map(len, tokens))


CLIENTS = """
import asyncio, json, sys
import openai

async def one(client, asked):
    parts = []
    async for chunk in await client.completions.create(**asked, stream=True):
        parts.append(chunk.choices[0].text)
    return "".join(parts)

async def all_of_them(url, rows):
    async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=120) as client:
        return await asyncio.gather(*(one(client, asked) for asked in rows))

print(json.dumps(asyncio.run(all_of_them(sys.argv[1], json.load(sys.stdin)))))
"""


def test_64_streams_from_another_process(server: Running, model: RoutedModel) -> None:
    """Mixed adapters, prompts and lengths: every answer is its own."""
    beginning = "They all begin alike, and go on for longer than a page of keys and values: "
    rows = []
    for n in range(64):
        name = [*MODELS, "mixed"][n % 7]
        prompt = (beginning if n % 3 == 0 else "") + PROMPTS[n % 4] + "x" * (n % 5)
        row = {"model": "model" if name == "mixed" else name, "prompt": prompt, "temperature": 0, "max_tokens": 5 + n % 13}
        rows.append({**row, "extra_body": {"recycle": {"mixture": {"math": 0.5, "law": 0.5}}}} if name == "mixed" else row)
    ran = subprocess.run(
        [sys.executable, "-c", CLIENTS, server.url], input=json.dumps(rows), capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stderr
    expected = []
    for row in rows:
        weights = {"math": 0.5, "law": 0.5} if "extra_body" in row else mixture(str(row["model"]))
        expected.append(text(model, str(row["prompt"]), weights, int(row["max_tokens"])))  # type: ignore[call-overload]
    assert len(set(expected)) > 50
    assert json.loads(ran.stdout) == expected
    assert server.health()["active"] == server.health()["queue"] == 0


# --------------------------------------------------------------------------------------------------------------- bad input

OKAY: dict[str, Any] = {"model": "math", "prompt": "q", "max_tokens": 2}


CHAT: dict[str, Any] = {"model": "math", "messages": [{"role": "user", "content": "q"}], "max_tokens": 2}
WRONG: list[Any] = [
    None, True, -1, 0, 1.5, 1e308, "", "x", "\ud800", [], [[]], [None], {}, {"a": {}}, [[-1]], [10**9], 10**30, ["q"] * 65,
]  # fmt: skip
GOOD: dict[str, list[Any]] = {  # what is not wrong of these
    "model": [None], "prompt": ["x"], "messages": [], "max_tokens": [None], "temperature": [None, 0, 1.5], "top_p": [None], "n": [None],
    "stop": [None, "x", []], "logprobs": [None, 0], "seed": [None, 0, -1], "stream": [None, True], "stream_options": [None],
    "recycle": [None, {}], "presence_penalty": [None, 0], "logit_bias": [None, "", [], {}], "tools": [None, "", [], {}], "unknown": [],
    "echo": [None], "best_of": [None],
}  # fmt: skip


def bad_bodies() -> list[tuple[str, bytes]]:
    bodies: list[bytes] = [
        b"", b"{", b"null", b"[]", b"3", b'"x"', b"\xff\xfe", b'{"prompt": "\xff"}', b"NaN", b"[" * 100_000, b'{"a":' * 50_000,
        b'{"prompt": "q", "temperature": NaN}', b'{"prompt": "q", "temperature": 1e999}', b'{"prompt": "q", "seed": 1' + b"0" * 5000 + b"}",
        b'{"prompt": "q", "max_tokens": 99999999999999999999}', b'{"prompt": "\\ud800"}', b'{"prompt": "q"} trailing',
        json.dumps({**OKAY, "prompt": "q" * 2000}).encode(), json.dumps({**OKAY, "max_tokens": 100_000}).encode(),
        json.dumps({**OKAY, "prompt": [259]}).encode(), json.dumps({**OKAY, "recycle": {"mixture": {"prose": 1}}}).encode(),
        json.dumps({**OKAY, "recycle": {"mixture": {"law": 1}}}).encode(), json.dumps({**OKAY, "n": 65}).encode(),
        json.dumps({**OKAY, "prompt": ["q"] * 33, "n": 2}).encode(), b'{"prompt": "' + b"q" * (1 << 21) + b'"}',
    ]  # fmt: skip
    made = [("/v1/completions", body) for body in bodies]
    rng = random.Random(0)
    while len(made) < 130:
        field, value, chat = rng.choice(list(GOOD)), rng.choice(WRONG), rng.random() < 0.3
        if value not in GOOD[field] and not (chat and field == "prompt"):
            path, body = ("/v1/chat/completions", CHAT) if chat else ("/v1/completions", OKAY)
            made.append((path, json.dumps({**body, field: value}).encode()))
    for turn in (
        {"role": "robot", "content": "q"},
        {"role": "user"},
        {"role": "user", "content": [{"type": "image_url"}]},
        [],
        "q",
    ):
        made.append(("/v1/chat/completions", json.dumps({**CHAT, "messages": [turn]}).encode()))
    return made


def test_bad_bodies_are_refused_and_the_server_lives(server: Running, model: RoutedModel) -> None:
    before = server.health()
    for path, body in bad_bodies():
        status, answer = server.post(path, body)
        assert 400 <= status < 500, (body[:200], answer)
        assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}, body[:200]
        assert 0 < len(answer["error"]["message"]) <= 400
    assert server.health() == before and server.process.poll() is None
    made = server.client().completions.create(model="math", prompt=PROMPTS[0], **GREEDY)
    assert made.choices[0].text == text(model, PROMPTS[0], {"math": 1.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "prose"}, "There is no model 'prose'"),
        ({"temperature": 3}, "temperature: .*less than or equal to 2"),
        ({"top_p": 0}, "top_p: "),
        ({"max_tokens": 2000}, "max_tokens is 2000, and this server's limit 1024"),
        ({"max_tokens": 1000}, "The context is 512 tokens; the prompt has 1, and max_tokens is 1000"),
        ({"prompt": ""}, "A prompt is empty"),
        ({"logit_bias": {"5": 1}}, "logit_bias: this is not served"),
        ({"temprature": 0}, "There is no field 'temprature' here"),
        ({"tools": [{"type": "function"}]}, "tools: .*not served"),
        ({"presence_penalty": 0.5}, "penalties are not served"),
        ({"echo": True}, "echo: .*not served"),
        ({"model": "model", "recycle": {"mixture": {"prose": 1}}}, "no adapter 'prose' here; one of: code, law, math, poem"),
        ({"recycle": {"mixture": {"math": 1}}}, "A mixture goes with the model model"),
        ({"stream_options": {"include_usage": True}}, "goes with stream"),
    ],
)
def test_what_is_wrong_is_said(server: Running, change: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.APIStatusError, match=message) as raised:
        server.client().post("/completions", cast_to=object, body={**OKAY, **change})
    assert raised.value.status_code == (404 if "model" in change and change["model"] == "prose" else 400)


def test_what_is_wrong_with_a_whole_body(server: Running) -> None:
    found, answer = server.post("/v1/completions", b"[]")
    assert found == 400 and answer["error"]["message"].startswith("the body: ")
    found, sent = server.send("POST", "/v1/completions", b"{}", {})
    assert found == 415 and b"Content-Type: application/json" in sent


def test_other_refusals(server: Running) -> None:
    body = json.dumps(OKAY).encode()
    cases = [
        (404, "GET", "/nowhere", None, {}), (405, "GET", "/v1/completions", None, {}),
        (415, "POST", "/v1/completions", body, {"content-type": "text/plain"}), (415, "POST", "/v1/completions", body, {}),
        (403, "GET", "/v1/models", None, {"host": "evil.example:80"}), (413, "POST", "/v1/completions", b"x" * (3 << 20), {}),
    ]  # fmt: skip
    for status, method, path, sent, headers in cases:
        found, answer = server.send(
            method, path, sent, headers or ({"content-type": "application/json"} if status == 413 else {})
        )
        assert (found, set(json.loads(answer)["error"])) == (status, {"message", "type", "param", "code"})
    chunked = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    with socket.create_connection(server.address, timeout=60) as connection:  # a size that is not said beforehand
        connection.sendall(chunked + b"".join(b"10000\r\n" + b"x" * 0x10000 + b"\r\n" for _ in range(40)) + b"0\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


# ------------------------------------------------------------------------------------------------- many, leaving, the end


def long(client: openai.OpenAI, **options: Any) -> Any:
    """A stream that goes on, begun."""
    stream = client.completions.create(model="poem", prompt=PROMPTS[0], max_tokens=490, temperature=0, stream=True, **options)
    return stream, next(iter(stream)).choices[0].text


def test_who_leaves_frees_the_slot(server: Running) -> None:
    gone = 'recycle_requests_total{endpoint="/v1/completions",status="499"}'
    before, made = server.metric(gone), server.metric("recycle_tokens_total")
    stream, _ = long(server.client())
    assert server.health()["active"] == 1 == server.metric("recycle_active ")
    stream.close()
    until(lambda: server.health()["active"] == 0)
    until(lambda: server.metric(gone) == before + 1)
    body = json.dumps({"model": "poem", "prompt": PROMPTS[0], "max_tokens": 490, "temperature": 0}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(server.address, timeout=60) as connection:  # no stream, and nobody waits
        connection.sendall(head.encode() + body)
        until(lambda: server.health()["active"] == 1)
    until(lambda: server.health()["active"] == 0)
    until(lambda: server.metric(gone) == before + 2)
    assert server.metric("recycle_tokens_total") == made  # no answer was finished


def test_metrics(server: Running) -> None:
    names = (
        "recycle_routed_tokens_total",
        "recycle_tokens_total",
        "recycle_request_seconds_count",
        "recycle_first_token_seconds_count",
    )
    okay = 'recycle_requests_total{endpoint="/v1/completions",status="200"}'
    before = [server.metric(name) for name in (*names, okay)]
    server.client().completions.create(model="law", prompt="q", max_tokens=3, temperature=0)
    made = [server.metric(name) for name in (*names, okay)]
    assert [b - a for a, b in zip(before, made, strict=True)] == [4, 4, 1, 1, 1]
    server.get("/secret/path")
    assert "secret" not in server.get("/metrics")[1].decode()


def test_too_many_and_a_key(folder: Path) -> None:
    with serving(folder, "--max-active", "2", "--max-queue", "1", RECYCLE_API_KEY="sesame") as server:
        client = server.client("sesame")
        for key in ("wrong", "sesam", "sesamé"):
            header = {"authorization": f"Bearer {key}".encode("latin-1").decode("latin-1")}
            assert server.get("/v1/models", header)[0] == 401
        assert server.get("/v1/models")[0] == 401 and server.get("/health")[0] == 200
        first, second = long(client), long(client)
        body = json.dumps({"model": "math", "prompt": "q", "max_tokens": 2, "temperature": 0}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nauthorization: Bearer sesame\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(server.address, timeout=60) as waiting:
            waiting.sendall(head.encode() + body)
            until(lambda: server.health()["queue"] == 1)
            with pytest.raises(openai.RateLimitError, match="As many requests wait as may") as raised:
                client.completions.create(model="math", prompt="q", max_tokens=2)
            assert int(raised.value.response.headers["retry-after"]) >= 1
            first[0].close()
            second[0].close()
            assert waiting.recv(1000).startswith(b"HTTP/1.1 200 ")  # it had its turn
        assert client.completions.create(model="math", prompt="q", max_tokens=2).usage is not None
        assert server.metric('recycle_requests_total{endpoint="/v1/completions",status="429"}') == 1


def test_sigterm_finishes_what_runs(folder: Path, model: RoutedModel) -> None:
    with serving(folder) as server:
        stream, begun = long(server.client())
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.health()["status"] == "draining")
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            server.client().completions.create(model="math", prompt="q")
        assert server.get("/health")[0] == 503
        rest = "".join(chunk.choices[0].text for chunk in stream)
        assert begun + rest == text(model, PROMPTS[0], {"poem": 1.0}, 490)
        assert server.process.wait(timeout=60) == 0
        assert server.process.stderr is not None and "drained" in server.process.stderr.read()


def test_the_load_script(folder: Path, llama: Pico) -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "serve_load.py"
    command = [
        sys.executable,
        str(script),
        str(folder),
        "--streams",
        "12",
        "--tokens",
        "6",
        "--prompts",
        *map(str, llama.tasks),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "12 streams, 6 models" in ran.stdout and "0 are wrong" in ran.stdout and "one by one" in ran.stdout


# ----------------------------------------------------------------------------------------------------------- command line


def test_a_port_that_is_taken(folder: Path) -> None:
    bound = bind("127.0.0.1", 0)
    bound.listen()
    with bound:
        ran = CliRunner().invoke(main, ["serve", str(folder), "--port", str(bound.getsockname()[1])])
    assert ran.exit_code == 2 and "cannot be listened on" in ran.stderr and "Choose another --port" in ran.stderr


@pytest.mark.parametrize(
    "options", [["--api-key", " "], ["--api-key", "schlüssel"], ["--port", "99999"], ["--max-active", "0"]]
)
def test_options_that_make_no_sense(folder: Path, options: list[str]) -> None:
    assert CliRunner().invoke(main, ["serve", str(folder), *options]).exit_code == 2


def test_without_its_packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recycler.commands.serve.find_spec", lambda name: None if name == "uvicorn" else name)
    ran = CliRunner().invoke(main, ["serve", str(folder)])
    assert ran.exit_code == 2 and "uvicorn is not installed" in ran.stderr and "pip install 'recycler[serve]'" in ran.stderr


def test_no_such_model(tmp_path: Path) -> None:
    ran = CliRunner().invoke(main, ["serve", str(tmp_path / "none"), "--port", "0"])
    assert ran.exit_code in (2, 3) and "none" in ran.stderr


def test_names_that_are_taken(model: RoutedModel) -> None:
    for name in ("math", "base"):
        with pytest.raises(UsageError, match="is two models"):
            Service(model, Settings(name=name))


def test_without_a_chat_template(folder: Path) -> None:
    from starlette.testclient import TestClient

    from recycler.serving.app import make_app

    bare = recycler.load(folder)
    bare.tokenizer.chat_template = None
    with TestClient(make_app(Service(bare)), base_url="http://localhost") as client:
        made = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
        assert made.status_code == 400 and made.json()["error"]["code"] == "no_chat_template"


def test_what_cannot_be_packed_is_served(llama: Pico) -> None:
    """X-LoRA: the same API, in batches that end together."""
    from starlette.testclient import TestClient

    from recycler.serving.app import make_app

    model = routed(llama, "xlora")
    expected = text(model, PROMPTS[0], None)
    with TestClient(make_app(Service(model)), base_url="http://localhost") as client:
        assert client.get("/health").json()["batching"] == "static"
        asked = {"prompt": PROMPTS[0], **GREEDY}
        assert client.post("/v1/completions", json=asked).json()["choices"][0]["text"] == expected
        lines = client.post("/v1/completions", json={**asked, "stream": True}).text.split("\n\n")
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
