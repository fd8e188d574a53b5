"""Writing files in one step."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

PARTIAL = ".partial"


class OutputError(OSError):
    """A result cannot be written where it was asked for."""


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file as ``write_bytes`` does."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file in one step: whoever looks sees the old file or the new one, never half.

    Raises:
        OutputError: It cannot be written; the message names the file and the reason.
    """
    path = Path(path).expanduser()
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}. Its folder must exist and allow "
            "writing; choose another name or change that."
        ) from error


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file as ``write_text`` does; what JSON does not know is written as text."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")
