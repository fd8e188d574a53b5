"""The optimizer steps on one batch of experience."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rlhf.engine import Engine, NonFiniteError, World, discarding_on_error
from rlhf.engine.batching import chunks
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.experience import Experience
from rlhf.ppo.forward import head_inputs, response_values
from rlhf.ppo.metrics import LOSSES, UpdateStats
from rlhf_kernels import linear_ppo_loss


def run_epochs(
    experience: Experience,
    policy: Engine,
    critic: Engine | None,
    config: PPOConfig,
    *,
    seed: int,
    train_policy: bool = True,
) -> UpdateStats:
    """``config.epochs`` passes over the experience, an optimizer step for each minibatch.

    A step beyond ``config.max_approx_kl`` is the last one; schedules go on as if all were taken.
    """
    stats = UpdateStats(policy.device)
    lengths = experience.lengths()
    steps = list(minibatches(len(experience), config, seed))
    engines = [policy] * train_policy + ([] if critic is None else [critic])
    with discarding_on_error(*engines), naming_the_loss(stats, experience):
        for rows in steps:
            minibatch = experience.select(rows)
            normalizer = loss_normalizer(minibatch, config.aggregation, policy.world)
            for _, part in experience.micro_batches(rows, config.micro_batch_size, lengths):
                accumulate(part, policy, critic, config, normalizer, stats, train_policy)
            too_far = config.max_approx_kl is not None and (
                stats.step_approx_kl(policy.world) > config.max_approx_kl
            )
            stats.end_step(
                policy.step() if train_policy else {}, {} if critic is None else critic.step()
            )
            if too_far:
                break
    for engine in engines:
        engine.steps_done += len(steps) - stats.steps
    stats.early_stopped = stats.steps < len(steps)
    return stats


@contextmanager
def naming_the_loss(stats: UpdateStats, experience: Experience) -> Iterator[None]:
    """Say in a NonFiniteError which of the two losses it was; the engine knows only their sum."""
    try:
        yield
    except NonFiniteError as error:
        sums = dict(zip(LOSSES, stats.losses.tolist()))
        bad = [name.replace("_", " ") for name, value in sums.items() if not math.isfinite(value)]
        reach = f"The scores of this batch reach {experience.scores.abs().max().item():.3g}"
        if not bad:  # a gradient, of which the engine has said whose
            raise NonFiniteError(f"{error} {reach}.") from error
        raise NonFiniteError(
            f"the {' and the '.join(bad)} became NaN or infinite; this step was not taken. {reach} "
            "and should be around 1: scale the rewards if they are far from it, else lower the "
            "learning rate."
        ) from error


def minibatches(count: int, config: PPOConfig, seed: int) -> Iterator[list[int]]:
    """The rows of each optimizer step: in every epoch a new seeded partition of them all."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(config.epochs):
        order = torch.randperm(count, generator=generator).tolist()
        yield from chunks(order, config.minibatch_size)


def accumulate(
    part: Experience,
    policy: Engine,
    critic: Engine | None,
    config: PPOConfig,
    normalizer: Tensor,
    stats: UpdateStats,
    train_policy: bool = True,
) -> None:
    """Add one micro-batch's gradients, of both models in one backward, and its statistics."""
    with policy.autocast():
        values = None if critic is None else response_values(critic.model, part)
        with torch.set_grad_enabled(train_policy):
            hidden, weight, bias, _ = head_inputs(policy.model, part)
        if not train_policy:
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        loss, loss_stats = linear_ppo_loss(
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
    stats.add(loss_stats, part.response_mask.sum())
    policy.backward(loss)


def loss_normalizer(minibatch: Experience, aggregation: str, world: World) -> Tensor:
    """What the whole minibatch's loss is divided by, so that its micro-batches add up to it."""
    mask = minibatch.response_mask
    counted = mask if aggregation == "token-mean" else mask.any(1)
    return world.all_reduce_sum(counted.sum().float()).clamp(min=1)
