"""What is allocated and launched around the kernels of `gae` and `rollout_advantages`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from rlhf_kernels.backends.triton import advantages as kernels
from rlhf_kernels.backends.triton import whitening
from rlhf_kernels.backends.triton.tensors import mask_bytes, processors, rows, vector
from rlhf_kernels.ppo_types import GAEConfig

# Places that a program's 128 threads take at once. It is the same for all sizes, since the order
# in which steps are combined, and so the bits, depend on it.
BLOCK = 1024
NUM_WARPS = 4
# With fewer blocks than this a sequence is walked through sooner than two kernels are launched.
LEAST_BLOCKS = 8


def is_divided(sequences: int, blocks: int, multiprocessors: int) -> bool:
    """Whether each block gets a program: few, long sequences fill a GPU too."""
    return blocks >= LEAST_BLOCKS and sequences <= 2 * multiprocessors


def gae_forward(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap_values: Tensor | None,
    cu_seqlens: Tensor | None,
    config: GAEConfig,
    rates: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, [B, T] or packed [N], 0 at masked places."""
    advantages, returns = (_like(values) for _ in range(2))
    rewards = rows(rewards)
    _launch(
        {"rewards": rewards, "rewards_stride": rewards.stride(0)},
        *(values, mask, bootstrap_values, cu_seqlens, config, rates),
        {"advantages": advantages, "returns": returns},
    )
    return advantages, returns


def rollout_forward(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    bootstrap_values: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    config: GAEConfig,
    rates: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Advantages, returns, rewards, KL, and the advantages' `moments`."""
    advantages, returns, rewards, kl = (_like(values) for _ in range(4))
    slots = _slots(values, cu_seqlens)
    moments = values.new_zeros(slots, kernels.MOMENTS.value, dtype=torch.float32)
    total = values.new_empty(3, dtype=torch.float64)
    logprobs, ref_logprobs = rows(logprobs), rows(ref_logprobs)
    _launch(
        {
            "logprobs": logprobs,
            "logprobs_stride": logprobs.stride(0),
            "ref_logprobs": ref_logprobs,
            "ref_stride": ref_logprobs.stride(0),
            "scores": vector(scores),
            "kl_coef": float(kl_coef),
            "ESTIMATOR": kl_estimator,
        },
        *(values, mask, bootstrap_values, cu_seqlens, config, rates),
        {
            "advantages": advantages,
            "returns": returns,
            "rewards": rewards,
            "kl": kl,
            "moments": moments,
        },
    )
    with torch.cuda.device_of(total):
        whitening.total_kernel[(1,)](moments, slots, total, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return advantages, returns, rewards, kl, total


# Arguments that only some calls have.
_ABSENT: dict[str, Any] = {
    **dict.fromkeys(("logprobs", "ref_logprobs", "scores", "kl", "moments", "maps")),
    **{"logprobs_stride": 0, "ref_stride": 0, "rewards_stride": 0, "kl_coef": 0.0},
    "ESTIMATOR": None,
}


def _launch(
    inputs: dict[str, Any],
    values: Tensor,
    mask: Tensor,
    bootstrap_values: Tensor | None,
    cu_seqlens: Tensor | None,
    config: GAEConfig,
    rates: Tensor | None,
    outputs: dict[str, Tensor],
) -> None:
    sequences, longest = _sizes(values, cu_seqlens)
    if values.numel() == 0:
        return
    most_blocks = triton.cdiv(longest, BLOCK) + 1
    values, mask = rows(values), mask_bytes(mask)
    arguments = {
        **_ABSENT,
        **inputs,
        **outputs,
        "values": values,
        "values_stride": values.stride(0),
        "mask": mask,
        "mask_stride": mask.stride(0),
        "bootstrap_values": None if bootstrap_values is None else vector(bootstrap_values),
        "cu_seqlens": cu_seqlens,
        "columns": longest,
        "most_blocks": most_blocks,
        "gamma": config.gamma,
        "lam": config.lam,
        "value_lam": config.value_lam,
        "rates": None if rates is None else vector(rates),
        "DECAY": config.masked == "decay",
        "SAME": rates is None and config.lam == config.value_lam,
        "BLOCK": BLOCK,
        "num_warps": NUM_WARPS,
    }
    kernel = kernels.advantages_kernel
    with torch.cuda.device_of(values):
        if not is_divided(sequences, most_blocks, processors(values.device)):
            kernel[(sequences,)](**arguments, STAGE=kernels.WALK)
            return
        arguments["maps"] = values.new_empty(_slots(values, cu_seqlens), kernels.MAP.value)
        for stage in (kernels.MAPS, kernels.APPLY):
            kernel[(sequences * most_blocks,)](**arguments, STAGE=stage)


def _sizes(series: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """Number of sequences, and the most places that one of them can have."""
    if cu_seqlens is None:
        return series.shape[0], series.shape[1]
    return cu_seqlens.numel() - 1, series.shape[0]


def _slots(series: Tensor, cu_seqlens: Tensor | None) -> int:
    """As many as `_first_slot` counts with."""
    return series.numel() // BLOCK + 2 * _sizes(series, cu_seqlens)[0]


def _like(series: Tensor) -> Tensor:
    return torch.empty(series.shape, dtype=torch.float32, device=series.device)
