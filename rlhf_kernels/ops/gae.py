"""`rlhf_kernels::gae`, without a gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_kernels import backends
from rlhf_kernels.ops import define


def _forward(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap_values: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    chosen = backends.choose("gae_forward", rewards, backend)
    return chosen.gae_forward(rewards, values, mask, gamma, lam, bootstrap_values)


def _fake(rewards: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


gae = define("gae", _forward, _fake)
