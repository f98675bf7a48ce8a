"""General adapters are subtracted exactly, for every kind of adapter, without touching the originals, under any method."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from conftest import Pico
from hypothesis import given
from hypothesis import strategies as st
from pico import make_adapter
from torch import Tensor

import recycler
from recycler.base import load_base
from recycler.build import read_adapters
from recycler.cli import main
from recycler.routed import RoutedModel
from recycler.routers.discovery import load_router
from recycler.scoring import Fitting
from recycler.subtraction import Subtract, subtracted
from recycler.zoo.errors import InputError, UsageError

GENERAL = ("law", "poem")  # rsLoRA and DoRA
LEFT = ("code-minus-law-poem", "math-minus-law-poem")


@torch.no_grad()
def logits(model: RoutedModel) -> Tensor:
    tokens = model.tokenizer(["Add 3 and b.", "Is 14 liable to e?"], return_tensors="pt", padding=True, padding_side="left")
    inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    if model.source.encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[0, 70, 71]] * 2)
        return model(**inputs).logits  # type: ignore[no-any-return]
    return model(**inputs).logits[tokens.attention_mask.bool()]  # type: ignore[no-any-return]


def close(one: Tensor, other: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def test_each_is_itself_less_the_mean_of_the_general_ones(world: Pico, tmp_path: Path) -> None:
    """As the engine mixes the originals: math at 1, each general one at −½, DoRA included; composed, saved, loaded."""
    zoo = recycler.Zoo(world.zoo)
    before = digest(world.zoo / "adapters")
    router = recycler.build_router("uniform", zoo=zoo, subtract=GENERAL, out=tmp_path / "router")
    assert router.adapters == LEFT and digest(world.zoo / "adapters") == before
    model = recycler.compose(zoo, tmp_path / "router", tmp_path / "model")
    loaded = recycler.load(tmp_path / "model")
    base = load_base(str(world.base))
    originals = RoutedModel(base, read_adapters(zoo, ["code", "math", *GENERAL], base))
    for name, left in zip(("code", "math"), LEFT, strict=True):
        with originals.mixture({name: 1.0, "law": -0.5, "poem": -0.5}):
            expected = logits(originals)
        for one in (model, loaded):
            with one.only(left):
                close(logits(one), expected)
    assert loaded.adapters[1].source == "math − mean of law, poem"
    assert load_router(tmp_path / "router").facts["derived"][LEFT[0]]["of"] == ["code", "law", "poem"]


@given(st.integers(0, 1000))
def test_it_does_not_see_how_an_update_is_written(llama: Pico, seed: int) -> None:
    """ΔW of what comes out is the difference of the dense updates, whatever the factors; with compat it is not."""
    base = load_base(str(llama.base))
    zoo = recycler.Zoo(llama.zoo)
    adapters = read_adapters(zoo, ["code", "law", "math"], base)
    generator = torch.Generator().manual_seed(seed)
    turned = []
    for adapter in adapters:
        sites = {}
        for site, factors in adapter.sites.items():
            gauge = torch.randn(factors.rank, factors.rank, generator=generator) + 3 * torch.eye(factors.rank)
            new = type(factors)(torch.linalg.inv(gauge) @ factors.a_RD, factors.b_OR @ gauge)
            sites[site] = new
        turned.append(type(adapter)(adapter.name, sites))
    made = [_made(base, some, Subtract(("law", "math"))) for some in (adapters, turned)]
    for site, one in made[0].items():
        torch.testing.assert_close(one, made[1][site], rtol=1e-3, atol=1e-3)
        dense = [a.sites[site].b_OR @ a.sites[site].a_RD if site in a.sites else torch.zeros_like(one) for a in adapters]
        torch.testing.assert_close(one, dense[0] - (dense[1] + dense[2]) / 2, rtol=1e-4, atol=1e-4)


def _made(base: recycler.base.Base, adapters: list[recycler.zoo.Adapter], subtract: Subtract) -> dict[str, Tensor]:
    model = RoutedModel(base, adapters)
    try:
        [adapter] = subtracted(Fitting(model), subtract)
    finally:
        model.engine.detach()
    return {site: factors.b_OR @ factors.a_RD for site, factors in adapter.sites.items()}


def test_what_is_left_of_itself_is_nothing(llama: Pico, tmp_path: Path) -> None:
    """A copy of the general adapter loses everything; again and again the same comes out."""
    zoo = recycler.Zoo(tmp_path / "zoo")
    for name in ("math", "general"):
        recycler.fetch([llama.adapters["math"]], base=llama.base, zoo=zoo, names=[name]).raise_for_failures()
    router = recycler.build_router("uniform", zoo=zoo, subtract=["general"])
    model = recycler.compose(zoo, router)
    with model.disabled():
        bare = logits(model)
    close(logits(model), bare)
    again = recycler.build_router("uniform", zoo=zoo, subtract=["general"])
    for site, factors in router.derived[0].sites.items():
        assert torch.equal(factors.b_OR, again.derived[0].sites[site].b_OR)


def test_a_router_with_a_profile_learns_on_what_is_left(llama: Pico, tmp_path: Path) -> None:
    """Own tasks stay whose they are; the general ones need no scores."""
    zoo = recycler.Zoo(llama.zoo)
    shots = recycler.Shots.from_files(*llama.tasks)
    profile = recycler.profile(
        zoo, shots, kshot=4, dtype="float32", adapters=["code", "math"], assign={"code": "code", "math": "math"}
    )
    router = recycler.build_router("ridge", profile, zoo=zoo, subtract=GENERAL)
    assert router.adapters == LEFT
    assert router.facts["profile"]["own"] == {LEFT[0]: ["code"], LEFT[1]: ["math"]}
    assert set(router.facts["hashes"]) == {"code", "math", *GENERAL}
    assert profile.adapters == ("code", "math")
    result = recycler.evaluate(recycler.compose(zoo, router), recycler.Shots({"math": shots["math"][:2]}), max_new_tokens=2)
    assert result.chosen["oracle"]["math"] == {"adapter": LEFT[1], "how": "by profile"}


def test_a_merge_of_what_is_left(llama: Pico) -> None:
    """A method that makes adapters itself makes them of these."""
    zoo = recycler.Zoo(llama.zoo)
    router = recycler.build_router("cat", zoo=zoo, subtract=["law"], adapters=["code", "math"], weights="sum")
    assert router.adapters == ("cat",)
    assert router.facts["derived"]["cat"]["of"] == ["code", "law", "math"]
    model = recycler.compose(zoo, router)
    base = load_base(str(llama.base))
    originals = RoutedModel(base, read_adapters(zoo, ["code", "law", "math"], base))
    with originals.mixture({"code": 1.0, "math": 1.0, "law": -2.0}):
        close(logits(model), logits(originals))


def test_a_cut_says_what_it_lost(llama: Pico) -> None:
    zoo = recycler.Zoo(llama.zoo)
    whole = recycler.build_router("uniform", zoo=zoo, subtract=["law"], adapters=["math"])
    short = recycler.build_router("uniform", zoo=zoo, subtract=Subtract(("law",), rank=2), adapters=["math"])
    [one], [other] = whole.derived, short.derived
    assert one.ranks == (4, 6) and other.ranks == (2,)
    lost = total = 0.0
    for site, factors in one.sites.items():
        full = factors.b_OR.double() @ factors.a_RD.double()
        lost += float((full - other.sites[site].b_OR.double() @ other.sites[site].a_RD.double()).norm()) ** 2
        total += float(full.norm()) ** 2
    report = short.report["math-minus-law"]
    assert report["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-3) and report["error"] > 0.01
    assert whole.report["math-minus-law"]["error"] == 0


def test_compat_subtracts_factors_as_the_paper_s_code_does(llama: Pico, tmp_path: Path) -> None:
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    folders = [make_adapter(llama.base, name, options, tmp_path) for name in ("one", "en", "fr")]
    zoo = recycler.Zoo(tmp_path / "zoo")
    recycler.fetch(folders, base=llama.base, zoo=zoo).raise_for_failures()
    router = recycler.build_router("arrow", zoo=zoo, subtract=Subtract(("en", "fr"), compat=True))
    site = "model.layers.0.self_attn.q_proj"
    one, en, fr = (zoo[name].sites[site] for name in ("one", "en", "fr"))
    made = router.derived[0].sites[site]
    torch.testing.assert_close(made.a_RD, one.a_RD - (en.a_RD + fr.a_RD) / 2)
    torch.testing.assert_close(made.b_OR, one.b_OR - (en.b_OR + fr.b_OR) / 2)
    exact = recycler.build_router("arrow", zoo=zoo, subtract=["en", "fr"]).derived[0].sites[site]
    assert (made.b_OR @ made.a_RD - exact.b_OR @ exact.a_RD).norm() > 0.5 * (exact.b_OR @ exact.a_RD).norm()
    with pytest.raises(InputError, match="different ranks"):
        recycler.build_router("arrow", zoo=recycler.Zoo(llama.zoo), subtract=Subtract(GENERAL, compat=True))


def test_what_cannot_be_subtracted(llama: Pico) -> None:
    zoo = recycler.Zoo(llama.zoo)
    for wrong in ((), ("law", "law")):
        with pytest.raises(UsageError, match="not clear"):
            recycler.build_router("arrow", zoo=zoo, subtract=wrong)
    with pytest.raises(UsageError, match="novel"):
        recycler.build_router("arrow", zoo=zoo, subtract=["novel"])
    with pytest.raises(UsageError, match="No adapters were chosen"):
        recycler.build_router("arrow", zoo=zoo, adapters=["law"], subtract=["law"])
    with pytest.raises(UsageError, match="rank of 0"):
        Subtract(("law",), rank=0)
    assert Subtract(("d", "c", "b", "a")).name("x") == "x-minus-4"


def test_the_command(llama: Pico, tmp_path: Path) -> None:
    from click.testing import CliRunner

    common = ["build-router", "arrow", "--zoo", str(llama.zoo), "--out", str(tmp_path / "router")]
    done = CliRunner().invoke(main, [*common, "--subtract", "law,poem", "--subtract-rank", "4"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert load_router(tmp_path / "router").adapters == LEFT
    alone = CliRunner().invoke(main, [*common, "--force", "--subtract-rank", "4"])
    assert alone.exit_code == 2
