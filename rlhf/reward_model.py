"""A trained reward model in use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from rlhf.data import ChatFormat, Message, Text, pad_right
from rlhf.engine import (
    Frozen,
    NonFiniteError,
    TrainingConfig,
    check_choice,
    check_number,
    resolve_dtype,
    save_model,
)
from rlhf.engine.batching import chunks
from rlhf.engine.precision import autocast
from rlhf.models import (
    context_length,
    last_token_scores,
    load_scalar_model,
    load_tokenizer,
    score_head,
)
from rlhf_kernels.fast_layers import use_fast_layers

# Scores of a few units carry rounding of about 1e-6; a difference below this is no preference.
TIE_MARGIN = 1e-4


class RewardModel:
    """Scores responses to prompts; also a reward function for PPO and best-of-n.

    The score is the head's output at the last token of prompt + response, the EOS that the template
    puts at its end, minus ``config.reward_mean``. It is computed in float32, and the position comes
    from the attention mask: a score depends neither on padding nor on what shares its batch.

    Args:
        model: A sequence classifier with one label, or an id or folder of one.
        tokenizer: Its tokenizer, or an id or folder; None: the one that lies with the model, which
            is then an id or folder.
        template: As in ``ChatFormat``; must be the one that the model was trained with.
        dtype: Precision of the trunk's matrix products: auto, float32 or bfloat16, which keeps two
            to three digits of a score. The head's are float32 always.
        weights: How they are held: float32 or, with products of bfloat16, in bfloat16 too, for half
            of the memory and another digit of the score. A model that is given becomes that itself.

    Raises:
        ModelError: The model cannot be loaded or has no trained score, as a causal model.
        ValueError: dtype or weights is none of these, or they do not go together.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: str = "auto",
        dtype: str = "float32",
        weights: str = "float32",
    ) -> None:
        given = SimpleNamespace(dtype=dtype, weights=weights)
        check_choice(given, "dtype", ("auto", "float32", "bfloat16"))
        check_choice(given, "weights", ("float32", "bfloat16"))
        if weights == "bfloat16" and dtype != "bfloat16":
            raise ValueError(
                f"weights='bfloat16' has products of bfloat16, and dtype is {dtype!r}; set "
                "dtype='bfloat16', too"
            )
        self.dtype, self.weights = dtype, weights
        self.model = load_scalar_model(model)
        if weights == "bfloat16":
            self.model.bfloat16()
        score_head(self.model)
        use_fast_layers(self.model)
        self.tokenizer = load_tokenizer(tokenizer, model)
        self.chat_format = ChatFormat(self.tokenizer, template)
        self.template = template
        self._frozen: Frozen | None = None

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> RewardModel:
        """Load what ``save_pretrained`` or ``RewardTrainer`` wrote, onto the GPU if any.

        Raises:
            ModelError: It cannot be loaded, or is no reward model.
        """
        model = load_scalar_model(folder)
        template = getattr(model.config, "reward_template", "auto")
        return cls(model, load_tokenizer(folder), template)

    def save_pretrained(
        self, folder: str | Path, weights: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Write a Hugging Face folder; ``AutoModelForSequenceClassification`` loads it too.

        The model's weights are ``weights`` if they are given. Its config carries ``reward_mean``
        and ``reward_template`` beside the usual entries. The logits of the plain class are the
        scores before the mean is taken off.
        """
        self.model.config.reward_template = self.template
        save_model(self.model, self.tokenizer, folder, weights)

    def freeze(self, config: TrainingConfig, parked_in: str | Path | None = None) -> None:
        """Hold the weights of a model that is only read as the trained ones are held.

        Args:
            config: Under ``parallel`` "fsdp" or "hybrid" they are split over the ranks: from then
                on every rank must score equally many responses at a time.
            parked_in: Keep them in a file in this folder, and in memory while scoring alone.
        """
        exact = self.weights == "float32"
        self._frozen = Frozen(self.model, config, exact=exact, parked_in=parked_in)

    @property
    def is_sharded(self) -> bool:
        """Whether ``freeze`` has split the weights over the ranks."""
        return self._frozen is not None and self._frozen.is_sharded

    def score(
        self,
        prompts: Sequence[Text],
        responses: Sequence[str | list[Message]],
        batch_size: int = 16,
    ) -> list[float]:
        """One score a prompt and response; an empty response is scored as silence.

        Raises:
            ValueError: The lists differ in length, an item is no text or longer than the model's
                context, or batch_size is no whole number of at least 1.
            NonFiniteError: A score is NaN or infinite.
        """
        check_number(SimpleNamespace(batch_size=batch_size), "batch_size", at_least=1, integer=True)
        sequences = self._encode(prompts, responses)
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        scores = [math.nan] * len(sequences)
        for batch in chunks(order, batch_size):
            found = self._score_batch([sequences[index] for index in batch])
            for index, value in zip(batch, found):
                scores[index] = value
        for index, value in enumerate(scores):
            if not math.isfinite(value):
                raise NonFiniteError(f"the reward model's score of item {index} is {value}")
        return scores

    def compare(
        self,
        prompt: Text,
        a: str | list[Message],
        b: str | list[Message],
        tie_margin: float = TIE_MARGIN,
    ) -> str:
        """Which response scores higher: "A", "B", or "tie" if they differ by at most the margin.

        The default margin, 1e-4, only catches differences that rounding could have made.
        """
        if not tie_margin >= 0:
            raise ValueError(f"tie_margin={tie_margin!r} must be a number of at least 0")
        score_a, score_b = self.score([prompt, prompt], [a, b])
        if abs(score_a - score_b) <= tie_margin:
            return "tie"
        return "A" if score_a > score_b else "B"

    def __call__(
        self, prompts: Sequence[Text], responses: Sequence[str], /, **columns: Any
    ) -> list[float]:
        """``score``, in the form of a reward function; other columns are not used."""
        return self.score(prompts, responses)

    def _encode(
        self, prompts: Sequence[Text], responses: Sequence[str | list[Message]]
    ) -> list[list[int]]:
        if isinstance(prompts, str) or isinstance(responses, str):
            raise ValueError("prompts and responses must be lists, also for a single item")
        if len(prompts) != len(responses):
            raise ValueError(
                f"{len(prompts)} prompts and {len(responses)} responses; give one response each"
            )
        limit = context_length(self.model)
        sequences = []
        for index, (prompt, response) in enumerate(zip(prompts, responses)):
            for name, text in (("prompt", prompt), ("response", response)):
                if not isinstance(text, str | list):
                    raise ValueError(
                        f"item {index}: the {name} is {text!r}; give a text or a list of messages"
                    )
            ids, _ = self.chat_format.encode(prompt, response)
            if limit is not None and len(ids) > limit:
                raise ValueError(
                    f"item {index}: prompt and response have {len(ids)} tokens, more than the "
                    f"reward model's context of {limit}; shorten them"
                )
            sequences.append(ids)
        return sequences

    @torch.no_grad()
    def _score_batch(self, sequences: list[list[int]]) -> list[float]:
        was_training = self.model.training
        self.model.eval()
        # Which id pads does not matter: the mask hides it, and EOS exists in every tokenizer.
        ids, mask = pad_right(sequences, self.tokenizer.eos_token_id)
        device = next(self.model.parameters()).device
        read = lambda model: last_token_scores(model, ids.to(device), mask.to(device))  # noqa: E731
        with autocast(resolve_dtype(self.dtype, device), device):
            scores = read(self.model) if self._frozen is None else self._frozen.run(read)
        self.model.train(was_training)
        return scores.tolist()
