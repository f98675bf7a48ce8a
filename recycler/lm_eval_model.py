"""lm-evaluation-harness's view of a routed model: the model type ``recycler``.

lm-eval looks for no models in other packages, so that whoever wants the type imports this file; as a program it is lm-eval's own
command line with the type registered::

    python -m recycler.lm_eval_model run --model recycler --model_args pretrained=model/ --tasks arc_easy --limit 50
    python -m recycler.lm_eval_model run --model recycler --model_args pretrained=model/,only=math-lora --tasks gsm8k

``recycle eval MODEL --lm-eval arc_easy`` is the short way, with baselines beside it.

What a router decides once a sequence it decides on a request's context alone: a continuation that is scored is not seen, just as
`generate` has not seen it. Texts without a context (``loglikelihood_rolling``) are decided on the one token that lm-eval puts before.

Dimensions in names: B batch, T token, E adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm  # type: ignore[import-untyped]

from recycler.evaluating.harness import require_lm_eval
from recycler.routed import RoutedModel
from recycler.routers.base import Router
from recycler.zoo.errors import UsageError

require_lm_eval()

from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

if TYPE_CHECKING:
    Request = tuple[Any, list[int], list[int]]  # ((context, continuation) or None, context's ids, continuation's ids)


@register_model("recycler")
class RecyclerLM(HFLM):
    """A routed model for lm-eval.

    Args:
        pretrained: a composed model's folder or Hub id, or a model that is loaded.
        base: overrides the base that the model names.
        router: another router over the same adapters, a folder or a name in the zoo.
        only: this adapter alone, or "base" for none.
        weights: one mixture [E] for everything instead of `only`, as a tensor.
        device, dtype, resident: as `recycler.load` takes them.
        batch_size: rows in one forward, or "auto".
        options: whatever else lm-eval's own ``hf`` takes for a model that is loaded: ``max_length``, ``add_bos_token``, ...

    Raises:
        UsageError: there is no such adapter, `only` and `weights` are both given, or the router is for other adapters. What
            `recycler.load` raises.
    """

    logits_cache: bool

    def __init__(
        self,
        pretrained: str | Path | RoutedModel,
        base: str | None = None,
        router: str | Path | None = None,
        only: str | None = None,
        weights: Tensor | None = None,
        device: str | None = None,
        dtype: str = "auto",
        resident: int | str | None = None,
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        from recycler.composition import load

        if isinstance(pretrained, RoutedModel):
            model = pretrained
        else:
            if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
                device = None  # lm-eval's command line says cuda:0 unless told otherwise, and its own models go to the CPU then
            model = load(pretrained, base=base, resident=resident, device=device, dtype=dtype)
        if router is not None:
            from recycler.build import router_folder
            from recycler.routers.discovery import load_router
            from recycler.zoo.store import Zoo

            model.use(load_router(router_folder(Zoo(), str(router))))
        if only is not None:
            if weights is not None:
                raise UsageError("only and weights are both given.", "Each says who answers.", "Leave one of them out.")
            weights = model._weights_E({} if only == "base" else {str(only): 1.0})
        self.weights = weights
        backend = "seq2seq" if model.source.encoder_decoder else "causal"
        super().__init__(pretrained=model, tokenizer=model.tokenizer, backend=backend, batch_size=batch_size, **options)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results."""
        model: RoutedModel = self.model
        weights = None if self.weights is None else self.weights.tolist()
        return {
            "model_num_parameters": sum(p.numel() for p in model.base.parameters()),
            "model_dtype": str(model.base.dtype),
            "model_revision": model.source.revision,
            "model_sha": "",
            "base": model.source.id,
            "adapters": {adapter.name: adapter.sha256 for adapter in model.adapters},
            "router": None if model.router is None or weights else model.router.method(),
            "weights": weights,
        }

    # -- who answers

    @contextmanager
    def _answering(self) -> Iterator[None]:
        if self.weights is None:
            yield
        else:
            with self.model.mixture(self.weights):
                yield

    def _model_call(self, *args: Any, **inputs: Any) -> Tensor:
        with self._answering():
            logits_BTV: Tensor = super()._model_call(*args, **inputs)
        return logits_BTV

    def _model_generate(self, *args: Any, **options: Any) -> Tensor:
        with self._answering():
            ids_BT: Tensor = super()._model_generate(*args, **options)
        return ids_BT

    # -- what is decided once a sequence, on contexts

    @property
    def decides_on_contexts(self) -> bool:
        """Whether a continuation could leak into a decision. An encoder–decoder's never does: its input is the context."""
        router = self.model.router
        decides = router is not None and type(router).prepare is not Router.prepare
        return decides and self.weights is None and self.backend == "causal"

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if not self.decides_on_contexts:
            with self._sharing(self.logits_cache and _end_alike(requests)):
                scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return scores
        # lm-eval's own order, so that a batch that is handed on stays as it is.
        order = sorted(
            range(len(requests)), key=lambda i: (-len(requests[i][1] + requests[i][2]), requests[i][1] + requests[i][2])
        )
        result: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        rows = override_bs or self.batch_size
        if rows == "auto":
            rows = self._detect_batch_size([requests[i] for i in order], 0)
        for begin in tqdm(range(0, len(order), rows), disable=disable_tqdm, desc="Running loglikelihood requests"):
            numbers = order[begin : begin + rows]
            batch = [requests[i] for i in numbers]
            with self.model.planned(self._contexts(batch)), self._sharing(False):
                scores = super()._loglikelihood_tokens(batch, True, len(batch))
            for i, score in zip(numbers, scores, strict=True):
                result[i] = score
        return result

    @contextmanager
    def _sharing(self, shared: bool) -> Iterator[None]:
        """Whether requests of the same tokens share a forward, as far as lm-eval is concerned."""
        before, self.logits_cache = self.logits_cache, shared
        try:
            yield
        finally:
            self.logits_cache = before

    def _contexts(self, batch: Sequence[Request]) -> Mapping[str, Tensor]:
        """A batch's contexts, as far as the model will see them, as `generate` would be given them."""
        seen = [
            torch.tensor((context + scored)[-(self.max_length + 1) :][: -len(scored)], device=self.device)
            for _, context, scored in batch
        ]
        pad = self.tokenizer.pad_token_id
        ids_BT = pad_sequence(seen, batch_first=True, padding_value=pad, padding_side="left")
        mask_BT = pad_sequence([torch.ones_like(ids_T) for ids_T in seen], batch_first=True, padding_side="left")
        return {"input_ids": ids_BT, "attention_mask": mask_BT}


def _end_alike(requests: Sequence[Request]) -> bool:
    """Whether requests of the same tokens have contexts of the same length: lm-eval 0.4 scores the wrong tokens where they share a
    forward and have not."""
    lengths: dict[tuple[int, ...], int] = {}
    return all(lengths.setdefault(tuple(ids + more[:-1]), len(ids)) == len(ids) for _, ids, more in requests)


def main() -> None:
    """lm-eval's command line, with this model type."""
    from lm_eval.__main__ import cli_evaluate

    from recycler.terminal import complain
    from recycler.zoo.errors import RecycleError

    try:
        cli_evaluate()
    except RecycleError as error:
        complain(error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
