"""`rlhf_kernels::moments` and `rlhf_kernels::whiten`; ranks add up their moments in between."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels import backends
from rlhf_kernels.ops import define


def _moments(x: Tensor, mask: Tensor, backend: str | None) -> Tensor:
    return backends.choose("moments", x, backend).moments(x, mask)


def _moments_fake(x: Tensor, mask: Tensor, backend: str | None) -> Tensor:
    return x.new_empty(3, dtype=torch.float64)


def _whiten(
    x: Tensor, mask: Tensor, total: Tensor, shift_mean: bool, eps: float, backend: str | None
) -> Tensor:
    return backends.choose("whiten", x, backend).whiten(x, mask, total, shift_mean, eps)


def _whiten_fake(
    x: Tensor, mask: Tensor, total: Tensor, shift_mean: bool, eps: float, backend: str | None
) -> Tensor:
    return x.new_empty(x.shape)


moments = define("moments", _moments, _moments_fake)
whiten = define("whiten", _whiten, _whiten_fake)
