"""`rlhf_kernels::gae`, without a gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_kernels import backends
from rlhf_kernels.ops import define
from rlhf_kernels.ppo_types import GAEConfig


def _forward(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap_values: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    value_lam: float,
    masked: str,
    rates: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    chosen = backends.choose("gae_forward", rewards, backend)
    config = GAEConfig(gamma, lam, value_lam, masked)
    return chosen.gae_forward(rewards, values, mask, bootstrap_values, cu_seqlens, config, rates)


def _fake(rewards: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


gae = define("gae", _forward, _fake)
