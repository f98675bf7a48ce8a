"""The export ladder: what of a routed model other software can load, and what each rung loses.

============  ===================================================  =============================================================
rung          what comes out                                       what is lost
============  ===================================================  =============================================================
``xlora``     PEFT's X-LoRA folder                                 nothing but the second KV cache (X-LoRA routers only)
``vllm``,     adapters and mixtures, a command line, and           one decision a request: what a router does token by token
``lorax``     `recycle proxy`, which chooses one for each request
``peft``      one PEFT adapter                                     one mixture for everything
``merged``    full weights                                         the same, and rounding to the base's dtype
============  ===================================================  =============================================================

What is lost is measured on prompts, by the logits, from what was written: loaded by the other software where it can be had here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycler.exporting import cards, comparing, folders, merged, peft, servers, xlora
from recycler.exporting.comparing import Difference
from recycler.exporting.mixtures import Mixture, choose
from recycler.run import prompt_of
from recycler.scoring import Progress, silent
from recycler.shots import Shot, read_shots
from recycler.zoo.errors import InputError, UsageError, shorten

if TYPE_CHECKING:
    from torch import Tensor

    from recycler.routed import RoutedModel

_MIXTURES = 8
KINDS = ("peft", "merged", "vllm", "lorax", "xlora")
Prompts = str | Path | Sequence[str]


@dataclass(frozen=True)
class Export:
    """What was exported.

    Attributes:
        folder: where it lies. facts: its manifest, export.json. differences: what was compared, in words, and how far apart it is.
    """

    folder: Path
    facts: Mapping[str, Any]
    differences: Mapping[str, Difference]

    def lines(self) -> list[str]:
        """For people: what was made, and what that loses."""
        return cards.lines(self.folder, self.facts, {what: one.line() for what, one in self.differences.items()})

    def to_json(self) -> dict[str, Any]:
        """The manifest, and the folder."""
        return {**self.facts, "folder": str(self.folder)}


def export(
    model: RoutedModel | str | Path,
    to: str,
    out: str | Path,
    *,
    mixture: Mapping[str, float] | None = None,
    mean_of: Prompts | None = None,
    mixtures: int | None = None,
    rank: int | None = None,
    prompts: Prompts | None = None,
    base: str | None = None,
    force: bool = False,
    progress: Progress = silent,
    **loading: Any,
) -> Export:
    """Writes a routed model in a form that other software loads, and measures what that loses.

    Args:
        model: a composed model, its folder, or its id on the Hub.
        to: "peft", "merged", "vllm", "lorax" or "xlora".
        out: a new or empty folder.
        mixture: adapter → weight, for "peft" and "merged" of a router that decides by the input.
        mean_of: instead, the router's mean share on these prompts: a JSONL file, or texts. For "vllm" and "lorax", the prompts whose
            mixtures are looked for.
        mixtures: how many of the mixtures that `mean_of` asks for most become adapters too ("vllm", "lorax"); 8 where None. Each joins
            up to three adapters, and is exact, at the sum of their ranks.
        rank: cut what is written to this rank ("peft", "vllm", "lorax"); the error is measured.
        prompts: what is compared on, a JSONL file or texts; by default those of `mean_of`, else a few sentences. 16 at most count.
        base, loading: as `recycler.load` takes them, for a model that has to be loaded.
        force: replace an export that is there.

    Raises:
        UsageError: there is no such kind, an option does not go with it, or `out` is in use.
        InputError: the model cannot be exported so, or what was written does not answer as it should.
    """
    out = Path(out)
    _check(to, mixture=mixture, mean_of=mean_of, mixtures=mixtures, rank=rank)
    folders.check_output(out, force)
    mean = None if mean_of is None else _read(mean_of)
    shots = _read(prompts) if prompts is not None else list(mean or comparing.DEFAULT)
    if isinstance(model, (str, Path)):
        from recycler.loading import load

        model = load(model, base=base, **loading)
    elif base is not None or loading:
        raise UsageError("This model is loaded already.", "base, dtype and device are for loading it.", "Leave them out.")
    with folders.staged(out, force) as folder:
        made = _Rung(model, to, folder, out, shots, progress)
        if to in servers.MOST:
            facts = made.server(rank, mean or (), _MIXTURES if mixtures is None else mixtures)
        elif to == "xlora":
            facts = made.xlora()
        else:
            facts = made.fixed(choose(model, mixture, mean, progress), rank)
        facts = _described(model, to, facts, made.differences)
        (folder / "README.md").write_text(cards.readme(facts), encoding="utf8")
        facts = folders.finish(folder, facts)
    return Export(out, facts, made.differences)


class _Rung:
    """One export on its way: its model, its folder, its prompts, and what was found."""

    def __init__(
        self, model: RoutedModel, kind: str, folder: Path, final: Path, shots: Sequence[Shot], progress: Progress
    ) -> None:
        self.model, self.kind, self.folder, self.final, self.progress = model, kind, folder, final, progress
        self.prompts = comparing.inputs_of(model, shots)
        self.differences: dict[str, Difference] = {}

    def fixed(self, mixture: Mixture, rank: int | None) -> dict[str, Any]:
        """One mixture for everything: an adapter, or merged weights."""
        if self.kind == "peft":
            said = peft.write(self.model, mixture, self.folder, rank, self.progress)
            got = peft.answers(self.model, self.folder, self.prompts)
        else:
            said = merged.write(self.model, mixture, self.folder, self.progress)
            got = merged.answers(self.model, self.folder, self.prompts)
        with self.model.mixture(mixture.weights):
            meant = self._logits("the mixture")
        self._compare("the mixture itself", meant, got, exact=rank is None)
        if self.model.router is not None and not mixture.own:
            self._compare("the routed model", self._logits("the routed model"), got)
        return {"mixture": mixture.to_json(), **said}

    def server(self, rank: int | None, asking: Sequence[Shot], mixtures: int) -> dict[str, Any]:
        """Adapters for a server, and one of them for each request."""
        served = servers.write(
            self.model, self.kind, self.folder, self.final, rank, self.progress, prompts=asking, mixtures_of_prompts=mixtures
        )
        meant, got, chosen = servers.answers(self.model, self.folder, served.options, self.prompts)
        self._compare("the adapters that requests get", meant, got, exact=not served.errors)
        self._compare("the routed model", self._logits("the routed model"), got)
        return {
            "options": [one.to_json() for one in served.options],
            "cut": served.errors,
            "rank": served.rank,
            "chosen": {name: chosen.count(name) for name in dict.fromkeys(chosen)},
            "serve": servers.command(self.model, self.kind, served, self.final.absolute()),
            "upstream": f"http://127.0.0.1:{servers.PORTS[self.kind]}",
        }

    def xlora(self) -> dict[str, Any]:
        """PEFT's own X-LoRA."""
        said = xlora.write(self.model, self.folder, self.progress)
        got = peft.answers(self.model, self.folder, self.prompts)
        xlora.write_config(self.model, self.folder, self.final)
        self._compare("the routed model", self._logits("the routed model"), got, exact=True)
        return said

    def _logits(self, what: str) -> list[Tensor]:
        return comparing.logits(self.model, self.prompts, self.progress(len(self.prompts), what))

    def _compare(self, what: str, reference: list[Tensor], got: list[Tensor], exact: bool = False) -> None:
        found = self.differences[what] = comparing.difference(reference, got)
        if exact:
            comparing.require_exact(found, self.model, f"The export as {self.kind}")


def _described(
    model: RoutedModel, kind: str, facts: Mapping[str, Any], differences: Mapping[str, Difference]
) -> dict[str, Any]:
    """The manifest, but for the list of files."""
    used = facts.get("mixture", {}).get("weights", model.names)
    recorded = (model.router.facts if model.router is not None else {}).get("base") or {}
    return {
        "kind": kind,
        "base": {"id": peft.base_id(model), "revision": model.source.revision, "fingerprint": recorded.get("fingerprint")},
        "router": None if model.router is None else model.router.method(),
        "adapters": [
            {"name": a.name, "source": a.source, "revision": a.revision, "sha256": a.sha256, "licence": a.licence}
            for a in model.adapters
            if a.name in used
        ],
        "encoder_decoder": model.source.encoder_decoder,
        "dtype": str(model.base.dtype).removeprefix("torch."),
        **facts,
        "differences": {f"from {what}": one.to_json() for what, one in differences.items()},
        "versions": {name: version(name) for name in ("recycler", "torch", "transformers", "peft")},
    }


def _check(to: str, **given: Any) -> None:
    """Raises UsageError for a kind that there is not, and for options that do not go with it."""
    if to not in KINDS:
        raise UsageError(f"There is no export to {to!r}.", "", f"Choose {', '.join(KINDS)}.")
    fits = {
        "mixture": ("peft", "merged"),
        "mean_of": ("peft", "merged", *servers.MOST),
        "mixtures": tuple(servers.MOST),
        "rank": ("peft", *servers.MOST),
    }
    wrong = [name for name, value in given.items() if value is not None and to not in fits[name]]
    if wrong:
        name = wrong[0]
        raise UsageError(
            f"--{name.replace('_', '-')} does not go with --to {to}.",
            f"It is for {', '.join(fits[name])}.",
            "Leave it out, or export to one of these.",
        )
    if given["mixtures"] is not None and given["mean_of"] is None:
        raise UsageError(
            "--mixtures needs prompts.",
            "Which mixtures are wanted is seen on them.",
            "Add --mean-of prompts.jsonl",
            code="E_OPTION",
        )


def _read(source: Prompts) -> list[Shot]:
    """Prompts, from a JSONL file or as they are."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.is_file():
            raise UsageError(f"There is no file {path}.", "", "Give a JSONL file with a prompt in every row.", code="E_NO_FILE")
        rows, bad = read_shots(path, prompt_of)
        shots = [shot for _, shot in rows]
    else:
        found = [prompt_of({"prompt": one}) for one in source]
        shots = [one for one in found if isinstance(one, Shot)]
        bad = [one for one in found if isinstance(one, str)]
    if bad or not shots:
        raise InputError(
            f"{len(bad)} prompts cannot be used: {shorten(bad, 10)}." if bad else "There are no prompts.",
            "",
            'Each line is {"prompt": "..."} or {"messages": [...]}.',
            code="E_SHOTS",
        )
    return shots
