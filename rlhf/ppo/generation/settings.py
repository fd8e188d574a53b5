"""How responses are sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from rlhf.engine import check_choice, check_number
from rlhf.ppo.generation.options import check_generation_options

BACKENDS = ("generate", "continuous")


@dataclass
class SamplingOptions:
    """What a response is drawn from, and where it ends.

    The distribution that is trained is softmax(logits / temperature). ``top_p``, ``top_k``,
    ``min_p``, ``repetition_penalty``, ``min_new_tokens`` and most of ``generation_options`` sample
    from another one, for which nothing corrects: the log-probabilities are not those of the draws,
    and what is cut away is never tried. Leave them off for PPO, or change little.

    Attributes:
        max_new_tokens: Longest response, in tokens.
        min_new_tokens: Tokens before which no EOS, stop id or stop string ends a response.
        temperature: Divides the logits when sampling, and in every log-probability.
        top_p: Sample among the likeliest tokens that together have this probability (Holtzman et
            al. 2020, arXiv 1904.09751).
        top_k: Sample among so many likeliest tokens; 0 for all (Fan et al. 2018, arXiv 1805.04833).
        min_p: Sample among tokens at least so likely as this share of the likeliest one's
            probability (Nguyen et al. 2024, arXiv 2407.01082); 0 for all.
        repetition_penalty: Above 1, makes tokens less likely that prompt or response have already
            (Keskar et al. 2019, arXiv 1909.05858).
        stop_strings: Texts that end a response. Its ids end with the token that completes one; its
            text ends before it.
        stop_token_ids: Ids that end a response beside the EOS ids of model and tokenizer.
        generation_backend: What samples: generate (transformers' ``generate``) or continuous (its
            continuous batching, which fills the place of a response that has ended at once).
        generation_options: Further options of that backend; see ``docs/ppo.md``.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_strings: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    generation_backend: Literal["generate", "continuous"] = "generate"
    generation_options: dict[str, Any] = field(default_factory=dict)

    def check_sampling_options(self) -> None:
        """Raise ValueError, naming the field, for a setting that makes no sense."""
        check_number(self, "max_new_tokens", at_least=1, integer=True)
        check_number(self, "min_new_tokens", at_least=0, at_most=self.max_new_tokens, integer=True)
        check_number(self, "temperature", above=0)
        check_number(self, "top_p", above=0, at_most=1)
        check_number(self, "top_k", at_least=0, integer=True)
        check_number(self, "min_p", at_least=0, at_most=1)
        check_number(self, "repetition_penalty", above=0)
        check_list(self, "stop_strings", "texts, none empty", is_stop_string)
        check_list(self, "stop_token_ids", "whole numbers of at least 0", is_token_id)
        check_choice(self, "generation_backend", BACKENDS)
        if not isinstance(self.generation_options, Mapping):
            raise ValueError(
                f"generation_options={self.generation_options!r} must be a mapping from the names "
                "of options to values"
            )
        check_generation_options(self.generation_options, self.generation_backend)
        if self.generation_backend == "continuous" and self.repetition_penalty != 1:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} needs all tokens so far, which "
                "continuous batching does not show; leave it at 1 or set "
                "generation_backend='generate'"
            )

    def sampling_options(self) -> dict[str, Any]:
        """These options by name, to make settings of another class from."""
        return {option.name: getattr(self, option.name) for option in fields(SamplingOptions)}


@dataclass
class GenerationSettings(SamplingOptions):
    """How ``generate`` samples responses.

    Attributes:
        greedy: Take the likeliest token instead of sampling; temperature, top_p, top_k and min_p
            then do nothing.
        batch_size: Responses generated side by side. Changes memory and speed, not the result.
        dtype: Precision of matrix products: auto, float32 or bfloat16.
    """

    greedy: bool = False
    batch_size: int = 64
    dtype: str = "auto"

    def __post_init__(self) -> None:
        self.check_sampling_options()
        check_number(self, "batch_size", at_least=1, integer=True)
        check_choice(self, "dtype", ("auto", "float32", "bfloat16"))


def check_list(config: Any, name: str, what: str, valid: Callable[[Any], bool]) -> None:
    """Raise ValueError naming the field unless it is a list of valid values."""
    values = getattr(config, name)
    if not isinstance(values, list | tuple) or not all(map(valid, values)):
        raise ValueError(f"{name}={values!r} must be a list of {what}")


def is_stop_string(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
