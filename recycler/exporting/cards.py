"""What an export says of itself: on the terminal, and in its README.md."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from recycler.exporting.mixtures import Mixture
from recycler.sharing.card import licence_lines, plain, source_of
from recycler.zoo import licences
from recycler.zoo.errors import counted, shorten
from recycler.zoo.inspect import printable
from recycler.zoo.match import is_hub_id

_TITLES = {
    "peft": "as one PEFT adapter",
    "merged": "merged into its base",
    "vllm": "for vLLM",
    "lorax": "for LoRAX",
    "xlora": "as PEFT's X-LoRA",
}
_REQUEST = (
    "A request is given one adapter, or one of the mixtures that lie here, by `recycle proxy`: where the router mixes otherwise, or "
    "decides token by token, it is the nearest."
)
_LOST = {
    "peft": "One mixture for every prompt and every token: what the router does is not in it.",
    "merged": "One mixture for every prompt and every token, added to the weights and rounded to the base's dtype once.",
    "vllm": _REQUEST,
    "lorax": _REQUEST,
    "xlora": "Nothing of the routing. PEFT's X-LoRA runs without a KV cache, and needs base and classifier in fp32 to be the same to "
    "rounding.",
}
_ROUNDED = "Rounding to that dtype is part of these differences."


def lines(folder: Path, facts: Mapping[str, Any], found: Mapping[str, str]) -> list[str]:
    """For people, on a terminal.

    Args:
        found: what the export was compared with, in words → how far it is from that.
    """
    said = []
    if "mixture" in facts:
        said.append(f"mixture: {Mixture(**facts['mixture']).line()}")
    if "ranks" in facts:
        low, high = facts["ranks"]
        said.append(f"one adapter of rank {low if low == high else f'{low} to {high}'}, {facts['bytes'] / 1e6:,.1f} MB")
    if "converted" in facts:
        said.append(facts["converted"])
    cuts = {"it": facts["cut"]} if "ranks" in facts and "cut" in facts else facts.get("cut") or {}
    said += [f"{name}: {_error(cut)}" for name, cut in cuts.items()]
    if "options" in facts:
        mixed = _mixed(facts)
        alone = len(facts["options"]) - 1 - len(mixed)  # one is the base
        said.append(f"{counted(alone, 'adapter')} alone, {counted(len(mixed), 'mixture')}; largest rank {facts['rank']}")
        said += [Mixture(one["weights"], one["name"]).line() for one in mixed]
        said.append(f"the prompts got: {shorten([f'{name} {count}' for name, count in facts['chosen'].items()], 8)}")
    said += [f"beside {what}: {line}" for what, line in found.items()]
    if "rounding" in facts:
        said.append(f"rounded to {facts['dtype']}: {_error(facts['rounding'])}")
    if facts["dtype"] != "float32":
        said.append(f"measured in {facts['dtype']}, whose rounding is part of these differences; --dtype float32 leaves it out")
    if "serve" in facts:
        said += [
            "serve it, and route to it:",
            f"  {shlex.join(['sh', str(folder / 'serve.sh')])}",
            f"  {shlex.join(['recycle', 'proxy', str(folder), '--upstream', facts['upstream']])}",
        ]
    return [printable(line, 100_000) for line in said]


def _error(loss: Mapping[str, Any]) -> str:
    return f"ΔW with a relative error of {loss['error']:.2g} (worst {loss['worst'][1]:.2g})"


def readme(facts: Mapping[str, Any]) -> str:
    """README.md, with the Hub's YAML header: what it is, what is lost, where it came from, under which licences."""
    kind, named = str(facts["kind"]), str(facts["base"]["id"])
    base = named if is_hub_id(named) else "the base"  # cards are read by strangers: no path of somebody's disk
    roll = licences.roll_up({a["name"]: a["licence"] for a in facts["adapters"]})
    held = ["/".join(source_of(a).split("/")[:2]) for a in facts["adapters"] if a["revision"]]
    sources = list(dict.fromkeys(source for source in held if is_hub_id(source)))
    header: dict[str, Any] = {
        "library_name": "transformers" if kind == "merged" else "peft",
        **({"base_model": found} if (found := [*([named] if is_hub_id(named) else []), *sources]) else {}),
        "base_model_relation": "merge" if kind == "merged" else "adapter",
        "tags": ["lora", "recycler"],
    }
    if roll.single in licences.TERMS and kind != "merged":  # those weights are the base's too, whose licence is not known here
        header["license"] = roll.single
    elif roll.by_licence:
        header |= {"license": "other", "license_name": "as-stated-below"}
    count = len(facts["adapters"])
    rows = [
        f"| {a['name']} | {_share(facts, a['name'])} | {plain(source_of(a))} | {(a['revision'] or '')[:12]} "
        f"| {plain(a['licence'] or 'not stated')} | `{a['sha256'][:12]}` |"
        for a in facts["adapters"]
    ]
    compared = [
        f"| {what.removeprefix('from ')} | {one['max']:.2g} | {one['mean']:.2g} | {one['agreement']:.1%} | {one['kl']:.2g} |"
        for what, one in facts["differences"].items()
    ]
    first = next(iter(facts["differences"].values()))
    text = [
        "---",
        yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip(),
        "---",
        f"# {count} adapter{'s' * (count != 1)} on {plain(base)}, {_TITLES[kind]}",
        "",
        f"Made from a routed model (router: {facts['router'] or 'none'}). {_lost(facts)}",
        "",
        f"Measured on {first['prompts']} prompts, {first['tokens']} tokens, in {facts['dtype']}, on what lies here:",
        "",
        "| beside | largest difference of logits | mean | same argmax | KL (nats) |",
        "|---|---|---|---|---|",
        *compared,
        "",
        *([_ROUNDED, ""] if facts["dtype"] != "float32" else []),
        *_cuts(facts),
        *_mixtures(facts),
        "| adapter | weight | source | revision | licence | sha256 |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        *licence_lines(roll),
        *_use(kind, base, facts),
        "",
    ]
    return "\n".join(text)


def _lost(facts: Mapping[str, Any]) -> str:
    own = "mixture" in facts and facts["mixture"]["how"].startswith("the router's own")
    return "The router is one mixture for everything, and this is it." if own else _LOST[facts["kind"]]


def _share(facts: Mapping[str, Any], name: str) -> str:
    return f"{facts['mixture']['weights'][name]:.4g}" if "mixture" in facts else "–"


def _cuts(facts: Mapping[str, Any]) -> list[str]:
    """What was cut or converted, and the relative error ‖ΔW − ΔW′‖ / ‖ΔW‖ of that."""
    cuts = facts.get("cut") or {}
    found = [f"- {facts['converted']}"] if "converted" in facts else []
    found += [f"- {name}: {cut['error']:.2g}" for name, cut in ({"all of it": cuts} if "error" in cuts else cuts).items()]
    found += [f"- rounding to {facts['dtype']}: {facts['rounding']['error']:.2g}"] if "rounding" in facts else []
    return ["Cut or converted to what fits (relative error of ΔW):", "", *found, ""] if found else []


def _mixtures(facts: Mapping[str, Any]) -> list[str]:
    """The mixtures that are adapters of their own."""
    mixed = _mixed(facts)
    return [*(f"- {Mixture(one['weights'], one['name']).line()}" for one in mixed), ""] if mixed else []


def _mixed(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [one for one in facts.get("options", ()) if one["weights"] and one["weights"] != {one["name"]: 1.0}]


def _use(kind: str, base: str, facts: Mapping[str, Any]) -> list[str]:
    """How it is loaded."""
    auto = "AutoModelForSeq2SeqLM" if facts["encoder_decoder"] else "AutoModelForCausalLM"
    if kind in ("vllm", "lorax"):
        return ["```sh", "sh serve.sh", f"recycle proxy THIS_FOLDER --upstream {facts['upstream']}", "```"]
    code = [f"from transformers import {auto}", ""]
    if kind == "merged":
        return ["```python", *code, f'{auto}.from_pretrained("this folder")', "```"]
    code = [
        f"from peft import PeftModel{', XLoraConfig' * (kind == 'xlora')}",
        *code,
        f'base = {auto}.from_pretrained("{base}")',
    ]
    if kind == "xlora":
        code += [
            "base.config.use_cache = False",
            'config = XLoraConfig.from_pretrained("this folder")',
            'config.adapters = {name: f"this folder/adapters/{name}" for name in config.adapters}  # wherever it was moved to',
            'PeftModel.from_pretrained(base, "this folder", config=config)',
        ]
    else:
        code.append('PeftModel.from_pretrained(base, "this folder")')
    return ["```python", *code, "```"]
