"""Autograd for losses whose gradients the forward has formed: the backward only scales them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops import autograd_function, define

Gradients = tuple[Tensor | None, ...]


def define_loss(
    name: str, forward: Callable[..., Any], fake: Callable[..., Any], statistics: int
) -> Callable[..., Any]:
    """As `define`, for a forward that returns (loss, *statistics, *gradients).

    After the loss come `statistics` tensors, then the gradients of the first inputs, empty where
    they are not needed.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1 + statistics :])
        ctx.inputs = len(inputs)

    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Gradients:
        if grad_loss is None:
            return (None,) * ctx.inputs
        scaled = [
            (gradient * _in_full(grad_loss, gradient)).to(gradient.dtype) if needed else None
            for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad)
        ]
        return (*scaled, *([None] * (ctx.inputs - len(scaled))))

    return define(
        name,
        forward,
        fake,
        setup_context,
        backward,
        eager=_giving_away(name, forward, statistics).apply,
    )


def _giving_away(
    name: str, forward: Callable[..., Any], statistics: int
) -> type[torch.autograd.Function]:
    """The same for eager mode, without a second tensor of the weight's size.

    The first backward scales the gradients in place and gives them away. Another one, through a
    graph that was retained, runs the forward again.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.formed = output[1 + statistics :]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.options = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Gradients:
        gradients: list[Tensor | None] = [None] * len(ctx.options)
        if grad_loss is None:
            return tuple(gradients)
        formed, ctx.formed = ctx.formed, None
        if formed is None:
            saved = zip(ctx.saved_tensors, ctx.options, strict=True)
            inputs = [option if tensor is None else tensor for tensor, option in saved]
            formed = forward(*inputs)[1 + statistics :]
        for i, gradient in enumerate(formed):
            if ctx.needs_input_grad[i]:
                gradients[i] = _scale_in_place(gradient, grad_loss)
        return tuple(gradients)

    return autograd_function(name, forward, setup_context, backward)


def _scale_in_place(gradient: Tensor, scale: Tensor) -> Tensor:
    if gradient.device.type == "cpu":
        # As a number, which is not rounded either: a tensor of another type than the gradient's
        # would have PyTorch copy the whole gradient twice.
        return gradient.mul_(scale.item())
    return torch.mul(gradient, _in_full(scale, gradient), out=gradient)


def _in_full(scale: Tensor, gradient: Tensor) -> Tensor:
    """With the gradient's dimensions: PyTorch would round a 0-dim factor to 16 bits first."""
    return scale.reshape([1] * gradient.dim())


def needs_gradients(*tensors: Tensor | None) -> list[bool]:
    """Which gradients the forward must form."""
    enabled = torch.is_grad_enabled()
    return [enabled and tensor is not None and tensor.requires_grad for tensor in tensors]
