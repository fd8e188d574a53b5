"""Where the critic comes from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_llama, tiny_tokenizer
from tiny_policy import make_policy

from rlhf.models import ModelError, scalar_model_from_causal
from rlhf.ppo import PPOTrainer
from rlhf.reward_model import RewardModel


def make_reward(tokenizer: Any = None) -> RewardModel:
    model = scalar_model_from_causal(tiny_llama(5), seed=5)
    model.config.reward_mean = 0.5
    model.config.pad_token_id = 1
    return RewardModel(model, tokenizer or tiny_tokenizer(), template="none")


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def one_update(trainer: PPOTrainer) -> dict[str, float]:
    return trainer.update(trainer.rollout(next(trainer.prompts)))


def test_the_critic_starts_as_a_copy_of_the_reward_model(make_trainer: Any) -> None:
    reward = make_reward()
    before = state(reward.model)
    trainer = make_trainer(reward=reward)
    assert same(state(trainer.critic), before)
    assert trainer.critic.config.reward_mean == 0.5
    one_update(trainer)
    assert same(state(reward.model), before)  # the judge did not learn along
    assert not same(state(trainer.critic), before)


def test_scores_are_the_reward_models_own(make_trainer: Any) -> None:
    reward = make_reward()
    trainer = make_trainer(reward=reward)
    made = trainer.rollout(next(trainer.prompts))
    expected = reward.score([row["prompt"] for row in made.prompts], made.texts)
    torch.testing.assert_close(made.scores, torch.tensor(expected))


def test_a_reward_model_with_another_tokenizer_does_not_start_it(make_trainer: Any) -> None:
    other = tiny_tokenizer()
    other.add_tokens(["more"])
    reward, policy = make_reward(other), make_policy()
    trainer = make_trainer(reward=reward, policy=policy)
    assert same(state(trainer.critic.model), state(policy.model))
    one_update(trainer)  # and its scores still count


def test_without_a_reward_model_it_starts_from_the_policy_with_values_of_0(
    make_trainer: Any,
) -> None:
    policy = make_policy()
    trainer = make_trainer(policy=policy)
    assert same(state(trainer.critic.model), state(policy.model))
    made = trainer.rollout(next(trainer.prompts))
    assert not made.values.any()
    metrics = trainer.update(made)
    assert metrics["critic_grad_norm"] > 0
    assert trainer.rollout(next(trainer.prompts)).values.any()


def test_a_given_critic_is_trained_in_place(make_trainer: Any) -> None:
    critic = scalar_model_from_causal(tiny_llama(7))
    trainer = make_trainer(critic=critic)
    assert trainer.critic is critic
    reward = make_reward()
    assert make_trainer(reward=reward, critic=reward.model).critic is not reward.model


def test_a_reward_model_can_be_the_critic(make_trainer: Any) -> None:
    judge, reward = make_reward(), make_reward()
    assert make_trainer(reward=reward, critic=judge).critic is judge.model
    before = state(reward.model)
    trainer = make_trainer(reward=reward, critic=reward)
    one_update(trainer)
    assert same(state(reward.model), before)
    assert not same(state(trainer.critic), before)


def test_a_critic_of_a_smaller_vocabulary_is_refused(make_trainer: Any) -> None:
    small = tiny_llama()
    small.resize_token_embeddings(64)
    with pytest.raises(ModelError, match="knows 64 token ids and the policy 128"):
        make_trainer(critic=scalar_model_from_causal(small))


def test_the_critic_has_its_own_learning_rate(make_trainer: Any) -> None:
    metrics = one_update(make_trainer(critic_learning_rate=5e-3, lr_schedule="constant"))
    assert metrics["critic_learning_rate"] == pytest.approx(5e-3)
    assert metrics["learning_rate"] == pytest.approx(1e-3)
