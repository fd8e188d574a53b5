"""The clipped PPO loss, from log-probabilities or from hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.linear import (
    check_linear,
    group_name,
    linear_token_logprobs,
    waits_for_loss_scale,
)
from rlhf_kernels.ops.chunks import wide_dtype
from rlhf_kernels.ops.formed_gradients import needs_gradients
from rlhf_kernels.ops.linear_losses import linear_ppo_loss as _linear_ppo_loss
from rlhf_kernels.ops.linear_losses import loss_kernels
from rlhf_kernels.ops.ppo_loss import ppo_loss as _ppo_loss
from rlhf_kernels.ppo_types import PPOLossConfig, PPOLossStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "PPOLossConfig",
    "PPOLossStats",
    "linear_ppo_loss",
    "ppo_loss",
]

_DEFAULT = PPOLossConfig()
_IGNORED = -100


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    entropy: Tensor | None = None,
    config: PPOLossConfig = _DEFAULT,
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, PPOLossStats]:
    """The clipped PPO loss (Schulman et al. 2017, arXiv 1707.06347).

    loss = agg(policy) + value_coef · agg(value) - entropy_coef · agg(entropy); see
    `docs/kernels.md`. Differentiable by logprobs, values and entropy; the gradient stops at
    the others.

    Args:
        logprobs, old_logprobs, advantages: [B, T], floating-point.
        mask: [B, T], bool (or integers, 0 is masked): the valid tokens.
        values, returns: [B, T]; with them the value loss takes part. old_values: [B, T], needed
            with values unless config.value_clip_range is None.
        entropy: [B, T]; with it the entropy bonus takes part.
        config: clip ranges, coefficients, aggregation.
        normalizer: a number or a 0-dim tensor that divides the sum in place of the count of this
            call: valid tokens for "token-mean", sequences with a valid token for the others. With
            the whole batch's count, micro-batches and ranks add up to the whole batch's loss.
        backend: see `rlhf_kernels.backends`.

    Returns:
        (loss, PPOLossStats): a 0-dim tensor, float32 (float64 where an input is), and detached
        statistics on the same device. Without valid tokens both are 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit.
        BackendUnavailableError, UnsupportedOperationError: a backend named that cannot do it.
    """
    tensors = {
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "values": values,
        "old_values": old_values,
        "returns": returns,
        "entropy": entropy,
    }
    checks.floating(logprobs=logprobs, **tensors)
    checks.dimensions("logprobs", logprobs, 2, "[B, T]")
    checks.like("logprobs", logprobs, mask=mask, **tensors)
    _check_values(values, old_values, returns, config)
    dtype = checks.compute_dtype(logprobs, *tensors.values())
    logprobs = logprobs.to(dtype)
    loss, stats, *_ = _ppo_loss(
        logprobs,
        old_logprobs.detach().to(dtype),
        advantages.detach().to(dtype),
        checks.as_mask(mask),
        None if values is None else values.to(dtype),
        None if old_values is None else old_values.detach().to(dtype),
        None if returns is None else returns.detach().to(dtype),
        None if entropy is None else entropy.to(dtype),
        checks.as_normalizer(normalizer, logprobs),
        config.clip_range,
        config.clip_range_high,
        config.dual_clip,
        config.value_clip_range,
        config.value_coef,
        config.entropy_coef,
        config.aggregation,
        backend,
    )
    return loss, PPOLossStats(*stats.detach().unbind())


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    config: PPOLossConfig = _DEFAULT,
    normalizer: float | Tensor | None = None,
    chunk_size: int | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, PPOLossStats]:
    """`ppo_loss` of the policy whose logits are hidden · weightᵀ + bias, chunk by chunk.

    The gradient is formed with the loss and the backward only scales it, as in
    `linear_cross_entropy`. The entropy bonus is part of the loss, and with values so is the value
    loss. Masked tokens take part in no matrix product.

    Args:
        hidden: [B, T, H]. weight: [V, H]. bias: [V] or None. targets: [B, T], the tokens.
        temperature, chunk_size, group: as in `linear_token_logprobs`.
        old_logprobs, advantages, mask, values, old_values, returns, config, normalizer: as in
            `ppo_loss`.
        backend: see `rlhf_kernels.backends`; where it has kernels for rows of logits only, the loss
            over the tokens, the small part, takes its own default.

    Returns:
        (loss, PPOLossStats), as `ppo_loss`, float32 (float64 for float64 hidden states);
        differentiable by hidden, weight, bias and values.

    Raises:
        As `linear_token_logprobs` and `ppo_loss`.
    """
    checks.dimensions("hidden", hidden, 3, "[B, T, H]")
    dtype = check_linear(hidden, weight, bias, targets, chunk_size, group)
    tensors = {
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "values": values,
        "old_values": old_values,
        "returns": returns,
    }
    checks.floating(**tensors)
    checks.like("targets", targets, mask=mask, **tensors)
    _check_values(values, old_values, returns, config)
    mask, wide = checks.as_mask(mask), wide_dtype(dtype)
    targets = torch.where(mask, checks.as_targets(targets), _IGNORED)
    needed = needs_gradients(hidden, weight, bias)
    if waits_for_loss_scale(dtype, needed):
        logprobs, entropy = linear_token_logprobs(
            *(hidden, weight, targets),
            bias=bias,
            temperature=temperature,
            return_entropy=True,
            ignore_index=_IGNORED,
            chunk_size=chunk_size,
            group=group,
            backend=backend,
        )
        return ppo_loss(
            *(logprobs, old_logprobs, advantages, mask),
            values=values,
            old_values=old_values,
            returns=returns,
            entropy=entropy,
            config=config,
            normalizer=normalizer,
            backend=loss_kernels(logprobs, backend).NAME,
        )
    number, per_row = checks.split_temperature(temperature, targets, wide)
    old_logprobs = old_logprobs.detach().to(wide)
    loss, stats, *_ = _linear_ppo_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        None if values is None else values.to(wide),
        targets.reshape(-1),
        old_logprobs,
        advantages.detach().to(wide),
        mask,
        None if old_values is None else old_values.detach().to(wide),
        None if returns is None else returns.detach().to(wide),
        number,
        per_row,
        _IGNORED,
        checks.as_normalizer(normalizer, old_logprobs),
        config.clip_range,
        config.clip_range_high,
        config.dual_clip,
        config.value_clip_range,
        config.value_coef,
        config.entropy_coef,
        config.aggregation,
        dtype,
        chunk_size,
        group_name(group),
        backend,
        needed,
    )
    return loss, PPOLossStats(*stats.detach().unbind())


def _check_values(
    values: Tensor | None, old_values: Tensor | None, returns: Tensor | None, config: PPOLossConfig
) -> None:
    if values is None:
        if returns is not None or old_values is not None:
            raise ValueError("returns or old_values were given without values; give values too")
        return
    if returns is None:
        raise ValueError("values were given without returns; the value loss needs both")
    if old_values is None and config.value_clip_range is not None:
        raise ValueError(
            "values were given without old_values; give them, or set value_clip_range=None"
        )
