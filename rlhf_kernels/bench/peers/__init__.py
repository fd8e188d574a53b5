"""Other libraries' functions of the same purpose, where they are installed.

An adapter is one file: DISTRIBUTION (its name on PyPI), DEVICES (where its code runs), and
`offers()`, which imports the library and gives its functions by our operations' names, with our
operations' arguments. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from rlhf_kernels.bench.timing import reason

PEERS = (
    "torch_chunked",
    "trl",
    "verl",
    "openrlhf",
    "torchrl",
    "liger",
    "flash_attn",
    "cut_cross_entropy",
    "quack",
)


@dataclass(frozen=True)
class Offer:
    """A peer's function for one of our operations.

    function: takes what our operation takes, returns what it returns.
    entropy: it returns entropies too.
    destroys: it writes over the logits it is given, so it must have its own.
    comparable: False where its definition differs, so that its result is another number.
    """

    label: str
    function: Callable[..., Any]
    entropy: bool = False
    destroys: bool = False
    comparable: bool = True


def offers(
    operation: str, device: str, names: Sequence[str] = PEERS
) -> tuple[list[Offer], dict[str, str]]:
    """What these peers offer for an operation, and why some that have it offer nothing here."""
    found: list[Offer] = []
    missing: dict[str, str] = {}
    for name in names:
        adapter = _adapter(name)
        if operation not in adapter.OPERATIONS:
            continue
        why = unavailable_reason(name, device)
        if why is None:
            found += adapter.offers().get(operation, [])
        else:
            missing[name] = why
    return found, missing


def unavailable_reason(name: str, device: str) -> str | None:
    """Why a peer cannot take part, with what to install where that is it; None: it can."""
    adapter = _adapter(name)
    if device not in adapter.DEVICES:
        return f"runs on {', '.join(sorted(adapter.DEVICES))} alone"
    if _version(adapter.DISTRIBUTION) is None:
        return f"not installed (pip install {adapter.DISTRIBUTION})"
    try:
        adapter.offers()
    except Exception as error:  # a broken install raises anything
        return reason(error)
    return None


def versions() -> dict[str, str]:
    """The version of each peer, or "not installed"."""
    names = (_adapter(name).DISTRIBUTION for name in PEERS)
    return {name: _version(name) or "not installed" for name in names if name != "torch"}


def _adapter(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
