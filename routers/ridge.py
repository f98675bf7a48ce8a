"""Ridge: closed-form gates that tell tasks apart at every input, from K shots and forwards alone.

A gate only has to recognise, from the token's input at its site, whose task is being done; K shots hold thousands of tokens, so
least squares does it. With each adapter active on its own tasks' shots, collect x̂ = [LN(x), 1] over all real tokens of prompt
and completion, and accumulate G = Σ ω x̂ᵀx̂ and C = Σ ω x̂ᵀy with y the one-hot of the active adapter and ω a weight that
balances adapters; then W = (G + λI)⁻¹C, and the score is T·x̂W. Beside single shots, chains of several shots of different adapters in one context are used, each token labelled
(and adapted) by its own segment: that is what a conversation that changes subject looks like.

Every adapter has a column at every site, also where it holds no factors: a token that chooses it there gets no update, instead
of a stranger's.

G and C are sums over tokens. They are kept beside the router, so that an adapter can be added (`extended`) or taken out
(`without`) later without the others' shots.

This project's own method.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from recycler.routers.linear import LinearRouter, Rows
from recycler.routers.protocol import Group, Model, Profile, own_shots
from recycler.routers.select import Policy
from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

# How many tokens of one adapter weigh 1 each in G and C. With n tokens each weighs √(this / n), half-way between counting tokens
# (an adapter with long or many shots wins the tokens that nobody is sure of: one with two tasks among eleven with one cost 0.09
# held-in exact match) and counting adapters (long outputs are then learned too little: 0.02).
_TOKENS = 1600.0

# A row of the fit: chained (adapter number, shot) segments.
Chain = list[tuple[int, Any]]


@dataclass(frozen=True)
class RidgeConfig(Policy):
    """
    Attributes:
        ridge: λ, added to the diagonal of G; inputs are normalised, so it is in units of tokens.
        sharpness: T, what predicted one-hots in [0, 1] are multiplied by before the softmax.
        chains: how many chained contexts to fit on, beside the single shots; half as many as single shots when None.
        chain_length: shots in one chain.
        inputs: "block": one decision per block, taken at the input of its first linears and kept for the rest (q, k, v → o;
            gate, up → down). "all": one at every distinct input. Measured on twelve adapters, "block" answers about as well, in half the
            time to fit and with a fifth of the statistics.
        tokens: padded tokens in one forward; the dial for memory.
    """

    ridge: float = 30.0
    sharpness: float = 10.0
    chains: int | None = None
    chain_length: int = 3
    inputs: Literal["block", "all"] = "block"
    tokens: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, why in (
            ("ridge", "It is what makes the equations solvable."),
            ("sharpness", "Scores are multiplied by it."),
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)}.", why, "Use a positive, finite number.")
        for name, least in (("chains", 0), ("chain_length", 1), ("tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name}={value}.", "It is a count.", f"Use {name}={least} or more.")


class Ridge(LinearRouter):
    """score = T · [LN(x), 1] W, one W per distinct input: q, k and v of a layer share it."""

    Config = RidgeConfig
    needs = frozenset({"shots", "scores"})
    paper = "this project: closed-form gates from K shots"
    normalise = True

    def __init__(self, adapters: Sequence[str], config: Any, rows: Mapping[str, Rows] | None = None) -> None:
        super().__init__(adapters, config, rows)
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}

    @classmethod
    def fit(cls, model: Model, profile: Profile, config: RidgeConfig) -> Self:
        singles = [[row] for row in own_shots(model, profile)]
        chains = _chains(singles, config, profile.seed) if model.chains else []
        router = cls(model.adapters, config)
        router.sums = _observe(model, singles + chains, len(model.adapters), config)
        router._solve()
        without = [name for name in model.adapters if not profile.own.get(name)]
        router.report = {"rows": len(singles), "chains": len(chains), "without_shots": without}
        return router

    # -- updates

    def without(self, name: str) -> Self:
        """A router without one adapter: its column is dropped, and its tokens stay as examples of none of the others."""
        self._need_sums()
        if name not in self.adapters:
            raise UsageError(f"This router has no adapter {name}.", "", f"It has {', '.join(self.adapters)}.")
        keep = [e for e, other in enumerate(self.adapters) if other != name]
        router = type(self)([self.adapters[e] for e in keep], self.config)
        router.sums = {site: (g, c[:, keep]) for site, (g, c) in self.sums.items()}
        router.facts = dict(self.facts)
        router._solve()
        return router

    def extended(self, model: Model, profile: Profile, name: str) -> Self:
        """A router with one adapter more, from that adapter's own shots alone. `model` holds this router's adapters and,
        as its last one, the new one."""
        self._need_sums()
        if model.adapters != (*self.adapters, name):
            raise UsageError(
                f"The model's adapters are {', '.join(model.adapters)}.",
                "They must be this router's, in order, and the new one last.",
                "",
            )
        new = len(self.adapters)
        rows: list[Chain] = [[(new, shot)] for task in profile.own.get(name, ()) for shot in profile.shots[task]]
        added = _observe(model, rows, new + 1, self.config)
        router = type(self)(model.adapters, self.config)
        router.sums = {
            site: (g + added[site][0], torch.nn.functional.pad(c, (0, 1)) + added[site][1])
            for site, (g, c) in self.sums.items()
        }
        router.facts = dict(self.facts)
        router._solve()
        return router

    def _need_sums(self) -> None:
        if not self.sums:
            raise UsageError(
                "This router came without its statistics.",
                "They are kept where it was built, not in composed models.",
                "",
            )

    def _solve(self) -> None:
        for site, (g, c) in self.sums.items():
            g = g.double()
            g.diagonal().add_(self.config.ridge)
            w = torch.cholesky_solve(c.double(), torch.linalg.cholesky(g)).float() * self.config.sharpness
            self.rows[site] = Rows(w[:-1].T.contiguous(), w[-1].contiguous())

    def statistics(self) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for site, (g, c) in self.sums.items():
            index = torch.tril_indices(*g.shape, device=g.device)
            stored |= {f"{site}.gram": g[index[0], index[1]], f"{site}.cross": c}
        return stored

    def load_statistics(self, tensors: Mapping[str, Tensor]) -> None:
        for key in tensors:
            if key.endswith(".gram"):
                site, c = key.removesuffix(".gram"), tensors[key.removesuffix(".gram") + ".cross"]
                g = c.new_zeros(len(c), len(c))
                index = torch.tril_indices(*g.shape)
                g[index[0], index[1]] = tensors[key]
                self.sums[site] = (g + g.tril(-1).T, c)


def _chains(singles: Sequence[Chain], config: RidgeConfig, seed: int) -> list[Chain]:
    """Contexts of several shots of different adapters, every shot used about equally often."""
    rng = random.Random(f"ridge {seed}")
    wanted = len(singles) // 2 if config.chains is None else config.chains
    if len({chain[0][0] for chain in singles}) < config.chain_length or config.chain_length < 2:
        return []
    chains: list[Chain] = []
    pool: list[tuple[int, Any]] = []
    while len(chains) < wanted:
        chain: Chain = []
        while len(chain) < config.chain_length:
            if not pool:
                pool = [single[0] for single in singles]
                rng.shuffle(pool)
            taken = {e for e, _ in chain}
            position = next((i for i, (e, _) in enumerate(pool) if e not in taken), None)
            if position is None:  # only adapters that are in the chain are left
                pool = []
                continue
            chain.append(pool.pop(position))
        chains.append(chain)
    return chains


def _observe(model: Model, rows: Sequence[Chain], count: int, config: RidgeConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of each group that decides → (G [D+1, D+1], C [D+1, E]) over all real tokens, in fp32."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    shots = [[shot for _, shot in chain] for chain in rows]
    batches = list(model.batches(shots, config.tokens))
    encoded = []
    for numbers in batches:
        batch = model.encode([shots[i] for i in numbers])
        adapters = [[e for e, _ in rows[i]] for i in numbers]
        labels = {stream: _labels(adapters, segment_BT) for stream, segment_BT in batch.segment_BT.items()}
        encoded.append((batch, labels))
    weight_E = _balance(encoded, count)
    step = model.progress(len(encoded), "activations")
    for batch, labels in encoded:
        model.observe(batch, _tap(labels, batch.mask_BT, weight_E, sums, count, config.inputs == "all"))
        step()
    return {site: (g.cpu(), c.cpu()) for site, (g, c) in sums.items()}


def _labels(adapters: Sequence[Sequence[int]], segment_BT: Tensor) -> Tensor:
    """[B, T]: the adapter of each token's segment; padding gets that of the first."""
    width = max(map(len, adapters))
    table = torch.tensor([[*row, *[row[0]] * (width - len(row))] for row in adapters], device=segment_BT.device)
    return table.gather(1, segment_BT.clamp(min=0))


def _balance(encoded: Sequence[tuple[Any, Mapping[Any, Tensor]]], count: int) -> dict[Any, Tensor]:
    """Stream → the weight [E] of one token of each adapter. It depends on that adapter's tokens alone, so that sums add up."""
    tokens: dict[Any, Tensor] = {}
    for batch, labels in encoded:
        for stream, mask_BT in batch.mask_BT.items():
            found_E = torch.bincount(labels[stream][mask_BT], minlength=count)
            tokens[stream] = tokens[stream] + found_E if stream in tokens else found_E
    return {stream: (_TOKENS / found_E.clamp(min=1)).sqrt() for stream, found_E in tokens.items()}


def _tap(
    labels: Mapping[Any, Tensor],
    masks: Mapping[Any, Tensor],
    weight_E: Mapping[Any, Tensor],
    sums: dict[str, Any],
    count: int,
    everywhere: bool,
) -> Callable[..., Tensor]:
    """A mixture that gives each token its own adapter, and looks at the inputs on the way."""

    def weights(group: Group, x_BTD: Tensor) -> Tensor:
        y_BTE = torch.nn.functional.one_hot(labels[group.stream], count).float()
        if group.after is not None and not everywhere:
            return y_BTE[:, :, None]
        mask = masks[group.stream]
        x_ND = torch.nn.functional.layer_norm(x_BTD[mask].float(), (group.width,))
        x_ND = torch.nn.functional.pad(x_ND, (0, 1), value=1.0)
        weighted_ND = x_ND * weight_E[group.stream][labels[group.stream][mask]][:, None]
        g, c = weighted_ND.T @ x_ND, weighted_ND.T @ y_BTE[mask]
        if group.name in sums:
            sums[group.name][0].add_(g)
            sums[group.name][1].add_(c)
        else:
            sums[group.name] = (g, c)
        return y_BTE[:, :, None]

    return weights
