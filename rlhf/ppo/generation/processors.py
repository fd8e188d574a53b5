"""From logits to a token: transformers' processors, and a draw that each response makes alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlhf.engine import NonFiniteError
from rlhf.ppo.generation.options import warpers
from rlhf.ppo.generation.settings import GenerationSettings
from rlhf.ppo.seeds import derive_seed

BLOCK = 256  # tokens, of which a step of sampling sums up all and searches one block


def uniform_numbers(seed: int, row_numbers: Sequence[int], steps: int) -> Tensor:
    """fp64 [rows, steps] in [0, 1): a stream for each row, from the seed and its number."""
    streams = torch.empty(len(row_numbers), steps, dtype=torch.float64)
    for stream, number in zip(streams, row_numbers):
        generator = torch.Generator().manual_seed(derive_seed(seed, "row", number))
        torch.rand(steps, generator=generator, dtype=torch.float64, out=stream)
    return streams


def shaping(settings: GenerationSettings) -> LogitsProcessorList:
    """What makes the distribution to sample from out of logits, in transformers' order."""
    processors = LogitsProcessorList()
    if settings.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        processors.append(TopPLogitsWarper(float(settings.top_p)))
    if settings.min_p:
        processors.append(MinPLogitsWarper(float(settings.min_p)))
    if settings.generation_backend == "generate":
        processors.extend(warpers(settings.generation_options))
    return processors


def draw(scores: Tensor, uniforms: Tensor) -> Tensor:
    """The token of each row by inverse transform sampling, int64 [B].

    One uniform number a row, looked up in the cumulative distribution: that of blocks of the
    vocabulary first, then that inside the block found. ``torch.multinomial`` draws a number for
    every entry of the vocabulary instead, which on a CPU takes a third of the time of a step.

    Args:
        scores: [B, V], the logarithm of the distribution up to a constant a row.
        uniforms: fp64 [B] in [0, 1).
    """
    shares = scores.softmax(-1, dtype=torch.float32)
    blocks = torch.nn.functional.pad(shares, (0, -shares.shape[-1] % BLOCK))
    blocks = blocks.unflatten(-1, (-1, BLOCK))
    # float64 from here on: rare tokens keep their share next to a sum near 1.
    ends = blocks.sum(-1).double().cumsum(-1)
    total = ends[:, -1:]
    # The largest number times the total can round up to the total, behind which nothing stands.
    point = (uniforms[:, None] * total).minimum(total.nextafter(torch.zeros_like(total)))
    # The first end that exceeds the point, so never a block, or below a token, of probability 0.
    # Clamped for NaN, which exceeds nothing: whoever calls looks for it, but maybe later.
    block = torch.searchsorted(ends, point, right=True).clamp(max=blocks.shape[1] - 1)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1).double()
    before = torch.nn.functional.pad(ends, (1, 0)).gather(1, block)
    place = torch.searchsorted(before + inside.cumsum(-1), point, right=True)
    # The block's own sum rounds otherwise, so the point can lie behind its last token.
    last = BLOCK - 1 - (inside > 0).flip(-1).int().argmax(-1, keepdim=True)
    token = block * BLOCK + place.minimum(last)
    return token[:, 0].clamp(max=scores.shape[-1] - 1)


def only(token: Tensor, scores: Tensor) -> Tensor:
    """Scores [B, V] that leave ``token`` [B] as the only possible one."""
    return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


def unusable(scores: Tensor) -> Tensor:
    """bool [B], rows of which no token can be chosen.

    NaN would not fail by itself: its comparisons are false, and some token comes out. The largest
    of a row is NaN where any is, and infinite where any is or where all are -inf.
    """
    return ~scores.amax(-1).isfinite()


def not_finite(where: str) -> NonFiniteError:
    """The error of unusable logits; ``where`` they are."""
    return NonFiniteError(
        f"the policy's logits are NaN or infinite {where}. Look at its weights: it may have broken "
        "in training; lower the learning rate."
    )


class RequireFinite(LogitsProcessor):
    """Raises NonFiniteError for logits of which no token can be chosen."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bad = unusable(scores)
        if bad.any():
            raise not_finite(
                f"for {int(bad.sum())} of {len(bad)} responses after {input_ids.shape[1]} tokens "
                "(prompt included)"
            )
        return scores


class InverseTransformSampling(LogitsProcessor):
    """Draws a token for each row and leaves it the only possible one.

    Args:
        uniforms: fp64 [B, T], the number for each row and step.
    """

    def __init__(self, uniforms: Tensor) -> None:
        self.uniforms = uniforms
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.step += 1
        return only(draw(scores, self.uniforms[:, self.step - 1]), scores)


class RepetitionPenalty(LogitsProcessor):
    """Makes tokens less likely that a row has already (Keskar et al. 2019, arXiv 1909.05858).

    transformers' own, up to 5.17, counts the padding before a prompt, too, so that what a response
    is would depend on its neighbours' lengths, and EOS would be penalised where it pads.

    Args:
        penalty: Divides positive logits, multiplies negative ones.
        prompt_mask: bool [B, P], False on padding.
    """

    def __init__(self, penalty: float, prompt_mask: Tensor) -> None:
        self.penalty = penalty
        self.prompt_mask = prompt_mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        new = input_ids.shape[1] - self.prompt_mask.shape[1]
        counts = torch.nn.functional.pad(self.prompt_mask, (0, new), value=True).to(scores.dtype)
        seen = torch.zeros_like(scores).scatter_reduce_(1, input_ids, counts, "amax") > 0
        penalised = torch.where(scores > 0, scores / self.penalty, scores * self.penalty)
        return torch.where(seen, penalised, scores)


def logits_processors(
    settings: GenerationSettings, uniforms: Tensor, prompt_mask: Tensor
) -> LogitsProcessorList:
    """What turns logits into the choice of a token; the likeliest is left to transformers.

    Args:
        settings: How to sample.
        uniforms: See ``InverseTransformSampling``.
        prompt_mask: bool [B, P] of the batch.
    """
    processors = LogitsProcessorList([RequireFinite()])
    if settings.repetition_penalty != 1.0:
        processors.append(RepetitionPenalty(settings.repetition_penalty, prompt_mask))
    if not settings.greedy:
        processors += [*shaping(settings), InverseTransformSampling(uniforms)]
    return processors
