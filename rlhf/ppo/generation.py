"""Sampling responses: many prompts at once, in order, reproducible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlhf.data import ChatFormat, pad_left
from rlhf.engine import NonFiniteError, check_choice, check_number, resolve_dtype
from rlhf.engine.precision import autocast
from rlhf.ppo.seeds import derive_seed


@dataclass(frozen=True)
class GenerationSettings:
    """How responses are sampled.

    Attributes:
        max_new_tokens: Longest response, in tokens.
        temperature: Divides the logits.
        top_p: Sample among the likeliest tokens that together have this probability.
        top_k: Sample among so many likeliest tokens; 0 for all.
        greedy: Take the likeliest token instead of sampling; the three above then do nothing.
        batch_size: Responses generated side by side. Changes memory and speed, not the result.
        dtype: Precision of matrix products: auto, float32 or bfloat16.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False
    batch_size: int = 64
    dtype: str = "auto"

    def __post_init__(self) -> None:
        check_number(self, "max_new_tokens", at_least=1, integer=True)
        check_number(self, "temperature", above=0)
        check_number(self, "top_p", above=0, at_most=1)
        check_number(self, "top_k", at_least=0, integer=True)
        check_number(self, "batch_size", at_least=1, integer=True)
        check_choice(self, "dtype", ("auto", "float32", "bfloat16"))


@dataclass
class Generated:
    """Responses, a row each, in the order of the prompts.

    Attributes:
        prompt_ids: int64 [B, P], left padded. prompt_mask: bool [B, P].
        responses: int64 [B, T], right padded. response_mask: bool [B, T], True through the first
            EOS, inclusive; all of a response that has none.
        ended: bool [B], whether the response has an EOS.
        texts: The responses' texts, without special tokens.
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
) -> Generated:
    """Responses of a causal model to prompts of any lengths.

    Prompts are sorted by length, longest first, and generated ``settings.batch_size`` at a time;
    the result is in the given order, the ``num_return`` responses to a prompt one after another.
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

    Returns:
        ``Generated`` with ``len(prompt_ids) * num_return`` rows, on the model's device.

    Raises:
        NonFiniteError: The model's logits are NaN or infinite.
    """
    device = next(policy.parameters()).device
    eos_ids = eos_token_ids(policy, tokenizer)
    pad_id = padding_id(tokenizer)
    rows = [list(ids) for ids in prompt_ids for _ in range(num_return)]
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    numbers = range(len(rows)) if row_numbers is None else row_numbers
    uniforms = uniform_numbers(seed, numbers, settings.max_new_tokens).to(device)
    # Greedy for transformers: sampling, where it is asked for, is the last of the processors.
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=eos_ids or None,
        pad_token_id=pad_id,
    )

    ids, mask = pad_left(rows, pad_id)
    responses = torch.full((len(rows), settings.max_new_tokens), pad_id)
    with generating(policy, config), autocast(resolve_dtype(settings.dtype, device), device):
        for start in range(0, len(rows), settings.batch_size):
            chunk = order[start : start + settings.batch_size]
            chunk_ids, chunk_mask = pad_left([rows[row] for row in chunk], pad_id)
            output = policy.generate(
                input_ids=chunk_ids.to(device),
                attention_mask=chunk_mask.long().to(device),
                logits_processor=logits_processors(settings, uniforms[chunk]),
            )
            new = output[:, chunk_ids.shape[1] :].cpu()
            responses[torch.tensor(chunk), : new.shape[1]] = new
    responses, response_mask, ended = cut_at_eos(responses, eos_ids)
    return Generated(
        prompt_ids=ids.to(device),
        prompt_mask=mask.to(device),
        responses=responses.to(device),
        response_mask=response_mask.to(device),
        ended=ended.to(device),
        texts=decode(tokenizer, responses, response_mask),
    )


def cut_at_eos(responses: Tensor, eos_ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Where each response ends, from its own ids alone.

    A response without EOS fills the whole width, because the longest one sets it; so nothing here
    needs to know the padding token, which may be EOS.

    Args:
        responses: int64 [B, T], the ids after the prompt.
        eos_ids: The ids that end a response.

    Returns:
        ``(responses, mask, ended)``: int64 and bool [B, T'] with T' the longest response, bool [B].
    """
    is_eos = torch.isin(responses, torch.tensor(list(eos_ids), dtype=responses.dtype))
    earlier = is_eos.long().cumsum(1) - is_eos.long()
    mask = earlier == 0
    width = int(mask.sum(1).max())
    return responses[:, :width], mask[:, :width], is_eos.any(1)


def decode(tokenizer: Any, responses: Tensor, mask: Tensor) -> list[str]:
    """The texts of responses, exactly as they continue their prompts."""
    chat_format = ChatFormat(tokenizer, "none")
    return [
        chat_format.decode_completion(ids[valid].tolist()) for ids, valid in zip(responses, mask)
    ]


def eos_token_ids(policy: Any, tokenizer: Any) -> list[int]:
    """The ids that end a response: the generation config's and the tokenizer's."""
    configured = getattr(policy.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list | tuple) else [configured]
    return sorted({int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None})


def padding_id(tokenizer: Any) -> int:
    """An id to fill padding with; masks say where it is, so any id will do."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


class RequireFinite(LogitsProcessor):
    """Raises NonFiniteError for logits of which no token can be chosen.

    NaN would not fail by itself: its comparisons are false, and some token comes out.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # The largest of a row is NaN where any is, and infinite where any is or where all are -inf.
        bad = ~scores.amax(-1).isfinite()
        if bad.any():
            raise NonFiniteError(
                f"the policy's logits are NaN or infinite for {int(bad.sum())} of {len(bad)} "
                f"responses after {input_ids.shape[1]} tokens (prompt included). Look at its "
                "weights: it may have broken in training; lower the learning rate."
            )
        return scores


class InverseTransformSampling(LogitsProcessor):
    """Draws a token for each row and leaves it the only possible one.

    One uniform number a row, looked up in the cumulative distribution. ``torch.multinomial`` draws
    one for every entry of the vocabulary, which on a CPU takes a third of the time of a step.

    Args:
        uniforms: fp64 [B, T], the number for each row and step.
    """

    def __init__(self, uniforms: Tensor) -> None:
        self.uniforms = uniforms
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # float64 from here on: rare tokens keep their share next to a sum near 1.
        cumulative = scores.softmax(-1, dtype=torch.float32).cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        point = self.uniforms[:, self.step, None] * total
        self.step += 1
        # The first token whose cumulative share exceeds the point, so never one of probability 0;
        # the largest point can round up to the total itself.
        token = torch.searchsorted(cumulative, point, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def logits_processors(settings: GenerationSettings, uniforms: Tensor) -> LogitsProcessorList:
    """What turns logits into the choice of a token; the likeliest is left to transformers.

    Args:
        settings: How to sample.
        uniforms: See ``InverseTransformSampling``.
    """
    processors = LogitsProcessorList([RequireFinite()])
    if settings.greedy:
        return processors
    if settings.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        processors.append(TopPLogitsWarper(float(settings.top_p)))
    processors.append(InverseTransformSampling(uniforms))
    return processors


@contextmanager
def generating(model: Any, config: GenerationConfig) -> Iterator[None]:
    """The model in eval mode, with this generation config as its own.

    Eval mode, because a KV cache and gradient checkpointing exclude each other. Its own config,
    because transformers fills whatever a given config leaves open from it, and a repetition penalty
    there would sample from another distribution than the one whose log-probabilities PPO trains.
    """
    was_training, was_config = model.training, model.generation_config
    model.eval()
    model.generation_config = config
    try:
        yield
    finally:
        model.train(was_training)
        model.generation_config = was_config


def uniform_numbers(seed: int, row_numbers: Sequence[int], steps: int) -> Tensor:
    """fp64 [rows, steps] in [0, 1): a stream for each row, from the seed and its number."""
    streams = []
    for number in row_numbers:
        generator = torch.Generator().manual_seed(derive_seed(seed, "row", number))
        streams.append(torch.rand(steps, generator=generator, dtype=torch.float64))
    return torch.stack(streams)
