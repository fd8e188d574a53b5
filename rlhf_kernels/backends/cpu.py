"""The C++ kernels for CPU tensors: allocation and addresses around `rlhf_kernels._cpu`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.backends import addresses, reference
from rlhf_kernels.backends.addresses import address, float_rows, unit_columns, vector
from rlhf_kernels.backends.cpu_extension import (
    ELEMENT_TYPES,
    FRESH_PAGES_BYTES,
    availability,
    describe,
    empty,
)
from rlhf_kernels.backends.cpu_extension import extension as _cpu
from rlhf_kernels.backends.cpu_layers import (
    cached_attention,
    rms_norm_backward,
    rms_norm_forward,
    rotary,
    row_attention_backward,
    row_attention_forward,
    swiglu_backward,
    swiglu_forward,
)
from rlhf_kernels.ppo_types import (
    KL_ESTIMATORS,
    MASKED_STEPS,
    NUM_STATS,
    GAEConfig,
    PPOLossConfig,
)

__all__ = [
    "availability",
    "cached_attention",
    "describe",
    "rms_norm_backward",
    "rms_norm_forward",
    "rotary",
    "row_attention_backward",
    "row_attention_forward",
    "swiglu_backward",
    "swiglu_forward",
]

NAME = "cpu"
PRIMITIVES = frozenset(
    {
        "token_logprobs_forward",
        "token_logprobs_backward",
        "gae_forward",
        "rollout_forward",
        "moments",
        "whiten",
        "whitened_gae",
        "ppo_loss_forward",
        "swiglu_forward",
        "swiglu_backward",
        "rms_norm_forward",
        "rms_norm_backward",
        "rotary",
        "row_attention_forward",
        "row_attention_backward",
        "cached_attention",
    }
)
ADAMW_8BIT_BLOCK = 256  # numbers with a scale


def token_logprobs_forward(
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    need_entropy: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-probabilities [N], entropies [N] (or None), normalization [N, 2] of the rows of [N, V].

    The normalization of an ignored row is 0.
    """
    logits = unit_columns(logits)
    rows, columns = logits.shape
    targets = targets.contiguous()
    per_row, number = _temperature(temperature)
    logprobs = empty((rows,), torch.float32)
    normalization = empty((rows, 2), torch.float32)
    entropy = empty((rows,), torch.float32) if need_entropy else None
    bad = _cpu.token_logprobs_forward(
        logits.data_ptr(),
        ELEMENT_TYPES[logits.dtype],
        rows,
        columns,
        logits.stride(0),
        targets.data_ptr(),
        address(per_row),
        number,
        ignore_index,
        logprobs.data_ptr(),
        address(entropy),
        normalization.data_ptr(),
        torch.get_num_threads(),
    )
    if bad >= 0:
        checks.targets_in_range(targets, columns, ignore_index)
    return logprobs, entropy, normalization


def token_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    ignore_index: int,
    normalization: Tensor,
    entropy: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient [N, V] of the logits, in their dtype; `out` may be `logits` itself."""
    if out is not None and out.shape[1] > 1 and out.stride(1) != 1:
        raise ValueError(f"out has strides {out.stride()}; expected columns side by side")
    logits = unit_columns(logits)
    rows, columns = logits.shape
    targets = targets.contiguous()
    per_row, number = _temperature(temperature)
    grad_logprobs = vector(grad_logprobs)
    grad_entropy = None if grad_entropy is None else vector(grad_entropy)
    entropy = None if entropy is None else vector(entropy)
    normalization = vector(normalization)
    fresh = False
    if out is None:
        out = empty(logits.shape, logits.dtype)
        fresh = out.nbytes > FRESH_PAGES_BYTES
    bad = _cpu.token_logprobs_backward(
        logits.data_ptr(),
        ELEMENT_TYPES[logits.dtype],
        rows,
        columns,
        logits.stride(0),
        targets.data_ptr(),
        address(per_row),
        number,
        ignore_index,
        normalization.data_ptr(),
        address(entropy),
        grad_logprobs.data_ptr(),
        address(grad_entropy),
        out.data_ptr(),
        out.stride(0),
        fresh,
        torch.get_num_threads(),
    )
    if bad >= 0:
        checks.targets_in_range(targets, columns, ignore_index)
    return out


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
    advantages, returns = (empty(values.shape, torch.float32) for _ in range(2))
    bootstrap = None if bootstrap_values is None else vector(bootstrap_values)
    rates = None if rates is None else vector(rates)
    series = [float_rows(x) for x in (rewards, values)]
    mask = unit_columns(mask)
    _cpu.gae(
        addresses.sequences(values, cu_seqlens),
        *map(addresses.series, series),
        addresses.series(mask),
        address(bootstrap),
        addresses.gae_rates(config, rates),
        MASKED_STEPS.index(config.masked),
        advantages.data_ptr(),
        returns.data_ptr(),
        torch.get_num_threads(),
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
    outputs = [empty(values.shape, torch.float32) for _ in range(4)]
    moments = empty((3,), torch.float64)
    scores = vector(scores)
    bootstrap = None if bootstrap_values is None else vector(bootstrap_values)
    rates = None if rates is None else vector(rates)
    series = [float_rows(x) for x in (logprobs, ref_logprobs, values)]
    mask = unit_columns(mask)
    _cpu.rollout(
        addresses.sequences(values, cu_seqlens),
        scores.data_ptr(),
        *map(addresses.series, series),
        addresses.series(mask),
        address(bootstrap),
        kl_coef,
        KL_ESTIMATORS.index(kl_estimator),
        addresses.gae_rates(config, rates),
        MASKED_STEPS.index(config.masked),
        *(output.data_ptr() for output in outputs),
        moments.data_ptr(),
        torch.get_num_threads(),
    )
    advantages, returns, rewards, kl = outputs
    return advantages, returns, rewards, kl, moments


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """Number, mean, and sum of squared deviations [3] of the valid places, in float64."""
    total = empty((3,), torch.float64).zero_()
    if x.numel() == 0:
        return total
    rows, valid = _as_grid(x, mask)
    _cpu.moments(
        addresses.series(rows),
        addresses.series(valid),
        *rows.shape,
        total.data_ptr(),
        torch.get_num_threads(),
    )
    return total


def whiten(x: Tensor, mask: Tensor, total: Tensor, shift_mean: bool, eps: float) -> Tensor:
    """(x - mean)/sqrt(var + eps) by the moments of all ranks; any shape."""
    mean, variance = (float(number) for number in reference.mean_and_variance(total))
    out = empty(x.shape, torch.float32)
    if x.numel() == 0:
        return out
    rows, valid = _as_grid(x, mask)
    _cpu.whiten(
        addresses.series(rows),
        addresses.series(valid),
        *rows.shape,
        mean,
        1.0 / math.sqrt(variance + eps),
        0.0 if shift_mean else mean,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def whitened_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages and returns [B, T] (see `ops.whitened_gae`), and the advantages' `moments`."""
    rows, columns = rewards.shape
    advantages, returns = (empty((rows, columns), torch.float32) for _ in range(2))
    moments = empty((3,), torch.float64)
    rewards, values = float_rows(rewards), float_rows(values)
    wide = mask.dtype == torch.int64  # as a tokenizer's mask is: read as it stands
    mask = unit_columns(mask if wide else mask.bool())
    _cpu.whitened_gae(
        *map(addresses.series, (rewards, values, mask)),
        wide,
        rows,
        columns,
        gamma,
        lam,
        eps,
        advantages.data_ptr(),
        returns.data_ptr(),
        moments.data_ptr(),
        torch.get_num_threads(),
    )
    return advantages, returns, moments


def _as_grid(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [rows, columns], for any shape but an empty one."""
    columns = x.shape[-1] if x.dim() > 0 else 1
    return float_rows(x.reshape(-1, columns)), unit_columns(mask.reshape(-1, columns))


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
    shape = logprobs.shape
    if values is not None and config.value_clip_range is None:
        old_values = values  # takes no part: every step from it is inside an infinite range
    policy = (logprobs, old_logprobs, advantages)
    of_values = (values, old_values, returns)
    others = (entropy, ref_logprobs, importance_weights)
    series = [None if x is None else float_rows(x) for x in (*policy, *of_values, *others)]
    mask = unit_columns(mask)
    normalizer = None if normalizer is None else vector(normalizer)
    loss = empty((), torch.float32)
    stats = empty((NUM_STATS,), torch.float32)
    grad_logprobs = empty(shape, torch.float32)
    grad_values = None if values is None else empty(shape, torch.float32)
    grad_entropy = None if entropy is None else empty(shape, torch.float32)
    _cpu.ppo_loss(
        addresses.sequences(logprobs, cu_seqlens),
        logprobs.numel(),
        [*map(addresses.series, series), addresses.series(mask)],
        addresses.clipping(config),
        addresses.weighing(config),
        address(normalizer),
        loss.data_ptr(),
        stats.data_ptr(),
        grad_logprobs.data_ptr(),
        address(grad_values),
        address(grad_entropy),
        torch.get_num_threads(),
    )
    return loss, stats, grad_logprobs, grad_values, grad_entropy


def adamw_8bit(
    weights: Tensor,
    remainder: Tensor | None,
    gradient: Tensor,
    mean: Tensor,
    mean_scale: Tensor,
    square: Tensor,
    square_scale: Tensor,
    noise: Tensor,
    settings: tuple[float, ...],
) -> None:
    """A step of a slice of a parameter, in this thread: see `rlhf.engine.adamw_8bit`.

    No operation of the package, and no primitive of other backends. All are vectors without gaps;
    the noise may be longer than the slice.

    Raises:
        ValueError: One of them does not fit the others.
    """
    size, wide = weights.numel(), torch.float32 if remainder is None else torch.bfloat16
    numbers = [(weights, wide), (gradient, wide), (mean, torch.int8), (square, torch.uint8)]
    if remainder is not None:
        numbers.append((remainder, torch.int8))
    blocks = (size + ADAMW_8BIT_BLOCK - 1) // ADAMW_8BIT_BLOCK
    for tensor, dtype in numbers:
        _check_vector(tensor, size, dtype)
    for tensor in (mean_scale, square_scale):
        _check_vector(tensor, blocks, torch.float32)
    _cpu.adamw_8bit(
        size,
        weights.data_ptr(),
        address(remainder),
        gradient.data_ptr(),
        mean.data_ptr(),
        mean_scale.data_ptr(),
        square.data_ptr(),
        square_scale.data_ptr(),
        noise.data_ptr(),
        settings,
    )


def transposed(x: Tensor) -> Tensor:
    """x.t() of float32 [M, N] in an order of its own, [N, M] without gaps; no primitive either."""
    if x.dtype != torch.float32 or x.dim() != 2 or x.stride(1) != 1:
        return x.t().contiguous()
    out = x.new_empty(x.shape[1], x.shape[0])
    threads = torch.get_num_threads()
    _cpu.transpose(x.data_ptr(), *x.shape, x.stride(0), out.data_ptr(), threads)
    return out


def square_sum(x: Tensor) -> float:
    """The sum of all squares, each one rounded to float32, of a tensor without gaps; no primitive
    either."""
    threads = torch.get_num_threads()
    return _cpu.square_sum(x.data_ptr(), ELEMENT_TYPES[x.dtype], x.numel(), threads)


def _check_vector(tensor: Tensor, size: int, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tensor.shape != (size,):
        found = f"{tensor.dtype} of shape {list(tensor.shape)}"
        raise ValueError(f"{size} numbers of {dtype} are needed, not {found}")


def _temperature(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    if isinstance(temperature, Tensor):
        return vector(temperature), 1.0
    return None, temperature
