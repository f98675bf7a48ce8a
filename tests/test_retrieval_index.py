"""Retrieval's indices that look at few examples: what they find, how it is counted, and that a router keeps to its own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from test_requests import ASKED, NAMES, fitting, inputs, profile  # noqa: F401  (fitting is a fixture)

from recycler.routers.discovery import load_router
from recycler.routers.retrieval import Retrieval, RetrievalConfig, index_of, nearest, searched
from recycler.scoring import Fitting
from recycler.zoo.errors import UsageError

Kind = Literal["hnsw", "ivf"]


def examples(count: int, width: int = 32) -> torch.Tensor:
    """Unit vectors around fifty middles."""
    torch.manual_seed(0)
    middles = torch.randn(50, width)
    return torch.nn.functional.normalize(middles[torch.arange(count) % 50] + 0.5 * torch.randn(count, width), dim=-1)


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_most_of_the_nearest_are_found(kind: Kind) -> None:
    known, asked = examples(4000), examples(4100)[4000:]
    best, found = nearest(asked, known, 10)[1], searched(index_of(known, kind), asked, 10)[1]
    recall = (best[:, :, None] == found[:, None, :]).any(-1).float().mean()
    assert recall > 0.9
    values, numbers = searched(index_of(known, kind), asked, 10)
    torch.testing.assert_close(values, (asked[:, None] * known[numbers]).sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
@pytest.mark.parametrize("count", [1, 3, 100])
def test_few_examples_are_all_found(kind: Kind, count: int) -> None:
    known = examples(count)
    values, numbers = searched(index_of(known, kind), known, 64)
    assert values.shape == (count, min(count, 64)) and (numbers[:, 0] == torch.arange(count)).all()


def test_what_was_not_found_is_nobody() -> None:
    known = examples(2000)
    index = index_of(known, "ivf")
    index.nprobe = 1  # one cluster holds fewer than are asked for
    values, numbers = searched(index, known[:4], 2000)
    assert (values == -torch.inf).any() and (numbers >= 0).all() and (values[:, 0] > 0.99).all()


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_the_adapter_with_the_nearest_example_answers(fitting: Fitting, kind: Kind, tmp_path: Path) -> None:  # noqa: F811
    router = Retrieval.fit(fitting, profile(), RetrievalConfig(index=kind, neighbours=5))
    expected = torch.eye(4)[[NAMES.index(task) for task in ASKED]]
    assert torch.equal(router.decide(fitting, inputs(fitting, *ASKED.values())).weights_BE, expected)
    less = load_router(router.without("law").save(tmp_path / "less"))
    assert isinstance(less, Retrieval) and less.config.index == kind
    weights = less.decide(fitting, inputs(fitting, ASKED["poem"])).weights_BE  # the index is that of those who are left
    assert weights.tolist() == [[0.0, 0.0, 1.0]]


def test_bad_options() -> None:
    with pytest.raises(UsageError, match="count"):
        RetrievalConfig(neighbours=0)
