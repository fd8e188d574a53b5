"""The definitions in plain PyTorch, for any device: what every other backend must agree with.

Arithmetic is float32, or float64 where the input is float64 (then the outputs are too, which makes
this backend the oracle of the tests). Gradients are formed explicitly, not by autograd, so that
ties fall where `docs/kernels.md` says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.backends.reference_layers import (  # noqa: F401 (primitives of this backend)
    cached_attention,
    rms_norm_backward,
    rms_norm_forward,
    rotary,
    row_attention_backward,
    row_attention_forward,
    swiglu_backward,
    swiglu_forward,
)
from rlhf_kernels.packing import Packed, at_tokens, valid_tokens
from rlhf_kernels.ppo_types import GAEConfig, PPOLossConfig

NAME = "reference"
PRIMITIVES = frozenset(
    {
        "token_logprobs_forward",
        "token_logprobs_backward",
        "gae_forward",
        "rollout_forward",
        "moments",
        "whiten",
        "ppo_loss_forward",
        "row_attention_forward",
        "row_attention_backward",
        "cached_attention",
        "kl_penalty",
        "shaped_rewards",
        "masked_mean",
        "swiglu_forward",
        "swiglu_backward",
        "rms_norm_forward",
        "rms_norm_backward",
        "rotary",
    }
)


def availability() -> str | None:
    return None


def token_logprobs_forward(
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    need_entropy: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-probabilities [N], entropies [N] (or None), normalization [N, 2] of the rows of [N, V].

    The normalization is what the backward needs to find log-probabilities again: the largest logit,
    and the logarithm of the sum of exp((z - max)/τ). Their sum, the log-sum-exp, would lose digits
    where logits are large. A row whose target is `checks.ELSEWHERE` has log-probability 0.
    """
    checks.targets_in_range(targets, logits.shape[1], ignore_index)
    ignored, safe_targets = _split_targets(targets, logits.shape[1], ignore_index)
    maximum = _wide(logits).amax(dim=-1)
    shifted = _shifted(logits, maximum, temperature)
    exponentials = shifted.exp()
    normalizer = exponentials.sum(dim=-1)
    log_normalizer = normalizer.log()
    picked = shifted.gather(1, safe_targets[:, None]).squeeze(1)
    without_target = ignored | (targets == checks.ELSEWHERE)
    logprobs = torch.where(without_target, 0.0, picked - log_normalizer)
    entropy = None
    if need_entropy:
        # 0 · (−inf) counts as 0; a NaN probability stays NaN.
        weighted = torch.where(exponentials == 0, 0.0, exponentials * shifted)
        entropy = torch.where(ignored, 0.0, log_normalizer - weighted.sum(dim=-1) / normalizer)
    return logprobs, entropy, torch.stack([maximum, log_normalizer], dim=1)


def token_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    normalization: Tensor,
    entropy: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient [N, V] of the logits, in their dtype; `out` may be `logits` itself.

    Rows whose target is `checks.ELSEWHERE` have no column with the target's term.
    """
    ignored, safe_targets = _split_targets(targets, logits.shape[1], ignore_index)
    maximum, log_normalizer = normalization.unbind(dim=1)
    logp = _shifted(logits, maximum, temperature).sub_(log_normalizer[:, None])
    probabilities = logp.exp()
    upstream = grad_logprobs.to(logp.dtype)[:, None]
    grad = -upstream * probabilities
    if grad_entropy is not None:
        assert entropy is not None, "an entropy gradient needs the forward's entropy"
        spread = torch.where(probabilities == 0, 0.0, probabilities * (logp + entropy[:, None]))
        grad -= grad_entropy.to(logp.dtype)[:, None] * spread
    target_term = torch.where((targets == checks.ELSEWHERE)[:, None], 0.0, upstream)
    grad.scatter_add_(1, safe_targets[:, None], target_term)
    grad /= temperature[:, None] if isinstance(temperature, Tensor) else temperature
    grad = torch.where(ignored[:, None], 0.0, grad)
    return grad.to(logits.dtype) if out is None else out.copy_(grad)


def gae_forward(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap_values: Tensor | None,
    cu_seqlens: Tensor | None,
    config: GAEConfig,
    rates: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, [B, T] or packed [N], 0 at masked places.

    rates: [B, 3], gamma, lam and value_lam of each sequence, in place of those of `config`.
    """
    packed = Packed.of(cu_seqlens, mask)
    if packed is not None:
        rewards, values = packed.pad(rewards), packed.pad(values)
        both_padded = gae_forward(
            rewards, values, packed.pad(mask), bootstrap_values, None, config, rates
        )
        return packed.unpad(both_padded[0]), packed.unpad(both_padded[1])
    rewards = torch.where(mask, rewards, 0.0)
    values = torch.where(mask, values, 0.0)
    numbers = (config.gamma, config.lam, config.value_lam)
    gamma, lam, value_lam = numbers if rates is None else rates.unbind(dim=1)
    # Before the last valid token masked ones take their steps too, where the decay goes on.
    counted = mask if config.masked == "skip" else mask.flip(1).cumsum(1).flip(1) > 0
    both = torch.zeros(2, *values.shape, dtype=values.dtype, device=values.device)
    zero = values.new_zeros(values.shape[0])
    following = [zero, zero]
    next_value = zero if bootstrap_values is None else bootstrap_values
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        for i, decay in enumerate((gamma * lam, gamma * value_lam)):
            advantage = delta + decay * following[i]
            both[i, :, t] = torch.where(mask[:, t], advantage, 0.0)
            following[i] = torch.where(counted[:, t], advantage, following[i])
        next_value = torch.where(counted[:, t], values[:, t], next_value)
    return both[0], both[1] + values


def rollout_forward(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap_values: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    config: GAEConfig,
    rates: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Advantages, returns, rewards, KL, and the advantages' `moments`."""
    kl = torch.where(mask, kl_penalty(logprobs, ref_logprobs, kl_estimator), 0.0)
    rewards = shaped_rewards(scores, kl, mask, kl_coef, cu_seqlens)
    advantages, returns = gae_forward(
        rewards, values, mask, bootstrap_values, cu_seqlens, config, rates
    )
    return advantages, returns, rewards, kl, moments(advantages, mask)


def ppo_loss_forward(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    config: PPOLossConfig,
    normalizer: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Loss [], statistics [NUM_STATS] and the gradients of logprobs, values and entropy.

    All [B, T], or packed [N] with cu_seqlens.
    """
    zero = logprobs.new_zeros(())
    weights = aggregation_weights(mask, cu_seqlens, config.aggregation, normalizer, logprobs.dtype)
    count = mask.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0).sum() / count

    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    advantages = torch.where(mask, advantages, 0.0)
    policy, grad_policy, clipped, dual_clipped = _policy_terms(log_ratio, advantages, config)
    of_policy = weights
    if importance_weights is not None:
        of_policy = torch.where(mask, weights * importance_weights, 0.0)
    policy_loss = (of_policy * policy).sum()
    grad_logprobs = of_policy * grad_policy
    ratio = log_ratio.exp()
    ratio_max = torch.where(mask, ratio, 0.0).amax() if ratio.numel() else zero

    loss, value_loss, value_clip_fraction, explained = policy_loss, zero, zero, zero
    grad_values = grad_entropy = None
    if values is not None:
        assert returns is not None, "values need returns"
        values, returns = torch.where(mask, values, 0.0), torch.where(mask, returns, 0.0)
        value, slope, value_clipped = _value_terms(values, old_values, returns, mask, config)
        value_loss = (weights * value).sum()
        loss = loss + config.value_coef * value_loss
        grad_values = config.value_coef * weights * slope
        value_clip_fraction = mean(value_clipped.to(ratio.dtype))
        explained = _explained_variance(values, returns, mask, count)
    mean_entropy = zero
    if entropy is not None:
        entropy = torch.where(mask, entropy, 0.0)
        mean_entropy = mean(entropy)
        loss = loss - config.entropy_coef * (weights * entropy).sum()
        grad_entropy = -config.entropy_coef * weights
    ref_kl = zero
    if ref_logprobs is not None:
        r = torch.where(mask, logprobs - ref_logprobs, 0.0)
        kl = kl_penalty(r, zero, config.kl_loss_estimator)
        ref_kl = mean(kl)
        loss = loss + config.kl_loss_coef * (weights * kl).sum()
        grad_logprobs += config.kl_loss_coef * weights * _kl_slope(r, config.kl_loss_estimator)

    stats = torch.stack(
        [
            policy_loss,
            value_loss,
            mean_entropy,
            mean(-log_ratio),
            mean(log_ratio.expm1() - log_ratio),
            mean(clipped.to(ratio.dtype)),
            value_clip_fraction,
            mean(dual_clipped.to(ratio.dtype)),
            mean(ratio),
            ratio_max,
            explained,
            ref_kl,
        ]
    )
    return loss, stats, grad_logprobs, grad_values, grad_entropy


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """A KL estimate per token, elementwise."""
    r = logprobs - ref_logprobs
    if estimator == "k1":
        return r
    if estimator == "k2":
        return 0.5 * r * r
    if estimator == "k3":
        return torch.expm1(-r) + r
    return r.abs()


def shaped_rewards(
    scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    """−kl_coef · kl, plus the score at the last valid token of each sequence."""
    packed = Packed.of(cu_seqlens, mask)
    if packed is not None:
        return packed.unpad(shaped_rewards(scores, packed.pad(kl), packed.pad(mask), kl_coef))
    valid_from_here = mask.flip(-1).cumsum(-1).flip(-1)
    last = mask & (valid_from_here == 1)
    return -kl_coef * torch.where(mask, kl, 0.0) + torch.where(last, scores[:, None], 0.0)


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None) -> Tensor:
    """The mean over valid places; 0 where there are none."""
    return torch.where(mask, x, 0.0).sum(dim) / mask.sum(dim).clamp(min=1)


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """Number, mean, and sum of squared deviations [3] of the valid places, in float64.

    A float32 count would stop at 2^24. Deviations, rather than squares, keep small variances exact.
    (MPS has no float64.)
    """
    wide = x.dtype if x.device.type == "mps" else torch.float64
    count = mask.sum(dtype=wide)
    mean = torch.where(mask, x, 0.0).sum(dtype=wide) / count.clamp(min=1)
    deviations = torch.where(mask, x.to(wide) - mean, 0.0)
    return torch.stack([count, mean, deviations.square().sum()])


def whiten(x: Tensor, mask: Tensor, total: Tensor, shift_mean: bool, eps: float) -> Tensor:
    """(x − mean)/sqrt(var + eps) by the moments of all ranks."""
    mean, variance = mean_and_variance(total)
    # In the moments' type: the mean rounded to float32 may be a deviation away.
    centred = torch.where(mask, x.to(total.dtype) - mean, 0.0)
    whitened = centred / (variance + eps).sqrt()
    if not shift_mean:
        whitened = whitened + mean
    # Masked again: moments that are not finite would reach masked places, too.
    return torch.where(mask, whitened, 0.0).to(x.dtype)


def mean_and_variance(total: Tensor) -> tuple[Tensor, Tensor]:
    """Of `moments`; 0 without valid places. The variance is that of the population."""
    count, mean, squares = total.unbind()
    return mean, squares / count.clamp(min=1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _shifted(logits: Tensor, maximum: Tensor, temperature: float | Tensor) -> Tensor:
    """A new tensor of (logits - maximum) / temperature, which keeps the digits of large logits."""
    shifted = _wide(logits) - maximum[:, None]
    return shifted.div_(temperature[:, None] if isinstance(temperature, Tensor) else temperature)


def _split_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Which rows are ignored, and targets that can be gathered in every row."""
    ignored = targets == ignore_index
    return ignored, torch.where(ignored, 0, targets).clamp(0, vocabulary - 1)


def aggregation_weights(
    mask: Tensor,
    cu_seqlens: Tensor | None,
    aggregation: str,
    normalizer: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """What each token's loss is multiplied by before the sum; 0 at masked places."""
    if normalizer is None:
        by_token = aggregation == "token-mean"
        valid = mask.sum() if by_token else (valid_tokens(mask, cu_seqlens) > 0).sum()
        normalizer = valid.clamp(min=1)
    weights = mask.to(dtype)
    if aggregation == "seq-mean-token-mean":
        lengths = valid_tokens(mask, cu_seqlens).clamp(min=1)
        weights = weights / at_tokens(lengths, mask, cu_seqlens)
    # `where`, since a normalizer of 0 may stand beside a mask without valid tokens.
    return torch.where(mask, weights / normalizer.to(dtype).reshape(()), 0.0)


def _policy_terms(
    log_ratio: Tensor, advantages: Tensor, config: PPOLossConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per token: policy loss, its gradient by the log-probability, clipped, dual-clipped."""
    high = config.clip_range if config.clip_range_high is None else config.clip_range_high
    ratio = log_ratio.exp()
    surrogate = ratio * advantages
    bounded = ratio.clamp(1.0 - config.clip_range, 1.0 + high) * advantages
    clipped = bounded < surrogate
    policy = -torch.where(clipped, bounded, surrogate)
    grad = torch.where(clipped, 0.0, -surrogate)
    dual_clipped = torch.zeros_like(clipped)
    if config.dual_clip is not None:
        ceiling = -config.dual_clip * advantages
        dual_clipped = (advantages < 0) & (ceiling < policy)
        policy = torch.where(dual_clipped, ceiling, policy)
        grad = torch.where(dual_clipped, 0.0, grad)
    return policy, grad, clipped, dual_clipped


def _kl_slope(r: Tensor, estimator: str) -> Tensor:
    """The derivative of `kl_penalty` by the log-probability."""
    if estimator == "k1":
        return torch.ones_like(r)
    return r if estimator == "k2" else -torch.expm1(-r)


def _value_terms(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,
    config: PPOLossConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per token: value loss, its gradient by the value, clipped."""
    error = values - returns
    if config.value_clip_range is None:
        return 0.5 * error.square(), error, torch.zeros_like(mask)
    assert old_values is not None, "a value clip range needs old values"
    old_values = torch.where(mask, old_values, 0.0)
    step = values - old_values
    bounded_error = old_values + step.clamp(-config.value_clip_range, config.value_clip_range)
    bounded_error = bounded_error - returns
    # Inside the range both errors are one; rounding in old + step must not make it a tie-break.
    # Negated, so that a NaN (the old value's too) chooses the bounded error, which is NaN then.
    outside = ~(step.abs() <= config.value_clip_range)
    clipped = outside & ~(bounded_error.square() <= error.square())
    value = 0.5 * torch.where(clipped, bounded_error, error).square()
    return value, torch.where(clipped, 0.0 * bounded_error, error), clipped


def _explained_variance(values: Tensor, returns: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    if returns.numel() == 0:
        return returns.new_zeros(())
    # Relative to one of them, so that equal returns have no variance at all, not a rounded one.
    pivot = returns.reshape(-1)[mask.reshape(-1).byte().argmax()]
    returns, values = returns - pivot, values - pivot

    def variance(x: Tensor) -> Tensor:
        centred = torch.where(mask, x - torch.where(mask, x, 0.0).sum() / count, 0.0)
        return centred.square().sum() / count

    total = variance(returns)
    return torch.where(total == 0, 0.0, 1.0 - variance(returns - values) / total)
