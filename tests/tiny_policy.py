"""A tiny policy whose responses end early often enough."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import tiny_llama

# With 128 token ids, 16 that end a response make one of about 8 tokens.
EOS_IDS = [3, *range(108, 123)]


def make_policy(seed: int = 0, **options: Any) -> Any:
    """A policy with distributions far from uniform, which often ends its responses."""
    policy = tiny_llama(seed, **options)
    with torch.no_grad():
        policy.lm_head.weight.mul_(20)
    policy.generation_config.eos_token_id = EOS_IDS
    return policy
