"""Which number type matrix products run in."""

from __future__ import annotations

import time
from functools import cache

import torch

# bfloat16 must be clearly faster before it is worth its rounding; hardware with bfloat16 units is
# 2 to 8 times as fast, hardware without them several times slower, so noise cannot tip the choice.
MIN_SPEEDUP = 1.5


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The type that "auto", "float32" or "bfloat16" means on this device."""
    if dtype != "auto":
        return torch.bfloat16 if dtype == "bfloat16" else torch.float32
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and cpu_is_fast_at_bfloat16()
    return torch.bfloat16 if fast else torch.float32


@cache
def cpu_is_fast_at_bfloat16() -> bool:
    """Measure it once: whether a matrix product is at least 1.5 times as fast as in float32."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other would measure a busy machine's load
    try:
        return _product_seconds(torch.float32) > MIN_SPEEDUP * _product_seconds(torch.bfloat16)
    finally:
        torch.set_num_threads(threads)


def _product_seconds(dtype: torch.dtype, size: int = 256, repeats: int = 20) -> float:
    """Shortest time of a product of two square matrices."""
    a = torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - start)
    return min(times[1:])
