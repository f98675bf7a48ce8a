"""Classifier: what does the prompt ask for, and who does that best? Two steps, one decision a sequence.

Step one, p(task | prompt): `routers/requests.py`, on the prompt's text and on the base's own states. Step two, a table from task to
mixture, chosen on the task's shots: the adapter with the lowest NLL, or two of the best mixed where that is better by more than one
standard error; a task that nobody helps has the base.

A prompt is given the row of its likeliest task. Where that is not sure, and its wording does not tell it from a second task, it may
be a third thing that no shot asks for: the second's row is mixed in, if the two get along, which is to say that each of them keeps
most of what it can on its own shots. Adapters that do (past tense and plural) can do together what neither was trained for (the
third person); most others ruin each other. Each has 0.6 and not half of its strength: updates of different adapters are nearly
orthogonal, so that the mean of two is shorter than either.

A prompt that resembles no shot of any task goes to the base.

Why two steps: which adapter is best for one prompt is a noisy label, its task is not. From the two-step router of Composition of
Experts (Jain et al. 2024, arXiv:2412.01868; no released code), which reads the text only and picks one whole model.

Shapes: p [B, C], table [C, E], friends [C, C], weights [B, E].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recycler.routers.protocol import Model, Profile, Reader
from recycler.routers.requests import Requests, Witnesses
from recycler.routers.sequence import Decision, SequenceRouter
from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

_SHARES = (0.5, 0.7)  # of the better of two adapters that are mixed
_ALIKE = 0.3  # the wording gives a second task at least this share of the first's probability
_TOGETHER = 0.6  # of each row, where two are mixed
_KEPT = 0.75  # of the probability of its own answers that each of two friends keeps in their mixture
_NEAREST = 3  # tasks that are tried as a task's friends
_TRIED = 8  # shots of each


@dataclass(frozen=True)
class ClassifierConfig(Witnesses):
    """
    Attributes:
        sure: a prompt whose likeliest task has less probability than this may be given two tasks' rows; 0 never does that.
        unknown: a prompt whose best cosine with any shot's prompt is below this gets the base. Unrelated text is at 0.1 to 0.2,
            rewordings of the shots are above 0.3.
        mix: a task's row may be a mixture of two of this many best adapters; 1 gives every task a single adapter.
    """

    sure: float = 0.9
    unknown: float = 0.2
    mix: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sure", "unknown"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name}={getattr(self, name)}.", "", "Use a number from 0 to 1.", code="E_OPTION")
        if self.mix < 1:
            raise UsageError(f"mix={self.mix}.", "A task has one adapter at least.", "Use 1 or more.", code="E_OPTION")


class Classifier(SequenceRouter):
    """weights = table[argmax_c p(c | prompt)], or the mean of two rows"""

    Config = ClassifierConfig
    needs = frozenset({"shots", "scores", "embeddings"})
    paper = "Composition of Experts (arXiv:2412.01868), with evidence from the base's own states"
    abstains = True

    def __init__(self, adapters: Sequence[str], config: Any) -> None:
        super().__init__(adapters, config)
        self.requests: Requests | None = None
        self.table_CE = torch.zeros(0, len(self.adapters))
        self.friends_CC = torch.zeros(0, 0, dtype=torch.bool)

    @classmethod
    def fit(cls, model: Model, profile: Profile, config: ClassifierConfig) -> Self:
        router = cls(model.adapters, config)
        router.requests = Requests.fit(model, profile.shots, config, profile.seed)
        tasks = router.requests.tasks
        router.table_CE = table(model, profile, tasks, config.mix)
        router.friends_CC = torch.eye(len(tasks), dtype=torch.bool)
        if config.sure:
            near_CC = router.requests.nearness() if len(tasks) > 1 else torch.zeros(1, 1)
            router.friends_CC |= friends(model, profile, tasks, router.table_CE, near_CC)
        router.report = {
            "tasks": {
                task: {name: round(w, 2) for name, w in zip(model.adapters, row, strict=True) if w} or "base"
                for task, row in zip(tasks, router.table_CE.tolist(), strict=True)
            },
            "get along": [f"{tasks[c]} + {tasks[d]}" for c, d in router.friends_CC.nonzero().tolist() if c < d],
        }
        return router

    def decide(self, reader: Reader, inputs: Mapping[str, Any]) -> Decision:
        assert self.requests is not None
        found = self.requests.read(reader, inputs)
        p_BC = found.log_p_BC.exp()
        first_B, second_B = companions(p_BC, found.text_BC.exp(), self.friends_CC, self.config.sure)
        known_B = found.similarity_B >= self.config.unknown
        one_BE, two_BE = self.table_CE[first_B], self.table_CE[second_B]
        share_B = torch.where((one_BE == two_BE).all(-1), 0.5, _TOGETHER) * known_B
        weights_BE = (one_BE + two_BE) * share_B[:, None]
        why = []
        for b, (one, two) in enumerate(zip(first_B.tolist(), second_B.tolist(), strict=True)):
            said = {self.requests.tasks[c]: round(float(p_BC[b, c]), 3) for c in dict.fromkeys((one, two))}
            reason = {"tasks": said, "similarity": round(float(found.similarity_B[b]), 3), "read": found.tails[b]}
            why.append(reason if known_B[b] else {"unknown": True, **reason})
        return Decision(weights_BE, why)

    def tensors(self) -> dict[str, Tensor]:
        assert self.requests is not None
        return {"table": self.table_CE, "friends": self.friends_CC, **self.requests.tensors}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        rest = dict(tensors)
        self.table_CE, self.friends_CC = rest.pop("table"), rest.pop("friends")
        self.requests = Requests(tuple(self.report["tasks"]), self.config, rest)


def companions(p_BC: Tensor, wording_BC: Tensor, friends_CC: Tensor, sure: float) -> tuple[Tensor, Tensor]:
    """Each prompt's likeliest task, and the one whose row is mixed in: where that is not `sure`, the friend that the wording speaks
    for most, if it has `_ALIKE` of what it says for the first; else the first again."""
    first_B = p_BC.argmax(-1)
    floor_B1 = _ALIKE * wording_BC.gather(1, first_B[:, None])
    friends_BC = (wording_BC * friends_CC[first_B]).scatter(1, first_B[:, None], floor_B1)
    return first_B, torch.where(p_BC.amax(-1) < sure, friends_BC.argmax(-1), first_B)


def table(model: Model, profile: Profile, tasks: Sequence[str], mix: int) -> Tensor:
    """Task → mixture [C, E]: the adapter with the lowest mean NLL on the task's shots; two of the `mix` best where their mixture
    is lower by more than a standard error of the difference; nobody where the base is as good.

    An adapter assigned to a task by hand is its row, whatever the scores.
    """
    nll = profile.nll
    places = list(profile.shots)
    rows_CE = torch.zeros(len(tasks), len(model.adapters))
    open_: list[tuple[int, Tensor, Tensor]] = []
    for c, task in enumerate(tasks):
        owner = profile.owner.get(task)
        if owner is None:
            continue
        own = model.adapters.index(owner)
        rows_CE[c, own] = 1.0
        scores_EK = nll[1:, places.index(task)]
        order = scores_EK.mean(-1).argsort(stable=True).tolist()
        if mix > 1 and order[0] == own:  # not one given by hand against the scores
            for one, other in combinations(order[:mix], 2):
                for share in _SHARES:
                    mixture_E = torch.zeros(len(model.adapters))
                    mixture_E[one], mixture_E[other] = share, 1 - share
                    open_.append((c, mixture_E, scores_EK[own]))
    step = model.progress(len(open_), "mixtures")
    best: dict[int, float] = {}
    for c, mixture_E, alone_K in open_:
        gain_K = alone_K - _nll(model, profile.shots[tasks[c]], mixture_E)
        error = float(gain_K.std()) / len(gain_K) ** 0.5 if len(gain_K) > 1 else float("inf")
        certain = float(gain_K.mean()) - error  # of two such mixtures, the one that is surer to be better
        if certain > best.get(c, 0.0):
            best[c], rows_CE[c] = certain, mixture_E
        step()
    return rows_CE


@torch.no_grad()
def _nll(model: Model, shots: Sequence[Any], mixture_E: Tensor, mean: bool = True) -> Tensor:
    """NLL of each shot's completion [K]: the mean over its tokens, or their sum."""
    result_K = torch.zeros(len(shots))
    for numbers in model.batches([[shot] for shot in shots], 4096):
        batch = model.encode([[shots[i]] for i in numbers])
        loss_BT = model.nll(batch, mixture_E)
        loss_B = loss_BT.sum(1) / (batch.labels_BT != -100).sum(1) if mean else loss_BT.sum(1)
        result_K[numbers] = loss_B.cpu()
    return result_K


def friends(model: Model, profile: Profile, tasks: Sequence[str], table_CE: Tensor, near_CC: Tensor) -> Tensor:
    """[C, C] bool, symmetric: which tasks' rows can be mixed half and half. Each then keeps `_KEPT` of the mean probability that
    its own row gives its shots' answers; tried for the tasks whose prompts are nearest, so that it grows with C and not with C²."""
    count = len(tasks)
    pairs = {
        tuple(sorted((c, d)))
        for c in range(count)
        for d in near_CC[c].argsort(descending=True, stable=True)[:_NEAREST].tolist()
        if c != d
    }
    shots = [profile.shots[task][:_TRIED] for task in tasks]
    alone_C = [_answered(model, shots[c], table_CE[c]) for c in range(count)]
    step = model.progress(len(pairs), "who gets along")
    found_CC = torch.zeros(count, count, dtype=torch.bool)
    for c, d in sorted(pairs):
        mixture_E = (table_CE[c] + table_CE[d]) / 2
        if all(_answered(model, shots[i], mixture_E) >= _KEPT * alone_C[i] for i in (c, d)):
            found_CC[c, d] = found_CC[d, c] = True
        step()
    return found_CC


def _answered(model: Model, shots: Sequence[Any], mixture_E: Tensor) -> float:
    """The mean probability of a shot's whole answer."""
    return float((-_nll(model, shots, mixture_E, mean=False)).exp().mean())
