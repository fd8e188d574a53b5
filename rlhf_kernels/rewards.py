"""KL penalties and the rewards that they shape."""

from __future__ import annotations

from torch import Tensor

from rlhf_kernels import backends, checks
from rlhf_kernels.ppo_types import KL_ESTIMATORS


def kl_penalty(
    logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k1", backend: str | None = None
) -> Tensor:
    """An estimate of KL(policy || reference) per token (Schulman, "Approximating KL", 2020).

    With r = logprobs - ref_logprobs: "k1" is r, "k2" r²/2, "k3" exp(-r) - 1 + r, "abs" |r|.

    Args:
        logprobs, ref_logprobs: the same shape, floating-point.
        estimator: one of the four above.
        backend: see `rlhf_kernels.backends`.

    Returns:
        A tensor of the inputs' shape, float32 (float64 where an input is), differentiable.

    Raises:
        ValueError, TypeError: an unknown estimator; shapes, dtypes or devices that do not fit.
    """
    checks.one_of("estimator", estimator, KL_ESTIMATORS)
    checks.floating(logprobs=logprobs, ref_logprobs=ref_logprobs)
    checks.like("logprobs", logprobs, ref_logprobs=ref_logprobs)
    dtype = checks.compute_dtype(logprobs, ref_logprobs)
    chosen = backends.choose_composed("kl_penalty", logprobs, backend)
    return chosen.kl_penalty(logprobs.to(dtype), ref_logprobs.to(dtype), estimator)


def shaped_rewards(
    scores: Tensor,
    kl: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rewards per token: -kl_coef · kl, plus the score at the row's last valid token.

    Args:
        scores: [B], one score a sequence, floating-point.
        kl: [B, T], floating-point; [N] with cu_seqlens.
        mask: the shape of kl, bool (or integers, 0 is masked): the valid tokens.
        kl_coef: the weight of the penalty.
        cu_seqlens: [B + 1], integers: sequences without padding, as in `gae`.
        backend: see `rlhf_kernels.backends`.

    Returns:
        rewards of kl's shape, float32 (float64 where an input is), 0 at masked positions,
        differentiable. A row without valid tokens gets no reward.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    checks.floating(scores=scores, kl=kl)
    cu_seqlens, sequences = checks.sequences("kl", kl, cu_seqlens)
    checks.shape("scores", scores, (sequences,), "one score a sequence")
    checks.like("kl", kl, mask=mask)
    checks.same_device("kl", kl, scores=scores)
    dtype = checks.compute_dtype(scores, kl)
    chosen = backends.choose_composed("shaped_rewards", kl, backend)
    kl_coef = checks.finite("kl_coef", kl_coef)
    return chosen.shaped_rewards(
        scores.to(dtype), kl.to(dtype), checks.as_mask(mask), kl_coef, cu_seqlens
    )
