"""`recycle eval`: is routing worth it? On rows of one's own, or on lm-evaluation-harness's tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from recycler.options import as_json, in_zoo, names_of, on_device, open_zoo, pairs_of, print_json, with_base
from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from recycler.routed import RoutedModel
    from recycler.routers.base import Router


@click.command(name="eval")
@click.argument("model_path", metavar="MODEL")
@click.argument("files", nargs=-1)
@click.option(
    "--router",
    "others",
    multiple=True,
    metavar="DIR",
    help="Another router over the same adapters, a folder or a name in the zoo; may be repeated.",
)
@click.option(
    "--rows", "--limit", "rows", type=click.IntRange(min=1), help="At most this many rows of each task, from the top."
)
@click.option("--lm-eval", metavar="A,B", help="Tasks of lm-evaluation-harness instead of FILES; needs recycler[lm-eval].")
@click.option("--lm-eval-path", metavar="DIR", type=click.Path(), help="A folder with task files of your own, for --lm-eval.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="By default what the reference needs, and a little more.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--assign", multiple=True, metavar="ADAPTER=TASK", help="Which adapter is a task's own, for the oracle.")
@click.option("--answers", type=click.Path(), help="A folder for everybody's answers, as JSONL; new or empty.")
@click.option("--record", is_flag=True, help="Keep the result with the model: evaluation.json, and the scores on its card.")
@click.option("--force", is_flag=True, help="Write answers into a folder that is not empty.")
@with_base
@on_device
@in_zoo
@as_json
def eval_command(
    model_path: str, files: tuple[str, ...], others: tuple[str, ...], rows: int | None, lm_eval: str | None,
    lm_eval_path: str | None, max_new_tokens: int | None, batch_size: int, assign: tuple[str, ...], answers: str | None, record: bool,
    force: bool, base: str | None, device: str | None, dtype: str, zoo_path: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Set a model beside base, best single adapter, uniform average and oracle.

    Ends with a verdict, also when routing does not help. With --lm-eval the rows and scores are those of lm-evaluation-harness's
    tasks, which know no oracle; the verdict reads each task's first metric, marked with *.

    \b
    Examples:
      recycle eval model/ tasks/*.jsonl --router other-gates/
      recycle eval model/ tasks/*.jsonl --record
      recycle eval model/ --lm-eval arc_easy,hellaswag --limit 100
      recycle eval model/ --lm-eval my_task --lm-eval-path my-tasks/
    """
    if bool(files) == (lm_eval is not None):
        raise UsageError(
            "One of FILES and --lm-eval is needed, and not both.",
            "",
            "recycle eval MODEL tasks/*.jsonl, or recycle eval MODEL --lm-eval TASKS",
        )
    if lm_eval is not None:
        given = {"--max-new-tokens": max_new_tokens, "--assign": assign, "--answers": answers, "--record": record}
        unused = [flag for flag, value in given.items() if value]
        if unused:
            raise UsageError(
                f"{', '.join(unused)} does not go with --lm-eval.", "Its tasks say that themselves.", "Leave it out."
            )
        from recycler.evaluating.harness import harness, harness_table, require_lm_eval
        from recycler.terminal import bars

        require_lm_eval()
        model, routers = _loaded(model_path, others, zoo_path, base, device, dtype)
        with bars() as progress:
            found = harness(
                model, names_of(lm_eval) or [], routers=routers, path=lm_eval_path, rows=rows, batch_size=batch_size,
                progress=progress,
            )  # fmt: skip
        if as_json:
            print_json(found.to_json())
        else:
            harness_table(found)
        return
    if lm_eval_path is not None:
        raise UsageError("--lm-eval-path goes with --lm-eval.", "", "Name the tasks: --lm-eval TASKS")
    from recycler.evaluating.evaluation import evaluate
    from recycler.model_folder import MANIFEST
    from recycler.run import check_answers, write_answers
    from recycler.sharing.card import record_evaluation
    from recycler.shots import Shots
    from recycler.terminal import bars, evaluation_table

    if answers:
        check_answers(Path(answers), force)
    if record and not (Path(model_path) / MANIFEST).is_file():
        raise UsageError(
            f"--record keeps the result in the model's folder, and {model_path} is none.",
            "",
            "Compose it with --out, or leave --record out.",
        )
    shots = Shots.from_files(*files)
    if rows:
        shots = Shots({task: some[:rows] for task, some in shots.items()})
    model, routers = _loaded(model_path, others, zoo_path, base, device, dtype)
    owner = {task: name for name, tasks in pairs_of(assign).items() for task in tasks}
    with bars() as progress:
        result = evaluate(
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
    if record:
        record_evaluation(model_path, result)
    if as_json:
        print_json(result.to_json())
    else:
        evaluation_table(result)


def _loaded(
    model_path: str, others: tuple[str, ...], zoo_path: str | None, base: str | None, device: str | None, dtype: str
) -> tuple[RoutedModel, dict[str, Router]]:
    """The model, and label → router: its own first, then others by their folders' names."""
    from recycler.build import router_folder
    from recycler.composition import load
    from recycler.routers.discovery import load_router
    from recycler.terminal import say

    folders = [router_folder(open_zoo(zoo_path), name).resolve() for name in others]
    routers = {folder.name: load_router(folder) for folder in folders}
    model = load(model_path, base=base, device=device, dtype=dtype)
    for warning in model.warnings:
        say(f"warning: {warning}")
    assert model.router is not None
    routers = {model.router.method(): model.router, **routers}
    if len(routers) <= len(others):
        raise UsageError("Two routers have one name.", "They are told apart by their folders' names.", "Rename a folder.")
    return model, routers
