"""What every error code means, in one place: the catalogue behind ``recycle errors`` and docs/errors.md.

A code is stable: scripts may compare it, and it is never given to another mistake. A new one needs an entry here, and nothing
else; a test holds the catalogue, the raise sites and the page together.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from recycler.zoo.errors import UsageError, choices

PAGE = "docs/errors.md"


@dataclass(frozen=True)
class ErrorCode:
    """One kind of mistake.

    Attributes:
        exit: the exit code of a command that ends with it.
        meaning: what happened, and why it is refused. remedy: what to do.
    """

    code: str
    exit: int
    title: str
    meaning: str
    remedy: str

    @property
    def docs(self) -> str:
        return f"{PAGE}#{self.code.lower()}"

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {**asdict(self), "docs": self.docs}

    def section(self) -> str:
        """Its part of the page, in Markdown; also what ``recycle errors CODE`` prints."""
        return f"## {self.code}\n\n**{self.title}.** Exit code {self.exit}.\n\n{self.meaning}\n\n*What to do:* {self.remedy}\n"


_EXITS = {
    1: "unexpected",
    2: "the call itself is off",
    3: "an input was rejected, or does not fit",
    4: "refused for security",
    5: "the Hub, access or the network",
    6: "some of many succeeded",
}

_ROWS: dict[int, list[tuple[str, str, str, str]]] = {
    1: [
        ("E_UNEXPECTED", "A fault in this program", "Something failed that was not foreseen.",
         "Run it again; if it stays so, report it with the output of `recycle env`."),
        ("E_SYSTEM", "The system refused a file", "A disk is full, or a file may not be read or written.",
         "Check permissions and free space; `recycle doctor` shows both."),
        ("E_CLUSTER", "Workers cannot do the work", "No Ray cluster answers, it has no room, its machines have other versions, or a worker died again and again.",
         "The message says which; without `--engine` the same work is done here, and what a profile has measured is kept."),
    ],
    2: [
        ("E_USAGE", "The call is off", "Two options exclude each other, one is missing, or a value is not of its form.",
         "The message names it; `recycle COMMAND --help` has examples."),
        ("E_OPTION", "A dial has a value that it does not take", "Options of methods (`-o key=value`) and numbers are checked before anything runs.",
         "`recycle routers` lists the options of every method, with their defaults."),
        ("E_METHOD", "There is no such router", "The name is that of no method here, nor of an installed plugin.",
         "`recycle routers` lists them."),
        ("E_UNKNOWN", "Nothing has that name", "An adapter, task or expert is named that the zoo, profile, router or model does not hold.",
         "The message lists those that there are. `recycle zoo list` shows the zoo's."),
        ("E_NAME", "A name that cannot be used", "Names become folders: a-z, 0-9, '.', '_', '-'; `base` is taken. One name stands for one thing.",
         "Choose another with `--as`, `--out`, or by renaming the file."),
        ("E_SOURCE", "Neither a folder nor a place on the Hub", "Sources are written org/name, org/name@revision or org/name@revision/subfolder; folders must exist.",
         "Check the spelling; write `./name` for a folder."),
        ("E_NO_FILE", "There is no such file", "A file or pattern matched nothing.", "Check the path; patterns are expanded from the folder you are in."),
        ("E_EXISTS", "Something is there already", "Nothing is overwritten unless asked, and --force replaces only what the same command made.",
         "Choose another `--out` or `--as`, or add `--force`."),
        ("E_WRITING", "Another run is writing there", "Two runs into one folder would mix their results.", "Wait for it, or choose another `--out`."),
        ("E_EMPTY_ZOO", "The zoo is empty", "There are no adapters where the command looks: $RECYCLE_ZOO, or --zoo.",
         "`recycle fetch SOURCE`; or point `--zoo` at the right folder (`recycle zoo path`)."),
        ("E_NEEDS_PROFILE", "This needs shots or a profile", "The method learns from scored examples, and none were given.",
         "`recycle profile FILES --kshot 16 --out NAME`, then `--profile NAME`. Methods that need none: `recycle routers`."),
        ("E_FIXED", "This router cannot be changed that way", "Some methods learn all adapters together, so that one more or less would change the others.",
         "Build it again with the adapters that you want."),
        ("E_MEMORY", "Adapters cannot be paged or exchanged like this", "Adapters on disk (`--resident`) and room for more (`spare`) have limits that the message names.",
         "Load the model without `--resident`, or with more `spare`."),
        ("E_MERGE", "The base's weights cannot take a mixture", "They are quantised, offloaded or shared with another module, or lack a bias that an adapter adds.",
         "Route instead of merging; or load the unquantised base, whole."),
        ("E_DEVICE", "No such device or dtype", "The device cannot hold tensors here, or the dtype is none that a base is loaded in.",
         "`recycle doctor` shows what there is; leave `--device` and `--dtype` out to have them chosen."),
        ("E_MISSING_EXTRA", "An optional package is missing", "This part needs a package that is not installed with recycler itself.",
         "Run the `pip install 'recycler[...]'` line of the message."),
    ],
    3: [
        ("E_INPUT", "An input was rejected", "It was read, and cannot be used for what was asked.", "The message says what is wrong and what would do."),
        ("E_NO_ADAPTER", "There is no adapter at this place", "An adapter is a folder with adapter_config.json and adapter_model.safetensors.",
         "Point at the folder that holds both; a checkpoint may lie in a subfolder (`org/name/checkpoint-500`)."),
        ("E_FORMAT", "A method that is no sum on linears", "IA3, prompt tuning, OFT and others do not add an update to weights, so they cannot be mixed with those that do; some are only converted by `fetch`.",
         "Merge it into its base with PEFT and `recycle extract`, where the message says so; else leave it out."),
        ("E_CONFIG", "The config cannot be read exactly", "adapter_config.json is no such file, contradicts the tensors, or sets fields that would change what the adapter does.",
         "Correct the fields that are named, or save the adapter again with PEFT in a plain form."),
        ("E_RANK", "Ranks disagree", "The config and the tensors, or A and B, have different ranks, so that the scale α/r would be a guess.",
         "Take config and weights from the same checkpoint."),
        ("E_BIAS", "It changes biases of the base", "`bias=all` or `lora_only` is state that a mixture of updates cannot carry.",
         "Merge it into its base with PEFT, save that, and `recycle extract`."),
        ("E_MODULES_TO_SAVE", "It replaces whole modules of the base", "`modules_to_save` holds copies of modules; several adapters cannot share one module.",
         "Merge it into its base with PEFT, save that, and `recycle extract`, which says what it leaves out."),
        ("E_VOCABULARY", "It changes the vocabulary or the depth", "Embeddings, added tokens and replicated layers make it another model.", "Leave it out."),
        ("E_TRUNCATED", "A file is cut short", "Fewer bytes than its header declares: a broken upload or download.", "Fetch or copy it again."),
        ("E_NONFINITE", "NaN or infinite values", "Training diverged, or the file is damaged. One such number spreads to every answer.",
         "Take an earlier checkpoint: `org/name@commit/checkpoint-500`."),
        ("E_EMPTY", "Nothing in it acts", "Tensors are zero throughout or without elements: untrained, or saved by DeepSpeed ZeRO-3 without gathering.",
         "Save it again with `stage3_gather_16bit_weights_on_model_save`, or take another checkpoint."),
        ("E_DTYPE", "Numbers that are no real numbers", "Packed or quantised factors cannot be read exactly.", "Save the adapter in fp32, bf16 or fp16."),
        ("E_TOO_LARGE", "Larger than the limit", "An adapter is small next to its base; a file this large is rarely one.", "If it is meant: `--max-size`."),
        ("E_SITES", "Its module names are not in the base", "An adapter that is placed in part, or nowhere, loads and does nothing. Another base, or names of another version of transformers.",
         "The message names the prefix that would fit; give the base that the adapter declares."),
        ("E_SHAPES", "Its shapes are not those of the base", "It was trained for a base of another size, or the base is a quantised copy that stores other numbers.",
         "Give the base that the adapter declares, unquantised."),
        ("E_BASE_MISMATCH", "Another base", "Adapter, profile, router and model belong to one base. On another one they mean something else, even where all shapes agree.",
         "Give that base with `--base`; `--base-alias ID` where it is a copy of the same weights; `recycle doctor` compares fingerprints."),
        ("E_BASE_UNKNOWN", "Its base is not known", "The update cannot be computed without the base's weights or shapes, and none is declared or to be had here.", "Name it: `--base ID` or a folder."),
        ("E_BASE", "No base that can be used", "The folder holds no complete language model in safetensors, or of a kind that transformers does not know.",
         "Give the folder with config.json and the weights, or save it again with `model.save_pretrained(FOLDER)`."),
        ("E_LICENCE", "A licence that may not go in", "It is not in `--license-allow`, or none is stated under `--strict`.", "Leave the adapter out, ask its author, or allow the licence after reading it."),
        ("E_OUTLIER", "Its norm is far from the others'", "In any mixture it would drown them, and it would win every gate that looks at norms.",
         "`--accept-outlier` keeps it; then look at it with `recycle zoo health`."),
        ("E_CONVERSION", "It could not be converted", "PEFT refuses it, computes something else than its update, or the numbers do not allow a decomposition.",
         "Update PEFT, or leave the adapter out."),
        ("E_IMPORT", "Another project's zoo, not as known", "Files of mttl, PHATGOOSE, GLIDER or LoraHub hold something whose meaning would be a guess.",
         "The message says which tensors or fields; save the expert again, or leave it out."),
        ("E_NOT_EXTRACTABLE", "The fine-tune cannot become an adapter", "It differs from its base in no linear, or in more than linears.", "See the message; such models have to be used whole."),
        ("E_CHANGED", "An adapter changed since", "Scores and gates were made with other weights of that name.", "Run `recycle profile`, or build the router again."),
        ("E_SHOTS", "Examples that cannot be used", "Rows are not of the form that is read, or there are too few distinct ones.",
         'One JSON object a line: `{"prompt": "...", "completion": "..."}` or `{"messages": [...]}`; or a smaller `--kshot`.'),
        ("E_CHAT_TEMPLATE", "The base has no chat template", "Rows with messages are written out by the tokenizer's template.", "Use rows with prompt and completion, or an instruct base."),
        ("E_NO_GAIN", "No adapter helps anywhere", "By the profile nobody is better than the base at the tasks in question, so there is nothing to learn from.",
         "Profile the tasks that the adapters were trained for, or say whose they are: `--assign ADAPTER=TASK`."),
        ("E_PROFILE", "The profile cannot be read", "There is none, it was not finished, or a file of it is damaged.", "Run `recycle profile` again with the same arguments: it goes on where it stopped."),
        ("E_ROUTER", "The router cannot be used", "Its files are missing or damaged, or it was built for other adapters or another base.", "Build it again: `recycle build-router`."),
        ("E_MODEL", "No composed model, or a damaged one", "recycle.json is missing or unreadable, or its parts do not belong together.", "Compose it again: `recycle compose`; `recycle doctor MODEL` looks at all of it."),
        ("E_NEWER", "Written by a newer version", "This version does not know the format.", "`pip install -U recycler`"),
        ("E_MANIFEST", "zoo.json cannot be read", "The list of what the zoo holds was cut or edited by hand, or is none.",
         "Restore it, or move it away and fetch again; get a lock again from its owner."),
        ("E_BUSY", "The zoo is locked", "Another process writes into it.", "Wait for it; a lock whose process died is free by itself."),
        ("E_FILES", "Files that are missing, or cannot be read or written", "A path is no folder or no regular file, or is not readable here; or files of the zoo are gone.",
         "Check the path, permissions and free space; `recycle zoo verify` lists what is missing."),
    ],
    4: [
        ("E_SECURITY", "Refused for security", "The input could do harm.", "Leave it out, unless you know better than its contents say."),
        ("E_PICKLE", "Weights as a pickle only", "`.bin`, `.pt` and `.ckpt` files can run any code when they are loaded, so none is opened.",
         "Ask the author for safetensors; or `--allow-pickle`, which opens it in a process that can do little else."),
        ("E_HASH", "Contents differ from their hash", "Damaged on the way or on disk, or changed since they were vetted.",
         "Fetch again, over another network if need be; if it stays so, tell the owner."),
        ("E_LOCK", "Not what the lock describes", "The files at the source changed since the lock was written, or somebody edited the lock.", "Ask the lock's owner. Do not edit it."),
        ("E_HEADER", "Not a valid safetensors file", "Tensors overlap, leave holes or lie outside the file, or it is a pickle under another name: the file lies about itself.",
         "Leave it out, or get it again from its author."),
        ("E_LINK", "A link that leads out of the folder", "Following it could copy a file that was never meant to be shared.", "Replace the link by the file itself."),
        ("E_HOSTILE_NAME", "A file name that could do harm", "Such names are written to escape a folder, or to replace another file.", "Leave it out, and tell the Hub."),
        ("E_PATTERN", "A pattern that never ends", "A rank or alpha pattern that backtracks without end can stall a machine.", "Write module paths out in the config."),
        ("E_CONSENT", "It would send your prompts elsewhere", "The router names an endpoint that nobody here has agreed to.", "Set the variable that the message names, if you agree."),
    ],
    5: [
        ("E_HUB", "The Hub did not give what was asked", "Its answer was incomplete or no such thing.", "Run it again later; what was fetched stays."),
        ("E_GATED", "Gated", "The owner wants you to accept conditions first.", "Accept them on the page, then `hf auth login` or set HF_TOKEN."),
        ("E_AUTH", "Your token does not allow it", "It is not valid for this repository.", "`hf auth login` with a token that may read it."),
        ("E_NOT_FOUND", "Not on the Hub", "Missing, private, disabled or mistyped; the Hub does not tell these apart.", "Check the spelling and the revision; log in where it is private."),
        ("E_RATE_LIMIT", "Too many requests", "The Hub counts requests in windows of five minutes.", "Wait and run it again; it goes on. A token has a larger budget."),
        ("E_OFFLINE", "Offline mode is on", "HF_HUB_OFFLINE is set or `--offline` was given, and what is asked for is not in the cache.", "Unset it once to fetch. What is in the zoo needs no network."),
        ("E_UNREACHABLE", "It cannot be reached", "The Hub, its store or an endpoint does not answer.", "Check the network and any proxy; run it again: what was fetched stays."),
        ("E_CONFLICT", "Somebody else wrote there", "The repository changed while this was being pushed, or is in use.", "Look at what is there now, and push again."),
    ],
    6: [
        ("E_PARTIAL", "Some of many failed", "The others are done and stay; the message names each failure with its reason.", "Mend those that are named and run the same command: it goes on."),
    ],
}  # fmt: skip

CATALOGUE: dict[str, ErrorCode] = {
    code: ErrorCode(code, exit_code, title, meaning, remedy)
    for exit_code, rows in _ROWS.items()
    for code, title, meaning, remedy in rows
}
"""Code → what it means, by exit code."""


def explain(code: str) -> ErrorCode:
    """The entry of a code, in upper or lower case, with or without its E_.

    Raises:
        UsageError: there is no such code.
    """
    name = code.strip().upper()
    name = name if name.startswith("E_") else f"E_{name}"
    if name not in CATALOGUE:
        raise UsageError(
            f"There is no error code {code!r}.",
            "",
            f"Choose {choices(CATALOGUE, name)}. recycle errors lists them all.",
            code="E_UNKNOWN",
        )
    return CATALOGUE[name]


def page() -> str:
    """All of docs/errors.md. It is written by: python -m recycler.zoo.error_codes"""
    lines = [
        "# Errors",
        "",
        'Every error has a code that stays the same: the last line of a message names it, as do `error.code` in Python and `"code"` in JSON.',
        "`recycle errors CODE` prints the section of a code, without a network; `recycle errors --json` lists all.",
        "",
        "| exit code | | codes |",
        "|---|---|---|",
    ]
    for exit_code, why in _EXITS.items():
        names = ", ".join(f"[{code}](#{code.lower()})" for code, one in CATALOGUE.items() if one.exit == exit_code)
        lines.append(f"| {exit_code} | {why} | {names} |")
    return "\n".join(lines) + "\n\n" + "\n".join(one.section() for one in CATALOGUE.values())


if __name__ == "__main__":
    from pathlib import Path

    target = Path(__file__).resolve().parent.parent / PAGE
    target.parent.mkdir(exist_ok=True)
    target.write_text(page(), encoding="utf-8")
