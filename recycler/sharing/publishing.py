"""A composed model as strangers may see it: only what belongs to a model, with the weights that were composed, and without paths of
this disk or secrets. Knows nothing of the Hub's client.

What must change on the way (a local base's name, sources, the card) is changed in memory; the folder stays as it is.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recycler.converting.truncation import Truncation
from recycler.model_folder import ADAPTERS, CARD, EVALUATION, MANIFEST, ROUTER, belongs, read_manifest, required
from recycler.routers.base import Router
from recycler.sharing.card import LOCAL, card, read_evaluation, source_of
from recycler.zoo import inspect, licences
from recycler.zoo.errors import InputError, SecurityError, UsageError, shorten
from recycler.zoo.inspect import printable
from recycler.zoo.match import is_hub_id

_BASE_KEY = "base_model_name_or_path"
_SECRETS = {
    "a token of Hugging Face": r"\bhf_[A-Za-z0-9]{30,}",
    "a token of GitHub": r"\b(?:gh[pousr]_|github_pat_)[A-Za-z0-9_]{30,}",
    "a key of AWS": r"\bAKIA[0-9A-Z]{16}\b",
    "a key of Google": r"\bAIza[0-9A-Za-z_-]{35}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{24,}",
    "a token of Slack": r"\bxox[abprs]-[A-Za-z0-9-]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}


@dataclass(frozen=True)
class Public:
    """What may be uploaded.

    Attributes:
        files: posix path inside the repository → a file of the model's folder, or contents in its place.
        manifest: recycle.json as it is uploaded.
    """

    files: Mapping[str, Path | bytes]
    manifest: Mapping[str, Any]

    @property
    def sizes(self) -> dict[str, int]:
        """Path → bytes."""
        return {path: len(held) if isinstance(held, bytes) else held.stat().st_size for path, held in self.files.items()}

    @property
    def card(self) -> str:
        held = self.files[CARD]
        return (held if isinstance(held, bytes) else held.read_bytes()).decode("utf8")


@dataclass(frozen=True)
class _Shown:
    router: Router
    truncated: Mapping[str, Truncation]


def publish(
    folder: Path, repo: str, *, base_id: str | None = None, widget: Sequence[str] = (), datasets: Sequence[str] = ()
) -> Public:
    """Checks a model's folder, and makes of it what is uploaded to `repo`.

    Args:
        base_id: what the base is called on the Hub; by default as the model names it.
        widget, datasets: for the card.

    Raises:
        InputError: no composed model, or a part of it is missing. UsageError: the base is a local folder, and not `base_id`.
        SecurityError: weights are not those that were composed; files that no model holds; links; secrets; paths of this disk
            where they cannot be taken out.
    """
    from recycler.routers.discovery import load_router

    if base_id is not None and not is_hub_id(base_id):
        raise UsageError(f"{printable(base_id)!r} is no id on the Hub.", "", "Write --base-id org/base.", code="E_SOURCE")
    manifest = read_manifest(folder)
    truncated = manifest.pop("truncated")
    paths = _files(folder, [record["name"] for record in manifest["adapters"]])
    _check_weights(folder, manifest)
    router = load_router(folder / ROUTER)
    hashes = {record["name"]: record["sha256"] for record in manifest["adapters"]}
    fitted = {name: one for name, one in (router.facts.get("hashes") or {}).items() if name in hashes and name not in truncated}
    if router.adapters != tuple(hashes) or any(hashes[name] != one for name, one in fitted.items()):
        raise InputError(f"The router in {folder} was built for other adapters.", "", "Compose it again.", code="E_MODEL")
    named = base_id or _public_base(manifest["base"])
    taken_out = _local_names(folder, manifest, named)
    public = _public_manifest(manifest, named)
    files: dict[str, Path | bytes] = {}
    for path in paths:
        plain = path.endswith(".safetensors") or path == EVALUATION
        is_router = path.startswith(f"{ROUTER}/")
        files[path] = folder / path if plain else _cleaned(folder / path, taken_out, named, is_router=is_router)
    files[MANIFEST] = _as_json(public)
    evaluation = read_evaluation(folder)
    text = card(_Shown(router, truncated), public, evaluation=evaluation, repo=repo, widget=widget, datasets=datasets)
    files[CARD] = text.encode("utf8")
    _refuse_secrets(files)
    _refuse_paths(files, taken_out, {r["name"] for r in public["adapters"] if r["revision"]})
    return Public(dict(sorted(files.items())), public)


def check_licences(manifest: Mapping[str, Any], allow: Iterable[str] | None, *, strict: bool, shared: bool) -> list[str]:
    """Whether the adapters' licences let the model be passed on; what they ask, as notes.

    Args:
        allow: the licences that adapters may state; any where None. strict: what states none, is not recognised or is in conflict
            with another is refused too.
        shared: others can see it. A licence that forbids passing on changed or combined versions is then refused unless `allow`
            names it.

    Raises:
        InputError: naming every adapter and what it states.
    """
    stated = {record["name"]: record.get("licence") for record in manifest["adapters"]}
    chosen = None if allow is None else licences.parse_list(",".join(allow))
    if chosen is not None or strict:
        licences.require(stated, chosen, strict=strict)
    fixed = {
        name: one
        for name, text in stated.items()
        for one in licences.stated(text)
        if licences.NO_DERIVATIVES in licences.terms(one)
    }
    if fixed and shared and chosen is None:
        raise InputError(
            f"Licences that forbid passing it on: {shorten(f'{name} ({one})' for name, one in fixed.items())}.",
            "They allow no changed or combined versions, and a mixture may count as one.",
            "Compose without those adapters, push with --private, or name what you accept: --license-allow "
            + ",".join(sorted({one for text in stated.values() for one in licences.stated(text)})),
            code="E_LICENCE",
        )
    roll = licences.roll_up(stated)
    return [f"licences: {roll.verdict}", *(f"licences in conflict: {one}" for one in roll.conflicts)]


def _files(folder: Path, names: Sequence[str]) -> list[str]:
    """The paths of all files, each of which belongs to the model.

    Raises:
        SecurityError: strangers, or links. InputError: something is missing.
    """
    found, links = [], []
    for parent, folders, files in os.walk(folder):
        inside = Path(parent).relative_to(folder)
        for name in [*folders, *files]:
            path = (inside / name).as_posix()
            if (folder / path).is_symlink():
                links.append(path)
            elif name in files:
                found.append(path)
    strangers = sorted(path for path in found if not belongs(path, names))
    if strangers or links:
        what = "links" if links else "files that no composed model has"
        raise SecurityError(
            f"{folder} holds {what}: {shorten([printable(path) for path in links or strangers], 10)}.",
            "What a link leads to may be private." if links else "Whatever it is, it would be public.",
            "Put copies in their place." if links else "Move them away; a push takes what save_pretrained wrote.",
            code="E_LINK" if links else "E_SECURITY",
        )
    missing = sorted(set(required(names)) - set(found))
    if missing:
        raise InputError(
            f"{folder} lacks a part of the model: {shorten(missing, 5)}.", "", "Compose the model again.", code="E_MODEL"
        )
    return sorted(found)


def _check_weights(folder: Path, manifest: Mapping[str, Any]) -> None:
    changed = []
    for record in manifest["adapters"]:
        if inspect.hashes(folder / ADAPTERS / record["name"] / inspect.WEIGHTS)[0] != record["sha256"]:
            changed.append(record["name"])
    if changed:
        raise SecurityError(
            f"The weights of {shorten(changed)} in {folder} are not those that were composed.",
            f"Their sha256 differs from what {MANIFEST} says, and whoever loads the model would be refused.",
            "Compose the model again.",
            code="E_HASH",
        )


def _public_base(base: Mapping[str, Any]) -> str:
    """The base's id on the Hub, as the model names it."""
    named = str(base["id"])
    if is_hub_id(named) and not Path(named).exists():
        return named
    raise UsageError(
        f"The model's base is a folder here: {printable(named)}.",
        "Whoever loads the model from the Hub must find its base there.",
        "Say what it is called on the Hub: --base-id org/base",
        code="E_SOURCE",
    )


def _local_names(folder: Path, manifest: Mapping[str, Any], named: str) -> dict[str, str]:
    """Paths of this disk that the model knows of → what stands in their place; the longest first."""
    base = manifest["base"]
    found = {str(name): named for name in (base["id"], base.get("path")) if name and str(name) != named}
    for record in manifest["adapters"]:
        if source_of(record) == LOCAL:
            trained_on = _json_of(folder / ADAPTERS / record["name"] / inspect.CONFIG).get(_BASE_KEY)
            found |= {str(record["source"]): LOCAL}
            found |= {} if not isinstance(trained_on, str) or is_hub_id(trained_on) else {trained_on: named}
    return dict(sorted(found.items(), key=lambda pair: -len(pair[0])))


def _public_manifest(manifest: Mapping[str, Any], named: str) -> dict[str, Any]:
    base = {key: value for key, value in manifest["base"].items() if key != "path"}
    if base["id"] != named:
        base |= {"id": named, "revision": None}  # what revision that was is not known
    adapters = [{**record, "source": source_of(record)} for record in manifest["adapters"]]
    return {**manifest, "base": base, "adapters": adapters}


def _cleaned(file: Path, taken_out: Mapping[str, str], named: str, *, is_router: bool) -> Path | bytes:
    """A text without the paths in `taken_out`; the file itself where it has none, byte for byte."""
    if file.suffix == ".json":
        before = _json_of(file)
        after = _replaced(before, taken_out)
        if is_router and isinstance(after.get("base"), dict):
            after["base"] = {key: value for key, value in after["base"].items() if key != "path"} | {"id": named}
        return file if after == before else _as_json(after)
    text = new = file.read_text(encoding="utf8", errors="replace")
    for local, shown in taken_out.items():
        new = new.replace(local, shown) if os.sep in local else new  # a word may be any word
    return file if new == text else new.encode("utf8")


def _json_of(file: Path) -> dict[str, Any]:
    try:
        held: Any = json.loads(file.read_text(encoding="utf8"))
        if not isinstance(held, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise InputError(f"{file} cannot be read ({error}).", "", "Compose the model again.", code="E_MODEL") from None
    return held


def _replaced(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, list):
        return [_replaced(one, names) for one in value]
    if isinstance(value, dict):
        return {key: _replaced(one, names) for key, one in value.items()}
    return value


def _as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode("utf8")


def _texts(files: Mapping[str, Path | bytes]) -> Iterator[tuple[str, str]]:
    """(path, text) of every file that people can read; of weights it is their header."""
    for path, held in files.items():
        if isinstance(held, bytes):
            data = held
        elif path.endswith(".safetensors"):
            with held.open("rb") as stream:
                data = stream.read(min(int.from_bytes(stream.read(8), "little"), 10_000_000))
        else:
            data = held.read_bytes()
        yield path, data.decode("utf8", "replace")


def _refuse_secrets(files: Mapping[str, Path | bytes]) -> None:
    found = []
    for path, text in _texts(files):
        for what, pattern in _SECRETS.items():
            if any(len(set(one)) > 8 for one in re.findall(pattern, text)):  # hf_xxxxxxxx is none
                found.append(f"{path} ({what})")
    if found:
        raise SecurityError(
            f"What looks like a secret stands in {shorten(found, 10)}.",
            "It would be public, and stay in the repository's history.",
            "Take it out of the file, and revoke it if anybody has seen it.",
        )


def _refuse_paths(files: Mapping[str, Path | bytes], taken_out: Mapping[str, str], public: set[str]) -> None:
    """A last look for names of this disk, but not in the files of adapters that came from the Hub: those are public as they are."""
    home = str(Path.home())
    names = {*taken_out, *({home + os.sep} if len(home) > 1 else ())}
    found = []
    for path, text in _texts(files):
        top, _, rest = path.partition("/")
        if not (top == ADAPTERS and rest.split("/")[0] in public) and any(os.sep in name and name in text for name in names):
            found.append(path)
    if found:
        raise SecurityError(
            f"A path of this disk stands in {shorten(found, 10)}.",
            "Names of folders and users are nobody's business.",
            "Edit the file, and push again.",
        )
