"""`recycle routers` and `recycle build-router`: which methods there are, a router from one of them, and later changes to it."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import click

from recycler.options import (
    as_json,
    as_text,
    in_zoo,
    names_of,
    on_device,
    open_zoo,
    pairs_of,
    print_json,
    with_base,
    with_engine,
    with_select,
)
from recycler.zoo.errors import UsageError


@click.command(name="routers")
@as_json
def routers_command(as_json: bool) -> None:
    """List the routing methods: what each needs, its options, its paper.

    "add" marks those whose routers take in one adapter more, or let go of one, without touching the others.
    """
    from recycler.routers.discovery import methods, options
    from recycler.terminal import table

    found = methods()
    if as_json:
        rows = {
            name: {
                "needs": sorted(cls.needs),
                "add": cls.extends(),
                "paper": cls.paper,
                "options": {k: v for k, (_, v) in options(cls).items()},
            }
            for name, cls in found.items()
        }
        print_json({"schema_version": 1, "routers": rows})
        return
    table(
        ["method", "needs", "add", "options", "paper"],
        [
            [
                name,
                ", ".join(sorted(cls.needs)) or "nothing",
                "yes" if cls.extends() else "",
                " ".join(f"{k}={v}" for k, (_, v) in options(cls).items()),
                cls.paper,
            ]
            for name, cls in found.items()
        ],
    )


@click.command(name="build-router")
@click.argument("method", required=False)
@click.option("--profile", "profile_name", help="A profile's name in the zoo, or its folder.")
@click.option(
    "-o",
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the method; see `recycle routers`.",
)
@click.option(
    "--out",
    type=click.Path(),
    help="Where to save it; by default a folder of the zoo named after method and profile.",
)
@click.option("--adapters", help="Comma-separated names; by default the profile's, or the whole zoo.")
@click.option("--assign", multiple=True, metavar="ADAPTER=TASK", help="Say by hand which task is an adapter's own.")
@click.option(
    "--subtract", metavar="A,B", help="General adapters: their mean is taken out of the others, which alone are routed to."
)
@click.option(
    "--subtract-rank", type=click.IntRange(min=1), help="Cut what --subtract makes to this rank; says what that loses."
)
@with_select
@click.option("--add", metavar="ADAPTER", help="Learn this adapter too, and leave the others' columns as they are.")
@click.option("--remove", metavar="ADAPTER", help="Let go of this adapter; the others' columns stay as they are.")
@click.option(
    "--router", "router_name", metavar="DIR", help="The router to add to or remove from: a folder, or a name in the zoo."
)
@click.option("--force", is_flag=True, help="Replace a router that is there.")
@with_engine
@with_base
@on_device
@in_zoo
@as_json
def build_command(
    method: str | None, profile_name: str | None, options: tuple[str, ...], out: str | None, adapters: str | None,
    assign: tuple[str, ...], subtract: str | None, subtract_rank: int | None, select: str | None, count: int | None,
    add: str | None, remove: str | None, router_name: str | None, force: bool, engine: str | None, base: str | None, device: str | None,
    dtype: str, zoo_path: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Build a light router, or change one later; base and adapters stay frozen.

    \b
    Examples:
      recycle build-router arrow                      # needs no examples at all
      recycle build-router ridge --profile p16 --out gates/
      recycle build-router phatgoose --profile p16 -o steps=100 -o top_k=1
      recycle build-router arrow --subtract en,fr     # without what both general adapters know
      recycle build-router auto --profile p16         # tries several, keeps the best
      recycle build-router ridge --profile p16 --select kshot --count 12
      recycle build-router --add poem --router gates/ --profile p17 --out more/
      recycle build-router --remove law --router gates/ --out fewer/
    """
    from recycler.terminal import bars

    zoo = open_zoo(zoo_path)
    if add or remove or router_name:
        if options or adapters or subtract or select or engine:
            raise UsageError(
                "-o, --adapters, --subtract, --select and --engine are for new routers.",
                "A change leaves a router's options and other adapters as they are.",
                "Leave them out, or build a new router.",
            )
        router, folder = _changed(
            zoo, method, router_name, add, remove, profile_name, out, assign, force, base, {"device": device, "dtype": dtype}
        )
    else:
        if method is None:
            raise UsageError("Which method?", "", "recycle build-router METHOD; `recycle routers` lists them.")
        from recycler import sharding
        from recycler.evaluating.choosing import auto_config
        from recycler.evaluating.choosing import build_router as run
        from recycler.routers.discovery import find, make_config
        from recycler.scoring import silent
        from recycler.subtraction import Subtract

        name = "-".join([method, *([Path(profile_name).name] if profile_name else [])])
        folder = Path(out) if out else zoo.routers_dir / name
        given = {key: values[-1] for key, values in pairs_of(options, "-o", "KEY=VALUE").items()}
        flags = sorted(
            {
                "profile",
                "zoo",
                "base",
                "adapters",
                "out",
                "assign",
                "subtract",
                "select",
                "count",
                "force",
                "engine",
                "device",
                "dtype",
            }
            & set(given)
        )
        if flags:
            raise UsageError(f"{', '.join(flags)} is not an option of a method.", "", f"Use --{flags[0]}.")
        if subtract_rank and not subtract:
            raise UsageError("--subtract-rank goes with --subtract.", "", "Name the general adapters: --subtract A,B")
        general = Subtract(tuple(names_of(subtract) or ()), subtract_rank) if subtract is not None else None
        # before `run` takes a key such as `progress` for a keyword of its own
        auto_config(given) if method == "auto" else make_config(find(method), given)
        talks = sharding.leads()  # of several processes that share a base, one
        # what an engine prints is chatter
        with bars() if talks else nullcontext(silent) as progress, redirect_stdout(sys.stderr):
            router = run(
                method, profile_name, zoo=zoo, base=base, adapters=names_of(adapters), out=folder, assign=pairs_of(assign),
                subtract=general, select=select, count=count, force=force, engine=engine, progress=progress,
                loading={"device": device, "dtype": dtype}, **given,
            )  # fmt: skip
        if not talks:
            return
    if as_json:
        print_json({"schema_version": 1, "router": str(folder), "method": router.method(), "adapters": list(router.adapters),
                     "report": router.report})  # fmt: skip
    else:
        from recycler.terminal import say

        for key, value in router.report.items():
            say(f"{key}: {as_text(value)}")
        click.echo(str(folder))


def _changed(
    zoo: Any, method: str | None, router_name: str | None, add: str | None, remove: str | None, profile_name: str | None,
    out: str | None, assign: tuple[str, ...], force: bool, base: str | None, loading: dict[str, Any],
) -> tuple[Any, Path]:  # fmt: skip
    """The router with one adapter more or less, and where it is kept."""
    from recycler.build import router_folder
    from recycler.routers.discovery import load_router
    from recycler.terminal import bars
    from recycler.updating import add_adapter, remove_adapter

    if router_name is None or bool(add) == bool(remove):
        raise UsageError(
            "A change takes one of --add and --remove, and --router.",
            "",
            "recycle build-router --add ADAPTER --router DIR --out DIR2",
        )
    source = router_folder(zoo, router_name)
    router = load_router(source)
    if method not in (None, router.method()):
        raise UsageError(f"{source} holds a router of {router.method()}, not of {method}.", "", "Leave the method out.")
    step = f"with-{add}" if add else f"without-{remove}"
    folder = Path(out) if out else zoo.routers_dir / f"{source.resolve().name}-{step}"
    with bars() as progress, redirect_stdout(sys.stderr):  # what an engine prints is chatter
        if add:
            router = add_adapter(
                router, add, profile_name, zoo=zoo, base=base, out=folder, assign=pairs_of(assign), force=force,
                progress=progress, loading=loading,
            )  # fmt: skip
        else:
            router = remove_adapter(router, str(remove), profile_name, zoo=zoo, out=folder, force=force)
    return router, folder
