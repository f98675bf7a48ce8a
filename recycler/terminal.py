"""What a person sees: tables on stdout, everything else on stderr, bars only where there is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from recycler.zoo.errors import RecycleError
from recycler.zoo.untrusted import OBEYED

if TYPE_CHECKING:
    from recycler.evaluating.evaluation import Evaluation
    from recycler.profiles import Profile


def say(text: str) -> None:
    """A line on stderr, above a bar where there is one. Control characters of whatever is quoted in it are gone."""
    print(OBEYED.sub("", text), file=sys.stderr, flush=True)  # click.echo would write around the bar, into its line


def complain(error: RecycleError) -> None:
    """What happened, why, and what to do, each on its own line; then the error's code, and where it is explained.

    The same for a person and for a file: scripts tell errors apart by the code, and reports are pasted from logs.
    """
    label = click.style("error:", fg="red", bold=True)  # no colour where it is no terminal
    click.echo(f"{label} {OBEYED.sub('', error.what)}", err=True)
    for part in (error.why, error.fix):
        for line in part.splitlines():
            say(f"  {line}")
    click.secho(f"  more: recycle errors {error.code}, or {error.docs}", dim=True, err=True)


@contextmanager
def bars() -> Iterator[Callable[[int, str], Callable[..., None]]]:
    """Progress on stderr: bars with a rate and an end on a terminal, one line a stage elsewhere."""
    if not sys.stderr.isatty():
        yield _lines
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        """Steps per second: lately, and over all once it is done."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.{0 if speed >= 10 else 1}f}/s" if speed else "", style="progress.data.speed")

    columns = (
        TextColumn("{task.description:>20}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=False) as progress:

        def start(steps: int, what: str) -> Callable[..., None]:
            task = progress.add_task(what, total=steps, note="")

            def step(count: int = 1, note: str = "") -> None:
                progress.update(task, advance=count, note=note)

            return step

        yield start


def _lines(steps: int, what: str) -> Callable[..., None]:
    done, shown = 0, 0

    def step(count: int = 1, note: str = "") -> None:
        nonlocal done, shown
        done += count
        if done * 10 // max(steps, 1) > shown or done == steps:  # every tenth
            shown = done * 10 // max(steps, 1)
            say(f"{what}: {done}/{steps} {note}".rstrip())

    return step


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: int | None = None) -> None:
    """A table on stdout: drawn to fit a terminal, tab-separated when piped.

    Args:
        right: columns from this one on are aligned to the right.
    """
    rows = [[OBEYED.sub("", cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in [list(header), *rows]:
            click.echo("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in row))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(header):
        drawn.add_column(name, justify="right" if right is not None and number >= right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(escape(cell) for cell in row))
    Console().print(drawn)


def profile_table(profile: Profile) -> None:
    """NLL of the base and every adapter, tasks down, the lowest marked; exact match beside it where it was measured."""
    header = ["task", "base", *profile.adapters]
    rows = []
    nll_RT = profile.nll.mean(-1)
    exact_RT = None if profile.exact is None else profile.exact.mean(-1)
    for t, task in enumerate(profile.tasks):
        best = int(nll_RT[:, t].argmin())
        cells = []
        for r in range(len(header) - 1):
            cell = f"{float(nll_RT[r, t]):.2f}"
            if exact_RT is not None:
                cell += f" ({float(exact_RT[r, t]):.2f})"
            cells.append(cell + "*" * (r == best))
        rows.append([task, *cells])
    table(header, rows, right=1)
    say("mean NLL per completion token, lower is better, * the lowest" + "; exact match in brackets" * (exact_RT is not None))
    without = [name for name, tasks in profile.own.items() if not tasks]
    for name, tasks in profile.own.items():
        if tasks:
            say(f"{name}: {', '.join(tasks)}")
    if without:
        say(f"better than the base nowhere: {', '.join(without)}")
    if profile.harmful:
        say(
            f"warning: {', '.join(profile.harmful)} make every task clearly worse. Trained for another base of the same shapes, "
            "or broken? See: recycle zoo check, recycle zoo health"
        )


def evaluation_table(result: Evaluation) -> None:
    """Exact match per task and contender, the mean with its interval, NLL below, and the verdict."""
    header = ["task", "rows", *result.contenders]
    rows: list[list[str]] = []
    for task in result.tasks:
        values = {c: sum(result.exact[c][task]) / len(result.exact[c][task]) for c in result.contenders}
        rows.append([task, str(len(result.exact["base"][task])), *(f"{v:.2f}" for v in values.values())])
    rows.append(["mean exact match", "", *(f"{result.mean(c):.3f}" for c in result.contenders)])
    intervals = [result.interval(c) for c in result.contenders]
    rows.append(["95 % interval", "", *(f"{low:.2f}–{high:.2f}" for low, high in intervals)])
    rows.append(["mean NLL", "", *(f"{result.mean(c, 'nll'):.2f}" for c in result.contenders)])
    table(header, rows, right=1)
    single: dict[str, Any] = result.chosen["best_single"]
    hindsight = [task for task, one in result.chosen["oracle"].items() if one["how"] == "in hindsight"]
    say(f"best single: {single['adapter']} ({single['how']})")
    if hindsight:
        say(f"oracle chosen in hindsight, by NLL on these rows, for: {', '.join(hindsight)}")
    click.echo(result.verdict())
    if result.beyond:
        say(f"beyond the zoo, where nothing scores clearly above the base: {', '.join(result.beyond)}")
    if result.untold:
        say(f"too few rows to tell, where something may score above the base: {', '.join(result.untold)}")
