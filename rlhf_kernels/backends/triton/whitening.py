"""Moments of the valid places, and numbers shifted and scaled by them."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from rlhf_kernels.backends.triton.formulas import MOMENTS, store_moments, total_moments

# What scales a place: the mean in two parts, the factor, and what is added in the end.
SCALING = tl.constexpr(4)

_NUMBERS = ("x_stride", "mask_stride", "columns", "blocks")


@triton.jit
def _block(blocks, columns, BLOCK: tl.constexpr):
    """(row, columns of this program's block, which of them there are)."""
    program = tl.program_id(0)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return (program // blocks).to(tl.int64), column, column < columns


@triton.jit(do_not_specialize=[*_NUMBERS, "x", "mask", "moments"])
def moments_kernel(
    x,
    x_stride: tl.int64,
    mask,
    mask_stride: tl.int64,
    columns,
    blocks,
    moments,
    BLOCK: tl.constexpr,
):
    """The moments of each block of a row. Grid: (rows · blocks,)."""
    row, column, there = _block(blocks, columns, BLOCK)
    valid = tl.load(mask + row * mask_stride + column, mask=there, other=0) != 0
    x = tl.load(x + row * x_stride + column, mask=valid, other=0.0)
    store_moments(moments + tl.program_id(0).to(tl.int64) * MOMENTS, x, valid)


@triton.jit(do_not_specialize=["moments", "number", "total"])
def total_kernel(moments, number, total, BLOCK: tl.constexpr):
    """The moments [3] of all, in float64, from those of `number` blocks. Grid: (1,)."""
    count, mean, squares = total_moments(moments, number, MOMENTS, BLOCK)
    tl.store(total, count)
    tl.store(total + 1, mean)
    tl.store(total + 2, squares)


@triton.jit(do_not_specialize=["total", "scaling", "eps"])
def scaling_kernel(total, scaling, eps, SHIFT_MEAN: tl.constexpr):
    """Of moments in float64 the numbers that whiten in float32. Grid: (1,)."""
    mean = tl.load(total + 1)
    variance = tl.load(total + 2) / tl.maximum(tl.load(total), 1.0)
    near = mean.to(tl.float32)
    tl.store(scaling, near)
    tl.store(scaling + 1, (mean - near.to(tl.float64)).to(tl.float32))
    tl.store(scaling + 2, (1.0 / tl.sqrt(variance + eps)).to(tl.float32))
    tl.store(scaling + 3, tl.where(SHIFT_MEAN, 0.0, near))


@triton.jit(do_not_specialize=[*_NUMBERS, "x", "mask", "scaling", "out"])
def whiten_kernel(
    x,
    x_stride: tl.int64,
    mask,
    mask_stride: tl.int64,
    columns,
    blocks,
    scaling,
    out,
    BLOCK: tl.constexpr,
):
    """Grid: (rows · blocks,). `out` has no gaps between rows."""
    row, column, there = _block(blocks, columns, BLOCK)
    valid = tl.load(mask + row * mask_stride + column, mask=there, other=0) != 0
    x = tl.load(x + row * x_stride + column, mask=valid, other=0.0)
    # The mean in two parts, so that it costs a small deviation no digits.
    centred = x - tl.load(scaling) - tl.load(scaling + 1)
    whitened = tl.fma(centred, tl.load(scaling + 2), tl.load(scaling + 3))
    tl.store(out + row * columns + column, tl.where(valid, whitened, 0.0), mask=there)
