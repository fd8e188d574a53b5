"""What is allocated and launched around the kernels of `ppo_loss`."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from rlhf_kernels.backends.triton import ppo_loss as kernels
from rlhf_kernels.backends.triton.ppo_divisor import count_kernel, divisor_kernel
from rlhf_kernels.backends.triton.ppo_sums import PARTIAL, finish_kernel
from rlhf_kernels.backends.triton.tensors import as_rows, is_aligned, mask_bytes, rows, vector
from rlhf_kernels.ppo_types import NUM_STATS, PPOLossConfig

BLOCK = 1024
NUM_WARPS = 4
# The last kernel holds this many rows of sums at once.
FINISH_BLOCK = 64
# Bytes of the mask that are counted at once, and by one program where sequences do not matter.
COUNT_BLOCK = 4096
COUNT_PART = 4 * COUNT_BLOCK


def ppo_loss_forward(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    config: PPOLossConfig,
    normalizer: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Loss [], statistics [NUM_STATS] and the gradients of logprobs, values and entropy."""
    series = {
        "logprobs": logprobs,
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "values": values,
        "old_values": None if config.value_clip_range is None else old_values,
        "returns": returns,
        "entropy": entropy,
        "ref_logprobs": ref_logprobs,
        "importance_weights": importance_weights,
    }
    present = {name: rows(x) for name, x in series.items() if x is not None}
    present["mask"] = mask_bytes(mask)
    loss = logprobs.new_empty((), dtype=torch.float32)
    stats = logprobs.new_empty(NUM_STATS, dtype=torch.float32)
    grads = [
        None if x is None else torch.empty(x.shape, dtype=torch.float32, device=x.device)
        for x in (logprobs, values, entropy)
    ]
    coefficients = {
        "value_coef": float(config.value_coef),
        "entropy_coef": float(config.entropy_coef),
        "kl_coef": float(config.kl_loss_coef),
    }
    with torch.cuda.device_of(logprobs):
        counts, divisor = _divisors(present["mask"], cu_seqlens, config.aggregation, normalizer)
        programs, places = _places(present, cu_seqlens, by_sequence=counts is not None)
        partials = logprobs.new_empty(programs, PARTIAL.value, dtype=torch.float32)
        if programs > 0:
            kernel = kernels.aligned_loss_kernel if places["ALIGNED"] else kernels.loss_kernel
            kernel[(programs,)](
                **_ABSENT | places,
                counts=counts,
                divisor=divisor,
                **_clips(config),
                **coefficients,
                **dict(zip(("grad_logprobs", "grad_values", "grad_entropy"), grads, strict=True)),
                partials=partials,
                ESTIMATOR=config.kl_loss_estimator,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )
        finish_kernel[(1,)](
            partials,
            programs,
            **coefficients,
            loss=loss,
            stats=stats,
            BLOCK=FINISH_BLOCK,
            num_warps=NUM_WARPS,
        )
    grad_logprobs, grad_values, grad_entropy = grads
    assert grad_logprobs is not None
    return loss, stats, grad_logprobs, grad_values, grad_entropy


_OPTIONAL = ("values", "old_values", "returns", "entropy", "ref_logprobs", "importance_weights")
_ABSENT: dict[str, Any] = {
    **dict.fromkeys(_OPTIONAL),
    **dict.fromkeys((f"{name}_stride" for name in _OPTIONAL), 0),
}


def _clips(config: PPOLossConfig) -> dict[str, float]:
    high = config.clip_range if config.clip_range_high is None else config.clip_range_high
    limit = config.value_clip_range
    return {
        "low": 1.0 - config.clip_range,
        "high": 1.0 + high,
        "dual_clip": math.inf if config.dual_clip is None else float(config.dual_clip),
        "value_clip_range": math.inf if limit is None else float(limit),
    }


def _divisors(
    mask: Tensor, cu_seqlens: Tensor | None, aggregation: str, normalizer: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """The valid tokens of each sequence, where its mean is taken; what the sum is divided by."""
    by_token, by_sequence = aggregation == "token-mean", aggregation == "seq-mean-token-mean"
    if normalizer is not None and not by_sequence:
        return None, vector(normalizer)
    (mask,) = as_rows(mask) if by_token else (mask,)
    columns = mask.shape[-1]
    if by_token or cu_seqlens is None:
        cu_seqlens = None
        number, part = mask.shape[0], COUNT_PART if by_token else max(columns, 1)
    else:
        number, part = cu_seqlens.numel() - 1, columns
    parts = triton.cdiv(columns, part) if by_token else 1
    counts = torch.empty(number * parts, dtype=torch.int32, device=mask.device)
    if len(counts) > 0:
        count_kernel[(len(counts),)](
            *(mask, mask.stride(0), cu_seqlens, columns, part, parts, counts),
            BLOCK=COUNT_BLOCK,
            num_warps=NUM_WARPS,
        )
    if normalizer is None:
        divisor = torch.empty(1, dtype=torch.float32, device=mask.device)
        divisor_kernel[(1,)](
            counts, len(counts), divisor, TOKENS=by_token, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
    else:
        divisor = vector(normalizer)
    return counts if by_sequence else None, divisor


def _places(
    present: dict[str, Tensor], cu_seqlens: Tensor | None, by_sequence: bool
) -> tuple[int, dict[str, Any]]:
    """The number of programs, and what says where each finds its tokens.

    All tokens are one row where no series has gaps, unless packed sequences must be told apart.
    """
    some = present["mask"]
    arguments: dict[str, Any] = {"cu_seqlens": cu_seqlens if by_sequence else None}
    if arguments["cu_seqlens"] is None:
        arguments["sequence_columns"] = max(some.shape[-1], 1)
        present = dict(zip(present, as_rows(*present.values()), strict=True))
        sequences, columns = present["mask"].shape
        blocks = triton.cdiv(columns, BLOCK)
        programs = sequences * blocks
        arguments["ALIGNED"] = all(is_aligned(x) for x in present.values())
    else:
        arguments["sequence_columns"] = 2**31 - 1
        sequences, columns, blocks = len(arguments["cu_seqlens"]) - 1, 0, 0
        programs = some.numel() // BLOCK + sequences if some.numel() else 0
        arguments["ALIGNED"] = False
    arguments |= {"sequences": sequences, "columns": columns, "blocks": blocks}
    arguments |= {f"{name}_stride": x.stride(0) for name, x in present.items()}
    return programs, present | arguments
