"""Checks of what a tensor holds, as operators: a tracer has nothing to look at, its graph will.

A wrong `cu_seqlens` would have a kernel read and write beyond its tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.ops import define


def _in_order(cu_seqlens: Tensor, length: int, name: str) -> Tensor:
    checks.in_order(name, length, cu_seqlens)
    return cu_seqlens


def _in_unit_interval(value: Tensor, name: str) -> Tensor:
    checks.in_unit_interval(name, value)
    return value


# An operator returns no input of its own.
def _cu_seqlens(cu_seqlens: Tensor, length: int, name: str) -> Tensor:
    return _in_order(cu_seqlens, length, name).clone()


def _rate(value: Tensor, name: str) -> Tensor:
    return _in_unit_interval(value, name).clone()


def _fake(tensor: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(tensor)


checked_cu_seqlens = define("checked_cu_seqlens", _cu_seqlens, _fake, eager=_in_order)
checked_rate = define("checked_rate", _rate, _fake, eager=_in_unit_interval)
