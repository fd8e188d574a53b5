"""Which steps an update takes: the early stop and the critic's warm-up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf.engine import World
from rlhf.ppo import PPOConfig
from rlhf.ppo.metrics import POLICY_FIGURES, VALUE_FIGURES, UpdateStats
from rlhf_kernels import PPOLossStats


def weights(model: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def unchanged(before: list[torch.Tensor], model: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def adam_steps(engine: Any) -> set[int]:
    return {int(state["step"]) for state in engine.optimizer.state.values()}


def test_a_step_too_far_is_the_last(make_trainer: Any) -> None:
    """A high learning rate leaves the bound with the second step; the first has ratio 1."""
    trainer = make_trainer(max_approx_kl=1e-4, learning_rate=1e-2, epochs=3)
    metrics = trainer.update(trainer.rollout(next(trainer.prompts)))
    assert metrics["optimizer_steps"] == 2
    assert metrics["early_stopped"] == 1
    assert metrics["first_step/approx_kl"] < 1e-8
    assert metrics["approx_kl"] > 0.5e-4  # the mean of the two steps'
    assert adam_steps(trainer.models.policy) == adam_steps(trainer.models.critic) == {2}
    # The schedules stand where they would without the stop.
    assert trainer.models.policy.steps_done == trainer.models.critic.steps_done == 6
    assert trainer.models.policy.learning_rate == pytest.approx(1e-2 / 2)


def test_within_the_bound_nothing_changes(make_trainer: Any) -> None:
    free, bound = make_trainer(), make_trainer(max_approx_kl=1e3)
    figures = [trainer.update(trainer.rollout(next(trainer.prompts))) for trainer in (free, bound)]
    assert figures[0]["optimizer_steps"] == figures[1]["optimizer_steps"] == 4
    assert figures[0]["early_stopped"] == figures[1]["early_stopped"] == 0
    assert unchanged(weights(free.policy), bound.policy)


def test_the_figure_is_the_mean_over_one_steps_tokens() -> None:
    """However its micro-batches were cut, and whatever the steps before it were."""
    stats = UpdateStats(torch.device("cpu"))
    nothing = PPOLossStats(*torch.zeros(len(PPOLossStats._fields)))
    steps = [[(3, 0.5)], [(1, 0.1), (4, 0.2), (5, 0.05)]]  # (tokens, KL) of each micro-batch
    for micro_batches in steps:
        for tokens, kl in micro_batches:
            found_there = nothing._replace(approx_kl_k3=torch.tensor(kl))
            stats.add(found_there, torch.tensor(tokens), POLICY_FIGURES)
            stats.add(nothing, torch.tensor(tokens), VALUE_FIGURES)  # counts no token twice
        found = stats.step_approx_kl(World())
        total = sum(tokens for tokens, _ in micro_batches)
        mean = sum(tokens * kl for tokens, kl in micro_batches) / total
        assert found == pytest.approx(mean, rel=1e-5)
        stats.end_step({}, {})


def test_in_the_warmup_only_the_critic_learns(make_trainer: Any) -> None:
    trainer = make_trainer(critic_warmup_updates=2, total_updates=4, kl_target=6.0, kl_horizon=8)
    policy, critic = weights(trainer.policy), weights(trainer.critic)
    for number, prompts in enumerate(trainer.prompts, start=1):
        metrics = trainer.update(trainer.rollout(prompts))
        assert unchanged(policy, trainer.policy) == (number <= 2)
        assert not unchanged(critic, trainer.critic)
        critic = weights(trainer.critic)
        assert ("grad_norm" in metrics) == (number > 2)
        if number <= 2:
            assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
            assert metrics["entropy"] > 0
            assert trainer.kl_control.coef == 0.1  # nothing to control yet
    # The policy's schedule covers its own steps: the first of them has the full rate.
    assert trainer.models.policy.steps_done == trainer.models.policy.total_steps == 8
    assert trainer.models.critic.steps_done == trainer.models.critic.total_steps == 16
    assert trainer.kl_control.coef < 0.1


def test_the_warmup_trains_the_critic_as_always(make_trainer: Any) -> None:
    """Its gradients do not depend on whether the policy learns beside it."""
    warm, usual = make_trainer(critic_warmup_updates=1), make_trainer()
    for trainer in (warm, usual):
        trainer.update(trainer.rollout(next(trainer.prompts)))
    assert unchanged(weights(warm.critic), usual.critic)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_approx_kl": 0.0}, "max_approx_kl=0.0 must be a number above 0"),
        ({"critic_warmup_updates": -1}, "critic_warmup_updates=-1 must be"),
        (
            {"critic_warmup_updates": 5, "total_updates": 5},
            "critic_warmup_updates=5 leaves the policy none of the total_updates=5",
        ),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings)


@pytest.mark.parametrize("name", ["ziegler2019", "tldr"])
def test_presets_are_configurations(name: str) -> None:
    config = PPOConfig.preset(name)
    assert (config.batch_size, config.epochs, config.steps_per_update) == (512, 4, 4)
    assert (config.gamma, config.lam, config.clip_range) == (1.0, 0.95, 0.2)
    assert config.kl_target == (6.0 if name == "ziegler2019" else None)
    assert PPOConfig.preset(name, batch_size=1024, seed=3).batch_size == 1024
    assert config.total_updates * config.batch_size == pytest.approx(1e6, rel=1e-3)


def test_an_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="preset='tldr2' must be one of 'ziegler2019', 'tldr'"):
        PPOConfig.preset("tldr2")
