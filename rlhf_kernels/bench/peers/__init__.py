"""Other libraries' functions of the same purpose, where they are installed.

An adapter is one file: DISTRIBUTION (its name on PyPI), DEVICES (where its code runs), and
`offers()`, which imports the library and gives its functions by our operations' names, with our
operations' arguments. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
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


def offers(operation: str, device: str) -> tuple[list[Offer], dict[str, str]]:
    """What the installed peers offer for an operation, and why the other peers offer nothing."""
    found: list[Offer] = []
    missing: dict[str, str] = {}
    for name in PEERS:
        adapter = importlib.import_module(f"{__name__}.{name}")
        if operation not in adapter.OPERATIONS:
            continue
        if device not in adapter.DEVICES:
            missing[name] = f"runs on {', '.join(sorted(adapter.DEVICES))} alone"
            continue
        try:
            found += adapter.offers().get(operation, [])
        except Exception as error:  # a broken install raises anything
            missing[name] = reason(error)
    return found, missing


def versions() -> dict[str, str]:
    """The version of each peer, or "not installed"."""
    found = {}
    for name in PEERS:
        distribution = importlib.import_module(f"{__name__}.{name}").DISTRIBUTION
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[distribution] = "not installed"
    found.pop("torch")
    return found
