"""Adapters as vLLM and LoRAX take them, and what `recycle proxy` needs to choose among them.

::

    DIR/  adapters/<name>/   plain LoRA: one rank at all linears (padded with zeros), scalings folded in, no rank patterns
          adapters/mix-1/    mixtures, each as one adapter: the router's own, and those that prompts ask for
          model/             the routed model itself, for the proxy
          serve.sh           the server's command line
          server.json        what can be asked for, and what the server calls it

Neither server knows DoRA, a bias of B, or ranks that differ from linear to linear. DoRA becomes a plain update, cut to a rank, with an error
that is measured; a bias cannot be had and is refused. LoRAX can also merge adapters anew for each request, but only where they have one
rank, its linear merge adds up A's and B's apart, (Σ w B)(Σ w A), which is not Σ w BA, and its OpenAI API does not take the weights: it is
not used.

What the servers take is from their sources (vLLM's PEFTHelper, LoRAConfig and LoRAModel; LoRAX's merge strategies and its OpenAI API); the
files were not tried on either here, but every one of them is loaded with PEFT.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recycler.exporting import comparing, mixtures, peft
from recycler.exporting.options import BASE, Option, asked_for, nearest
from recycler.exporting.options import mixtures as table_of
from recycler.exporting.peft import base_id
from recycler.routers.merging import Update
from recycler.zoo import lowrank
from recycler.zoo.adapter import Factors
from recycler.zoo.errors import InputError, UsageError, shorten
from recycler.zoo.writing import write_adapter

if TYPE_CHECKING:
    from recycler.routed import RoutedModel
    from recycler.scoring import Progress
    from recycler.shots import Shot

SERVER = "server.json"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
MOST = {"vllm": 512, "lorax": 128}
_USUAL = 128  # where an update has to be cut at all
MOST_PROMPTS = 1000  # that are read for mixtures
_AT_ONCE = 8  # adapters in one batch; each takes memory of its own on the device
PORTS = {"vllm": 8000, "lorax": 8080}


@dataclass(frozen=True)
class Served:
    """What was written.

    Attributes:
        options: what a request can be given. errors: of those that were cut or converted, ‖ΔW − ΔW'‖ / ‖ΔW‖. rank: the largest.
    """

    options: list[Option]
    errors: dict[str, dict[str, Any]]
    rank: int


def write(
    model: RoutedModel,
    kind: str,
    folder: Path,
    final: Path,
    rank: int | None,
    progress: Progress,
    *,
    prompts: Sequence[Shot] = (),
    mixtures_of_prompts: int = 0,
) -> Served:
    """Writes the adapters and the mixtures, the routed model, and server.json.

    Args:
        kind: "vllm" or "lorax". final: where `folder` will lie. rank: cut adapters to it.
        prompts, mixtures_of_prompts: beside the router's own mixtures, so many that these prompts ask for; the first `MOST_PROMPTS`
            of them count.

    Raises:
        InputError: an adapter cannot be served. UsageError: there is no router, or the rank is more than the server takes.
    """
    router = model.router
    if router is None:
        raise UsageError("This model has no router.", "A request would be given nothing.", "Compose one: recycle compose")
    if model.source.encoder_decoder:
        raise InputError(
            "The base is an encoder–decoder.",
            f"{kind} serves adapters of causal models.",
            "Export it as an adapter for PEFT: --to peft",
            code="E_BASE",
        )
    if rank is not None and not 1 <= rank <= MOST[kind]:
        raise UsageError(
            f"--rank {rank}.", f"{kind} takes ranks of 1 to {MOST[kind]}.", f"Use --rank {MOST[kind]} or less.", code="E_OPTION"
        )
    if BASE in model.names:
        raise InputError(
            f"An adapter is called {BASE}.", "The proxy calls the bare base so.", "Fetch it under another name.", code="E_MODEL"
        )
    _refuse_biases(model, kind)
    wanted = {name: {name: 1.0} for name in model.names}
    mixed = table_of(router)
    if prompts and mixtures_of_prompts:
        some = prompts[:MOST_PROMPTS]
        shares_NE = mixtures.shares(model, some, progress(len(some), "what prompts are given"))
        mixed += asked_for(shares_NE, model.names, [*wanted.values(), *mixed, {}], mixtures_of_prompts)
    number = 0
    for weights in mixed:
        number += 1
        while f"mix-{number}" in wanted:
            number += 1
        wanted[f"mix-{number}"] = weights
    step = progress(len(wanted), "writing adapters")
    errors, largest = {}, 1
    for name, weights in wanted.items():
        made, loss = mixtures.updates(model, weights, _fitting(rank, MOST[kind]))
        largest = max(largest, *(update.a_RD.shape[0] for update in made.values()))
        into = folder / "adapters" / name
        into.mkdir(parents=True)
        write_adapter(into, _padded(made), base=base_id(model), base_revision=model.source.revision, task_type="CAUSAL_LM")
        report = loss.report()
        if report["error"] > lowrank.ROUNDING:
            errors[name] = report
        step()
    base = Option(BASE, {}, base_id(model) if kind == "vllm" else "")
    called = (lambda name: name) if kind == "vllm" else (lambda name: str(final.absolute() / "adapters" / name))
    options = [*(Option(name, weights, called(name)) for name, weights in wanted.items()), base]
    _with_model(model, folder / "model")
    said = {"schema_version": 1, "kind": kind, "options": [one.to_json() for one in options]}
    (folder / SERVER).write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf8")
    served = Served(options, errors, largest)
    lines = ["#!/bin/sh", 'cd "$(dirname "$0")" || exit', f'exec {command(model, kind, served, Path())} "$@"', ""]
    (folder / "serve.sh").write_text("\n".join(lines), encoding="utf8")
    return served


def command(model: RoutedModel, kind: str, served: Served, final: Path) -> str:
    """The server's command line, for a folder that lies at `final`, seen from where it is run."""
    base = base_id(model)
    words = ["vllm", "serve", base] if kind == "vllm" else ["lorax-launcher", "--model-id", base]
    if model.source.revision:
        words += ["--revision", model.source.revision]
    if kind == "lorax":
        return shlex.join([*words, "--adapter-source", "local", "--port", str(PORTS[kind])])
    names = [one.name for one in served.options if one.name != BASE]
    most = next(rank for rank in VLLM_RANKS if rank >= served.rank)
    words += ["--enable-lora", "--max-loras", str(min(len(names), _AT_ONCE)), "--max-cpu-loras", str(len(names))]
    words += ["--max-lora-rank", str(most), "--port", str(PORTS[kind]), "--lora-modules"]
    return shlex.join([*words, *(f"{name}={final / 'adapters' / name}" for name in names)])


def _refuse_biases(model: RoutedModel, kind: str) -> None:
    biased = mixtures.beside_factors(model)["bias"]
    if biased:
        raise InputError(
            f"{shorten(biased)} {'has' if len(biased) == 1 else 'have'} a bias of B, which {kind} does not add.",
            "It is no function of the input that A and B could take over.",
            f"Take it out of the router (recycle build-router --router DIR --remove {biased[0]}), or use --to merged or --to peft.",
            code="E_BIAS",
        )


def _fitting(rank: int | None, most: int) -> Callable[[Update, Any], tuple[Update, float]]:
    """Plain, and of a rank that is asked for, or that the server takes. What has to become plain is cut to a usual rank where nothing else
    is said."""

    def shape(update: Update, weight: Any) -> tuple[Update, float]:
        if update.scale_O is not None:
            return mixtures.plain(rank or _USUAL)(update, weight)
        return mixtures.shorter(rank or most)(update, weight)

    return shape


def _padded(updates: dict[str, Update]) -> dict[str, Factors]:
    """One rank at all sites: rows of zeros in A, columns of zeros in B."""
    rank = max(update.a_RD.shape[0] for update in updates.values())

    def of(update: Update) -> Factors:
        more = rank - update.a_RD.shape[0]
        a_RD = torch.nn.functional.pad(update.a_RD.float(), (0, 0, 0, more))
        return Factors(a_RD.contiguous(), torch.nn.functional.pad(update.b_OR.float(), (0, more)).contiguous())

    return {site: of(update) for site, update in updates.items()}


def _with_model(model: RoutedModel, folder: Path) -> None:
    """A composed copy; the model itself goes on with the files it has."""
    from recycler.composition import save

    folders = model.folders
    try:
        save(model, folder)
    finally:
        model.folders = folders


# ------------------------------------------------------------------------------------------------------------ the reduction


def answers(
    model: RoutedModel, folder: Path, options: Sequence[Option], prompts: list[dict[str, Tensor]]
) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """The reduction to one option a request, on prompts; every option that is used is loaded with PEFT.

    Returns:
        Each prompt's logits [T, V] under its option's mixture; those of the files that were written for it; the option's name.
    """
    chosen = []
    for inputs in prompts:
        plain = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        chosen.append(nearest(mixtures.share(model, plain), model.names, options)[0])
    meant: list[Tensor] = [torch.empty(0)] * len(prompts)
    got = list(meant)
    for name in dict.fromkeys(one.name for one in chosen):
        rows = [i for i, one in enumerate(chosen) if one.name == name]
        some = [prompts[i] for i in rows]
        with model.mixture(chosen[rows[0]].weights):
            of_mixture = comparing.logits(model, some)
        of_file = of_mixture if name == BASE else peft.answers(model, folder / "adapters" / name, some)
        for i, one, other in zip(rows, of_mixture, of_file, strict=True):
            meant[i], got[i] = one, other
    return meant, got, [one.name for one in chosen]
