"""The optimizer steps on an experience."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policy import make_policy
from torch import Tensor

from rlhf.engine import micro_batches
from rlhf.models import token_scores
from rlhf.ppo import Experience, PPOTrainer
from rlhf.ppo.metrics import UpdateStats
from rlhf.ppo.update import Step, loss_normalizer, minibatches, run_epochs

AGGREGATIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]


def gradients(
    trainer: PPOTrainer, experience: Experience, micro_batch_size: int, tokens: int | None = None
) -> list[Tensor]:
    """The gradients of one step on the whole experience, of policy and critic."""
    config = dataclasses.replace(trainer.config, micro_batch_size=micro_batch_size)
    engines = list(trainer.models.trained.values())
    lengths = experience.lengths()
    normalizer = loss_normalizer(experience, config.aggregation)
    step = Step(trainer.models, config, normalizer, UpdateStats(trainer.device))
    totals = [sum(both) for both in lengths]
    for part in micro_batches(range(len(experience)), totals, size=micro_batch_size, tokens=tokens):
        for name in step.order:
            step.accumulate(name, experience.micro_batch(part, lengths))
    found = [p.grad.clone() for engine in engines for p in engine.parameters]
    for engine in engines:
        engine.optimizer.zero_grad()
    return found


def pad(experience: Experience, left: int, right: int) -> Experience:
    """The same experience with more padding, and NaN in it wherever a number can stand."""
    changes = {}
    for field in dataclasses.fields(experience):
        value = getattr(experience, field.name)
        if torch.is_tensor(value) and value.dim() == 2:
            widths = (left, 0) if field.name.startswith("prompt_") else (0, right)
            is_float = value.is_floating_point()
            value = torch.nn.functional.pad(value, widths, value=float("nan") if is_float else 0)
            if is_float:
                mask = torch.nn.functional.pad(experience.response_mask, (0, right))
                value = value.masked_fill(~mask, float("nan"))
        changes[field.name] = value
    return Experience(**changes)


def assert_close_to_rounding(found: list[Tensor], expected: list[Tensor]) -> None:
    """Equal up to float32 rounding of sums over all tokens, relative to each tensor's size."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1e-3, b.abs().max().item()))


@pytest.mark.parametrize(
    "settings",
    [
        *[{"aggregation": aggregation} for aggregation in AGGREGATIONS],
        *[
            {"advantage_estimator": name, "responses_per_prompt": 2}
            for name in ("rloo", "reinforce++", "grpo")
        ],
        {"kl_placement": "loss", "kl_estimator": "k2", "reference": make_policy(1)},
    ],
)
def test_micro_batches_and_padding_do_not_change_gradients(
    make_trainer: Any, settings: dict[str, Any]
) -> None:
    trainer = make_trainer(**settings)
    experience = trainer.rollout(trainer.rows)
    assert experience.response_mask.sum(1).unique().numel() > 2  # lengths differ
    expected = gradients(trainer, experience, len(experience))
    assert all(g.abs().max() > 0 for g in expected[:1])
    for size in (1, 2, 4):
        assert_close_to_rounding(gradients(trainer, experience, size), expected)
    for budget in (1, 20, 45):
        assert_close_to_rounding(gradients(trainer, experience, 8, budget), expected)
    backwards = experience.select(list(range(len(experience)))[::-1])
    assert_close_to_rounding(gradients(trainer, backwards, 3), expected)
    padded = pad(experience, 3, 4)
    trainer.estimate_advantages(padded)
    assert_close_to_rounding(gradients(trainer, padded, 2), expected)


def test_a_real_models_gradients_do_not_change_either(make_trainer: Any, stories_dir: Path) -> None:
    trainer = make_trainer(
        policy=str(stories_dir),
        tokenizer=str(stories_dir),
        prompts=["Once upon a time", "Lily", "The big dog was", "One day, a girl"],
        batch_size=8,
        max_new_tokens=24,
    )
    experience = trainer.rollout(next(trainer.prompts))
    expected = gradients(trainer, experience, len(experience))
    assert max(g.abs().max() for g in expected) > 1e-3
    for size, budget in ((1, None), (3, None), (8, 60)):
        assert_close_to_rounding(gradients(trainer, experience, size, budget), expected)
    padded = pad(experience, 3, 4)
    trainer.estimate_advantages(padded)
    assert_close_to_rounding(gradients(trainer, padded, 2), expected)
    stats = run_epochs(experience, trainer.models, trainer.config, seed=0)
    assert stats.on_device()["first_step/ratio_mean"].item() == pytest.approx(1.0, abs=1e-5)


def test_micro_batches_and_padding_do_not_change_the_next_policy(make_trainer: Any) -> None:
    first = make_trainer(micro_batch_size=1)
    experience = first.rollout(first.rows + first.rows[:2])
    second = make_trainer(micro_batch_size=8, micro_batch_tokens=40)
    first.update(experience)
    second.update(pad(experience, 2, 3))
    # Adam divides by the gradient's size plus 1e-5: rounding moves a weight by a small share of
    # the learning rate, 1e-3, in each of the four steps.
    for model in ("policy", "critic"):
        for a, b in zip(getattr(first, model).parameters(), getattr(second, model).parameters()):
            torch.testing.assert_close(a, b, rtol=0, atol=4 * 1e-3 * 0.02)


def test_gradients_are_those_of_the_formula(make_trainer: Any) -> None:
    """The loss written out on whole forwards of the models, the old policy a step away."""
    trainer = make_trainer(
        temperature=0.8, entropy_coef=0.05, clip_range=0.1, value_clip_range=0.05
    )
    experience = trainer.rollout(trainer.rows)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(experience.logprobs.shape, generator=generator)
    experience.logprobs = experience.logprobs + 0.2 * noise
    experience.values = experience.values + 0.2 * noise
    found = gradients(trainer, experience, 2)

    width = experience.prompt_ids.shape[1]
    ids = torch.cat([experience.prompt_ids, experience.responses], 1)
    attention = torch.cat([experience.prompt_mask, experience.response_mask], 1).long()
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    logits = trainer.policy(ids, attention_mask=attention, position_ids=positions).logits
    logp = (logits[:, width - 1 : -1] / 0.8).log_softmax(-1)
    chosen = logp.gather(2, experience.responses[..., None]).squeeze(2)
    entropy = -(logp.exp() * logp).sum(-1)
    values = token_scores(trainer.critic, ids, attention)[:, width - 1 : -1]
    ratio = (chosen - experience.logprobs).exp()
    a, old, target = experience.advantages, experience.values, experience.returns
    policy_loss = -torch.minimum(ratio * a, ratio.clamp(0.9, 1.1) * a)
    clipped = old + (values - old).clamp(-0.05, 0.05)
    value_loss = 0.5 * torch.maximum((values - target) ** 2, (clipped - target) ** 2)
    losses = policy_loss + 0.5 * value_loss - 0.05 * entropy
    losses[experience.response_mask].mean().backward()
    engines = trainer.models.policy, trainer.models.critic
    assert_close_to_rounding(found, [p.grad for engine in engines for p in engine.parameters])


def test_the_first_ratio_is_one(make_trainer: Any) -> None:
    trainer = make_trainer()
    metrics = trainer.update(trainer.rollout(trainer.rows))
    # Log-probabilities of up to 30, computed twice in float32, in different batches.
    assert metrics["first_step/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["first_step/approx_kl"] == pytest.approx(0.0, abs=1e-8)
    assert metrics["ratio_max"] > 1.001  # later steps moved


@pytest.mark.parametrize(("epochs", "minibatch_size", "steps"), [(1, 8, 1), (3, 4, 6), (2, 1, 16)])
def test_the_number_of_optimizer_steps(
    make_trainer: Any, epochs: int, minibatch_size: int, steps: int
) -> None:
    trainer = make_trainer(epochs=epochs, minibatch_size=minibatch_size, micro_batch_size=2)
    assert trainer.models.policy.total_steps == 2 * steps
    trainer.update(trainer.rollout(next(trainer.prompts)))
    assert trainer.models.policy.steps_done == trainer.models.critic.steps_done == steps
    optimizer = trainer.models.policy.optimizer
    assert {int(state["step"]) for state in optimizer.state.values()} == {steps}


def test_every_epoch_uses_every_response_once_in_a_new_order(make_trainer: Any) -> None:
    config = make_trainer(epochs=3).config
    steps = list(minibatches(8, config, seed=1))
    assert [len(rows) for rows in steps] == [4] * 6
    epochs = [steps[i] + steps[i + 1] for i in (0, 2, 4)]
    assert all(sorted(rows) == list(range(8)) for rows in epochs)
    assert epochs[0] != epochs[1]
    assert steps == list(minibatches(8, config, seed=1))
    assert steps != list(minibatches(8, config, seed=2))


def test_policy_and_critic_are_clipped_apart(make_trainer: Any) -> None:
    """A critic with huge gradients leaves the policy's step as it was."""
    calm, wild = make_trainer(epochs=1, minibatch_size=8), make_trainer(epochs=1, minibatch_size=8)
    experience = calm.rollout(next(calm.prompts))
    shaken = copy.deepcopy(experience)
    shaken.returns = shaken.returns * 1e4
    first, second = calm.update(experience), wild.update(shaken)
    assert second["critic_grad_norm"] > 100 * first["critic_grad_norm"]
    assert second["grad_norm"] == first["grad_norm"]
    for a, b in zip(calm.policy.parameters(), wild.policy.parameters()):
        assert torch.equal(a, b)


def test_statistics_are_means_over_all_tokens_of_all_steps(make_trainer: Any) -> None:
    """Micro-batches of any size report the same figures."""
    figures = []
    for size in (1, 8):
        trainer = make_trainer(micro_batch_size=size, clip_range=0.01)
        experience = trainer.rollout(next(trainer.prompts))
        config = trainer.config
        stats = run_epochs(experience, trainer.models, config, seed=0)
        figures.append({k: v.item() for k, v in stats.on_device().items()})
    assert figures[0]["clip_fraction"] > 0.1
    for name, value in figures[0].items():
        assert value == pytest.approx(figures[1][name], rel=2e-3, abs=2e-5), name


@pytest.mark.parametrize("name", ["responses", "advantages", "values", "prompt_ids", "ended"])
def test_a_changed_experience_that_does_not_fit_is_named(make_trainer: Any, name: str) -> None:
    trainer = make_trainer()
    experience = trainer.rollout(trainer.rows)
    setattr(experience, name, getattr(experience, name)[:-1])
    weights = [p.detach().clone() for p in trainer.policy.parameters()]
    with pytest.raises(
        ValueError, match=rf"{name} of the experience has shape \(5,.*expected \(6,"
    ):
        trainer.update(experience)
    assert all(map(torch.equal, weights, trainer.policy.parameters()))
    assert trainer.updates_done == 0
