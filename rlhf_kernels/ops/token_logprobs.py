"""`rlhf_kernels::token_logprobs` and its backward, on groups of rows [G, N, V].

Kernels take rows at one stride; the groups, one after the other, allow for another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import backends, checks
from rlhf_kernels.ops import define


def _forward(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    ignore_index: int,
    need_entropy: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = backends.choose("token_logprobs_forward", logits, backend)
    checks.temperatures_positive(temperatures, targets, ignore_index)
    if logits.shape[0] != 1:  # the kernel would name the row within its group
        checks.targets_in_range(targets, logits.shape[2], ignore_index)
    parts = [
        chosen.token_logprobs_forward(rows, targets[place], tau, ignore_index, need_entropy)
        for place, rows, tau in _groups(logits, temperature, temperatures)
    ]
    logprobs, entropies, normalizations = zip(*parts)
    # An operator returns tensors, so "none" is an empty one.
    entropy = _joined(entropies) if need_entropy else logprobs[0].new_empty(0)
    return _joined(logprobs), entropy, _joined(normalizations)


def _groups(
    logits: Tensor, temperature: float, temperatures: Tensor | None
) -> Iterator[tuple[slice, Tensor, float | Tensor]]:
    """Each group's place among all rows, its rows [N, V], and its temperature."""
    rows = logits.shape[1]
    for group in range(logits.shape[0]):
        place = slice(group * rows, (group + 1) * rows)
        yield place, logits[group], temperature if temperatures is None else temperatures[place]


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _forward_fake(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    ignore_index: int,
    need_entropy: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0] * logits.shape[1]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    normalization = logits.new_empty(rows, 2, dtype=dtype)
    entropy = normalization.new_empty(rows if need_entropy else 0)
    return normalization.new_empty(rows), entropy, normalization


def _backward(
    logits: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    ignore_index: int,
    normalization: Tensor,
    entropy: Tensor | None,
    backend: str | None,
) -> Tensor:
    chosen = backends.choose("token_logprobs_backward", logits, backend)
    whole = None if logits.shape[0] == 1 else logits.new_empty(logits.shape)
    for group, (place, rows, tau) in enumerate(_groups(logits, temperature, temperatures)):
        grad = chosen.token_logprobs_backward(
            grad_logprobs[place],
            None if grad_entropy is None else grad_entropy[place],
            rows,
            targets[place],
            tau,
            ignore_index,
            normalization[place],
            None if entropy is None else entropy[place],
            # Where there is one group, the kernel makes its own, in fresh pages.
            out=None if whole is None else whole[group],
        )
    return grad[None] if whole is None else whole


def _backward_fake(logits: Tensor, *others: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, temperature, temperatures, ignore_index, need_entropy, backend = inputs
    _, entropy, normalization = output
    constant = (normalization,) if need_entropy else (entropy, normalization)
    ctx.mark_non_differentiable(*constant)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, temperatures, entropy, normalization)
    ctx.options = (temperature, ignore_index, need_entropy, backend)


def _autograd_backward(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    logits, targets, temperatures, entropy, normalization = ctx.saved_tensors
    temperature, ignore_index, need_entropy, backend = ctx.options
    if grad_logprobs is None:
        if grad_entropy is None:
            return (None,) * 7
        grad_logprobs = normalization.new_zeros(targets.shape)
    if not need_entropy or grad_entropy is None:
        grad_entropy = entropy = None
    grad = token_logprobs_backward(
        logits,
        grad_logprobs,
        grad_entropy,
        targets,
        temperature,
        temperatures,
        ignore_index,
        normalization,
        entropy,
        backend,
    )
    return grad, None, None, None, None, None, None


token_logprobs_backward = define("token_logprobs_backward", _backward, _backward_fake)
token_logprobs = define(
    "token_logprobs", _forward, _forward_fake, _setup_context, _autograd_backward
)
