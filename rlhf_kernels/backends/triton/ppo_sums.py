"""From the sums that the blocks of the PPO loss leave behind to loss and statistics.

In float64, and always in the same order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from rlhf_kernels.backends.triton.formulas import total_moments

# What a block leaves behind: sums over its valid tokens (the first four times the weights that the
# aggregation gives them), the largest ratio, the moments of returns and of their errors.
POLICY_LOSS, VALUE_LOSS = tl.constexpr(0), tl.constexpr(1)
WEIGHTED_ENTROPY, WEIGHTED_REF_KL = tl.constexpr(2), tl.constexpr(3)
ENTROPY, LOG_RATIO, K3, RATIO = (tl.constexpr(i) for i in range(4, 8))
CLIPPED, VALUE_CLIPPED, DUAL_CLIPPED = (tl.constexpr(i) for i in range(8, 11))
REF_KL, COUNT, RATIO_MAX = (tl.constexpr(i) for i in range(11, 14))
SUMS = tl.constexpr(16)
RETURNS, ERRORS = tl.constexpr(16), tl.constexpr(20)
PARTIAL = tl.constexpr(24)


@triton.jit
def _at(sums, field):
    return tl.sum(tl.where(tl.arange(0, SUMS) == field, sums, 0.0))


@triton.jit
def _mean(sums, field):
    return (_at(sums, field) / tl.maximum(_at(sums, COUNT), 1.0)).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "partials",
        "number",
        "value_coef",
        "entropy_coef",
        "kl_coef",
        "loss",
        "stats",
    ]
)
def finish_kernel(
    partials,
    number,
    value_coef,
    entropy_coef,
    kl_coef,
    loss,
    stats,
    BLOCK: tl.constexpr,
):
    """Loss [] and statistics [12] from what `number` blocks left behind. Grid: (1,)."""
    field = tl.arange(0, SUMS)
    sums = tl.zeros([BLOCK, SUMS], tl.float64)
    largest = tl.zeros([BLOCK], tl.float32)
    for first in range(0, number, BLOCK):
        block = first + tl.arange(0, BLOCK)
        rows = partials + block.to(tl.int64) * PARTIAL
        there = (block[:, None] < number) & (field[None, :] < RATIO_MAX)
        sums += tl.load(rows[:, None] + field[None, :], mask=there, other=0.0).to(tl.float64)
        largest = tl.maximum(largest, tl.load(rows + RATIO_MAX, mask=block < number, other=0.0))
    sums = tl.sum(sums, axis=0)
    policy_loss = _at(sums, POLICY_LOSS)
    value_loss = _at(sums, VALUE_LOSS)
    total = policy_loss + value_coef * value_loss
    total += kl_coef * _at(sums, WEIGHTED_REF_KL) - entropy_coef * _at(sums, WEIGHTED_ENTROPY)
    tl.store(loss, total.to(tl.float32))
    tl.store(stats, policy_loss.to(tl.float32))
    tl.store(stats + 1, value_loss.to(tl.float32))
    tl.store(stats + 2, _mean(sums, ENTROPY))
    tl.store(stats + 3, -_mean(sums, LOG_RATIO))
    tl.store(stats + 4, _mean(sums, K3))
    tl.store(stats + 5, _mean(sums, CLIPPED))
    tl.store(stats + 6, _mean(sums, VALUE_CLIPPED))
    tl.store(stats + 7, _mean(sums, DUAL_CLIPPED))
    tl.store(stats + 8, _mean(sums, RATIO))
    ratio = _at(sums, RATIO)
    tl.store(stats + 9, tl.where(ratio == ratio, tl.max(largest), float("nan")))
    _, _, spread = total_moments(partials + RETURNS, number, PARTIAL, BLOCK)
    _, _, unexplained = total_moments(partials + ERRORS, number, PARTIAL, BLOCK)
    # Equal returns have no deviations at all, not rounded ones.
    explained = tl.where(spread == 0.0, 0.0, 1.0 - unexplained / spread)
    tl.store(stats + 10, explained.to(tl.float32))
    tl.store(stats + 11, _mean(sums, REF_KL))
