"""An adapter on its way from another project's file into the zoo."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycler.zoo.adapter import Factors
from recycler.zoo.errors import SecurityError
from recycler.zoo.inspect import printable
from recycler.zoo.writing import write_adapter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """One adapter of a file that may hold many.

    Attributes:
        name: as its author calls it; not yet a slug.
        sites: module path of the base → factors, the project's scale folded into B.
        base: the id of its base, where it is known.
        notes: what a person should know of how it was read.
    """

    name: str
    sites: Mapping[str, Factors] = field(repr=False)
    base: str | None = None
    notes: tuple[str, ...] = ()


class Tensors(Mapping[str, Any]):
    """Safetensors files as one mapping, from which tensors are read one by one. A context manager."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = paths

    def __enter__(self) -> Tensors:
        from safetensors import SafetensorError, safe_open

        self.opened = ExitStack()
        self.homes: dict[str, Any] = {}
        try:
            for path in self.paths:
                stream = self.opened.enter_context(safe_open(path, framework="pt"))
                self.homes.update(dict.fromkeys(stream.keys(), stream))
        except SafetensorError as error:
            self.opened.close()
            raise SecurityError(
                f"{printable(path)} is no safetensors file: {printable(error)}.",
                "The process that wrote it may have been taken over.",
                "Ask the author for safetensors.",
                code="E_HEADER",
            ) from error
        return self

    def __exit__(self, *error: object) -> None:
        self.opened.close()

    def __getitem__(self, name: str) -> Tensor:
        return self.homes[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.homes))

    def __len__(self) -> int:
        return len(self.homes)


def write(part: Part, folder: Path) -> Path:
    """Write a part as a plain PEFT LoRA folder; `folder` is made, and returned."""
    folder.mkdir(parents=True, exist_ok=True)
    task = "SEQ_2_SEQ_LM" if any(path.startswith("decoder.") for path in part.sites) else "CAUSAL_LM"
    write_adapter(folder, part.sites, base=part.base, task_type=task)
    return folder
