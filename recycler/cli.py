"""The command line: `recycle`. Verbs call the library; this file only reads options, shows progress, and prints.

Data goes to stdout, chatter and progress to stderr. Exit codes: 0 ok, 1 unexpected, 2 usage, 3 input rejected, 4 security,
5 Hub or offline, 6 partial success. Nothing heavy is imported until a verb runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from recycler.cli_bench import bench_command
from recycler.cli_build import build_command, routers_command
from recycler.cli_convert import extract_command
from recycler.cli_fetch import fetch_command
from recycler.cli_find import search_command
from recycler.cli_zoo import zoo_group
from recycler.options import (
    Group,
    as_json,
    in_zoo,
    names_of,
    on_device,
    open_zoo,
    pairs_of,
    print_json,
    with_base,
)
from recycler.zoo.errors import UsageError


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="recycler", prog_name="recycle")
def main() -> None:
    """Turn a pile of LoRA adapters into one routed model, and say honestly when it helps.

    \b
    recycle search --base org/base
    recycle fetch org/math-lora org/law-lora --base org/base
    recycle profile tasks/*.jsonl --kshot 16 --out p16
    recycle build-router ridge --profile p16 --out gates/
    recycle compose --router gates/ --out model/
    recycle eval model/ tasks/*.jsonl
    recycle run model/ --input prompts.jsonl --output answers.jsonl
    """


main.add_command(fetch_command)
main.add_command(search_command)
main.add_command(extract_command)
main.add_command(zoo_group)


@main.command()
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
@with_base
@on_device
@in_zoo
@as_json
def profile(
    files: tuple[str, ...], kshot: int, seed: int, out: str, datasets: tuple[str, ...], adapters: str | None, assign: tuple[str, ...],
    generate: bool, force: bool, base: str | None, device: str | None, dtype: str, zoo_path: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Score the base and every adapter on K shots of every task.

    FILES are JSONL, one task each, named by the file's stem; a row is {"prompt", "completion"} or {"messages": [...]}. An
    interrupted run goes on where it stopped, and a finished one is not measured again.

    \b
    Examples:
      recycle profile tasks/*.jsonl --kshot 16 --out p16
      recycle profile tasks/*.jsonl --assign math-lora=gsm8k --generate
    """
    from recycler.build import profile as run
    from recycler.shots import Shots
    from recycler.terminal import bars, say

    if not files and not datasets:
        raise UsageError("A profile needs shots.", "", "Give JSONL files, one task each: recycle profile tasks/*.jsonl")
    shots = Shots.from_files(*files) if files else Shots({})
    for name in datasets:
        shots = Shots({**shots, **Shots.from_dataset(name)})
    stages: list[str] = []
    with bars() as progress:

        def noted(steps: int, what: str) -> Callable[..., None]:
            stages.append(what)
            return progress(steps, what)

        result = run(
            open_zoo(zoo_path), shots, kshot, seed=seed, out=out, base=base, adapters=names_of(adapters), assign=pairs_of(assign),
            generate=generate, force=force, progress=noted, device=device, dtype=dtype,
        )  # fmt: skip
    if as_json:
        print_json(result.to_json())
    else:
        from recycler.terminal import profile_table

        profile_table(result)
    say(f"kept as {result.folder}" if stages else f"measured before, kept as {result.folder}; --force measures again")


main.add_command(routers_command)
main.add_command(build_command)
main.add_command(bench_command)


@main.command()
@click.option("--router", "router_name", required=True, help="A router's folder, or its name in the zoo.")
@click.option("--out", required=True, type=click.Path(), help="The model's folder; must be new or empty.")
@click.option("--max-rank", type=click.IntRange(min=1), help="Cut adapters of a higher rank to this one; says what that loses.")
@click.option("--license-allow", metavar="A,B", help="Comma-separated licences; any other is an error (exit code 3).")
@click.option("--strict", is_flag=True, help="Missing licences, unrecognised ones and conflicts are errors too.")
@click.option("--force", is_flag=True, help="Replace a composed model that is there.")
@with_base
@in_zoo
def compose(
    router_name: str, out: str, max_rank: int | None, license_allow: str | None, strict: bool, force: bool, base: str | None,
    zoo_path: str | None,
) -> None:  # fmt: skip
    """Put adapters and router together into one directory.

    \b
    Examples:
      recycle compose --router gates/ --out model/
      recycle compose --router gates/ --out small/ --max-rank 8
      recycle compose --router gates/ --out free/ --license-allow apache-2.0,mit --strict
    """
    from recycler.composition import compose as run
    from recycler.terminal import say
    from recycler.zoo.licences import roll_up

    model = run(
        open_zoo(zoo_path), router_name, out, base=base, force=force, max_rank=max_rank,
        license_allow=None if license_allow is None else license_allow.split(","), strict=strict,
    )  # fmt: skip
    for warning in model.warnings:
        say(f"warning: {warning}")
    for name, cut in model.truncated.items():
        say(cut.line(name))
    say(f"{len(model.names)} adapters on {len(model.sites)} sites, {model.extra_bytes / 1e6:.1f} MB beside the base")
    say(f"licences: {roll_up({adapter.name: adapter.licence for adapter in model.adapters}).verdict}")
    click.echo(out)


@main.command()
@click.argument("model_path", metavar="MODEL")
@click.option("--input", "input_file", type=click.Path(), help="JSONL; each row has a prompt, or messages.")
@click.option(
    "--output",
    "output_file",
    type=click.Path(),
    help='JSONL; each row as it came, plus "generated". By default stdout.',
)
@click.option("-p", "--prompt", "prompts", multiple=True, help="A prompt; may be repeated: then JSONL comes out.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--only", "only_adapter", metavar="ADAPTER", help="Use this adapter alone; `base` for none.")
@click.option("--explain", is_flag=True, help="Add \"routing\" to each row: the adapters' shares, and the router's reason.")
@click.option("--recruit", is_flag=True, help="A `skills` router's recruits answer one by one, and their answers become one.")
@click.option(
    "--resident", metavar="SIZE", help="Memory for adapters, 2GB say: they stay on disk and are read as they are wanted."
)
@click.option("--force", is_flag=True, help="Replace the output file.")
@with_base
@on_device
def run(
    model_path: str, input_file: str | None, output_file: str | None, prompts: tuple[str, ...], max_new_tokens: int, batch_size: int,
    only_adapter: str | None, explain: bool, recruit: bool, resident: str | None, force: bool, base: str | None, device: str | None,
    dtype: str,
) -> None:  # fmt: skip
    """Answer prompts with a composed model, greedily.

    One -p prints its answer and nothing else. Several, and any with --explain or --recruit, print JSONL, {"prompt", "generated"}
    and what was asked for, in their order.

    \b
    Examples:
      recycle run model/ --input prompts.jsonl --output answers.jsonl
      recycle run model/ -p "What is 2 + 2?"
      recycle run model/ -p "What is 2 + 2?" --explain
    """
    from recycler.composition import load
    from recycler.run import answer_file, answered_prompts
    from recycler.terminal import bars, say

    if bool(input_file) == bool(prompts):
        raise UsageError(
            "One of --input and -p is needed, and not both.",
            "",
            "recycle run MODEL --input FILE.jsonl, or -p TEXT",
        )
    if output_file and prompts:
        raise UsageError("--output goes with --input.", "Answers to -p are printed.", "Leave --output out.")
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "only": only_adapter,
        "explain": explain,
        "recruit": recruit,
    }

    shelf: Any = None

    def loaded() -> Any:
        nonlocal shelf
        model = load(model_path, base=base, resident=resident, device=device, dtype=dtype)
        for warning in model.warnings:
            say(f"warning: {warning}")
        shelf = model.engine.shelf
        return model

    with bars() as progress:
        if input_file:
            lines = answer_file(loaded, Path(input_file), Path(output_file) if output_file else None, force=force,
                                progress=progress, **settings)  # fmt: skip
            text = "" if output_file else "".join(lines)
        else:
            rows = answered_prompts(loaded(), prompts, progress=progress, **settings)
            plain = len(rows) == 1 and not (explain or recruit)
            text = rows[0]["generated"] + "\n" if plain else "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    if shelf is not None:
        say(str(shelf))
    click.echo(text, nl=False)


@main.command(name="eval")
@click.argument("model_path", metavar="MODEL")
@click.argument("files", nargs=-1, required=True)
@click.option(
    "--router",
    "others",
    multiple=True,
    metavar="DIR",
    help="Another router over the same adapters, a folder or a name in the zoo; may be repeated.",
)
@click.option("--rows", type=click.IntRange(min=1), help="At most this many rows of each task, from the top.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="By default what the reference needs, and a little more.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--assign", multiple=True, metavar="ADAPTER=TASK", help="Which adapter is a task's own, for the oracle.")
@click.option("--answers", type=click.Path(), help="A folder for everybody's answers, as JSONL; new or empty.")
@click.option("--force", is_flag=True, help="Write answers into a folder that is not empty.")
@with_base
@on_device
@in_zoo
@as_json
def evaluate(
    model_path: str, files: tuple[str, ...], others: tuple[str, ...], rows: int | None, max_new_tokens: int | None, batch_size: int,
    assign: tuple[str, ...], answers: str | None, force: bool, base: str | None, device: str | None, dtype: str,
    zoo_path: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Set a model beside base, best single adapter, uniform average and oracle.

    Ends with a verdict, also when routing does not help.

    \b
    Example:
      recycle eval model/ tasks/*.jsonl --router other-gates/
    """
    from recycler.build import router_folder
    from recycler.composition import load
    from recycler.evaluation import evaluate as run
    from recycler.routers.discovery import load_router
    from recycler.run import check_answers, write_answers
    from recycler.shots import Shots
    from recycler.terminal import bars, evaluation_table, say

    if answers:
        check_answers(Path(answers), force)
    shots = Shots.from_files(*files)
    if rows:
        shots = Shots({task: some[:rows] for task, some in shots.items()})
    folders = [router_folder(open_zoo(zoo_path), name).resolve() for name in others]
    routers = {folder.name: load_router(folder) for folder in folders}
    model = load(model_path, base=base, device=device, dtype=dtype)
    for warning in model.warnings:
        say(f"warning: {warning}")
    assert model.router is not None
    routers = {model.router.method(): model.router, **routers}
    if len(routers) <= len(others):
        raise UsageError("Two routers have one name.", "They are told apart by their folders' names.", "Rename a folder.")
    owner = {task: name for name, tasks in pairs_of(assign).items() for task in tasks}
    with bars() as progress:
        result = run(
            model,
            shots,
            routers=routers,
            owner=owner,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
        )
    if answers:
        write_answers(result, shots, Path(answers), force=force)
    if as_json:
        print_json(result.to_json())
    else:
        evaluation_table(result)


if __name__ == "__main__":
    sys.exit(main())
