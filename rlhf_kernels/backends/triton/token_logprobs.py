"""The row kernels on [N, V] logits: one read forward, one read and one write backward.

A row is read as blocks of BLOCK elements, each block as BLOCK / VECTOR vectors of 16 bytes. Memory
is addressed from the last 16-byte boundary at or below a row's start, so that all loads but those
of a row's first and last block are whole vectors, whatever V, the strides and the view: `head` is
the number of elements between that boundary and the row. ALIGNED says at compile time that rows
begin on boundaries and end on them; then first and last blocks are whole vectors as well.

Exponents are taken in units of log 2, as the hardware has them: exp(d) = exp2(d · LOG2E).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from rlhf_kernels import checks

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of finite floats
# Below this exponent exp2 is 0, and 0 · NEGLIGIBLE is 0 where 0 · (−inf) would be NaN.
NEGLIGIBLE = tl.constexpr(-256.0)
ELSEWHERE = tl.constexpr(checks.ELSEWHERE)

# Integers that vary from call to call must not select another compilation, nor may the alignment
# of what is read a number at a time.
_FORWARD_PLAIN = ("first", "row_stride", "columns", "targets", "temperatures", "ignore_index")
_OUTPUTS = ("normalization", "logprobs", "entropy")


@triton.jit
def _begin_of_row(first, row_stride, row, VECTOR: tl.constexpr, ALIGNED: tl.constexpr):
    """(boundary, head): where the row's vectors begin, and how far into them the row does."""
    begin = first + row * row_stride
    # Written as a multiple, which the compiler sees; of an argument it would have to be told.
    boundary = begin // VECTOR * VECTOR
    head = (begin - boundary).to(tl.int32)
    if ALIGNED:
        head = 0
    return boundary, head


@triton.jit
def _temperature_of(temperatures, temperature, row):
    if temperatures is not None:
        temperature = tl.load(temperatures + row)
    return temperature


@triton.jit
def _refer(total, weighted, old, new, scale, ENTROPY: tl.constexpr):
    """The sums with respect to the maximum `new` >= `old`."""
    drop = (old - new) * scale
    factor = tl.exp2(drop)
    if ENTROPY:
        weighted = (weighted + total * tl.maximum(drop, NEGLIGIBLE)) * factor
    return total * factor, weighted


@triton.jit
def _add_block(highest, total, weighted, x, scale, ENTROPY: tl.constexpr):
    """Take a block [lanes, VECTOR] into the lanes' sums; a vector's elements lie in one thread.

    With d = (x − highest)·scale over what a lane has seen: total = Σ 2^d, weighted = Σ 2^d·d. A NaN
    makes total NaN and keeps it so.
    """
    new = tl.maximum(highest, tl.max(x, axis=1))
    total, weighted = _refer(total, weighted, highest, new, scale, ENTROPY)
    d = (x - new[:, None]) * scale
    e = tl.exp2(d)
    total += tl.sum(e, axis=1)
    if ENTROPY:
        weighted += tl.sum(e * tl.maximum(d, NEGLIGIBLE), axis=1)
    return new, total, weighted


@triton.jit
def _combine(highest, total, weighted, scale, ENTROPY: tl.constexpr):
    """One (maximum, total, weighted) from those of lanes, or of parts of a row."""
    maximum = tl.max(highest, axis=0)
    total, weighted = _refer(total, weighted, highest, maximum, scale, ENTROPY)
    return maximum, tl.sum(total, axis=0), tl.sum(weighted, axis=0)


@triton.jit
def _sums(
    row_logits,
    begin,
    end,
    head,
    scale,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """(maximum, total, weighted) of the elements [max(begin, head), end) behind a boundary."""
    LANES: tl.constexpr = BLOCK // VECTOR
    offsets = (tl.arange(0, LANES) * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    highest = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    if not ALIGNED:
        at = begin + offsets
        x = tl.load(row_logits + at, mask=(at >= head) & (at < end), other=float("-inf"))
        highest, total, weighted = _add_block(
            highest, total, weighted, x.to(tl.float32), scale, ENTROPY
        )
        begin += BLOCK
    whole = begin + tl.maximum(end - begin, 0) // BLOCK * BLOCK
    for start in range(begin, whole, BLOCK):
        x = tl.load(row_logits + start + offsets)
        highest, total, weighted = _add_block(
            highest, total, weighted, x.to(tl.float32), scale, ENTROPY
        )
    if whole < end:
        at = whole + offsets
        x = tl.load(row_logits + at, mask=at < end, other=float("-inf"))
        highest, total, weighted = _add_block(
            highest, total, weighted, x.to(tl.float32), scale, ENTROPY
        )
    return _combine(highest, total, weighted, scale, ENTROPY)


@triton.jit
def _finish(
    row_logits,
    row,
    target,
    columns,
    tau,
    maximum,
    total,
    weighted,
    normalization,
    logprobs,
    entropy,
):
    """Write the row's outputs. `row_logits` points at its first element."""
    column = tl.minimum(tl.maximum(target, 0), columns - 1)  # never read outside of the row
    z = tl.load(row_logits + column).to(tl.float32)
    maximum = tl.where(total == 0.0, float("-inf"), maximum)
    # The maximum passed over NaN; whoever combines parts of the vocabulary must not.
    maximum = tl.where(total == total, maximum, float("nan"))
    log_sum = tl.log(total)
    logprob = tl.div_rn(z - maximum, tau) - log_sum
    tl.store(logprobs + row, tl.where(target == ELSEWHERE, 0.0, logprob))
    if entropy is not None:
        tl.store(entropy + row, log_sum - weighted / total * LN2)
    tl.store(normalization + 2 * row, maximum)
    tl.store(normalization + 2 * row + 1, log_sum)


@triton.jit
def _finish_ignored(row, normalization, logprobs, entropy):
    tl.store(logprobs + row, 0.0)
    if entropy is not None:
        tl.store(entropy + row, 0.0)
    tl.store(normalization + 2 * row, 0.0)
    tl.store(normalization + 2 * row + 1, 0.0)


@triton.jit(do_not_specialize=[*_FORWARD_PLAIN, *_OUTPUTS])
def forward_kernel(
    logits,
    first,
    row_stride: tl.int64,
    columns,
    targets,
    temperatures,
    temperature,
    ignore_index: tl.int64,
    normalization,
    logprobs,
    entropy,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A row's outputs by one program. Grid: (N,)."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    if target == ignore_index:
        _finish_ignored(row, normalization, logprobs, entropy)
        return
    if ALIGNED:
        columns = columns // VECTOR * VECTOR  # says so to the compiler
    boundary, head = _begin_of_row(first, row_stride, row, VECTOR, ALIGNED)
    tau = _temperature_of(temperatures, temperature, row)
    scale = tl.div_rn(LOG2E, tau)
    maximum, total, weighted = _sums(
        logits + boundary,
        0,
        head + columns,
        head,
        scale,
        BLOCK,
        VECTOR,
        ALIGNED,
        entropy is not None,
    )
    _finish(
        logits + boundary + head,
        row,
        target,
        columns,
        tau,
        maximum,
        total,
        weighted,
        normalization,
        logprobs,
        entropy,
    )


@triton.jit(do_not_specialize=[*_FORWARD_PLAIN, "part_blocks", "parts"])
def partial_kernel(
    logits,
    first,
    row_stride: tl.int64,
    columns,
    targets,
    temperatures,
    temperature,
    ignore_index: tl.int64,
    part_blocks,
    parts,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """The sums of one part of a row, into parts [N, number, 3]. Grid: (N, number of parts).

    A part is `part_blocks` blocks; those of ignored rows are left out.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(targets + row) == ignore_index:
        return
    if ALIGNED:
        columns = columns // VECTOR * VECTOR  # says so to the compiler
    boundary, head = _begin_of_row(first, row_stride, row, VECTOR, ALIGNED)
    scale = tl.div_rn(LOG2E, _temperature_of(temperatures, temperature, row))
    begin = tl.program_id(1) * part_blocks * BLOCK
    maximum, total, weighted = _sums(
        logits + boundary,
        begin,
        tl.minimum(begin + part_blocks * BLOCK, head + columns),
        head,
        scale,
        BLOCK,
        VECTOR,
        ALIGNED,
        ENTROPY,
    )
    part = parts + 3 * (row * tl.num_programs(1) + tl.program_id(1))
    tl.store(part, maximum)
    tl.store(part + 1, total)
    tl.store(part + 2, weighted)


@triton.jit(do_not_specialize=[*_FORWARD_PLAIN, *_OUTPUTS, "logits", "parts", "number"])
def combine_kernel(
    logits,
    first,
    row_stride: tl.int64,
    columns,
    targets,
    temperatures,
    temperature,
    ignore_index: tl.int64,
    normalization,
    logprobs,
    entropy,
    parts,
    number,
    MOST_PARTS: tl.constexpr,
):
    """A row's outputs from the sums of its parts, always in the same order. Grid: (N,)."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    if target == ignore_index:
        _finish_ignored(row, normalization, logprobs, entropy)
        return
    tau = _temperature_of(temperatures, temperature, row)
    place = tl.arange(0, MOST_PARTS)
    part = parts + 3 * (row * number + place)
    there = place < number
    maximum, total, weighted = _combine(
        tl.load(part, mask=there, other=LOWEST),
        tl.load(part + 1, mask=there, other=0.0),
        tl.load(part + 2, mask=there, other=0.0),
        tl.div_rn(LOG2E, tau),
        entropy is not None,
    )
    _finish(
        logits + first + row * row_stride,
        row,
        target,
        columns,
        tau,
        maximum,
        total,
        weighted,
        normalization,
        logprobs,
        entropy,
    )


@triton.jit
def _expm1(x):
    """exp(x) − 1 for x <= 0, to a few roundings of its size."""
    # Near 0 the difference cancels; there ten terms of the series leave less than a rounding.
    series = 1.0 + x * (1.0 / 10)
    for divisor in tl.static_range(9, 1, -1):
        series = 1.0 + x * series * (1.0 / divisor)
    return tl.where(x > -0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def _target_gradient(logp, g, h, entropy):
    """The gradient by the target's logit, times tau. 1 − p is formed without cancellation."""
    p = tl.exp(logp)
    spread = tl.where(p == 0.0, 0.0, p * (logp + entropy))
    return -_expm1(logp) * g - h * spread


@triton.jit
def _write_gradient(x_at, out_at, mask, offsets, row, ENTROPY: tl.constexpr):
    """Read a block, form its gradient in float32, write it."""
    ignored, maximum, scale, log2_sum, entropy2, of_logprob, of_entropy, place, of_target = row
    if ignored:
        tl.store(out_at, tl.zeros(offsets.shape, out_at.dtype.element_ty), mask=mask)
    else:
        x = tl.load(x_at, mask=mask).to(tl.float32)
        logp = (x - maximum) * scale - log2_sum
        p = tl.exp2(logp)
        if ENTROPY:
            grad = p * ((tl.maximum(logp, NEGLIGIBLE) + entropy2) * of_entropy + of_logprob)
        else:
            grad = p * of_logprob
        grad = tl.where(offsets == place, of_target, grad)
        tl.store(out_at, grad.to(out_at.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        *_FORWARD_PLAIN,
        *_OUTPUTS,
        "out_first",
        "out_stride",
        "grad_logprobs",
        "grad_entropy",
        "blocks",
    ]
)
def backward_kernel(
    logits,
    first,
    row_stride: tl.int64,
    out,
    out_first,
    out_stride: tl.int64,
    columns,
    blocks,
    targets,
    temperatures,
    temperature,
    ignore_index: tl.int64,
    normalization,
    entropy,
    grad_logprobs,
    grad_entropy,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    SAME_HEAD: tl.constexpr,
):
    """The gradient of one block of a row. Grid: (N · blocks,). `out` may be the logits.

    SAME_HEAD: out's rows lie to 16-byte boundaries as those of the logits do, so that what is
    stored are whole vectors too.
    """
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    begin = program % blocks * BLOCK
    if ALIGNED:
        columns = columns // VECTOR * VECTOR  # says so to the compiler
    boundary, head = _begin_of_row(first, row_stride, row, VECTOR, ALIGNED)
    if SAME_HEAD:
        out_boundary, _ = _begin_of_row(out_first, out_stride, row, VECTOR, ALIGNED)
    else:
        out_boundary = out_first + row * out_stride - head
    end = head + columns

    target = tl.load(targets + row)
    tau = _temperature_of(temperatures, temperature, row)
    maximum = tl.load(normalization + 2 * row)
    log_sum = tl.load(normalization + 2 * row + 1)
    g = tl.load(grad_logprobs + row)
    h = 0.0
    row_entropy = 0.0
    if grad_entropy is not None:
        h = tl.load(grad_entropy + row)
        row_entropy = tl.load(entropy + row)

    # Every thread reads the target's logit, if this block holds it, and forms the gradient there.
    # Only the thread that holds the target's place uses it, and that one writes after it has read;
    # where `out` is the logits, another that comes later reads what was written, to no effect. An
    # ignored target, or one in another rank's part of the vocabulary, is in no block.
    target_at = target + head
    mine = (target >= 0) & (target < columns) & (target_at >= begin) & (target_at < begin + BLOCK)
    z = tl.load(logits + boundary + target_at, mask=mine, other=0.0).to(tl.float32)
    target_logp = tl.div_rn(z - maximum, tau) - log_sum

    values = (
        target == ignore_index,
        maximum,
        tl.div_rn(LOG2E, tau),
        log_sum * LOG2E,
        row_entropy * LOG2E,
        tl.div_rn(-g, tau),
        tl.div_rn(-h, tau) * LN2,
        tl.where(mine, target_at - begin, -1).to(tl.int32),
        tl.div_rn(_target_gradient(target_logp, g, h, row_entropy), tau),
    )
    offsets = tl.arange(0, BLOCK)
    at = begin + offsets
    x_at = logits + boundary + at
    out_at = out + out_boundary + at
    if (begin >= head) & (begin + BLOCK <= end):
        _write_gradient(x_at, out_at, None, offsets, values, grad_entropy is not None)
    else:
        mask = (at >= head) & (at < end)
        _write_gradient(x_at, out_at, mask, offsets, values, grad_entropy is not None)
