"""What every request passes before it is read: is it for this host, from somebody with the key, of a bearable size, sent in a bearable
time, and while the server takes requests? And what is counted when it is answered."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Iterable
from typing import Any

from starlette.requests import ClientDisconnect

from recycler.serving.errors import ApiError
from recycler.serving.service import Service

LEFT = "recycle.left"  # set in a request's scope where its client left
READ_ON = 64 << 20  # bytes of a body that is too large are still read, up to this, so that its sender gets to read why


class Door:
    """ASGI middleware."""

    def __init__(self, app: Any, service: Service) -> None:
        self.app, self.service = app, service
        self.local = is_loopback(service.settings.host)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def counting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self._check(scope)
            except ApiError as error:
                await error.response()(scope, receive, counting)
            else:
                await self.app(scope, self._limited(receive), counting)
        except ClientDisconnect:  # in the middle of its body
            scope[LEFT] = True
        finally:
            self.service.metrics.counted(scope["path"], 499 if scope.get(LEFT) else status)

    def _check(self, scope: Any) -> None:
        headers = dict(_headers(scope))
        host = headers.get("host", "")
        if self.local and host and not is_loopback(_bare(host)):
            # A page of another site that calls itself this host would read answers otherwise.
            raise ApiError(403, "This server answers requests for localhost.", code="host")
        if not scope["path"].startswith("/v1"):
            return
        key = self.service.settings.api_key
        given = headers.get("authorization", "")
        if key is not None and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            what = "The API key is wrong." if given else "An API key is needed: Authorization: Bearer KEY."
            raise ApiError(401, what, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > READ_ON:
            raise self._too_large(connection="close")
        if scope["method"] == "POST":
            if self.service.draining:
                raise ApiError(503, "The server is shutting down.", code="draining", headers={"retry-after": "5"})
            if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
                # What browsers send to strangers' servers without asking is of other types.
                raise ApiError(415, "Send JSON, with the header Content-Type: application/json.", code="content_type")

    def _limited(self, receive: Any) -> Any:
        """`receive`, under which a body is neither too large nor too slow."""
        settings, loop = self.service.settings, asyncio.get_running_loop()
        ends, read, whole = loop.time() + settings.body_seconds, 0, False

        async def part() -> Any:
            nonlocal read, whole
            try:
                message = await asyncio.wait_for(receive(), ends - loop.time())
            except asyncio.TimeoutError:
                what = f"The body did not come within {settings.body_seconds:g} seconds."
                raise ApiError(408, what, code="too_slow", headers={"connection": "close"}) from None
            read += len(message.get("body", b""))
            whole = not message.get("more_body")
            return message

        async def limited() -> Any:
            if whole:  # what comes now is that the client leaves
                return await receive()
            message = await part()
            if read > settings.max_request_bytes:
                while not whole and read < READ_ON:
                    await part()
                raise self._too_large()
            return message

        return limited

    def _too_large(self, **headers: str) -> ApiError:
        what = f"A body has at most {self.service.settings.max_request_bytes} bytes."
        return ApiError(413, what, code="too_large", headers=headers)


def _headers(scope: Any) -> Iterable[tuple[str, str]]:
    return ((name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"])


def _bare(host: str) -> str:
    """Without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] if host.count(":") == 1 else host


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address or a name."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
