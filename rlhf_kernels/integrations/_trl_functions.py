"""TRL 1.12.0's functions on our kernels: see `rlhf_kernels.integrations.trl`."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import checks, statistics
from rlhf_kernels.integrations._deferred_logits import NEVER, DeferredLogits
from rlhf_kernels.integrations._trl_ppo import KeptLogprobs
from rlhf_kernels.logprobs import token_logprobs
from rlhf_kernels.ops.whiten import moments


def selective_log_softmax(logits: Tensor | DeferredLogits | KeptLogprobs, index: Tensor) -> Tensor:
    """The log-probabilities of chosen classes.

    Args:
        logits: [..., V], floating-point; or what `forward` and `batch_generation` of this module
            give in their place.
        index: [...], or [..., K] for K classes of each row; integers in [0, V).

    Returns:
        index's shape, in the logits' dtype, differentiable. Sums are taken in float32 or wider.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or classes that do not fit.
    """
    if isinstance(logits, KeptLogprobs) or (
        isinstance(logits, DeferredLogits) and index.dim() < len(logits.shape)
    ):
        return logits.token_logprobs(index)
    if isinstance(logits, DeferredLogits):
        logits = logits.whole()
    if index.dim() < logits.dim():
        return token_logprobs(logits, index, ignore_index=NEVER).to(logits.dtype)
    # All K of a row lie as far from their logits as the likeliest class, which is always finite.
    highest = logits.detach().argmax(dim=-1)
    logsumexp = logits.gather(-1, highest[..., None])[..., 0] - token_logprobs(logits, highest)
    return (logits.gather(-1, index) - logsumexp[..., None]).to(logits.dtype)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """The entropy of each row's softmax, in nats.

    Args:
        logits: [..., V], floating-point. A logit of -inf adds 0, where TRL's result is NaN.
        chunk_size: TRL's rows at a time. The kernels need no chunks: it has no effect.

    Returns:
        [...], in the logits' dtype, differentiable. Sums are taken in float32 or wider.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    first = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    _, entropy = token_logprobs(logits, first, return_entropy=True)
    return entropy.to(logits.dtype)


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """The mean over valid places; NaN where there are none.

    Args:
        values: any shape, floating-point. What stands at masked places has no effect, where TRL's
            NaN and infinities there make the result NaN.
        mask: its shape, bool, or zeros and ones of any dtype.
        axis: the dimension to average over; None: all.

    Returns:
        The means, float32 (float64 for float64 values), differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    valid = _valid(mask)
    mean = statistics.masked_mean(values, valid, dim=axis)
    some = valid.any() if axis is None else valid.any(axis)
    return torch.where(some, mean, torch.nan)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """The variance over valid places, with Bessel's correction unless `unbiased` is False.

    Args:
        values, mask: as for `masked_mean`.

    Returns:
        The variance, 0-dim, float32 (float64 for float64 values), differentiable: NaN where one
        place is valid, which has none.

    Raises:
        ValueError: No place is valid, and the correction is asked for.
    """
    return _mean_and_var(values, mask, unbiased)[1]


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(values - mean) / √(var + 10⁻⁸), with the mean and corrected variance over valid places.

    Args:
        values, mask: as for `masked_mean`.
        shift_mean: False adds the mean again.

    Returns:
        values' shape, float32 (float64 for float64 values), differentiable; masked places are
        shifted and scaled like the others.

    Raises:
        ValueError: No place is valid.
    """
    mean, var = _mean_and_var(values, mask, unbiased=True)
    whitened = (values - mean) * torch.rsqrt(var + 1e-8)
    return whitened if shift_mean else whitened + mean


def _mean_and_var(values: Tensor, mask: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    valid = _valid(mask)
    if unbiased and not valid.any():
        raise ValueError(
            "no place of the mask is valid, so there is no variance; is the mini-batch too small?"
        )
    if values.requires_grad and torch.is_grad_enabled():
        mean = masked_mean(values, valid)
        var = masked_mean((values - mean).square(), valid)
        count = valid.sum()
        return mean, var * (count / (count - 1)) if unbiased else var
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    checks.like("values", wide, mask=valid)
    count, mean, squares = moments(wide, valid, None).unbind()
    var = squares / (count - 1 if unbiased else count)
    return mean.to(wide.dtype), var.to(wide.dtype)


def _valid(mask: Tensor) -> Tensor:
    """Also of floating-point numbers, by which TRL multiplies."""
    return mask if mask.dtype == torch.bool else mask != 0
