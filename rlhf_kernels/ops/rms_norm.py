"""`rlhf_kernels::rms_norm`: the normalization of Llama-like transformers, and its backward.

y = x·rsqrt(mean(x²) + eps)·weight  (Zhang & Sennrich, 2019, https://arxiv.org/abs/1910.07467)

floor: forward 2 numbers an element are moved, backward 3
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import backends, checks
from rlhf_kernels.ops import define


def _forward(x: Tensor, weight: Tensor, eps: float, backend: str | None) -> tuple[Tensor, Tensor]:
    return backends.choose("rms_norm_forward", x, backend).rms_norm_forward(x, weight, eps)


def _forward_fake(
    x: Tensor, weight: Tensor, eps: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty(math.prod(x.shape[:-1]), dtype=dtype)


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_weight: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    chosen = backends.choose("rms_norm_backward", x, backend)
    grad_x, grad_weight = chosen.rms_norm_backward(grad, x, weight, rstd, need_weight)
    # An operator returns tensors, so "none" is an empty one.
    return grad_x, weight.new_empty(0) if grad_weight is None else grad_weight


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_weight: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if need_weight else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.backend = inputs
    rstd = output[1]
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x, weight, rstd)


def _autograd_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    of_x, of_weight = ctx.needs_input_grad[:2]
    grad_x, grad_weight = _rms_norm_backward(grad, x, weight, rstd, of_weight, ctx.backend)
    return grad_x if of_x else None, grad_weight if of_weight else None, None, None


_rms_norm_backward = define("rms_norm_backward", _backward, _backward_fake)
_rms_norm = define("rms_norm", _forward, _forward_fake, _setup_context, _autograd_backward)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """x·rsqrt(mean(x²) + eps)·weight over the last dimension, differentiable once by both.

    Float32 arithmetic, rounded once: transformers' module rounds 16-bit types before the weight,
    too. The weight's gradient adds up float32, in an order of its own on each backend; on `cpu` the
    number of threads does not change it.

    Args:
        x: [..., N], float32, bfloat16, float16, or float64 (reference backend); any strides.
        weight: [N], any floating-point dtype.
        eps: a number of 0 or more.
        backend: see `rlhf_kernels.backends`.

    Returns:
        [..., N] without gaps, of the dtype of x (whatever that of the weight).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit.
        BackendUnavailableError, UnsupportedOperationError: a backend named that cannot do it.
    """
    checks.floating(x=x, weight=weight)
    if x.dim() == 0:
        raise ValueError("x has shape (); expected [..., N]")
    checks.shape("weight", weight, x.shape[-1:], "the last dimension of x")
    checks.same_device("x", x, weight=weight)
    if not eps >= 0.0:
        raise ValueError(f"eps is {eps!r}; expected a number of 0 or more")
    return _rms_norm(x, weight, checks.finite("eps", eps), backend)[0]
