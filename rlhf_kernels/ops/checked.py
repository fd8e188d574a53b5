"""Checks of a tensor's content inside compiled code, where a tracer has no content to look at.

A wrong `cu_seqlens` would have a kernel read and write beyond its tensors. Eager mode calls the
same checks directly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.ops import define


def _cu_seqlens(cu_seqlens: Tensor, length: int, name: str) -> Tensor:
    checks.in_order(name, length, cu_seqlens)
    return cu_seqlens.clone()  # an operator returns no input of its own


def _rate(value: Tensor, name: str) -> Tensor:
    checks.in_unit_interval(name, value)
    return value.clone()


def _fake(tensor: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(tensor)


checked_cu_seqlens = define("checked_cu_seqlens", _cu_seqlens, _fake)
checked_rate = define("checked_rate", _rate, _fake)
