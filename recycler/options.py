"""What all verbs of the command line share: the error boundary, common options, small conversions."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from recycler.zoo.errors import RecycleError, UsageError
from recycler.zoo.untrusted import OBEYED

if TYPE_CHECKING:
    from recycler.zoo.store import Zoo


_INTERRUPTED = {
    "profile": "interrupted; the same command goes on where it stopped",
    "bench-routers": "interrupted; with --out, the methods that were done are kept, and the same command goes on with the others",
    "fetch": "interrupted; the adapters that were done are in the zoo, and the same command goes on with the others",
}


class Group(click.Group):
    """Turns the library's errors into a message and an exit code, in one place; and keeps commands in the order of the work."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        pressed: list[bool] = []
        try:
            with _watching(pressed):
                return super().invoke(ctx)
        except RecycleError as error:
            from recycler.terminal import complain

            complain(error)
            ctx.exit(error.exit_code)
        except Exception as error:
            if pressed and isinstance(
                error, (ImportError, RecursionError)
            ):  # what libraries make of it while they are imported
                self._interrupted(ctx)
            refused = _of_the_system(error)
            if refused is None:
                if hasattr(error, "add_note"):  # since Python 3.11: what stands below the traceback
                    fault = RecycleError("")
                    error.add_note(f"This was not foreseen. more: recycle errors {fault.code}, or {fault.docs}")
                raise
            from recycler.terminal import complain

            complain(refused)
            ctx.exit(refused.exit_code)
        except KeyboardInterrupt:
            self._interrupted(ctx)

    def _interrupted(self, ctx: click.Context) -> None:
        from recycler.terminal import say

        say(_INTERRUPTED.get(ctx.invoked_subcommand or "", "interrupted; nothing unfinished was kept"))
        ctx.exit(130)


@contextmanager
def _watching(pressed: list[bool]) -> Iterator[None]:
    """Notes in `pressed` that Ctrl-C was pressed, whatever becomes of the exception."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def press(number: int, frame: Any) -> None:
        pressed.append(True)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def as_json(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON with stable keys.")(function)


def in_zoo(function: Callable[..., Any]) -> Callable[..., Any]:
    help_text = "The zoo's folder; by default $RECYCLE_ZOO, else ~/.cache/recycle/zoo."
    return click.option("--zoo", "zoo_path", type=click.Path(file_okay=False), help=help_text)(function)


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    function = click.option("--dtype", default="auto", show_default=True, help="auto (as stored), float32, bfloat16, ...")(
        function
    )
    return click.option("--device", help="cpu, cuda, cuda:1, ...; by default CUDA when there is a device.")(function)


def with_base(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--base", help="The base model: a Hub id, or a folder that holds a copy.")(function)


def with_engine(function: Callable[..., Any]) -> Callable[..., Any]:
    help_text = (
        "Share the work: ray (workers on this machine, or the cluster at $RAY_ADDRESS) or ray://HOST:PORT; same results."
    )
    return click.option("--engine", metavar="ENGINE", help=help_text)(function)


def with_select(function: Callable[..., Any]) -> Callable[..., Any]:
    function = click.option(
        "--count", type=click.IntRange(min=1), metavar="M", help="How many adapters --select keeps at most; 12 by default."
    )(function)
    help_text = "Choose candidates first: by exact match and NLL on the shots, and by how unlike their updates are."
    return click.option("--select", type=click.Choice(["kshot"]), help=help_text)(function)


def open_zoo(path: str | None) -> Zoo:
    from recycler.zoo.store import Zoo

    return Zoo(path)


def names_of(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def pairs_of(items: tuple[str, ...], flag: str = "--assign", form: str = "ADAPTER=TASK") -> dict[str, Any]:
    """``a=b`` options as a → [b, ...]."""
    pairs: dict[str, list[str]] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not (equals and key.strip() and value.strip()):
            raise UsageError(f"{flag} {item!r} is not {form}.", "", f"Write {flag} {form}.")
        pairs.setdefault(key.strip(), []).append(value.strip())
    return pairs


def as_text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {as_text(inner)}" for key, inner in value.items())
    return "–" if value is None else str(value)


def _of_the_system(error: Exception) -> RecycleError | None:
    """A full disk, or a file that may not be read or written, as an error of ours; None for anything else."""
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):  # that one is click's business
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    elif type(error).__name__ == "SafetensorError" and "I/O error" in str(error):  # its own, also for a full disk
        what = str(error)
    else:
        return None
    return RecycleError(f"{what}.", "The system refused it.", "Check permissions and free space.", code="E_SYSTEM")


def print_json(data: Any) -> None:
    """On stdout, readable, with what a terminal would obey spelled out as JSON spells it: it stands in strings only."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    click.echo(OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text))
