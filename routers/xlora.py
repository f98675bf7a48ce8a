"""X-LoRA: a small classifier on the bare base's last hidden state says, token by token, who gets how much.

Buehler & Buehler 2024, X-LoRA: Mixture of low-rank adapter experts (arXiv:2402.07148).

Before every forward the bare base runs over the same tokens, H [B, T, H]. Weights are softmax(f(H)/τ) [B, T, E], the same at every
site, or with `layerwise` one set for each group of sites, [B, T, L, E]. f is a linear map (depth 1) or Linear, ReLU, dropout repeated
before it. The base pass is exact with a KV cache, since the bare base keeps a second one (`recycler.companion`). An adapter that is
absent at a site keeps its share and adds nothing there.

An encoder–decoder has no second pass at its decoder: H are the encoder's states, read once a sequence; tokens of the encoder
stream are routed by their own, the decoder stream by their masked mean.

Fitting trains f on the shots of every adapter's own tasks, and on chains of them in one context, with the language-model loss;
everything else is frozen. H does not depend on f: it is computed once. Depth 1 can start in closed form (`init`), and stay there
with ``steps=0``; there, adapters without shots of their own are never chosen.

Departures from PEFT's: a KV cache; f reads LN(H) unless `normalise` is off, and stays in fp32; groups of sites that read the same
input share a head under `layerwise`; chains. As in PEFT ``renormalise=False`` leaves the k largest weights as the softmax over all
gave them. What PEFT or the package `xlora` has saved is taken over with `checkpoint`.

`frozen` decides once, at the prompt's last token, before the first forward, and keeps that for prompt and answer. It is another
method than X-LoRA: approximate, without a pass beside decoding, and not wrong about early tokens that cannot know the task yet.

Dimensions in names: B batch, T token, H hidden width, E adapter, L head (1, or one per group or site), S site of a group.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from recycler.routers import columns, xlora_checkpoint
from recycler.routers.base import Gate, Router
from recycler.routers.chains import Chain, chains
from recycler.routers.protocol import Batch, Group, Model, Profile, Reader, Stream, own_shots
from recycler.routers.select import Policy
from recycler.routers.training import descend, ends
from recycler.routers.xlora_start import Linear, States, start
from recycler.zoo.errors import InputError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

ALL = "all"  # the name of the one head that serves every site


@dataclass(frozen=True)
class XLoraConfig(Policy):
    """
    Attributes:
        top_k: PEFT's default is None, all of them. With renormalise=False it is PEFT's way to keep k.
        layerwise: a head for every group of sites; False is one for all.
        depth: linear layers of the classifier. size: the width between them. dropout: between them, while it trains.
        normalise: the classifier reads LN(H); False is PEFT's.
        frozen: decide once, at the prompt's last token.
        init: where a classifier of depth 1 starts. "ridge": least squares of whose tokens these are. "shots": mean states. "random": as
            PEFT's.
        ridge, sharpness: λ, and what predicted one-hots are multiplied by, of init=ridge.
        steps: optimiser steps; 0 leaves it where it started. rows: rows in a step. lr: AdamW's learning rate. On twelve real adapters
            (8 shots a task, 48 other rows) 15 steps of 12 rows from init=ridge gave exact match 0.65, no steps 0.71 in a tenth of
            the time; all adapters kept, init=ridge 0.67, init=shots 0.25.
        tokens: padded tokens in one forward and backward, the dial for memory.
        chains: how many chained contexts to fit on, beside the single shots; half as many as single shots when None.
        chain_length: shots in one chain.
        checkpoint: a folder with X-LoRA's own classifier, to be taken over, with its settings, instead of fitting one; needs no shots.
    """

    layerwise: bool = False
    depth: int = 1
    size: int = 2048
    dropout: float = 0.2
    normalise: bool = True
    frozen: bool = False
    init: Literal["ridge", "shots", "random"] = "ridge"
    ridge: float = 30.0
    sharpness: float = 10.0
    steps: int = 0
    rows: int = 24
    lr: float = 1e-3
    tokens: int = 1024
    chains: int | None = None
    chain_length: int = 3
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = (("depth", 1), ("size", 1), ("steps", 0), ("rows", 1), ("tokens", 1), ("chains", 0), ("chain_length", 1))
        for name, least in counts:
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name}={value}.", "It is a count.", f"Use {name}={least} or more.", code="E_OPTION")
        for name in ("ridge", "sharpness", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)}.", "", "Use a positive, finite number.", code="E_OPTION")
        if not 0 <= self.dropout < 1:
            raise UsageError(
                f"dropout={self.dropout}.", "It is a share of what is dropped.", "Use 0 or more, below 1.", code="E_OPTION"
            )
        if self.checkpoint is None and self.depth > 1 and self.init != "random":
            raise UsageError(
                f"init={self.init} with depth={self.depth}.",
                "It is known for one linear layer only.",
                "Add init=random, or depth=1.",
                code="E_OPTION",
            )
        if self.checkpoint is None and self.init == "random" and self.steps == 0:
            raise UsageError(
                "init=random with steps=0.", "That routes by chance.", "Add steps=100, or init=ridge.", code="E_OPTION"
            )


@dataclass
class Scores:
    """The plan: scores of this forward's tokens by stream. Empty until `step`.

    Attributes:
        input_BTLE: at the tokens themselves, or [B, 1, L, E] where one decision is for all of them.
        target_BTLE: for a decoder beside an encoder.
    """

    input_BTLE: Tensor | None = None
    target_BTLE: Tensor | None = None


class XLora(Router):
    """scores = f(bare base's last hidden state), for all sites or per group."""

    Config = XLoraConfig
    needs = frozenset({"shots", "scores"})
    paper = "Buehler & Buehler 2024 (arXiv:2402.07148)"
    trains = False  # but where `steps` asks for it
    base_pass = True

    def __init__(
        self,
        adapters: Sequence[str],
        config: Any,
        trunk: Sequence[Linear] = (),
        heads: Mapping[str, Linear] | None = None,
    ) -> None:
        super().__init__(adapters, config)
        self.base_pass = not config.frozen
        self.trunk, self.heads = list(trunk), dict(heads or {})
        self._placed: dict[torch.device, tuple[list[Linear], Tensor, Tensor]] = {}

    @classmethod
    def needed(cls, config: XLoraConfig) -> frozenset[str]:
        return frozenset() if config.checkpoint is not None else cls.needs

    # -- fitting

    @classmethod
    def fit(cls, model: Model, profile: Profile | None, config: XLoraConfig) -> Self:
        if config.checkpoint is not None:
            return cls._taken_over(model, config)
        assert profile is not None
        singles: list[Chain] = [[row] for row in own_shots(model, profile)]
        chained = chains(singles, config.chains, config.chain_length, profile.seed) if model.chains else []
        rows = singles + chained
        shown = States(model, rows, config.tokens)
        router = cls(model.adapters, config)
        names = sorted(group.name for group in model.groups) if config.layerwise else [ALL]
        router.trunk, router.heads = start(model, shown, names, config, profile.seed)
        losses = router._train(model, rows, shown, profile.seed) if config.steps else []
        without = [name for name in model.adapters if not profile.own.get(name)]
        router.report = {"rows": len(singles), "chains": len(chained), "without_shots": without}
        if losses:
            router.report["loss"] = ends(losses)
        return router

    @classmethod
    def _taken_over(cls, model: Model, config: XLoraConfig) -> Self:
        taken = xlora_checkpoint.read(str(config.checkpoint), model.adapters, model.sites, model.width)
        settings = dataclasses.replace(config, normalise=False, steps=0, **taken.settings)
        router = cls(model.adapters, settings, taken.trunk, taken.heads)
        router.report = {"checkpoint": settings.checkpoint}
        return router

    def _train(self, model: Model, rows: Sequence[Chain], shown: States, seed: int) -> list[float]:
        """Trains trunk and heads where they are, by the policy they will run with."""
        device = shown.device
        trunk = [(nn.Parameter(w.to(device)), nn.Parameter(b.to(device))) for w, b in self.trunk]
        names = list(self.heads)
        w_LEH = nn.Parameter(torch.stack([self.heads[name][0] for name in names]).to(device))
        b_LE = nn.Parameter(torch.stack([self.heads[name][1] for name in names]).to(device))
        noise = torch.Generator(device).manual_seed(seed + model.part[0])

        def drop(x: Tensor) -> Tensor:
            keep = 1.0 - self.config.dropout
            return x * (torch.rand(x.shape, generator=noise, device=device) < keep) / keep

        def mixture(batch: Batch, numbers: Sequence[int]) -> Callable[[Group, Tensor], Tensor]:
            states_BTH, mask_BT = shown.padded(numbers, batch.mask_BT["input"])

            def net(h_BTH: Tensor) -> Tensor:
                return _classify(self._read(h_BTH), trunk, w_LEH, b_LE, drop)

            if not model.chains:
                plan = _pooled(net, states_BTH, mask_BT, self.config.frozen)
            elif self.config.frozen:  # the first scored position is the prompt's last token
                plan = Scores(net(_at(states_BTH, (batch.labels_BT != -100).int().argmax(1))))
            else:
                plan = Scores(net(states_BTH))
            gates = {group.name: self._gate(group).to(device) for group in model.groups}
            return lambda group, x_BTD: self.weights(gates[group.name](x_BTD, plan), group)

        parameters = [p for pair in trunk for p in pair] + [w_LEH, b_LE]
        if self.config.frozen:  # one decision cannot serve a chain
            rows = [chain for chain in rows if len(chain) == 1]
        losses = descend(model, parameters, rows, mixture, self.config, f"xlora {seed}")
        self.trunk = [(w.detach().cpu(), b.detach().cpu()) for w, b in trunk]
        self.heads = {name: (w_LEH.detach()[i].cpu(), b_LE.detach()[i].cpu()) for i, name in enumerate(names)}
        self._placed.clear()
        return losses

    # -- running

    def prepare(self, reader: Reader, inputs: Mapping[str, Any]) -> Scores:
        if reader.chains and not self.config.frozen:
            return Scores()
        states_BTH, mask_BT = reader.states(inputs)
        if not reader.chains:
            return _pooled(self._scores, states_BTH, mask_BT, self.config.frozen)
        last_B = (mask_BT * torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)).argmax(1)
        return Scores(self._scores(_at(states_BTH, last_B)))

    def step(self, states_BTH: Tensor, plan: Any) -> Scores:
        return Scores(self._scores(states_BTH), plan.target_BTLE if isinstance(plan, Scores) else None)

    def _scores(self, states_BTH: Tensor) -> Tensor:
        """[B, T, L, E], fp32. The classifier goes where the states are."""
        device = states_BTH.device
        if device not in self._placed:
            heads = list(self.heads.values())
            self._placed[device] = (
                [(w.to(device), b.to(device)) for w, b in self.trunk],
                torch.stack([w for w, _ in heads]).to(device),
                torch.stack([b for _, b in heads]).to(device),
            )
        return _classify(self._read(states_BTH), *self._placed[device])

    def _read(self, states_BTH: Tensor) -> Tensor:
        states_BTH = states_BTH.float()
        return nn.functional.layer_norm(states_BTH, states_BTH.shape[-1:]) if self.config.normalise else states_BTH

    def gate(self, group: Group) -> Gate:
        return self._gate(group)

    def _gate(self, group: Group, site: str | None = None) -> _Gate:
        names = {name: number for number, name in enumerate(self.heads)}
        if ALL in names:
            return _Gate(group.stream, None)
        own = [names.get(s, names.get(group.name)) for s in ([site] if site else group.sites)]
        if None in own:
            raise InputError(
                f"The classifier has no head for {group.name}.",
                "It was fitted for other adapters or for another base.",
                "Build it again for this zoo.",
                code="E_ROUTER",
            )
        numbers = [n for n in own if n is not None]
        return _Gate(group.stream, numbers if len(set(numbers)) > 1 else numbers[:1])

    def score(self, group: Group, site: str, x_BTD: Tensor, plan: Any = None) -> Tensor:
        return self._gate(group, site).to(x_BTD.device)(x_BTD, plan)[..., 0, :]

    # -- later changes, saving

    def without(self, name: str) -> Self:
        """A router without one adapter: its column is dropped."""
        keep = columns.rest(self, name)
        heads = {site: (w_EH[keep], b_E[keep]) for site, (w_EH, b_E) in self.heads.items()}
        router = type(self)([self.adapters[e] for e in keep], self.config, self.trunk, heads)
        router.facts, router.thresholds = dict(self.facts), dict(self.thresholds)
        return router

    def tensors(self) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for i, (w, b) in enumerate(self.trunk):
            stored |= {f"trunk.{i}.weight": w, f"trunk.{i}.bias": b}
        for name, (w_EH, b_E) in self.heads.items():
            stored |= {f"{name}.head": w_EH, f"{name}.offset": b_E}
        return stored

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        depth = sum(key.startswith("trunk.") and key.endswith(".weight") for key in tensors)
        self.trunk = [(tensors[f"trunk.{i}.weight"], tensors[f"trunk.{i}.bias"]) for i in range(depth)]
        names = sorted(key.removesuffix(".head") for key in tensors if key.endswith(".head"))
        self.heads = {name: (tensors[f"{name}.head"], tensors[f"{name}.offset"]) for name in names}
        self._placed.clear()
        wrong = [name for name, (w_EH, _) in self.heads.items() if w_EH.ndim != 2 or len(w_EH) != len(self.adapters)]
        if wrong or not self.heads:
            raise InputError(
                "The classifier does not give one score per adapter.", "", "Build the router again.", code="E_ROUTER"
            )


class _Gate(Gate):
    """Picks a group's scores out of the plan: [B, T or 1, S or 1, E], or [N, S or 1, E] of a model that flattens its tokens."""

    numbers_S: Tensor | None

    def __init__(self, stream: Stream, numbers: Sequence[int] | None) -> None:
        super().__init__()
        self.stream = stream
        self.register_buffer("numbers_S", None if numbers is None else torch.tensor(numbers), persistent=False)

    def forward(self, x_BTD: Tensor, plan: Any = None) -> Tensor:
        scores = None
        if isinstance(plan, Scores):
            scores = plan.input_BTLE if self.stream == "input" else plan.target_BTLE
        if scores is None:
            raise UsageError(
                "This router decides by the bare base's states, and was given none.", "", "Call the model, not its parts."
            )
        scores = scores.to(x_BTD.device)
        if self.numbers_S is not None:
            scores = scores.index_select(-2, self.numbers_S)
        if x_BTD.dim() == 2:
            scores = scores.flatten(0, 1)
        times = x_BTD.shape[0] // scores.shape[0]
        return scores if times == 1 else scores.repeat_interleave(times, 0)


def _classify(
    x_BTH: Tensor,
    trunk: Sequence[Linear],
    w_LEH: Tensor,
    b_LE: Tensor,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """[B, T, L, E]"""
    for w, b in trunk:
        x_BTH = nn.functional.linear(x_BTH, w, b).relu()
        x_BTH = x_BTH if drop is None else drop(x_BTH)
    return nn.functional.linear(x_BTH, w_LEH.flatten(0, 1), b_LE.flatten()).unflatten(-1, b_LE.shape)


def _at(states_BTH: Tensor, position_B: Tensor) -> Tensor:
    """One state of each row [B, 1, H]."""
    return states_BTH[torch.arange(len(position_B), device=position_B.device), position_B][:, None]


def _pooled(net: Callable[[Tensor], Tensor], states_BTH: Tensor, mask_BT: Tensor, frozen: bool) -> Scores:
    """The plan beside an encoder: its own tokens by their states, the decoder's by their mean; frozen, all by their mean."""
    mask_BT1 = mask_BT[..., None].to(states_BTH)
    mean_B1H = (states_BTH * mask_BT1).sum(1, keepdim=True) / mask_BT1.sum(1, keepdim=True).clamp(min=1)
    pooled = net(mean_B1H)
    return Scores(pooled if frozen else net(states_BTH), pooled)
