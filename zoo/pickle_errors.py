"""What the process that opens pickles says of one that it refused → reasons a person understands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from recycler.zoo.errors import InputError, RecycleError, SecurityError, shorten
from recycler.zoo.inspect import printable

_AUTHOR = "Ask the author for safetensors."

# kind → (error, what happened, why it is refused, what to do); {0} is what the process named
_REFUSALS: Mapping[str, tuple[type[RecycleError], str, str, str]] = {
    "globals": (
        SecurityError,
        "asks to import {0}",
        "Weights need tensors and plain values only; whatever else a pickle imports can be code that runs.",
        "Ask the author for safetensors. Objects of a framework that you trust can be saved without them by that framework's "
        "own code, on a machine where it can do no harm.",
    ),
    "malformed": (SecurityError, "is no pickle of weights: {0}", "It does what files of weights never do.", _AUTHOR),
    "pickle": (SecurityError, "is not what torch.save writes", "It is neither of its formats.", "Give the file of weights."),
    "tar": (SecurityError, "is in torch's oldest format, a tar", "It cannot be opened without running code.", _AUTHOR),
    "code": (SecurityError, "is a TorchScript archive", "It holds a program, not weights.", _AUTHOR),
    "bomb": (
        SecurityError,
        "is a bomb: {0}",
        "It unpacks to more than it may.",
        "If it is meant, raise the limit with --max-size.",
    ),
    "nested": (SecurityError, "is nested too deeply", "No file of weights is.", _AUTHOR),
    "memory": (SecurityError, "asked for more memory than its size can need", "It was stopped.", _AUTHOR),
    "time": (SecurityError, "took longer than {0} to open", "It was stopped.", "If it is large, give it more time."),
    "tried": (SecurityError, "tried this as it was opened: {0}", "It was stopped before it could.", _AUTHOR),
    "crash": (SecurityError, "ended the process that opened it ({0})", "Weights do not do that.", _AUTHOR),
    "broken": (InputError, "is cut short or damaged: {0}", "Its tensors cannot be read.", "Fetch or copy it again."),
    "names": (InputError, "does not name its tensors: {0}", "Names say where a tensor belongs.", "Save a dict of tensors."),
    "kind": (
        InputError,
        "holds tensors that are not plain numbers: {0}",
        "Sparse, quantised and complex ones, and those of special classes, have no place in an adapter.",
        "Save it again with dense tensors in fp32, bf16 or fp16.",
    ),
}


def refusal(path: Path, kind: str, names: object) -> RecycleError:
    """The error for a pickle. `kind` and `names` are a stranger's words: any kind that is not known is taken for a crash."""
    error, what, why, fix = _REFUSALS.get(kind, _REFUSALS["crash"])
    told = [printable(name) for name in names] if isinstance(names, list) else []
    return error(f"{printable(path.name)} {what.format(shorten(told) or 'no word')}.", why, fix)
