"""The three trainings, small enough to run whole in a second or two."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from tiny_models import tiny_llama, tiny_tokenizer
from tiny_policy import make_policy

from rlhf import (
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardModel,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from rlhf.models import scalar_model_from_causal

COMMON: dict[str, Any] = {
    "learning_rate": 1e-3,
    "template": "none",
    "dtype": "float32",
    "trackers": ["jsonl"],
    "micro_batch_size": 2,
    # The check is that ranks change nothing: Adam must not blow rounding up where gradients are 0.
    "adam_eps": 1e-5,
}
PROMPTS = [{"prompt": " ".join(f"w{i}" for i in range(1, 2 + n))} for n in range(7)]


def word_count(prompts: list[Any], responses: list[str]) -> list[float]:
    """A reward that differs between responses."""
    return [0.1 * len(text.split()) for text in responses]


def sft(folder: Path, *, rows: int = 15, **settings: Any) -> SFTTrainer:
    # 15 rows in steps of 4: the last step of an epoch has 3, which two ranks cannot halve.
    data = [{"prompt": f"w{i}", "completion": "w1 w2 w3"[: 2 + 3 * (i % 3)]} for i in range(rows)]
    options = {**COMMON, "batch_size": 4, "epochs": 2, "eval_fraction": 0.0, **settings}
    config = SFTConfig(output_dir=str(folder), **options)
    return SFTTrainer(
        config, tiny_llama(tie_word_embeddings=True), tiny_tokenizer(), data, data[:3]
    )


def reward(folder: Path, *, rows: int = 15, **settings: Any) -> RewardTrainer:
    data = [
        {"prompt": f"w{i}", "chosen": f"w2 w{i}", "rejected": "w9 w9 w9"[: 2 + 3 * (i % 3)]}
        for i in range(rows)
    ]
    options = {**COMMON, "batch_size": 4, "epochs": 2, "eval_fraction": 0.0, **settings}
    config = RewardConfig(output_dir=str(folder), **options)
    return RewardTrainer(config, tiny_llama(), tiny_tokenizer(), data, data[:3])


def ppo(
    folder: Path,
    *,
    prompts: Any = PROMPTS,
    policy_seed: int = 0,
    policy_options: dict[str, Any] | None = None,
    scorer: Any = None,
    eval_prompts: Any = None,
    **settings: Any,
) -> PPOTrainer:
    options = {
        **COMMON,
        "total_updates": 3,
        "batch_size": 8,
        "minibatch_size": 4,
        "epochs": 2,
        "max_new_tokens": 10,
        **settings,
    }
    config = PPOConfig(output_dir=str(folder), **options)
    policy = make_policy(policy_seed, **(policy_options or {}))
    return PPOTrainer(
        config,
        policy,
        tiny_tokenizer(),
        prompts,
        scorer or word_count,
        eval_prompts=eval_prompts,
    )


def ppo_with_a_reward_model(folder: Path, **settings: Any) -> PPOTrainer:
    """9 responses, which two ranks cannot halve, and one to evaluate with, which one of them does
    not share; the critic starts as a copy of the reward.
    """
    model = RewardModel(scalar_model_from_causal(tiny_llama(3), seed=2), tiny_tokenizer())
    sizes = {"batch_size": 9, "minibatch_size": 3, "eval_every": 2}
    return ppo(folder, scorer=model, eval_prompts=PROMPTS[:1], **sizes, **settings)


# With all that has a state of its own (the KL's weight, the scores' moments) or decides by what all
# ranks have seen (the early stop).
WITHOUT_CRITIC: dict[str, Any] = {
    "advantage_estimator": "grpo",
    "responses_per_prompt": 2,
    "kl_placement": "loss",
    "kl_estimator": "k2",
    "kl_target": 0.05,
    "kl_horizon": 16,
    "score_normalization": "running",
    "max_approx_kl": 3e-4,
}
TRAININGS: dict[str, Any] = {
    "sft": sft,
    "reward": reward,
    "ppo": ppo,
    "ppo_reward_model": ppo_with_a_reward_model,
    "ppo_shared": partial(ppo, critic="shared"),
    "ppo_lora": partial(ppo, lora_rank=2, critic_lora_rank=2),
    "ppo_without_critic": partial(ppo, **WITHOUT_CRITIC),
    "ppo_warmup": partial(ppo, critic_warmup_updates=1),
}
