"""`recycle extract`: a full fine-tune minus its base becomes an adapter."""

from __future__ import annotations

import click

from recycler.options import as_json, in_zoo, open_zoo, print_json


@click.command(name="extract")
@click.option("--tuned", required=True, metavar="ID|FOLDER", help="The fine-tuned model, in safetensors.")
@click.option("--base", required=True, metavar="ID|FOLDER", help="The base that its tuning started from, in safetensors.")
@click.option("--rank", type=click.IntRange(min=1), metavar="R", help="At most this rank at every linear.")
@click.option(
    "--energy", type=click.FloatRange(0, 1, min_open=True), metavar="E", help="The least rank that keeps this share of Σσ²."
)
@click.option("--as", "name", metavar="NAME", help="Its name in the zoo; by default the tuned model's.")
@click.option("--out", type=click.Path(), metavar="FOLDER", help="A new folder to write it to, instead of the zoo.")
@click.option("--force-base", is_flag=True, help="Go on where the base looks like another model.")
@in_zoo
@as_json
def extract_command(
    tuned: str,
    base: str,
    rank: int | None,
    energy: float | None,
    name: str | None,
    out: str | None,
    force_base: bool,
    zoo_path: str | None,
    as_json: bool,
) -> None:
    """Turn a full fine-tune into an adapter: its difference from the base, by SVD.

    Checkpoints of GaLore, Fira, SST or plain fine-tuning join the zoo this way. Neither model is loaded: tensors are read one by
    one. What LoRA cannot carry (norms, embeddings, biases) is listed with its share of the change. Of --rank and --energy the
    smaller rank counts; by default 90 % of the energy, at most rank 32.

    \b
    Examples:
      recycle extract --tuned org/math-7b --base org/base-7b --rank 32 --as math
      recycle extract --tuned ./tuned --base ./base --energy 0.95 --out ./math-lora
    """
    from recycler.converting.extraction import extract
    from recycler.terminal import bars, say

    with bars() as progress:
        done = extract(
            tuned,
            base,
            rank=rank,
            energy=energy,
            name=name,
            zoo=None if out else open_zoo(zoo_path),
            out=out,
            force_base=force_base,
            progress=progress,
        )
    if as_json:
        print_json(done.to_json())
        return
    for line in done.lines():
        say(line)
    click.echo(done.name or str(done.folder))
