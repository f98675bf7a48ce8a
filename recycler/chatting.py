"""A conversation with a routed model, and who fires while it answers. Knows nothing of terminals.

Every turn renders the whole conversation anew, by the tokenizer's chat template or as plain turns (`plain`), and answers that: what
a router decides once a sequence it decides on all of it, and an answer is what `generate` gives for the same tokens. Nothing is
kept of the turns before but their text: another mixture, or another plan, would make their keys and values wrong.

Dimensions in names: S site, E adapter, N token of the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from recycler import text
from recycler.sampling import Draws
from recycler.shots import NO_TEXT, Shot, is_text
from recycler.zoo.errors import UsageError, choices
from recycler.zoo.places import places

if TYPE_CHECKING:
    from recycler.routed import RoutedModel

Turns = Sequence[tuple[str, str]]  # (role, content)

_ASKS, _ANSWERS = "Instruction:", "Response:"
STOP = f"\n{_ASKS}"  # a model without a chat template would go on with the next question


@dataclass(frozen=True)
class Piece:
    """What one more token added to an answer.

    Attributes:
        text: empty while a character is unfinished, or for an end token.
        shares: each adapter's mean weight over sites, in the forward that made the token, in the order of ``model.names``; what is
            missing to 1 is the base's.
    """

    text: str
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Answer:
    """An answer, and who made it.

    Attributes:
        text: without special tokens and outer spaces.
        pieces: one for each token; their texts are the answer as it was made.
        layers: layer (or the linear's name, outside the layers) → each adapter's mean weight over its sites and all tokens.
        why: the router's reason, from routers that decide once a sequence and say one.
        stopped: somebody stopped it.
        forgotten: how many of the oldest turns no longer fitted into the base's context.
    """

    text: str
    pieces: tuple[Piece, ...]
    layers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    why: Mapping[str, Any] | None = None
    stopped: bool = False
    forgotten: int = 0

    @property
    def shares(self) -> tuple[float, ...]:
        """Each adapter's share of the answer: the mean over its tokens."""
        return _mean([piece.shares for piece in self.pieces])


def leader(shares: Sequence[float]) -> int | None:
    """The number of the adapter that dominates; None where it is the base."""
    best = max(range(len(shares)), key=lambda e: abs(shares[e]), default=None)
    return None if best is None or abs(shares[best]) <= max(1 - sum(shares), 0.0) else best


def plain(turns: Turns) -> str:
    """A conversation for a base without a chat template: instructions and responses, apart by an empty line, as routers are fitted
    on chains of examples; a system text comes first, as it is.

    ::

        Instruction: What is 417 + 85?
        Response: 502

        Instruction: And in words?
        Response:

    Raises:
        UsageError: somebody answers whom nobody asked, or nobody asks at the end.
    """
    roles = [role for role, _ in turns]
    if roles[-1:] != ["user"] or any(role == "assistant" and before != "user" for before, role in pairwise(["", *roles])):
        raise UsageError(
            "These are no plain turns.",
            "Each answer follows a user's message, and a user's message is the last.",
            "Order them so.",
        )
    blocks: list[str] = []
    for role, content in turns:
        if role == "assistant":
            blocks[-1] += f" {content}"
        else:
            blocks.append(content if role == "system" else f"{_ASKS} {content}\n{_ANSWERS}")
    return text.SEPARATOR.join(blocks)


def unseen(model: RoutedModel) -> str:
    """What to know before chatting through the base's template: that neither gates nor scores have seen it; "" where they have, or
    where nobody can tell."""
    facts = {} if model.router is None else model.router.facts.get("profile") or {}
    if not model.tokenizer.chat_template or facts.get("chats", True):
        return ""
    return (
        "the shots were plain prompts, and chats go through the base's chat template, a form in which nothing here was measured; "
        "--plain writes them as `Instruction: … Response: …`, if the shots were so"
    )


class Chat:
    """A conversation.

    Args:
        system: said before everything; None says nothing.
        only: this adapter alone, or "base"; the router where None.
        max_new_tokens: of one answer.
        temperature: 0 for the likeliest answer; above it, answers are drawn.
        seed: of what is drawn: the same conversation with the same seed goes the same way.
        template: False makes plain turns even where the tokenizer has a chat template.

    Attributes:
        turns: (role, content) of what was said, the system text left out.
        last: the last answer, or None.

    Raises:
        UsageError: there is no such adapter, or a number makes no sense.
    """

    def __init__(
        self,
        model: RoutedModel,
        *,
        system: str | None = None,
        only: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        template: bool = True,
    ) -> None:
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={max_new_tokens}.", "An answer has at least one token.", "Use 1 or more.")
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise UsageError(f"temperature={temperature}.", "", "Use 0 for the likeliest answer, or a positive number.")
        self.model, self.max_new_tokens, self.temperature, self.seed = model, max_new_tokens, temperature, seed
        self.template = template and bool(model.tokenizer.chat_template)
        self.system = system
        self.turns: list[tuple[str, str]] = []
        self.last: Answer | None = None
        self.use(only)

    def use(self, only: str | None) -> None:
        """Who answers from now on: one adapter, "base" for none, or the router again where None.

        Raises:
            UsageError: there is no such adapter.
        """
        if only not in (None, "base", *self.model.names):
            raise UsageError(
                f"There is no adapter {only!r} in this model.",
                "",
                f"Choose {choices(self.model.names, only or '')}.",
                code="E_UNKNOWN",
            )
        self.only = only

    def reset(self) -> None:
        """Forgets what was said; the system text stays."""
        self.turns, self.last = [], None

    def prompt(self, turns: Turns) -> dict[str, Tensor]:
        """Inputs of `generate` for turns that end with the user's."""
        turns = [*([("system", self.system)] if self.system else []), *turns]
        shot = Shot("", "", tuple(turns)) if self.template else Shot(plain(turns), "")
        return text.prompts(self.model.source, [[shot]])

    def ask(
        self, message: str, *, on_piece: Callable[[Piece], None] = lambda piece: None, stop: Callable[[], bool] = lambda: False
    ) -> Answer:
        """Answers a message. The conversation goes on only with an answer that was finished or stopped, not after an error.

        Args:
            on_piece: called with every piece as it is made.
            stop: asked after every token; the answer ends where it says True.

        Raises:
            UsageError: it is no text, or longer than the base's context.
        """
        if not message.strip() or not is_text(Shot(message, "")):
            raise UsageError("This message cannot be used.", NO_TEXT if message.strip() else "It is empty.", "Give some text.")
        turns, inputs, limit = self._fit([*self.turns, ("user", message)])
        start = 1 if self.model.source.encoder_decoder else inputs["input_ids"].shape[1]
        watch = _Watch(self.model, start, on_piece, stop, None if self.template else STOP)
        options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": limit}
        options |= {"eos_token_id": self.model.source.ends, "pad_token_id": self.model.tokenizer.pad_token_id}
        if self.temperature:
            options["logits_processor"] = [Draws([self.seed + len(self.turns)], self.temperature)]
        control = self.model.engine.control
        with torch.no_grad(), self._answering(), self.model.planned(inputs) as plan, control.set(record=watch.record):
            why = None if plan is None or self.model.router is None else self.model.router.explain(plan)
            self.model.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([watch]))
        watch.end()
        forgotten = len(self.turns) + 1 - len(turns)
        self.last = watch.answer(None if why is None else why[0], forgotten)
        self.turns = [*turns, ("assistant", self.last.text)]
        return self.last

    def _answering(self) -> AbstractContextManager[Any]:
        if self.only is None:
            return nullcontext()
        return self.model.disabled() if self.only == "base" else self.model.only(self.only)

    def _fit(self, turns: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], dict[str, Tensor], int]:
        """(the turns that fit into the base's context, their inputs, how many tokens there are for an answer)."""
        size = None if self.model.source.encoder_decoder else getattr(self.model.config, "max_position_embeddings", None)
        inputs = self.prompt(turns)
        while size and inputs["input_ids"].shape[1] + self.max_new_tokens > size and len(turns) > 2:
            turns = turns[2:]  # a question and its answer
            inputs = self.prompt(turns)
        room = self.max_new_tokens if not size else size - inputs["input_ids"].shape[1]
        if room < 1:
            raise UsageError(
                f"This message is too long: {inputs['input_ids'].shape[1]} tokens.", f"The base reads {size}.", "Shorten it."
            )
        return turns, inputs, min(room, self.max_new_tokens)


class _Watch(StoppingCriteria):
    """Asked by `generate` after every token whether to go on: the moment to see the token, and what the banks took down in the
    forward that made it.

    Args:
        start: how many tokens there are before the answer.
    """

    def __init__(
        self, model: RoutedModel, start: int, on_piece: Callable[[Piece], None], stop: Callable[[], bool], stop_text: str | None
    ) -> None:
        self.tokenizer, self.count, self.ends = model.tokenizer, len(model.names), set(model.source.ends)
        self.start, self.on_piece, self.stop, self.stop_text = start, on_piece, stop, stop_text
        self.record: dict[str, Tensor] = {}
        stream = {site: group.stream for group in model.engine.groups for site in group.sites}
        self.sites = [site for site in model.sites if stream[site] == "target" or not model.source.encoder_decoder]
        self.total_SE: Tensor | None = None
        self.seen: list[str] = []  # the sites of total_SE
        self.ids: list[int] = []
        self.pieces: list[Piece] = []
        self.shown = ""
        self.done = self.stopped = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if not self.done:  # on some devices `generate` runs a step more than it returns
            self.see(input_ids[0, self.start + len(self.ids) :].tolist())
        return torch.full((len(input_ids),), self.done, dtype=torch.bool, device=input_ids.device)

    def see(self, new: list[int]) -> None:
        self.ids += new
        whole = self.decoded()
        if self.stop_text is not None and self.stop_text in whole:
            self.done, whole = True, whole.split(self.stop_text)[0]
        self.add(whole if self.done else whole[: len(whole) - _unsure(whole, self.stop_text)])
        self.done = self.done or self.ids[-1] in self.ends
        if not self.done and self.stop():
            self.done = self.stopped = True

    def add(self, whole: str) -> None:
        """A piece more, which takes the answer to `whole`."""
        new = whole[len(self.shown) :] if whole.startswith(self.shown) else ""
        self.shown += new
        self.pieces.append(Piece(new, self.shares()))
        self.on_piece(self.pieces[-1])

    def end(self) -> None:
        """What was held back and turned out to be the answer's."""
        whole = self.decoded()
        if self.stop_text is not None:
            whole = whole.split(self.stop_text)[0]
        if self.pieces and whole != self.shown and whole.startswith(self.shown):
            last = self.pieces[-1]
            rest = Piece(whole[len(self.shown) :], last.shares)
            self.pieces[-1] = Piece(last.text + rest.text, last.shares)
            self.shown = whole
            self.on_piece(rest)

    def decoded(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def shares(self) -> tuple[float, ...]:
        # Experts see some of the tokens only, in rows of their own: theirs are left out.
        sites = [site for site in self.sites if site in self.record and self.record[site].dim() == 3]
        if not sites:  # the bare base
            return (0.0,) * self.count
        w_SE = torch.stack([self.record[site][0, -1] for site in sites])
        self.total_SE = w_SE if self.total_SE is None else self.total_SE + w_SE
        self.seen = sites
        return tuple(w_SE.mean(0).tolist())

    def answer(self, why: Mapping[str, Any] | None, forgotten: int) -> Answer:
        layers: dict[str, list[tuple[float, ...]]] = {}
        if self.total_SE is not None:
            where = places(self.seen)
            for site, weights_E in zip(self.seen, (self.total_SE / len(self.pieces)).tolist(), strict=True):
                layer, kind = where[site]
                layers.setdefault(kind if layer is None else str(layer), []).append(tuple(weights_E))
        means = {layer: _mean(rows) for layer, rows in layers.items()}
        return Answer(self.shown.strip(), tuple(self.pieces), means, why, self.stopped, forgotten)


def _unsure(whole: str, stop_text: str | None) -> int:
    """How many characters at the end may become others, or a text that ends the answer."""
    broken = len(whole) - len(whole.rstrip("\ufffd"))  # bytes of a character whose others are to come
    if broken or stop_text is None:
        return broken
    return next((n for n in range(min(len(stop_text), len(whole)), 0, -1) if whole.endswith(stop_text[:n])), 0)


def _mean(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))
