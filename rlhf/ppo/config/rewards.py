"""Settings of scores and advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.engine import check_choice, check_number
from rlhf.ppo.estimators import ESTIMATORS, AdvantageEstimator


@dataclass
class RewardsConfig:
    """From scores to advantages.

    Attributes:
        score_normalization: Scale and shift scores to variance 1 and mean 0: none, batch (over the
            batch) or running (over all scores so far; arXiv 2307.04964).
        score_clip: Bound scores, after normalisation, to this size; null for none.
        missing_eos_penalty: Subtracted from the score of a response that did not end by itself;
            null for none.
        missing_eos_score: Takes the place of that score instead; -1 in arXiv 2403.17031.
        length_penalty: Subtracted from the score for each token of a response.
        advantage_estimator: gae, rloo, reinforce++, grpo, or a name added to
            rlhf.ppo.estimators.ESTIMATORS; all but gae train without a critic.
        gamma: Discount of later rewards, for gae and reinforce++.
        lam: GAE's decay, from 0 (one-step) to 1 (Monte Carlo).
        critic_lam: The decay for the critic's returns (arXiv 2504.05118); null takes lam.
        grpo_divide_by_std: Whether grpo divides by the deviation of a prompt's responses; false is
            Dr. GRPO's (arXiv 2503.20783).
        whiten_rewards: Scale the rewards of a batch to variance 1, keeping their mean.
        whiten_advantages: Scale and shift the advantages of a batch to variance 1 and mean 0; null
            does so where the estimator's paper does: gae and reinforce++.
    """

    score_normalization: Literal["none", "batch", "running"] = "none"
    score_clip: float | None = None
    missing_eos_penalty: float | None = None
    missing_eos_score: float | None = None
    length_penalty: float = 0.0
    advantage_estimator: str = "gae"
    gamma: float = 1.0
    lam: float = 0.95
    critic_lam: float | None = None
    grpo_divide_by_std: bool = True
    whiten_rewards: bool = False
    whiten_advantages: bool | None = None

    @property
    def estimator(self) -> AdvantageEstimator:
        """The advantage estimator of that name."""
        return ESTIMATORS[self.advantage_estimator]

    @property
    def whitens_advantages(self) -> bool:
        """What ``whiten_advantages`` means with this estimator."""
        chosen = self.whiten_advantages
        return self.estimator.whitens if chosen is None else chosen

    def check_rewards(self) -> None:
        """Raise ValueError, naming the field, for a setting that makes no sense."""
        check_choice(self, "score_normalization", ("none", "batch", "running"))
        check_number(self, "score_clip", above=0, optional=True)
        check_number(self, "missing_eos_penalty", at_least=0, optional=True)
        check_number(self, "missing_eos_score", optional=True)
        if self.missing_eos_penalty is not None and self.missing_eos_score is not None:
            raise ValueError(
                f"missing_eos_score={self.missing_eos_score} replaces the score that "
                f"missing_eos_penalty={self.missing_eos_penalty} lowers; give one of the two"
            )
        check_number(self, "length_penalty", at_least=0)
        check_choice(self, "advantage_estimator", ESTIMATORS)
        check_number(self, "gamma", at_least=0, at_most=1)
        check_number(self, "lam", at_least=0, at_most=1)
        check_number(self, "critic_lam", at_least=0, at_most=1, optional=True)
        if self.critic_lam is not None and not self.estimator.needs_critic:
            raise ValueError(
                f"critic_lam={self.critic_lam} is for the critic, and "
                f"advantage_estimator={self.advantage_estimator!r} has none; leave it out"
            )
