"""The linear layers of models on a CPU, multiplied by oneDNN where that is faster."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_kernels.ops.products import linear, onednn_is_faster


def use_fast_products(model: nn.Module) -> None:
    """Have a model's linear layers multiply float32 by `rlhf_kernels.ops.products.linear`.

    Nothing changes where PyTorch's own products are as fast. Weights and names stay as they are.
    """
    if not onednn_is_faster():
        return
    for module in linear_layers(model):
        module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


@contextmanager
def packed_for_sampling(
    model: nn.Module, rows: int, leaving_out: Collection[nn.Module] = ()
) -> Iterator[bool]:
    """The model's linear layers with weights laid out for products of a few rows, as sampling has.

    A step of sampling reads every weight for a few rows: oneDNN rearranges them first, each time,
    unless they lie as it wants them. The copy takes as much memory as the weights, and is gone
    afterwards; they must not change inside.

    Args:
        model: Its layers of float32 or, where the processor has products of it, bfloat16 on a CPU
            are meant; others stay as they are.
        rows: How many there will be, about.
        leaving_out: Layers that stay as they are.

    Yields:
        Whether packed weights are of use with this model here.
    """
    # A compiler would have to know what packed weights look like.
    compiled = any(module._compiled_call_impl for module in model.modules())
    if compiled or not onednn_is_faster():
        yield False
        return
    layers = [
        layer for layer in linear_layers(model) if packable(layer) and layer not in leaving_out
    ]
    with keeping_forwards(layers):
        for layer in layers:
            layer.forward = _with_packed(layer, rows)  # type: ignore[method-assign]
        yield True


def packable(layer: nn.Linear) -> bool:
    """Whether oneDNN has products of its packed weight."""
    return layer.weight.dtype in _packed_dtypes() and type(layer.weight.data) is Tensor


def packed_product(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    """x @ weight.T + bias by a packed copy, for x [..., K] of the weight's type."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, packed, bias, "none", [], "")


@contextmanager
def keeping_forwards(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Puts back what the layers' `forward` was, of the class or of the layer's own."""
    before = [vars(layer).get("forward") for layer in layers]
    try:
        yield
    finally:
        for layer, forward in zip(layers, before):
            if forward is not None:
                layer.forward = forward  # type: ignore[method-assign]
            else:
                vars(layer).pop("forward", None)


def _packed_dtypes() -> tuple[torch.dtype, ...]:
    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if bfloat16 else (torch.float32,)


def _with_packed(layer: nn.Linear, rows: int) -> Any:
    dtype, product = layer.weight.dtype, packed_product(layer.weight.detach(), layer.bias, rows)

    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # oneDNN's operation has none
            return nn.functional.linear(x, layer.weight, layer.bias)
        if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == dtype:
            x = x.to(dtype)
        elif torch.is_autocast_enabled("cpu") or x.dtype != dtype:
            return nn.functional.linear(x, layer.weight, layer.bias)
        return product(x)

    return forward


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """Those that are `nn.Linear` itself, on a CPU: subclasses multiply as they see fit, and so does
    a layer whose forward someone else has replaced.
    """
    return [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and module.weight.device.type == "cpu"
        and runs_as_its_class(module, _forward)
    ]


def runs_as_its_class(module: nn.Module, ours: Any) -> bool:
    """Whether a module's forward is its class's, or `ours` in its place already: not another's."""
    forward = vars(module).get("forward")
    return forward is None or getattr(forward, "__func__", None) is ours
