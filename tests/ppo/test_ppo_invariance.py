"""How a batch is cut, padded and ordered changes no loss, no gradient and not the next policy.

On a tiny random model and on stories260k; for ranks see ``tests/distributed``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_ppo_update import assert_close_to_rounding, pad
from torch import Tensor

from rlhf.engine import micro_batches
from rlhf.ppo import Experience, PPOTrainer
from rlhf.ppo.metrics import UpdateStats
from rlhf.ppo.update import Step, loss_normalizer

MakeTrainer = Callable[..., PPOTrainer]
STORIES = ["Once upon a time", "Lily", "The big dog was", "One day, a girl"]
RATE = 1e-3
# What an experience is turned into, and the settings of micro-batches; each is compared with one
# micro-batch of all responses as they were sampled.
CHANGES: dict[str, tuple[Callable[[Experience], Experience], dict[str, Any]]] = {
    "micro-batches of 1": (lambda e: e, {"micro_batch_size": 1}),
    "micro-batches of 3": (lambda e: e, {"micro_batch_size": 3}),
    "a budget below one response": (lambda e: e, {"micro_batch_tokens": 1}),
    "a budget of a few responses": (lambda e: e, {"micro_batch_tokens": 60}),
    "more padding": (lambda e: pad(e, 3, 4), {}),
    "much more padding": (lambda e: pad(e, 17, 29), {"micro_batch_size": 2}),
    "backwards": (lambda e: e.select(list(range(len(e)))[::-1]), {"micro_batch_size": 3}),
    "shuffled": (lambda e: e.select([5, 2, 7, 0, 3, 6, 1, 4]), {"micro_batch_tokens": 60}),
}


@pytest.fixture(params=["tiny", "stories260k"])
def make(request: pytest.FixtureRequest, make_trainer: MakeTrainer) -> MakeTrainer:
    """Makes a trainer of 8 responses that are one minibatch, in one micro-batch unless told."""
    options: dict[str, Any] = {"batch_size": 8, "minibatch_size": 8, "epochs": 3}
    options |= {"learning_rate": RATE, "critic_learning_rate": RATE, "micro_batch_size": 8}
    options |= {"lr_schedule": "constant", "temperature": 0.8, "entropy_coef": 0.02}
    if request.param == "stories260k":
        folder = str(request.getfixturevalue("stories_dir"))
        options |= {"policy": folder, "tokenizer": folder, "prompts": STORIES, "max_new_tokens": 24}

    def made(**settings: Any) -> PPOTrainer:
        return make_trainer(**{**options, **settings})

    return made


def sampled(trainer: PPOTrainer) -> Experience:
    """Responses of several lengths, from a policy and a critic a little away from those trained."""
    experience = trainer.rollout(next(trainer.prompts))
    noise = torch.randn(experience.logprobs.shape, generator=torch.Generator().manual_seed(0))
    experience.logprobs = experience.logprobs + 0.2 * noise
    experience.ref_logprobs = experience.ref_logprobs - 0.1 * noise
    experience.values = experience.values + 0.2 * noise
    experience.response_mask[1, 5:] = False  # stories seldom end by themselves so early
    experience.response_mask[6, 2:] = False
    trainer.estimate_advantages(experience)
    assert len(experience.response_mask.sum(1).unique()) > 2
    return experience


def losses_and_gradients(
    trainer: PPOTrainer, experience: Experience
) -> tuple[dict[str, float], list[Tensor]]:
    """Of one optimizer step on the whole experience, both models', before it is taken."""
    config, lengths = trainer.config, experience.lengths()
    normalizer = loss_normalizer(experience, config.aggregation)
    step = Step(trainer.models, config, normalizer, UpdateStats(trainer.device))
    parts = micro_batches(
        range(len(experience)),
        [sum(both) for both in lengths],
        size=config.micro_batch_size,
        tokens=config.micro_batch_tokens,
    )
    losses: dict[str, float] = {}
    for name in step.order:
        step.terms = {}
        for part in parts:
            step.accumulate(name, experience.micro_batch(part, lengths))
        key = "value loss" if name == "critic" else "policy loss"
        losses[key] = step.terms[key].item()
    engines = trainer.models.trained.values()
    found = [p.grad.clone() for engine in engines for p in engine.parameters]
    for engine in engines:
        engine.discard()
    return losses, found


@pytest.mark.parametrize("change", CHANGES)
def test_losses_gradients_and_the_next_policy_stay(make: MakeTrainer, change: str) -> None:
    changed, settings = CHANGES[change]
    whole, cut = make(), make(**settings)
    experience = sampled(whole)
    other = changed(copy.deepcopy(experience))
    if "padding" in change:
        whole.estimate_advantages(other)  # rewards and advantages beside NaN in the padding

    losses, gradients = losses_and_gradients(whole, experience)
    found_losses, found_gradients = losses_and_gradients(cut, other)
    assert min(map(abs, losses.values())) > 1e-3  # there is something to compare
    assert found_losses == pytest.approx(losses, rel=2e-5)
    assert max(g.abs().max() for g in gradients) > 1e-3
    assert_close_to_rounding(found_gradients, gradients)

    # Three steps, each of the whole batch: the order of responses is all that a partition decides.
    before = [p.detach().clone() for p in whole.policy.parameters()]
    first, second = whole.update(experience), cut.update(other)
    for name in ("policy_loss", "value_loss", "approx_kl", "clip_fraction", "grad_norm", "entropy"):
        assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-5), name
    for model in ("policy", "critic"):
        pairs = zip(getattr(whole, model).parameters(), getattr(cut, model).parameters())
        for a, b in pairs:
            # Adam divides by the gradient's size plus 1e-5, so that rounding moves a weight by a
            # small share of the rate in each step; a wrong gradient would move it by all of it.
            torch.testing.assert_close(a, b, rtol=0, atol=3 * RATE * 0.03)
    moved = [(a - b).abs().max() for a, b in zip(before, whole.policy.parameters())]
    assert max(moved) > RATE


def test_a_wrong_share_would_be_seen(make: MakeTrainer) -> None:
    """What the bounds are worth: dividing by each micro-batch's own tokens goes beyond them."""
    trainer = make(micro_batch_size=3)
    experience = sampled(trainer)
    _, right = losses_and_gradients(trainer, experience)
    parts = [experience.select(rows) for rows in ([0, 1, 2], [3, 4, 5], [6, 7])]
    wrong = [torch.zeros_like(g) for g in right]
    for part in parts:
        _, gradients = losses_and_gradients(trainer, part)
        wrong = [a + b / len(parts) for a, b in zip(wrong, gradients)]
    with pytest.raises(AssertionError):
        assert_close_to_rounding(wrong, right)


@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 3}, {"micro_batch_tokens": 60}])
def test_no_tokens_ratio_is_off_before_the_first_step(
    make: MakeTrainer, settings: dict[str, Any]
) -> None:
    """One step, and a model that has already moved: the largest ratio is 1, and so is the mean."""
    trainer = make(epochs=1, minibatch_size=8, **settings)
    for prompts in trainer.prompts:
        metrics = trainer.update(trainer.rollout(prompts))
        assert metrics["optimizer_steps"] == 1
        # Log-probabilities of size 10 as float32, sums of some hundred products behind them.
        assert metrics["ratio_max"] == pytest.approx(1.0, abs=2e-5)
        assert metrics["ratio_mean"] == pytest.approx(1.0, abs=2e-6)
        assert metrics["approx_kl"] < 1e-10  # half the mean square of what is left
        assert metrics["clip_fraction"] == 0.0
    assert metrics["kl"] != pytest.approx(0.0, abs=1e-3)
