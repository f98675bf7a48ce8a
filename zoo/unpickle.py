"""Pickled weights → safetensors, by a process of its own that can do little else. Nothing is unpickled here.

The process (`sandbox`) gets no environment, no standard input to speak of and an empty working folder; it loads with
``torch.load(weights_only=True)`` of torch 2.10 or later, behind `walls`, and is killed when its time is up. What it leaves is
read as what a stranger sent: sizes first, then a header that is vetted, then numbers.

What can not be had on a system (a network namespace, a memory limit) is named in the report. Two things are always there: the
audit hook, and the clock in this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from recycler.zoo import inspect
from recycler.zoo.errors import InputError, RecycleError, SecurityError
from recycler.zoo.inspect import printable
from recycler.zoo.pickle_errors import refusal
from recycler.zoo.sandbox import is_old

SECONDS = 60.0
_START_SECONDS = 120  # to import torch, on a slow disk
_SLACK = 2**29  # bytes of memory beside the tensors
_MAX_LINE, _MAX_FACTS = 2**20, 2**25
# This package from where it is, and nothing else from there: ``-I`` hides folders that the environment or the user's site names.
_PROGRAM = """
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
spec = PathFinder.find_spec("recycler", [sys.argv[1]])
sys.modules["recycler"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["recycler"])
from recycler.zoo.sandbox import main
main()
"""
_OLD = "Before torch 2.10 even weights_only could be made to run code (CVE-2025-32434, CVE-2026-24747)."


@dataclass(frozen=True)
class Report:
    """What became of one pickle.

    Attributes:
        source: the pickle. sha256: of its bytes.
        weights: safetensors files with its tensors, vetted: none, one, or more where one header could not name them all.
        tensors: how many. Names are the keys that lead to a tensor, joined by "/".
        facts: its plain values, as JSON has them.
        held: the walls that stood around the process. missing: those that this system does not have.
        torch: the version that opened it.
    """

    source: Path
    sha256: str
    weights: tuple[Path, ...]
    tensors: int
    facts: Mapping[str, Any]
    held: tuple[str, ...]
    missing: tuple[str, ...]
    torch: str

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys, without the facts."""
        return {
            "source": self.source.name,
            "sha256": self.sha256,
            "tensors": self.tensors,
            "torch": self.torch,
            "held": list(self.held),
            "missing": list(self.missing),
        }

    def __str__(self) -> str:
        lacking = f"; not on this system: {', '.join(self.missing)}" if self.missing else ""
        return f"{printable(self.source.name)}: {self.tensors} tensors, opened apart by torch {self.torch}{lacking}"


def to_safetensors(
    pickle: Path | str, out: Path | str, *, max_bytes: int = inspect.MAX_BYTES, seconds: float = SECONDS
) -> Report:
    """Turn one file of pickled tensors into ``<out>/<its name>.safetensors``.

    Args:
        pickle: what ``torch.save`` wrote, in its zip format or the older one.
        out: a folder, made where it is not there.
        max_bytes: the most that the file, or its tensors unpacked, may hold.
        seconds: of wall clock, after which the process is killed.

    Raises:
        SecurityError: it asks for anything but tensors and plain values, is no pickle, unpacks to more than it may, or took
            too much memory or time; or torch is too old.
        InputError: truncated, damaged, too large, without tensors, or with tensors that safetensors cannot hold.
    """
    (result,) = open_pickles([pickle], out, max_bytes=max_bytes, seconds=seconds)
    if isinstance(result, RecycleError):
        raise result
    if not result.weights:
        raise InputError(
            f"{printable(pickle)} holds no tensors.",
            "There is nothing to convert.",
            "Give the file of weights.",
            code="E_EMPTY",
        )
    return result


def open_pickles(
    pickles: Sequence[Path | str],
    out: Path | str,
    *,
    plain: Mapping[int, Iterable[str]] | None = None,
    max_bytes: int = inspect.MAX_BYTES,
    seconds: float = SECONDS,
) -> list[Report | RecycleError]:
    """Open several pickles of one origin, in one process as long as it lives.

    Args:
        pickles: as in `to_safetensors`; results land in `out`, so their names must differ.
        plain: for the pickles at these places in the list, packages whose objects may be read as plain dicts of their
            attributes. Nothing of the packages is imported; tensors are not to be had that way.
        seconds: for each.

    Returns:
        A report or an error for each, in order; see `to_safetensors`.

    Raises:
        SecurityError: no sandbox is to be had, so nothing was opened.
    """
    _require_torch()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    paths = [Path(pickle) for pickle in pickles]
    results: dict[int, Report | RecycleError] = {}
    for place, path in enumerate(paths):
        size = _size(path)
        if isinstance(size, RecycleError):
            results[place] = size
        elif size > max_bytes:
            results[place] = InputError(
                f"{printable(path.name)} holds {size / 1e6:,.0f} MB, more than the limit of {max_bytes / 1e6:,.0f} MB.",
                "An adapter is small next to its base.",
                "If it is meant, raise the limit with --max-size.",
                code="E_TOO_LARGE",
            )
    while todo := [place for place in range(len(paths)) if place not in results]:
        with tempfile.TemporaryDirectory(dir=out, prefix=".sandbox-") as folder:
            run = _Run(Path(folder).resolve(), max_bytes, seconds)
            chosen = [paths[place] for place in todo]
            for n, verdict in run.go(chosen, {str(n): list((plain or {}).get(place, ())) for n, place in enumerate(todo)}):
                path = paths[todo[n]]
                results[todo[n]] = verdict if isinstance(verdict, RecycleError) else run.collect(n, path, out, verdict)
    return [results[place] for place in range(len(paths))]


class _Run:
    """One life of the process: it goes on until its list is done or it dies over one of them."""

    def __init__(self, folder: Path, max_bytes: int, seconds: float) -> None:
        self.folder, self.max_bytes, self.seconds = folder, max_bytes, seconds
        self.ready: Mapping[str, Any] = {}

    def go(self, pickles: Sequence[Path], plain: Mapping[str, list[str]]) -> list[tuple[int, RecycleError | Mapping[str, Any]]]:
        """(place, an error or the process's last word on it) for the pickles that it came to, at least one."""
        largest = max(path.stat().st_size for path in pickles)
        job = {
            "pickles": [str(path.absolute()) for path in pickles],
            "plain": plain,
            "path": _where_torch_is(),
            "max_bytes": self.max_bytes,
            "memory": 3 * largest + _SLACK,
            "cpu_seconds": int(self.seconds * len(pickles)) + _START_SECONDS,
        }
        lines: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        verdicts: list[tuple[int, RecycleError | Mapping[str, Any]]] = []
        current = 0
        process = self._start(job)
        try:
            assert process.stdout is not None
            threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
            deadline = time.monotonic() + _START_SECONDS
            while True:
                try:
                    line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    if not self.ready:
                        raise _no_sandbox(f"it did not start within {_START_SECONDS} s") from None
                    verdicts.append((current, refusal(pickles[current], "time", [f"{self.seconds:g} s"])))
                    return verdicts
                if line is None or "tried" in line:
                    break
                if "old" in line:
                    raise _too_old(printable(line["old"]))
                if "unable" in line:
                    raise _no_sandbox(printable(line["unable"]))
                if "ready" in line:
                    self.ready = line
                if "done" in line and line["done"] == current:
                    refused = line.get("refused")
                    verdict = refusal(pickles[current], str(refused), line.get("names")) if refused else line
                    verdicts.append((current, verdict))
                    current += 1
                if current == len(pickles):
                    return verdicts
                deadline = time.monotonic() + self.seconds
            if line is None:
                if not self.ready:
                    raise _no_sandbox(f"it ended with {_ending(process)}")
                verdicts.append((current, refusal(pickles[current], "crash", [_ending(process)])))
            else:
                verdicts.append((current, refusal(pickles[current], "tried", [line["tried"]])))
            return verdicts
        finally:
            _kill(process)

    def _start(self, job: Mapping[str, Any]) -> subprocess.Popen[bytes]:
        root = Path(sys.modules["recycler"].__file__ or "").absolute().parent.parent
        # Threads cost address space, which is limited. Windows cannot start a process without SystemRoot.
        environment = {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
        }
        environment |= {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _PROGRAM, str(root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=self.folder,
                env=environment,
                close_fds=True,
                start_new_session=True,
            )
        except OSError as error:
            raise _no_sandbox(printable(error)) from error
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it died at once, which its output will say
            process.stdin.write(json.dumps(job).encode())
            process.stdin.close()
        return process

    def collect(self, number: int, path: Path, out: Path, said: Mapping[str, Any]) -> Report | RecycleError:
        """Vet what the process left for one pickle, and move it to `out`."""
        try:
            values = _read_facts(self.folder / f"{number}.json")
            moved: list[Path] = []
            count = 0
            while (left := self.folder / f"{number}-{len(moved)}.safetensors").is_symlink() or left.exists():
                _require_file(left, self.max_bytes + 2**24)
                shapes = inspect.read_header(left)
                inspect.check_header(shapes, str(path))
                count += len(shapes)
                moved.append(out / f"{path.name}{f'-{len(moved)}' if moved else ''}.safetensors")
                shutil.move(left, moved[-1])
            if said.get("tensors") != count:
                raise ValueError("the number of tensors differs")
        except InputError as error:
            return error
        except (RecycleError, ValueError, OSError, RecursionError) as error:
            return SecurityError(
                f"{printable(path.name)}: what the sandbox left of it is not what it should be: {printable(error)}.",
                "The process that opened it may have been taken over.",
                "Ask the author for safetensors.",
                code="E_HEADER",
            )
        ready = self.ready
        held, missing = (tuple(printable(one) for one in ready.get(key, ())) for key in ("held", "missing"))
        version = printable(ready.get("ready"))
        return Report(path, inspect.hashes(path)[0], tuple(moved), count, values, held, missing, version)


def _read(stream: IO[bytes], lines: queue.SimpleQueue[Mapping[str, Any] | None]) -> None:
    """The process's lines into a queue; None at their end, and at the first that is none of ours."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        while raw := stream.readline(_MAX_LINE):
            line = json.loads(raw)
            if not isinstance(line, dict):
                break
            lines.put(line)
    lines.put(None)


def _read_facts(path: Path) -> Mapping[str, Any]:
    _require_file(path, _MAX_FACTS)
    values = json.loads(path.read_text("utf-8"))
    if not isinstance(values, dict):
        raise ValueError("no facts")
    return values


def _require_file(path: Path, max_bytes: int) -> None:
    """A plain file, no link, of at most so many bytes. Raises ValueError or OSError."""
    fact = path.lstat()
    if not stat.S_ISREG(fact.st_mode) or fact.st_nlink != 1 or fact.st_size > max_bytes:
        raise ValueError(f"{path.name} is no plain file of its size")


def _size(path: Path) -> int | RecycleError:
    try:
        fact = path.stat()
        if stat.S_ISREG(fact.st_mode):
            return fact.st_size
        why = "it is no file"
    except OSError as error:
        why = error.strerror or str(error)
    return InputError(
        f"{printable(path)} cannot be read: {printable(why)}.", fix="Check the path and its permissions.", code="E_FILES"
    )


def _where_torch_is() -> list[str]:
    """Where the process finds what it imports."""
    from importlib.util import find_spec

    specs = [find_spec(name) for name in ("torch", "safetensors", "numpy")]
    return list(dict.fromkeys(str(Path(spec.origin).parent.parent) for spec in specs if spec and spec.origin))


def _require_torch() -> None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        held = version("torch")
    except PackageNotFoundError:
        return  # it may be there all the same; the process will see
    if is_old(held):
        raise _too_old(held)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End it and whatever it started."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _ending(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return "no word"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _too_old(version: str) -> SecurityError:
    return SecurityError(
        f"Pickles are not opened with torch {version}.",
        _OLD,
        "Run: pip install -U 'torch>=2.10'; or ask the author for safetensors.",
        code="E_PICKLE",
    )


def _no_sandbox(why: str) -> SecurityError:
    return SecurityError(
        f"No process could be had to open pickles in: {why}.",
        "Opened here, a pickle could do all that you can.",
        "Try it from another environment, or ask the authors for safetensors.",
        code="E_PICKLE",
    )
