"""The coefficient of the KL penalty, and where the penalty stands."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import pytest
import torch
from tiny_policy import make_policy

from rlhf.ppo import PPOConfig
from rlhf.ppo.forward import response_logprobs
from rlhf.ppo.kl_control import KLController
from rlhf.ppo.metrics import UpdateStats
from rlhf.ppo.update import Step


def test_a_fixed_coefficient_stays() -> None:
    control = KLController(0.1)
    control.update(100.0, 512)
    assert control.coef == 0.1


@pytest.mark.parametrize(
    ("kl", "error"),
    [(6.0, 0.0), (6.6, 0.1), (5.4, -0.1), (7.2, 0.2), (60.0, 0.2), (0.0, -0.2), (-1.0, -0.2)],
)
def test_the_coefficient_follows_the_formula(kl: float, error: float) -> None:
    control = KLController(0.15, target=6.0, horizon=10000)
    control.update(kl, 512)
    assert control.coef == pytest.approx(0.15 * (1 + error * 512 / 10000), rel=1e-12)
    control.update(kl, 256)
    expected = 0.15 * (1 + error * 512 / 10000) * (1 + error * 256 / 10000)
    assert control.coef == pytest.approx(expected, rel=1e-12)


def test_the_papers_constant_is_a_horizon_of_ten_batches() -> None:
    control = KLController(1.0, target=6.0, horizon=10 * 64)
    control.update(100.0, 64)
    assert control.coef == pytest.approx(1 + 0.1 * 0.2, rel=1e-12)


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_divergence_that_is_no_number_is_refused(kl: float) -> None:
    control = KLController(0.1, target=6.0)
    with pytest.raises(ValueError, match=f"512 responses is {kl}"):
        control.update(kl, 512)
    assert control.coef == 0.1


def test_state_goes_through_json() -> None:
    control = KLController(0.1, target=6.0)
    control.update(9.0, 500)
    other = KLController(0.1, target=6.0)
    other.load_state_dict(json.loads(json.dumps(control.state_dict())))
    assert other.coef == control.coef != 0.1


def test_the_trainer_uses_and_adapts_its_coefficient(make_trainer: Any) -> None:
    """The first update has KL 0 and so lowers it; that of a rollout counts in its update."""
    trainer = make_trainer(kl_coef=0.3, kl_target=0.05, kl_horizon=16, total_updates=3)
    used, expected = [], 0.3
    for prompts in trainer.prompts:
        made = trainer.rollout(prompts)
        assert made.kl_coef == trainer.kl_control.coef == pytest.approx(expected, rel=1e-6)
        sums = (made.logprobs - made.ref_logprobs).sum(1) * -made.kl_coef
        torch.testing.assert_close(made.rewards.sum(1), made.scores + sums, atol=1e-5, rtol=1e-5)
        metrics = trainer.update(made)
        used.append(metrics["kl_coef"])
        assert metrics["kl_coef"] == made.kl_coef
        error = min(max(metrics["kl"] / 0.05 - 1, -0.2), 0.2)
        expected *= 1 + error * len(made) / 16
    assert used[1] == pytest.approx(0.3 * (1 - 0.2 * 8 / 16), rel=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_penalty_in_the_loss_has_the_estimates_gradient(
    make_trainer: Any, estimator: str
) -> None:
    """With equal scores and no critic nothing else is left of the loss."""
    trainer = make_trainer(
        reference=make_policy(1),
        reward=lambda prompts, responses: [0.5] * len(responses),
        advantage_estimator="rloo",
        responses_per_prompt=2,
        kl_placement="loss",
        kl_estimator=estimator,
        kl_coef=0.7,
        entropy_coef=0.0,
    )
    made = trainer.rollout(next(trainer.prompts))
    mask, engine = made.response_mask, trainer.models.policy
    torch.testing.assert_close(made.rewards.sum(1), made.scores)  # no penalty there
    assert not made.advantages.any()
    stats = UpdateStats(engine.device)
    Step(trainer.models, trainer.config, mask.sum().float(), stats).accumulate("policy", made)
    found = [p.grad.clone() for p in engine.parameters]
    engine.discard()

    r = response_logprobs(trainer.policy, made, 1.0) - made.ref_logprobs
    estimate = {"k1": r, "k2": r**2 / 2, "k3": (-r).exp() - 1 + r}[estimator]
    (0.7 * estimate[mask].mean()).backward()
    for a, b in zip(found, [p.grad for p in engine.parameters], strict=True):
        # Sums of float32 products over 80 tokens, in another order.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


def test_the_trainers_coefficient_weighs_the_penalty_in_the_loss(make_trainer: Any) -> None:
    """Not the setting's, which is only its first value."""
    steps = []
    for coefficient in (0.1, 0.1, 5.0):
        trainer = make_trainer(
            reference=make_policy(1), kl_placement="loss", kl_estimator="k2", kl_target=6.0
        )
        trainer.kl_control.coef = coefficient
        trainer.update(trainer.rollout(next(trainer.prompts)))
        steps.append(trainer.policy.lm_head.weight.detach().clone())
    assert torch.equal(steps[0], steps[1])
    assert not torch.allclose(steps[0], steps[2], atol=1e-4)


def test_k1_in_the_loss_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        PPOConfig(kl_placement="loss", kl_estimator="k3")
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        PPOConfig(kl_placement="loss")
    assert "choose k2 or k3" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_target=6.0 multiplies kl_coef, which is 0"),
        ({"kl_target": 0.0}, "kl_target=0.0 must be a number above 0"),
        ({"kl_target": 6.0, "kl_horizon": 63}, "kl_horizon=63 is less than one batch of 64"),
        ({"kl_placement": "both"}, "kl_placement='both' must be one of 'reward', 'loss'"),
        ({"kl_placement": "loss", "kl_estimator": "abs"}, "'abs' works in the reward only"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings)
