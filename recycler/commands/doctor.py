"""`recycle doctor`, `env`, `errors` and `completion`: what helps when something is not as expected."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import TYPE_CHECKING

import click

from recycler.helping import completing
from recycler.options import as_json, in_zoo, on_device, open_zoo, print_json, with_base
from recycler.zoo.untrusted import OBEYED

if TYPE_CHECKING:
    from recycler.helping.doctor import Diagnosis

_INDENT = 25  # of what stands beside the labels
_MARKS = {"problem": ("problem", "red"), "suspicion": ("suspicion", "yellow"), "ok": ("ok", "green")}


@click.command(name="doctor")
@click.argument("model", required=False)
@click.option("--profile", "profile_name", help="A profile's name in the zoo, or its folder: its scores are measured again.")
@with_base
@on_device
@in_zoo
@as_json
def doctor_command(
    model: str | None, profile_name: str | None, base: str | None, device: str | None, dtype: str, zoo_path: str | None, as_json: bool
) -> None:  # fmt: skip
    """Say what is wrong, the likeliest cause first.

    Without anything it looks at the installation, the machine, the Hub and the zoo; with a MODEL, a --profile or a --base also at
    base, tokenizer, chat template, numbers, every adapter and the router, by a few forwards. Nothing is changed. Exit code 3
    where there is a problem, 0 where there are suspicions only.

    \b
    Examples:
      recycle doctor model/
      recycle doctor model/ --profile p16
      recycle doctor --base org/base --json
    """
    from recycler.helping.doctor import examine
    from recycler.terminal import bars

    with bars() as progress:
        found = examine(
            model, profile=profile_name, base=base, zoo=open_zoo(zoo_path), device=device, dtype=dtype, progress=progress
        )
    if as_json:
        print_json(found.to_json())
    else:
        _show(found)
    if found.exit_code:
        raise click.exceptions.Exit(found.exit_code)


def _show(found: Diagnosis) -> None:
    for finding in found.findings:
        word, colour = _MARKS[finding.level]
        label = click.style(f"{word:<9}", fg=colour, bold=finding.level != "ok")
        code = f" [{finding.code}]" if finding.code else ""
        first, *rest = [line for part in (finding.what + code, finding.why, finding.fix) if part for line in _wrapped(part)]
        click.echo(f"{label}  {finding.about:<12}  {first}")
        for line in rest:
            click.echo(" " * _INDENT + line)
    problems, suspicions = len(found.problems), sum(f.level == "suspicion" for f in found.findings)
    from recycler.terminal import say

    said = [
        f"{count} {word}{'s' * (count != 1)}" for count, word in ((problems, "problem"), (suspicions, "suspicion")) if count
    ]
    say(" and ".join(said) + ", the likeliest cause first" if said else "nothing is wrong that can be seen from here")


def _wrapped(part: str) -> list[str]:
    """Lines that fit beside the labels on a terminal; one line elsewhere."""
    clean = OBEYED.sub("", part)
    if not sys.stdout.isatty():
        return [clean]
    room = max(40, shutil.get_terminal_size().columns - _INDENT)
    return textwrap.wrap(clean, room, break_long_words=False, break_on_hyphens=False) or [""]


@click.command(name="env")
@as_json
def env_command(as_json: bool) -> None:
    """Print versions, system, devices and variables, to paste into a bug report.

    Tokens and passwords are masked, and your home folder is written ~.

    \b
    Examples:
      recycle env > report.md
      recycle env --json
    """
    from recycler.helping.environment import environment, markdown

    facts = environment()
    if as_json:
        print_json(facts)
    else:
        click.echo(OBEYED.sub("", markdown(facts)))


@click.command(name="errors")
@click.argument("code", required=False)
@as_json
def errors_command(code: str | None, as_json: bool) -> None:
    """Explain the code that an error names, or list all. Needs no network.

    \b
    Examples:
      recycle errors E_PICKLE
      recycle errors --json
    """
    from recycler.terminal import table
    from recycler.zoo.error_codes import CATALOGUE, explain

    chosen = list(CATALOGUE.values()) if code is None else [explain(code)]
    if as_json:
        print_json({"schema_version": 1, "errors": {one.code: one.to_json() for one in chosen}})
    elif code is None:
        table(["code", "exit", "what"], [[one.code, str(one.exit), one.title] for one in chosen])
    else:
        click.echo(f"{chosen[0].section()}\n{chosen[0].docs}")


@click.command(name="completion")
@click.argument("shell", type=click.Choice(completing.SHELLS))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print the script that completes commands, options and the zoo's names in a shell.

    \b
    Examples:
      eval "$(recycle completion bash)"     # in ~/.bashrc
      eval "$(recycle completion zsh)"      # in ~/.zshrc
      recycle completion fish > ~/.config/fish/completions/recycle.fish
    """
    click.echo(completing.script(ctx.find_root().command, shell))


def register(main: click.Group) -> None:
    """Adds these commands, and gives all commands their completion: to be called last."""
    for command in (doctor_command, env_command, errors_command, completion_command):
        main.add_command(command)
    completing.attach(main)
