"""From the reward's scores to those that are trained on."""

from __future__ import annotations

import json
import random
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.ppo import PPOConfig
from rlhf.ppo.score_shaping import Moments, ScoreShaper

SCORES = torch.tensor([3.0, 1.0, -4.0, 8.0])
ENDED = torch.tensor([True, False, True, True])
LENGTHS = torch.tensor([2, 3, 1, 4])
# Moments and division in float64, rounded once to float32.
CLOSE = {"rtol": 1e-6, "atol": 1e-7}


def shape(scores: Tensor = SCORES, **settings: Any) -> list[float]:
    return ScoreShaper(PPOConfig(**settings)).shape(scores, ENDED, LENGTHS).tolist()


def test_scores_are_left_alone_by_default() -> None:
    assert shape() == SCORES.tolist()


def test_each_step_alone() -> None:
    assert shape(score_clip=2.5) == [2.5, 1.0, -2.5, 2.5]
    assert shape(missing_eos_penalty=2.0) == [3.0, -1.0, -4.0, 8.0]
    assert shape(missing_eos_score=-7.0) == [3.0, -7.0, -4.0, 8.0]
    assert shape(length_penalty=0.5) == [2.0, -0.5, -4.5, 6.0]
    mean, deviation = 2.0, statistics.pstdev(SCORES.tolist())
    assert shape(score_normalization="batch") == pytest.approx(
        [(score - mean) / deviation for score in SCORES.tolist()], rel=1e-6
    )


def test_the_order_of_the_steps() -> None:
    """Normalised, clipped in deviations, replaced as it stands, and each token paid for at last."""
    deviation = statistics.pstdev(SCORES.tolist())
    found = shape(
        score_normalization="batch", score_clip=1.0, missing_eos_score=-3.0, length_penalty=0.1
    )
    first, third = (3.0 - 2.0) / deviation, -1.0
    assert found == pytest.approx([first - 0.2, -3.0 - 0.3, third - 0.1, 1.0 - 0.4], rel=1e-6)


def test_a_score_that_is_no_number_is_not_remembered() -> None:
    shaper, expected = (ScoreShaper(PPOConfig(score_normalization="running")) for _ in range(2))
    expected.remember(torch.tensor([1.0, 4.0]))
    shaper.remember(torch.tensor([1.0, torch.nan, 4.0, torch.inf]))
    assert shaper.state_dict() == expected.state_dict()


def test_moments_in_parts_are_those_of_the_whole() -> None:
    generator = random.Random(0)
    numbers = [1000.0 + generator.gauss(0, 0.1) for _ in range(60)]
    parts = [numbers[:1], numbers[1:1], numbers[1:40], numbers[40:]]
    moments = Moments()
    for part in parts:
        moments = moments.including(torch.tensor(part, dtype=torch.float64))
    assert moments.count == 60
    assert moments.mean == pytest.approx(statistics.fmean(numbers), rel=1e-14)
    # Around 1000, float64 holds a deviation of 0.1 to 1e-12 of itself.
    assert moments.variance == pytest.approx(statistics.pvariance(numbers), rel=1e-10)


def test_running_normalisation_counts_all_scores_so_far_and_this_batch() -> None:
    shaper = ScoreShaper(PPOConfig(score_normalization="running"))
    batches = [SCORES, SCORES * 3 + 1, SCORES - 5]
    seen: list[float] = []
    for scores in batches:
        seen += scores.tolist()
        expected = (scores - statistics.fmean(seen)) / statistics.pstdev(seen)
        for _ in range(2):  # asking again changes nothing
            torch.testing.assert_close(shaper.shape(scores, ENDED, LENGTHS), expected, **CLOSE)
        shaper.remember(scores)
    assert shaper.moments.count == 12


def test_equal_scores_become_zero() -> None:
    equal = torch.full((4,), 0.1)
    assert shape(equal, score_normalization="batch") == pytest.approx([0.0] * 4, abs=1e-6)


def test_state_goes_through_json() -> None:
    settings = PPOConfig(score_normalization="running")
    shaper, other = ScoreShaper(settings), ScoreShaper(settings)
    shaper.remember(SCORES)
    other.load_state_dict(json.loads(json.dumps(shaper.state_dict())))
    arguments = (SCORES + 2, ENDED, LENGTHS)
    assert torch.equal(other.shape(*arguments), shaper.shape(*arguments))
    assert not torch.equal(other.shape(*arguments), ScoreShaper(settings).shape(*arguments))


def test_only_an_update_is_remembered(make_trainer: Any) -> None:
    trainer = make_trainer(score_normalization="running")
    experience = trainer.rollout(next(trainer.prompts))
    first = experience.rewards.clone()
    trainer.rollout(next(trainer.prompts))
    trainer.estimate_advantages(experience)
    assert torch.equal(experience.rewards, first)
    trainer.update(experience)
    assert trainer.score_shaper.moments.count == len(experience)
    assert trainer.score_shaper.moments.mean == pytest.approx(experience.scores.mean().item())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"missing_eos_score": -1.0, "missing_eos_penalty": 1.0}, "give one of the two"),
        ({"score_clip": 0.0}, "score_clip=0.0 must be a number above 0"),
        ({"score_normalization": "rank"}, "score_normalization='rank' must be one of"),
        ({"length_penalty": -1.0}, "length_penalty=-1.0 must be"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings)
