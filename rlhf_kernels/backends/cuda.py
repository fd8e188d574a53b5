"""The CUDA kernels for GPU tensors: allocation and launches around `rlhf_kernels._cuda`.

They run on PyTorch's current stream, allocate nothing and wait for nothing, so a CUDA graph can
capture them. No GPU has confirmed them yet, so this backend must be asked for by name.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.backends import addresses
from rlhf_kernels.backends.addresses import address, float_rows, unit_columns, vector
from rlhf_kernels.backends.missing import why_missing
from rlhf_kernels.ppo_types import (
    KL_ESTIMATORS,
    MASKED_STEPS,
    NUM_STATS,
    GAEConfig,
    PPOLossConfig,
)

NAME = "cuda"
PRIMITIVES = frozenset({"gae_forward", "rollout_forward", "moments", "whiten", "ppo_loss_forward"})

# Blocks of one multiprocessor that keep its memory pipes busy.
BLOCKS_PER_PROCESSOR = 2
# Shorter sequences are not divided: two more launches cost as much as some chunks in a row.
FEWEST_CHUNKS_TO_DIVIDE = 8


def _load() -> tuple[Any, str | None]:
    """The extension module, or why it cannot be used."""
    try:
        import rlhf_kernels._cuda as extension
    except ImportError as error:
        return None, why_missing("_cuda", error)
    return extension, None


_cuda, _unavailable = _load()


def availability() -> str | None:
    """None where the kernels can be used, else the reason."""
    if _unavailable is not None:
        return _unavailable
    driver, needed = _cuda.driver_version(), _cuda.RUNTIME_VERSION
    if driver == 0 or not torch.cuda.is_available():
        return "no GPU was found; its kernels take tensors on an NVIDIA GPU (cuda) alone"
    if driver // 1000 < needed // 1000:
        return (
            f"the GPU's driver supports CUDA {_version(driver)}, and the kernels were built with "
            f"{_version(needed)}; install a newer driver, or build with an older nvcc (CUDA_HOME)"
        )
    return None


def describe() -> str:
    """For `rlhf_kernels.info`: what built the kernels."""
    return f"CUDA {_version(_cuda.RUNTIME_VERSION)}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


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
    advantages, returns = (_new(values, *values.shape) for _ in range(2))
    bootstrap = None if bootstrap_values is None else vector(bootstrap_values)
    rates = None if rates is None else vector(rates)
    series = [float_rows(x) for x in (rewards, values)]
    mask = unit_columns(mask)
    all_sequences = addresses.sequences(values, cu_seqlens)
    parts, *scratch = _parts(all_sequences, values)
    with torch.cuda.device_of(values):
        _cuda.gae(
            all_sequences,
            *map(addresses.series, series),
            addresses.series(mask),
            address(bootstrap),
            addresses.gae_rates(config, rates),
            MASKED_STEPS.index(config.masked),
            advantages.data_ptr(),
            returns.data_ptr(),
            (parts, *map(address, scratch)),
            _stream(values),
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
    advantages, returns, rewards, kl = (_new(values, *values.shape) for _ in range(4))
    scores = vector(scores)
    bootstrap = None if bootstrap_values is None else vector(bootstrap_values)
    rates = None if rates is None else vector(rates)
    series = [float_rows(x) for x in (logprobs, ref_logprobs, values)]
    mask = unit_columns(mask)
    all_sequences = addresses.sequences(values, cu_seqlens)
    parts, *scratch = _parts(all_sequences, values)
    total = _new(values, 3, dtype=torch.float64)
    part_moments = _new(values, all_sequences[0] * parts, 3, dtype=torch.float64)
    with torch.cuda.device_of(values):
        _cuda.rollout(
            all_sequences,
            scores.data_ptr(),
            *map(addresses.series, series),
            addresses.series(mask),
            address(bootstrap),
            kl_coef,
            KL_ESTIMATORS.index(kl_estimator),
            addresses.gae_rates(config, rates),
            MASKED_STEPS.index(config.masked),
            *map(address, (advantages, returns, rewards, kl, total, part_moments)),
            (parts, *map(address, scratch)),
            _stream(values),
        )
    return advantages, returns, rewards, kl, total


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """Number, mean, and sum of squared deviations [3] of the valid places, in float64."""
    total = _new(x, 3, dtype=torch.float64)
    scratch = _new(x, _cuda.MOST_BLOCKS, 3, dtype=torch.float64)
    rows, valid = _as_grid(x, mask)
    with torch.cuda.device_of(x):
        _cuda.moments(
            addresses.series(rows),
            addresses.series(valid),
            *rows.shape,
            total.data_ptr(),
            scratch.data_ptr(),
            _stream(x),
        )
    return total


def whiten(x: Tensor, mask: Tensor, total: Tensor, shift_mean: bool, eps: float) -> Tensor:
    """(x - mean)/sqrt(var + eps) by the moments of all ranks; any shape."""
    out = _new(x, *x.shape)
    rows, valid = _as_grid(x, mask)
    total = total.contiguous()
    with torch.cuda.device_of(x):
        _cuda.whiten(
            addresses.series(rows),
            addresses.series(valid),
            *rows.shape,
            total.data_ptr(),
            shift_mean,
            eps,
            out.data_ptr(),
            _stream(x),
        )
    return out


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
    if values is not None and config.value_clip_range is None:
        old_values = values  # takes no part: every step from it is inside an infinite range
    policy = (logprobs, old_logprobs, advantages)
    of_values = (values, old_values, returns)
    others = (entropy, ref_logprobs, importance_weights)
    series = [None if x is None else float_rows(x) for x in (*policy, *of_values, *others)]
    mask = unit_columns(mask)
    normalizer = None if normalizer is None else vector(normalizer)
    all_sequences = addresses.sequences(logprobs, cu_seqlens)
    scratch = _ppo_scratch(logprobs, all_sequences[0], config, normalizer)
    loss, stats, grad_logprobs = (_new(logprobs, *s) for s in ((), (NUM_STATS,), logprobs.shape))
    grad_values = None if values is None else _new(logprobs, *logprobs.shape)
    grad_entropy = None if entropy is None else _new(logprobs, *logprobs.shape)
    with torch.cuda.device_of(logprobs):
        _cuda.ppo_loss(
            all_sequences,
            logprobs.numel(),
            [*map(addresses.series, series), addresses.series(mask)],
            addresses.clipping(config),
            addresses.weighing(config),
            address(normalizer),
            *map(address, (loss, stats, grad_logprobs, grad_values, grad_entropy)),
            tuple(map(address, scratch)),
            _stream(logprobs),
        )
    return loss, stats, grad_logprobs, grad_values, grad_entropy


def _new(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def parts_of_sequences(sequences: int, places: int, processors: int) -> int:
    """Among how many blocks to divide each sequence: few long ones fill a GPU too."""
    if sequences == 0:
        return 1
    chunks = -(-places // (sequences * _cuda.CHUNK))  # of one of them, on average
    wanted = BLOCKS_PER_PROCESSOR * processors // sequences
    return 1 if chunks < FEWEST_CHUNKS_TO_DIVIDE else max(1, min(wanted, chunks))


def _parts(
    sequences: tuple[int, int, int], like: Tensor
) -> tuple[int, Tensor | None, Tensor | None]:
    """The parts of a sequence, and scratch for the counts and the sums of all chunks."""
    count, columns, packed = sequences
    parts = parts_of_sequences(count, like.numel(), _processors(like.device))
    if parts == 1:
        return 1, None, None
    chunks = (
        like.numel() // _cuda.CHUNK + count + 1 if packed else count * -(-columns // _cuda.CHUNK)
    )
    return parts, _new(like, chunks, dtype=torch.int32), _new(like, chunks, 2)


def _as_grid(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [rows, columns]."""
    columns = x.shape[-1] if x.dim() > 0 else 1
    rows = x.numel() // max(columns, 1)
    return float_rows(x.reshape(rows, columns)), unit_columns(mask.reshape(rows, columns))


def _ppo_scratch(
    like: Tensor, sequences: int, config: PPOLossConfig, normalizer: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """For the valid tokens and the weights of sequences, where they are needed, and for sums."""
    partials = _new(like, _cuda.MOST_BLOCKS, _cuda.PPO_PARTIAL, dtype=torch.float64)
    by_length = config.aggregation == "seq-mean-token-mean"
    if normalizer is not None and not by_length:
        return None, None, partials
    counts = _new(like, sequences, dtype=torch.int32)
    # At least one: the kernels know that there are weights by their address.
    return counts, _new(like, max(sequences, 1) if by_length else 1), partials
