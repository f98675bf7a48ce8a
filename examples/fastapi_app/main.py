"""A FastAPI application around a composed model.

    cd examples/fastapi_app && MODEL=../../.demo/tour-model uvicorn main:app

It has a folder `routers/` of its own, as many applications do: recycler's is `recycler.routers`, so that the two never meet. For an
OpenAI-compatible server there is `recycle serve`; this is for an application that has other things to do too.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

import recycler
from routers import answers, health  # noqa: TID251  (this application's)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """The model is loaded once, before the first request, and let go with the application."""
    app.state.model = recycler.load(os.environ["MODEL"])
    app.state.turn = threading.Lock()  # a model answers one batch at a time
    yield
    del app.state.model


app = FastAPI(title="answers", lifespan=lifespan)
app.include_router(answers.router)
app.include_router(health.router)
