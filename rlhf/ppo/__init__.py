"""PPO for language models; ``docs/ppo.md`` follows the algorithm line by line."""

from __future__ import annotations

from rlhf.ppo.callbacks import Callback
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.experience import Experience
from rlhf.ppo.generation import Generated, GenerationSettings, Sampler, generate
from rlhf.ppo.scoring import RewardError
from rlhf.ppo.trainer import PPOTrainer

__all__ = [
    "Callback",
    "Experience",
    "Generated",
    "GenerationSettings",
    "PPOConfig",
    "PPOTrainer",
    "RewardError",
    "Sampler",
    "generate",
]
