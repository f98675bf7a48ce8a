"""Work in threads, reported in one: results and progress arrive where the work was ordered, so that whoever draws or prints needs
no locks.

Threads are daemons. A process that is told to end ends, whatever a thread waits for; what it leaves behind is the business of
whoever writes files so that they can be left behind (`recycler.zoo.staging`).
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from recycler.zoo.patience import Interrupted, stop_when

GRACE_S = 2.0
"""How long a caller that was interrupted waits for work that is nearly done."""

T = TypeVar("T")
Tell = Callable[..., None]
"""Given to every task: passes its arguments on to `heard`, in the caller's thread."""


def run_all(
    tasks: Sequence[Callable[[Tell], T]], workers: int, done: Callable[[int, T | Exception], None], heard: Tell
) -> None:
    """Run every task, at most `workers` at once; return when all are done.

    Args:
        done: called in this thread as each task ends, with its number and what it returned or raised. What `done` itself
            raises ends the run.
        heard: called in this thread with whatever a task tells.

    Raises:
        BaseException: what `done` or `heard` raised, or KeyboardInterrupt. Then no further task begins, those under way end
            at their next request to the Hub, and what takes longer than `GRACE_S` is left to itself.
    """
    todo = deque(range(len(tasks)))
    inbox: queue.SimpleQueue[tuple[bool, tuple[Any, ...]]] = queue.SimpleQueue()
    stop = threading.Event()

    def tell(*what: Any) -> None:
        inbox.put((False, what))

    def work() -> None:
        stop_when(stop.is_set)
        while not stop.is_set():
            try:
                index = todo.popleft()
            except IndexError:
                return
            try:
                outcome: Any = tasks[index](tell)
            except Interrupted:
                return
            except Exception as error:
                outcome = error
            inbox.put((True, (index, outcome)))

    threads = [threading.Thread(target=work, name=f"fetch-{n}", daemon=True) for n in range(min(workers, len(tasks)))]
    for thread in threads:
        thread.start()
    left = len(tasks)
    try:
        while left:
            try:
                finished, what = inbox.get(timeout=0.5)  # with a timeout, so that Ctrl-C is heard on every system
            except queue.Empty:
                continue
            if finished:
                left -= 1
                done(*what)
            else:
                heard(*what)
    except BaseException:
        stop.set()
        until = time.monotonic() + GRACE_S
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        raise
    for thread in threads:
        thread.join()
