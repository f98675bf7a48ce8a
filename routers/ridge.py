"""Ridge: closed-form gates that tell tasks apart at every input, from K shots and forwards alone.

A gate only has to recognise, from the token's input at its site, whose task is being done; K shots hold thousands of tokens, so
least squares does it. With each adapter active on its own tasks' shots, collect x̂ = [LN(x), 1] over all real tokens of prompt
and completion, and accumulate G = Σ ω x̂ᵀx̂ and C = Σ ω x̂ᵀy with y the one-hot of the active adapter and ω a weight that
balances adapters; then W = (G + λI)⁻¹C, and the score is T·x̂W. Beside single shots, chains of several shots of different
adapters in one context are used, each token labelled (and adapted) by its own segment: that is what a conversation that changes
subject looks like.

λ can be each site's own (``-o ridge=none``). The shots are dealt into parts, chains join shots of one part only, and the sums are
kept for each part: the error of a W that was solved without a part follows from that part's sums alone
(`recycler.routers.ridge_equations`). That takes an eigendecomposition for every site and part, seconds at a width of 576 and hours
at 4096, and finds what one λ of 200 does about as well; so that is the default.

Measured on twelve adapters, 16 shots a task, four times fitted on 12 and scored on the other 4 (192 rows; mean NLL / share of
answers right when the reference is read along), the same rows reworded, and after two examples of other tasks (switch):

                                     held-in        reworded       switch
    own adapter                    0.481 / 0.734  0.760 / 0.604  0.602 / 0.609
    λ = 30, T = 10                 0.629 / 0.651  1.290 / 0.391  0.775 / -
    λ of each site, T = 10         0.612 / 0.641  1.230 / 0.453  0.748 / 0.531
    the same in two rounds         0.581 / 0.641  1.488 / 0.479  0.687 / 0.583

With answers generated, λ of each site took reworded rows from 0.396 to 0.458, switched ones from 0.552 to 0.562, and held-in ones
from 0.682 to 0.661. Sites choose λ of 30 to 1000; 200 or 1000 everywhere gave about the same NLL. T of each site (6 to 30) made
held-in rows worse (0.651) and switched ones too (by 0.06 on half of them), so that it is 10 unless asked for. A second round helps
where the subject changes (10 of 192 answers gained, none lost), costs as much again as the first, and on prompts worded unlike
any shot is wrong more confidently. The scored rows had a say in the choice of λ, and in the mixtures of the second round; the gates
were solved without them.

Every adapter has a column at every site, also where it holds no factors: a token that chooses it there gets no update, instead
of a stranger's.

G and C are sums over tokens. They are kept beside the router, with each site's λ and T, so that an adapter can be added
(`extended`) or taken out (`without`) later without the others' shots. The sums of each part would be several times as much, and
are dropped: an update keeps the λ that was found.

An adapter learns from the shots of its own tasks, and which those are can be said by hand: ``--assign
plural=plural,third_person`` gives the adapter `plural` the shots of a task that nobody was trained for too, and its tokens then
choose that adapter.

This project's own method.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from recycler.routers.chains import Chain, chains, few, labels
from recycler.routers.columns import require_next, rest
from recycler.routers.linear import LinearRouter, Rows
from recycler.routers.protocol import Batch, Few, Group, Model, Profile, Rowwise, Weights, own_shots
from recycler.routers.ridge_equations import Sums, left_out, solve, solve_without, total
from recycler.routers.select import Policy
from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

# How many tokens of one adapter weigh 1 each in G and C. With n tokens each weighs √(this / n), half-way between counting tokens
# (an adapter with long or many shots wins the tokens that nobody is sure of: one with two tasks among eleven with one cost 0.09
# held-in exact match) and counting adapters (long outputs are then learned too little: 0.02).
_TOKENS = 1600.0
# λ and T where no shot can be left out, because there is one of each adapter; and what T is chosen from.
_RIDGE, _SHARPNESS = 100.0, 10.0
_SHARPNESSES = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0)

Encoded = tuple[Batch, dict[Any, Tensor], Few]  # a batch, per stream the adapter of each token [B, T], and who is in its rows


@dataclass(frozen=True)
class RidgeConfig(Policy):
    """
    Attributes:
        ridge: λ, added to the diagonal of G; inputs are normalised, so it is in units of tokens. None: at each site the one with
            the least squared error on shots that were left out, at the cost of an eigendecomposition for each.
        sharpness: T, what predicted one-hots in [0, 1] are multiplied by before the softmax. None: at each site the one with the
            least cross-entropy on shots that were left out, for one pass more over the single shots.
        folds: in how many parts shots are left out. Each costs one eigendecomposition a site: 0.04 s at width 576, growing with the
            cube of it. For a wide base, ridge=300 spares them.
        rounds: passes over the rows. In the first each token has its own adapter in all layers below, which is more than a gate can
            count on; in every later one, the mixture that the gates of the round before give it, solved without its part. Two are
            better for contexts that change subject, and take twice the time.
        chains: how many chained contexts to fit on, beside the single shots; half as many as single shots when None.
        chain_length: shots in one chain.
        inputs: "block": one decision per block, taken at the input of its first linears and kept for the rest (q, k, v → o;
            gate, up → down). "all": one at every distinct input. Measured on twelve adapters, "block" answers about as well, in
            half the time to fit and with a fifth of the statistics.
        tokens: padded tokens in one forward; the dial for memory.
    """

    ridge: float | None = 200.0
    sharpness: float | None = 10.0
    folds: int = 4
    rounds: int = 1
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
            number = getattr(self, name)
            if number is not None and not 0 < number < math.inf:
                raise UsageError(
                    f"{name}={number}.",
                    why,
                    f"Use a positive, finite number, or {name}=none to have it found.",
                    code="E_OPTION",
                )
        for name, least in (("folds", 2), ("rounds", 1), ("chains", 0), ("chain_length", 1), ("tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name}={value}.", "It is a count.", f"Use {name}={least} or more.", code="E_OPTION")


class Ridge(LinearRouter):
    """score = T · [LN(x), 1] W, one W per distinct input: q, k and v of a layer share it."""

    Config = RidgeConfig
    needs = frozenset({"shots", "scores"})
    paper = "this project: closed-form gates from K shots"
    normalise = True

    def __init__(self, adapters: Sequence[str], config: Any, rows: Mapping[str, Rows] | None = None) -> None:
        super().__init__(adapters, config, rows)
        self.sums: dict[str, Sums] = {}
        self.dials: dict[str, tuple[float, float]] = {}  # (λ, T) of each site

    @classmethod
    def fit(cls, model: Model, profile: Profile, config: RidgeConfig) -> Self:
        shots = own_shots(model, profile)
        parts_F = _parts(shots, config)
        chained_F = _chained(parts_F, config, profile.seed) if model.chains else [[] for _ in parts_F]
        rows_F = [part + more for part, more in zip(parts_F, chained_F, strict=True)]
        router = cls(model.adapters, config)
        sums_F = _rounds(model, rows_F, len(model.adapters), config)
        router.sums = total(sums_F)
        router._find_dials(model, parts_F, sums_F)
        router._solve()
        without = [name for name in model.adapters if not profile.own.get(name)]
        router.report = {"rows": len(shots), "chains": sum(map(len, chained_F)), "without_shots": without}
        for number, name in enumerate(("ridge", "sharpness")):
            found = [dials[number] for dials in router.dials.values()]
            router.report[name] = statistics.median(found) if found else None
        return router

    def _find_dials(self, model: Model, parts_F: Sequence[Sequence[Chain]], sums_F: Sequence[Mapping[str, Sums]]) -> None:
        config = self.config
        self.dials = {site: (config.ridge or _RIDGE, config.sharpness or _SHARPNESS) for site in self.sums}
        if len(parts_F) == 1 or None not in (config.ridge, config.sharpness):
            return
        found = {site: left_out([sums[site] for sums in sums_F], config.ridge) for site in self.sums}
        self.dials = {site: (ridge, self.dials[site][1]) for site, (ridge, _) in found.items()}
        if config.sharpness is None:
            gates_F = [{site: w_F[f] for site, (_, w_F) in found.items()} for f in range(len(parts_F))]
            sharpness = _sharpness(model, parts_F, gates_F, len(self.adapters), config)
            self.dials = {site: (ridge, sharpness[site]) for site, (ridge, _) in self.dials.items()}

    # -- updates

    def without(self, name: str) -> Self:
        """A router without one adapter: its column is dropped, and its tokens stay as examples of none of the others."""
        self._need_sums()
        keep = rest(self, name)
        router = type(self)([self.adapters[e] for e in keep], self.config)
        router.sums = {site: (g, c[:, keep]) for site, (g, c) in self.sums.items()}
        router.facts, router.dials = dict(self.facts), dict(self.dials)
        router._solve()
        return router

    def extended(self, model: Model, profile: Profile, name: str) -> Self:
        """A router with one adapter more, from that adapter's own shots alone. `model` holds this router's adapters and,
        as its last one, the new one.

        Raises:
            UsageError: there are no statistics, no shots of the new adapter, or it brings sites where nobody decided before.
        """
        self._need_sums()
        require_next(self, model, name)
        if not any(profile.shots[task] for task in profile.own.get(name, ())):
            raise UsageError(
                f"The profile holds no shots of {name}.",
                "Its gates are learned from those of its own tasks.",
                f"Say which tasks are its own: --assign {name}=TASK",
            )
        if sorted(_deciding(model, self.config)) != sorted(self.sums):
            raise UsageError(
                f"{name} touches sites where this router decides nothing.",
                "What the others' tokens look like there was never collected.",
                "Build the router again.",
                code="E_FIXED",
            )
        new = len(self.adapters)
        parts_F = _parts([(new, shot) for task in profile.own.get(name, ()) for shot in profile.shots[task]], self.config)
        known = {site: (g, torch.nn.functional.pad(c, (0, 1))) for site, (g, c) in self.sums.items()}
        router = type(self)(model.adapters, self.config)
        router.sums = total([known, *_rounds(model, parts_F, new + 1, self.config, known)])
        router.facts, router.dials = dict(self.facts), dict(self.dials)
        router._solve()
        return router

    def _need_sums(self) -> None:
        if not self.sums:
            raise UsageError(
                "This router came without its statistics.",
                "They are kept where it was built, not in composed models.",
                "",
                code="E_FIXED",
            )

    def _solve(self) -> None:
        for site, (g, c) in self.sums.items():
            ridge, sharpness = self.dials[site]
            w = solve((g, c), ridge) * sharpness
            self.rows[site] = Rows(w[:-1].T.contiguous(), w[-1].contiguous())

    def statistics(self) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for site, (g, c) in self.sums.items():
            index = torch.tril_indices(*g.shape, device=g.device)
            dials = torch.tensor(self.dials[site], dtype=torch.float64)
            stored |= {f"{site}.gram": g[index[0], index[1]], f"{site}.cross": c, f"{site}.dials": dials}
        return stored

    def load_statistics(self, tensors: Mapping[str, Tensor]) -> None:
        for key in tensors:
            if key.endswith(".gram"):
                site = key.removesuffix(".gram")
                c = tensors[f"{site}.cross"]
                g = c.new_zeros(len(c), len(c))
                index = torch.tril_indices(*g.shape)
                g[index[0], index[1]] = tensors[key]
                self.sums[site] = (g + g.tril(-1).T, c)
                ridge, sharpness = tensors[f"{site}.dials"].tolist()
                self.dials[site] = (ridge, sharpness)


# -- rows


def _parts(shots: Sequence[tuple[int, Any]], config: RidgeConfig) -> list[list[Chain]]:
    """Single shots, in the parts that are left out in turn: each holds about as many of every adapter. One part where there is
    nothing to find, or no adapter has a second shot."""
    shots_E = Counter(e for e, _ in shots)
    to_find = config.rounds > 1 or None in (config.ridge, config.sharpness)
    count = min(config.folds, max(shots_E.values())) if to_find and shots else 1
    parts_F: list[list[Chain]] = [[] for _ in range(count)]
    seen_E: Counter[int] = Counter()
    place: dict[Any, int] = {}  # a shot of two adapters is left out for both at once
    for e, shot in shots:
        parts_F[place.setdefault(shot, seen_E[e] % count)].append([(e, shot)])
        seen_E[e] += 1
    return parts_F


def _chained(parts_F: Sequence[Sequence[Chain]], config: RidgeConfig, seed: int) -> list[list[Chain]]:
    """Chains of the shots of each part."""
    count, total = len(parts_F), config.chains
    wanted_F = [None if total is None else total * (f + 1) // count - total * f // count for f in range(count)]
    return [chains(part, wanted, config.chain_length, seed) for part, wanted in zip(parts_F, wanted_F, strict=True)]


# -- passes


def _deciding(model: Model, config: RidgeConfig) -> list[str]:
    """The names of the groups that have a gate of their own."""
    return [group.name for group in model.groups if group.after is None or config.inputs == "all"]


def _rounds(
    model: Model,
    rows_F: Sequence[Sequence[Chain]],
    count: int,
    config: RidgeConfig,
    known: Mapping[str, Sums] | None = None,
) -> list[dict[str, Sums]]:
    """Per part, the sums over all its real tokens at each group that decides, in fp32, as the last round saw them.

    Args:
        known: sums of other rows, which gates are solved from too.
    """
    encoded_F = [_encoded(model, rows, config) for rows in rows_F]
    sums_F = _observe(model, encoded_F, count, config, None)
    for _ in range(config.rounds - 1 if len(rows_F) > 1 else 0):
        gates_F: list[dict[str, Tensor]] = [{} for _ in rows_F]
        for site in sums_F[0]:
            found = [sums[site] for sums in sums_F]
            for gates, w_DE in zip(gates_F, solve_without(found, config.ridge or _RIDGE, (known or {}).get(site)), strict=True):
                gates[site] = w_DE
        sums_F = _observe(model, encoded_F, count, config, gates_F)
    return sums_F


def _observe(
    model: Model,
    encoded_F: Sequence[Sequence[Encoded]],
    count: int,
    config: RidgeConfig,
    gates_F: Sequence[Mapping[str, Tensor]] | None,
) -> list[dict[str, Sums]]:
    """One pass over all parts.

    Args:
        gates_F: for each part, what decides while it is looked at: W [D+1, E] of each site; None for each token's own adapter.
    """
    weight_E = _balance([one for encoded in encoded_F for one in encoded], count)
    step = model.progress(sum(map(len, encoded_F)), "activations")
    sums_F = []
    for f, encoded in enumerate(encoded_F):
        sums: dict[str, Sums] = {}

        def add(group: Group, x_ND: Tensor, label_N: Tensor, sums: dict[str, Sums] = sums) -> None:
            weighted_ND = x_ND * weight_E[group.stream][label_N][:, None]
            g, c = weighted_ND.T @ x_ND, weighted_ND.T @ _one_hot(label_N, count)
            if group.name in sums:
                sums[group.name][0].add_(g)
                sums[group.name][1].add_(c)
            else:
                sums[group.name] = (g, c)

        for one in encoded:
            model.observe(one[0], _tap(one, count, config, add, None if gates_F is None else gates_F[f]))
            step()
        sums_F.append({site: (g.cpu(), c.cpu()) for site, (g, c) in sums.items()})
    return sums_F


def _sharpness(
    model: Model,
    parts_F: Sequence[Sequence[Chain]],
    gates_F: Sequence[Mapping[str, Tensor]],
    count: int,
    config: RidgeConfig,
) -> dict[str, float]:
    """T of each site: the least cross-entropy of single shots' tokens, each part's under gates that have not seen it."""
    encoded_F = [_encoded(model, part, config) for part in parts_F]
    weight_E = _balance([one for encoded in encoded_F for one in encoded], count)
    step = model.progress(sum(map(len, encoded_F)), "sharpness")
    loss_L: dict[str, Tensor] = {}
    for encoded, gates in zip(encoded_F, gates_F, strict=True):

        def add(group: Group, x_ND: Tensor, label_N: Tensor, gates: Mapping[str, Tensor] = gates) -> None:
            score_NE = x_ND @ gates[group.name].to(x_ND.device)
            weight_N = weight_E[group.stream][label_N]
            losses = [
                torch.nn.functional.cross_entropy(score_NE * number, label_N, reduction="none") @ weight_N
                for number in _SHARPNESSES
            ]
            loss_L[group.name] = loss_L.get(group.name, 0.0) + torch.stack(losses)

        for one in encoded:
            model.observe(one[0], _tap(one, count, config, add, gates if config.rounds > 1 else None))
            step()
    return {site: _SHARPNESSES[int(loss.argmin())] for site, loss in loss_L.items()}


def _encoded(model: Model, rows: Sequence[Chain], config: RidgeConfig) -> list[Encoded]:
    shots = [[shot for _, shot in chain] for chain in rows]
    encoded: list[Encoded] = []
    for numbers in model.batches(shots, config.tokens):
        batch, told = model.encode([shots[i] for i in numbers]), [rows[i] for i in numbers]
        encoded.append(
            (batch, {stream: labels(told, segment_BT) for stream, segment_BT in batch.segment_BT.items()}, few(told))
        )
    return encoded


def _balance(encoded: Sequence[Encoded], count: int) -> dict[Any, Tensor]:
    """Stream → the weight [E] of one token of each adapter. It depends on that adapter's tokens alone, so that sums add up."""
    tokens: dict[Any, Tensor] = {}
    for batch, label_BT, _ in encoded:
        for stream, mask_BT in batch.mask_BT.items():
            found_E = torch.bincount(label_BT[stream][mask_BT], minlength=count)
            tokens[stream] = tokens[stream] + found_E if stream in tokens else found_E
    return {stream: (_TOKENS / found_E.clamp(min=1)).sqrt() for stream, found_E in tokens.items()}


def _tap(
    encoded: Encoded,
    count: int,
    config: RidgeConfig,
    see: Callable[[Group, Tensor, Tensor], None],
    gates: Mapping[str, Tensor] | None,
) -> Weights:
    """A mixture that shows the inputs of gates on the way: x̂ [N, D+1] of the real tokens, and their adapters [N].

    Args:
        gates: what decides; None gives each token its own adapter.
    """
    batch, label_BT, known = encoded
    sharpness = config.sharpness or _SHARPNESS
    decided: dict[str, Tensor] = {}

    def weights(group: Group, x_BTD: Tensor) -> Tensor:
        if group.after is not None and config.inputs == "block":
            return decided[group.after]
        label, mask = label_BT[group.stream], batch.mask_BT[group.stream]
        x_BTD = torch.nn.functional.layer_norm(x_BTD.float(), (group.width,))
        x_BTD = torch.nn.functional.pad(x_BTD, (0, 1), value=1.0)
        see(group, x_BTD[mask], label[mask])
        if gates is None:
            w_BTE = _one_hot(label, count)
        else:
            w_BTE = config.weights(x_BTD @ gates[group.name].to(x_BTD.device) * sharpness, group)
        decided[group.name] = w_BTE[:, :, None]
        return decided[group.name]

    return weights if gates is not None else Rowwise(weights, known)


def _one_hot(label: Tensor, count: int) -> Tensor:
    return torch.nn.functional.one_hot(label, count).float()
