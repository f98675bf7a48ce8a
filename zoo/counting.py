"""What the Hub's client takes for a progress bar, and is none: it counts, for whoever draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OnBytes = Callable[[int], None]
"""Called in the thread that downloads, with the bytes that came since the last call; negative where some must come again."""


def counter(on_bytes: OnBytes | None) -> Any:
    """What the client takes for a class of progress bars: it draws nothing and tells `on_bytes`."""

    class Counter:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.n = 0
            self.total = options.get("total")

        def __enter__(self) -> Counter:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def update(self, size: float | None = 1) -> None:
            self.n += int(size or 0)
            if on_bytes is not None:
                on_bytes(int(size or 0))

        def update_transfer(self, size: int) -> None:
            """Bytes on the wire, told apart from bytes of the file where contents come in shared pieces."""

        def set_postfix_str(self, *args: Any, **options: Any) -> None:
            pass

        refresh = close = set_postfix_str

    return Counter
