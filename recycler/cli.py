"""The command line: `recycle`. Its verbs are in `recycler.commands`; they call the library, read options, show progress, and print.

Data goes to stdout, chatter and progress to stderr. Exit codes: 0 ok, 1 unexpected, 2 usage, 3 input rejected, 4 security,
5 Hub or offline, 6 partial success. Nothing heavy is imported until a verb runs.
"""

from __future__ import annotations

import sys

import click

from recycler.commands.bench import bench_command
from recycler.commands.build import build_command, routers_command
from recycler.commands.chat import chat_command
from recycler.commands.compose import compose_command
from recycler.commands.convert import extract_command
from recycler.commands.doctor import register
from recycler.commands.eval import eval_command
from recycler.commands.explain import explain_command
from recycler.commands.export import export_command, proxy_command
from recycler.commands.fetch import fetch_command
from recycler.commands.find import search_command
from recycler.commands.pictures import plot_group, report_command
from recycler.commands.profile import profile_command
from recycler.commands.push import push_command
from recycler.commands.run import run_command
from recycler.commands.serve import serve_command
from recycler.commands.zoo import zoo_group
from recycler.options import Group


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


# In the order of the work.
for command in (
    search_command, fetch_command, extract_command, zoo_group,
    profile_command, routers_command, build_command, bench_command,
    compose_command, run_command, chat_command, serve_command,
    explain_command, eval_command, plot_group, report_command,
    push_command, export_command, proxy_command,
):  # fmt: skip
    main.add_command(command)
register(main)  # last: it gives completion to all commands that are there


if __name__ == "__main__":
    sys.exit(main())
