"""The definitions of docs/kernels.md as plain float64 loops, independent of every backend."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_kernels import PPOLossConfig


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().to(torch.float64).numpy()


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    grad_logprobs: np.ndarray | None = None,
    grad_entropy: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(logprobs [N], entropy [N], gradient [N, V]) of the rows of [N, V]."""
    z = array(logits)
    rows, vocabulary = z.shape
    tau = np.full(rows, temperature) if not isinstance(temperature, Tensor) else array(temperature)
    g = np.zeros(rows) if grad_logprobs is None else grad_logprobs
    h = np.zeros(rows) if grad_entropy is None else grad_entropy
    logprobs, entropy, gradient = np.zeros(rows), np.zeros(rows), np.zeros((rows, vocabulary))
    for i in range(rows):
        target = int(targets[i])
        if target == ignore_index:
            continue
        scaled = [float(x) / tau[i] for x in z[i]]
        top = max(scaled)
        lse = top + math.log(math.fsum(math.exp(x - top) for x in scaled))
        log_p = [x - lse for x in scaled]
        p = [math.exp(x) for x in log_p]
        logprobs[i] = log_p[target]
        entropy[i] = -math.fsum(a * b for a, b in zip(p, log_p) if a > 0)
        for j in range(vocabulary):
            of_logprob = g[i] * ((1.0 if j == target else 0.0) - p[j])
            of_entropy = -h[i] * p[j] * (log_p[j] + entropy[i]) if p[j] > 0 else 0.0
            gradient[i, j] = (of_logprob + of_entropy) / tau[i]
    return logprobs, entropy, gradient


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
    bootstrap_values: Tensor | None = None,
    value_lam: float | Tensor | None = None,
    masked: str = "skip",
) -> tuple[np.ndarray, np.ndarray]:
    """A_t as the sum over k of (γλ)^k δ_{t+k}, not as a recursion."""
    r, v, m = array(rewards), array(values), mask.bool().cpu().numpy()
    advantages, returns = np.zeros(r.shape), np.zeros(r.shape)
    value_lam = lam if value_lam is None else value_lam
    for b in range(r.shape[0]):
        discount, decay, slow = (
            float(x[b]) if isinstance(x, Tensor) else x for x in (gamma, lam, value_lam)
        )
        valid = np.flatnonzero(m[b])
        places = valid
        if masked == "decay" and valid.size:
            places = np.arange(valid[0], valid[-1] + 1)
        rewards_at = [r[b, t] if m[b, t] else 0.0 for t in places]
        values_at = [v[b, t] if m[b, t] else 0.0 for t in places]
        last = 0.0 if bootstrap_values is None else float(bootstrap_values[b])
        following = [*values_at[1:], last]
        deltas = np.array(
            [x + discount * n - y for x, n, y in zip(rewards_at, following, values_at)]
        )
        powers = [(discount * x) ** np.arange(len(deltas)) for x in (decay, slow)]
        for i, t in enumerate(places):
            if not m[b, t]:
                continue
            sums = [float(power[: len(deltas) - i] @ deltas[i:]) for power in powers]
            advantages[b, t], returns[b, t] = sums[0], sums[1] + v[b, t]
    return advantages, returns


def ppo_weights(mask: np.ndarray, aggregation: str, normalizer: float | None) -> np.ndarray:
    lengths = mask.sum(axis=1)
    if normalizer is None:
        normalizer = float(mask.sum() if aggregation == "token-mean" else (lengths > 0).sum())
    weights = np.zeros(mask.shape)
    for b, t in zip(*np.nonzero(mask)):
        length = lengths[b] if aggregation == "seq-mean-token-mean" else 1.0
        weights[b, t] = 1.0 / (length * normalizer)
    return weights


def ppo_loss(
    inputs: dict[str, Tensor | None],
    mask: Tensor,
    config: PPOLossConfig,
    normalizer: float | None = None,
) -> SimpleNamespace:
    """loss, stats (dict), grads (dict of [B, T]) and scale: the sum of the terms' magnitudes."""
    x = {name: None if tensor is None else array(tensor) for name, tensor in inputs.items()}
    x = {"ref_logprobs": None, "importance_weights": None} | x
    m = mask.bool().cpu().numpy()
    weights = ppo_weights(m, config.aggregation, normalizer)
    grads = {name: np.zeros(m.shape) for name in ("logprobs", "values", "entropy")}
    policy, value, bonus, divergence = [], [], [], []
    records: dict[str, list[float]] = {
        name: []
        for name in (
            "entropy",
            "approx_kl_k1",
            "approx_kl_k3",
            "clip_fraction",
            "value_clip_fraction",
            "dual_clip_fraction",
            "ratio",
            "ref_kl",
        )
    }
    for b, t in zip(*np.nonzero(m)):
        w = weights[b, t]
        at = {name: None if v is None else float(v[b, t]) for name, v in x.items()}
        term, slope, clipped, dual, log_ratio = _policy(at, config)
        importance = 1.0 if at["importance_weights"] is None else at["importance_weights"]
        policy.append(w * importance * term)
        grads["logprobs"][b, t] = w * importance * slope
        records["clip_fraction"].append(clipped)
        records["dual_clip_fraction"].append(dual)
        records["approx_kl_k1"].append(-log_ratio)
        records["approx_kl_k3"].append(math.exp(log_ratio) - 1 - log_ratio)
        records["ratio"].append(math.exp(log_ratio))
        if at["values"] is not None:
            term, slope, clipped = _value(at, config)
            value.append(w * term)
            grads["values"][b, t] = config.value_coef * w * slope
            records["value_clip_fraction"].append(clipped)
        if at["entropy"] is not None:
            bonus.append(w * at["entropy"])
            grads["entropy"][b, t] = -config.entropy_coef * w
            records["entropy"].append(at["entropy"])
        if at["ref_logprobs"] is not None:
            kl, slope = _kl(at["logprobs"] - at["ref_logprobs"], config.kl_loss_estimator)
            divergence.append(w * kl)
            grads["logprobs"][b, t] += config.kl_loss_coef * w * slope
            records["ref_kl"].append(kl)
    stats = {name: _mean(record) for name, record in records.items() if name != "ratio"}
    stats["ratio_mean"] = _mean(records["ratio"])
    stats["ratio_max"] = max(records["ratio"], default=0.0)
    stats["policy_loss"], stats["value_loss"] = math.fsum(policy), math.fsum(value)
    stats["explained_variance"] = _explained_variance(x, m)
    parts = [
        *policy,
        *(config.value_coef * term for term in value),
        *(-config.entropy_coef * term for term in bonus),
        *(config.kl_loss_coef * term for term in divergence),
    ]
    return SimpleNamespace(
        loss=math.fsum(parts),
        stats=stats,
        grads=grads,
        scale=math.fsum(abs(part) for part in parts),
    )


def _policy(at: dict[str, Any], config: PPOLossConfig) -> tuple[float, float, float, float, float]:
    high = config.clip_range if config.clip_range_high is None else config.clip_range_high
    log_ratio = at["logprobs"] - at["old_logprobs"]
    ratio, advantage = math.exp(log_ratio), at["advantages"]
    free = ratio * advantage
    bounded = min(max(ratio, 1 - config.clip_range), 1 + high) * advantage
    clipped = bounded < free
    term, slope = (-bounded, 0.0) if clipped else (-free, -free)
    dual = False
    if config.dual_clip is not None and advantage < 0 and -config.dual_clip * advantage < term:
        term, slope, dual = -config.dual_clip * advantage, 0.0, True
    return term, slope, float(clipped), float(dual), log_ratio


def _kl(r: float, estimator: str) -> tuple[float, float]:
    if estimator == "k1":
        return r, 1.0
    return (r * r / 2, r) if estimator == "k2" else (math.expm1(-r) + r, -math.expm1(-r))


def _value(at: dict[str, Any], config: PPOLossConfig) -> tuple[float, float, float]:
    error = at["values"] - at["returns"]
    limit = config.value_clip_range
    if limit is None or abs(at["values"] - at["old_values"]) <= limit:
        return 0.5 * error**2, error, 0.0
    step = limit if at["values"] > at["old_values"] else -limit
    bounded = at["old_values"] + step - at["returns"]
    if bounded**2 > error**2:
        return 0.5 * bounded**2, 0.0, 1.0
    return 0.5 * error**2, error, 0.0


def _explained_variance(x: dict[str, np.ndarray | None], mask: np.ndarray) -> float:
    values, returns = x["values"], x["returns"]
    if values is None or returns is None or not mask.any():
        return 0.0
    total = float(np.var(returns[mask]))
    return 1.0 - float(np.var(returns[mask] - values[mask])) / total if total > 0 else 0.0


def _mean(record: list[float]) -> float:
    return math.fsum(record) / len(record) if record else 0.0


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> np.ndarray:
    s, k, m = array(scores), array(kl), mask.bool().cpu().numpy()
    rewards = np.zeros(k.shape)
    for b in range(k.shape[0]):
        places = np.flatnonzero(m[b])
        for t in places:
            rewards[b, t] = -kl_coef * k[b, t] + (s[b] if t == places[-1] else 0.0)
    return rewards


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> np.ndarray:
    v, m = array(x), mask.bool().cpu().numpy()
    result = np.zeros(v.shape)
    if m.any():
        mean, variance = np.mean(v[m]), np.var(v[m])
        result[m] = (v[m] - mean) / np.sqrt(variance + eps) + (0.0 if shift_mean else mean)
    return result
