"""The coefficient of the KL penalty over a run."""

from __future__ import annotations

import math
from typing import Any

LARGEST_ERROR = 0.2  # Ziegler et al. 2019, section 2.2


class KLController:
    """A fixed coefficient, or one that holds the KL divergence near a target.

    The adaptive one is the proportional controller, in the logarithm of the coefficient, of Ziegler
    et al. 2019 (arXiv 1909.08593, section 2.2)::

        error = clip((KL - target) / target, -0.2, 0.2)
        coef *= 1 + K * error

    The paper has K = 0.1 for each update of 512 responses; its published code has K = n / horizon
    for n responses and a horizon of 10000, so 0.05 there. This class follows the code, so that the
    speed does not depend on how responses are cut into updates. ``horizon = 10 * batch_size`` is
    the paper's.

    Args:
        coef: The coefficient, or its first value.
        target: KL divergence per response, in nats; None for a fixed coefficient.
        horizon: Responses over which the coefficient would change by its whole relative error.
    """

    def __init__(self, coef: float, target: float | None = None, horizon: int = 10000) -> None:
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, responses: int) -> None:
        """Take in the mean KL divergence of so many responses.

        Raises:
            ValueError: It is NaN or infinite; the coefficient stays as it is.
        """
        if self.target is None:
            return
        if not math.isfinite(kl):
            raise ValueError(f"the mean KL divergence of {responses} responses is {kl}")
        error = (kl - self.target) / self.target
        error = min(max(error, -LARGEST_ERROR), LARGEST_ERROR)
        self.coef *= 1.0 + error * responses / self.horizon

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coef = float(state["coef"])
