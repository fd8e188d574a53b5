"""Means and whitening over the valid places of a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.backends import reference
from rlhf_kernels.ops.whiten import moments, whiten

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def masked_mean(x: Tensor, mask: Tensor, *, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """The mean over valid places, of all of x or along `dim`; 0 where there are none.

    Args:
        x: any shape, floating-point. mask: its shape, bool (or integers, 0 is masked).
        dim: what to average over, as in `torch.sum`; None: everything.

    Returns:
        The means, float32 (float64 for float64 inputs), differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    checks.floating(x=x)
    checks.like("x", x, mask=mask)
    return reference.masked_mean(x.to(checks.compute_dtype(x)), checks.as_mask(mask), dim)


def masked_whiten(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """(x - mean)/sqrt(var + eps), statistics over valid places, population variance.

    Args:
        x: any shape, floating-point. mask: its shape, bool (or integers, 0 is masked).
        shift_mean: False adds the mean again: the scale changes, the mean stays.
        eps: added to the variance, above 0.
        group: take the statistics over all ranks of this process group: counts, means
            and deviations are gathered, so every rank must call, whatever it holds.
        backend: see `rlhf_kernels.backends`.

    Returns:
        A tensor of x's shape, float32 (float64 for float64 inputs), 0 at masked places and
        without valid ones. It carries no gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, or an eps not above 0.
    """
    checks.floating(x=x)
    checks.like("x", x, mask=mask)
    eps = checks.positive("eps", eps)
    wide, mask = x.detach().to(checks.compute_dtype(x)), checks.as_mask(mask)
    if x.dim() == 0:  # kernels take rows
        wide, mask = wide[None], mask[None]
    total = over_ranks(moments(wide, mask, backend), group)
    return whiten(wide, mask, total, shift_mean, eps, backend).view(x.shape)


def over_ranks(own: Tensor, group: ProcessGroup | None) -> Tensor:
    """The moments [3] of all ranks of `group` together, from those of each (Chan et al. 1979)."""
    if group is None:
        return own
    import torch.distributed as dist

    ranks = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(ranks, own, group=group)
    counts, means, squares = torch.stack(ranks).unbind(dim=1)
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1)
    between = counts * (means - mean).square()
    return torch.stack([count, mean, (squares + between).sum()])
