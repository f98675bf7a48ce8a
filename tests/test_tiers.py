"""Zoos larger than memory, and adapters in int8: a model that pages answers as one that holds everything."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from way import Way

import recycler
from recycler.engine.packed import Packed, slabs, write
from recycler.engine.quantised import dequantise, quantise, round_trip
from recycler.engine.stack import Slab
from recycler.engine.tiers import Page, Tier, parse_size
from recycler.routed import RoutedModel
from recycler.zoo.errors import InputError, UsageError

IDS = torch.tensor([[5, 60, 7, 80, 9], [11, 6, 90, 4, 33], [8, 8, 44, 23, 17]])
NAMES = ("math", "law", "code", "poem")  # the last is a DoRA


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


def compose(world: Pico, method: str, out: Path, **options: Any) -> Path:
    zoo = recycler.Zoo(world.zoo)
    recycler.compose(zoo, recycler.build_router(method, zoo=zoo, **options), out)
    return out


@pytest.fixture(scope="module")
def models(world: Pico, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Composed models: token by token, and one mixture for everything."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "arrow": compose(world, "arrow", folder / "arrow", top_k=2),
        "uniform": compose(world, "uniform", folder / "uniform"),
    }


def inputs(model: RoutedModel) -> dict[str, torch.Tensor]:
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS[:, :3]} if model.source.encoder_decoder else {})


@torch.no_grad()
def logits(model: RoutedModel) -> torch.Tensor:
    return model(**inputs(model)).logits


def one(model: RoutedModel) -> int:
    """Bytes of the smallest adapter."""
    return min(packed.size for packed in shelf(model).packed)


def shelf(model: RoutedModel) -> Any:
    assert model.engine.shelf is not None
    return model.engine.shelf


def settle(model: RoutedModel) -> None:
    """Waits for what is being read ahead."""
    for future, _ in [*shelf(model)._flying.values()]:
        future.exception()


# -- the same answers


@pytest.mark.parametrize("resident", ["1GB", "20KB", 1], ids=["all", "about one adapter", "nothing"])
@pytest.mark.parametrize("method", ["arrow", "uniform"])
def test_a_paged_model_answers_as_one_in_memory(
    models: dict[str, Path], packed: Path, method: str, resident: str | int
) -> None:
    whole = recycler.load(models[method])
    paged = recycler.load(models[method], resident=resident, packed=packed)
    for _ in range(2):  # the second time with what the first left
        torch.testing.assert_close(logits(paged), logits(whole), rtol=1e-5, atol=1e-5)
    for mixture in ({"poem": 1.0}, {"math": 0.7, "law": -0.3}, torch.eye(4)[[2, 0, 3]], {}):
        with whole.mixture(mixture), paged.mixture(mixture):
            torch.testing.assert_close(logits(paged), logits(whole), rtol=1e-5, atol=1e-5)
    made = [model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False) for model in (paged, whole)]
    assert torch.equal(*made)
    assert shelf(paged).tier.held <= shelf(paged).tier.budget


@pytest.mark.parametrize("name", NAMES)
def test_one_adapter_alone_is_the_same_to_the_last_bit(models: dict[str, Path], packed: Path, name: str) -> None:
    """DoRA's norms over the base are taken when it is packed; a bias of B is in `test_every_part_comes_back`."""
    whole = recycler.load(models["uniform"])
    paged = recycler.load(models["uniform"], resident="20KB", packed=packed)
    with whole.only(name), paged.only(name):
        assert torch.equal(logits(paged), logits(whole))


def test_a_router_that_reads_the_prompt_pages_what_it_chose(way: Way, tmp_path: Path, packed: Path) -> None:
    recycler.compose(way.zoo, recycler.build_router("oracle", way.profile, zoo=way.zoo), tmp_path / "oracle")
    whole = recycler.load(tmp_path / "oracle")
    paged = recycler.load(tmp_path / "oracle", resident="60KB", packed=packed)
    for tasks in (("math", "law", "math"), ("poem", "code", "law"), (None, "math", "poem")):
        with whole.labelled(tasks), paged.labelled(tasks):
            torch.testing.assert_close(logits(paged), logits(whole), rtol=1e-5, atol=1e-5)
    settle(paged)
    assert shelf(paged).bytes_read > 0


def test_a_model_can_be_composed_paged_and_saved(llama: Pico, packed: Path, tmp_path: Path) -> None:
    zoo = recycler.Zoo(llama.zoo)
    router = recycler.build_router("arrow", zoo=zoo, top_k=2)
    model = recycler.compose(zoo, router, tmp_path / "model", resident="1MB", packed=packed)
    whole = recycler.load(tmp_path / "model")
    torch.testing.assert_close(logits(model), logits(whole), rtol=1e-5, atol=1e-5)
    assert [a.licence for a in model.adapters] == [a.licence for a in whole.adapters]
    assert [a.sha256 for a in model.adapters] == [a.sha256 for a in whole.adapters]


def test_paged_adapters_follow_their_model(models: dict[str, Path], packed: Path) -> None:
    whole, paged = recycler.load(models["arrow"]), recycler.load(models["arrow"], resident="1MB", packed=packed)
    logits(paged)
    halves = [logits(model.to(torch.bfloat16)) for model in (paged, whole)]
    assert halves[0].dtype == torch.bfloat16
    torch.testing.assert_close(*halves, rtol=5e-2, atol=5e-2)


def test_weights_that_are_trained_see_all_adapters(models: dict[str, Path], packed: Path) -> None:
    """An adapter at weight 0 has a gradient."""
    grads = []
    for options in ({}, {"resident": "20KB", "packed": packed}):
        model = recycler.load(models["uniform"], **options)  # type: ignore[arg-type]
        weights_E = torch.tensor([0.5, 0.0, 0.2, 0.0], requires_grad=True)
        with model.mixture(weights_E):
            model(**inputs(model)).logits.square().mean().backward()
        assert weights_E.grad is not None
        grads.append(weights_E.grad)
    assert grads[0].abs().min() > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)


def test_slabs_and_plans_can_be_asked_for(models: dict[str, Path], packed: Path) -> None:
    whole, paged = recycler.load(models["uniform"]), recycler.load(models["uniform"], resident="20KB", packed=packed)
    used = (1, 3)
    for bank, other in zip(paged.engine.banks, whole.engine.banks, strict=True):
        for some, held in zip(shelf(paged).slabs(bank, used), other.stack.slabs(), strict=True):
            assert some.keys() == held.keys() & set(used)
            for e, one in some.items():
                assert all(a is b or torch.equal(a, b) for a, b in zip(one, held[e], strict=True))  # type: ignore[arg-type]
    with whole.only("code"), paged.only("code"):
        plans = [[(s.sites, s.path, s.rows, s.bytes) for s in model.execution_plan(64, 2)] for model in (paged, whole)]
        assert plans[0] == plans[1]


# -- what is held


def test_what_is_held_is_counted_and_said(models: dict[str, Path], packed: Path) -> None:
    model = recycler.load(models["uniform"], resident="1MB", packed=packed)
    held, gates = shelf(model), model.extra_bytes
    assert held.held == 0 and held.bytes_read == 0 and held.hit_rate == 0  # nothing is read before it is used
    with model.only("math"):
        logits(model)
        settle(model)
        first = (held.hits + held.ahead + held.misses, held.bytes_read)
        logits(model)
        assert (held.hits + held.ahead + held.misses, held.bytes_read) == first  # the stacks were there
    assert held.bytes_read == held.packed[model.names.index("math")].size
    assert model.extra_bytes == gates + held.held and held.bytes_read < held.held <= 2 * held.bytes_read + 10_000
    with model.mixture({"math": 1.0, "law": 1.0}):
        logits(model)
        settle(model)
    assert held.hits > 0 and held.bytes_read == sum(held.packed[model.names.index(n)].size for n in ("math", "law"))
    text = str(held)
    assert f"{held.hit_rate:.1%}" in text and "4 adapters" in text and "of 1.0 MB in memory" in text


def page(size: int) -> Page:
    return Page(torch.zeros(size, dtype=torch.uint8))


def test_the_page_that_was_used_longest_ago_goes_first() -> None:
    tier = Tier(30)
    for e in range(3):
        tier.put(("q", e), page(10))
    assert tier.get(("q", 0)) is not None
    tier.put(("q", 3), page(10))
    assert [e for _, e in tier.pages] == [2, 0, 3] and tier.evicted == 1 and tier.held == 30
    tier.put(("q", 4), page(25))
    assert [e for _, e in tier.pages] == [4] and tier.held == 25
    tier.put(("q", 5), page(31))  # larger than the budget: whoever asked has it, and it is not kept
    assert not tier.pages and tier.held == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 12), st.booleans()), max_size=40), st.integers(1, 30))
def test_a_tier_holds_what_it_says(steps: list[tuple[int, int, bool]], budget: int) -> None:
    """Against a model of it: a list, oldest first."""
    tier, model = Tier(budget), list[tuple[int, int]]()
    for e, size, puts in steps:
        found = tier.get(("q", e))
        assert (found is not None) == any(key == e for key, _ in model)
        if puts:
            tier.put(("q", e), page(size))
            model = [pair for pair in model if pair[0] != e] + [(e, size)]
            while sum(size for _, size in model) > budget:
                model.pop(0)
        elif found is not None:
            model.sort(key=lambda pair: pair[0] == e)
        assert [e for _, e in tier.pages] == [e for e, _ in model]
        assert tier.held == sum(size for _, size in model) <= budget and tier.fresh == 0


def test_adapters_are_evicted_when_others_need_the_room(models: dict[str, Path], packed: Path) -> None:
    model = recycler.load(models["uniform"], resident="1MB", packed=packed)
    held = shelf(model)
    held.tier.budget = int(1.6 * max(one.size for one in held.packed))  # one of them as stacks, and half of one as pages
    for name in ("code", "math", "code"):
        with model.only(name):
            logits(model)
            settle(model)
        assert held.tier.held <= held.tier.budget
    assert held.evicted > 0
    assert held.bytes_read > held.packed[model.names.index("code")].size + held.packed[model.names.index("math")].size


# -- reading ahead


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Reading in the background waits for it, and reading in the foreground does not."""
    opened, read = threading.Event(), Packed.read

    def slow(self: Packed, places: Any, *, pinned: bool = False) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread():
            assert opened.wait(20)
        return read(self, places, pinned=pinned)

    monkeypatch.setattr(Packed, "read", slow)
    yield opened
    opened.set()


def test_what_was_read_ahead_is_not_read_again(models: dict[str, Path], packed: Path) -> None:
    model = recycler.load(models["uniform"], resident="10MB", packed=packed)
    held = shelf(model)
    for bank in model.engine.banks:
        held.prefetch(bank, (0, 1, 2, 3))
    settle(model)
    assert held.bytes_read == held.size and held.misses == held.hits == 0
    logits(model)
    assert held.misses == held.hits == 0 and held.ahead == sum(
        len(one.places(b.group.sites)) > 0 for one in held.packed for b in model.engine.banks
    )
    assert held.bytes_read == held.size and held.hit_rate == 0 and held.tier.fresh == 0


def test_a_forward_does_not_wait_for_a_queue(models: dict[str, Path], packed: Path, gate: threading.Event) -> None:
    """What has not begun to be read ahead is read at once; what has is waited for, and read once."""
    whole = recycler.load(models["uniform"])
    model = recycler.load(models["uniform"], resident="10MB", packed=packed)
    held, banks = shelf(model), model.engine.banks
    held.prefetch(banks[-1], (0, 1, 2, 3))  # the thread hangs in the first of these
    held.prefetch(banks[0], (0, 1, 2, 3))
    page = held._page

    def opening(key: tuple[str, int], *args: Any) -> Page:
        if key[0] == banks[-1].group.name:
            gate.set()
        return page(key, *args)

    held._page = opening
    torch.testing.assert_close(logits(model), logits(whole), rtol=1e-5, atol=1e-5)
    settle(model)
    assert held.bytes_read == held.size and held.misses > 0 and not held._flying


def test_reading_ahead_leaves_half_the_budget(models: dict[str, Path], packed: Path, gate: threading.Event) -> None:
    model = recycler.load(models["uniform"], resident="10MB", packed=packed)
    held = shelf(model)
    held.tier.budget = 20_000
    for bank in model.engine.banks:
        held.prefetch(bank, (0, 1, 2, 3))
    assert 0 < sum(size for _, size in held._flying.values()) <= 10_000
    gate.set()
    settle(model)
    assert 0 < held.tier.fresh <= 10_000


def test_gates_guess_who_is_needed_one_layer_up(llama: Pico, models: dict[str, Path], packed: Path, tmp_path: Path) -> None:
    model = recycler.load(compose(llama, "arrow", tmp_path / "arrow", top_k=1), resident="10MB", packed=packed)
    held, banks = shelf(model), {bank.group.name: bank for bank in model.engine.banks}
    asked: list[tuple[str, tuple[int, ...]]] = []
    held.prefetch = lambda bank, used: asked.append((bank.group.name, tuple(used)))
    logits(model)
    q = "layers.{}.self_attn.q_proj"
    assert [name for name, _ in asked if "q_proj" in name] == ["model." + q.format(1)]
    assert all("layers.1" in name and used for name, used in asked) and len(asked) == len(banks) // 2


# -- damage


@pytest.mark.parametrize("how", ["a bit of the weights", "a bit of the header", "cut short", "empty", "longer"])
def test_a_damaged_file_is_refused_and_never_computed_with(llama: Pico, tmp_path: Path, how: str) -> None:
    folder = compose(llama, "uniform", tmp_path / "model")
    recycler.load(folder, resident="1MB", packed=tmp_path / "packed")
    file = max((tmp_path / "packed").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    if how.startswith("a bit"):
        data[-100 if "weights" in how else data.index(b"q_proj")] ^= 1
    file.write_bytes({"cut short": data[:-64], "empty": data[:0], "longer": data + bytes(64)}.get(how, data))
    with pytest.raises(InputError, match=r"packed adapter .*damaged.*Delete it") as error:
        logits(recycler.load(folder, resident="1MB", packed=tmp_path / "packed"))
    assert error.value.why and str(file) in error.value.what
    file.unlink()  # as it says
    whole, paged = recycler.load(folder), recycler.load(folder, resident="1MB", packed=tmp_path / "packed")
    torch.testing.assert_close(logits(paged), logits(whole), rtol=1e-5, atol=1e-5)


def test_a_file_that_shrinks_while_it_is_used_raises(llama: Pico, tmp_path: Path) -> None:
    model = recycler.load(compose(llama, "uniform", tmp_path / "model"), resident=1, packed=tmp_path / "packed")
    logits(model)
    for file in (tmp_path / "packed").iterdir():
        file.write_bytes(file.read_bytes()[:4000])
    with pytest.raises(InputError, match="damaged"):
        logits(model)
    shutil.rmtree(tmp_path / "packed")
    with pytest.raises(InputError, match="damaged"):
        logits(model)


def test_an_adapter_that_changed_is_packed_anew(llama: Pico, tmp_path: Path) -> None:
    """The config counts, too: it scales the weights."""
    folder = compose(llama, "uniform", tmp_path / "model")
    recycler.load(folder, resident="1MB", packed=tmp_path / "packed")
    config = folder / "adapters" / "math" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 24'))
    whole, paged = recycler.load(folder), recycler.load(folder, resident="1MB", packed=tmp_path / "packed")
    with whole.only("math"), paged.only("math"):
        assert torch.equal(logits(paged), logits(whole))
    assert len([*(tmp_path / "packed").iterdir()]) == 5


# -- what is refused


@pytest.mark.parametrize("size", ["", "many", "-1GB", "0", 0, -5, "2 XB", "1e9", True, "0.1B", "GB"])
def test_a_size_that_is_none_is_refused(models: dict[str, Path], size: Any) -> None:
    with pytest.raises(UsageError, match=r"resident=.*is no size"):
        recycler.load(models["uniform"], resident=size)


def test_sizes_are_bytes() -> None:
    texts = {"2GB": 2 * 10**9, "2 gb": 2 * 10**9, "1.5GiB": 3 * 2**29, "500M": 5 * 10**8, "64k": 64_000, "17": 17, "17B": 17}
    assert {text: parse_size(text) for text in texts} == texts and parse_size(12345) == 12345


def test_what_cannot_be_paged_says_so(llama: Pico, models: dict[str, Path], packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="adapter_dtype needs resident"):
        recycler.load(models["uniform"], adapter_dtype="int8")
    with pytest.raises(UsageError, match=r"'int4'.* is unknown.*int8"):
        recycler.load(models["uniform"], resident="1GB", adapter_dtype="int4")  # type: ignore[arg-type]
    zoo = recycler.Zoo(llama.zoo)
    with pytest.raises(UsageError, match="cut while composing"):
        recycler.compose(zoo, recycler.build_router("uniform", zoo=zoo), max_rank=2, resident="1GB", packed=packed)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        recycler.load(models["uniform"], resident="1GB", packed=tmp_path / "file" / "packed")


def test_a_paged_model_is_not_compiled(models: dict[str, Path], packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = recycler.load(models["uniform"], resident="1GB", packed=packed)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(UsageError, match="cannot be compiled"):
        model.engine.banks[0].add(0, torch.zeros(1, 1, 32), torch.zeros(1, 1, 32), None)


# -- the file, and int8


def made(rank: int, width: int, out: int, dtype: torch.dtype, scale: bool, bias: bool) -> Slab:
    extra = [torch.randn(out).to(dtype) if wanted else None for wanted in (scale, bias)]
    return Slab(torch.randn(rank, width).to(dtype), torch.randn(rank, out).to(dtype), *extra)


@given(
    st.lists(
        st.tuples(
            st.integers(1, 9), st.integers(1, 40), st.integers(1, 40),
            st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.booleans(), st.booleans(),
        ), min_size=1, max_size=4,
    ),
    st.booleans(),
)  # fmt: skip
def test_every_part_comes_back(tmp_path_factory: pytest.TempPathFactory, sites: list[Any], int8: bool) -> None:
    """Whatever ranks, widths and dtypes a site has, with and without DoRA's scale and a bias: bit by bit; in int8 within half a step."""
    path = tmp_path_factory.mktemp("one") / "adapter.safetensors"
    kept = {f"site{i}": made(*site) for i, site in enumerate(sites)}
    write(path, kept, {"base": "org/base"}, int8=int8)
    file = Packed(path)
    assert [*file.sites] == [*kept] and file.adapter == {"base": "org/base"}
    chosen = [*kept][::-1]  # in another order, and some of them
    for names in (chosen, chosen[:1]):
        places = file.places([*names, "absent"])
        buffer = file.read([place for _, place in places])
        for s, one in slabs(buffer, places, torch.float32).items():
            was = kept[names[s]]
            for now, then in ((one.a_RD, was.a_RD), (one.b_RO, was.b_RO)):
                step_R1 = then.float().abs().amax(1, keepdim=True) / 127 if int8 else torch.zeros(len(then), 1)
                assert bool(((now - then.float()).abs() <= step_R1 / 2 * 1.001 + 1e-12).all())
            for now_O, then_O in ((one.scale_O, was.scale_O), (one.bias_O, was.bias_O)):
                assert (now_O is None) == (then_O is None)
                assert now_O is None or then_O is None or torch.equal(now_O, then_O.float())
    with safe_open(path, framework="pt") as stream:  # any reader of safetensors opens it
        assert stream.get_tensor("slabs").nbytes == file.size


@given(st.integers(1, 16), st.integers(1, 300), st.floats(-30, 30), st.integers(0, 2**31))
def test_int8_errs_by_half_a_step_at_most(rank: int, width: int, power: float, seed: int) -> None:
    """At any size of numbers, rows of zeros and rows of very different sizes included."""
    generator = torch.Generator().manual_seed(seed)
    x_RD = torch.randn(rank, width, generator=generator) * 2.0**power * torch.logspace(-6, 6, rank)[:, None]
    x_RD[rank // 2] = 0
    q_RD, scale_R1 = quantise(x_RD)
    back_RD = dequantise(q_RD, scale_R1, torch.float32)
    assert q_RD.dtype == torch.int8 and bool(((back_RD - x_RD).abs() <= scale_R1 * 0.5001).all())
    assert not back_RD[rank // 2].any()
    again = quantise(back_RD)  # what is int8 already stays what it is
    torch.testing.assert_close(dequantise(*again, torch.float32), back_RD, rtol=1e-6, atol=0)


@given(st.integers(1, 32), st.integers(32, 300), st.integers(32, 300), st.integers(0, 2**31))
def test_what_int8_adds_is_nearly_what_was_added(rank: int, width: int, out: int, seed: int) -> None:
    """B A x on random factors and inputs: within 3 %, typically 1.3 %."""
    generator = torch.Generator().manual_seed(seed)
    a_RD, b_RO = torch.randn(rank, width, generator=generator), torch.randn(rank, out, generator=generator)
    x_ND = torch.randn(16, width, generator=generator)
    exact_NO = x_ND @ a_RD.T @ b_RO
    near_NO = x_ND @ dequantise(*quantise(a_RD), torch.float32).T @ dequantise(*quantise(b_RO), torch.float32)
    assert (near_NO - exact_NO).norm() <= 0.03 * exact_NO.norm()


def test_an_int8_model_is_smaller_and_nearly_the_same(models: dict[str, Path], packed: Path) -> None:
    whole = recycler.load(models["uniform"])
    plain = recycler.load(models["uniform"], resident="1MB", packed=packed)
    paged = recycler.load(models["uniform"], resident="1MB", packed=packed, adapter_dtype="int8")
    assert shelf(paged).size < 0.5 * shelf(plain).size  # pico ranks are short: scales and alignment weigh
    with whole.disabled():
        bare = logits(whole)
    exact, near = logits(whole), logits(paged)
    assert 0 < (near - exact).norm() < 0.05 * (exact - bare).norm()
    for bank in whole.engine.banks:
        round_trip(bank.stack)
    torch.testing.assert_close(logits(whole), near, rtol=1e-5, atol=1e-5)  # what the measurement of it computes with
