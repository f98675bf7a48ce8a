"""transformers' own machinery on a RoutedModel: caches, beams, samples, pipelines, drafts, continuous batching, checkpoints.

The reference is plain: greedy decoding by hand, one prompt at a time, without a cache; or one forward over a whole sequence.
"""

from __future__ import annotations

import gc
import inspect
from contextlib import AbstractContextManager
from typing import Any

import pico
import pytest
import torch
from accelerate import cpu_offload
from conftest import Pico
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from test_conformance import TEXTS, close, routed, router_of
from torch import Tensor
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, GenerationMixin, pipeline

import recycler
from recycler.base import Base, load_base
from recycler.build import read_adapters
from recycler.routed import RoutedModel
from recycler.routers.protocol import Group
from recycler.scoring import Fitting
from recycler.zoo.errors import UsageError

TASKS = ["math", "law", "code"]  # of TEXTS
# By token, for all, by sequence, by the bare base's own pass.
METHODS = ["arrow", "uniform", "retrieval", "classifier", "oracle", "glider", "xlora"]
STEPS = 6
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": STEPS, "min_new_tokens": STEPS}


@pytest.fixture(scope="module", params=METHODS)
def model(request: pytest.FixtureRequest, llama: Pico) -> RoutedModel:
    return routed(llama, request.param)


@pytest.fixture(scope="module")
def arrow(llama: Pico) -> RoutedModel:
    return routed(llama, "arrow")


@pytest.fixture(autouse=True)
def _no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """A manager of continuous batching collects garbage three times; that is what the tests would wait for."""
    monkeypatch.setattr(gc, "collect", lambda *args: 0)


def told(model: RoutedModel, rows: list[int]) -> AbstractContextManager[Any]:
    """The oracle is told whose task each row is."""
    return model.labelled([TASKS[i] for i in rows])


def prompts(model: RoutedModel, rows: list[int], side: str = "left") -> dict[str, Tensor]:
    tokens = model.tokenizer([TEXTS[i] for i in rows], return_tensors="pt", padding=True, padding_side=side)
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}


@torch.no_grad()
def by_hand(model: RoutedModel, row: int, steps: int = STEPS) -> list[int]:
    """The answer to one prompt, greedy, every token by a forward over all of it."""
    ids_BT = prompts(model, [row])["input_ids"]
    length = ids_BT.shape[1]
    with told(model, [row]), model.planned({"input_ids": ids_BT}):
        for _ in range(steps):
            logits_BV = model(input_ids=ids_BT, use_cache=False).logits[:, -1].clone()
            logits_BV[:, 2] = -torch.inf  # no end, as min_new_tokens says
            ids_BT = torch.cat([ids_BT, logits_BV.argmax(-1, keepdim=True)], 1)
    return list(ids_BT[0, length:].tolist())


def answers(sequences_BT: Tensor) -> list[list[int]]:
    return [list(row) for row in sequences_BT[:, -STEPS:].tolist()]


def test_the_prompts_get_different_mixtures(model: RoutedModel) -> None:
    """Else rows could be exchanged and nobody would notice."""
    with told(model, [0, 1, 2]):
        share_BE = model.weights_for(prompts(model, [0, 1, 2])).share()
    assert model.router is not None
    if model.router.granularity != "static":
        apart = 0.1 if model.router.granularity == "sequence" else 1e-3
        assert min((share_BE[i] - share_BE[i - 1]).abs().max() for i in range(3)) > apart


@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
def test_caches(model: RoutedModel, cache: str | None) -> None:
    """A batch padded on the left, with either kind of cache."""
    with told(model, [0, 1, 2]):
        made = model.generate(**prompts(model, [0, 1, 2]), **GREEDY, cache_implementation=cache)
    assert answers(made) == [by_hand(model, row) for row in range(3)]


@settings(max_examples=8)
@given(
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    beams=st.integers(2, 3),
    several=st.booleans(),
    static=st.booleans(),
)
def test_beams_are_those_of_each_prompt_alone(
    model: RoutedModel, rows: list[int], beams: int, several: bool, static: bool
) -> None:
    options: dict[str, Any] = {**GREEDY, "num_beams": beams, "num_return_sequences": beams if several else 1}
    kind = "static" if static else None
    with told(model, rows):
        made = answers(model.generate(**prompts(model, rows), **options, cache_implementation=kind))
    alone = []
    for row in rows:
        with told(model, [row]):
            alone += answers(model.generate(**prompts(model, [row]), **options, use_cache=False))
    assert made == alone


def test_beams_of_an_encoder_decoder(t5: Pico) -> None:
    for method in ("arrow", "oracle", "xlora"):
        model = routed(t5, method)
        options: dict[str, Any] = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
        with told(model, [0, 1, 2]):
            made = answers(model.generate(**prompts(model, [0, 1, 2], "right"), **options))
        alone = []
        for row in range(3):
            with told(model, [row]):
                alone += answers(model.generate(**prompts(model, [row]), **options, use_cache=False))
        assert made == alone, method


@torch.no_grad()
def test_samples_are_drawn_from_each_prompts_own_distribution(model: RoutedModel) -> None:
    torch.manual_seed(0)
    batch = prompts(model, [0, 1, 2])
    options: dict[str, Any] = {**GREEDY, "do_sample": True, "num_return_sequences": 2, "output_logits": True}
    with told(model, [0, 1, 2]):
        made = model.generate(**batch, **options, return_dict_in_generate=True)
    width = batch["input_ids"].shape[1]
    drawn_BTV = torch.stack(made.logits, 1)
    assert len(drawn_BTV) == 6 and len(set(map(tuple, answers(made.sequences)))) > 3
    for number, sequence in enumerate(made.sequences):
        row = number // 2
        own = prompts(model, [row])["input_ids"]
        whole = torch.cat([own, sequence[None, width:]], 1)
        with told(model, [row]), model.planned({"input_ids": own}):
            logits = model(input_ids=whole, use_cache=False).logits[0]
        close([drawn_BTV[number]], [logits[own.shape[1] - 1 : -1]], 1e-4)


def test_a_pipeline(model: RoutedModel) -> None:
    generator = pipeline("text-generation", model=model, tokenizer=model.tokenizer)  # type: ignore[call-overload]
    rows = [2, 0, 1]
    with told(model, rows):
        made = generator([TEXTS[i] for i in rows], batch_size=3, return_tensors=True, **GREEDY)
    # The pipeline keeps padding where it stands before the prompt.
    assert [one[0]["generated_token_ids"][-STEPS:] for one in made] == [by_hand(model, row) for row in rows]


# ------------------------------------------------------------------------------------------------------------------ drafts


@pytest.mark.parametrize("draft", ["base", "twin", "prompt"])
def test_drafts_change_nothing(model: RoutedModel, llama: Pico, draft: str) -> None:
    """Proposed by the bare base, by a model that knows the answer, or looked up in the prompt."""
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if draft != "prompt":
        bare = AutoModelForCausalLM.from_pretrained(llama.base).eval()
        options = {"assistant_model": bare if draft == "base" else routed(llama, str(model.router and model.router.method()))}
    for row in range(3):
        with told(model, [row]):
            made = model.generate(**prompts(model, [row]), **GREEDY, **options)
        assert answers(made) == [by_hand(model, row)]


# ------------------------------------------------------------------------------------------------------ continuous batching

PAGES = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
ENDLESS = GenerationConfig(max_new_tokens=STEPS, do_sample=False, eos_token_id=-1, pad_token_id=0)


def endless(model: RoutedModel, row: int) -> list[int]:
    """As `by_hand`, with an end token that is a token like others."""
    with told(model, [row]):
        made = model.generate(**prompts(model, [row]), generation_config=ENDLESS, use_cache=False)
    return answers(made)[0]


def token_ids(model: RoutedModel, rows: list[int]) -> list[list[int]]:
    return [model.tokenizer(TEXTS[i]).input_ids for i in rows]


def test_continuous_batching_answers_as_one_at_a_time_or_refuses(model: RoutedModel) -> None:
    router, rows = model.router, [2, 0, 1, 2]
    assert router is not None
    with told(model, rows):
        if router.method() in ("glider", "xlora"):
            with pytest.raises(UsageError, match=rf"cannot run {router.method()}.* Use generate\."):
                model.generate_batch(token_ids(model, rows), ENDLESS, PAGES)
            return
        made = model.generate_batch(token_ids(model, rows), ENDLESS, PAGES)
    assert list(made) == [one.request_id for one in made.values()] == ["req_0", "req_1", "req_2", "req_3"]
    assert [one.error for one in made.values()] == [None] * 4
    assert [one.prompt_ids for one in made.values()] == token_ids(model, rows)
    assert [one.generated_tokens for one in made.values()] == [endless(model, row) for row in rows]


def test_every_prompt_has_its_own_mixture(arrow: RoutedModel) -> None:
    """Also of prompts that are the same, whose keys and values the base would share."""
    prompt = list(range(3, 100))
    weights_BE = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    with arrow.mixture(weights_BE):
        made = arrow.generate_batch([prompt] * 4, ENDLESS, PAGES)
        with pytest.raises(UsageError, match="4 mixtures for 1 prompts"):
            arrow.generate_batch([prompt], ENDLESS, PAGES)
    alone = []
    for weights_E in weights_BE:
        with arrow.mixture(weights_E):
            alone.append(answers(arrow.generate(torch.tensor([prompt]), generation_config=ENDLESS))[0])
    assert [one.generated_tokens for one in made.values()] == alone
    assert alone[0] == alone[2] != alone[1] != alone[3]


def test_several_answers_to_one_prompt(llama: Pico) -> None:
    model, rows = routed(llama, "oracle"), [1, 0, 1]
    options = {"max_new_tokens": STEPS, "eos_token_id": -1, "pad_token_id": 0}
    twice = GenerationConfig(**options, do_sample=True, top_k=1, num_return_sequences=2)
    with told(model, rows):
        made = model.generate_batch(token_ids(model, rows), twice, PAGES)
    assert list(made) == [f"req_{i}{child}" for i in range(3) for child in ("__child#0", "")]
    assert [one.prompt_ids for one in made.values()] == [ids for ids in token_ids(model, rows) for _ in range(2)]
    assert [one.generated_tokens for one in made.values()] == [endless(model, row) for row in rows for _ in range(2)]
    assert [one.request_id for one in made.values()] == list(made)


def test_a_manager_serves_what_needs_no_plan(arrow: RoutedModel, llama: Pico) -> None:
    options: dict[str, Any] = {"generation_config": ENDLESS, "continuous_batching_config": PAGES}
    with arrow.continuous_batching_context_manager(**options) as manager:
        names = manager.add_requests(token_ids(arrow, [0, 1, 2]))
        made = {one.request_id: one.generated_tokens for one in (manager.get_result(timeout=20) for _ in names)}
    assert [made[name] for name in names] == [endless(arrow, row) for row in range(3)]
    oracle = routed(llama, "oracle")
    for model, fix in ((oracle, "Use generate_batch"), (routed(llama, "xlora"), "Use generate")):
        with pytest.raises(UsageError, match=fix):
            model.continuous_batching_context_manager(**options)
        with pytest.raises(UsageError, match=fix):
            model.init_continuous_batching(**options)
        with model.only("math"):
            assert model.generate_batch(token_ids(model, [1]), ENDLESS, PAGES)["req_0"].generated_tokens
    with arrow.mixture(torch.zeros(1, 40, 4)), pytest.raises(UsageError, match="each row or token"):
        arrow.generate_batch(token_ids(arrow, [1]), ENDLESS, PAGES)


def test_a_kept_manager_does_not_answer_for_another_mixture(llama: Pico) -> None:
    model, prompt = routed(llama, "arrow"), list(range(3, 100))
    kept = {"generation_config": ENDLESS, "continuous_batching_config": PAGES, "persistent_manager": True}
    first = model.generate_batch([prompt], **kept)["req_0"].generated_tokens
    with model.disabled():
        second = model.generate_batch([prompt], **kept)["req_0"].generated_tokens
        assert second == answers(model.generate(torch.tensor([prompt]), generation_config=ENDLESS))[0] != first
    assert model.generate_batch([prompt], **kept)["req_0"].generated_tokens == first


def test_an_encoder_decoder_is_not_batched_so(t5: Pico) -> None:
    for method in ("uniform", "oracle"):
        with pytest.raises(UsageError, match="cannot run an encoder–decoder"):
            routed(t5, method).generate_batch([[5, 6]], ENDLESS, PAGES)


def test_generate_does_not_page(arrow: RoutedModel) -> None:
    with pytest.raises(UsageError, match="read padding as text"):
        arrow.generate(**prompts(arrow, [0, 1]), cache_implementation="paged", max_new_tokens=2)


def test_nothing_else_generates() -> None:
    """What of transformers' public methods is the base's own, unplanned: none of it starts a generation. Whoever finds a new name
    here sees to it that it is planned."""
    own = {"generate", "generate_batch", "init_continuous_batching", "continuous_batching_context_manager"}
    public = {name for name, kind in inspect.getmembers(GenerationMixin, callable) if not name.startswith("_")}
    assert own <= public & set(vars(RoutedModel))
    assert public - own <= {
        "adjust_generation_fn", "compute_transition_scores", "destroy_cached_continuous_batching_manager", "heal_tokens",
        "load_custom_generate", "prepare_inputs_for_generation",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ checkpointed activations


def fresh(world: Pico, method: str, checkpointed: bool) -> RoutedModel:
    """In training mode, in which alone transformers checkpoints; without dropout."""
    model = routed(world, method)
    model.base.train()
    for module in model.base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if checkpointed:
        model.base.gradient_checkpointing_enable()
    return model


@pytest.mark.parametrize("kind", ["one mixture", "one a row", "gates"])
def test_gates_learn_the_same_from_checkpoints(world: Pico, kind: str) -> None:
    """Backward runs the layers again, long after the mixture's ``with`` block; the model's own router must not step in."""
    rows = [[shot] for shots in recycler.Shots.from_files(*world.tasks).sample(1).values() for shot in shots]
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        fitting = Fitting(fresh(world, "arrow", checkpointed))
        batch = fitting.encode(rows)
        shape = {"one mixture": (4,), "one a row": (len(rows), 4)}.get(kind)
        trained = {"all": torch.rand(shape)} if shape else {g.name: torch.randn(4, g.width) / 9 for g in fitting.groups}
        leaves = {name: tensor.requires_grad_() for name, tensor in trained.items()}
        calls: list[str] = []

        def gate(group: Group, x_BTD: Tensor, leaves: Any = leaves, calls: list[str] = calls) -> Tensor:
            calls.append(group.name)
            return (x_BTD @ leaves[group.name].T).sigmoid()[..., None, :]

        loss = fitting.nll(batch, leaves["all"] if shape else gate).sum()
        ran = len(calls)
        loss.backward()
        assert (len(calls) > ran) == (checkpointed and not shape)  # layers did run again
        found.append((loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}))
    assert found[0][0] == found[1][0]
    for name, grad in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_plans_reach_checkpoints(llama: Pico, method: str) -> None:
    grads = []
    for checkpointed in (False, True):
        model = fresh(llama, method, checkpointed)
        batch = prompts(model, [0, 1, 2])
        x_BTH = model.base.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        with told(model, [0, 1, 2]), model.planned(batch):
            logits = model(inputs_embeds=x_BTH, attention_mask=batch["attention_mask"], use_cache=False).logits
        logits.square().mean().backward()
        grads.append(x_BTH.grad)
        assert model.engine.control.plan is None
    assert grads[0] is not None and grads[0].abs().max() > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------- bases in pieces, and quantised ones

PLAIN, ALL = ("code", "law", "math"), ("code", "law", "math", "poem")  # poem is a DoRA: it reads the base's weights


@pytest.mark.parametrize("adapters", [PLAIN, ALL], ids=["plain", "dora"])
@pytest.mark.parametrize("where", ["auto", "disk", "nowhere"])
def test_device_maps(llama: Pico, where: str, adapters: tuple[str, ...]) -> None:
    """accelerate's: between forwards some layers are not there, or none."""
    zoo, router = recycler.Zoo(llama.zoo), router_of(llama, "arrow", adapters)
    parts = {name: "cpu" for name in ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")}
    device_map: Any = {"auto": "auto", "disk": {**parts, "model.layers.1": "disk"}}
    base = load_base(str(llama.base), device_map=device_map.get(where))
    if where == "nowhere":
        cpu_offload(base.model, execution_device=torch.device("cpu"))
    model, plain = RoutedModel(base, read_adapters(zoo, router.adapters, base), router), routed(llama, "arrow", adapters)
    assert any(parameter.is_meta for parameter in model.base.parameters()) == (where != "auto")
    made = model.generate(**prompts(model, [0, 1, 2]), **GREEDY)
    assert answers(made) == [by_hand(plain, row) for row in range(3)]


QUANTISED: dict[str, dict[str, Any]] = {
    "8 bit": {"load_in_8bit": True},
    "4 bit": {"load_in_4bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """A llama of whole blocks of 64 weights, with biases, as bitsandbytes wants and as Qwen has them."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = pico.LlamaConfig(
        vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.1,
        attention_bias=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    base = pico.LlamaForCausalLM(config)
    for layer in base.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    base.save_pretrained(folder / "llama")
    pico.tokenizer(eos_at_end=False).save_pretrained(folder / "llama")
    adapters = pico.make_adapters(folder / "llama", folder / "adapters")
    zoo = recycler.Zoo(folder / "zoo")
    recycler.fetch(list(adapters.values()), base=folder / "llama", zoo=zoo).raise_for_failures()
    return Pico("llama", folder / "llama", adapters, [], zoo.path)


@pytest.mark.parametrize("adapter", ["math", "poem"])
@pytest.mark.parametrize("kind", QUANTISED)
@torch.no_grad()
def test_quantised_bases(wide: Pico, kind: str, adapter: str) -> None:
    """On the same quantised base, an adapter's answer is PEFT's."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoTokenizer, BitsAndBytesConfig

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            wide.base, quantization_config=BitsAndBytesConfig(**QUANTISED[kind]), device_map="cpu"
        ).requires_grad_(False)

    base = Base(load(), AutoTokenizer.from_pretrained(wide.base), str(wide.base))
    zoo = recycler.Zoo(wide.zoo)
    model = RoutedModel(base, read_adapters(zoo, ALL, base))
    batch = prompts(model, [0, 1, 2])
    mask = batch["attention_mask"].bool()
    with model.disabled():
        bare = model(**batch).logits
    with model.only(adapter):
        ours = model(**batch).logits
    expected = PeftModel.from_pretrained(load(), wide.adapters[adapter]).eval()(**batch).logits
    far = (expected - bare)[mask].abs().max()
    assert far > 0.5 and (ours - expected)[mask].abs().max() < 0.03 * far
