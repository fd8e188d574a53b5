"""Sampling from a tiny policy, for the tests of generation."""

from __future__ import annotations

from typing import Any

from tiny_models import tiny_tokenizer

from rlhf.ppo.generation import Generated, GenerationSettings, generate

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
EOS = 3


def sample(
    policy: Any,
    prompts: list[list[int]] = PROMPTS,
    *,
    tokenizer: Any = None,
    seed: int = 0,
    num_return: int = 1,
    row_numbers: list[int] | None = None,
    sampler: Any = None,
    **options: Any,
) -> Generated:
    return generate(
        policy,
        tokenizer or tiny_tokenizer(),
        prompts,
        GenerationSettings(**{"max_new_tokens": 8, "dtype": "float32", **options}),
        seed=seed,
        num_return=num_return,
        row_numbers=row_numbers,
        sampler=sampler,
    )


def rows(generated: Generated) -> list[list[int]]:
    """The responses without padding."""
    return [ids[m].tolist() for ids, m in zip(generated.responses, generated.response_mask)]
