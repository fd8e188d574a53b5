"""Best-of-n: sample n responses, keep the one the reward likes best.

The simplest use of a reward, and the yardstick for PPO: n samples reach a reward at a KL divergence
of at most log n - (n - 1)/n from the policy (Stiennon et al. 2020, arXiv 2009.01325).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data import ChatFormat, Text, prepare_tokenizer
from rlhf.models import context_length, load_causal_lm, load_tokenizer
from rlhf.ppo.generation import GenerationSettings, generate
from rlhf.ppo.prompts import encode_prompts, read_prompts
from rlhf.ppo.scoring import Reward, score_responses


@dataclass(frozen=True)
class BestOfN:
    """What best-of-n found for one prompt.

    Attributes:
        prompt: As it was given.
        best: The response with the highest score; of equal ones, the first sampled.
        best_score: Its score.
        candidates: All n as (text, score), in the order in which they were sampled.
    """

    prompt: Text
    best: str
    best_score: float
    candidates: list[tuple[str, float]]


def best_of_n(
    policy: Any,
    prompts: Any,
    reward: Reward,
    n: int,
    *,
    tokenizer: Any = None,
    template: str = "auto",
    settings: GenerationSettings | None = None,
    seed: int = 0,
) -> list[BestOfN]:
    """Sample n responses to each prompt and rank them by the reward.

    Args:
        policy: A causal model: an id, a folder or an object.
        prompts: A file, a folder, a hub name, a ``Dataset``, or a list of rows or texts. Columns
            beside the prompt go to the reward.
        reward: A ``RewardModel`` or a callable ``(prompts, responses, **columns)``.
        n: Responses to each prompt.
        tokenizer: An id, a folder or a tokenizer; None: the one that lies with the policy.
        template: How a prompt becomes token ids; see ``ChatFormat``.
        settings: How to sample; None for the defaults of ``GenerationSettings``.
        seed: Of the sampling.

    Returns:
        One ``BestOfN`` for each prompt, in order.

    Raises:
        ValueError: n is below 1, or the policy is an object and no tokenizer was given.
        RewardError: The reward failed or returned something unusable; the message names the prompt.
        DataError: A prompt is malformed or too long.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    if tokenizer is None and not isinstance(policy, str | Path):
        raise ValueError("give tokenizer=, because the policy is a model object")
    settings = settings or GenerationSettings()
    tokenizer = load_tokenizer(policy if tokenizer is None else tokenizer)
    prepare_tokenizer(tokenizer)
    model = load_causal_lm(policy)
    rows = read_prompts(prompts)
    prompt_ids = encode_prompts(
        rows,
        ChatFormat(tokenizer, template),
        max_new_tokens=settings.max_new_tokens,
        context=context_length(model),
    )
    texts = generate(model, tokenizer, prompt_ids, settings, seed=seed, num_return=n).texts
    scores = score_responses(reward, [row for row in rows for _ in range(n)], texts).tolist()
    candidates = list(zip(texts, scores))
    return [
        rank(row["prompt"], candidates[start : start + n])
        for row, start in zip(rows, range(0, len(candidates), n))
    ]


def rank(prompt: Text, candidates: list[tuple[str, float]]) -> BestOfN:
    """One prompt's result."""
    text, score = max(candidates, key=lambda candidate: candidate[1])
    return BestOfN(prompt, text, score, candidates)
