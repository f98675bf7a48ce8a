"""The process: a socket, uvicorn, and an end that loses nothing.

SIGTERM, or Ctrl-C, drains: what is new gets 503, what runs is finished, then the process exits with 0. A second one cuts short what
runs, which is told so.
"""

from __future__ import annotations

import errno
import socket
from types import FrameType
from typing import Any

import uvicorn

from recycler.serving.app import make_app
from recycler.serving.errors import ApiError
from recycler.serving.service import Service
from recycler.serving.wire import Wire
from recycler.zoo.errors import PartialError, RecycleError, UsageError, counted

LAST_BYTES = 5  # seconds that clients have to read what is ready


def bind(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 is any that is free.

    Raises:
        UsageError: the port is taken, or the host is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise UsageError(
            f"{host}:{port} cannot be listened on.", f"{error.strerror or error}.", "Choose another --port." if taken else ""
        ) from error
    return bound


def url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, that drains."""

    def __init__(self, service: Service, *, log_level: str = "warning") -> None:
        config = uvicorn.Config(
            make_app(service),
            http=Wire,
            log_level=log_level,
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)
        self.service = service
        self.cut = 0  # answers that were not finished
        self._signals = 0
        self._idle = 0  # ticks

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Nothing that takes a lock: whom this interrupts may hold it.
        self._signals += 1
        self.service.draining = True
        if self._signals > 2:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        ends = await super().on_tick(counter)
        worker = self.service.worker
        if self._signals > 1 and not worker.idle:
            self.cut += worker.fail_all(ApiError(503, "The server was stopped.", code="stopped"))
        elif not worker.alive and not worker.idle:  # whom nobody will answer
            worker.fail_all(self.service.dead())
        if not (self.service.draining and worker.idle):
            return ends
        self._idle += 1
        # Requests are tasks until their last byte is out; a client that does not read is not waited for.
        drained = not self.server_state.tasks or self._idle > 10 * LAST_BYTES
        return ends or drained


def serve(service: Service, bound: socket.socket) -> None:
    """Serves on a socket that listens, until told to stop.

    Raises:
        RecycleError: the model's thread ended by itself. PartialError: answers were cut short.
    """
    server: Any = Server(service)
    server.run(sockets=[bound])
    if server.cut:
        raise PartialError(
            f"{counted(server.cut, 'answer')} cut short.", "A second signal came.", "One alone lets them finish."
        )
    if not service.draining:
        raise RecycleError("The server ended.", "Its log says why.", "Start it again.")
