"""Trainers around a tiny policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_tokenizer
from tiny_policy import make_policy

from rlhf.ppo import PPOConfig, PPOTrainer

PROMPTS = [{"prompt": " ".join(f"w{i}" for i in range(1, 2 + n)), "bonus": n} for n in range(6)]


def word_count(prompts: list[Any], responses: list[str]) -> list[float]:
    """A reward that differs between responses."""
    return [0.1 * len(text.split()) for text in responses]


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., PPOTrainer]:
    """Makes a trainer; keyword arguments are settings, but for the objects named here."""

    def make(
        *,
        policy: Any = None,
        reward: Any = word_count,
        prompts: Any = PROMPTS,
        critic: Any = None,
        reference: Any = None,
        tokenizer: Any = None,
        eval_prompts: Any = None,
        critic_choice: str = "auto",
        **settings: Any,
    ) -> PPOTrainer:
        config = {
            "output_dir": str(tmp_path / "ppo"),
            "learning_rate": 1e-3,
            "total_updates": 2,
            "batch_size": 8,
            "minibatch_size": 4,
            "micro_batch_size": 3,
            "epochs": 2,
            "max_new_tokens": 10,
            "template": "none",
            "dtype": "float32",
            "trackers": [],
            "critic": critic_choice,  # the setting; ``critic`` is the model
        }
        return PPOTrainer(
            PPOConfig(**{**config, **settings}),
            make_policy() if policy is None else policy,
            tiny_tokenizer() if tokenizer is None else tokenizer,
            prompts,
            reward,
            critic,
            reference,
            eval_prompts=eval_prompts,
        )

    return make
