"""Zoo + router → one model, in memory and as a directory that stands on its own (`recycler.model_folder` says what is in it;
`recycler.loading` reads it). Adapters are written as fetched, or cut to --max-rank: each still loads in PEFT. recycle.json comes last.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recycler.base import Base, load_base
from recycler.build import base_of, read_adapters, router_folder
from recycler.converting.truncation import Truncation, truncate
from recycler.loading import compare
from recycler.loading import load as load
from recycler.model_folder import CARD, MANIFEST, SCHEMA_VERSION, TOP
from recycler.routed import RoutedModel
from recycler.routers.base import Router
from recycler.routers.discovery import load_router
from recycler.sharing.card import card
from recycler.shelving import AdapterDtype, Shelving
from recycler.zoo import formats, licences
from recycler.zoo.adapter import Adapter
from recycler.zoo.errors import InputError, UsageError, shorten
from recycler.zoo.lowrank import check_dials
from recycler.zoo.store import Zoo
from recycler.zoo.writing import write_adapter


def compose(
    zoo: Zoo | None,
    router: Router | str | Path,
    out: str | Path | None = None,
    *,
    base: str | Base | None = None,
    force: bool = False,
    max_rank: int | None = None,
    license_allow: Iterable[str] | None = None,
    strict: bool = False,
    resident: int | str | None = None,
    adapter_dtype: AdapterDtype | None = None,
    packed: str | Path | None = None,
    spare: int | None = None,
    **loading: Any,
) -> RoutedModel:
    """Puts base, adapters and router together.

    Args:
        zoo: where the router's adapters are; the default zoo where None.
        router: a Router, or its folder, or its name in the zoo.
        out: a folder to save the model in; must be empty or new unless `force`.
        base: an id, a folder or a loaded base; by default the one the router was built on.
        max_rank: cut adapters of a higher rank to this one, site by site; ``model.truncated`` says what that lost.
        license_allow: the licences that adapters may state; any where None. strict: what states none, is not recognised or is in
            conflict with another may not go in either.
        resident, adapter_dtype, packed, spare: as `load` takes them.
        loading: dtype, device, device_map, as `recycler.base.load_base` takes them.

    Raises:
        InputError: an adapter is missing, changed since the router was built, does not fit the base, or has a licence that may
            not go in.
        UsageError: `out` is not empty, or `max_rank` is below 1; or adapters are to be paged that are made or cut here.
    """
    check_dials(max_rank, None)
    shelving = Shelving.of(resident, adapter_dtype, packed)
    zoo = Zoo() if zoo is None else zoo
    if not isinstance(router, Router):
        router = load_router(router_folder(zoo, router))
    if out is not None:
        check_output(Path(out), force)
    made = {adapter.name for adapter in router.derived}
    if shelving is not None and (made or max_rank is not None):
        raise UsageError(
            "Adapters that are made or cut while composing cannot be paged.",
            "They have no files yet.",
            "Compose with --out and without resident, then load that folder with it.",
            code="E_MEMORY",
        )
    hashes = router.facts.get("hashes") or {name: "" for name in router.adapters if name not in made}
    # In the router's order, which a saved mapping has lost.
    needed = [name for name in router.adapters if name in hashes] + [name for name in hashes if name not in router.adapters]
    missing = [name for name in needed if name not in zoo]
    if missing:
        raise InputError(
            f"The router needs {shorten(missing)}, which the zoo at {zoo.path} does not hold.",
            "A router's columns belong to the adapters it was built for.",
            "Fetch them, or build the router again.",
            code="E_ROUTER",
        )
    if license_allow is not None or strict:
        allow = None if license_allow is None else licences.parse_list(",".join(license_allow))
        licences.require({name: zoo.entry(name).licence for name in needed}, allow, strict=strict)
    if not isinstance(base, Base):
        base = load_base(base or recorded_base(router) or base_of(zoo, needed), **loading)
    adapters = (
        read_adapters(zoo, needed, base) if shelving is None else [_shelved(shelving, zoo, name, base) for name in needed]
    )
    changed = [a.name for a in adapters if router.facts.get("hashes", {}).get(a.name, a.sha256) != a.sha256]
    if changed:
        raise InputError(
            f"{shorten(changed)} changed since the router was built.",
            "Its gates are for other weights.",
            "Build it again.",
            code="E_CHANGED",
        )
    folders = {name: zoo.folder(name) for name in needed}
    scratch: Path | None = None
    if made:
        scratch = Path(tempfile.mkdtemp(prefix="recycler-"))
        adapters, folders = _derived(router, adapters, scratch)
    truncated: dict[str, Truncation] = {}
    if max_rank is not None and any(max(a.ranks) > max_rank for a in adapters):
        scratch = scratch or Path(tempfile.mkdtemp(prefix="recycler-"))
        adapters, folders, truncated = _truncated(adapters, folders, max_rank, base, scratch)
    model = RoutedModel(base, adapters, router, shelf=None if shelving is None else shelving.shelf(), spare=spare)
    model.folders, model.truncated = folders, truncated
    if scratch is not None:
        weakref.finalize(model, shutil.rmtree, scratch, True)
    compare(model, router.facts.get("base") or {})
    if out is not None:
        save(model, Path(out), force=force)
    return model


def _shelved(shelving: Shelving, zoo: Zoo, name: str, base: Base) -> Adapter:
    entry = zoo.entry(name)
    adapter = shelving.add(base, zoo.folder(name), name)
    if adapter.sha256 != entry.weights:
        return zoo[name]  # which says what is wrong
    return replace(adapter, source=entry.source, revision=entry.revision, base=entry.base, licence=entry.licence)


def _derived(router: Router, sources: Sequence[Adapter], scratch: Path) -> tuple[list[Adapter], dict[str, Path]]:
    """The adapters that a router made itself, with the licences of those it made them from, and their folders."""
    origins = router.facts.get("derived") or {}
    made, folders = [], {}
    for adapter in router.derived:
        origin = origins.get(adapter.name) or {}
        parts = [one for one in sources if one.name in origin.get("of", [one.name])]
        source = origin.get("source") or f"{router.method()} of {', '.join(one.name for one in parts)}"
        texts = sorted({one.licence for one in parts if one.licence})
        # Several hold together; where one states none, nothing is granted by it, so that the whole states none.
        licence = ", ".join(texts) if all(licences.stated(one.licence) for one in parts) else None
        folders[adapter.name] = scratch / "derived" / adapter.name
        folders[adapter.name].mkdir(parents=True)
        write_adapter(folders[adapter.name], adapter.sites, base=adapter.base)
        read, _ = formats.read(folders[adapter.name], adapter.name)
        made.append(replace(adapter, sha256=read.sha256, source=source, licence=licence or None))
    return made, folders


def _truncated(
    adapters: list[Adapter], folders: dict[str, Path], rank: int, base: Base, scratch: Path
) -> tuple[list[Adapter], dict[str, Path], dict[str, Truncation]]:
    """Adapters, their folders, and what was cut from whom; whoever has no higher rank stays as it is."""
    from recycler.engine.sites import weight_OD

    done: list[Adapter] = []
    places, facts = dict(folders), {}
    for adapter in adapters:
        name = adapter.name
        found = truncate(
            adapter, rank, folders[name], scratch / name, lambda path: weight_OD(base.model.get_submodule(path)).cpu()
        )
        if found is None:
            done.append(adapter)
        else:
            done.append(found[0])
            places[name], facts[name] = scratch / name, found[1]
    return done, places, facts


def check_output(folder: Path, force: bool) -> None:
    """Raises UsageError when `folder` is in use and may not be replaced."""
    if folder.is_file():
        raise UsageError(f"{folder} is a file.", "", "Choose another --out.", code="E_EXISTS")
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if held and not force:
        raise UsageError(
            f"{folder} is not empty.",
            "Nothing is overwritten unless asked.",
            "Choose another --out, or add --force.",
            code="E_EXISTS",
        )
    if held and MANIFEST not in held:
        raise UsageError(
            f"{folder} holds something else than a composed model.",
            "--force replaces models only.",
            "Choose another --out.",
            code="E_EXISTS",
        )
    strangers = sorted(held - set(TOP))
    if strangers:
        raise UsageError(
            f"{folder} holds a composed model, and beside it {shorten(strangers)}.",
            "--force replaces models only, and that would be lost.",
            "Move it away, or choose another --out.",
            code="E_EXISTS",
        )


def save(model: RoutedModel, folder: Path, *, force: bool = False) -> Path:
    """Writes a model's directory: all of it beside the target, then one rename.

    Raises:
        UsageError: the folder is in use, or the model has no router.
    """
    check_output(folder, force)
    if model.router is None:
        raise UsageError("This model has no router to save.", "", "Compose one: recycler.compose(zoo, router)")
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        for adapter in model.adapters:
            shutil.copytree(model.folders[adapter.name], temporary / "adapters" / adapter.name)
        model.router.save(temporary / "router", statistics=False)
        facts = model.router.facts
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "base": {"id": model.source.id, **facts.get("base", {}), **_where(model.source)},
            "adapters": [
                {
                    "name": a.name,
                    "source": a.source,
                    "revision": a.revision,
                    "sha256": a.sha256,
                    "licence": a.licence,
                    **({"truncated": model.truncated[a.name].to_json()} if a.name in model.truncated else {}),
                }
                for a in model.adapters
            ],
            "router": model.router.method(),
            "versions": {name: version(name) for name in ("recycler", "torch", "transformers", "peft")},
        }
        (temporary / CARD).write_text(card(model, manifest), encoding="utf8")
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf8")
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    model.folders = {a.name: folder / "adapters" / a.name for a in model.adapters}
    return folder


def _where(base: Base) -> dict[str, Any]:
    """Where this base can be had; the id and the fingerprint stay those that the router was built on."""
    folder = Path(base.id)
    return {"path": str(folder.resolve()) if folder.is_dir() else base.id, "revision": base.revision}


def replace_folder(new: Path, target: Path) -> None:
    """Puts `new` where `target` is; what was there goes away only once the new one is in place."""
    if not target.exists():
        new.rename(target)
        return
    old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def recorded_base(router: Router) -> str | None:
    """The base that a router was built on: its folder where that is still here, else its id."""
    facts = router.facts.get("base") or {}
    path = facts.get("path")
    return path if path and Path(path).is_dir() else facts.get("id")
