"""What an export loses, on the logits: those of the routed model beside those of what came out, over the same prompts.

Dimensions in names: B batch, T token, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recycler import text
from recycler.base import quiet
from recycler.shots import Shot
from recycler.zoo.errors import InputError

if TYPE_CHECKING:
    from recycler.routed import RoutedModel

MOST, LAST = 16, 64  # prompts that are compared, and how many of each one's last tokens: a vocabulary's logits are large
EXACT = 1e-4  # of the largest logit: what fp32 may round, and no more
DEFAULT = tuple(
    Shot(prompt, "")
    for prompt in (
        "The capital of France is",
        "Translate into German: The weather is nice today.",
        "What is 417 + 85?",
        "def fibonacci(n):",
        "Summarise in one sentence: The meeting was moved from Monday to Thursday because the room was taken.",
        "Write the date in ISO format: the 3rd of May 1954",
        "Is the following review positive or negative? I would buy it again.",
        "Once upon a time",
    )
)

Run = Callable[..., Any]


@dataclass(frozen=True)
class Difference:
    """How far one model's logits are from a reference's, over all tokens that were compared.

    Attributes:
        max, mean: of the absolute differences of logits. largest: the reference's largest logit, in size.
        agreement: the share of tokens with the same argmax.
        kl: mean KL(reference ‖ other), nats.
    """

    prompts: int
    tokens: int
    max: float
    mean: float
    largest: float
    agreement: float
    kl: float

    def line(self) -> str:
        """For people."""
        return (
            f"logits differ by {self.max:.2g} at most, {self.mean:.2g} in the mean; argmax agrees at {self.agreement:.1%} of "
            f"{self.tokens} tokens of {self.prompts} prompt{'s' * (self.prompts != 1)}; KL {self.kl:.2g} nats"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {key: value if isinstance(value, int) else float(f"{value:.4g}") for key, value in asdict(self).items()}


def inputs_of(model: RoutedModel, shots: Sequence[Shot]) -> list[dict[str, Tensor]]:
    """Each prompt's inputs, one row each, so that nothing is padded. A decoder gets the prompt's first tokens."""
    found = []
    for shot in shots[:MOST]:
        inputs = text.prompts(model.source, [[shot]])
        if model.source.encoder_decoder:
            start = inputs["input_ids"].new_tensor([[model.config.decoder_start_token_id]])
            inputs["decoder_input_ids"] = torch.cat([start, inputs["input_ids"][:, :8]], 1)
        found.append(inputs)
    return found


@torch.no_grad()
def logits(run: Run, prompts: Sequence[Mapping[str, Tensor]], step: Callable[..., None] | None = None) -> list[Tensor]:
    """Each prompt's logits [T, V] at its last tokens, fp32, on the CPU."""
    result = []
    for inputs in prompts:
        result.append(run(**inputs, use_cache=False).logits[0, -LAST:].float().cpu())
        if step is not None:
            step()
    return result


def difference(reference: Sequence[Tensor], other: Sequence[Tensor]) -> Difference:
    """Compares logits [T, V] of the same prompts."""
    most = total = largest = kl = 0.0
    agree = tokens = numbers = 0
    for one_TV, two_TV in zip(reference, other, strict=True):
        off_TV = (one_TV - two_TV).abs()
        most, largest = max(most, float(off_TV.max())), max(largest, float(one_TV.abs().max()))
        total, numbers = total + float(off_TV.double().sum()), numbers + off_TV.numel()
        agree, tokens = agree + int((one_TV.argmax(-1) == two_TV.argmax(-1)).sum()), tokens + len(one_TV)
        p_TV, q_TV = one_TV.double().log_softmax(-1), two_TV.double().log_softmax(-1)
        kl += float((p_TV.exp() * (p_TV - q_TV)).sum())
    return Difference(len(reference), tokens, most, total / numbers, largest, agree / tokens, max(kl / tokens, 0.0))


def require_exact(found: Difference, model: RoutedModel, what: str) -> None:
    """What was written must be what was meant: to fp32's rounding, where the base is in fp32.

    Raises:
        InputError: it is not.
    """
    if model.base.dtype == torch.float32 and not found.max <= EXACT * max(found.largest, 1.0):
        raise InputError(
            f"{what} does not answer as the mixture it was made of: {found.line()}.",
            "Nothing was written.",
            "Report it with the versions of peft and transformers, and the adapters' formats.",
        )


@contextmanager
def in_peft(model: RoutedModel, folder: Path) -> Iterator[Any]:
    """A PEFT folder, loaded by PEFT itself on the model's own base, which is as it was afterwards: no second copy is needed."""
    from peft import PeftModel

    base = model.base
    before = set(vars(base))
    cached = getattr(base.config, "use_cache", None)
    with model.disabled(), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about what is meant
        base.config.use_cache = False  # PEFT's X-LoRA insists
        loaded = None
        try:
            loaded = PeftModel.from_pretrained(base, str(folder)).eval()
            yield loaded
        finally:
            if loaded is not None:
                tuner: Any = loaded.base_model
                getattr(tuner, "lora_model", tuner).unload()
            base.config.use_cache = cached
            for name in set(vars(base)) - before:
                delattr(base, name)
            base.requires_grad_(False)
