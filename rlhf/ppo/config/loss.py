"""Settings of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.engine import check_number
from rlhf_kernels import PPOLossConfig


@dataclass
class LossConfig:
    """The clipped PPO loss.

    Attributes:
        clip_range: The policy's probability ratio is clipped to 1 - clip_range and 1 + clip_range.
        clip_range_high: Upper side of that range where it differs; null takes clip_range.
        dual_clip: Bound on the loss of bad actions, above 1 (arXiv 1912.09729); null for none.
        value_clip_range: How far a value may move from the old one; null for no clipping.
        value_coef: Weight of the value loss.
        entropy_coef: Weight of the entropy bonus.
        aggregation: What the loss is averaged over: token-mean (all tokens of a minibatch),
            seq-mean-token-mean or seq-mean-token-sum (first each response, then their mean).
    """

    clip_range: float = 0.2
    clip_range_high: float | None = None
    dual_clip: float | None = None
    value_clip_range: float | None = 0.2
    value_coef: float = 0.5
    entropy_coef: float = 0.01
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] = "token-mean"

    def check_loss(self) -> None:
        """Raise ValueError, naming the field, for a setting that makes no sense."""
        check_number(self, "value_coef", at_least=0)
        check_number(self, "entropy_coef", at_least=0)
        self.loss_config()  # checks the clip ranges and the aggregation

    def loss_config(self) -> PPOLossConfig:
        """The part of the settings that ``rlhf_kernels.ppo_loss`` takes."""
        return PPOLossConfig(
            clip_range=self.clip_range,
            clip_range_high=self.clip_range_high,
            dual_clip=self.dual_clip,
            value_clip_range=self.value_clip_range,
            value_coef=self.value_coef,
            entropy_coef=self.entropy_coef,
            aggregation=self.aggregation,
        )
