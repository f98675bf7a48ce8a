"""`recycle push`: a composed model to the Hub."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from recycler.options import as_json, print_json

if TYPE_CHECKING:
    from recycler.sharing.pushing import Pushed


@click.command(name="push")
@click.argument("model", metavar="MODEL")
@click.argument("repo_id", metavar="REPO_ID")
@click.option("--private", is_flag=True, default=None, help="Make a new repository private.")
@click.option("--revision", metavar="BRANCH", help="A branch, made where it is not there; the default branch otherwise.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead; needs no right to write.")
@click.option("--message", "commit_message", metavar="TEXT", help="Of the commit.")
@click.option("--base-id", metavar="ORG/BASE", help="The base's id on the Hub, where the model was composed on a folder.")
@click.option("--license-allow", metavar="A,B", help="Comma-separated licences; any other is an error (exit code 3).")
@click.option("--strict", is_flag=True, help="Missing licences, unrecognised ones and conflicts are errors too.")
@click.option("--widget", multiple=True, metavar="TEXT", help="A prompt to try the model with, on its page; may be repeated.")
@click.option("--dataset", "datasets", multiple=True, metavar="ID", help="A dataset that shots were taken from, for the card.")
@click.option("--force", is_flag=True, help="Also into a repository that holds something else; it stays beside the model.")
@click.option("--dry-run", is_flag=True, help="Upload nothing: list files and sizes, and print the card.")
@as_json
def push_command(
    model: str, repo_id: str, private: bool | None, revision: str | None, create_pr: bool, commit_message: str | None,
    base_id: str | None, license_allow: str | None, strict: bool, widget: tuple[str, ...], datasets: tuple[str, ...], force: bool,
    dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Upload a composed model to the Hub; run, eval and load then take its id.

    Weights are compared with their hashes first. Files that no model holds, links and secrets are refused, and paths of this disk
    are taken out. A repository that is there gets a new commit where it is empty or holds a composed model. Printed is
    ORG/NAME@COMMIT, which always means these files.

    \b
    Examples:
      recycle push model/ org/routed --private
      recycle push model/ org/routed --base-id org/base --dry-run
      recycle push model/ org/routed --license-allow apache-2.0,mit --strict
    """
    from huggingface_hub.utils import disable_progress_bars

    from recycler.sharing.pushing import push
    from recycler.terminal import say

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        done = push(
            model, repo_id, private=private, revision=revision, create_pr=create_pr, commit_message=commit_message, base_id=base_id,
            license_allow=None if license_allow is None else license_allow.split(","), strict=strict, widget=widget, datasets=datasets,
            force=force, dry_run=dry_run,
        )  # fmt: skip
    except KeyboardInterrupt:
        say(
            "interrupted; the repository holds all of it or nothing, and the same command goes on with the files that had not arrived"
        )
        os._exit(130)  # an end by the interpreter waits for the client's threads, which send all that is left
    if as_json:
        print_json(done.to_json())
    for note in done.notes:
        say(note)
    size = f"{len(done.files)} files, {sum(done.files.values()) / 1e6:,.1f} MB"
    if dry_run:
        if not as_json:
            _preview(done)
        say(f"{size} would go to {done.url}; nothing was uploaded")
        return
    gone = f", {len(done.removed)} of an earlier model removed" if done.removed else ""
    say(
        f"{size}{gone}: {done.pull_request or done.url}"
        if done.changed
        else f"{done.url} holds this already; no commit was made"
    )
    if not as_json:
        click.echo(done.pinned)


def _preview(done: Pushed) -> None:
    from recycler.terminal import table
    from recycler.zoo.untrusted import OBEYED

    rows = [[path, f"{size:,}"] for path, size in done.files.items()] + [[path, "removed"] for path in done.removed]
    table(["file", "bytes"], rows, right=1)
    click.echo("\n" + OBEYED.sub("", done.card))
