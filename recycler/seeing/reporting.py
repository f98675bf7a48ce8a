"""One page about a zoo and its router: is it worth it, who is good at what, who answers, who is like whom, and under which licences.

What there is no data for is left out, and the page says which command would give it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycler.build import profile_folder
from recycler.model_folder import EVALUATION, read_manifest
from recycler.pictures import canvas
from recycler.pictures.results import Results, parse, read
from recycler.pictures.routing import LayerWeights
from recycler.pictures.similarity import Cosines
from recycler.pictures.tasks import TaskScores
from recycler.profiles import Profile
from recycler.scoring import Progress, silent
from recycler.shots import Shot, Shots
from recycler.zoo import formats
from recycler.zoo.errors import RecycleError, UsageError
from recycler.zoo.store import Zoo

if TYPE_CHECKING:
    from recycler.routed import RoutedModel
    from recycler.seeing.explaining import Explanation
    from recycler.zoo.adapter import Adapter

_MAPPED = 32  # prompts behind the routing map
_EXAMPLES = 8  # of them, token by token
_NEW_TOKENS = 32  # of an example's answer


@dataclass(frozen=True)
class Origin:
    """Where an adapter came from, and what its card states."""

    name: str
    source: str
    revision: str | None
    licence: str | None


@dataclass(frozen=True)
class Report:
    """What a page shows; None or empty where there is no data.

    Attributes:
        title: the model's or the profile's name. facts: label → text, for the head of the page.
        results_from: in words, where the results are from.
        examples: (task or None, explanation, the reference or ""), each a prompt with its answer.
        missing: the adapters that were profiled, and that the zoo no longer holds.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    results: Results | None = None
    results_from: str = ""
    scores: TaskScores | None = None
    routing: LayerWeights | None = None
    examples: Sequence[tuple[str | None, Explanation, str]] = ()
    cosines: Cosines | None = None
    origins: Sequence[Origin] = ()
    missing: Sequence[str] = ()


def report(
    model: str | Path | None = None,
    out: str | Path = "report.html",
    *,
    profile: Profile | str | Path | None = None,
    bench: str | Path | None = None,
    tasks: Shots | None = None,
    rows: int | None = None,
    prompts: Iterable[str] = (),
    max_new_tokens: int | None = None,
    zoo: Zoo | None = None,
    base: str | None = None,
    force: bool = False,
    progress: Progress = silent,
    loading: dict[str, Any] | None = None,
) -> Path:
    """Writes a page that opens from disk and loads nothing.

    Args:
        model: a composed model, a folder or an id of the Hub. out: the page.
        profile: what was measured on shots; by default the one that the model's router was built from, where the zoo still holds it.
        bench: a folder of `bench_routers`, or a file with what ``recycle eval --json`` printed. Without it, the model is evaluated on
            `tasks`; without these, what was kept in its folder is shown.
        rows: of each task, at most, from the top.
        prompts: examples to show token by token; by default some of `tasks`, else of the profile's shots.
        max_new_tokens: of answers; by default what the reference needs and a little more, and 32 for examples.
        loading: dtype, device, device_map, as `recycler.base.load_base` takes them.

    Raises:
        UsageError: there is nothing to report on, `out` exists and not `force`, or matplotlib is missing.
        InputError: the model, profile or bench cannot be read.
    """
    from recycler.seeing.report_page import page

    path = check_page(out, force)
    if model is None and profile is None and bench is None:
        raise UsageError("There is nothing to report on.", "", "Name a composed model, --profile NAME, or --bench FOLDER.")
    asked = tuple(prompts)
    if model is None and (asked or tasks is not None):
        raise UsageError("Prompts and tasks are answered by a model.", "None was named.", "recycle report MODEL -p TEXT")
    if asked:
        from recycler.seeing.explaining import check_prompt

        for prompt in asked:
            check_prompt(prompt)
    zoo = Zoo() if zoo is None else zoo
    results, told = (None, "") if bench is None else (read(bench), f"from {Path(bench).name}")
    if profile is not None and not isinstance(profile, Profile):
        profile = Profile.load(profile_folder(zoo, profile))
    gathered = _Gathered(zoo, profile, progress)
    if model is not None:
        gathered.model(model)
    shown = gathered.prompts(asked, tasks, rows)
    examples: list[tuple[str | None, Explanation, str]] = []
    routing = None
    if model is not None and shown:
        from recycler.loading import load

        loaded = load(model, base=base, **(loading or {}))
        try:
            if results is None and tasks is not None:
                results = _evaluated(loaded, tasks, rows, max_new_tokens, progress)
                told = "measured for this page"
            routing = LayerWeights.of(loaded, [shot for _, shot in shown], tasks=[task for task, _ in shown])
            examples = _explained(loaded, shown, max_new_tokens or _NEW_TOKENS, progress)
        finally:
            loaded.engine.detach()
    if results is None and gathered.kept is not None:
        results, told = gathered.kept, "kept in the model's folder"
    profile = gathered.profile
    content = Report(
        title=Path(model).name or str(model) if model is not None else profile.name if profile else Path(str(bench)).name,
        facts=gathered.facts(),
        results=results,
        results_from=told,
        scores=None if profile is None else TaskScores.of(profile),
        routing=routing,
        examples=examples,
        cosines=gathered.cosines(),
        origins=gathered.origins,
        missing=gathered.missing,
    )
    text = page(content)
    canvas.write_bytes(path, text.encode("utf8", "replace"))
    return path


def check_page(out: str | Path, force: bool = False) -> Path:
    """The page's file, before any work is done for it.

    Raises:
        UsageError: it exists, or matplotlib is missing.
    """
    canvas.require()
    path = Path(out).expanduser()
    canvas.check_free(path, force)
    return path


class _Gathered:
    """What is known without a forward: the adapters, where they are from, and the profile."""

    def __init__(self, zoo: Zoo, profile: Profile | None, progress: Progress) -> None:
        self.zoo, self.profile, self.progress = zoo, profile, progress
        self.folder: Path | None = None
        self.manifest: Mapping[str, Any] | None = None
        self.kept: Results | None = None
        self.origins: list[Origin] = []
        self.missing: list[str] = []
        if profile is not None:
            self._of_profile(profile)

    def _of_profile(self, profile: Profile) -> None:
        entries = self.zoo.entries
        self.missing = [name for name in profile.adapters if name not in entries]
        held = [entries[name] for name in profile.adapters if name in entries]
        self.origins = [Origin(one.name, _source(one.source), one.revision, one.licence) for one in held]

    def model(self, model: str | Path) -> None:
        """What a composed model's folder says, and the profile that its router was built from, where the zoo holds it unchanged."""
        from recycler.routers.discovery import load_router
        from recycler.sharing.card import read_evaluation
        from recycler.sharing.pulling import find

        self.folder = find(model).folder
        self.manifest = read_manifest(self.folder)
        kept = read_evaluation(self.folder)
        self.kept = None if kept is None else parse(kept, self.folder / EVALUATION)
        if self.profile is None:
            known = load_router(self.folder / "router").facts.get("profile") or {}
            try:
                profile = Profile.load(profile_folder(self.zoo, str(known["name"]))) if "name" in known else None
            except RecycleError:
                profile = None  # it went away, or has another form now: the model stands without it
            hashes = {one["name"]: one["sha256"] for one in self.manifest["adapters"]}
            if profile is not None and {n: h for n, h in profile.hashes.items() if n in hashes} == hashes:
                self.profile = profile
        self.missing = []
        self.origins = [
            Origin(one["name"], _source(one["source"]), one["revision"], one.get("licence"))
            for one in self.manifest["adapters"]
        ]

    def facts(self) -> dict[str, str]:
        found: dict[str, str] = {}
        profile, manifest = self.profile, self.manifest
        if manifest is not None:
            found |= {"base": str(manifest["base"]["id"]), "router": str(manifest["router"])}
        elif profile is not None and profile.base.get("id"):
            found["base"] = str(profile.base["id"])
        if "base" in found and Path(found["base"]).is_absolute():
            found["base"] = Path(found["base"]).name
        count = len(self.origins) + len(self.missing)
        found |= {"adapters": str(count)} if count else {}
        if profile is not None:
            found["profile"] = f"{profile.name}: {len(profile.tasks)} tasks, {profile.nll.shape[-1]} shots each"
        return found

    def cosines(self) -> Cosines | None:
        folder, names = self.folder, [one.name for one in self.origins]
        if len(names) < 2:
            return None

        def read_one(name: str) -> Adapter:
            return self.zoo[name] if folder is None else formats.read(folder / "adapters" / name, name)[0]

        return Cosines.of(names, read_one, self.progress)

    def prompts(self, asked: Sequence[str], tasks: Shots | None, rows: int | None) -> list[tuple[str | None, Shot]]:
        """(task, prompt): those that were asked for, else some of each task's rows, task by task in turn."""
        if asked:
            return [(None, Shot(prompt, "")) for prompt in asked]
        shots = tasks if tasks is not None else self.profile.shots if self.profile is not None else Shots({})
        columns: list[list[tuple[str | None, Shot]]] = [[(task, shot) for shot in some[:rows]] for task, some in shots.items()]
        deepest = max((len(column) for column in columns), default=0)
        return [column[i] for i in range(deepest) for column in columns if i < len(column)][:_MAPPED]


def _evaluated(model: RoutedModel, tasks: Shots, rows: int | None, max_new_tokens: int | None, progress: Progress) -> Results:
    from recycler.evaluating.evaluation import evaluate

    shots = Shots({task: some[:rows] for task, some in tasks.items()})
    found = Results.of(evaluate(model, shots, max_new_tokens=max_new_tokens, progress=progress).to_json())
    assert model.router is not None
    kinds = {"router": model.router.granularity}
    return replace(found, contenders=tuple(replace(one, kind=kinds.get(one.kind, one.kind)) for one in found.contenders))


def _explained(
    model: RoutedModel, shown: Sequence[tuple[str | None, Shot]], max_new_tokens: int, progress: Progress
) -> list[tuple[str | None, Explanation, str]]:
    """The first prompts, answered. A chat row's last turn stands for it only in its template, which `explain` does not take."""
    from recycler.seeing.explaining import explain

    chosen = [(task, shot) for task, shot in shown if shot.messages is None][:_EXAMPLES]
    step = progress(len(chosen), "explaining")
    found = []
    for task, shot in chosen:
        one = explain(model, shot.prompt, max_new_tokens=max_new_tokens, task=task, progress=progress)
        found.append((task, one, shot.completion.strip()))
        step()
    return found


def _source(source: str) -> str:
    """A Hub id as it is; of somebody's disk only the folder's name."""
    return Path(source).name if Path(source).is_absolute() or source.startswith("~") else source
