"""PPO on a real model against plain Python functions."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import pytest

from rlhf.ppo import PPOConfig, PPOTrainer

PROMPTS = ["Once upon a time", "One day, Lily", "Tom and his dog", "The little girl"]
EXAMPLE = Path(__file__).parents[2] / "examples" / "stories_ppo.py"
ESTIMATORS = {
    "gae": {},
    "reinforce++": {},
    "rloo": {"responses_per_prompt": 12},
    "grpo": {"responses_per_prompt": 12},
}


def letter_share(prompts: list[str], responses: list[str]) -> list[float]:
    """Ten times the share of the letter h: smooth, and within reach of a few updates."""
    return [10 * text.lower().count("h") / max(1, len(text)) for text in responses]


def make_trainer(stories_dir: Path, tmp_path: Path, **settings: Any) -> PPOTrainer:
    plain = {
        "output_dir": str(tmp_path),
        "template": "none",
        "batch_size": 48,
        "minibatch_size": 24,
        "micro_batch_size": 24,
        "epochs": 2,
        "max_new_tokens": 16,
        "critic_learning_rate": 1e-3,
        "entropy_coef": 0.0,
        "dtype": "float32",
        "trackers": [],
    }
    config = PPOConfig(**{**plain, **settings})
    return PPOTrainer(config, str(stories_dir), str(stories_dir), PROMPTS, letter_share)


class Outcome(NamedTuple):
    """What a training changed, over 128 responses before it and as many after it."""

    before: float  # mean score
    gain: float  # of the mean score
    error: float  # standard error of that
    kl: float  # nats, over 16 tokens
    objective_gain: float  # of the score less the KL penalty: what PPO maximises


def train(stories_dir: Path, tmp_path: Path, estimator: str, seed: int) -> Outcome:
    """16 updates at half the rate at which KL begins to run away.

    At twice the rate 12 updates gained as much score, for 4.0 nats with a spread over seeds of 0.6
    (REINFORCE++, whose one baseline for all prompts leaves the most noise) in place of 2.6 with
    0.26, and the penalty ate the gain: the seed decided how far the policy overshot.
    """
    trainer = make_trainer(
        stories_dir,
        tmp_path,
        advantage_estimator=estimator,
        total_updates=16,
        learning_rate=2.5e-4,
        warmup_ratio=0.2,
        kl_coef=0.1,
        seed=seed,
        **ESTIMATORS[estimator],
    )
    sample = (PROMPTS * 32)[: 128 // trainer.config.responses_per_prompt]
    before = trainer.rollout(sample)
    assert before.kl.abs().max() < 1e-4
    trainer.train()
    after = trainer.rollout(sample)
    return Outcome(
        before.scores.mean().item(),
        (after.scores.mean() - before.scores.mean()).item(),
        ((after.scores.var() + before.scores.var()) / len(before)).sqrt().item(),
        after.kl.sum(1).mean().item(),
        (after.rewards.sum(1).mean() - before.rewards.sum(1).mean()).item(),
    )


def check(outcome: Outcome) -> None:
    """Bounds some three spreads over seeds away from the means: ten seeds of each estimator."""
    assert outcome.gain > 5 * outcome.error  # not the luck of the sample; means of 8.2 to 10.2
    assert outcome.gain > 0.4 * outcome.before  # 0.67 to 0.84; the least of all was 0.55
    assert outcome.kl < 3.6  # 1.9 to 2.6 with spreads of 0.26; the most was 3.0
    assert outcome.objective_gain > 0.0  # 0.13 with spreads of 0.03 to 0.05; the least was 0.04


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_reward_rises_at_a_small_divergence(
    stories_dir: Path, tmp_path: Path, estimator: str
) -> None:
    check(train(stories_dir, tmp_path, estimator, seed=0))


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_reward_rises_with_every_seed(
    stories_dir: Path, tmp_path: Path, estimator: str
) -> None:
    outcomes = [train(stories_dir, tmp_path / str(seed), estimator, seed) for seed in range(5)]
    for outcome in outcomes:
        check(outcome)
    # Over seeds, what PPO maximises has risen for certain, and not only where the sample was lucky.
    gains = [outcome.objective_gain for outcome in outcomes]
    assert fmean(gains) > 4 * stdev(gains) / len(gains) ** 0.5
    assert fmean(gains) > 0.08


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_adaptive_coefficient_holds_its_target(
    stories_dir: Path, tmp_path: Path, seed: int
) -> None:
    """6 nats within 20 % over the second half, with the speed of Ziegler et al. 2019: K = 0.1.

    The coefficient follows slowly, so the policy must keep up with it: a learning rate three times
    as high drives it far out before the coefficient has moved, and breaks it.
    """
    trainer = make_trainer(
        stories_dir,
        tmp_path,
        total_updates=100,
        learning_rate=3e-4,
        lr_schedule="constant",
        warmup_ratio=0.1,
        kl_coef=0.2,
        kl_target=6.0,
        kl_horizon=10 * 48,
        seed=seed,
    )
    metrics = [trainer.update(trainer.rollout(prompts)) for prompts in trainer.prompts]
    second_half = [update["kl"] for update in metrics[50:]]
    assert sum(second_half) / 50 == pytest.approx(6.0, rel=0.2)  # the seeds reach 6.2 to 6.5
    assert max(second_half) < 12
    coefficients = [update["kl_coef"] for update in metrics]
    assert min(coefficients) < 0.1  # it fell while the policy was near the reference,
    assert coefficients[-1] > 1.1 * min(coefficients)  # and rose when it went too far
    score = [update["score"] for update in metrics]
    assert sum(score[50:]) / 50 > 1.5 * sum(score[:5]) / 5


@pytest.mark.slow
def test_the_example_makes_stories_happier(stories_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), str(stories_dir), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=True)
    found = re.findall(r"score (-?[\d.]+) .*reference (-?[\d.]+) nats", done.stdout)
    (before, start_kl), (after, end_kl) = [tuple(map(float, pair)) for pair in found]
    assert start_kl == 0.0
    assert before < 0.3
    assert after > 1.0
    assert end_kl < 8.0
