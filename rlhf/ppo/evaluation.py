"""How the policy does on held-out prompts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from math import lcm

from rlhf.ppo.config import PPOConfig
from rlhf.ppo.experience import Sequences
from rlhf.ppo.forward import response_logprobs
from rlhf.ppo.generation import Sampler
from rlhf.ppo.models import PPOModels
from rlhf.ppo.prompts import PromptRow
from rlhf.ppo.rollout import batched
from rlhf.ppo.scoring import Reward
from rlhf.ppo.seeds import derive_seed
from rlhf.ppo.sharing import shared_generation, shared_scores

logger = logging.getLogger(__name__)


def warn_if_none_is_best(config: PPOConfig, rows: Sequence[PromptRow]) -> None:
    """Say so if checkpoints and evaluations are asked for, and never fall on the same update."""
    every, evaluated, total = config.save_every, config.eval_every, config.total_updates
    if not (rows and every and evaluated):
        return
    if max(every, evaluated) < total <= lcm(every, evaluated):
        logger.warning(
            "save_every=%d and eval_every=%d fall on no update together, so no checkpoint is kept "
            "as the one with the best eval_score; make save_every a multiple of eval_every.",
            *(every, evaluated),
        )


def evaluate(
    models: PPOModels,
    tokenizer: object,
    rows: Sequence[PromptRow],
    prompt_ids: Sequence[Sequence[int]],
    reward: Reward,
    config: PPOConfig,
    sampler: Sampler | None = None,
) -> dict[str, float]:
    """One response to each prompt, always with the same random numbers.

    Returns:
        ``eval_score``, ``eval_kl`` (nats a response, the k1 estimate), ``eval_response_length`` and
        ``eval_eos_rate``, means over the prompts.
    """
    generated = shared_generation(
        models.policy,
        tokenizer,
        prompt_ids,
        config.generation_settings(len(rows), dtype=config.dtype, greedy=config.eval_greedy),
        seed=derive_seed(config.seed, "evaluate"),
        sampler=sampler,
    )
    scores, _ = shared_scores(reward, rows, generated.texts, models.policy.world)
    sequences = Sequences(
        generated.prompt_ids, generated.prompt_mask, generated.responses, generated.response_mask
    )
    of_tokens = partial(response_logprobs, temperature=config.temperature)
    over_all = partial(batched, sequences=sequences, models=models, config=config)
    kl = over_all(models.policy, of_tokens) - over_all(models.reference, of_tokens)
    return {
        "eval_score": scores.mean().item(),
        "eval_kl": kl.sum(1).mean().item(),
        "eval_response_length": generated.response_mask.sum(1).float().mean().item(),
        "eval_eos_rate": generated.ended.float().mean().item(),
    }
