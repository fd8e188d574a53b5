"""Settings of the KL penalty."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from rlhf.engine import check_choice, check_number

logger = logging.getLogger(__name__)


@dataclass
class KLConfig:
    """How far the policy may move from the reference.

    Attributes:
        kl_coef: Weight of the penalty on the KL divergence from the reference; with kl_target its
            first value.
        kl_target: KL divergence in nats per response that the weight is adapted to (Ziegler et al.
            2019, arXiv 1909.08593, who took 6); null for a fixed weight.
        kl_horizon: Responses over which the adapted weight would change by its whole error; smaller
            adapts faster. 10000 is Ziegler et al.'s.
        kl_estimator: Estimator of the divergence: k1, k2, k3 or abs.
        kl_placement: Where the penalty stands: reward (each token's, Ziegler et al. 2019) or loss
            (beside the policy's, as in GRPO, arXiv 2402.03300; with k2 or k3).
    """

    kl_coef: float = 0.1
    kl_target: float | None = None
    kl_horizon: int = 10000
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    kl_placement: Literal["reward", "loss"] = "reward"

    def check_kl(self) -> None:
        """Raise ValueError, naming the field, for a setting that makes no sense."""
        check_number(self, "kl_coef", at_least=0)
        check_number(self, "kl_target", above=0, optional=True)
        check_number(self, "kl_horizon", at_least=1, integer=True)
        check_choice(self, "kl_estimator", ("k1", "k2", "k3", "abs"))
        check_choice(self, "kl_placement", ("reward", "loss"))
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError(
                f"kl_target={self.kl_target} multiplies kl_coef, which is 0 and would stay so; "
                "give kl_coef a first value above 0"
            )
        if self.kl_placement == "loss":
            self._check_loss_estimator()

    def _check_loss_estimator(self) -> None:
        if self.kl_estimator == "abs":
            raise ValueError("kl_estimator='abs' works in the reward only; choose k2 or k3")
        if self.kl_estimator == "k1" and self.kl_coef > 0:
            logger.warning(
                "kl_placement='loss' with kl_estimator='k1' hardly penalises anything: the "
                "gradient of k1 is 0 in the mean; choose k2 or k3"
            )
