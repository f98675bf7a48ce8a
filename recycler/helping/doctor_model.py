"""What `recycle doctor` looks at in a base and in a composed model: files, fingerprints, scores, and a few forwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycler.helping import doctor_checks as checks
from recycler.helping.doctor_notes import Notes
from recycler.zoo.errors import InputError, RecycleError, counted, shorten

if TYPE_CHECKING:
    from torch import Tensor

    from recycler.base import Base
    from recycler.profiles import Profile
    from recycler.routed import RoutedModel
    from recycler.zoo.store import Zoo

_PROMPTS = ("What is 2 + 2?", "Write a poem about the sea.", "def add(a, b):", "Translate into French: good morning.")
_MOST = 16  # adapters that are tried alone, those that fired first
_SHOTS = 6
_SAME = 1e-6  # of the largest logit


def look_at_base(notes: Notes, place: str, load: Callable[[], Base]) -> Base | None:
    """Loads a base, an id or a folder, and looks at it alone."""
    with notes.during("base"):
        if Path(place).is_dir() and (missing := checks.missing_files(Path(place))):
            raise InputError(
                f"The base {place} is not whole: {shorten(missing)} missing.",
                "A base is a folder with its config, its weights in safetensors and its tokenizer.",
                "Copy or download it again; or give another with --base.",
                code="E_BASE",
            )
        base = load()
        for about, check in (("tokenizer", checks.tokenizer), ("dtype", checks.numbers)):
            with notes.during(about):
                check(notes, base)
        return base
    return None


def compare(notes: Notes, base: Base, recorded: Mapping[str, Any], what: str, profile: Profile | None) -> bool:
    """A base against what was made on it; whether the profile's shots can be read by it."""
    known = _fingerprint(notes, base, recorded, what)
    readable = False
    with notes.during("template"):
        readable = checks.template(notes, base, profile)
    if known and readable and profile is not None:  # on another base scores differ, and the base is why
        with notes.during("tokenizer"):
            _score_base(notes, base, profile)
    return readable


def _fingerprint(notes: Notes, base: Base, recorded: Mapping[str, Any], what: str) -> bool:
    """Whether this is the base that something was made on, as far as is known."""
    from recycler.base import fingerprint

    known, here = recorded.get("fingerprint"), fingerprint(base.model)
    if known and known != here and getattr(base.model.config, "quantization_config", None) is not None:
        notes.suspect(
            "quantisation", f"Whether {base.id} is the base that {what} was made on cannot be seen: it is quantised.",
            "A quantised copy has a fingerprint of its own, and activations that differ a little.",
            f"Compare with the original: --base {recorded.get('id')}",
        )  # fmt: skip
        return False
    if known and known != here:
        notes.problem(
            "base", f"{base.id} is not the base that {what} was made on.",
            f"Its fingerprint is {here}; that of {recorded.get('id')} was {known}. Adapters and gates mean something else on it.",
            f"Give that base: --base {recorded.get('path') or recorded.get('id')}", code="E_BASE_MISMATCH",
        )  # fmt: skip
        return False
    notes.ok("base", f"{base.id}: fingerprint {here}" + (f", as when {what} was made" if known else ""))
    return True


def _score_base(notes: Notes, base: Base, profile: Profile) -> None:
    """The bare base on a few of the profile's shots, against what was measured then."""
    import torch

    from recycler import text

    now, known = [], []
    for t, rows in enumerate(list(profile.shots.values())[:_SHOTS]):
        batch = text.encode(base, [[rows[0]]])
        with torch.no_grad():
            logits_BTV = base.model(**batch.inputs, use_cache=False).logits
        scored_BT = batch.labels_BT != text.IGNORE
        now.append(float(torch.nn.functional.cross_entropy(logits_BTV[scored_BT].float(), batch.labels_BT[scored_BT])))
        known.append(float(profile.nll[0, t, 0]))
    checks.reproduced(notes, profile, now, known, "the base")


def model(
    notes: Notes, zoo: Zoo, place: str | Path, base: str | None, profile: Profile | None, loading: Mapping[str, Any]
) -> tuple[str | None, Base | None]:
    """The router's method and the base, as far as the model could be loaded."""
    from recycler import loading as composed
    from recycler.model_folder import read_manifest
    from recycler.routers.discovery import load_router
    from recycler.sharing.pulling import find

    with notes.during("model"):
        found = find(place)
        folder, manifest = found.folder, read_manifest(found.folder)
        sound = _parts(notes, folder, manifest["adapters"])
        router = None
        with notes.during("router"):
            router = load_router(folder / "router")
        recorded, ours = manifest["base"], found.commit is None
        place = str(base or (recorded.get("path") if ours else None) or recorded["id"])
        loaded = look_at_base(notes, place, lambda: composed._load_base(recorded, base, dict(loading), ours=ours))
        if router is not None:
            checks.changed(notes, {n: h for n, h in router.facts.get("hashes", {}).items() if n in zoo}, zoo, "the router")
            profile = profile or _found(zoo, router.facts)
        if loaded is not None:
            readable = compare(notes, loaded, recorded, "the model", profile)
            if sound and router is not None:
                with notes.during("model"):
                    whole = composed.load(folder, base=loaded)
                    try:
                        _forwards(notes, whole, _questions(profile if readable else None))
                    finally:
                        whole.engine.detach()
        with notes.during("versions"):
            checks.versions_then(notes, manifest.get("versions") or {})
        notes.ok("model", f"{folder}: {counted(len(manifest['adapters']), 'adapter')}, {manifest['router']}")
        return manifest["router"], loaded
    return None, None


def _parts(notes: Notes, folder: Path, records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every adapter of a model can be read, and is the one that was composed."""
    from recycler.zoo import formats
    from recycler.zoo.store import norm_of

    sound, norms = True, {}
    for record in records:
        name = record["name"]
        try:
            adapter = formats.read(folder / "adapters" / name, name)[0]
            found, norms[name] = adapter.sha256, norm_of(adapter) or 0.0
        except RecycleError as error:
            fix = f"Compose the model again, from a zoo that holds {name} whole."
            notes.problem("weights", error.what, error.why, fix, code=error.code, subject=name)
            sound = False
        except OSError as error:
            notes.problem(
                "weights", f"{name} cannot be read: {error}.", fix="Compose the model again.", code="E_FILES", subject=name
            )
            sound = False
        else:
            if found != record["sha256"]:
                notes.problem(
                    "weights", f"The weights of {name} are not those that were composed.",
                    f"Their sha256 is {found}; {record['sha256']} was recorded.", "Compose the model again.", code="E_HASH", subject=name,
                )  # fmt: skip
                sound = False
    checks.norms(notes, norms, "this model")
    return sound


def _found(zoo: Zoo, facts: Mapping[str, Any]) -> Profile | None:
    """The profile that a router was built from, where the zoo still has it."""
    from recycler.profiles import Profile

    name = (facts.get("profile") or {}).get("name")
    folder = zoo.profiles_dir / str(name)
    if not name or Path(name).name != name or not (folder / "profile.json").exists():
        return None
    try:
        profile = Profile.load(folder)
    except (RecycleError, json.JSONDecodeError):
        return None
    return profile if profile.base.get("fingerprint") == (facts.get("base") or {}).get("fingerprint") else None


def _questions(profile: Profile | None) -> list[Any]:
    """A shot of each of a few tasks, or prompts of no task in particular."""
    from recycler.shots import Shot

    if profile is None:
        return [Shot(prompt, "") for prompt in _PROMPTS]
    return [rows[0] for rows in profile.shots.values()][:_SHOTS]


def _forwards(notes: Notes, model: RoutedModel, shots: Sequence[Any]) -> None:
    """The answer's first logits, by the base, the mixture of nothing, the router, and adapters alone."""
    import torch

    from recycler import text
    from recycler.routers.static import StaticRouter

    inputs = text.prompts(model.source, [[shot] for shot in shots])
    if model.source.encoder_decoder:
        start = model.base.config.decoder_start_token_id
        inputs["decoder_input_ids"] = torch.full((len(shots), 1), start, device=model.source.device)
    else:
        inputs = text.causal_inputs(model.source, inputs["input_ids"], inputs["attention_mask"].bool())

    @torch.no_grad()
    def logits() -> Tensor:
        logits_BV: Tensor = model(**inputs).logits[:, -1].float()
        return logits_BV

    with model.disabled():
        base_BV = logits()
    scale = float(base_BV.abs().max())
    if not _finite(notes, base_BV, "the base alone"):
        return

    def away(other_BV: Tensor) -> float:
        return float((other_BV - base_BV).abs().max()) / scale

    with model.mixture({}):
        if away(logits()) > 1e-4:
            notes.problem("adapters", "A mixture that weighs every adapter 0 is not the base.", "The base has changed, or this is a fault.",
                          "Report it with the output of: recycle env", code="E_UNEXPECTED")  # fmt: skip
    firing = model.weights_for(inputs)
    share_BE = firing.share()
    routed_BV = logits()
    fired = [model.names[e] for e in share_BE.sum(0).argsort(descending=True).tolist() if float(share_BE[:, e].abs().sum()) > 0]
    silent = []
    for name in [*fired, *(n for n in model.names if n not in fired)][:_MOST]:
        with model.only(name):
            alone_BV = logits()
        if _finite(notes, alone_BV, name) and away(alone_BV) <= _SAME:
            silent.append(name)
    for name in silent:
        notes.problem(
            "adapters", f"{name} loads, and does nothing: alone at weight 1 it leaves the base's answers as they are.",
            "It is untrained, its update is lost in rounding, or its modules are not used.",
            "Take another checkpoint of it, or leave it out.", code="E_EMPTY", subject=name,
        )  # fmt: skip
    _finite(notes, routed_BV, "the router's mixture")
    if away(routed_BV) > _SAME:
        notes.ok(
            "router",
            f"routed answers differ from the base's; {len(fired)} of {counted(len(model.names), 'adapter')} fired: {shorten(fired, 6)}",
        )
    elif not fired:
        notes.suspect("router", "The router leaves all of these prompts to the base.", "No adapter gets any weight.",
                      "Ask something like the training data (--profile NAME takes its shots); or look at its threshold: -o policy=null")  # fmt: skip
    elif set(fired) - set(silent):
        notes.problem("router", "Adapters fire, and the answers are the base's.", f"{shorten(fired)} got weight, to no effect.",
                      "Build the router again, and compose.", code="E_ROUTER")  # fmt: skip
    top, value = share_BE.max(1).indices.tolist(), float(share_BE.max(1).values.min())
    if (
        len(shots) > 2
        and len(set(top)) == 1
        and value > 0.9
        and len(model.names) > 1
        and not isinstance(model.router, StaticRouter)
    ):
        notes.suspect("router", f"{model.names[top[0]]} answers everything: it has over 90 % on each of {len(shots)} different prompts.",
                      "The router does not tell these prompts apart.", "Compare methods: recycle bench-routers; or recycle eval.")  # fmt: skip


def _finite(notes: Notes, logits_BV: Tensor, who: str) -> bool:
    if bool(logits_BV.isfinite().all()):
        return True
    notes.problem("dtype", f"NaN or infinite logits from {who}.", "Activations overflow, or a weight is damaged.",
                  "Try --dtype float32; if it stays so, the weights are at fault.", code="E_NONFINITE")  # fmt: skip
    return False
