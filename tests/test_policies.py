"""Every policy with every method: what routers promise holds whichever is chosen; thresholds are found; ranks are experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import Pico
from test_conformance import FAST, TEXTS, close, inputs, logits, profile_of
from torch import Tensor
from way import never

import recycler
from recycler.base import load_base
from recycler.build import read_adapters
from recycler.cli import main
from recycler.routed import RoutedModel
from recycler.routers import calibration
from recycler.routers.base import Router
from recycler.routers.discovery import load_router, methods
from recycler.routers.protocol import own_shots
from recycler.routers.select import Policy
from recycler.scoring import Fitting
from recycler.updating import add_adapter
from recycler.zoo.errors import InputError, UsageError

METHODS = sorted(name for name, cls in methods().items() if issubclass(cls.Config, Policy) and cls.granularity == "token")
POLICIES: dict[str, dict[str, Any]] = {
    "top_p": {"policy": "top_p", "p": 0.6, "renormalise": False},
    "null": {"policy": "null"},
    "tsallis": {"policy": "tsallis", "entropy": 0.7, "top_k": 1},
    "dials": {"top_k": "1,3", "standardise": 1.5, "renormalise": False, "shared": True},
    "ranks": {"ranks": 3},
}
_ROUTERS: dict[Any, Router] = {}


def router_of(world: Pico, method: str, **options: Any) -> Router:
    key = (world.kind, method, str(options))
    if key not in _ROUTERS:
        config = {**FAST.get(method, {}), **options}
        _ROUTERS[key] = recycler.build_router(method, profile_of(world), zoo=recycler.Zoo(world.zoo), **config)
    return _ROUTERS[key]


def routed(world: Pico, method: str, **options: Any) -> RoutedModel:
    return recycler.compose(recycler.Zoo(world.zoo), router_of(world, method, **options))


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=sorted(POLICIES))
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return POLICIES[str(request.param)]


# --------------------------------------------------------------------------------------------------- what routers promise


def test_weights_are_a_mixture(llama: Pico, method: str, options: dict[str, Any]) -> None:
    model = routed(llama, method, **options)
    assert model.router is not None and model.router.abstains == model.router.config.abstains
    for w_BTE in model.weights_for(inputs(model, TEXTS)).sites.values():
        assert torch.isfinite(w_BTE).all() and (w_BTE >= 0).all() and (w_BTE.sum(-1) <= 1 + 1e-5).all()


def test_a_batch_is_its_rows(llama: Pico, method: str, options: dict[str, Any]) -> None:
    model = routed(llama, method, **options)
    alone = [logits(model, [text])[0] for text in TEXTS]
    close(logits(model, TEXTS, "left"), alone, 1e-4)
    close(logits(model, TEXTS, "right"), alone, 1e-4)


@torch.no_grad()
def test_a_kv_cache_changes_nothing(llama: Pico, method: str, options: dict[str, Any]) -> None:
    model = routed(llama, method, **options)
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "output_logits": True}
    batch = inputs(model, TEXTS)
    cached, plain = (model.generate(**batch, **how, return_dict_in_generate=True, use_cache=c) for c in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    close(list(cached.logits), list(plain.logits), 1e-4)


def test_saved_and_loaded_is_bit_identical(llama: Pico, method: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = routed(llama, method, **options)
    model.save_pretrained(tmp_path / "model")
    loaded = recycler.load(tmp_path / "model")
    assert loaded.router is not None and model.router is not None
    assert loaded.router.thresholds == model.router.thresholds and loaded.router.config == model.router.config
    for a, b in zip(logits(model, TEXTS), logits(loaded, TEXTS), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["arrow", "ridge", "phatgoose"])
def test_gate_and_policy_are_one_graph(llama: Pico, name: str, options: dict[str, Any]) -> None:
    router = router_of(llama, name, **options)
    group = routed(llama, name, **options).engine.groups[0]
    gate = router.gate(group)
    assert gate is not None
    torch.compiler.reset()
    compiled = torch.compile(lambda x_BTD: router.weights(gate(x_BTD), group), fullgraph=True, backend="aot_eager")
    x_BTD = torch.randn(2, 3, group.width)
    torch.testing.assert_close(compiled(x_BTD), router.weights(gate(x_BTD), group))


@pytest.mark.parametrize("options", [{"policy": "null"}, {"ranks": 2}], ids=["null", "ranks"])
def test_on_encoder_decoders_too(t5: Pico, options: dict[str, Any]) -> None:
    model = routed(t5, "ridge", **options)
    close(logits(model, TEXTS), [logits(model, [text])[0] for text in TEXTS], 1e-4)
    if "policy" in options:
        assert model.router is not None and len(model.router.thresholds) == len(model.engine.groups)


# -------------------------------------------------------------------------------------------------------------- thresholds


def by_hand(world: Pico, router: Router, quantile: float) -> dict[str, float]:
    """Token by token, with a model of three adapters in place of a mask where a mask is not needed."""
    base = load_base(str(world.base))
    model = RoutedModel(base, read_adapters(recycler.Zoo(world.zoo), router.adapters, base))
    fitting = Fitting(model)
    best: dict[str, dict[int, list[float]]] = {group.name: {} for group in fitting.groups}
    for e, shot in own_shots(fitting, profile_of(world)):
        batch = fitting.encode([[shot]])

        def look(group: Any, x_BTD: Tensor, e: int = e) -> Tensor:
            others = [i for i in range(len(router.adapters)) if i != e]
            rows = []
            for site in group.sites:
                s_TE = router.score(group, site, x_BTD)[0]
                found = s_TE[:, others].max(-1).values
                best[group.name].setdefault(e, []).extend(v for v in found.tolist() if v > float("-inf"))
                s_TE[:, e] = float("-inf")
                rows.append(Policy().weights(s_TE))
            return torch.stack(rows, -2)[None]

        fitting.observe(batch, look)
    mean = {}
    for name, values in best.items():
        each = [torch.tensor(v).double().quantile(quantile) for v in values.values() if v]
        mean[name] = float(torch.stack(each).mean()) if each else float("-inf")
    return mean


@pytest.mark.parametrize("method", ["arrow", "phatgoose"])
def test_a_threshold_is_what_strangers_score(llama: Pico, method: str) -> None:
    router = router_of(llama, method, policy="null", quantile=0.4)
    expected = by_hand(llama, router, 0.4)
    assert router.thresholds.keys() == expected.keys()
    assert router.thresholds == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert router.report["threshold"]["highest"] == pytest.approx(max(expected.values()), abs=1e-3)


def test_more_of_strangers_is_more_of_the_base(llama: Pico) -> None:
    """And −∞ and +∞, by hand, are top-k and the base."""
    share = []
    for quantile in (0.05, 0.5, 0.95):
        model = routed(llama, "phatgoose", policy="null", quantile=quantile)
        share.append(float(model.weights_for(inputs(model, TEXTS)).share().sum()))
    assert share[0] > share[1] > share[2]
    plain, low, high = (
        logits(routed(llama, "phatgoose", **options), TEXTS)
        for options in ({}, {"policy": "null", "threshold": -1e9}, {"policy": "null", "threshold": 1e9})
    )
    close(low, plain, 0)
    close(high, logits(RoutedModel(load_base(str(llama.base)), []), TEXTS), 1e-6)


def test_what_a_threshold_needs(llama: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the base is loaded."""
    monkeypatch.setattr("recycler.build._loaded", lambda *_: never())
    zoo = recycler.Zoo(llama.zoo)
    with pytest.raises(UsageError, match=r"no profile was given.*-o threshold="):
        recycler.build_router("arrow", zoo=zoo, policy="null")
    with pytest.raises(InputError, match="there are none"):
        nobody = profile_of(llama).assign({name: () for name in llama.adapters})
        recycler.build_router("arrow", nobody, zoo=zoo, policy="null")
    sequence = methods()["classifier"]
    with pytest.raises(UsageError, match="once a sequence"):
        calibration.check(sequence, Policy(policy="null"), profile_of(llama))
    calibration.check(sequence, Policy(policy="null", threshold=0.0), None)


def test_thresholds_outlive_a_change_of_adapters(llama: Pico, tmp_path: Path) -> None:
    zoo = recycler.Zoo(llama.zoo)
    small = recycler.build_router(
        "ridge", profile_of(llama), zoo=zoo, adapters=["code", "law", "math"], policy="null", out=tmp_path / "small"
    )
    grown = add_adapter(tmp_path / "small", "poem", profile_of(llama), zoo=zoo, out=tmp_path / "grown")
    assert grown.thresholds == small.thresholds == load_router(tmp_path / "grown").thresholds
    model = recycler.compose(zoo, grown)
    assert all(torch.isfinite(one).all() for one in logits(model, TEXTS))


def test_the_whole_way_by_the_command_line(llama: Pico, tmp_path: Path) -> None:
    where = ["--zoo", str(llama.zoo), "--out", str(tmp_path / "gates")]
    done = CliRunner().invoke(main, ["build-router", "arrow", "-o", "policy=null", *where])
    assert done.exit_code == 2 and "no profile was given" in done.stderr
    profile_of(llama).save(tmp_path / "p4")
    given = ["--profile", str(tmp_path / "p4"), "-o", "policy=null", "-o", "quantile=0.5"]
    done = CliRunner().invoke(main, ["build-router", "arrow", *given, *where])
    assert done.exit_code == 0, done.output
    router = load_router(tmp_path / "gates")
    assert router.abstains and len(router.thresholds) > 4 and "threshold" in router.report


# ------------------------------------------------------------------------------------------------------- rank-wise experts


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_all_ranks_are_the_plain_result(kind: str, request: pytest.FixtureRequest) -> None:
    world: Pico = request.getfixturevalue(kind)
    close(logits(routed(world, "ridge", ranks=999), TEXTS), logits(routed(world, "ridge"), TEXTS), 2e-5)


@torch.no_grad()
def test_the_largest_components_act(llama: Pico) -> None:
    """Against dense SVDs of what each adapter adds, one token at a time, DoRA's scale of the base's output untouched."""
    router = router_of(llama, "ridge", ranks=2)
    base = load_base(str(llama.base))
    adapters = read_adapters(recycler.Zoo(llama.zoo), router.adapters, base)
    model = RoutedModel(base, adapters, router)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        base.model.get_submodule(site).register_forward_hook(
            lambda module, args, output, site=site: seen.__setitem__(site, (args[0], output))
        )
        for site in model.sites
    ]  # after the engine's own
    fired = model.weights_for(inputs(model, TEXTS[:1])).sites
    for handle in handles:
        handle.remove()
    for site in model.sites:
        w_OD = base.model.get_submodule(site).weight.double()
        x_TD, y_TO = (t[0].double() for t in seen[site])
        for t in range(len(x_TD)):
            plain_O = w_OD @ x_TD[t]
            expected_O, parts = plain_O.clone(), []
            for e, adapter in enumerate(adapters):
                if (factors := adapter.sites.get(site)) is None:
                    continue
                weight, delta_OD = float(fired[site][0, t, e]), factors.b_OR.double() @ factors.a_RD.double()
                if factors.magnitude_O is not None:
                    c_O = factors.magnitude_O.double() / (w_OD + delta_OD).norm(dim=1)
                    expected_O += weight * (c_O - 1) * plain_O
                    delta_OD = c_O[:, None] * delta_OD
                u, s, vt = torch.linalg.svd(delta_OD, full_matrices=False)
                parts += [weight * s[r] * (vt[r] @ x_TD[t]) * u[:, r] for r in range(len(s))]
            parts.sort(key=lambda part: -float(part.norm()))
            expected_O += torch.stack(parts[:2]).sum(0)
            torch.testing.assert_close(y_TO[t], expected_O, rtol=1e-3, atol=1e-3 * float(y_TO[t].abs().max()))


def test_other_mixtures_have_all_their_ranks(llama: Pico) -> None:
    limited, plain = routed(llama, "arrow", ranks=1), routed(llama, "arrow")
    with limited.only("code"), plain.only("code"):
        close(logits(limited, TEXTS), logits(plain, TEXTS), 2e-5)
    one = logits(limited, TEXTS)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(one, logits(plain, TEXTS), strict=True))
    limited.use(plain.router)
    close(logits(limited, TEXTS), logits(plain, TEXTS), 2e-5)


def test_ranks_above_a_width(llama: Pico) -> None:
    """An adapter of a rank above the linear's own has as many components as the linear has dimensions."""
    from dataclasses import replace

    base = load_base(str(llama.base))
    (adapter,) = read_adapters(recycler.Zoo(llama.zoo), ["code"], base)
    site = "model.layers.0.self_attn.k_proj"  # 16 × 32
    torch.manual_seed(0)
    large = replace(adapter.sites[site], a_RD=torch.randn(40, 32), b_OR=torch.randn(16, 40) / 20)
    model = RoutedModel(base, [replace(adapter, sites={site: large})])
    (bank,) = model.engine.banks
    with model.only("code"):
        before = logits(model, TEXTS)
        bank.limit(3)
        close(logits(model, TEXTS), before, 2e-5)
    assert bank.stack.a_RD.shape == (40, 32) and not bank.stack.a_RD[16:].any()
