"""Errors of the Hub's client → `HubError`: the reason, dug out from where the client buried it, and what to
do.

One reason can arrive in several wrappings: a gated repository as itself, a disabled one as "file not found in
the cache", a broken connection as an error of the transport library that is no OSError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from recycler.zoo.errors import HubError
from recycler.zoo.inspect import printable

MAX_WAIT_S = 330.0  # the Hub counts over 300


def explain(repo: str, revision: str | None, error: Exception) -> HubError | None:
    """What a person should read; None where the error is not the Hub's, but a fault in the program."""
    from huggingface_hub import errors

    def inside(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in _chain(error))

    where = printable(repo)
    page = "its page on the Hub"
    answer = _response(error)
    status = answer.status_code if answer is not None else None
    if inside(errors.OfflineModeIsEnabled):
        return HubError(
            f"{where} was not fetched: offline mode is on.",
            "HF_HUB_OFFLINE is set, and no request is made.",
            "Unset it to fetch. What is in the zoo already needs no network.",
            code="E_OFFLINE",
        )
    if inside(errors.GatedRepoError):
        return HubError(
            f"{where} is gated.",
            "Its owner wants you to accept conditions first.",
            f"Accept them on {page}, then log in with: hf auth login",
            code="E_GATED",
        )
    if inside(errors.DisabledRepoError):
        return HubError(
            f"{where} is disabled.", "The Hub or its owner took it down.", "Choose another adapter.", code="E_NOT_FOUND"
        )
    if inside(errors.RevisionNotFoundError):
        return HubError(
            f"{where} has no revision {printable(revision)}.",
            "It was renamed or deleted, or is mistyped.",
            f"Look up branches and commits on {page}.",
            code="E_NOT_FOUND",
        )
    if inside(errors.RepositoryNotFoundError) or status in (401, 404):
        return HubError(
            f"{where} was not found.",
            "It is missing or private, or the access token is not valid; the Hub does not tell these apart.",
            "Check the spelling. If it is private, log in with: hf auth login",
            code="E_NOT_FOUND",
        )
    if status == 403:
        return HubError(
            f"The Hub refuses access to {where}.",
            "Your token does not allow it.",
            "Log in with a token that may read it: hf auth login",
            code="E_AUTH",
        )
    if status == 429:
        return HubError(
            f"The Hub's rate limit was reached at {where}.",
            "Too many requests in the last five minutes, from you or from your network.",
            "Wait five minutes and run it again; what was fetched stays. Logging in helps: hf auth login",
            code="E_RATE_LIMIT",
        )
    if status is not None:
        return HubError(
            f"The Hub answered {status} for {where}.", "The fault is on its side.", "Run it again later.", code="E_UNREACHABLE"
        )
    if inside(errors.HFValidationError):
        return HubError(f"{where} is no valid name on the Hub.", "It cannot exist.", "Check the spelling.", code="E_NOT_FOUND")
    if _transport(error) or inside(ConnectionError, TimeoutError, errors.LocalEntryNotFoundError):
        return HubError(
            f"{where} could not be fetched: the Hub cannot be reached.",
            f"{printable(type(_chain(error)[-1]).__name__)}: {printable(_chain(error)[-1])}.",
            "Check the network and any proxy, then run it again; what was fetched stays.",
            code="E_UNREACHABLE",
        )
    if _in_xet(error):
        return HubError(
            f"{where} could not be fetched from the Hub's Xet store.",
            f"{type(error).__name__}: {printable(error)}.",
            "Run it again; what was fetched stays. To go around that store, set HF_HUB_DISABLE_XET=1.",
            code="E_UNREACHABLE",
        )
    if isinstance(error, OSError) or inside(ValueError, KeyError):  # short bodies, no JSON
        return HubError(
            f"{where} could not be fetched.",
            f"{type(error).__name__}: {printable(error)}.",
            "Run it again; if it stays so, something between here and the Hub changes the answers.",
            code="E_UNREACHABLE",
        )
    return None


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error and its causes, outermost first."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _response(error: BaseException) -> Any:
    """The HTTP answer that is at the bottom of it, or None."""
    answers = [r for e in _chain(error) if (r := getattr(e, "response", None)) is not None]
    return answers[-1] if answers else None


def _transport(error: BaseException) -> bool:
    """Whether the connection failed. The library changed its name; its errors are no OSError."""
    names = {type(e).__module__.partition(".")[0] for e in _chain(error)}
    return (bool(names & {"httpx", "httpx2", "httpcore", "httpcore2"}) or _closed(error)) and _response(error) is None


def _closed(error: BaseException) -> bool:
    """Whether the session was closed under the request: the client does that when a connection of another thread fails."""
    return any(type(e) is RuntimeError and "client has been closed" in str(e) for e in _chain(error))


def _in_xet(error: BaseException) -> bool:
    """Whether the client's Xet code raised it: bare RuntimeErrors, after its own retries."""
    at = error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_name == "xet_get":
            return True
        at = at.tb_next
    return False


def _named(error: BaseException, *names: str) -> bool:
    return any(type(e).__name__ in names for e in _chain(error))


def is_passing(error: BaseException) -> bool:
    """Whether another try may succeed: rate limits, server errors, broken connections."""
    if any(isinstance(e, FileNotFoundError) for e in _chain(error)):
        return False  # LocalEntryNotFoundError: the client spent its own retries before it gave up
    return is_busy(error) or _transport(error)


def is_unspent(error: BaseException) -> bool:
    """`is_passing`, for downloads: the client retries those itself where a body was cut or nothing came, but not after a reset."""
    spent = (
        "TimeoutException",
        "ConnectTimeout",
        "ReadTimeout",
        "WriteTimeout",
        "PoolTimeout",
        "ConnectError",
        "RemoteProtocolError",
    )
    return is_busy(error) or _expired(error) or (is_passing(error) and (_closed(error) or not _named(error, *spent)))


def _expired(error: BaseException) -> bool:
    """Whether a signed link was refused, which asking the Hub again replaces: contents lie elsewhere than what gives the links."""
    answer = _response(error)
    return answer is not None and answer.status_code == 403 and not re.search("/(api|resolve)/", str(answer.request.url))


def is_busy(error: BaseException) -> bool:
    """Whether the Hub answered, and asks for patience."""
    answer = _response(error)
    return answer is not None and bool(answer.status_code == 429 or answer.status_code >= 500)


def is_limit(error: BaseException) -> bool:
    """Whether a rate limit was reached."""
    answer = _response(error)
    return answer is not None and answer.status_code == 429


def is_refused(error: BaseException) -> bool:
    """Whether nobody answers there: a closed port, no such host, or silence until the time was up."""
    return _transport(error) and _named(error, "ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError")


def asked_for(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait, None where it does not say."""
    limit = re.search(r"\br=0\b.*?\bt=(\d+)", headers.get("ratelimit", ""))
    asked = limit[1] if limit else headers.get("retry-after", "").strip()
    return float(asked) + 1 if asked.isdecimal() else None


def pause(error: BaseException, attempt: int) -> float:
    """Seconds to wait: what the answer asks for, else 1, 2, 4."""
    answer = _response(error)
    asked = asked_for(answer.headers) if answer is not None else None
    return 2.0**attempt if asked is None else min(asked, MAX_WAIT_S)


def too_long(seconds: float) -> HubError:
    """What is raised in place of a pause longer than the Hub's own window of five minutes."""
    return HubError(
        f"The Hub asks to wait {seconds / 60:,.0f} minutes before the next request.",
        "Its rate limits are counted over five minutes, so this is no ordinary limit.",
        "Run it again later; what was fetched stays. Logging in helps: hf auth login",
        code="E_RATE_LIMIT",
    )
