"""The command line: `recycle`. Verbs call the library; this file only reads options, shows progress, and prints.

Data goes to stdout, chatter and progress to stderr. Exit codes: 0 ok, 1 unexpected, 2 usage, 3 input rejected, 4 security,
5 Hub or offline, 6 partial success. Nothing heavy is imported until a verb runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from recycler.zoo.errors import RecycleError, UsageError

if TYPE_CHECKING:
    from recycler.zoo.store import Zoo


_INTERRUPTED = {
    "profile": "interrupted; the same command goes on where it stopped",
    "fetch": "interrupted; the adapters that were done are in the zoo, and the same command goes on with the others",
}


class Group(click.Group):
    """Turns the library's errors into a message and an exit code, in one place; and keeps commands in the order of the work."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RecycleError as error:
            from recycler.terminal import complain

            complain(error)
            ctx.exit(error.exit_code)
        except Exception as error:
            refused = _of_the_system(error)
            if refused is None:
                raise
            from recycler.terminal import complain

            complain(refused)
            ctx.exit(refused.exit_code)
        except KeyboardInterrupt:
            from recycler.terminal import say

            say(_INTERRUPTED.get(ctx.invoked_subcommand or "", "interrupted; nothing unfinished was kept"))
            ctx.exit(130)


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


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="recycler", prog_name="recycle")
def main() -> None:
    """Turn a pile of LoRA adapters into one routed model, and say honestly when it helps.

    \b
    recycle fetch org/math-lora org/law-lora --base org/base
    recycle profile tasks/*.jsonl --kshot 16 --out p16
    recycle build-router ridge --profile p16 --out gates/
    recycle compose --router gates/ --out model/
    recycle eval model/ tasks/*.jsonl
    recycle run model/ --input prompts.jsonl --output answers.jsonl
    """


@main.command()
@click.argument("sources", nargs=-1, required=True)
@click.option("--as", "names", multiple=True, metavar="NAME", help="A name for each source, in order.")
@with_base
@click.option("--dry-run", is_flag=True, help="Say what would come, and keep nothing.")
@click.option(
    "--max-size", type=click.IntRange(min=1), metavar="MB", help="The most that one adapter may hold; by default 2147."
)
@in_zoo
@as_json
def fetch(
    sources: tuple[str, ...],
    names: tuple[str, ...],
    base: str | None,
    dry_run: bool,
    max_size: int | None,
    zoo_path: str | None,
    as_json: bool,
) -> None:
    """Bring adapters into the zoo, vetted and pinned.

    SOURCES are Hub ids (org/name[@revision][/subfolder]), folders, or folders of adapter folders. One bad adapter among many
    does not stop the others (exit code 6, and a summary).

    \b
    Examples:
      recycle fetch org/math-lora org/law-lora@v2 --base org/base
      recycle fetch ./my-lora --as my-math --base ./base-folder
      recycle fetch ./adapters --base ./base-folder --dry-run
    """
    from recycler.fetching import fetch as run
    from recycler.terminal import say

    def event(stage: str, name: str, text: str) -> None:
        if stage in ("kept", "checked") and not as_json:  # what failed is said at the end
            say(text)

    limit: dict[str, Any] = {} if max_size is None else {"max_bytes": max_size * 10**6}
    report = run(list(sources), base, _zoo(zoo_path), names=list(names) or None, dry_run=dry_run, on_event=event, **limit)
    if as_json:
        _print_json(report.to_json())
    else:
        for one in report.fetched:
            click.echo(one.name)
    report.raise_for_failures()


@main.group(name="zoo", cls=Group)
def zoo_group() -> None:
    """Look at the zoo, and tidy it."""


@zoo_group.command(name="list")
@in_zoo
@as_json
def zoo_list(zoo_path: str | None, as_json: bool) -> None:
    """List the adapters."""
    from recycler.terminal import table

    zoo = _zoo(zoo_path)
    entries = zoo.entries
    if as_json:
        _print_json(
            {
                "schema_version": 1,
                "path": str(zoo.path),
                "adapters": {n: e.to_json() for n, e in entries.items()},
            }
        )
        return
    rows = [
        [
            n,
            ", ".join(map(str, e.ranks)),
            str(e.sites),
            ", ".join(e.kinds),
            e.base or "?",
            e.licence or "?",
            e.source,
        ]
        for n, e in entries.items()
    ]
    table(["name", "rank", "sites", "kind", "base", "licence", "source"], rows)


@zoo_group.command(name="show")
@click.argument("name")
@in_zoo
@as_json
def zoo_show(name: str, zoo_path: str | None, as_json: bool) -> None:
    """Everything that is known of one adapter."""
    zoo = _zoo(zoo_path)
    entry = zoo.entry(name)
    if as_json:
        _print_json({"schema_version": 1, "name": name, "folder": str(zoo.folder(name)), **entry.to_json()})
        return
    from recycler.terminal import table

    facts = {"folder": str(zoo.folder(name)), **entry.to_json()}
    facts["files"] = ", ".join(f"{file} ({fact['size']} bytes)" for file, fact in entry.files.items())
    table(["", name], [[key, _text(value)] for key, value in facts.items()])


@zoo_group.command(name="remove")
@click.argument("names", nargs=-1, required=True)
@in_zoo
def zoo_remove(names: tuple[str, ...], zoo_path: str | None) -> None:
    """Remove adapters; where one is unknown, none."""
    from recycler.terminal import say

    _zoo(zoo_path).remove(names)
    say(f"removed {', '.join(names)}")


@zoo_group.command(name="verify")
@click.argument("names", nargs=-1)
@in_zoo
@as_json
def zoo_verify(names: tuple[str, ...], zoo_path: str | None, as_json: bool) -> None:
    """Hash every file again and compare with zoo.json; exit code 3 where something differs."""
    from recycler.terminal import say
    from recycler.zoo.errors import InputError

    zoo = _zoo(zoo_path)
    problems = zoo.verify(names or None)
    if as_json:
        _print_json({"schema_version": 1, "problems": [vars(p) for p in problems]})
    else:
        for problem in problems:
            click.echo(str(problem))
    if problems:
        raise InputError(f"{len(problems)} files differ from zoo.json.", "", "Remove those adapters and fetch them again.")
    say(f"{len(names or zoo)} adapters are as they were fetched")


@zoo_group.command(name="path")
@click.argument("name", required=False)
@in_zoo
def zoo_path_command(name: str | None, zoo_path: str | None) -> None:
    """Print the folder of the zoo, or of one adapter (PEFT loads from there)."""
    zoo = _zoo(zoo_path)
    click.echo(str(zoo.folder(name) if name else zoo.path))


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
            _zoo(zoo_path), shots, kshot, seed=seed, out=out, base=base, adapters=_names(adapters), assign=_pairs(assign),
            generate=generate, force=force, progress=noted, device=device, dtype=dtype,
        )  # fmt: skip
    if as_json:
        _print_json(result.to_json())
    else:
        from recycler.terminal import profile_table

        profile_table(result)
    say(f"kept as {result.folder}" if stages else f"measured before, kept as {result.folder}; --force measures again")


@main.command()
@as_json
def routers(as_json: bool) -> None:
    """List the routing methods: what each needs, its options, its paper."""
    from recycler.routers.base import methods, options
    from recycler.terminal import table

    found = methods()
    if as_json:
        rows = {
            name: {
                "needs": sorted(cls.needs),
                "paper": cls.paper,
                "options": {k: v for k, (_, v) in options(cls).items()},
            }
            for name, cls in found.items()
        }
        _print_json({"schema_version": 1, "routers": rows})
        return
    table(
        ["method", "needs", "options", "paper"],
        [
            [
                name,
                ", ".join(sorted(cls.needs)) or "nothing",
                " ".join(f"{k}={v}" for k, (_, v) in options(cls).items()),
                cls.paper,
            ]
            for name, cls in found.items()
        ],
    )


@main.command(name="build-router")
@click.argument("method")
@click.option("--profile", "profile_name", help="A profile's name in the zoo, or its folder.")
@click.option(
    "-o",
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the method; see `recycle routers`.",
)
@click.option(
    "--out",
    type=click.Path(),
    help="Where to save it; by default a folder of the zoo named after method and profile.",
)
@click.option("--adapters", help="Comma-separated names; by default the profile's, or the whole zoo.")
@click.option("--assign", multiple=True, metavar="ADAPTER=TASK", help="Say by hand which task is an adapter's own.")
@click.option("--force", is_flag=True, help="Replace a router that is there.")
@with_base
@on_device
@in_zoo
@as_json
def build_router(
    method: str, profile_name: str | None, options: tuple[str, ...], out: str | None, adapters: str | None, assign: tuple[str, ...],
    force: bool, base: str | None, device: str | None, dtype: str, zoo_path: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Build a light router; base and adapters stay frozen.

    \b
    Examples:
      recycle build-router arrow                      # needs no examples at all
      recycle build-router ridge --profile p16 --out gates/
      recycle build-router phatgoose --profile p16 -o steps=100 -o top_k=1
    """
    from recycler.build import build_router as run
    from recycler.routers.base import find, make_config
    from recycler.terminal import bars, say

    zoo = _zoo(zoo_path)
    folder = Path(out) if out else zoo.routers_dir / "-".join([method, *([Path(profile_name).name] if profile_name else [])])
    given = {key: values[-1] for key, values in _pairs(options, "-o", "KEY=VALUE").items()}
    flags = sorted({"profile", "zoo", "base", "adapters", "out", "assign", "force", "device", "dtype"} & set(given))
    if flags:
        raise UsageError(f"{', '.join(flags)} is not an option of a method.", "", f"Use --{flags[0]}.")
    make_config(find(method), given)  # before `run` takes a key such as `progress` for a keyword of its own
    with bars() as progress:
        router = run(
            method, profile_name, zoo=zoo, base=base, adapters=_names(adapters), out=folder, assign=_pairs(assign), force=force,
            progress=progress, loading={"device": device, "dtype": dtype}, **given,
        )  # fmt: skip
    if as_json:
        _print_json({"schema_version": 1, "router": str(folder), "method": method, "adapters": list(router.adapters),
                     "report": router.report})  # fmt: skip
    else:
        for key, value in router.report.items():
            say(f"{key}: {_text(value)}")
        click.echo(str(folder))


@main.command()
@click.option("--router", "router_name", required=True, help="A router's folder, or its name in the zoo.")
@click.option("--out", required=True, type=click.Path(), help="The model's folder; must be new or empty.")
@click.option("--force", is_flag=True, help="Replace a composed model that is there.")
@with_base
@in_zoo
def compose(router_name: str, out: str, force: bool, base: str | None, zoo_path: str | None) -> None:
    """Put adapters and router together into one directory.

    \b
    Example:
      recycle compose --router gates/ --out model/
    """
    from recycler.composition import compose as run
    from recycler.terminal import say

    model = run(_zoo(zoo_path), router_name, out, base=base, force=force)
    for warning in model.warnings:
        say(f"warning: {warning}")
    say(f"{len(model.names)} adapters on {len(model.sites)} sites, {model.extra_bytes / 1e6:.1f} MB beside the base")
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
@click.option("--force", is_flag=True, help="Replace the output file.")
@with_base
@on_device
def run(
    model_path: str, input_file: str | None, output_file: str | None, prompts: tuple[str, ...], max_new_tokens: int, batch_size: int,
    only_adapter: str | None, force: bool, base: str | None, device: str | None, dtype: str,
) -> None:  # fmt: skip
    """Answer prompts with a composed model, greedily.

    One -p prints its answer and nothing else. Several print JSONL, {"prompt", "generated"} each, in their order.

    \b
    Examples:
      recycle run model/ --input prompts.jsonl --output answers.jsonl
      recycle run model/ -p "What is 2 + 2?"
    """
    from recycler.composition import load
    from recycler.run import answer_file, answer_prompts
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
    }

    def loaded() -> Any:
        model = load(model_path, base=base, device=device, dtype=dtype)
        for warning in model.warnings:
            say(f"warning: {warning}")
        return model

    with bars() as progress:
        if input_file:
            lines = answer_file(loaded, Path(input_file), Path(output_file) if output_file else None, force=force,
                                progress=progress, **settings)  # fmt: skip
            text = "" if output_file else "".join(lines)
        else:
            answers = answer_prompts(loaded(), prompts, progress=progress, **settings)
            rows = [{"prompt": prompt, "generated": answer} for prompt, answer in zip(prompts, answers, strict=True)]
            text = answers[0] + "\n" if len(rows) == 1 else "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
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
    from recycler.routers.base import Router
    from recycler.run import check_answers, write_answers
    from recycler.shots import Shots
    from recycler.terminal import bars, evaluation_table, say

    if answers:
        check_answers(Path(answers), force)
    shots = Shots.from_files(*files)
    if rows:
        shots = Shots({task: some[:rows] for task, some in shots.items()})
    folders = [router_folder(_zoo(zoo_path), name).resolve() for name in others]
    routers = {folder.name: Router.load(folder) for folder in folders}
    model = load(model_path, base=base, device=device, dtype=dtype)
    for warning in model.warnings:
        say(f"warning: {warning}")
    assert model.router is not None
    routers = {model.router.method(): model.router, **routers}
    if len(routers) <= len(others):
        raise UsageError("Two routers have one name.", "They are told apart by their folders' names.", "Rename a folder.")
    owner = {task: name for name, tasks in _pairs(assign).items() for task in tasks}
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
        _print_json(result.to_json())
    else:
        evaluation_table(result)


def _zoo(path: str | None) -> Zoo:
    from recycler.zoo.store import Zoo

    return Zoo(path)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _pairs(items: tuple[str, ...], flag: str = "--assign", form: str = "ADAPTER=TASK") -> dict[str, Any]:
    """``a=b`` options as a → [b, ...]."""
    pairs: dict[str, list[str]] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not (equals and key.strip() and value.strip()):
            raise UsageError(f"{flag} {item!r} is not {form}.", "", f"Write {flag} {form}.")
        pairs.setdefault(key.strip(), []).append(value.strip())
    return pairs


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    return "–" if value is None else str(value)


def _of_the_system(error: Exception) -> RecycleError | None:
    """A full disk, or a file that may not be read or written, as an error of ours; None for anything else."""
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):  # that one is click's business
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    elif type(error).__name__ == "SafetensorError" and "I/O error" in str(error):  # its own, also for a full disk
        what = str(error)
    else:
        return None
    return RecycleError(f"{what}.", "The system refused it.", "Check permissions and free space.")


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
