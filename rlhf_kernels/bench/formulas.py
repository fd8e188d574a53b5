"""The formulas as one writes them in PyTorch: what the kernels are compared with.

Logits in a narrow type are made float32 first, as training code does for the sake of the sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels import PPOLossConfig


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """gather - logsumexp."""
    logits = logits.float()
    picked = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return picked - torch.logsumexp(logits, dim=-1)


def token_logprobs_and_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """From one log_softmax."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


def linear_token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return token_logprobs(F.linear(hidden, weight), targets)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: PPOLossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped policy loss with its entropy bonus, [B, T, H] hidden states."""
    logprobs, entropy = token_logprobs_and_entropy(F.linear(hidden, weight), targets)
    return policy_loss(logprobs, entropy, old_logprobs, advantages, mask, config)


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: PPOLossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The part of `ppo_loss` that needs no values."""
    count = mask.sum()

    def mean(x: Tensor) -> Tensor:
        return (x * mask).sum() / count

    log_ratio = (logprobs - old_logprobs) * mask
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
    loss = mean(torch.maximum(plain, bounded))
    mean_entropy = mean(entropy)
    with torch.no_grad():
        stats = {
            "policy_loss": loss,
            "entropy": mean_entropy,
            "approx_kl_k1": mean(-log_ratio),
            "approx_kl_k3": mean(ratio - 1 - log_ratio),
            "clip_fraction": mean((bounded > plain).float()),
            "ratio_mean": mean(ratio),
            "ratio_max": (ratio * mask).max(),
        }
    return loss - config.entropy_coef * mean_entropy, stats


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """The loop over time of most RLHF code bases; padding on the right."""
    rewards, values = rewards * mask, values * mask
    last = torch.zeros_like(values[:, 0])
    reversed_advantages = []
    steps = values.shape[1]
    for t in reversed(range(steps)):
        next_values = values[:, t + 1] if t < steps - 1 else 0.0
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        last = delta + gamma * lam * last
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages, advantages + values


def rollout_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One operation after the other, as TRL 1.12's PPO has them: advantages (whitened by the
    unbiased variance), returns, rewards, KL."""
    kl = torch.where(mask, logprobs - ref_logprobs, 0.0)
    rewards = -kl_coef * kl
    last = mask.sum(dim=1) - 1
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    advantages, returns = gae(rewards, values, mask, 1.0, 0.95)
    count = mask.sum()
    mean = (advantages * mask).sum() / count
    centred = advantages - mean
    variance = (centred.square() * mask).sum() / count * (count / (count - 1))
    whitened = (centred * torch.rsqrt(variance + 1e-8)).masked_fill(~mask, 0.0)
    return whitened, returns, rewards, kl


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    entropy: Tensor,
    config: PPOLossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped loss and the same statistics as `rlhf_kernels.ppo_loss` gives."""
    assert config.value_clip_range is not None
    policy, stats = policy_loss(logprobs, entropy, old_logprobs, advantages, mask, config)
    count = mask.sum()

    def mean(x: Tensor) -> Tensor:
        return (x * mask).sum() / count

    step = (values - old_values).clamp(-config.value_clip_range, config.value_clip_range)
    plain = (values - returns).square()
    bounded = (old_values + step - returns).square()
    value_loss = 0.5 * mean(torch.maximum(plain, bounded))
    with torch.no_grad():
        error = returns - values
        spread = mean((returns - mean(returns)).square())
        stats["value_loss"] = value_loss
        stats["value_clip_fraction"] = mean((bounded > plain).float())
        stats["explained_variance"] = 1 - mean((error - mean(error)).square()) / spread
    return policy + config.value_coef * value_loss, stats


def ppo_loss_only(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    entropy: Tensor,
    config: PPOLossConfig,
) -> Tensor:
    """The same loss without any statistics."""
    assert config.value_clip_range is not None
    count = mask.sum()
    ratio = ((logprobs - old_logprobs) * mask).exp()
    bounded = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
    policy = torch.maximum(-advantages * ratio, -advantages * bounded)
    step = (values - old_values).clamp(-config.value_clip_range, config.value_clip_range)
    value = torch.maximum((values - returns).square(), (old_values + step - returns).square())
    per_token = policy + 0.5 * config.value_coef * value - config.entropy_coef * entropy
    return (per_token * mask).sum() / count
