"""The model card of a composed model: what is in it, where it came from, under which licences, and what was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from recycler.zoo import licences
from recycler.zoo.inspect import printable
from recycler.zoo.match import is_hub_id

if TYPE_CHECKING:
    from recycler.routed import RoutedModel

_MARKUP = re.compile(r"[|<>`]")


def card(model: RoutedModel, manifest: Mapping[str, Any]) -> str:
    """README.md of a composed model, with the Hub's YAML header."""
    router = model.router
    assert router is not None
    base, adapters = manifest["base"]["id"], manifest["adapters"]
    roll = licences.roll_up({a["name"]: a["licence"] for a in adapters})
    sources = [a["source"] for a in adapters if a["revision"]]  # only Hub ids belong in the header
    header: dict[str, Any] = {
        "library_name": "recycler",
        "base_model": [*([base] if is_hub_id(base) else []), *sources],
        "base_model_relation": "merge",
        "tags": ["lora", "mixture-of-experts", "recycler"],
    }
    if roll.single in licences.TERMS:
        header["license"] = roll.single
    elif roll.single:  # a stranger's words belong in the table below, not in the header
        header |= {"license": "other", "license_name": "as-stated-below"}
    elif roll.by_licence:  # where none is stated at all, nothing can be said in one word
        header |= {"license": "other", "license_name": "several-licences"}
    own = (router.facts.get("profile") or {}).get("own", {})
    rows = [
        f"| {a['name']} | {_plain(a['source'])} | {(a['revision'] or '')[:12]} | {_plain(a['licence'] or 'not stated')} "
        f"| {_plain(', '.join(own.get(a['name'], ()))) or '–'} | `{a['sha256'][:12]}` |"
        for a in adapters
    ]
    options = ", ".join(f"{key}={value}" for key, value in vars(router.config).items())
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip(),
        "---",
        f"# {len(adapters)} adapter{'s' * (len(adapters) != 1)} on {_plain(base)}, routed by {router.method()}",
        "",
        f"A routed mixture of existing LoRA adapters. Neither the base nor the adapters were trained; the router is "
        f"**{router.method()}** ({router.paper}; {options}).",
        "",
        "| adapter | source | revision | licence | own tasks | sha256 |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        *_licences(roll),
        *_cut(model),
        "```python",
        "import recycler",
        "",
        'model = recycler.load("this folder")',
        'inputs = model.tokenizer(["..."], return_tensors="pt", padding=True, padding_side="left")',
        "model.generate(**inputs, max_new_tokens=32)",
        "```",
        "",
        "Measure it before use: `recycle eval THIS_FOLDER tasks/*.jsonl` sets it beside the base, the best single adapter and "
        "their average, and says when routing does not help.",
        "",
    ]
    return "\n".join(lines)


def _licences(roll: licences.RollUp) -> list[str]:
    """Which licences the adapters state, and what they ask together."""
    rows = [
        f"| {_plain(one)} | {_plain('; '.join(licences.SENTENCES[term] for term in licences.terms(one))) or '–'} | {', '.join(names)} |"
        for one, names in roll.by_licence.items()
    ]
    table = ["| licence | asks | adapters |", "|---|---|---|", *rows, ""] if rows else []
    unstated = f"; not stated for {', '.join(roll.unstated)}" if roll.unstated else ""
    return [
        *table,
        f"Licences: {_plain(', '.join(roll.by_licence)) or 'none stated'}{unstated}. Together: {_plain(roll.verdict)}. The model as a "
        f"whole is bound by all of them, and by the base's. {licences.DISCLAIMER}",
        "",
        *(line for one in roll.conflicts for line in (f"Licences in conflict: {_plain(str(one))}.", "")),
    ]


def _cut(model: RoutedModel) -> list[str]:
    """Which adapters were cut to a lower rank for this model, and what that lost."""
    if not model.truncated:
        return []
    rows = [f"- {_plain(cut.line(name))}" for name, cut in model.truncated.items()]
    return ["Cut to a lower rank for this model (relative error of the update, ‖ΔW − ΔW′‖ / ‖ΔW‖):", "", *rows, ""]


def _plain(text: str) -> str:
    """Text from somewhere else, safe in a table cell."""
    return _MARKUP.sub(" ", printable(text, 500)).strip()
