"""What kind of adapter a config describes, and how it can become factors: read, converted, or refused with the reason.

The table covers every ``peft_type`` of PEFT 0.21 and a few that PEFT does not know or no longer does. Whether a method can be
converted is PEFT's own word (``supports_lora_conversion`` of its layers): its update must be added to the weight of a linear.
What a method needs of the base was read from where its layers take their numbers.

A kind says nothing about options that are refused whatever the kind, such as ``modules_to_save``: those are `config`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from recycler.zoo.inspect import printable


@dataclass(frozen=True)
class Kind:
    """What an adapter_config.json says the adapter is, and how it can become factors.

    Attributes:
        name: as people write it: LoRA, rsLoRA, DoRA, AdaLoRA, VeRA, PiSSA, ...; options are joined by "+", as in "LoRA+bias".
        how: "read": straight from its files; "convert": through PEFT, into plain LoRA; "refuse".
        lossless: convert only: of low rank by construction, so that nothing is lost but rounding.
        needs: what a conversion needs of the base: nothing, the shapes of its linears, or its weights.
        why: refuse only: the reason, a sentence. fix: what can be done instead.
    """

    name: str
    how: Literal["read", "convert", "refuse"]
    lossless: bool = True
    needs: Literal["nothing", "shapes", "weights"] = "nothing"
    why: str = ""
    fix: str = ""


READ = "LoRA (rsLoRA, DoRA and a bias of B included), AdaLoRA, LoRA-XS and IncreLoRA"
CONVERTED = (
    "VeRA, LoHa, LoKr, RandLoRA, MiSS, Bone, FourierFT, WaveFT, C3A, VB-LoRA, Uni-LoRA, GraLoRA, DeLoRA, PSOFT, TinyLoRA, "
    "PiSSA and OLoRA"
)
_MERGE = (
    "Merge it into its base with PEFT's merge_and_unload, save that model, and take the difference by SVD: "
    "recycle extract --tuned FOLDER --base BASE"
)
_LEAVE = "Leave it out."


def _low(name: str, needs: Literal["shapes", "weights"] = "shapes") -> Kind:
    return Kind(name, "convert", lossless=True, needs=needs)


def _dense(name: str, needs: Literal["shapes", "weights"] = "shapes") -> Kind:
    return Kind(name, "convert", lossless=False, needs=needs)


def _refuse(name: str, why: str, fix: str = _LEAVE) -> Kind:
    return Kind(name, "refuse", why=why, fix=fix)


def _prompt(name: str) -> Kind:
    return _refuse(name, "It adds virtual tokens or cached keys and values to the input and has no update of a linear.")


def _multiplies(name: str, how: str) -> Kind:
    return _refuse(name, f"It {how}: its update depends on the base's weights and is of full rank.", _MERGE)


# LORA and MISS depend on further fields; `_lora` and `_miss` look at them.
_TYPES: Mapping[str, Kind] = {
    "ADALORA": Kind("AdaLoRA", "read"),
    # IncreLoRA writes no config; this is what to put into one (its tensors are recognised under LORA and ADALORA too).
    "INCRELORA": Kind("IncreLoRA", "read"),
    # added to the weight, through fixed projections or a bank: of the adapter's rank
    "VERA": _low("VeRA"),
    "VBLORA": _low("VB-LoRA"),
    "UNILORA": _low("Uni-LoRA"),
    "DELORA": _low("DeLoRA"),  # it stores the norms of the base that it needs
    "TINYLORA": _low("TinyLoRA"),  # it stores the singular vectors of the base that it works between
    # added to the weight, of a higher rank
    "LOHA": _dense("LoHa"),
    "LOKR": _dense("LoKr"),
    "RANDLORA": _dense("RandLoRA"),
    "FOURIERFT": _dense("FourierFT"),
    "WAVEFT": _dense("WaveFT"),
    "C3A": _dense("C3A"),
    "GRALORA": _dense("GraLoRA"),
    # no update of a linear
    "PROMPT_TUNING": _prompt("prompt tuning"),
    "MULTITASK_PROMPT_TUNING": _prompt("multitask prompt tuning"),
    "P_TUNING": _prompt("p-tuning"),
    "PREFIX_TUNING": _prompt("prefix tuning"),
    "ADAPTION_PROMPT": _prompt("LLaMA-Adapter"),
    "CPT": _prompt("CPT"),
    "CARTRIDGE": _prompt("Cartridge"),
    "LN_TUNING": _refuse("LN tuning", "It changes norms, not linears."),
    "BEFT": _refuse("BEFT", "It changes biases of the base, not weights."),
    "TRAINABLE_TOKENS": _refuse("trainable tokens", "It changes embeddings of single tokens."),
    # not linear in the input, or not a function of one layer's input alone
    "PEANUT": _refuse("PEANuT", "Its update is a small network with an activation: it is not linear in the input."),
    "SHADOW": _refuse("ShadowPEFT", "It runs a second network beside the base: it is not an update of weights."),
    "LILY": _refuse("Lily", "Its update depends on the input, through a router of its own."),
    "POLY": _refuse("Poly", "It mixes its modules by task: it is a multi-task model, not one adapter."),
    "XLORA": _refuse("X-LoRA", "It is a router over several adapters, not one adapter.", "Fetch the adapters it was made of."),
    # depends on the base's weights
    "IA3": _multiplies("IA3", "scales rows and columns of the base's weights"),
    "HIRA": _multiplies("HiRA", "multiplies the base's weights entry by entry"),
    "OFT": _multiplies("OFT", "rotates the base's weights"),
    "BOFT": _multiplies("BOFT", "rotates the base's weights"),
    "HRA": _multiplies("HRA", "reflects the base's weights"),
    "ROAD": _multiplies("RoAd", "rotates the output of the base"),
    "FROD": _multiplies("FRoD", "replaces the base's weights"),
    "OSF": _multiplies("OSF", "trains singular directions of the base's weights"),
    "GLORA": _multiplies("GLoRA", "scales the base's weights and changes its biases"),
    "DEFT": _refuse("DEFT", "It projects the base's weights, and PEFT does not convert it.", _MERGE),
    "ADAMSS": _refuse("AdaMSS", "It works in clusters of the base's singular vectors, and PEFT does not convert it.", _MERGE),
    # added to the weight, but not of low rank, or not fixed
    "SHIRA": _refuse("SHiRA", "It changes scattered entries of the weights: its update is sparse, not of low rank.", _MERGE),
    "SUPERTUNING": _refuse("Super-Tuning", "It changes scattered entries of the weights: its update is sparse.", _MERGE),
    "PVERA": _refuse("PVeRA", "Its update is drawn from a distribution that depends on the input."),
}

# Values of init_lora_weights that leave the base as it is.
_HARMLESS_INITS = {"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"}
_INITS = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA", "loftq": "LoftQ"}


def kind_of(config: Mapping[str, Any], *, initial: bool = False) -> Kind:
    """The kind of adapter that `config`, a parsed adapter_config.json, describes.

    Args:
        initial: the adapter's state before training lies beside it, so that an initialisation that changed the base's weights
            can be taken out without them: ΔW = s(BA − B₀A₀).
    """
    given = config.get("peft_type")
    if given == "LORA":
        return _lora(config, initial)
    if given in ("MISS", "BONE"):
        return _miss(config)
    if given == "PSOFT":
        if config.get("psoft_svd", "full") in ("full", None):
            return _low("PSOFT", "weights")  # between singular vectors of the base
        return _refuse("PSOFT", "It starts from a random approximation of the base's singular vectors, and does not store it.")
    if isinstance(given, str) and given in _TYPES:
        return _TYPES[given]
    return _refuse(
        printable(given, 60) if given else "no peft_type",
        "It is no method that this version knows." if given else "Without a peft_type nobody can say how its tensors act.",
        f"Read as they are: {READ}. Converted: {CONVERTED}.",
    )


def _lora(config: Mapping[str, Any], initial: bool) -> Kind:
    name = "rsLoRA" if config.get("use_rslora") is True else "LoRA"
    if config.get("use_dora") is True:
        name = "DoRA" if name == "LoRA" else "rsLoRA+DoRA"
    if config.get("lora_bias") is True:
        name += "+bias"
    init = printable(config.get("init_lora_weights", True)).lower()
    if init in _HARMLESS_INITS:
        return Kind(name, "read")
    method, _, iterations = init.partition("_niter_")
    shown = _INITS.get(method, init)
    if name not in ("LoRA", "rsLoRA"):  # taking the start out adds rank, and DoRA's norm and the bias are not made for that
        return _refuse(f"{shown} with {name}", f"Its start, init_lora_weights={init!r}, changed the base's weights.", _MERGE)
    if method == "loftq":
        return _refuse(shown, "It was trained on a base that LoftQ had quantised, and makes up for that error too.")
    if method not in _INITS:
        return _refuse(init, f"init_lora_weights={init!r} is not known; it may have changed the base's weights.")
    if initial:
        return Kind(shown, "convert")
    if init in ("pissa", "olora"):  # PEFT computes these from the base's weights alone, the same every time
        return Kind(shown, "convert", needs="weights")
    random = "was computed with random numbers" if iterations else "was computed from data"
    return _refuse(
        shown,
        f"Its start, init_lora_weights={init!r}, changed the base's weights, {random}, and is not beside it.",
        "Put the initial adapter into its folder, as a subfolder called initial_adapter; or ask the author for the adapter saved "
        "with path_initial_model_for_weight_conversion.",
    )


def _miss(config: Mapping[str, Any]) -> Kind:
    """MiSS, and Bone as it was called before. PEFT 0.21 reads Bone's tensors under MiSS's names."""
    name = "MiSS" if config["peft_type"] == "MISS" else "Bone"
    if config.get("init_weights") == "bat":
        return _dense(f"{name}-bat", "weights")
    return _low(name)
