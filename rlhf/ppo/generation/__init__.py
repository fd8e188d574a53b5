"""Sampling responses."""

from __future__ import annotations

from rlhf.ppo.generation.ending import Ending, eos_token_ids
from rlhf.ppo.generation.responses import Generated, Sampler, generate
from rlhf.ppo.generation.settings import GenerationSettings, SamplingOptions

__all__ = [
    "Ending",
    "Generated",
    "GenerationSettings",
    "Sampler",
    "SamplingOptions",
    "eos_token_ids",
    "generate",
]
