"""Several rewards as one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data import Text
from rlhf.ppo.scoring import Reward, check_reward, score_responses


class WeightedRewards:
    """The weighted sum of rewards; PPO shows the mean of each as the figure ``score/NAME``.

    Args:
        rewards: ``{name: (reward, weight)}``; each reward as ``PPOTrainer`` takes it.

    Raises:
        TypeError: A reward cannot be called.
        ValueError: There is none, or a weight is no finite number.
    """

    def __init__(self, rewards: Mapping[str, tuple[Reward, float]]) -> None:
        if not rewards:
            raise ValueError("give at least one reward")
        for name, (reward, weight) in rewards.items():
            check_reward(reward)
            if not math.isfinite(weight):
                raise ValueError(f"the weight of reward {name!r} is {weight!r}; give a number")
        self.rewards = dict(rewards)

    def __call__(
        self, prompts: Sequence[Text], responses: Sequence[str], **columns: list[Any]
    ) -> list[float]:
        """The weighted sums alone."""
        rows = [
            {"prompt": prompt, **{name: values[row] for name, values in columns.items()}}
            for row, prompt in enumerate(prompts)
        ]
        return score_responses(self, rows, responses).tolist()
