"""The clipped PPO loss, from log-probabilities or from hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    config: PPOLossConfig = _DEFAULT,
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, PPOLossStats]:
    """The clipped PPO loss (Schulman et al. 2017, arXiv 1707.06347).

    loss = agg(policy) + value_coef · agg(value) - entropy_coef · agg(entropy)
    + kl_loss_coef · agg(KL to the reference); see `docs/kernels.md`. Differentiable by logprobs,
    values and entropy; the gradient stops at the others.

    Args:
        logprobs, old_logprobs, advantages: [B, T], floating-point; [N] with cu_seqlens.
        mask: their shape, bool (or integers, 0 is masked): the valid tokens.
        values, returns: their shape; with them the value loss takes part. old_values: needed with
            values unless config.value_clip_range is None.
        entropy: their shape; with it the entropy bonus takes part.
        ref_logprobs: their shape, the reference policy's; with them its KL divergence takes part.
        importance_weights: their shape; each token's policy loss is multiplied by its own, as where
            another engine sampled the tokens (truncated importance sampling).
        cu_seqlens: [B + 1], int32 or int64: sequence b stands from cu_seqlens[b] to
            cu_seqlens[b + 1] in tensors [N], without padding.
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
    constants = {
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "old_values": old_values,
        "returns": returns,
        "ref_logprobs": ref_logprobs,
        "importance_weights": importance_weights,
    }
    tensors = {**constants, "values": values, "entropy": entropy}
    checks.floating(logprobs=logprobs, **tensors)
    cu_seqlens, _ = checks.sequences("logprobs", logprobs, cu_seqlens)
    checks.like("logprobs", logprobs, mask=mask, **tensors)
    _check_values(values, old_values, returns, config)
    dtype = checks.compute_dtype(logprobs, *tensors.values())
    logprobs = logprobs.to(dtype)
    fixed = {name: _constant(tensor, dtype) for name, tensor in constants.items()}
    loss, stats, *_ = _ppo_loss(
        logprobs,
        None if values is None else values.to(dtype),
        None if entropy is None else entropy.to(dtype),
        fixed["old_logprobs"],
        fixed["advantages"],
        checks.as_mask(mask),
        fixed["old_values"],
        fixed["returns"],
        fixed["ref_logprobs"],
        fixed["importance_weights"],
        cu_seqlens,
        checks.as_normalizer(normalizer, logprobs),
        *config.arguments(),
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
    ref_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
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
        hidden: [B, T, H]; [N, H] with cu_seqlens. weight: [V, H]. bias: [V] or None.
        targets: [B, T] or [N], the tokens.
        temperature, chunk_size, group: as in `linear_token_logprobs`.
        old_logprobs, advantages, mask, values, old_values, returns, ref_logprobs,
            importance_weights, cu_seqlens, config, normalizer: as in `ppo_loss`.
        backend: see `rlhf_kernels.backends`; where it has kernels for rows of logits only, the loss
            over the tokens, the small part, takes its own default.

    Returns:
        (loss, PPOLossStats), as `ppo_loss`, float32 (float64 for float64 hidden states);
        differentiable by hidden, weight, bias and values.

    Raises:
        As `linear_token_logprobs` and `ppo_loss`.
    """
    if cu_seqlens is None:
        checks.dimensions("hidden", hidden, 3, "[B, T, H] (or [N, H] with cu_seqlens)")
    else:
        checks.dimensions("hidden", hidden, 2, "[N, H], as cu_seqlens is given")
    dtype = check_linear(hidden, weight, bias, targets, chunk_size, group)
    cu_seqlens, _ = checks.sequences("targets", targets, cu_seqlens)
    constants = {
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "old_values": old_values,
        "returns": returns,
        "ref_logprobs": ref_logprobs,
        "importance_weights": importance_weights,
    }
    checks.floating(values=values, **constants)
    checks.like("targets", targets, mask=mask, values=values, **constants)
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
            ref_logprobs=ref_logprobs,
            importance_weights=importance_weights,
            cu_seqlens=cu_seqlens,
            config=config,
            normalizer=normalizer,
            backend=loss_kernels(logprobs, backend).NAME,
        )
    number, per_row = checks.split_temperature(temperature, targets, wide)
    fixed = {name: _constant(tensor, wide) for name, tensor in constants.items()}
    loss, stats, *_ = _linear_ppo_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        None if values is None else values.to(wide),
        targets.reshape(-1),
        fixed["old_logprobs"],
        fixed["advantages"],
        mask,
        fixed["old_values"],
        fixed["returns"],
        fixed["ref_logprobs"],
        fixed["importance_weights"],
        cu_seqlens,
        number,
        per_row,
        _IGNORED,
        checks.as_normalizer(normalizer, fixed["old_logprobs"]),
        *config.arguments(),
        dtype,
        chunk_size,
        group_name(group),
        backend,
        needed,
    )
    return loss, PPOLossStats(*stats.detach().unbind())


def _constant(tensor: Tensor | None, dtype: torch.dtype) -> Any:
    """What no gradient flows to."""
    return None if tensor is None else tensor.detach().to(dtype)


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
