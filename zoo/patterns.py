"""PEFT's rank and alpha patterns, matched as PEFT matches them, without letting a file's pattern stall the
machine."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from recycler.zoo.errors import InputError, SecurityError, shorten
from recycler.zoo.inspect import printable

# Without repetition, group or alternative a pattern takes time linear in the path.
_PLAIN = re.compile(r"[\w.\\^$\[\]-]*")
_MAX_LENGTH = 500
_CHILD = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
patterns, paths = json.load(sys.stdin)
compiled = [re.compile(rf"(.*\\.)?({p})$") for p in patterns]
json.dump([next((i for i, c in enumerate(compiled) if c.match(path)), None) for path in paths], sys.stdout)
"""


def first_matches(patterns: list[str], paths: list[str], timeout_s: float = 10.0) -> list[int | None]:
    """For every path, the index of the first pattern that matches, or None.

    A pattern matches as in ``peft.utils.other.get_pattern_key``: ``re.match(rf"(.*\\.)?({pattern})$",
    path)``. Python's ``re`` cannot be interrupted and some patterns take years, so anything with a repetition
    or an alternative is matched in a child process that is ended after `timeout_s` seconds.

    Raises:
        InputError: a pattern is no valid regular expression, or longer than 500 characters.
        SecurityError: the patterns did not finish in time.
    """
    compiled, wrong = [], []
    for pattern in patterns:
        try:
            if len(pattern) > _MAX_LENGTH:
                raise ValueError("too long")
            compiled.append(re.compile(rf"(.*\.)?({pattern})$"))
        except (re.error, ValueError, RecursionError, OverflowError):
            wrong.append(printable(pattern, 60))
    if wrong:
        raise InputError(
            f"Not usable as regular expressions: {shorten(wrong)}.",
            "Rank and alpha patterns are matched against module paths.",
            "Correct rank_pattern and alpha_pattern in adapter_config.json.",
        )
    if all(_PLAIN.fullmatch(pattern) for pattern in patterns):
        return [next((i for i, c in enumerate(compiled) if c.match(path)), None) for path in paths]
    return _in_child(patterns, paths, timeout_s)


def _in_child(patterns: list[str], paths: list[str], timeout_s: float) -> list[int | None]:
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD],
            input=json.dumps([patterns, paths]),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise SecurityError(
            f"Matching took more than {timeout_s:g} s: {shorten(printable(p, 60) for p in patterns)}.",
            "A rank or alpha pattern that backtracks without end can stall a machine.",
            "Write the module paths out in rank_pattern and alpha_pattern.",
        ) from error
    found: list[int | None] = json.loads(child.stdout)
    return found
