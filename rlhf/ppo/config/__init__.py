"""Settings of PPO, with the values of the published recipes as defaults; a file for each part."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.engine import TrainingConfig, check_number
from rlhf.ppo.config.loss import LossConfig
from rlhf.ppo.config.models import ModelsConfig
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
        batch_size: Prompts, and so responses, per update.
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
        self.check_rewards()
        self.check_loss()
        self.check_models()
        self.check_watching()

    @property
    def steps_per_update(self) -> int:
        """Optimizer steps per update: epochs times minibatches."""
        return self.epochs * (self.batch_size // self.minibatch_size)
