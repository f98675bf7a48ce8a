"""The JSON files that say what a folder of recycler's own holds: read, or refused with what makes them again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recycler.zoo.errors import InputError


def read_document(
    path: Path, schema: int, check: Callable[[dict[str, Any]], object], *, what: str, make: str, again: str, code: str
) -> dict[str, Any]:
    """What `path` holds.

    Args:
        schema: the newest `schema_version` that is understood.
        check: raises ValueError, KeyError or TypeError for what lacks something. It may add what it found.
        what: what a folder with such a file is: "a composed model". make: how to make one. again: what to do about a broken one. code: of
            these errors.

    Raises:
        InputError: there is no such file, it is newer, or it cannot be read.
    """
    try:
        said: dict[str, Any] = json.loads(path.read_text(encoding="utf8"))
        newer = said["schema_version"] > schema
        if not newer:  # a newer one may lack what is checked
            check(said)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path.parent} is not {what}.", f"There is no {path.name} in it.", make, code=code) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}).", "", again, code=code) from None
    if newer:
        raise InputError(f"{path.parent} was written by a newer version.", "", "Upgrade recycler.", code="E_NEWER")
    return said
