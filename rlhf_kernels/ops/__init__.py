"""The operations as PyTorch sees them: schemas, shapes and gradients, over the backends.

Each module defines an operator `rlhf_kernels::<name>` for `torch.compile` and other tracers, and
the same functions as a plain `autograd.Function` for eager mode: there the dispatcher's way through
a Python operator costs more than the small kernels themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn import Parameter

_PLAIN = (torch.Tensor, Parameter)


def define(
    name: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    eager: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register `rlhf_kernels::name` and return the function that calls it the cheapest way.

    forward: runs on real tensors; its annotations are the schema. fake: the outputs' shapes.
    setup_context, backward: as in `torch.autograd.Function`; without them: not differentiable.
    eager: what eager mode calls, where it is not an autograd function of these.
    """
    operator = torch.library.custom_op(f"rlhf_kernels::{name}", forward, mutates_args=())
    operator.register_fake(fake)
    if backward is not None:
        operator.register_autograd(backward, setup_context=setup_context)
    if eager is None:
        eager = forward
        if backward is not None:
            eager = autograd_function(name, forward, setup_context, backward).apply

    def call(first: torch.Tensor, *rest: Any) -> Any:
        if backward is not None:
            _check_transforms(name)
        if type(first) not in _PLAIN or _observed():
            return operator(first, *rest)
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:
            return forward(first, *rest)  # an autograd function would cost 20 us for nothing
        return eager(first, *rest)

    return call


def _observed() -> bool:
    """Whether someone must see the operator: a compiler, a tracer, a mode, a function transform.

    They stand in the dispatcher, or put tensors without an address in the place of real ones.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _check_transforms(name: str) -> None:
    """`torch.func.grad` and `jvp` know nothing of an operator's backward: they would give zeros."""
    if torch.compiler.is_compiling():
        return
    transform = torch._C._functorch.peek_interpreter_stack()
    kinds = torch._C._functorch.TransformType
    if transform is not None and transform.key() in (kinds.Grad, kinds.Jvp):
        raise NotImplementedError(
            f"{name} has no derivative under torch.func; use backward() or torch.autograd.grad"
        )


def autograd_function(
    name: str, forward: Callable[..., Any], setup_context: Any, backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """An autograd function whose second derivative raises."""

    # One function for both: a separate setup_context makes `apply` bind a signature every call.
    def forward_with_context(ctx: Any, *inputs: Any) -> Any:
        output = forward(*inputs)
        setup_context(ctx, inputs, output)
        return output

    members = {
        "forward": staticmethod(forward_with_context),
        "backward": staticmethod(_first_derivative(name, backward)),
    }
    return type(name, (torch.autograd.Function,), members)


def _first_derivative(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """Gradients are formed on detached tensors: what is derived from them again must raise.

    `once_differentiable` lets it pass where the upstream gradient is a constant.
    """
    message = f"{name} has first derivatives only: its gradient cannot be differentiated again"

    def wrapped(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # it is, where create_graph=True
            return gradients
        raising: Any = torch._C._functions.DelayedError(message.encode(), len(gradients))
        return raising(*(x if x is None else x.detach().requires_grad_() for x in gradients))

    return wrapped
