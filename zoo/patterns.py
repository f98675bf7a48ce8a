"""PEFT's rank and alpha patterns, matched as PEFT matches them, without letting a file's patterns stall the machine.

Python's ``re`` cannot be interrupted, and some patterns take years to match, or minutes to compile. So a pattern that is no plain
module path is neither compiled nor matched in this process.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

from recycler.zoo.errors import InputError, SecurityError, shorten
from recycler.zoo.untrusted import printable

# A module path, or the end of one: as a regular expression all of it stands for itself, but the dot for any character.
_PLAIN = re.compile(r"[\w.-]*")
_MAX_LENGTH = 500
_TIMEOUT_S = 2.0  # a config has two sets of patterns, and both together must stay under five seconds
_CHILD = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
except (ImportError, ValueError, OSError):
    pass
patterns, paths = json.load(sys.stdin)
compiled, wrong = [], []
for i, p in enumerate(patterns):
    try:
        compiled.append(re.compile(rf"(.*\\.)?({p})$"))
    except (re.error, ValueError, RecursionError, OverflowError):
        wrong.append(i)
found = [] if wrong else [next((i for i, c in enumerate(compiled) if c.match(path)), None) for path in paths]
json.dump([wrong, found], sys.stdout)
"""


def first_matches(patterns: list[str], paths: list[str], timeout_s: float = _TIMEOUT_S) -> list[int | None]:
    """For every path, the index of the first pattern that matches, or None.

    A pattern matches as in ``peft.utils.other.get_pattern_key``: ``re.match(rf"(.*\\.)?({pattern})$",
    path)``. Plain paths are looked up; anything else is matched in a child process. Either ends after `timeout_s` seconds.

    Raises:
        InputError: a pattern is no valid regular expression, or longer than 500 characters.
        SecurityError: the patterns did not finish in time.
    """
    long = [pattern for pattern in patterns if len(pattern) > _MAX_LENGTH]
    if long:
        raise _unusable(long)
    if all(map(_PLAIN.fullmatch, patterns)) and all(map(str.isprintable, paths)):
        return _look_up(patterns, paths, timeout_s)
    return _in_child(patterns, paths, timeout_s)


def _look_up(patterns: list[str], paths: list[str], timeout_s: float) -> list[int | None]:
    """`first_matches` for plain patterns: a path matches if the whole of it, or what follows one of its dots, equals the pattern
    once the characters at the pattern's dots are blotted out."""
    by_length: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
    for index, pattern in enumerate(patterns):
        dots = tuple(i for i, character in enumerate(pattern) if character == ".")
        by_length.setdefault(len(pattern), {}).setdefault(dots, {}).setdefault(pattern, index)
    deadline = time.monotonic() + timeout_s
    found: list[int | None] = []
    for path in paths:
        hits = []
        for start in (0, *(i + 1 for i, character in enumerate(path) if character == ".")):
            end = list(path[start:])
            for dots, table in by_length.get(len(end), {}).items():
                blotted = end.copy()
                for dot in dots:
                    blotted[dot] = "."
                hit = table.get("".join(blotted))
                if hit is not None:
                    hits.append(hit)
        found.append(min(hits, default=None))
        if time.monotonic() > deadline:
            raise _endless(patterns, timeout_s)
    return found


def _in_child(patterns: list[str], paths: list[str], timeout_s: float) -> list[int | None]:
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([patterns, paths]),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:  # too long, or too much memory
        raise _endless(patterns, timeout_s) from error
    wrong, found = json.loads(child.stdout)
    if wrong:
        raise _unusable([patterns[i] for i in wrong])
    return list(found)


def _unusable(wrong: list[str]) -> InputError:
    return InputError(
        f"Not usable as regular expressions: {shorten(printable(p, 60) for p in wrong)}.",
        f"Rank and alpha patterns are matched against module paths, and have at most {_MAX_LENGTH} characters.",
        "Correct rank_pattern and alpha_pattern in adapter_config.json.",
        code="E_CONFIG",
    )


def _endless(patterns: list[str], timeout_s: float) -> SecurityError:
    return SecurityError(
        f"Matching took more than {timeout_s:g} s: {shorten(printable(p, 60) for p in patterns)}.",
        "A rank or alpha pattern that backtracks without end can stall a machine.",
        "Write the module paths out in rank_pattern and alpha_pattern.",
        code="E_PATTERN",
    )
