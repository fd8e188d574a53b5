"""The reference backend's layers of Llama-like transformers: see `reference.py`."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up of tensors [..., N]."""
    wide = _wide(gate)
    return _stored(wide * wide.sigmoid() * _wide(up), gate)


def swiglu_backward(
    gate: Tensor, up: Tensor, grad_hidden: Tensor, need_hidden: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of gate and up [..., N], and silu(gate)·up again (or None)."""
    wide, wide_up, grad = _wide(gate), _wide(up), _wide(grad_hidden)
    sigmoid = wide.sigmoid()
    # Of -gate, as 1 - sigmoid would lose the digits of what is left.
    slope = sigmoid * (1.0 + wide * (-wide).sigmoid())
    silu = wide * sigmoid
    grad_gate, grad_up = grad * wide_up * slope, grad * silu
    hidden = _stored(silu * wide_up, gate) if need_hidden else None
    return _stored(grad_gate, gate), _stored(grad_up, gate), hidden


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x·rstd·weight [..., N], and rstd = rsqrt(mean(x²) + eps) [rows]."""
    wide = _wide(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return _stored(wide * rstd * weight.to(wide.dtype), x), rstd.flatten()


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x [..., N] and of the weight [N] (or None), rstd as the forward gave it."""
    rstd = rstd.view(*x.shape[:-1], 1)
    normalized, wide_grad = _wide(x) * rstd, _wide(grad)
    weighted = wide_grad * weight.to(rstd.dtype)
    mean = (weighted * normalized).mean(-1, keepdim=True)
    grad_x = _stored(rstd * (weighted - normalized * mean), x)
    if not need_weight:
        return grad_x, None
    columns = (wide_grad * normalized).reshape(rstd.numel(), weight.numel())
    return grad_x, columns.sum(0).to(weight.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, adjoint: bool, out: Tensor) -> Tensor:
    """x·cos + rotate_half(x)·sin of x [B, H, T, D] into `out`, or the adjoint: a gradient's."""
    wide = _wide(x)
    cos, sin = (table.to(wide.dtype).unsqueeze(1) for table in (cos, sin))
    turned = -_rotate_half(wide * sin) if adjoint else _rotate_half(wide) * sin
    return out.copy_(wide * cos + turned)


def _rotate_half(x: Tensor) -> Tensor:
    lower, upper = x.chunk(2, dim=-1)
    return torch.cat([-upper, lower], dim=-1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _stored(result: Tensor, like: Tensor) -> Tensor:
    """In the dtype of the input, without gaps: operations keep the strides of theirs."""
    return result.to(like.dtype).contiguous()
