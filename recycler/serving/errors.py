"""What goes wrong, in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}`` and a status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from recycler.zoo.errors import RecycleError

LONGEST = 400  # characters of a message


class ApiError(Exception):
    """A request is refused, or could not be answered.

    Args:
        param: the field that is wrong. code: for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message[:LONGEST], param, code, headers

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, dict(self.headers or {}))


def of(error: Exception) -> ApiError:
    """Any error as one of these. What the library refuses on purpose is the request's fault; details of others stay in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return _invalid(error)
    if isinstance(error, RecycleError):
        return ApiError(400, str(error), code=error.code)
    if isinstance(error, HTTPException):
        allowed = {name.lower(): value for name, value in (error.headers or {}).items()}.get("allow", "another method")
        said = {404: "There is nothing here; the API is under /v1.", 405: f"Here it is {allowed}."}
        what = said.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, what, headers=error.headers)
    return ApiError(500, "The answer could not be computed; the server's log says more.")


def _invalid(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = found[0]
    where = ".".join(str(part)[:60] for part in first["loc"])
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is no JSON. {first['msg']}")
    field = str(first["loc"][0])[:60] if first["loc"] else None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"There is no field {where!r} here.", param=field)
    more = f" ({len(found) - 1} more)" if len(found) > 1 else ""
    what = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{where or 'the body'}: {what}{more}", param=field)


def install(app: FastAPI) -> None:
    """Answers every error of an app so."""

    def answer(request: Request, error: Exception) -> JSONResponse:
        return of(error).response()

    for kind in (ApiError, ValidationError, RecycleError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
