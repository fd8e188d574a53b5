"""Everything that follows a rollout, backwards in time: KL penalty, rewards, advantages, returns.

A sequence is taken in blocks of BLOCK places, counted from the end of its valid span, so that
padding changes no bit. With A_next from the block behind, A_t = m_t · A_next + b_t: the factors and
terms of a block come from a scan of the affine maps A ↦ δ_t + c·A, identities at holes.

Where there are sequences enough, a program walks through the blocks of one. Where they are too few
to fill the GPU, each block has a program: first all find the maps of their blocks (MAPS), then each
goes through the maps of the blocks behind its own and begins with what comes out (APPLY). Both ways
compute the same numbers from the same ones, so the results have the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from rlhf_kernels.backends.triton.formulas import (
    MOMENTS,
    kl_estimate,
    store_moments,
)

# What a launch does, and the numbers of a block's map: factor and term for the advantages, and
# those for what the returns are made of.
WALK, MAPS, APPLY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
MAP = tl.constexpr(4)

_INPUTS = ("logprobs", "ref_logprobs", "scores", "rewards", "values", "mask")
_STRIDES = ("logprobs_stride", "ref_stride", "rewards_stride", "values_stride", "mask_stride")
_NUMBERS = ("kl_coef", "columns", "most_blocks", "gamma", "lam", "value_lam")
_OF_SEQUENCES = ("bootstrap_values", "cu_seqlens", "rates")
_OUTPUTS = ("advantages", "returns", "kl", "moments", "maps")
# Neither numbers nor where memory begins select another compilation.
_PLAIN = [*_INPUTS, *_STRIDES, *_NUMBERS, *_OF_SEQUENCES, *_OUTPUTS]


@triton.jit
def _bounds(cu_seqlens, columns, sequence):
    """Where a sequence begins in tensors without gaps, and its length."""
    if cu_seqlens is None:
        return sequence * columns, columns
    else:
        begin = tl.load(cu_seqlens + sequence)
        return begin, (tl.load(cu_seqlens + sequence + 1) - begin).to(tl.int32)


@triton.jit
def _first_slot(begin, sequence, BLOCK: tl.constexpr):
    """Of the places for what blocks leave behind. Up to the next sequence's there are enough."""
    return begin // BLOCK + 2 * sequence


@triton.jit
def _end_of_valid(mask, length, BLOCK: tl.constexpr):
    """The place behind the last valid one; 0 without any."""
    end = 0
    start = length
    while (start > 0) & (end == 0):
        start -= BLOCK
        t = start + tl.arange(0, BLOCK)
        valid = tl.load(mask + t, mask=t >= 0, other=0) != 0
        end = tl.max(tl.where(valid, t + 1, 0))
    return end


@triton.jit
def _next_valid(mask, start, end, BLOCK: tl.constexpr):
    """The first valid place from `start` on; `end`, or one behind it, without any."""
    found = end
    while (start < end) & (found == end):
        t = start + tl.arange(0, BLOCK)
        valid = tl.load(mask + t, mask=(t >= 0) & (t < end), other=0) != 0
        found = tl.min(tl.where(valid, t, end))
        start += BLOCK
    return found


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _one_after_the_other(factor, term, left_factor, left_term):
    """The map of places on the left after that of places on the right of them."""
    return left_factor * factor, tl.fma(left_factor, term, left_term)


@triton.jit
def _first(x, BLOCK: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BLOCK) == 0, x, 0.0))


@triton.jit
def _is_valid(mask, t, end):
    return tl.load(mask + t, mask=(t >= 0) & (t < end), other=0) != 0


@triton.jit
def _rewards(row, t, valid, ESTIMATOR: tl.constexpr):
    """(reward, KL estimate): given, or the penalty and at the last valid place the score."""
    logprobs, ref_logprobs, scores, kl_coef, rewards, _, _, _, end = row
    if ESTIMATOR is None:
        reward = tl.load(rewards + t, mask=valid, other=0.0)
        return reward, reward
    else:
        r = tl.load(logprobs + t, mask=valid, other=0.0)
        r -= tl.load(ref_logprobs + t, mask=valid, other=0.0)
        kl = kl_estimate(r, ESTIMATOR)
        score = tl.where(t == end - 1, tl.load(scores), 0.0)
        return tl.fma(kl, -kl_coef, score), kl


@triton.jit
def _steps(row, t, valid, begin, BLOCK: tl.constexpr, DECAY: tl.constexpr):
    """(which places of a block take a step, the value behind each of them).

    `begin` is where the next block does. Holes take steps with DECAY, and their value is 0.
    """
    _, _, _, _, _, values, mask, bootstrap, end = row
    after = t + 1
    if DECAY:
        steps = (t >= 0) & (t < end)
        there = _is_valid(mask, after, end)
    else:
        behind = _next_valid(mask, begin, end, BLOCK)
        after = tl.where((after < begin) & _is_valid(mask, after, end), after, behind)
        after = tl.associative_scan(after, 0, _smaller, reverse=True)
        steps = valid
        there = steps & (after < end)
    next_value = tl.load(values + after, mask=there, other=0.0)
    return steps, tl.where(after < end, next_value, bootstrap)


@triton.jit
def _maps(delta, steps, decay):
    """Factor and term of each place, with all behind it in the block."""
    factor = tl.where(steps, decay, 1.0)
    return tl.associative_scan((factor, delta), 0, _one_after_the_other, reverse=True)


@triton.jit
def _store_map(to, factor, term, BLOCK: tl.constexpr):
    tl.store(to, _first(factor, BLOCK))
    tl.store(to + 1, _first(term, BLOCK))


@triton.jit
def _through_maps(maps, number):
    """What follows the block behind which `number` blocks stand."""
    following = 0.0
    for block in range(0, number):
        factor = tl.load(maps + block * MAP)
        following = tl.fma(factor, following, tl.load(maps + block * MAP + 1))
    return following


@triton.jit
def _work(most_blocks, STAGE: tl.constexpr):
    """(sequence, its first block, the one behind its last) of this program."""
    program = tl.program_id(0)
    if STAGE == WALK:
        return program.to(tl.int64), 0, 2**30
    else:
        block = program % most_blocks
        return (program // most_blocks).to(tl.int64), block, block + 1


@triton.jit
def _row(x, stride, cu_seqlens, sequence, begin):
    if cu_seqlens is None:
        return x + sequence * stride
    else:
        return x + begin


@triton.jit
def _decays(gamma, lam, value_lam, rates, sequence):
    """(discount, decay of the advantages, decay of what the returns are made of)."""
    if rates is not None:
        gamma = tl.load(rates + 3 * sequence)
        lam = tl.load(rates + 3 * sequence + 1)
        value_lam = tl.load(rates + 3 * sequence + 2)
    return gamma, gamma * lam, gamma * value_lam


@triton.jit
def _store(to, x, valid, inside):
    tl.store(to, tl.where(valid, x, 0.0), mask=inside)


@triton.jit(do_not_specialize=_PLAIN)
def advantages_kernel(
    logprobs,
    logprobs_stride: tl.int64,
    ref_logprobs,
    ref_stride: tl.int64,
    scores,
    kl_coef,
    rewards,
    rewards_stride: tl.int64,
    values,
    values_stride: tl.int64,
    mask,
    mask_stride: tl.int64,
    bootstrap_values,
    cu_seqlens,
    columns,
    most_blocks,
    gamma,
    lam,
    value_lam,
    rates,
    advantages,
    returns,
    kl,
    moments,
    maps,
    STAGE: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    DECAY: tl.constexpr,
    SAME: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (B,) to WALK, else (B · most_blocks,).

    Without an ESTIMATOR of the KL divergence the rewards are given, and neither KL nor moments are
    written; else rewards are an output. SAME: returns are made of the advantages.
    """
    sequence, first, last = _work(most_blocks, STAGE)
    begin, length = _bounds(cu_seqlens, columns, sequence)
    values = _row(values, values_stride, cu_seqlens, sequence, begin)
    mask = _row(mask, mask_stride, cu_seqlens, sequence, begin)
    if ESTIMATOR is None:
        rewards = _row(rewards, rewards_stride, cu_seqlens, sequence, begin)
        # Not read, but a tuple cannot hold None.
        logprobs = rewards
        ref_logprobs = rewards
        scores = rewards
    else:
        logprobs = _row(logprobs, logprobs_stride, cu_seqlens, sequence, begin)
        ref_logprobs = _row(ref_logprobs, ref_stride, cu_seqlens, sequence, begin)
        scores += sequence
    bootstrap = 0.0
    if bootstrap_values is not None:
        bootstrap = tl.load(bootstrap_values + sequence)
    gamma, decay, decay_of_return = _decays(gamma, lam, value_lam, rates, sequence)
    end = _end_of_valid(mask, length, BLOCK)
    row = (logprobs, ref_logprobs, scores, kl_coef, rewards, values, mask, bootstrap, end)

    # Blocks are counted from the right; the first ones may hold nothing but padding.
    top = end + tl.cdiv(length - end, BLOCK) * BLOCK
    slot = _first_slot(begin, sequence, BLOCK)
    following = 0.0
    following_of_return = 0.0
    if STAGE == APPLY:
        following = _through_maps(maps + slot * MAP, first)
        if not SAME:
            following_of_return = _through_maps(maps + slot * MAP + 2, first)
    for block in range(first, tl.minimum(last, tl.cdiv(top, BLOCK))):
        behind = top - block * BLOCK
        t = behind - BLOCK + tl.arange(0, BLOCK)
        valid = _is_valid(mask, t, end)
        reward, penalty = _rewards(row, t, valid, ESTIMATOR)
        value = tl.load(values + t, mask=valid, other=0.0)
        steps, next_value = _steps(row, t, valid, behind, BLOCK, DECAY)
        delta = tl.where(steps, tl.fma(next_value, gamma, reward) - value, 0.0)
        factor, term = _maps(delta, steps, decay)
        if not SAME:
            factor_of_return, term_of_return = _maps(delta, steps, decay_of_return)
        if STAGE == MAPS:
            _store_map(maps + (slot + block) * MAP, factor, term, BLOCK)
            if not SAME:
                _store_map(maps + (slot + block) * MAP + 2, factor_of_return, term_of_return, BLOCK)
        else:
            advantage = tl.fma(factor, following, term)
            of_return = advantage
            if not SAME:
                of_return = tl.fma(factor_of_return, following_of_return, term_of_return)
                following_of_return = _first(of_return, BLOCK)
            following = _first(advantage, BLOCK)
            inside = (t >= 0) & (t < length)
            _store(advantages + begin + t, advantage, valid, inside)
            _store(returns + begin + t, of_return + value, valid, inside)
            if ESTIMATOR is not None:
                _store(rewards + begin + t, reward, valid, inside)
                _store(kl + begin + t, penalty, valid, inside)
                store_moments(moments + (slot + block) * MOMENTS, advantage, valid)
