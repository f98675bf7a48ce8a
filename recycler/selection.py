"""Which adapters are worth routing among: a zoo of hundreds, and shots, become the right dozen.

Every adapter is a candidate for the tasks on which it beats the base; the base is a candidate everywhere, so that whoever helps
nobody is dropped. On each task candidates are ranked by exact match, where the profile has it, and by the perplexity of the
answers; the sum of the two ranks puts them in order, and the first few stay. Of these the one comes in that adds most to what the
chosen can do together (exact match, and share of the base's NLL taken away), until each task has its best. What room is left is
filled so that the updates are as unlike each other as can be: the subset with the least Σ|cos(ΔW_i, ΔW_j)|, by the exact cosine
of whole updates (`recycler.zoo.similarity`), not of their factors, which are not unique.

Selection signals: "Leveraging Open Knowledge for Advancing Task Expertise in Large Language Models" (arXiv 2408.15915), which does
not say how it combines them, and takes the cosines of A and of B apart.

Dimensions in names: R base and adapters (row 0 is the base), T task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recycler.zoo.errors import InputError, UsageError, shorten
from recycler.zoo.similarity import NEAR, compare

if TYPE_CHECKING:
    from recycler.profiles import Profile
    from recycler.zoo.adapter import Adapter
    from recycler.zoo.store import Zoo

COUNT, PER_TASK = 12, 3
WAYS = ("kshot",)
_EXHAUSTIVE = 5000  # subsets up to this many are all tried; beyond, one adapter is taken after the other


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    Attributes:
        names: the chosen, in the order of the profile.
        reasons: chosen adapter → why.
        dropped: other adapter → why not.
        redundancy: Σ|cos| over pairs of the chosen; None where the updates were not compared.
    """

    names: tuple[str, ...]
    reasons: Mapping[str, str]
    dropped: Mapping[str, str] = field(repr=False)
    redundancy: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "reasons": dict(self.reasons),
            "dropped": dict(self.dropped),
            "redundancy": self.redundancy,
        }


def select(
    profile: Profile, count: int = COUNT, adapters: Mapping[str, Adapter] | None = None, *, per_task: int = PER_TASK
) -> Selection:
    """Chooses at most `count` of a profile's adapters.

    Args:
        adapters: where updates are read from, to compare them (a `Zoo` is such a mapping); only candidates are read. Without,
            room is filled by rank.
        per_task: how many candidates a task keeps.

    Raises:
        UsageError: `count` or `per_task` is below 1, or more adapters were assigned by hand than `count`.
        InputError: no adapter beats the base anywhere.
    """
    for name, value in (("count", count), ("per_task", per_task)):
        if value < 1:
            raise UsageError(f"{name}={value}.", "It is a number of adapters.", f"Use {name}=1 or more.", code="E_OPTION")
    order = rankings(profile, per_task)
    by_hand = [name for name in profile.adapters if profile.assigned.get(name)]
    if len(by_hand) > count:
        raise UsageError(f"{len(by_hand)} adapters were assigned by hand.", f"--count {count} holds fewer.", "Raise --count.")
    candidates = [n for n in profile.adapters if n in by_hand or any(n in names for names in order.values())]
    if not candidates:
        raise InputError(
            f"By profile {profile.name}, no adapter is better than the base at any task.",
            "There is nothing worth routing to.",
            "Profile the tasks they were trained for.",
            code="E_NO_GAIN",
        )
    alike = _cosines(candidates, adapters)
    chosen = {name: "assigned by hand" for name in by_hand}
    dropped: dict[str, str] = {}
    # Whoever adds most to what the chosen can do together, until nobody adds anything: then each task has its best.
    worth = {n: {t: _worth(profile, n, t) for t, names in order.items() if n in names} for n in candidates}
    reached = dict.fromkeys(order, 0.0)
    for name in by_hand:
        reached = {task: max(value, worth[name].get(task, 0.0)) for task, value in reached.items()}
    waiting = [name for name in candidates if name not in chosen]
    while waiting and len(chosen) < count:
        adds = {n: sum(max(value - reached[task], 0.0) for task, value in worth[n].items()) for n in waiting}
        name = max(waiting, key=lambda n: (adds[n], n))
        if adds[name] <= 0:
            break
        waiting.remove(name)
        if twin := _twin(name, chosen, alike):
            dropped[name] = f"does the same as {twin}"
            continue
        chosen[name] = _standing(name, order)
        reached = {task: max(value, worth[name].get(task, 0.0)) for task, value in reached.items()}
    rest = [n for n in candidates if n not in chosen and n not in dropped]
    dropped |= {n: f"does the same as {twin}" for n in rest if (twin := _twin(n, chosen, alike))}
    rest = [n for n in rest if n not in dropped]
    rest.sort(key=lambda n: (min(names.index(n) for names in order.values() if n in names), n))
    for name in _unlike(list(chosen), rest, count - len(chosen), alike):
        chosen[name] = _standing(name, order) + (", and unlike the others" if alike else "")
    for name in profile.adapters:
        if name not in chosen and name not in dropped:
            full = "no room for it" if len(chosen) == count and name in waiting else "does the same as others that were taken"
            dropped[name] = full if name in candidates else "never among a task's best"
    names = tuple(name for name in profile.adapters if name in chosen)
    return Selection(names, {n: chosen[n] for n in names}, dropped, _redundancy(names, alike) if alike else None)


def narrowed(
    zoo: Zoo,
    profile: Profile | None,
    adapters: Iterable[str] | None,
    assign: Mapping[str, str | Iterable[str]] | None,
    way: str | None,
    count: int | None,
) -> Selection | None:
    """What --select and --count ask for; None where they ask for nothing.

    Args:
        adapters: choose among these; by default among the profile's that the zoo has.

    Raises:
        UsageError: an unknown way, a count without one, or no profile.
    """
    if way is None:
        if count is not None:
            raise UsageError("--count says how many to select.", "Nothing is selected without --select.", "Add --select kshot.")
        return None
    if way not in WAYS:
        raise UsageError(f"There is no selection {way!r}.", "", f"Use {', '.join(WAYS)}.")
    if profile is None:
        raise UsageError(
            f"--select {way} ranks adapters by shots, and no profile was given.",
            "",
            "Add --profile NAME.",
            code="E_NEEDS_PROFILE",
        )
    among = [name for name in profile.adapters if name in (zoo if adapters is None else set(adapters))]
    return select(profile.restricted(among).assign(assign or {}), COUNT if count is None else count, zoo)


def rankings(profile: Profile, per_task: int = PER_TASK) -> dict[str, list[str]]:
    """Task → the adapters to keep for it, best first: those that beat the base, by the sum of their ranks in exact match and in
    perplexity, ties by perplexity. An adapter beats the base where it answers more, or as much at a lower NLL."""
    nll_RT = profile.nll.double().mean(-1)
    right_RT = torch.zeros_like(nll_RT) if profile.exact is None else profile.exact.double().mean(-1)
    better_RT = (right_RT > right_RT[0]) | ((right_RT == right_RT[0]) & (nll_RT < nll_RT[0]))
    better_RT &= torch.isfinite(nll_RT)
    total_RT = _ranks(-right_RT) + _ranks(nll_RT)  # exp is monotone: the ranks of perplexity are those of NLL
    kept: dict[str, list[str]] = {}
    for t, task in enumerate(profile.tasks):
        rows = [r for r in range(1, len(nll_RT)) if better_RT[r, t]]
        rows.sort(key=lambda r: (float(total_RT[r, t]), float(nll_RT[r, t]), profile.adapters[r - 1]))
        kept[task] = [profile.adapters[r - 1] for r in rows[:per_task]]
    return kept


def _ranks(values_RT: Tensor) -> Tensor:
    """Ranks down the rows, the least first; equal values share the lowest of theirs."""
    return torch.stack([torch.searchsorted(column.sort().values, column) for column in values_RT.T.contiguous()], 1)


def _worth(profile: Profile, name: str, task: str) -> float:
    """What an adapter does for a task: exact match above the base's, and the share of the base's NLL that it takes away."""
    row, column = profile.adapters.index(name) + 1, profile.tasks.index(task)
    base, own = float(profile.nll[0, column].mean()), float(profile.nll[row, column].mean())
    right = 0.0 if profile.exact is None else float(profile.exact[row, column].mean() - profile.exact[0, column].mean())
    return max(right, 0.0) + max(1 - own / base, 0.0) if base > 0 else max(right, 0.0)


def _standing(name: str, order: Mapping[str, Sequence[str]]) -> str:
    """``first at plural, past_tense``, or the best place it has."""
    places = {task: names.index(name) for task, names in order.items() if name in names}
    best = min(places.values())
    word = ("first", "second", "third")[best] if best < 3 else f"number {best + 1}"
    return f"{word} at {shorten([task for task, place in places.items() if place == best], 4)}"


Alike = Callable[[str, str], float]


def _cosines(names: Sequence[str], adapters: Mapping[str, Adapter] | None) -> Alike | None:
    return None if adapters is None else compare(adapters, names).between


def _twin(name: str, others: Mapping[str, str], alike: Alike | None) -> str | None:
    return None if alike is None else next((other for other in others if alike(name, other) > NEAR), None)


def _redundancy(names: Sequence[str], alike: Alike) -> float:
    return sum(abs(alike(a, b)) for a, b in combinations(names, 2))


def _unlike(chosen: list[str], rest: list[str], room: int, alike: Alike | None) -> list[str]:
    """At most `room` of the rest, which with the chosen are least alike; without cosines, the first."""
    room = min(room, len(rest))
    if alike is None or room <= 0:
        return rest[: max(room, 0)]
    if comb(len(rest), room) <= _EXHAUSTIVE:
        subsets = [list(some) for some in combinations(rest, room)]
        taken = min(subsets, key=lambda some: _redundancy(chosen + some, alike))
    else:
        taken = []
        for _ in range(room):
            near = {n: sum(abs(alike(n, other)) for other in chosen + taken) for n in rest if n not in taken}
            taken.append(min(near, key=near.__getitem__))
    # Two that do the same are never both taken.
    return [n for i, n in enumerate(taken) if not _twin(n, dict.fromkeys(taken[:i], ""), alike)]
