"""What a fetch would bring, with nothing kept: from the Hub by its listing, the config and the header of the weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from recycler.intake.arrival import Intake
from recycler.intake.bases import Placed, Shapes
from recycler.intake.fetch_report import Fetched
from recycler.intake.jobs import Job
from recycler.intake.locking import check_originals
from recycler.zoo import config, formats, hub, inspect
from recycler.zoo.errors import InputError
from recycler.zoo.inspect import printable
from recycler.zoo.kinds import Kind, kind_of
from recycler.zoo.preview import module_paths
from recycler.zoo.safetensors_header import check_header
from recycler.zoo.sources import INITIAL


def preview(intake: Intake, job: Job) -> Fetched:
    """What would come of a source. Values, such as NaN, are looked at for folders only.

    Raises:
        RecycleError: it would be refused, or is not to be had.
    """
    found = _folder(intake, job, job.source.folder) if job.source.folder is not None else _repository(intake, job)
    held = intake.zoo.entries.get(job.name)
    if not held:
        return found
    same = (held.source, held.revision) == (found.source, found.revision) and found.revision is not None
    text = f"the zoo holds {job.name} from {printable(held.source)}" + (
        " at this commit already" if same else "; other contents would need --as"
    )
    if found.receipt is None:
        return replace(found, plan=f"{found.plan}; {text}")
    return replace(found, receipt=replace(found.receipt, warnings=(*found.receipt.warnings, text)))


def _folder(intake: Intake, job: Job, folder: Path) -> Fetched:
    sizes = intake.sizes(job, folder)
    layout = intake.layout_of(sizes, str(folder))
    if job.pinned is not None:
        check_originals(job.pinned, folder)
    place = job.pinned.source if job.pinned else job.source.place
    if layout is not None:
        return _pickled(intake, job, layout, place, None, sizes)
    files = inspect.check_folder(folder, intake.max_bytes)
    size = sum(sizes[file] for file in files)
    settings = config.parse_json(config.read_config(folder / inspect.CONFIG), job.name)
    kind = kind_of(settings, initial=any(INITIAL.fullmatch(path.name) for path in folder.iterdir() if path.is_dir()))
    licence = inspect.card_licence(folder)
    warnings = intake.policy.check_licence(job.name, licence)
    if kind.how == "convert":
        header = inspect.read_header(folder / inspect.WEIGHTS)
        plan, placed = _to_convert(intake, job, kind, settings, header, warnings)
        return Fetched(
            job.name, place, None, placed.base, placed.path, size, False, None, licence, None, placed.forced, plan
        )  # fmt: skip
    adapter, receipt = formats.read(folder, job.name, source=place, max_bytes=intake.max_bytes)
    placed = intake.place(job, {path: factors.shape for path, factors in adapter.sites.items()}, adapter.base)
    warnings += intake.check_norm(job.name, adapter, placed.base)
    receipt = placed.stamp(receipt, (), warnings)
    return Fetched(job.name, place, None, placed.base, placed.path, size, False, receipt, licence, None, placed.forced)


def _repository(intake: Intake, job: Job) -> Fetched:
    source = job.source
    listing = intake.look(job)
    place = replace(source, repo=listing.repo).place
    layout = intake.layout_of({name: fact.size for name, fact in listing.files.items()}, source.text)
    warnings = intake.policy.check_licence(job.name, job.pinned.licence if job.pinned else listing.licence)
    if layout is not None:
        return _pickled(intake, job, layout, place, listing.revision, {n: f.size for n, f in listing.files.items()})
    with tempfile.TemporaryDirectory() as folder:
        hub.download_files(source, listing, Path(folder), only=(inspect.CONFIG,), **intake.access)
        raw = config.read_config(Path(folder) / inspect.CONFIG)
    settings = config.parse_json(raw, job.name)
    kind = kind_of(settings, initial=any("/" in name for name in listing.files))
    if kind.how == "convert":
        header = hub.header(source, listing, **intake.access)
        plan, placed = _to_convert(intake, job, kind, settings, header, (*listing.notes, *warnings))
        return Fetched(
            job.name, place, listing.revision, placed.base, placed.path, listing.size, False, None, listing.licence, None,
            placed.forced, plan,
        )  # fmt: skip
    parsed = config.parse_config(raw, job.name)
    sites, receipt = formats.plan(parsed, hub.header(source, listing, **intake.access), job.name, source=place)
    placed = intake.place(job, {path: site.shape for path, site in sites.items()}, parsed.base)
    receipt = placed.stamp(receipt, listing.notes, warnings)
    return Fetched(
        job.name, place, listing.revision, placed.base, placed.path, listing.size, False, receipt, listing.licence, None, placed.forced
    )  # fmt: skip


def _to_convert(
    intake: Intake,
    job: Job,
    kind: Kind,
    settings: Mapping[str, object],
    header: Mapping[str, tuple[int, ...]],
    remarks: Sequence[str],
) -> tuple[str, Placed]:
    """What a conversion would take, with the `remarks` and what the comparison with the base adds; and that comparison.

    Raises:
        RecycleError: the conversion would be refused, by what the config, the header and the base's config tell.
    """
    read = config.check_convertible(settings, job.name)
    check_header(header, job.name)
    placed = intake.place(job, _sites(intake, job, kind, read, settings, header), read.base)
    needs = {
        "nothing": "",
        "shapes": ", which takes the config of its base",
        "weights": ", which takes the weights of its base",
    }
    loss = "without loss" if kind.lossless else "with a loss that is then measured"
    plan = f"{kind.name}; it would be converted into LoRA {loss}{needs[kind.needs]}"
    more = (*remarks, *placed.notes, *placed.warnings)
    return plan + (f" ({'; '.join(more)})" if more else ""), placed


def _sites(
    intake: Intake,
    job: Job,
    kind: Kind,
    read: config.Settings,
    settings: Mapping[str, object],
    header: Mapping[str, tuple[int, ...]],
) -> Shapes:
    """Module path → (O, D) of what would be converted. Where the tensors do not tell O and D, they are the base's, so that it
    is asked only whether the modules are there."""
    chosen = intake.base_to_convert(job) or read.base
    if chosen is None and kind.needs != "nothing":
        raise InputError(
            f"{job.name} is {kind.name}, and its base is not known.",
            f"Its update cannot be computed without the {kind.needs} of the base, and it declares none.",
            "Name the base with --base.",
            code="E_BASE_UNKNOWN",
        )
    known: Shapes = {}
    if chosen is not None and kind.needs != "nothing":
        if chosen.startswith(("\\\\", "//")):  # another machine's share, which a stranger's file must not make us open
            raise InputError(
                f"{job.name} is {kind.name}, and its base {printable(chosen)} is on another machine.",
                f"Its update cannot be computed without the {kind.needs} of the base.",
                "Name a folder that holds a copy with --base.",
                code="E_BASE_UNKNOWN",
            )
        known = intake.bases.shapes(chosen)
    if settings.get("peft_type") == "LORA":  # only its start has to be taken out
        return {path: site.shape for path, site in formats.plan(read, header, job.name)[0].items()}
    return {path: known.get(path, (0, 0)) for path in sorted(module_paths(header, known))}


def _pickled(intake: Intake, job: Job, layout: str, place: str, revision: str | None, sizes: Mapping[str, int]) -> Fetched:
    from recycler.zoo import importers

    files = importers.files_of(sizes, layout)
    pickles = [name for name in files if inspect.is_pickle(name)]
    plan = f"{len(pickles)} pickles in the layout of {layout}; they would be opened apart, and their adapters converted"
    size = sum(sizes[name] for name in files)
    return Fetched(job.name, place, revision, intake.bases.of(None), None, size, False, None, plan=plan)
