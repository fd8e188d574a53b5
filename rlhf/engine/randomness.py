"""The state of the global random generators, as JSON values.

Trainers derive their own seeds; but a user's reward, a library or dropout may draw from these.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's (all devices') global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Python's, NumPy's and PyTorch's states, the last for the CPU and this rank's GPU."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": to_text(torch.get_rng_state()),
        "cuda": to_text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Continue where ``random_state`` was taken."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(from_text(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(from_text(state["cuda"]))


@contextmanager
def keeping_random_state_on_error() -> Iterator[None]:
    """Put the generators back if what is inside fails; done again, it draws the same numbers."""
    state = random_state()
    try:
        yield
    except BaseException:
        set_random_state(state)
        raise


def to_text(state: Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def from_text(text: str) -> Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
