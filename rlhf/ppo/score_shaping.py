"""From what the reward returned to the score that is trained on.

In this order, each step on the scale that the one before it left:

1. Normalisation (``score_normalization``), so that the settings below, ``kl_coef`` and the critic's
   learning rate mean the same whatever unit the reward speaks.
2. Clipping (``score_clip``), which then bounds outliers in standard deviations (Zheng et al. 2023,
   arXiv 2307.04964).
3. Responses without EOS: ``missing_eos_score`` takes their score's place, or
   ``missing_eos_penalty`` is subtracted. After the two above, so that its size is certain: a
   fixed -1 lies one deviation below the mean (Huang et al. 2024, arXiv 2403.17031), and no clipping
   can take it back.
4. ``length_penalty`` for each token (Singhal et al. 2023, arXiv 2310.03716, on rewards that grow
   with length). Last, so that it holds for replaced scores too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf.ppo.estimators import EPS

if TYPE_CHECKING:
    from rlhf.ppo.config import PPOConfig


@dataclass(frozen=True)
class Moments:
    """Mean and variance of numbers that come in parts (Chan et al. 1979), in float64.

    Attributes:
        count: How many there were.
        mean: Their mean.
        squares: Sum of their squared deviations from it.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def including(self, numbers: Tensor) -> Moments:
        """The moments with these numbers too; this object stays as it is."""
        new = numbers.detach().double().cpu()
        if new.numel() == 0:
            return self
        total = self.count + new.numel()
        mean = new.mean().item()
        squares = ((new - mean) ** 2).sum().item()
        shift = mean - self.mean
        return Moments(
            total,
            self.mean + shift * new.numel() / total,
            self.squares + squares + shift**2 * self.count * new.numel() / total,
        )

    @property
    def variance(self) -> float:
        """Population variance."""
        return self.squares / max(1, self.count)


class ScoreShaper:
    """The steps above, with the moments of all scores trained on so far.

    Args:
        config: Settings of the scores.
    """

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.moments = Moments()

    def shape(self, scores: Tensor, ended: Tensor, lengths: Tensor) -> Tensor:
        """The shaped scores, fp32 [B]; nothing is remembered, so it may be called again.

        Args:
            scores: [B], what the reward returned.
            ended: bool [B], whether the response ended with EOS.
            lengths: [B], tokens of each response.
        """
        config = self.config
        shaped = scores.float()
        if config.score_normalization != "none":
            known = self.moments if config.score_normalization == "running" else Moments()
            moments = known.including(scores)
            shaped = (shaped - moments.mean) / math.sqrt(moments.variance + EPS)
        if config.score_clip is not None:
            shaped = shaped.clamp(-config.score_clip, config.score_clip)
        if config.missing_eos_score is not None:
            shaped = torch.where(ended, shaped, config.missing_eos_score)
        if config.missing_eos_penalty is not None:
            shaped = shaped - config.missing_eos_penalty * (~ended).float()
        return shaped - config.length_penalty * lengths.float()

    def remember(self, scores: Tensor) -> None:
        """Count the scores of a batch that was trained on among those so far.

        One that is NaN or infinite is not: its steps were skipped, and no later one's shall be.
        """
        if self.config.score_normalization == "running":
            self.moments = self.moments.including(scores[scores.isfinite()])

    def state_dict(self) -> dict[str, Any]:
        return vars(self.moments).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moments = Moments(**state)
