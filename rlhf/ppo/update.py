"""The optimizer steps on one batch of experience."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf.engine import NonFiniteError, World, discarding_on_error, rank_micro_batches
from rlhf.engine.batching import chunks
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.experience import Experience
from rlhf.ppo.forward import head_inputs, response_values
from rlhf.ppo.metrics import LOSSES, UpdateStats
from rlhf.ppo.models import PPOModels
from rlhf.ppo.shared_trunk import shares_trunk, values_of
from rlhf_kernels import PPOLossStats, linear_ppo_loss


def run_epochs(
    experience: Experience,
    models: PPOModels,
    config: PPOConfig,
    *,
    seed: int,
    train_policy: bool = True,
) -> UpdateStats:
    """``config.epochs`` passes over the experience, an optimizer step for each minibatch.

    A step beyond ``config.max_approx_kl`` is the last one; schedules go on as if all were taken.
    """
    world, stats = models.policy.world, UpdateStats(models.policy.device)
    steps = list(minibatches(len(experience), config, seed))
    engines = {
        name: engine for name, engine in models.trained.items() if train_policy or name != "policy"
    }
    lengths = experience.lengths()
    with discarding_on_error(*engines.values()), saying_how_large(experience.scores):
        for rows in steps:
            normalizer = loss_normalizer(experience.select(rows), config.aggregation)
            for part, last in my_micro_batches(experience, rows, lengths, config, world):
                accumulate(part, models, config, normalizer, stats, train_policy, last=last)
            too_far = config.max_approx_kl is not None and (
                stats.step_approx_kl(world) > config.max_approx_kl
            )
            outcome = {name: engine.step() for name, engine in engines.items()}
            stats.end_step(outcome.get("policy", {}), outcome.get("critic", {}))
            if too_far:
                break
    for engine in engines.values():
        engine.steps_done += len(steps) - stats.steps
    stats.early_stopped = stats.steps < len(steps)
    stats.reduce(world)
    return stats


def my_micro_batches(
    experience: Experience,
    rows: list[int],
    lengths: list[tuple[int, int]],
    config: PPOConfig,
    world: World,
) -> Iterator[tuple[Experience, bool]]:
    """This rank's micro-batches of an optimizer step, each with whether it is the last."""
    parts = rank_micro_batches(
        rows,
        [sum(both) for both in lengths],
        size=config.micro_batch_size,
        tokens=config.micro_batch_tokens,
        rank=world.rank,
        ranks=world.size,
    )
    for number, part in enumerate(parts, start=1):
        yield experience.micro_batch(part, lengths), number == len(parts)


@contextmanager
def saying_how_large(scores: Tensor) -> Iterator[None]:
    """Add to a NonFiniteError how large the scores are: the usual reason for it."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{error} The scores of this batch reach {scores.abs().max().item():.3g} and should be "
            "around 1: scale the rewards if they are far from it."
        ) from error


def minibatches(count: int, config: PPOConfig, seed: int) -> Iterator[list[int]]:
    """The rows of each optimizer step: in every epoch a new seeded partition of them all."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(config.epochs):
        order = torch.randperm(count, generator=generator).tolist()
        yield from chunks(order, config.minibatch_size)


def accumulate(
    part: Experience,
    models: PPOModels,
    config: PPOConfig,
    normalizer: Tensor,
    stats: UpdateStats,
    train_policy: bool = True,
    *,
    last: bool = True,
) -> None:
    """Add one micro-batch's gradients, of all models in one backward, and its statistics."""
    policy, critic = models.policy, models.critic
    trained = ([policy] if train_policy else []) + ([] if critic is None else [critic])
    with policy.autocast():
        own_values = None
        if critic is not None:
            own_values = critic.run(partial(response_values, batch=part), last=last)

        def policy_loss(model: Any) -> tuple[Tensor, PPOLossStats]:
            with torch.set_grad_enabled(train_policy):
                hidden, weight, bias, _ = head_inputs(model, part)
            if not train_policy:
                weight, bias = weight.detach(), None if bias is None else bias.detach()
            values = own_values
            if shares_trunk(model):
                values = values_of(model, hidden, part.response_mask)
            return linear_ppo_loss(
                hidden,
                weight,
                part.responses,
                part.logprobs,
                part.advantages,
                part.response_mask,
                bias=bias,
                values=values,
                old_values=part.values,
                returns=part.returns,
                ref_logprobs=part.ref_logprobs if config.kl_placement == "loss" else None,
                temperature=config.temperature,
                config=config.loss_config(part.kl_coef),
                normalizer=normalizer,
            )

        loss, loss_stats = policy.run(policy_loss, last=last)
    stats.add(loss_stats, part.response_mask.sum())
    terms = {name.replace("_", " "): getattr(loss_stats, name) for name in LOSSES}
    trained[0].backward(loss, terms=terms, beside=trained[1:])


def loss_normalizer(minibatch: Experience, aggregation: str) -> Tensor:
    """What the whole minibatch's loss is divided by, so that its micro-batches add up to it."""
    mask = minibatch.response_mask
    counted = mask if aggregation == "token-mean" else mask.any(1)
    return counted.sum().float().clamp(min=1)
