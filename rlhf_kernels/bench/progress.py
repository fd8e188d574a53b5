"""Where a run stands: in the tables' titles and, on a terminal, in a line that rewrites itself."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

Tell = Callable[[str], None]
_CLEAR = "\r\033[K"


def silent(_: str) -> None:
    """For a caller that shows no progress."""


class Progress:
    """Counts cases and seconds."""

    def __init__(self, cases: int, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._cases, self._case = cases, 0
        self._start = time.monotonic()

    @property
    def place(self) -> str:
        """Of the case that is under way, and the time since the start: "[3/34, 1:05]"."""
        return f"[{self._case}/{self._cases}, {self.elapsed}]"

    @property
    def elapsed(self) -> str:
        """Minutes and seconds since the start."""
        minutes, seconds = divmod(int(time.monotonic() - self._start), 60)
        return f"{minutes}:{seconds:02}"

    def tell(self, what: str) -> None:
        """What begins, in place of what was told last; the empty text clears the line."""
        if not self._stream.isatty():
            return
        width = shutil.get_terminal_size().columns - 1
        line = f"{self.place} {what}"[:width] if what else ""
        self._stream.write(_CLEAR + line)
        self._stream.flush()

    def next_case(self) -> None:
        self._case += 1
