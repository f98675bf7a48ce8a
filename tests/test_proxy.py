"""`recycle proxy` in front of a server that speaks vLLM's API and answers by PEFT with the exported adapters: end to end, answers are those
of the request-level routed model."""

from __future__ import annotations

import json
import shlex
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
import torch
import uvicorn
from click.testing import CliRunner
from conftest import Pico
from openai import OpenAI
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import recycler
from recycler.cli import main
from recycler.exporting.options import Option, nearest
from recycler.exporting.proxy import open_proxy, serve
from recycler.routed import RoutedModel
from recycler.run import answer_prompts
from recycler.zoo.errors import InputError, UsageError

PROMPTS = ["Add 1 and b.", "O 3 of the long, long poem!", "def f7(x): return x", "Is 14 liable to e?", "Add 9 and d.", "zzzz"]
TOKENS = 5


class Upstream:
    """A server of an export, started by the command line that it printed.

    Attributes:
        seen: (path, body, headers) of every request.
    """

    def __init__(self, serve: str) -> None:
        words = shlex.split(serve)
        assert words[:2] == ["vllm", "serve"] and "--enable-lora" in words
        self.base, modules = words[2], dict(word.split("=", 1) for word in words[words.index("--lora-modules") + 1 :])
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        model = AutoModelForCausalLM.from_pretrained(self.base)
        first, *rest = modules
        self.model = PeftModel.from_pretrained(model, modules[first], adapter_name=first)
        for name in rest:
            self.model.load_adapter(modules[name], name)
        self.model.eval()
        self.names, self.one, self.seen = set(modules), threading.Lock(), list[tuple[str, Any, Any]]()
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                upstream.seen.append((self.path, None, {key.lower(): value for key, value in self.headers.items()}))
                self.send(200, {"version": "1"}, {"x-served-by": "upstream"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                upstream.seen.append((self.path, body, {key.lower(): value for key, value in self.headers.items()}))
                if self.path not in ("/v1/completions", "/v1/chat/completions"):
                    return self.send(418, {"error": {"message": "a teapot"}}, {"retry-after": "7"})
                if body["model"] not in {upstream.base, *upstream.names}:
                    return self.send(404, {"error": {"message": f"no model {body['model']}"}})
                if body.get("max_tokens", 16) > 100:
                    return self.send(400, {"object": "error", "message": "max_tokens is too large", "code": 40303})
                chat = "chat" in self.path
                pieces = upstream.pieces(body, chat)
                if not body.get("stream"):
                    text = "".join(pieces)
                    choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
                    return self.send(
                        200,
                        {
                            "id": "1",
                            "model": body["model"],
                            "object": "o",
                            "created": 1,
                            "choices": [{"index": 0, "finish_reason": "stop", **choice}],
                        },
                    )
                self.send_response(200)
                self.send_header("content-type", "text/event-stream; charset=utf-8")
                self.end_headers()
                for piece in pieces:
                    choice = {"delta": {"content": piece}} if chat else {"text": piece}
                    chunk = {
                        "id": "1",
                        "model": body["model"],
                        "object": "o",
                        "created": 1,
                        "choices": [{"index": 0, "finish_reason": None, **choice}],
                    }
                    self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                    self.wfile.flush()
                self.wfile.write(b"data: [DONE]\n\n")

            def send(self, status: int, said: Any, headers: dict[str, str] | None = None) -> None:
                data = json.dumps(said).encode()
                self.send_response(status)
                for key, value in {
                    "content-type": "application/json",
                    "content-length": str(len(data)),
                    **(headers or {}),
                }.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @torch.no_grad()
    def pieces(self, body: dict[str, Any], chat: bool) -> list[str]:
        """The answer, token by token, by the adapter whose name the request has."""
        if chat:
            text = self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
            inputs = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        elif isinstance(body["prompt"], str):
            inputs = self.tokenizer(body["prompt"], return_tensors="pt")
        else:
            inputs = {"input_ids": torch.tensor([body["prompt"]])}
        with self.one:
            options = {"max_new_tokens": body.get("max_tokens", 16), "do_sample": False}
            if body["model"] == self.base:
                with self.model.disable_adapter():
                    ids = self.model.generate(**inputs, **options)
            else:
                self.model.set_adapter(body["model"])
                ids = self.model.generate(**inputs, **options)
        new = ids[0, inputs["input_ids"].shape[1] :]
        pieces, said = [], ""
        for i in range(len(new)):
            text = self.tokenizer.decode(new[: i + 1], skip_special_tokens=True)
            held = text.endswith("\ufffd") and i < len(new) - 1  # half a character
            pieces.append("" if held else text[len(said) :])
            said = said if held else text
        return pieces


class World(NamedTuple):
    """A routed model, its export, the server that serves it, and the proxy's address."""

    model: RoutedModel
    folder: Path
    facts: dict[str, Any]
    upstream: Upstream
    url: str

    def option(self, prompt: str) -> Option:
        """What a prompt is given at the level of requests, found without the proxy."""
        options = [Option(one["name"], one["weights"], one["model"]) for one in self.facts["options"]]
        share = self.model.weights_for(self.model.tokenizer(prompt, return_tensors="pt")).share()[0]
        return nearest(share, self.model.names, options)[0]

    def expected(self, prompt: str) -> str:
        with self.model.mixture(self.option(prompt).weights):
            return answer_prompts(self.model, [prompt], max_new_tokens=TOKENS)[0]

    def post(self, path: str = "completions", **body: Any) -> requests.Response:
        return requests.post(f"{self.url}/v1/{path}", json=body, timeout=60)


def running(app: Any) -> tuple[uvicorn.Server, str, threading.Thread]:
    held = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [held]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    return server, f"http://127.0.0.1:{held.getsockname()[1]}", thread


@pytest.fixture(scope="module")
def exported(llama: Pico, tmp_path_factory: pytest.TempPathFactory) -> tuple[RoutedModel, Path, dict[str, Any]]:
    """Ridge, which decides token by token; poem is DoRA, and becomes a plain adapter."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    zoo = recycler.Zoo(llama.zoo)
    names, shots = tuple(sorted(llama.adapters)), recycler.Shots.from_files(*llama.tasks).sample(6)
    profile = recycler.Profile(names, shots, torch.ones(5, 4, 6), assigned={name: (name,) for name in names})
    model = recycler.compose(zoo, recycler.build_router("ridge", profile, zoo=zoo))
    return model, folder, dict(recycler.export(model, "vllm", folder, prompts=PROMPTS).facts)


@pytest.fixture(scope="module")
def world(exported: tuple[RoutedModel, Path, dict[str, Any]]) -> Iterator[World]:
    model, folder, facts = exported
    upstream = Upstream(facts["serve"])
    server, url, thread = running(open_proxy(folder, upstream.url))
    yield World(model, folder, facts, upstream, url)
    server.should_exit = True
    thread.join()
    upstream.server.shutdown()


def test_answers_are_those_of_the_request_level_model(world: World) -> None:
    chosen = {}
    for prompt in PROMPTS:
        answer = world.post(prompt=prompt, max_tokens=TOKENS)
        assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == world.expected(prompt)
        chosen[prompt] = answer.headers["x-recycle-adapter"]
        assert chosen[prompt] == world.option(prompt).name
    assert len(set(chosen.values())) > 1
    counts = {name: list(chosen.values()).count(name) for name in chosen.values()}
    assert world.facts["chosen"] == counts
    single = {answer_prompts(world.model, [PROMPTS[0]], max_new_tokens=TOKENS, only=name)[0] for name in world.model.names}
    assert len(single) > 1  # it matters who answers


def test_openais_client_chats_and_streams(world: World) -> None:
    client = OpenAI(base_url=f"{world.url}/v1", api_key="secret")
    turns: Any = [{"role": "user", "content": "Add 1 and b."}]
    whole = client.chat.completions.create(model="routed", messages=turns, max_tokens=TOKENS)
    assert world.upstream.seen[-1][1]["messages"] == turns and world.upstream.seen[-1][2]["authorization"] == "Bearer secret"
    pieces = [
        chunk.choices[0].delta.content
        for chunk in client.chat.completions.create(model="routed", messages=turns, max_tokens=TOKENS, stream=True)
    ]
    assert len(pieces) == TOKENS and "".join(filter(None, pieces)) == whole.choices[0].message.content
    assert whole.model in {one["name"] for one in world.facts["options"]}
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Add 1 and b."}]}]
    assert world.post("chat/completions", messages=parts, max_tokens=101).headers["x-recycle-adapter"] == whole.model
    assert {model.id for model in client.models.list()} == {"routed", "base", *world.model.names}


def test_a_stream_comes_as_it_is(world: World) -> None:
    body = {"prompt": "Add 1 and b.", "max_tokens": TOKENS, "stream": True}
    through = requests.post(f"{world.url}/v1/completions", json=body, timeout=60)
    direct = requests.post(
        f"{world.upstream.url}/v1/completions", json={**body, "model": through.headers["x-recycle-adapter"]}, timeout=60
    )
    assert through.content == direct.content and through.content.endswith(b"data: [DONE]\n\n")
    assert through.headers["content-type"] == direct.headers["content-type"]


def test_who_is_named_answers(world: World) -> None:
    for name in ("poem", "base"):
        answer = world.post(model=name, prompt=PROMPTS[0], max_tokens=TOKENS)
        assert answer.headers["x-recycle-adapter"] == name
        assert (
            answer.json()["choices"][0]["text"]
            == answer_prompts(world.model, [PROMPTS[0]], max_new_tokens=TOKENS, only=name)[0]
        )
    assert world.upstream.seen[-1][1]["model"] == world.upstream.base
    missing = world.post(model="prose", prompt="a")
    assert (
        missing.status_code == 404
        and "prose" in missing.json()["error"]["message"]
        and "poem" in missing.json()["error"]["message"]
    )


def test_token_ids_and_several_prompts(world: World) -> None:
    ids = world.model.tokenizer(PROMPTS[0]).input_ids
    assert world.post(prompt=ids, max_tokens=TOKENS).json()["choices"][0]["text"] == world.expected(PROMPTS[0])
    other = next(prompt for prompt in PROMPTS if world.option(prompt) != world.option(PROMPTS[0]))
    refused = world.post(prompt=[PROMPTS[0], other])
    assert refused.status_code == 400 and "want different adapters" in refused.json()["error"]["message"]


def test_responses_are_routed(world: World) -> None:
    """What /v1/responses is given is read as the same turns are in a chat; the server answers it, or says that it cannot."""
    prompt, system = next(p for p in PROMPTS if world.option(p).name != "base"), "Be brief."
    turns = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    world.post("chat/completions", messages=turns, max_tokens=1)
    expected = world.upstream.seen[-1][1]["model"]
    call = {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"}
    for given in (prompt, [{"role": "user", "content": [{"type": "input_text", "text": prompt}]}, call]):
        answer = world.post("responses", model="routed", input=given, instructions=system)
        path, body, _ = world.upstream.seen[-1]
        assert path == "/v1/responses" and body == {"model": expected, "input": given, "instructions": system}
        assert answer.status_code == 418 and answer.headers["x-recycle-adapter"]  # this one does not know them


def test_errors_and_other_paths_are_passed_on(world: World) -> None:
    too_large = world.post(prompt="a", max_tokens=101)
    assert too_large.status_code == 400 and too_large.json() == {
        "object": "error",
        "message": "max_tokens is too large",
        "code": 40303,
    }
    teapot = world.post("embeddings", input="a", model="anything")
    assert teapot.status_code == 418 and teapot.headers["retry-after"] == "7" and "x-recycle-adapter" not in teapot.headers
    assert world.upstream.seen[-1][1] == {"input": "a", "model": "anything"}
    version = requests.get(f"{world.url}/version?full=1", timeout=60)
    assert (
        version.json() == {"version": "1"}
        and version.headers["x-served-by"] == "upstream"
        and world.upstream.seen[-1][0] == "/version?full=1"
    )


@pytest.mark.parametrize(
    "path, data",
    [
        ("completions", b"{"), ("completions", b"[]"), ("completions", b"{}"), ("completions", b'{"prompt": ""}'),
        ("completions", b'{"prompt": [99999]}'), ("completions", b'{"prompt": [-1]}'), ("completions", b'{"prompt": [true]}'),
        ("completions", b'{"prompt": ["a", 3]}'), ("completions", b"\xff"), ("chat/completions", b'{"messages": []}'),
        ("chat/completions", b'{"messages": [3]}'), ("chat/completions", b'{"messages": [{"role": "user", "content": 3}]}'),
        ("chat/completions", b'{"messages": [{"content": "a"}]}'), ("chat/completions", b'{"messages": "a"}'),
        ("responses", b'{"input": ""}'), ("responses", b'{"input": []}'), ("responses", b'{"input": {"a": 1}}'),
    ],
)  # fmt: skip
def test_what_is_no_request(world: World, path: str, data: bytes) -> None:
    before = len(world.upstream.seen)
    answer = requests.post(f"{world.url}/v1/{path}", data=data, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
    assert len(world.upstream.seen) == before


def raw(url: str, head: str) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as link:
        link.sendall(f"{head}\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: link.recv(4096), b""))


def test_a_path_cannot_name_another_server(world: World) -> None:
    for target in ("@127.0.0.1:9/x", "//127.0.0.1:9/x", "http://127.0.0.1:9/x", "/../../x"):
        before = len(world.upstream.seen)
        status = int(raw(world.url, f"GET {target} HTTP/1.1").split()[1])
        assert (status == 200 and len(world.upstream.seen) == before + 1) or 400 <= status < 502, target


def test_a_server_that_is_not_there(exported: tuple[RoutedModel, Path, dict[str, Any]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        nobody = f"http://127.0.0.1:{held.getsockname()[1]}"
    server, url, thread = running(open_proxy(exported[1], nobody))
    answer = requests.post(f"{url}/v1/completions", json={"prompt": "a"}, timeout=60)
    assert answer.status_code == 502 and "does not answer" in answer.json()["error"]["message"]
    server.should_exit = True
    thread.join()


def test_mixtures_are_adapters_of_their_own(llama: Pico, tmp_path: Path) -> None:
    """A merge that is static, for LoRAX, where adapters are called by their folders."""
    zoo = recycler.Zoo(llama.zoo)
    model = recycler.compose(zoo, recycler.build_router("uniform", zoo=zoo))
    recycler.export(model, "lorax", tmp_path / "out", prompts=["a"])
    app = open_proxy(tmp_path / "out", "http://127.0.0.1:9", adapters_at="/data/adapters")
    server, url, thread = running(app)
    assert requests.post(f"{url}/v1/completions", json={"prompt": "a"}, timeout=60).status_code == 502  # it is asked for mix-1
    assert {one["id"] for one in requests.get(f"{url}/v1/models", timeout=60).json()["data"]} == {
        "routed",
        "base",
        "mix-1",
        *model.names,
    }
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize("upstream", ["localhost:8000", "ftp://a", "http://", "http://a:0", "http://["])
def test_what_is_no_address(exported: tuple[RoutedModel, Path, dict[str, Any]], upstream: str) -> None:
    with pytest.raises(UsageError, match="--upstream"):
        open_proxy(exported[1], upstream)


def test_what_is_no_export(exported: tuple[RoutedModel, Path, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not an export"):
        open_proxy(tmp_path)
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read"):
        open_proxy(tmp_path)
    (tmp_path / "export.json").write_text('{"schema_version": 99, "files": [], "kind": "vllm"}')
    with pytest.raises(InputError, match="newer version"):
        open_proxy(tmp_path)
    (tmp_path / "export.json").write_text('{"schema_version": 1, "files": [], "kind": "peft"}')
    with pytest.raises(InputError, match="an export to peft"):
        open_proxy(tmp_path)
    (tmp_path / "export.json").write_text('{"schema_version": 1, "files": [], "kind": "vllm", "upstream": "http://a"}')
    with pytest.raises(InputError, match=r"server\.json cannot be read"):
        open_proxy(tmp_path)
    with pytest.raises(UsageError, match="for LoRAX"):
        open_proxy(exported[1], adapters_at="/data")


def test_the_command(world: World, tmp_path: Path) -> None:
    """It says where it listens, and what is wrong."""
    said: list[str] = []
    app = open_proxy(world.folder, world.upstream.url)
    threading.Thread(target=serve, args=(app, "127.0.0.1", 0, said.append), daemon=True).start()
    while not said:
        time.sleep(0.01)
    url = said[0].split()[2].removesuffix(",")
    answer = requests.post(f"{url}/completions", json={"prompt": PROMPTS[0], "max_tokens": TOKENS}, timeout=60)
    assert answer.json()["choices"][0]["text"] == world.expected(PROMPTS[0])
    assert len(said) == 1
    threading.Thread(
        target=serve, args=(open_proxy(world.folder, "http://127.0.0.1:1"), "127.0.0.1", 0, said.append), daemon=True
    ).start()
    while len(said) < 3:
        time.sleep(0.01)
    assert said[1].startswith("warning: nothing listens at http://127.0.0.1:1")
    taken = CliRunner().invoke(main, ["proxy", str(world.folder), "--port", url.split(":")[2].removesuffix("/v1")])
    assert taken.exit_code == 2 and "Nothing can listen" in taken.stderr and "--port" in taken.stderr
    assert CliRunner().invoke(main, ["proxy", str(tmp_path)]).exit_code == 3
