"""Best-of-n: sample n responses, keep the one the reward likes best.

The simplest use of a reward, and the yardstick for PPO: n samples reach a reward at a KL divergence
of at most log n - (n - 1)/n from the policy (Stiennon et al. 2020, arXiv 2009.01325).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from rlhf.data import ChatFormat, Prompt, prepare_tokenizer
from rlhf.engine import MAX_SEED, check_number
from rlhf.models import context_length, load_causal_lm, load_tokenizer
from rlhf.ppo.generation import GenerationSettings, generate
from rlhf.ppo.prompts import name_of_prompts, prepare_prompts, read_prompts, repeat_each
from rlhf.ppo.scoring import Reward, check_reward, score_responses


@dataclass(frozen=True)
class BestOfN:
    """What best-of-n found for one prompt.

    Attributes:
        prompt: As it was given.
        best: The response with the highest score; of equal ones, the first sampled.
        best_score: Its score.
        candidates: All n as (text, score), in the order in which they were sampled.
    """

    prompt: Prompt
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
        prompts: A file, a folder, a hub name, a ``Dataset``, or a list of rows, texts or token ids.
            Columns beside the prompt go to the reward.
        reward: A ``RewardModel`` or a callable ``(prompts, responses, **columns)``.
        n: Responses to each prompt.
        tokenizer: An id, a folder or a tokenizer; None: the one that lies with the policy, which is
            then an id or a folder.
        template: How a prompt becomes token ids; see ``ChatFormat``.
        settings: How to sample; None for the defaults of ``GenerationSettings``.
        seed: Of the sampling.

    Returns:
        One ``BestOfN`` for each prompt, in order.

    Raises:
        ValueError: n is no whole number of at least 1, or seed none of at least 0.
        ModelError: The policy cannot be loaded, or is an object and no tokenizer was given.
        RewardError: The reward failed or returned something unusable; the message names the prompt.
        DataError: A prompt is malformed or too long.
        TypeError: The reward is no callable.
    """
    arguments = SimpleNamespace(n=n, seed=seed)
    check_number(arguments, "n", at_least=1, integer=True)
    check_number(arguments, "seed", at_least=0, at_most=MAX_SEED, integer=True)
    check_reward(reward)
    settings = settings or GenerationSettings()
    tokenizer = load_tokenizer(tokenizer, policy)
    prepare_tokenizer(tokenizer)
    rows = read_prompts(prompts)
    model = load_causal_lm(policy)
    scored, prompt_ids = prepare_prompts(
        rows,
        ChatFormat(tokenizer, template),
        model,
        reward,
        max_new_tokens=settings.max_new_tokens,
        context=context_length(model),
        source=name_of_prompts(prompts),
    )
    texts = generate(model, tokenizer, prompt_ids, settings, seed=seed, num_return=n).texts
    scores = score_responses(reward, repeat_each(scored, n), texts).tolist()
    candidates = list(zip(texts, scores))
    return [
        rank(row["prompt"], candidates[start : start + n])
        for row, start in zip(rows, range(0, len(candidates), n))
    ]


def rank(prompt: Prompt, candidates: list[tuple[str, float]]) -> BestOfN:
    """One prompt's result."""
    text, score = max(candidates, key=lambda candidate: candidate[1])
    return BestOfN(prompt, text, score, candidates)
