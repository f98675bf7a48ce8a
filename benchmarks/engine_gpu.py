"""What routing costs on a GPU. Needs this package and a torch with CUDA; nothing is downloaded.

    python benchmarks/engine_gpu.py [--quick] [--rows G1,G4] [--repeats 5] [--out .bench/engine_gpu]
    python benchmarks/engine_gpu.py --dry-run        # no GPU: traces every row's forwards on fake CUDA tensors, times nothing

The linears of one Llama-8B layer, and all of SmolLM2-135M; random weights, bf16, two adapters a token. Ratios are to the same modules
without adapters. CUDA events, contenders interleaved, the minimum of the rounds; where it says so as one captured graph. Prints one row
for each claim (benchmarks/README.md says what they are) and writes rows.json. The targets are a roofline's and 5 to 15 %, made before
anybody had measured. Exit status 2 where there is no CUDA.

Dimensions in names: B batch, T token, D input width, E adapter.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import fake_cuda
import peers
import torch
from gpu_models import CUDA, GROUPS, HALF, ArrowLike, Clock, Linears, Whole, peft_single, plain_linears, routed_linears
from report import Claim, Row, describe, save, show
from torch import Tensor, nn

from recycler.engine.attach import Attachment
from recycler.engine.bank import Few

LLAMA = (4096, 1024, 14336)  # hidden, keys and values, MLP: Llama-8B
SMOL = {**peers.SMOLLM2, "num_hidden_layers": 30, "vocab_size": 49152}


def paths_of(engine: Attachment, tokens: int) -> str:
    chosen = {bank.foresee((1, tokens, bank.group.width))[0] for bank in engine.banks}
    return f"path {', '.join(sorted(chosen))}"


def tokens_of(count: int, width: int) -> Tensor:
    return torch.randn(1, count, width, device=CUDA, dtype=HALF)


class Rowset:
    """Each method G1, G2, … is a row. Only a test has a `limit` on the number of adapters below 256."""

    def __init__(
        self, clock: Clock, shape: tuple[int, int, int], smol: Mapping[str, int], tokens: int, rivals: bool, limit: int = 256
    ) -> None:
        self.clock, self.shape, self.smol, self.tokens, self.rivals, self.limit = clock, shape, smol, tokens, rivals, limit

    def _routed(self, count: int) -> tuple[Linears, Attachment]:
        return routed_linears(self.shape, min(count, self.limit), 16)

    def _prefill(self, name: str, count: int, most: float, arrow: bool = False) -> Row:
        x, runs = tokens_of(self.tokens, self.shape[0]), {}
        plain, (layer, engine) = plain_linears(self.shape), self._routed(count)
        runs["base"], runs["ours"] = lambda: plain(x), lambda: layer(x)
        if self.rivals:  # one GEMM for base and adapters; a layer of its own, whose weights become views
            joined, joint = self._routed(count)
            joint.join()
            runs["ours, one GEMM"] = lambda: joined(x)
        single = peft_single(self.shape, 16)
        runs["PEFT one LoRA"] = lambda: single(x)
        if arrow and self.rivals:
            rival = ArrowLike(self.shape, min(count, self.limit), 16)
            runs["PEFT Arrow"] = lambda: rival(x)
        found = self.clock.ratios(runs, times=5)
        claims = [Claim("× base", found["ours"], most)]
        if count == 8:
            claims.append(Claim("× PEFT one LoRA", found["ours"] / found["PEFT one LoRA"], 1.0))
        if "PEFT Arrow" in found:
            claims.append(Claim("times faster than PEFT Arrow", found["PEFT Arrow"] / found["ours"], 8.0, at_most=False))
        said = ", ".join(f"{who} {ratio:.2f}" for who, ratio in found.items() if who.startswith(("PEFT", "ours,")))
        return Row(name, f"Llama-8B's linears, prefill of {self.tokens}, {count} adapters", tuple(claims), said, paths_of(engine, self.tokens))  # fmt: skip

    def G1(self) -> Row:
        return self._prefill("G1", 8, 1.25)

    def G2(self) -> Row:
        return self._prefill("G2", 64, 1.6, arrow=True)

    def G3(self) -> Row:
        return self._prefill("G3", 256, 2.1)

    def _decode(self, name: str, tokens: int, targets: Mapping[int, float]) -> Row:
        x, plain = tokens_of(tokens, self.shape[0]), plain_linears(self.shape)
        claims, notes = [], []
        for count, most in targets.items():
            layer, engine = self._routed(count)
            found = self.clock.ratios({"base": lambda: plain(x), "ours": lambda layer=layer: layer(x)}, graphed=True)
            claims.append(Claim(f"{count} adapters × base", found["ours"], most))
            notes.append(f"{count}: {paths_of(engine, tokens)}")
            del layer, engine
        return Row(name, f"Llama-8B's linears, {tokens} token(s), one graph", tuple(claims), "", "; ".join(notes))

    def G4(self) -> Row:
        return self._decode("G4", 1, {8: 1.25, 64: 1.35, 256: 1.40})

    def G5(self) -> Row:
        return self._decode("G5", 64, {64: 1.65, 256: 2.1})

    def G6(self) -> Row:
        plain, ours = Whole(self.smol), Whole(self.smol, min(64, self.limit))
        found = self.clock.ratios({"base": plain.decode(), "ours": ours.decode()}, graphed=True)
        return Row("G6", "SmolLM2-135M, one token, 64 adapters, one graph", (Claim("× base", found["ours"], 2.0),), "", paths_of(ours.engine, 1))  # fmt: skip

    def G7(self) -> Row:
        from peft import LoraConfig, get_peft_model

        targets = [site for sites in GROUPS for site in sites]
        config = LoraConfig(r=8, target_modules=targets, init_lora_weights=False)
        options = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
        plain, ours = Whole(self.smol), Whole(self.smol, min(64, self.limit))
        one = Whole(self.smol, wrap=lambda model: get_peft_model(model, config, **options).eval())
        runs = {
            "PEFT one LoRA": one.prefill(self.tokens),
            "base": plain.prefill(self.tokens),
            "ours": ours.prefill(self.tokens),
        }
        found = self.clock.ratios(runs, times=5)
        note = f"{found['ours'] / found['base']:.2f} × base; {paths_of(ours.engine, self.tokens)}"
        return Row("G7", f"SmolLM2-135M, prefill of {self.tokens}, 64 adapters", (Claim("× PEFT one LoRA", found["ours"], 1.0),), "", note)  # fmt: skip

    def G8(self) -> Row:
        plain, claims = plain_linears(self.shape), []
        x, (layer, engine) = tokens_of(16, self.shape[0]), self._routed(64)
        before = self.clock.kernels(lambda: plain(x))
        wanted = [("dense", 16.0), ("skip", 24.0)]
        for path, most in wanted:
            with engine.control.set(path=path):
                claims.append(Claim(f"{path} path", self.clock.kernels(lambda: layer(x)) - before, most))
        return Row(
            "G8", "kernels launched beside the base's, by layer", tuple(claims), "PEFT Arrow 112 by count of its code", ""
        )

    def G9(self, sequences: int = 8) -> Row:
        plain, (layer, engine) = plain_linears(self.shape), self._routed(64)
        x = torch.randn(sequences, max(self.tokens // sequences, 16), self.shape[0], device=CUDA, dtype=HALF)
        chosen = [*range(sequences)]
        w_BE = nn.functional.one_hot(torch.arange(sequences, device=CUDA), min(64, self.limit)).to(torch.float32)
        with engine.control.set(forced=w_BE, few=Few(tuple(chosen), 1)):
            found = self.clock.ratios({"base": lambda: plain(x), "ours": lambda: layer(x)}, times=5)
        return Row(
            "G9", f"Llama-8B's linears, {sequences} sequences with one adapter each", (Claim("× base", found["ours"], 1.15),)
        )

    def G10(self) -> Row:
        plain, (layer, engine) = plain_linears(self.shape), self._routed(64)
        x = tokens_of(self.tokens, self.shape[0])
        extra = self.clock.peak(lambda: layer(x)) - self.clock.peak(lambda: plain(x))
        arrow = self.tokens * 64 * self.shape[2] * 2 / 1e9
        return Row("G10", f"GB at its highest beside the base's, {self.tokens} tokens, 64 adapters", (Claim("GB", extra, 0.5),),
                   f"PEFT Arrow at least {arrow:.1f}", paths_of(engine, self.tokens))  # fmt: skip

    def G11(self) -> Row:
        layer, engine = self._routed(64)
        inputs, waits = [tokens_of(count, self.shape[0]) for count in (self.tokens, 1, 16)], 0
        for path, x in itertools.product((None, "dense", "gather", "sorted"), inputs):
            if path == "gather" and x.shape[1] > 64:
                continue
            with torch.no_grad(), engine.control.set(path=path):
                layer(x)  # tables are made when first asked for
                try:
                    with self.clock.no_syncs():
                        layer(x)
                except RuntimeError as error:
                    if self.clock.dry or "synchroniz" not in str(error):
                        raise
                    waits += 1
        return Row(
            "G11", "waits for the device in a forward, any path, 1, 16 and many tokens", (Claim("waits", float(waits), 0.0),)
        )

    def G12(self) -> Row:
        plain, (layer, _) = plain_linears(self.shape), self._routed(8)
        x, side = tokens_of(1, self.shape[0]), nullcontext() if self.clock.dry else torch.cuda.Stream()
        size = 84_000_000
        host = torch.empty(size, dtype=torch.uint8, pin_memory=not self.clock.dry)
        room = torch.empty(size, dtype=torch.uint8, device=CUDA)

        def steps(copies: bool) -> None:  # about as many layer steps as two tokens of a Llama-8B take
            if copies:
                with side if self.clock.dry else torch.cuda.stream(side):
                    room.copy_(host, non_blocking=True)
            for _ in range(64):
                layer(x)

        found = self.clock.ratios({"without": lambda: steps(False), "with": lambda: steps(True)}, times=2)
        del plain
        return Row("G12", "an adapter of 84 MB copied beside two tokens' steps", (Claim("× without", found["with"], 1.05),),
                   "", "the copy alone; the engine's own paging is not driven here")  # fmt: skip


def run(rowset: Rowset, names: list[str]) -> list[Row]:
    rows = []
    for name in names:
        with fake_cuda.mode() if rowset.clock.dry else nullcontext():
            try:
                row = getattr(rowset, name)()
            except Exception as error:
                what = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
                row = Row(name, "", (), note=f"could not run: {what}")
                if rowset.clock.dry:
                    raise
        rows.append(row)
        show([row])
        if not rowset.clock.dry:
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    every = [f"G{number}" for number in range(1, 13)]
    parser = argparse.ArgumentParser(description="What routing costs on a GPU.")
    parser.add_argument("--dry-run", action="store_true", help="trace the forwards on fake CUDA tensors; nothing is timed")
    parser.add_argument("--quick", action="store_true", help="1024 tokens instead of 4096, without PEFT's Arrow")
    parser.add_argument("--rows", default=",".join(every))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(".bench/engine_gpu"))
    arguments = parser.parse_args()
    names = arguments.rows.split(",")
    if unknown := sorted(set(names) - set(every)):
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(every)}")
    if not arguments.dry_run and not torch.cuda.is_available():
        print("This torch sees no CUDA device. Run it on a machine that has one, or add --dry-run.", file=sys.stderr)
        raise SystemExit(2)
    machine = describe()
    if not arguments.dry_run:
        machine |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        machine["text"] += f"; {machine['gpu']}, CUDA {machine['cuda']}"
    print(machine["text"])
    clock = Clock(arguments.dry_run, arguments.repeats)
    rows = run(Rowset(clock, LLAMA, SMOL, 1024 if arguments.quick else 4096, not arguments.quick), names)
    if arguments.dry_run:
        print(f"{len(rows)} rows traced on fake CUDA tensors: nothing waits for the device, and nothing was timed")
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    save(machine, rows, arguments.out / "rows.json")


if __name__ == "__main__":
    main()
