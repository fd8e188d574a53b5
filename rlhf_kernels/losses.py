"""The clipped PPO loss, from log-probabilities or from hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.linear import linear_token_logprobs
from rlhf_kernels.ops.ppo_loss import ppo_loss as _ppo_loss
from rlhf_kernels.ppo_types import PPOLossConfig, PPOLossStats

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
    temperature: float | Tensor = 1.0,
    config: PPOLossConfig = _DEFAULT,
    normalizer: float | Tensor | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, PPOLossStats]:
    """`ppo_loss` of the policy whose logits are hidden · weightᵀ + bias, chunk by chunk.

    The entropy bonus is part of it; for the value loss call `ppo_loss` on the critic's side or add
    the two. Masked tokens take part in no matrix product.

    Args:
        hidden: [B, T, H]. weight: [V, H]. bias: [V] or None. targets: [B, T], the tokens.
        temperature, chunk_size: as in `linear_token_logprobs`.
        old_logprobs, advantages, mask, config, normalizer, backend: as in `ppo_loss`.

    Returns:
        (loss, PPOLossStats), as `ppo_loss`; differentiable by hidden, weight and bias.

    Raises:
        As `linear_token_logprobs` and `ppo_loss`.
    """
    checks.dimensions("hidden", hidden, 3, "[B, T, H]")
    checks.shape("targets", targets, hidden.shape[:-1], "the shape of hidden without the last")
    checks.like("targets", targets, mask=mask, old_logprobs=old_logprobs, advantages=advantages)
    mask = checks.as_mask(mask)
    logprobs, entropy = linear_token_logprobs(
        hidden,
        weight,
        torch.where(mask, checks.as_targets(targets), _IGNORED),
        bias=bias,
        temperature=temperature,
        return_entropy=True,
        ignore_index=_IGNORED,
        chunk_size=chunk_size,
        backend=backend,
    )
    return ppo_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        # Without a bonus the entropy is a statistic alone, and its backward is saved.
        entropy=entropy if config.entropy_coef else entropy.detach(),
        config=config,
        normalizer=normalizer,
        backend=backend,
    )


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
