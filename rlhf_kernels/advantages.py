"""Generalized advantage estimation, and all that follows a rollout in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.backends.reference import mean_and_variance
from rlhf_kernels.ops.gae import gae as _gae
from rlhf_kernels.ops.rollout_advantages import rollout_advantages as _rollout
from rlhf_kernels.ops.whiten import moments, whiten
from rlhf_kernels.packing import valid_tokens
from rlhf_kernels.ppo_types import KL_ESTIMATORS, MASKED_STEPS, GAEConfig
from rlhf_kernels.statistics import over_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_EPS = 1e-8  # added to variances


class RolloutAdvantages(NamedTuple):
    """What `rollout_advantages` computes, without gradient.

    The first four have the shape of the log-probabilities and are 0 at masked positions. The last
    two are 0-dim: mean and standard deviation of the advantages before whitening, over the valid
    tokens of all ranks.
    """

    advantages: Tensor
    returns: Tensor
    rewards: Tensor
    kl: Tensor
    advantage_mean: Tensor
    advantage_std: Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    value_lam: float | Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    masked: str = "skip",
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, arXiv 1506.02438).

    Args:
        rewards, values: [B, T], floating-point; [N] with cu_seqlens.
        mask: their shape, bool (or integers, 0 is masked). Masked positions may stand anywhere.
        gamma, lam: the discount and the decay in [0, 1]; numbers, or tensors [B].
        value_lam: the decay of the returns' own advantages, for a critic that learns from longer
            sums than the policy (VAPO, arXiv 2504.05118); None: lam.
        bootstrap_values: [B], the value after the last valid token; None: 0, the episode is over.
        masked: "skip": the next token is the next valid one. "decay": a masked token between valid
            ones is a step of its own, whose reward and value are 0.
        cu_seqlens: [B + 1], int32 or int64: sequences stand one behind the other, without padding,
            sequence b from cu_seqlens[b] to cu_seqlens[b + 1].
        backend: see `rlhf_kernels.backends`.

    Returns:
        (advantages, returns), of the rewards' shape, float32 (float64 where an input is), 0 at
        masked positions; returns = advantages + values. They carry no gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit.
        BackendUnavailableError, UnsupportedOperationError: a backend named that cannot do it.
    """
    checks.floating(rewards=rewards, values=values, bootstrap_values=bootstrap_values)
    cu_seqlens, sequences = checks.sequences("rewards", rewards, cu_seqlens)
    checks.like("rewards", rewards, values=values, mask=mask)
    dtype = checks.compute_dtype(rewards, values, bootstrap_values)
    bootstrap_values = _bootstrap(bootstrap_values, rewards, sequences, dtype)
    config, rates = _rates(gamma, lam, value_lam, masked, rewards, sequences, dtype)
    return _gae(
        rewards.detach().to(dtype),
        values.detach().to(dtype),
        checks.as_mask(mask),
        bootstrap_values,
        cu_seqlens,
        *config,
        rates,
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
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    value_lam: float | Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    masked: str = "skip",
    whiten_scores: bool = False,
    score_clip: float | None = None,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
    cu_seqlens: Tensor | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> RolloutAdvantages:
    """KL penalty, shaped rewards, GAE and whitening of one rollout.

    Args:
        scores: [B], one score a sequence.
        logprobs, ref_logprobs, values: [B, T], floating-point; [N] with cu_seqlens.
        mask: their shape, bool (or integers, 0 is masked): the valid tokens.
        kl_coef, kl_estimator: as in `shaped_rewards` and `kl_penalty`.
        gamma, lam, value_lam, bootstrap_values, masked, cu_seqlens: as in `gae`.
        whiten_scores: scale and shift the scores to variance 1 and mean 0 over the sequences that
            have a valid token.
        score_clip: bound the scores, whitened or not, to [-score_clip, score_clip].
        whiten_rewards: scale the rewards to variance 1 before GAE, leaving their mean.
        whiten_advantages: scale and shift the advantages to variance 1 and mean 0.
        group: whiten over all ranks of this process group, as in `masked_whiten`: every rank must
            call.
        backend: see `rlhf_kernels.backends`.

    Returns:
        advantages; returns (before the whitening of advantages); rewards (before whitening); kl;
        advantage_mean and advantage_std (before whitening).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit.
        BackendUnavailableError, UnsupportedOperationError: a backend named that cannot do it.
    """
    checks.one_of("kl_estimator", kl_estimator, KL_ESTIMATORS)
    checks.floating(scores=scores, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values)
    checks.floating(bootstrap_values=bootstrap_values)
    cu_seqlens, sequences = checks.sequences("logprobs", logprobs, cu_seqlens)
    checks.shape("scores", scores, (sequences,), "one score a sequence")
    checks.like("logprobs", logprobs, ref_logprobs=ref_logprobs, values=values, mask=mask)
    checks.same_device("logprobs", logprobs, scores=scores)
    kl_coef = checks.finite("kl_coef", kl_coef)
    dtype = checks.compute_dtype(scores, logprobs, ref_logprobs, values, bootstrap_values)
    bootstrap_values = _bootstrap(bootstrap_values, logprobs, sequences, dtype)
    config, rates = _rates(gamma, lam, value_lam, masked, logprobs, sequences, dtype)
    mask, values = checks.as_mask(mask), values.to(dtype)
    scores = scores.to(dtype)
    if whiten_scores:
        scores = _whitened_scores(scores, mask, cu_seqlens, group, backend)
    if score_clip is not None:
        bound = checks.positive("score_clip", score_clip)
        scores = scores.clamp(-bound, bound)
    advantages, returns, rewards, kl, total = _rollout(
        scores,
        logprobs.to(dtype),
        ref_logprobs.to(dtype),
        values,
        mask,
        bootstrap_values,
        cu_seqlens,
        kl_coef,
        kl_estimator,
        *config,
        rates,
        backend,
    )
    if whiten_rewards:
        of_rewards = over_ranks(moments(rewards, mask, backend), group)
        used = whiten(rewards, mask, of_rewards, False, _EPS, backend)
        series = (bootstrap_values, cu_seqlens)
        advantages, returns = _gae(used, values, mask, *series, *config, rates, backend)
        total = moments(advantages, mask, backend)
    total = over_ranks(total, group)
    mean, variance = mean_and_variance(total)
    if whiten_advantages:
        advantages = whiten(advantages, mask, total, True, _EPS, backend)
    statistics = mean.to(dtype), variance.sqrt().to(dtype)
    return RolloutAdvantages(advantages, returns, rewards, kl, *statistics)


def _rates(
    gamma: float | Tensor,
    lam: float | Tensor,
    value_lam: float | Tensor | None,
    masked: str,
    series: Tensor,
    sequences: int,
    dtype: torch.dtype,
) -> tuple[GAEConfig, Tensor | None]:
    """The numbers, and where one of them is a tensor, all three of each sequence [B, 3]."""
    checks.one_of("masked", masked, MASKED_STEPS)
    value_lam = lam if value_lam is None else value_lam
    given = {"gamma": gamma, "lam": lam, "value_lam": value_lam}
    numbers = []
    for name, value in given.items():
        if not isinstance(value, Tensor):
            checks.unit_interval(name, value)
            numbers.append(float(value))
            continue
        numbers.append(1.0)
        value = value.expand(sequences) if value.dim() == 0 else value
        given[name] = checks.rate(name, value, series, sequences).detach().to(dtype)
    config = GAEConfig(numbers[0], numbers[1], numbers[2], masked)
    if not any(isinstance(value, Tensor) for value in given.values()):
        return config, None
    columns = [
        value
        if isinstance(value, Tensor)
        else torch.full((sequences,), value, dtype=dtype, device=series.device)
        for value in given.values()
    ]
    return config, torch.stack(columns, dim=1)


def _bootstrap(
    bootstrap_values: Tensor | None, series: Tensor, sequences: int, dtype: torch.dtype
) -> Tensor | None:
    if bootstrap_values is None:
        return None
    checks.shape("bootstrap_values", bootstrap_values, (sequences,), "one a sequence")
    checks.same_device("the other tensors", series, bootstrap_values=bootstrap_values)
    return bootstrap_values.detach().to(dtype)


def _whitened_scores(
    scores: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    group: ProcessGroup | None,
    backend: str | None,
) -> Tensor:
    valid = valid_tokens(mask, cu_seqlens) > 0
    total = over_ranks(moments(scores, valid, backend), group)
    return whiten(scores, valid, total, True, _EPS, backend)
