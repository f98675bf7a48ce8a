"""An X-LoRA router as PEFT's own X-LoRA folder: the reverse of `recycler.routers.xlora_checkpoint`.

::

    DIR/  adapter_config.json          peft_type XLORA, and where the adapters lie
          adapter_model.safetensors    the classifier
          adapters/0, adapters/1, ...  the adapters as plain LoRA, scalings folded in

PEFT calls its adapters "0", "1", … whatever they are called; only under these names does it activate them. Which is which is in
export.json, under "called". PEFT 0.21 leaves out classifier layers whose number is such a name when it saves; here all are written, and it reads them.

Dimensions in names: E adapter, H input width of a head, L site.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recycler.exporting import mixtures
from recycler.exporting.peft import base_id
from recycler.routers.xlora import ALL, XLora
from recycler.zoo.errors import InputError, shorten
from recycler.zoo.writing import write_adapter

if TYPE_CHECKING:
    from recycler.routed import RoutedModel
    from recycler.scoring import Progress

_KEY = "base_model.internal_xlora_classifier.layers"
_DROPOUT = 0.2  # PEFT's own default; with it a hidden layer is three modules: linear, ReLU, dropout


def write(model: RoutedModel, folder: Path, progress: Progress) -> dict[str, Any]:
    """Writes the folder; `write_config` says once more where it lies, when it is moved.

    Raises:
        InputError: the router is no X-LoRA, or does something that PEFT's cannot.
    """
    from safetensors.torch import save_file

    router = _exportable(model)
    places = {name: str(number) for number, name in enumerate(router.adapters)}
    step = progress(len(places), "writing adapters")
    for name, number in places.items():
        into = folder / "adapters" / number
        into.mkdir(parents=True)
        sites = mixtures.read_factors(model, [name])[name]
        write_adapter(into, sites, base=base_id(model), base_revision=model.source.revision, task_type="CAUSAL_LM")
        step()
    tensors = {f"{_KEY}.{number}": tensor for number, tensor in _classifier(router, model).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_config(model, folder, folder)
    return {"called": {number: name for name, number in places.items()}, "classifier": {"layers": len(router.trunk) + 1}}


def write_config(model: RoutedModel, folder: Path, final: Path) -> None:
    """adapter_config.json of a folder that will lie at `final`: PEFT wants whole paths of the adapters."""
    router = model.router
    assert isinstance(router, XLora)
    config = router.config
    kept = config.top_k if config.top_k is not None and config.top_k < len(router.adapters) else None
    after = kept is not None and config.renormalise  # a softmax over those that are kept
    said = {
        "peft_type": "XLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_id(model),
        "revision": model.source.revision,
        "inference_mode": True,
        "hidden_size": model.reading.width,
        "adapters": {str(e): str(final.absolute() / "adapters" / str(e)) for e in range(len(router.adapters))},
        "enable_softmax": not after,
        "enable_softmax_topk": after,
        "softmax_temperature": 1.0,  # it is in the last layer
        "layerwise_scalings": ALL not in router.heads,
        "top_k_lora": kept,
        "xlora_depth": len(router.trunk) + 1,
        "xlora_size": len(router.trunk[0][1]) if router.trunk else 2048,
        "xlora_dropout_p": _DROPOUT,
        "use_trainable_adapters": False,
        "scaling_pass_value": 0.0,
        "global_scaling_weight": 1.0,
    }
    (folder / "adapter_config.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf8")


def _exportable(model: RoutedModel) -> XLora:
    """Raises InputError, naming all that PEFT's X-LoRA cannot do."""
    router = model.router
    if not isinstance(router, XLora):
        raise InputError(
            f"The router is {'none' if router is None else router.method()}, not xlora.",
            "PEFT's X-LoRA is a classifier on the base's last hidden state; another method's gates do not fit in.",
            "Fit one: recycle build-router xlora --profile NAME -o normalise=false",
            code="E_ROUTER",
        )
    config = router.config
    wrong = [
        (model.source.encoder_decoder, "the base is an encoder–decoder, whose states PEFT's X-LoRA does not find", ""),
        (config.normalise, "its classifier reads LN(H)", "-o normalise=false"),
        (config.frozen, "it decides once a prompt", "-o frozen=false"),
        (config.policy != "top_k", f"its policy is {config.policy}", "-o policy=top_k"),
        (isinstance(config.top_k, str), f"it keeps another number at each depth (top_k={config.top_k})", "-o top_k=2"),
        (config.standardise is not None, "its scores are standardised", "-o standardise=none"),
        (config.shared, "the average is always on", "-o shared=false"),
        (config.ranks is not None, "it chooses components", "-o ranks=none"),
    ]
    more = mixtures.beside_factors(model)
    for kind, what in (
        ("magnitude", "DoRA, and PEFT's X-LoRA refuses it"),
        ("bias", "a bias of B, and PEFT's X-LoRA does not weigh it"),
    ):
        if found := more[kind]:
            fix = f"build it without (recycle build-router --router DIR --remove {found[0]})"
            wrong.append((True, f"{shorten(found, 5)} {'has' if len(found) == 1 else 'have'} {what}", fix))
    said = [(what, fix) for is_so, what, fix in wrong if is_so]
    if said:
        raise InputError(
            "This router is not exported as PEFT's X-LoRA.",
            f"There it would route differently: {'; '.join(what for what, _ in said)}.",
            f"Build it for that: {', '.join(dict.fromkeys(fix for _, fix in said if fix)) or 'on a causal base'}.",
            code="E_ROUTER",
        )
    return router


def _sites(model: RoutedModel) -> list[str]:
    """All linears that an adapter touches, in the order in which the base defines its modules, which is PEFT's."""
    touched = set(model.sites)
    return [name for name, _ in model.base.named_modules() if name in touched]


def _classifier(router: XLora, model: RoutedModel) -> dict[str, Tensor]:
    """Its layers as PEFT numbers them, the temperature in the last one. A group's head, which is named after its first site, serves
    all of the group; PEFT has one for each linear."""
    groups = {site: group.name for group in model.engine.groups for site in group.sites}
    heads_of = {site: site if site in router.heads else name for site, name in groups.items()}
    sites = _sites(model)
    layers = list(router.trunk)
    if ALL in router.heads:
        weight_EH, bias_E = router.heads[ALL]
    else:
        heads = [router.heads[heads_of[site]] for site in sites]
        weight_EH, bias_E = torch.cat([w for w, _ in heads]), torch.cat([b for _, b in heads])
    layers.append((weight_EH / router.config.temperature, bias_E / router.config.temperature))
    found = {}
    for number, (weight, bias) in enumerate(layers):
        found[f"{3 * number}.weight"], found[f"{3 * number}.bias"] = weight.float().contiguous(), bias.float().contiguous()
    return found
