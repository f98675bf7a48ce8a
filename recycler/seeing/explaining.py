"""One answer, explained: who fired at which layer and token, and what the answer would have been worth without each of them.

What is measured is the answer's log-probability, token by token, under three kinds of mixture: the one that answered; the same with
one adapter's weights set to 0 and nothing else changed; and the bare base. The others' weights are those that were recorded, not
decided anew and not renormalised, so that the difference is that adapter's part alone. All of them run as rows of one batch.

A token of the prompt has the weights with which it was read; one of the answer those of the step that wrote it, in which the token
before it was read. The prompt's last token is read once and counts as both.

Dimensions in names: T token (the prompt's, then the answer's), A token of the answer, L layer, E adapter, S site of a group, R row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recycler import text
from recycler.pictures.routing import layers
from recycler.routers.protocol import Batch, Few, Group, Rowwise
from recycler.scoring import Progress, nll, silent
from recycler.seeing.pieces import pieces
from recycler.shots import NO_TEXT, Shot, is_text
from recycler.zoo.errors import InputError, UsageError

if TYPE_CHECKING:
    from recycler.routed import RoutedModel

SCHEMA_VERSION = 1
LEAD = 0.05  # a token is somebody's when their share is so far ahead of the next one's
_TOKENS = 4096  # padded tokens in one forward
_DIGITS = 6


@dataclass(frozen=True, eq=False)
class Explanation:
    """Who answered, and what each contributed.

    Attributes:
        prompt, answer: as text; the answer without special tokens.
        method: the router's; "mixture" where one was given instead, "base" where adapters are disabled.
        adapters: all names, in the order of E.
        tokens: each token's own text; put together they are what the tokenizer decodes, special tokens included.
        special: which of them are special tokens. An answer that ended has its end token as the last one.
        begins: the number of the answer's first token.
        layers: names, in the order of L, as `recycler.pictures.routing.layers` gives them: "0", "1", ...; "encoder 0", "decoder 0"
            where adapters sit in two stacks; a linear outside of layers by its own name.
        share_TE: mean weight over sites, where a token was read (the prompt's) or written (the answer's). What is missing to 1 is
            the base's.
        share_LE: mean weight over a layer's sites and tokens.
        share_LTE: mean weight over a layer's sites; NaN where a layer has no part in a token (a decoder in the prompt's).
        routed_A, base_A: log-probability of each token of the answer, in nats, as it was answered and by the bare base.
        without: adapter → the same with its weights set to 0, for every adapter that fired (had a weight other than 0 anywhere), the
            largest share first.
        why: the router's reason, from routers that decide once a prompt.
    """

    prompt: str
    answer: str
    method: str
    adapters: tuple[str, ...]
    tokens: tuple[str, ...]
    special: tuple[bool, ...]
    begins: int
    layers: tuple[str, ...]
    share_TE: Tensor
    share_LE: Tensor
    share_LTE: Tensor
    routed_A: Tensor
    base_A: Tensor
    without: Mapping[str, Tensor]
    why: dict[str, Any] | None = None

    @property
    def fired(self) -> tuple[str, ...]:
        """The adapters that fired, the largest share first."""
        return tuple(self.without)

    @property
    def share(self) -> dict[str, float]:
        """Of each adapter that fired: its mean weight over sites and tokens."""
        return self.share_of(0, len(self.tokens))

    def share_of(self, start: int, stop: int) -> dict[str, float]:
        """`share`, over some of the tokens."""
        mean_E = self.share_TE[start:stop].mean(0).tolist()
        return {name: mean_E[self.adapters.index(name)] for name in self.without}

    @property
    def effect(self) -> dict[str, float]:
        """Of each adapter that fired: log p(answer) minus log p(answer) without it, in nats. Above 0 it helped this answer."""
        return {name: float(self.effect_A(name).sum()) for name in self.without}

    def chief(self, count: int) -> tuple[str, ...]:
        """At most so many of those that fired, for a table: by turns the largest share and the largest effect. In order of share."""
        effect = self.effect
        by_effect = sorted(effect, key=lambda name: -abs(effect[name]))
        taken = list(dict.fromkeys(name for pair in zip(self.fired, by_effect, strict=True) for name in pair))[:count]
        return tuple(name for name in self.fired if name in set(taken))

    def effect_A(self, name: str) -> Tensor:
        """`effect`, token by token of the answer."""
        return self.routed_A - self.without[name]

    def owner(self, token: int) -> str | None:
        """Whose a token is: the adapter with the largest share of it. None where the base has more, or where nobody leads the next
        one by `LEAD`."""
        share_E = self.share_TE[token]
        value_K, number_K = share_E.abs().topk(min(2, len(share_E)))
        first, second = float(value_K[0]), float(value_K[1]) if len(value_K) > 1 else 0.0
        if first <= self.base_share(token) or first - second < LEAD:
            return None
        return self.adapters[int(number_K[0])]

    def base_share(self, token: int) -> float:
        """What adapters leave of a token to the base."""
        return max(0.0, 1.0 - float(self.share_TE[token].sum()))

    def to_json(self) -> dict[str, Any]:
        """Numbers are rounded; shares that round to nothing are left out."""
        share, effect = self.share, self.effect
        asked, answered = self.share_of(0, self.begins), self.share_of(self.begins, len(self.tokens))
        result: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "prompt": self.prompt,
            "answer": self.answer,
            "method": self.method,
            "logprob": {"routed": _rounded(self.routed_A.sum()), "base": _rounded(self.base_A.sum())},
            "adapters": [
                {
                    "name": name,
                    "share": _rounded(share[name]),
                    "share_prompt": _rounded(asked[name]),
                    "share_answer": _rounded(answered[name]),
                    "effect": _rounded(effect[name]),
                    "logprob_without": _rounded(self.without[name].sum()),
                }
                for name in self.fired
            ],
            "layers": [{"layer": layer, "shares": self._shares(self.share_LE[i])} for i, layer in enumerate(self.layers)],
            "tokens": [self._token(i) for i in range(len(self.tokens))],
        }
        return result if self.why is None else {**result, "why": self.why}

    def _token(self, i: int) -> dict[str, Any]:
        row: dict[str, Any] = {
            "text": self.tokens[i],
            "part": "prompt" if i < self.begins else "answer",
            "special": self.special[i],
            "adapter": self.owner(i),
            "shares": self._shares(self.share_TE[i]),
        }
        a = i - self.begins
        if a >= 0:
            row |= {
                "logprob": {"routed": _rounded(self.routed_A[a]), "base": _rounded(self.base_A[a])},
                "effects": {name: _rounded(self.effect_A(name)[a]) for name in self.fired},
            }
        return row

    def _shares(self, share_E: Tensor) -> dict[str, float]:
        """The largest first."""
        pairs = [(name, _rounded(share_E[self.adapters.index(name)])) for name in self.fired]
        return dict(sorted((pair for pair in pairs if pair[1]), key=lambda pair: -abs(pair[1])))


@torch.no_grad()
def explain(
    model: RoutedModel,
    prompt: str,
    answer: str | None = None,
    *,
    max_new_tokens: int = 64,
    task: str | None = None,
    progress: Progress = silent,
) -> Explanation:
    """Answers a prompt greedily, or takes the answer that is given, and explains it.

    It is explained as it is answered now: by the router, or in a ``with`` block of `mixture`, `only` or `disabled` by that.

    Where a router limits how many rank-one components act (``-o ranks=8``), those of the other adapters move up into the places that a
    removed one leaves.

    Args:
        answer: the text to explain, followed by the end of the answer; by default what the model answers.
        max_new_tokens: of an answer that is made; fewer where the base's context ends.
        task: for a router that wants to be told (`oracle`).

    Raises:
        UsageError: the prompt is blank or no text, or `max_new_tokens` is below 1. InputError: prompt and answer are longer than the base's
            context, or weights are not one row a token, as in experts that see only some tokens.
    """
    check_prompt(prompt, answer)
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens={max_new_tokens}.", "An answer has at least one token.", "Use 1 or more.")
    shot = Shot(prompt, answer or "")
    inputs = text.prompts(model.source, [[shot]])
    asked = inputs["input_ids"][0].tolist()
    given = [] if answer is None else _given(model, shot)
    room = _room(model, len(asked), len(given) or 1)
    with nullcontext() if task is None else model.labelled([task]), model.planned(inputs) as plan:
        answered = _generated(model, inputs, min(max_new_tokens, room or max_new_tokens)) if answer is None else given
        record: dict[str, Tensor] = {}
        with model.engine.control.set(record=record):
            loss_RT = nll(model, _batch(model, asked, answered, 1), None)
        why = None if plan is None or model.router is None else model.router.explain(plan)
        routed_A, base_A, without = _removals(model, asked, answered, record, _answer(loss_RT, len(answered))[0], progress)
    share_LTE, share_TE, layers = _shares(model, record, len(asked), len(answered))
    mean_E = share_TE.mean(0).abs()
    number = {name: e for e, name in enumerate(model.names)}
    order = sorted(without, key=lambda name: (-float(mean_E[number[name]]), name))
    tokenizer, special = model.tokenizer, set(model.tokenizer.all_special_ids)
    if model.source.encoder_decoder:
        texts = pieces(tokenizer, asked) + pieces(tokenizer, answered)
    else:
        texts = pieces(tokenizer, asked + answered)
    return Explanation(
        prompt=prompt,
        answer=tokenizer.decode(answered, skip_special_tokens=True) if answer is None else answer,
        method=_method(model),
        adapters=model.names,
        tokens=tuple(texts),
        special=tuple(i in special for i in asked + answered),
        begins=len(asked),
        layers=layers,
        share_TE=share_TE,
        share_LE=share_LTE.nanmean(1),
        share_LTE=share_LTE,
        routed_A=routed_A,
        base_A=base_A,
        without={name: without[name] for name in order},
        why=None if why is None else why[0],
    )


def check_prompt(prompt: str, answer: str | None = None) -> None:
    """Raises UsageError where there is nothing to explain, or what no tokenizer takes."""
    if not prompt.strip():
        raise UsageError("A prompt cannot be used: it is empty.", "", "Give some text, or leave it out.")
    if not is_text(Shot(prompt, answer or "")):
        raise UsageError("A prompt or an answer cannot be used.", f"In it is {NO_TEXT}.", "Give it as UTF-8.")


def _room(model: RoutedModel, asked: int, answered: int) -> int | None:
    """How many tokens there are for an answer; None where nothing says.

    Raises:
        InputError: the base has no positions for prompt and answer. Each adapter would cost a forward that says nothing.
    """
    size = None if model.source.encoder_decoder else getattr(model.config, "max_position_embeddings", None)
    if size is not None and asked + answered > size:
        raise InputError(
            f"The prompt has {asked} tokens{f', and its answer {answered}' if answered > 1 else ''}.",
            f"The base's context is {size}.",
            "Shorten the prompt.",
        )
    return None if size is None else int(size) - asked


def _method(model: RoutedModel) -> str:
    control = model.engine.control
    if not control.enabled:
        return "base"
    return "mixture" if control.forced is not None or model.router is None else model.router.method()


def _generated(model: RoutedModel, inputs: Mapping[str, Tensor], max_new_tokens: int) -> list[int]:
    """Token ids of the greedy answer, with its end token where it ends by itself."""
    ids_BT = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=model.source.ends,
        pad_token_id=model.tokenizer.pad_token_id,
    )  # fmt: skip
    start = 1 if model.source.encoder_decoder else inputs["input_ids"].shape[1]
    ids: list[int] = ids_BT[0, start:].tolist()
    return ids


def _given(model: RoutedModel, shot: Shot) -> list[int]:
    return [*text.completion_ids(model.source, shot), model.tokenizer.eos_token_id]


def _batch(model: RoutedModel, asked: Sequence[int], answered: Sequence[int], rows: int) -> Batch:
    """Prompt and answer, `rows` times, as they are read: without the answer's last token, which nothing follows."""
    device = model.source.device

    def repeated(ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, device=device).expand(rows, -1)

    if model.source.encoder_decoder:
        source_RT, target_RT = repeated(asked), repeated([model.base.config.decoder_start_token_id, *answered[:-1]])
        inputs = {
            "input_ids": source_RT,
            "attention_mask": torch.ones_like(source_RT),
            "decoder_input_ids": target_RT,
            "decoder_attention_mask": torch.ones_like(target_RT),
        }
        masks = {"input": torch.ones_like(source_RT).bool(), "target": torch.ones_like(target_RT).bool()}
        return Batch(inputs, repeated(answered), masks, {})  # type: ignore[arg-type]
    ids_RT = repeated([*asked, *answered[:-1]])
    labels_RT = repeated([text.IGNORE] * (len(asked) - 1) + [*answered])
    mask_RT = torch.ones_like(ids_RT).bool()
    return Batch(text.causal_inputs(model.source, ids_RT, mask_RT), labels_RT, {"input": mask_RT}, {})


def _removals(
    model: RoutedModel, asked: Sequence[int], answered: Sequence[int], record: Mapping[str, Tensor], routed_A: Tensor,
    progress: Progress,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
    """The answer's log-probabilities as routed, by the base, and without each adapter that fired."""
    fired = sorted({e for w in record.values() for e in w.flatten(0, -2).ne(0).any(0).nonzero()[:, 0].tolist()})
    if not fired:
        return routed_A, routed_A, {}
    count = len(model.names)
    keep_RE = torch.ones(len(fired) + 1, count)
    keep_RE[torch.arange(len(fired)), torch.tensor(fired)] = 0
    keep_RE[-1] = 0  # the base
    size = max(1, _TOKENS // (len(asked) + len(answered)) - 1)
    change_RA = []
    forwards = -(-len(keep_RE) // size)
    step = (progress if forwards > 1 else silent)(forwards, "without each")
    for start in range(0, len(keep_RE), size):
        # Each batch has the whole mixture as its first row: a difference is taken within one forward.
        some_RE = torch.cat([torch.ones(1, count), keep_RE[start : start + size]])
        weights = Rowwise(_replay(record, some_RE), Few(tuple(fired), len(fired)))
        with model.engine.control.set(replayed=True):
            loss_RT = nll(model, _batch(model, asked, answered, len(some_RE)), weights)
        logprob_RA = _answer(loss_RT, len(answered))
        if start == 0:
            routed_A = logprob_RA[0]
        change_RA.append(logprob_RA[1:] - logprob_RA[0])
        step()
    without_RA = routed_A + torch.cat(change_RA)
    return routed_A, without_RA[-1], {model.names[e]: without_RA[r] for r, e in enumerate(fired)}


def _replay(record: Mapping[str, Tensor], keep_RE: Tensor) -> Any:
    """The weights that were recorded, for as many rows as `keep_RE` has, times it."""

    def weights(group: Group, x_RTD: Tensor) -> Tensor:
        known = next(record[site] for site in group.sites if site in record)
        w_TSE = torch.stack([record.get(site, torch.zeros_like(known)) for site in group.sites], -2)
        w_TSE = w_TSE.flatten(0, -3).to(x_RTD.device)
        w_RTSE = w_TSE * keep_RE.to(x_RTD.device)[:, None, None]
        if x_RTD.shape[:-1].numel() != w_RTSE.shape[:2].numel():
            raise InputError(
                f"{group.name} does not read every token once.",
                "Who fired there cannot be told apart by token, nor taken away exactly.",
                "Explain a model whose adapters sit on linears that read all tokens.",
            )
        return w_RTSE.view(*x_RTD.shape[:-1], *w_RTSE.shape[2:])

    return weights


def _answer(loss_RT: Tensor, count: int) -> Tensor:
    """Log-probabilities of the answer's tokens [R, A]: the last that was read wrote the last one."""
    return -loss_RT[:, -count:].double().cpu()


def _shares(
    model: RoutedModel, record: Mapping[str, Tensor], asked: int, answered: int
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Mean weights by layer and token [L, T, E] and by token [T, E], and the layers' names."""
    streams = {site: group.stream for group in model.engine.groups for site in group.sites}
    both = model.source.encoder_decoder
    total, sites = torch.zeros(asked + answered, len(model.names)), torch.zeros(asked + answered, 1)
    sums_of: dict[str, tuple[Tensor, Tensor]] = {}
    for site, layer in layers(record).items():
        w_TE, first, last = record[site].flatten(0, -2).cpu(), 0, asked + answered
        if both:
            first, last = (0, asked) if streams[site] == "input" else (asked, asked + answered)
        else:
            w_TE = torch.cat([w_TE[:asked], w_TE[asked - 1 :]])
        sums = sums_of.setdefault(layer, (torch.zeros_like(total), torch.zeros_like(sites)))
        for sum_TE, count_T1 in ((total, sites), sums):
            sum_TE[first:last] += w_TE
            count_T1[first:last] += 1
    share_LTE = torch.stack([sum_TE / count_T1 for sum_TE, count_T1 in sums_of.values()]) if sums_of else total[None][:0]
    return share_LTE, total / sites.clamp(min=1), tuple(sums_of)


def _rounded(value: Any) -> float:
    return round(float(value), _DIGITS)
