"""What several operations compute: exponentials, KL estimates, moments of a block."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
# ln 2 in two parts; the first has so few digits that its products with integers are exact.
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440054690583e-4)

# Of a block's moments: how many, one of the numbers, the mean's distance from it, and the sum of
# squared deviations. So neither the mean nor the deviations lose digits, in float32.
MOMENTS = tl.constexpr(4)


@triton.jit
def exp(x):
    """e^x to a few roundings of its size, for large x too."""
    x = tl.where(x > 89.0, 89.0, tl.where(x < -105.0, -105.0, x))  # NaN stays
    whole = tl.floor(x * _LOG2E + 0.5)
    rest = x - whole * _LN2_HIGH - whole * _LN2_LOW
    # In two steps, since 2^whole alone may be too large where the product is not.
    half = tl.floor(whole * 0.5)
    return tl.exp2(rest * _LOG2E) * tl.exp2(half) * tl.exp2(whole - half)


@triton.jit
def exp_minus_one_minus(x, exp_x):
    """e^x − 1 − x. Near 0 the plain form loses all digits, so a polynomial stands in there."""
    series = 1.0 + x * (1.0 / 10)
    for divisor in tl.static_range(9, 2, -1):
        series = 1.0 + x * series * (1.0 / divisor)
    return tl.where((x > -0.5) & (x < 0.5), 0.5 * x * x * series, exp_x - 1.0 - x)


@triton.jit
def kl_estimate(r, ESTIMATOR: tl.constexpr):
    """An estimate of the KL divergence (Schulman, 2020) with r = logprob − ref_logprob."""
    if ESTIMATOR == "k1":
        return r
    elif ESTIMATOR == "k2":
        return r * r * 0.5
    elif ESTIMATOR == "k3":
        return exp_minus_one_minus(-r, exp(-r))
    else:
        return tl.abs(r)


@triton.jit
def kl_slope(r, ESTIMATOR: tl.constexpr):
    """The derivative of `kl_estimate` by the log-probability."""
    if ESTIMATOR == "k1":
        return tl.full(r.shape, 1.0, tl.float32)
    elif ESTIMATOR == "k2":
        return r
    else:
        exp_r = exp(-r)
        near = r - exp_minus_one_minus(-r, exp_r)
        return tl.where((r > -0.5) & (r < 0.5), near, 1.0 - exp_r)


@triton.jit
def store_moments(to, x, valid):
    """The MOMENTS of a block's valid places, into four numbers at `to`."""
    count = tl.sum(valid.to(tl.float32))
    # Any of them would do. The maximum passes over NaN, which then is in the differences.
    one = tl.where(count > 0.0, tl.max(tl.where(valid, x, float("-inf"))), 0.0)
    distance = tl.where(valid, x - one, 0.0)
    mean = tl.sum(distance) / tl.maximum(count, 1.0)
    deviation = tl.where(valid, distance - mean, 0.0)
    tl.store(to, count)
    tl.store(to + 1, one)
    tl.store(to + 2, mean)
    tl.store(to + 3, tl.sum(deviation * deviation))


@triton.jit
def total_moments(blocks, number, stride, BLOCK: tl.constexpr):
    """(count, mean, sum of squared deviations) in float64 of `number` blocks' moments.

    The blocks stand `stride` apart. Their means are combined first, then the deviations refer to
    the mean of all (Chan et al. 1979); the order is always the same.
    """
    places = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, number, BLOCK):
        n, block_mean, _ = _load_moments(blocks, start + places, number, stride)
        count += n
        total += n * block_mean
    n_all = tl.sum(count)
    mean = tl.sum(total) / tl.maximum(n_all, 1.0)
    squares = tl.zeros([BLOCK], tl.float64)
    for start in range(0, number, BLOCK):
        n, block_mean, block_squares = _load_moments(blocks, start + places, number, stride)
        distance = block_mean - mean
        squares += tl.where(n > 0.0, block_squares + n * distance * distance, 0.0)
    return n_all, mean, tl.sum(squares)


@triton.jit
def _load_moments(blocks, block, number, stride):
    there = block < number
    at = blocks + block.to(tl.int64) * stride
    count = tl.load(at, mask=there, other=0.0).to(tl.float64)
    one = tl.load(at + 1, mask=there, other=0.0).to(tl.float64)
    distance = tl.load(at + 2, mask=there, other=0.0).to(tl.float64)
    squares = tl.load(at + 3, mask=there, other=0.0).to(tl.float64)
    return count, one + distance, squares
