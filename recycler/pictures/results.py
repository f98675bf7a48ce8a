"""Results as pictures and pages read them: what `recycle bench-routers --out` and `recycle eval --json` wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from recycler.zoo.errors import InputError, UsageError, shorten

_KINDS = ("static", "sequence", "token")
ROWS = "all rows"  # the one group of an evaluation
_NEWEST = 1  # schema_version of both
_FEW = (  # what is said of a task → of all such tasks
    ("beyond the zoo: don't bother", "Beyond the zoo{}, where nothing scores clearly above the base"),
    ("too few rows to tell", "Too few rows to tell{}, where something may score above the base"),
)


class Mean(NamedTuple):
    """Exact match over a group's tasks, its 95 % interval, and the mean NLL."""

    exact: float
    low: float
    high: float
    nll: float


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        kind: "baseline", or of a router "static", "sequence", "token", or "router" where that is not known.
        means: group → its mean.
        tasks: group → task → exact match.
        times: × the bare base's time a row. gates, adapters: bytes beside the base. fit: seconds. None where not measured.
        needs: what it was fitted on.
    """

    name: str
    kind: str
    means: Mapping[str, Mean]
    tasks: Mapping[str, Mapping[str, float]]
    times: float | None = None
    gates: int | None = None
    adapters: int | None = None
    fit: float | None = None
    needs: str = ""


@dataclass(frozen=True)
class Results:
    """A whole table.

    Attributes:
        contenders: baselines first.
        groups: names of groups of rows ("held-in", "held-out", ...).
        rows: group → task → how many rows.
        verdicts: what to use, a sentence each.
        helps: whether a router is worth using; None where that was not said.
        failed: method → why it could not be built.
        by_task: group → task → what to do about it, in words.
    """

    contenders: tuple[Contender, ...]
    groups: tuple[str, ...]
    rows: Mapping[str, Mapping[str, int]]
    verdicts: tuple[str, ...]
    helps: bool | None = None
    failed: Mapping[str, str] = field(default_factory=dict)
    by_task: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Results:
        """From the JSON of a bench, or of an evaluation.

        Raises:
            KeyError, TypeError, ValueError: it is neither.
        """
        groups: Mapping[str, Any] = data.get("groups", {ROWS: data})
        if not groups:
            raise ValueError("no method could be built")
        costs: Mapping[str, Any] = data.get("costs", {})
        first = next(iter(groups.values()))
        contenders = [_contender(name, groups, costs.get(name, {})) for name in first["contenders"]]
        by_task = {
            name: {task: str(one["verdict"]) for task, one in group["by_task"].items()} for name, group in groups.items()
        }
        verdicts = [str(data["recommendation"] if "groups" in data else data["verdict"])]
        for name, judged in by_task.items():
            where = f", {name}" if "groups" in data else ""
            for verdict, what in _FEW:
                if tasks := [task for task, said in judged.items() if said == verdict]:
                    verdicts.append(f"{what.format(where)}: {shorten(tasks, 12)}.")
        return cls(
            tuple(sorted(contenders, key=lambda one: one.kind != "baseline")),
            tuple(groups),
            {name: {task: int(count) for task, count in group["rows"].items()} for name, group in groups.items()},
            tuple(verdicts),
            not verdicts[0].startswith(("Don't", "Nothing")),
            {str(label): str(why) for label, why in data.get("failed", {}).items()},
            by_task,
        )


def _contender(name: str, groups: Mapping[str, Any], cost: Mapping[str, Any]) -> Contender:
    held = {group: data["contenders"][name] for group, data in groups.items()}
    first = next(iter(held.values()))
    times = cost.get("times_base")
    if times is None and first.get("base_seconds_per_row"):
        times = first["seconds_per_row"] / first["base_seconds_per_row"]
    router = bool(first["router"])
    return Contender(
        str(name),
        (kind if (kind := cost.get("kind")) in _KINDS else "router") if router else "baseline",
        {
            group: Mean(float(one["mean_exact"]), float(one["interval"][0]), float(one["interval"][1]), float(one["mean_nll"]))
            for group, one in held.items()
        },
        {group: {str(task): float(value) for task, value in one["exact"].items()} for group, one in held.items()},
        None if times is None or not math.isfinite(times) else float(times),
        cost.get("router", first.get("router_bytes", None if router else 0)),
        cost.get("adapters"),
        cost.get("fit") if router else None,
        str(cost.get("needs", "")),
    )


def read(source: str | Path) -> Results:
    """Reads a folder of `recycle bench-routers --out`, its bench.json, or what `recycle eval` printed with --json or kept with --record.

    Raises:
        UsageError: there is no such file. InputError: it holds something else.
    """
    path = Path(source).expanduser()
    file = path
    if path.is_dir():
        file = next((path / name for name in ("bench.json", "evaluation.json") if (path / name).exists()), path / "bench.json")
    if not path.exists():
        raise UsageError(f"There is no {path}.", "", _FIX, code="E_NO_FILE")
    if not file.exists():
        half = (path / "journal.jsonl").exists()
        raise InputError(
            f"{path} holds no {'finished ' * half}bench.",
            "The run was interrupted." if half else "There is no bench.json in it.",
            "Run recycle bench-routers again with the same arguments; it goes on where it stopped." if half else _FIX,
        )
    try:
        data = json.loads(file.read_text(encoding="utf8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read ({error}).", "", _FIX) from None
    return parse(data, file)


def parse(data: Any, file: Path) -> Results:
    """`Results.of`, of what a file holds.

    Raises:
        InputError: it is no results, or newer than this version.
    """
    try:
        if data["schema_version"] > _NEWEST:
            raise InputError(f"{file} was written by a newer version.", "", "Upgrade recycler.", code="E_NEWER")
        return Results.of(data)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, StopIteration) as error:
        raise InputError(f"{file} cannot be read as results ({type(error).__name__}: {error}).", "", _FIX) from None


_FIX = (
    "Make one: recycle bench-routers --profile NAME --tasks FILE... --out FOLDER, or recycle eval MODEL FILE... --json > FILE"
)
