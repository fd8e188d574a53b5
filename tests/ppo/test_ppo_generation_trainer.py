"""How a trainer samples: its settings, its backend, an engine of the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tiny_models import tiny_tokenizer
from tiny_policy import make_policy
from tiny_sampling import EOS, rows

from rlhf.ppo import PPOConfig, PPOTrainer

MakeTrainer = Callable[..., PPOTrainer]


def first_rollout(trainer: PPOTrainer) -> Any:
    return trainer.rollout(next(trainer.prompts))


def test_both_backends_give_the_same_rollout(make_trainer: MakeTrainer) -> None:
    expected = first_rollout(make_trainer())
    made = first_rollout(make_trainer(generation_backend="continuous", generation_batch_size=3))
    assert rows(made) == rows(expected)
    assert made.texts == expected.texts
    assert made.scores.tolist() == expected.scores.tolist()


@pytest.mark.parametrize("backend", ["generate", "continuous"])
def test_a_rollout_stops_at_stop_strings_and_trains_what_stopped_it(
    make_trainer: MakeTrainer, backend: str
) -> None:
    free = first_rollout(make_trainer())
    long = next(text.split() for text in free.texts if len(text.split()) > 4)
    seen: list[str] = []

    def reward(prompts: list[Any], responses: list[str]) -> list[float]:
        seen.extend(responses)
        return [float(len(response)) for response in responses]

    stops = [f" {long[2]}"]
    trainer = make_trainer(reward=reward, stop_strings=stops, generation_backend=backend)
    experience = first_rollout(trainer)
    assert seen == experience.texts
    assert " ".join(long[:2]) in seen
    row = seen.index(" ".join(long[:2]))
    assert experience.ended[row]
    assert tiny_tokenizer().decode(rows(experience)[row]) == " ".join(long[:3])
    metrics = trainer.update(experience)
    assert metrics["first_step/ratio_mean"] == pytest.approx(1, abs=1e-5)


def test_a_trainer_samples_with_another_engine(make_trainer: MakeTrainer) -> None:
    """Whose ids no tokenizer would give: they go into training as they are."""
    made = make_trainer()
    calls: list[Any] = []

    def engine(policy: Any, tokenizer: Any, prompts: Any, settings: Any, **rest: Any) -> Any:
        calls.append((policy, settings.temperature, rest["row_numbers"]))
        return [[127, 0, 5 + row, EOS, 9] for row in rest["row_numbers"]]

    trainer = PPOTrainer(
        PPOConfig(**{**vars(made.config), "temperature": 0.7}),
        make_policy(),
        tiny_tokenizer(),
        [{"prompt": "w1 w2"}],
        lambda prompts, responses: [0.0] * len(responses),
        sampler=engine,
    )
    experience = first_rollout(trainer)
    assert rows(experience) == [[127, 0, 5 + row, EOS] for row in range(8)]
    assert calls == [(trainer.policy, 0.7, list(range(8)))]
    assert trainer.update(experience)["eos_rate"] == 1
