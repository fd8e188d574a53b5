"""A rollout's forward passes, kept for the update's first step."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import rlhf.ppo.update as update_module
from rlhf.ppo import Experience, PPOTrainer

WHOLE = {"minibatch_size": 8, "micro_batch_size": 8}
TRUNKS = {
    "critic": ({}, "critic", "response_values"),
    "policy": ({}, "policy", "response_hidden"),
    "shared": ({"critic_choice": "shared"}, "policy", "response_hidden"),
    "none": (
        {"advantage_estimator": "rloo", "responses_per_prompt": 2},
        "policy",
        "response_hidden",
    ),
}


@pytest.fixture(params=TRUNKS)
def case(request: Any, make_trainer: Any) -> tuple[Callable[..., PPOTrainer], str, str]:
    """What makes a trainer, one of the models that it trains, and the function that runs it."""
    settings, name, function = TRUNKS[request.param]
    return lambda **more: make_trainer(**settings, **{**WHOLE, **more}), name, function


def passes(function: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with every forward pass of an update."""
    seen: list[int] = []
    plain = getattr(update_module, function)

    def counted(*args: Any) -> Any:
        seen.append(1)
        return plain(*args)

    monkeypatch.setattr(update_module, function, counted)
    return seen


def weights(trainer: PPOTrainer) -> list[torch.Tensor]:
    return [p.detach().clone() for engine in trainer.engines.values() for p in engine.parameters]


def test_the_first_step_does_not_run_it_again(case: Any, monkeypatch: Any) -> None:
    make, name, function = case
    trainer = make()
    experience = trainer.rollout(trainer.rows[:4])
    assert trainer.engines[name] in [kept.engine for kept in experience.kept]
    seen = passes(function, monkeypatch)
    metrics = trainer.update(experience)
    assert len(seen) == trainer.config.epochs - 1
    assert metrics["optimizer_steps"] == trainer.config.epochs
    assert experience.kept == ()  # the graphs are gone


def test_the_update_is_that_without_it(case: Any) -> None:
    make, *_ = case
    found, metrics = [], []
    for keep in (True, False):
        trainer = make()
        experience = trainer.rollout(trainer.rows[:4])
        if not keep:
            experience.kept = ()
        metrics.append(trainer.update(experience))
        found.append(weights(trainer))
    for a, b in zip(*found, strict=True):
        # Rows in another order: sums differ by roundings, which Adam's first steps, of the learning
        # rate in size wherever a gradient is not 0, can turn into a part of such a step.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-2 * trainer.config.learning_rate)
    losses = ["value_loss"] if "value_loss" in metrics[0] else []
    for key in ["policy_loss", "approx_kl", "kl", *losses]:
        assert metrics[0][key] == pytest.approx(metrics[1][key], rel=1e-4, abs=1e-7)


def test_old_figures_are_the_first_steps_to_the_bit(case: Any) -> None:
    make, *_ = case
    trainer = make(epochs=1)
    metrics = trainer.update(trainer.rollout(trainer.rows[:4]))
    assert metrics["approx_kl"] == 0.0
    assert metrics["clip_fraction"] == 0.0


def replace_responses(experience: Experience, trainer: PPOTrainer) -> None:
    experience.responses = experience.responses.clone()
    experience.responses[0, 0] = 7


def change_by_numpy(experience: Experience, trainer: PPOTrainer) -> None:
    experience.responses.numpy()[0, 0] = 7


def change_mask(experience: Experience, trainer: PPOTrainer) -> None:
    experience.response_mask[0, 0] = False


def step_in_between(experience: Experience, trainer: PPOTrainer) -> None:
    trainer.update(trainer.rollout(trainer.rows[:4]))


def load_weights(experience: Experience, trainer: PPOTrainer) -> None:
    for engine in trainer.engines.values():
        engine.model.load_state_dict(engine.model.state_dict())


def change_data(experience: Experience, trainer: PPOTrainer) -> None:
    """As in moving averages of weights. PyTorch does not count it as a change."""
    for engine in trainer.engines.values():
        next(iter(engine.model.parameters())).data.mul_(1.01)


def set_data(experience: Experience, trainer: PPOTrainer) -> None:
    for engine in trainer.engines.values():
        norm = next(p for p in engine.model.parameters() if p.dim() == 1)
        norm.data = norm.data * 1.01


@pytest.mark.parametrize(
    "change",
    [
        replace_responses,
        change_by_numpy,
        change_mask,
        step_in_between,
        load_weights,
        change_data,
        set_data,
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_it_is_dropped_where_it_would_not_be_the_same(
    case: Any, change: Callable[..., None], optimizer: str, monkeypatch: Any
) -> None:
    make, _, function = case
    trainer = make(optimizer=optimizer, total_updates=3)
    experience = trainer.rollout(trainer.rows[:4])
    change(experience, trainer)
    seen = passes(function, monkeypatch)
    trainer.update(experience)
    assert len(seen) == trainer.config.epochs


@pytest.mark.parametrize("settings", [{"micro_batch_size": 2}, {"minibatch_size": 2}])
def test_more_than_one_part_keeps_nothing(case: Any, settings: dict[str, int]) -> None:
    make, *_ = case
    trainer = make(**settings)
    assert trainer.rollout(trainer.rows[:4]).kept == ()


def test_it_waits_for_its_model_while_the_critic_warms_up(
    make_trainer: Any, monkeypatch: Any
) -> None:
    trainer = make_trainer(**WHOLE, critic_warmup_updates=1)
    policy = [p.detach().clone() for p in trainer.policy.parameters()]
    experience = trainer.rollout(trainer.rows[:4])
    seen = passes("response_values", monkeypatch)
    trainer.update(experience)
    assert len(seen) == trainer.config.epochs - 1
    assert all(map(torch.equal, policy, trainer.policy.parameters()))


def test_a_copy_has_none(make_trainer: Any) -> None:
    trainer = make_trainer(**WHOLE)
    experience = trainer.rollout(trainer.rows[:4])
    assert copy.deepcopy(experience).kept == ()
    assert pickle.loads(pickle.dumps(experience)).kept == ()
    assert len(experience.kept) == 2


def test_inference_mode_keeps_nothing(case: Any) -> None:
    make, *_ = case
    trainer = make()
    with torch.inference_mode():
        experience = trainer.rollout(trainer.rows[:4])
    assert experience.kept == ()


def test_collected_experiences_keep_one_graph(case: Any, monkeypatch: Any) -> None:
    make, name, function = case
    trainer = make(total_updates=3)
    first, second = (trainer.rollout(trainer.rows[:4]) for _ in range(2))
    of_first = next(k for k in first.kept if k.engine is trainer.engines[name])
    assert of_first.output is None
    seen = passes(function, monkeypatch)
    trainer.update(first)
    assert len(seen) == trainer.config.epochs
    trainer.update(second)  # its weights have changed since
    assert len(seen) == 2 * trainer.config.epochs


def test_a_graph_is_gone_backward_once(case: Any, monkeypatch: Any) -> None:
    """Two experiences that share it, of which the first update breaks off before its step."""
    make, *_ = case
    trainer = make()
    experience = trainer.rollout(trainer.rows[:4])
    twin = dataclasses.replace(experience)
    for engine in trainer.engines.values():
        monkeypatch.setattr(engine, "step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.update(experience)
    monkeypatch.undo()
    trainer.update(twin)
    assert all(kept.output is None for kept in twin.kept)
