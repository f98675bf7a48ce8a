"""`recycle plot` and `recycle report`: pictures of a zoo and its routing, and one page of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from recycler.commands.bench import Lists, shots_in
from recycler.options import Group, in_zoo, on_device, open_zoo, with_base
from recycler.zoo.errors import UsageError


def _kept(function: Callable[..., Any]) -> Callable[..., Any]:
    function = click.option("--force", is_flag=True, help="Replace the picture and its CSV.")(function)
    help_text = "The picture, .png or .svg; its numbers go beside it, as .csv."
    return click.option("--out", required=True, type=click.Path(), metavar="FILE", help=help_text)(function)


def _keep(module: Any, data: Any, out: str, force: bool) -> None:
    from recycler.pictures import canvas
    from recycler.terminal import say

    picture, beside = canvas.keep(module.draw(data), module.table(data), out, force=force)
    say(f"{module.describe(data)} Numbers: {beside}")
    click.echo(str(picture))


@click.group(name="plot", cls=Group)
def plot_group() -> None:
    """Draw a picture, with the CSV behind it beside it."""


@plot_group.command(name="tasks")
@click.option("--profile", "profile_name", required=True, help="A profile's name in the zoo, or its folder.")
@click.option("--score", type=click.Choice(["nll", "exact"]), help="By default exact match where it was measured, else NLL.")
@_kept
@in_zoo
def plot_tasks(profile_name: str, score: str | None, out: str, force: bool, zoo_path: str | None) -> None:
    """Which adapter helps on which task. Gains over the base, from a profile.

    \b
    Example:
      recycle plot tasks --profile p16 --out tasks.png
    """
    from recycler.build import profile_folder
    from recycler.pictures import canvas, tasks
    from recycler.profiles import Profile

    canvas.check_out(out, force)
    profile = Profile.load(profile_folder(open_zoo(zoo_path), profile_name))
    _keep(tasks, tasks.TaskScores.of(profile, score), out, force)


@plot_group.command(name="routing")
@click.argument("model_path", metavar="MODEL")
@click.argument("files", nargs=-1)
@click.option("-p", "--prompt", "prompts", multiple=True, help="A prompt; may be repeated.")
@click.option("--rows", type=click.IntRange(min=1), default=4, show_default=True, help="Rows of each file, from the top.")
@_kept
@with_base
@on_device
def plot_routing(
    model_path: str, files: tuple[str, ...], prompts: tuple[str, ...], rows: int, out: str, force: bool, base: str | None,
    device: str | None, dtype: str,
) -> None:  # fmt: skip
    """Which adapter works at which layer. Mean weights on prompts, those of -p or of JSONL FILES.

    \b
    Examples:
      recycle plot routing model/ -p "What is 2 + 2?" --out routing.png
      recycle plot routing model/ tasks/*.jsonl --rows 2 --out routing.svg
    """
    from recycler.loading import load
    from recycler.pictures import canvas, routing
    from recycler.seeing.explaining import check_prompt
    from recycler.shots import Shot, Shots

    if bool(prompts) == bool(files):
        raise UsageError(
            "Prompts are needed, from -p or from files, and not from both.", "", "recycle plot routing MODEL -p TEXT"
        )
    for prompt in prompts:
        check_prompt(prompt)
    canvas.check_out(out, force)
    shown: list[tuple[str | None, Shot]] = [(None, Shot(prompt, "")) for prompt in prompts]
    if files:
        shown = [(task, shot) for task, some in Shots.from_files(*files).items() for shot in some[:rows]]
    model = load(model_path, base=base, device=device, dtype=dtype)
    found = routing.LayerWeights.of(model, [shot for _, shot in shown], tasks=[task for task, _ in shown])
    _keep(routing, found, out, force)


@plot_group.command(name="tokens")
@click.argument("model_path", metavar="MODEL")
@click.option("-p", "--prompt", required=True, help="The prompt.")
@click.option("--answer", help="Show this answer to it, in place of the model's own.")
@click.option("--task", help="The prompt's task, for routers that want to be told (`oracle`).")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@_kept
@with_base
@on_device
def plot_tokens(
    model_path: str, prompt: str, answer: str | None, task: str | None, max_new_tokens: int, out: str, force: bool, base: str | None,
    device: str | None, dtype: str,
) -> None:  # fmt: skip
    """Who answered, token by token. Prompt and answer in the colours of adapters, as `recycle explain` shows them.

    \b
    Example:
      recycle plot tokens model/ -p "What is 2 + 2?" --out tokens.svg
    """
    from recycler.loading import load
    from recycler.pictures import canvas, tokens
    from recycler.seeing.explaining import check_prompt, explain
    from recycler.terminal import bars

    check_prompt(prompt, answer)
    canvas.check_out(out, force)
    model = load(model_path, base=base, device=device, dtype=dtype)
    with bars() as progress:
        found = explain(model, prompt, answer, max_new_tokens=max_new_tokens, task=task, progress=progress)
    _keep(tokens, found, out, force)


@plot_group.command(name="similarity")
@click.argument("names", nargs=-1)
@click.option("--model", "model_path", metavar="MODEL", help="The adapters of a composed model, in place of the zoo's.")
@_kept
@in_zoo
def plot_similarity(names: tuple[str, ...], model_path: str | None, out: str, force: bool, zoo_path: str | None) -> None:
    """Which adapters are alike. Cosines of their updates and a dendrogram, for the whole zoo or NAMES.

    \b
    Examples:
      recycle plot similarity --out alike.png
      recycle plot similarity --model model/ --out alike.svg
    """
    from recycler.model_folder import read_manifest
    from recycler.pictures import canvas, similarity
    from recycler.sharing.pulling import find
    from recycler.terminal import bars
    from recycler.zoo import formats

    canvas.check_out(out, force)
    zoo = open_zoo(zoo_path)
    read: Callable[[str], Any] = zoo.__getitem__
    if model_path is not None:
        folder = find(model_path).folder
        held = [record["name"] for record in read_manifest(folder)["adapters"]]

        def read(name: str) -> Any:
            return formats.read(folder / "adapters" / name, name)[0]

    else:
        held = list(zoo)
    unknown = sorted(set(names) - set(held))
    if unknown:
        where = "zoo" if model_path is None else "model"
        raise UsageError(
            f"Not in the {where}: {', '.join(unknown)}.", "", "recycle zoo list shows the zoo's.", code="E_UNKNOWN"
        )
    chosen = list(dict.fromkeys(names)) or held
    if len(chosen) < 2:
        raise UsageError("There are no two adapters to compare.", "", "Fetch some: recycle fetch SOURCE...")
    with bars() as progress:
        found = similarity.Cosines.of(chosen, read, progress)
    _keep(similarity, found, out, force)


@plot_group.command(name="scores")
@click.argument("bench", metavar="BENCH")
@_kept
def plot_scores(bench: str, out: str, force: bool) -> None:
    """Who scores what, with intervals. From a folder of `bench-routers --out`, a model's after `eval --record`, or a file with what
    `eval --json` printed.

    \b
    Examples:
      recycle plot scores bench/ --out scores.svg
      recycle plot scores model/ --out scores.svg
    """
    from recycler.pictures import canvas, results, scores

    canvas.check_out(out, force)
    _keep(scores, results.read(bench), out, force)


@plot_group.command(name="cost")
@click.argument("bench", metavar="BENCH")
@_kept
def plot_cost(bench: str, out: str, force: bool) -> None:
    """Quality against cost. Exact match over time and over the size of gates, from the same results as `plot scores`.

    \b
    Example:
      recycle plot cost bench/ --out cost.png
    """
    from recycler.pictures import canvas, cost, results

    canvas.check_out(out, force)
    _keep(cost, results.read(bench), out, force)


@click.command(name="report", cls=Lists)
@click.argument("model", metavar="[MODEL]", required=False)
@click.option("--out", type=click.Path(), default="report.html", show_default=True, metavar="FILE", help="The page.")
@click.option("--profile", help="A profile's name in the zoo, or its folder; by default the one behind the model's router.")
@click.option("--bench", metavar="FOLDER", help="Results of bench-routers --out, or a file with what eval --json printed.")
@click.option("--tasks", multiple=True, metavar="FILE...", help="JSONL files, or a folder: one task each.")
@click.option("--rows", type=click.IntRange(min=1), help="At most this many rows of each task, from the top.")
@click.option("-p", "--prompt", "prompts", multiple=True, help="An example to show token by token; may be repeated.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), help="By default what the reference needs, and 32 where there is none."
)
@click.option("--force", is_flag=True, help="Replace the page.")
@with_base
@on_device
@in_zoo
def report_command(
    model: str | None, out: str, profile: str | None, bench: str | None, tasks: tuple[str, ...], rows: int | None,
    prompts: tuple[str, ...], max_new_tokens: int | None, force: bool, base: str | None, device: str | None, dtype: str,
    zoo_path: str | None,
) -> None:  # fmt: skip
    """Write one page about a model, a profile or a bench: results, pictures, examples token by token, licences.

    It opens from disk and loads nothing. Without --bench, a model is evaluated on --tasks. What there is no data for is left out, and
    the page says which command gives it.

    \b
    Examples:
      recycle report model/ --bench bench/ -p "What is 2 + 2?" --out report.html
      recycle report model/ --tasks tasks/*.jsonl --rows 20
      recycle report --profile p16 --out zoo.html
    """
    from recycler.seeing.reporting import report
    from recycler.terminal import bars

    with bars() as progress:
        path = report(
            model, out, profile=profile, bench=bench, tasks=shots_in(tasks) if tasks else None, rows=rows, prompts=prompts,
            max_new_tokens=max_new_tokens, zoo=open_zoo(zoo_path), base=base, force=force, progress=progress,
            loading={"device": device, "dtype": dtype},
        )  # fmt: skip
    click.echo(str(path))
