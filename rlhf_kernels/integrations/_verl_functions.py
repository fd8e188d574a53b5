"""The functions that `rlhf_kernels.integrations.verl` describes and offers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels
from rlhf_kernels import PPOLossConfig, checks
from rlhf_kernels.integrations._common import entropy, or_nan, promoted
from rlhf_kernels.ops.whiten import moments
from rlhf_kernels.ops.whitened_gae import whiten_everywhere, whitened_gae

_EPS = 1e-8  # added to variances and to counts
_LOG_RATIO_BOUND = 20.0
_K3_BOUND = 10.0
_ESTIMATORS = {
    "kl": "k1",
    "k1": "k1",
    "abs": "abs",
    "mse": "k2",
    "k2": "k2",
    "low_var_kl": "k3",
    "k3": "k3",
}


# --- verl.utils.torch_functional ---


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probabilities [...] of labels [...] under logits [..., V], differentiable.

    They have the logits' dtype; float32 where verl runs on flash-attn, as there. The logits are
    never overwritten, whatever `inplace_backward` says.
    """
    logprobs = rlhf_kernels.token_logprobs(logits, labels)
    return logprobs if _on_flash_attention() else logprobs.to(logits.dtype)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropies [...] of softmax(logits [..., V]), of the logits' dtype, differentiable."""
    return entropy(logits).to(logits.dtype)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """Entropies [N] of softmax(logits [N, V]), float32, differentiable.

    Nothing of the logits' size is made, so there are no chunks.
    """
    return entropy(logits).float()


def masked_mean(values: Tensor, mask: Tensor, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """The mean over the mask, of everything or along `axis`; 0 where it is empty."""
    return _masked_sum(values, mask, axis) / (mask.sum(dim=axis) + _EPS)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(values - mean)/√(var + 1e-8), of the values' shape and dtype, differentiable.

    Mean and variance (over n - 1) are those of the places in the mask; the others are shifted and
    scaled like them.

    Raises:
        ValueError: fewer than two places in the mask.
    """
    mask = mask.bool()
    if torch.is_grad_enabled() and values.requires_grad:
        return _whiten_with_gradient(values, mask, shift_mean)
    wide = values.detach().to(checks.compute_dtype(values))
    total = moments(wide, mask, None)
    _check_count(int(total[0]))
    return whiten_everywhere(wide, total, shift_mean, _EPS).to(values.dtype)


# --- verl.trainer.ppo.core_algos ---


@torch.no_grad()
def compute_gae_advantage_return(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Whitened advantages and returns [B, T]; masked tokens, a tool's output, are no steps.

    A masked place has the advantage of the next valid one, or 0 behind the last, and that plus the
    value as return, before all of it is whitened.

    Raises:
        ValueError: fewer than two valid tokens, or gamma or lam outside of [0, 1].
    """
    dtype = promoted(token_level_rewards, values, response_mask)
    wide = checks.compute_dtype(token_level_rewards, values)
    advantages, returns, count = whitened_gae(
        *(token_level_rewards.to(wide), values.to(wide), response_mask),
        *(float(gamma), float(lam), _EPS),
    )
    _check_count(count)
    return advantages.to(dtype), returns.to(dtype)


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    """One number of losses [B, T] and their mask [B, T], differentiable; NaN for an empty mask.

    Raises:
        ValueError: an unknown mode; dp_size above 1 without the whole batch's count.
    """
    aggregation, divisor = _divisor(
        *(loss_mask, loss_agg_mode, dp_size, batch_num_tokens),
        *(global_batch_size, loss_scale_factor),
    )
    if aggregation == "token-mean":
        total = _masked_sum(loss_mat, loss_mask, None)
        return (total / divisor).to(total.dtype)  # a count by dp_size is a float32
    per_sequence = _masked_sum(loss_mat, loss_mask, -1)
    if aggregation == "seq-mean-token-mean":
        per_sequence = per_sequence / (loss_mask.sum(dim=-1) + _EPS)
    return per_sequence.sum(dtype=_loss_dtype(loss_agg_mode, per_sequence)) / divisor


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The clipped loss with dual clip, differentiable by log_prob, and verl's metrics of it.

    Args:
        old_log_prob, log_prob, advantages, response_mask: [B, T].
        config: verl's ActorConfig: clip ranges, `clip_ratio_c`, `global_batch_info`.
        rollout_is_weights: [B, T], which multiply each token's loss; None: 1.
    """
    assert config is not None, "compute_policy_loss_vanilla needs the actor's config"
    low, high, dual_clip = _clip_ratios(config)
    aggregation, divisor = _divisor(response_mask, loss_agg_mode, **config.global_batch_info)
    # Bounded before the kernel, which bounds nothing: an advantage of 0 beside an overflowing ratio
    # is 0, and the metrics see the bounded one.
    log_ratio = _bounded_log_ratio(log_prob, old_log_prob)
    loss, stats = rlhf_kernels.ppo_loss(
        log_ratio,
        log_ratio.new_zeros(()).expand_as(log_ratio),
        advantages,
        response_mask.bool(),
        importance_weights=rollout_is_weights,
        config=PPOLossConfig(
            clip_range=low, clip_range_high=high, dual_clip=dual_clip, aggregation=aggregation
        ),
        normalizer=divisor,
    )
    names = ("clip_fraction", "approx_kl_k1", "dual_clip_fraction")
    clipped, kl, dual_clipped = torch.stack([getattr(stats, name) for name in names]).tolist()
    series = log_prob, old_log_prob, advantages, rollout_is_weights, response_mask
    dtype = _loss_dtype(loss_agg_mode, *series)
    return or_nan(loss, divisor).to(dtype), {
        "actor/pg_clipfrac": clipped,
        "actor/ppo_kl": kl,
        "actor/pg_clipfrac_lower": dual_clipped,
    }


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Half the clipped squared error, differentiable by vpreds, and the fraction clipped.

    Args:
        vpreds, returns, values, response_mask: [B, T]; values are the old ones.
        cliprange_value: how far vpreds may be from values.
        the others: as in `agg_loss`.
    """
    aggregation, divisor = _divisor(
        *(response_mask, loss_agg_mode, dp_size, batch_num_tokens),
        *(global_batch_size, loss_scale_factor),
    )
    zeros = vpreds.new_zeros(()).expand_as(vpreds)  # the policy's part of the kernel's loss
    loss, stats = rlhf_kernels.ppo_loss(
        *(zeros, zeros, zeros, response_mask.bool()),
        values=vpreds,
        old_values=values,
        returns=returns,
        config=PPOLossConfig(
            value_clip_range=cliprange_value, value_coef=1.0, aggregation=aggregation
        ),
        normalizer=divisor,
    )
    dtype = _loss_dtype(loss_agg_mode, vpreds, returns, values, response_mask)
    return or_nan(loss, divisor).to(dtype), stats.value_clip_fraction.float()


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """An estimate of the KL divergence per token, of the inputs' shape, differentiable by both.

    Args:
        logprob, ref_logprob: the same shape.
        kl_penalty: "kl" or "k1", "abs", "mse" or "k2", "low_var_kl" or "k3" (bounded to 10); with
            a "+" the gradient is that of "k2".

    Raises:
        NotImplementedError: another estimator.
    """
    name = kl_penalty.removesuffix("+")
    if name not in _ESTIMATORS:
        raise NotImplementedError(f"kl_penalty is {kl_penalty!r}")
    dtype = promoted(logprob, ref_logprob)
    estimator = _ESTIMATORS[name]
    if not kl_penalty.endswith("+") or estimator == "k2":
        return _estimate(logprob, ref_logprob, estimator).to(dtype)
    with torch.no_grad():
        value = _estimate(logprob, ref_logprob, estimator)
    through = _estimate(logprob, ref_logprob, "k2")
    return (through - through.detach() + value).to(dtype)


# --- what they share ---


def _loss_dtype(mode: str, *tensors: Tensor | None) -> torch.dtype:
    """verl's modes over sequences multiply by a float32 mask of the sequences."""
    dtype = promoted(*tensors)
    return dtype if mode.startswith("token-") else torch.promote_types(dtype, torch.float32)


def _on_flash_attention() -> bool:
    """Whether verl's own log-probabilities would come from flash-attn's kernel."""
    module = sys.modules.get("verl.utils.torch_functional")
    found = getattr(module, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", False)
    return found and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"


def _masked_sum(values: Tensor, mask: Tensor, axis: int | tuple[int, ...] | None) -> Tensor:
    valid = torch.where(mask.bool(), values, 0.0)
    return (valid if mask.dtype == torch.bool else valid * mask).sum(dim=axis)


def _check_count(count: int) -> None:
    if count < 2:
        raise ValueError(f"the mask has {count} valid places; whitening needs at least two")


def _whiten_with_gradient(values: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
    """The same in PyTorch, since our kernel takes what was sampled as constant."""
    count = mask.sum()
    _check_count(int(count))
    wide = values.to(checks.compute_dtype(values))
    mean = torch.where(mask, wide, 0.0).sum() / count
    variance = torch.where(mask, wide - mean, 0.0).square().sum() / (count - 1)
    whitened = (wide - mean) * torch.rsqrt(variance + _EPS)
    return (whitened if shift_mean else whitened + mean).to(values.dtype)


def _divisor(
    mask: Tensor,
    mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | Tensor | None = None,
    global_batch_size: int | Tensor | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[str, float | Tensor]:
    """Our aggregation, and by what to divide its sum, for one of verl's modes."""
    if mode == "token-sum":
        return "token-mean", 1 / dp_size
    if mode == "token-mean":
        tokens = _count(mask.sum, batch_num_tokens, "batch_num_tokens", mask, dp_size)
        return "token-mean", tokens / dp_size
    if mode not in ("seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"):
        raise ValueError(f"loss_agg_mode is {mode!r}, which verl does not have")

    def own() -> Tensor:
        return (mask.sum(dim=-1) > 0).sum()

    sequences = _count(own, global_batch_size, "global_batch_size", mask, dp_size)
    if mode != "seq-mean-token-sum-norm":
        return mode, sequences / dp_size
    scale = mask.shape[-1] if loss_scale_factor is None else loss_scale_factor
    return "seq-mean-token-sum", sequences * scale / dp_size


def _count(
    own: Callable[[], Tensor], given: float | Tensor | None, name: str, mask: Tensor, dp_size: int
) -> float | Tensor:
    """The whole batch's count where it is given, else the micro-batch's own."""
    if isinstance(given, Tensor):
        return given.to(mask.device)  # it may be on the CPU beside a mask on a GPU
    if given is not None:
        return given
    if dp_size > 1:
        raise ValueError(f"dp_size is {dp_size}, which needs {name} of the whole batch")
    return own()


def _clip_ratios(config: Any) -> tuple[float, float, float]:
    """Below, above, and the dual clip's."""
    both = config.clip_ratio
    low = both if config.clip_ratio_low is None else config.clip_ratio_low
    high = both if config.clip_ratio_high is None else config.clip_ratio_high
    dual_clip = config.get("clip_ratio_c", 3.0)
    assert dual_clip > 1.0, f"clip_ratio_c is {dual_clip}; it must be above 1"
    return low, high, dual_clip


def _bounded_log_ratio(logprob: Tensor, other: Tensor) -> Tensor:
    wide = checks.compute_dtype(logprob, other)
    return (logprob.to(wide) - other.to(wide)).clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)


def _estimate(logprob: Tensor, ref_logprob: Tensor, estimator: str) -> Tensor:
    if estimator != "k3":
        return rlhf_kernels.kl_penalty(logprob, ref_logprob, estimator=estimator)
    # Bounded first: what overflows has the gradient 0, not 0 · ∞.
    log_ratio = _bounded_log_ratio(logprob, ref_logprob)
    zeros = log_ratio.new_zeros(()).expand_as(log_ratio)
    k3 = rlhf_kernels.kl_penalty(log_ratio, zeros, estimator="k3")
    return k3.clamp(-_K3_BOUND, _K3_BOUND)
