"""What is allocated and launched around the kernels of `moments` and `masked_whiten`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from rlhf_kernels.backends.triton import whitening as kernels
from rlhf_kernels.backends.triton.tensors import as_rows, mask_bytes, rows

BLOCK = 1024
NUM_WARPS = 4
SHAPE = {"BLOCK": BLOCK, "num_warps": NUM_WARPS}


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """Number, mean, and sum of squared deviations [3] of the valid places, in float64."""
    programs, series = _series(x, mask)
    blocks = torch.empty(programs, kernels.MOMENTS.value, dtype=torch.float32, device=x.device)
    total = torch.empty(3, dtype=torch.float64, device=x.device)
    with torch.cuda.device_of(x):
        if programs > 0:
            kernels.moments_kernel[(programs,)](**series, moments=blocks, **SHAPE)
        kernels.total_kernel[(1,)](blocks, programs, total, **SHAPE)
    return total


def whiten(x: Tensor, mask: Tensor, total: Tensor, shift_mean: bool, eps: float) -> Tensor:
    """(x − mean)/sqrt(var + eps) by the moments of all ranks; any shape."""
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    programs, series = _series(x, mask)
    if programs == 0:
        return out
    scaling = torch.empty(kernels.SCALING.value, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        kernels.scaling_kernel[(1,)](
            total.contiguous(), scaling, float(eps), SHIFT_MEAN=shift_mean, num_warps=1
        )
        kernels.whiten_kernel[(programs,)](**series, scaling=scaling, out=out, **SHAPE)
    return out


def _series(x: Tensor, mask: Tensor) -> tuple[int, dict[str, Any]]:
    """The number of programs, and what both kernels read."""
    x, mask = as_rows(rows(x), mask_bytes(mask))
    blocks = triton.cdiv(x.shape[1], BLOCK)
    return x.shape[0] * blocks, {
        "x": x,
        "x_stride": x.stride(0),
        "mask": mask,
        "mask_stride": mask.stride(0),
        "columns": x.shape[1],
        "blocks": blocks,
    }
