"""OpenRLHF's losses."""

from __future__ import annotations

from torch import Tensor

from rlhf_kernels import PPOLossConfig
from rlhf_kernels.bench.peers import Offer

DISTRIBUTION = "openrlhf"
DEVICES = frozenset({"cpu", "cuda"})
OPERATIONS = frozenset({"ppo_loss"})


def offers() -> dict[str, list[Offer]]:
    from openrlhf.models.loss import PolicyLoss, ValueLoss

    losses: dict[PPOLossConfig, tuple[PolicyLoss, ValueLoss]] = {}

    # Without an entropy bonus: less work than ours.
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
        if config not in losses:
            clip = config.clip_range
            policy = PolicyLoss(clip_eps_low=clip, clip_eps_high=clip)
            losses[config] = policy, ValueLoss(config.value_clip_range)
        policy, value = losses[config]
        policy_loss = policy(logprobs, old_logprobs, advantages, action_mask=mask)[0]
        return policy_loss + config.value_coef * value(
            values, old_values, returns, action_mask=mask
        )

    return {"ppo_loss": [Offer("openrlhf, no entropy", ppo_loss, comparable=False)]}
