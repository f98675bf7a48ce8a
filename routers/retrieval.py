"""Retrieval: the adapter whose stored examples resemble the prompt most. No model is fitted: the examples are the router.

score_e = max over the prompts s of e's own shots, and over the tails t of the prompt, of cos(embed(s), embed(t)); −∞ without
shots. The best adapter answers alone (top_k=1), or several by a softmax of the scores over `temperature`.

Examples are searched exactly unless there are millions of them: ``index=hnsw`` (a graph of neighbours: quick at any size, some 300 bytes
an example beside the example) or ``index=ivf`` (clusters, of which a sixteenth is searched). Both answer with a few dozen examples, and
adapters that none of these is of score −∞. What they miss is measured by `python benchmarks/many_tasks.py`.

The Retrieval baseline of PHATGOOSE (Muqeeth et al. 2024, arXiv:2402.05859; 1000 examples each, MiniLM, one-hot; earlier:
Jang et al. 2023, arXiv:2302.03202). Differences: FAISS does the search, and every tail of the prompt that begins at a line
(`routers/requests.py`) is a query, so that an earlier turn does not answer for the last one.

Shapes: examples [N, D], scores and weights [B, E].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from recycler.routers.protocol import Model, Profile, Reader, own_shots
from recycler.routers.requests import MINILM, tails
from recycler.routers.select import Policy
from recycler.routers.sequence import Decision, SequenceRouter
from recycler.zoo.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

_NEIGHBOURS = 64  # what an index that is not exact is asked for


@dataclass(frozen=True)
class RetrievalConfig(Policy):
    """
    Attributes:
        encoder: a sentence encoder: an id of the Hub, or a folder.
        tails: also read what begins at a line of the prompt.
        index: how FAISS looks: "flat" at every example; "hnsw" and "ivf" at few, and may miss one.
        neighbours: examples that answer for a query; None is all for index=flat, 64 for the others.
    """

    top_k: int | None = 1
    temperature: float = 0.05
    encoder: str = MINILM
    tails: bool = True
    index: Literal["flat", "hnsw", "ivf"] = "flat"
    neighbours: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours is not None and self.neighbours < 1:
            raise UsageError(f"neighbours={self.neighbours}.", "It is a count.", "Use neighbours=1 or more.", code="E_OPTION")


class Retrieval(SequenceRouter):
    """score_e = the highest cosine of the prompt with one of e's examples"""

    Config = RetrievalConfig
    needs = frozenset({"shots", "scores", "embeddings"})
    paper = "the Retrieval baseline of Muqeeth et al. 2024 (arXiv:2402.05859)"

    def __init__(self, adapters: Sequence[str], config: Any) -> None:
        super().__init__(adapters, config)
        self.examples_ND = torch.zeros(0, 1)
        self.owner_N = torch.zeros(0, dtype=torch.long)
        self._index: Any = None  # FAISS's, made when first asked for

    @classmethod
    def fit(cls, model: Model, profile: Profile, config: RetrievalConfig) -> Self:
        router = cls(model.adapters, config)
        router._learn(model, own_shots(model, profile))
        return router

    def _learn(self, model: Model, rows: Sequence[tuple[int, Any]]) -> None:
        texts = [text for _, shot in rows for text in model.texts(model.prompts([[shot]]))]
        made_ND, self._index = model.embed(texts, self.config.encoder), None
        self.examples_ND = torch.cat([self.examples_ND, made_ND]) if len(self.examples_ND) else made_ND
        self.owner_N = torch.cat([self.owner_N, torch.tensor([e for e, _ in rows])])

    def decide(self, reader: Reader, inputs: Mapping[str, Any]) -> Decision:
        parts = [tails(text) if self.config.tails else [text] for text in reader.texts(inputs)]
        queries = reader.embed([tail for some in parts for tail in some], self.config.encoder)
        if self._index is None:
            self._index = index_of(self.examples_ND, self.config.index)
        exact = self.config.index == "flat"
        found_PN, index_PN = searched(self._index, queries, self.config.neighbours or (None if exact else _NEIGHBOURS))
        owners_PN = self.owner_N[index_PN]
        scores_PE = torch.full((len(queries), len(self.adapters)), -torch.inf)
        scores_PE = scores_PE.scatter_reduce(1, owners_PN, found_PN, "amax")
        scores_BE = torch.stack([one.amax(0) for one in scores_PE.split([len(some) for some in parts])])
        why = [
            {"similarity": {self.adapters[e]: round(s, 3) for e, s in enumerate(row) if s > max(row) - 0.1}}
            for row in scores_BE.tolist()
        ]
        return Decision(self.config.weights(scores_BE), why)

    # -- later changes

    def extended(self, model: Model, profile: Profile, name: str) -> Self:
        new = len(self.adapters)
        if model.adapters != (*self.adapters, name):
            raise UsageError(
                f"The model's adapters are {', '.join(model.adapters)}.",
                "They must be this router's, and the new one last.",
                "",
            )
        router = type(self)(model.adapters, self.config)
        router.examples_ND, router.owner_N = self.examples_ND, self.owner_N
        router._learn(model, [(e, shot) for e, shot in own_shots(model, profile) if e == new])
        return router

    def without(self, name: str) -> Self:
        if name not in self.adapters:
            raise UsageError(f"This router has no adapter {name}.", "", f"It has {', '.join(self.adapters)}.", code="E_UNKNOWN")
        gone = self.adapters.index(name)
        router = type(self)([other for other in self.adapters if other != name], self.config)
        kept_N = self.owner_N != gone
        router.examples_ND = self.examples_ND[kept_N]
        router.owner_N = self.owner_N[kept_N] - (self.owner_N[kept_N] > gone).long()
        return router

    def tensors(self) -> dict[str, Tensor]:
        return {"examples": self.examples_ND, "owner": self.owner_N}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.examples_ND, self.owner_N = tensors["examples"], tensors["owner"]
        self._index = None


def nearest(queries_PD: Tensor, examples_ND: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """(cosines, numbers of the examples), [P, N] each, highest first, exact. All examples where `count` is None: some tens of
    thousands of shots are searched in milliseconds."""
    return searched(index_of(examples_ND), queries_PD, count)


def index_of(examples_ND: Tensor, kind: str = "flat") -> Any:
    """FAISS's index of inner products. "hnsw" has 32 neighbours for each example; "ivf" about 4√N clusters (of 39 examples at least, as
    FAISS wants it), of which a sixteenth and at least 8 are searched."""
    import faiss

    count, width = examples_ND.shape
    index: Any
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 200, 128
    elif kind == "ivf":
        clusters = max(min(round(4 * count**0.5), count // 39), 1)
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, clusters, faiss.METRIC_INNER_PRODUCT)
        index.train(examples_ND.numpy())
        index.nprobe = min(max(8, clusters // 16), clusters)
    else:
        index = faiss.IndexFlatIP(width)
    index.add(examples_ND.numpy())
    return index


def searched(index: Any, queries_PD: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """(cosines, numbers of the examples), [P, N] each, highest first; −∞ and example 0 where the index found no more."""
    found, numbers = index.search(queries_PD.numpy(), min(count or index.ntotal, index.ntotal))
    found_PN, numbers_PN = torch.from_numpy(found), torch.from_numpy(numbers)
    return found_PN.masked_fill(numbers_PN < 0, -torch.inf), numbers_PN.clamp(min=0)
