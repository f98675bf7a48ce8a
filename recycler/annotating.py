"""Asking a language model about texts: a local one from transformers, or an endpoint that speaks OpenAI's chat completions.

Answers are kept under the zoo (``cache/annotations/``), one file each, named by the hash of model, prompt and settings: nothing is
asked twice, and a router that is built again is the same. What is asked, and what of an answer is used, says
`recycler.routers.instructions`; this file hands text over and takes text back.

A model or a router from elsewhere may name an endpoint. Where the prompts go is decided here, by the person who runs it: an endpoint
that was not named by them is refused, unless it is on this machine.
"""

from __future__ import annotations

import ipaddress
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from recycler.zoo.errors import HubError, SecurityError, UsageError
from recycler.zoo.hub_errors import is_busy, is_passing, is_refused, pause
from recycler.zoo.store import Zoo
from recycler.zoo.untrusted import printable

ENDPOINT = "RECYCLE_LLM"
"""The environment variable that names an endpoint one agrees to send prompts to."""
KEY = "OPENAI_API_KEY"
MAX_TOKENS = 64
_TRIES, _TIMEOUT_S, _WHOLE_S, _THREADS = 4, 60.0, 300.0, 8
_MAX_BYTES = 1 << 20  # of an answer
_BATCH = 8

_allowed: dict[str, Path] = {}  # llm → the zoo where its answers are kept


class _Backend(Protocol):
    identity: str

    def answers(self, prompts: Sequence[str], temperature: float, seed: int) -> Iterator[tuple[int, str]]:
        """(number of the prompt, answer), as they come."""
        ...


class Annotator:
    """One language model, and what it was asked before.

    Args:
        llm: a model's folder or its id on the Hub, or ``https://host/v1#model``.
        folder: where answers are kept; by default in the zoo.
        key: for an endpoint; by default what OPENAI_API_KEY holds, if anything. It is neither stored nor shown.

    Raises:
        UsageError: a malformed endpoint. SecurityError: one that nobody here has named.
    """

    def __init__(self, llm: str, folder: Path | None = None, *, key: str | None = None) -> None:
        self.llm = llm
        self.folder = folder or _allowed.get(llm, Zoo().path) / "cache" / "annotations"
        self.backend: _Backend = _Endpoint(llm, key) if is_endpoint(llm) else _Local(llm)

    def ask(self, prompts: Sequence[str], *, temperature: float = 0.0, seed: int = 0) -> list[str]:
        """Answers, in the order of `prompts`; at most `MAX_TOKENS` long.

        Args:
            temperature: 0 for the likeliest answer. seed: draws another one where the temperature is above 0.

        Raises:
            HubError: the model cannot be had, or the endpoint does not answer. What was answered before that is kept.
        """
        files = {prompt: self._file(prompt, temperature, seed) for prompt in dict.fromkeys(prompts)}
        known = {prompt: text for prompt, file in files.items() if (text := _read(file)) is not None}
        todo = [prompt for prompt in files if prompt not in known]
        if todo:
            for number, text in self.backend.answers(todo, temperature, seed):
                known[todo[number]] = text
                _write(files[todo[number]], text)
        return [known[prompt] for prompt in prompts]

    def _file(self, prompt: str, temperature: float, seed: int) -> Path:
        settings = [self.backend.identity, prompt, temperature, seed if temperature else 0, MAX_TOKENS]
        key = sha256(json.dumps(settings).encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.json"


def ask(prompts: Sequence[str], llm: str, *, temperature: float = 0.0, seed: int = 0) -> list[str]:
    """`Annotator.ask` of a model that is loaded once per process."""
    return Annotator(llm).ask(prompts, temperature=temperature, seed=seed)


def allow(llm: str | None, zoo: Path) -> None:
    """Takes note that the user named this model, for `zoo`: it may be sent prompts, and its answers are kept there."""
    if llm is not None:
        _allowed[llm] = zoo


def is_endpoint(llm: str) -> bool:
    return llm.lower().startswith(("http://", "https://"))


# ----------------------------------------------------------------------------------------------------------------- endpoints


class _Endpoint:
    """A server that speaks OpenAI's chat completions."""

    def __init__(self, llm: str, key: str | None) -> None:
        parts = urlsplit(llm)
        if not parts.fragment or not parts.hostname or parts.query or parts.username or parts.password:
            raise UsageError(
                f"{printable(llm)} does not name an endpoint and a model.",
                "What is written here is kept with the router, so a key has no place in it.",
                f"Write https://HOST/v1#MODEL, and put the key into {KEY}.",
            )
        if not (_is_here(parts.hostname) or llm in _allowed or os.environ.get(ENDPOINT) == llm):
            raise SecurityError(
                f"This router wants to send the prompts to {printable(llm)}.",
                "Routers come from elsewhere, too, and nobody here has agreed to that.",
                f"To agree, set {ENDPOINT}={printable(llm)}",
                code="E_CONSENT",
            )
        self.identity, self.model = llm, parts.fragment
        self.url = llm.partition("#")[0].rstrip("/") + "/chat/completions"
        self.where = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
        self.key = key if key is not None else os.environ.get(KEY)

    def answers(self, prompts: Sequence[str], temperature: float, seed: int) -> Iterator[tuple[int, str]]:
        # The Hub's client brings a transport library that changed its name; its client's class is that of the session.
        from huggingface_hub.utils import get_session

        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        with type(get_session())(headers=headers, timeout=_TIMEOUT_S, follow_redirects=False) as client:
            pool = ThreadPoolExecutor(_THREADS)
            try:
                jobs = [pool.submit(self._patiently, client, prompt, temperature, seed) for prompt in prompts]
                for number, job in enumerate(jobs):
                    yield number, job.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _patiently(self, client: Any, prompt: str, temperature: float, seed: int) -> str:
        for attempt in range(_TRIES):
            try:
                return self._once(client, prompt, temperature, seed)
            except HubError:
                raise
            except Exception as error:
                last = attempt == _TRIES - 1 or (is_refused(error) and attempt > 0)
                if last or not is_passing(error):
                    explained = self._explain(error)
                    if explained is None:
                        raise
                    raise explained from error
                time.sleep(pause(error, attempt))
        raise AssertionError("unreachable")

    def _once(self, client: Any, prompt: str, temperature: float, seed: int) -> str:
        asked = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": temperature,
            "seed": seed,
            "max_tokens": MAX_TOKENS,
        }
        began, body = time.monotonic(), b""
        with client.stream("POST", self.url, json=asked) as response:
            for piece in response.iter_bytes():
                body += piece
                if len(body) > _MAX_BYTES or time.monotonic() - began > _WHOLE_S:
                    raise self._error("sends an answer without end", "It is too long, or too slow.")
            said = printable(body.decode("utf8", "replace").strip(), 200)
            if not response.is_success:
                if not is_busy(_Refusal(response)):
                    raise self._refused(response.status_code, said)
                response.raise_for_status()
        try:
            text = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise self._error("answers, but not with a chat completion", f"It said: {said}.")
        return text.encode("utf8", "replace").decode("utf8")

    def _refused(self, status: int, said: str) -> HubError:
        why = f"It answered {status}: {said}." if said else f"It answered {status}."
        if status in (401, 403):
            return self._error("refuses access", why, f"Put a valid key into {KEY}.")
        if status in (400, 404, 422):
            return self._error(f"cannot be asked for {printable(self.model)}", why, "Check the address and the model's name.")
        return self._error("does not do what it is asked", why)

    def _explain(self, error: Exception) -> HubError | None:
        answer = getattr(error, "response", None)
        if answer is not None:
            fix = "Wait, and run it again; what was answered is kept."
            return self._error("is busy, or broken", f"It answered {answer.status_code} {_TRIES} times.", fix)
        if is_passing(error) or type(error).__module__.partition(".")[0].startswith(("httpx", "httpcore")):
            why = f"{type(error).__name__}: {printable(error)}."
            return self._error("cannot be reached", why, "Is the server running? Check the address, then run it again.")
        return None

    def _error(self, what: str, why: str, fix: str = "Check the address: it must speak OpenAI's chat completions.") -> HubError:
        return HubError(f"The language model at {printable(self.where)} {what}.", why, fix, code="E_UNREACHABLE")


class _Refusal(Exception):
    """An answer that is no success, in the form in which errors carry one."""

    def __init__(self, response: Any) -> None:
        self.response = response


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# --------------------------------------------------------------------------------------------------------------- local models


class _Local:
    """A model that transformers loads. It is loaded when something is asked that it was not asked before."""

    def __init__(self, name: str) -> None:
        self.name = name
        # A folder is known by what lies in it; an id stands for itself.
        files = sorted(Path(name).iterdir()) if Path(name).is_dir() else []
        facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.suffix in (".json", ".safetensors")]
        self.identity = f"{name} {facts}" if facts else name

    def answers(self, prompts: Sequence[str], temperature: float, seed: int) -> Iterator[tuple[int, str]]:
        import torch

        from recycler import text
        from recycler.sampling import Draws
        from recycler.shots import Shot

        base = _loaded(self.name)
        chat = bool(base.tokenizer.chat_template)
        plain = [_plain(prompt, base.tokenizer.get_added_vocab()) for prompt in prompts]
        shots = [Shot("", "", (("user", p),)) if chat else Shot(p, "") for p in plain]
        limits: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": MAX_TOKENS}
        limits |= {"eos_token_id": base.ends, "pad_token_id": base.tokenizer.pad_token_id}
        for numbers in text.by_length([len(text.prompt_ids(base, shot)) for shot in shots], rows=_BATCH):
            inputs = text.prompts(base, [[shots[i]] for i in numbers])
            if temperature:  # each by a seed of its own, so that company does not matter
                seeds = [_seed(prompts[i], seed) for i in numbers]
                limits["logits_processor"] = [Draws(seeds, temperature)]
            with torch.no_grad():
                ids_BT = base.model.generate(**inputs, **limits)
            start = 0 if base.encoder_decoder else inputs["input_ids"].shape[1]
            for i, ids in zip(numbers, ids_BT[:, start:], strict=True):
                yield i, base.tokenizer.decode(ids, skip_special_tokens=True)


def _plain(prompt: str, special: Iterable[str]) -> str:
    """A prompt in which what a tokenizer takes for the end of a turn, and the like, is written apart: texts are data."""
    for token in sorted(special, key=len, reverse=True):
        if len(token.strip()) > 1:
            prompt = prompt.replace(token, f"{token.strip()[0]} {token.strip()[1:]}")
    return prompt


def _seed(prompt: str, seed: int) -> int:
    return int.from_bytes(sha256(f"{seed} {prompt}".encode()).digest()[:7], "big")


@cache
def _loaded(name: str) -> Any:
    from recycler.base import load_base

    return load_base(name)


# --------------------------------------------------------------------------------------------------------------------- cache


def _read(file: Path) -> str | None:
    """The answer in a file; None where there is none, or none that can be read."""
    try:
        text = json.loads(file.read_text(encoding="utf8"))["answer"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return text if isinstance(text, str) else None


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf8") as stream:
        json.dump({"answer": text}, stream)
    os.replace(temporary, file)
