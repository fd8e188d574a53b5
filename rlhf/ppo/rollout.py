"""From sampled and scored responses to advantages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf.engine import Engine, Frozen, World, rank_micro_batches
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.estimators import Episodes
from rlhf.ppo.experience import Experience, Sequences
from rlhf.ppo.forward import logprobs_of, response_hidden, response_logprobs, response_values
from rlhf.ppo.generation import Generated
from rlhf.ppo.kept_forward import KeptForwards, keep_forward
from rlhf.ppo.models import PPOModels, WithoutAdapters
from rlhf.ppo.prompts import PromptRow
from rlhf.ppo.score_shaping import ScoreShaper
from rlhf.ppo.shared_trunk import shares_trunk, values_of

Runs = Engine | Frozen | WithoutAdapters


def make_experience(
    rows: list[PromptRow],
    generated: Generated,
    scores: Tensor,
    models: PPOModels,
    config: PPOConfig,
) -> Experience:
    """The experience with log-probabilities and values; its advantages are still zeros.

    Each rank works out a share of the rows, and all get all of them. The log-probabilities are
    those of the distribution at ``config.temperature``, under the policy as under the reference:
    top_p and top_k shape what is sampled, not what is trained.
    """
    sequences = Sequences(
        generated.prompt_ids, generated.prompt_mask, generated.responses, generated.response_mask
    )
    over_batch = partial(batched, sequences=sequences, models=models, config=config)
    logprobs_by = partial(response_logprobs, temperature=config.temperature)
    ref_logprobs = over_batch(models.reference, logprobs_by)
    # What is trained comes last: nothing else runs while its passes are kept.
    of_policy = keep_forward(models.policy, response_hidden, sequences, config)
    hidden_by = response_hidden if of_policy is None else of_policy.replay
    both = over_batch(models.policy, partial(_figures, hidden_by, config.temperature))
    logprobs, values = both[..., 0], both[..., 1] if both.shape[-1] > 1 else None
    of_critic = None
    if models.critic is not None:
        of_critic = keep_forward(models.critic, response_values, sequences, config)
        values = over_batch(
            models.critic, response_values if of_critic is None else of_critic.replay
        )
    zeros = torch.zeros_like(logprobs)
    return Experience(
        **vars(sequences),
        ended=generated.ended,
        prompts=rows,
        texts=generated.texts,
        scores=scores,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        advantages=zeros,
        returns=None if values is None else zeros,
        rewards=zeros,
        kl=zeros,
        kept=KeptForwards(kept for kept in (of_policy, of_critic) if kept is not None),
    )


def _figures(
    hidden_by: Callable[[Any, Sequences], Tensor], temperature: float, policy: Any, batch: Sequences
) -> Tensor:
    """Log-probabilities [B, T, 1] of a batch, with a value head also the values [B, T, 2]."""
    hidden = hidden_by(policy, batch)
    found = [logprobs_of(policy, hidden, batch, temperature)]
    if shares_trunk(policy):
        found.append(values_of(policy, hidden, batch.response_mask))
    return torch.stack(found, dim=-1)


def batched(
    model: Runs,
    function: Callable[..., Tensor],
    *,
    sequences: Sequences,
    models: PPOModels,
    config: PPOConfig,
) -> Tensor:
    """``function(model, batch)`` over all sequences, under the policy's autocast."""
    with models.policy.autocast():
        return without_gradient(
            lambda batch: model.run(partial(function, batch=batch)),
            sequences,
            config.micro_batch_size,
            config.micro_batch_tokens,
        )


@torch.no_grad()
def without_gradient(
    function: Callable[[Sequences], Tensor],
    batch: Sequences,
    micro_batch_size: int,
    micro_batch_tokens: int | None = None,
) -> Tensor:
    """``function`` (of a micro-batch, giving [b, t, ...]) over all of it, fp32 [B, T, ...]."""
    world, lengths = World(), batch.lengths()
    result = torch.zeros(0)
    parts = rank_micro_batches(
        range(len(batch)),
        [sum(both) for both in lengths],
        size=micro_batch_size,
        tokens=micro_batch_tokens,
        rank=world.rank,
        ranks=world.size,
    )
    for part in parts:
        values = function(batch.micro_batch(part, lengths))
        if not result.numel():
            shape = *batch.responses.shape, *values.shape[2:]
            result = torch.zeros(shape, dtype=torch.float32, device=values.device)
        if part:
            index = torch.as_tensor(part, device=result.device)
            result[index, : values.shape[1]] = values
    # Every row is zero on all ranks but one, so the sum is exact.
    return world.all_reduce_sum(result)


def estimate_advantages(
    experience: Experience, config: PPOConfig, shaper: ScoreShaper, kl_coef: float
) -> None:
    """Set advantages, returns, rewards, kl and kl_coef from scores, log-probabilities and values.

    The score, shaped, counts at the last valid token, and the episode ends there, whether it is EOS
    or the response was cut off.

    Args:
        experience: Changed in place; its scores stay as the reward gave them.
        config: Settings.
        shaper: Of the scores; it remembers nothing of these.
        kl_coef: Weight of the KL penalty.

    Raises:
        ValueError: A score is NaN or infinite.
    """
    bad = (~experience.scores.isfinite()).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(
            f"scores[{row}] of the experience is {experience.scores[row].item()}; whoever changes "
            "scores must leave a finite number for each response"
        )
    mask = experience.response_mask
    estimate = config.estimator(
        Episodes(
            scores=shaper.shape(experience.scores, experience.ended, mask.sum(1)),
            logprobs=experience.logprobs,
            ref_logprobs=experience.ref_logprobs,
            values=experience.values,
            mask=mask,
            kl_coef=kl_coef if config.kl_placement == "reward" else 0.0,
            config=config,
        )
    )
    experience.advantages, experience.returns = estimate.advantages, estimate.returns
    experience.rewards, experience.kl = estimate.rewards, estimate.kl
    experience.kl_coef = kl_coef
