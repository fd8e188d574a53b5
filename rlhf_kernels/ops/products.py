"""Matrix products of float32 on a CPU, by oneDNN where that is faster than `torch.mm`.

PyTorch multiplies float32 matrices with MKL, which does not know AMD's processors: with weights
that are in no cache, as in training, 504 x 576 x 1536 runs at some 100 GFLOP/s on two cores of
Zen 4, and at 155 by oneDNN, which PyTorch has with it for bfloat16. Both are exact to float32's
rounding, and repeat bit for bit.

    floor: 2·M·N·K operations at 32 a cycle and core, 237 GFLOP/s on those two cores at 3.7 GHz
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.backends import load, unavailable_reason
from rlhf_kernels.ops import define

# Below this many multiplications the call costs more than the product.
SMALL = 2**22


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD processor under a PyTorch that has MKL and oneDNN.

    Asked, not measured: a stopwatch may choose otherwise in the next run, which would then round
    differently.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or not _is_amd():
        return False
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return has_both and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def mm(left: Tensor, right: Tensor) -> Tensor:
    """left [M, K] @ right [K, N]."""
    if takes_onednn(left, right):
        return torch.ops.mkldnn._linear_pointwise(by_rows(left), right.t(), None, "none", [], "")
    return torch.mm(left, right)


def by_rows(x: Tensor) -> Tensor:
    """x [M, K], each row without gaps, as oneDNN's wrapper wants its left side.

    It would copy a transposed one by PyTorch's operation: a fifth of the time of a weight's
    gradient.
    """
    if x.stride(1) == 1 or x.stride(0) != 1 or unavailable_reason("cpu") is not None:
        return x
    return load("cpu").transposed(x.t())


def takes_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether `mm` of these would go to oneDNN; what does not fit is left to PyTorch's message."""
    return (
        left.dtype == right.dtype == torch.float32
        and left.device.type == "cpu"
        and left.shape[-1] == right.shape[0]
        and left.numel() * right.shape[-1] >= SMALL
        and onednn_is_faster()
    )


def product_with_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] @ weight [N, K].T + bias; not differentiable."""
    if takes_onednn(x, weight.t()):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    grads = _linear_gradients(rows, x.reshape(-1, x.shape[-1]), weight, *ctx.needs_input_grad)
    grad_x, grad_weight, grad_bias = grads
    return (
        grad_x.view(x.shape) if ctx.needs_input_grad[0] else None,
        grad_weight if ctx.needs_input_grad[1] else None,
        grad_bias if ctx.needs_input_grad[2] else None,
    )


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool, of_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of x [M, K], weight [N, K] and bias [N] from that of the result [M, N]."""
    return (
        mm(grad, weight) if of_x else grad.new_empty(0),
        mm(grad.t(), x) if of_weight else grad.new_empty(0),
        grad.sum(0) if of_bias else grad.new_empty(0),
    )


def _gradients_fake(
    grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool, of_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if of_x else 0),
        weight.new_empty(weight.shape if of_weight else 0),
        weight.new_empty(weight.shape[0] if of_bias else 0),
    )


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "AuthenticAMD" in platform.processor()  # Windows has it there


_linear_gradients = define("linear_backward", _gradients, _gradients_fake)
_linear_by_onednn = define("linear", product_with_rows, _linear_fake, _setup_context, _backward)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, in float32 on a CPU by the faster library; differentiable once.

    Under autocast and for other types and devices it is PyTorch's own.

    Args:
        x: [..., K]. weight: [N, K]. bias: [N] or None.
    """
    both = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    if torch.is_autocast_enabled(x.device.type) or not both:
        return torch.nn.functional.linear(x, weight, bias)
    return _linear_by_onednn(x, weight, bias)
