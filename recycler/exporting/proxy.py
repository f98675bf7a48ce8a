"""An OpenAI-compatible router in front of a vLLM or LoRAX server: it reads the prompt, chooses what the request is given, and passes on
everything else as it is.

A request for the model ``routed`` (or for none) has its "model" exchanged for the name of the option that the router would choose
(`recycler.exporting.options`). A request that names an option gets that. Streams, errors and unknown paths come through
byte for byte; the header ``x-recycle-adapter`` says who was asked.

The prompt is read by the routed model itself, so that its base is loaded here as well: on a CPU, or beside the server. Routers that decide
once a sequence read what they need; those that decide token by token need one forward of the prompt.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recycler import text
from recycler.exporting import folders, mixtures, servers
from recycler.exporting.options import BASE, Option, nearest
from recycler.shots import Shot
from recycler.zoo.errors import InputError, RecycleError, UsageError, choices

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from recycler.routed import RoutedModel

ROUTED = "routed"
_TEXTS = ("text", "input_text", "output_text")


class Refused(Exception):
    """A request that is not passed on: a status, and what OpenAI's clients show."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind


class Chooser:
    """The routed model of an export, and the options of its server.

    Args:
        model: it is asked from one thread at a time. options: as server.json lists them; names are those of the server.
    """

    def __init__(self, model: RoutedModel, options: list[Option]) -> None:
        self.model, self.options = model, options
        self._one = threading.Lock()

    def choose(self, body: Mapping[str, Any]) -> Option:
        """Who answers a request.

        Raises:
            Refused: it names a model that there is not, holds no prompt, or prompts that want different adapters.
        """
        named = body.get("model")
        if named not in (None, "", ROUTED):
            found = [one for one in self.options if named in (one.name, one.model)]
            if not found:
                there = choices([ROUTED, *(one.name for one in self.options)])
                raise Refused(404, f"The model {str(named)[:200]!r} does not exist; choose {there}.", "not_found_error")
            return found[0]
        with self._one:
            try:
                wanted = {one.name: one for one in (self._of(ids) for ids in self._prompts(body))}
            except RecycleError as error:
                raise Refused(400, str(error)) from error
        if len(wanted) > 1:
            raise Refused(400, f"These prompts want different adapters ({', '.join(wanted)}); send them one by one.")
        return next(iter(wanted.values()))

    def warm(self) -> None:
        """Routes something, so that what the router needs (a sentence encoder) is there, or missed, before a request comes."""
        self._of(text.prompt_ids(self.model.source, Shot("Hello.", "")))

    def _of(self, ids: list[int]) -> Option:
        ids_BT = torch.tensor([ids], device=self.model.source.device)
        share_E = mixtures.share(self.model, {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)})
        return nearest(share_E, self.model.names, self.options)[0]

    def _prompts(self, body: Mapping[str, Any]) -> list[list[int]]:
        """Token ids of each prompt of a request, as the server will have them."""
        source = self.model.source
        if "input" in body and not {"messages", "prompt"} & set(body):  # of /v1/responses
            body = {"messages": _as_messages(body["input"], body.get("instructions"))}
        if "messages" in body:
            return [text.prompt_ids(source, Shot("", "", _turns(body["messages"])))]
        given: Any = body.get("prompt")
        several: list[Any] = given if isinstance(given, list) and given and not _are_ids(given) else [given]
        found = []
        for one in several:
            if isinstance(one, str) and one:
                found.append(text.prompt_ids(source, Shot(one, "")))
            elif _are_ids(one) and max(one) < len(source.tokenizer) and min(one) >= 0:
                found.append(one)
            else:
                raise Refused(400, "A request needs a prompt: text, token ids, or messages.")
        return found


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _as_messages(given: Any, instructions: Any) -> list[Any]:
    """What /v1/responses is given, as messages: a text or turns, and instructions before them; calls of tools are no turns."""
    turns = (
        [{"role": "user", "content": given}] if given and isinstance(given, str) else given if isinstance(given, list) else []
    )
    spoken = [one for one in turns if not (isinstance(one, dict) and one.get("type", "message") != "message")]
    return [{"role": "system", "content": instructions}, *spoken] if instructions else spoken


def _turns(messages: Any) -> tuple[tuple[str, str], ...]:
    """(role, content) of each; of content in parts, the text."""
    turns = []
    for one in messages if isinstance(messages, list) else []:
        content = one.get("content") if isinstance(one, dict) else None
        if isinstance(content, list):
            parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") in _TEXTS]
            content = "".join(part for part in parts if isinstance(part, str))
        content = "" if content is None and isinstance(one, dict) else content  # a turn that calls a tool
        if not isinstance(content, str) or not isinstance(one.get("role"), str):
            raise Refused(400, "Each message needs a role and a content of text.")
        turns.append((one["role"], content))
    if not turns:
        raise Refused(400, "messages hold no prompt.")
    return tuple(turns)


def open_proxy(
    folder: str | Path,
    upstream: str | None = None,
    *,
    adapters_at: str | None = None,
    base: str | None = None,
    **loading: Any,
) -> Starlette:
    """The proxy of an export for vLLM or LoRAX.

    Args:
        folder: what ``recycle export --to vllm`` made. upstream: the server; by default where the export's command line puts it.
        adapters_at: where a LoRAX server sees the folder ``adapters``.
        base, loading: as `recycler.load` takes them.

    Raises:
        InputError: the folder is no such export. UsageError: fastapi is missing, or the upstream is no address.
    """
    folder = Path(folder)
    said = folders.read(folder)
    if said["kind"] not in servers.MOST:
        raise InputError(
            f"{folder} is an export to {said['kind']}.",
            "A proxy stands in front of vLLM or LoRAX.",
            "recycle export MODEL --to vllm --out DIR",
            code="E_MODEL",
        )
    if adapters_at is not None and said["kind"] != "lorax":
        raise UsageError("--adapters-at is for LoRAX.", "vLLM is told names, not places.", "Leave it out.")
    options = _options(folder, said["kind"], adapters_at)
    address = _address(upstream or said["upstream"])
    _require_extra()
    from recycler.exporting.proxy_app import create_app
    from recycler.loading import load

    chooser = Chooser(load(folder / "model", base=base, **loading), options)
    chooser.warm()
    app = create_app(chooser, address)
    app.state.upstream = address
    return app


def _options(folder: Path, kind: str, adapters_at: str | None) -> list[Option]:
    try:
        listed = json.loads((folder / servers.SERVER).read_text(encoding="utf8"))["options"]
        options = [Option(str(one["name"]), dict(one["weights"]), str(one["model"])) for one in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / servers.SERVER} cannot be read ({error}).", "", "Export the model again.", code="E_MODEL"
        ) from None
    if kind == "lorax":  # it calls adapters by their folders
        at = Path(adapters_at) if adapters_at is not None else folder.absolute() / "adapters"
        options = [one if one.name == BASE else Option(one.name, one.weights, str(at / one.name)) for one in options]
    return options


def _address(url: str) -> str:
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise UsageError(
            f"--upstream {url!r}.", "It is no address of a server.", "Write http://127.0.0.1:8000", code="E_OPTION"
        )
    return url.rstrip("/")


def _require_extra() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "A proxy needs starlette and uvicorn.", "", "pip install 'recycler[serve]'", code="E_MISSING_EXTRA"
        ) from error


def _answers(url: str) -> bool:
    """Whether anything listens there."""
    import socket
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=2).close()
    except OSError:
        return False
    return True


def serve(app: Starlette, host: str, port: int, say: Callable[[str], None]) -> None:
    """Runs the app until it is interrupted."""
    import socket

    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        held = socket.create_server((host, port), family=family)
    except OSError as error:
        what = f"Nothing can listen at {host}:{port} ({error.strerror or error})."
        raise UsageError(what, "", "Give another --port; 0 takes any that is free.", code="E_OPTION") from error
    with held:
        if not _answers(app.state.upstream):
            say(f"warning: nothing listens at {app.state.upstream} yet; until it does, requests get 502")
        say(f"listening at http://{host if ':' not in host else f'[{host}]'}:{held.getsockname()[1]}/v1, model {ROUTED!r}")
        with suppress(KeyboardInterrupt):  # the way to end it
            uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[held])
