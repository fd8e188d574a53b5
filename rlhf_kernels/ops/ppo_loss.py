"""`rlhf_kernels::ppo_loss`: the forward forms the gradients, the backward scales them."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from rlhf_kernels import backends
from rlhf_kernels.ops.formed_gradients import define_loss
from rlhf_kernels.ppo_types import NUM_STATS, PPOLossConfig

loss_config = functools.lru_cache(maxsize=64)(PPOLossConfig)


def _forward(
    logprobs: Tensor,
    values: Tensor | None,
    entropy: Tensor | None,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old_values: Tensor | None,
    returns: Tensor | None,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    normalizer: Tensor | None,
    clip_range: float,
    clip_range_high: float | None,
    dual_clip: float | None,
    value_clip_range: float | None,
    value_coef: float,
    entropy_coef: float,
    aggregation: str,
    kl_loss_coef: float,
    kl_loss_estimator: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    chosen = backends.choose("ppo_loss_forward", logprobs, backend)
    config = loss_config(
        clip_range,
        clip_range_high,
        dual_clip,
        value_clip_range,
        value_coef,
        entropy_coef,
        aggregation,
        kl_loss_coef,
        kl_loss_estimator,
    )
    loss, stats, grad_logprobs, grad_values, grad_entropy = chosen.ppo_loss_forward(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        values,
        old_values,
        returns,
        entropy,
        ref_logprobs,
        importance_weights,
        cu_seqlens,
        config,
        normalizer,
    )
    # An operator returns tensors, so "none" is an empty one.
    if grad_values is None:
        grad_values = logprobs.new_empty(0)
    if grad_entropy is None:
        grad_entropy = logprobs.new_empty(0)
    return loss, stats, grad_logprobs, grad_values, grad_entropy


def _fake(
    logprobs: Tensor, values: Tensor | None, entropy: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def gradient(of: Tensor | None) -> Tensor:
        return logprobs.new_empty(0 if of is None else logprobs.shape)

    loss, stats = logprobs.new_empty(()), logprobs.new_empty(NUM_STATS)
    return loss, stats, gradient(logprobs), gradient(values), gradient(entropy)


ppo_loss = define_loss("ppo_loss", _forward, _fake, statistics=1)
