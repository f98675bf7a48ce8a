"""The proxy as an application: what it reads, what it exchanges, and how all else is passed on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from recycler.exporting.proxy import ROUTED, Chooser, Refused

try:  # the Hub's client brings one of the two
    import httpx2 as httpx
except ImportError:
    import httpx  # type: ignore[import-not-found, no-redef]

HEADER = "x-recycle-adapter"
_LARGEST = 32 * 2**20  # bytes of a body
_READ = ("v1/completions", "v1/chat/completions", "v1/responses")
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]
_HOP = {
    "connection",
    "keep-alive",
    "transfer-encoding",
    "te",
    "trailer",
    "upgrade",
    "proxy-authorization",
    "proxy-authenticate",
}
_PATIENCE = httpx.Timeout(600.0, connect=10.0)  # seconds without a byte from the server


def create_app(chooser: Chooser, upstream: str) -> Starlette:
    """The application.

    Args:
        upstream: the server's address, without a slash at its end.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # Nothing of the environment: a proxy that is meant for the web has no business between two servers.
        headers = {"accept-encoding": "identity"}
        async with httpx.AsyncClient(timeout=_PATIENCE, trust_env=False, headers=headers) as app.state.client:
            yield

    async def models(request: Request) -> Response:
        names = [ROUTED, *(one.name for one in chooser.options)]
        listed = [{"id": name, "object": "model", "owned_by": "recycler"} for name in names]
        return JSONResponse({"object": "list", "data": listed})

    async def any_path(request: Request) -> Response:
        body = await _body(request)
        if request.method != "POST" or request.path_params["path"] not in _READ:
            return await _passed_on(request, upstream, body, {})
        try:
            said = json.loads(body)
            if not isinstance(said, dict):
                raise ValueError
        except ValueError:
            raise Refused(400, "The body is no JSON object.") from None
        option = await run_in_threadpool(chooser.choose, said)
        return await _passed_on(request, upstream, json.dumps({**said, "model": option.model}).encode(), {HEADER: option.name})

    def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        said = {"message": str(error), "type": error.kind, "param": None, "code": None}
        return JSONResponse({"error": said}, error.status)

    routes = [Route("/v1/models", models), Route("/{path:path}", any_path, methods=_METHODS)]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={Refused: refused})


async def _passed_on(request: Request, upstream: str, body: bytes, extra: Mapping[str, str]) -> Response:
    """The same request to the server, and its answer as it comes."""
    client = request.app.state.client
    path = request.scope["raw_path"].decode("latin-1")
    if not path.startswith("/"):  # it would become part of the server's name
        raise Refused(400, "A path begins with a slash.")
    url = f"{upstream}{path}" + (f"?{request.url.query}" if request.url.query else "")
    headers = [(k, v) for k, v in request.headers.items() if k not in _HOP | {"host", "content-length"}]
    try:
        sent = await client.send(client.build_request(request.method, url, headers=headers, content=body), stream=True)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        what = f"The server at {upstream} does not answer ({type(error).__name__})."
        raise Refused(504 if isinstance(error, httpx.TimeoutException) else 502, what, "server_error") from error
    answer = StreamingResponse(_bytes(sent), sent.status_code)
    kept = [(k.lower(), v) for k, v in sent.headers.raw if k.decode("latin-1").lower() not in _HOP]
    answer.raw_headers = kept + [(k.encode(), v.encode()) for k, v in extra.items()]
    return answer


async def _bytes(sent: Any) -> AsyncIterator[bytes]:
    try:
        async for piece in sent.aiter_raw():
            yield piece
    finally:
        await sent.aclose()


async def _body(request: Request) -> bytes:
    """Raises Refused where it is larger than a prompt can be."""
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > _LARGEST:
            raise Refused(413, f"The body is larger than {_LARGEST // 2**20} MB.")
        pieces.append(piece)
    return b"".join(pieces)
