"""`recycle compose`: zoo and router become one directory."""

from __future__ import annotations

import click

from recycler.options import in_zoo, open_zoo, with_base


@click.command(name="compose")
@click.option("--router", "router_name", required=True, help="A router's folder, or its name in the zoo.")
@click.option("--out", required=True, type=click.Path(), help="The model's folder; must be new or empty.")
@click.option("--max-rank", type=click.IntRange(min=1), help="Cut adapters of a higher rank to this one; says what that loses.")
@click.option("--license-allow", metavar="A,B", help="Comma-separated licences; any other is an error (exit code 3).")
@click.option("--strict", is_flag=True, help="Missing licences, unrecognised ones and conflicts are errors too.")
@click.option("--force", is_flag=True, help="Replace a composed model that is there.")
@with_base
@in_zoo
def compose_command(
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
    from recycler.zoo.errors import counted
    from recycler.zoo.licences import roll_up

    model = run(
        open_zoo(zoo_path), router_name, out, base=base, force=force, max_rank=max_rank,
        license_allow=None if license_allow is None else license_allow.split(","), strict=strict,
    )  # fmt: skip
    for warning in model.warnings:
        say(f"warning: {warning}")
    for name, cut in model.truncated.items():
        say(cut.line(name))
    say(
        f"{counted(len(model.names), 'adapter')} on {counted(len(model.sites), 'site')}, {model.extra_bytes / 1e6:.1f} MB beside the base"
    )
    say(f"licences: {roll_up({adapter.name: adapter.licence for adapter in model.adapters}).verdict}")
    click.echo(out)
