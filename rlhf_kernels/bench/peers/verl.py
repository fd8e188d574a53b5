"""verl's functions of PPO, as its trainer and its workers call them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import PPOLossConfig
from rlhf_kernels.bench.peers import Offer

DISTRIBUTION = "verl"
DEVICES = frozenset({"cpu", "cuda"})
OPERATIONS = frozenset({"gae", "rollout_advantages", "ppo_loss"})


def offers() -> dict[str, list[Offer]]:
    from verl.trainer.ppo import core_algos
    from verl.workers.config import ActorConfig

    @functools.cache
    def settings(clip: float) -> Any:
        return ActorConfig(
            strategy="fsdp",
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=1,
            clip_ratio=clip,
            clip_ratio_low=clip,
            clip_ratio_high=clip,
        )

    # Its advantages come whitened, so `gae` does more there than here.
    def gae(rewards: Tensor, values: Tensor, mask: Tensor) -> Any:
        whole = mask.to(rewards.dtype)
        return core_algos.compute_gae_advantage_return(rewards, values, whole, 1.0, 0.95)

    def rollout(
        scores: Tensor,
        logprobs: Tensor,
        ref_logprobs: Tensor,
        values: Tensor,
        mask: Tensor,
        kl_coef: float,
    ) -> Any:
        whole = mask.to(values.dtype)
        kl = core_algos.kl_penalty(logprobs, ref_logprobs, kl_penalty="kl") * whole
        last = whole.sum(1, keepdim=True).long() - 1
        rewards = (-kl_coef * kl).scatter_add_(1, last, scores[:, None])
        return core_algos.compute_gae_advantage_return(rewards, values * whole, whole, 1.0, 0.95)

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
    ) -> Tensor:
        policy, _ = core_algos.compute_policy_loss_vanilla(
            old_logprobs, logprobs, advantages, mask, config=settings(config.clip_range)
        )
        value, _ = core_algos.compute_value_loss(
            values, returns, old_values, mask, cliprange_value=config.value_clip_range
        )
        bonus = core_algos.agg_loss(entropy, mask, "token-mean")
        return policy + config.value_coef * value - config.entropy_coef * bonus

    return {
        "gae": [Offer("verl gae, whitened", torch.no_grad()(gae), comparable=False)],
        # It leaves numbers at masked places.
        "rollout_advantages": [Offer("verl", torch.no_grad()(rollout), comparable=False)],
        "ppo_loss": [Offer("verl", ppo_loss)],
    }
