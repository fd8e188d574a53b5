"""Settings of prompts and of sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.engine import check_choice, check_number
from rlhf.ppo.generation import GenerationSettings, SamplingOptions


@dataclass
class SamplingConfig(SamplingOptions):
    """How prompts become ids and responses are sampled; see ``SamplingOptions`` for the latter.

    Attributes:
        template: How a prompt becomes token ids: auto (the tokenizer's chat template, else
            instruction), instruction, none (the text as it stands).
        responses_per_prompt: Responses sampled for each prompt.
        generation_batch_size: Responses sampled side by side; null for the whole batch.
    """

    template: Literal["auto", "instruction", "none"] = "auto"
    responses_per_prompt: int = 1
    generation_batch_size: int | None = None

    def check_sampling(self) -> None:
        """Raise ValueError, naming the field, for a setting that makes no sense."""
        check_choice(self, "template", ("auto", "instruction", "none"))
        check_number(self, "responses_per_prompt", at_least=1, integer=True)
        check_number(self, "generation_batch_size", at_least=1, integer=True, optional=True)
        self.check_sampling_options()

    def generation_settings(
        self, rows: int, *, dtype: str, greedy: bool = False
    ) -> GenerationSettings:
        """The settings of ``generate`` for a batch of ``rows`` responses."""
        return GenerationSettings(
            **self.sampling_options(),
            greedy=greedy,
            batch_size=self.generation_batch_size or rows,
            dtype=dtype,
        )
