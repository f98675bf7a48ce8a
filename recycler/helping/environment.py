"""What a bug report needs to say about a machine, with nothing secret in it."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
_PACKAGES = (
    "recycler", "torch", "transformers", "peft", "huggingface-hub", "safetensors", "accelerate", "sentence-transformers", "tokenizers",
    "bitsandbytes", "triton", "vllm", "fastapi", "uvicorn", "matplotlib", "lm-eval", "ray", "numpy", "click", "rich",
)  # fmt: skip
_PREFIXES = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "RECYCLE_", "TORCH", "PYTORCH_", "CUDA_", "OMP_", "TOKENIZERS_", "XDG_CACHE_HOME",
             "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "REQUESTS_CA_BUNDLE", "SSL_CERT_")  # fmt: skip
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|HEADER", re.IGNORECASE)
_PUBLIC = ("TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_TOKEN_PATH")
_LOGIN = re.compile(r"(\w[\w+.-]*://)\S*@|(?<!\S)\S*:\S*@")  # up to the last @ of a word: passwords hold anything
_QUERY = re.compile(r"(?<=[?&;])([^=&;?\s]+)=[^&;\s]*")
_LOOKS_SECRET = re.compile(r"\b(?:hf_|sk-|gh[opsur]_|github_pat_|xox[abp]-|AKIA|eyJ)[\w.-]{8,}|(?i:bearer|basic)\s+\S+")


def environment() -> dict[str, Any]:
    """Versions, system, devices and variables, under stable keys. Values that may be secret are masked."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "schema_version": SCHEMA_VERSION,
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
        "plugins": plugins(),
        "python": platform.python_version(),
        "executable": _short(sys.executable),
        "installed": _short(str(Path(__file__).parent.parent)),
        "system": platform.platform(),
        "cpu": f"{_cpu()}, {os.cpu_count()} cores",
        "memory_gb": _memory(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "variables": variables(),
    }


def plugins() -> list[str]:
    """Routers that other packages bring."""
    return sorted(f"{point.name} = {point.value}" for point in entry_points(group="recycler.routers"))


def variables() -> dict[str, str]:
    """The variables that matter here, sorted; what may be secret is masked."""
    chosen = {name: value for name, value in os.environ.items() if name.upper().startswith(_PREFIXES)}
    return {name: masked(name, value) for name, value in sorted(chosen.items())}


def markdown(facts: dict[str, Any]) -> str:
    """To be pasted into a report."""
    rows = [
        ("recycler", facts["packages"].get("recycler", "not installed")),
        ("Python", f"{facts['python']} ({facts['executable']})"),
    ]
    rows += [("installed in", facts["installed"]), ("system", facts["system"]), ("CPU", facts["cpu"])]
    rows += [
        ("memory", f"{facts['memory_gb']} GB"),
        ("GPU", ", ".join(facts["gpus"]) or "none"),
        ("CUDA of torch", facts["cuda"] or "none"),
    ]
    rows += [(name, found) for name, found in facts["packages"].items() if name != "recycler"]
    rows += [("plugins", ", ".join(facts["plugins"]) or "none")]
    rows += [(f"`{name}`", f"`{value}`") for name, value in facts["variables"].items()]
    cells = [(name, str(value).replace("|", r"\|").replace("\n", " ")) for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])


def masked(name: str, value: str) -> str:
    """A variable's value as strangers may read it: nothing of what its name or its shape says is secret, no login and no query of a
    URL, no home folder."""
    if _SECRET.search(name) and name not in _PUBLIC:
        return "(set)" if value else "(empty)"
    value = _LOGIN.sub(lambda found: f"{found[1] or ''}***@", value)
    value = _QUERY.sub(lambda found: f"{found[1]}=***", value)
    return _short(_LOOKS_SECRET.sub("***", value))


def _short(path: str) -> str:
    """A home folder spells somebody's name."""
    home = str(Path.home())
    return path.replace(home, "~") if len(home) > 1 else path


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory() -> float:
    import psutil  # type: ignore[import-untyped]  # accelerate brings it

    return round(psutil.virtual_memory().total / 1e9, 1)
