"""X-LoRA's classifier: closed form, means of shots, training; its own checkpoints; gates from shots for PHATGOOSE too."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import recycler
from recycler.base import load_base
from recycler.build import read_adapters
from recycler.profiles import Profile
from recycler.routed import RoutedModel
from recycler.routers import xlora_checkpoint
from recycler.routers.initial import directions, temperature
from recycler.routers.phatgoose import Phatgoose, PhatgooseConfig
from recycler.routers.xlora import XLora, XLoraConfig
from recycler.scoring import Fitting
from recycler.zoo.errors import InputError, UsageError

NAMES = ("code", "law", "math", "poem")


def profile(pico: Pico, names: tuple[str, ...] = NAMES) -> Profile:
    shots = recycler.Shots.from_files(*pico.tasks).sample(4)
    return Profile(names, shots, torch.ones(len(names) + 1, len(shots), 4), assigned={name: (name,) for name in names})


def fitting(pico: Pico, names: tuple[str, ...] = NAMES) -> Fitting:
    base = load_base(str(pico.base))
    return Fitting(RoutedModel(base, read_adapters(recycler.Zoo(pico.zoo), names, base)))


def fit(pico: Pico, names: tuple[str, ...] = NAMES, **config: Any) -> XLora:
    return XLora.fit(fitting(pico, names), profile(pico, names), XLoraConfig(**config))


def states(pico: Pico) -> tuple[Tensor, Tensor]:
    """(LN of the bare base's states, whose shot) of every token of the single shots, one row at a time."""
    model = fitting(pico)
    rows, owners = [], []
    for number, name in enumerate(NAMES):
        for shot in profile(pico).shots[name]:
            h_BTH, mask_BT = model.states(model.encode([[shot]]).inputs)
            rows.append(torch.nn.functional.layer_norm(h_BTH[mask_BT], (model.width,)))
            owners.append(torch.full((len(rows[-1]),), number))
    return torch.cat(rows), torch.cat(owners)


# ------------------------------------------------------------------------------------------------------------ where it starts


def test_the_closed_form_is_the_least_squares_solution(world: Pico) -> None:
    router = fit(world, chains=0, ridge=3.0, sharpness=5.0)
    x_NH, label_N = states(world)
    tokens_E = label_N.bincount().double()
    root_N1 = (tokens_E.mean() / tokens_E[label_N]).sqrt().sqrt()[:, None]  # squared again by least squares
    x = torch.cat([x_NH, torch.ones(len(x_NH), 1)], 1).double() * root_N1
    y = torch.nn.functional.one_hot(label_N).double() * root_N1
    penalty = 3.0**0.5 * torch.eye(x.shape[1]).double()
    w = torch.linalg.lstsq(torch.cat([x, penalty]), torch.cat([y, torch.zeros(x.shape[1], 4).double()])).solution * 5.0
    weight, bias = router.heads["all"]
    torch.testing.assert_close(weight, w[:-1].T.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bias, w[-1].float(), rtol=1e-3, atol=1e-3)


def test_means_of_shots(world: Pico) -> None:
    """Rows are parallel to mean − mean of means; the first choice gets about half."""
    router = fit(world, init="shots", chains=0)
    x_NH, label_N = states(world)
    mean_EH = torch.stack([x_NH[label_N == e].mean(0) for e in range(4)])
    weight, bias = router.heads["all"]
    expected = torch.nn.functional.normalize(mean_EH - mean_EH.mean(0), dim=1)
    torch.testing.assert_close(torch.nn.functional.normalize(weight, dim=1), expected, rtol=1e-3, atol=1e-4)
    assert not bias.any()
    assert abs(float((x_NH @ weight.T).softmax(-1).amax(-1).mean()) - 0.5) < 0.02


@given(st.integers(3, 6), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_the_temperature_gives_the_first_choice_half(count: int, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    scores_NE = torch.randn(64, count) * scale
    assert abs(float((scores_NE / temperature(scores_NE)).softmax(-1).amax(-1).mean()) - 0.5) < 1e-3


def test_scores_that_tell_nothing_keep_their_temperature() -> None:
    assert temperature(torch.ones(5, 1)) == 1.0
    assert temperature(torch.ones(5, 4)) == 1.0
    pair = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))  # of two, the first choice has half at least
    assert abs(float((pair / temperature(pair)).softmax(-1).amax(-1).mean()) - 0.75) < 1e-3


def test_adapters_without_shots_have_no_direction() -> None:
    v_ED = directions(torch.tensor([[4.0, 0.0], [0.0, 0.0], [0.0, 2.0]]), torch.tensor([4.0, 0.0, 1.0]))
    assert not v_ED[1].any()
    torch.testing.assert_close(v_ED[0], torch.nn.functional.normalize(torch.tensor([0.5, -1.0]), dim=0))
    assert not directions(torch.tensor([[3.0, 1.0]]), torch.tensor([3.0])).any()


@pytest.mark.parametrize("init", ["ridge", "shots"])
def test_adapters_without_shots_are_never_chosen(llama: Pico, init: Any) -> None:
    model = fitting(llama)
    some = replace(profile(llama), assigned={name: (name,) for name in NAMES if name != "law"})
    for steps in (0, 2):
        router = XLora.fit(model, some, XLoraConfig(init=init, top_k=None, steps=steps))
        assert router.report["without_shots"] == ["law"]
        model.model.use(router)
        share = model.model.weights_for({"input_ids": torch.tensor([[5, 6, 7, 8]])}).share()
        assert share[0, NAMES.index("law")] == 0 and abs(float(share.sum()) - 1) < 1e-4
        model.model.use(None)


# ------------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("options", [{}, {"layerwise": True}, {"depth": 2, "size": 16}, {"top_k": 2}, {"frozen": True}])
def test_training_lowers_the_loss_of_the_shots(world: Pico, options: dict[str, Any]) -> None:
    given = {"init": "random", "lr": 3e-2, "rows": 100, "dropout": 0.0, "chains": 4, **options}
    model, shots = fitting(world), profile(world)
    router = XLora.fit(model, shots, XLoraConfig(**given, steps=12))
    assert router.report["loss"]["last"] < router.report["loss"]["first"]
    first = XLora.fit(model, shots, XLoraConfig(**given, steps=1))
    for name, (weight, bias) in router.heads.items():
        assert not torch.equal(weight, first.heads[name][0]) and not torch.equal(bias, first.heads[name][1])
    assert all(not torch.equal(a, b) for (a, _), (b, _) in zip(router.trunk, first.trunk, strict=True))


def test_training_goes_on_from_the_closed_form(llama: Pico) -> None:
    start, trained = fit(llama), fit(llama, steps=1, lr=1e-4)
    torch.testing.assert_close(start.heads["all"][0], trained.heads["all"][0], rtol=0, atol=2e-4)
    assert not torch.equal(start.heads["all"][0], trained.heads["all"][0])


def test_a_random_start_does_not_depend_on_how_adapters_are_numbered(llama: Pico) -> None:
    order = ("poem", "math", "code", "law")
    options: dict[str, Any] = {"init": "random", "steps": 1, "depth": 2, "size": 8, "dropout": 0.0}
    one, other = fit(llama, NAMES, **options), fit(llama, order, **options)
    columns = [order.index(name) for name in NAMES]
    torch.testing.assert_close(one.heads["all"][0], other.heads["all"][0][columns], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one.trunk[0][0], other.trunk[0][0], rtol=1e-3, atol=1e-4)


def test_layerwise_has_a_head_for_each_group(llama: Pico) -> None:
    model = fitting(llama)
    router = XLora.fit(model, profile(llama), XLoraConfig(layerwise=True, init="random", steps=2, lr=0.1))
    assert set(router.heads) == {group.name for group in model.groups}
    model.model.use(router)
    fired = model.model.weights_for({"input_ids": torch.tensor([[5, 6, 7, 8]])}).sites
    layer = "model.layers.1."
    assert torch.equal(fired[layer + "self_attn.q_proj"], fired[layer + "self_attn.v_proj"])
    assert not torch.equal(fired[layer + "self_attn.q_proj"], fired[layer + "mlp.up_proj"])


def test_the_largest_weights_stay_as_the_softmax_gave_them(llama: Pico) -> None:
    """PEFT's top-k: no renormalisation; ours, by default, does."""
    router = fit(llama)
    scores = torch.randn(2, 3, 1, 4)
    every = scores.softmax(-1)
    kept = replace(router.config, top_k=2, renormalise=False).weights(scores)
    assert torch.equal((kept > 0).sum(-1), torch.full((2, 3, 1), 2))
    torch.testing.assert_close(kept[kept > 0], every[kept > 0])


def test_an_adapter_is_taken_out(llama: Pico) -> None:
    whole = fit(llama, layerwise=True)
    rest = whole.without("law")
    assert rest.adapters == ("code", "math", "poem")
    for name, (weight, bias) in rest.heads.items():
        assert torch.equal(weight, whole.heads[name][0][[0, 2, 3]]) and torch.equal(bias, whole.heads[name][1][[0, 2, 3]])
    with pytest.raises(UsageError, match="no adapter law"):
        rest.without("law")


def test_prompt_and_answer_at_once_are_scored_as_they_are_generated(llama: Pico) -> None:
    """Frozen, the decision sees the prompt alone; token-wise, every token decides for itself."""
    model = fitting(llama)
    shots = profile(llama)
    row = [[shots.shots["law"][0]]]
    for frozen in (False, True):
        model.model.use(XLora.fit(model, shots, XLoraConfig(frozen=frozen)))
        batch = model.encode(row)
        whole = recycler.scoring.nll(model.model, batch, None)
        prompt = model.prompts(row)
        answer = batch.inputs["input_ids"][:, prompt["input_ids"].shape[1] :]
        with torch.no_grad(), model.model.planned(prompt):
            cache = model.model.base(**prompt, use_cache=True)
            logits = [cache.logits[:, -1]]
            for t in range(answer.shape[1]):
                step = model.model.base(input_ids=answer[:, t : t + 1], past_key_values=cache.past_key_values, use_cache=True)
                logits.append(step.logits[:, -1])
        labels = batch.labels_BT[batch.labels_BT != -100]
        loss = torch.nn.functional.cross_entropy(torch.cat(logits), labels, reduction="none")
        torch.testing.assert_close(whole[batch.labels_BT != -100], loss, rtol=1e-4, atol=1e-4)
        model.model.use(None)


@pytest.mark.parametrize(
    "given, says",
    [
        ({"depth": 0}, "depth=0"), ({"steps": -1}, "steps=-1"), ({"size": 0}, "size=0"), ({"rows": 0}, "rows=0"),
        ({"ridge": 0.0}, "ridge=0.0"), ({"sharpness": math.inf}, "sharpness=inf"), ({"lr": -1.0}, "lr=-1.0"),
        ({"dropout": 1.0}, "dropout=1.0"), ({"depth": 2}, "init=ridge with depth=2"), ({"init": "random"}, "steps=0"),
        ({"chains": -1}, "chains=-1"), ({"top_k": 0}, "top_k=0"),
    ],
)  # fmt: skip
def test_options_that_make_no_classifier(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        XLoraConfig(**given)


def test_a_gate_without_states_says_so(llama: Pico) -> None:
    model, router = fitting(llama), fit(llama)
    with pytest.raises(UsageError, match="bare base's states"):
        router.score(model.groups[0], model.groups[0].name, torch.zeros(1, 2, model.groups[0].width))
    layerwise = fit(llama, layerwise=True)
    layerwise.heads = {"elsewhere": next(iter(layerwise.heads.values()))}
    with pytest.raises(InputError, match="no head"):
        layerwise.gate(model.groups[0])


# ---------------------------------------------------------------------------------------------------------------- checkpoints


def checkpoint(folder: Path, layers: dict[str, Tensor] | None = None, **said: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"adapters": {name: name for name in NAMES}, "xlora_depth": 1, **said}
    (folder / "xlora_config.json").write_text(json.dumps(config))
    save_file(
        layers or {"layers.0.weight": torch.randn(4, 32), "layers.0.bias": torch.randn(4)},
        folder / "xlora_classifier.safetensors",
    )
    return folder


def read(folder: Path, sites: tuple[str, ...] = ("a", "b")) -> xlora_checkpoint.Taken:
    return xlora_checkpoint.read(folder, NAMES, sites, 32)


def test_sites_are_in_the_order_of_the_bases_modules(llama: Pico, tmp_path: Path) -> None:
    """Outputs of a layerwise classifier are sites × adapters, as PEFT walks the base; columns as the configuration lists them."""
    model = fitting(llama)
    order = [name for name, _ in model.model.base.named_modules() if name in model.sites]
    assert list(model.sites) == order and len(order) == len(model.model.sites)
    weight, bias = torch.randn(len(order) * 4, 32), torch.randn(len(order) * 4)
    listed = ("poem", "code", "math", "law")
    folder = checkpoint(
        tmp_path / "c",
        {"layers.0.weight": weight, "layers.0.bias": bias},
        layerwise_scalings=True,
        adapters=dict.fromkeys(listed),
    )
    router = XLora.fit(model, None, XLoraConfig(checkpoint=str(folder), policy="top_p"))
    assert router.config.policy == "top_k" and router.config.checkpoint == "c"  # its settings come with it
    for number, site in enumerate(order):
        for e, name in enumerate(NAMES):
            assert torch.equal(router.heads[site][0][e], weight[number * 4 + listed.index(name)])
            assert router.heads[site][1][e] == bias[number * 4 + listed.index(name)]


def test_the_packages_names_and_missing_biases(tmp_path: Path) -> None:
    layers = {"inner.0.weight": torch.randn(8, 32), "inner.0.bias": torch.randn(8), "last.weight": torch.randn(4, 8)}
    taken = read(checkpoint(tmp_path / "c", layers, xlora_depth=2, softmax_temperature=0.5, top_k_lora=3))
    assert torch.equal(taken.trunk[0][0], layers["inner.0.weight"]) and torch.equal(
        taken.heads["all"][0], layers["last.weight"]
    )
    assert not taken.heads["all"][1].any()
    settings = {"temperature": 0.5, "top_k": 3, "renormalise": False, "depth": 2, "size": 8, "layerwise": False}
    assert settings.items() <= taken.settings.items() and taken.settings["checkpoint"] == "c"


@pytest.mark.parametrize(
    "said, says",
    [
        ({"enable_softmax_topk": True, "top_k_lora": 2}, "softmax of a softmax"),
        ({"enable_softmax": False}, "raw scores"),
        ({"enable_softmax": False, "enable_softmax_topk": True}, "without top_k_lora"),
        ({"scaling_pass_value": 0.5}, "not the bare base"),
        ({"global_scaling_weight": 2.0}, "multiplies all updates"),
        ({"peft_type": "LORA"}, "a checkpoint of LORA"),
        ({"xlora_depth": 2}, "1 of the classifier's 2 layers"),
        ({"layerwise_scalings": True}, "does not fit"),
    ],
)
def test_what_cannot_be_taken_over_is_refused_by_name(tmp_path: Path, said: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        read(checkpoint(tmp_path / "c", **said))
    assert says in f"{caught.value.what} {caught.value.why}"


def test_other_adapters_other_widths_and_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="classifier over a, b; the model holds code"):
        read(checkpoint(tmp_path / "c", adapters={"a": "", "b": ""}))
    with pytest.raises(InputError, match="does not fit"):
        read(checkpoint(tmp_path / "c", {"layers.0.weight": torch.randn(4, 16), "layers.0.bias": torch.randn(4)}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no X-LoRA checkpoint"):
        read(tmp_path / "empty")
    (tmp_path / "empty" / "xlora_classifier.pt").write_bytes(b"cposix\nsystem\n")
    with pytest.raises(InputError, match="no X-LoRA checkpoint") as caught:
        read(tmp_path / "empty")
    assert "pickle" in caught.value.why
    checkpoint(tmp_path / "c")
    (tmp_path / "c" / "xlora_classifier.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "c")


# ------------------------------------------------------------------------------------------------- gates of PHATGOOSE from shots


def goose(pico: Pico, names: tuple[str, ...] = NAMES, **config: Any) -> Phatgoose:
    return Phatgoose.fit(fitting(pico, names), profile(pico, names), PhatgooseConfig(**config))


def test_untrained_gates_are_mean_inputs_at_their_temperature(world: Pico) -> None:
    router = goose(world, init="shots", steps=0)
    model = fitting(world)
    seen: dict[str, list[tuple[int, Tensor]]] = {group.name: [] for group in model.groups}
    for number, name in enumerate(NAMES):
        for shot in profile(world).shots[name]:
            batch = model.encode([[shot]])

            def weights(group: Any, x: Tensor, number: int = number, batch: Any = batch) -> Tensor:
                x = torch.nn.functional.layer_norm(x[batch.mask_BT[group.stream]], (group.width,))
                seen[group.name].append((number, x))
                return torch.eye(4)[number].expand(1, 1, 1, 4)

            model.observe(batch, weights)
    for group in model.groups:
        mean_ED = torch.stack([torch.cat([x for e, x in seen[group.name] if e == number]).mean(0) for number in range(4)])
        expected = torch.nn.functional.normalize(mean_ED - mean_ED.mean(0), dim=1)
        x_ND = torch.cat([x for _, x in seen[group.name]])
        for site in group.sites:
            rows = router.rows[site]
            assert rows.offset_E is not None
            present = [e for e, name in enumerate(NAMES) if name in model.factors(site)]
            assert (rows.offset_E == 0).nonzero().flatten().tolist() == present
            found = torch.nn.functional.normalize(rows.v_ED, dim=1)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
            sure = float((x_ND @ rows.v_ED[present].T).softmax(-1).amax(-1).mean())
            if len(present) > 1:
                assert abs(sure - (0.5 if len(present) > 2 else 0.75)) < 0.03, site


def test_trained_gates_may_start_from_shots(llama: Pico) -> None:
    one, other = goose(llama, init="shots", steps=2), goose(llama, steps=2)
    assert one.report["loss"]["first"] != other.report["loss"]["first"]
    site = next(iter(one.rows))
    assert not torch.equal(one.rows[site].v_ED, other.rows[site].v_ED)


def test_a_gate_is_added_and_the_others_stay(world: Pico) -> None:
    small = goose(world, ("code", "law", "math"), steps=3)
    shots = recycler.Shots({"poem": profile(world).shots["poem"]})
    alone = Profile(("poem",), shots, torch.ones(2, 1, 4), assigned={"poem": ("poem",)})
    model = fitting(world)
    grown = small.extended(model, alone, "poem")
    assert grown.adapters == NAMES
    for group in model.groups:
        for site in group.sites:
            offset_E = grown.rows[site].offset_E
            assert offset_E is not None
            assert (offset_E[3] == 0) == ("poem" in model.factors(site))
            if site in small.rows:
                assert torch.equal(grown.rows[site].v_ED[:3], small.rows[site].v_ED)
                assert torch.equal(offset_E[:3], small.rows[site].offset_E)
            else:
                assert torch.isinf(offset_E[:3]).all()
            if offset_E[3] == 0:
                assert grown.rows[site].v_ED[3].any()
    model.model.use(grown)
    assert set(model.model.weights_for({"input_ids": torch.tensor([[5, 6, 7]])}).sites) == set(model.model.sites)
    rest = grown.without("poem")
    assert rest.adapters == small.adapters
    assert all(torch.equal(rest.rows[site].v_ED, rows.v_ED) for site, rows in small.rows.items())


def test_gates_that_cannot_grow(llama: Pico) -> None:
    small = goose(llama, ("code", "law", "math"), init="shots", steps=0)
    with pytest.raises(UsageError, match="what sets each adapter's shots apart"):
        small.extended(fitting(llama), profile(llama), "poem")
    with pytest.raises(UsageError, match="The model's adapters are"):
        goose(llama, ("code", "math"), steps=1).extended(fitting(llama), profile(llama), "poem")
    with pytest.raises(UsageError, match="no adapter poem"):
        small.without("poem")


@pytest.mark.parametrize("given", [{"steps": 0}, {"steps": -1}, {"lr": math.inf}, {"rows": 0}, {"tokens": 0}])
def test_options_that_make_no_gates(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        PhatgooseConfig(**given)
