"""The whole method in one flat script: adapter files → factors → router → routed answers → comparison with the base.

    python examples/flat.py                    # after `make demo`, which leaves the base in .demo/base
    python examples/flat.py --base FOLDER --adapters FOLDER --tasks FOLDER --shots 8 --rows 5

It needs torch, transformers and safetensors, and reads top to bottom. The router is ridge, a little simplified: one gate for each
layer, no chains of shots, all tokens weigh the same. What it leaves out, recycler does: DoRA, ranks in patterns and vetting of what it
reads; batches with padding; one GEMM for all adapters; saving; intervals and a verdict. Each adapter `name` must have its examples in
TASKS/kshot/name.jsonl, and rows to be scored on in TASKS/test/name.jsonl.

Dimensions in names: T token, D width, E adapter, R rank, O output.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description="Routing LoRA adapters, flat.")
parser.add_argument("--base", default=".demo/base", help="a decoder-only model")
parser.add_argument("--adapters", type=Path, default=Path("examples/adapters"), help="a folder of PEFT LoRA folders")
parser.add_argument("--tasks", type=Path, default=Path("examples/tasks"))
parser.add_argument("--shots", type=int, default=8, help="examples of each task that the router learns from")
parser.add_argument("--rows", type=int, default=3, help="rows of each task to answer")
options = parser.parse_args()
LAMBDA, SHARPNESS, TOP_K = 200.0, 10.0, 2
torch.set_grad_enabled(False)

# ---- 1. adapter files → factors. ΔW = s·B·A at every linear, s = α/r, or α/√r for rsLoRA; s goes into B, once.
names = sorted(folder.name for folder in options.adapters.iterdir() if (folder / "adapter_config.json").exists())
factors: dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}  # linear → adapter number → A [R, D], B [O, R]
for e, name in enumerate(names):
    config = json.loads((options.adapters / name / "adapter_config.json").read_text())
    if config["peft_type"] != "LORA" or config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise SystemExit(f"{name} is no plain LoRA; recycler reads it, this script does not")
    scale = config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1.0)
    tensors = load_file(options.adapters / name / "adapter_model.safetensors")
    for key, a_RD in tensors.items():
        if key.endswith(".lora_A.weight"):
            linear = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b_OR = tensors[key.replace("lora_A", "lora_B")]
            factors.setdefault(linear, {})[e] = a_RD.float(), scale * b_OR.float()
print(f"{len(names)} adapters on {len(factors)} linears: {', '.join(names)}")

# ---- 2. the base, frozen. Two kinds of hooks make it a routed model.
tokenizer = AutoTokenizer.from_pretrained(options.base)
model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32).eval()
layers = model.model.layers
forced_E: torch.Tensor | None = torch.zeros(len(names))  # one mixture for every token; None asks the gates
now_TE = torch.zeros(1, len(names))  # the mixture of each token in the layer that runs
gates: list[torch.Tensor] = []  # a layer → W [D + 1, E]
collecting = None  # while fitting: the number of the adapter that is at work
inputs_G: list[torch.Tensor] = []  # a layer → Σ x̂ᵀx̂
outputs_C: list[torch.Tensor] = []  # a layer → Σ x̂ᵀy
fired = torch.zeros(len(names))  # weights that gates gave, summed


def before_layer(number: int):
    """At a layer's input: who gets how much in it, for each token."""

    def hook(module, args, kwargs):
        global now_TE, fired
        x_TD = torch.nn.functional.layer_norm(args[0][0] if args else kwargs["hidden_states"][0], (model.config.hidden_size,))
        x_TD = torch.cat([x_TD, torch.ones(len(x_TD), 1)], -1)  # x̂ = [LN(x), 1]
        if collecting is not None:
            inputs_G[number] += x_TD.T @ x_TD
            outputs_C[number][:, collecting] += x_TD.sum(0)  # y is the one-hot of the adapter at work
        if forced_E is not None:
            now_TE = forced_E.expand(len(x_TD), -1)
        else:
            score_TE = SHARPNESS * x_TD @ gates[number]
            best = score_TE.topk(min(TOP_K, len(names)), dim=-1)
            now_TE = torch.zeros_like(score_TE).scatter(-1, best.indices, best.values.softmax(-1))
            fired += now_TE.sum(0)

    return hook


def after_linear(held: dict[int, tuple[torch.Tensor, torch.Tensor]]):
    """At a linear's output: y = W x + Σ_e w_e B_e A_e x. An adapter that is not at this linear adds nothing here."""

    def hook(module, args, y):
        for e, (a_RD, b_OR) in held.items():
            if now_TE[:, e].any():
                y = y + now_TE[:, e, None] * (args[0] @ a_RD.T @ b_OR.T)
        return y

    return hook


for number, layer in enumerate(layers):
    layer.register_forward_pre_hook(before_layer(number), with_kwargs=True)
for linear, held in factors.items():
    model.get_submodule(linear).register_forward_hook(after_linear(held))

# ---- 3. the router. Every adapter works on its own examples, and each layer notes what its inputs look like; then least squares
# tells from an input whose task is being done: W = (G + λI)⁻¹ C. No gradients, and neither base nor adapters change.
width = model.config.hidden_size + 1
inputs_G = [torch.zeros(width, width) for _ in layers]
outputs_C = [torch.zeros(width, len(names)) for _ in layers]


def rows(part: str, name: str, count: int) -> list[dict[str, str]]:
    lines = (options.tasks / part / f"{name}.jsonl").read_text(encoding="utf8").splitlines()
    return [json.loads(line) for line in lines[:count]]


for collecting, name in enumerate(names):
    forced_E = torch.eye(len(names))[collecting]
    for shot in rows("kshot", name, options.shots):
        model(**tokenizer(shot["prompt"] + shot["completion"], return_tensors="pt"))
collecting = None
gates = [torch.linalg.solve(G + LAMBDA * torch.eye(width), C) for G, C in zip(inputs_G, outputs_C, strict=True)]
print(f"{len(gates)} gates from {options.shots} examples of each task")


# ---- 4. is it worth it? The same rows, answered by the base, by all adapters at once, by the gates.
def answer(prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip().split("\n")[0]


contenders = {"base": torch.zeros(len(names)), "uniform": torch.full((len(names),), 1 / len(names)), "routed": None}
right = dict.fromkeys(contenders, 0.0)
print(f"{'task':<18}" + "".join(f"{one:>9}" for one in contenders) + "  who fired most")
for name in names:
    scored, fired = rows("test", name, options.rows), torch.zeros(len(names))
    line = f"{name:<18}"
    for contender, mixture in contenders.items():
        forced_E = mixture
        share = sum(answer(row["prompt"]) == row["completion"].strip() for row in scored) / len(scored)
        right[contender] += share / len(names)
        line += f"{share:9.2f}"
    print(line + f"  {names[fired.argmax()]} {fired.max() / fired.sum():.0%}")
print(f"{'exact match':<18}" + "".join(f"{share:9.2f}" for share in right.values()))
