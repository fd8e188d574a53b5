"""Published recipes as settings.

Each writes out what the recipe says, whether or not it is the default. Models, prompts and the
reward are the user's.
"""

from __future__ import annotations

from typing import Any

# Ziegler et al. 2019 (arXiv 1909.08593), the stylistic tasks; where the paper is silent, its code
# (github.com/openai/lm-human-preferences: launch.py and train_policy.py).
ZIEGLER_2019 = {
    "total_updates": 1954,  # 1,000,000 episodes
    "batch_size": 512,
    "minibatch_size": 512,  # one minibatch
    "epochs": 4,
    "learning_rate": 1e-5,  # Adam, falling linearly to 0
    "adam_eps": 1e-8,  # TensorFlow's Adam
    "max_grad_norm": None,
    "max_new_tokens": 24,
    "temperature": 0.7,
    "kl_coef": 0.15,
    "kl_target": 6.0,
    "kl_horizon": 10000,
    "kl_estimator": "k1",
    "missing_eos_score": -1.0,  # there for a response without a period after its 16th token
    "gamma": 1.0,
    "lam": 0.95,
    "whiten_rewards": True,
    "whiten_advantages": True,
    "clip_range": 0.2,
    "value_clip_range": 0.2,
    "value_coef": 0.1,
    "entropy_coef": 0.0,
}

# Huang et al. 2024 (arXiv 2403.17031), the reproduction of TL;DR (Stiennon et al. 2020, arXiv
# 2009.01325); its table of PPO hyperparameters and its code
# (github.com/vwxyzjn/summarize_from_feedback_details: ppo_left_padding.py).
TLDR = {
    "total_updates": 1953,  # 1,000,000 episodes
    "batch_size": 512,
    "minibatch_size": 512,
    "epochs": 4,
    "learning_rate": 3e-6,  # AdamW, falling linearly to 0
    "adam_eps": 1e-5,
    "max_grad_norm": None,
    "max_new_tokens": 53,
    "temperature": 0.7,
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "missing_eos_score": -1.0,
    "gamma": 1.0,
    "lam": 0.95,
    "whiten_rewards": True,  # as in the code
    "whiten_advantages": True,
    "clip_range": 0.2,
    "value_clip_range": 0.2,
    "value_coef": 0.1,
    "entropy_coef": 0.0,
}

PRESETS: dict[str, dict[str, Any]] = {"ziegler2019": ZIEGLER_2019, "tldr": TLDR}


def preset_settings(name: str) -> dict[str, Any]:
    """The settings of the recipe; ValueError, naming those there are, if it is unknown."""
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} must be one of {', '.join(map(repr, PRESETS))}")
    return dict(PRESETS[name])
