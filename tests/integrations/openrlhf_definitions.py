"""What OpenRLHF's functions mean, token by token.

Everything is float64; a scalar is a 0-dim tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def clip(x: Tensor, low: float, high: float) -> Tensor:
    return x.clamp(low, high)


def valid(x: Tensor, mask: Tensor | None) -> list[list[Tensor]]:
    """The entries of each row where the mask is not 0."""
    flags = torch.ones(x.shape) if mask is None else mask
    return [[e for e, m in zip(row, kept) if m != 0] for row, kept in zip(x, flags)]


def mean(numbers: list[Tensor]) -> Tensor:
    return torch.stack(numbers).mean() if numbers else torch.tensor(math.nan, dtype=torch.float64)


def aggregated(
    terms: Tensor,
    mask: Tensor | None,
    token_level: bool,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
) -> Tensor:
    rows = [row for row in valid(terms, mask) if row]
    if token_level:
        summands, whole = [entry for row in rows for entry in row], batch_num_tokens
    else:
        summands, whole = [mean(row) for row in rows], global_batch_size
    if whole is None:
        return mean(summands)
    return sum(summands, torch.zeros((), dtype=torch.float64)) * dp_size / float(whole)


def per_token(function: Callable[..., Tensor], *series: Tensor) -> Tensor:
    rows = [torch.stack([function(*each) for each in zip(*row)]) for row in zip(*series)]
    return torch.stack(rows)


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    rows = logits.reshape(-1, logits.shape[-1]) / temperature
    found = [
        row[label] - row.max() - (row - row.max()).exp().sum().log()
        for row, label in zip(rows, labels.reshape(-1))
    ]
    return torch.stack(found).view(labels.shape)


def compute_entropy(logits: Tensor) -> Tensor:
    rows = logits.reshape(-1, logits.shape[-1])
    found = []
    for row in rows:
        p = (row - row.max()).exp() / (row - row.max()).exp().sum()
        found.append(-(p * p.log()).sum())
    return torch.stack(found).view(logits.shape[:-1])


def compute_approx_kl(
    new: Tensor,
    base: Tensor,
    old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    estimates: dict[str, Callable[[Tensor], Tensor]] = {
        "k1": lambda r: r,
        "k2": lambda r: r * r / 2,
        "k3": lambda r: torch.expm1(-r) + r if r > -10 else r * 0 + 10,
    }
    value = per_token(lambda n, b: clip(estimates[kl_estimator](n - b), -10, 10), new, base)
    if not unbiased_gradient:
        return value
    weights = torch.ones_like(new) if old is None else (new - old).exp().clamp(max=10)
    slope = weights.detach() * (new - base).square() / 2
    return value.detach() + slope - slope.detach()


def policy_loss(
    settings: dict[str, Any],
    new: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    rollout: Tensor | None = None,
    **whole: Any,
) -> tuple[Tensor | None, ...]:
    options = {"clip_eps_low": 0.2, "clip_eps_high": 0.2, "dual_clip": None, **settings}
    level = options.get("is_correction_level", "off")
    gspo = options.get("policy_loss_type") == "gspo"
    if gspo:
        behind = old if level == "off" else rollout
        means = [mean(row) if row else new.new_zeros(()) for row in valid(new - behind, mask)]
        ratios = torch.stack(means).exp()[:, None].expand_as(new)
    else:
        ratios = clip(new - old, -20, 20).exp()

    def clipped_ratio(ratio: Tensor) -> Tensor:
        return clip(ratio, 1 - options["clip_eps_low"], 1 + options["clip_eps_high"])

    def term(ratio: Tensor, advantage: Tensor) -> Tensor:
        loss = -min(ratio * advantage, clipped_ratio(ratio) * advantage)
        if options["dual_clip"] is not None and advantage < 0:
            # Unlike min(), which may leave only numbers, it has a gradient in any case.
            loss = torch.minimum(loss, -options["dual_clip"] * advantage)
        return loss

    terms = per_token(term, ratios, advantages)
    worse = per_token(lambda r, a: (clipped_ratio(r) * a < r * a).double(), ratios, advantages)
    kl = filtered = None
    if level != "off" and not gspo:
        weights, outside = correction(options, old, rollout, mask)
        terms = weights * terms
        filtered = outside.mean() if level == "seq" else aggregated(outside, mask, True)
        kl = aggregated(rollout - old, mask, True)
    token_level = options.get("token_level_loss", True) and not gspo
    return (
        aggregated(terms, mask, token_level, **whole),
        aggregated(worse, mask, True),
        aggregated(old - new, mask, True).detach(),
        kl,
        filtered,
    )


def gates(
    options: dict[str, Any], old: Tensor, rollout: Tensor, mask: Tensor | None
) -> list[list[Tensor]]:
    """What is compared with the threshold, per token, or one a row; NaN for an empty row."""
    gating = options.get("is_correction_gating", "ratio")

    def gate(o: Tensor, r: Tensor) -> Tensor:
        if gating == "ratio":
            return o - r
        p, q = (clip(each.exp(), 1e-6, 1 - 1e-6) for each in (r, o))
        if gating == "tv":
            return abs(p - q)
        return sum(a * (a.log() - b.log()) for a, b in ((p, q), (1 - p, 1 - q)))

    found = per_token(gate, old, rollout)
    rows = list(found) if options["is_correction_level"] == "token" else None
    if rows is None:
        rows = [mean(row).expand(1) for row in valid(found, mask)]
    return [[each.exp() if gating == "ratio" else each for each in row] for row in rows]


def correction(
    options: dict[str, Any], old: Tensor, rollout: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    low, high = options.get("is_correction_threshold", (0.5, 5.0))
    found = torch.stack([torch.stack(row) for row in gates(options, old, rollout, mask)])
    outside = ~((low <= found) & (found <= high))
    if options.get("is_correction_mode") == "clip":
        return found.clamp(low, high), outside.double()
    return (old - rollout).exp().where(~outside, 0.0), outside.double()


def value_loss(
    settings: dict[str, Any],
    values: Tensor,
    old: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    **whole: Any,
) -> Tensor:
    eps = settings.get("clip_eps")

    def term(value: Tensor, before: Tensor, target: Tensor) -> Tensor:
        error = (value - target).square()
        if eps is None:
            return error / 2
        return max(error, (before + clip(value - before, -eps, eps) - target).square()) / 2

    terms = per_token(term, values, old, returns)
    return aggregated(terms, mask, settings.get("token_level_loss", True), **whole)


def get_advantages_and_returns(
    self: Any, values: Tensor, rewards: Tensor, mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """A_t = Σ_k (γλ)^k δ_{t+k} over every place; masked ones have no reward and no value."""
    kept = torch.ones_like(values) if mask is None else mask != 0
    rewards, values = rewards.where(kept != 0, 0.0), values.where(kept != 0, 0.0)
    length = values.shape[1]
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * following - values
    advantages = torch.stack(
        [
            sum((gamma * lambd) ** (k - t) * deltas[:, k] for k in range(t, length))
            for t in range(length)
        ],
        dim=1,
    )
    return advantages, advantages + values


DEFINITIONS = SimpleNamespace(
    log_probs_from_logits=log_probs_from_logits,
    compute_entropy=compute_entropy,
    compute_approx_kl=compute_approx_kl,
    PolicyLoss=lambda **settings: functools.partial(policy_loss, settings),
    ValueLoss=lambda **settings: functools.partial(value_loss, settings),
    get_advantages_and_returns=get_advantages_and_returns,
)
