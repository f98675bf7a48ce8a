"""`recycle export` and `recycle proxy`: a routed model for other software, and a router in front of a server."""

from __future__ import annotations

from pathlib import Path

import click

from recycler.options import as_json, on_device, print_json, with_base
from recycler.zoo.errors import UsageError


@click.command(name="export")
@click.argument("model_path", metavar="MODEL")
@click.option(
    "--to",
    required=True,
    type=click.Choice(["peft", "merged", "vllm", "lorax", "xlora"]),
    help="What is made: one PEFT adapter, full weights, adapters for a server, or PEFT's X-LoRA.",
)
@click.option("--out", required=True, type=click.Path(), help="A new or empty folder.")
@click.option("--mixture", metavar="A=0.5,B=0.5", help="Which mixture, where the router decides by the input (peft, merged).")
@click.option(
    "--mean-of",
    metavar="FILE",
    type=click.Path(),
    help="JSONL; instead, the router's mean share on its prompts (peft, merged), or the mixtures that they ask for most (vllm, lorax).",
)
@click.option(
    "--mixtures",
    type=click.IntRange(min=0),
    metavar="N",
    help="How many of these become adapters too (vllm, lorax). [default: 8]",
)
@click.option(
    "--rank", type=click.IntRange(min=1), metavar="R", help="Cut to this rank (peft, vllm, lorax); says what that loses."
)
@click.option("--prompts", metavar="FILE", type=click.Path(), help="JSONL; what the loss is measured on, 16 prompts at most.")
@click.option("--force", is_flag=True, help="Replace an export that is there.")
@with_base
@on_device
@as_json
def export_command(
    model_path: str, to: str, out: str, mixture: str | None, mean_of: str | None, mixtures: int | None, rank: int | None,
    prompts: str | None, force: bool, base: str | None, device: str | None, dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Write a composed model in a form that other software loads.

    Each form loses something: it is measured on prompts by comparing logits, said, and kept in export.json. A static router's
    mixture becomes one PEFT adapter or one set of weights exactly; for other routers say which mixture. For servers the router is
    kept, by `recycle proxy`, which chooses an adapter or a mixture once a request; mixtures are the router's own, and those that
    your prompts ask for (--mean-of).

    \b
    Examples:
      recycle export model/ --to peft --out adapter/ --mixture math=0.5,law=0.5
      recycle export model/ --to merged --out weights/ --mean-of prompts.jsonl
      recycle export model/ --to vllm --out served/ --mean-of prompts.jsonl --mixtures 8
      recycle export model/ --to xlora --out xlora/ --dtype float32
    """
    from recycler.exporting.ladder import export
    from recycler.terminal import bars, say

    with bars() as progress:
        done = export(
            model_path, to, out, mixture=_weights(mixture), mean_of=mean_of, mixtures=mixtures, rank=rank, prompts=prompts, force=force,
            base=base, device=device, dtype=dtype, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(done.to_json())
        return
    for line in done.lines():
        say(line)
    click.echo(out)


def _weights(text: str | None) -> dict[str, float] | None:
    """``math=0.5,law=1`` → weights by name."""
    if text is None:
        return None
    found: dict[str, float] = {}
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        try:
            if not equals or not name or name in found:
                raise ValueError
            found[name] = float(value)
        except ValueError:
            raise UsageError(f"--mixture {text!r}.", f"{item.strip()!r} is no weight.", "Write math=0.5,law=0.5") from None
    return found


@click.command(name="proxy")
@click.argument("folder", metavar="DIR", type=click.Path())
@click.option("--upstream", metavar="URL", help="The server; by default where `recycle export` said it would be.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", type=click.IntRange(0, 65535), default=8001, show_default=True, help="0 takes any that is free.")
@click.option("--adapters-at", metavar="PATH", help="Where a LoRAX server sees the adapters/ folder, in a container say.")
@with_base
@on_device
def proxy_command(
    folder: str, upstream: str | None, host: str, port: int, adapters_at: str | None, base: str | None, device: str | None, dtype: str
) -> None:  # fmt: skip
    """Route requests to a vLLM or LoRAX server, by the router, once a request.

    An OpenAI-compatible server in front of another one: model "routed" is given the adapter or mixture that the router would choose
    for the prompt; the name of one, or `base`, is passed on as it is. Streams and errors come through as they are; the header x-recycle-adapter says
    who answers. DIR is what `recycle export --to vllm` made.

    \b
    Example:
      recycle proxy served/ --upstream http://127.0.0.1:8000 --port 8001
    """
    from recycler.exporting.proxy import open_proxy, serve
    from recycler.terminal import say

    app = open_proxy(Path(folder), upstream, adapters_at=adapters_at, base=base, device=device, dtype=dtype)
    serve(app, host, port, say)
