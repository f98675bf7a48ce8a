"""Why is it not what I expected? Looks at installation, zoo, base, profile and model, and names the likeliest cause first.

People blame the merge when the cause is a template, sampling, quantisation or another base. So everything is looked at that can be
looked at without judging answers: fingerprints, tokenizer, template, numbers; scores that were measured once are measured again;
and a few forwards show whether adapters act at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycler.helping import doctor_checks as checks
from recycler.helping import doctor_model
from recycler.helping.doctor_notes import Finding, Notes
from recycler.helping.doctor_zoo import zoo_health
from recycler.zoo.errors import counted, shorten

if TYPE_CHECKING:
    from recycler.base import Base
    from recycler.profiles import Profile
    from recycler.zoo.store import Zoo

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Diagnosis:
    """What was found, the likeliest cause first."""

    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.level == "problem")

    @property
    def exit_code(self) -> int:
        """0 where there is no problem, else 3."""
        return 3 if self.problems else 0

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        counts = {level: sum(f.level == level for f in self.findings) for level in ("problem", "suspicion", "ok")}
        return {"schema_version": SCHEMA_VERSION, "counts": counts, "findings": [f.to_json() for f in self.findings]}


def examine(
    model: str | Path | None = None,
    *,
    profile: str | Path | None = None,
    base: str | None = None,
    zoo: Zoo | None = None,
    device: str | None = None,
    dtype: str = "auto",
    progress: Callable[[int, str], Callable[..., None]] | None = None,
) -> Diagnosis:
    """Looks at everything that there is to look at. Changes nothing, and raises nothing: what cannot be examined is a finding.

    Args:
        model: a composed model's folder, or its id on the Hub. profile: a name in the zoo, or a folder.
        base: an id or a folder; by default the one that the model or the profile was made on.
        zoo: the default zoo where None. Its adapters are compared with the base, where one is given.
        device, dtype: as `recycler.base.load_base` takes them.
        progress: given the steps and a word, returns what is called at each step.
    """
    notes = Notes()
    sound = True
    with notes.during("installation"):
        sound = checks.installation(notes)
    if not sound:  # all else would only say so in other words
        return Diagnosis(tuple(notes.ranked()))
    from huggingface_hub import constants

    from recycler.base import load_base
    from recycler.zoo.store import Zoo

    zoo = Zoo() if zoo is None else zoo
    loading: dict[str, Any] = {"device": device, "dtype": dtype}
    with notes.during("installation"):
        checks.extras(notes)
    with notes.during("device"):
        checks.machine(notes)
    with notes.during("hub"):
        checks.hub(notes)
    with notes.during("disk"):
        checks.disk(notes, {"zoo": zoo.path, "Hub's cache": Path(constants.HF_HUB_CACHE)})
    scores = None if profile is None else _profile(notes, zoo, profile)
    method = None
    loaded: Base | None = None
    if model is not None:
        method, loaded = doctor_model.model(notes, zoo, model, base, scores, loading)
    elif base is not None or scores is not None:
        name = base or str(scores and (scores.base.get("path") or scores.base["id"]))
        loaded = doctor_model.look_at_base(notes, name, lambda: load_base(name, **loading))
        if loaded is not None:
            recorded = {} if scores is None else scores.base
            doctor_model.compare(notes, loaded, recorded, f"profile {'' if scores is None else scores.name}", scores)
    with notes.during("encoder"):
        checks.encoder(notes, method)
    with notes.during("zoo"):
        from recycler.engine.sites import linear_shapes

        shapes = linear_shapes(loaded.model) if loaded is not None and model is None else None
        zoo_health(notes, zoo, None if loaded is None else loaded.id, shapes, progress)
    return Diagnosis(tuple(notes.ranked()))


def _profile(notes: Notes, zoo: Zoo, name: str | Path) -> Profile | None:
    from recycler.build import profile_folder
    from recycler.profiles import Profile

    with notes.during("model"):
        profile = Profile.load(profile_folder(zoo, name))
        checks.changed(notes, profile.hashes, zoo, f"profile {profile.name}")
        without = [one for one, tasks in profile.own.items() if not tasks]
        if profile.harmful:
            notes.problem(
                "adapters", f"{shorten(profile.harmful)}: every task is clearly worse with it, by profile {profile.name}.",
                "Trained for another base of the same shapes, or broken.", "Look at it with recycle zoo health, or remove it.",
            )  # fmt: skip
        if without:
            notes.suspect(
                "adapters", f"{shorten(without)}: better than the base nowhere, by profile {profile.name}.",
                "Routers that learn from shots cannot choose it.", "Profile the tasks that it was trained for, or leave it out.",
            )  # fmt: skip
        notes.ok(
            "model",
            f"profile {profile.name}: {counted(len(profile.adapters), 'adapter')}, {counted(len(profile.tasks), 'task')}",
        )
        return profile
    return None
