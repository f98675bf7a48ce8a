"""Routing by layer: the mean weight that each adapter gets at each layer, on some prompts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recycler.pictures import canvas
from recycler.pictures.canvas import Cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from recycler.routed import RoutedModel
    from recycler.shots import Shot

BASE = "base, no adapter"
_LEAST = 0.005  # of weight, anywhere: whoever gets less everywhere is counted, and not drawn
_ROWS = 60  # drawn at most, the heaviest


@dataclass(frozen=True)
class LayerWeights:
    """Plain weights.

    Attributes:
        adapters, layers: names, in the order of the model.
        values: an adapter a row, a layer a column.
        prompts: how many they are a mean over.
    """

    adapters: tuple[str, ...]
    layers: tuple[str, ...]
    values: Sequence[Sequence[float]]
    prompts: int

    @classmethod
    def of(
        cls, model: RoutedModel, shots: Sequence[Shot], *, tasks: Sequence[str | None] | None = None, batch_size: int = 8
    ) -> LayerWeights:
        """Runs a forward of each prompt. A layer's weights are a mean over its sites, over a prompt's tokens, and over prompts.

        Args:
            shots: whose prompts; their completions are not read. tasks: each one's, for a router that wants to be told.
        """
        import torch

        from recycler import text

        names: dict[str, str] = {}
        totals: dict[str, list[torch.Tensor]] = {}
        for numbers in text.by_length([len(text.prompt_ids(model.source, shot)) for shot in shots], rows=batch_size):
            inputs = text.prompts(model.source, [[shots[i]] for i in numbers])
            told = nullcontext() if tasks is None else model.labelled([tasks[i] for i in numbers])
            with told, model.planned(inputs):
                if not model.source.encoder_decoder:
                    inputs = text.causal_inputs(model.source, inputs["input_ids"], inputs["attention_mask"].bool())
                firing = model.weights_for(inputs)
            names = names or layers(firing.sites)
            for path, w_BTE in firing.sites.items():
                # An encoder's sites have the prompt's length, a decoder's are not padded here.
                mask = firing.mask_BT if firing.mask_BT is not None and firing.mask_BT.shape[1] == w_BTE.shape[1] else None
                m_BT1 = torch.ones_like(w_BTE[..., :1]) if mask is None else mask[..., None].to(w_BTE)
                totals.setdefault(path, []).append(((w_BTE * m_BT1).sum(1) / m_BT1.sum(1).clamp(min=1)).sum(0).double().cpu())
        order = list(dict.fromkeys(names.values()))
        mean = {path: torch.stack(parts).sum(0) / len(shots) for path, parts in totals.items()}
        grid = [torch.stack([mean[path] for path, name in names.items() if name == layer]).mean(0) for layer in order]
        return cls(model.names, tuple(order), torch.stack(grid, 1).tolist(), len(shots))

    def bare(self) -> list[float]:
        """What is missing to 1, layer by layer: the base's."""
        return [1 - sum(row[i] for row in self.values) for i in range(len(self.layers))]


def layers(paths: Iterable[str]) -> dict[str, str]:
    """Module path → its layer's name, in the order of the model: ``3``, or ``decoder 3`` where there are two stacks; a module
    outside the layers has its own name."""
    paths = list(paths)
    found = {path: re.match(r"(.*?)\.?(\d+)\.", path) for path in paths}
    stacks = list(dict.fromkeys(hit[1] for hit in found.values() if hit))

    def key(path: str) -> tuple[int, int]:
        hit = found[path]
        return (stacks.index(hit[1]), int(hit[2])) if hit else (len(stacks), 0)

    def name(path: str) -> str:
        hit = found[path]
        if hit is None:
            return path.rpartition(".")[2]
        return f"{hit[1].split('.')[0]} {hit[2]}" if len(stacks) > 1 else hit[2]

    return {path: name(path) for path in sorted(paths, key=key)}


def draw(data: LayerWeights) -> Figure:
    """Adapters down, the heaviest on top, layers across, the first on the left."""
    from recycler.pictures.heat import above, extent, head, heat

    with canvas.drawing():
        heaviest = {e: sum(data.values[e]) for e in range(len(data.adapters))}
        shown = [e for e in sorted(heaviest, key=lambda e: -heaviest[e]) if max(map(abs, data.values[e])) >= _LEAST][:_ROWS]
        names, rows = [data.adapters[e] for e in shown], [list(data.values[e]) for e in shown]
        rest = [e for e in heaviest if e not in set(shown)]
        if rest:
            names.append(f"{len(rest)} others")
            rows.append([sum(data.values[e][i] for e in rest) for i in range(len(data.layers))])
        if max(map(abs, data.bare())) >= _LEAST:
            names.append(BASE)
            rows.append(data.bare())
        wide = extent(len(data.layers), 0.4 if len(data.layers) <= 20 else 0.24)
        high = extent(len(rows), 0.26 if len(rows) <= 40 else 0.155)
        full = max((abs(value) for row in rows for value in row), default=1.0) or 1.0
        low = min((value for row in rows for value in row), default=0.0)
        top, left = above(data.layers) + 0.15, canvas.width_of(names) + 0.2
        made = canvas.figure(left + wide + 0.2, top + high + 0.2)
        many = f"{data.prompts} prompts" if data.prompts != 1 else "one prompt"
        head(made, f"Routing by layer: mean weight on {many}", full, -full if low < -_LEAST else 0.0)
        place = canvas.axes(made, left, top, wide, high)
        heat(place, rows, full, rows=names, columns=data.layers)
        place.set_xlabel("layer", fontsize=canvas.SMALL, color=canvas.MUTED)
        place.xaxis.set_label_position("top")
        return made


def table(data: LayerWeights) -> list[list[Cell]]:
    """All adapters, in the order of the model, and the base's part."""
    rows: list[list[Cell]] = [["adapter", *(f"layer {name}" if name.isdigit() else name for name in data.layers)]]
    return rows + [[name, *row] for name, row in zip(data.adapters, data.values, strict=True)] + [["base", *data.bare()]]


def describe(data: LayerWeights) -> str:
    mean = {name: sum(row) / len(row) for name, row in zip(data.adapters, data.values, strict=True)}
    first = sorted(mean, key=lambda name: -mean[name])[:5]
    told = ", ".join(f"{name} {mean[name]:.0%}" for name in first)
    return f"Heat map of {len(mean)} adapters' mean weight at {len(data.layers)} layers. Over all layers, most goes to {told}."
