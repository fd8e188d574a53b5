"""What the names of an imported package stand for, before, while and after it is patched."""

from __future__ import annotations

import sys
from typing import Any


def held_by(package: str) -> dict[str, Any]:
    """What every name of every module of it is."""
    return {
        f"{name}.{key}": value
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == package
        for key, value in vars(module).items()
    }


def changed(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    assert before.keys() == now.keys()
    return {name for name in before if before[name] is not now[name]}
