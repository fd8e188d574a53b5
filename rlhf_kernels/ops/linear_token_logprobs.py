"""`rlhf_kernels::linear_token_logprobs`: log-probabilities, whose gradients come from outside.

What the loss makes of them is not known here, so the backward computes each chunk of logits again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops import define
from rlhf_kernels.ops.chunks import (
    Gradients,
    Head,
    Rows,
    fake_gradients,
    no_autocast,
    wide_dtype,
)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    ignore_index: int,
    need_entropy: bool,
    dtype: torch.dtype,
    chunk_size: int | None,
    group: str | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(weight, bias, dtype, chunk_size, group, backend)
    with torch.no_grad(), no_autocast(hidden):
        rows = Rows(hidden, head, targets, temperature, temperatures, ignore_index)
        logprobs = hidden.new_zeros(hidden.shape[0], dtype=wide_dtype(dtype))
        entropy = torch.zeros_like(logprobs) if need_entropy else logprobs.new_empty(0)
        normalization = logprobs.new_zeros(hidden.shape[0], 2)
        for chunk in rows.chunks():
            of_chunk = rows.logprobs(chunk, need_entropy)
            rows.put(logprobs, chunk.place, of_chunk[0])
            if of_chunk[1] is not None:
                rows.put(entropy, chunk.place, of_chunk[1])
            rows.put(normalization, chunk.place, of_chunk[2])
    return logprobs, entropy, normalization


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    ignore_index: int,
    need_entropy: bool,
    dtype: torch.dtype,
    chunk_size: int | None,
    group: str | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = hidden.shape[0]
    normalization = hidden.new_empty(rows, 2, dtype=wide_dtype(dtype))
    entropy = normalization.new_empty(rows if need_entropy else 0)
    return normalization.new_empty(rows), entropy, normalization


def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    ignore_index: int,
    normalization: Tensor,
    entropy: Tensor | None,
    dtype: torch.dtype,
    chunk_size: int | None,
    group: str | None,
    backend: str | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias; empty where `needed` says no."""
    head = Head(weight, bias, dtype, chunk_size, group, backend)
    with torch.no_grad(), no_autocast(hidden):
        rows = Rows(hidden, head, targets, temperature, temperatures, ignore_index)
        gradients = Gradients(rows, hidden, needed)
        for chunk in rows.chunks():
            grad_logits = rows.logit_gradients(
                chunk,
                rows.pick(grad_logprobs, chunk.place),
                None if grad_entropy is None else rows.pick(grad_entropy, chunk.place),
                rows.pick(normalization, chunk.place),
                None if entropy is None else rows.pick(entropy, chunk.place),
            )
            gradients.add(chunk, grad_logits)
        return gradients.finish()


def _backward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    ignore_index: int,
    normalization: Tensor,
    entropy: Tensor | None,
    dtype: torch.dtype,
    chunk_size: int | None,
    group: str | None,
    backend: str | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(hidden, weight, bias, needed)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, temperature, temperatures, ignore_index, need_entropy = inputs[
        :8
    ]
    _, entropy, normalization = output
    constant = (normalization,) if need_entropy else (entropy, normalization)
    ctx.mark_non_differentiable(*constant)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, temperatures, entropy, normalization)
    ctx.options = (temperature, ignore_index, need_entropy, *inputs[8:])


def _autograd_backward(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, targets, temperatures, entropy, normalization = ctx.saved_tensors
    temperature, ignore_index, need_entropy, *head = ctx.options
    if grad_logprobs is None:
        if grad_entropy is None:
            return (None,) * 12
        grad_logprobs = normalization.new_zeros(targets.shape)
    if not need_entropy or grad_entropy is None:
        grad_entropy = entropy = None
    needed = [ctx.needs_input_grad[i] for i in range(3)]
    gradients = linear_token_logprobs_backward(
        hidden,
        weight,
        bias,
        targets,
        grad_logprobs,
        grad_entropy,
        temperature,
        temperatures,
        ignore_index,
        normalization,
        entropy,
        *head,
        needed,
    )
    kept = [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]
    return (*kept, *([None] * 9))


linear_token_logprobs_backward = define("linear_token_logprobs_backward", _backward, _backward_fake)
linear_token_logprobs = define(
    "linear_token_logprobs", _forward, _forward_fake, _setup_context, _autograd_backward
)
