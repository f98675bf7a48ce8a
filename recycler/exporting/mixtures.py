"""Which mixture is exported, and its updates: exact sums of the adapters' own (`recycler.routers.merging`).

Dimensions in names: E adapter, N prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recycler import text
from recycler.engine.sites import linear_shapes, weight_OD
from recycler.routers.merging import Loss, Part, Update, Weight, cut, linear, update_of
from recycler.routers.sequence import Decision
from recycler.routers.static import StaticRouter
from recycler.scoring import Progress, silent
from recycler.zoo import formats, lowrank
from recycler.zoo.errors import UsageError, choices, counted, shorten
from recycler.zoo.match import place

if TYPE_CHECKING:
    from recycler.routed import RoutedModel
    from recycler.shots import Shot
    from recycler.zoo.adapter import Factors


@dataclass(frozen=True)
class Mixture:
    """One mixture for everything.

    Attributes:
        weights: adapter → weight, those of weight 0 left out. how: where it comes from, for people.
        own: it is what the router itself does, so that nothing of the routing is lost.
    """

    weights: Mapping[str, float]
    how: str
    own: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"weights": dict(self.weights), "how": self.how}

    def line(self) -> str:
        shown = sorted(self.weights.items(), key=lambda pair: -abs(pair[1]))
        return f"{shorten([f'{name} {weight:.3g}' for name, weight in shown], 8)} ({self.how})"


def choose(
    model: RoutedModel, given: Mapping[str, float] | None, mean_of: Sequence[Shot] | None, progress: Progress = silent
) -> Mixture:
    """The mixture to export: the one that is given, the mean over prompts, or that of a router which has only one.

    Raises:
        UsageError: the router decides by the input, and nothing says which mixture; or what is said is none.
    """
    if given is not None and mean_of is not None:
        raise UsageError("--mixture and --mean-of exclude each other.", "Each says which mixture is exported.", "Give one.")
    if given is not None:
        unknown = sorted(set(given) - set(model.names))
        if unknown:
            raise UsageError(
                f"There is no adapter {', '.join(unknown)} in this model.",
                "",
                f"Choose {choices(model.names, unknown[0])}.",
                code="E_UNKNOWN",
            )
        if not all(isinstance(weight, (int, float)) and math.isfinite(weight) for weight in given.values()):
            raise UsageError("A mixture's weights are finite numbers.", "", "Write math=0.5,law=0.5", code="E_OPTION")
        return _of(torch.tensor([float(given.get(name, 0.0)) for name in model.names]), model, "given")
    if mean_of is not None:
        how = f"the router's mean share on {counted(len(mean_of), 'prompt')}"
        step = progress(len(mean_of), "what prompts are given")
        return _of(shares(model, mean_of, step).mean(0), model, how)
    if isinstance(model.router, StaticRouter):
        return replace(_of(model.router.weights_E, model, f"the router's own: {model.router.method()}"), own=True)
    raise UsageError(
        "This model has no router." if model.router is None else f"{model.router.method()} decides by the input.",
        "What is exported is one mixture for everything.",
        "Say which: --mixture math=0.5,law=0.5, or --mean-of prompts.jsonl for the router's mean share on those prompts.",
    )


def _of(weights_E: Tensor, model: RoutedModel, how: str) -> Mixture:
    weights = {name: float(f"{w:.6g}") for name, w in zip(model.names, weights_E.tolist(), strict=True) if abs(w) >= 1e-6}
    if not weights:
        raise UsageError(
            "Every weight of this mixture is 0.", "That is the bare base.", "Give one adapter another weight.", code="E_OPTION"
        )
    return Mixture(weights, how)


@torch.no_grad()
def share(model: RoutedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a prompt (one row) is given: the router's own decision for it, or each adapter's mean weight over sites and tokens. [E],
    on the CPU; what is missing to 1 is the base's."""
    with model.planned(inputs) as plan:
        if isinstance(plan, Decision):
            return plan.weights_BE[0].float().cpu()
        if not model.source.encoder_decoder:
            inputs = text.causal_inputs(model.source, inputs["input_ids"], inputs["attention_mask"].bool())
        return model.weights_for(dict(inputs)).share()[0].float().cpu()


def shares(model: RoutedModel, shots: Sequence[Shot], step: Callable[..., None] = lambda: None) -> Tensor:
    """What each prompt is given, [N, E], on the CPU."""
    rows = []
    for shot in shots:
        rows.append(share(model, text.prompts(model.source, [[shot]])))
        step()
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------------------------------- updates


def read_factors(model: RoutedModel, names: Iterable[str]) -> dict[str, Mapping[str, Factors]]:
    """Adapter → site → factors, as their files have them.

    Raises:
        UsageError: an adapter of this model has no files. Errors of reading as `formats.read` raises them.
    """
    shapes = linear_shapes(model.base)
    found: dict[str, Mapping[str, Factors]] = {}
    for name in names:
        own = {site: held[name] for site, held in model.factors.items() if name in held}
        if not own and name not in model.folders:
            raise UsageError(
                f"The files of {name} are not known.", "", "Save the model, and export the folder.", code="E_USAGE"
            )
        found[name] = own or place(formats.read(model.folders[name], name)[0], shapes)
    return found


def beside_factors(model: RoutedModel) -> dict[str, list[str]]:
    """Which adapters have more than factors: "magnitude" (DoRA) and "bias" (of B). They are read one by one, so that a large zoo fits."""
    found: dict[str, list[str]] = {"magnitude": [], "bias": []}
    for name in model.names:
        held = read_factors(model, [name])[name].values()
        if any(one.magnitude_O is not None for one in held):
            found["magnitude"].append(name)
        if any(one.bias_O is not None for one in held):
            found["bias"].append(name)
    return found


def base_weight(model: RoutedModel, site: str) -> Tensor:
    """W [O, D] of a linear, fp32, on the CPU."""
    return weight_OD(model.base.get_submodule(site)).cpu()


def updates(
    model: RoutedModel,
    weights: Mapping[str, float],
    shape: Callable[[Update, Weight], tuple[Update, float]],
    factors: Mapping[str, Mapping[str, Factors]] | None = None,
    step: Callable[..., None] = lambda: None,
) -> tuple[dict[str, Update], Loss]:
    """A mixture's update at every linear that it touches, exact, and then as `shape` makes it.

    Args:
        shape: (update, what gives W) → (the update to keep, ‖what that loses‖_F). factors: read from disk where None.
    """
    factors = read_factors(model, weights) if factors is None else factors
    made: dict[str, Update] = {}
    loss = Loss()
    for site in [site for site in model.sites if any(site in factors[name] for name in weights)]:
        weight = cache(partial(base_weight, model, site))
        parts = [Part(n, w, update_of(factors[n][site], weight)) for n, w in weights.items() if site in factors[n]]
        whole = linear(parts)
        made[site], lost = shape(whole, weight)
        loss.add(site, lost, whole.norm(weight), made[site].a_RD.shape[0])
        step()
    return made, loss


def shorter(rank: int | None) -> Callable[[Update, Weight], tuple[Update, float]]:
    """Keeps S and b, and cuts B A to a rank. Without one all of it is kept, in factors that are no larger than B A itself: the ranks of
    many adapters add up to more than a linear can have."""

    def shape(update: Update, weight: Weight) -> tuple[Update, float]:
        full = min(update.a_RD.shape[1], update.b_OR.shape[0])
        return (update, 0.0) if rank is None and update.a_RD.shape[0] <= full else cut(update, rank, None)

    return shape


def plain(rank: int | None) -> Callable[[Update, Weight], tuple[Update, float]]:
    """As a plain LoRA: what scales the base's output (DoRA) becomes part of a dense ΔW, whose SVD is cut to a rank; b stays. Without a
    rank nothing but rounding is lost, at up to the full rank."""

    def shape(update: Update, weight: Weight) -> tuple[Update, float]:
        if update.scale_O is None:
            return shorter(rank)(update, weight)
        dense_OD = update.dense(weight)
        found = lowrank.factorise(dense_OD, rank)
        if found is None:
            o, d = dense_OD.shape
            return Update(torch.zeros(1, d), torch.zeros(o, 1), None, update.bias_O), 0.0
        lost = found.error if rank is not None else 0.0
        return Update(found.a_RD, found.b_OR, None, update.bias_O), lost * float(torch.linalg.matrix_norm(dense_OD))

    return shape
