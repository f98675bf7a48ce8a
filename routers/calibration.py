"""The null policy's threshold, found on the shots: what do scores look like where the right adapter is missing?

A token of a task that nobody here was trained for cannot be had, but one of math in a zoo without math can. The shots of every
adapter's own tasks are run with that adapter out of the choice (its score −∞), the others routed as plain top-k would; a token's
highest score is then what a stranger's would be. The threshold of a group is the `quantile` of these, each adapter's taken apart and
averaged, so that long shots do not count more than short ones.

The quantile is the share of strangers' tokens that are left to the base, and there are two sides to it: tokens of tasks that an
adapter does know are lost with them, which is why the default is below a half. Where gates are learned adapter by adapter
(PHATGOOSE, Arrow), leaving one out is exact: on twelve real adapters and Arrow, quantile=0.3 left 27 % of the tokens of tasks without
an adapter to the base, but 28 % of the others too, because Arrow's scores do not tell them apart. Gates learned together (ridge,
X-LoRA) have seen these tokens as nobody's else, so that real strangers score higher than these: with ridge, 0.3 left 6 % of the
former and 5 % of the latter, and 0.9 left 42 % and 27 %. There ask for more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from recycler.routers.base import Gate, Router
from recycler.routers.protocol import Batch, Group, Model, Profile, own_shots
from recycler.zoo.errors import InputError, UsageError

TOKENS = 4096  # padded tokens in one forward


def check(cls: type[Router], config: Any, profile: Any) -> None:
    """Says what is missing for a threshold, before the long work.

    Raises:
        UsageError: it has to be found, and the method decides once a sequence, or there is no profile. InputError: the profile
            knows no adapter's own tasks.
    """
    if not getattr(config, "calibrated", False):
        return
    by_hand = "Or give one by hand: -o threshold=0.5"
    if cls.granularity != "token":
        raise UsageError(
            f"policy=null with {cls.method()} needs a threshold.",
            "It is found for methods that decide token by token, and this one decides once a sequence.",
            "Give one: -o threshold=0.5",
        )
    if profile is None:
        raise UsageError(
            "policy=null finds its threshold on shots, and no profile was given.",
            "",
            f"Add --profile NAME. {by_hand}",
            code="E_NEEDS_PROFILE",
        )
    if not any(profile.own.values()):
        raise InputError(
            "policy=null finds its threshold on shots of adapters' own tasks, and there are none.",
            "By the profile nobody is better than the base at any task.",
            f"Say which are theirs: --assign ADAPTER=TASK. {by_hand}",
            code="E_NO_GAIN",
        )


@torch.no_grad()
def calibrate(router: Router, model: Model, profile: Any) -> None:
    """Finds the thresholds of a router whose config asks for it; they are kept with it."""
    if not getattr(router.config, "calibrated", False):
        return
    found = _strangers(router, model, profile)
    for group in model.groups:
        quantiles = [
            torch.quantile(torch.cat(best).double(), router.config.quantile)
            for _, best in sorted(found.get(group.name, {}).items())
            if sum(map(len, best))
        ]
        # In fp32, as it is saved. Where nobody has a rival there is nothing to compare with, and nothing is left to the base.
        value = torch.stack(quantiles).mean().float() if quantiles else torch.tensor(float("-inf"))
        router.thresholds[group.name] = float(value)
    known = [value for value in router.thresholds.values() if value > float("-inf")]
    if known:
        spread = torch.tensor(known).quantile(torch.tensor([0.0, 0.5, 1.0])).tolist()
        router.report["threshold"] = dict(zip(("lowest", "median", "highest"), (round(v, 4) for v in spread), strict=True))


def _strangers(router: Router, model: Model, profile: Profile) -> dict[str, dict[str, list[Tensor]]]:
    """Group → adapter → the highest score that any other adapter has at each token of that adapter's shots, for every gate of the
    group; where no other has any score it is left out."""
    rows = own_shots(model, profile)
    shots = [[shot] for _, shot in rows]
    found: dict[str, dict[str, list[Tensor]]] = {}
    gates = {group.name: router.gate(group) for group in model.groups}
    batches = list(model.batches(shots, TOKENS))
    step = model.progress(len(batches), "threshold")
    for numbers in batches:
        batch = model.encode([shots[i] for i in numbers])
        own_B = torch.tensor([rows[i][0] for i in numbers], device=batch.labels_BT.device)
        plan = router.prepare(model, model.prompts([shots[i] for i in numbers]))
        if router.base_pass:
            plan = router.step(model.states(batch.inputs)[0], plan)
        model.observe(batch, _without_own(router, gates, batch, own_B, plan, found))
        step()
    return found


def _without_own(
    router: Router,
    gates: Mapping[str, Gate | None],
    batch: Batch,
    own_B: Tensor,
    plan: Any,
    found: dict[str, dict[str, list[Tensor]]],
) -> Callable[[Group, Tensor], Tensor]:
    """A mixture of each row's strangers, which looks at their scores on the way."""
    plain = replace(router.config, policy="top_k", shared=False)
    decided: dict[str, Tensor] = {}
    own_BE = torch.nn.functional.one_hot(own_B, len(router.adapters)).bool()

    def weights(group: Group, x_BTD: Tensor) -> Tensor:
        gate = gates[group.name]
        if gate is None:
            decided[group.name] = decided[str(group.after)]
            return decided[group.name]
        scores = gate.to(x_BTD.device)(x_BTD, plan)
        scores = scores.masked_fill(own_BE[:, None, None], float("-inf"))
        best_BTS = router.config.seen(scores).amax(-1).expand(*x_BTD.shape[:2], -1)
        mask_BT = batch.mask_BT[group.stream]
        for e in own_B.unique().tolist():
            best_N = best_BTS[(own_B == e)[:, None] & mask_BT].flatten()
            store = found.setdefault(group.name, {}).setdefault(router.adapters[e], [])
            store.append(best_N[best_N > float("-inf")].cpu())
        decided[group.name] = plain.weights(scores, group)
        return decided[group.name]

    return weights
