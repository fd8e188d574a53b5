"""Triton's interpreter, made to round as GPUs do.

TRITON_INTERPRET=1 runs Triton kernels in numpy on CPU tensors. The interpreter cuts off the lower
bits of what it stores in bfloat16, where every GPU rounds to the nearest; it converts bit field by
bit field, which takes most of a kernel's time; it copies whole storages onto themselves; and it
scans element by element.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def correct() -> None:
    """Let the interpreter convert between float32 and bfloat16 as PyTorch does, in place."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        pair = (src.dtype.scalar, dst_type.scalar)
        if pair == (tl.bfloat16, tl.float32):
            data = (src.data.astype(np.uint32) << 16).view(np.float32)
        elif pair == (tl.float32, tl.bfloat16):
            data = torch.from_numpy(np.array(src.data)).bfloat16().view(torch.uint16).numpy()
        else:
            return original(self, src, dst_type)
        return interpreter.TensorHandle(data, dst_type.scalar)

    interpreter.InterpreterBuilder.cast_impl = cast_impl
    # The arguments are CPU tensors already, so there is nothing to copy back to a device.
    interpreter.GridExecutor._restore_args_dev = lambda *args: None
    interpreter.ScanOps.generic_scan = _scan


def _scan(self: Any, tensors: Any) -> list[Any]:
    """Of whole vectors, over 1, 2, 4, ... elements, as GPUs combine them too."""
    assert self.axis == 0 and len(tensors[0].shape) == 1
    arrays = [np.array(x.handle.data) for x in tensors]
    types = [x.dtype for x in tensors]
    step = 1
    while step < len(arrays[0]):
        before = [self.to_tensor(np.roll(x, step), t) for x, t in zip(arrays, types)]
        combined = self.combine_fn.fn(
            *before, *(self.to_tensor(x, t) for x, t in zip(arrays, types))
        )
        combined = combined if len(arrays) > 1 else (combined,)
        for array, x in zip(arrays, combined):
            array[step:] = x.handle.data[step:]
        step *= 2
    return [self.to_tensor(x, t) for x, t in zip(arrays, types)]
