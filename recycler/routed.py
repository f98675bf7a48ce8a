"""RoutedModel: base + adapters + router. Forward and generate on mixed batches.

It behaves like the base it wraps (``model.config``, ``model.generate``, ``pipeline(model=model)``); what it adds is the mixture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recycler import batching
from recycler.base import Base
from recycler.engine.attach import Attachment
from recycler.engine.bank import Control
from recycler.engine.merge import merged
from recycler.engine.plan import ExecutionPlan, execution_plan
from recycler.reading import Reading
from recycler.routers.base import Router
from recycler.routers.protocol import Few, Rowwise, Weights
from recycler.routers.sequence import Decision
from recycler.routers.static import StaticRouter
from recycler.zoo.errors import UsageError, choices

if TYPE_CHECKING:
    from recycler.converting.truncation import Truncation
    from recycler.engine.tiers import Shelf
    from recycler.sharing.pushing import Pushed
    from recycler.zoo.adapter import Adapter, Factors


def _named(args: Sequence[Any], inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """A model's inputs by name: the first that has none is input_ids."""
    ids = args[0] if args else inputs.get("inputs")
    return inputs if ids is None else {"input_ids": ids, **inputs}


def _known_to_transformers() -> None:
    """A pipeline warns of whatever is not in this table, with all of it; the trainer reads in it how labels are shifted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TABLE

    TABLE.setdefault("recycler", RoutedModel.__name__)


def _require(router: Router, names: tuple[str, ...]) -> None:
    if router.adapters != names:
        raise UsageError(
            f"The router is for {', '.join(router.adapters)}.", f"The model's are {', '.join(names)}, in this order.", ""
        )


@contextmanager
def _checkpoints(base: Any, control: Control) -> Iterator[None]:
    """Where the base checkpoints its activations, backward runs layers again, when the ``with`` blocks around their forward have
    ended: under the mixture that they had."""
    name = "_gradient_checkpointing_func"
    layers = [m for m in base.modules() if name in vars(m)] if base.training and torch.is_grad_enabled() else []

    def kept(checkpoint: Any) -> Any:
        def run(layer: Any, *args: Any) -> Any:
            then = dict(vars(control))

            def again(*inputs: Any) -> Any:
                with control.set(**then):
                    return layer(*inputs)

            return checkpoint(again, *args)

        return run

    before = [getattr(layer, name) for layer in layers]
    try:
        for layer, checkpoint in zip(layers, before, strict=True):
            setattr(layer, name, kept(checkpoint))
        yield
    finally:
        for layer, checkpoint in zip(layers, before, strict=True):
            setattr(layer, name, checkpoint)


@dataclass(frozen=True)
class Firing:
    """Who fired: the weights a forward used.

    Attributes:
        adapters: names, in the order of the last axis.
        sites: module path → weights [B, T, E].
        mask_BT: True at real tokens; None when the inputs had no padding mask.
    """

    adapters: tuple[str, ...]
    sites: Mapping[str, Tensor]
    mask_BT: Tensor | None = None

    def share(self) -> Tensor:
        """[B, E]: each adapter's mean weight over sites and real tokens."""
        rows = []
        for w_BTE in self.sites.values():
            # Sites of the other stream (a decoder's) have other lengths, and no padding in generation order.
            m_BT = self.mask_BT if self.mask_BT is not None and self.mask_BT.shape[1] == w_BTE.shape[1] else None
            m_BT1 = torch.ones_like(w_BTE[..., :1]) if m_BT is None else m_BT[..., None].to(w_BTE)
            rows.append((w_BTE * m_BT1).sum(1) / m_BT1.sum(1).clamp(min=1))
        return torch.stack(rows).mean(0)

    def top(self, count: int = 3) -> list[list[tuple[str, float]]]:
        """Per row, the `count` adapters with the largest share, largest first."""
        share_BE = self.share()
        value_BK, index_BK = share_BE.topk(min(count, share_BE.shape[-1]), dim=-1)
        return [
            [(self.adapters[i], v) for v, i in zip(values, indices, strict=True)]
            for values, indices in zip(value_BK.tolist(), index_BK.tolist(), strict=True)
        ]


class RoutedModel(nn.Module):
    """Base + adapters + router.

    Args:
        base: a loaded base.
        adapters: with factors for sites of that base; their order is the order of weights.
        router: None leaves every forward to an explicit mixture (`mixture`, `only`, `disabled`).
        shelf: holds the adapters' factors where they are paged in from disk (`recycler.load` with `resident`); `adapters` then need
            none, and are in the order of the shelf.
        spare: keeps room for so many adapters more, each as large as the largest now (`exchange`); none where None.

    Attributes:
        adapters: the Adapter records; without their factors once there is a router.
        router: the router, or None; `use` exchanges it.
    """

    def __init__(
        self,
        base: Base,
        adapters: Sequence[Adapter],
        router: Router | None = None,
        *,
        shelf: Shelf | None = None,
        spare: int | None = None,
    ) -> None:
        super().__init__()
        _known_to_transformers()
        self.source, self.adapters, self.router = base, tuple(adapters), router
        self.base, self.tokenizer = base.model, base.tokenizer
        self.folders: dict[str, Path] = {}  # where each adapter's files lie
        self.truncated: dict[str, Truncation] = {}  # adapters that were cut to a rank, and what that lost
        self.warnings: list[str] = []  # what loading has to say
        self.tasks: tuple[str | None, ...] | None = None  # each row's task, inside `labelled`
        factors: dict[str, dict[str, Factors]] = {} if shelf is None else {site: {} for site in shelf.sites}
        for adapter in self.adapters if shelf is None else ():
            for site, update in adapter.sites.items():
                factors.setdefault(site, {})[adapter.name] = update
        self.engine = Attachment(base.model, factors, self.names, router, shelf=shelf, spare=spare)
        # Only fitting reads factors again; a finished model does not keep a second copy, in fp32, of what the engine holds.
        self.factors = factors if router is None and shelf is None else {}
        if router is not None:
            self.adapters = tuple(replace(adapter, sites={}) for adapter in self.adapters)
        self.train(False)

    # -- what is in it

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order of weights."""
        return tuple(adapter.name for adapter in self.adapters)

    @property
    def sites(self) -> tuple[str, ...]:
        """Module paths that at least one adapter touches."""
        return tuple(bank.group.sites[s] for bank in self.engine.banks for s in bank.touched)

    @property
    def extra_bytes(self) -> int:
        """Memory that adapters and gates take beside the base; of adapters that are paged, what is in memory now."""
        shelf = self.engine.shelf
        return sum(t.numel() * t.element_size() for t in self.engine.buffers()) + (0 if shelf is None else shelf.held)

    def __getattr__(self, name: str) -> Any:
        """Whatever is not here is the base's: config, device, generation_config, can_generate, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)

    def use(self, router: Router | None) -> None:
        """Exchanges the router; the adapters stay as they are.

        Raises:
            UsageError: it was built for other adapters, or for another order of them.
        """
        if router is not None:
            _require(router, self.names)
        self.engine.use(router)
        self.router = router

    def exchange(self, adapters: Sequence[Adapter], router: Router, folders: Mapping[str, Path] | None = None) -> None:
        """Takes in other adapters, and the router that was built for them, in place: what was compiled stays compiled. The model
        must have been made with `spare`.

        ::

            router = recycler.add_adapter(model.router, "poem", zoo=zoo)
            poem = recycler.build.read_adapters(zoo, ["poem"], model.source)
            model.exchange([*model.adapters, *poem], router, {"poem": zoo.folder("poem")})

        A graph stays as it is where a router's scores are linear in the input (arrow, phatgoose, ridge), or it decides once a sequence,
        or for everything, and its options stay as they are. Others are traced again. It is the dense path that is compiled.

        Args:
            adapters: in the router's order. Those that the model holds may come without their factors, as they are in
                `self.adapters`.
            folders: where new ones' files lie; `save_pretrained` copies them.

        Raises:
            UsageError: the model has no room, or too little; new adapters touch other linears than those before, or have a DoRA
                magnitude or a bias where none had; the router is for others. The model is as it was then.
        """
        names = tuple(adapter.name for adapter in adapters)
        if self.engine.columns is None:
            raise UsageError(
                "This model has no room for other adapters.",
                "Its tensors are as large as what they hold.",
                "Make it with spare=N.",
                code="E_MEMORY",
            )
        _require(router, names)
        held = {adapter.name: adapter for adapter in self.adapters}
        changed = [a.name for a in adapters if not a.sites and a.name in held and a.sha256 != held[a.name].sha256]
        if changed:
            raise UsageError(f"{', '.join(changed)} changed, and came without factors.", "", "Read them again.")
        self.engine.exchange(adapters, self.names, router)
        self.router, self.factors = router, {}
        self.adapters = tuple(replace(adapter, sites={}) for adapter in adapters)
        folders = {**self.folders, **(folders or {})}
        self.folders = {name: folders[name] for name in names if name in folders}
        kept = [a.name for a in adapters if a.name in held and a.sha256 == held[a.name].sha256]
        self.truncated = {name: facts for name, facts in self.truncated.items() if name in kept}

    # -- running

    def forward(self, *args: Any, **inputs: Any) -> Any:
        with self.planned(_named(args, inputs)), _checkpoints(self.base, self.engine.control):
            return self.base(*args, **inputs)

    def generate(self, *args: Any, **inputs: Any) -> Any:
        """As the base's own `generate`, with its options.

        Raises:
            UsageError: it is to page its cache.
        """
        if inputs.get("cache_implementation") == "paged":
            raise UsageError(
                "`generate` does not page its cache.",
                "Its rows are padded, and continuous batching would read padding as text.",
                "Use generate_batch, with a list of token ids for each prompt.",
                code="E_MEMORY",
            )
        with self.planned(_named(args, inputs)):
            return self.base.generate(*args, **inputs)

    @contextmanager
    def planned(self, prompt: Mapping[str, Any]) -> Iterator[Any]:
        """Lets the router decide on `prompt` what it decides once a sequence; every forward in the ``with`` block uses it.

        `forward` and `generate` do so by themselves, on their own inputs. Around a forward that is given prompt and answer at
        once this says what the prompt is.

        Args:
            prompt: ``input_ids`` and ``attention_mask``; what the mask hides is not read.

        Yields:
            What the router decided: a plan, or None from a router that has nothing to decide beforehand.
        """
        control = self.engine.control
        if self.router is None or control.plan is not None or control.forced is not None or not control.enabled:
            yield control.plan
            return
        plan = self.router.prepare(self.reading, prompt)
        few = Few.of(plan.weights_BE) if isinstance(plan, Decision) else control.few
        if self.engine.shelf is not None and few is not None:
            self.engine.shelf.promote(few.used)
        wide = plan
        if isinstance(plan, Decision) and self.engine.columns is not None:
            wide = replace(plan, weights_BE=self.engine.widen(plan.weights_BE))
        with control.set(plan=wide, few=few):
            yield plan

    @property
    def reading(self) -> Reading:
        """What the router may read of a prompt."""
        return Reading(self)

    @contextmanager
    def labelled(self, tasks: Sequence[str | None]) -> Iterator[RoutedModel]:
        """Says which task each row of the inputs is of, for routers that want to be told (`oracle`)."""
        before, self.tasks = self.tasks, tuple(tasks)
        try:
            yield self
        finally:
            self.tasks = before

    # -- continuous batching: the new tokens of many prompts are one row, and nothing there says whose a token is

    def generate_batch(self, inputs: Sequence[Sequence[int]], *args: Any, **options: Any) -> dict[str, Any]:
        """As the base's own `generate_batch`. Where one mixture holds for a whole sequence, each prompt has its own, in the same batch.

        Args:
            inputs: each prompt's token ids, without padding.

        Returns:
            ``req_0``, ``req_1``, ... → what was generated for each prompt, in their order.

        Raises:
            UsageError: what is decided for a prompt is neither a mixture for all of it nor made token by token; or there are
                more or fewer decisions than prompts.
        """
        return batching.generate(self, inputs, *args, **options)

    def init_continuous_batching(self, *args: Any, **options: Any) -> Any:
        """As the base's own. The manager keeps to one mixture, or to routers that decide token by token.

        Raises:
            UsageError: something is decided once a sequence.
        """
        batching.pack(self)
        return self.base.init_continuous_batching(*args, **options)

    def continuous_batching_context_manager(self, *args: Any, **options: Any) -> Any:
        """As the base's own; see `init_continuous_batching`."""
        batching.pack(self)
        return self.base.continuous_batching_context_manager(*args, **options)

    # -- other mixtures than the router's

    @contextmanager
    def mixture(self, weights: Weights | Mapping[str, float]) -> Iterator[RoutedModel]:
        """Overrides the router in a ``with`` block.

        Args:
            weights: name → weight (others are 0); or a tensor [E], [B, E] or [B, T, E]; or a function, as routers are fitted with
                (`recycler.routers.protocol`).
        """
        if isinstance(weights, Mapping):
            weights = self._weights_E(weights)
        few = None
        if isinstance(weights, Rowwise):
            few, weights = weights.few, weights.weights
        elif isinstance(weights, Tensor):
            self._require_columns(weights)
            few = Few.of(weights) if weights.dim() <= 2 else None
            weights = self.engine.widen(weights.to(self.source.device))
        with self.engine.control.set(forced=weights, few=few):
            yield self

    def _weights_E(self, weights: Mapping[str, float]) -> Tensor:
        unknown = sorted(set(weights) - set(self.names))
        if unknown:
            raise UsageError(
                f"There is no adapter {', '.join(unknown)} in this model.",
                "",
                f"Choose {choices(self.names)}.",
                code="E_UNKNOWN",
            )
        return torch.tensor([float(weights.get(name, 0.0)) for name in self.names])

    def _require_columns(self, weights_E: Tensor) -> None:
        """Fewer columns would be taken for the first adapters' without a word."""
        if weights_E.dim() == 0 or weights_E.shape[-1] != len(self.names):
            raise UsageError(
                f"The weights have the shape {list(weights_E.shape)}.",
                f"The model holds {len(self.names)} adapters; each needs its weight.",
                "Give one number for each, in the order of model.names, or a mapping from name to weight.",
            )

    def only(self, name: str) -> Any:
        """``with model.only("math"):`` that adapter alone, at weight 1."""
        return self.mixture({name: 1.0})

    @contextmanager
    def disabled(self) -> Iterator[RoutedModel]:
        """``with model.disabled():`` the bare base."""
        with self.engine.control.set(enabled=False):
            yield self

    @contextmanager
    def merged(self, weights: Mapping[str, float] | Tensor | None = None) -> Iterator[RoutedModel]:
        """``with model.merged({"math": 0.7, "code": 0.3}):`` one mixture written into the base's weights, which are put back
        afterwards to the bit: no adapter costs anything meanwhile. For long runs; `mixture` is quicker to begin with.

        Args:
            weights: name → weight, or [E]; by default those of a router that is one mixture for everything.

        Raises:
            UsageError: the router decides by the input; or a linear cannot be written (quantised, shared, offloaded).
        """
        if weights is None:
            if not isinstance(self.router, StaticRouter):
                raise UsageError("This model has no single mixture.", "", "Name one: model.merged({...}).")
            weights = self.router.weights_E
        weights_E = self._weights_E(weights) if isinstance(weights, Mapping) else weights.cpu()
        self._require_columns(weights_E)
        with merged(self.engine, self.base, weights_E):
            yield self

    @torch.no_grad()
    def weights_for(self, inputs: Mapping[str, Any]) -> Firing:
        """Runs one forward and returns who fired, per site and token."""
        inputs = {k: v.to(self.source.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        if self.source.encoder_decoder and "decoder_input_ids" not in inputs:
            start = self.base.config.decoder_start_token_id
            rows = inputs["input_ids"].shape[0]
            inputs["decoder_input_ids"] = torch.full((rows, 1), start, device=self.source.device)
        record: dict[str, Tensor] = {}
        with self.engine.control.set(record=record):
            self(**inputs)
        mask = inputs.get("attention_mask")
        return Firing(self.names, record, None if mask is None else mask.bool())

    def execution_plan(self, tokens: int, sequences: int = 1) -> ExecutionPlan:
        """Which path a forward of so many tokens takes at each site, and why; print it. The choice is made by shapes alone;
        ``model.engine.control.path = "dense"`` overrides it. In a ``with`` block of `mixture`, for that mixture."""
        return execution_plan(self.engine, tokens, sequences)

    # -- on disk

    def save_pretrained(self, folder: str | Path, *, force: bool = False) -> Path:
        """Writes the model's directory (see `recycler.composition`); the base is referenced, not copied."""
        from recycler.composition import save

        return save(self, Path(folder), force=force)

    def push_to_hub(self, repo_id: str, **options: Any) -> Pushed:
        """Uploads the model to the Hub; options as `recycler.push` has them, and ``evaluation`` for its card."""
        from recycler.sharing.pushing import push_model

        return push_model(self, repo_id, **options)

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, **options: Any) -> RoutedModel:
        """Loads a composed model, from a folder or the Hub (see `recycler.load`)."""
        from recycler.loading import load

        return load(path_or_id, **options)
