"""Sampling responses: many prompts at once, in order, reproducible, with any engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor

from rlhf.data import pad_left, pad_right
from rlhf.ppo.generation.batches import padding_id, sample_in_batches
from rlhf.ppo.generation.ending import Ending
from rlhf.ppo.generation.settings import GenerationSettings


class Sampler(Protocol):
    """What samples: one of the two backends here, or a function of the user's around any engine."""

    def __call__(
        self,
        policy: Any,
        tokenizer: Any,
        prompt_ids: Sequence[Sequence[int]],
        settings: GenerationSettings,
        *,
        ending: Ending,
        seed: int,
        row_numbers: Sequence[int],
    ) -> Sequence[Sequence[int]]:
        """The ids of one response to each prompt, in order, as the engine chose them.

        They are trained as they come, and never decoded and encoded again. So the engine must have
        the policy's present weights and sample from softmax(logits / temperature).

        Args:
            policy: The model. tokenizer: Its tokenizer.
            prompt_ids: The ids of each prompt, none empty.
            settings: How to sample.
            ending: ``ending.ids`` and ``ending.stop_strings`` are where to stop. What follows the
                first end is dropped, so a sampler that goes on wastes time and nothing else.
            seed: Of the sampling.
            row_numbers: The number of each response in the whole batch. Random numbers that depend
                on seed and row number alone make responses independent of how rows are shared out.

        Returns:
            For each prompt at least one id and at most ``settings.max_new_tokens``.
        """
        ...


def backend(name: str) -> Sampler:
    """The sampler of ``generation_backend``.

    Raises:
        ValueError: The installed transformers has no continuous batching.
    """
    if name == "generate":
        return sample_in_batches
    try:
        from rlhf.ppo.generation.continuous import sample_continuously
    except ImportError as error:
        raise ValueError(
            f"transformers {transformers.__version__} has no continuous batching that this "
            f"package can use ({error}); update it (5.17 and 5.23 are known to work) or set "
            "generation_backend='generate'"
        ) from error
    return sample_continuously


@dataclass
class Generated:
    """Responses, a row each, in the order of the prompts.

    Attributes:
        prompt_ids: int64 [B, P], left padded. prompt_mask: bool [B, P].
        responses: int64 [B, T], right padded. response_mask: bool [B, T], True through the
            response's end, inclusive; all of a response that has none.
        ended: bool [B], whether the response ended by itself: at an EOS or stop id, or at a stop
            string.
        texts: The responses' texts, without special tokens and without the stop string.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    responses: Tensor
    response_mask: Tensor
    ended: Tensor
    texts: list[str]


@torch.no_grad()
def generate(
    policy: Any,
    tokenizer: Any,
    prompt_ids: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    seed: int,
    num_return: int = 1,
    row_numbers: Sequence[int] | None = None,
    sampler: Sampler | None = None,
) -> Generated:
    """Responses of a causal model to prompts of any lengths.

    The result is in the given order, the ``num_return`` responses to a prompt one after another.
    Every response has random numbers of its own, from ``seed`` and its row number alone: it does
    not depend, beyond rounding of the logits, on what is generated beside it or on which rank. The
    global generators are not touched. Of the model's own generation config only the EOS ids are
    used, so that what is sampled is the distribution that the settings say.

    Args:
        policy: A transformers causal model, on the device to generate on.
        tokenizer: For padding, EOS and the texts.
        prompt_ids: Token ids of each prompt, none empty; see ``ChatFormat.prompt_ids``.
        settings: How to sample.
        seed: Of the sampling.
        num_return: Responses to each prompt.
        row_numbers: The number that each response has in the whole batch, of which these prompts
            are a part; None: 0, 1, 2, ...
        sampler: Another engine than that of ``settings.generation_backend``.

    Returns:
        ``Generated`` with ``len(prompt_ids) * num_return`` rows, on the model's device.

    Raises:
        NonFiniteError: The model's logits are NaN or infinite.
        ValueError: A prompt is empty, a stop id is not in the vocabulary, the backend cannot run
            the model, or ``sampler`` returned something other than a response to each prompt.
    """
    for number, prompt in enumerate(prompt_ids):
        if not len(prompt):
            raise ValueError(f"prompt {number} is empty; a response needs a token to follow")
    device = next(policy.parameters()).device
    pad_id = padding_id(tokenizer)
    ending = Ending(policy, tokenizer, settings)
    rows = [list(ids) for ids in prompt_ids for _ in range(num_return)]
    numbers = list(range(len(rows)) if row_numbers is None else row_numbers)
    sample = sampler or backend(settings.generation_backend)
    sampled = sample(
        policy, tokenizer, rows, settings, ending=ending, seed=seed, row_numbers=numbers
    )
    vocabulary = policy.get_input_embeddings().weight.shape[0]
    check_responses(sampled, len(rows), settings.max_new_tokens, vocabulary)
    cut = [ending.cut(list(response)) for response in sampled]
    ids, mask = pad_left(rows, pad_id)
    responses, response_mask = pad_right([response for response, _ in cut], pad_id)
    return Generated(
        prompt_ids=ids.to(device),
        prompt_mask=mask.to(device),
        responses=responses.to(device),
        response_mask=response_mask.to(device),
        ended=torch.tensor([ended for _, ended in cut], device=device),
        texts=[ending.text(response) for response, _ in cut],
    )


def check_responses(sampled: Any, rows: int, max_new_tokens: int, vocabulary: int) -> None:
    """Raise ValueError unless a sampler returned ids of a response for every prompt."""
    wanted = f"a sampler must return a list of {rows} responses, each a list of token ids"
    if not isinstance(sampled, Sequence) or len(sampled) != rows:
        count = f" of {len(sampled)}" if isinstance(sampled, Sequence) else ""
        raise ValueError(f"{wanted}; it returned a {type(sampled).__name__}{count}")
    for row, response in enumerate(sampled):
        if not isinstance(response, Sequence) or not all(isinstance(i, int) for i in response):
            raise ValueError(f"{wanted}; response {row} is {str(response)[:80]}")
        if not 1 <= len(response) <= max_new_tokens:
            raise ValueError(
                f"{wanted}, at least one and at most max_new_tokens={max_new_tokens}; "
                f"response {row} has {len(response)}"
            )
        unknown = [i for i in response if not 0 <= i < vocabulary]
        if unknown:
            raise ValueError(
                f"{wanted} of the policy's vocabulary, 0 to {vocabulary - 1}; response {row} has "
                f"{unknown[0]}"
            )
