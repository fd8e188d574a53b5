"""How tensors and settings are passed to the compiled modules: as addresses, sizes and strides.

What makes a tensor fit may copy it; hold on to the result until the kernel was called.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_kernels.ppo_types import AGGREGATIONS, KL_ESTIMATORS, GAEConfig, PPOLossConfig

ABSENT = (0, 0)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def vector(x: Tensor) -> Tensor:
    """Float32 without gaps."""
    return (x if x.dtype == torch.float32 else x.float()).contiguous()


def float_rows(x: Tensor) -> Tensor:
    """Float32 with columns side by side; any row stride."""
    return unit_columns(x if x.dtype == torch.float32 else x.float())


def unit_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """[..., N], not empty, without gaps or as a matrix with columns side by side."""
    return x if x.is_contiguous() else unit_columns(x.reshape(-1, x.shape[-1]))


def series(x: Tensor | None) -> tuple[int, int]:
    """Address and row stride."""
    return ABSENT if x is None else (x.data_ptr(), x.stride(0))


def sequences(like: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    """Their number, their length where it is one, or where they begin."""
    if cu_seqlens is None:
        return like.shape[0], like.shape[1], 0
    return cu_seqlens.numel() - 1, 0, cu_seqlens.data_ptr()


def gae_rates(config: GAEConfig, rates: Tensor | None) -> tuple[float, float, float, int]:
    return config.gamma, config.lam, config.value_lam, address(rates)


def clipping(config: PPOLossConfig) -> tuple[float, float, float, float]:
    """The ratio's bounds, the dual clip and the value's range; infinity where there is none."""
    high = config.clip_range if config.clip_range_high is None else config.clip_range_high
    dual_clip = math.inf if config.dual_clip is None else config.dual_clip
    value_range = math.inf if config.value_clip_range is None else config.value_clip_range
    return 1.0 - config.clip_range, 1.0 + high, dual_clip, value_range


def weighing(config: PPOLossConfig) -> tuple[float, float, float, int, int]:
    """How the parts of the PPO loss are weighed and added up."""
    return (
        config.value_coef,
        config.entropy_coef,
        config.kl_loss_coef,
        KL_ESTIMATORS.index(config.kl_loss_estimator),
        AGGREGATIONS.index(config.aggregation),
    )
