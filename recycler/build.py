"""Zoo + profile → router: the base is loaded, the adapters attached, the gates fitted. Base and adapters stay bit-identical."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recycler import annotating, recruiting, sharding
from recycler.base import Base, fingerprint, load_base
from recycler.journal import only_one
from recycler.profiles import Profile, measure
from recycler.profiles import check_output as check_profile_output
from recycler.routed import RoutedModel
from recycler.routers import calibration
from recycler.routers.base import Derived, Router
from recycler.routers.base import check_output as check_router_output
from recycler.routers.discovery import find, make_config
from recycler.scoring import Fitting, Progress, silent
from recycler.selection import narrowed
from recycler.shots import Shots
from recycler.subtraction import Subtract, renamed, subtracted
from recycler.workers import Workers, connect
from recycler.zoo.adapter import Adapter
from recycler.zoo.errors import InputError, UsageError, choices, shorten
from recycler.zoo.manifest import check_name
from recycler.zoo.match import place, require_one_base
from recycler.zoo.store import Zoo, require_writable


def profile(
    zoo: Zoo | None = None,
    shots: Shots | None = None,
    kshot: int = 16,
    *,
    seed: int = 0,
    out: str | Path | None = None,
    base: str | Base | None = None,
    adapters: Iterable[str] | None = None,
    assign: Mapping[str, str | Iterable[str]] | None = None,
    generate: bool = False,
    force: bool = False,
    engine: str | Workers | None = None,
    progress: Progress = silent,
    **loading: Any,
) -> Profile:
    """Scores the base and every adapter of a zoo on K shots of every task.

    Args:
        shots: all rows; `kshot` of each task are taken, by `seed`, the same every time.
        out: a name inside the zoo, or a folder (anything with a path separator). An interrupted run with the same
            arguments goes on where it stopped, and a finished one is returned as it is. None keeps the result in memory only.
        base: an id or a folder, or a loaded base; by default what the zoo's adapters declare.
        adapters: which of the zoo; all by default.
        assign: adapter → own tasks, by hand.
        generate: also score exact match by generation.
        force: measure again, and replace a finished profile in `out`.
        engine: who computes: "ray" or ``ray://HOST:PORT`` for workers (`recycler.workers`); this process where None. Scores are the same.
        loading: dtype, device, device_map, as `recycler.base.load_base` takes them.

    Raises:
        UsageError, InputError, HubError: each says what to do. UsageError also where `out` holds a profile of another
            measurement, or another run is writing there.
    """
    zoo = Zoo() if zoo is None else zoo
    if not shots:
        raise UsageError(
            "A profile needs shots.", "", "Give JSONL files: Shots.from_files('tasks/*.jsonl')", code="E_NEEDS_PROFILE"
        )
    sample = shots.sample(kshot, seed)
    chosen = _chosen(zoo, adapters)
    where = None if out is None else profile_folder(zoo, out)
    if where is not None:
        check_profile_output(where)
    loaded = _loaded(zoo, chosen, base, loading)
    model = RoutedModel(loaded, read_adapters(zoo, chosen, loaded))
    facts = _base_facts(zoo, chosen, loaded)
    hashes = {adapter.name: adapter.sha256 for adapter in model.adapters}
    name = where.name if where is not None else "profile"
    inputs = f"{facts} {hashes} {loaded.model.dtype}"
    key = sha256(f"{model.names} {sample.sha256} {seed} {inputs} {generate}".encode()).hexdigest()
    empty = Profile(model.names, sample, _blank(len(chosen) + 1, sample), None, facts, hashes, {}, seed, name, where, key)
    given = empty.assign(assign or {}).assigned  # names are checked before the long work
    journal = None if where is None else where / "journal.jsonl"
    with only_one(where):
        if where is not None and not force and (where / "profile.json").exists():
            return _measured(where, key, given)
        try:
            with connect(engine, zoo) as workers:
                nll, exact = measure(
                    model, sample, generate=generate, journal=journal, progress=progress, key=inputs, workers=workers
                )
        finally:
            model.engine.detach()
        result = replace(empty, nll=nll, exact=exact, assigned=given)
        if where is not None and journal is not None:
            result.save(where)
            journal.unlink(missing_ok=True)
    return result


def _measured(folder: Path, key: str, assigned: Mapping[str, tuple[str, ...]]) -> Profile:
    """The profile that is there, if it has the same key. Tasks assigned by hand are no measurement, and are recorded."""
    held = Profile.load(folder)
    if held.key != key:
        raise UsageError(
            f"{folder} holds a profile of another measurement.",
            "Its shots, seed, adapters, base, dtype or --generate differ, and nothing is overwritten unless asked.",
            "Choose another --out, or add --force.",
            code="E_EXISTS",
        )
    if assigned and assigned != held.assigned:
        held = replace(held, assigned=assigned)
        held.save(folder)
    return held


def build_router(
    method: str,
    profile: Profile | str | Path | None = None,
    *,
    zoo: Zoo | None = None,
    base: str | Base | None = None,
    adapters: Iterable[str] | None = None,
    out: str | Path | None = None,
    assign: Mapping[str, str | Iterable[str]] | None = None,
    subtract: Iterable[str] | Subtract | None = None,
    select: str | None = None,
    count: int | None = None,
    force: bool = False,
    engine: str | Workers | None = None,
    progress: Progress = silent,
    loading: dict[str, Any] | None = None,
    **config: Any,
) -> Router:
    """Fits a router.

    Args:
        method: a file name of routers/, or an entry point's. `recycler.build_router` also takes "auto" (see `recycler.evaluating.choosing`).
        profile: a Profile, or its name in the zoo, or its folder. Methods that need no shots work without.
        base: as in `profile`.
        adapters: which of the zoo; by default the profile's, or all.
        out: a folder to save it in; new or empty, unless `force`.
        assign: adapter → own tasks, by hand.
        subtract: general adapters, whose mean is taken out of every other before the router is built; they are not routed to. Scores
            of a profile are those measured before (see `recycler.subtraction`).
        select, count: "kshot" chooses at most `count` of the adapters first, by the profile (see `recycler.selection`).
        force: replace a router that is in `out`.
        engine: who computes, as in `profile`; for methods whose work can be shared.
        config: the method's own options; unknown ones are rejected with the choices.

    Raises:
        UsageError, InputError, HubError: each says what to do.
    """
    zoo = Zoo() if zoo is None else zoo
    cls = find(method)
    settings = make_config(cls, config)
    annotating.allow(getattr(settings, "llm", None), zoo.path)
    if engine not in (None, "local") and not cls.spreads(settings):
        raise UsageError(
            f"{method} has no work that workers could share.",
            "It is fitted in one piece.",
            "Leave --engine out. Others: arrow, and phatgoose with -o alone=true.",
            code="E_OPTION",
        )
    if out is not None:
        check_router_output(Path(out), force)
        require_writable(Path(out))
    if isinstance(profile, (str, Path)):
        profile = Profile.load(profile_folder(zoo, profile))
    if profile is None and cls.needed(settings) & {"shots", "scores"}:
        known = sorted(p.name for p in zoo.profiles_dir.glob("*") if (p / "profile.json").exists())
        raise UsageError(
            f"{method} learns from shots, and no profile was given.",
            f"Profiles in the zoo: {shorten(known) or 'none'}.",
            "Run: recycle profile FILE... --kshot 16 --out NAME, then add --profile NAME",
            code="E_NEEDS_PROFILE",
        )
    selection = narrowed(zoo, profile, adapters, assign, select, count)
    adapters = adapters if selection is None else selection.names
    chosen = _chosen(zoo, adapters if profile is None or adapters is not None else profile.adapters)
    if subtract is not None and not isinstance(subtract, Subtract):
        subtract = Subtract(tuple(subtract))
    general = [] if subtract is None else _chosen(zoo, subtract.general)
    chosen = _chosen(zoo, [name for name in chosen if name not in general])
    if profile is not None:
        profile = _matching(zoo, profile, chosen).assign(assign or {})
        if cls.needed(settings) & {"shots", "scores"} and not any(profile.own.values()):
            raise InputError(
                f"By profile {profile.name}, none of {shorten(chosen)} is better than the base at any task.",
                f"{method} learns from tasks that are an adapter's own, and there are none.",
                "Profile the tasks they were trained for, or say which are theirs: --assign ADAPTER=TASK",
                code="E_NO_GAIN",
            )
    elif assign:
        raise UsageError(
            "Tasks are assigned to adapters of a profile, and none was given.",
            "",
            "Add --profile NAME.",
            code="E_NEEDS_PROFILE",
        )
    calibration.check(cls, settings, profile)
    loaded = _loaded(
        zoo, chosen, base or (None if profile is None else profile.base.get("path")), loading or {}, sharding.together()
    )
    if profile is not None:
        _same_base(profile, loaded)
    model = RoutedModel(loaded, read_adapters(zoo, [*chosen, *general], loaded))
    hashes = {adapter.name: adapter.sha256 for adapter in model.adapters}
    facts = _base_facts(zoo, [*chosen, *general], loaded)
    stages: list[Sequence[Adapter]] = []  # adapters made out of the zoo's, and out of those
    started = time.perf_counter()
    try:
        if subtract is not None:
            stages.append(subtracted(Fitting(model, progress), subtract))
            model = _holding(stages[-1], model)
            profile = None if profile is None else renamed(profile, {name: subtract.name(name) for name in chosen})
        made = cls.derive(Fitting(model, progress), profile, settings)
        if made:
            stages.append(made)
            model = _holding(made, model)
        with connect(engine, zoo) as workers:
            router = cls.fit(Fitting(model, progress, workers), profile, settings)
        calibration.calibrate(router, Fitting(model, progress), profile)
        if out is not None:  # one that is not kept does so when it is first asked
            recruiting.settle(model, router, progress)
    finally:
        model.engine.detach()
    router.derived = tuple(replace(adapter, base=adapter.base or facts["id"]) for adapter in (stages[-1] if stages else ()))
    router.report |= {adapter.name: dict(adapter.facts) for made in stages for adapter in made if isinstance(adapter, Derived)}
    router.report |= {} if selection is None else {"selected": dict(selection.reasons)}
    router.report["seconds"] = round(time.perf_counter() - started, 1)
    router.facts = {
        "base": facts,
        "hashes": hashes,
        "profile": None if profile is None else profile.summary(),
        **({"derived": _origins(stages)} if stages else {}),
        "versions": {name: version(name) for name in ("recycler", "torch", "transformers")},
    }
    if out is not None and sharding.leads():
        router.save(Path(out), force=force)
    if sharding.together():
        sharding.meet()
    return router


def _holding(adapters: Sequence[Adapter], model: RoutedModel) -> RoutedModel:
    """Other adapters on the model's base."""
    model.engine.detach()
    return RoutedModel(model.source, adapters)


def _origins(stages: Sequence[Sequence[Adapter]]) -> dict[str, dict[str, Any]]:
    """Adapter of the last stage → the zoo's adapters that are in it ("of"), and how ("source")."""
    of: dict[str, list[str]] = {}
    for made in stages:
        before = dict(of)
        for adapter in made:
            if isinstance(adapter, Derived):
                of[adapter.name] = list(dict.fromkeys(one for part in adapter.parts for one in before.get(part, [part])))
    return {adapter.name: {"of": of[adapter.name], "source": adapter.source} for adapter in stages[-1] if adapter.name in of}


def subject(
    zoo: Zoo,
    profile: Profile | str | Path,
    *,
    base: str | Base | None = None,
    adapters: Iterable[str] | None = None,
    assign: Mapping[str, str | Iterable[str]] | None = None,
    loading: dict[str, Any] | None = None,
) -> tuple[Profile, Base]:
    """What `build_router` works on: a profile of some of a zoo's adapters, checked against these, and its base, loaded.

    Args: as of `build_router`. Raises: as `build_router`.
    """
    if isinstance(profile, (str, Path)):
        profile = Profile.load(profile_folder(zoo, profile))
    chosen = _chosen(zoo, profile.adapters if adapters is None else adapters)
    profile = _matching(zoo, profile, chosen).assign(assign or {})
    loaded = _loaded(zoo, chosen, base or profile.base.get("path"), loading or {})
    _same_base(profile, loaded)
    return profile, loaded


def profile_folder(zoo: Zoo, name: str | Path) -> Path:
    """Where a profile is kept: a bare name means a folder of the zoo."""
    return _folder(zoo.profiles_dir, name)


def router_folder(zoo: Zoo, name: str | Path) -> Path:
    """Where a router is kept: a bare name means a folder of the zoo, unless there is such a folder here."""
    here = Path(name)
    return here if (here / "router.json").exists() else _folder(zoo.routers_dir, name)


def _folder(parent: Path, name: str | Path) -> Path:
    if isinstance(name, Path) or "/" in name or "\\" in name or name in (".", ".."):
        return Path(name).expanduser()
    try:
        return parent / check_name(name)
    except UsageError as error:
        fix = "Use such a name, or a path: ./" + name
        raise UsageError(f"{name!r} cannot name a folder of the zoo.", error.why, fix, code="E_NAME") from None


def read_adapters(zoo: Zoo, names: Iterable[str], base: Base) -> list[Adapter]:
    """Reads adapters and places them on a base; all that do not fit are named.

    Raises:
        InputError: some do not fit. Errors of reading as `Zoo` raises them.
    """
    from recycler.engine.sites import linear_shapes

    shapes = linear_shapes(base.model)
    adapters, wrong = [], []
    for name in names:
        adapter = zoo[name]
        try:
            adapters.append(replace(adapter, sites=place(adapter, shapes)))
        except InputError as error:
            wrong.append(error)
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        raise InputError(
            f"{len(wrong)} adapters do not fit {base.id}: " + " ".join(e.what for e in wrong[:5]),
            "One model has one base.",
            "Give their base with --base, or choose adapters with --adapters.",
            code="E_SITES",
        )
    return adapters


def base_of(zoo: Zoo, names: Iterable[str]) -> str:
    """The base that adapters of a zoo were fetched for: the folder that was recorded as a copy, else the declared id.

    Raises:
        InputError: they were trained for different bases. UsageError: none is known.
    """
    entries = {name: zoo.entry(name) for name in names}
    declared = require_one_base({name: entry.base for name, entry in entries.items()})
    folders = [e.base_path for e in entries.values() if e.base_path and Path(e.base_path).is_dir()]
    if folders or declared:
        return folders[0] if folders else str(declared)
    raise UsageError("The adapters declare no base.", "", "Name one with --base.")


def _loaded(zoo: Zoo, names: Iterable[str], base: str | Base | None, loading: dict[str, Any], shared: bool = False) -> Base:
    if isinstance(base, Base):
        return base
    return (sharding.load if shared else load_base)(base or base_of(zoo, names), **loading)


def _base_facts(zoo: Zoo, names: Iterable[str], loaded: Base) -> dict[str, Any]:
    declared = require_one_base({name: zoo.entry(name).base for name in names})
    path = str(Path(loaded.id).resolve()) if Path(loaded.id).is_dir() else loaded.id
    return {
        "id": declared or loaded.id,
        "path": path,
        "revision": loaded.revision,
        "fingerprint": fingerprint(loaded.model),
    }


def _chosen(zoo: Zoo, adapters: Iterable[str] | None) -> list[str]:
    chosen = list(zoo.entries) if adapters is None else list(dict.fromkeys(adapters))
    if not chosen and adapters is not None:
        raise UsageError("No adapters were chosen.", "", f"Name some of the zoo's ({choices(zoo)}), or leave them all.")
    if not chosen:
        raise UsageError(
            f"The zoo at {zoo.path} is empty.", "", "Run: recycle fetch ORG/NAME, or recycle fetch FOLDER", code="E_EMPTY_ZOO"
        )
    for name in chosen:
        zoo.entry(name)
    return chosen


def _matching(zoo: Zoo, profile: Profile, chosen: Sequence[str]) -> Profile:
    """What the profile says of the chosen adapters, if it was measured on these very ones."""
    strangers = [name for name in chosen if name not in profile.adapters]
    if strangers:
        raise UsageError(
            f"Profile {profile.name} knows nothing of {shorten(strangers)}.",
            f"It was measured with {choices(profile.adapters).removeprefix('one of: ')}.",
            "Run recycle profile again, or leave them out with --adapters.",
            code="E_UNKNOWN",
        )
    changed = [
        n
        for n in chosen
        if profile.hashes.get(n) and zoo.entry(n).files["adapter_model.safetensors"]["sha256"] != profile.hashes[n]
    ]
    if changed:
        raise InputError(
            f"{shorten(changed)} changed since profile {profile.name} was measured.",
            "Its scores are another adapter's.",
            "Run recycle profile again.",
            code="E_CHANGED",
        )
    return profile.restricted(chosen)


def _same_base(profile: Profile, loaded: Base) -> None:
    known, here = profile.base.get("fingerprint"), fingerprint(loaded.model)
    if known and known != here:
        raise InputError(
            f"{loaded.id} is not the base that profile {profile.name} was measured on.",
            f"Its fingerprint is {here}; that of {profile.base.get('id')} was {known}.",
            "Give that base with --base, or run recycle profile again on this one.",
            code="E_BASE_MISMATCH",
        )


def _blank(rows: int, shots: Shots) -> Any:
    import torch

    return torch.zeros(rows, len(shots), len(next(iter(shots.values()))))
