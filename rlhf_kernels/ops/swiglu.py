"""`rlhf_kernels::swiglu`: the gated unit of Llama-like feed-forward layers, and its backward.

h = silu(gate)·up, silu(x) = x·sigmoid(x)  (Shazeer, 2020, https://arxiv.org/abs/2002.05202)

floor: forward 3 numbers an element are moved, backward 5; 6 with h, which need not be kept then
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_kernels import backends, checks
from rlhf_kernels.ops import define


def _forward(gate: Tensor, up: Tensor, backend: str | None) -> Tensor:
    return backends.choose("swiglu_forward", gate, backend).swiglu_forward(gate, up)


def _forward_fake(gate: Tensor, up: Tensor, backend: str | None) -> Tensor:
    return gate.new_empty(gate.shape)


def _backward(
    gate: Tensor, up: Tensor, grad_hidden: Tensor, need_hidden: bool, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = backends.choose("swiglu_backward", gate, backend)
    grad_gate, grad_up, hidden = chosen.swiglu_backward(gate, up, grad_hidden, need_hidden)
    # An operator returns tensors, so "none" is an empty one.
    return grad_gate, grad_up, gate.new_empty(0) if hidden is None else hidden


def _backward_fake(
    gate: Tensor, up: Tensor, grad_hidden: Tensor, need_hidden: bool, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = gate.new_empty(gate.shape if need_hidden else 0)
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape), hidden


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    grad_gate, grad_up, _ = _swiglu_backward(gate, up, grad, False, ctx.backend)
    of_gate, of_up, _ = ctx.needs_input_grad
    return grad_gate if of_gate else None, grad_up if of_up else None, None


_swiglu_backward = define("swiglu_backward", _backward, _backward_fake)
_swiglu = define("swiglu", _forward, _forward_fake, _setup_context, _autograd_backward)


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate)·up, differentiable once by both; float32 arithmetic, rounded once.

    Args:
        gate, up: [..., N], float32, bfloat16, float16, or float64 (reference backend), of the same
            shape, dtype and device. The halves of one product are read where they lie.
        backend: see `rlhf_kernels.backends`.

    Returns:
        [..., N] without gaps, of the dtype of gate.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
        BackendUnavailableError, UnsupportedOperationError: a backend named that cannot do it.
    """
    _check(gate, up=up)
    return _swiglu(gate, up, backend)


def swiglu_backward(
    gate: Tensor, up: Tensor, grad_hidden: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `swiglu`, and its result again, in one pass; not differentiable.

    For layers that form their own gradients: what the weights after the unit need of it comes from
    here, so that the forward need not keep it.

    Args:
        gate, up, grad_hidden: [..., N], as for `swiglu`.
        backend: see `rlhf_kernels.backends`.

    Returns:
        grad_gate, grad_up, silu(gate)·up: [..., N] without gaps, of the dtype of gate.

    Raises:
        As `swiglu`.
    """
    _check(gate, up=up, grad_hidden=grad_hidden)
    return _swiglu_backward(gate, up, grad_hidden, True, backend)


def _check(gate: Tensor, **others: Tensor) -> None:
    checks.floating(gate=gate)
    if gate.dim() == 0:
        raise ValueError("gate has shape (); expected [..., N]")
    checks.like("gate", gate, **others)
    checks.same_dtype("gate", gate, **others)
