"""`recycle profile`: what is each adapter good at?"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout

import click

from recycler.options import as_json, in_zoo, names_of, on_device, open_zoo, pairs_of, print_json, with_base, with_engine
from recycler.zoo.errors import UsageError


@click.command(name="profile")
@click.argument("files", nargs=-1)
@click.option("--kshot", default=16, show_default=True, help="Rows of each task to use.")
@click.option("--seed", default=0, show_default=True, help="Chooses the rows; the same every time.")
@click.option("--out", default="profile", show_default=True, help="A name inside the zoo, or a folder.")
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    metavar="NAME",
    help="A dataset of the Hub as a task; needs recycler[datasets].",
)
@click.option("--adapters", help="Comma-separated names; by default the whole zoo.")
@click.option("--assign", multiple=True, metavar="ADAPTER=TASK", help="Say by hand which task is an adapter's own.")
@click.option("--generate", is_flag=True, help="Also score exact match by generation.")
@click.option("--force", is_flag=True, help="Measure again, and replace a finished profile.")
@with_engine
@with_base
@on_device
@in_zoo
@as_json
def profile_command(
    files: tuple[str, ...], kshot: int, seed: int, out: str, datasets: tuple[str, ...], adapters: str | None, assign: tuple[str, ...],
    generate: bool, force: bool, engine: str | None, base: str | None, device: str | None, dtype: str, zoo_path: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Score the base and every adapter on K shots of every task.

    FILES are JSONL, one task each, named by the file's stem; a row is {"prompt", "completion"} or {"messages": [...]}. An
    interrupted run goes on where it stopped, and a finished one is not measured again.

    \b
    Examples:
      recycle profile tasks/*.jsonl --kshot 16 --out p16
      recycle profile tasks/*.jsonl --assign math-lora=gsm8k --generate
      recycle profile tasks/*.jsonl --engine ray      # shared by workers
    """
    from recycler.build import profile as run
    from recycler.shots import Shots
    from recycler.terminal import bars, say

    if not files and not datasets:
        raise UsageError(
            "A profile needs shots.",
            "",
            "Give JSONL files, one task each: recycle profile tasks/*.jsonl",
            code="E_NEEDS_PROFILE",
        )
    shots = Shots.from_files(*files) if files else Shots({})
    for name in datasets:
        shots = Shots({**shots, **Shots.from_dataset(name)})
    stages: list[str] = []
    with bars() as progress, redirect_stdout(sys.stderr):  # what an engine prints is chatter

        def noted(steps: int, what: str) -> Callable[..., None]:
            stages.append(what)
            return progress(steps, what)

        result = run(
            open_zoo(zoo_path), shots, kshot, seed=seed, out=out, base=base, adapters=names_of(adapters), assign=pairs_of(assign),
            generate=generate, force=force, engine=engine, progress=noted, device=device, dtype=dtype,
        )  # fmt: skip
    if as_json:
        print_json(result.to_json())
    else:
        from recycler.terminal import profile_table

        profile_table(result)
    say(f"kept as {result.folder}" if stages else f"measured before, kept as {result.folder}; --force measures again")
