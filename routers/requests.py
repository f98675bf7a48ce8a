"""What a prompt asks for: the log-probability of each of a few tasks, from shots of them.

Five witnesses are heard, each a logistic regression fitted on the shots.

Text. A sentence encoder reads the prompt. Where a prompt holds earlier turns, the encoding of all of it is about all of them; so
every tail of the prompt that begins at a line is read too. Nobody needs to say where turns begin, and long prompts are read to
their end although encoders stop at a few hundred tokens.

Words. The mean of the base's own hidden states over the tokens of a tail, without what all prompts share: what its words mean to the
model that will answer.

Gist. The base's state where it would say in one word what a tail means (`routers/gist.py`).

Names. How near the encoding of a tail is to that of each task's name. A name that says what the task is ("plural") knows wordings that
no shot has; how much names say in this profile, a single number, is fitted on the shots too, and for names like "task-07" it is 0.

State. The hidden state at the last token of the prompt. It has read everything, in order, and knows which request is still
unanswered; what it knows of wordings it has not seen is little. It is fitted on the shots and on chains of them, and heard only
where tails speak for different tasks, on which of those it is.

A task is claimed by the tail that speaks for it most:

    log p(c) = max over tails of [log p_text(c) + b · log p_words(c) + g · log p_gist(c) + n · log p_names(c)] + a · log p_state(c),

normalised.

On SmolLM2's twelve tasks, the share of prompts whose task is named right (`benchmarks/decisions.py`): plain 1.00, after two turns of
other tasks .99. Of prompts in other words than any of 12 shots: text .90, with words .93, with gist .95, with names .96; of a second
set of such, curter and more figurative ("Make college many"), .85, .86, .88 and .89. What goes wrong there are the tasks on single words (plural,
category), and the encoder and the base alike do not know what is meant.

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

from recycler.routers.gist import frame, gists
from recycler.routers.protocol import Model, Reader
from recycler.routers.states import States, unit
from recycler.zoo.errors import UsageError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_TAILS = 8  # how many are read: the last ones, and the whole
_WORDS = 3  # fewer words say nothing
_STRENGTH = {"text": 10.0, "words": 10.0, "gist": 10.0, "state": 100.0}  # C of the regressions; what they read has length 1


@dataclass(frozen=True)
class Witnesses:
    """How prompts are read.

    Attributes:
        encoder: a sentence encoder: an id of the Hub, or a folder.
        state: a, the say of the base's state at the prompt's last token beside the text's 1, where tails disagree.
        words: b, the say of the base's mean state over a tail. With both at 0 the base need not read the prompt twice.
        gist: g, the say of what the base takes a tail to mean; it reads each tail once more for that. Encoder–decoders, which do
            not go on with what they read, have none.
        names: n, the say of the tasks' names. It is small, as they speak as loudly of what they do not fit.
        depth: which layer's states, from 0 to 1. The middle sees the wording; the last layers are busy with the next word.
        tails: also read what begins at a line; false reads the whole prompt only.
    """

    encoder: str = MINILM
    state: float = 1.0
    words: float = 0.5
    gist: float = 0.5
    names: float = 0.25
    depth: float = 0.8
    tails: bool = True

    def __post_init__(self) -> None:
        for name in ("state", "words", "gist", "names"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(
                    f"{name}={getattr(self, name)}.", "It weighs evidence beside the text's.", "Use 0 or more.", code="E_OPTION"
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
        text_BC: what the text alone says of the tail that spoke for the likeliest task.
        similarity_B: of each prompt, the highest cosine between one of its tails and a shot's prompt.
        tails: of each prompt, the tail that spoke for the likeliest task.
    """

    log_p_BC: Tensor
    text_BC: Tensor
    similarity_B: Tensor
    tails: list[str]


class Requests:
    """The fitted witnesses: `tasks` [C] and tensors by name."""

    def __init__(self, tasks: Sequence[str], config: Witnesses, tensors: Mapping[str, Tensor]) -> None:
        self.tasks, self.config, self.tensors = tuple(tasks), config, dict(tensors)

    @property
    def frame(self) -> tuple[str, str]:
        """What all shots' prompts begin and end with."""
        before, after = (self.tensors.get(f"frame.{part}") for part in ("before", "after"))
        return ("", "") if before is None or after is None else (_as_text(before), _as_text(after))

    @classmethod
    def fit(cls, model: Model, shots: Mapping[str, Sequence[Any]], config: Witnesses, seed: int) -> Requests:
        """Fits the witnesses on the prompts of `shots`."""
        tasks = sorted(shots)
        rows = [(c, shot) for c, task in enumerate(tasks) for shot in shots[task]]
        labels = [c for c, _ in rows]
        texts = [text for _, shot in rows for text in model.texts(model.prompts([[shot]]))]
        text_ND = model.embed(texts, config.encoder)
        tensors = {"examples": text_ND, "labels": torch.tensor(labels), **_regression("text", text_ND, labels, len(tasks))}
        shared = frame(texts)
        tensors |= {"frame.before": _as_bytes(shared[0]), "frame.after": _as_bytes(shared[1])}
        if config.names:
            tensors |= _named(text_ND, model.embed([_spoken(task) for task in tasks], config.encoder), labels)
        if config.gist and model.chains:
            tensors |= _centred("gist", gists(model, texts, shared), labels, len(tasks))
        chains = [[shot] for _, shot in rows]
        if config.words:
            spans = _spans(model, texts, shared)
            words_NH = _states(model, chains, config.depth, lambda states, some: states.mean([spans[i] for i in some]))
            tensors |= _centred("words", words_NH, labels, len(tasks))
        if config.state:
            chained = _preceded(rows, seed) if model.chains and len(tasks) > 1 else []
            state_NH = _states(model, chains + chained, config.depth, lambda states, _: states.last())
            tensors |= _regression("state", state_NH, labels + labels[: len(chained)], len(tasks))
        return cls(tasks, config, tensors)

    def read(self, reader: Reader, inputs: Mapping[str, Any]) -> Found:
        """Log-probabilities of the tasks, for a batch of prompts."""
        parts = [tails(text) if self.config.tails else [text] for text in reader.texts(inputs)]
        sizes = [len(some) for some in parts]
        flat = [tail for some in parts for tail in some]
        text_PD = reader.embed(flat, self.config.encoder)
        wording_PC = self._log_p("text", text_PD)
        claim_PC = wording_PC
        if "names" in self.tensors:
            near_PC = text_PD @ self.tensors["names"].T - self.tensors["names.middle"]
            claim_PC = claim_PC + self.config.names * (self.tensors["names.scale"] * near_PC).log_softmax(-1)
        if "gist.weight" in self.tensors:
            claim_PC = claim_PC + self.config.gist * self._log_p("gist", gists(reader, flat, self.frame))
        states = States(reader, inputs, self.config.depth) if self.config.words or self.config.state else None
        if states is not None and self.config.words:
            row_P = [b for b, size in enumerate(sizes) for _ in range(size)]
            words_PH = states.mean(_spans(reader, flat, self.frame), row_P)
            claim_PC = claim_PC + self.config.words * self._log_p("words", words_PH)
        claims = claim_PC.split(sizes)
        log_p_BC = torch.stack([one.amax(0) for one in claims])
        if states is not None and self.config.state:
            log_p_BC = log_p_BC + self.config.state * _between(claims, self._log_p("state", states.last()))
        log_p_BC = log_p_BC.log_softmax(-1)
        similarity_P = (text_PD @ self.tensors["examples"].T).amax(-1)
        spoke = [int(one[:, best].argmax()) for one, best in zip(claims, log_p_BC.argmax(-1).tolist(), strict=True)]
        return Found(
            log_p_BC,
            torch.stack([one[p] for one, p in zip(wording_PC.split(sizes), spoke, strict=True)]),
            torch.stack([one.amax() for one in similarity_P.split(sizes)]),
            [some[p] for some, p in zip(parts, spoke, strict=True)],
        )

    def nearness(self) -> Tensor:
        """[C, C]: the cosine between the mean embeddings of two tasks' prompts; −1 with itself."""
        labels = self.tensors["labels"]
        middle_CD = torch.stack([self.tensors["examples"][labels == c].mean(0) for c in range(len(self.tasks))])
        near_CC = unit(middle_CD) @ unit(middle_CD).T
        return near_CC.fill_diagonal_(-1.0)

    def _log_p(self, witness: str, x_ND: Tensor) -> Tensor:
        if (middle_D := self.tensors.get(f"{witness}.middle")) is not None:
            x_ND = unit(x_ND - middle_D)
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


def _states(model: Model, chains: Sequence[Sequence[Any]], depth: float, take: Callable[[States, list[int]], Tensor]) -> Tensor:
    """What `take` takes of the states of each chain's prompt [N, H], given their numbers too."""
    taken_NH = torch.zeros(len(chains), model.width)
    batches = list(model.batches(chains, 4096))
    step = model.progress(len(batches), "hidden states")
    for numbers in batches:
        taken_NH[numbers] = take(States(model, model.prompts([chains[i] for i in numbers]), depth), numbers)
        step()
    return taken_NH


def _spans(reader: Reader, texts: Sequence[str], frame: tuple[str, str]) -> list[tuple[int, int]]:
    """Of each text, where its words are without its frame, as `States.mean` takes it."""
    before, after = reader.lengths([frame[0].rstrip(), frame[1]])  # a space belongs to the word after it
    spans = []
    for text, count in zip(texts, reader.lengths(texts), strict=True):
        first = count - before * text.startswith(frame[0])
        end = after * text.endswith(frame[1])
        spans.append((first, end) if first > end else (max(count, 1), 0))
    return spans


def _preceded(rows: Sequence[tuple[int, Any]], seed: int) -> list[list[Any]]:
    """Each shot once more, after one to three shots of other tasks."""
    rng = random.Random(f"requests {seed}")
    chains = []
    for c, shot in rows:
        others = [other for d, other in rows if d != c]
        chains.append([*rng.sample(others, min(rng.randint(1, 3), len(others))), shot])
    return chains


def _as_bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _as_text(tensor: Tensor) -> str:
    return bytes(tensor.tolist()).decode()


def _spoken(name: str) -> str:
    """A task's name as one would say it: "past_tense" is past tense."""
    return re.sub(r"[\W_]+", " ", name).strip() or name


def _named(text_ND: Tensor, name_CD: Tensor, labels: Sequence[int]) -> dict[str, Tensor]:
    """p = softmax(k (cos(text, name) − its mean over the shots)), with the k ≥ 0 under which the shots' tasks are likeliest: the
    likelihood is concave in k, so that its slope says on which side of k the best one is."""
    near_NC = text_ND @ name_CD.T
    middle_C = near_NC.mean(0)
    near_NC = near_NC - middle_C
    own_N = near_NC[torch.arange(len(labels)), list(labels)]
    low, high = 0.0, 100.0
    for _ in range(40):
        k = (low + high) / 2
        slope = (own_N - ((k * near_NC).softmax(-1) * near_NC).sum(-1)).mean()
        low, high = (k, high) if slope > 0 else (low, k)
    return {"names": name_CD, "names.middle": middle_C, "names.scale": torch.tensor(low)}


def _centred(witness: str, x_NH: Tensor, labels: Sequence[int], count: int) -> dict[str, Tensor]:
    """A regression on directions from the mean: all states of a base point much the same way."""
    middle_H = x_NH.mean(0)
    return {f"{witness}.middle": middle_H, **_regression(witness, unit(x_NH - middle_H), labels, count)}


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
