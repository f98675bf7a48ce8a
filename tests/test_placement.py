"""Tensor names and shapes of every format, damaged at random: each tensor has its place, or nothing is read."""

from __future__ import annotations

from typing import Any

import pytest
from adapters import PREFIX
from hypothesis import given, settings
from hypothesis import strategies as st

from recycler.zoo import adalora, formats
from recycler.zoo.config import Settings
from recycler.zoo.errors import InputError

Shapes = dict[str, tuple[int, ...]]
PAIR: Shapes = {"lora_A.weight": (2, 3), "lora_B.weight": (5, 2)}
TRIPLET: Shapes = {"lora_A": (1, 3), "lora_E": (1, 1), "lora_B": (5, 1)}
VALID: dict[str, tuple[Shapes, Settings]] = {
    "LoRA": (PAIR, Settings(rank=2)),
    "DoRA": ({**PAIR, "lora_magnitude_vector": (5,)}, Settings(rank=2, dora=True)),
    "bias": ({**PAIR, "lora_B.bias": (5,)}, Settings(rank=2, bias=True)),
    "LoRA-XS": ({**PAIR, "default_lora_latent_mapping.weight": (2, 2)}, Settings(rank=2)),
    "AdaLoRA": (TRIPLET, Settings(rank=2, masks={"q_proj": (True, False)}, method="ADALORA")),
    "IncreLoRA": (
        {f"{part}.{i}": shape for i in (0, 1) for part, shape in TRIPLET.items()} | {"ranknum": (1,)},
        Settings(rank=2, method="INCRELORA"),
    ),
}
PARTS = ["lora_A", "lora_B", "lora_E", "ranknum", "lora_magnitude_vector", "default_lora_latent_mapping", "x"]
ENDS = ["", ".weight", ".bias", ".default", ".0", ".1", ".2", ".00", ".default.weight", "."]
PLACES = [f"{PREFIX}q_proj.", f"{PREFIX}v_proj.", f"{PREFIX}base_layer.", "q_proj.", f"{PREFIX}.", ""]
strange = st.builds("".join, st.tuples(st.sampled_from(PLACES), st.sampled_from(PARTS), st.sampled_from(ENDS)))
sizes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@pytest.mark.parametrize("kind", VALID)
@given(data=st.data())
@settings(max_examples=100)
def test_every_tensor_is_placed_or_nothing_is_read(kind: str, data: Any) -> None:
    parts, config = VALID[kind]
    own = {f"{PREFIX}q_proj.{part}": shape for part, shape in parts.items()}
    lost = data.draw(st.sets(st.sampled_from(sorted(own)), max_size=2))
    more = data.draw(st.dictionaries(strange, sizes, max_size=2))
    shapes = {key: shape for key, shape in own.items() if key not in lost} | more
    try:
        sites, receipt = formats.plan(config, shapes, "math")
    except InputError as error:
        assert shapes != own and error.why and error.fix
        return
    placed = {name for site in sites.values() for name in vars(site).values() if isinstance(name, str)}
    placed |= {name for site in sites.values() for part in (site.a, site.b, site.values) for name in part}
    assert placed | adalora.pruned(shapes) == set(shapes), "a tensor was dropped"
    assert receipt.sites == len(sites) > 0 and receipt.tensors == len(shapes)


@pytest.mark.parametrize("kind", VALID)
@given(data=st.data())
@settings(max_examples=50)
def test_a_site_that_lost_a_part_is_refused(kind: str, data: Any) -> None:
    parts, config = VALID[kind]
    lost = data.draw(st.sampled_from(sorted(parts)))
    whole = {f"{PREFIX}v_proj.{part}": shape for part, shape in parts.items()}
    cut = {f"{PREFIX}q_proj.{part}": shape for part, shape in parts.items() if part != lost}
    with pytest.raises(InputError, match="q_proj"):
        formats.plan(config, {**whole, **cut}, "math")
