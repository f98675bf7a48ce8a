"""What a fetch would bring, with nothing kept: from the Hub by its listing, the config and the header of the weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from recycler.fetch_report import Fetched
from recycler.intake import Intake
from recycler.jobs import Job
from recycler.locking import check_originals
from recycler.zoo import config, formats, hub, inspect
from recycler.zoo.inspect import printable
from recycler.zoo.kinds import Kind, kind_of
from recycler.zoo.sources import INITIAL, Listing


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
        return _to_convert(intake, job, kind, settings, place, None, size)
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
        return _to_convert(intake, job, kind, settings, place, listing.revision, listing.size, listing)
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
    place: str,
    revision: str | None,
    size: int,
    listing: Listing | None = None,
) -> Fetched:
    declared = settings.get("base_model_name_or_path")
    base = intake.bases.of(declared if isinstance(declared, str) and declared else None)
    needs = {
        "nothing": "",
        "shapes": ", which takes the config of its base",
        "weights": ", which takes the weights of its base",
    }
    loss = "without loss" if kind.lossless else "with a loss that is then measured"
    plan = f"{kind.name}; it would be converted into LoRA {loss}{needs[kind.needs]}"
    notes = f" ({'; '.join(listing.notes)})" if listing and listing.notes else ""
    return Fetched(
        job.name, place, revision, base, None, size, False, None, listing.licence if listing else None, plan=plan + notes
    )


def _pickled(intake: Intake, job: Job, layout: str, place: str, revision: str | None, sizes: Mapping[str, int]) -> Fetched:
    from recycler.zoo import importers

    files = importers.files_of(sizes, layout)
    pickles = [name for name in files if inspect.is_pickle(name)]
    plan = f"{len(pickles)} pickles in the layout of {layout}; they would be opened apart, and their adapters converted"
    size = sum(sizes[name] for name in files)
    return Fetched(job.name, place, revision, intake.bases.of(None), None, size, False, None, plan=plan)
