"""GETs to the Hub for many threads: counted, bounded in time and size, patient together, with an eye on the rate budget.

`huggingface_hub` has the session, the headers and the errors; what its own calls lack is here. Its listings have no timeout and
follow any link; its retries know nothing of each other, so that eight threads which meet a limit would ask eight times over; and
it looks at the budget only when it is used up.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from recycler.zoo.errors import HubError
from recycler.zoo.hub_errors import asked_for, explain, is_busy, is_limit, is_passing
from recycler.zoo.patience import pause_of

Bucket = Literal["api", "resolvers"]
"""The Hub has a budget for its API (listings) and another for the contents of files."""

TIMEOUT_S = 10.0
"""For a connection, and for every next piece of an answer."""
DEADLINE_S = 30.0
"""For an answer as a whole, however it trickles in."""
PATIENCE_S = 30.0
"""A pause that the Hub asks for is waited out up to here; a longer one is for a person to decide."""
_TRIES = {"busy": 5, "broken": 3, "silent": 2}
_HOPS = 4
_DEAD = 16  # so many requests in a row given up: the Hub is gone, and the rest need not be tried
# What is left when nothing more is sent: the header is as old as the answer, and others are under way.
_RESERVE: Mapping[str, int] = {"api": 1, "resolvers": 8}
_BUDGET = re.compile(r'"(?P<bucket>\w+)"\s*;\s*r\s*=\s*(?P<left>\d+)\s*;\s*t\s*=\s*(?P<seconds>\d+)')
_KEPT_OF_ERRORS = ("x-error-code", "x-error-message", "x-request-id", "retry-after", "ratelimit")

T = TypeVar("T")


class StopError(HubError):
    """Nothing more can be asked for now: the budget is used up for longer than `PATIENCE_S`, or the Hub is gone.

    Attributes:
        advice: what to do, to stand behind "stopped after 480 of 500: ".
        seconds: until the budget is full again, None where that is not known.
    """

    def __init__(self, what: str, why: str, advice: str, seconds: int | None = None, *, code: str | None = None) -> None:
        super().__init__(what, why, advice, code=code)
        self.advice = advice
        self.seconds = seconds


@dataclass(frozen=True)
class Answer:
    """What came back for a GET, redirects followed.

    Attributes:
        url: of the first request.
        headers: of the last answer, names in lower case.
        body: at most as many bytes as were asked for. whole: whether that was all.
        commit: what the Hub says the file is at, None where it does not say.
        next: where its Link header says the next page is, as it stands there.
    """

    url: str
    status: int
    headers: Mapping[str, str]
    body: bytes
    whole: bool
    commit: str | None
    next: str | None


class Wire:
    """GETs to one Hub with one token, from any number of threads.

    Args:
        token: an access token; the saved or environment's one where None, none at all where False.
        endpoint: another Hub than the default.
    """

    def __init__(self, *, token: str | bool | None = None, endpoint: str | None = None) -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers

        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.counts: dict[Bucket, int] = {"api": 0, "resolvers": 0}
        self._headers = build_hf_headers(token=token)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._pause = pause_of(endpoint)  # of everybody in this process who asks the same Hub
        self._stopped: dict[Bucket, StopError] = {}
        self._given_up = 0

    @property
    def anonymous(self) -> bool:
        """Whether requests carry no token."""
        return not any(name.lower() == "authorization" for name in self._headers)

    @property
    def stopped(self) -> StopError | None:
        """Why nothing more is sent, None while something may be."""
        return next(iter(self._stopped.values()), None)

    @contextmanager
    def telling(self, told: Callable[[float], None]) -> Iterator[None]:
        """Within it, `told` hears of the seconds to wait, unless somebody else does already."""
        mine = self._pause.told is None
        if mine:
            self._pause.told = told
        try:
            yield
        finally:
            if mine:
                self._pause.told = None

    def close(self) -> None:
        """Let no thread wait or send any longer, as after Ctrl-C."""
        self._over.set()

    def get(
        self,
        bucket: Bucket,
        where: str,
        url: str,
        read: Callable[[Answer], T],
        *,
        limit: int,
        ranged: bool = False,
    ) -> T:
        """GET `url`, again where the Hub was busy, the connection broke, or `read` finds the answer garbled.

        Args:
            bucket: the budget that it counts against.
            where: the repository, for messages.
            read: makes something of the answer; its ValueError means that it was garbled on the way.
            limit: the most bytes of the body that are read.
            ranged: ask for no more than the first `limit` bytes.

        Raises:
            HubError: it cannot be had; it says why. StopError: nothing more can be asked for now.
        """
        for attempt in range(max(_TRIES.values())):
            self._wait_for_turn(bucket)
            try:
                found = read(self._once(bucket, url, limit, ranged))
            except Exception as error:
                failure = explain(where, None, error)
                if failure is None:
                    raise
                kind = _kind(error)
                if kind is None or attempt + 1 >= _TRIES[kind]:
                    raise self._give_up(bucket, kind, error, failure) from error
                self._rest(bucket, error, attempt)
            else:
                self._given_up = 0
                return found
        raise AssertionError("unreachable")

    def _wait_for_turn(self, bucket: Bucket) -> None:
        if self._over.is_set():
            raise StopError("The search was interrupted.", "", "run it again")
        if bucket in self._stopped:
            raise self._stopped[bucket]
        self._pause.wait()

    def _once(self, bucket: Bucket, url: str, limit: int, ranged: bool) -> Answer:
        from huggingface_hub.utils import get_session, hf_raise_for_status

        session = get_session()
        headers = dict(self._headers)
        if ranged:
            headers |= {"Range": f"bytes=0-{limit - 1}", "Accept-Encoding": "identity"}
        # Redirects are followed here and not by the session, which would read their bodies without a bound; its own rule for
        # tokens (none to another origin) is in `next_request`.
        request: Any = session.build_request("GET", url, headers=headers, timeout=TIMEOUT_S)
        deadline = time.monotonic() + DEADLINE_S
        commit = None
        with self._lock:
            self.counts[bucket] += 1
        for hop in range(_HOPS + 1):
            response: Any = session.send(request, stream=True, follow_redirects=False)
            try:
                if hop == 0:
                    self._heed(bucket, response.headers.get("ratelimit", ""), response.status_code)
                commit = commit or response.headers.get("x-repo-commit")
                moved = response.next_request is not None
                failed = response.status_code >= 400 and response.status_code != 416  # an empty file has no part to give
                body, whole = _body(response, 65_536 if moved or failed else limit, deadline)
                if failed:  # afresh and without its body, which the client's own reading of errors trusts too far
                    kept = {name: response.headers[name] for name in _KEPT_OF_ERRORS if name in response.headers}
                    hf_raise_for_status(type(response)(response.status_code, headers=kept, request=response.request))
                if not moved:
                    headers = {name.lower(): value for name, value in response.headers.items()}
                    link = response.links.get("next", {}).get("url")
                    return Answer(url, response.status_code, headers, body, whole, commit, link)
                request = response.next_request
            finally:
                response.close()
        raise ValueError(f"more than {_HOPS} redirects")

    def _heed(self, bucket: Bucket, header: str, status: int) -> None:
        """Stop before the budget is overdrawn: rest for a little while, or for good where that is long."""
        found = _BUDGET.search(header)
        if found is None or status == 429:  # which says how long to rest, and is heard in `_rest`
            return
        named: Bucket = "api" if found["bucket"] == "api" else "resolvers" if found["bucket"] == "resolvers" else bucket
        if int(found["left"]) <= _RESERVE[named]:
            self._rest_for(named, float(found["seconds"]))

    def _rest(self, bucket: Bucket, error: BaseException, attempt: int) -> None:
        """After a failure: everybody rests where the Hub asks for it, else this thread alone."""
        headers = getattr(getattr(error, "response", None), "headers", None) or {}
        seconds = asked_for(headers) or 2.0**attempt
        if is_limit(error):
            self._rest_for(bucket, seconds)
        else:
            time.sleep(min(seconds, PATIENCE_S))

    def _rest_for(self, bucket: Bucket, seconds: float) -> None:
        with self._lock:
            if seconds > PATIENCE_S:
                self._stopped.setdefault(bucket, self._used_up(int(seconds)))
            else:
                self._pause.ask(seconds)

    def _give_up(self, bucket: Bucket, kind: str | None, error: BaseException, failure: HubError) -> HubError:
        if kind is None:  # the Hub answered, and will not say otherwise
            self._given_up = 0
            return failure
        with self._lock:
            self._given_up += 1
            if is_limit(error):
                self._stopped.setdefault(bucket, self._used_up(None))
            elif self._given_up >= _DEAD:
                gone = StopError(failure.what, failure.why, "the Hub stopped answering; run it again later", code=failure.code)
                self._stopped.setdefault(bucket, gone)
            return self._stopped.get(bucket, failure)

    def _used_up(self, seconds: int | None) -> StopError:
        whose = "the anonymous budget" if self.anonymous else "your token's budget"
        when = "in a few minutes" if seconds is None else f"in {seconds} s"
        advice = f"{whose} is used up; {'set HF_TOKEN or ' if self.anonymous else ''}continue {when}"
        return StopError(
            "The Hub's rate limit was reached.",
            "It counts requests in windows of five minutes.",
            advice,
            seconds,
            code="E_RATE_LIMIT",
        )


def _kind(error: BaseException) -> str | None:
    """What went wrong in passing: "busy", "broken" or "silent"; None where another try would be the same."""
    if is_busy(error):
        return "busy"
    if isinstance(error, TimeoutError) or any(kind.__name__ == "TimeoutException" for kind in type(error).__mro__):
        return "silent"
    return "broken" if is_passing(error) or isinstance(error, ValueError) else None


def _body(response: Any, limit: int, deadline: float) -> tuple[bytes, bool]:
    """At most `limit` bytes of the body, and whether that is all of it."""
    pieces: list[bytes] = []
    size = 0
    for piece in response.iter_bytes():
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            return b"".join(pieces)[:limit], False
        if time.monotonic() > deadline:
            raise TimeoutError(f"the answer was not complete after {DEADLINE_S:g} s")
    return b"".join(pieces), True
