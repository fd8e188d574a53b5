"""The C++ kernels for CPU tensors: allocation and addresses around `rlhf_kernels._cpu`.

Compiled for several instruction sets; the best that the machine runs is used, or the one that the
environment variable RLHF_KERNELS_CPU_ISA names (baseline, avx2 or avx512).
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import checks
from rlhf_kernels.backends import addresses, reference
from rlhf_kernels.backends.addresses import address, as_rows, float_rows, unit_columns, vector
from rlhf_kernels.ppo_types import (
    KL_ESTIMATORS,
    MASKED_STEPS,
    NUM_STATS,
    GAEConfig,
    PPOLossConfig,
)

NAME = "cpu"
PRIMITIVES = frozenset(
    {
        "token_logprobs_forward",
        "token_logprobs_backward",
        "gae_forward",
        "rollout_forward",
        "moments",
        "whiten",
        "ppo_loss_forward",
        "swiglu_forward",
        "swiglu_backward",
        "rms_norm_forward",
        "rms_norm_backward",
        "rotary",
        "row_attention_forward",
        "row_attention_backward",
    }
)
ADAMW_8BIT_BLOCK = 256  # numbers with a scale
ISA_VARIABLE = "RLHF_KERNELS_CPU_ISA"

_ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# The C library gives allocations of this size back to the system when they are freed, so each new
# one starts out without memory pages.
_FRESH_PAGES_BYTES = 32 * 2**20


def _load() -> tuple[Any, str | None]:
    """The extension module, or why it cannot be used."""
    try:
        import rlhf_kernels._cpu as extension
    except ImportError as error:
        return None, _why_missing(error)
    requested = os.environ.get(ISA_VARIABLE)
    if requested:
        try:
            extension.use_isa(requested)
        except ValueError as error:
            return None, f"{ISA_VARIABLE}: {error}"
    return extension, None


def _why_missing(error: ImportError) -> str:
    try:
        from rlhf_kernels._build_info import CPU_MISSING
    except ImportError:
        return f"rlhf_kernels._cpu is not built (run `pip install -e .` in the checkout): {error}"
    return CPU_MISSING or f"rlhf_kernels._cpu cannot be loaded: {error}"


_cpu, _unavailable = _load()


def availability() -> str | None:
    """None where the kernels can be used, else the reason."""
    return _unavailable


def describe() -> str:
    """For `rlhf_kernels.info`: the instruction set in use, among those that would run."""
    return f"C++, {_cpu.isa()} code (this machine runs {', '.join(_cpu.isas())})"


def in_huge_pages(new: Tensor) -> Tensor:
    """A tensor whose memory has not been touched; a large one will be given huge pages.

    That spares a fault for every 4 kB of it. Without the extension, or elsewhere, it does nothing.
    """
    if _cpu is not None and new.device.type == "cpu" and new.nbytes > _FRESH_PAGES_BYTES:
        _cpu.ask_for_huge_pages(new.data_ptr(), new.nbytes)
    return new


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new tensor for the C++ to fill: on the CPU, whatever PyTorch's default device is."""
    return torch.empty(shape, dtype=dtype, device="cpu")


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
        _ELEMENT_TYPES[logits.dtype],
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
        fresh = out.nbytes > _FRESH_PAGES_BYTES
    bad = _cpu.token_logprobs_backward(
        logits.data_ptr(),
        _ELEMENT_TYPES[logits.dtype],
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


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up of tensors [..., N]."""
    hidden = in_huge_pages(empty(gate.shape, gate.dtype))
    if hidden.numel() > 0:
        gate, up = as_rows(gate), as_rows(up)
        _cpu.swiglu_forward(_rows(gate), _rows(up), hidden.data_ptr(), torch.get_num_threads())
    return hidden


def swiglu_backward(
    gate: Tensor, up: Tensor, grad_hidden: Tensor, need_hidden: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of gate and up [..., N], and silu(gate)·up again (or None)."""
    grad_gate, grad_up = (in_huge_pages(empty(gate.shape, gate.dtype)) for _ in range(2))
    hidden = in_huge_pages(empty(gate.shape, gate.dtype)) if need_hidden else None
    if gate.numel() > 0:
        gate, up, grad_hidden = as_rows(gate), as_rows(up), as_rows(grad_hidden)
        _cpu.swiglu_backward(
            *map(_rows, (gate, up, grad_hidden)),
            grad_gate.data_ptr(),
            grad_up.data_ptr(),
            address(hidden),
            torch.get_num_threads(),
        )
    return grad_gate, grad_up, hidden


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x·rstd·weight [..., N], and rstd = rsqrt(mean(x²) + eps) [rows]."""
    out = in_huge_pages(empty(x.shape, x.dtype))
    rstd = empty((math.prod(x.shape[:-1]),), torch.float32)
    if x.numel() > 0:
        x, weight = as_rows(x), vector(weight)
        _cpu.rms_norm_forward(
            _rows(x),
            weight.data_ptr(),
            eps,
            out.data_ptr(),
            rstd.data_ptr(),
            torch.get_num_threads(),
        )
    return out, rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, need_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x [..., N] and of the weight [N] (or None), rstd as the forward gave it."""
    grad_x = in_huge_pages(empty(x.shape, x.dtype))
    grad_weight = empty(weight.shape, torch.float32) if need_weight else None
    if x.numel() > 0:
        grad, x, wide = as_rows(grad), as_rows(x), vector(weight)
        _cpu.rms_norm_backward(
            _rows(grad),
            _rows(x),
            wide.data_ptr(),
            rstd.data_ptr(),
            grad_x.data_ptr(),
            address(grad_weight),
            torch.get_num_threads(),
        )
    elif grad_weight is not None:
        grad_weight.zero_()
    return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, adjoint: bool, out: Tensor) -> Tensor:
    """x·cos + rotate_half(x)·sin of x [B, H, T, D] into `out`, or the adjoint: a gradient's."""
    if x.numel() > 0:
        x, cos, sin = unit_columns(x), *_rotary_tables(x, cos, sin)
        _cpu.rotary(
            tuple(x.shape),
            *map(_heads, (x, cos, sin, out)),
            adjoint,
            torch.get_num_threads(),
        )
    return out


def _rotary_tables(x: Tensor, *tables: Tensor) -> list[Tensor]:
    """Both as [B, 1, T, D], of the type of x where they are, else of float32."""
    same = all(table.dtype == x.dtype for table in tables)
    dtype = x.dtype if same else torch.float32
    return [
        unit_columns(table.to(dtype)).expand(x.shape[0], -1, -1).unsqueeze(1) for table in tables
    ]


def _heads(x: Tensor) -> tuple[int, int, int, int, int]:
    """What the extension takes for [B, H, T, D] whose last dimension has no gaps."""
    sequence, head, step, _ = x.stride()
    return x.data_ptr(), _ELEMENT_TYPES[x.dtype], sequence, head, step


def row_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_starts: Tensor,
    scale: float,
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output [tokens, heads, size], log-sum-exps [tokens, heads], and in 16 bits, for the backward,
    the output in float32."""
    all_inputs = query, key, value = [unit_columns(x) for x in (query, key, value)]
    row_starts = row_starts.contiguous()
    out = empty(query.shape, query.dtype)
    rounded = for_backward and out.dtype != torch.float32
    exact = empty(query.shape, torch.float32) if rounded else None
    log_sums = empty(query.shape[:2], torch.float32)
    _cpu.row_attention_forward(
        tuple(map(_heads_of_tokens, all_inputs)),
        _attention_settings(query, key, scale),
        (row_starts.numel() - 1, row_starts.data_ptr()),
        out.data_ptr(),
        address(exact),
        log_sums.data_ptr(),
        torch.get_num_threads(),
    )
    return out, log_sums, exact


def row_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_starts: Tensor,
    scale: float,
    exact: Tensor,
    log_sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, contiguous. exact: the output in float32."""
    all_inputs = query, key, value = [unit_columns(x) for x in (query, key, value)]
    row_starts = row_starts.contiguous()
    grad_out = unit_columns(grad_out.to(query.dtype))
    exact, log_sums = vector(exact), vector(log_sums)
    grads = [empty(x.shape, x.dtype) for x in all_inputs]
    _cpu.row_attention_backward(
        tuple(map(_heads_of_tokens, all_inputs)),
        _attention_settings(query, key, scale),
        (row_starts.numel() - 1, row_starts.data_ptr()),
        _heads_of_tokens(grad_out),
        exact.data_ptr(),
        log_sums.data_ptr(),
        *(grad.data_ptr() for grad in grads),
        torch.get_num_threads(),
    )
    return grads[0], grads[1], grads[2]


def _heads_of_tokens(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _attention_settings(
    query: Tensor, key: Tensor, scale: float
) -> tuple[int, int, int, int, float]:
    return query.shape[1], key.shape[1], query.shape[2], _ELEMENT_TYPES[query.dtype], scale


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


def _check_vector(tensor: Tensor, size: int, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tensor.shape != (size,):
        found = f"{tensor.dtype} of shape {list(tensor.shape)}"
        raise ValueError(f"{size} numbers of {dtype} are needed, not {found}")


def _rows(x: Tensor) -> tuple[int, int, int, int, int]:
    """What the extension takes for `as_rows`."""
    columns = x.shape[-1]
    stride = columns if x.is_contiguous() else x.stride(0)
    return x.data_ptr(), _ELEMENT_TYPES[x.dtype], x.numel() // columns, columns, stride


def _temperature(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    if isinstance(temperature, Tensor):
        return vector(temperature), 1.0
    return None, temperature
