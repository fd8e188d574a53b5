"""What TRL 1.12, verl 0.9 and OpenRLHF 0.11 compute, in float64, token by token.

Written from the papers and from what those versions do, as formulas: see docs/peers.md. Arrays are
[B, T]; masks are bool. `trl_` is `trl.experimental.ppo`, `verl_` is `verl.trainer.ppo.core_algos`
with the vanilla policy loss, `openrlhf_` is its PPO with the estimator `gae`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def advantages_of(rewards: list[float], values: list[float], gamma: float, lam: float) -> Array:
    """A_i = Σ_k (γλ)^k δ_{i+k} over the steps given; after the last one the value is 0."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, following, values)]
    decay = gamma * lam
    sums = [math.fsum(decay**k * d for k, d in enumerate(deltas[i:])) for i in range(len(deltas))]
    return np.array(sums)


# GAE: the peers differ in what a step is, and in what stands at places that are none.


def verl_gae(
    rewards: Array, values: Array, mask: Array, gamma: float, lam: float
) -> tuple[Array, Array]:
    """Advantages (not whitened yet) and returns. Steps are the valid tokens.

    A masked place has the advantage of the next valid one, or 0, and returns on top of its value.
    """
    advantages = np.zeros(mask.shape)
    for b, row in enumerate(mask):
        valid = np.flatnonzero(row)
        of_valid = advantages_of(list(rewards[b, valid]), list(values[b, valid]), gamma, lam)
        for t in range(row.size):
            i = int(np.searchsorted(valid, t))
            advantages[b, t] = of_valid[i] if i < valid.size else 0.0
    return advantages, advantages + values


def openrlhf_gae(
    rewards: Array, values: Array, mask: Array, gamma: float, lam: float
) -> tuple[Array, Array]:
    """Every place is a step; at masked ones reward and value are 0."""
    rewards, values = np.where(mask, rewards, 0.0), np.where(mask, values, 0.0)
    rows = [advantages_of(list(r), list(v), gamma, lam) for r, v in zip(rewards, values)]
    advantages = np.array(rows).reshape(mask.shape)
    return advantages, advantages + values


def trl_masks(lengths: list[int], width: int) -> tuple[Array, Array]:
    """The policy's mask, each response's tokens, and the critic's: one place more, if there is."""
    places = np.arange(width)[None, :]
    tokens = np.array(lengths)[:, None]
    return places < tokens, places < tokens + 1


class TRLRollout(NamedTuple):
    advantages: Array  # whitened, 0 at padding
    raw_advantages: Array
    returns: Array
    rewards: Array


def trl_rollout(
    scores: Array,
    kl: Array,
    values: Array,
    lengths: list[int],
    kl_coef: float,
    gamma: float,
    lam: float,
    whiten_rewards: bool = False,
) -> TRLRollout:
    """The score stands one place after the response, where the critic is asked once more.

    It stands at the response's last token where the response fills the width.
    """
    policy, critic = trl_masks(lengths, values.shape[1])
    rewards = -kl_coef * np.where(policy, kl, 0.0)
    for b, row in enumerate(critic):
        rewards[b, np.flatnonzero(row)[-1]] += scores[b]
    used = rewards
    if whiten_rewards:
        used = bessel_whiten(rewards, critic, shift_mean=False)
    advantages, returns = openrlhf_gae(used, values, critic, gamma, lam)
    whitened = np.where(policy, bessel_whiten(advantages, policy), 0.0)
    return TRLRollout(whitened, advantages, returns, rewards)


# Whitening.


def bessel_whiten(x: Array, mask: Array, shift_mean: bool = True) -> Array:
    """TRL and verl: the unbiased variance, Σ(x − mean)²/(n − 1), and 10⁻⁸ under the root.

    Masked places are scaled like the others (TRL then sets them to 0). n = 0 is an error in both,
    n = 1 one in verl and NaN in TRL.
    """
    if mask.sum() < 2:
        raise ValueError("no unbiased variance of fewer than two tokens")
    mean, variance = x[mask].mean(), x[mask].var(ddof=1)
    return (x - mean) / math.sqrt(variance + 1e-8) + (0.0 if shift_mean else mean)


def openrlhf_normalize(x: Array, mask: Array, no_std_norm: bool = False) -> Array:
    """The population variance, at least 10⁻⁸; masked places are scaled like the others."""
    centred = x - x[mask].mean()
    return centred if no_std_norm else centred / math.sqrt(max(x[mask].var(), 1e-8))


# KL estimates of one token, r = logprob − ref_logprob.


def verl_kl(kind: str, r: float) -> float:
    if kind == "low_var_kl":
        bounded = clip(-r, -20.0, 20.0)
        return clip(math.exp(bounded) - bounded - 1.0, -10.0, 10.0)
    return {"kl": r, "abs": abs(r), "mse": 0.5 * r * r}[kind]


def openrlhf_kl(kind: str, r: float) -> float:
    """Each estimator is bounded to ±10."""
    if kind == "k3":
        bounded = max(r, -10.0)
        value = math.exp(-bounded) - 1.0 + bounded
    else:
        value = {"k1": r, "k2": r * r / 2.0}[kind]
    return clip(value, -10.0, 10.0)


def trl_kl(kind: str, r: float) -> float:
    return {"k1": r, "k3": math.exp(-r) - 1.0 + r}[kind]


# Rewards.


def verl_rewards(scores: Array, kl: Array, mask: Array, present: Array, kl_coef: float) -> Array:
    """The score stands at the last token present, be it the model's own (in `mask`) or a tool's."""
    rewards = -kl_coef * np.where(mask, kl, 0.0)
    for b, row in enumerate(present):
        rewards[b, np.flatnonzero(row)[-1]] += scores[b]
    return rewards


def openrlhf_rewards(
    scores: Array,
    kl: Array,
    mask: Array,
    kl_coef: float,
    clip_range: tuple[float, float] = (-10.0, 10.0),
) -> Array:
    """The score, bounded, stands at the last valid token; a negative coefficient counts as 0."""
    rewards = -max(kl_coef, 0.0) * kl
    for b, row in enumerate(mask):
        last = np.flatnonzero(row)[-1] if row.any() else row.size - 1
        rewards[b, last] += clip(scores[b], *clip_range)
    return rewards


# Losses of one token: d = logprob − old_logprob, a its advantage.


def trl_policy(d: float, a: float, eps: float = 0.2) -> float:
    ratio = math.exp(d)
    return max(-a * ratio, -a * clip(ratio, 1.0 - eps, 1.0 + eps))


def verl_policy(d: float, a: float, low: float = 0.2, high: float = 0.2, c: float = 3.0) -> float:
    """Always with the dual clip; log-ratios count as at most 20 in size."""
    ratio = math.exp(clip(d, -20.0, 20.0))
    loss = max(-a * ratio, -a * clip(ratio, 1.0 - low, 1.0 + high))
    return min(loss, -a * c) if a < 0 else loss


def openrlhf_policy(
    d: float, a: float, low: float = 0.2, high: float = 0.2, dual_clip: float | None = None
) -> float:
    """Log-ratios count as at most 20 in size; the dual clip is optional."""
    ratio = math.exp(clip(d, -20.0, 20.0))
    gain = min(ratio * a, clip(ratio, 1.0 - low, 1.0 + high) * a)
    if dual_clip is not None and a < 0:
        gain = max(gain, dual_clip * a)
    return -gain


def clipped_value(value: float, old: float, target: float, eps: float | None) -> float:
    """TRL, verl and OpenRLHF (only there eps may be None) alike."""
    free = (value - target) ** 2
    if eps is None:
        return 0.5 * free
    return 0.5 * max(free, (clip(value, old - eps, old + eps) - target) ** 2)


def per_token(formula: Callable[..., float], mask: Array, *series: Array) -> Array:
    """`formula` of the numbers at each valid place, 0 elsewhere."""
    result = np.zeros(mask.shape)
    for place in zip(*np.nonzero(mask)):
        result[place] = formula(*(float(x[place]) for x in series))
    return result


# From tokens to a number.


def trl_aggregate(terms: Array, mask: Array) -> float:
    return float(terms[mask].sum() / mask.sum())


def verl_aggregate(terms: Array, mask: Array, mode: str, scale: float | None = None) -> float:
    """`loss_agg_mode`; sequences without a valid token count in none. `scale`: of the "-norm"."""
    if mode == "token-sum":
        return float(terms[mask].sum())
    if mode == "token-mean":
        return float(terms[mask].sum() / mask.sum())
    rows = [(terms[b, row].sum(), row.sum()) for b, row in enumerate(mask) if row.any()]
    if mode == "seq-mean-token-mean":
        return float(sum(total / count for total, count in rows) / len(rows))
    mean = float(sum(total for total, _ in rows) / len(rows))
    if mode == "seq-mean-token-sum-norm":
        return mean / (mask.shape[1] if scale is None else scale)
    return mean


def openrlhf_aggregate(terms: Array, mask: Array, token_level: bool = True) -> float:
    return verl_aggregate(terms, mask, "token-mean" if token_level else "seq-mean-token-mean")


# What corrects for another engine having sampled: log_ratio = old_logprob − rollout_logprob.


def verl_importance_weights(
    log_ratios: Array, mask: Array, per_sequence: bool = False, upper: float = 2.0
) -> Array:
    """`rollout_is`, truncated: of each token, or of all tokens of a sequence together."""
    result = np.zeros(mask.shape)
    for b, row in enumerate(mask):
        for t in np.flatnonzero(row):
            exponent = log_ratios[b, row].sum() if per_sequence else log_ratios[b, t]
            result[b, t] = min(math.exp(clip(exponent, -20.0, 20.0)), upper)
    return result


def openrlhf_importance_weight(
    log_ratio: float, mode: str = "mask", low: float = 0.5, high: float = 5.0
) -> float:
    """`is_correction_level: token`; "mask" drops a token outside of the band, "clip" bounds it.

    With "mask" it is verl's IcePop too, a `rollout_is_threshold` of two numbers.
    """
    weight = math.exp(log_ratio)
    if mode == "clip":
        return clip(weight, low, high)
    return weight if low <= weight <= high else 0.0


def openrlhf_unbiased_slope(r: float, d: float) -> float:
    """Of one token's KL term with `unbiased_gradient`; where d is 0, that of verl's "k3+"."""
    return min(math.exp(d), 10.0) * r


def slopes(loss: Callable[[Array], float], at: Array, mask: Array, step: float = 1e-6) -> Array:
    """The gradient by central differences, off by about 1e-10 each for step² and for eps/step."""
    result = np.zeros(at.shape)
    for place in zip(*np.nonzero(mask)):
        above, below = at.copy(), at.copy()
        above[place] += step
        below[place] -= step
        result[place] = (loss(above) - loss(below)) / (2.0 * step)
    return result
