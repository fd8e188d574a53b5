"""The norm of all gradients together, with float32's digits whatever their type."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlhf.engine.adamw_8bit import has_kernel
from rlhf_kernels.backends import cpu


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The root of the sum of all squares, a number on the gradients' device; NaN or infinite if one
    of them is, or if a square is beyond float32.

    Args:
        gradients: Of one device; of any shapes; parts of them where FSDP has split the model.
    """
    if gradients and all(map(_has_kernel, gradients)):
        # PyTorch would copy those of 16 bits, and add up to 28 million float32 squares in float32:
        # off by 3e-4 for a vocabulary of 49,152.
        total = sum(cpu.square_sum(gradient) for gradient in gradients)
        return torch.tensor(math.sqrt(total), dtype=torch.float32)
    if gradients and gradients[0].dtype.itemsize == 2:  # the norm needs more digits
        return torch.stack(
            [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        ).norm()
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _has_kernel(gradient: Tensor) -> bool:
    """Whether the C++ sums its squares: an ordinary CPU tensor without gaps."""
    ordinary = type(gradient) is Tensor and gradient.dtype in cpu.ELEMENT_TYPES
    return ordinary and gradient.is_contiguous() and has_kernel(gradient)
