"""`rlhf_kernels::rotary`: the position embedding of Llama-like transformers, and its adjoint.

y = x·cos + rotate_half(x)·sin, rotate_half(x) = [-x₂, x₁] for the halves x₁, x₂ of a head
(Su et al., 2021, https://arxiv.org/abs/2104.09864, with halves in place of neighbours)

floor: 2 numbers an element are moved, forward and backward
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_kernels import backends, checks
from rlhf_kernels.ops import define


def _rotate(
    x: Tensor, cos: Tensor, sin: Tensor, adjoint: bool, by_steps: bool, backend: str | None
) -> Tensor:
    out = _rotate_fake(x, cos, sin, adjoint, by_steps, backend)
    return backends.choose("rotary", x, backend).rotary(x, cos, sin, adjoint, out)


def _rotate_fake(
    x: Tensor, cos: Tensor, sin: Tensor, adjoint: bool, by_steps: bool, backend: str | None
) -> Tensor:
    """Without gaps as [B, T, H, D] or as [B, H, T, D]."""
    sequences, heads, steps, width = x.shape
    if by_steps:
        return x.new_empty(sequences, steps, heads, width).transpose(1, 2)
    return x.new_empty(sequences, heads, steps, width)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, *ctx.options = inputs
    ctx.save_for_backward(cos, sin)


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    adjoint, by_steps, backend = ctx.options
    return _rotary(grad, cos, sin, not adjoint, by_steps, backend), *(None,) * 5


_rotary = define("rotary", _rotate, _rotate_fake, _setup_context, _autograd_backward)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> Tensor:
    """x·cos + rotate_half(x)·sin, differentiable once by x; float32 arithmetic, rounded once.

    What transformers' `apply_rotary_pos_emb` does to queries or keys; the halves of cos and sin
    need not be equal.

    Args:
        x: [B, H, T, D], D even, float32, bfloat16, float16, or float64 (reference backend); any
            strides.
        cos, sin: [B or 1, T, D], any floating-point dtype; they get no gradient.
        backend: see `rlhf_kernels.backends`.

    Returns:
        [B, H, T, D], of the dtype of x. It lies in memory as x does, and so does the gradient of x:
        a transposed view of [B, T, H, D] gives one, too; without gaps.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
        BackendUnavailableError, UnsupportedOperationError: a backend named that cannot do it.
    """
    checks.floating(x=x, cos=cos, sin=sin)
    checks.dimensions("x", x, 4, "[B, H, T, D]")
    sequences, _, steps, width = x.shape
    if width % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected an even last dimension")
    checks.dimensions("cos", cos, 3, "[B or 1, T, D]")
    expected = (1 if cos.shape[0] == 1 else sequences, steps, width)
    checks.shape("cos", cos, expected, "[B or 1, T, D] of x")
    checks.like("cos", cos, sin=sin)
    checks.same_device("x", x, cos=cos)
    by_steps = x.stride(1) < x.stride(2)
    return _rotary(x, cos.detach(), sin.detach(), False, by_steps, backend)
