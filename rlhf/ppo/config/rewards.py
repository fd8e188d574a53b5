"""Settings of scores, the KL penalty and advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.engine import check_choice, check_number


@dataclass
class RewardsConfig:
    """From scores to advantages.

    Attributes:
        kl_coef: Weight of the per-token penalty on the KL divergence from the reference.
        kl_estimator: Estimator of that divergence: k1, k2, k3 or abs.
        missing_eos_penalty: Subtracted from the score of a response that did not end by itself;
            null for none.
        gamma: Discount of later rewards.
        lam: GAE's decay, from 0 (one-step) to 1 (Monte Carlo).
        whiten_rewards: Scale the rewards of a batch to variance 1, keeping their mean.
        whiten_advantages: Scale and shift the advantages of a batch to variance 1 and mean 0.
    """

    kl_coef: float = 0.1
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    missing_eos_penalty: float | None = None
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    whiten_advantages: bool = True

    def check_rewards(self) -> None:
        """Raise ValueError, naming the field, for a setting that makes no sense."""
        check_number(self, "kl_coef", at_least=0)
        check_choice(self, "kl_estimator", ("k1", "k2", "k3", "abs"))
        check_number(self, "missing_eos_penalty", at_least=0, optional=True)
        check_number(self, "gamma", at_least=0, at_most=1)
        check_number(self, "lam", at_least=0, at_most=1)
