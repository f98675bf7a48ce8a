"""What a server carries: many streams at once against one after the other, and whether every answer is its own.

    python benchmarks/serve_load.py MODEL [--streams 64] [--tokens 32] [--prompts FILE.jsonl ...]

Starts `recycle serve MODEL` in a process of its own, opens all streams at the same time, greedily, the models in turn (the routed one,
every adapter, the base), stops the server, and answers the same requests with `generate`, one by one. An answer that differs is looked
at: where the two highest logits nearly agreed at one of its tokens (within 1e-3 in fp32), rounding decides; anything else is an error,
and so is the exit code. For scale: PEFT answers the same prompts with the first adapter alone, one by one and all in one batch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

EXAMPLES = Path(__file__).parent.parent / "examples"
TIE = {"float32": 1e-3, "bfloat16": 2.0, "float16": 0.25}  # of logits around 25, which rounding moves


class Asked(NamedTuple):
    model: str
    prompt: str


class Answer(NamedTuple):
    text: str
    tokens: int
    first: float  # seconds to the first text
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description="What a server carries.")
    parser.add_argument("model", type=Path, help="a composed model's folder")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer, at most")
    parser.add_argument(
        "--prompts", type=Path, nargs="+", help="JSONL with a prompt a row; by default the examples' test tasks"
    )
    parser.add_argument("--only", metavar="NAME", help="all streams ask this one model")
    parser.add_argument("--base", help="the base, where the model does not find it")
    parser.add_argument("--dtype", default="float32", help="in bfloat16 a token is often a matter of rounding")
    parser.add_argument("--skip-one-by-one", action="store_true", help="times alone, unchecked")
    arguments = parser.parse_args()
    import recycler

    prompts = read_prompts(arguments.prompts or sorted((EXAMPLES / "tasks" / "test").glob("*.jsonl")), arguments.streams)

    options = ["--base", arguments.base] if arguments.base else []
    options += [
        "--dtype",
        arguments.dtype,
        "--max-active",
        str(arguments.streams),
        "--max-tokens",
        str(max(arguments.tokens, 1024)),
    ]
    command = [sys.executable, "-m", "recycler.cli", "serve", str(arguments.model), "--port", "0", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        if not url:
            raise SystemExit("the server did not start")
        names = asyncio.run(names_of(url))
        asked = [Asked(arguments.only or names[n % len(names)], prompt) for n, prompt in enumerate(prompts)]
        asyncio.run(load(url, asked[:2], 2))  # what is done once is done
        began = time.perf_counter()
        answers = asyncio.run(load(url, asked, arguments.tokens))
        seconds = time.perf_counter() - began
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    tokens = sum(answer.tokens for answer in answers)
    firsts = sorted(answer.first for answer in answers)
    print(
        f"{len(answers)} streams, {len(set(one.model for one in asked))} models, {tokens} tokens; the server ended with {code}"
    )
    print(f"{'':16}  {'seconds':>8}  {'requests/s':>10}  {'tokens/s':>8}")
    print(line("served", seconds, len(answers), tokens))
    ties = wrong = 0
    if not arguments.skip_one_by_one:
        model = recycler.load(arguments.model, base=arguments.base, dtype=arguments.dtype)
        alone, expected = one_by_one(model, asked, arguments.tokens)
        print(line("one by one", alone, len(answers), tokens))
        if not model.source.encoder_decoder:
            for what, rows in (("PEFT, one by one", 1), ("PEFT, one batch", len(asked))):
                print(line(what, *peft(model, arguments.model, [row.prompt for row in asked], rows, arguments.tokens)))
        print(f"{alone / seconds:.1f} times as fast as one by one")
        ties, wrong = compare(asked, answers, expected, TIE.get(arguments.dtype, 1e-3))
    print(f"first text after {statistics.median(firsts):.2f} s in the median, {firsts[int(len(firsts) * 0.95)]:.2f} s at 95 %")
    if not arguments.skip_one_by_one:
        print(f"{len(answers) - ties - wrong} answers equal, {ties} differ from a tie on, {wrong} are wrong")
    sys.exit(1 if wrong or code else 0)


def line(what: str, seconds: float, requests: int, tokens: int) -> str:
    return f"{what:16}  {seconds:8.2f}  {requests / seconds:10.2f}  {tokens / seconds:8.1f}"


def read_prompts(files: list[Path], count: int) -> list[str]:
    """`count` prompts, the files in turn; from the top again where they are fewer."""
    rows = [
        [json.loads(row)["prompt"] for row in file.read_text(encoding="utf8").splitlines() if row.strip()] for file in files
    ]
    turns = [some[n] for n in range(max(map(len, rows))) for some in rows if n < len(some)]
    return [turns[n % len(turns)] for n in range(count)]


async def names_of(url: str) -> list[str]:
    import openai

    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        return [model.id async for model in client.models.list()]


async def load(url: str, asked: list[Asked], tokens: int) -> list[Answer]:
    """All streams at once."""
    import openai

    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=3600) as client:

        async def one(row: Asked) -> Answer:
            began, first, parts, made = time.perf_counter(), 0.0, [], 0
            stream = await client.completions.create(
                model=row.model,
                prompt=row.prompt,
                max_tokens=tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            async for chunk in stream:
                first = first or time.perf_counter() - began
                parts += [choice.text for choice in chunk.choices]
                made = chunk.usage.completion_tokens if chunk.usage else made
            return Answer("".join(parts), made, first, time.perf_counter() - began)

        return await asyncio.gather(*map(one, asked))


def one_by_one(model: Any, asked: list[Asked], tokens: int) -> tuple[float, list[tuple[str, float]]]:
    """Seconds, and each answer with how far ahead of the second its tokens were at the closest."""
    made: list[tuple[str, float]] = []
    spent = 0.0
    for row in asked:
        inputs = model.tokenizer(row.prompt, return_tensors="pt").to(model.source.device)
        with mixture(model, row.model):
            began = time.perf_counter()
            out = model.generate(
                **inputs,
                max_new_tokens=tokens,
                do_sample=False,
                repetition_penalty=1.0,
                return_dict_in_generate=True,
                output_logits=True,
            )
            spent += time.perf_counter() - began
        start = 0 if model.source.encoder_decoder else inputs["input_ids"].shape[1]
        text = model.tokenizer.decode(out.sequences[0, start:], skip_special_tokens=True)
        ahead = min(float(top[0] - top[1]) for top in (logits[0].float().topk(2).values for logits in out.logits))
        made.append((text, ahead))
    return spent, made


def peft(model: Any, folder: Path, prompts: list[str], rows: int, tokens: int) -> tuple[float, int, int]:
    """Seconds, requests and tokens of the first adapter in PEFT, on the bare base, `rows` prompts at a time."""
    from peft import PeftModel

    model.engine.detach()
    one, ends = PeftModel.from_pretrained(model.base, str(folder / "adapters" / model.names[0])), set(model.source.ends)
    seconds, made = 0.0, 0
    for start in range(0, len(prompts), rows):
        inputs = model.tokenizer(prompts[start : start + rows], return_tensors="pt", padding=True, padding_side="left")
        began = time.perf_counter()
        out = one.generate(**inputs.to(model.source.device), max_new_tokens=tokens, do_sample=False, repetition_penalty=1.0)
        seconds += time.perf_counter() - began
        for row in out[:, inputs["input_ids"].shape[1] :].tolist():
            made += next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
    one.unload()
    return seconds, len(prompts), made


def mixture(model: Any, name: str) -> Any:
    from contextlib import nullcontext

    return model.only(name) if name in model.names else model.disabled() if name == "base" else nullcontext()


def compare(asked: list[Asked], answers: list[Answer], expected: list[tuple[str, float]], tie: float) -> tuple[int, int]:
    """How many answers differ and had a tie, and how many differ without one; those are printed."""
    ties = wrong = 0
    for row, answer, (text, ahead) in zip(asked, answers, expected, strict=True):
        if answer.text == text:
            continue
        if ahead < tie:
            ties += 1
        else:
            wrong += 1
            print(f"{row.model}: {row.prompt!r} → {answer.text!r}, alone {text!r}")
    return ties, wrong


if __name__ == "__main__":
    main()
