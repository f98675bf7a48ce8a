"""The card of an adapter, README.md: the YAML at its head is read as data, by a safe loader, within limits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from recycler.zoo.untrusted import printable

CARD = "README.md"
_MAX_HEAD = 100_000  # bytes; a card with a long table of results has some 50 kB of YAML
_MAX_DEPTH = 20


def card_licence(folder: Path) -> str | None:
    """The licence that the folder's README states in its YAML head; None where there is none."""
    card = _head(folder / CARD)
    stated = card.get("license") or card.get("license_name")
    if stated == "other":
        stated = card.get("license_name") or stated
    if isinstance(stated, list):
        stated = ", ".join(one for one in stated if isinstance(one, str))
    return printable(stated) if isinstance(stated, str) and stated else None


def _head(path: Path) -> dict[Any, Any]:
    """The YAML between the first two lines of dashes; empty where it cannot be used.

    Aliases are not followed: a page of them stands for billions of items, and ``<<`` would build those. Depth is
    limited because the loader recurses.
    """
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        if not path.is_file():  # opening a pipe would wait for a writer
            return {}
        with path.open("rb") as stream:
            text = stream.read(_MAX_HEAD).decode("utf-8", "replace")
        head = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---", text, re.DOTALL)
        if not head:
            return {}
        depth = 0
        for event in yaml.parse(head[1], Loader=loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH or isinstance(event, yaml.AliasEvent):
                return {}
        card = yaml.load(head[1], loader)
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return card if isinstance(card, dict) else {}
