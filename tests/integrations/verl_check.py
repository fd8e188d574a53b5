"""A function of verl's on our kernels, values and gradients, against verl's own.

What is expected is what verl's function gives for the same numbers in float64. Ours compute in
float32 (float64 for float64) and round once to the dtype that verl's has; tolerances count those
roundings.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from comparisons import close, close_gradients, leaves, normal
from torch import Tensor

Call = Callable[..., Tensor]


def check(
    ours: Call, theirs: Call, inputs: list[Tensor], tolerance: float, of_gradient: float, seed: int
) -> None:
    """Both take the inputs; gradients are compared under a random upstream one."""
    own, peers, wide = leaves(inputs), leaves(inputs), leaves(inputs, torch.float64)
    actual, same_type, expected = ours(*own), theirs(*peers), theirs(*wide)
    assert (actual.dtype, actual.shape) == (same_type.dtype, same_type.shape)
    close(actual, expected, tolerance)
    upstream = normal(*expected.shape, seed=seed + 99, dtype=actual.dtype)
    of_gradient *= float(1 + upstream.abs().max())
    close_gradients(actual, own, expected, wide, upstream, of_gradient)
