"""What the engine's benchmarks run: a random model, random adapters, and those that are compared, all with the same prototypes.

Nothing is downloaded. PEFT reads its adapters from folders, which are written to a temporary place.

Dimensions in names: B batch, T token, N token of any sequence, D input width, O output width, E adapter, K one of a token's adapters.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from recycler.base import Base
from recycler.engine.attach import Attachment
from recycler.engine.bank import Few
from recycler.engine.sites import linear_shapes
from recycler.routed import RoutedModel
from recycler.routers.arrow import Arrow
from recycler.routers.linear import Rows
from recycler.routers.protocol import Group
from recycler.routers.select import Policy
from recycler.routers.xlora import ALL, XLora, XLoraConfig
from recycler.scoring import Fitting
from recycler.zoo.adapter import Adapter, Factors
from recycler.zoo.writing import write_adapter

SMOLLM2: Mapping[str, int] = {  # two layers of SmolLM2-135M
    "vocab_size": 2048, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 9,
    "num_key_value_heads": 3,
}  # fmt: skip
PICO: Mapping[str, int] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
MIXED = (4, 4, 8, 8, 16, 16, 32, 64)
TOP_K = 2
BASE, OURS, DENSE, PADDED, LOOP = "base", "ours", "ours, dense path", "ranks padded to the largest", "loop over adapters"
SINGLE, MERGED, ARROW, XLORA, OURS_XLORA = (
    "PEFT one LoRA",
    "PEFT one LoRA, merged",
    "PEFT Arrow",
    "PEFT X-LoRA",
    "ours as X-LoRA",
)


@dataclass(frozen=True)
class Contender:
    """
    Attributes:
        model: what is called. enter: what holds while it runs.
        caches: False runs all tokens again at every step, as PEFT's X-LoRA must.
    """

    model: Any
    enter: Callable[[], AbstractContextManager[Any]] = nullcontext
    caches: bool = True


# -- models and adapters


def bare(shape: Mapping[str, int], dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The same random weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **shape, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=None, tie_word_embeddings=True
    )
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def ranks_of(kind: str, count: int) -> tuple[int, ...]:
    """Ranks of so many adapters: "equal" is 8 each, "mixed" goes round MIXED."""
    return tuple(itertools.islice(itertools.cycle(MIXED if kind == "mixed" else (8,)), count))


def make_adapters(shapes: Mapping[str, tuple[int, int]], ranks: Sequence[int]) -> list[Adapter]:
    """Random adapters, each the same at every call."""
    made = []
    for number, rank in enumerate(ranks):
        draw = torch.Generator().manual_seed(number)
        sites = {
            site: Factors(torch.randn(rank, d, generator=draw) / d**0.5, 0.05 * torch.randn(o, rank, generator=draw))
            for site, (o, d) in shapes.items()
        }
        made.append(Adapter(f"a{number:03d}", sites))
    return made


def sites_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {site: shape for site, shape in linear_shapes(model).items() if "layers." in site}


def padded(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The same updates, every rank as large as the largest: rows of zeros."""
    most = max(adapter.ranks[-1] for adapter in adapters)

    def wide(update: Factors) -> Factors:
        spare = most - update.rank
        return Factors(nn.functional.pad(update.a_RD, (0, 0, 0, spare)), nn.functional.pad(update.b_OR, (0, spare)))

    return [Adapter(a.name, {site: wide(update) for site, update in a.sites.items()}) for a in adapters]


# -- contenders


def routed(model: Any, adapters: Sequence[Adapter], rows: Mapping[str, Rows] | None = None) -> RoutedModel:
    """Ours, by Arrow. `rows` are prototypes that are known already."""
    ours = RoutedModel(Base(model, None, "random"), adapters)
    policy = Policy(top_k=TOP_K)
    ours.use(Arrow.fit(Fitting(ours), None, policy) if rows is None else Arrow(ours.names, policy, rows))
    return ours


def as_xlora(model: Any, adapters: Sequence[Adapter], head: tuple[Tensor, Tensor]) -> RoutedModel:
    """Ours with X-LoRA's semantics: the bare base's last state, one classifier for all sites, softmax over all, the largest kept."""
    names = [adapter.name for adapter in adapters]
    config = XLoraConfig(normalise=False, top_k=TOP_K, renormalise=False)
    return RoutedModel(Base(model, None, "random"), adapters, XLora(names, config, [], {ALL: head}))


def looped(model: Any, adapters: Sequence[Adapter], rows: Mapping[str, Rows]) -> Any:
    """What one would write first: at every linear one adapter after the other, each on the tokens that chose it."""
    for site in adapters[0].sites:
        linear = model.get_submodule(site)
        dtype = linear.weight.dtype
        held = [(a.sites[site].a_RD.T.to(dtype), a.sites[site].b_OR.T.to(dtype)) for a in adapters]
        linear.register_forward_hook(_loop(held, rows[site].v_ED))
    return model


def _loop(held: Sequence[tuple[Tensor, Tensor]], v_ED: Tensor) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x_ND = args[0].flatten(0, -2)
        value_NK, index_NK = (x_ND.float() @ v_ED.T).abs().topk(TOP_K)
        weight_NK = value_NK.softmax(-1).to(x_ND.dtype)
        y_NO = output.flatten(0, -2)
        for e, (a_DR, b_RO) in enumerate(held):
            token, place = (index_NK == e).nonzero(as_tuple=True)
            if len(token):
                y_NO.index_add_(0, token, (x_ND[token] @ a_DR * weight_NK[token, place, None]) @ b_RO)
        return y_NO.view(output.shape)

    return hook


def write_folders(adapters: Sequence[Adapter], folder: Path) -> list[str]:
    for adapter in adapters:
        (folder / adapter.name).mkdir(parents=True)
        write_adapter(folder / adapter.name, adapter.sites, base=None, task_type="CAUSAL_LM")
    return [str(folder / adapter.name) for adapter in adapters]


def peft_arrow(model: Any, paths: Sequence[str], rows: Mapping[str, Rows]) -> Any:
    """PEFT's Arrow with the given prototypes: its own power iteration has not converged on random factors."""
    from peft.tuners.lora.arrow import create_arrow_model
    from peft.tuners.lora.config import ArrowConfig

    theirs = create_arrow_model(model, list(paths), ArrowConfig(top_k=TOP_K, rng_seed=0)).eval()
    for name, module in theirs.named_modules():
        for arrow in getattr(module, "lora_arrow", {}).values():
            arrow.register_buffer("prototypes", rows[name.removeprefix("base_model.model.")].v_ED.clone(), persistent=False)
            arrow._protos_ready = True
    return theirs


def peft_xlora(model: Any, paths: Sequence[str]) -> tuple[Any, tuple[Tensor, Tensor]]:
    """PEFT's X-LoRA and its classifier (weight, bias). It loads adapters as "0", "1", …, whatever they are called."""
    from peft import XLoraConfig as Theirs
    from peft import get_peft_model

    model.config.use_cache = False
    named = {str(number): path for number, path in enumerate(paths)}
    config = Theirs(task_type="CAUSAL_LM", hidden_size=model.config.hidden_size, adapters=named, top_k_lora=TOP_K)
    theirs = get_peft_model(model, config).eval()
    last = theirs.base_model.internal_xlora_classifier.layers[-1]
    torch.manual_seed(3)
    nn.init.normal_(last.weight, std=0.1)
    return theirs, (last.weight.detach().clone(), last.bias.detach().clone())


def peft_single(model: Any, path: str) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, path).eval()


class Field:
    """All contenders on one set of adapters. PEFT's are made once, in fp32, and cast.

    Args:
        without: names of contenders to leave out.
    """

    def __init__(self, shape: Mapping[str, int], ranks: Sequence[int], folder: Path, without: Sequence[str] = ()) -> None:
        self.shape, self.without = shape, set(without)
        model = bare(shape)
        self.adapters = make_adapters(sites_of(model), ranks)
        fitted = routed(model, self.adapters)
        assert isinstance(fitted.router, Arrow)
        self.rows = fitted.router.rows
        paths = write_folders(self.adapters, folder)
        self.equal = len(set(ranks)) == 1
        self.theirs: dict[str, Any] = {SINGLE: peft_single(bare(shape), paths[0])}
        self.theirs[MERGED] = peft_single(bare(shape), paths[0]).merge_and_unload()
        if self.equal and ARROW not in self.without:
            self.theirs[ARROW] = peft_arrow(bare(shape), paths, self.rows)
        self.head: tuple[Tensor, Tensor] | None = None
        if XLORA not in self.without:
            self.theirs[XLORA], self.head = peft_xlora(bare(shape), paths)

    def contenders(self, dtype: torch.dtype) -> dict[str, Contender]:
        made = {BASE: Contender(bare(self.shape, dtype))}
        for name, model in self.theirs.items():
            made[name] = Contender(model.to(dtype), caches=name != XLORA)
            if name == XLORA:
                model.base_model.internal_xlora_classifier.dtype = dtype
        made[LOOP] = Contender(looped(bare(self.shape, dtype), self.adapters, self.rows))
        if not self.equal:
            wide = routed(bare(self.shape, dtype), padded(self.adapters), self.rows)
            made[PADDED] = Contender(wide, lambda: wide.engine.control.set(path="dense"))
        ours = routed(bare(self.shape, dtype), self.adapters, self.rows)
        if self.head is not None:
            made[OURS_XLORA] = Contender(as_xlora(bare(self.shape, dtype), self.adapters, self.head))
        made[DENSE] = Contender(ours, lambda: ours.engine.control.set(path="dense"))
        made[OURS] = Contender(ours)
        return {name: contender for name, contender in made.items() if name not in self.without}


@torch.no_grad()
def check_agreement(contenders: Mapping[str, Contender], ids_BT: Tensor) -> dict[str, float]:
    """Largest logit difference to what each contender should equal, in units of 1e-5 · the largest logit, over the 98 % of tokens
    where it is smallest: in fp32 a token whose second and third score tie may be routed otherwise.

    Raises:
        SystemExit: they do not compute the same.
    """

    def logits(name: str) -> Tensor:
        with contenders[name].enter():
            return contenders[name].model(input_ids=ids_BT, use_cache=False).logits.float()

    pairs = [(name, OURS) for name in (ARROW, LOOP, PADDED, DENSE)] + [(OURS_XLORA, XLORA), (MERGED, SINGLE)]
    found = {}
    for one, other in pairs:
        if one in contenders and other in contenders:
            wanted = logits(other)
            apart_N = (logits(one) - wanted).abs().amax(-1).flatten() / (1e-5 * wanted.abs().max())
            found[f"{one} = {other}"] = worst = float(apart_N.quantile(0.98))
            if worst > 3:
                raise SystemExit(f"{one} and {other} do not compute the same: logits differ by {worst:.0f}e-5 of the largest.")
    if (logits(OURS) - logits(BASE)).abs().max() < 1e-2 * logits(BASE).abs().max():
        raise SystemExit("The adapters do nothing: there is nothing to compare.")
    return found


# -- one linear


class OneLinear(nn.Module):
    def __init__(self, d: int, o: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(d, o, bias=False).to(dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)  # type: ignore[no-any-return]


def one_linear(d: int, o: int, dtype: torch.dtype, adapters: Sequence[Adapter], routes: bool = True) -> tuple[Any, Attachment]:
    """(linear, engine) with random prototypes, or without a router."""
    linear, names = OneLinear(d, o, dtype), [adapter.name for adapter in adapters]
    v_ED = nn.functional.normalize(torch.randn(len(names), d, generator=torch.Generator().manual_seed(1)), dim=-1)
    router = Arrow(names, Policy(top_k=TOP_K), {"proj": Rows(v_ED)}) if routes else None
    factors = {"proj": {adapter.name: adapter.sites["proj"] for adapter in adapters}}
    return linear, Attachment(linear, factors, names, router, groups=(Group(("proj",), d),))


@contextmanager
def per_sequence(engine: Attachment, sequences: int, k: int) -> Iterator[Tensor]:
    """Every sequence has its own k adapters, evenly weighted. Yields the weights [B, E]."""
    count = engine.banks[0].count
    chosen_BK = torch.rand(sequences, count, generator=torch.Generator().manual_seed(2)).topk(k).indices
    w_BE = torch.zeros(sequences, count).scatter(1, chosen_BK, 1 / k)
    with engine.control.set(forced=w_BE, few=Few.of(w_BE)):
        yield w_BE


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation made, in numbers; views of what was there do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in given]
        self.numel = max([self.numel, *made])
        return out


# -- time


def interleaved(runs: Mapping[str, tuple[Callable[[], Any], int]], repeats: int) -> dict[str, float]:
    """Seconds of this thread that one call takes: the minimum over the rounds, in each of which everybody has a turn.

    Args:
        runs: name → (call, how often in a turn).
    """
    best = dict.fromkeys(runs, float("inf"))
    for run, _ in 2 * [*runs.values()]:  # twice: what is compiled may be compiled again when shapes repeat
        run()
    for _ in range(repeats):
        for name, (run, times) in runs.items():
            started = time.thread_time()
            for _ in range(times):
                run()
            best[name] = min(best[name], (time.thread_time() - started) / times)
    return best
