"""Best-of-n sampling."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import tiny_tokenizer
from tiny_policy import make_policy

from rlhf.best_of import best_of_n
from rlhf.data import DataError
from rlhf.models import ModelError
from rlhf.ppo import GenerationSettings, RewardError

PROMPTS = [{"prompt": "w1", "sign": 1}, {"prompt": "w2 w3 w4", "sign": -1}]
SETTINGS = GenerationSettings(max_new_tokens=10, dtype="float32")


def words(prompts: list[str], responses: list[str], sign: list[int]) -> list[float]:
    return [s * float(len(text.split())) for s, text in zip(sign, responses)]


def run(n: int = 6, prompts: Any = PROMPTS, reward: Any = words, **options: Any) -> Any:
    options = {"tokenizer": tiny_tokenizer(), "settings": SETTINGS, "template": "none", **options}
    return best_of_n(make_policy(), prompts, reward, n, **options)


def test_the_best_of_the_candidates_is_returned() -> None:
    results = run()
    assert [result.prompt for result in results] == ["w1", "w2 w3 w4"]
    for result, sign in zip(results, (1, -1)):
        assert len(result.candidates) == 6
        scores = [score for _, score in result.candidates]
        assert scores == [sign * len(text.split()) for text, _ in result.candidates]
        assert len(set(scores)) > 1
        assert result.best_score == max(scores)
        assert (result.best, result.best_score) == result.candidates[scores.index(max(scores))]


def test_seed_decides() -> None:
    assert run(seed=3) == run(seed=3)
    assert run(seed=3) != run(seed=4)


def test_batches_may_cut_a_prompts_candidates() -> None:
    settings = GenerationSettings(max_new_tokens=10, greedy=True, batch_size=4, dtype="float32")
    for result in run(n=3, settings=settings):
        assert len({text for text, _ in result.candidates}) == 1


def test_wrong_arguments_are_clear_errors() -> None:
    for n in (0, 2.5, True, "3"):
        with pytest.raises(ValueError, match=f"n={n!r} must be a whole number at least 1"):
            run(n=n)
    for seed in (-1, 2**70, 0.5):
        with pytest.raises(ValueError, match=f"seed={seed}"):
            run(seed=seed)
    with pytest.raises(TypeError, match="the reward is str"):
        run(reward="heuristic")
    with pytest.raises(ModelError, match="tokenizer="):
        run(tokenizer=None)
    with pytest.raises(RewardError, match="'w1'"):
        run(reward=lambda prompts, responses: [float("nan")] * len(responses))
    for length, rest in ((60, "leaves 54"), (80, "leaves 54")):  # 80 alone is beyond the 64
        with pytest.raises(DataError, match=f"row 2: the prompt has {length} tokens.*{rest}"):
            run(prompts=["w1", " ".join(["w1"] * length)])
