"""`recycle run`: answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from recycler.options import on_device, with_base
from recycler.zoo.errors import UsageError


@click.command(name="run")
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
def run_command(
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
        model = load(model_path, base=base, resident=resident, device=device, dtype=dtype, progress=progress)
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
