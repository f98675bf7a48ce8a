"""`recycle serve`: a routed model behind OpenAI's API."""

from __future__ import annotations

from importlib.util import find_spec

import click

from recycler.options import on_device, with_base
from recycler.zoo.errors import UsageError, counted


@click.command(name="serve")
@click.argument("model_path", metavar="MODEL")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 lets others in: give an --api-key then.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 for any that is free.")
@click.option("--name", help="What clients call the routed model; by default the folder's name.")
@click.option("--api-key", envvar="RECYCLE_API_KEY", metavar="KEY", help="What clients must send; also as $RECYCLE_API_KEY.")
@click.option("--max-active", type=click.IntRange(min=1), default=64, show_default=True, help="Answers in the making at once.")
@click.option("--max-queue", type=click.IntRange(min=0), default=256, show_default=True, help="More that wait; others get 429.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="Of one answer.")
@click.option(
    "--max-request-bytes", type=click.IntRange(min=1), default=1 << 20, show_default=True, help="Of one request's body."
)
@click.option(
    "--cache-tokens",
    type=click.IntRange(min=64),
    default=16384,
    show_default=True,
    help="Keys and values that are kept at once, for all requests; none can be longer.",
)
@click.option(
    "--resident", metavar="SIZE", help="Memory for adapters, 2GB say: they stay on disk and are read as they are wanted."
)
@click.option("--plain", is_flag=True, help="Chats as `Instruction: … Response: …`, even where the base has a chat template.")
@with_base
@on_device
def serve_command(
    model_path: str, host: str, port: int, name: str | None, api_key: str | None, max_active: int, max_queue: int, max_tokens: int,
    max_request_bytes: int, cache_tokens: int, resident: str | None, plain: bool, base: str | None, device: str | None, dtype: str,
) -> None:  # fmt: skip
    """Serve a composed model behind OpenAI's API: completions, chats, streams.

    The routed model, every adapter alone, and `base` are models of their own; requests for any of them share batches. A body may
    say `"recycle": {"mixture": {"math": 0.7, "code": 0.3}}`, and `usage.recycle` says who answered. /health and /metrics say how
    it goes. Prints its address once it listens; SIGTERM finishes what runs, and a second one cuts it short.

    \b
    Examples:
      recycle serve model/
      recycle serve model/ --port 8080 --max-active 16 --max-queue 32
      recycle serve model/ --plain
      RECYCLE_API_KEY=... recycle serve model/ --host 0.0.0.0
    """
    missing = [package for package in ("fastapi", "uvicorn", "prometheus_client") if find_spec(package) is None]
    if missing:
        raise UsageError(
            f"{', '.join(missing)} is not installed.",
            "Serving needs it.",
            "Run: pip install 'recycler[serve]'",
            code="E_MISSING_EXTRA",
        )
    if api_key is not None and not (api_key.strip() and api_key.isascii() and api_key.isprintable()):
        raise UsageError("The API key is empty, or not plain text.", "Clients send it in a header.", "Use letters and digits.")

    from pathlib import Path

    from recycler.chatting import unseen
    from recycler.composition import load
    from recycler.serving.door import is_loopback
    from recycler.serving.server import bind, serve, url
    from recycler.serving.service import Service, Settings
    from recycler.serving.worker import Limits
    from recycler.terminal import say

    bound = bind(host, port)
    if api_key is None and not is_loopback(host):
        say(f"warning: {host} can be reached from elsewhere, and there is no API key")
    model = load(model_path, base=base, resident=resident, device=device, dtype=dtype)
    for warning in filter(None, [*model.warnings, "" if plain else unseen(model)]):
        say(f"warning: {warning}")
    limits = Limits(active=max_active, queue=max_queue, cache_tokens=cache_tokens)
    settings = Settings(
        name=name or Path(model_path).resolve().name, host=host, api_key=api_key, max_tokens=max_tokens, plain=plain,
        max_request_bytes=max_request_bytes, limits=limits,
    )  # fmt: skip
    service = Service(model, settings)
    how = f"static batches, because {service.why_static}" if service.why_static else "continuous batches"
    say(
        f"serving {settings.name}, {counted(len(service.names), 'adapter')} and base, in {how}; context {service.context} tokens"
    )
    bound.listen(2048)
    click.echo(f"{url(bound)}/v1")
    serve(service, bound)
    say("drained")
