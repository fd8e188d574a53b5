"""Which number type matrix products run in."""

from __future__ import annotations

import torch


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The type that "auto", "float32" or "bfloat16" means on this device."""
    if dtype != "auto":
        return torch.bfloat16 if dtype == "bfloat16" else torch.float32
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and cpu_is_fast_at_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Context in which matrix products run in ``dtype``; none in float32."""
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if enabled else None, enabled=enabled)


def cpu_is_fast_at_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AMX, AVX-512); without, it is several
    times slower than float32. Asked, not measured: a stopwatch may choose otherwise in the next
    run. False elsewhere than on x86.
    """
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
