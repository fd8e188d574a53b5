"""RLHF in three stages: supervised fine-tuning, reward modelling and PPO.

Names are loaded when first used, so `import rlhf` does not import transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.best_of import best_of_n
    from rlhf.data import PreferenceDataset, PreferencePair, agreement_stats
    from rlhf.http_reward import HTTPReward
    from rlhf.pipeline import PipelineConfig, RLHFPipeline
    from rlhf.ppo import PPOConfig, PPOTrainer
    from rlhf.ppo.scoring import WeightedRewards
    from rlhf.reward import RewardConfig, RewardModel, RewardTrainer
    from rlhf.rewards import HeuristicReward
    from rlhf.sft import SFTConfig, SFTTrainer

_HOME = {
    "HTTPReward": "rlhf.http_reward",
    "HeuristicReward": "rlhf.rewards",
    "PPOConfig": "rlhf.ppo",
    "PPOTrainer": "rlhf.ppo",
    "PipelineConfig": "rlhf.pipeline",
    "PreferenceDataset": "rlhf.data",
    "PreferencePair": "rlhf.data",
    "RLHFPipeline": "rlhf.pipeline",
    "RewardConfig": "rlhf.reward",
    "RewardModel": "rlhf.reward",
    "RewardTrainer": "rlhf.reward",
    "SFTConfig": "rlhf.sft",
    "SFTTrainer": "rlhf.sft",
    "WeightedRewards": "rlhf.ppo.scoring",
    "agreement_stats": "rlhf.data",
    "best_of_n": "rlhf.best_of",
}

__all__ = [
    "HTTPReward",
    "HeuristicReward",
    "PPOConfig",
    "PPOTrainer",
    "PipelineConfig",
    "PreferenceDataset",
    "PreferencePair",
    "RLHFPipeline",
    "RewardConfig",
    "RewardModel",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "WeightedRewards",
    "agreement_stats",
    "best_of_n",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
