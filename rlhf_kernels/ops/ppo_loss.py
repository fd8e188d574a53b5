"""`rlhf_kernels::ppo_loss`: the forward forms the gradients, the backward scales them."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from rlhf_kernels import backends
from rlhf_kernels.ops import define
from rlhf_kernels.ppo_types import NUM_STATS, PPOLossConfig

loss_config = functools.lru_cache(maxsize=64)(PPOLossConfig)


def _forward(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    cu_seqlens: Tensor | None,
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
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    chosen = backends.choose("ppo_loss_forward", logprobs, backend)
    config = loss_config(
        clip_range,
        clip_range_high,
        dual_clip,
        value_clip_range,
        value_coef,
        entropy_coef,
        aggregation,
        kl_loss_coef,
        kl_loss_estimator,
    )
    loss, stats, grad_logprobs, grad_values, grad_entropy = chosen.ppo_loss_forward(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        values,
        old_values,
        returns,
        entropy,
        ref_logprobs,
        importance_weights,
        cu_seqlens,
        config,
        normalizer,
    )
    # An operator returns tensors, so "none" is an empty one.
    if grad_values is None:
        grad_values = logprobs.new_empty(0)
    if grad_entropy is None:
        grad_entropy = logprobs.new_empty(0)
    return loss, stats, grad_logprobs, grad_values, grad_entropy


def _fake(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    entropy: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def gradient(of: Tensor | None) -> Tensor:
        return logprobs.new_empty(0 if of is None else logprobs.shape)

    loss, stats = logprobs.new_empty(()), logprobs.new_empty(NUM_STATS)
    return loss, stats, gradient(logprobs), gradient(values), gradient(entropy)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, stats, *gradients = output
    ctx.mark_non_differentiable(stats, *gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    ctx.has_values, ctx.has_entropy = inputs[4] is not None, inputs[7] is not None
    ctx.inputs = len(inputs)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None] * ctx.inputs
    if grad_loss is not None:
        grad_logprobs, grad_values, grad_entropy = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            gradients[0] = grad_loss * grad_logprobs
        if ctx.has_values and ctx.needs_input_grad[4]:
            gradients[4] = grad_loss * grad_values
        if ctx.has_entropy and ctx.needs_input_grad[7]:
            gradients[7] = grad_loss * grad_entropy
    return tuple(gradients)


ppo_loss = define("ppo_loss", _forward, _fake, _setup_context, _backward)
