"""What a prompt asks for: the log-probability of each of a few tasks, from shots of them.

Three witnesses are heard, each a logistic regression fitted on the shots.

Text. A sentence encoder reads the prompt. Where a prompt holds earlier turns, the encoding of all of it is about all of them; so
every tail of the prompt that begins at a line is read too. Nobody needs to say where turns begin, and long prompts are read to
their end although encoders stop at a few hundred tokens.

Words. The mean of the base's own hidden states over the tokens of a tail: what its words mean to the model that will answer.

State. The hidden state at the last token of the prompt. It has read everything, in order, and knows which request is still
unanswered; what it knows of wordings it has not seen is little. It is fitted on the shots and on chains of them, and heard only
where tails speak for different tasks, on which of those it is.

A task is claimed by the tail that speaks for it most:

    log p(c) = max over tails of [log p_text(c) + b · log p_words(c)] + a · log p_state(c), normalised.

On SmolLM2's twelve tasks, with 12 shots each, the share of prompts whose task is named right: plain 1.00, after two turns of other
tasks 1.00, in words that nobody had in mind when this was made .925, such words after two turns so worded .84. The text alone names
.917 of the reworded, and .65 of those after other turns. A state that is always heard names .84 of the reworded. Of a second set of
such words, curter and more figurative ("Make college many"), .856 is named right, the text alone .847; what goes wrong there are the
tasks on single words (plural, category), and the encoder and the base alike do not know what is meant.

Dimensions in names: B batch, T token, C task, N example, P tail, D width of the encoder, H width of the base.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recycler.routers.protocol import Model, Reader
from recycler.zoo.errors import UsageError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_TAILS = 8  # how many are read: the last ones, and the whole
_WORDS = 3  # fewer words say nothing
_STRENGTH = {"text": 10.0, "words": 10.0, "state": 100.0}  # C of the regressions; what they read has length 1


@dataclass(frozen=True)
class Witnesses:
    """How prompts are read.

    Attributes:
        encoder: a sentence encoder: an id of the Hub, or a folder.
        state: a, the say of the base's state at the prompt's last token beside the text's 1, where tails disagree.
        words: b, the say of the base's mean state over a tail. With both at 0 the base need not read the prompt twice.
        depth: which layer's states, from 0 to 1. The middle sees the wording; the last layers are busy with the next word.
        tails: also read what begins at a line; false reads the whole prompt only.
    """

    encoder: str = MINILM
    state: float = 1.0
    words: float = 0.5
    depth: float = 0.8
    tails: bool = True

    def __post_init__(self) -> None:
        for name in ("state", "words"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(
                    f"{name}={getattr(self, name)}.", "It weighs the base's evidence.", "Use 0 or more.", code="E_OPTION"
                )
        if not 0 < self.depth <= 1:
            raise UsageError(
                f"depth={self.depth}.",
                "It says how far up the base a layer is.",
                "Use a number above 0, at most 1.",
                code="E_OPTION",
            )


@dataclass
class Found:
    """What was found in the prompts of a batch.

    Attributes:
        log_p_BC: log-probabilities of the tasks.
        similarity_B: of each prompt, the highest cosine between one of its tails and a shot's prompt.
        tails: of each prompt, the tail that spoke for the likeliest task.
    """

    log_p_BC: Tensor
    similarity_B: Tensor
    tails: list[str]


class Requests:
    """The fitted witnesses: `tasks` [C] and tensors by name."""

    def __init__(self, tasks: Sequence[str], config: Witnesses, tensors: Mapping[str, Tensor]) -> None:
        self.tasks, self.config, self.tensors = tuple(tasks), config, dict(tensors)

    @classmethod
    def fit(cls, model: Model, shots: Mapping[str, Sequence[Any]], config: Witnesses, seed: int) -> Requests:
        """Fits the witnesses on the prompts of `shots`."""
        tasks = sorted(shots)
        rows = [(c, shot) for c, task in enumerate(tasks) for shot in shots[task]]
        labels = [c for c, _ in rows]
        texts = [text for _, shot in rows for text in model.texts(model.prompts([[shot]]))]
        text_ND = model.embed(texts, config.encoder)
        tensors = {"examples": text_ND, "labels": torch.tensor(labels), **_regression("text", text_ND, labels, len(tasks))}
        if config.state or config.words:
            chains = [[shot] for _, shot in rows]
            chained = _preceded(rows, seed) if model.chains and len(tasks) > 1 and config.state else []
            if config.words:
                words_NH = _states(model, chains, config.depth, lambda states: states.mean())
                middle_H = words_NH.mean(0)
                tensors |= {"words.middle": middle_H}
                tensors |= _regression("words", _unit(words_NH - middle_H), labels, len(tasks))
            if config.state:
                state_NH = _states(model, chains + chained, config.depth, _States.last)
                tensors |= _regression("state", state_NH, labels + labels[: len(chained)], len(tasks))
        return cls(tasks, config, tensors)

    def read(self, reader: Reader, inputs: Mapping[str, Any]) -> Found:
        """Log-probabilities of the tasks, for a batch of prompts."""
        parts = [tails(text) if self.config.tails else [text] for text in reader.texts(inputs)]
        sizes = [len(some) for some in parts]
        flat = [tail for some in parts for tail in some]
        text_PD = reader.embed(flat, self.config.encoder)
        claim_PC = self._log_p("text", text_PD)
        states = _States(reader, inputs, self.config.depth) if self.config.words or self.config.state else None
        if states is not None and self.config.words:
            row_P = [b for b, size in enumerate(sizes) for _ in range(size)]
            words_PH = states.mean(row_P, reader.lengths(flat)) - self.tensors["words.middle"]
            claim_PC = claim_PC + self.config.words * self._log_p("words", _unit(words_PH))
        claims = claim_PC.split(sizes)
        log_p_BC = torch.stack([one.amax(0) for one in claims])
        if states is not None and self.config.state:
            log_p_BC = log_p_BC + self.config.state * _between(claims, self._log_p("state", states.last()))
        log_p_BC = log_p_BC.log_softmax(-1)
        similarity_P = (text_PD @ self.tensors["examples"].T).amax(-1)
        spoke = [
            some[int(one[:, best].argmax())]
            for some, one, best in zip(parts, claims, log_p_BC.argmax(-1).tolist(), strict=True)
        ]
        return Found(log_p_BC, torch.stack([one.amax() for one in similarity_P.split(sizes)]), spoke)

    def nearness(self) -> Tensor:
        """[C, C]: the cosine between the mean embeddings of two tasks' prompts; −1 with itself."""
        labels = self.tensors["labels"]
        middle_CD = torch.stack([self.tensors["examples"][labels == c].mean(0) for c in range(len(self.tasks))])
        near_CC = _unit(middle_CD) @ _unit(middle_CD).T
        return near_CC.fill_diagonal_(-1.0)

    def _log_p(self, witness: str, x_ND: Tensor) -> Tensor:
        return (x_ND @ self.tensors[f"{witness}.weight"].T + self.tensors[f"{witness}.bias"]).log_softmax(-1)


def _between(claims: Sequence[Tensor], state_BC: Tensor) -> Tensor:
    """The state's word [B, C] on which of the tasks that the tails of a prompt speak for is meant; others fare as the least of
    these, and with a single one there is nothing to say."""
    for_BC = torch.stack([torch.nn.functional.one_hot(one.argmax(-1), one.shape[-1]).amax(0) for one in claims]).bool()
    state_BC = state_BC.masked_fill(~for_BC, -torch.inf).log_softmax(-1)
    least_B1 = state_BC.masked_fill(~for_BC, torch.inf).amin(-1, keepdim=True)
    return torch.where(for_BC, state_BC, least_B1)


def tails(text: str) -> list[str]:
    """The prompt, and its last parts that begin at a line and hold a few words, longest first."""
    starts = [found.end() for found in re.finditer(r"\n+", text)]
    found = [text[start:] for start in starts if len(text[start:].split()) >= _WORDS]
    return list(dict.fromkeys([text, *found[-(_TAILS - 1) :]]))


def last_tokens(reader: Reader, inputs: Mapping[str, Any], depth: float) -> Tensor:
    """The base's hidden state at each prompt's last token [B, H], standardised to length 1."""
    return _States(reader, inputs, depth).last()


class _States:
    """The base's hidden states of a batch of prompts at one depth, standardised, on the CPU."""

    def __init__(self, reader: Reader, inputs: Mapping[str, Any], depth: float) -> None:
        states_BTH, mask_BT = reader.states(inputs, depth)
        self.states_BTH = torch.nn.functional.layer_norm(states_BTH, states_BTH.shape[-1:])
        # How many real tokens there are from each token to the end, itself included; 0 at padding.
        self.left_BT = (mask_BT.flip(1).long().cumsum(1).flip(1)) * mask_BT

    def last(self) -> Tensor:
        """[B, H], of length 1: at each prompt's last token."""
        last_B = (self.left_BT == 1).long().argmax(1)
        return _unit(self.states_BTH[torch.arange(len(last_B), device=last_B.device), last_B].cpu())

    def mean(self, rows: Sequence[int] | None = None, counts: Sequence[int] | None = None) -> Tensor:
        """[P, H]: the mean over the last `counts` tokens of row `rows`; over all of every row where None."""
        states_BTH, left_BT = self.states_BTH, self.left_BT
        if rows is not None:
            states_BTH, left_BT = states_BTH[list(rows)], left_BT[list(rows)]
        inside_PT = left_BT > 0
        if counts is not None:
            inside_PT &= left_BT <= torch.tensor(counts, device=left_BT.device).clamp(min=1)[:, None]
        share_PT = inside_PT / inside_PT.sum(1, keepdim=True)
        return torch.einsum("pt,pth->ph", share_PT, states_BTH).cpu()


def _unit(x_NH: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x_NH, dim=-1)


def _states(model: Model, chains: Sequence[Sequence[Any]], depth: float, take: Callable[[_States], Tensor]) -> Tensor:
    """What `take` takes of the states of each chain's prompt [N, H]."""
    taken_NH = torch.zeros(len(chains), model.width)
    batches = list(model.batches(chains, 4096))
    step = model.progress(len(batches), "hidden states")
    for numbers in batches:
        taken_NH[numbers] = take(_States(model, model.prompts([chains[i] for i in numbers]), depth))
        step()
    return taken_NH


def _preceded(rows: Sequence[tuple[int, Any]], seed: int) -> list[list[Any]]:
    """Each shot once more, after one to three shots of other tasks."""
    rng = random.Random(f"requests {seed}")
    chains = []
    for c, shot in rows:
        others = [other for d, other in rows if d != c]
        chains.append([*rng.sample(others, min(rng.randint(1, 3), len(others))), shot])
    return chains


def _regression(witness: str, x_ND: Tensor, labels: Sequence[int], count: int) -> dict[str, Tensor]:
    """A multinomial logistic regression: weight [C, D] and bias [C]. With one task there is nothing to tell apart."""
    if count == 1:
        return {f"{witness}.weight": x_ND.new_zeros(1, x_ND.shape[1]), f"{witness}.bias": x_ND.new_zeros(1)}
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=_STRENGTH[witness], max_iter=5000).fit(x_ND.double().numpy(), list(labels))
    weight, bias = torch.from_numpy(fitted.coef_).float(), torch.from_numpy(fitted.intercept_).float()
    if count == 2:  # scikit-learn keeps one row for two classes
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    return {f"{witness}.weight": weight, f"{witness}.bias": bias}
