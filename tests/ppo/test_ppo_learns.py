"""PPO on a real model, at a small scale, against a plain Python function."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.ppo import PPOConfig, PPOTrainer

PROMPTS = ["Once upon a time", "One day, Lily", "Tom and his dog", "The little girl"]


def letter_share(prompts: list[str], responses: list[str]) -> list[float]:
    """Ten times the share of the letter h: smooth, and within reach of a few updates."""
    return [10 * text.lower().count("h") / max(1, len(text)) for text in responses]


def train(folder: Path, stories: Path, **settings: float) -> tuple[list[float], list[float]]:
    config = PPOConfig(
        output_dir=str(folder),
        template="none",
        total_updates=12,
        batch_size=48,
        minibatch_size=24,
        micro_batch_size=24,
        epochs=2,
        max_new_tokens=16,
        learning_rate=1e-3,
        warmup_ratio=0.2,
        dtype="float32",
        trackers=[],
        **settings,  # type: ignore[arg-type]
    )
    trainer = PPOTrainer(config, str(stories), str(stories), PROMPTS, letter_share)
    scores, kls = [], []
    for prompts in trainer.prompts:
        metrics = trainer.update(trainer.rollout(prompts))
        scores.append(metrics["score"])
        kls.append(metrics["kl"])
    final = trainer.rollout(PROMPTS * 24)
    scores.append(final.scores.mean().item())
    kls.append(final.kl.sum(1).mean().item())
    return scores, kls


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_reward_rises_at_a_small_divergence(
    stories_dir: Path, tmp_path: Path, seed: int
) -> None:
    scores, kls = train(tmp_path, stories_dir, kl_coef=0.1, seed=seed)
    print(scores, kls)
    assert kls[0] == pytest.approx(0.0, abs=1e-4)
