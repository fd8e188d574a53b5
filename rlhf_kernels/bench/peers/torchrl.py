"""torchrl's estimators of advantages, which know no masks: an episode ends at its last token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.bench.peers import Offer

DISTRIBUTION = "torchrl"
DEVICES = frozenset({"cpu", "cuda"})
OPERATIONS = frozenset({"gae"})


def offers() -> dict[str, list[Offer]]:
    from torchrl.objectives.value import functional

    def adapted(estimate: Callable[..., Any]) -> Callable[..., Any]:
        def gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            valid = mask.unsqueeze(-1)
            values, rewards = values.unsqueeze(-1) * valid, rewards.unsqueeze(-1) * valid
            following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
            done = torch.zeros_like(valid)
            done.scatter_(1, (mask.sum(1) - 1).view(-1, 1, 1), True)
            both = estimate(1.0, 0.95, values, following, rewards, done)
            advantages, returns = (torch.where(mask, x.squeeze(-1), 0.0) for x in both)
            return advantages, returns

        return gae

    return {
        "gae": [
            Offer("torchrl vec_gae", adapted(functional.vec_generalized_advantage_estimate)),
            Offer("torchrl gae", adapted(functional.generalized_advantage_estimate)),
        ]
    }
