"""How routed sites execute: grouping, hooks, dtypes, compilation, memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Pico
from test_conformance import FAST
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

import recycler
from recycler.base import load_base
from recycler.build import read_adapters
from recycler.engine.attach import Attachment
from recycler.engine.bank import Bank
from recycler.engine.sites import linear_shapes, trace_groups
from recycler.routed import RoutedModel
from recycler.routers.discovery import methods
from recycler.routers.linear import LinearGate, Rows
from recycler.zoo.adapter import Factors
from recycler.zoo.errors import InputError


def make(world: Pico, router: str | None = None, **loading: Any) -> RoutedModel:
    zoo = recycler.Zoo(world.zoo)
    if router is not None:
        return recycler.compose(zoo, recycler.build_router(router, zoo=zoo), **loading)
    base = load_base(str(world.base), **loading)
    return RoutedModel(base, read_adapters(zoo, list(zoo), base))


def test_sites_that_read_one_input_are_one_group(llama: Pico) -> None:
    groups = {g.name.removeprefix("model.layers.1."): g for g in make(llama).engine.groups if "layers.1" in g.name}
    names = {name: tuple(s.rpartition(".")[2] for s in g.sites) for name, g in groups.items()}
    assert names == {
        "self_attn.q_proj": ("q_proj", "k_proj", "v_proj"),
        "self_attn.o_proj": ("o_proj",),
        "mlp.gate_proj": ("gate_proj", "up_proj"),
        "mlp.down_proj": ("down_proj",),
    }
    assert groups["self_attn.o_proj"].after == "model.layers.1.self_attn.q_proj"
    assert groups["mlp.down_proj"].after == "model.layers.1.mlp.gate_proj"
    assert groups["self_attn.q_proj"].after is None and groups["mlp.down_proj"].width == 48


def test_cross_attention_keys_belong_to_the_encoder_stream(t5: Pico) -> None:
    groups = {g.name: g for g in make(t5).engine.groups}
    cross = "decoder.block.0.layer.1.EncDecAttention"
    assert groups[f"{cross}.q"].stream == "target" and groups[f"{cross}.q"].sites == (f"{cross}.q",)
    assert groups[f"{cross}.k"].stream == "input" and groups[f"{cross}.k"].sites == (f"{cross}.k", f"{cross}.v")
    # the attention output sees decoder tokens, so it may follow q and never k
    assert groups[f"{cross}.o"].stream == "target" and groups[f"{cross}.o"].after == f"{cross}.q"


def test_a_site_that_no_forward_reaches_is_refused(llama: Pico) -> None:
    base = load_base(str(llama.base))
    base.model.model.layers[0].unused = torch.nn.Linear(4, 4)
    with pytest.raises(InputError, match=r"does not reach model\.layers\.0\.unused"):
        trace_groups(base.model, ["model.layers.0.unused", "model.layers.0.mlp.up_proj"])


def test_the_base_keeps_its_tree_and_gets_it_back(llama: Pico) -> None:
    base = load_base(str(llama.base))
    before = [name for name, _ in base.model.named_modules()]
    model = RoutedModel(base, read_adapters(recycler.Zoo(llama.zoo), ["math"], base))
    assert [name for name, _ in base.model.named_modules()] == before
    ids = torch.tensor([[5, 6, 7]])
    with model.only("math"):
        routed = base.model(ids).logits
    model.engine.detach()
    assert not torch.equal(base.model(ids).logits, routed)


def test_ranks_are_concatenated_never_padded(llama: Pico) -> None:
    model = make(llama)
    for bank in model.engine.banks:
        held = [f.rank for site in bank.group.sites for f in model.factors[site].values()]
        assert bank.stack.a_RD.shape == (sum(held), bank.group.width)
        assert len(set(held)) > 1 or len(held) < 3


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("method", ["arrow", "uniform"])
def test_no_tensor_of_tokens_by_adapters_by_outputs_exists(method: str, biased: bool) -> None:
    """64 adapters of rank 1 on a wide linear: nothing larger than tokens × max(rank rows + gate rows, 2 d_out), where two is how
    many adapters a token has (paths that sort tokens have each once for each of its adapters)."""
    count, width, tokens = 64, 256, 512
    torch.manual_seed(0)
    base = _OneLinear(width)
    bias_O = torch.randn(width) if biased else None
    factors = {f"a{e:02}": Factors(torch.randn(1, width), torch.randn(width, 1), None, bias_O) for e in range(count)}
    router = methods()[method].fit(_Fit(base, factors), None, methods()[method].Config())
    engine = Attachment(base, {"proj": factors}, list(factors), router, groups=_Fit.groups(width))
    with torch.no_grad(), _Largest() as seen:
        base(torch.randn(1, tokens, width))
    assert seen.numel <= tokens * max(2 * count, 2 * width)
    assert engine.groups[0].width == width


def _mixed(base: _OneLinear, factors: dict[str, Factors], x_BTD: torch.Tensor, w_BTE: torch.Tensor) -> torch.Tensor:
    """What the engine should answer, adapter by adapter, in fp64."""
    weight_OD, x_BTD = base.proj.weight.double(), x_BTD.double()
    plain_BTO = x_BTD @ weight_OD.T
    y_BTO = plain_BTO + base.proj.bias.double()
    for e, update in enumerate(factors.values()):
        delta_OD = update.b_OR.double() @ update.a_RD.double()
        own_BTO = x_BTD @ delta_OD.T
        if update.magnitude_O is not None:
            c_O = update.magnitude_O.double() / (weight_OD + delta_OD).norm(dim=1)
            own_BTO = (c_O - 1) * plain_BTO + c_O * own_BTO
        if update.bias_O is not None:
            own_BTO = own_BTO + update.bias_O.double()
        y_BTO = y_BTO + w_BTE[..., e : e + 1].double() * own_BTO
    return y_BTO


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4)], ids=["one mixture", "one a row", "one a token"])
@pytest.mark.parametrize("flat", [False, True])
@torch.no_grad()
def test_biases_and_magnitudes_are_mixed_with_their_weights(shape: tuple[int, ...], flat: bool) -> None:
    """Of four adapters one is plain, two have a bias of B, and one is a DoRA; the linear has a bias of its own."""
    torch.manual_seed(0)
    base = _OneLinear(16)
    update = [Factors(torch.randn(r, 16), torch.randn(16, r)) for r in (2, 3, 1, 4)]
    factors = {
        "math": update[0],
        "law": replace(update[1], bias_O=torch.randn(16)),
        "poem": replace(update[2], magnitude_O=torch.rand(16) + 1),
        "code": replace(update[3], bias_O=torch.randn(16)),
    }
    group = _Fit.groups(16)
    engine = Attachment(base, {"proj": factors}, list(factors), groups=group)
    x_BTD, w = torch.randn(2, 3, 16), torch.randn(shape)
    w_BTE = w.view(*w.shape[:-1], *[1] * (3 - w.dim()), 4).expand(2, 3, 4)
    with engine.control.set(enabled=False):
        expected = _mixed(base, factors, x_BTD, w_BTE)
    record: dict[str, torch.Tensor] = {}
    if flat and w.dim() < 3:  # a model that flattens its tokens: what is forced has a row for every token, or one for all
        w = w if w.dim() == 1 else w_BTE.reshape(1, 6, 4)
    with engine.control.set(forced=w, record=None if flat else record):
        routed = base(x_BTD.flatten(0, 1) if flat else x_BTD).view(2, 3, 16)
    torch.testing.assert_close(routed.double(), expected, rtol=1e-5, atol=1e-5)
    if not flat:
        torch.testing.assert_close(record["proj"], w_BTE)


def test_a_bias_moves_with_its_model_and_takes_gradients() -> None:
    torch.manual_seed(0)
    base = _OneLinear(16)
    factors = {"math": Factors(torch.randn(2, 16), torch.randn(16, 2), None, torch.randn(16))}
    engine = Attachment(base, {"proj": factors}, ["math"], groups=_Fit.groups(16))
    x, w = torch.randn(1, 3, 16), torch.full((1,), 0.5, requires_grad=True)
    with engine.control.set(forced=w):
        base(x).sum().backward()
    update_BTO = x @ (factors["math"].b_OR @ factors["math"].a_RD).T + factors["math"].bias_O
    assert w.grad is not None
    torch.testing.assert_close(w.grad, update_BTO.sum().view(1))
    half, engine = base.to(torch.bfloat16), engine.to(torch.bfloat16)
    with torch.no_grad(), engine.control.set(forced=w):
        routed = half(x.bfloat16())
        bare = torch.nn.functional.linear(x.bfloat16(), half.proj.weight, half.proj.bias)
    assert routed.dtype == torch.bfloat16
    torch.testing.assert_close((routed - bare).float(), 0.5 * update_BTO.detach(), rtol=5e-2, atol=1e-1)


class _OneLinear(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)  # type: ignore[no-any-return]


class _Fit:
    """The least a data-free router asks of a model."""

    def __init__(self, base: _OneLinear, factors: dict[str, Factors]) -> None:
        self.adapters, self._factors = tuple(factors), factors
        self.groups: Any = _Fit.groups(base.proj.in_features)

    @staticmethod
    def groups(width: int) -> Any:
        from recycler.routers.protocol import Group

        return (Group(("proj",), width),)

    def factors(self, site: str) -> dict[str, Factors]:
        return self._factors

    def map(self, work: Any, items: Any, what: str) -> list[Any]:
        return [work(self, item) for item in items]

    def progress(self, steps: int, what: str) -> Any:
        return lambda count=1, note="": None


def test_gates_stay_fp32_in_a_bf16_model(llama: Pico) -> None:
    model = make(llama, "arrow").to(torch.bfloat16)
    gates = [bank.gate for bank in model.engine.banks]
    assert all(isinstance(gate, LinearGate) and gate.v_ND.dtype == torch.float32 for gate in gates)
    assert all(bank.stack.a_RD.dtype == torch.bfloat16 for bank in model.engine.banks)
    # exactly what they were, not cast down and up again
    fresh = make(llama, "arrow")
    for one, other in zip(model.engine.banks, fresh.engine.banks, strict=True):
        assert torch.equal(one.gate.v_ND, other.gate.v_ND)  # type: ignore[union-attr]
    logits = model(torch.tensor([[5, 6, 7]])).logits
    exact = fresh(torch.tensor([[5, 6, 7]])).logits
    assert logits.dtype == torch.bfloat16 and (logits.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_logits_are_fp32_whatever_comes_in() -> None:
    torch.manual_seed(0)
    rows = [Rows(torch.randn(4, 16))]
    x = torch.randn(1, 3, 16)
    for normalise in (False, True):
        gate = LinearGate(rows, normalise, False)
        assert gate(x.bfloat16()).dtype == torch.float32
        torch.testing.assert_close(gate(x.bfloat16()), gate(x.bfloat16().float()))


def test_inference_mode_and_written_inputs_are_not_confused(llama: Pico) -> None:
    """The shared shrink is reused only for the very same input, unchanged since."""
    model = make(llama)
    bank = next(b for b in model.engine.banks if len(b.group.sites) == 3)
    assert isinstance(bank, Bank)
    x = torch.randn(1, 2, 32)
    with model.mixture({"code": 1.0}), torch.no_grad():
        first = bank.mix(x)[0].h_NR.clone()
        x.mul_(2)
        assert torch.allclose(bank.mix(x)[0].h_NR, 2 * first)
    ids = torch.tensor([[5, 6, 7]])
    with model.only("code"):
        with torch.inference_mode():
            fast = model(ids).logits
        assert torch.equal(fast, model(ids).logits)
    assert all(b._x is None and b._begun is None for b in model.engine.banks), "activations are kept alive"


@pytest.mark.parametrize("method", sorted(methods()))
def test_the_whole_routed_model_compiles_without_a_break(llama: Pico, method: str) -> None:
    zoo = recycler.Zoo(llama.zoo)
    profile = recycler.profile(zoo, recycler.Shots.from_files(*llama.tasks), kshot=2)
    model = recycler.compose(zoo, recycler.build_router(method, profile, zoo=zoo, **FAST.get(method, {})))
    torch._dynamo.reset()
    # The eager backend traces everything that a real one would, without generating code.
    compiled = torch.compile(model.base, fullgraph=True, backend="eager")
    ids = torch.tensor([[5, 6, 7, 8]])
    # What is decided once a sequence is decided before the forward.
    with torch.no_grad(), model.planned({"input_ids": ids}):
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_one_graph_serves_all_lengths_on_the_same_path(llama: Pico) -> None:
    """The chooser's thresholds are the only lengths that a graph looks at."""
    model = make(llama, "arrow")
    torch._dynamo.reset()
    compiled = torch.compile(model.base, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        compiled(torch.randint(5, 90, (1, 40)), use_cache=False)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for tokens in (33, 50, 64):
                ids = torch.randint(5, 90, (1, tokens))
                torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


class _Int8(torch.nn.Module):
    """A quantised linear: int8 weight, a scale, answers in bf16."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = torch.nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ (self.weight.float() * self.scale).T).bfloat16()


def test_a_quantised_linear_is_only_added_to() -> None:
    torch.manual_seed(0)
    base = _OneLinear(16)
    base.proj = _Int8(base.proj)  # type: ignore[assignment]
    kept = base.proj.weight.clone()
    bias_O = torch.randn(16)
    update = Factors(torch.randn(2, 16), torch.randn(16, 2), None, bias_O)
    x = torch.randn(1, 3, 16)
    bare = base(x)
    engine = Attachment(base, {"proj": {"math": update}}, ["math"], groups=_Fit.groups(16))
    with engine.control.set(forced=torch.ones(1)):
        routed = base(x)
    assert routed.dtype == torch.bfloat16 and torch.equal(base.proj.weight, kept)
    torch.testing.assert_close(routed, bare + (x @ (update.b_OR @ update.a_RD).T + bias_O).bfloat16(), rtol=2e-2, atol=2e-2)


def test_gradients_reach_a_mixture(llama: Pico) -> None:
    model = make(llama)
    w = torch.full((len(model.names),), 0.5, requires_grad=True)
    with model.mixture(w):
        model(torch.tensor([[5, 6, 7]])).logits.square().sum().backward()
    assert w.grad is not None and (w.grad != 0).all()
    assert all(p.grad is None for p in model.base.parameters())


def test_conv1d_linears_are_sites() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16)).eval()
    shapes = linear_shapes(model)
    assert shapes["transformer.h.0.attn.c_attn"] == (96, 32) and shapes["transformer.h.0.mlp.c_proj"] == (32, 128)
    site = "transformer.h.0.attn.c_attn"
    torch.manual_seed(0)
    update = Factors(torch.randn(2, 32), torch.randn(96, 2))
    engine = Attachment(model, {site: {"math": update}}, ["math"])
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad(), engine.control.set(forced=torch.ones(1)):
        routed = model(ids).logits
    engine.detach()
    with torch.no_grad():
        model.get_submodule(site).weight += (update.b_OR @ update.a_RD).T
        torch.testing.assert_close(model(ids).logits, routed, rtol=1e-4, atol=1e-4)


def test_a_pipeline_takes_a_routed_model(llama: Pico) -> None:
    from transformers import pipeline

    model = make(llama, "arrow")
    answer = pipeline("text-generation", model=model, tokenizer=model.tokenizer)("Add 2", max_new_tokens=3, do_sample=False)
    ids = model.generate(**model.tokenizer("Add 2", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert answer[0]["generated_text"] == model.tokenizer.decode(ids[0], skip_special_tokens=True)


def test_accelerate_places_banks_where_their_linears_run(llama: Pico) -> None:
    model = make(llama, device_map={"": "cpu"})
    with model.only("math"):
        logits = model(torch.tensor([[5, 6]])).logits
    with make(llama).only("math") as other:
        torch.testing.assert_close(logits, other(torch.tensor([[5, 6]])).logits)


@pytest.mark.parametrize(
    "normalise, absolute, missing", [(False, True, False), (True, False, True), (True, True, True), (False, False, True)]
)
def test_scores_out_of_the_shared_gemm_are_the_gates_own(normalise: bool, absolute: bool, missing: bool) -> None:
    torch.manual_seed(0)
    offset_E = torch.tensor([0.0, float("-inf"), 0.5, 0.0]) if missing else None
    gate = LinearGate([Rows(torch.randn(4, 16) + 0.3, offset_E), Rows(torch.randn(4, 16), None)], normalise, absolute)
    x_BTD = torch.randn(2, 3, 16) * 3 + 1
    torch.testing.assert_close(gate.finish(x_BTD @ gate.rows().T, x_BTD), gate(x_BTD), rtol=1e-5, atol=1e-5)


def test_adapters_and_gates_share_one_matrix_and_part_where_a_model_moves(llama: Pico) -> None:
    model = make(llama, "arrow")
    held = model.extra_bytes
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    for bank in model.engine.banks:
        assert bank._fold is not None and bank.stack.a_RD.data_ptr() == bank._fold[0].data_ptr()
    model.to(torch.bfloat16)
    assert all(bank._fold is None for bank in model.engine.banks)
    model.to(torch.float32)
    assert all(bank._fold is not None for bank in model.engine.banks) and model.extra_bytes == held
    assert (model(ids).logits - before).abs().max() < 0.1 * before.abs().max()
    model.use(None)
    assert all(bank._fold is None for bank in model.engine.banks)
