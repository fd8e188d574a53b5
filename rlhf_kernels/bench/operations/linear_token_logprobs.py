"""`linear_token_logprobs` against the bare products."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk
from rlhf_kernels.bench import formulas
from rlhf_kernels.bench.operation import Case
from rlhf_kernels.bench.operations.linear import LinearOperation


class LinearTokenLogprobs(LinearOperation):
    """Forward and backward compute four products, the logits twice; the floor is three."""

    name = "linear_token_logprobs"

    def ours(self, backend: str) -> Callable[..., Any]:
        return functools.partial(rk.linear_token_logprobs, backend=backend)

    def eager(self) -> Callable[..., Any]:
        return formulas.linear_token_logprobs

    def upstream(self, case: Case) -> Tensor | None:
        return torch.randn(case.sizes["N"], device=case.device)


OPERATION = LinearTokenLogprobs()
