"""A model's weights on disk, read tensor by tensor: no model is built, and no more than one tensor is in memory at a time.

Module paths are those of the model as transformers builds it; names in files may lack or have its prefix (GPT-2's files say
``h.0.…`` where the module is ``transformer.h.0.…``), and tied weights are stored once.

Dimensions in names: D input width, O output width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycler.zoo import hub, inspect
from recycler.zoo.errors import InputError, SecurityError, shorten
from recycler.zoo.hub import Source
from recycler.zoo.inspect import printable

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_MAX_INDEX = 50_000_000
MAX_BYTES = 16 * inspect.MAX_BYTES


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a model's safetensors.

    Attributes:
        name: as it was given: a Hub id or a folder. folder: where its files lie.
        revision: the 40-hex commit when it came from the Hub.
        shapes: tensor name → shape. files: tensor name → the file it is in.
    """

    name: str
    folder: Path
    revision: str | None
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    files: Mapping[str, Path] = field(repr=False)

    @classmethod
    def open(cls, name: str | Path, *, max_bytes: int = MAX_BYTES) -> Checkpoint:
        """Find a model's weights and read their headers; from the Hub, download them first, verified.

        Args:
            name: ``org/name[@revision]``, or a folder.
            max_bytes: the most that may be downloaded.

        Raises:
            InputError: no weights, or broken ones. SecurityError: pickles only, or a forged file.
            HubError: not to be had. UsageError: neither an id nor a folder.
        """
        source = Source.parse(name)
        folder, revision = source.folder, None
        if folder is None:
            listing = hub.peek(source.repo, revision=source.revision)
            if listing is None:
                folder = _cached(source)
            else:
                _require_safetensors(source.text, listing)
                folder = hub.snapshot(source.repo, revision=source.revision, max_bytes=max_bytes)
            revision = folder.name
            folder = folder / source.subfolder if source.subfolder else folder
        if not folder.is_dir():
            raise InputError(
                f"{printable(name)} is not a folder.", "", "Give a folder that holds a model, or a Hub id.", code="E_BASE"
            )
        _require_safetensors(str(name), [path.name for path in folder.iterdir()])
        shapes: dict[str, tuple[int, ...]] = {}
        files: dict[str, Path] = {}
        for path, listed in _shards(folder).items():
            held = inspect.read_header(path)
            for key in held if listed is None else listed:
                if key not in held:
                    raise InputError(
                        f"{printable(path)} lacks {printable(key)}, which {INDEX} says it holds.",
                        "The index and the files are of different models.",
                        "Fetch or save the model again.",
                        code="E_BASE",
                    )
                shapes[key], files[key] = held[key], path
        return cls(str(name), folder, revision, shapes, files)

    def tensor(self, key: str) -> Tensor:
        """One tensor, as stored. The file is opened for it alone, so that its pages are given back with it."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.files[key], framework="pt") as stream:
                return stream.get_tensor(key)
        except SafetensorError as error:
            raise SecurityError(
                f"{printable(self.files[key])} breaks the rules of safetensors: {printable(error)}.",
                "Tensors overlap, leave holes or lie outside the file, so its contents are ambiguous.",
                "Get the file again from its author.",
                code="E_HEADER",
            ) from error


class Layout:
    """Which tensors of checkpoints belong to which parameters of a model that has no weights.

    Args:
        model: from `recycler.base.skeleton`.
    """

    def __init__(self, model: Any) -> None:
        from torch import nn

        from recycler.engine.sites import linear_shapes

        self.shapes: Mapping[str, tuple[int, int]] = linear_shapes(model)
        self._prefix = getattr(model, "base_model_prefix", "")
        self._alias: dict[int, list[str]] = {}  # one parameter may have several names
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._alias.setdefault(id(parameter), []).append(name)
        self._of = {name: names for names in self._alias.values() for name in names}
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        modules = dict(model.named_modules())
        self.transposed = {path for path in self.shapes if type(modules[path]).__name__ == "Conv1D"}
        self.tied = {path for path in self.shapes if id(modules[path].weight) in embeddings}
        """Linears that share their weight with an embedding: a change of it is no update of a linear alone."""

    def key(self, checkpoint: Checkpoint, parameter: str) -> str | None:
        """The tensor that holds a parameter, under whichever of its names; None where there is none."""
        prefix = self._prefix + "."
        for name in self._of.get(parameter, [parameter]):
            for candidate in (name, name.removeprefix(prefix), prefix + name):
                if candidate in checkpoint.shapes:
                    return candidate
        return None

    def parameters(self) -> list[str]:
        """One name for every parameter, in the model's order."""
        return [names[0] for names in self._alias.values()]

    def name_of(self, path: str) -> str:
        """The name that `parameters` has for the weight of a linear."""
        return self._of[path + ".weight"][0]

    def weight(self, checkpoint: Checkpoint, path: str) -> Tensor:
        """The weight of a linear, fp32 [O, D].

        Raises:
            InputError: it is not there, or has another shape, as quantised weights have.
        """
        key = self.key(checkpoint, path + ".weight")
        tensor = None if key is None else checkpoint.tensor(key)
        if tensor is not None and path in self.transposed and tensor.ndim == 2:
            tensor = tensor.T
        if tensor is None or tuple(tensor.shape) != self.shapes[path] or not tensor.is_floating_point():
            found = "is not there" if tensor is None else f"is {list(tensor.shape)} of {tensor.dtype}"
            raise InputError(
                f"The weight of {printable(path)} in {printable(checkpoint.name)} {found}.",
                f"The model has a linear of {list(self.shapes[path])} there. A quantised copy stores other numbers, and older "
                "files may use other names.",
                "Use the original weights, saved by transformers: model.save_pretrained(FOLDER).",
                code="E_SHAPES",
            )
        return tensor.float()


def _cached(source: Source) -> Path:
    """The folder in the client's cache of a repository that `hub.peek` found there."""
    from huggingface_hub import try_to_load_from_cache

    held = try_to_load_from_cache(source.repo, "config.json", revision=source.revision)
    assert isinstance(held, str)
    return Path(held).parent


def _require_safetensors(where: str, names: list[str]) -> None:
    if any(name.endswith(".safetensors") for name in names):
        return
    pickled = sorted(printable(name) for name in names if name.endswith(_PICKLED))
    if pickled:
        raise SecurityError(
            f"The weights of {printable(where)} are pickled ({shorten(pickled, 3)}).",
            "Loading a pickle can run code, so none is opened.",
            "Use a copy in safetensors, or convert it where you trust it: model.save_pretrained(FOLDER).",
            code="E_PICKLE",
        )
    raise InputError(
        f"{printable(where)} holds no model: there are no safetensors in it.",
        "",
        f"Give the folder that holds {WEIGHTS}, or {INDEX} and its parts.",
        code="E_BASE",
    )


def _shards(folder: Path) -> dict[Path, list[str] | None]:
    """File → the tensors to take from it; None for all of them."""
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        found = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("*.safetensors"))
        if len(found) != 1:
            raise InputError(
                f"{printable(folder)} holds {len(found)} weight files, neither {WEIGHTS} nor {INDEX}.",
                "Which of them make up the model is not said.",
                "Save it again with transformers: model.save_pretrained(FOLDER).",
                code="E_BASE",
            )
        return {_inside(folder, found[0].name): None}
    try:
        if index.stat().st_size > _MAX_INDEX:
            raise ValueError("it is too large")
        placed = json.loads(index.read_text(encoding="utf8"))["weight_map"]
        parts: dict[Path, list[str] | None] = {}
        for key, file in placed.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"{file!r} is no file of the folder")
            held = parts.setdefault(_inside(folder, file), [])
            assert held is not None
            held.append(key)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{printable(index)} cannot be used: {printable(error)}.",
            "",
            "Fetch or save the model again.",
            code="E_BASE",
        ) from error
    return parts


def _inside(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise InputError(
            f"{printable(folder)} lacks {printable(name)}.", "It is a part of the model.", "Fetch it again.", code="E_BASE"
        )
    return folder / name
