"""`linear_cross_entropy` against the bare products."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import rlhf_kernels as rk
from rlhf_kernels.bench import formulas
from rlhf_kernels.bench.operations.linear import LinearOperation


class LinearCrossEntropy(LinearOperation):
    name = "linear_cross_entropy"

    def ours(self, backend: str) -> Callable[..., Any]:
        return functools.partial(rk.linear_cross_entropy, backend=backend)

    def eager(self) -> Callable[..., Any]:
        return formulas.linear_cross_entropy


OPERATION = LinearCrossEntropy()
