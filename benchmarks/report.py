"""What the engine's benchmarks say: claims, rows, and the machine they were run on."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Claim:
    """One number that has to be on the right side of another."""

    label: str
    value: float
    target: float
    at_most: bool = True

    @property
    def holds(self) -> bool:
        return self.value <= self.target if self.at_most else self.value >= self.target


@dataclass(frozen=True)
class Row:
    name: str
    measure: str
    claims: tuple[Claim, ...]
    anchor: str = ""
    note: str = ""  # why there is nothing, or what else there is to know

    @property
    def verdict(self) -> str:
        if not self.claims:
            return "not run"
        if any(math.isnan(claim.value) for claim in self.claims):
            return "not timed"
        return "pass" if all(claim.holds for claim in self.claims) else "falls short"


def describe() -> dict[str, Any]:
    """The machine, in words and as JSON."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    text = f"{model or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread, load {load:.1f} at the start; "
    text += ", ".join(f"{name} {version}" for name, version in versions.items()) + f"; {date}"
    return {
        "cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": load, "python": platform.python_version(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(), **versions, "date": date, "text": text,
    }  # fmt: skip


def show(rows: Sequence[Row]) -> None:
    print("\nrow  verdict      measure: reached (target)   [others]")
    for row in rows:
        said = ", ".join(
            f"{claim.label} {claim.value:.2f} ({'≤' if claim.at_most else '≥'} {claim.target:g})" for claim in row.claims
        )
        print(
            f"{row.name:4s} {row.verdict:12s} {row.measure}: {said}"
            + f"   [{row.anchor}]" * bool(row.anchor)
            + f"   {row.note}" * bool(row.note)
        )


def save(machine: dict[str, Any], rows: Sequence[Row], file: Path) -> None:
    found = [asdict(row) | {"verdict": row.verdict} for row in rows]
    file.write_text(json.dumps({"machine": machine, "rows": found}, indent=2) + "\n", encoding="utf8")
