"""`rlhf_kernels::token_logprobs` and its backward, on rows [N, V]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import backends
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
    tau = temperature if temperatures is None else temperatures
    logprobs, entropy, lse = chosen.token_logprobs_forward(
        logits, targets, tau, ignore_index, need_entropy
    )
    # An operator returns tensors, so "none" is an empty one.
    return logprobs, lse.new_empty(0) if entropy is None else entropy, lse


def _forward_fake(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    ignore_index: int,
    need_entropy: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    lse = logits.new_empty(rows, dtype=dtype)
    return torch.empty_like(lse), lse.new_empty(rows if need_entropy else 0), lse


def _backward(
    logits: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    ignore_index: int,
    lse: Tensor,
    entropy: Tensor | None,
    backend: str | None,
) -> Tensor:
    chosen = backends.choose("token_logprobs_backward", logits, backend)
    tau = temperature if temperatures is None else temperatures
    return chosen.token_logprobs_backward(
        grad_logprobs, grad_entropy, logits, targets, tau, ignore_index, lse, entropy
    )


def _backward_fake(logits: Tensor, *others: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, temperature, temperatures, ignore_index, need_entropy, backend = inputs
    _, entropy, lse = output
    ctx.mark_non_differentiable(*((lse,) if need_entropy else (entropy, lse)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, temperatures, entropy, lse)
    ctx.options = (temperature, ignore_index, need_entropy, backend)


def _autograd_backward(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    logits, targets, temperatures, entropy, lse = ctx.saved_tensors
    temperature, ignore_index, need_entropy, backend = ctx.options
    if grad_logprobs is None:
        if grad_entropy is None:
            return (None,) * 7
        grad_logprobs = torch.zeros_like(lse)
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
        lse,
        entropy,
        backend,
    )
    return grad, None, None, None, None, None, None


token_logprobs_backward = define("token_logprobs_backward", _backward, _backward_fake)
token_logprobs = define(
    "token_logprobs", _forward, _forward_fake, _setup_context, _autograd_backward
)
