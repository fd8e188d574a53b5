"""What backends share: the settings of GAE, the settings and statistics of the PPO loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from torch import Tensor

KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
KL_LOSS_ESTIMATORS = ("k1", "k2", "k3")
MASKED_STEPS = ("skip", "decay")
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")


class GAEConfig(NamedTuple):
    """Numbers of `gae`, checked; value_lam is lam where none was given."""

    gamma: float
    lam: float
    value_lam: float
    masked: str


@dataclass(frozen=True)
class PPOLossConfig:
    """How `ppo_loss` clips, weighs and adds up (Schulman et al. 2017, arXiv 1707.06347).

    clip_range: the ratio is clipped to [1 - clip_range, 1 + clip_range_high].
    clip_range_high: the upper side, where it differs; None takes clip_range.
    dual_clip: c > 1 bounds the loss of negative advantages at -c·A (arXiv 1912.09729); None: no.
    value_clip_range: how far the value may move from the old one; None: unclipped.
    value_coef, entropy_coef: the weights in loss = policy + value_coef·value - entropy_coef·H.
    aggregation: "token-mean" divides the sum over valid tokens by their number;
        "seq-mean-token-mean" takes each sequence's mean, "seq-mean-token-sum" its sum, and divides
        their sum by the number of sequences that have a valid token.
    kl_loss_coef: the weight of the KL divergence from the reference policy, where ref_logprobs are
        given; 0.001 is verl's.
    kl_loss_estimator: "k1", "k2" or "k3" (Schulman, "Approximating KL divergence", 2020), the last
        as in GRPO (arXiv 2402.03300). The mean gradient of k1 is 0 where the tokens were sampled
        from the policy; that of k2 is the KL divergence's own.
    """

    clip_range: float = 0.2
    clip_range_high: float | None = None
    dual_clip: float | None = None
    value_clip_range: float | None = 0.2
    value_coef: float = 0.5
    entropy_coef: float = 0.01
    aggregation: str = "token-mean"
    kl_loss_coef: float = 0.001
    kl_loss_estimator: str = "k3"

    def __post_init__(self) -> None:
        for name in ("clip_range", "clip_range_high", "value_clip_range"):
            value = getattr(self, name)
            if value is None and name != "clip_range":
                continue
            if not value > 0:
                raise ValueError(f"{name} is {value!r}; it must be positive")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip is {self.dual_clip!r}; it must be above 1, or None")
        for name in ("value_coef", "entropy_coef", "kl_loss_coef"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a finite number")
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(
                f"aggregation is {self.aggregation!r}; choose one of {', '.join(AGGREGATIONS)}"
            )
        if self.kl_loss_estimator not in KL_LOSS_ESTIMATORS:
            raise ValueError(
                f"kl_loss_estimator is {self.kl_loss_estimator!r}; "
                f"choose one of {', '.join(KL_LOSS_ESTIMATORS)}"
            )

    def arguments(self) -> tuple[Any, ...]:
        """The settings in their order, as an operator takes them."""
        return tuple(getattr(self, name) for name in _SETTINGS)


_SETTINGS = tuple(field.name for field in fields(PPOLossConfig))


class PPOLossStats(NamedTuple):
    """What `ppo_loss` saw, as detached 0-dim tensors on its device; 0 without valid tokens.

    policy_loss and value_loss are aggregated as the loss is (and so add up over micro-batches that
    share a normalizer); the others are means over the valid tokens of the call, except ratio_max.
    """

    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor
    approx_kl_k1: Tensor
    approx_kl_k3: Tensor
    clip_fraction: Tensor
    value_clip_fraction: Tensor
    dual_clip_fraction: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    explained_variance: Tensor
    ref_kl: Tensor


PPO_STATS: tuple[str, ...] = PPOLossStats._fields
NUM_STATS = len(PPO_STATS)
