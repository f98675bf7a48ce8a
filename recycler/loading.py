"""A composed model from its folder, or from the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from recycler.base import Base, fingerprint, load_base
from recycler.model_folder import MANIFEST, read_manifest
from recycler.routed import RoutedModel
from recycler.routers.discovery import load_router
from recycler.scoring import Progress, silent
from recycler.sharing.pulling import find
from recycler.shelving import AdapterDtype, Shelving
from recycler.zoo import client_cache, formats
from recycler.zoo.errors import InputError, SecurityError
from recycler.zoo.match import is_hub_id, place


def load(
    path_or_id: str | Path,
    *,
    base: str | Base | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    endpoint: str | None = None,
    resident: int | str | None = None,
    adapter_dtype: AdapterDtype | None = None,
    packed: str | Path | None = None,
    spare: int | None = None,
    progress: Progress = silent,
    **loading: Any,
) -> RoutedModel:
    """Loads a composed model: from its folder, or from the Hub.

    Args:
        path_or_id: a folder, or ``org/name[@revision]``. Where a folder is spelled like an id, the folder is meant;
            ``hf://org/name`` means the Hub.
        base: overrides the base that the model names: an id, a folder that holds a copy, or a loaded one.
        revision, token, cache_dir, local_files_only, force_download, endpoint: of the model on the Hub, as `recycler.sharing.pulling.find`
            takes them. With `local_files_only` no request is made for the base either.
        resident: how much memory adapters may take, bytes or a text such as "2GB": they lie on disk and are paged in as they are
            used. All are in memory where None. ``print(model.engine.shelf)`` says how that goes.
        adapter_dtype: "int8" keeps paged adapters in it until they are used, about 1 % from what they were; the base's dtype where
            None. packed: where they are packed (`recycler.shelving`).
        spare: keep room for so many adapters more (`RoutedModel.exchange`); none where None.
        loading: dtype, device, device_map, as `recycler.base.load_base` takes them.

    Raises:
        InputError: not a composed model, a part of it is missing, or the base does not fit.
        UsageError: `resident` or `adapter_dtype` is nonsense, or the router chooses among components of paged adapters.
        SecurityError: an adapter's weights are not those that were composed. HubError: it cannot be had.
    """
    shelving = Shelving.of(resident, adapter_dtype, packed)
    found = find(
        path_or_id, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only,
        force_download=force_download, endpoint=endpoint, progress=progress,
    )  # fmt: skip
    folder = found.folder
    manifest = read_manifest(folder)
    router = load_router(folder / "router")
    with client_cache.offline(local_files_only):
        loaded = base if isinstance(base, Base) else _load_base(manifest["base"], base, loading, ours=found.commit is None)
    from recycler.engine.sites import linear_shapes

    shapes = linear_shapes(loaded.model)
    adapters = []
    for record in manifest["adapters"]:
        name = record["name"]
        home = folder / "adapters" / name
        # What is wrong is wrong here, not where it came from.
        adapter = formats.read(home, name)[0] if shelving is None else shelving.add(loaded, home, name)
        if adapter.sha256 != record["sha256"]:
            raise SecurityError(
                f"The weights of {name} in {folder} are not those that were composed.",
                f"Their sha256 is {adapter.sha256}, {MANIFEST} says {record['sha256']}.",
                "Compose the model again." if found.commit is None else "Tell its owner, who has to push it again.",
                code="E_HASH",
            )
        came = {"source": record["source"], "revision": record["revision"], "licence": record.get("licence")}
        sites = place(adapter, shapes) if shelving is None else {}
        adapters.append(replace(adapter, sites=sites, **came))
    if tuple(a.name for a in adapters) != router.adapters:
        raise InputError(
            f"The router in {folder} was built for other adapters.", "", "Compose the model again.", code="E_MODEL"
        )
    model = RoutedModel(loaded, adapters, router, shelf=None if shelving is None else shelving.shelf(), spare=spare)
    model.folders = {a.name: folder / "adapters" / a.name for a in adapters}
    model.truncated = manifest["truncated"]
    model.warnings += found.notes
    compare(model, manifest["base"])
    return model


def compare(model: RoutedModel, recorded: Mapping[str, Any]) -> None:
    """Warns where the base is another than the router was built on."""
    known = recorded.get("fingerprint")
    if known and fingerprint(model.source.model) != known:
        model.warnings.append(
            f"{model.source.id} is not the base that the router was built on ({recorded.get('id')}, fingerprint {known}): "
            "its gates were fitted on other activations."
        )


def _load_base(recorded: Mapping[str, Any], given: str | None, loading: dict[str, Any], *, ours: bool) -> Base:
    """The base that was given, else the recorded folder where it exists, else the recorded id. A stranger's model (not `ours`)
    names no folders of this machine."""
    if given is not None:
        return load_base(given, **loading)
    path, name = recorded.get("path"), recorded["id"]
    if not ours and not (isinstance(name, str) and is_hub_id(name)):
        raise InputError(
            "The model names no base that is on the Hub.",
            "It was composed on a folder of somebody's disk.",
            "Name the base, or a folder that holds a copy, with --base.",
            code="E_BASE_UNKNOWN",
        )
    if ours and path and Path(path).is_dir():
        return load_base(path, **loading)
    return load_base(name, revision=recorded.get("revision"), **loading)
