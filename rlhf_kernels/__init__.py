"""Kernels for reinforcement learning from human feedback: see `docs/kernels.md`.

`python -m rlhf_kernels.info` prints which backends this machine has.
"""

from rlhf_kernels.advantages import RolloutAdvantages, gae, rollout_advantages
from rlhf_kernels.backends import BackendUnavailableError, UnsupportedOperationError
from rlhf_kernels.linear import linear_cross_entropy, linear_token_logprobs
from rlhf_kernels.logprobs import token_logprobs
from rlhf_kernels.losses import PPOLossConfig, PPOLossStats, linear_ppo_loss, ppo_loss
from rlhf_kernels.rewards import kl_penalty, shaped_rewards
from rlhf_kernels.statistics import masked_mean, masked_whiten

__all__ = [
    "BackendUnavailableError",
    "PPOLossConfig",
    "PPOLossStats",
    "RolloutAdvantages",
    "UnsupportedOperationError",
    "gae",
    "kl_penalty",
    "linear_cross_entropy",
    "linear_ppo_loss",
    "linear_token_logprobs",
    "masked_mean",
    "masked_whiten",
    "ppo_loss",
    "rollout_advantages",
    "shaped_rewards",
    "token_logprobs",
]
