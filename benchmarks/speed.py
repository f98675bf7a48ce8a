"""What routing costs: prefill and decode of a routed model beside its base and beside PEFT's single LoRA, in one process.

    python benchmarks/speed.py [--base FOLDER] [--adapters FOLDER] [--dtype float32] [--tokens 256] [--repeats 7]

One thread, thread time, contenders interleaved, the minimum of the repeats; ratios are to the base in the same run. Peak extra
memory is by how much the resident set of a fresh process that has run the base grows, at its highest, while it loads the routed
model and prefills; what adapters and gates themselves take is printed beside it.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"


def main() -> None:
    parser = argparse.ArgumentParser(description="What routing costs.")
    parser.add_argument("--base", type=Path, default=Path(".demo/base"))
    parser.add_argument("--adapters", type=Path, default=EXAMPLES / "adapters")
    parser.add_argument("--shots", default=str(EXAMPLES / "tasks/kshot/*.jsonl"), help="shots for the routers that need them")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--extra-peak-of", metavar="MODEL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.extra_peak_of:
        print(extra_peak(arguments.extra_peak_of, str(arguments.base), arguments.dtype, arguments.tokens))
        return

    import torch

    import recycler
    from recycler.base import load_base
    from recycler.build import read_adapters
    from recycler.profiles import Profile
    from recycler.routed import RoutedModel
    from recycler.routers.discovery import make_config, methods
    from recycler.scoring import Fitting

    sys.path.insert(0, str(EXAMPLES))
    from get_base import get_base

    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = get_base(arguments.base)
    zoo = recycler.Zoo(Path(tempfile.mkdtemp()) / "zoo")
    recycler.fetch(arguments.adapters, base=folder, zoo=zoo).raise_for_failures()
    base = load_base(str(folder), dtype=arguments.dtype)
    ids = torch.randint(10, base.model.config.vocab_size, (1, arguments.tokens + 1))

    def prefill(model: Any) -> Callable[[], None]:
        return lambda: model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=1)

    def decode(model: Any) -> Callable[[], None]:
        cache = model(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values

        def step() -> None:
            model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
            cache.crop(-1)

        return step

    with torch.no_grad():
        fitting = RoutedModel(base, read_adapters(zoo, list(zoo), base))
        shots = recycler.Shots.from_files(arguments.shots).sample(2)
        own = {name: (name,) for name in zoo if name in shots}
        nll = torch.zeros(len(zoo) + 1, len(shots), 2)
        profile = Profile(fitting.names, shots, nll, assigned=own)
        quick: dict[str, dict[str, Any]] = {
            "phatgoose": {"steps": 1, "rows": 4},
            "ridge": {"chains": 4},
        }  # how well they route does not matter here
        with torch.enable_grad():
            routers = {
                name: cls.fit(Fitting(fitting), profile, make_config(cls, quick.get(name, {})))
                for name, cls in methods().items()
            }
        adapters = fitting.names
        fitting.engine.detach()
        del fitting
        model = RoutedModel(base, read_adapters(zoo, adapters, base), next(iter(routers.values())))
        model.folders = {name: zoo.folder(name) for name in zoo}
        saved = model.save_pretrained(zoo.path.parent / "model")
        # In a process of its own, where nothing else has raised the mark.
        command = [sys.executable, __file__, "--extra-peak-of", str(saved), "--base", str(folder)]
        command += ["--dtype", arguments.dtype, "--tokens", str(arguments.tokens)]
        grown = float(subprocess.check_output(command))

        from peft import PeftModel

        largest = max(zoo.entries, key=lambda name: zoo.entries[name].parameters)
        peft = PeftModel.from_pretrained(load_base(str(folder), dtype=arguments.dtype).model, zoo.folder(largest))

        def bare() -> Any:
            return model.engine.control.set(enabled=False)

        contenders: dict[str, tuple[Any, Callable[[], Any]]] = {
            "base": (base.model, bare),
            f"PEFT, {largest} alone": (peft, nullcontext),
        }
        for name, router in routers.items():
            contenders[f"routed, {name}"] = (model, lambda router=router: _use(model, router))

        print(f"{len(zoo)} adapters on {len(model.sites)} sites; {arguments.dtype}, one thread, {platform.processor() or platform.machine()}, "
              f"torch {torch.__version__}")  # fmt: skip
        print(f"adapters and gates: {model.extra_bytes / 1e6:.1f} MB; peak extra memory of loading them and a prefill: "
              f"{grown:.0f} MB")  # fmt: skip
        for title, make in ((f"prefill {arguments.tokens}", prefill), (f"decode at {arguments.tokens}", decode)):
            runs = {}
            for name, (contender, enter) in contenders.items():
                with enter():
                    runs[name] = make(contender)
            best = dict.fromkeys(runs, float("inf"))
            for _ in range(arguments.repeats + 1):
                for name, (_, enter) in contenders.items():
                    with enter():
                        started = time.thread_time()
                        for _ in range(1 if make is prefill else 10):
                            runs[name]()
                        best[name] = min(best[name], time.thread_time() - started)
            print(f"\n{title}")
            for name, seconds in best.items():
                each = seconds / (1 if make is prefill else 10)
                print(f"  {name:28s} {each * 1e3:8.1f} ms   {seconds / best['base']:.2f} × base")


def _use(model: Any, router: Any) -> Any:
    if model.router is not router:
        model.use(router)
    return nullcontext()


def extra_peak(model: str, folder: str, dtype: str, tokens: int) -> float:
    """By how many MB this process's resident set grows, at its highest, when a composed model is loaded onto a base that has
    already run, and prefills. Linux only, where the high-water mark can be reset; elsewhere nan."""
    import torch

    import recycler
    from recycler.base import load_base

    torch.set_num_threads(1)
    base = load_base(folder, dtype=dtype)
    inputs: dict[str, Any] = {"input_ids": torch.arange(10, 10 + tokens)[None], "use_cache": False, "logits_to_keep": 1}
    status = Path("/proc/self/status")
    with torch.no_grad():
        base.model(**inputs)
        if not status.exists():
            return float("nan")
        Path("/proc/self/clear_refs").write_text("5")
        before = _kilobytes(status, "VmHWM")
        recycler.load(model, base=base)(**inputs)
    return (_kilobytes(status, "VmHWM") - before) / 1e3


def _kilobytes(status: Path, field: str) -> float:
    return next(float(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))


if __name__ == "__main__":
    main()
