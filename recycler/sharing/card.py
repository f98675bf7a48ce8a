"""The model card of a composed model: what is in it, where it came from, under which licences, and what was measured.

A card is read by strangers, so that no path of somebody's disk is in it, and what strangers wrote is plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from recycler.model_folder import CARD, EVALUATION, ROUTER, read_manifest
from recycler.zoo import licences
from recycler.zoo.errors import InputError
from recycler.zoo.inspect import printable
from recycler.zoo.match import is_hub_id

if TYPE_CHECKING:
    from recycler.converting.truncation import Truncation
    from recycler.evaluating.evaluation import Evaluation
    from recycler.routers.base import Router

LOCAL = "local"
"""What a card calls an adapter that came from a folder."""

_PATH = re.compile(r"(?<!\S)(~|\.{0,2}[\\/]|[A-Za-z]:[\\/])[^,]*")  # "extracted from /a b, base /c" has two
_MARKUP = re.compile(r"[|<>`]")
_HEADER = {"library_name": "recycler", "pipeline_tag": "text-generation", "tags": ["lora", "mixture-of-experts", "recycler"]}


class Composed(Protocol):
    """What a card says something about: a RoutedModel, or what lies in its folder."""

    @property
    def router(self) -> Router | None: ...
    @property
    def truncated(self) -> Mapping[str, Truncation]: ...


@dataclass(frozen=True)
class _OnDisk:
    router: Router
    truncated: Mapping[str, Truncation]


def card(
    model: Composed,
    manifest: Mapping[str, Any],
    *,
    evaluation: Mapping[str, Any] | None = None,
    repo: str | None = None,
    widget: Sequence[str] = (),
    datasets: Sequence[str] = (),
) -> str:
    """README.md of a composed model, with the Hub's YAML header.

    Args:
        manifest: as recycle.json has it.
        evaluation: as `Evaluation.to_json` has it.
        repo: where the model is on the Hub, for the lines that load it.
        widget: prompts to try it with. datasets: ids on the Hub of what the router's shots were taken from.
    """
    router = model.router
    assert router is not None
    named, adapters = manifest["base"]["id"], manifest["adapters"]
    base = plain(named) if is_hub_id(named) else "a base that is not on the Hub"
    roll = licences.roll_up({a["name"]: a["licence"] for a in adapters})
    own = (router.facts.get("profile") or {}).get("own", {})
    rows = [
        f"| {a['name']} | {plain(source_of(a))} | {(a['revision'] or '')[:12]} | {plain(a['licence'] or 'not stated')} "
        f"| {plain(', '.join(own.get(a['name'], ()))) or '–'} | `{a['sha256'][:12]}` |"
        for a in adapters
    ]
    options = ", ".join(f"{key}={value}" for key, value in vars(router.config).items())
    lines = [
        "---",
        _header(manifest, roll, _results(evaluation, router.method()), repo, widget, datasets),
        "---",
        f"# {len(adapters)} adapter{'s' * (len(adapters) != 1)} on {base}, routed by {router.method()}",
        "",
        f"A routed mixture of existing LoRA adapters. Neither the base nor the adapters were trained; the router is "
        f"**{router.method()}** ({router.paper}; {options}).",
        "",
        *_use(repo),
        *_scores(evaluation, repo),
        "## Adapters",
        "",
        "| adapter | source | revision | licence | own tasks | sha256 |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        *_cut(model),
        "## Licences",
        "",
        *licence_lines(roll),
        *_lock(manifest),
    ]
    return "\n".join(lines)


def record_evaluation(folder: str | Path, evaluation: Evaluation | Mapping[str, Any]) -> Path:
    """Keeps what was measured with a composed model: evaluation.json in its folder, and the scores on its card.

    Args:
        evaluation: what `recycler.evaluate` returned, or its `to_json()`.

    Returns:
        The card.

    Raises:
        InputError: the folder is no composed model, or this is no evaluation.
    """
    from recycler.journal import write_text

    folder = Path(folder)
    facts: Any = evaluation if isinstance(evaluation, Mapping) else evaluation.to_json()
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"  # in its own order, baselines first
    facts = _checked(text, folder / EVALUATION)
    shown = card_of(folder, evaluation=facts)
    write_text(folder / EVALUATION, text)
    write_text(folder / CARD, shown)
    return folder / CARD


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """What `record_evaluation` kept, None where nothing is.

    Raises:
        InputError: evaluation.json is no evaluation.
    """
    path = folder / EVALUATION
    return _checked(path.read_text(encoding="utf8"), path) if path.exists() else None


def card_of(folder: Path, **options: Any) -> str:
    """The card of a model's folder, without its base; `options` as `card` takes them.

    Raises:
        InputError: it is no composed model.
    """
    from recycler.routers.discovery import load_router

    manifest = read_manifest(folder)
    return card(_OnDisk(load_router(folder / ROUTER), manifest["truncated"]), manifest, **options)


def source_of(record: Mapping[str, Any]) -> str:
    """Where an adapter came from, as recycle.json records it; `LOCAL` in place of a path of somebody's disk."""
    return _PATH.sub(LOCAL, str(record["source"]))


def _header(
    manifest: Mapping[str, Any],
    roll: licences.RollUp,
    results: list[Any],
    repo: str | None,
    widget: Sequence[str],
    datasets: Sequence[str],
) -> str:
    from huggingface_hub import ModelCardData

    named = manifest["base"]["id"]
    # Only Hub ids belong in the header, and of an adapter in a subfolder the repository's.
    held = ["/".join(source_of(a).split("/")[:2]) for a in manifest["adapters"] if a["revision"]]
    sources = list(dict.fromkeys(source for source in held if is_hub_id(source)))
    facts: dict[str, Any] = {
        **_HEADER,
        "base_model": [*([named] if is_hub_id(named) else []), *sources],
        "base_model_relation": "merge" if sources else "adapter",
        "datasets": list(datasets) or None,
        "widget": [{"text": printable(text, 2000)} for text in widget] or None,
    }
    if roll.single in licences.TERMS:
        facts["license"] = roll.single
    elif roll.single:  # a stranger's words belong in the table below, not in the header
        facts |= {"license": "other", "license_name": "as-stated-below"}
    elif roll.by_licence:  # where none is stated at all, nothing can be said in one word
        facts |= {"license": "other", "license_name": "several-licences"}
    if results:
        facts |= {"eval_results": results, "model_name": (repo or "recycler model").rpartition("/")[2]}
    return ModelCardData(**facts).to_yaml().strip()


def _use(repo: str | None) -> list[str]:
    return [
        "```python",
        "import recycler",
        "",
        f'model = recycler.load("{repo or "this folder"}")',
        'inputs = model.tokenizer(["..."], return_tensors="pt", padding=True, padding_side="left")',
        "model.generate(**inputs, max_new_tokens=32)",
        "model.weights_for(inputs).top(2)  # who fired, per row",
        "```",
        "",
        "The base is fetched from where it is; what is loaded are safetensors and JSON, and each adapter must have the sha256 that "
        "`recycle.json` gives it. "
        + (
            f"`recycle run {repo} -p ...` answers from the command line."
            if repo
            else "`recycle run THIS_FOLDER -p ...` answers."
        ),
        "",
    ]


def _results(evaluation: Mapping[str, Any] | None, method: str) -> list[Any]:
    """The own router's exact match as the header's model-index has it."""
    from huggingface_hub import EvalResult

    if evaluation is None:
        return []
    label = _own(evaluation, method)
    found = evaluation["contenders"][label]

    def result(dataset: str, kind: str, value: float) -> EvalResult:
        task: dict[str, Any] = {"task_type": "text-generation", "dataset_name": dataset, "dataset_type": kind}
        return EvalResult(**task, metric_type="exact_match", metric_name="exact match", metric_value=round(float(value), 4))

    tasks = [
        result(printable(task), re.sub(r"[^\w.-]+", "-", task).strip("-") or "task", value)
        for task, value in found["exact"].items()
    ]
    return [*tasks, result(f"mean of {len(tasks)} tasks", "mean", found["mean_exact"])]


def _scores(evaluation: Mapping[str, Any] | None, repo: str | None) -> list[str]:
    """What was measured, beside what needs no router, and whether routing is worth it."""
    if evaluation is None:
        return [
            f"Measure it before use: `recycle eval {repo or 'THIS_FOLDER'} tasks/*.jsonl` sets it beside the base, the best single "
            "adapter and their average, and says when routing does not help.",
            "",
        ]
    contenders, rows = evaluation["contenders"], evaluation["rows"]
    several = list(contenders.values())
    best = {task: max(one["exact"][task] for one in several) for task in rows}

    def cell(value: float, most: float) -> str:
        return f"**{value:.2f}**" if value == most > 0 else f"{value:.2f}"

    table = [
        f"| {plain(task)} | {count} | " + " | ".join(cell(one["exact"][task], best[task]) for one in several) + " |"
        for task, count in rows.items()
    ]
    intervals = [f"{one['interval'][0]:.2f}–{one['interval'][1]:.2f}" for one in several]
    beyond = [task for task, found in evaluation["by_task"].items() if found["verdict"].startswith("beyond")]
    single = (evaluation["chosen"].get("best_single") or {}).get("adapter")
    return [
        "## Scores",
        "",
        f"**{plain(evaluation['verdict'])}**",
        "",
        "| exact match | rows | " + " | ".join(plain(name) for name in contenders) + " |",
        "|---|" + "---:|" * (len(several) + 1),
        *table,
        "| **mean** | | " + " | ".join(f"{one['mean_exact']:.3f}" for one in several) + " |",
        "| 95 % interval | | " + " | ".join(intervals) + " |",
        "| mean NLL | | " + " | ".join(f"{one['mean_nll']:.2f}" for one in several) + " |",
        "",
        "`oracle` knows each row's task and uses the adapter that is best for it; `uniform` is the average of all adapters"
        + (f"; `best single` is {plain(single)}." if single else "."),
        "",
        *(
            [f"Beyond these adapters, where nothing scores clearly above the base: {plain(', '.join(beyond))}.", ""]
            if beyond
            else []
        ),
    ]


def _own(evaluation: Mapping[str, Any], method: str) -> str:
    """The contender that is the model's own router: by its method's name, else the best of the routers."""
    routers = {name: one for name, one in evaluation["contenders"].items() if one["router"]}
    named = next((name for name in (method, f"{method} router") if name in routers), None)
    return named or max(routers, key=lambda name: routers[name]["mean_exact"])


def _checked(text: str, path: Path) -> dict[str, Any]:
    """An evaluation, with everything in it that a card shows."""
    try:
        facts: dict[str, Any] = json.loads(text)
        contenders = facts["contenders"]
        for one in contenders.values():
            for value in (
                one["mean_exact"],
                one["mean_nll"],
                *one["interval"],
                *(one["exact"][task] for task in facts["rows"]),
            ):
                float(value)
        whole = facts["rows"] and len({len(one["interval"]) for one in contenders.values()} | {2}) == 1
        shown = isinstance(facts["verdict"], str) and all(isinstance(one["verdict"], str) for one in facts["by_task"].values())
        if not (whole and shown and isinstance(facts["chosen"], dict) and any(one["router"] for one in contenders.values())):
            raise ValueError("it has no rows, no router or no verdict")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is no evaluation ({type(error).__name__}: {printable(error)}).",
            "A card shows what `recycle eval` measured.",
            "Keep what recycler.evaluate returns: recycler.sharing.card.record_evaluation(folder, evaluation)",
        ) from None
    return facts


def _lock(manifest: Mapping[str, Any]) -> list[str]:
    """Every adapter's commit and hash, in full."""
    base = manifest["base"]
    named = base["id"] if is_hub_id(base["id"]) else LOCAL
    rows = [("base", named, base.get("revision"), f"fingerprint:{base.get('fingerprint')}")]
    rows += [(a["name"], source_of(a), a["revision"], f"sha256:{a['sha256']}") for a in manifest["adapters"]]
    lines = [f"{name}  {plain(source)}{f'@{revision}' if revision else ''}  {sums}" for name, source, revision, sums in rows]
    return ["<details><summary>Lock: commits and hashes in full</summary>", "", "```", *lines, "```", "", "</details>", ""]


def licence_lines(roll: licences.RollUp) -> list[str]:
    """Which licences the adapters state, and what they ask together."""
    rows = [
        f"| {plain(one)} | {plain('; '.join(licences.SENTENCES[term] for term in licences.terms(one))) or '–'} | {', '.join(names)} |"
        for one, names in roll.by_licence.items()
    ]
    table = ["| licence | asks | adapters |", "|---|---|---|", *rows, ""] if rows else []
    unstated = f"; not stated for {', '.join(roll.unstated)}" if roll.unstated else ""
    return [
        *table,
        f"Licences: {plain(', '.join(roll.by_licence)) or 'none stated'}{unstated}. Together: {plain(roll.verdict)}. The model as a "
        f"whole is bound by all of them, and by the base's. {licences.DISCLAIMER}",
        "",
        *(line for one in roll.conflicts for line in (f"Licences in conflict: {plain(str(one))}.", "")),
    ]


def _cut(model: Composed) -> list[str]:
    """Which adapters were cut to a lower rank for this model, and what that lost."""
    if not model.truncated:
        return []
    rows = [f"- {plain(cut.line(name))}" for name, cut in model.truncated.items()]
    return ["Cut to a lower rank for this model (relative error of the update, ‖ΔW − ΔW′‖ / ‖ΔW‖):", "", *rows, ""]


def plain(text: str) -> str:
    """Text from somewhere else, safe in a table cell."""
    return _MARKUP.sub(" ", printable(text, 500)).strip()
