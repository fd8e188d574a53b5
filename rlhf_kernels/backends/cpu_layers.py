"""The cpu backend's layers of Llama-like transformers: see `cpu.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_kernels.backends.addresses import address, as_rows, series, unit_columns, vector
from rlhf_kernels.backends.cpu_extension import ELEMENT_TYPES, empty, in_huge_pages
from rlhf_kernels.backends.cpu_extension import extension as _cpu


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
    return x.data_ptr(), ELEMENT_TYPES[x.dtype], sequence, head, step


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


def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Output [B, heads, size] of one query a row against keys [B, kv_heads, keys, size]."""
    out = empty(query.shape, query.dtype)
    if out.numel() > 0:
        rows, kv_heads, keys, size = key.shape
        steps, key, value = unit_columns(query).unsqueeze(2), unit_columns(key), unit_columns(value)
        mask = None if mask is None else unit_columns(mask)
        _cpu.cached_attention(
            (rows, kv_heads, query.shape[1] // kv_heads, keys, size),
            *map(_heads, (steps, key, value)),
            series(mask),
            scale,
            out.data_ptr(),
            torch.get_num_threads(),
        )
    return out


def _heads_of_tokens(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _attention_settings(
    query: Tensor, key: Tensor, scale: float
) -> tuple[int, int, int, int, float]:
    return query.shape[1], key.shape[1], query.shape[2], ELEMENT_TYPES[query.dtype], scale


def _rows(x: Tensor) -> tuple[int, int, int, int, int]:
    """What the extension takes for `as_rows`."""
    columns = x.shape[-1]
    stride = columns if x.is_contiguous() else x.stride(0)
    return x.data_ptr(), ELEMENT_TYPES[x.dtype], x.numel() // columns, columns, stride
