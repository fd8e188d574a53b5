"""Advantage estimators against loops in float64, and training with each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policy import make_policy
from torch import Tensor

from rlhf.ppo import PPOConfig
from rlhf.ppo.estimators import ESTIMATORS, CriticFree, Episodes, Estimate

CRITIC_FREE = ["rloo", "reinforce++", "grpo"]
# Float32 sums of up to 30 numbers of size 1, and one division.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
NAN = float("nan")
Rows = list[list[float]]


def settings(estimator: str, **changes: Any) -> PPOConfig:
    group = {} if estimator == "gae" else {"responses_per_prompt": 3}
    plain: dict[str, Any] = {
        "advantage_estimator": estimator,
        "batch_size": 6,
        "minibatch_size": 6,
        "kl_coef": 0.3,
        "gamma": 0.9,
        "lam": 0.8,
        **group,
    }
    return PPOConfig(**{**plain, **changes})


def episodes(config: PPOConfig, kl_coef: float = 0.3) -> Episodes:
    """Two prompts with three responses each, of all lengths, one with a hole; NaN where masked."""
    generator = torch.Generator().manual_seed(4)
    mask = torch.tensor(
        [
            [1, 1, 1, 1, 1],
            [1, 1, 0, 0, 0],
            [1, 0, 1, 1, 0],
            [1, 0, 0, 0, 0],
            [1, 1, 1, 1, 0],
            [1, 1, 1, 0, 0],
        ]
    ).bool()

    def numbers() -> Tensor:
        return torch.randn(mask.shape, generator=generator).masked_fill(~mask, NAN)

    return Episodes(
        scores=torch.randn(6, generator=generator),
        logprobs=numbers(),
        ref_logprobs=numbers(),
        values=numbers() if config.estimator.needs_critic else None,
        mask=mask,
        kl_coef=kl_coef,
        config=config,
    )


def in_float64(made: Episodes) -> Iterator[tuple[list[int], list[float], list[float]]]:
    """(valid places, rewards there, values there) of each response."""
    for row in range(len(made.mask)):
        places = [t for t in range(made.mask.shape[1]) if made.mask[row, t]]
        kl = [float(made.logprobs[row, t]) - float(made.ref_logprobs[row, t]) for t in places]
        rewards = [-made.kl_coef * x for x in kl]
        rewards[-1] += float(made.scores[row])
        values = [] if made.values is None else [float(made.values[row, t]) for t in places]
        yield places, rewards, values


def place(rows: Rows, made: Episodes) -> Tensor:
    """Numbers at valid places as [B, T] with 0 elsewhere."""
    result = torch.zeros(made.mask.shape)
    result[made.mask] = torch.tensor([x for row in rows for x in row])
    return result


def to_go(numbers: list[float], decay: float) -> list[float]:
    """The discounted sum of what follows each number, itself included."""
    sums, rest = [], 0.0
    for number in reversed(numbers):
        rest = number + decay * rest
        sums.append(rest)
    return sums[::-1]


def check(estimate: Estimate, made: Episodes, advantages: Rows) -> None:
    """Advantages as given; rewards and KL as the formula has them."""
    torch.testing.assert_close(estimate.advantages, place(advantages, made), **CLOSE)
    rewards = [rewards for _, rewards, _ in in_float64(made)]
    torch.testing.assert_close(estimate.rewards, place(rewards, made), **CLOSE)
    kl = (made.logprobs - made.ref_logprobs).masked_fill(~made.mask, 0.0)
    torch.testing.assert_close(estimate.kl, kl, **CLOSE)


def test_gae_with_a_decay_of_its_own_for_the_critic() -> None:
    config = settings("gae", critic_lam=1.0, whiten_advantages=False)
    made = episodes(config)
    advantages, returns = [], []
    for _, rewards, values in in_float64(made):
        following = [*values[1:], 0.0]
        deltas = [r + 0.9 * n - v for r, v, n in zip(rewards, values, following)]
        advantages.append(to_go(deltas, 0.9 * 0.8))
        returns.append(to_go(rewards, 0.9))  # a decay of 1: what was really received
    estimate = config.estimator(made)
    check(estimate, made, advantages)
    assert estimate.returns is not None
    torch.testing.assert_close(estimate.returns, place(returns, made), **CLOSE)


def test_rloo_leaves_one_out() -> None:
    config = settings("rloo")
    made = episodes(config)
    totals = [sum(rewards) for _, rewards, _ in in_float64(made)]
    expected = []
    for row, (places, _, _) in enumerate(in_float64(made)):
        group = range(row // 3 * 3, row // 3 * 3 + 3)
        baseline = sum(totals[other] for other in group if other != row) / 2
        expected.append([totals[row] - baseline] * len(places))
    estimate = config.estimator(made)
    check(estimate, made, expected)
    assert estimate.returns is None


@pytest.mark.parametrize("divide", [True, False])
def test_grpo_normalises_over_the_group(divide: bool) -> None:
    config = settings("grpo", grpo_divide_by_std=divide)
    made = episodes(config)
    totals = [sum(rewards) for _, rewards, _ in in_float64(made)]
    expected = []
    for row, (places, _, _) in enumerate(in_float64(made)):
        group = totals[row // 3 * 3 : row // 3 * 3 + 3]
        mean = sum(group) / 3
        deviation = math.sqrt(sum((total - mean) ** 2 for total in group) / 3) if divide else 1.0
        expected.append([(totals[row] - mean) / deviation] * len(places))
    check(config.estimator(made), made, expected)


@pytest.mark.parametrize("whiten", [None, True, False])
def test_reinforce_plus_plus_normalises_over_the_batch(whiten: bool | None) -> None:
    config = settings("reinforce++", whiten_advantages=whiten)
    made = episodes(config)
    sums = [to_go(rewards, 0.9) for _, rewards, _ in in_float64(made)]
    tokens = [number for row in sums for number in row]
    mean = sum(tokens) / len(tokens)
    variance = sum((number - mean) ** 2 for number in tokens) / len(tokens)
    deviation = 1.0 if whiten is False else math.sqrt(variance)
    check(config.estimator(made), made, [[(x - mean) / deviation for x in row] for row in sums])


@pytest.mark.parametrize("name", CRITIC_FREE)
def test_equal_scores_teach_nothing(name: str) -> None:
    config = settings(name, gamma=1.0)
    made = episodes(config, kl_coef=0.0)
    made.scores.fill_(0.1)
    assert config.estimator(made).advantages.abs().max() < 1e-3  # rounding by a deviation of 1e-4


def test_rewards_are_whitened_before_they_are_added_up() -> None:
    """Over all tokens to variance 1, around their mean; what is reported stays as it was."""
    config = settings("rloo", whiten_rewards=True)
    made = episodes(config)
    tokens = [reward for _, rewards, _ in in_float64(made) for reward in rewards]
    mean = sum(tokens) / len(tokens)
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in tokens) / len(tokens))
    totals = [sum((r - mean) / deviation + mean for r in row) for _, row, _ in in_float64(made)]
    expected = []
    for row, (places, _, _) in enumerate(in_float64(made)):
        group = totals[row // 3 * 3 : row // 3 * 3 + 3]
        # The mean of the two others is as far away as the mean of all three, and half as much.
        expected.append([1.5 * (totals[row] - sum(group) / 3)] * len(places))
    check(config.estimator(made), made, expected)


@pytest.mark.parametrize("name", CRITIC_FREE)
def test_training_without_a_critic(make_trainer: Any, tmp_path: Path, name: str) -> None:
    trainer = make_trainer(advantage_estimator=name, responses_per_prompt=2)
    assert trainer.critic is None
    assert trainer.models.critic is None
    experience = trainer.rollout(next(trainer.prompts))
    assert experience.values is None
    assert experience.returns is None
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    metrics = trainer.update(experience)
    assert not any(torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters()))
    of_critics = ("critic", "value", "explained", "return")
    assert not [figure for figure in metrics if figure.startswith(of_critics)]
    assert all(math.isfinite(value) for value in metrics.values())
    trainer.save()
    assert (tmp_path / "ppo" / "config.json").exists()
    assert not (tmp_path / "ppo" / "critic").exists()


def test_a_critic_that_nobody_needs_is_refused(make_trainer: Any) -> None:
    with pytest.raises(ValueError, match="'rloo' trains without a critic"):
        make_trainer(advantage_estimator="rloo", responses_per_prompt=2, critic=make_policy())


def test_the_responses_to_a_prompt_follow_one_another(make_trainer: Any) -> None:
    trainer = make_trainer(responses_per_prompt=4, advantage_estimator="grpo")
    prompts = next(trainer.prompts)
    assert len(prompts) == 2
    experience = trainer.rollout(prompts)
    assert len(experience) == 8
    assert experience.prompts == [prompts[0]] * 4 + [prompts[1]] * 4
    assert len({tuple(ids) for ids in experience.responses[:4].tolist()}) > 1
    # In two updates all the prompts of a pass once, and as many as a batch has room for.
    assert len(list(trainer.prompts)) == 2


def test_a_group_must_be_whole(make_trainer: Any) -> None:
    trainer = make_trainer(responses_per_prompt=4, advantage_estimator="grpo")
    part = trainer.rollout(next(trainer.prompts)).select([0, 1, 2])
    with pytest.raises(ValueError, match="3 responses are no multiple of responses_per_prompt=4"):
        trainer.estimate_advantages(part)


def test_an_estimator_of_ones_own(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class MeanBaseline(CriticFree):
        def advantages(self, rewards: Tensor, episodes: Episodes) -> Tensor:
            totals = rewards.sum(1)
            return episodes.for_each_token(totals - totals.mean())

    monkeypatch.setitem(ESTIMATORS, "mean", MeanBaseline())
    trainer = make_trainer(advantage_estimator="mean")
    made = trainer.rollout(next(trainer.prompts))
    expected = (made.scores - made.scores.mean())[:, None] * made.response_mask
    torch.testing.assert_close(made.advantages, expected, atol=1e-5, rtol=1e-5)
    trainer.update(made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage_estimator": "vtrace"}, "'vtrace' must be one of 'gae', 'rloo'"),
        ({"advantage_estimator": "rloo"}, "'rloo' compares .* at least 2; .* is 1"),
        ({"advantage_estimator": "grpo"}, "'grpo' compares .* at least 2; .* is 1"),
        ({"responses_per_prompt": 3}, "responses_per_prompt=3 does not divide batch_size=64"),
        ({"responses_per_prompt": 0}, "responses_per_prompt=0 must be"),
        (
            {"advantage_estimator": "reinforce++", "critic_lam": 1.0},
            "critic_lam=1.0 is for the critic",
        ),
        ({"critic_lam": 1.5}, "critic_lam=1.5 must be"),
        (
            {"advantage_estimator": "reinforce++", "critic_warmup_updates": 1},
            "critic_warmup_updates=1 is for the critic",
        ),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(**changes)
