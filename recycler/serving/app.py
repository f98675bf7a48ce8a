"""The HTTP side of `recycle serve`: OpenAI's endpoints over a `Service`.

POST /v1/completions, /v1/chat/completions (whole, or streamed as server-sent events); GET /v1/models, /health, /metrics.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from recycler.serving import answers, errors, schema
from recycler.serving.door import LEFT, Door
from recycler.serving.errors import ApiError
from recycler.serving.jobs import End, Event, Failure, Job, Piece
from recycler.serving.service import Service


def make_app(service: Service) -> FastAPI:
    """The app; the service starts and stops with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await asyncio.get_running_loop().run_in_executor(None, service.stop)

    app = FastAPI(
        title="recycle serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    errors.install(app)
    app.add_middleware(Door, service=service)
    began = int(time.time())

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        found = service.health()
        return JSONResponse(found, 200 if found["status"] == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse(answers.models(service.models, began))

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        if name not in service.models:
            raise ApiError(404, f"There is no model {name[:100]!r} here.", param="model", code="model_not_found")
        return JSONResponse(answers.model(name, began))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = schema.CompletionRequest.model_validate_json(await request.body())
        return await _answer(service, request, body, answers.Completions(_spell(service), body.top))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = schema.ChatRequest.model_validate_json(await request.body())
        return await _answer(service, request, body, answers.Chats(_spell(service), body.top))

    return app


def _spell(service: Service) -> answers.Spell:
    return lambda token: str(service.spelling.decode([token]))


class Exchange:
    """One request's jobs at work, and their events in the order in which they came.

    Raises:
        ApiError: the jobs are refused.
    """

    def __init__(self, service: Service, body: Any, form: Any) -> None:
        self.service, self.body, self.form = service, body, form
        self.began = time.perf_counter()
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.jobs: list[Job] = []
        self.name = service.settings.name if body.model is None else body.model

    async def submit(self) -> None:
        service, loop = self.service, asyncio.get_running_loop()

        def emit(number: int, event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(self.events.put_nowait, (number, event))

        mixture = service.mixture(self.body)
        prompts = await loop.run_in_executor(service.pool, service.prompts, self.body)
        self.jobs = service.jobs(self.body, prompts, mixture, emit)
        service.submit(self.jobs)

    async def each(self) -> AsyncIterator[tuple[int, Piece | End]]:
        """Pieces and ends until the last one.

        Raises:
            ApiError: a job failed.
        """
        left, first = len(self.jobs), True
        while left:
            number, event = await self.events.get()
            if isinstance(event, Failure):
                raise errors.of(event.error)
            if first:
                first = False
                self.service.metrics.first.observe(time.perf_counter() - self.began)
            if isinstance(event, End):
                left -= 1
            yield number, event
        for job in self.jobs:
            self.service.metrics.answered(len(job.prompt), len(job.made), job.share)
        self.service.metrics.seconds.labels(self.service.kind(self.name)).observe(time.perf_counter() - self.began)

    @property
    def usage(self) -> dict[str, Any]:
        return answers.usage(self.jobs, self.body.n or 1)

    def cancel(self) -> None:
        self.service.worker.cancel(self.jobs)


async def _answer(service: Service, request: Request, body: Any, form: Any) -> Response:
    exchange = Exchange(service, body, form)
    await exchange.submit()
    return await (_streamed if body.stream else _whole)(exchange, request)


async def _whole(exchange: Exchange, request: Request) -> Response:
    form, choices = exchange.form, [answers.Choice(job) for job in exchange.jobs]

    async def collect() -> None:
        async for number, event in exchange.each():
            if isinstance(event, Piece):
                choices[number].add(event)
            else:
                choices[number].reason = event.reason

    try:
        if not await _unless_left(request, collect()):
            return Response(status_code=499)  # nobody reads it
    finally:
        exchange.cancel()
    made = [form.full(number, choice) for number, choice in enumerate(choices)]
    return JSONResponse({**answers.envelope(form, exchange.name, streamed=False), "choices": made, "usage": exchange.usage})


async def _streamed(exchange: Exchange, request: Request) -> Response:
    """The first event is waited for, so that what fails before it has a status of its own."""
    events = exchange.each()
    first: list[tuple[int, Piece | End]] = []

    async def begin() -> None:
        first.append(await anext(events))

    try:
        if not await _unless_left(request, begin()):
            exchange.cancel()
            return Response(status_code=499)
    except BaseException:
        exchange.cancel()
        raise
    return Stream(exchange, events, first)


class Stream(Response):
    """Server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange, events: AsyncIterator[tuple[int, Piece | End]], first: list[Any]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.exchange, self.events, self.first = exchange, events, first

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def write(data: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        async def run() -> None:
            try:
                async for chunk in self._chunks():
                    await write(json.dumps(chunk, ensure_ascii=False, separators=(",", ":")))
            except ApiError as error:
                await write(json.dumps(error.body()))
            await write("[DONE]")
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await _unless_left(Request(scope, receive), run())
        finally:
            self.exchange.cancel()

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        exchange, form = self.exchange, self.exchange.form
        envelope = answers.envelope(form, exchange.name, streamed=True)
        options = exchange.body.stream_options
        counted = options is not None and options.include_usage
        if counted:
            envelope["usage"] = None
        for number in range(len(exchange.jobs)):
            opening = form.opening(number)
            if opening is not None:
                yield {**envelope, "choices": [opening]}
        async for number, event in _after(self.first, self.events):
            choice = form.delta(number, event) if isinstance(event, Piece) else form.closing(number, event.reason)
            yield {**envelope, "choices": [choice]}
        if counted:
            yield {**envelope, "choices": [], "usage": exchange.usage}


async def _after(first: list[Any], rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    for one in first:
        yield one
    async for one in rest:
        yield one


async def _unless_left(request: Request, work: Any) -> bool:
    """Waits for work; ends it, and is False, where the client leaves before."""

    async def leaving() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, left = asyncio.ensure_future(work), asyncio.ensure_future(leaving())
    try:
        await asyncio.wait({working, left}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        request.scope[LEFT] = True
        return False
    finally:
        for task in (working, left):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task
