"""Asking the Hub with patience: further tries, one pause for all threads, and no request that goes on for ever.

What the client leaves open is closed here, for requests made inside `patiently` and for no others (the client's session is
shared with the rest of the program):

- it does not retry calls for metadata, nor connections that were reset; `patiently` does;
- when the Hub asks one thread to wait, the others would go on asking; here they all wait;
- it waits as long as an answer asks, be it years; here more than a limit's window is an error;
- some of its calls have no time limit, and a limit on silence does not stop a body that comes a byte at a time.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from recycler.zoo.errors import HubError
from recycler.zoo.hub_errors import MAX_WAIT_S, asked_for, explain, is_limit, is_passing, is_refused, pause, too_long

TIMEOUT_S = 30.0
"""The longest silence in answer to a request that has no limit of its own."""
SLOW_S, SLOWEST = 60.0, 1024.0
"""An answer that has come at fewer than `SLOWEST` bytes a second for more than `SLOW_S` counts as none."""
_TRIES = 4

T = TypeVar("T")


class Asked(Protocol):
    """What is asked for: for messages."""

    @property
    def repo(self) -> str: ...

    @property
    def revision(self) -> str | None: ...


class Interrupted(BaseException):
    """Raised in a thread that is to end, out of the request it would make next. No error: nobody explains or retries it."""


class Pause:
    """When the Hub asks one thread to wait, all threads that ask the same Hub wait.

    Attributes:
        told: called with the seconds to wait whenever a longer pause begins.
        dead: the last thing known of the Hub is that nobody answers there; then nothing is tried twice.
    """

    def __init__(self) -> None:
        self.told: Callable[[float], None] | None = None
        self.dead = False
        self._until = 0.0
        self._lock = threading.Lock()

    def ask(self, seconds: float) -> None:
        """All requests from now on wait until `seconds` have passed.

        Raises:
            HubError: that is longer than any limit lasts.
        """
        if seconds > MAX_WAIT_S:
            raise too_long(seconds)
        until = time.monotonic() + seconds
        with self._lock:
            longer = until > self._until + 1
            self._until = max(self._until, until)
        if longer and self.told is not None:
            self.told(seconds)

    def wait(self) -> None:
        seconds = self._until - time.monotonic()
        if seconds > 0:
            time.sleep(seconds)


_pauses: dict[str, Pause] = {}
_mine = threading.local()


def pause_of(endpoint: str | None = None) -> Pause:
    """The one pause of all who ask the Hub at `endpoint` (the default Hub where None)."""
    return _pauses.setdefault((endpoint or "").rstrip("/"), Pause())


def stop_when(check: Callable[[], bool] | None) -> None:
    """From now on, requests that this thread makes through `patiently` raise `Interrupted` once `check()` is true."""
    _mine.check = check


def patiently(
    source: Asked, call: Callable[[], T], passing: Callable[[BaseException], bool] = is_passing, *, endpoint: str | None = None
) -> T:
    """Run `call`, again after a pause where the Hub was busy or the connection broke; explain the rest.

    Args:
        source: what it is about, for messages.
        call: asks the Hub, through its client's session, in this thread.
        passing: whether an error is worth another try.
        endpoint: the Hub that it asks; its pause is shared with every other thread.

    Raises:
        HubError: the reason, after the last try.
    """
    shared = pause_of(endpoint)
    for attempt in range(_TRIES):
        try:
            with _asking(shared):
                answer = call()
        except HubError:  # explained already
            raise
        except Exception as error:
            failure = explain(source.repo, source.revision, error)
            if failure is None:
                raise
            refused = is_refused(error)
            tries = 1 if shared.dead and refused else 2 if refused else _TRIES
            if attempt >= tries - 1 or not passing(error):
                shared.dead = refused
                raise failure from error
            seconds = pause(error, attempt)
            if is_limit(error):
                shared.ask(seconds)  # waited for before the next try, by everybody
            else:
                time.sleep(seconds)
        else:
            shared.dead = False
            return answer
    raise AssertionError("unreachable")


@contextmanager
def _asking(shared: Pause) -> Iterator[None]:
    """Requests of this thread wait while the Hub asks for it, and end in time."""
    from huggingface_hub.utils import get_session

    hooks = get_session().event_hooks
    if _before not in hooks["request"]:  # a session is replaced when a connection fails
        hooks["request"].append(_before)
        hooks["response"].append(_after)
    outer, _mine.pause = getattr(_mine, "pause", None), shared
    try:
        _go_on()
        shared.wait()
        yield
    finally:
        _mine.pause = outer


def _go_on() -> None:
    check = getattr(_mine, "check", None)
    if check is not None and check():
        raise Interrupted


def _before(request: Any) -> None:
    """Hook of the client's session, called before every request, in the thread that makes it."""
    shared: Pause | None = getattr(_mine, "pause", None)
    if shared is None:  # somebody else's request
        return
    _go_on()
    shared.wait()
    limits: Mapping[str, float | None] = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = {
        kind: TIMEOUT_S if limits.get(kind) is None else limits[kind] for kind in ("connect", "read", "write", "pool")
    }


def _after(response: Any) -> None:
    """Hook called with every answer, before its body is read."""
    shared: Pause | None = getattr(_mine, "pause", None)
    if shared is None:
        return
    if response.status_code == 429:  # the client waits too, but only in this thread
        shared.ask(asked_for(response.headers) or 1.0)
    response.stream = _steady(response)


def _steady(response: Any) -> Any:
    """The answer's body, ending in the library's own timeout error where it comes too slowly."""
    stream = response.stream
    # The library changed its name, so its classes are found by theirs.
    kind = next((base for base in type(stream).__mro__ if base.__name__ == "SyncByteStream"), None)
    if kind is None:  # from a transport of the user's own
        return stream
    timeout = sys.modules[kind.__module__.partition(".")[0]].ReadTimeout

    class Steady(kind):  # type: ignore[misc, valid-type]
        def __iter__(self) -> Iterator[bytes]:
            began, received = time.monotonic(), 0
            for piece in stream:
                _go_on()
                received += len(piece)
                took = time.monotonic() - began
                if took > SLOW_S + received / SLOWEST:
                    raise timeout(f"only {received} bytes came in {took:.0f} s", request=response.request)
                yield piece

        def close(self) -> None:
            stream.close()

    return Steady()
