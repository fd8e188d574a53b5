"""Settings of PPO, with the values of the published recipes as defaults; a file for each part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf.engine import TrainingConfig, check_number
from rlhf.ppo.config.loss import LossConfig
from rlhf.ppo.config.models import ModelsConfig
from rlhf.ppo.config.presets import preset_settings
from rlhf.ppo.config.rewards import RewardsConfig
from rlhf.ppo.config.sampling import SamplingConfig
from rlhf.ppo.config.watching import WatchingConfig

__all__ = ["PPOConfig"]


@dataclass
class PPOConfig(
    WatchingConfig, ModelsConfig, LossConfig, RewardsConfig, SamplingConfig, TrainingConfig
):
    """Settings of PPO; see ``docs/ppo.md`` for the algorithm line by line.

    Attributes:
        learning_rate: Highest learning rate of the policy's Adam.
        adam_eps: Adam's epsilon; 1e-5 is PPO's customary value.
        total_updates: How often to sample a batch and train on it.
        batch_size: Responses per update, ``responses_per_prompt`` of them to each prompt.
        minibatch_size: Responses per optimizer step; divides batch_size, or is all of it if larger.
        epochs: Passes over each batch of responses.
    """

    output_dir: str = "runs/ppo"
    learning_rate: float = 1e-5
    adam_eps: float = 1e-5
    total_updates: int = 100
    batch_size: int = 64
    minibatch_size: int = 16
    epochs: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("total_updates", "batch_size", "minibatch_size", "epochs"):
            check_number(self, name, at_least=1, integer=True)
        self.minibatch_size = min(self.minibatch_size, self.batch_size)
        if self.batch_size % self.minibatch_size:
            raise ValueError(
                f"minibatch_size={self.minibatch_size} does not divide "
                f"batch_size={self.batch_size}; choose one that does"
            )
        self.check_sampling()
        self.check_kl()
        self.check_rewards()
        self.check_loss()
        self.check_models()
        self.check_watching()
        self._check_together()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> PPOConfig:
        """The settings of a published recipe: ``ziegler2019`` or ``tldr``.

        Args:
            name: Of the recipe; ``rlhf.ppo.config.presets`` says where each number comes from.
            overrides: Settings that differ from it.

        Raises:
            ValueError: There is no such recipe, or a setting makes no sense.
        """
        return cls(**{**preset_settings(name), **overrides})

    @property
    def has_own_critic(self) -> bool:
        """Whether a critic is trained that is a model of its own."""
        return self.estimator.needs_critic and self.critic != "shared"

    @property
    def prompts_per_update(self) -> int:
        """Prompts in a batch of ``batch_size`` responses."""
        return self.batch_size // self.responses_per_prompt

    def _check_together(self) -> None:
        """Checks of settings from different parts."""
        size, least = self.responses_per_prompt, self.estimator.min_responses
        if self.batch_size % size:
            raise ValueError(
                f"responses_per_prompt={size} does not divide batch_size={self.batch_size}, which "
                "counts responses; choose one that does"
            )
        if size < least:
            raise ValueError(
                f"advantage_estimator={self.advantage_estimator!r} compares the responses to a "
                f"prompt and needs at least {least}; responses_per_prompt is {size}"
            )
        if self.kl_target is not None and self.kl_horizon < self.batch_size:
            raise ValueError(
                f"kl_horizon={self.kl_horizon} is less than one batch of {self.batch_size} "
                "responses; the weight would overshoot. 10 times the batch is a fast horizon"
            )
        self._check_warmup()

    def _check_warmup(self) -> None:
        if not self.critic_warmup_updates:
            return
        if self.critic == "shared":
            raise ValueError(
                f"critic_warmup_updates={self.critic_warmup_updates} trains the critic alone, and "
                "critic='shared' has no trunk of its own; leave one of the two out"
            )
        if not self.estimator.needs_critic:
            raise ValueError(
                f"critic_warmup_updates={self.critic_warmup_updates} is for the critic, and "
                f"advantage_estimator={self.advantage_estimator!r} has none; leave it out"
            )
        if self.critic_warmup_updates >= self.total_updates:
            raise ValueError(
                f"critic_warmup_updates={self.critic_warmup_updates} leaves the policy none of "
                f"the total_updates={self.total_updates}; lower it"
            )

    @property
    def steps_per_update(self) -> int:
        """Optimizer steps per update: epochs times minibatches."""
        return self.epochs * (self.batch_size // self.minibatch_size)
