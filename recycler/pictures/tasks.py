"""Adapters on tasks: what each adapter gains over the base on each task's shots, from a profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recycler.pictures import canvas
from recycler.pictures.canvas import INK, Cell
from recycler.zoo.errors import UsageError, counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from recycler.profiles import Profile

_ROWS = 60  # drawn at most: with hundreds, no name could be read
SCORES = {"nll": "gain over the base in NLL, nats a token", "exact": "gain over the base in exact match"}


@dataclass(frozen=True)
class TaskScores:
    """Plain scores.

    Attributes:
        score: "nll" or "exact".
        adapters, tasks: names.
        values: an adapter a row, a task a column.
        base: the base's, task by task.
        owner: task → the adapter to use when the task is known.
    """

    score: str
    adapters: tuple[str, ...]
    tasks: tuple[str, ...]
    values: Sequence[Sequence[float]]
    base: Sequence[float]
    owner: Mapping[str, str]

    @classmethod
    def of(cls, profile: Profile, score: str | None = None) -> TaskScores:
        """A profile's: exact match where it was measured and something matched, else NLL, unless `score` says which.

        Raises:
            UsageError: exact match was asked for, and not measured.
        """
        if score == "exact" and profile.exact is None:
            raise UsageError(
                f"Profile {profile.name} holds no exact match.", "", "Measure it: recycle profile FILE... --generate"
            )
        told = profile.exact is not None and bool(profile.exact.any())
        score = score or ("exact" if told else "nll")
        held = profile.exact if score == "exact" else profile.nll
        assert held is not None
        base, *values = held.mean(-1).tolist()
        return cls(score, profile.adapters, profile.tasks, values, base, profile.owner)

    def gains(self) -> list[list[float]]:
        """Above 0 is better than the base, whichever score it is."""
        sign = 1 if self.score == "exact" else -1
        return [[sign * (value - base) for value, base in zip(row, self.base, strict=True)] for row in self.values]

    def order(self) -> list[int]:
        """Adapters by the task on which they gain most, so that a specialist lies near the diagonal; whoever gains nowhere is last."""
        gains = self.gains()
        best = [max(range(len(row)), key=row.__getitem__) for row in gains]
        return sorted(range(len(gains)), key=lambda e: (gains[e][best[e]] <= 0, best[e], -gains[e][best[e]], self.adapters[e]))

    def shown(self, count: int = _ROWS) -> list[int]:
        """`order`, of so many at most: whoever is the one to use for a task, then those that gain most anywhere."""
        gains, owners, order = self.gains(), set(self.owner.values()), self.order()
        wanted = sorted(order, key=lambda e: (self.adapters[e] not in owners, -max(gains[e])))[:count]
        return [e for e in order if e in set(wanted)]


def draw(data: TaskScores) -> Figure:
    """Adapters down, tasks across; a square marks the adapter to use for a task."""
    from recycler.pictures.heat import above, extent, head, heat

    with canvas.drawing():
        order, gains = data.shown(), data.gains()
        rows = [gains[e] for e in order]
        wide = extent(len(data.tasks), 0.5 if len(data.tasks) <= 20 else 0.2)
        high = extent(len(order), 0.26 if len(order) <= 40 else 0.155)
        most = max((value for row in rows for value in row), default=0.0)
        least = min((value for row in rows for value in row), default=0.0)
        full = most if most > 0 else abs(least) or 1.0
        top, left = above(data.tasks), canvas.width_of(data.adapters) + 0.2
        made = canvas.figure(left + wide + 0.2, top + high + 0.2)
        note = "□ the adapter to use when the task is known" if data.owner else ""
        head(made, "Adapters on tasks: " + SCORES[data.score], full, -full if least < 0 else 0.0, note, beyond=least < -full)
        place = canvas.axes(made, left, top, wide, high)
        left_out = len(data.adapters) - len(order)
        told = f"the {len(order)} of {len(data.adapters)} adapters that help most; the CSV has all" if left_out else ""
        heat(place, rows, full, rows=[data.adapters[e] for e in order], columns=data.tasks, note=told)
        at = {data.adapters[e]: row for row, e in enumerate(order)}
        marks = [(c, at[data.owner[task]]) for c, task in enumerate(data.tasks) if data.owner.get(task) in at]
        cell = min(wide / len(data.tasks), high / len(order)) * 72
        if marks and cell >= 10:
            from matplotlib.patches import Rectangle

            for c, r in marks:
                place.add_patch(
                    Rectangle((c - 0.5, r - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.2, zorder=3, clip_on=False)
                )
        elif marks:
            place.scatter(
                [c for c, _ in marks],
                [r for _, r in marks],
                s=max(cell, 2.5) ** 2,
                marker="s",
                facecolor="none",
                edgecolor=INK,
                linewidth=0.7,
            )
        return made


def table(data: TaskScores) -> list[list[Cell]]:
    """The scores as they were measured, in the order of the picture: the base, then adapters."""
    rows: list[list[Cell]] = [[f"mean {data.score}", *data.tasks], ["base", *data.base]]
    return rows + [[data.adapters[e], *data.values[e]] for e in data.order()]


def describe(data: TaskScores) -> str:
    owners = [f"{data.owner[task]} for {task}" for task in data.tasks if task in data.owner]
    alone = [task for task in data.tasks if task not in data.owner]
    told = f"Heat map of {counted(len(data.adapters), 'adapter')} on {counted(len(data.tasks), 'task')}: {SCORES[data.score]}."
    told += f" Best by profile: {', '.join(owners[:12])}{' and more' * (len(owners) > 12)}." if owners else ""
    return told + (f" Nobody is better than the base on {', '.join(alone[:12])}." if alone else "")
