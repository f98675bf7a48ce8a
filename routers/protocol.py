"""What a router may ask of a model and of a profile. Nothing else about either is known in this folder.

Dimensions in names: B batch, T token, D input width, H hidden width, E adapter, S site of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Union

from torch import Tensor

if TYPE_CHECKING:
    from recycler.zoo.adapter import Factors

Stream = Literal["input", "target"]


@dataclass(frozen=True)
class Group:
    """Sites that read the same input tensor (q, k and v of one layer, say), so that one gate computation can serve them.

    Attributes:
        sites: module paths in call order; the first names the group.
        width: D, the width of the shared input.
        stream: which tokens it sees: "input" (all of a causal model; the encoder side of an encoder–decoder, cross-attention
            keys and values included) or "target" (the decoder side).
        after: the name of the group that ran before it in the same module on the same stream (q, k and v for the attention
            output; gate and up for down), whose decision it can reuse; None if there is none.
        depth: how far up it lies: 0 for the first group of the model, near 1 for the last.
    """

    sites: tuple[str, ...]
    width: int
    stream: Stream = "input"
    after: str | None = None
    depth: float = 0.0

    @property
    def name(self) -> str:
        return self.sites[0]


@dataclass
class Batch:
    """Tokenised rows, padded.

    Attributes:
        inputs: keyword arguments of the model's forward.
        labels_BT: token ids to predict at each position of the scored stream, −100 where nothing is scored.
        mask_BT: per stream, True at real tokens.
        segment_BT: per stream, which of the row's chained examples a token belongs to; −1 at padding.
    """

    inputs: dict[str, Tensor]
    labels_BT: Tensor
    mask_BT: dict[Stream, Tensor]
    segment_BT: dict[Stream, Tensor]


@dataclass(frozen=True)
class Few:
    """What a host knows of mixtures, one a sequence, before anything runs: who is in any of them, and at most how many in one."""

    used: tuple[int, ...]
    k: int

    @classmethod
    def of(cls, weights_BE: Tensor) -> Few:
        """Reads weights. Those that are trained use all adapters."""
        if weights_BE.requires_grad:
            return cls(tuple(range(weights_BE.shape[-1])), weights_BE.shape[-1])
        on_BE = weights_BE.detach().reshape(-1, weights_BE.shape[-1]) != 0
        return cls(tuple(on_BE.any(0).nonzero()[:, 0].tolist()), int(on_BE.sum(-1).amax()))


Function = Callable[[Group, Tensor], Tensor]  # (group, x [B, T, D]) → weights [B, T, S or 1, E]


@dataclass(frozen=True)
class Rowwise:
    """Weights that are a function of what is seen on the way, of rows whose adapters are known beforehand: whoever is not theirs is
    not multiplied with, so that a batch costs the same in a zoo of any size.

    Attributes:
        weights: 0 for every adapter that is not in `few.used`, and in all tokens of one row for all but `few.k`.
    """

    weights: Function
    few: Few


Weights = Union[Tensor, Function, Rowwise]  # noqa: UP007  (a runtime alias; 3.10 has no `type`)


class Reader(Protocol):
    """What a router may read of a sequence before the first forward, while it is fitted and while it runs.

    `inputs` are keyword arguments of the model's forward; of them the real tokens of ``input_ids`` count.
    """

    adapters: tuple[str, ...]
    width: int  # H, of the base's hidden states
    chains: bool  # can several examples share one context? (no for encoder–decoder models)

    @property
    def tasks(self) -> Sequence[str | None] | None:
        """Each row's task, where somebody said it (`RoutedModel.labelled`)."""
        ...

    def texts(self, inputs: Mapping[str, Any]) -> list[str]:
        """Each row's tokens, decoded; special tokens are left out."""
        ...

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens of the base each text has, without special tokens."""
        ...

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The base's inputs for texts as they stand, padded: ``input_ids`` and ``attention_mask`` [N, T], on its device. Of a text
        that is longer than its context they are the end."""
        ...

    def embed(self, texts: Sequence[str], encoder: str) -> Tensor:
        """Sentence embeddings [N, width of the encoder], of length 1, fp32, on the CPU."""
        ...

    def ask(self, prompts: Sequence[str], llm: str, *, temperature: float = 0.0, seed: int = 0) -> list[str]:
        """A language model's answers, in order, uncleaned and some 60 tokens long at most. What was asked before is not asked
        again. How to ask and what to keep: `recycler.routers.instructions`.

        Args:
            llm: a model's folder, its id on the Hub, or an endpoint, ``https://host/v1#model``.
            temperature: 0 for the likeliest answer; above it, each `seed` draws another.
        """
        ...

    def states(self, inputs: Mapping[str, Any], depth: float = 1.0) -> tuple[Tensor, Tensor]:
        """The bare base's hidden states [B, T, H], fp32, and the mask [B, T] that is True at real tokens: those of the encoder
        where there is one. One forward without adapters, without gradients.

        Args:
            depth: how far up: 1 for what the head reads, 0.5 for what comes out of the middle layer.
        """
        ...


class Model(Reader, Protocol):
    """The base with its adapters, as a router sees it while it is fitted."""

    groups: tuple[Group, ...]
    sites: tuple[str, ...]  # of all groups, in the order in which the base defines its modules
    part: tuple[int, int]  # (which process this is, how many share the base); (0, 1) where it is on its own

    def factors(self, site: str) -> Mapping[str, Factors]:
        """The adapters that hold factors at `site`, by name."""
        ...

    def base_weight(self, site: str) -> Tensor:
        """The base's weight W [O, D] at `site`, fp32, on the CPU."""
        ...

    def encode(self, rows: Sequence[Sequence[Any]]) -> Batch:
        """Tokenises rows of one or more shots each, chained in one context, and pads them."""
        ...

    def prompts(self, rows: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        """Tokenises rows as `encode` does, up to where the last shot's answer would begin; padded on the left."""
        ...

    def observe(self, batch: Batch, weights: Weights) -> None:
        """One forward without gradients and without logits, for what `weights`, as a function, sees on the way."""
        ...

    def nll(self, batch: Batch, weights: Weights) -> Tensor:
        """Negative log-likelihood per label [B, T] (0 where nothing is scored) with the given mixture.

        `weights` is a tensor [E], [B, E] or [B, T, E], or a function of (group, x_BTD) that returns [B, T, S or 1, E]; `Rowwise`
        where each row's adapters are known.
        """
        ...

    def batches(self, rows: Sequence[Sequence[Any]], tokens: int) -> Iterator[list[int]]:
        """Row numbers in batches of about `tokens` tokens, rows of like length together."""
        ...

    def map(self, work: Callable[[Any, Any], Any], items: Sequence[Any], what: str) -> list[Any]:
        """``work(model, item)`` for every item, in order, under a bar called `what`. Others may do it, who hold an equal model: `work` is
        a function of a module, items and results are small and can be sent, and no item knows what came of another."""
        ...

    def progress(self, steps: int, what: str) -> Callable[..., None]:
        """A bar of `steps`; call the result as (count=1, note="") after each."""
        ...


class Profile(Protocol):
    """What shots taught us, as a router sees it."""

    adapters: tuple[str, ...]
    shots: Mapping[str, Sequence[Any]]  # task → its K shots: each has `prompt`, `completion`, and `messages` or None
    own: Mapping[str, Sequence[str]]  # adapter → the tasks that are its own
    owner: Mapping[str, str]  # task → the adapter to use where the task is known; tasks that nobody helps are left out
    best_single: str | None  # the one adapter to use everywhere; None for the base
    nll: Tensor  # [1 + E, tasks, K], mean NLL a token; row 0 is the base
    exact: Tensor | None  # the same of exact match, where answers were generated
    seed: int


def own_shots(model: Model, profile: Profile) -> list[tuple[int, Any]]:
    """(adapter number, shot) for every shot of every adapter's own tasks, in the order of names: what is drawn from the list
    with a seed does not depend on how the adapters are numbered."""
    numbers = {name: e for e, name in enumerate(model.adapters)}
    return [
        (numbers[name], shot) for name in sorted(numbers) for task in profile.own.get(name, ()) for shot in profile.shots[task]
    ]
