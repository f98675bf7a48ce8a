"""The base model: found by Hub id or folder, loaded frozen, described without being loaded.

Knows nothing about adapters.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycler.zoo.errors import HubError, InputError, RecycleError, SecurityError, UsageError, shorten

if TYPE_CHECKING:
    import torch


DTYPES = ("float32", "bfloat16", "float16", "float64")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_NO_CODE = {"trust_remote_code": False}  # left open, transformers asks whoever sits at the terminal, and runs it after a yes
_HAD = "Check the id and the connection (gated models need HF_TOKEN), or give --base a folder that holds a copy."


@dataclass(frozen=True)
class Base:
    """A loaded base model.

    Attributes:
        model: from transformers, in eval mode, all parameters frozen.
        tokenizer: its tokenizer, with a pad token.
        id: the Hub id or folder it was loaded from.
        revision: 40-hex commit when it came from the Hub.
    """

    model: Any
    tokenizer: Any
    id: str
    revision: str | None = None

    @property
    def encoder_decoder(self) -> bool:
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    @property
    def device(self) -> torch.device:
        """Where inputs go; also where accelerate offloads the embeddings themselves."""
        from recycler.engine.sites import input_device

        return input_device(self.model)

    @property
    def ends(self) -> list[int]:
        """Token ids that end an answer: the tokenizer's, and whatever the model's generation config adds."""
        more = getattr(self.model.generation_config, "eos_token_id", None)
        ids = [self.tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])]
        return sorted({i for i in ids if i is not None})


def load_base(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    device_map: Any = None,
    revision: str | None = None,
) -> Base:
    """Loads a base model and its tokenizer.

    Args:
        name: a Hub id or a folder.
        dtype: "auto" (as stored), or a torch dtype or its name.
        device: moved there after loading; by default CUDA when there is a device, else the CPU.
        device_map: given to transformers as is; then `device` must be None.

    Raises:
        HubError: it cannot be had. InputError: it is not a language model that transformers knows. SecurityError: its weights
            are pickles. UsageError: there is no such dtype or device.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    dtype = str(dtype).removeprefix("torch.")
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(
            f"There is no dtype {dtype!r} to load a base in.", "", "Use auto, float32, bfloat16 or float16.", code="E_DEVICE"
        )
    if device is not None:
        _require_device(device)
    with quiet(), _explained(name):
        files = _files(name, revision)
        if files is not None:
            _refuse_pickles(name, files)
        where = {"revision": revision, "local_files_only": files is None, **_NO_CODE}
        config = _config(name, where)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model: Any = auto.from_pretrained(name, dtype=dtype, device_map=device_map, use_safetensors=True, **where)
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    if device_map is None:
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return ready(model, tokenizer, name)


def load_tokenizer(name: str, *, revision: str | None = None) -> Any:
    """A base's tokenizer alone. Raises as `load_base`."""
    from transformers import AutoTokenizer

    with quiet(), _explained(name):
        local = _files(name, revision) is None
        return AutoTokenizer.from_pretrained(name, revision=revision, local_files_only=local, **_NO_CODE)


def ready(model: Any, tokenizer: Any, name: str) -> Base:
    """A model and its tokenizer as a base: frozen, in eval mode, with a pad token."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.eval().requires_grad_(False)
    model.get_output_embeddings().register_forward_pre_hook(_contiguous)
    return Base(model, tokenizer, name, getattr(model.config, "_commit_hash", None))


def _contiguous(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Input of the output embedding, in one piece. Models slice the last positions off before it; torch multiplies a slice
    row by row, on the CPU with a copy of the whole vocabulary matrix for each (measured: 4 s instead of 0.1 s for 64 rows)."""
    return (args[0].contiguous(), *args[1:])


def linear_shapes(name: str, *, revision: str | None = None) -> Mapping[str, tuple[int, int]]:
    """Module path → (O, D) of every linear of a base, from its config.json alone: no weights are read.

    Raises:
        HubError: the config cannot be had. InputError: it is not a language model that transformers knows.
    """
    from recycler.engine.sites import linear_shapes as shapes

    return shapes(skeleton(name, revision=revision))


def base_revision(name: str) -> str | None:
    """The 40-hex commit of a base on the Hub whose config was looked up just now, as the client's cache has it: no request.
    None for a folder, and where nothing was looked up."""
    if Path(name).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    from recycler.zoo.sources import is_commit

    try:
        held = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no valid id, such as a path on another's disk
        return None
    commit = Path(held).parent.name if isinstance(held, str) else ""
    return commit if is_commit(commit) else None


def skeleton(name: str, *, revision: str | None = None) -> Any:
    """A base without weights, on the meta device, from its config.json alone. Raises as `linear_shapes`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    with quiet(), _explained(name):
        config = _config(name, {"revision": revision, "local_files_only": _files(name, revision) is None})
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with torch.device("meta"):
            return auto.from_config(config, **_NO_CODE)


def fingerprint(model: Any) -> str:
    """A short hash of the base's parameters: names, shapes and the first 64 values of each, as bf16, so that the dtype
    it was loaded in does not matter. Tells a copy from another model; does not prove that all weights are equal."""
    import torch

    known = getattr(model, "known_fingerprint", None)  # of a base in parts (`recycler.sharding`)
    if known is not None:
        return str(known)
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if parameter.is_floating_point() and parameter.device.type != "meta":
            head = parameter.detach().flatten()[:64].to("cpu", torch.bfloat16)
            digest.update(head.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _require_device(device: str) -> None:
    """Raises UsageError unless tensors can be kept there; asked before anything is loaded."""
    import torch

    try:
        torch.empty(0, device=device)
        usable, why = device != "meta", "It keeps no values."
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises depends on the device
        usable, why = False, _first_line(error)
    if not usable:
        count = torch.cuda.device_count()
        here = "cpu" if not count else "cpu or cuda" + (f":0 to cuda:{count - 1}" if count > 1 else "")
        raise UsageError(f"The device {device!r} cannot be used.", why, f"Use {here}, or leave --device out.", code="E_DEVICE")


def _files(name: str, revision: str | None) -> list[str] | None:
    """The names of a base's files; None where the Hub is not to be had, and the client's cache has to do.

    Raises:
        HubError: it cannot be had.
    """
    if Path(name).is_dir():
        return [path.name for path in Path(name).iterdir()]
    from recycler.zoo import hub

    try:
        return hub.peek(name, revision=revision)
    except HubError as error:
        raise HubError(f"The base {name} cannot be had.", f"{error.what} {error.why}".strip(), _HAD, code=error.code) from error


def _refuse_pickles(name: str, files: Iterable[str]) -> None:
    files = sorted(files)
    pickled = [file for file in files if file.endswith(_PICKLED)]
    if pickled and not any(file.endswith(".safetensors") for file in files):
        raise SecurityError(
            f"The weights of {name} are pickled ({shorten(pickled, 3)}).",
            "Loading a pickle can run code, so none is opened.",
            "Use a copy in safetensors, or convert it where you trust it: model.save_pretrained(FOLDER), then --base FOLDER.",
            code="E_PICKLE",
        )


def _config(name: str, where: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name, **{**where, **_NO_CODE})


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what transformers raises about a base into one of ours."""
    try:
        yield
    except RecycleError:
        raise
    except OSError as error:
        if Path(name).is_dir():
            raise InputError(
                f"{name} is not a model folder.",
                _first_line(error),
                "Give the folder that holds config.json and the weights.",
                code="E_BASE",
            ) from error
        from recycler.zoo import hub_errors

        known = hub_errors.explain(name, None, error)  # gated, not there, offline: each has its code
        why = f"{known.what} {known.why}" if known else _first_line(error)
        raise HubError(f"The base {name} cannot be had.", why, _HAD, code=known.code if known else None) from error
    except (ValueError, KeyError) as error:
        raise InputError(
            f"{name} is not a base that can be used.",
            _first_line(error),
            "Use a causal or encoder–decoder language model.",
            code="E_BASE",
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Chatter of transformers and of the Hub's client belongs to nobody here; errors still come through as exceptions."""
    from huggingface_hub.utils import logging as client
    from transformers.utils import logging as chatter

    level, bars, said = chatter.get_verbosity(), chatter.is_progress_bar_enabled(), client.get_verbosity()
    chatter.set_verbosity(logging.ERROR)
    client.set_verbosity(logging.ERROR)
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        client.set_verbosity(said)
        if bars:
            chatter.enable_progress_bar()
