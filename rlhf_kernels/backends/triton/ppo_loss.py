"""Loss, statistics and gradients of clipped PPO (Schulman et al. 2017).

The loss kernel takes blocks of a row's tokens: it writes their gradients and one row of sums, of
which `ppo_sums.finish_kernel` makes loss and statistics. `ppo_divisor` finds what is divided by.

Comparisons stand so that NaN in a valid place reaches the loss and its gradient, and so that ties
follow the unclipped branch. Loads are not masked by what is valid, which would make them narrow.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from rlhf_kernels.backends.triton.formulas import (
    MOMENTS,
    exp,
    exp_minus_one_minus,
    kl_estimate,
    kl_slope,
    store_moments,
)
from rlhf_kernels.backends.triton.ppo_sums import (
    CLIPPED,
    COUNT,
    DUAL_CLIPPED,
    ENTROPY,
    ERRORS,
    K3,
    LOG_RATIO,
    PARTIAL,
    POLICY_LOSS,
    RATIO,
    RATIO_MAX,
    REF_KL,
    RETURNS,
    VALUE_CLIPPED,
    VALUE_LOSS,
    WEIGHTED_ENTROPY,
    WEIGHTED_REF_KL,
)


@triton.jit
def _sequence_of(cu_seqlens, sequences, program, BLOCK: tl.constexpr):
    """The packed sequence whose block this is: sequence b has those from cu[b] // BLOCK + b on."""
    low = 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) // BLOCK + middle <= program:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _load_all(x, t, end, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(x + t)
    else:
        return tl.load(x + t, mask=t < end, other=0)


@triton.jit
def _load(x, t, end, valid, WHOLE: tl.constexpr):
    """0 where it is not valid, whatever stands there."""
    return tl.where(valid, _load_all(x, t, end, WHOLE), 0.0)


@triton.jit
def _store(to, t, end, x, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(to + t, x)
    else:
        tl.store(to + t, x, mask=t < end)


@triton.jit
def _store_sum(to, x):
    tl.store(to, tl.sum(x.to(tl.float32)))


@triton.jit
def _weights(divisor, counts, sequence_columns, t, valid):
    """What each token's loss is multiplied by before the sum; 0 at masked places."""
    weight = tl.div_rn(1.0, tl.load(divisor))
    if counts is not None:
        count = tl.load(counts + t // sequence_columns, mask=valid, other=1)
        weight = tl.div_rn(weight, count.to(tl.float32))
    return tl.where(valid, weight, 0.0)


@triton.jit
def _policy_terms(ratio, advantage, numbers):
    """(loss, its gradient by the log-probability, clipped, dual-clipped) of each token."""
    low, high, dual_clip, _, _, _, _ = numbers
    bounded = tl.where(ratio < low, low, ratio)
    bounded = tl.where(bounded > high, high, bounded) * advantage
    surrogate = ratio * advantage
    clipped = bounded < surrogate
    loss = -tl.where(clipped, bounded, surrogate)
    ceiling = -dual_clip * advantage
    dual_clipped = (advantage < 0.0) & (ceiling < loss)
    slope = tl.where(clipped | dual_clipped, 0.0, -surrogate)
    return tl.where(dual_clipped, ceiling, loss), slope, clipped, dual_clipped


@triton.jit
def _value_terms(value, old_value, ret, limit, CLIP_VALUES: tl.constexpr):
    """(loss, its gradient by the value, clipped) of each token."""
    error = value - ret
    if CLIP_VALUES:
        step = value - old_value
        bounded = tl.where(step > limit, limit, step)
        bounded = tl.where(bounded < -limit, -limit, bounded)
        bounded_error = old_value + bounded - ret
        # Inside the range both errors are one; the bounded one takes no part there, so rounding
        # cannot break the tie. Where a NaN comes in, the old value's too, it is NaN and is chosen.
        squared = bounded_error * bounded_error
        outside = (step > limit) | (step < -limit) | (step != step)
        clipped = outside & ((squared > error * error) | (squared != squared))
        chosen = tl.where(clipped, bounded_error, error)
        return 0.5 * chosen * chosen, tl.where(clipped, 0.0 * bounded_error, error), clipped
    else:
        return 0.5 * error * error, error, tl.zeros(error.shape, tl.int1)


@triton.jit
def _policy(
    series,
    block,
    weight,
    numbers,
    partial,
    REF: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The gradient of the log-probabilities, of the loss and of the KL divergence in it."""
    all_logprobs, old_logprobs, advantages, ref_logprobs, importance_weights = series
    t, end, valid = block
    logprob = _load(all_logprobs, t, end, valid, WHOLE)
    log_ratio = logprob - _load(old_logprobs, t, end, valid, WHOLE)
    ratio = exp(log_ratio)
    advantage = _load(advantages, t, end, valid, WHOLE)
    loss, slope, clipped, dual_clipped = _policy_terms(ratio, advantage, numbers)
    if IMPORTANCE:
        importance = _load(importance_weights, t, end, valid, WHOLE)
        loss *= importance
        slope *= importance
    # Masked places hold log-ratio 0 and advantage 0: every term is 0 there but the ratio.
    valid_ratio = tl.where(valid, ratio, 0.0)
    _store_sum(partial + POLICY_LOSS, weight * loss)
    _store_sum(partial + LOG_RATIO, log_ratio)
    _store_sum(partial + K3, exp_minus_one_minus(log_ratio, ratio))
    _store_sum(partial + RATIO, valid_ratio)
    _store_sum(partial + CLIPPED, clipped)
    _store_sum(partial + DUAL_CLIPPED, dual_clipped)
    _store_sum(partial + COUNT, valid)
    # The maximum passes over NaN; the sum does not, and says so in the end.
    tl.store(partial + RATIO_MAX, tl.max(tl.where(valid_ratio == valid_ratio, valid_ratio, 0.0)))
    if REF:
        r = logprob - _load(ref_logprobs, t, end, valid, WHOLE)
        kl = kl_estimate(r, ESTIMATOR)
        _store_sum(partial + REF_KL, kl)
        _store_sum(partial + WEIGHTED_REF_KL, weight * kl)
        _, _, _, _, _, _, kl_coef = numbers
        slope += kl_coef * kl_slope(r, ESTIMATOR)
    else:
        tl.store(partial + REF_KL, 0.0)
        tl.store(partial + WEIGHTED_REF_KL, 0.0)
    return weight * slope


@triton.jit
def _value(
    series,
    block,
    weight,
    numbers,
    partial,
    CLIP_VALUES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The gradient of the values."""
    values, old_values, returns = series
    _, _, _, limit, value_coef, _, _ = numbers
    t, end, valid = block
    value = _load(values, t, end, valid, WHOLE)
    ret = _load(returns, t, end, valid, WHOLE)
    old_value = value
    if CLIP_VALUES:
        old_value = _load(old_values, t, end, valid, WHOLE)
    loss, slope, clipped = _value_terms(value, old_value, ret, limit, CLIP_VALUES)
    _store_sum(partial + VALUE_LOSS, weight * loss)
    _store_sum(partial + VALUE_CLIPPED, clipped)
    store_moments(partial + RETURNS, ret, valid)
    store_moments(partial + ERRORS, ret - value, valid)
    return value_coef * weight * slope


@triton.jit
def _tokens(
    policy_series,
    value_series,
    entropy,
    mask,
    outputs,
    t,
    end,
    counts,
    sequence_columns,
    divisor,
    numbers,
    partial,
    VALUES: tl.constexpr,
    CLIP_VALUES: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    REF: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One block of a row. WHOLE: all of it is there."""
    grad_logprobs, grad_values, grad_entropy = outputs
    valid = _load_all(mask, t, end, WHOLE) != 0
    weight = _weights(divisor, counts, sequence_columns, t, valid)
    block = (t, end, valid)
    grad = _policy(
        policy_series, block, weight, numbers, partial, REF, IMPORTANCE, ESTIMATOR, WHOLE
    )
    _store(grad_logprobs, t, end, grad, WHOLE)
    if VALUES:
        grad = _value(value_series, block, weight, numbers, partial, CLIP_VALUES, WHOLE)
        _store(grad_values, t, end, grad, WHOLE)
    else:
        tl.store(partial + VALUE_LOSS, 0.0)
        tl.store(partial + VALUE_CLIPPED, 0.0)
        field = tl.arange(0, 2 * MOMENTS)
        tl.store(partial + RETURNS + field, tl.zeros([2 * MOMENTS], tl.float32))
    if WITH_ENTROPY:
        _, _, _, _, _, entropy_coef, _ = numbers
        x = _load(entropy, t, end, valid, WHOLE)
        _store_sum(partial + ENTROPY, x)
        _store_sum(partial + WEIGHTED_ENTROPY, weight * x)
        _store(grad_entropy, t, end, -entropy_coef * weight, WHOLE)
    else:
        tl.store(partial + ENTROPY, 0.0)
        tl.store(partial + WEIGHTED_ENTROPY, 0.0)


@triton.jit
def _stride(stride, ALIGNED: tl.constexpr):
    if ALIGNED:
        return stride // 16 * 16  # says so to the compiler
    else:
        return stride


@triton.jit
def _row(x, stride, cu_seqlens, row, begin, ALIGNED: tl.constexpr, absent):
    if x is None:
        return absent
    elif cu_seqlens is None:
        return x + row * _stride(stride, ALIGNED)
    else:
        return x + begin


def _loss_kernel(
    logprobs,
    logprobs_stride: tl.int64,
    old_logprobs,
    old_logprobs_stride: tl.int64,
    advantages,
    advantages_stride: tl.int64,
    mask,
    mask_stride: tl.int64,
    values,
    values_stride: tl.int64,
    old_values,
    old_values_stride: tl.int64,
    returns,
    returns_stride: tl.int64,
    entropy,
    entropy_stride: tl.int64,
    ref_logprobs,
    ref_logprobs_stride: tl.int64,
    importance_weights,
    importance_weights_stride: tl.int64,
    cu_seqlens,
    sequences,
    columns,
    blocks,
    sequence_columns,
    counts,
    divisor,
    low,
    high,
    dual_clip,
    value_clip_range,
    value_coef,
    entropy_coef,
    kl_coef,
    grad_logprobs,
    grad_values,
    grad_entropy,
    partials,
    ESTIMATOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of a row, or of a packed sequence. Grid: (rows · blocks,), see `_sequence_of`.

    counts: the valid tokens of each sequence, by which the weight of its tokens is divided, or
    None; a row holds one sequence, or several of sequence_columns places. ALIGNED: rows begin on
    boundaries of 16 bytes, in all tensors.
    """
    program = tl.program_id(0)
    partials += program.to(tl.int64) * PARTIAL
    if cu_seqlens is None:
        row = (program // blocks).to(tl.int64)
        first = program % blocks * BLOCK
        end = columns
        begin = row * _stride(columns, ALIGNED)
    else:
        row = _sequence_of(cu_seqlens, sequences, program, BLOCK).to(tl.int64)
        begin = tl.load(cu_seqlens + row)
        first = (program - (begin // BLOCK + row)).to(tl.int32) * BLOCK
        end = (tl.load(cu_seqlens + row + 1) - begin).to(tl.int32)
    if counts is not None:
        counts += row
    VALUES: tl.constexpr = values is not None
    CLIP_VALUES: tl.constexpr = old_values is not None
    WITH_ENTROPY: tl.constexpr = entropy is not None
    REF: tl.constexpr = ref_logprobs is not None
    IMPORTANCE: tl.constexpr = importance_weights is not None
    # What is absent is not read, but a tuple cannot hold None.
    logprobs = _row(logprobs, logprobs_stride, cu_seqlens, row, begin, ALIGNED, logprobs)
    policy_series = (
        logprobs,
        _row(old_logprobs, old_logprobs_stride, cu_seqlens, row, begin, ALIGNED, logprobs),
        _row(advantages, advantages_stride, cu_seqlens, row, begin, ALIGNED, logprobs),
        _row(ref_logprobs, ref_logprobs_stride, cu_seqlens, row, begin, ALIGNED, logprobs),
        _row(
            importance_weights,
            importance_weights_stride,
            cu_seqlens,
            row,
            begin,
            ALIGNED,
            logprobs,
        ),
    )
    value_series = (
        _row(values, values_stride, cu_seqlens, row, begin, ALIGNED, logprobs),
        _row(old_values, old_values_stride, cu_seqlens, row, begin, ALIGNED, logprobs),
        _row(returns, returns_stride, cu_seqlens, row, begin, ALIGNED, logprobs),
    )
    entropy = _row(entropy, entropy_stride, cu_seqlens, row, begin, ALIGNED, logprobs)
    mask = _row(mask, mask_stride, cu_seqlens, row, begin, ALIGNED, logprobs)
    outputs = (
        grad_logprobs + begin,
        grad_logprobs + begin if grad_values is None else grad_values + begin,
        grad_logprobs + begin if grad_entropy is None else grad_entropy + begin,
    )
    numbers = (low, high, dual_clip, value_clip_range, value_coef, entropy_coef, kl_coef)
    if first + BLOCK <= end:
        _tokens(
            policy_series,
            value_series,
            entropy,
            mask,
            outputs,
            first + tl.arange(0, BLOCK),
            end,
            counts,
            sequence_columns,
            divisor,
            numbers,
            partials,
            VALUES,
            CLIP_VALUES,
            WITH_ENTROPY,
            REF,
            IMPORTANCE,
            ESTIMATOR,
            True,
        )
    else:
        _tokens(
            policy_series,
            value_series,
            entropy,
            mask,
            outputs,
            first + tl.arange(0, BLOCK),
            end,
            counts,
            sequence_columns,
            divisor,
            numbers,
            partials,
            VALUES,
            CLIP_VALUES,
            WITH_ENTROPY,
            REF,
            IMPORTANCE,
            ESTIMATOR,
            False,
        )


_SERIES = (
    "logprobs",
    "old_logprobs",
    "advantages",
    "mask",
    "values",
    "old_values",
    "returns",
    "entropy",
    "ref_logprobs",
    "importance_weights",
)
_GRADIENTS = ("grad_logprobs", "grad_values", "grad_entropy")
_NUMBERS = (
    *("cu_seqlens", "sequences", "columns", "blocks", "sequence_columns", "counts", "divisor"),
    *(
        "low",
        "high",
        "dual_clip",
        "value_clip_range",
        "value_coef",
        "entropy_coef",
        "kl_coef",
        "partials",
    ),
)
# Neither numbers nor where memory begins select another compilation, but for all of it at once.
_PLAIN = [*_NUMBERS, *(f"{name}_stride" for name in _SERIES)]
aligned_loss_kernel = triton.jit(_loss_kernel, do_not_specialize=_PLAIN)
loss_kernel = triton.jit(_loss_kernel, do_not_specialize=[*_PLAIN, *_SERIES, *_GRADIENTS])
