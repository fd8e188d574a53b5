"""What the aggregation of the PPO loss divides by, where it is not given: tokens or sequences."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

_COUNTED = ("mask", "mask_stride", "cu_seqlens", "columns", "part", "parts", "counts")


@triton.jit(do_not_specialize=_COUNTED)
def count_kernel(
    mask,
    mask_stride: tl.int64,
    cu_seqlens,
    columns,
    part,
    parts,
    counts,
    BLOCK: tl.constexpr,
):
    """The valid tokens of each part of a row, or of a packed sequence. Grid: (rows · parts,)."""
    program = tl.program_id(0).to(tl.int64)
    if cu_seqlens is None:
        mask += program // parts * mask_stride
        start = (program % parts).to(tl.int32) * part
        end = tl.minimum(start + part, columns)
    else:
        begin = tl.load(cu_seqlens + program)
        mask += begin
        start = 0
        end = (tl.load(cu_seqlens + program + 1) - begin).to(tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(start, end, BLOCK):
        t = first + tl.arange(0, BLOCK)
        count += (tl.load(mask + t, mask=t < end, other=0) != 0).to(tl.int32)
    tl.store(counts + program, tl.sum(count))


@triton.jit(do_not_specialize=["counts", "number", "divisor"])
def divisor_kernel(counts, number, divisor, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """The number of tokens, or of sequences that have a valid one; at least 1. Grid: (1,)."""
    total = tl.zeros([BLOCK], tl.int64)
    for first in range(0, number, BLOCK):
        at = first + tl.arange(0, BLOCK)
        count = tl.load(counts + at, mask=at < number, other=0)
        total += count if TOKENS else (count > 0).to(tl.int32)
    tl.store(divisor, tl.maximum(tl.sum(total), 1).to(tl.float32))
