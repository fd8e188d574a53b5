"""`rlhf_kernels::gated_mlp`: a Llama-like feed-forward layer and its backward, as one function.

y = (silu(x·Wgᵀ)·(x·Wuᵀ))·Wdᵀ  (Shazeer, 2020, https://arxiv.org/abs/2002.05202)

Four tensors of the inner width are kept for a backward by operations of PyTorch, here two: the
unit's result is computed again, in the pass that has its gradients.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_kernels.ops import define
from rlhf_kernels.ops.products import mm, product_with_rows
from rlhf_kernels.ops.swiglu import swiglu, swiglu_backward


def _forward(
    x: Tensor, of_gate: Tensor, of_up: Tensor, of_down: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = product_with_rows(x, of_gate, None), product_with_rows(x, of_up, None)
    return product_with_rows(swiglu(gate, up), of_down, None), gate, up


def _forward_fake(
    x: Tensor, of_gate: Tensor, of_up: Tensor, of_down: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    inner = (*x.shape[:-1], of_gate.shape[0])
    return x.new_empty(*x.shape[:-1], of_down.shape[0]), x.new_empty(inner), x.new_empty(inner)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, gate, up = output
    ctx.mark_non_differentiable(gate, up)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, gate, up)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:  # of a result that nothing depends on
        return None, None, None, None
    inputs = ctx.saved_tensors
    rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (grad, inputs[0], *inputs[4:])]
    grads = _gated_mlp_backward(*rows, *inputs[1:4], *ctx.needs_input_grad)
    found = [each if needed else None for each, needed in zip(grads, ctx.needs_input_grad)]
    return (found[0] if found[0] is None else found[0].view(inputs[0].shape), *found[1:])


def _gradients(
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    of_gate: Tensor,
    of_up: Tensor,
    of_down: Tensor,
    needs_x: bool,
    needs_gate: bool,
    needs_up: bool,
    needs_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Those of x and of the three weights, from that of the result; empty where not needed."""
    grad_gate, grad_up, hidden = swiglu_backward(gate, up, mm(grad, of_down))
    none = grad.new_empty(0)
    return (
        mm(grad_gate, of_gate).add_(mm(grad_up, of_up)) if needs_x else none,
        mm(grad_gate.t(), x) if needs_gate else none,
        mm(grad_up.t(), x) if needs_up else none.clone(),
        mm(grad.t(), hidden) if needs_down else none.clone(),
    )


def _gradients_fake(
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    of_gate: Tensor,
    of_up: Tensor,
    of_down: Tensor,
    needs_x: bool,
    needs_gate: bool,
    needs_up: bool,
    needs_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs_x else 0),
        x.new_empty(of_gate.shape if needs_gate else 0),
        x.new_empty(of_up.shape if needs_up else 0),
        x.new_empty(of_down.shape if needs_down else 0),
    )


_gated_mlp_backward = define("gated_mlp_backward", _gradients, _gradients_fake)
_gated_mlp = define("gated_mlp", _forward, _forward_fake, _setup_context, _backward)


def gated_mlp(x: Tensor, of_gate: Tensor, of_up: Tensor, of_down: Tensor) -> Tensor:
    """(silu(x @ of_gate.T) * (x @ of_up.T)) @ of_down.T, differentiable once by all four.

    Args:
        x: [..., H]. of_gate, of_up: [I, H]. of_down: [O, I]. All of one dtype and device.

    Returns:
        [..., O], of the dtype of x.
    """
    return _gated_mlp(x, of_gate, of_up, of_down)[0]
