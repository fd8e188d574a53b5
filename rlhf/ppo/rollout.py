"""From sampled and scored responses to advantages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf.ppo.config import PPOConfig
from rlhf.ppo.estimators import Episodes
from rlhf.ppo.experience import Experience, Sequences
from rlhf.ppo.forward import response_logprobs, response_values
from rlhf.ppo.generation import Generated
from rlhf.ppo.prompts import PromptRow
from rlhf.ppo.score_shaping import ScoreShaper


def make_experience(
    rows: list[PromptRow],
    generated: Generated,
    scores: Tensor,
    *,
    policy: Any,
    reference: Any,
    critic: Any,
    config: PPOConfig,
) -> Experience:
    """The experience with log-probabilities and values; its advantages are still zeros.

    The log-probabilities are those of the distribution at ``config.temperature``, under the policy
    as under the reference: top_p and top_k shape what is sampled, not what is trained.
    """
    sequences = Sequences(
        generated.prompt_ids, generated.prompt_mask, generated.responses, generated.response_mask
    )

    def over_batch(function: Callable[[Sequences], Tensor]) -> Tensor:
        return without_gradient(function, sequences, config.micro_batch_size)

    temperature = config.temperature
    zeros = torch.zeros_like(generated.responses, dtype=torch.float32)
    return Experience(
        **vars(sequences),
        ended=generated.ended,
        prompts=rows,
        texts=generated.texts,
        scores=scores,
        logprobs=over_batch(partial(response_logprobs, policy, temperature=temperature)),
        ref_logprobs=over_batch(partial(response_logprobs, reference, temperature=temperature)),
        values=None if critic is None else over_batch(partial(response_values, critic)),
        advantages=zeros,
        returns=None if critic is None else zeros,
        rewards=zeros,
        kl=zeros,
    )


@torch.no_grad()
def without_gradient(
    function: Callable[[Sequences], Tensor], batch: Sequences, micro_batch_size: int
) -> Tensor:
    """``function`` (of a micro-batch, giving [b, t]) over the whole batch, fp32 [B, T]."""
    result = torch.zeros_like(batch.responses, dtype=torch.float32)
    rows = range(len(batch))
    for part, micro_batch in batch.micro_batches(rows, micro_batch_size, batch.lengths()):
        values = function(micro_batch)
        index = torch.as_tensor(part, device=result.device)
        result[index, : values.shape[1]] = values
    return result


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
    """
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
