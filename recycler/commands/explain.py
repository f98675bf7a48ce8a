"""`recycle explain`: who answered a prompt, token by token and layer by layer, and what each adapter was worth to the answer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from recycler.options import as_json, as_text, on_device, print_json, with_base
from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from recycler.seeing.explaining import Explanation
    from recycler.seeing.strips import Slots

_ROWS = 12  # adapters in a terminal's table
_BLOCKS = "·▁▂▃▄▅▆▇█"
_COLUMNS = 32  # of a row of blocks


@click.command(name="explain")
@click.argument("model_path", metavar="MODEL")
@click.option("-p", "--prompt", "prompts", multiple=True, required=True, help="A prompt; may be repeated.")
@click.option(
    "--answer",
    "answers",
    multiple=True,
    metavar="TEXT",
    help="Explain this answer, as the model would write it (often after a space), instead of its own; one for each -p, or "
    "several for one.",
)
@click.option("--task", metavar="NAME", help="The prompts' task, for a router that wants to be told (`oracle`).")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--html", "html_file", type=click.Path(), metavar="FILE", help="Also write a page that opens from disk.")
@click.option("--force", is_flag=True, help="Replace that page.")
@with_base
@on_device
@as_json
def explain_command(
    model_path: str, prompts: tuple[str, ...], answers: tuple[str, ...], task: str | None, max_new_tokens: int, html_file: str | None,
    force: bool, base: str | None, device: str | None, dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Show which adapters answered, and what each was worth to the answer.

    Every token has the colour of the adapter that led in reading it (the prompt's) or writing it (the answer's); then come each
    adapter's shares, its effect, and its share by layer. The effect is how much of the answer's log-probability goes when that adapter's weights are set
    to 0 and everybody else's stay as they were (they are not renormalised). Piped, tables are tab-separated.

    \b
    Examples:
      recycle explain model/ -p "What is 2 + 2?"
      recycle explain model/ -p "What is 2 + 2?" --answer " 5" --json
      recycle explain model/ -p "2 + 2" -p "Ode to a mouse" --html why.html
    """
    from recycler.loading import load
    from recycler.pictures.canvas import check_free
    from recycler.seeing.explain_page import write_page
    from recycler.seeing.explaining import SCHEMA_VERSION, check_prompt, explain
    from recycler.terminal import bars, say

    if answers and len(prompts) == 1:
        prompts = prompts * len(answers)
    if answers and len(answers) != len(prompts):
        raise UsageError(
            f"-p was given {len(prompts)} times, and --answer {len(answers)}.", "", "Give each -p its --answer, in their order."
        )
    for prompt, answer in zip(prompts, answers or [None] * len(prompts), strict=True):
        check_prompt(prompt, answer)
    if html_file:
        check_free(Path(html_file), force, option="--html")
    model = load(model_path, base=base, device=device, dtype=dtype)
    for warning in model.warnings:
        say(f"warning: {warning}")
    found: list[Explanation] = []
    with bars() as progress:
        step = progress(len(prompts), "explaining")
        for prompt, answer in zip(prompts, answers or [None] * len(prompts), strict=True):
            found.append(explain(model, prompt, answer, max_new_tokens=max_new_tokens, task=task, progress=progress))
            step()
    if html_file:
        say(f"page: {write_page(found, Path(html_file), force=force)}")
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, "explanations": [one.to_json() for one in found]})
        return
    from recycler.seeing.strips import slots

    colours = slots(found)
    for one in found:
        _show(one, colours)
    say("effect: log p(answer) minus log p(answer) without that adapter, in nats; above 0 it helped")


def _show(one: Explanation, colours: Slots) -> None:
    from rich.console import Console

    from recycler.seeing.strips import legend_text, strip_text
    from recycler.terminal import say

    console = Console(highlight=False)
    if console.color_system is not None and not console.no_color:  # else a strip would say nothing
        few = console.color_system == "standard"
        console.print(strip_text(one, colours, few=few), legend_text(one, colours, few=few), sep="\n\n")
        console.print()
    else:
        _tokens(one)
        _layers(one)
    _adapters(one)
    if one.why is not None:
        say(f"{one.method}: {' '.join(as_text(one.why).split())}")
    click.echo()


def _adapters(one: Explanation) -> None:
    from recycler.seeing.strips import signed
    from recycler.terminal import say, table

    drawn = sys.stdout.isatty()
    effect, asked, answered = one.effect, one.share_of(0, one.begins), one.share_of(one.begins, len(one.tokens))
    shown = one.chief(_ROWS) if drawn else one.fired
    header = ["adapter", "prompt", "answer", "effect", *(["by layer, first to last"] if drawn else [])]
    rows = [
        [name, f"{asked[name]:.1%}", f"{answered[name]:.1%}", signed(effect[name]), *([_by_layer(one, name)] if drawn else [])]
        for name in shown
    ]
    routed, base = float(one.routed_A.sum()), float(one.base_A.sum())
    rows.append(["all of them", "", "", signed(routed - base), *([""] if drawn else [])])
    table(header, rows, right=1)
    if len(shown) < len(one.fired):
        say(f"and {len(one.fired) - len(shown)} more; all of them: --json")
    say(f"log p(answer) {routed:.2f}, by the bare base {base:.2f}")


def _by_layer(one: Explanation, name: str) -> str:
    return blocks(one.share_LE[:, one.adapters.index(name)].tolist())


def blocks(column: Sequence[float], most: int = _COLUMNS) -> str:
    """Shares by layer, a block each; neighbours share one where there are many layers."""
    each = -(-len(column) // most)
    means = [sum(part) / len(part) for part in (column[at : at + each] for at in range(0, len(column), each))]
    return "".join(_BLOCKS[min(8, round(8 * abs(mean)))] for mean in means)


def _tokens(one: Explanation) -> None:
    from recycler.seeing.strips import visible
    from recycler.terminal import table

    rows = []
    for i, token in enumerate(one.tokens):
        a = i - one.begins
        share_E = one.share_TE[i]
        owner = one.owner(i)
        told = (
            ["base", f"{one.base_share(i):.3f}"]
            if owner is None
            else [owner, f"{float(share_E[one.adapters.index(owner)]):.3f}"]
        )
        scores = [f"{float(one.routed_A[a]):.3f}", f"{float(one.base_A[a]):.3f}"] if a >= 0 else ["", ""]
        rows.append(["prompt" if a < 0 else "answer", visible(token), *told, *scores])
    table(["part", "token", "adapter", "share", "log p", "log p of the base"], rows)
    click.echo()


def _layers(one: Explanation) -> None:
    from recycler.terminal import table

    numbers = [one.adapters.index(name) for name in one.fired]
    rows = [[layer, *(f"{share:.3f}" for share in one.share_LE[i, numbers].tolist())] for i, layer in enumerate(one.layers)]
    table(["layer", *one.fired], rows)
    click.echo()
