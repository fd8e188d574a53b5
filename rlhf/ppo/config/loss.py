"""Settings of the loss and of the steps on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.engine import check_number
from rlhf.ppo.config.kl import KLConfig
from rlhf_kernels import PPOLossConfig


@dataclass
class LossConfig(KLConfig):
    """The clipped PPO loss, and which steps are taken on it.

    Attributes:
        clip_range: The policy's probability ratio is clipped to 1 - clip_range and 1 + clip_range.
        clip_range_high: Upper side of that range where it differs; null takes clip_range.
        dual_clip: Bound on the loss of bad actions, above 1 (arXiv 1912.09729); null for none.
        value_clip_range: How far a value may move from the old one; null for no clipping.
        value_coef: Weight of the value loss.
        entropy_coef: Weight of the entropy bonus.
        aggregation: What the loss is averaged over: token-mean (all tokens of a minibatch),
            seq-mean-token-mean or seq-mean-token-sum (first each response, then their mean).
        max_approx_kl: After a step whose minibatch lies further than this from the policy that
            sampled (approximate KL, mean over tokens, in nats), the rest of the update is left out;
            null for never.
        critic_warmup_updates: In so many updates at the beginning only the critic learns
            (arXiv 2503.01491).
    """

    clip_range: float = 0.2
    clip_range_high: float | None = None
    dual_clip: float | None = None
    value_clip_range: float | None = 0.2
    value_coef: float = 0.5
    entropy_coef: float = 0.01
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] = "token-mean"
    max_approx_kl: float | None = None
    critic_warmup_updates: int = 0

    def check_loss(self) -> None:
        """Raise ValueError, naming the field, for a setting that makes no sense."""
        check_number(self, "value_coef", at_least=0)
        check_number(self, "entropy_coef", at_least=0)
        check_number(self, "max_approx_kl", above=0, optional=True)
        check_number(self, "critic_warmup_updates", at_least=0, integer=True)
        self.loss_config(0.0)  # checks the clip ranges and the aggregation

    def loss_config(self, kl_coef: float) -> PPOLossConfig:
        """The part of the settings that ``rlhf_kernels.ppo_loss`` takes.

        Args:
            kl_coef: The KL penalty's weight at this point of the run, for a penalty in the loss.
        """
        in_loss = self.kl_placement == "loss"
        return PPOLossConfig(
            kl_loss_coef=kl_coef if in_loss else 0.0,
            kl_loss_estimator=self.kl_estimator if in_loss else "k3",
            clip_range=self.clip_range,
            clip_range_high=self.clip_range_high,
            dual_clip=self.dual_clip,
            value_clip_range=self.value_clip_range,
            value_coef=self.value_coef,
            entropy_coef=self.entropy_coef,
            aggregation=self.aggregation,
        )
