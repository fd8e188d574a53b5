"""A function of OpenRLHF's on our kernels, values and gradients, against a peer in float64.

Ours compute in float32 (float64 for float64) and round once; tolerances count those roundings.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from comparisons import close, close_gradients, leaves
from openrlhf_definitions import DEFINITIONS
from torch import Tensor

from rlhf_kernels.integrations import openrlhf

Call = Callable[..., tuple[Tensor | None, ...]]


def check(
    call: Callable[[Any], Call],
    peer: SimpleNamespace,
    inputs: tuple[Tensor, ...],
    tolerances: tuple[float, ...],
    of_gradient: float,
) -> None:
    """`call` gives a module's function of the inputs: first what has gradients, then metrics.

    The gradients are compared under an upstream one that differs from place to place. OpenRLHF
    itself is also given the inputs as they are, for its dtypes.
    """
    own, wide = leaves(inputs), leaves(inputs, torch.float64)
    actual, expected = call(openrlhf)(*own), call(peer)(*wide)
    kinds = expected if peer is DEFINITIONS else call(peer)(*leaves(inputs))
    for found, meant, kind, tolerance in zip(actual, expected, kinds, tolerances, strict=True):
        if found is None or meant is None:
            assert found is meant
            continue
        assert found.shape == meant.shape
        assert peer is DEFINITIONS or found.dtype == kind.dtype
        close(found, meant, tolerance)
    first, exact = actual[0], expected[0]
    assert first is not None and exact is not None
    upstream = torch.linspace(0.5, 1.5, first.numel()).view(first.shape).to(first.dtype)
    close_gradients(first, own, exact, wide, upstream, of_gradient)
