"""recycler: turn a pile of LoRA adapters into one routed model, and say honestly when it helps.

    zoo = recycler.Zoo()
    recycler.fetch(["org/math-lora", "org/law-lora"], base="org/base", zoo=zoo)
    profile = recycler.profile(zoo, shots=recycler.Shots.from_files("tasks/*.jsonl"), kshot=16)
    router = recycler.build_router("ridge", profile, zoo=zoo)
    model = recycler.compose(zoo, router)

Names are imported when they are first used, so that importing this package (and ``recycle --help``) stays instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recycler.build import profile
    from recycler.composition import compose
    from recycler.converting.extraction import extract
    from recycler.evaluating.benching import bench_routers
    from recycler.evaluating.choosing import build_router
    from recycler.evaluating.evaluation import evaluate
    from recycler.exporting.ladder import export
    from recycler.intake.fetching import fetch
    from recycler.intake.searching import search
    from recycler.judging.checking import check
    from recycler.loading import load
    from recycler.profiles import Profile
    from recycler.routed import RoutedModel
    from recycler.routers.base import Router
    from recycler.routers.discovery import load_router
    from recycler.seeing.explaining import explain
    from recycler.seeing.reporting import report
    from recycler.sharing.pushing import push
    from recycler.shots import Shots
    from recycler.zoo.adapter import Adapter
    from recycler.zoo.errors import RecycleError
    from recycler.zoo.store import Zoo

_HOME = {
    "Adapter": "recycler.zoo.adapter",
    "Profile": "recycler.profiles",
    "RecycleError": "recycler.zoo.errors",
    "RoutedModel": "recycler.routed",
    "Router": "recycler.routers.base",
    "Shots": "recycler.shots",
    "Zoo": "recycler.zoo.store",
    "bench_routers": "recycler.evaluating.benching",
    "build_router": "recycler.evaluating.choosing",
    "check": "recycler.judging.checking",
    "compose": "recycler.composition",
    "evaluate": "recycler.evaluating.evaluation",
    "explain": "recycler.seeing.explaining",
    "export": "recycler.exporting.ladder",
    "extract": "recycler.converting.extraction",
    "fetch": "recycler.intake.fetching",
    "load": "recycler.loading",
    "load_router": "recycler.routers.discovery",
    "profile": "recycler.build",
    "push": "recycler.sharing.pushing",
    "report": "recycler.seeing.reporting",
    "search": "recycler.intake.searching",
}

__all__ = [
    "Adapter", "Profile", "RecycleError", "RoutedModel", "Router", "Shots", "Zoo", "bench_routers", "build_router", "check", "compose",
    "evaluate", "explain", "export", "extract", "fetch", "load", "load_router", "profile", "push", "report", "search",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'recycler' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
