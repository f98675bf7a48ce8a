"""The folder of a composed model: which files it holds, and what recycle.json says. One list, for whoever writes, loads, pushes
or pulls one.

::

    model/  recycle.json                            base, adapters (name, source, sha256), versions
            adapters/<name>/                        adapter_config.json, adapter_model.safetensors, a card, a licence
            router/                                 router.json, router.safetensors
            README.md                               model card
            evaluation.json                         what `recycler.sharing.card.record_evaluation` keeps; may be missing
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from recycler.converting.truncation import Truncation
from recycler.zoo import inspect
from recycler.zoo.documents import read_document
from recycler.zoo.manifest import check_name

SCHEMA_VERSION = 1
MANIFEST = "recycle.json"
CARD = "README.md"
EVALUATION = "evaluation.json"
ADAPTERS = "adapters"
ROUTER = "router"
TOP = (MANIFEST, CARD, EVALUATION, ADAPTERS, ROUTER)
_ROUTER = tuple(f"{ROUTER}/router.{end}" for end in ("json", "safetensors"))


def required(names: Collection[str]) -> list[str]:
    """The files without which a model of these adapters cannot be loaded; posix paths inside its folder."""
    each = (inspect.CONFIG, inspect.WEIGHTS)
    return [MANIFEST, *_ROUTER, *(f"{ADAPTERS}/{name}/{file}" for name in names for file in each)]


def belongs(path: str, names: Collection[str]) -> bool:
    """Whether a file (a posix path inside the folder) is one that a model of these adapters may hold: no code, no pickles, nothing
    of adapters that it does not name."""
    if path in (MANIFEST, CARD, EVALUATION, *_ROUTER):
        return True
    top, _, rest = path.partition("/")
    name, _, file = rest.partition("/")
    return top == ADAPTERS and name in names and inspect.own_files([file]) == [file]


def read_manifest(folder: Path) -> dict[str, Any]:
    """What recycle.json says, with ``truncated`` as adapter → `Truncation`.

    Raises:
        InputError: there is none, it cannot be read, or it is newer than this version.
    """
    return read_document(
        folder / MANIFEST,
        SCHEMA_VERSION,
        _check,
        what="a composed model",
        make="Make one: recycle compose --router DIR --out DIR",
        again="Compose the model again.",
        code="E_MODEL",
    )


def _check(manifest: dict[str, Any]) -> None:
    manifest["base"]["id"]
    for record in manifest["adapters"]:
        record["source"], record["revision"], record["sha256"]
        check_name(record["name"])  # names become paths
    cut = {record["name"]: record["truncated"] for record in manifest["adapters"] if "truncated" in record}
    manifest["truncated"] = {name: Truncation.from_json(facts) for name, facts in cut.items()}
