"""The optimizer steps on one batch of experience."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf.engine import Engine, SkippedStepsError, World, discarding_on_error, rank_micro_batches
from rlhf.engine.batching import chunks
from rlhf.models import lm_head
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.experience import Experience
from rlhf.ppo.forward import response_hidden, response_values
from rlhf.ppo.kept_forward import take_kept
from rlhf.ppo.metrics import LOSSES, POLICY_FIGURES, VALUE_FIGURES, UpdateStats
from rlhf.ppo.models import PPOModels
from rlhf.ppo.shared_trunk import shares_trunk, values_of
from rlhf_kernels import PPOLossStats, linear_ppo_loss, ppo_loss

LARGE_SCORE = 100.0  # beyond it, their size may be why a loss or a gradient is not finite


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
    experience.check_shapes()  # a user may have changed it
    world, stats = models.policy.world, UpdateStats(models.policy.device)
    steps = list(minibatches(len(experience), config, seed))
    engines = {
        name: engine for name, engine in models.trained.items() if train_policy or name != "policy"
    }
    lengths = experience.lengths()
    with discarding_on_error(*engines.values()), saying_how_large(experience.scores):
        for rows in steps:
            normalizer = loss_normalizer(experience.select(rows), config.aggregation)
            step = Step(models, config, normalizer, stats, train_policy)
            outcome = {}
            for name in step.order:
                kept = take_kept(experience, step.model(name))
                if kept is not None:
                    whole = experience.micro_batch(kept[0], lengths)
                    step.accumulate(name, whole, output=kept[1])
                else:
                    for part, last in my_micro_batches(experience, rows, lengths, config, world):
                        step.accumulate(name, part, last=last)
                too_far = (
                    config.max_approx_kl is not None
                    and name == "policy"
                    and (stats.step_approx_kl(world) > config.max_approx_kl)
                )
                if name in engines:
                    outcome[name] = engines[name].step()
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
    """Add to a SkippedStepsError how large the scores are, if that may be the reason for it."""
    try:
        yield
    except SkippedStepsError as error:
        largest = scores.abs().max().item()
        if largest <= LARGE_SCORE:
            raise
        raise SkippedStepsError(
            f"{error} The scores of this batch reach {largest:.3g} and should be around 1: scale "
            "the rewards."
        ) from error


def minibatches(count: int, config: PPOConfig, seed: int) -> Iterator[list[int]]:
    """The rows of each optimizer step: in every epoch a new seeded partition of them all."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(config.epochs):
        order = torch.randperm(count, generator=generator).tolist()
        yield from chunks(order, config.minibatch_size)


class Step:
    """The gradients of one optimizer step: all micro-batches of one model, then of the other.

    One model's activations and gradients are gone before the other's are made.

    Attributes:
        order: Names of the models to go through. The policy comes last if it is trained: critics do
            not read it, and what they find not finite must skip its step.
    """

    def __init__(
        self,
        models: PPOModels,
        config: PPOConfig,
        normalizer: Tensor,
        stats: UpdateStats,
        train_policy: bool = True,
    ) -> None:
        self.models, self.config, self.stats = models, config, stats
        self.normalizer, self.train_policy = normalizer, train_policy
        critic = [] if models.critic is None else ["critic"]
        self.order = [*critic, "policy"] if train_policy else ["policy", *critic]
        self.terms: dict[str, Tensor] = {}

    def model(self, name: str) -> Engine:
        """One of those in ``order``."""
        model = self.models.critic if name == "critic" else self.models.policy
        assert model is not None
        return model

    def accumulate(
        self, name: str, part: Experience, *, last: bool = True, output: Tensor | None = None
    ) -> None:
        """Add one micro-batch's gradients of a model, and its statistics.

        Args:
            name: The model. part: The micro-batch.
            last: Whether it is the step's last one.
            output: What a forward pass has given, where there has been one: the critic's values or
                the policy's hidden states.
        """
        model = self.model(name)
        loss_of = self._value_loss if name == "critic" else self._policy_loss
        with model.autocast():
            loss, loss_stats = model.run(partial(loss_of, part=part, output=output), last=last)
        figures = VALUE_FIGURES if name == "critic" else POLICY_FIGURES
        if shares_trunk(model.model):
            figures = VALUE_FIGURES | POLICY_FIGURES
        self.stats.add(loss_stats, part.response_mask.sum(), figures)
        for loss_name in LOSSES:
            term = getattr(loss_stats, loss_name)
            title = loss_name.replace("_", " ")
            self.terms[title] = self.terms[title] + term if title in self.terms else term
        if loss.requires_grad:
            model.backward(loss, terms=self.terms)

    def _policy_loss(
        self, model: Any, part: Experience, output: Tensor | None
    ) -> tuple[Tensor, PPOLossStats]:
        config, values = self.config, None
        with torch.set_grad_enabled(self.train_policy):
            hidden = response_hidden(model, part) if output is None else output
            weight, bias = lm_head(model)
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
                old_values=None if values is None else part.values,
                returns=None if values is None else part.returns,
                ref_logprobs=part.ref_logprobs if config.kl_placement == "loss" else None,
                temperature=config.temperature,
                config=config.loss_config(part.kl_coef),
                normalizer=self.normalizer,
            )

    def _value_loss(
        self, critic: Any, part: Experience, output: Tensor | None
    ) -> tuple[Tensor, PPOLossStats]:
        return ppo_loss(
            part.logprobs,  # a ratio of 1: the policy's loss is constant, but NaN if they are
            part.logprobs,
            part.advantages,
            part.response_mask,
            values=response_values(critic, part) if output is None else output,
            old_values=part.values,
            returns=part.returns,
            config=self.config.loss_config(part.kl_coef),
            normalizer=self.normalizer,
        )


def loss_normalizer(minibatch: Experience, aggregation: str) -> Tensor:
    """What the whole minibatch's loss is divided by, so that its micro-batches add up to it."""
    mask = minibatch.response_mask
    counted = mask if aggregation == "token-mean" else mask.any(1)
    return counted.sum().float().clamp(min=1)
