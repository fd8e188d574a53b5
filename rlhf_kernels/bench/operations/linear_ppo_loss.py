"""`linear_ppo_loss` against the bare products."""

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

CONFIG = rk.PPOLossConfig()


class LinearPPOLoss(LinearOperation):
    """Every token is valid, so that the products are those of the floor."""

    name = "linear_ppo_loss"

    def ours(self, backend: str) -> Callable[..., Any]:
        return functools.partial(rk.linear_ppo_loss, config=CONFIG, backend=backend)

    def eager(self) -> Callable[..., Any]:
        return self.adapt(formulas.linear_ppo_loss)

    def adapt(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(function, config=CONFIG)

    def arguments(
        self, case: Case, hidden: Tensor, weight: Tensor, targets: Tensor
    ) -> tuple[Any, ...]:
        batch = 8 if case.sizes["N"] % 8 == 0 else 1
        targets = targets.view(batch, -1)
        with torch.no_grad():
            old = rk.linear_token_logprobs(hidden, weight, targets.view(-1)).view(targets.shape)
        old_logprobs = old + 0.1 * torch.randn_like(old)
        advantages = torch.randn_like(old)
        mask = torch.ones_like(targets, dtype=torch.bool)
        states = hidden.view(batch, -1, hidden.shape[-1])
        return states, weight, targets, old_logprobs, advantages, mask


OPERATION = LinearPPOLoss()
