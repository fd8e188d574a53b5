"""Causal attention of one row in float64, with its gradients and a bound of float32's errors."""

from __future__ import annotations

import math

import torch
from kernel_cases import EPS
from torch import Tensor

UNDERFLOW = 1e-30  # a probability below the smallest normal float is 0


def rounding(terms: int) -> float:
    """Relative to the sum of the terms' sizes: a running sum rounds once a term, about the root of
    their number in effect; and a few more."""
    return EPS * (math.sqrt(terms) + 4)


def row(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float) -> list[tuple[Tensor, Tensor]]:
    """Output and gradients of q, k, v, each with its bound, for [tokens, heads, size] and upstream
    gradient g."""
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    q, k, v, g = (x.double().transpose(0, 1) for x in (q, k, v, g))
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    tokens, size = q.shape[1:]
    scores, later = scale * q @ k.mT, torch.ones(tokens, tokens).triu(1).bool()
    sums = scores.masked_fill(later, -math.inf).logsumexp(-1, keepdim=True)
    p = (scores - sums).exp().masked_fill(later, 0.0)
    out, products = p @ v, g @ v.mT
    dots = (g * out).sum(-1, keepdim=True)
    slopes = p * (products - dots)

    # A probability's relative error: its score's, the log-sum-exp's, the exponential's.
    score_error = rounding(size) * abs(scale) * (q.abs() @ k.abs().mT)
    relative = score_error + (p * score_error).sum(-1, keepdim=True) + rounding(tokens)
    relative = relative + 2 * EPS * (scores.abs() + sums.abs())
    p_error = p * relative + UNDERFLOW
    out_error = p_error @ v.abs() + rounding(tokens) * (p @ v.abs())
    products_error = rounding(size) * (g.abs() @ v.abs().mT)
    dots_error = (g.abs() * (out_error + rounding(size) * out.abs())).sum(-1, keepdim=True)
    slope_error = p_error * (products - dots).abs() + p * (products_error + dots_error)
    slope_error = slope_error + 2 * EPS * p * (products.abs() + dots.abs())

    def from_keys(weights: Tensor, error: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        bound = error @ x.abs() + rounding(tokens) * (weights.abs() @ x.abs())
        return (weights @ x).transpose(0, 1), bound.transpose(0, 1)

    def from_queries(weights: Tensor, error: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        sizes = weights.abs().mT @ x.abs()
        bound = error.mT @ x.abs() + rounding(group * tokens) * sizes
        return summed(weights.mT @ x), summed(bound)

    def summed(x: Tensor) -> Tensor:
        return x.unflatten(0, (kv_heads, group)).sum(1).transpose(0, 1)

    return [
        (out.transpose(0, 1), out_error.transpose(0, 1)),
        from_keys(scale * slopes, abs(scale) * slope_error, k),
        from_queries(scale * slopes, abs(scale) * slope_error, q),
        from_queries(p, p_error, g),
    ]


def rows(
    inputs: list[Tensor], upstream: Tensor, lengths: list[int], scale: float
) -> list[tuple[Tensor, Tensor]]:
    """The same for rows one behind the other."""
    of_rows = zip(*(x.detach().cpu().split(lengths) for x in (*inputs, upstream)))
    results = zip(*(row(*tensors, scale) for tensors in of_rows))
    return [
        (torch.cat([x for x, _ in r]), torch.cat([y for _, y in r])) for r in map(list, results)
    ]
