"""Pico models, tokenizers and adapters: two layers, random weights, seconds. The pipeline that runs on them is the real one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

# Mixed ranks, targets and kinds, as on the Hub. `law` touches few sites, `code` others than `math`.
ADAPTERS: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "llama": {
        "math": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]},
        "law": {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        "code": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "poem": {"r": 3, "lora_alpha": 6, "target_modules": ["o_proj", "gate_proj"], "use_dora": True},
    },
    "t5": {
        "math": {"r": 4, "lora_alpha": 8, "target_modules": ["q", "v", "wi", "wo"]},
        "law": {"r": 2, "lora_alpha": 2, "target_modules": ["q", "v"], "use_rslora": True},
        "code": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "poem": {"r": 3, "lora_alpha": 6, "target_modules": ["k", "wo"], "use_dora": True},
    },
}
TASKS = {"math": "Add {} and {}.", "law": "Is {} liable to {}?", "code": "def f{}(x): return x{}", "poem": "O {} of the {}!"}


def tokenizer(eos_at_end: bool) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: pad 0, bos 1, eos 2, then the 256 bytes. T5's kind ends every text with eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {symbol: i + 3 for i, symbol in enumerate(alphabet)}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    built.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    if eos_at_end:
        built.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])  # type: ignore[assignment]
    made = PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    return made


def make_base(kind: str, folder: Path) -> Path:
    """A saved pico model: "llama" (causal) or "t5" (encoder–decoder), fp32."""
    torch.manual_seed(0)
    if kind == "llama":
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                initializer_range=0.2, tie_word_embeddings=False,
            )
        )  # fmt: skip
    else:
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=259, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=2,
                decoder_start_token_id=0, initializer_factor=0.8, feed_forward_proj="relu",
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer(eos_at_end=kind == "t5").save_pretrained(folder)
    return folder


def make_adapter(base: Path, name: str, options: Mapping[str, Any], folder: Path, seed: int | None = None) -> Path:
    """A PEFT adapter of a pico base with random factors, written by PEFT itself; returns ``folder/name``."""
    from peft import LoraConfig, get_peft_model

    seq2seq = "t5" in base.name
    auto: Any = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    torch.manual_seed(sum(map(ord, name)) if seed is None else seed)
    config = LoraConfig(task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM", **options)
    model = get_peft_model(auto.from_pretrained(base), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.3)
            elif "magnitude" in key:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.4))
    model.save_pretrained(folder / name)
    return folder / name


def make_adapters(base: Path, folder: Path) -> dict[str, Path]:
    """All of ADAPTERS for a base."""
    kind = "t5" if "t5" in base.name else "llama"
    return {name: make_adapter(base, name, options, folder) for name, options in ADAPTERS[kind].items()}


def make_tasks(folder: Path, rows: int = 6) -> list[Path]:
    """One JSONL file a task, named after the adapters."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for task, template in TASKS.items():
        lines = [
            json.dumps({"prompt": template.format(i * 7 % 11, "abcdef"[i % 6]), "completion": f" {task[i % 3]}{i}"})
            for i in range(rows)
        ]
        file = folder / f"{task}.jsonl"
        file.write_text("\n".join(lines) + "\n", encoding="utf8")
        files.append(file)
    return files
