"""An adapter's files beside what the manifest says of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recycler.zoo import inspect
from recycler.zoo.inspect import printable
from recycler.zoo.manifest import Entry


@dataclass(frozen=True)
class Problem:
    """Something in a zoo that differs from its manifest. ``str()`` says it in a line."""

    name: str
    file: str
    what: str

    @property
    def changed(self) -> bool:
        """Whether contents differ from those that were vetted; else a file is missing, or does not belong there."""
        return self.what.startswith("changed")

    def __str__(self) -> str:
        return f"{printable(self.name)}: {printable(self.file)}: {self.what}"


def compare(home: Path, entry: Entry) -> list[Problem]:
    """Every file that is missing, changed or not listed."""
    problems = []
    present = {path.name for path in home.iterdir()} if home.is_dir() else set()
    for name, fact in entry.files.items():
        if name not in present:
            problems.append(Problem(entry.name, printable(name), "missing"))
        elif inspect.hashes(home / name)[0] != fact["sha256"]:
            problems.append(Problem(entry.name, printable(name), "changed: its sha256 differs from zoo.json"))
    problems += [Problem(entry.name, printable(n), "not in zoo.json") for n in sorted(present - set(entry.files))]
    return problems
