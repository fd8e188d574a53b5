"""Calling rewards and checking what they return."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_llama

from rlhf import HeuristicReward, WeightedRewards
from rlhf.ppo.scoring import RewardError, check_reward, score_responses

ROWS = [{"prompt": "first prompt", "topic": "a"}, {"prompt": "second prompt", "topic": "b"}]
TEXTS = ["one", "two"]


@pytest.mark.parametrize(
    "returned",
    [[1, 2.5], (1.0, 2.5), np.array([1.0, 2.5]), torch.tensor([1.0, 2.5]), iter([1, 2.5])],
)
def test_lists_arrays_and_tensors_are_scores(returned: Any) -> None:
    scores = score_responses(lambda prompts, responses: returned, ROWS, TEXTS)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1.0, 2.5]


HUGE = pytest.param(10**5000, id="an int that Python does not print")


@pytest.mark.parametrize(
    "bad", [nan, inf, 1e300, 10**400, HUGE, None, "good", "2.5", b"2.5", [1.0]]
)
def test_a_bad_score_names_its_prompt(bad: Any) -> None:
    with pytest.raises(RewardError, match=r"response 2 of 2.*'second prompt'"):
        score_responses(lambda prompts, responses: [1.0, bad], ROWS, TEXTS)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_scores_is_an_error(count: int) -> None:
    with pytest.raises(RewardError, match=f"{count} scores for 2 responses.*'first prompt'"):
        score_responses(lambda prompts, responses: [1.0] * count, ROWS, TEXTS)


@pytest.mark.parametrize(
    "returned",
    [None, 1.0, "12", b"12", {1.0, 2.0}, {"a": 1, "b": 2}, torch.tensor(1.0)],
)
def test_something_else_than_a_list_is_an_error(returned: Any) -> None:
    with pytest.raises(RewardError, match="a list with one number for each"):
        score_responses(lambda prompts, responses: returned, ROWS, TEXTS)


def test_an_exception_in_the_reward_is_named_and_kept() -> None:
    def broken(prompts: list[str], responses: list[str]) -> list[float]:
        raise KeyError("lexicon")

    with pytest.raises(RewardError, match=r"KeyError: 'lexicon'.*'first prompt'") as error:
        score_responses(broken, ROWS, TEXTS)
    assert isinstance(error.value.__cause__, KeyError)


def test_a_generator_that_fails_on_its_way_is_named() -> None:
    def halfway(prompts: list[str], responses: list[str]) -> Any:
        yield 1.0
        raise KeyError("lexicon")

    with pytest.raises(RewardError, match=r"KeyError: 'lexicon'"):
        score_responses(halfway, ROWS, TEXTS)


@pytest.mark.parametrize("reward", [3.0, None, "runs/reward", [1.0], dict, tiny_llama()])
def test_what_cannot_be_a_reward_is_said(reward: Any) -> None:
    with pytest.raises(TypeError, match=r"give a RewardModel .* or a function"):
        check_reward(reward)


def test_columns_go_to_rewards_that_take_them() -> None:
    seen: dict[str, Any] = {}

    def all_columns(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        seen.update(columns, prompts=prompts, responses=responses)
        return [0.0, 0.0]

    def named(prompts: list[str], responses: list[str], topic: list[str]) -> list[float]:
        return [float(t == "b") for t in topic]

    def none(prompts: list[str], responses: list[str]) -> list[float]:
        return [3.0, 4.0]

    score_responses(all_columns, ROWS, TEXTS)
    assert seen == {
        "topic": ["a", "b"],
        "prompts": ["first prompt", "second prompt"],
        "responses": TEXTS,
    }
    assert score_responses(named, ROWS, TEXTS).tolist() == [0.0, 1.0]
    assert score_responses(none, ROWS, TEXTS).tolist() == [3.0, 4.0]


def test_a_column_called_like_a_rewards_own_parameter_is_never_lost() -> None:
    rows = [{**row, "responses": n} for n, row in enumerate(ROWS)]

    def clashing(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        return [0.0, 0.0]

    def apart(prompts: list[str], responses: list[str], /, **columns: Any) -> list[float]:
        return [float(n) for n in columns["responses"]]

    def none(prompts: list[str], responses: list[str]) -> list[float]:
        return [3.0, 4.0]

    with pytest.raises(RewardError, match=r"has a column 'responses', .*; rename one of them"):
        score_responses(clashing, rows, TEXTS)
    assert score_responses(apart, rows, TEXTS).tolist() == [0.0, 1.0]
    assert score_responses(none, rows, TEXTS).tolist() == [3.0, 4.0]
    assert score_responses(WeightedRewards({"it": (apart, 2.0)}), rows, TEXTS).tolist() == [
        0.0,
        2.0,
    ]
    score_responses(HeuristicReward(), rows, TEXTS)  # takes columns and looks at none
