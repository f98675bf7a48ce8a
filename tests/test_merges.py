"""Merges: one adapter at weight 1 is that adapter, a merge is a function of ΔW alone, and what a method says it does it does."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.utils import merge_utils
from pico import make_adapter
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import recycler
from recycler.base import load_base
from recycler.build import read_adapters
from recycler.routed import RoutedModel
from recycler.routers import merging
from recycler.routers.average import Average
from recycler.routers.dare import Dropped
from recycler.routers.discovery import find, load_router
from recycler.routers.merging import Part, Place, Update, agree, cut, factors_of, keep_largest, linear, update_of
from recycler.routers.ties import Trimmed
from recycler.zoo import formats
from recycler.zoo.adapter import Factors
from recycler.zoo.errors import InputError, UsageError

LINEAR = ("cat", "svd")
DENSE = ("ties", "dare", "magnitude_prune")
DERIVED = (*LINEAR, *DENSE)
WHOLE: Mapping[str, dict[str, Any]] = {
    "cat": {}, "svd": {"energy": 1.0}, **{method: {"density": 1.0, "energy": 1.0} for method in DENSE}
}  # fmt: skip
TEXTS = ["Add 3 and b.", "Is 14 liable to e?"]
seeds = st.integers(0, 10_000)
shapes = st.tuples(st.integers(2, 9), st.integers(2, 9))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update(o: int, d: int, r: int, seed: int, *, scaled: bool = False) -> Update:
    return Update(random(r, d, seed=seed), random(o, r, seed=seed + 1), random(o, seed=seed + 2) if scaled else None)


def place(updates: list[Update], weights: list[float] | None = None, w_OD: Tensor | None = None) -> Place:
    weights = weights or [1 / len(updates)] * len(updates)
    parts = [Part(f"e{e}", w, one) for e, (w, one) in enumerate(zip(weights, updates, strict=True))]
    return Place("site", parts, sum(map(abs, weights)), lambda: w_OD if w_OD is not None else torch.zeros(1))


def dense(one: Update, w_OD: Tensor | None = None) -> Tensor:
    """The definition, in fp64."""
    delta = one.b_OR.double() @ one.a_RD.double()
    return delta if one.scale_O is None or w_OD is None else delta + one.scale_O.double()[:, None] * w_OD.double()


def triples(one: Place) -> list[tuple[str, float, Tensor]]:
    return [(part.name, part.weight, dense(part.update)) for part in one.parts]


# ------------------------------------------------------------------------------------------------------------ the pipeline


def batch(model: RoutedModel) -> dict[str, Tensor]:
    tokens = model.tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    made = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    return made | ({"decoder_input_ids": torch.tensor([[0, 70, 71]] * 2)} if model.source.encoder_decoder else {})


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    out: Tensor = model(**inputs).logits
    return out if "decoder_input_ids" in inputs else out[inputs["attention_mask"].bool()]


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def peft_model(world: Pico, folder: Path) -> Any:
    auto: Any = AutoModelForSeq2SeqLM if world.kind == "t5" else AutoModelForCausalLM
    return PeftModel.from_pretrained(auto.from_pretrained(world.base), folder).eval()


@pytest.mark.parametrize("method", DERIVED)
def test_a_merge_is_built_composed_saved_loaded_and_exported(world: Pico, method: str, tmp_path: Path) -> None:
    """All the way, with adapters of every kind among them; PEFT loads what lies beside the router, and gives the same logits."""
    zoo = recycler.Zoo(world.zoo)
    built = recycler.build_router(method, zoo=zoo, out=tmp_path / "router")
    assert built.adapters == (method,) and set(built.report[method]) == {"error", "worst", "ranks"}
    model = recycler.compose(zoo, tmp_path / "router")
    assert model.names == (method,)
    expected = logits(model, batch(model))
    assert torch.equal(expected, logits(recycler.compose(zoo, built), batch(model)))
    model.save_pretrained(tmp_path / "model")
    loaded = recycler.load(tmp_path / "model")
    assert torch.equal(logits(loaded, batch(model)), expected)
    for folder in (tmp_path / "router" / "adapters" / method, tmp_path / "model" / "adapters" / method):
        close(logits(peft_model(world, folder), batch(model)), expected, 2e-5)
    answer = loaded.generate(**{k: v for k, v in batch(model).items() if "decoder" not in k}, max_new_tokens=3)
    assert answer.shape[0] == 2
    [record] = loaded.adapters
    assert record.source == f"{method} of code, law, math, poem"
    again = load_router(tmp_path / "router")
    assert [a.sites.keys() for a in again.derived] == [a.sites.keys() for a in built.derived]
    with model.disabled():
        assert (logits(model, batch(model)) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("method", DERIVED)
@pytest.mark.parametrize(
    "options",
    [{"lora_alpha": 4}, {"lora_alpha": 8, "use_rslora": True}, {"lora_alpha": 2, "rank_pattern": {"q_proj": 3, "q": 3}},
     {"lora_alpha": 4, "lora_bias": True}, {"lora_alpha": 8, "use_dora": True}, {"lora_alpha": 4, "use_dora": True, "use_rslora": True}],
)  # fmt: skip
def test_one_adapter_at_weight_1_is_that_adapter(world: Pico, method: str, options: dict[str, Any], tmp_path: Path) -> None:
    """PEFT's own forward of it, for scalings of ½, 1 and 2, rsLoRA, mixed ranks, biases and DoRA."""
    targets = ["q", "v"] if world.kind == "t5" else ["q_proj", "v_proj"]
    folder = make_adapter(world.base, "alone", {"r": 4, "target_modules": targets, **options}, tmp_path)
    biased(folder)
    zoo = recycler.Zoo(tmp_path / "zoo")
    recycler.fetch([folder], base=world.base, zoo=zoo).raise_for_failures()
    density = {} if method in LINEAR else {"density": 1.0}
    model = recycler.compose(zoo, recycler.build_router(method, zoo=zoo, weights="alone=1", **density))
    close(logits(model, batch(model)), logits(peft_model(world, folder), batch(model)))
    close(logits(peft_model(world, model.folders[method]), batch(model)), logits(peft_model(world, folder), batch(model)))


def biased(folder: Path) -> None:
    """Gives the biases of B, zero as PEFT makes them, values."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    for key in sorted(tensors):
        if key.endswith("lora_B.bias"):
            tensors[key] = random(*tensors[key].shape, seed=3).float()
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("method", DERIVED)
def test_nothing_dropped_is_the_mixture(world: Pico, method: str) -> None:
    """At density 1 a merge of LoRA, rsLoRA and DoRA adapters is their weighted sum, as the engine mixes them. TIES elects signs."""
    zoo = recycler.Zoo(world.zoo)
    names = ("poem",) if method == "ties" else ("code", "law", "math", "poem")
    weights = {name: weight for name, weight in zip(names, (0.7, -0.5, 1.2, 0.4), strict=False)}
    text = ",".join(f"{name}={weight}" for name, weight in weights.items())
    model = recycler.compose(zoo, recycler.build_router(method, zoo=zoo, adapters=names, weights=text, **WHOLE[method]))
    base = load_base(str(world.base))
    mixed = RoutedModel(base, read_adapters(zoo, names, base))
    with mixed.mixture(weights):
        close(logits(model, batch(model)), logits(mixed, batch(model)), 1e-4)
    average = recycler.compose(zoo, recycler.build_router("average", zoo=zoo, adapters=names, weights=text))
    close(logits(average, batch(model)), logits(model, batch(model)), 1e-4)


@pytest.mark.parametrize("method", LINEAR)
def test_peft_merges_plain_adapters_to_the_same(llama: Pico, method: str) -> None:
    zoo = recycler.Zoo(llama.zoo)
    reference = peft_model(llama, llama.adapters["math"])
    reference.load_adapter(llama.adapters["code"], "code")
    rank = {"svd_rank": 6} if method == "svd" else {}
    reference.add_weighted_adapter(["default", "code"], [0.7, 0.5], "merged", combination_type=method, **rank)
    reference.set_adapter("merged")
    options = {"rank": 6} if method == "svd" else {}
    router = recycler.build_router(method, zoo=zoo, adapters=["code", "math"], weights="math=0.7,code=0.5", **options)
    model = recycler.compose(zoo, router)
    close(logits(model, batch(model)), logits(reference, batch(model)), 1e-4)


def test_licences_and_origins_of_a_merge(llama: Pico, tmp_path: Path) -> None:
    """A merge is under what all of its parts state; where one states nothing it states nothing."""
    zoo = recycler.Zoo(tmp_path / "zoo")
    stated = {"math": "apache-2.0", "law": "cc-by-nc-4.0", "code": None}
    for name, licence in stated.items():
        folder = tmp_path / name
        folder.mkdir()
        for file in llama.adapters[name].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n" if licence else "no header\n")
    recycler.fetch([tmp_path / name for name in stated], base=llama.base, zoo=zoo).raise_for_failures()
    both = recycler.compose(zoo, recycler.build_router("cat", zoo=zoo, adapters=["law", "math"]), tmp_path / "both")
    assert both.adapters[0].licence == "apache-2.0, cc-by-nc-4.0"
    assert "non-commercial" in (tmp_path / "both" / "README.md").read_text()
    assert recycler.compose(zoo, recycler.build_router("cat", zoo=zoo, adapters=["math"])).adapters[0].licence == "apache-2.0"
    assert recycler.compose(zoo, recycler.build_router("cat", zoo=zoo)).adapters[0].licence is None
    named = recycler.build_router("cat", zoo=zoo, weights="math=1,law=1")
    assert recycler.compose(zoo, named).adapters[0].licence == "apache-2.0, cc-by-nc-4.0"  # code is not in it
    with pytest.raises(InputError, match="not allowed"):
        recycler.compose(zoo, named, license_allow=["mit"])


def test_a_merge_may_be_called_like_an_adapter(llama: Pico, tmp_path: Path) -> None:
    """The zoo's `cat` is still checked, and the merge takes its place in the model."""
    zoo = recycler.Zoo(tmp_path / "zoo")
    recycler.fetch([llama.adapters["math"]], base=llama.base, zoo=zoo, names=["cat"]).raise_for_failures()
    router = recycler.build_router("cat", zoo=zoo, out=tmp_path / "router")
    assert recycler.compose(zoo, tmp_path / "router").names == ("cat",)
    router.facts["hashes"]["cat"] = "0" * 64
    with pytest.raises(InputError, match="cat changed"):
        recycler.compose(zoo, router)


def test_evaluation_of_a_merge_finds_its_baselines(llama: Pico) -> None:
    """The profile's best single adapter is not in the model; it must not silently become the base."""
    zoo, shots = recycler.Zoo(llama.zoo), recycler.Shots.from_files(*llama.tasks)
    profile = recycler.profile(zoo, shots, kshot=2, dtype="float32", assign={name: [name] for name in llama.adapters})
    model = recycler.compose(zoo, recycler.build_router("cat", profile, zoo=zoo))
    result = recycler.evaluate(model, recycler.Shots({"math": shots["math"][:2]}), max_new_tokens=2)
    assert result.chosen["best_single"]["how"] == "in hindsight"


# ------------------------------------------------------------------------------------------------------------ linear maths


@given(shapes, st.lists(st.integers(1, 5), min_size=1, max_size=4), seeds)
def test_a_sum_of_updates_is_an_update(shape: tuple[int, int], ranks: list[int], seed: int) -> None:
    w_OD = random(*shape, seed=seed + 99)
    one = place([update(*shape, r, seed + 7 * e, scaled=e % 2 == 1) for e, r in enumerate(ranks)], w_OD=w_OD)
    expected = sum(part.weight * dense(part.update, w_OD) for part in one.parts)
    merged = linear(one.parts)
    assert merged.a_RD.shape[0] == sum(ranks)
    torch.testing.assert_close(dense(merged, w_OD), expected)


@given(shapes, st.integers(1, 4), seeds)
def test_dora_is_an_update_and_back(shape: tuple[int, int], rank: int, seed: int) -> None:
    """c ⊙ (W + BA) − W in fp64 from the definition; and any S makes a DoRA adapter again, also one with c' < 0."""
    w_OD = random(*shape, seed=seed).float()
    plain = update(*shape, rank, seed + 1)
    dora = Factors(plain.a_RD.float(), plain.b_OR.float(), random(shape[0], seed=seed + 5).float())
    one = update_of(dora, lambda: w_OD)
    torch.testing.assert_close(dense(one, w_OD), _dora(dora, w_OD))
    again = factors_of("x", {"site": one}, lambda site: w_OD)["site"]
    torch.testing.assert_close(_dora(again, w_OD), _dora(dora, w_OD), rtol=1e-4, atol=1e-4)


def _dora(factors: Factors, w_OD: Tensor) -> Tensor:
    assert factors.magnitude_O is not None
    tuned_OD = w_OD.double() + factors.b_OR.double() @ factors.a_RD.double()
    return (factors.magnitude_O.double() / tuned_OD.norm(dim=1))[:, None] * tuned_OD - w_OD.double()


def test_a_plain_linear_beside_dora_keeps_the_base_as_it_is() -> None:
    w_OD = random(4, 3, seed=0).float()
    made = factors_of("x", {"a": update(4, 3, 1, 1, scaled=True), "b": update(4, 3, 1, 5)}, lambda site: w_OD)
    assert all(factors.magnitude_O is not None for factors in made.values())
    torch.testing.assert_close(_dora(made["b"], w_OD), dense(update(4, 3, 1, 5)), rtol=1e-5, atol=1e-5)


def test_a_row_that_vanishes_is_nearly_said() -> None:
    """S = −1 takes the base's output away, which DoRA cannot say with any finite B; a millionth of it stays."""
    w_OD = random(4, 3, seed=0).float()
    gone = Update(random(1, 3, seed=1), random(4, 1, seed=2), torch.full((4,), -1.0, dtype=torch.float64))
    made = factors_of("x", {"a": gone}, lambda site: w_OD)["a"]
    torch.testing.assert_close(_dora(made, w_OD), dense(gone, w_OD), rtol=1e-4, atol=1e-4)


def test_a_magnitude_beside_a_bias_is_refused() -> None:
    biased = Update(random(1, 3, seed=1), random(4, 1, seed=2), None, random(4, seed=3))
    with pytest.raises(InputError, match=r"magnitude .* bias"):
        factors_of("cat", {"a": biased, "b": update(4, 3, 1, 5, scaled=True)}, lambda site: torch.ones(4, 3))


@given(shapes, st.integers(1, 12), st.integers(1, 6), seeds)
def test_a_cut_is_the_best_of_its_rank(shape: tuple[int, int], rank: int, keep: int, seed: int) -> None:
    one = update(*shape, rank, seed)
    shorter, lost = cut(one, keep, None)
    s_K = torch.linalg.svdvals(dense(one))
    best = 0.0 if rank <= keep else float(s_K[keep:].norm())
    assert lost == pytest.approx(best, abs=1e-9) == pytest.approx(float((dense(one) - dense(shorter)).norm()), abs=1e-9)
    assert shorter.a_RD.shape[0] <= max(keep, 1)


# ------------------------------------------------------------------------------------------------------- choosing entries


@given(shapes, st.floats(0.01, 1), seeds)
def test_the_largest_entries_are_kept(shape: tuple[int, int], density: float, seed: int) -> None:
    delta = random(*shape, seed=seed)
    kept = keep_largest(delta, density)
    count = math.ceil(density * delta.numel())
    assert int((kept != 0).sum()) == count
    order = delta.abs().flatten().sort(descending=True).indices[:count]
    naive = torch.zeros(delta.numel(), dtype=delta.dtype)
    naive[order] = delta.flatten()[order]
    assert torch.equal(kept.flatten(), naive)


def test_entries_of_one_size_are_kept_together() -> None:
    delta = torch.tensor([[3.0, -1.0], [1.0, 0.0]])
    assert torch.equal(keep_largest(delta, 0.5), torch.tensor([[3.0, -1.0], [1.0, 0.0]]))
    assert torch.equal(keep_largest(delta, 0.01), torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(keep_largest(torch.zeros(2, 2), 0.5), torch.zeros(2, 2))


def naive_ties(deltas: list[tuple[str, float, Tensor]], total: float, signs: str) -> Tensor:
    """One entry after the other."""
    shape = deltas[0][2].shape
    merged = torch.zeros(shape, dtype=torch.float64)
    for entry in itertools.product(*map(range, shape)):
        values = [(w * float(v[entry]), abs(w)) for _, w, v in deltas]
        mass = sum(v for v, _ in values)
        vote = sum((v > 0) - (v < 0) for v, _ in values) if signs == "frequency" else mass
        sign = 1 if (vote or mass) >= 0 else -1
        agreeing = [(v, w) for v, w in values if v * sign > 0]
        if agreeing:
            merged[entry] = total * sum(v for v, _ in agreeing) / sum(w for _, w in agreeing)
    return merged


@given(shapes, st.integers(1, 5), st.sampled_from(["total", "frequency"]), st.sampled_from([0.2, 0.6, 1.0]), seeds)
def test_ties_elects_signs_like_a_naive_reference(
    shape: tuple[int, int], count: int, signs: str, density: float, seed: int
) -> None:
    weights = [float(w) for w in random(count, seed=seed)]
    one = place([update(*shape, 2, seed + 7 * e) for e in range(count)], weights)
    trimmed = list(Trimmed(triples(one), density))
    torch.testing.assert_close(agree(trimmed, one.total, signs), naive_ties(trimmed, one.total, signs))


@given(shapes, st.integers(2, 5), st.sampled_from(["total", "frequency"]), st.floats(0.1, 0.9), seeds)
def test_ties_at_equal_weights_is_peft_s_on_dense_updates(
    shape: tuple[int, int], count: int, signs: Any, density: float, seed: int
) -> None:
    one = place([update(*shape, 2, seed + 7 * e) for e in range(count)])
    deltas = triples(one)
    kept = int(density * shape[0] * shape[1])
    assume(kept > 0)
    share = kept / (shape[0] * shape[1])  # PEFT rounds down
    theirs = merge_utils.ties([v for _, _, v in deltas], torch.ones(count), density, signs)
    ours = agree(Trimmed(deltas, share), one.total, signs)
    if signs == "frequency":  # where votes tie PEFT says plus, whatever the entries are
        votes = torch.stack([v.sign() for _, _, v in Trimmed(deltas, share)]).sum(0)
        ours, theirs = ours[votes != 0], theirs[votes != 0]
    torch.testing.assert_close(ours, theirs)


@given(shapes, st.integers(1, 4), st.sampled_from(DENSE), seeds, st.permutations(range(4)))
def test_dense_merges_see_updates_and_names_only(
    shape: tuple[int, int], count: int, method: str, seed: int, order: list[int]
) -> None:
    """Another way to write ΔW as a product, and another order of adapters, change nothing."""
    cls: Any = find(method)
    config = cls.Config(density=0.5)
    one = place([update(*shape, 2, seed + 7 * e) for e in range(count)])
    gauge = random(2, 2, seed=seed + 5) + 3 * torch.eye(2, dtype=torch.float64)
    turned = [Update(torch.linalg.inv(gauge) @ p.update.a_RD, p.update.b_OR @ gauge) for p in one.parts]
    shuffled = [triples(place(turned))[e] for e in order if e < count]
    expected = cls.blend(triples(one), one.total, "site", config)
    torch.testing.assert_close(cls.blend(shuffled, one.total, "site", config), expected)


@given(shapes, st.integers(1, 4), st.sampled_from(DENSE), seeds)
@settings(max_examples=25)
def test_at_density_1_nothing_is_dropped(shape: tuple[int, int], count: int, method: str, seed: int) -> None:
    cls: Any = find(method)
    one = place([update(*shape, 2, seed + 7 * e) for e in range(1 if method == "ties" else count)])
    made = cls.blend(triples(one), one.total, "site", cls.Config(density=1.0))
    torch.testing.assert_close(made, dense(linear(one.parts)))


def test_dare_keeps_the_mean_and_the_density() -> None:
    """Over many draws the mean is ΔW, and the share that is kept is the density."""
    delta = random(6, 5, seed=1)
    draws = [next(iter(Dropped([("math", 1.0, delta)], 0.3, f"{seed} site")))[2] for seed in range(4000)]
    stacked = torch.stack(draws)
    error = (stacked.mean(0) - delta).abs() / delta.abs()
    assert float(error.max()) < 5 * math.sqrt((1 / 0.3 - 1) / 4000)  # five standard errors
    assert float((stacked != 0).double().mean()) == pytest.approx(0.3, abs=0.01)
    kept = stacked[0][stacked[0] != 0]
    torch.testing.assert_close(kept, delta[stacked[0] != 0] / 0.3)


def test_dare_draws_by_seed_place_and_name() -> None:
    delta = random(6, 5, seed=1)
    masks = {
        key: next(iter(Dropped([(name, 1.0, delta)], 0.5, place)))[2] != 0
        for key, (name, place) in {"one": ("math", "0 q"), "other name": ("law", "0 q"), "place": ("math", "0 v"),
                                   "seed": ("math", "1 q"), "again": ("math", "0 q")}.items()
    }  # fmt: skip
    assert torch.equal(masks["one"], masks["again"])
    assert not any(torch.equal(masks["one"], masks[key]) for key in ("other name", "place", "seed"))


def test_the_error_in_the_report_is_the_error_there_is(llama: Pico) -> None:
    zoo = recycler.Zoo(llama.zoo)
    names = ["code", "math"]
    short, whole = (recycler.build_router("ties", zoo=zoo, adapters=names, **dial) for dial in ({"rank": 3}, {"energy": 1.0}))
    lost = total = 0.0
    for site, factors in whole.derived[0].sites.items():
        full, cut_ = (f.b_OR.double() @ f.a_RD.double() for f in (factors, short.derived[0].sites[site]))
        lost, total = lost + float((full - cut_).norm()) ** 2, total + float(full.norm()) ** 2
    assert short.report["ties"]["error"] == pytest.approx(math.sqrt(lost / total), rel=1e-3)
    assert short.report["ties"]["error"] > 0.1 and whole.report["ties"]["error"] < 1e-5
    assert short.report["ties"]["ranks"] == [3, 3]


# ------------------------------------------------------------------------------------------------------------------ options


def test_weights_by_name_mean_and_sum() -> None:
    config = merging.MergeConfig
    assert config().mixture(["law", "code"]) == {"code": 0.5, "law": 0.5}
    assert config("sum", 0.3).mixture(["law", "code"]) == {"code": 0.3, "law": 0.3}
    assert config(" law = -2, code=0", 0.5).mixture(["law", "code", "math"]) == {"law": -1.0}
    with pytest.raises(UsageError, match="weights name poem"):
        config("poem=1").mixture(["law"])


@pytest.mark.parametrize(
    "weights", ["", "law", "law=", "law=x", "law=nan", "law=inf", "law=1,law=2", "=1", "law=1,", "law=0", "median"]
)
def test_weights_that_cannot_be_read(weights: str) -> None:
    with pytest.raises(UsageError, match="weights="):
        merging.MergeConfig(weights)


@pytest.mark.parametrize("option, value", [("scale", 0), ("scale", math.nan), ("rank", 0), ("energy", 1.5)])
@pytest.mark.parametrize("method", ["svd", *DENSE])
def test_options_that_make_no_merge(method: str, option: str, value: float) -> None:
    with pytest.raises(UsageError):
        find(method).Config(**{option: value})


@pytest.mark.parametrize("density", [0, -0.1, 1.1, math.nan])
@pytest.mark.parametrize("method", DENSE)
def test_densities_that_keep_nothing_or_more_than_all(method: str, density: float) -> None:
    with pytest.raises(UsageError, match="density="):
        find(method).Config(density=density)


def test_an_average_gains_and_loses_an_adapter(llama: Pico) -> None:
    zoo = recycler.Zoo(llama.zoo)
    whole = recycler.build_router("average", zoo=zoo)
    assert isinstance(whole, Average)
    assert whole.without("law").weights_E.tolist() == pytest.approx([1 / 3] * 3)
    named = recycler.build_router("average", zoo=zoo, weights="math=0.5,law=2")
    assert isinstance(named, Average)
    rest = named.without("code")
    assert rest.adapters == ("law", "math", "poem") and rest.weights_E.tolist() == [2.0, 0.5, 0.0]
    with pytest.raises(UsageError, match="no adapter novel"):
        named.without("novel")
    assert dataclasses.asdict(named.config) == {"weights": "math=0.5,law=2", "scale": 1.0}


def test_an_empty_merge_says_so(llama: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find("ties"), "blend", classmethod(lambda cls, deltas, *rest: 0 * next(iter(deltas))[2]))
    with pytest.raises(InputError, match="empty"):
        recycler.build_router("ties", zoo=recycler.Zoo(llama.zoo), adapters=["math"])


def test_an_exported_folder_reads_back(llama: Pico, tmp_path: Path) -> None:
    zoo = recycler.Zoo(llama.zoo)
    router = recycler.build_router("cat", zoo=zoo, out=tmp_path / "router")
    read, _ = formats.read(tmp_path / "router" / "adapters" / "cat", "cat")
    assert read.base and all(
        torch.equal(getattr(read.sites[site], key), getattr(factors, key))
        for site, factors in router.derived[0].sites.items()
        for key in ("a_RD", "b_OR", "magnitude_O")
    )
