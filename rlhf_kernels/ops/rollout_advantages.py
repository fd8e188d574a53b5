"""`rlhf_kernels::rollout_advantages`: KL, rewards and GAE in one pass, without a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import backends
from rlhf_kernels.ops import define
from rlhf_kernels.ppo_types import GAEConfig


def _forward(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap_values: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    gamma: float,
    lam: float,
    value_lam: float,
    masked: str,
    rates: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    chosen = backends.choose("rollout_forward", logprobs, backend)
    return chosen.rollout_forward(
        scores,
        logprobs,
        ref_logprobs,
        values,
        mask,
        bootstrap_values,
        cu_seqlens,
        kl_coef,
        kl_estimator,
        GAEConfig(gamma, lam, value_lam, masked),
        rates,
    )


def _fake(
    scores: Tensor, logprobs: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    advantages, returns, rewards, kl = (logprobs.new_empty(logprobs.shape) for _ in range(4))
    return advantages, returns, rewards, kl, logprobs.new_empty(3, dtype=torch.float64)


rollout_advantages = define("rollout_advantages", _forward, _fake)
