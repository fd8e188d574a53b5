"""Generalized advantage estimation, and all that follows a rollout in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.backends import reference
from rlhf_kernels.ops.gae import gae as _gae
from rlhf_kernels.rewards import KL_ESTIMATORS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RolloutAdvantages(NamedTuple):
    """What `rollout_advantages` computes, [B, T] each, 0 at masked positions, without gradient."""

    advantages: Tensor
    returns: Tensor
    rewards: Tensor
    kl: Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_values: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, arXiv 1506.02438).

    Args:
        rewards, values: [B, T], floating-point.
        mask: [B, T], bool (or integers, 0 is masked). Masked positions may stand anywhere and are
            stepped over: the next token is the next valid one.
        gamma, lam: the discount and the decay, in [0, 1].
        bootstrap_values: [B], the value after the last valid token; None: 0, the episode is over.
        backend: see `rlhf_kernels.backends`.

    Returns:
        (advantages, returns), [B, T], float32 (float64 where an input is), 0 at masked positions;
        returns = advantages + values. They carry no gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit.
        BackendUnavailableError, UnsupportedOperationError: a backend named that cannot do it.
    """
    checks.floating(rewards=rewards, values=values, bootstrap_values=bootstrap_values)
    checks.dimensions("rewards", rewards, 2, "[B, T]")
    checks.like("rewards", rewards, values=values, mask=mask)
    checks.unit_interval("gamma", gamma)
    checks.unit_interval("lam", lam)
    if bootstrap_values is not None:
        checks.shape("bootstrap_values", bootstrap_values, rewards.shape[:1], "one a sequence")
        checks.same_device("rewards", rewards, bootstrap_values=bootstrap_values)
    dtype = checks.compute_dtype(rewards, values, bootstrap_values)
    return _gae(
        rewards.detach().to(dtype),
        values.detach().to(dtype),
        checks.as_mask(mask),
        float(gamma),
        float(lam),
        None if bootstrap_values is None else bootstrap_values.detach().to(dtype),
        backend,
    )


@torch.no_grad()
def rollout_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_values: Tensor | None = None,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> RolloutAdvantages:
    """KL penalty, shaped rewards, GAE and whitening of one rollout.

    Args:
        scores: [B], one score a sequence.
        logprobs, ref_logprobs, values: [B, T], floating-point.
        mask: [B, T], bool (or integers, 0 is masked): the valid tokens.
        kl_coef, kl_estimator: as in `shaped_rewards` and `kl_penalty`.
        gamma, lam, bootstrap_values: as in `gae`.
        whiten_rewards: scale the rewards to variance 1 before GAE, leaving their mean.
        whiten_advantages: scale and shift the advantages to variance 1 and mean 0.
        group: whiten over all ranks of this process group, as in `masked_whiten`.
        backend: runs the primitive underneath, `gae`; the rest is elementwise PyTorch.

    Returns:
        advantages; returns (before the whitening of advantages); rewards (before whitening); kl.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit.
        BackendUnavailableError, UnsupportedOperationError: a backend named that cannot do it.
    """
    checks.one_of("kl_estimator", kl_estimator, KL_ESTIMATORS)
    checks.floating(scores=scores, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values)
    checks.dimensions("logprobs", logprobs, 2, "[B, T]")
    checks.shape("scores", scores, logprobs.shape[:1], "one score a sequence")
    checks.like("logprobs", logprobs, ref_logprobs=ref_logprobs, values=values, mask=mask)
    checks.same_device("logprobs", logprobs, scores=scores)
    dtype = checks.compute_dtype(scores, logprobs, ref_logprobs, values, bootstrap_values)
    mask = checks.as_mask(mask)
    kl = reference.kl_penalty(logprobs.to(dtype), ref_logprobs.to(dtype), kl_estimator)
    kl = torch.where(mask, kl, 0.0)
    kl_coef = checks.finite("kl_coef", kl_coef)
    rewards = reference.shaped_rewards(scores.to(dtype), kl, mask, kl_coef)
    used = rewards
    if whiten_rewards:
        used = reference.masked_whiten(rewards, mask, False, 1e-8, group)
    advantages, returns = gae(
        used,
        values,
        mask,
        gamma=gamma,
        lam=lam,
        bootstrap_values=bootstrap_values,
        backend=backend,
    )
    if whiten_advantages:
        advantages = reference.masked_whiten(advantages, mask, True, 1e-8, group)
    return RolloutAdvantages(advantages, returns, rewards, kl)
