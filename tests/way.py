"""One pico world gone the whole way once, for the tests of composed models, answers and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import Pico
from torch import Tensor

import recycler
from recycler import Profile, Router, Shots

NAMES = ("code", "law", "math", "poem")
PROMPTS = ["Add 1 and b.", "O 3 of the long, long poem!"]


class Way(NamedTuple):
    """One pico world, and what was made from it once."""

    pico: Pico
    zoo: recycler.Zoo
    profile: Profile
    router: Router
    folder: Path  # the composed model


def go(pico: Pico, folder: Path) -> Way:
    """Profile, build ridge, compose."""
    zoo = recycler.Zoo(pico.zoo)
    profile = recycler.profile(zoo, shots=Shots.from_files(*pico.tasks), kshot=3, out=folder / "p3")
    router = recycler.build_router("ridge", profile, zoo=zoo, out=folder / "gates")
    recycler.compose(zoo, router, folder / "model").engine.detach()
    return Way(pico, zoo, profile, router, folder / "model")


def logits(model: Any, prompt: str = PROMPTS[0]) -> Tensor:
    inputs = dict(model.tokenizer(prompt, return_tensors="pt"))
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[0, 9, 42]])
    with torch.no_grad():
        result: Tensor = model(**inputs).logits
    return result


def one_by_one(model: Any, prompts: list[str], new: int) -> list[str]:
    """Greedy answers, a prompt at a time, by `generate` itself."""
    texts = []
    for prompt in prompts:
        inputs = model.tokenizer(prompt, return_tensors="pt")
        start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        ids = model.generate(**inputs, max_new_tokens=new, do_sample=False)[0, start:]
        texts.append(model.tokenizer.decode(ids, skip_special_tokens=True))
    return texts


def never() -> Any:
    raise AssertionError("the model was loaded before the input was checked")
