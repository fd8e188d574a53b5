"""GAE as verl's trainer takes it: carried over masked places, then whitened; without a gradient.

The cpu backend has it in one kernel, since there the passes over memory cost more than the sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import backends, checks
from rlhf_kernels.ops.gae import gae
from rlhf_kernels.ops.whiten import moments, whiten


def whitened_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, eps: float
) -> tuple[Tensor, Tensor, int]:
    """Advantages and returns [B, T] of the computing dtype, and the number of valid places.

    A masked place has the advantage of the next valid one, or 0 behind the last, and that plus the
    value as return. Then all advantages are whitened by mean and variance (over n - 1) of the valid
    ones; with fewer than two they are no numbers to be used.

    Args:
        rewards, values: [B, T], of one dtype, float32 or float64.
        mask: [B, T], of any dtype; 0 is masked.
        gamma, lam: numbers in [0, 1].
        eps: added to the variance.
    """
    checks.dimensions("token_level_rewards", rewards, 2, "[B, T]")
    checks.like("token_level_rewards", rewards, values=values, response_mask=mask)
    checks.unit_interval("gamma", gamma)
    checks.unit_interval("lam", lam)
    chosen = backends.choose("gae_forward", rewards, None)
    if "whitened_gae" in chosen.PRIMITIVES:
        advantages, returns, total = chosen.whitened_gae(rewards, values, mask, gamma, lam, eps)
        return advantages, returns, int(total[0])
    return _composed(rewards, values, mask.bool(), gamma, lam, eps)


def _composed(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, eps: float
) -> tuple[Tensor, Tensor, int]:
    advantages, _ = gae(rewards, values, mask, None, None, gamma, lam, lam, "skip", None, None)
    total = moments(advantages, mask, None)
    # Both in one transfer, since the host must wait for the count as well.
    count, holes = torch.stack([total[0], _rises(mask).to(total.dtype)]).tolist()
    if holes:
        advantages = _from_the_next_valid(advantages, mask)
    returns = advantages + values
    return whiten_everywhere(advantages, total, True, eps), returns, int(count)


def whiten_everywhere(x: Tensor, total: Tensor, shift_mean: bool, eps: float) -> Tensor:
    """By the moments of the valid places; their number less 1 is Bessel's correction."""
    total = total - total.new_tensor([1.0, 0.0, 0.0])
    everywhere = torch.ones(x.shape[-1:], dtype=torch.bool, device=x.device).expand(x.shape)
    return whiten(x, everywhere, total, shift_mean, eps, None)


def _rises(mask: Tensor) -> Tensor:
    """Whether a valid token follows a masked one in a row [B, T]: 0 or 1, 0-dim."""
    return (mask[:, 1:] & ~mask[:, :-1]).any()


def _from_the_next_valid(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, T] with each masked place holding what the next valid one does; 0 behind the last."""
    length = mask.shape[1]
    places = torch.arange(length, dtype=torch.int64, device=mask.device)
    own = torch.where(mask, places, length)
    following = own.flip(1).cummin(dim=1).values.flip(1)
    padded = torch.cat([x, x.new_zeros(x.shape[0], 1)], dim=1)
    return padded.gather(1, following)
