"""Settings of prompts and of sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.engine import check_choice, check_number


@dataclass
class SamplingConfig:
    """How prompts become ids and responses are sampled.

    Attributes:
        template: How a prompt becomes token ids: auto (the tokenizer's chat template, else
            instruction), instruction, none (the text as it stands).
        max_new_tokens: Longest response, in tokens.
        responses_per_prompt: Responses sampled for each prompt.
        temperature: Divides the logits when sampling, and in every log-probability.
        top_p: Sample among the likeliest tokens that together have this probability.
        top_k: Sample among so many likeliest tokens; 0 for all.
        generation_batch_size: Responses sampled side by side; null for the whole batch.
    """

    template: Literal["auto", "instruction", "none"] = "auto"
    max_new_tokens: int = 64
    responses_per_prompt: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    generation_batch_size: int | None = None

    def check_sampling(self) -> None:
        """Raise ValueError, naming the field, for a setting that makes no sense."""
        check_choice(self, "template", ("auto", "instruction", "none"))
        check_number(self, "max_new_tokens", at_least=1, integer=True)
        check_number(self, "responses_per_prompt", at_least=1, integer=True)
        check_number(self, "temperature", above=0)
        check_number(self, "top_p", above=0, at_most=1)
        check_number(self, "top_k", at_least=0, integer=True)
        check_number(self, "generation_batch_size", at_least=1, integer=True, optional=True)
