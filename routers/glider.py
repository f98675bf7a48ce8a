"""GLIDER: a local router's scores at every token, plus one global bias a sequence that says what the prompt is about.

Li et al. 2024, GLIDER: Global and Local Instruction-Driven Expert Router (arXiv:2410.07172).

    score_{t,e} = local_{t,e} + β · b_e

The local term is PHATGOOSE's, as in the paper, or that of any router that decides token by token (`local=ridge`). The global term
is the same for every token and site of a sequence. With text=instructions, b_e is the highest cosine between the prompt's
instruction and those of e's own tasks. An instruction is one sentence by a language model (`llm`, asked once for each text), or,
without one, the text itself: the shots' prompts on the one side, the prompt's tails on the other. With text=requests, b_e is
log p(e | prompt), from the classifiers of `routers/requests.py`; `local=ridge text=requests` is ridge + text.

The paper chooses β with knowledge of what is held-in and what is not (100 or 3). Here it is calibrated, on shots: β_known is what
answers them best while a shot's own entry is left out of the index; β_new what answers them best while the whole adapter that they
belong to is left out, which is what a task that nobody here was trained for looks like. A prompt is known when its similarity to
the nearest text is above the threshold that best tells the one case from the other.

Departures from the released code: instructions are embedded whole (it drops the last coordinate), b is looked up for each prompt
(it is set once per evaluation task), absent adapters and renormalisation are the local router's and the policy's.

Shapes: b and bias [B, E]; scores [B, T, E].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from recycler.routers.base import Gate, Router
from recycler.routers.discovery import find, make_config
from recycler.routers.instructions import instructions
from recycler.routers.protocol import Group, Model, Profile, Reader, own_shots
from recycler.routers.requests import MINILM, Requests, Witnesses, tails
from recycler.routers.retrieval import nearest
from recycler.routers.select import Policy
from recycler.routers.sequence import for_input, on_device
from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

_BETAS = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0)
_ROWS = 36  # shots that β is calibrated on
_NEVER = -1e4  # the bias of an adapter that is left out: finite, so that no row is all −∞


@dataclass(frozen=True)
class GliderConfig(Policy):
    """
    Attributes:
        local: the router that scores tokens; local_options: its options, as "steps=20,lr=0.01".
        text: what the global term compares: instructions, or what `requests` finds.
        llm: who writes the instructions: a model's folder or Hub id, or an endpoint ``https://host/v1#model``.
        encoder: a sentence encoder: an id of the Hub, or a folder.
        beta: β for every prompt; calibrated where None.
    """

    local: str = "phatgoose"
    local_options: str = ""
    text: Literal["instructions", "requests"] = "instructions"
    llm: str | None = None
    encoder: str = MINILM
    beta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta is not None and not 0 <= self.beta < float("inf"):
            raise UsageError(f"beta={self.beta}.", "It weighs the global term.", "Use 0 or more.", code="E_OPTION")
        if self.local == "glider":
            raise UsageError(
                "local=glider.", "Its local term is another router's.", "Use local=phatgoose or local=ridge.", code="E_OPTION"
            )

    def local_config(self) -> tuple[type[Router], Any]:
        """The local router's class, and its Config."""
        cls = find(self.local)
        if cls.granularity != "token" or cls.base_pass:
            raise UsageError(
                f"local={self.local}.", "It does not score tokens.", "Use local=phatgoose, ridge or arrow.", code="E_OPTION"
            )
        pairs = [part.partition("=") for part in self.local_options.split(",") if part]
        return cls, make_config(cls, {key.strip(): value.strip() for key, _, value in pairs})


class Glider(Router):
    """score = local score + β · b"""

    Config = GliderConfig
    needs = frozenset({"shots", "scores", "embeddings"})
    paper = "Li et al. 2024 (arXiv:2410.07172)"
    trains = True  # as its local router does by default

    def __init__(self, adapters: Sequence[str], config: Any) -> None:
        super().__init__(adapters, config)
        cls, settings = config.local_config()
        self.local: Router = cls(adapters, settings)
        self.compass: Compass | None = None

    @classmethod
    def fit(cls, model: Model, profile: Profile, config: GliderConfig) -> Self:
        router = cls(model.adapters, config)
        router.local = type(router.local).fit(model, profile, router.local.config)
        router.compass = Compass.fit(model, profile, config)
        router.report = {"local": {"config": dataclasses.asdict(router.local.config), "report": router.local.report}}
        if config.beta is None:
            router._calibrate(model, profile)
        router.report |= {"global": router.compass.facts}
        return router

    def prepare(self, reader: Reader, inputs: Mapping[str, Any]) -> Tensor:
        assert self.compass is not None
        b_BE, similarity_B = self.compass.read(reader, inputs)
        return on_device(self.compass.beta(similarity_B, self.config.beta)[:, None] * b_BE, inputs)

    def gate(self, group: Group) -> Gate | None:
        local = self.local.gate(group)
        return None if local is None else _Biased(local)

    def score(self, group: Group, site: str, x_BTD: Tensor, plan: Any = None) -> Tensor:
        return self.local.score(group, site, x_BTD) + for_input(plan, x_BTD)

    def _calibrate(self, model: Model, profile: Profile) -> None:
        """β_known, β_new and the similarity between them, on a seeded few of the shots."""
        assert self.compass is not None
        rows = own_shots(model, profile)
        generator = torch.Generator().manual_seed(profile.seed)
        some = torch.randperm(len(rows), generator=generator)[:_ROWS].tolist()
        rows = [rows[i] for i in sorted(some)]
        prompts = [model.prompts([[shot]]) for _, shot in rows]
        own_N = torch.tensor([e for e, _ in rows])
        known = [self.compass.read(model, one, without_nearest=True) for one in prompts]
        new = [self.compass.read(model, one, without=e) for one, (e, _) in zip(prompts, rows, strict=True)]
        step = model.progress(2 * len(_BETAS), "β")
        best = {}
        for what, found in (("known", known), ("new", new)):
            b_NE = torch.cat([b_BE for b_BE, _ in found])
            losses = []
            for beta in _BETAS:
                bias_NE = beta * b_NE
                if what == "new":
                    bias_NE = bias_NE.scatter(1, own_N[:, None], _NEVER)
                losses.append(self._loss(model, [shot for _, shot in rows], bias_NE))
                step(1, f"{what} {beta:g}: {losses[-1]:.3f}")
            best[what] = _BETAS[min(range(len(_BETAS)), key=lambda i: (losses[i], i))]
        near, far = (torch.cat([similarity_B for _, similarity_B in found]) for found in (known, new))
        self.compass.facts |= {"beta_known": best["known"], "beta_new": best["new"], "threshold": _threshold(near, far)}

    @torch.no_grad()
    def _loss(self, model: Model, shots: Sequence[Any], bias_NE: Tensor) -> float:
        """Mean NLL a token of the shots, routed with these biases."""
        total = 0.0
        for numbers in model.batches([[shot] for shot in shots], 4096):
            batch = model.encode([[shots[i]] for i in numbers])
            loss_BT = model.nll(batch, self._mixture(model, bias_NE[numbers]))
            total += float((loss_BT.sum(1) / (batch.labels_BT != -100).sum(1)).sum())
        return total / len(shots)

    def _mixture(self, model: Model, bias_BE: Tensor) -> Callable[[Group, Tensor], Tensor]:
        gates = {group.name: self.gate(group) for group in model.groups}
        decided: dict[str, Tensor] = {}

        def weights(group: Group, x_BTD: Tensor) -> Tensor:
            gate = gates[group.name]
            if gate is None:
                decided[group.name] = decided[str(group.after)]
            else:
                decided[group.name] = self.weights(gate.to(x_BTD.device)(x_BTD, bias_BE), group)
            return decided[group.name]

        return weights

    def tensors(self) -> dict[str, Tensor]:
        assert self.compass is not None
        stored = {f"local.{key}": tensor for key, tensor in self.local.tensors().items()}
        return stored | {f"global.{key}": tensor for key, tensor in self.compass.tensors().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"local": {}, "global": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = tensor
        cls, _ = self.config.local_config()
        self.local = cls(self.adapters, make_config(cls, self.report["local"]["config"]))
        self.local.report = self.report["local"]["report"]
        self.local.load_tensors(parts["local"])
        self.compass = Compass(self.adapters, self.config, dict(self.report["global"]), parts["global"])


class _Biased(Gate):
    def __init__(self, local: Gate) -> None:
        super().__init__()
        self.local = local

    def forward(self, x_BTD: Tensor, plan: Any = None) -> Tensor:
        return self.local(x_BTD) + for_input(plan, x_BTD)[..., None, :]


class Compass:
    """The global term: what each adapter is about, and how to tell what a prompt is about.

    Attributes:
        facts: β_known, β_new, the threshold, and the tasks of `requests`; JSON.
        stored: tensors by name.
    """

    def __init__(
        self, adapters: Sequence[str], config: GliderConfig, facts: dict[str, Any], stored: Mapping[str, Tensor]
    ) -> None:
        self.adapters, self.config, self.facts, self.stored = tuple(adapters), config, facts, dict(stored)
        self.requests: Requests | None = None
        if config.text == "requests":
            rest = {key: tensor for key, tensor in self.stored.items() if key != "belongs"}
            self.requests = Requests(facts["tasks"], Witnesses(encoder=config.encoder), rest)

    @classmethod
    def fit(cls, model: Model, profile: Profile, config: GliderConfig) -> Self:
        facts: dict[str, Any] = {}
        if config.text == "requests":
            own = {task: profile.shots[task] for name in sorted(model.adapters) for task in profile.own.get(name, ())}
            requests = Requests.fit(model, own, Witnesses(encoder=config.encoder), profile.seed)
            belongs_CE = torch.zeros(len(requests.tasks), len(model.adapters), dtype=torch.bool)
            for e, name in enumerate(model.adapters):
                for task in profile.own.get(name, ()):
                    belongs_CE[requests.tasks.index(task), e] = True
            facts["tasks"] = list(requests.tasks)
            return cls(model.adapters, config, facts, {"belongs": belongs_CE, **requests.tensors})
        texts: list[str] = []
        owners: list[int] = []
        for e, name in enumerate(model.adapters):
            for task in profile.own.get(name, ()):
                prompts = [text for shot in profile.shots[task] for text in model.texts(model.prompts([[shot]]))]
                said = prompts if config.llm is None else instructions(model, [prompts], config.llm)
                texts += said
                owners += [e] * len(said)
        if config.llm is not None:
            facts["instructions"] = {model.adapters[e]: text for e, text in zip(owners, texts, strict=True)}
        examples_ND = model.embed(texts, config.encoder)
        return cls(model.adapters, config, facts, {"examples": examples_ND, "owner": torch.tensor(owners)})

    def tensors(self) -> dict[str, Tensor]:
        return self.stored

    def read(
        self, reader: Reader, inputs: Mapping[str, Any], *, without: int | None = None, without_nearest: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(b [B, E], the similarity [B] to the nearest text).

        Args:
            without: an adapter whose texts are taken out; without_nearest: the nearest text is, which is a shot's own.
        """
        if self.requests is not None:
            return self._read_requests(reader, inputs, without)
        prompts = reader.texts(inputs)
        parts = [tails(text) for text in prompts]
        if self.config.llm is not None:
            parts = [[text] for text in instructions(reader, [[text] for text in prompts], self.config.llm)]
        queries = reader.embed([tail for some in parts for tail in some], self.config.encoder)
        found_PN, index_PN = nearest(queries, self.stored["examples"])
        owner_PN = self.stored["owner"][index_PN]
        if without is not None:
            found_PN = found_PN.masked_fill(owner_PN == without, -1.0)
        if without_nearest and self.config.llm is None:
            found_PN = found_PN.masked_fill(found_PN > 1 - 1e-4, -1.0)
        b_PE = torch.full((len(queries), len(self.adapters)), -1.0).scatter_reduce(1, owner_PN, found_PN, "amax")
        b_BE = torch.stack([one.amax(0) for one in b_PE.split([len(some) for some in parts])])
        return b_BE, b_BE.amax(-1)

    def _read_requests(self, reader: Reader, inputs: Mapping[str, Any], without: int | None) -> tuple[Tensor, Tensor]:
        assert self.requests is not None
        found = self.requests.read(reader, inputs)
        belongs_CE = self.stored["belongs"].clone()
        if without is not None:
            belongs_CE[:, without] = False
        log_p_BCE = found.log_p_BC[:, :, None].masked_fill(~belongs_CE, _NEVER)
        # An adapter without a task of its own is as unlikely as the unlikeliest.
        b_BE = log_p_BCE.logsumexp(1).clamp(min=float(found.log_p_BC.min()))
        return b_BE, found.log_p_BC.amax(-1) if without is None else b_BE.amax(-1)

    def beta(self, similarity_B: Tensor, given: float | None) -> Tensor:
        """β for each prompt [B]."""
        if given is not None:
            return torch.full_like(similarity_B, given)
        known_B = similarity_B >= self.facts["threshold"]
        return torch.where(known_B, self.facts["beta_known"], self.facts["beta_new"])


def _threshold(near_N: Tensor, far_N: Tensor) -> float:
    """The similarity above which most of `near` and below which most of `far` lies: the middle of the widest gap among the best."""
    points = torch.cat([near_N, far_N]).sort().values
    middles = torch.cat([points[:1] - 1e-3, (points[1:] + points[:-1]) / 2])
    right = [float((near_N >= m).float().mean() + (far_N < m).float().mean()) for m in middles]
    best = [i for i, value in enumerate(right) if value >= max(right) - 1e-6]
    return round(float(middles[best[len(best) // 2]]), 4)
