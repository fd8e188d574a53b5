"""`rlhf_kernels._cpu`, the C++ for CPU tensors, and memory for it to fill.

Compiled for several instruction sets; the best that the machine runs is used, or the one that the
environment variable RLHF_KERNELS_CPU_ISA names (baseline, avx2 or avx512).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.backends.missing import why_missing

ISA_VARIABLE = "RLHF_KERNELS_CPU_ISA"

ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# The C library gives allocations of this size back to the system when they are freed, so each new
# one starts out without memory pages.
FRESH_PAGES_BYTES = 32 * 2**20


def _load() -> tuple[Any, str | None]:
    """The extension module, or why it cannot be used."""
    try:
        import rlhf_kernels._cpu as found
    except ImportError as error:
        return None, why_missing("_cpu", error)
    requested = os.environ.get(ISA_VARIABLE)
    if requested:
        try:
            found.use_isa(requested)
        except ValueError as error:
            return None, f"{ISA_VARIABLE}: {error}"
    return found, None


extension, _unavailable = _load()


def availability() -> str | None:
    """None where the kernels can be used, else the reason."""
    return _unavailable


def describe() -> str:
    """For `rlhf_kernels.info`: the instruction set in use, among those that would run."""
    return f"C++, {extension.isa()} code (this machine runs {', '.join(extension.isas())})"


def in_huge_pages(new: Tensor) -> Tensor:
    """A tensor whose memory has not been touched; a large one will be given huge pages.

    That spares a fault for every 4 kB of it. Without the extension, or elsewhere, it does nothing.
    """
    if extension is not None and new.device.type == "cpu" and new.nbytes > FRESH_PAGES_BYTES:
        extension.ask_for_huge_pages(new.data_ptr(), new.nbytes)
    return new


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new tensor for the C++ to fill: on the CPU, whatever PyTorch's default device is."""
    return torch.empty(shape, dtype=dtype, device="cpu")
