"""Connections, before there is a request: what is no HTTP is told so in OpenAI's shape, and who sends a head byte by byte is not
waited for. uvicorn answers the first in plain text, and waits for the second for ever."""

from __future__ import annotations

import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from recycler.serving.errors import ApiError

HEAD_SECONDS = 20.0  # that a request's head may take, from its first byte or the connection's beginning


class Wire(H11Protocol):
    """HTTP/1.1 over one connection."""

    _head_ends: float | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def _watch_head(self) -> None:
        """Puts uvicorn's timer for idle connections, which any byte stops, on again while a head is unfinished."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._head_ends = None
        elif self.timeout_keep_alive_task is None:
            now = self.loop.time()
            self._head_ends = now + HEAD_SECONDS if self._head_ends is None else self._head_ends
            self.timeout_keep_alive_task = self.loop.call_later(
                max(self._head_ends - now, 0.0), self.timeout_keep_alive_handler
            )

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(ApiError(400, "This is no request in HTTP/1.1.", code="no_http").body()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason="Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
