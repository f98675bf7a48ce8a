"""A router changed later: one adapter more, or one less. The others' columns stay as they are, and nothing is learned again.

Which methods can is said by `Router.extends` (`recycle routers` lists it); what the others would have to learn again, they would
have to learn for all adapters.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recycler.base import Base, fingerprint, load_base
from recycler.build import base_of, profile_folder, read_adapters, router_folder, subject
from recycler.composition import recorded_base
from recycler.profiles import Profile
from recycler.routed import RoutedModel
from recycler.routers.base import Router
from recycler.routers.base import check_output as check_router_output
from recycler.routers.discovery import load_router, methods
from recycler.scoring import Fitting, Progress, silent
from recycler.zoo.errors import InputError, UsageError, shorten
from recycler.zoo.store import Zoo, require_writable


def add_adapter(
    router: Router | str | Path,
    name: str,
    profile: Profile | str | Path | None = None,
    *,
    zoo: Zoo | None = None,
    base: str | Base | None = None,
    out: str | Path | None = None,
    assign: Mapping[str, str | Iterable[str]] | None = None,
    force: bool = False,
    progress: Progress = silent,
    loading: dict[str, Any] | None = None,
) -> Router:
    """The same router with one adapter more, as its last, learned from that adapter's own shots alone.

    Args:
        router: a Router, or its folder, or its name in the zoo. It is not changed.
        profile: a Profile that knows the new adapter, or its name in the zoo, or its folder; it need not know the others. Methods
            that need no shots work without.
        base, out, assign, force, loading: as of `recycler.build_router`; by default the base is the one that the router was built on.

    Raises:
        UsageError: its method learns all adapters together, it holds the adapter already, or the profile does not know it.
        InputError: the base is another one, an adapter changed since, or the profile finds no task that is the new one's own.
    """
    zoo = Zoo() if zoo is None else zoo
    router = _open(zoo, router, "extended", "take in one adapter more")
    _check_output(out, force)
    zoo.entry(name)
    if name in router.adapters:
        raise UsageError(f"The router holds {name} already.", "", "Remove it first, to learn it again.", code="E_FIXED")
    _unchanged(zoo, router)
    names = [*router.adapters, name]
    needed = router.needed(router.config)
    base = base or recorded_base(router) or base_of(zoo, names)
    if profile is None:
        if needed & {"shots", "scores"}:
            raise UsageError(
                f"{router.method()} learns from shots, and no profile of {name} was given.",
                "",
                f"Run: recycle profile FILE... --adapters {name} --out NAME, then add --profile NAME",
                code="E_NEEDS_PROFILE",
            )
        if assign:
            raise UsageError(
                "Tasks are assigned to adapters of a profile, and none was given.",
                "",
                "Add --profile NAME.",
                code="E_NEEDS_PROFILE",
            )
        loaded = base if isinstance(base, Base) else load_base(base, **(loading or {}))
    else:
        profile = profile if isinstance(profile, Profile) else Profile.load(profile_folder(zoo, profile))
        known = [other for other in router.adapters if other in profile.adapters]
        profile, loaded = subject(zoo, profile, base=base, adapters=[*known, name], assign=assign, loading=loading)
        if needed & {"shots", "scores"} and not profile.own.get(name):
            raise InputError(
                f"By profile {profile.name}, {name} is better than the base at no task, or others are at all of them.",
                f"{router.method()} learns it from the tasks that are its own.",
                f"Profile the tasks it was trained for, or say which are its own: --assign {name}=TASK",
                code="E_NO_GAIN",
            )
    _same_base(router, loaded)
    model = RoutedModel(loaded, read_adapters(zoo, names, loaded))
    started = time.perf_counter()
    try:
        grown = router.extended(Fitting(model, progress), profile, name)
        _covers(grown, model, name)
    finally:
        model.engine.detach()
    hashes = {**router.facts.get("hashes", {}), name: model.adapters[-1].sha256}
    change = {"add": name, "profile": None if profile is None else profile.name}
    summary = _with(router.facts.get("profile"), profile, names)
    return _keep(router, grown, hashes, summary, change, time.perf_counter() - started, out, force)


def remove_adapter(
    router: Router | str | Path,
    name: str,
    profile: Profile | str | Path | None = None,
    *,
    zoo: Zoo | None = None,
    out: str | Path | None = None,
    force: bool = False,
) -> Router:
    """The same router without one adapter. Neither the base nor the adapters are needed.

    Args:
        router: a Router, or its folder, or its name in the zoo. It is not changed.
        profile: that of the others, or its name in the zoo, or its folder: says whose the tasks of the one that goes are now.

    Raises:
        UsageError: its method learns all adapters together, or it has no such adapter, or no other.
    """
    zoo = Zoo() if zoo is None else zoo
    router = _open(zoo, router, "without", "let go of one adapter")
    _check_output(out, force)
    started = time.perf_counter()
    left = router.without(name)
    hashes = {other: value for other, value in router.facts.get("hashes", {}).items() if other != name}
    if profile is not None and not isinstance(profile, Profile):
        profile = Profile.load(profile_folder(zoo, profile))
    if profile is not None:
        strangers = [other for other in left.adapters if other not in profile.adapters]
        if strangers:
            raise UsageError(
                f"Profile {profile.name} knows nothing of {shorten(strangers)}.", "", "Leave --profile out.", code="E_UNKNOWN"
            )
        summary: dict[str, Any] | None = profile.restricted(left.adapters).summary()
    else:
        summary = _less(router.facts.get("profile"), name)
    return _keep(router, left, hashes, summary, {"remove": name}, time.perf_counter() - started, out, force)


def _open(zoo: Zoo, router: Router | str | Path, change: str, what: str) -> Router:
    """The router, if its method defines the change."""
    router = router if isinstance(router, Router) else load_router(router_folder(zoo, router))
    if not _defines(type(router), change):
        able = shorten(sorted(name for name, cls in methods().items() if _defines(cls, change)), 20)
        raise UsageError(
            f"{router.method()} cannot {what}.",
            f"It learns all adapters together, so that the others would change too. These do not: {able}.",
            "Build it again.",
            code="E_FIXED",
        )
    if router.derived:
        raise UsageError(
            f"This router cannot {what}.",
            "It routes among adapters that were made out of the zoo's, all of them together.",
            "Build it again.",
            code="E_FIXED",
        )
    return router


def _defines(cls: type[Router], change: str) -> bool:
    return getattr(cls, change) is not getattr(Router, change)


def _check_output(out: str | Path | None, force: bool) -> None:
    if out is not None:
        check_router_output(Path(out), force)
        require_writable(Path(out))


def _unchanged(zoo: Zoo, router: Router) -> None:
    known = router.facts.get("hashes", {})
    held = {name: zoo.entry(name).files["adapter_model.safetensors"]["sha256"] for name in router.adapters}
    changed = [name for name in router.adapters if known.get(name, held[name]) != held[name]]
    if changed:
        raise InputError(
            f"{shorten(changed)} changed since the router was built.",
            "Its gates are for other weights.",
            "Build it again.",
            code="E_CHANGED",
        )


def _same_base(router: Router, loaded: Base) -> None:
    recorded = router.facts.get("base") or {}
    known, here = recorded.get("fingerprint"), fingerprint(loaded.model)
    if known and known != here:
        raise InputError(
            f"{loaded.id} is not the base that the router was built on.",
            f"Its fingerprint is {here}; that of {recorded.get('id')} was {known}.",
            "Give that base with --base, or build a router for this one.",
            code="E_BASE_MISMATCH",
        )


def _covers(router: Router, model: RoutedModel, name: str) -> None:
    """The new adapter may touch linears that none of the others does."""
    try:
        for group in model.engine.groups:
            router.gate(group)
    except InputError as error:
        raise InputError(
            f"{name} touches linears that no adapter of this router touches, and {router.method()} cannot add these.",
            error.what,
            "Build it again, with all adapters.",
            code="E_SITES",
        ) from None


def _with(old: Mapping[str, Any] | None, profile: Profile | None, names: list[str]) -> dict[str, Any] | None:
    """What the router remembers of profiles. One that knows all adapters replaces the old; one that knows the new adapter, and not
    all others, adds its own tasks."""
    if profile is None:
        return None if old is None else dict(old)
    if set(profile.adapters) == set(names) or old is None:
        return profile.summary()
    mine = list(profile.own.get(names[-1], ()))
    return {
        **old,
        "tasks": list(dict.fromkeys([*old.get("tasks", []), *mine])),
        "own": {**old.get("own", {}), names[-1]: mine},
        "owner": {**old.get("owner", {}), **dict.fromkeys(mine, names[-1])},
    }


def _less(old: Mapping[str, Any] | None, name: str) -> dict[str, Any] | None:
    """What the router remembers of its profile, without an adapter. Who comes second on its tasks is not known here: nobody."""
    if old is None:
        return None
    kept = dict(old)
    for key, whose in (("own", lambda item: item[0]), ("owner", lambda item: item[1])):
        kept[key] = dict(item for item in old.get(key, {}).items() if whose(item) != name)
    if old.get("best_single") == name:
        kept["best_single"] = None
    return kept


def _keep(
    old: Router, new: Router, hashes: dict[str, str], summary: dict[str, Any] | None, change: dict[str, Any], seconds: float,
    out: str | Path | None, force: bool,
) -> Router:  # fmt: skip
    new.thresholds = {**old.thresholds, **new.thresholds}
    new.facts = {
        **old.facts,
        "hashes": hashes,
        "profile": summary,
        "updates": [*old.facts.get("updates", []), change],
        "versions": {name: version(name) for name in ("recycler", "torch", "transformers")},
    }
    new.thresholds = dict(old.thresholds)
    new.report = {**old.report, **new.report, "seconds": round(seconds, 1)}
    if out is not None:
        new.save(Path(out), force=force)
    return new
