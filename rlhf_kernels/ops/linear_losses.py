"""`rlhf_kernels::linear_cross_entropy` and `rlhf_kernels::linear_ppo_loss`.

What each token adds to these losses is known as soon as its log-probability is, so one pass over
the chunks forms logits, loss and gradients: three matrix products, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import backends
from rlhf_kernels.backends import reference
from rlhf_kernels.ops.chunks import (
    Gradients,
    Head,
    Rows,
    fake_gradients,
    no_autocast,
    wide_dtype,
)
from rlhf_kernels.ops.formed_gradients import define_loss
from rlhf_kernels.ops.ppo_loss import loss_config
from rlhf_kernels.ppo_types import NUM_STATS

# From a chunk's place, log-probabilities and entropies to the loss's gradients by both.
Slopes = Callable[[slice, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def _pass(
    rows: Rows, hidden: Tensor, need_entropy: bool, needed: list[bool], slopes: Slopes
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Log-probabilities and entropies [N] (0 where ignored), and the gradients of the loss."""
    logprobs = hidden.new_zeros(hidden.shape[0], dtype=wide_dtype(rows.head.dtype))
    entropy = torch.zeros_like(logprobs) if need_entropy else logprobs
    gradients = Gradients(rows, hidden, needed)
    for chunk in rows.chunks():
        of_chunk, entropy_of_chunk, normalization = rows.logprobs(chunk, need_entropy)
        rows.put(logprobs, chunk.place, of_chunk)
        if entropy_of_chunk is not None:
            rows.put(entropy, chunk.place, entropy_of_chunk)
        if any(needed):
            g, h = slopes(chunk.place, of_chunk, entropy_of_chunk)
            grad_logits = rows.logit_gradients(chunk, g, h, normalization, entropy_of_chunk)
            gradients.add(chunk, grad_logits)
    return logprobs, entropy, gradients.finish()


def _cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    normalizer: Tensor | None,
    mean: bool,
    dtype: torch.dtype,
    chunk_size: int | None,
    group: str | None,
    backend: str | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    head = Head(weight, bias, dtype, chunk_size, group, backend)
    with torch.no_grad(), no_autocast(hidden):
        rows = Rows(hidden, head, targets, 1.0, None, ignore_index)
        if normalizer is None:
            count = max(rows.count, 1) if mean else 1
            normalizer = hidden.new_full((), count, dtype=wide_dtype(dtype))
        slope = -1.0 / normalizer

        def slopes(_: slice, logprobs: Tensor, __: Tensor | None) -> tuple[Tensor, None]:
            return slope.expand_as(logprobs), None

        logprobs, _, gradients = _pass(rows, hidden, False, needed, slopes)
        return (-logprobs.sum() / normalizer, *gradients)


def _cross_entropy_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    normalizer: Tensor | None,
    mean: bool,
    dtype: torch.dtype,
    chunk_size: int | None,
    group: str | None,
    backend: str | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=wide_dtype(dtype))
    return (loss, *fake_gradients(hidden, weight, bias, needed))


def _ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor | None,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old_values: Tensor | None,
    returns: Tensor | None,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    ignore_index: int,
    normalizer: Tensor | None,
    clip_range: float,
    clip_range_high: float | None,
    dual_clip: float | None,
    value_clip_range: float | None,
    value_coef: float,
    entropy_coef: float,
    aggregation: str,
    kl_loss_coef: float,
    kl_loss_estimator: str,
    dtype: torch.dtype,
    chunk_size: int | None,
    group: str | None,
    backend: str | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = Head(weight, bias, dtype, chunk_size, group, backend)
    clips = (clip_range, clip_range_high, dual_clip, value_clip_range, value_coef, entropy_coef)
    of_kl = (kl_loss_coef, kl_loss_estimator)
    config = loss_config(*clips, aggregation, *of_kl)
    # The same terms, for tokens that are not in their sequences: each is weighed afterwards.
    per_token = loss_config(*clips, "token-mean", *of_kl)
    with torch.no_grad(), no_autocast(hidden):
        rows = Rows(hidden, head, targets, temperature, temperatures, ignore_index)
        chosen = loss_kernels(old_logprobs, backend)
        weights = reference.aggregation_weights(
            mask, cu_seqlens, aggregation, normalizer, old_logprobs.dtype
        )
        one = weights.new_ones(())

        def slopes(
            place: slice, logprobs: Tensor, entropy: Tensor | None
        ) -> tuple[Tensor, Tensor | None]:
            def of_chunk(x: Tensor | None) -> Tensor | None:
                return None if x is None else rows.pick(x.reshape(-1), place)[None]

            old, weight_of = of_chunk(old_logprobs), of_chunk(weights)
            _, _, g, _, h = chosen.ppo_loss_forward(
                logprobs[None],
                old,
                of_chunk(advantages),
                torch.ones_like(logprobs[None], dtype=torch.bool),
                None,
                None,
                None,
                # Without a bonus the entropy is a statistic alone, and its gradient is saved.
                entropy[None] if entropy is not None and entropy_coef else None,
                of_chunk(ref_logprobs),
                of_chunk(importance_weights),
                None,
                per_token,
                one,
            )
            return (g * weight_of)[0], None if h is None else (h * weight_of)[0]

        logprobs, entropy, gradients = _pass(rows, hidden, True, needed, slopes)
        loss, stats, _, grad_values, _ = chosen.ppo_loss_forward(
            logprobs.view(mask.shape),
            old_logprobs,
            advantages,
            mask,
            values,
            old_values,
            returns,
            entropy.view(mask.shape),
            ref_logprobs,
            importance_weights,
            cu_seqlens,
            config,
            normalizer,
        )
        # An operator returns tensors, so "none" is an empty one.
        of_values = loss.new_empty(0) if grad_values is None else grad_values
        return (loss, stats, *gradients, of_values)


def _ppo_loss_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor | None,
    targets: Tensor,
    old_logprobs: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, stats = old_logprobs.new_empty(()), old_logprobs.new_empty(NUM_STATS)
    of_values = old_logprobs.new_empty(0 if values is None else values.shape)
    needed = others[-1]
    return (loss, stats, *fake_gradients(hidden, weight, bias, needed), of_values)


def loss_kernels(tensor: Tensor, backend: str | None) -> Any:
    """The named backend where it has the loss over tokens, else the default: it is the small part.

    The row kernels, which are chosen before, raise where the name itself is wrong.
    """
    try:
        return backends.choose("ppo_loss_forward", tensor, backend)
    except backends.UnsupportedOperationError:
        return backends.default("ppo_loss_forward", tensor.device.type, tensor.dtype)


linear_cross_entropy = define_loss(
    "linear_cross_entropy", _cross_entropy, _cross_entropy_fake, statistics=0
)
linear_ppo_loss = define_loss("linear_ppo_loss", _ppo_loss, _ppo_loss_fake, statistics=1)
