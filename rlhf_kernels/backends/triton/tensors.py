"""What the launches share: tensors as the kernels address them, and the GPU's size."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Columns within a row are counted in 32 bits, one block past its end included.
MOST_COLUMNS = 2**31 - 2**16


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def vector(x: Tensor) -> Tensor:
    """Float32 without gaps."""
    return (x if x.dtype == torch.float32 else x.float()).contiguous()


def rows(x: Tensor) -> Tensor:
    """Float32 with columns side by side; any row stride."""
    return unit_columns(x if x.dtype == torch.float32 else x.float())


def unit_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def mask_bytes(mask: Tensor) -> Tensor:
    """Columns side by side; valid is what is not 0."""
    return unit_columns(mask).view(torch.uint8)


def as_rows(*series: Tensor) -> list[Tensor]:
    """Tensors of one shape as [rows, columns]; as one row where none of them has gaps."""
    few = series[0].numel() < MOST_COLUMNS
    if few and all(x.is_contiguous() for x in series):
        return [x.view(1, -1) for x in series]
    columns = series[0].shape[-1]
    return [x.reshape(-1, columns) for x in series]


def is_aligned(x: Tensor) -> bool:
    """Whether each row of [rows, columns] begins on a boundary of 16 bytes, wherever it stands."""
    one = x.shape[0] == 1
    return x.data_ptr() % 16 == 0 and (one or (x.stride(0) % 16 == 0 and x.shape[1] % 16 == 0))
