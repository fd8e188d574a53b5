"""The optimizer steps on one batch of experience."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf.engine import Engine, NonFiniteError, discarding_on_error, rank_micro_batches
from rlhf.engine.batching import chunks
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.experience import Experience
from rlhf.ppo.forward import head_inputs, response_values
from rlhf.ppo.metrics import LOSSES, UpdateStats
from rlhf_kernels import PPOLossStats, linear_ppo_loss


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
    totals = [sum(both) for both in lengths]
    steps = list(minibatches(len(experience), config, seed))
    engines = [policy] * train_policy + ([] if critic is None else [critic])
    with discarding_on_error(*engines), saying_how_large(experience.scores):
        for rows in steps:
            normalizer = loss_normalizer(experience.select(rows), config.aggregation)
            parts = rank_micro_batches(
                rows,
                totals,
                size=config.micro_batch_size,
                tokens=config.micro_batch_tokens,
                rank=policy.world.rank,
                ranks=policy.world.size,
            )
            for number, part in enumerate(parts, start=1):
                batch, last = experience.micro_batch(part, lengths), number == len(parts)
                accumulate(
                    batch, policy, critic, config, normalizer, stats, train_policy, last=last
                )
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
    stats.reduce(policy.world)
    return stats


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
    policy: Engine,
    critic: Engine | None,
    config: PPOConfig,
    normalizer: Tensor,
    stats: UpdateStats,
    train_policy: bool = True,
    *,
    last: bool = True,
) -> None:
    """Add one micro-batch's gradients, of both models in one backward, and its statistics."""
    trained = ([policy] if train_policy else []) + ([] if critic is None else [critic])
    with policy.autocast():
        values = (
            None if critic is None else critic.run(partial(response_values, batch=part), last=last)
        )

        def policy_loss(model: Any) -> tuple[Tensor, PPOLossStats]:
            with torch.set_grad_enabled(train_policy):
                hidden, weight, bias, _ = head_inputs(model, part)
            if not train_policy:
                weight, bias = weight.detach(), None if bias is None else bias.detach()
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
